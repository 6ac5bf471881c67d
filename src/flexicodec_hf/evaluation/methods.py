"""What is evaluated: the recordings themselves, the codec with some settings, text-to-speech."""

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
from ..data.runner import chunk_length
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from .recognizers import SAMPLING_RATE


# How labels name each way to choose the token rate.
_RATE_NAMES = {"merging_threshold": "threshold", "target_frame_rate": "rate", "fixed_frame_rate": "fixed rate"}

Synthesizer = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class Clip:
    """
    One item of a dataset. Waveforms are `(num_samples,)` at 16 kHz, float32.

    Args:
        name: Its `id` in the dataset, or its number.
        text: The words; `None` if unknown.
        waveform: The recording; `None` for a text to speak.
        reference_waveform: For text-to-speech, a recording of the voice to use.
        reference_text: The words of `reference_waveform`.
    """

    name: str
    text: str | None = None
    waveform: np.ndarray | None = None
    reference_waveform: np.ndarray | None = None
    reference_text: str | None = None


@dataclass(frozen=True)
class Speech:
    """
    The output of a method for one clip.

    Args:
        waveform: `(num_samples,)` at 16 kHz.
        aligned: Whether it has the same content at the same times as the clip's recording.
        processing_seconds: How long the method took; `None` for recordings.
        num_tokens: The number of tokens that represent the clip.
        bits: The size of these tokens.
    """

    waveform: np.ndarray
    aligned: bool = False
    processing_seconds: float | None = None
    num_tokens: int | None = None
    bits: float | None = None


class Method(Protocol):
    """Turns a clip into speech. Returns `None` if the clip lacks what it needs."""

    label: str
    settings: Mapping[str, Any]

    def __call__(self, clip: Clip) -> Speech | None: ...


class Original:
    """The recordings, whose error rate is the baseline."""

    label = "original"
    settings: Mapping[str, Any] = {}

    def __call__(self, clip: Clip) -> Speech | None:
        return None if clip.waveform is None else Speech(clip.waveform)


class CodecReconstruction:
    """
    Encodes and decodes recordings with one setting of the codec.

    Args:
        codec: The model, on its device.
        feature_extractor: Its feature extractor.
        merging_threshold: Cosine similarity above which frames are merged. By default the model's, without a rate.
        target_frame_rate: Average number of tokens per second; a threshold is chosen for each clip.
        fixed_frame_rate: For comparison, downsample at a fixed rate: this many tokens per second, whatever the
            similarities, with lengths as even as whole frames allow. These tokens need no bits for their length.
        num_quantizers: Number of codebooks; 1 is the semantic one. All by default.
        chunk_length_s: Clips longer than twice this are processed in chunks of this many seconds; `None` never does.

    Raises:
        ValueError: More than one rate is given, or a value is out of range.
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
        config = codec.config
        if config.sampling_rate != SAMPLING_RATE:
            raise ValueError(f"the codec works at {config.sampling_rate} Hz, the measures at {SAMPLING_RATE}.")
        rates = dict(zip(_RATE_NAMES, (merging_threshold, target_frame_rate, fixed_frame_rate), strict=True))
        rate = {name: value for name, value in rates.items() if value is not None}
        if len(rate) > 1:
            raise ValueError(f"pass one of {', '.join(rates)}, got {', '.join(rate)}.")
        rate = rate or {"merging_threshold": config.merging_threshold}
        codebooks = config.num_quantizers if num_quantizers is None else min(num_quantizers, config.num_quantizers)
        if codebooks < 1:
            raise ValueError(f"`num_quantizers` must be at least 1, got {num_quantizers}.")
        lowest = config.frame_rate / config.max_frames_per_token
        if fixed_frame_rate is not None and not lowest <= fixed_frame_rate <= config.frame_rate:
            raise ValueError(
                f"`fixed_frame_rate` must be between {lowest} and {config.frame_rate} tokens per second, got "
                f"{fixed_frame_rate}."
            )

        ((kind, value),) = rate.items()
        self.label = f"{_RATE_NAMES[kind]} {value:g}, {codebooks} codebook{'s' if codebooks > 1 else ''}"
        self.settings: Mapping[str, Any] = {**rate, "num_quantizers": codebooks}
        self._codec, self._feature_extractor = codec, feature_extractor
        self._rate, self._codebooks, self._chunk_length_s = rate, codebooks, chunk_length_s
        length_bits = 0.0 if fixed_frame_rate is None else math.log2(config.max_frames_per_token)
        self._bits_per_token = config.bits_per_token(codebooks) - length_bits

    @torch.inference_mode()
    def __call__(self, clip: Clip) -> Speech | None:
        if clip.waveform is None:
            return None
        start = time.perf_counter()
        encoded, chunk_length_s = self._encode(clip.waveform)
        decoded: Any = self._codec.decode(encoded.audio_codes, encoded.token_lengths, chunk_length_s=chunk_length_s)
        output = decoded.audio_values[0, 0].float().cpu().numpy()[: len(clip.waveform)]
        seconds = time.perf_counter() - start
        num_tokens = encoded.audio_codes.shape[2]
        return Speech(output, True, seconds, num_tokens, num_tokens * self._bits_per_token)

    @torch.inference_mode()
    def tokenize(self, waveform: np.ndarray) -> list[tuple[int, int]]:
        """The tokens of a waveform `(num_samples,)` at 16 kHz: the semantic code of each, and its length in frames."""
        encoded, _ = self._encode(waveform)
        return list(zip(encoded.audio_codes[0, 0].tolist(), encoded.token_lengths[0].tolist(), strict=True))

    def _encode(self, waveform: np.ndarray) -> tuple[Any, float | None]:
        """The codec's output, and the length of the chunks that the clip was processed in."""
        codec = self._codec
        chunk_length_s = chunk_length(len(waveform) / SAMPLING_RATE, self._chunk_length_s)
        inputs = self._feature_extractor(
            waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt", device=codec.device
        )
        frames: Any = codec.encode_frames(**inputs, num_quantizers=self._codebooks, chunk_length_s=chunk_length_s)
        segmentation: dict[str, Any] = self._rate
        if "fixed_frame_rate" in self._rate:
            frames_per_token = codec.config.frame_rate / self._rate["fixed_frame_rate"]
            segmentation = {"token_lengths": even_token_lengths(frames.semantic_frames.shape[1], frames_per_token)}
        encoded = codec.quantize_frames(frames, self._codebooks, **segmentation, chunk_length_s=chunk_length_s)
        return encoded, chunk_length_s


