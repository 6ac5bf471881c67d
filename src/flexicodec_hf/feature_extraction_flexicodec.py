"""Feature extractor of FlexiCodec: waveforms, and filterbank features for the semantic encoder."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from os import PathLike
from typing import Any

import numpy as np
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import PaddingStrategy, TensorType, is_torch_available, logging

from .compatibility_flexicodec import is_number
from .release_flexicodec import FlexiCodecReleaseMixin


if is_torch_available():
    import torch


logger = logging.get_logger(__name__)

# Frames whose spectra are computed at once: few enough for a processor's cache and for bounded memory.
_FRAMES_PER_BLOCK = 512

# A larger peak is not audio in [-1, 1] that overshoots, but integer PCM without scaling.
_LARGEST_PEAK = 100.0


class FlexiCodecFeatureExtractor(FlexiCodecReleaseMixin, SequenceFeatureExtractor):
    r"""
    Constructs a FlexiCodec feature extractor. It turns mono audio into the two inputs of
    [FlexiCodec](https://huggingface.co/papers/2510.00981): waveforms for the acoustic encoder, and
    filterbank features for the semantic encoder.

    This feature extractor inherits from [`SequenceFeatureExtractor`] which contains most of the main methods. Users
    should refer to this superclass for more information regarding those methods.

    The features are the log-mel filterbank of Kaldi (Hamming window, pre-emphasis 0.97, 20 Hz to the
    Nyquist frequency), in stacks of `num_stacked_frames` frames every `stack_stride` frames, normalized
    as `(x + cmvn_shift) * cmvn_scale` (flexicodec 0.1.2, feature_extractors.py, `FBankGen`). By default,
    a clip of `n` samples has `1 + (n - 400) // 160` frames, or one if it is shorter than a window. There
    is one stack per six frames, rounded up: 560 values every 60 ms.

    Args:
        feature_size (`int`, *optional*, defaults to 1):
            The number of channels of `input_values`. Only 1 is supported.
        sampling_rate (`int`, *optional*, defaults to 16000):
            The sampling rate of the audio in hertz (Hz).
        padding_value (`float`, *optional*, defaults to 0.0):
            The value that fills `input_values` and `input_features` beyond the end of a clip.
        num_mel_bins (`int`, *optional*, defaults to 80):
            The number of mel filters.
        frame_length_ms (`float`, *optional*, defaults to 25.0):
            The length of the analysis window in milliseconds. For a shorter clip, the window is as long as
            the clip.
        frame_shift_ms (`float`, *optional*, defaults to 10.0):
            The distance between windows in milliseconds.
        num_stacked_frames (`int`, *optional*, defaults to 7):
            The number of consecutive frames in one stack. The first and the last frame are repeated beyond
            the edges.
        stack_stride (`int`, *optional*, defaults to 6):
            The distance between stacks in frames.
        cmvn_shift (`list[float]`, *optional*):
            Values to add to the stacked features, of length `num_stacked_frames * num_mel_bins`. Without it
            and `cmvn_scale`, the features are not normalized.
        cmvn_scale (`list[float]`, *optional*):
            Values to multiply the shifted features by, of the same length.
        dither (`float`, *optional*, defaults to 0.0):
            The standard deviation of Gaussian noise added to every window, in units of 16-bit PCM. The
            original FlexiCodec uses 1.0, so its features and codes change from call to call (flexicodec 0.1.2,
            feature_extractors.py, through the default of `WavFrontend` of funasr).

    Example:

    ```python
    >>> import numpy as np
    >>> from flexicodec_hf import FlexiCodecFeatureExtractor

    >>> feature_extractor = FlexiCodecFeatureExtractor()
    >>> audio = 0.1 * np.sin(np.arange(16_000))
    >>> inputs = feature_extractor(audio, sampling_rate=16_000, return_tensors="pt")
    >>> inputs.input_values.shape, inputs.input_features.shape
    (torch.Size([1, 1, 16000]), torch.Size([1, 17, 560]))
    ```
    """

    model_input_names = ["input_values", "padding_mask", "input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        num_mel_bins: int = 80,
        frame_length_ms: float = 25.0,
        frame_shift_ms: float = 10.0,
        num_stacked_frames: int = 7,
        stack_stride: int = 6,
        cmvn_shift: Sequence[float] | None = None,
        cmvn_scale: Sequence[float] | None = None,
        dither: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        if feature_size != 1:
            raise ValueError(f"`feature_size` must be 1, because FlexiCodec works on mono audio, got {feature_size}.")
        if self.padding_side != "right":
            raise ValueError(f"`padding_side` must be 'right' for FlexiCodec, got {self.padding_side!r}.")
        self.num_mel_bins = num_mel_bins
        self.frame_length_ms = frame_length_ms
        self.frame_shift_ms = frame_shift_ms
        self.num_stacked_frames = num_stacked_frames
        self.stack_stride = stack_stride
        self.dither = dither

        if (cmvn_shift is None) != (cmvn_scale is None):
            missing = "cmvn_shift" if cmvn_shift is None else "cmvn_scale"
            raise ValueError(f"`cmvn_shift` and `cmvn_scale` belong together, but `{missing}` is missing.")
        self.cmvn_shift = self._checked_cmvn("cmvn_shift", cmvn_shift)
        self.cmvn_scale = self._checked_cmvn("cmvn_scale", cmvn_scale)

    @property
    def frame_length(self) -> int:
        """The length of the analysis window in samples."""
        return round(self.sampling_rate * self.frame_length_ms / 1000)

    @property
    def frame_shift(self) -> int:
        """The distance between analysis windows in samples."""
        return round(self.sampling_rate * self.frame_shift_ms / 1000)

    def __call__(
        self,
        audio: np.ndarray
        | torch.Tensor
        | list[float]
        | list[np.ndarray]
        | list[torch.Tensor]
        | list[list[float]]
        | None = None,
        sampling_rate: int | None = None,
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        downmix: bool = False,
        return_tensors: str | TensorType | None = None,
        device: str | torch.device = "cpu",
        generator: torch.Generator | None = None,
        raw_audio: Any = None,
    ) -> BatchFeature:
        """
        Prepare one or several clips for the model. The result for a clip does not depend on the other clips.

        Args:
            audio (`np.ndarray`, `torch.Tensor`, `list[float]`, or a `list` of such clips):
                A clip, or a list of clips. A clip is an array, a tensor or a list of floats in [-1, 1] of
                shape `(num_samples,)` or `(1, num_samples)`, or `(num_channels, num_samples)` with
                `downmix=True`, with at least one sample.
            sampling_rate (`int`, *optional*):
                The sampling rate of `audio`. Pass it, so that audio at a wrong rate raises an error.
            padding (`bool`, `str` or [`~utils.PaddingStrategy`], *optional*, defaults to `True`):
                How to pad the clips on the right:

                - `True` or `'longest'`: to the length of the longest clip.
                - `'max_length'`: to `max_length` samples.
                - `False` or `'do_not_pad'`: not at all. Clips of different lengths then need
                  `return_tensors=None`.
            max_length (`int`, *optional*):
                The largest number of samples of a clip. A longer clip is an error, unless `truncation` is set.
            truncation (`bool`, *optional*, defaults to `False`):
                Whether to cut clips longer than `max_length`, before their features are computed.
            pad_to_multiple_of (`int`, *optional*):
                If set, pads the clips to the next multiple of this number of samples.
            downmix (`bool`, *optional*, defaults to `False`):
                Whether to average the channels of a clip. Without it, a clip with several channels is an error.
            return_tensors (`str` or [`~utils.TensorType`], *optional*):
                `'pt'` returns batched tensors on `device`, `'np'` batched arrays, `None` lists with one array per
                clip.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where the features are computed.
            generator (`torch.Generator`, *optional*):
                The source of the dither's noise, drawn on the generator's device.
            raw_audio (*optional*):
                Another name of `audio`, which the feature extractors of other codecs use.

        Returns:
            [`BatchFeature`] with

            - **input_values** (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)`) -- The waveforms.
            - **padding_mask** (`torch.IntTensor` of shape `(batch_size, num_samples)`) -- 1 for samples, 0 for
              padding.
            - **input_features** (`torch.FloatTensor` of shape
              `(batch_size, num_stacks, num_stacked_frames * num_mel_bins)`) -- The features.
            - **input_features_mask** (`torch.IntTensor` of shape `(batch_size, num_stacks)`) -- 1 for stacks, 0 for
              padding.

        Raises:
            ValueError: `audio` is empty, is not made of finite floats in [-1, 1], has another shape or another
                sampling rate, or is longer than `max_length` without `truncation`; or the padding arguments do not
                fit together.
        """
        if raw_audio is not None:
            if audio is not None:
                raise ValueError("`raw_audio` is another name of `audio`: pass the clips under one of the two.")
            audio = raw_audio
        if sampling_rate is None:
            logger.warning_once(
                f"It is strongly recommended to pass the `sampling_rate` argument to `{type(self).__name__}()`. "
                "Failing to do so can result in silent errors that might be hard to debug."
            )
        elif np.ndim(sampling_rate) or isinstance(sampling_rate, bool) or sampling_rate != self.sampling_rate:
            raise ValueError(
                f"`sampling_rate` is {sampling_rate}, but this feature extractor works at {self.sampling_rate} Hz: "
                f"resample the audio to {self.sampling_rate} Hz."
            )

        strategy = self._get_padding_strategies(padding=padding, max_length=max_length)
        value: Any
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and not (is_number(value, whole=True) and 1 <= value < 2**31):
                raise ValueError(
                    f"`{name}` must be a whole number of samples, at least one and below 2**31, got {value!r}."
                )
        if truncation and max_length is None:
            raise ValueError("`truncation=True` needs `max_length`, the number of samples to keep.")
        if pad_to_multiple_of is not None and strategy == PaddingStrategy.DO_NOT_PAD:
            raise ValueError(
                "`pad_to_multiple_of` needs `padding`: pass `padding=True` or leave `pad_to_multiple_of` out."
            )

        try:
            is_usable = not torch.empty(1, device=device).is_meta
        except (RuntimeError, AssertionError, TypeError):
            is_usable = False
        if not is_usable:
            raise ValueError(f"`device` must be one that torch can use here, such as 'cpu', got {device!r}.")
        clips = _split_clips(audio)
        with torch.no_grad():
            waveforms = []
            for i, clip in enumerate(clips):
                name = "`audio`" if len(clips) == 1 else f"`audio[{i}]`"
                waveform = _as_waveform(clip, name, downmix)
                if max_length is not None and len(waveform) > max_length:
                    if not truncation:
                        raise ValueError(
                            f"{name} has {len(waveform)} samples, more than `max_length`={max_length}. "
                            "Pass `truncation=True` to cut it."
                        )
                    waveform = waveform[:max_length]
                waveforms.append(waveform.to(device))

            lengths = [len(waveform) for waveform in waveforms]
            if strategy != PaddingStrategy.DO_NOT_PAD:
                length = max_length if max_length and strategy == PaddingStrategy.MAX_LENGTH else max(lengths)
                multiple = pad_to_multiple_of or 1
                lengths = [math.ceil(length / multiple) * multiple] * len(waveforms)
            # Equal lengths share a tensor from the start: stacked later, each clip would be in memory twice.
            is_batch = return_tensors is not None and len(set(lengths)) == 1
            groups = [waveforms] if is_batch else [[waveform] for waveform in waveforms]
            outputs: list[dict[str, Any]] = [
                self._batch(group, length, device, generator) for group, length in zip(groups, lengths, strict=False)
            ]

        if return_tensors is None or TensorType(return_tensors) != TensorType.PYTORCH:
            outputs = [{name: tensor.cpu().numpy() for name, tensor in output.items()} for output in outputs]
        if is_batch:
            return BatchFeature(outputs[0])
        batch = BatchFeature({name: [output[name][0] for output in outputs] for name in self.model_input_names})
        return batch.convert_to_tensors(return_tensors)

    def _batch(
        self,
        waveforms: list[torch.Tensor],
        length: int,
        device: str | torch.device,
        generator: torch.Generator | None,
    ) -> dict[str, torch.Tensor]:
        """Clips, padded to `length` samples, with their features and masks."""
        num_clips, num_stacks = len(waveforms), self._num_stacks(length)
        size = self.num_stacked_frames * self.num_mel_bins
        values = torch.full((num_clips, 1, length), self.padding_value, device=device)
        padding_mask = torch.zeros(num_clips, length, dtype=torch.int32, device=device)
        features = torch.full((num_clips, num_stacks, size), self.padding_value, device=device)
        features_mask = torch.zeros(num_clips, num_stacks, dtype=torch.int32, device=device)
        for i, waveform in enumerate(waveforms):
            clip_stacks = self._num_stacks(len(waveform))
            values[i, 0, : len(waveform)] = waveform
            padding_mask[i, : len(waveform)] = 1
            self._extract_features(waveform, generator, output=features[i, :clip_stacks])
            features_mask[i, :clip_stacks] = 1
        return dict(zip(self.model_input_names, (values, padding_mask, features, features_mask), strict=True))

    def _num_stacks(self, num_samples: int) -> int:
        num_frames = 1 + max(num_samples - self.frame_length, 0) // self.frame_shift
        return math.ceil(num_frames / self.stack_stride)

    def _extract_features(
        self, waveform: torch.Tensor, generator: torch.Generator | None = None, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(num_samples,)` -> `(num_stacks, num_stacked_frames * num_mel_bins)`, block by block into `output`."""
        frames = self._frames(waveform)
        if output is None:
            size = self.num_stacked_frames * self.num_mel_bins
            output = torch.empty(self._num_stacks(len(waveform)), size, device=waveform.device)
        done = 0
        for stacks in self._stack(self._fbank(frames, generator), len(frames)):
            output[done : done + len(stacks)] = self._normalize(stacks)
            done += len(stacks)
        return output

    def _fbank(self, frames: torch.Tensor, generator: torch.Generator | None) -> Iterator[torch.Tensor]:
        """`(num_frames, window_length)` -> blocks of `(num_frames, num_mel_bins)`."""
        for block in frames.split(_FRAMES_PER_BLOCK):
            if self.dither:
                noise_device = block.device if generator is None else generator.device
                noise = torch.randn(block.shape, generator=generator, device=noise_device)
                block = block + noise.to(block.device) * (self.dither / 32768)
            yield self._log_mel(block)

    def _frames(self, waveform: torch.Tensor) -> torch.Tensor:
        """`(num_samples,)` -> `(num_frames, window_length)`, a view of all whole windows.

        The window of a shorter clip is the clip (flexicodec 0.1.2, `WavFrontend` of funasr, `frame_length`).
        """
        return waveform.unfold(0, min(self.frame_length, len(waveform)), self.frame_shift)

    def _log_mel(self, frames: torch.Tensor) -> torch.Tensor:
        """`(num_frames, window_length)` -> `(num_frames, num_mel_bins)`, like `compute-fbank-feats` of Kaldi."""
        window_length = frames.shape[1]
        # A spectrum needs two points, even of a single sample.
        fft_length = max(2, 1 << (window_length - 1).bit_length())
        window = torch.hamming_window(window_length, periodic=False, dtype=torch.float32, device=frames.device)
        filters = _mel_filters(fft_length, self.num_mel_bins, self.sampling_rate, frames.device)

        # The unit of Kaldi is one step of 16-bit PCM, and the floor of the logarithm depends on it.
        frames = frames * 32768
        frames = frames - frames.mean(dim=1, keepdim=True)
        previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, n=fft_length)
        power = spectrum[:, :-1].abs().square()
        # Autocast would round the powers to half precision.
        with torch.autocast(frames.device.type, enabled=False):
            energies = power @ filters
        return energies.clamp(min=torch.finfo(torch.float32).eps).log()

    def _stack(self, blocks: Iterable[torch.Tensor], num_frames: int) -> Iterator[torch.Tensor]:
        """Blocks of `(num_frames, num_mel_bins)` -> blocks of `(num_stacks, num_stacked_frames * num_mel_bins)`."""
        size, stride = self.num_stacked_frames, self.stack_stride
        missing_stacks, missing_frames = math.ceil(num_frames / stride), num_frames
        fbank = None
        for block in blocks:
            missing_frames -= len(block)
            before = block[:1].expand((size - 1) // 2, -1) if fbank is None else fbank
            fbank = torch.cat([before, block])
            if missing_frames == 0:
                end = (missing_stacks - 1) * stride + max(size, stride)
                fbank = torch.cat([fbank, fbank[-1:].expand(max(end - len(fbank), 0), -1)])
            num_stacks = min((len(fbank) - max(size, stride)) // stride + 1, missing_stacks)
            if num_stacks > 0:
                yield fbank.unfold(0, size, stride)[:num_stacks].transpose(1, 2).flatten(1)
                fbank = fbank[num_stacks * stride :]
                missing_stacks -= num_stacks

    def _normalize(self, features: torch.Tensor) -> torch.Tensor:
        if self.cmvn_shift is None:
            return features
        return (features + features.new_tensor(self.cmvn_shift)) * features.new_tensor(self.cmvn_scale)

    def _checked_cmvn(self, name: str, values: Sequence[float] | None) -> list[float] | None:
        if values is None:
            return None
        expected = self.num_stacked_frames * self.num_mel_bins
        if len(values) != expected:
            raise ValueError(
                f"`{name}` has {len(values)} values, expected `num_stacked_frames * num_mel_bins` = {expected}."
            )
        return [float(value) for value in values]


@lru_cache(maxsize=16)
def _mel_filters(fft_length: int, num_mel_bins: int, sampling_rate: int, device: torch.device) -> torch.Tensor:
    """Triangles on the mel scale up to the Nyquist frequency, `(fft_length / 2, num_mel_bins)`.

    In float32, as in Kaldi. Where a triangle barely touches a bin, rounding moves the log-mel energies by
    more than 1e-4, so `transformers.audio_utils.mel_filter_bank`, which is in float64, cannot be used.
    """
    frequencies = torch.arange(fft_length // 2, dtype=torch.float32, device="cpu") * (sampling_rate / fft_length)
    mels = 1127 * torch.log(1 + frequencies[:, None] / 700)
    lowest, highest = (1127 * math.log(1 + frequency / 700) for frequency in (20, sampling_rate / 2))
    steps = torch.arange(num_mel_bins + 2, dtype=torch.float32, device="cpu")
    edges = lowest + steps * ((highest - lowest) / (num_mel_bins + 1))
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (mels - left) / (center - left), (right - mels) / (right - center)
    return torch.minimum(rising, falling).clamp(min=0).to(device)


def _split_clips(audio: Any) -> list[Any]:
    """The clips of a list or tuple, which is a single clip if it holds numbers."""
    if not isinstance(audio, (list, tuple)):
        return [audio]
    if not audio:
        raise ValueError("`audio` is an empty list: pass at least one clip.")
    return [audio] if isinstance(audio[0], numbers.Number) else list(audio)


def _as_waveform(clip: Any, name: str, downmix: bool) -> torch.Tensor:
    """The clip as a checked `torch.float32` tensor of shape `(num_samples,)`."""
    if isinstance(clip, (str, bytes, PathLike)):
        raise ValueError(
            f"{name} must be a waveform, got the path {clip!r}. Read the file first, for example with "
            "`flexicodec_hf.audio_flexicodec.read_audio` or `librosa.load(path, sr=16000)`."
        )
    if isinstance(clip, np.ma.MaskedArray) and clip.mask.any():
        raise ValueError(f"{name} has masked samples: fill or cut them.")
    if isinstance(clip, torch.Tensor) and (clip.is_meta or clip.layout != torch.strided):
        raise ValueError(f"{name} must be a dense tensor, got {clip.layout} on {clip.device}.")
    if isinstance(clip, torch.Tensor):
        is_float, dtype = clip.is_floating_point(), clip.dtype
    else:
        try:
            clip = np.asarray(clip)
        except ValueError as error:
            raise ValueError(f"{name} is not a regular array of samples: {error}") from error
        is_float, dtype = clip.dtype.kind == "f", clip.dtype
    if not is_float:
        raise ValueError(
            f"{name} must hold floats in [-1, 1], got {dtype}. "
            "Divide integer PCM by its full scale, 32768 for 16 bits."
        )
    if not isinstance(clip, torch.Tensor):
        # `torch.from_numpy` takes neither read-only arrays nor reversed ones.
        is_usable = clip.flags.writeable and all(stride >= 0 for stride in clip.strides)
        clip = torch.from_numpy(clip.astype(np.float32, copy=not is_usable))
    clip = clip.to(torch.float32)

    shape = tuple(clip.shape)
    if clip.ndim not in (1, 2):
        raise ValueError(
            f"{name} must have the shape (num_samples,) or (num_channels, num_samples), got {shape}. "
            "Pass several clips as a list."
        )
    if clip.numel() == 0:
        raise ValueError(f"{name} is empty: it has the shape {shape}, at least one sample is needed.")
    if clip.ndim == 2:
        if shape[0] > max(1, shape[1]):
            raise ValueError(
                f"{name} must have the shape (num_samples,) or (num_channels, num_samples), got {shape}, which has "
                "more channels than samples: transpose it."
            )
        if shape[0] > 1 and not downmix:
            raise ValueError(
                f"{name} has {shape[0]} channels (shape {shape}), but the model takes one: pass `downmix=True` to "
                "average them. If these are several clips, pass them as a list."
            )
        clip = clip[0] if shape[0] == 1 else clip.mean(dim=0)

    peak = torch.stack(clip.aminmax()).abs().max().item()
    if not math.isfinite(peak):
        raise ValueError(f"{name} has NaN or infinite samples.")
    if peak > _LARGEST_PEAK:
        raise ValueError(
            f"{name} must hold floats in [-1, 1], but reaches {peak:g}. "
            "Divide PCM by its full scale, 32768 for 16 bits."
        )
    return clip


__all__ = ["FlexiCodecFeatureExtractor"]
