"""What is evaluated: the recordings themselves, the codec at one of its settings, text-to-speech."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from ..audio_flexicodec import resample
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from .common import SAMPLING_RATE, EvaluationError
from .data import Clip


@dataclass(frozen=True)
class Speech:
    """
    What a system made of a clip.

    Args:
        waveform: `(num_samples,)` at 16 kHz.
        aligned: Whether it says what the clip's recording says, at the same times.
        processing_seconds: How long the system took; `None` for recordings.
        num_tokens: That it needed.
        bits: That these cost.
    """

    waveform: np.ndarray
    aligned: bool = False
    processing_seconds: float | None = None
    num_tokens: int | None = None
    bits: float | None = None


class System(Protocol):
    """Makes speech of a clip, or `None` where the clip lacks what it needs."""

    label: str
    settings: Mapping[str, Any]

    def __call__(self, clip: Clip, waveform: np.ndarray | None) -> Speech | None: ...


class Original:
    """The recordings: what an error rate starts from."""

    label = "original"
    settings: Mapping[str, Any] = {}

    def __call__(self, clip: Clip, waveform: np.ndarray | None) -> Speech | None:
        return None if waveform is None else Speech(waveform)


class CodecReconstruction:
    """
    Encodes and decodes with one setting of the codec.

    Args:
        codec: The model, on its device.
        feature_extractor: Its feature extractor.
        merging_threshold, target_frame_rate: As for `codec.encode`; the model's threshold if neither is given.
        fixed_frame_rate: Fixed down-sampling instead, to compare with: so many tokens per second, as even as whole frames
            allow, however unlike the frames are. Such tokens need no bits for their length.
        num_quantizers: Rows of codes; 1 is the semantic row alone. All by default.
        chunk_length_s: Clips longer than twice this are processed in chunks of so many seconds; `None` means never.
    """

    def __init__(
        self,
        codec: FlexiCodecModel,
        feature_extractor: FlexiCodecFeatureExtractor,
        merging_threshold: float | None = None,
        target_frame_rate: float | None = None,
        fixed_frame_rate: float | None = None,
        num_quantizers: int | None = None,
        chunk_length_s: float | None = 30.0,
    ):
        if codec.config.sampling_rate != SAMPLING_RATE:
            raise EvaluationError(
                f"the codec works at {codec.config.sampling_rate} Hz, the measures at {SAMPLING_RATE}."
            )
        given = {
            "merging_threshold": merging_threshold,
            "target_frame_rate": target_frame_rate,
            "fixed_frame_rate": fixed_frame_rate,
        }
        rate = {name: value for name, value in given.items() if value is not None}
        if len(rate) > 1:
            raise EvaluationError(f"pass one of {', '.join(given)}, got {', '.join(rate)}.")
        rate = rate or {"merging_threshold": codec.config.merging_threshold}
        rows = (
            codec.config.num_quantizers if num_quantizers is None else min(num_quantizers, codec.config.num_quantizers)
        )
        if rows < 1:
            raise EvaluationError(f"`num_quantizers` must be at least 1, got {num_quantizers}.")

        ((kind, value),) = rate.items()
        name = {"merging_threshold": "threshold", "target_frame_rate": "rate", "fixed_frame_rate": "fixed rate"}[kind]
        self.label = f"{name} {value:g}, {rows} row{'s' if rows > 1 else ''}"
        self.settings: Mapping[str, Any] = {**rate, "num_quantizers": rows}
        self._codec, self._rate = codec, rate
        self._bits_per_token = codec.config.bits_per_token(rows)
        if fixed_frame_rate is not None:
            highest = codec.config.frame_rate
            lowest = highest / codec.config.max_frames_per_token
            if not lowest <= fixed_frame_rate <= highest:
                raise EvaluationError(
                    f"`fixed_frame_rate` must be between {lowest} and {highest} tokens a second, got {fixed_frame_rate}."
                )
            self._bits_per_token -= math.log2(codec.config.max_frames_per_token)
        self._feature_extractor = feature_extractor
        self._chunk_length_s = chunk_length_s

    @torch.inference_mode()
    def __call__(self, clip: Clip, waveform: np.ndarray | None) -> Speech | None:
        if waveform is None:
            return None
        long = self._chunk_length_s is not None and len(waveform) > 2 * self._chunk_length_s * SAMPLING_RATE
        chunk_length_s = self._chunk_length_s if long else None
        start = time.perf_counter()
        inputs = self._feature_extractor(
            waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt", device=self._codec.device
        )
        rows = self.settings["num_quantizers"]
        frames = self._codec.encode_frames(**inputs, num_quantizers=rows, chunk_length_s=chunk_length_s)
        segmentation: dict[str, Any] = self._rate
        if "fixed_frame_rate" in self._rate:
            step = self._codec.config.frame_rate / self._rate["fixed_frame_rate"]
            segmentation = {"token_lengths": _even_lengths(int(frames.num_frames), step)}
        encoded: Any = self._codec.quantize_frames(frames, rows, **segmentation, chunk_length_s=chunk_length_s)
        decoded = self._codec.decode(encoded.audio_codes, encoded.token_lengths, chunk_length_s=chunk_length_s)
        output = decoded.audio_values[0, 0].float().cpu().numpy()[: len(waveform)]
        seconds = time.perf_counter() - start
        num_tokens = encoded.audio_codes.shape[2]
        return Speech(output, True, seconds, num_tokens, num_tokens * self._bits_per_token)


class TextToSpeech:
    """
    Speaks the texts of the clips, with the voice of `reference_audio` where a clip has one.

    Args:
        synthesizer: A `text-to-speech` pipeline, or another function from a text to a dictionary with `audio` and
            `sampling_rate`. For clips with a voice it is also given `reference_audio` (`(num_samples,)` at 16 kHz),
            `reference_sampling_rate` and `reference_text`, which the stock pipeline does not know.
        label: What to call it in the results.
        seed: Set before each text, so that a result does not depend on what was spoken before.
        options: Passed on to each call, such as `forward_params={"merging_threshold": 0.91}`.
    """

    def __init__(
        self,
        synthesizer: Callable[..., Mapping[str, Any]],
        label: str = "text-to-speech",
        seed: int = 0,
        **options: Any,
    ):
        self.label = label
        self.settings: Mapping[str, Any] = {"seed": seed, **options}
        self._synthesizer, self._seed, self._options = synthesizer, seed, options

    def __call__(self, clip: Clip, waveform: np.ndarray | None) -> Speech | None:
        if not clip.text:
            return None
        options = dict(self._options)
        voice = clip.reference_waveform()
        if voice is not None:
            options |= {
                "reference_audio": voice,
                "reference_sampling_rate": SAMPLING_RATE,
                "reference_text": clip.reference_text,
            }
        set_seed(self._seed)
        start = time.perf_counter()
        spoken = self._synthesizer(clip.text, **options)
        seconds = time.perf_counter() - start
        audio = np.asarray(spoken["audio"], dtype=np.float32).reshape(-1)
        return Speech(resample(audio, spoken["sampling_rate"], SAMPLING_RATE), processing_seconds=seconds)


def _even_lengths(num_frames: int, frames_per_token: float) -> Tensor:
    """Lengths of tokens `(1, num_tokens)` that end at the multiples of `frames_per_token`, rounded down, and at the end."""
    ends = (torch.arange(math.ceil(num_frames / frames_per_token) + 1) * frames_per_token).long()
    return ends.clamp(max=num_frames).diff()[None]