class TextToSpeech:
    """
    Speaks the texts of the clips, with the voice of `reference_waveform` if a clip has one.

    Args:
        synthesizer: A `text-to-speech` pipeline, or another function from a text to a dictionary with `audio` and
            `sampling_rate`. For clips with a voice it also gets `reference_audio` (`(num_samples,)` at 16 kHz),
            `reference_sampling_rate` and `reference_text`, which the stock pipeline does not accept.
        label: Its name in the results.
        seed: Set before each text, so that a result does not depend on earlier ones.
        options: Passed on to each call, such as `forward_params={"merging_threshold": 0.91}`.
    """

    def __init__(self, synthesizer: Synthesizer, label: str = "text-to-speech", seed: int = 0, **options: Any):
        self.label = label
        self.settings: Mapping[str, Any] = {"seed": seed, **options}
        self._synthesizer, self._seed, self._options = synthesizer, seed, options

    def __call__(self, clip: Clip) -> Speech | None:
        if not clip.text:
            return None
        options = dict(self._options)
        if clip.reference_waveform is not None:
            options |= {
                "reference_audio": clip.reference_waveform,
                "reference_sampling_rate": SAMPLING_RATE,
                "reference_text": clip.reference_text,
            }
        set_seed(self._seed)
        start = time.perf_counter()
        spoken = self._synthesizer(clip.text, **options)
        seconds = time.perf_counter() - start
        audio = np.asarray(spoken["audio"], dtype=np.float32).reshape(-1)
        return Speech(resample(audio, spoken["sampling_rate"], SAMPLING_RATE), processing_seconds=seconds)


def even_token_lengths(num_frames: int, frames_per_token: float) -> Tensor:
    """
    Lengths of tokens that are as even as whole frames allow.

    Returns:
        `(1, num_tokens)`, integers that sum up to `num_frames`. Token `i` ends at frame `(i + 1) * frames_per_token`,
        rounded down; the last token may be shorter.
    """
    ends = (torch.arange(math.ceil(num_frames / frames_per_token) + 1) * frames_per_token).long()
    return ends.clamp(max=num_frames).diff()[None]
