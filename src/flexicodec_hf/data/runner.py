"""The codec over batches of clips: waveforms to tokens and tokens to waveforms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..audio_flexicodec import AudioClip, AudioFile
from ..configuration_flexicodec import FlexiCodecConfig
from ..cpu_flexicodec import optimize_for_cpu
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecEncoderOutput, FlexiCodecModel
from ..streaming_flexicodec import decode_blocks, encode_blocks
from .files import DataError
from .tokens import Tokens


Item = TypeVar("Item", AudioClip | AudioFile, Tokens)
Result = TypeVar("Result")


@dataclass(frozen=True)
class RateSetting:
    """How frames are merged: at a threshold, or at the one that gives the tokens per second."""

    merging_threshold: float | None = None
    target_frame_rate: float | None = None

    def __str__(self) -> str:
        if self.target_frame_rate is not None:
            return f"target_frame_rate={self.target_frame_rate}"
        return f"merging_threshold={self.merging_threshold}"


def rate_settings(
    config: FlexiCodecConfig, merging_thresholds: Iterable[float] = (), target_frame_rates: Iterable[float] = ()
) -> list[RateSetting]:
    """The settings for these numbers, each in its range and there once; the model's own threshold for none."""
    lowest = config.frame_rate / config.max_frames_per_token
    settings: list[RateSetting] = []
    for name, values, low, high in (
        ("merging_threshold", list(merging_thresholds), -1.0, 1.0),
        ("target_frame_rate", list(target_frame_rates), lowest, config.frame_rate),
    ):
        if len(set(values)) < len(values) or not all(low <= value <= high for value in values):
            raise DataError(f"`{name}s` must be different numbers between {low:g} and {high:g}, got {values}.")
        settings += [RateSetting(**{name: float(value)}) for value in values]
    return settings or [RateSetting(config.merging_threshold)]


def chunk_length(seconds: float, chunk_length_s: float | None) -> float | None:
    """The `chunk_length_s` for a clip: it is processed in chunks if longer than two of them, with 0 never."""
    return chunk_length_s if chunk_length_s and seconds > 2 * chunk_length_s else None


