"""24 kHz waveform to the normalized log mel spectrogram that Voicebox and vocoder share."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import PaddingStrategy, TensorType, logging


logger = logging.get_logger(__name__)


class FlexiCodecMelFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Waveforms to normalized log mel spectrograms.

    Each clip is computed on its own, so its frames do not depend on the batch. A clip of N samples
    has N // `hop_length` frames.

    Args:
        feature_size (`int`, *optional*, defaults to 128):
            Number of mel bins.
        sampling_rate (`int`, *optional*, defaults to 24000):
            Sampling rate of the waveforms, in Hz.
        n_fft (`int`, *optional*, defaults to 1920):
            Size of the Fourier transform and of the Hann window, in samples.
        hop_length (`int`, *optional*, defaults to 480):
            Samples for each frame.
        mean (`float`, *optional*, defaults to -4.92):
            Mean of the log mels of the training data.
        variance (`float`, *optional*, defaults to 8.14):
            Variance of the log mels of the training data.
        padding_value (`float`, *optional*, defaults to 0.0):
            Value of padding frames, after normalization.
    """

    model_input_names = ["mel", "mel_mask"]

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 24_000,
        n_fft: int = 1920,
        hop_length: int = 480,
        mean: float = -4.92,
        variance: float = 8.14,
        padding_value: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.mean = mean
        self.variance = variance
        # Under this name the base class leaves it out of the JSON.
        self.mel_filters = mel_filter_bank(
            num_frequency_bins=n_fft // 2 + 1,
            num_mel_filters=feature_size,
            min_frequency=0.0,
            max_frequency=sampling_rate / 2,
            sampling_rate=sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        ).astype(np.float32)

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """Compute the spectrograms of one clip or several.

        Args:
            raw_speech (`np.ndarray`, `torch.Tensor`, `list[float]`, or a list of such clips):
                Mono waveforms in [-1, 1], each one-dimensional.
            sampling_rate (`int`, *optional*):
                Their sampling rate in Hz. It must be the one of the extractor, so that a wrong rate
                is an error.
            padding (`bool` or `str`, *optional*, defaults to `True`):
                `True` or `"longest"` pads to the longest clip, `"max_length"` to `max_length`,
                `False` not at all.
            max_length (`int`, *optional*):
                Length to pad to, in frames.
            pad_to_multiple_of (`int`, *optional*):
                Pad to a multiple of that many frames.
            return_tensors (`str`, *optional*):
                `"pt"` or `"np"`.

        Returns:
            [`BatchFeature`]: `mel` of shape `(batch_size, num_frames, feature_size)` in float32,
            and `mel_mask` of shape `(batch_size, num_frames)`, 1 for frames and 0 for padding.

        Raises:
            ValueError: A different sampling rate, or a clip that is not mono or shorter than 30 ms.
        """
        if sampling_rate is None:
            logger.warning_once(
                f"`sampling_rate` was not given, so {self.sampling_rate} Hz are assumed. Pass it to "
                "turn a wrong rate into an error."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` is {sampling_rate}, but the spectrogram is defined at {self.sampling_rate} Hz: "
                "resample the clip first."
            )
        is_batch = isinstance(raw_speech, (list, tuple)) and len(raw_speech) > 0 and np.ndim(raw_speech[0]) > 0
        clips = [
            torch.as_tensor(clip, dtype=torch.float32).cpu() for clip in (raw_speech if is_batch else [raw_speech])
        ]
        features = self.pad(
            BatchFeature({"mel": [self._log_mel(clip, item).numpy() for item, clip in enumerate(clips)]}),
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors=return_tensors,
        )
        features["mel_mask"] = features.pop("attention_mask")
        return features

    def _log_mel(self, clip: torch.Tensor, item: int) -> torch.Tensor:
        overhang = (self.n_fft - self.hop_length) // 2
        if clip.ndim != 1:
            raise ValueError(
                f"Clip {item} of `raw_speech` has shape {tuple(clip.shape)}, expected one dimension: pass mono clips, "
                "several of them as a list."
            )
        if len(clip) <= overhang:
            raise ValueError(
                f"Clip {item} of `raw_speech` has {len(clip)} samples, but must have more than {overhang} "
                f"({1000 * overhang / self.sampling_rate:.0f} ms): its ends are reflected."
            )
        # As in the reference: flexicodec 0.1.2, nar_tts/melspec.py, lines 73 to 100 and 21 to 22.
        reflected = F.pad(clip[None], (overhang, overhang), mode="reflect")[0]
        window = torch.hann_window(self.n_fft)
        spectrum = torch.stft(reflected, self.n_fft, self.hop_length, window=window, center=False, return_complex=True)
        magnitudes = (torch.view_as_real(spectrum).square().sum(dim=-1) + 1e-9).sqrt()
        mel = magnitudes.T @ torch.from_numpy(self.mel_filters)
        return (mel.clamp(min=1e-5).log() - self.mean) / self.variance**0.5


__all__ = ["FlexiCodecMelFeatureExtractor"]
