"""Recordings of any length, block by block: waveforms in and tokens out, tokens in and waveforms out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import tee

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .chunking_flexicodec import Chunk, fade_in, windows
from .configuration_flexicodec import FlexiCodecConfig
from .feature_extraction_flexicodec import FlexiCodecFeatureExtractor, _as_waveform
from .modeling_flexicodec import (
    FlexiCodecEncoderOutput,
    FlexiCodecFramesOutput,
    FlexiCodecModel,
    _check_num_quantizers,
    _check_tokens,
    _chunk,
    _common_frames,
    _exact_convolutions,
    _in_features,
    _Lengths,
    _neighbors,
    _quantize_window,
    _whole_frames,
    repeat_by_token,
)


# Tokens whose vectors are made at once.
_TOKENS = 1024


def encode_blocks(
    codec: FlexiCodecModel,
    feature_extractor: FlexiCodecFeatureExtractor,
    blocks: Iterable[np.ndarray | Tensor],
    num_samples: int | None = None,
    num_quantizers: int | None = None,
    merging_threshold: float | None = None,
    target_frame_rate: float | None = None,
    chunk_length_s: float = 30.0,
    chunk_context_s: float = 5.0,
) -> Iterator[FlexiCodecEncoderOutput]:
    """
    Encode a recording that comes in blocks, in memory that does not grow with its length.

    The tokens are those of `codec.encode` with the same `chunk_length_s` and `chunk_context_s`. Up to ten
    minutes, these are the tokens of `codec.encode` without chunks, and come all at once.

    Args:
        codec: The codec.
        feature_extractor: The codec's.
        blocks: Waveforms of shape `(num_samples,)`, floats in [-1, 1] at the codec's sampling rate, of any lengths.
        num_samples: Samples of all blocks together: the two streams of the codec are aligned over the whole
            recording. By default they are counted first.
        num_quantizers, merging_threshold, target_frame_rate: As for `codec.encode`. A rate takes a second
            pass over the blocks.
        chunk_length_s: Seconds that are encoded at once, by the convolutions alone up to ten minutes.
        chunk_context_s: Seconds of context on each side of a chunk.

    `blocks` is iterated once if `num_samples` is given and `target_frame_rate` is not. Otherwise it must be a
    list, or another object that can be iterated again.

    Yields:
        [`FlexiCodecEncoderOutput`] of the tokens that begin in a chunk (or of all), a batch of one, without
        similarities.

    Raises:
        ValueError: An argument is out of its range, or the blocks are not what is expected.
        TypeError: An argument has another type.
    """
    chunk = _checked_chunk(codec.config, chunk_length_s, chunk_context_s)
    num_quantizers = _check_num_quantizers(codec.config, num_quantizers)
    # For the errors of these two arguments, before anything is read.
    one_frame = torch.ones(1, 1, dtype=torch.bool)
    threshold = codec.frame_merger.choose_threshold(torch.zeros(1, 0), one_frame, merging_threshold, target_frame_rate)
    if (num_samples is None or target_frame_rate is not None) and iter(blocks) is blocks:
        raise ValueError(
            "`blocks` can be iterated only once, but is needed twice: pass `num_samples` and no `target_frame_rate`, "
            "or an object that gives the blocks each time that it is iterated."
        )
    if num_samples is None:
        num_samples = sum(len(block) for block in blocks)
    if num_samples < 1:
        raise ValueError(f"`blocks` are empty: at least one sample is needed, got `num_samples`={num_samples}.")
    recording = _Recording(codec, feature_extractor, blocks, num_samples, chunk)
    return recording.encode(num_quantizers, None if target_frame_rate is not None else threshold, target_frame_rate)


@torch.no_grad()
def decode_blocks(
    codec: FlexiCodecModel,
    blocks: Iterable[FlexiCodecEncoderOutput],
    chunk_length_s: float = 30.0,
    chunk_context_s: float = 5.0,
) -> Iterator[Tensor]:
    """
    Decode tokens that come in blocks, in memory that does not grow with their number.

    The waveform is that of `codec.decode` with the same `chunk_length_s` and `chunk_context_s`, up to rounding:
    up to ten minutes, that without chunks. The first ten minutes of tokens are awaited before it begins.

    Args:
        codec: The codec.
        blocks: Outputs of [`encode_blocks`] or `codec.encode`, or others with `audio_codes` of shape
            `(1, num_quantizers, num_tokens)` and `token_lengths` of shape `(1, num_tokens)`.
        chunk_length_s: Seconds that are decoded at once, by the convolutions alone up to ten minutes.
        chunk_context_s: Seconds of context on each side of a chunk.

    Yields:
        The parts of the waveform, each of shape `(num_samples,)`, in the codec's type and on its device.

    Raises:
        ValueError: As `codec.decode`.
    """
    chunk, hop_length = _checked_chunk(codec.config, chunk_length_s, chunk_context_s), codec.config.hop_length
    frames = _Sequence(_attended_frames(codec, _Sequence(_latent_frames(codec, blocks)), chunk))
    tail: Tensor | None = None
    start = 0
    while True:
        # One frame more than the window, to know whether the chunk is the last.
        num_frames = frames.read(start + chunk.size + max(chunk.context, 1))
        core = slice(start, min(start + chunk.size, num_frames))
        window = slice(max(start - chunk.context, 0), min(core.stop + chunk.context, num_frames))
        if core.start == core.stop:
            raise ValueError("There is nothing to decode: `blocks` hold no tokens.")
        values = codec.acoustic_decoder(frames.part(window).t()[None])[0, 0]
        values = values[(core.start - window.start) * hop_length :]
        if tail is not None:
            # The chunks fade into each other over one frame, as in `run_in_windows`.
            ramp = fade_in(min(hop_length, len(values))).to(values)
            ending = F.pad(tail, (0, max(len(ramp) - len(tail), 0)))[: len(ramp)]
            values = torch.cat([torch.lerp(ending, values[: len(ramp)], ramp), values[len(ramp) :]])
        if core.stop == num_frames:
            yield values
            return
        length = chunk.size * hop_length
        values = F.pad(values, (0, max(length - len(values), 0)))  # without context, the last samples are missing
        yield values[:length]
        tail = values[length : length + hop_length]
        start = core.stop


class _Sequence:
    """A long tensor that comes in blocks along its first axis, of which a part is held."""

    def __init__(self, blocks: Iterable[Tensor]):
        self.blocks = iter(blocks)
        self.held: list[Tensor] = []
        self.start = self.stop = 0

    def read(self, stop: int) -> int:
        """Read on until `stop`, or to the end; returns where the part that is held ends."""
        while self.stop < stop and (block := next(self.blocks, None)) is not None:
            self.held.append(block)
            self.stop += len(block)
        return self.stop

    def part(self, part: slice) -> Tensor:
        """A part of the sequence. What lies before it is forgotten."""
        self.read(part.stop)
        whole = torch.cat(self.held)[part.start - self.start :]
        # A copy: a view would keep what is forgotten in memory.
        self.held, self.start = [whole.clone()], part.start
        return whole[: part.stop - part.start]


class _Recording:
    """A recording in blocks, as frames and tokens of a codec."""

    def __init__(
        self,
        codec: FlexiCodecModel,
        feature_extractor: FlexiCodecFeatureExtractor,
        blocks: Iterable[np.ndarray | Tensor],
        num_samples: int,
        chunk: Chunk,
    ):
        self.codec, self.config, self.feature_extractor = codec, codec.config, feature_extractor
        self.blocks, self.num_samples = blocks, num_samples
        self.num_features = feature_extractor._num_stacks(num_samples)
        self.num_frames = int(
            _common_frames(self.config, self._lengths(self.num_features), self._lengths(num_samples)).host
        )
        # The chunks of convolutions, and the windows of attention, in frames of the codec and of the semantic encoder.
        self.chunk, self.frame_chunk, self.feature_chunk = chunk, chunk, _in_features(self.config, chunk)
        if self.num_frames <= _whole_frames(self.config):
            self.frame_chunk, self.feature_chunk = Chunk(self.num_frames, 0), Chunk(self.num_features, 0)
        # As `encode_frames` does.
        self.is_exact = codec.exact_convolutions and codec.device.type == "cuda"

    @torch.no_grad()
    def encode(
        self, num_quantizers: int, threshold: Tensor | None, target_frame_rate: float | None
    ) -> Iterator[FlexiCodecEncoderOutput]:
        if threshold is None:
            threshold = self._threshold_for_rate(target_frame_rate)
        waveforms = [self._waveform()] if num_quantizers == 1 else tee(self._waveform())
        semantic = _Sequence(self._semantic_frames(waveforms[0]))
        acoustic = None if num_quantizers == 1 else _Sequence(self._acoustic_frames(waveforms[1]))
        quantize = partial(self.codec._quantize, num_acoustic_quantizers=num_quantizers - 1)
        start = 0  # of a token, from which merging goes on as if it had begun there
        for core, window in windows(self.num_frames, self.frame_chunk):
            stop = min(window.stop + self.config.max_frames_per_token, self.num_frames)
            held = slice(start, stop)
            frames = FlexiCodecFramesOutput(
                semantic.part(held)[None],
                None if acoustic is None else acoustic.part(held)[None],
                self._lengths(stop - start).device,
            )
            segments = self.codec.frame_merger(frames.semantic_frames, frames.num_frames, threshold)
            here, around = (slice(part.start - start, part.stop - start) for part in (core, window))
            found = _quantize_window(quantize, frames, segments, 0, here, slice(max(around.start, 0), around.stop))
            if found is not None:
                tokens, lengths = found
                yield FlexiCodecEncoderOutput(
                    audio_codes=tokens.codes,
                    token_lengths=lengths[None],
                    audio_codes_mask=torch.ones_like(lengths[None], dtype=torch.bool),
                    latents=tokens.latents.transpose(1, 2),
                    merging_threshold=threshold,
                )
            # The first token of the next window.
            starts = F.pad(segments.token_lengths[0].cumsum(dim=0), (1, 0)) + start
            start = int(starts[starts >= min(core.stop - self.frame_chunk.context, self.num_frames)][0])
        for _ in waveforms[0]:
            pass  # its end is checked

    def _threshold_for_rate(self, target_frame_rate: float | None) -> Tensor:
        merger, similarities, last = self.codec.frame_merger, [], None
        for frames in self._semantic_frames(self._waveform()):
            frames = frames if last is None else torch.cat([last, frames])
            similarities.append(merger.similarities(frames[None], frames.new_ones(1, len(frames), dtype=torch.bool)))
            last = frames[-1:]
        joined = torch.cat(similarities, dim=1)
        mask = joined.new_ones(1, self.num_frames, dtype=torch.bool)
        return merger.choose_threshold(joined, mask, None, target_frame_rate)

    def _lengths(self, length: int) -> _Lengths:
        """Of a batch of one."""
        return _Lengths(torch.tensor([length], device=self.codec.device), torch.tensor([length]))

    def _waveform(self) -> Iterator[Tensor]:
        count = 0
        for block in self.blocks:
            if len(block):
                count += len(block)
                yield _as_waveform(block, "a block of `blocks`", downmix=False).to(self.codec.device)
            if count > self.num_samples:
                break
        if count != self.num_samples:
            more = "at least " if count > self.num_samples else ""
            raise ValueError(f"`num_samples` is {self.num_samples}, but the blocks have {more}{count} samples.")

    def _semantic_frames(self, waveform: Iterator[Tensor]) -> Iterator[Tensor]:
        """Blocks `(num_frames, semantic_hidden_size)`: what the semantic encoder gives, on codec frames."""
        features = _Sequence(self._encoded_features(waveform))
        lengths = torch.tensor([[self.num_features], [self.num_frames]], device=self.codec.device)
        for core, _ in windows(self.num_frames, self.chunk):
            positions = torch.arange(core.start, core.stop, device=self.codec.device)
            left, right, weight = (value[0] for value in _neighbors(positions, lengths[0], lengths[1]))
            first = int(left[0])
            part = features.part(slice(first, int(right[-1]) + 1))
            yield part[left - first] * (1 - weight[:, None]) + part[right - first] * weight[:, None]

    def _encoded_features(self, waveform: Iterator[Tensor]) -> Iterator[Tensor]:
        """Blocks `(num_features, semantic_hidden_size)` of the semantic encoder's own frames."""
        extractor, samples = self.feature_extractor, _Sequence(waveform)
        stride, shift = extractor.stack_stride, extractor.frame_shift
        margin = -(-extractor.num_stacked_frames // stride)  # stacks at the edges that see beyond them
        for core, window in windows(self.num_features, self.feature_chunk):
            first = max(window.start - margin, 0)
            stop = ((window.stop + margin) * stride - 1) * shift + extractor.frame_length
            part = samples.part(slice(first * stride * shift, min(stop, self.num_samples)))
            inputs = extractor(
                part, sampling_rate=extractor.sampling_rate, return_tensors="pt", device=self.codec.device
            )
            features = inputs["input_features"][:, window.start - first : window.stop - first]
            with _exact_convolutions(self.is_exact):
                encoded = self.codec._encode_features(features, self._lengths(features.shape[1]), None)[0]
            yield encoded[core.start - window.start : core.stop - window.start]

    def _acoustic_frames(self, waveform: Iterator[Tensor]) -> Iterator[Tensor]:
        """Blocks `(num_frames, hidden_size)` of the acoustic encoder."""
        samples, hop_length = _Sequence(waveform), self.config.hop_length
        for core, window in windows(-(-self.num_samples // hop_length), self.chunk):
            part = samples.part(slice(window.start * hop_length, min(window.stop * hop_length, self.num_samples)))
            with _exact_convolutions(self.is_exact):
                frames = self.codec.acoustic_encoder.encode(part[None], self._lengths(len(part)), None)[0]
            yield frames[core.start - window.start : core.stop - window.start]


def _attended_frames(codec: FlexiCodecModel, frames: _Sequence, chunk: Chunk) -> Iterator[Tensor]:
    """Blocks `(num_frames, hidden_size)` of what the attention makes of latents: of all, or of window after window."""
    whole = _whole_frames(codec.config)
    start, num_frames = 0, frames.read(whole + 1)
    size, context = chunk if num_frames > whole else Chunk(num_frames, 0)
    while start < num_frames:
        # One frame more than the window, to know whether there is another.
        num_frames = frames.read(start + size + max(context, 1))
        first, stop = max(start - context, 0), min(start + size, num_frames)
        hidden_states = codec.bottleneck(frames.part(slice(first, min(stop + context, num_frames)))[None])[0]
        yield hidden_states[start - first : stop - first]
        start = stop


def _latent_frames(codec: FlexiCodecModel, blocks: Iterable[FlexiCodecEncoderOutput]) -> Iterator[Tensor]:
    """Blocks `(num_frames, hidden_size)` of the latents that the decoder gets."""
    # Tokens on each side that the ConvNeXt layers see.
    reach = 3 * len(codec.semantic_quantizer.decoder)
    pieces = _pieces(codec, blocks)
    piece = next(pieces, None)
    if piece is None:
        return
    codes, lengths = (tensor[..., :0] for tensor in piece)
    done = 0  # tokens of `codes` whose latents were made
    while piece is not None:
        following = next(pieces, None)
        if len(piece[0]) != len(codes):
            raise ValueError(f"All `blocks` must have as many codebooks, got {len(codes)} and {len(piece[0])}.")
        codes, lengths = torch.cat([codes, piece[0]], dim=1), torch.cat([lengths, piece[1]])
        stop = len(lengths) if following is None else len(lengths) - reach
        if stop > done:
            latents = codec.semantic_quantizer.from_codes(codes[None, 0], None)
            if len(codes) > 1:
                latents = latents + codec.acoustic_quantizer.from_codes(codes[None, 1:])
            covered = lengths[None, done:stop]
            yield repeat_by_token(latents[:, done:stop], covered, int(covered.sum()))[0]
            kept = max(stop - reach, 0)
            codes, lengths, done = codes[:, kept:], lengths[kept:], stop - kept
        piece = following


def _pieces(codec: FlexiCodecModel, blocks: Iterable[FlexiCodecEncoderOutput]) -> Iterator[tuple[Tensor, Tensor]]:
    """Some tokens at a time: codes `(num_quantizers, num_tokens)` and lengths `(num_tokens,)`, checked."""
    for block in blocks:
        codes, lengths = block["audio_codes"], block["token_lengths"]
        _check_tokens(codec.config, codes, lengths, None)
        if len(codes) != 1:
            raise ValueError(f"`blocks` must each have the tokens of one recording, got a batch of {len(codes)}.")
        yield from zip(codes[0].long().split(_TOKENS, dim=1), lengths[0].long().split(_TOKENS), strict=True)


def _checked_chunk(config: FlexiCodecConfig, chunk_length_s: float, chunk_context_s: float) -> Chunk:
    chunk = _chunk(config, chunk_length_s, chunk_context_s)
    if chunk is None:
        raise ValueError("`chunk_length_s` must be a number of seconds: how much is in memory at once.")
    return chunk


__all__ = ["decode_blocks", "encode_blocks"]