class CodecRunner:
    """
    A codec that processes batches of clips of any lengths.

    A batch that does not fit into memory, or in which the codec rejects a clip, is processed again in halves,
    so that only the clips at fault fail.

    Args:
        codec: On the device and in the type to run in.
        feature_extractor: The codec's.
        chunk_length_s: Clips longer than twice this are processed in chunks of so many seconds; 0 never does.
        show_progress: Whether a terminal shows how far such a clip is.
    """

    def __init__(
        self,
        codec: FlexiCodecModel,
        feature_extractor: FlexiCodecFeatureExtractor,
        chunk_length_s: float = 30.0,
        show_progress: bool = True,
    ):
        self.codec = codec
        self.feature_extractor = feature_extractor
        self.chunk_length_s = chunk_length_s
        self.show_progress = show_progress
        self.config = codec.config

    @classmethod
    def from_pretrained(cls, model: str, device: str, dtype: str, chunk_length_s: float = 30.0) -> CodecRunner:
        """Load a codec from the Hub or a directory, with the kernels for CPUs if `device` is one."""
        codec = FlexiCodecModel.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
        if device == "cpu":
            codec = optimize_for_cpu(codec)
        return cls(codec, FlexiCodecFeatureExtractor.from_pretrained(model), chunk_length_s)

    def chunk_of(self, item: AudioClip | AudioFile | Tokens) -> float | None:
        """Seconds of the chunks in which an item is processed; `None` if in one piece."""
        return chunk_length(item.seconds, self.chunk_length_s)

    def encode(
        self, clips: Sequence[AudioClip | AudioFile], rates: Sequence[RateSetting], num_quantizers: int | None = None
    ) -> list[list[Tokens] | Exception]:
        """
        For each clip the tokens at each rate, or what went wrong. The encoders run once for all rates, except for an
        [`AudioFile`] in chunks, which is never in memory as a whole. Clips are at the sampling rate of the codec.
        """
        return self._run(clips, lambda clip: 0, lambda batch: self._encode_batch(batch, rates, num_quantizers))

    def decode(self, tokens: Sequence[Tokens]) -> list[Iterable[np.ndarray] | Exception]:
        """
        For each item the parts `(num_samples,)` of a waveform that is as long as the clip was, or what went wrong.
        Those of an item in chunks are made, and raise their errors, as they are asked for.
        """
        return self._run(tokens, lambda item: len(item.audio_codes), self._decode_batch)

    def _run(
        self,
        items: Sequence[Item],
        key: Callable[[Item], int],
        process: Callable[[Sequence[Item]], list[Result]],
    ) -> list[Result | Exception]:
        """The results in the order of the items. Items with the same key form a batch; one in chunks is alone."""
        groups: dict[tuple[int, int | None], list[int]] = {}
        for i, item in enumerate(items):
            groups.setdefault((key(item), i if self.chunk_of(item) else None), []).append(i)
        results: dict[int, Result | Exception] = {}
        for group in groups.values():
            found = self._in_halves([items[i] for i in group], process)
            results |= dict(zip(group, found, strict=True))
        return [results[i] for i in range(len(items))]

    @torch.inference_mode()
    def _in_halves(
        self, batch: Sequence[Item], process: Callable[[Sequence[Item]], list[Result]]
    ) -> list[Result | Exception]:
        failure: Exception
        try:
            return list(process(batch))
        except torch.OutOfMemoryError:
            failure = self._out_of_memory()
        except ValueError as error:
            failure = error.with_traceback(None)
        # Outside of the handlers, which keep the memory of the failed batch.
        if len(batch) == 1:
            return [failure]
        half = len(batch) // 2
        return self._in_halves(batch[:half], process) + self._in_halves(batch[half:], process)

    def _progress(self, seconds: float) -> tqdm:
        return tqdm(total=round(seconds), unit="s", leave=False, disable=None if self.show_progress else True)

    def _out_of_memory(self) -> DataError:
        return DataError(f"out of memory on {self.codec.device}: pass a smaller `chunk_length_s`.")

    def _encode_batch(
        self, clips: Sequence[AudioClip | AudioFile], rates: Sequence[RateSetting], num_quantizers: int | None
    ) -> list[list[Tokens]]:
        chunk = self.chunk_of(clips[0])
        if chunk is not None and isinstance(clips[0], AudioFile):
            return [[self._encode_file(clips[0], rate, num_quantizers, chunk) for rate in rates]]
        inputs = self.feature_extractor(
            [np.concatenate(list(clip)) for clip in clips],
            sampling_rate=self.config.sampling_rate,
            return_tensors="pt",
            device=self.codec.device,
        )
        frames = self.codec.encode_frames(**inputs, num_quantizers=num_quantizers, chunk_length_s=chunk)
        tokens: list[list[Tokens]] = [[] for _ in clips]
        for rate in rates:
            encoded = self.codec.quantize_frames(
                frames, num_quantizers, rate.merging_threshold, rate.target_frame_rate, chunk_length_s=chunk
            )
            all_codes, all_lengths = (
                encoded[name].to("cpu", torch.int32) for name in ("audio_codes", "token_lengths")
            )
            found = encoded["merging_threshold"].tolist()
            for i, clip in enumerate(clips):
                num_tokens = int((all_lengths[i] > 0).sum())
                codes, lengths = all_codes[i, :, :num_tokens], all_lengths[i, :num_tokens]
                tokens[i].append(self._tokens(clip, codes, lengths, rate, found[i]))
        return tokens

    def _encode_file(
        self, clip: AudioFile, rate: RateSetting, num_quantizers: int | None, chunk_length_s: float
    ) -> Tokens:
        blocks, found = [], 0.0
        with self._progress(clip.seconds) as progress:
            for block in encode_blocks(
                self.codec,
                self.feature_extractor,
                clip,
                clip.num_samples,
                num_quantizers,
                rate.merging_threshold,
                rate.target_frame_rate,
                chunk_length_s,
            ):
                blocks.append([block[name][0].to("cpu", torch.int32) for name in ("audio_codes", "token_lengths")])
                found = float(block["merging_threshold"])
                progress.update(round(int(blocks[-1][1].sum()) / self.config.frame_rate, 2))
        codes, lengths = (torch.cat(parts, dim=-1) for parts in zip(*blocks, strict=True))
        return self._tokens(clip, codes, lengths, rate, found)

    def _tokens(
        self, clip: AudioClip | AudioFile, codes: torch.Tensor, lengths: torch.Tensor, rate: RateSetting, found: float
    ) -> Tokens:
        return Tokens(
            codes,
            lengths,
            clip.num_samples,
            self.config.sampling_rate,
            self.config.frame_rate,
            found if rate.merging_threshold is None else rate.merging_threshold,
            rate.target_frame_rate,
        )

    def _decode_batch(self, tokens: Sequence[Tokens]) -> list[Iterable[np.ndarray]]:
        for item in tokens:
            if (item.sampling_rate, item.frame_rate) != (self.config.sampling_rate, self.config.frame_rate):
                raise DataError(
                    f"tokens of a codec at {item.sampling_rate} Hz and {item.frame_rate} frames per second; the model "
                    f"works at {self.config.sampling_rate} Hz and {self.config.frame_rate}."
                )
            longest = int(item.token_lengths.max())
            if longest > self.config.max_frames_per_token:
                raise DataError(
                    f"a token covers {longest} frames, but a token of this model covers 1 to "
                    f"{self.config.max_frames_per_token}: the file is damaged, or of another model."
                )
        chunk = self.chunk_of(tokens[0])
        if chunk is not None:
            return [self._decode_long(tokens[0], chunk)]
        codes = pad_sequence([item.audio_codes.T for item in tokens], batch_first=True).transpose(1, 2)
        lengths = pad_sequence([item.token_lengths for item in tokens], batch_first=True)
        device = self.codec.device
        decoded = self.codec.decode(codes.to(device), lengths.to(device))
        waveforms = decoded.audio_values[:, 0].float().cpu().numpy()
        return [
            list(_with_length([waveform], item.num_samples)) for waveform, item in zip(waveforms, tokens, strict=True)
        ]

    def _decode_long(self, tokens: Tokens, chunk_length_s: float) -> Iterator[np.ndarray]:
        codes, lengths = (part[None].to(self.codec.device) for part in (tokens.audio_codes, tokens.token_lengths))
        block = FlexiCodecEncoderOutput(audio_codes=codes, token_lengths=lengths)
        waveform = decode_blocks(self.codec, [block], chunk_length_s)
        parts = _with_length((part.float().cpu().numpy() for part in waveform), tokens.num_samples)
        try:
            with self._progress(tokens.seconds) as progress:
                for part in parts:
                    yield part
                    progress.update(round(len(part) / tokens.sampling_rate, 2))
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory() from error


def _with_length(waveform: Iterable[np.ndarray], num_samples: int) -> Iterator[np.ndarray]:
    """The parts, cut, or padded with silence (for up to two frames that the encoder dropped)."""
    for part in waveform:
        yield part[:num_samples]
        num_samples -= len(part[:num_samples])
    if num_samples:
        yield np.zeros(num_samples, dtype=np.float32)
