"""The codec as the commands run it: clips to tokens and tokens to waveforms, on the CPU side of the device."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .. import __version__
from ..audio_flexicodec import AudioClip
from ..configuration_flexicodec import FlexiCodecConfig
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from .common import CommandError
from .tokens import Tokens


class CodecRunner:
    """
    A loaded codec, and how to run it.

    Args:
        config: Of the model.
        model: Hub id or directory.
        device: Where to run.
        dtype: Name of the type to run in.
        chunk_length_s: Clips longer than twice this are processed in chunks of so many seconds; 0 means never.
    """

    def __init__(self, config: FlexiCodecConfig, model: str, device: str, dtype: str, chunk_length_s: float):
        self.config = config
        self.name = model
        self.device = device
        self.chunk_length_s = chunk_length_s
        self.processing_seconds = 0.0
        self.feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(model)
        self.model = FlexiCodecModel.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()

    def chunk_of(self, item: AudioClip | Tokens) -> float | None:
        """Seconds of the chunks in which an item is processed; `None` where it is in one piece."""
        if self.chunk_length_s > 0 and item.seconds > 2 * self.chunk_length_s:
            return self.chunk_length_s
        return None

    @torch.inference_mode()
    def encode(
        self,
        clips: Sequence[AudioClip],
        num_quantizers: int | None,
        merging_threshold: float | None,
        target_frame_rate: float | None,
    ) -> list[Tokens]:
        """Clips, all in chunks or none, to the tokens of each."""
        start = time.perf_counter()
        inputs = self.feature_extractor(
            [clip.waveform for clip in clips],
            sampling_rate=self.config.sampling_rate,
            return_tensors="pt",
            device=self.device,
        )
        encoded = self.model.encode(
            **inputs,
            num_quantizers=num_quantizers,
            merging_threshold=merging_threshold,
            target_frame_rate=target_frame_rate,
            chunk_length_s=self.chunk_of(clips[0]),
        )
        codes, lengths = encoded.audio_codes.cpu(), encoded.token_lengths.cpu()
        self.processing_seconds += time.perf_counter() - start
        tokens = []
        for i, clip in enumerate(clips):
            num_tokens = int((lengths[i] > 0).sum())
            used = merging_threshold if target_frame_rate is None else encoded.merging_threshold[i].item()
            settings = encode_settings(self.config, self.name, num_quantizers, used, target_frame_rate)
            tokens.append(
                Tokens(
                    codes[i, :, :num_tokens],
                    lengths[i, :num_tokens],
                    clip.num_samples,
                    self.config.sampling_rate,
                    self.config.frame_rate,
                    {**settings, "source": clip.path.name, "flexicodec_hf_version": __version__},
                )
            )
        return tokens

    @torch.inference_mode()
    def decode(self, tokens: Sequence[Tokens]) -> list[np.ndarray]:
        """Tokens, all in chunks or none and with as many rows, to waveforms as long as the clips were."""
        for item in tokens:
            if (item.sampling_rate, item.frame_rate) != (self.config.sampling_rate, self.config.frame_rate):
                raise CommandError(
                    f"tokens of a codec at {item.sampling_rate} Hz and {item.frame_rate} frames per second; {self.name} "
                    f"works at {self.config.sampling_rate} Hz and {self.config.frame_rate}."
                )
        start = time.perf_counter()
        codes = pad_sequence([item.audio_codes.T for item in tokens], batch_first=True).transpose(1, 2)
        lengths = pad_sequence([item.token_lengths for item in tokens], batch_first=True)
        decoded = self.model.decode(
            codes.to(self.device), lengths.to(self.device), chunk_length_s=self.chunk_of(tokens[0])
        )
        waveforms = decoded.audio_values[:, 0].float().cpu().numpy()
        self.processing_seconds += time.perf_counter() - start
        return [_fit(waveform, item.num_samples) for waveform, item in zip(waveforms, tokens, strict=True)]


def encode_settings(
    config: FlexiCodecConfig,
    model: str,
    num_quantizers: int | None,
    merging_threshold: float | None,
    target_frame_rate: float | None,
) -> dict[str, str]:
    """What decides the codes of a clip, as text."""
    settings = {
        "model": model,
        "num_quantizers": str(min(num_quantizers or config.num_quantizers, config.num_quantizers)),
        "merging_threshold": str(config.merging_threshold if merging_threshold is None else merging_threshold),
    }
    if target_frame_rate is not None:
        settings["target_frame_rate"] = str(target_frame_rate)
    return settings


def _fit(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    """Cut, or padded with silence (up to two frames that the encoder dropped)."""
    waveform = waveform[:num_samples]
    return np.pad(waveform, (0, num_samples - len(waveform)))
