"""FlexiCodec: a speech codec whose frame rate follows the speech (arXiv 2510.00981)."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import index
from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedAudioTokenizerBase
from transformers.models.dac.modeling_dac import (
    DacDecoderBlock,
    DacEncoderBlock,
    Snake1d,
)
from transformers.models.fun_asr_nano.configuration_fun_asr_nano import FunAsrNanoEncoderConfig
from transformers.models.fun_asr_nano.modeling_fun_asr_nano import FunAsrNanoEncoder, FunAsrNanoFSMN
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast

from .chunking_flexicodec import Chunk, run_in_windows, windows
from .compatibility_flexicodec import OffloadedDeviceMixin, check_options
from .configuration_flexicodec import FlexiCodecConfig
from .release_flexicodec import FlexiCodecReleaseMixin


_INTEGERS = (torch.int16, torch.int32, torch.int64)
_MASK_NAMES = {"input_values": "padding_mask", "input_features": "input_features_mask"}


class FlexiCodecFramesOutput(NamedTuple):
    r"""
    Args:
        semantic_frames (`torch.FloatTensor` of shape `(batch_size, num_frames, semantic_hidden_size)`):
            Output of the semantic encoder, one vector per frame (80 ms). Values at padded positions
            are undefined.
        acoustic_frames (`torch.Tensor` of shape `(batch_size, num_frames, hidden_size)`):
            Output of the acoustic encoder on the same frames. `None` if only the semantic code was
            asked for.
        num_frames (`torch.LongTensor` of shape `(batch_size,)`):
            Number of frames of each item.
    """

    semantic_frames: Tensor
    acoustic_frames: Tensor | None
    num_frames: Tensor

    def cut(self, item: int, frames: slice) -> "FlexiCodecFramesOutput":
        """Some frames of one item."""
        acoustic = None if self.acoustic_frames is None else self.acoustic_frames[item, None, frames]
        num_frames = self.num_frames.new_tensor([frames.stop - frames.start])
        return FlexiCodecFramesOutput(self.semantic_frames[item, None, frames], acoustic, num_frames)


@dataclass
class FlexiCodecEncoderOutput(ModelOutput):
    r"""
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
            Codebook 0 is the semantic one (codes 0 to 32767), the others are the residual acoustic
            ones (0 to 4095).
        token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Number of frames (80 ms) that each token covers, 1 to 8; 0 at padding.
        audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`):
            `True` for tokens, `False` for padding.
        latents (`torch.Tensor` of shape `(batch_size, hidden_size, num_tokens)`):
            The continuous vectors that the codes stand for, summed over the codebooks; 0 at
            padding.
        frame_similarities (`torch.FloatTensor` of shape `(batch_size, num_frames - 1)`):
            Cosine similarity of each semantic frame with the next; 0 at padding.
        merging_threshold (`torch.FloatTensor` of shape `(batch_size,)`):
            The threshold that merged each item: the one passed, or the one found for
            `target_frame_rate`. `None` if `token_lengths` were passed instead.
    """

    audio_codes: Tensor | None = None
    token_lengths: Tensor | None = None
    audio_codes_mask: Tensor | None = None
    latents: Tensor | None = None
    frame_similarities: Tensor | None = None
    merging_threshold: Tensor | None = None


@dataclass
class FlexiCodecDecoderOutput(ModelOutput):
    r"""
    Args:
        audio_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`):
            Waveform in [-1, 1]; 0 at padding.
        padding_mask (`torch.BoolTensor` of shape `(batch_size, num_samples)`):
            `True` for samples, `False` for padding.
    """

    audio_values: Tensor | None = None
    padding_mask: Tensor | None = None


@dataclass
class FlexiCodecOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.Tensor` of shape `()`):
            Weighted sum of the three losses below. A trainer adds its reconstruction losses on
            `audio_values`.
        audio_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`):
            Reconstructed waveform, as long as the input.
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
            Codebook 0 is the semantic one (codes 0 to 32767), the others are the residual acoustic
            ones (0 to 4095).
        token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Number of frames (80 ms) that each token covers, 1 to 8; 0 at padding.
        audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`):
            `True` for tokens, `False` for padding.
        latents (`torch.Tensor` of shape `(batch_size, hidden_size, num_tokens)`):
            The continuous vectors that the codes stand for, summed over the codebooks in use; 0 at
            padding.
        commitment_loss (`torch.Tensor` of shape `()`):
            Mean squared distance of the projected residuals from their codes, summed over the
            acoustic codebooks in use.
        codebook_loss (`torch.Tensor` of shape `()`):
            The same distance, with gradients to the codebooks.
        distillation_loss (`torch.Tensor` of shape `()`):
            Mean squared distance of the decoded semantic latents from the mean semantic frame of
            each token.
        frame_similarities (`torch.FloatTensor` of shape `(batch_size, num_frames - 1)`):
            Cosine similarity of each semantic frame with the next; 0 at padding.
        merging_threshold (`torch.FloatTensor` of shape `(batch_size,)`):
            The threshold that merged each item.
    """

    loss: Tensor | None = None
    audio_values: Tensor | None = None
    audio_codes: Tensor | None = None
    token_lengths: Tensor | None = None
    audio_codes_mask: Tensor | None = None
    latents: Tensor | None = None
    commitment_loss: Tensor | None = None
    codebook_loss: Tensor | None = None
    distillation_loss: Tensor | None = None
    frame_similarities: Tensor | None = None
    merging_threshold: Tensor | None = None


class FlexiCodecAttention(nn.Module):
    """Bidirectional multi-head attention with rotary positions and no biases."""

    # One configuration describes three transformers of different widths.  trf-ignore: TRF029
    def __init__(self, config: FlexiCodecConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None
    ) -> Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        # Both are rotated at once: half of the kernels.
        states = torch.stack([self.q_proj(hidden_states), self.k_proj(hidden_states)])
        query, key = _rotate(states.view(2, *shape).transpose(2, 3), *position_embeddings)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention_interface(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0)
        return self.o_proj(output.reshape(hidden_states.shape))


def _rotate(states: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Rotary positions for `(..., length, head_dim)`, the first half of whose channels pairs with the second."""
    return states * cosines + states.roll(states.shape[-1] // 2, dims=-1) * signed_sines


class FlexiCodecTransformerLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each with a learned scale per channel (as in Mimi, arXiv 2410.00037)."""

    # One configuration describes three transformers of different widths.  trf-ignore: TRF029
    def __init__(self, config: FlexiCodecConfig, hidden_size: int, intermediate_size: int, num_heads: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.self_attn = FlexiCodecAttention(config, hidden_size, num_heads)
        self.self_attn_layer_scale = nn.Parameter(torch.empty(hidden_size))
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.mlp_layer_scale = nn.Parameter(torch.empty(hidden_size))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None
    ) -> Tensor:
        residual = hidden_states
        hidden_states = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, attention_mask)
        hidden_states = torch.addcmul(residual, self.self_attn_layer_scale, hidden_states)
        residual = hidden_states
        hidden_states = self.fc2(F.gelu(self.fc1(self.post_attention_layernorm(hidden_states))))
        return torch.addcmul(residual, self.mlp_layer_scale, hidden_states)


class FlexiCodecTransformer(nn.Module):
    """Bidirectional transformer without a final norm, with projections if its width is not that of the stream."""

    # One configuration describes three transformers of different widths.  trf-ignore: TRF029
    def __init__(
        self,
        config: FlexiCodecConfig,
        stream_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
    ):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.input_proj = nn.Linear(stream_size, hidden_size, bias=False) if stream_size != hidden_size else None
        self.layers = nn.ModuleList(
            FlexiCodecTransformerLayer(config, hidden_size, intermediate_size, num_heads) for _ in range(num_layers)
        )
        self.output_proj = nn.Linear(hidden_size, stream_size, bias=False) if stream_size != hidden_size else None

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: `(batch_size, length, stream_size)`.
            mask: `(batch_size, length)`, `True` where valid; `None` where everything is.

        Returns:
            `(batch_size, length, stream_size)`.
        """
        if self.input_proj is not None:
            hidden_states = self.input_proj(hidden_states)
        attention_mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=mask,
            allow_is_bidirectional_skip=mask is None,  # looking for padding in a mask waits for the device
        )
        position_embeddings = self._rotary_embeddings(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, attention_mask)
        if self.output_proj is not None:
            hidden_states = self.output_proj(hidden_states)
        return hidden_states

    def _rotary_embeddings(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `(length, head_dim)`, see `_rotate`."""
        # Not `LlamaRotaryEmbedding`: its inverse frequencies round differently in float32 (by 8e-6
        # in the cosines of 500 positions), and near ties of the released codec's codes hang on such
        # differences.
        device = hidden_states.device
        exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        positions = torch.arange(hidden_states.shape[1], device=device, dtype=torch.float32)
        angles = torch.outer(positions, self.config.rope_theta**-exponent)
        cosines, sines = angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)
        return torch.cat([cosines, cosines], dim=-1), torch.cat([-sines, sines], dim=-1)


class FlexiCodecSegments(NamedTuple):
    r"""
    How frames are merged into tokens.

    Args:
        token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`): Frames of each token, 0 at padding.
        token_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`): `True` for tokens.
        frame_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`): `True` for frames.
        similarities (`torch.FloatTensor` of shape `(batch_size, num_frames - 1)`): Of each frame with the next.
        threshold (`torch.FloatTensor` of shape `(batch_size,)`): `None` if the lengths were given.
        is_padded (`bool`): Whether an item has fewer frames or tokens than another.
    """

    token_lengths: Tensor
    token_mask: Tensor
    frame_mask: Tensor
    similarities: Tensor
    threshold: Tensor | None
    is_padded: bool

    def cut(self, item: int, frames: slice, tokens: slice) -> "FlexiCodecSegments":
        """Some tokens of one item, which cover these frames."""
        return self._replace(
            token_lengths=self.token_lengths[item, None, tokens],
            token_mask=self.token_mask[item, None, tokens],
            frame_mask=self.frame_mask[item, None, frames],
            is_padded=False,
        )


class FlexiCodecFrameMerger:
    """Decides which neighboring frames share a token: the dynamic frame rate of arXiv 2510.00981.

    Frames are merged while the cosine similarity of each with the next is above a threshold, up to
    `config.max_frames_per_token` of them. The result is the length of each token in frames. This class
    has no parameters.
    """

    def __init__(self, config: FlexiCodecConfig):
        self.config = config

    def __call__(
        self,
        frames: Tensor,
        num_frames: Tensor,
        merging_threshold: float | list[float] | Tensor | None = None,
        target_frame_rate: float | list[float] | Tensor | None = None,
        token_lengths: Tensor | None = None,
    ) -> FlexiCodecSegments:
        """Merge frames by a threshold (the default), a rate, or lengths that are given.

        Args:
            frames: `(batch_size, num_frames, size)` in float32.
            num_frames: `(batch_size,)`, frames of each item.
            merging_threshold: Similarity above which frames are merged, for all items or
                `(batch_size,)`.
            target_frame_rate: Tokens per second to aim at, for all items or `(batch_size,)`.
            token_lengths: `(batch_size, num_tokens)`, 0 at padding.
        """
        frame_mask = _length_mask(num_frames, frames.shape[1], frames.device)
        similarities = self.similarities(frames, frame_mask)
        if token_lengths is not None:
            if merging_threshold is not None or target_frame_rate is not None:
                raise ValueError("Pass either `token_lengths`, or `merging_threshold` or `target_frame_rate`.")
            token_lengths = self.check_segmentation(token_lengths, num_frames).to(frames.device)
            token_mask = token_lengths > 0
            is_padded = not bool(token_mask.all() & frame_mask.all())
            return FlexiCodecSegments(token_lengths, token_mask, frame_mask, similarities, None, is_padded)
        threshold = self.choose_threshold(similarities, frame_mask, merging_threshold, target_frame_rate)
        token_lengths, is_padded = self._segment(similarities, threshold, frame_mask, num_frames)
        token_mask = token_lengths > 0
        return FlexiCodecSegments(token_lengths, token_mask, frame_mask, similarities, threshold, is_padded)

    def similarities(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Cosine similarity of each frame with the next.

        Args:
            frames: `(batch_size, num_frames, size)` in float32.
            frame_mask: `(batch_size, num_frames)`, `False` for the padding on the right.

        Returns:
            `(batch_size, num_frames - 1)`, at most 1; 0 at padding.
        """
        similarities = F.cosine_similarity(frames[:, :-1], frames[:, 1:], dim=-1)
        # Rounding takes the cosine of equal vectors past 1, where a threshold of 1 would merge them
        # (as it does in flexicodec 0.1.2, modeling_flexicodec.py, line 877).
        return similarities.clamp(max=1.0) * frame_mask[:, 1:]

    def segment(self, similarities: Tensor, threshold: Tensor, frame_mask: Tensor) -> Tensor:
        """Merge frames whose similarity is above a threshold.

        Args:
            similarities: `(batch_size, num_frames - 1)`.
            threshold: `(batch_size,)`.
            frame_mask: `(batch_size, num_frames)`.

        Returns:
            Lengths of the tokens, `(batch_size, num_tokens)`; 0 at padding.
        """
        return self._segment(similarities, threshold, frame_mask)[0]

    def _segment(
        self, similarities: Tensor, threshold: Tensor, frame_mask: Tensor, num_frames: Tensor | None = None
    ) -> tuple[Tensor, bool]:
        """Lengths of the tokens, and whether there is padding. The host waits for the device once."""
        most_frames = frame_mask.sum(dim=1) if num_frames is None else num_frames
        starts = self._token_starts(similarities, threshold, frame_mask)
        index = starts.cumsum(dim=1) - 1
        are_finite = (similarities.isfinite() | ~frame_mask[:, 1:]).all()
        numbers = [*index[:, -1].aminmax(), *most_frames.aminmax(), are_finite]
        *fewest, fewest_frames, most, is_finite = torch.stack([number.long() for number in numbers]).tolist()
        if fewest_frames < 1 or most > frame_mask.shape[1]:
            raise ValueError(
                f"`num_frames` must be 1 to {frame_mask.shape[1]}, the number of frames, got values from "
                f"{fewest_frames} to {most}."
            )
        if not is_finite:
            raise ValueError("The semantic frames must be finite, got NaN or infinity.")
        num_tokens = fewest[1] + 1
        token_lengths = torch.zeros(len(starts), num_tokens, dtype=torch.long, device=starts.device)
        is_padded = fewest[0] != fewest[1] or fewest_frames < frame_mask.shape[1]
        return token_lengths.scatter_add_(1, index, frame_mask.long()), is_padded

    def threshold_for_rate(self, similarities: Tensor, frame_rate: Tensor, frame_mask: Tensor) -> Tensor:
        """Find the threshold with which each item comes closest to an average token rate.

        Args:
            similarities: `(batch_size, num_frames - 1)`.
            frame_rate: `(batch_size,)`, tokens per second to aim at.
            frame_mask: `(batch_size, num_frames)`.

        Returns:
            `(batch_size,)`.
        """
        num_frames = frame_mask.sum(dim=1)
        target = frame_rate / self.config.frame_rate * num_frames
        # The number of tokens never falls as the threshold rises, and changes only at similarities:
        # search those.
        candidates = similarities.masked_fill(~frame_mask[:, 1:], 1.0).sort(dim=1).values
        candidates = F.pad(candidates, (1, 0), value=-1.0)

        def count(index: Tensor) -> Tensor:
            threshold = candidates.gather(1, index[:, None])[:, 0]
            return self._token_starts(similarities, threshold, frame_mask).sum(dim=1)

        low, high = torch.zeros_like(num_frames), num_frames - 1
        for _ in range(candidates.shape[1].bit_length()):
            middle = (low + high) // 2
            enough = count(middle) >= target
            high = torch.where(enough, middle, high)
            low = torch.where(enough, low, (middle + 1).clamp(max=high))
        below = (high - 1).clamp(min=0)
        best = torch.where((target - count(below)).abs() < (count(high) - target).abs(), below, high)
        chosen = candidates.gather(1, best[:, None])[:, 0]
        # Half way to the next similarity, so that a slightly different rounding does not change
        # what is merged.
        following = F.pad(candidates, (0, 1), value=1.0).gather(1, best[:, None] + 1)[:, 0]
        middle = (chosen + following) / 2
        return torch.where(middle < following, middle, chosen)

    def choose_threshold(
        self,
        similarities: Tensor,
        frame_mask: Tensor,
        merging_threshold: float | list[float] | Tensor | None,
        target_frame_rate: float | list[float] | Tensor | None,
    ) -> Tensor:
        """Check the two arguments of which a caller may pass one, and return the threshold `(batch_size,)`."""
        if merging_threshold is not None and target_frame_rate is not None:
            raise ValueError("Pass either `merging_threshold` or `target_frame_rate`, not both.")
        if target_frame_rate is None:
            if merging_threshold is None:
                merging_threshold = self.config.merging_threshold
            threshold = _per_item("merging_threshold", merging_threshold, len(similarities))
            if not bool(((threshold >= -1) & (threshold <= 1)).all()):
                raise ValueError(f"`merging_threshold` is a cosine, between -1 and 1, got {merging_threshold}.")
            return _spread(threshold, similarities)
        rate = _per_item("target_frame_rate", target_frame_rate, len(similarities))
        lowest = self.config.frame_rate / self.config.max_frames_per_token
        if not bool(((rate >= lowest) & (rate <= self.config.frame_rate)).all()):
            raise ValueError(
                f"`target_frame_rate` must be between {lowest} and {self.config.frame_rate} tokens per second, got "
                f"{target_frame_rate}."
            )
        return self.threshold_for_rate(similarities, _spread(rate, similarities), frame_mask)

    def check_segmentation(self, token_lengths: Tensor, num_frames: Tensor) -> Tensor:
        """Check lengths of tokens that a caller passes, and return them as int64.

        Args:
            token_lengths: `(batch_size, num_tokens)`; 0 at padding.
            num_frames: `(batch_size,)`.

        Raises:
            ValueError: The lengths have a wrong shape, dtype or range, or do not cover the frames
            of each item.
        """
        batch_size = len(num_frames)
        _check_tensor("token_lengths", token_lengths)
        if token_lengths.ndim != 2 or len(token_lengths) != batch_size or token_lengths.dtype not in _INTEGERS:
            raise ValueError(
                f"`token_lengths` must be integers of the shape (batch_size, num_tokens) = ({batch_size}, "
                f"num_tokens), got {token_lengths.dtype} of {tuple(token_lengths.shape)}."
            )
        token_lengths = token_lengths.long()
        longest = self.config.max_frames_per_token
        expected, covered = num_frames.to(token_lengths.device), token_lengths.sum(dim=1)
        in_range = (token_lengths >= 0) & (token_lengths <= longest)
        padding_last = token_lengths[:, 1:].bool() <= token_lengths[:, :-1].bool()
        is_whole, is_valid = torch.stack([(covered == expected).all(), in_range.all() & padding_last.all()]).tolist()
        if not is_whole:
            raise ValueError(
                f"`token_lengths` must cover {expected.tolist()} frames, one number an item, and cover "
                f"{covered.tolist()}."
            )
        if not is_valid:
            raise ValueError(
                f"`token_lengths` must be 1 to {longest}, with 0 only after the last token of an item, "
                f"got {token_lengths.tolist()}."
            )
        return token_lengths

    def _token_starts(self, similarities: Tensor, threshold: Tensor, frame_mask: Tensor) -> Tensor:
        """Whether each frame `(batch_size, num_frames)` is the first of a token."""
        starts = F.pad(similarities <= threshold[:, None], (1, 0), value=True)
        positions = torch.arange(starts.shape[1], device=starts.device)
        segment_starts = (starts * positions).cummax(dim=1).values
        # A segment that is too long is cut every `max_frames_per_token` frames (flexicodec 0.1.2,
        # modeling_flexicodec.py, line 895).
        return ((positions - segment_starts) % self.config.max_frames_per_token == 0) & frame_mask


def frame_to_token(token_lengths: Tensor, num_frames: int) -> Tensor:
    """Index of the token that covers each frame.

    Args:
        token_lengths: `(batch_size, num_tokens)`, frames of each token.
        num_frames: Frames of the longest item.

    Returns:
        `(batch_size, num_frames)`; past the end of an item, its last token.
    """
    ends = token_lengths.cumsum(dim=1)
    frames = torch.arange(num_frames, device=ends.device).expand(ends.shape[0], -1).contiguous()
    return torch.searchsorted(ends, frames, right=True).clamp_(max=ends.shape[1] - 1)


def repeat_by_token(tokens: Tensor, token_lengths: Tensor, num_frames: int) -> Tensor:
    """Repeat the vector of each token, `(batch_size, num_tokens, size)`, to `(batch_size, num_frames, size)`."""
    index = frame_to_token(token_lengths, num_frames)
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def mean_by_token(frames: Tensor, token_lengths: Tensor, frame_mask: Tensor | None) -> Tensor:
    """Mean of the frames of each token: `(batch_size, num_frames, size)` to `(batch_size, num_tokens, size)`."""
    tokens = torch.arange(token_lengths.shape[1], device=frames.device)
    # A product with the 0/1 alignment: unlike a scatter, it adds in the same order on every device
    # and run.
    alignment = frame_to_token(token_lengths, frames.shape[1])[:, None] == tokens[:, None]
    if frame_mask is not None:
        alignment = alignment & frame_mask[:, None]
    return (alignment.to(frames.dtype) @ frames) / token_lengths.clamp(min=1)[..., None].to(frames.dtype)


class FlexiCodecTokenAggregator(nn.Module):
    """Merges the frames of each token into one vector (arXiv 2510.00981 section 3.2).

    One query per token, the mean of its frames plus a learned vector, is inserted after the token's
    last frame. A transformer runs over the interleaved sequence, and its outputs at the queries are
    the merged vectors.
    """

    # One configuration describes three transformers of different widths.  trf-ignore: TRF029
    def __init__(self, config: FlexiCodecConfig, stream_size: int, hidden_size: int):
        super().__init__()
        self.query_embedding = nn.Parameter(torch.empty(stream_size))
        self.transformer = FlexiCodecTransformer(
            config,
            stream_size=stream_size,
            hidden_size=hidden_size,
            intermediate_size=config.aggregator_intermediate_size,
            num_layers=config.num_aggregator_layers,
            num_heads=config.num_aggregator_attention_heads,
        )

    def forward(
        self, frames: Tensor, token_lengths: Tensor, frame_mask: Tensor | None, token_mask: Tensor | None
    ) -> Tensor:
        """
        Args:
            frames: `(batch_size, num_frames, stream_size)`.
            token_lengths: `(batch_size, num_tokens)`, frames of each token, 0 at padding.
            frame_mask, token_mask: `(batch_size, num_frames)` and `(batch_size, num_tokens)`, or both
                `None` when nothing is padding.

        Returns:
            `(batch_size, num_tokens, stream_size)`, undefined at padding.
        """
        batch_size, num_frames, _ = frames.shape
        num_tokens = token_lengths.shape[1]
        length = num_frames + num_tokens

        queries = (mean_by_token(frames, token_lengths, frame_mask) + self.query_embedding).to(frames.dtype)
        frame_positions = torch.arange(num_frames, device=frames.device) + frame_to_token(token_lengths, num_frames)
        query_positions = token_lengths.cumsum(dim=1) + torch.arange(num_tokens, device=frames.device)
        positions = torch.cat([frame_positions, query_positions], dim=1)
        mask = None
        if frame_mask is not None and token_mask is not None:
            valid = torch.cat([frame_mask, token_mask], dim=1)
            positions = positions.masked_fill(~valid, length)  # padding goes to a place of its own, then away
            mask = torch.arange(length, device=frames.device) < valid.sum(dim=1, keepdim=True)

        sequence = frames.new_zeros(batch_size, length + 1, frames.shape[-1])
        index = positions[..., None].expand(-1, -1, frames.shape[-1])
        sequence = sequence.scatter(1, index, torch.cat([frames, queries], dim=1))[:, :length]
        sequence = self.transformer(sequence, mask)
        index = query_positions.clamp(max=length - 1)[..., None].expand(-1, -1, frames.shape[-1])
        return sequence.gather(1, index)


class FlexiCodecConvNeXtLayer(GradientCheckpointingLayer):
    """ConvNeXt block over time, channels last, without a layer scale."""

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        size = config.convnext_hidden_size
        self.dwconv = nn.Conv1d(size, size, kernel_size=7, padding=3, groups=size)
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.pwconv1 = nn.Linear(size, config.convnext_intermediate_size)
        self.pwconv2 = nn.Linear(config.convnext_intermediate_size, size)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        residual = hidden_states
        if mask is not None:
            hidden_states = hidden_states * mask[..., None]
        hidden_states = self.dwconv(hidden_states.transpose(1, 2)).transpose(1, 2)
        return residual + self.pwconv2(F.gelu(self.pwconv1(self.norm(hidden_states))))


class FlexiCodecFloat32Linear(nn.Linear):
    """Computes in float32 whatever the model's dtype: the last bits of bfloat16 must not decide a code."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float(), self.bias.float())


class FlexiCodecFiniteScalarQuantizer(nn.Module):
    """Finite scalar quantization (arXiv 2309.15505): a code is a point of a small fixed grid."""

    levels: Tensor

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        levels = torch.tensor(config.semantic_quantization_levels)
        self.codebook_size = config.semantic_codebook_size
        self.project_in = FlexiCodecFloat32Linear(config.convnext_hidden_size, len(levels))
        self.project_out = nn.Linear(len(levels), config.convnext_hidden_size)
        self.levels = nn.Buffer(levels, persistent=False)
        self.basis = nn.Buffer(_place_values(levels), persistent=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: `(batch_size, num_tokens, convnext_hidden_size)`.

        Returns:
            The quantized vectors, of the same shape, and the codes, `(batch_size, num_tokens)`.
        """
        projected = self.project_in(hidden_states)
        half_width = self.levels // 2
        half_range = (self.levels - 1) * (1 - 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        # tan, where arXiv 2309.15505 has arctanh: the released weights were trained with it
        # (flexicodec 0.1.2, fsq_quantizer.py, line 86).
        bounded = torch.tanh(projected + torch.tan(offset / half_range)) * half_range - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        codes = ((rounded.detach().round().long() + half_width) * self.basis).sum(dim=-1)
        return self.project_out((rounded / half_width).to(hidden_states.dtype)), codes

    def from_codes(self, codes: Tensor) -> Tensor:
        """Codes `(batch_size, num_tokens)` to vectors `(batch_size, num_tokens, convnext_hidden_size)`."""
        half_width = self.levels // 2
        digits = (codes[..., None] // self.basis) % self.levels
        return self.project_out(((digits - half_width) / half_width).to(self.project_out.weight.dtype))


def _place_values(levels: Tensor) -> Tensor:
    """What a step of each digit adds to a code."""
    return levels.cumprod(dim=0) // levels


class FlexiCodecCodebook(nn.Embedding):
    """An embedding that also shows its table, so that hooks (offloading, say) see that use too."""

    def forward(self, input: Tensor | None = None) -> Tensor:
        """Entries `(..., size)` of codes `(...)`, or all entries `(num_entries, size)`."""
        return self.weight if input is None else super().forward(input)


class FlexiCodecVectorQuantizer(nn.Module):
    """One codebook of the residual quantizer: nearest entry by cosine in a small space (DAC, arXiv 2306.06546)."""

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        self.in_proj = FlexiCodecFloat32Linear(config.hidden_size, config.codebook_dim)
        self.out_proj = nn.Linear(config.codebook_dim, config.hidden_size)
        self.codebook = FlexiCodecCodebook(config.codebook_size, config.codebook_dim)

    def forward(
        self, hidden_states: Tensor, directions: Tensor, squared_norms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            hidden_states: `(batch_size, num_tokens, hidden_size)`.
            directions, squared_norms: The entries as unit vectors, `(codebook_size, codebook_dim)`,
                and `(codebook_size,)`, see `FlexiCodecResidualVectorQuantizer`; both in float32.

        Returns:
            Their projection and the chosen entries, both `(batch_size, num_tokens, codebook_dim)`
            in float32, and the codes `(batch_size, num_tokens)`.
        """
        projected = self.in_proj(hidden_states)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            # The squared distance of unit vectors, less a constant. The norms of the entries are
            # not exactly 1 in float32, which decides near ties as in flexicodec 0.1.2,
            # dac_quantize.py, line 90. (`DacVectorQuantize` of transformers adds them with the
            # other sign.)
            distances = torch.sub(squared_norms, F.normalize(projected, dim=-1) @ directions.t(), alpha=2)
        codes = distances.argmin(dim=-1)
        return projected, self.codebook(codes).float(), codes


class FlexiCodecResidualVectorQuantizer(nn.Module):
    """Residual vector quantization of the acoustic latents, a codebook at a time."""

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        self.quantizers = nn.ModuleList(FlexiCodecVectorQuantizer(config) for _ in range(config.num_quantizers - 1))

    def forward(
        self,
        hidden_states: Tensor,
        num_quantizers: int | Tensor,
        token_mask: Tensor | None,
        with_losses: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            hidden_states: `(batch_size, num_tokens, hidden_size)`.
            num_quantizers: How many codebooks to use. A tensor of shape `(batch_size,)` says how many
                the sum and the losses of each item use; all codes are returned then.
            token_mask: `(batch_size, num_tokens)`, or `None`.
            with_losses: Otherwise the losses are 0.

        Returns:
            The quantized vectors `(batch_size, num_tokens, hidden_size)`, the codes `(batch_size,
            num_quantizers, num_tokens)`, and the commitment and codebook losses.
        """
        commitment_loss = codebook_loss = hidden_states.new_zeros((), dtype=torch.float32)
        residual, outputs, codes = hidden_states, [], []
        quantizers = self.quantizers[:num_quantizers] if isinstance(num_quantizers, int) else self.quantizers
        directions, squared_norms = self._directions(quantizers)
        for i, quantizer in enumerate(quantizers):
            projected, entries, indices = quantizer(residual, directions[i], squared_norms[i])
            straight_through = projected + (entries - projected).detach()
            output = quantizer.out_proj(straight_through.to(hidden_states.dtype))
            residual = residual - output
            codes.append(indices)
            used: Tensor | float = 1.0
            if isinstance(num_quantizers, Tensor):
                used = (i < num_quantizers).to(output.dtype)
                output = output * used[:, None, None]
            outputs.append(output)
            if not with_losses:
                continue
            commitment_loss = commitment_loss + (_item_mse(projected, entries.detach(), token_mask) * used).mean()
            codebook_loss = codebook_loss + (_item_mse(entries, projected.detach(), token_mask) * used).mean()
        if not codes:
            return (
                torch.zeros_like(hidden_states),
                hidden_states.new_empty(hidden_states.shape[0], 0, hidden_states.shape[1], dtype=torch.long),
                commitment_loss,
                codebook_loss,
            )
        return torch.stack(outputs).sum(dim=0), torch.stack(codes, dim=1), commitment_loss, codebook_loss

    def _directions(self, quantizers: nn.ModuleList) -> tuple[Tensor, Tensor]:
        """The entries of all codebooks as unit vectors, and their squared norms, at once: a fifth of the kernels."""
        if not len(quantizers):
            return torch.empty(0), torch.empty(0)
        # The choice of a code has no gradient.
        entries = torch.stack([quantizer.codebook() for quantizer in quantizers]).detach()
        directions = F.normalize(entries.float(), dim=-1)
        return directions, directions.square().sum(dim=-1)

    def from_codes(self, codes: Tensor) -> Tensor:
        """Codes `(batch_size, n, num_tokens)` to the sum of their vectors `(batch_size, num_tokens, hidden_size)`."""
        vectors = [
            quantizer.out_proj(quantizer.codebook(codes[:, i]))
            for i, quantizer in enumerate(self.quantizers[: codes.shape[1]])
        ]
        return torch.stack(vectors).sum(dim=0)


def _item_mse(prediction: Tensor, target: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean squared error of each item `(batch_size,)` over its valid tokens."""
    error = (prediction - target).square().mean(dim=-1)
    if token_mask is None:
        return error.mean(dim=1)
    return (error * token_mask).sum(dim=1) / token_mask.sum(dim=1)


class FlexiCodecSnake1d(Snake1d):
    """DAC's activation. Not in float16, where the reciprocal of a small `alpha` is infinite."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float16:
            return super().forward(hidden_states)
        values, alpha = hidden_states.float(), self.alpha.float()
        return (values + (alpha + 1e-9).reciprocal() * (alpha * values).sin().square()).half()


class FlexiCodecResidualUnitsMixin:
    """The residual units of DAC's blocks, exact in padded batches.

    Everything past the end of an item is kept 0 between the convolutions, as the padding of a lone
    item is.
    """

    snake1: Snake1d
    res_unit1: nn.Module
    res_unit2: nn.Module
    res_unit3: nn.Module

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for module in self.modules():  # type: ignore[attr-defined]
            if type(module) is Snake1d:
                module.__class__ = FlexiCodecSnake1d

    def residual_units(self, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        """
        Args:
            hidden_states: `(batch_size, channels, length)`.
            lengths: `(batch_size,)`; `None` when nothing is padding.
        """
        for unit in (self.res_unit1, self.res_unit2, self.res_unit3):
            # Snake keeps 0 at 0, so it is enough to zero the output of a unit.
            hidden_states = _zero_past_end(unit(hidden_states), lengths)
        return hidden_states


class FlexiCodecEncoderBlock(FlexiCodecResidualUnitsMixin, DacEncoderBlock):
    """DAC's encoder block, exact in padded batches."""

    def forward(self, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        hidden_states = self.snake1(self.residual_units(hidden_states, lengths))
        return _zero_past_end(self.conv1(hidden_states), self.output_length(lengths))

    def output_length(self, length: Tensor | None) -> Tensor | None:
        return None if length is None else length // self.conv1.stride[0]


class FlexiCodecDecoderBlock(FlexiCodecResidualUnitsMixin, DacDecoderBlock):
    """DAC's decoder block, exact in padded batches."""

    def forward(self, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        lengths = self.output_length(lengths)
        return self.residual_units(_zero_past_end(self.conv_t1(self.snake1(hidden_states)), lengths), lengths)

    def output_length(self, length: Tensor | None) -> Tensor | None:
        if length is None:
            return None
        conv = self.conv_t1
        return (length - 1) * conv.stride[0] - 2 * conv.padding[0] + conv.kernel_size[0]


class FlexiCodecAcousticEncoder(nn.Module):
    """The encoder of DAC (arXiv 2306.06546) on batches with padding: waveforms to frames."""

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        size, ratios = config.encoder_hidden_size, config.downsampling_ratios
        self.hop_length = config.hop_length
        self.conv1 = nn.Conv1d(1, size, kernel_size=7, padding=3)
        self.block = nn.ModuleList(FlexiCodecEncoderBlock(config, ratio, i + 1) for i, ratio in enumerate(ratios))
        self.snake1 = FlexiCodecSnake1d(size * 2 ** len(ratios))
        self.conv2 = nn.Conv1d(size * 2 ** len(ratios), config.hidden_size, kernel_size=3, padding=1)

    def forward(self, hidden_states: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: `(batch_size, 1, num_samples)`, whole frames.
            lengths: `(batch_size,)` in samples, whole frames; `None` when nothing is padding.

        Returns:
            `(batch_size, hidden_size, num_frames)`.
        """
        hidden_states = _zero_past_end(self.conv1(_zero_past_end(hidden_states, lengths)), lengths)
        for block in self.block:
            hidden_states = block(hidden_states, lengths)
            lengths = block.output_length(lengths)
        return self.conv2(self.snake1(hidden_states))

    def encode(self, waveforms: Tensor, num_samples: "_Lengths", chunk: Chunk | None) -> Tensor:
        """Encode waveforms of any length, whole or in chunks.

        Args:
            waveforms: `(batch_size, length)`.
            num_samples: Samples of each item.
            chunk: Size and context of the chunks in frames.

        Returns:
            `(batch_size, num_frames, hidden_size)`.
        """
        hop_length = self.hop_length
        num_frames = _Lengths(*(-(-lengths // hop_length) for lengths in num_samples))
        length = int(num_frames.host.max()) * hop_length
        waveforms = _fit_length(waveforms, length)
        waveforms = waveforms.to(self.conv1.weight.dtype) * _length_mask(num_samples.device, length, waveforms.device)

        def run(rows: Tensor | slice, window: slice) -> Tensor:
            samples = waveforms[rows, window.start * hop_length : window.stop * hop_length]
            lengths = None
            if int(num_frames.host[rows].min()) < window.stop:
                lengths = (num_frames.device[rows].clamp(max=window.stop) - window.start) * hop_length
            return self(samples[:, None], lengths).transpose(1, 2)

        return run_in_windows(run, num_frames.host, chunk)


class FlexiCodecAcousticDecoder(nn.Module):
    """The decoder of DAC (arXiv 2306.06546) on batches with padding: frames to waveforms."""

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        size, ratios = config.decoder_hidden_size, config.upsampling_ratios
        self.conv1 = nn.Conv1d(config.hidden_size, size, kernel_size=7, padding=3)
        self.block = nn.ModuleList(FlexiCodecDecoderBlock(config, ratio, i) for i, ratio in enumerate(ratios))
        self.snake1 = FlexiCodecSnake1d(size // 2 ** len(ratios))
        self.conv2 = nn.Conv1d(size // 2 ** len(ratios), 1, kernel_size=7, padding=3)

    def forward(self, hidden_states: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: `(batch_size, hidden_size, num_frames)`.
            lengths: `(batch_size,)` in frames; `None` when nothing is padding.

        Returns:
            `(batch_size, 1, num_samples)` with, for each item, `output_length(lengths)` samples and
            then zeros.
        """
        hidden_states = _zero_past_end(self.conv1(_zero_past_end(hidden_states, lengths)), lengths)
        for block in self.block:
            hidden_states = block(hidden_states, lengths)
            lengths = block.output_length(lengths)
        return _zero_past_end(torch.tanh(self.conv2(self.snake1(hidden_states))), lengths)

    def output_length(self, length: Tensor) -> Tensor:
        """Number of samples that `length` frames decode to: 1280 per frame, less the 16 that the odd stride costs."""
        for block in self.block:
            length = block.output_length(length)
        return length


def _zero_past_end(hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
    """Set `hidden_states` `(batch_size, channels, length)` to 0 past the `lengths` `(batch_size,)` of the items."""
    if lengths is None:
        return hidden_states
    positions = torch.arange(hidden_states.shape[-1], device=hidden_states.device)
    return hidden_states * (positions < lengths[:, None, None])


class FlexiCodecFSMN(FunAsrNanoFSMN):
    """The memory block of the semantic encoder. Its convolution pads, and it needs no mask without padding."""

    def forward(self, hidden_states: Tensor, input_features_mask: Tensor | None) -> Tensor:
        if input_features_mask is not None:
            hidden_states = hidden_states * input_features_mask[..., None]
        return self.conv(self.pad(hidden_states.transpose(1, 2))).transpose(1, 2) + hidden_states


class FlexiCodecSemanticEncoder(FunAsrNanoEncoder):
    """
    SenseVoice's encoder, which is told that nothing is padding. The one of transformers looks into the
    mask: the host waits for it.
    """

    def __init__(self, config: FunAsrNanoEncoderConfig):
        super().__init__(config)
        for layer in self.layers:
            fsmn = layer.self_attn.fsmn
            fsmn.__class__ = FlexiCodecFSMN
            left, right = fsmn.pad.padding
            if left == right:
                fsmn.conv.padding, fsmn.pad = (left,), nn.Identity()

    def forward(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> BaseModelOutput:
        """
        Args:
            input_features: `(batch_size, num_features, input_size)`.
            input_features_mask: `(batch_size, num_features)`, `None` when nothing is padding.
        """
        hidden_states = input_features.to(self.layers[0].input_layernorm.weight.dtype)
        attention_mask = None
        if input_features_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=input_features_mask,
                allow_is_bidirectional_skip=False,
            )
            input_features_mask = input_features_mask.to(hidden_states.dtype)
        hidden_states = hidden_states * self.scaling + self.position_embeddings(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, input_features_mask)
        return BaseModelOutput(last_hidden_state=hidden_states)


class FlexiCodecSemanticQuantizer(nn.Module):
    """Tokens of the semantic stream: ConvNeXt layers, finite scalar quantization, ConvNeXt layers back."""

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.semantic_model_config.hidden_size, config.convnext_hidden_size)
        self.encoder = nn.ModuleList(FlexiCodecConvNeXtLayer(config) for _ in range(config.num_convnext_layers))
        self.fsq = FlexiCodecFiniteScalarQuantizer(config)
        self.decoder = nn.ModuleList(FlexiCodecConvNeXtLayer(config) for _ in range(config.num_convnext_layers))
        self.out_proj = nn.Linear(config.convnext_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: `(batch_size, num_tokens, semantic_hidden_size)`.
            token_mask: `(batch_size, num_tokens)`, or `None`.

        Returns:
            The semantic latents `(batch_size, num_tokens, hidden_size)` and the codes `(batch_size,
            num_tokens)`.
        """
        hidden_states = self.in_proj(hidden_states)
        for layer in self.encoder:
            hidden_states = layer(hidden_states, token_mask)
        quantized, codes = self.fsq(hidden_states)
        return self._decode(quantized, token_mask), codes

    def from_codes(self, codes: Tensor, token_mask: Tensor | None) -> Tensor:
        """The semantic latents `(batch_size, num_tokens, hidden_size)` of codes `(batch_size, num_tokens)`."""
        return self._decode(self.fsq.from_codes(codes), token_mask)

    def _decode(self, hidden_states: Tensor, token_mask: Tensor | None) -> Tensor:
        for layer in self.decoder:
            hidden_states = layer(hidden_states, token_mask)
        return self.out_proj(hidden_states)


class FlexiCodecPreTrainedModel(FlexiCodecReleaseMixin, OffloadedDeviceMixin, PreTrainedAudioTokenizerBase):
    config: FlexiCodecConfig
    config_class = FlexiCodecConfig
    base_model_prefix = "flexicodec"
    main_input_name = "input_values"
    input_modalities = "audio"
    # The losses are means over the batch, so `Trainer` itself averages over accumulation steps.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "FlexiCodecTransformerLayer",
        "FlexiCodecConvNeXtLayer",
        "FlexiCodecAcousticEncoder",
        "FlexiCodecAcousticDecoder",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    # ******** FlexiCodec specific: a second Auto class in the configuration ********
    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        if self._auto_class is not None:
            # `register_for_auto_class` writes one Auto class, and this model has two.
            auto_map = getattr(self.config, "auto_map", None) or {}
            name = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            self.config.auto_map = auto_map | {"AutoModelForAudioTokenization": name}
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, Snake1d):
            init.ones_(module.alpha)
        elif isinstance(module, FlexiCodecTransformerLayer):
            init.constant_(module.self_attn_layer_scale, self.config.layer_scale_initial_scale)
            init.constant_(module.mlp_layer_scale, self.config.layer_scale_initial_scale)
        elif isinstance(module, FlexiCodecTokenAggregator):
            init.normal_(module.query_embedding, std=std)
        elif isinstance(module, FlexiCodecModel):
            init.copy_(module.semantic_query_ids, torch.tensor(self.config.semantic_query_ids))
        elif isinstance(module, FlexiCodecFiniteScalarQuantizer):
            levels = torch.tensor(self.config.semantic_quantization_levels)
            init.copy_(module.levels, levels)
            init.copy_(module.basis, _place_values(levels))


class _QuantizedTokens(NamedTuple):
    """Codes `(batch_size, num_quantizers, num_tokens)`, latents `(batch_size, num_tokens, hidden_size)`, losses."""

    codes: Tensor
    latents: Tensor
    semantic_latents: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


class FlexiCodecModel(FlexiCodecPreTrainedModel):
    r"""
    The FlexiCodec speech codec ([arXiv 2510.00981](https://huggingface.co/papers/2510.00981)).

    It turns waveforms into 3 to 12.5 tokens per second. Neighboring frames that a frozen speech
    recognizer finds similar share a token. Each token has a semantic code, residual acoustic codes,
    and a length in frames.

    Padding never changes a result: each item of a padded batch gets the same codes, lengths and
    waveform as on its own, up to the rounding of the kernels.

    The semantic encoder is frozen: it runs without gradients, and `train()` leaves it in evaluation
    mode.

    Args:
        config ([`FlexiCodecConfig`]): Sizes of the model.

    Attributes:
        exact_convolutions (`bool`):
            Whether `encode` computes float32 convolutions on NVIDIA GPUs as exactly as on a CPU
            (the default), so that the codes are the same. `False` leaves the choice to PyTorch,
            whose default is TF32: faster, and some acoustic codes differ.

    Example:

    ```python
    >>> import flexicodec_hf
    >>> from transformers import AutoFeatureExtractor, AutoModel

    >>> feature_extractor = AutoFeatureExtractor.from_pretrained("jiaqili3/flexicodec")
    >>> codec = AutoModel.from_pretrained("jiaqili3/flexicodec")
    >>> inputs = feature_extractor(audio, sampling_rate=16_000, return_tensors="pt")
    >>> encoded = codec.encode(**inputs, target_frame_rate=6.25)
    >>> audio_values = codec.decode(**encoded).audio_values
    ```
    """

    exact_convolutions = True

    def __init__(self, config: FlexiCodecConfig):
        super().__init__(config)
        semantic_config = config.semantic_model_config
        self.semantic_encoder = FlexiCodecSemanticEncoder._from_config(semantic_config)
        self.semantic_query_embedding = nn.Embedding(config.num_semantic_queries, semantic_config.input_size)
        self.semantic_query_ids = nn.Buffer(torch.tensor(config.semantic_query_ids), persistent=False)
        self.acoustic_encoder = FlexiCodecAcousticEncoder(config)
        self.frame_merger = FlexiCodecFrameMerger(config)
        self.semantic_aggregator = FlexiCodecTokenAggregator(
            config, stream_size=semantic_config.hidden_size, hidden_size=config.aggregator_hidden_size
        )
        self.acoustic_aggregator = FlexiCodecTokenAggregator(
            config, stream_size=config.hidden_size, hidden_size=config.hidden_size
        )
        self.semantic_quantizer = FlexiCodecSemanticQuantizer(config)
        self.acoustic_quantizer = FlexiCodecResidualVectorQuantizer(config)
        self.bottleneck = FlexiCodecTransformer(
            config,
            stream_size=config.hidden_size,
            hidden_size=config.bottleneck_hidden_size,
            intermediate_size=config.bottleneck_intermediate_size,
            num_layers=config.num_bottleneck_layers,
            num_heads=config.num_bottleneck_attention_heads,
        )
        self.acoustic_decoder = FlexiCodecAcousticDecoder(config)
        self.post_init()
        self.semantic_encoder.requires_grad_(False)
        self.semantic_query_embedding.requires_grad_(False)

    def train(self, mode: bool = True) -> "FlexiCodecModel":
        super().train(mode)
        self.semantic_encoder.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The first layer that is trained, which reads waveforms."""
        return self.acoustic_encoder.conv1

    @can_return_tuple
    def encode(
        self,
        input_values: Tensor,
        input_features: Tensor,
        padding_mask: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        merging_threshold: float | list[float] | Tensor | None = None,
        target_frame_rate: float | list[float] | Tensor | None = None,
        chunk_length_s: float | None = None,
        chunk_context_s: float = 5.0,
    ) -> FlexiCodecEncoderOutput:
        r"""
        Turn speech into tokens.

        Args:
            input_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`):
                Waveforms at `config.sampling_rate`, from [`FlexiCodecFeatureExtractor`].
            input_features (`torch.Tensor` of shape `(batch_size, num_features, 560)`):
                Filterbank features of the same waveforms, from the same feature extractor.
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for samples, 0 for the padding after them.
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_features)`, *optional*):
                1 for features, 0 for the padding after them.
            num_quantizers (`int`, *optional*):
                Number of codebooks of `audio_codes`; 1 is the semantic one alone. Defaults to all,
                which is also what a larger number gives.
            merging_threshold (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                Cosine similarity above which neighboring frames share a token, for all items or for
                each. 1.0 never merges. Defaults to `config.merging_threshold`.
            target_frame_rate (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                Average tokens per second to aim at, instead of a threshold: each item gets the
                threshold that comes closest to this rate.
            chunk_length_s (`float`, *optional*):
                Process long audio in chunks of this many seconds, which bounds the memory. Up to
                ten minutes the tokens are those without chunks: the convolutions run in chunks,
                and the attention sees everything. Longer audio cannot be encoded without; there
                the attention sees a chunk and `chunk_context_s` around it, and other chunks give
                other codes. Merging and convolutions are always those of the whole, and no token
                breaks at a seam. Each hour takes 25 MB for frames.
            chunk_context_s (`float`, *optional*, defaults to 5.0):
                Context on each side of a chunk, in seconds: at least 2.1 for the convolutions to
                be exact.

        Returns:
            [`FlexiCodecEncoderOutput`]

        Raises:
            ValueError: The inputs have wrong shapes, dtypes or values or do not belong together, or
            an argument is out of its range.
            TypeError: An input is not a tensor, or an argument is not a number.
        """
        chunking: Any = {"chunk_length_s": chunk_length_s, "chunk_context_s": chunk_context_s}
        frames = self.encode_frames(
            input_values, input_features, padding_mask, input_features_mask, num_quantizers, **chunking
        )
        return self.quantize_frames(frames, num_quantizers, merging_threshold, target_frame_rate, **chunking)

    def encode_frames(
        self,
        input_values: Tensor,
        input_features: Tensor,
        padding_mask: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        chunk_length_s: float | None = None,
        chunk_context_s: float = 5.0,
    ) -> FlexiCodecFramesOutput:
        r"""
        Run both encoders: the first and longest step of `encode`, before any frames are merged.
        `quantize_frames` is the second step; it can follow several times, once for each threshold.

        The arguments are those of `encode`. `num_quantizers=1` leaves out the acoustic encoder.

        Returns:
            [`FlexiCodecFramesOutput`]

        Raises:
            ValueError: The inputs have wrong shapes or do not belong together.
        """
        chunk = _chunk(self.config, chunk_length_s, chunk_context_s)
        num_quantizers = _check_num_quantizers(self.config, num_quantizers)
        _check_inputs(self.config, input_values, input_features)
        num_samples, num_features = _valid_lengths(
            input_values=(input_values, padding_mask), input_features=(input_features, input_features_mask)
        )
        num_frames = _common_frames(self.config, num_features, num_samples)
        acoustic_frames = None
        with _exact_convolutions(self.exact_convolutions and input_features.device.type == "cuda"):
            semantic_frames = self._encode_semantic(input_features, num_features, num_frames, chunk)
            if num_quantizers != 1:
                acoustic_frames = self.acoustic_encoder.encode(input_values[:, 0], num_samples, chunk)
        if acoustic_frames is not None:
            # The acoustic frames are 0 to 2 more. The last ones go (flexicodec 0.1.2,
            # modeling_flexicodec.py, line 623).
            acoustic_frames = acoustic_frames[:, : semantic_frames.shape[1]]
        return FlexiCodecFramesOutput(semantic_frames, acoustic_frames, num_frames.device)

    def quantize_frames(
        self,
        frames: FlexiCodecFramesOutput,
        num_quantizers: int | None = None,
        merging_threshold: float | list[float] | Tensor | None = None,
        target_frame_rate: float | list[float] | Tensor | None = None,
        token_lengths: Tensor | None = None,
        chunk_length_s: float | None = None,
        chunk_context_s: float = 5.0,
    ) -> FlexiCodecEncoderOutput:
        r"""
        Merge frames and turn them into tokens: the second step of `encode`. It takes the arguments
        of `encode` that are named here, and two of its own.

        Args:
            frames ([`FlexiCodecFramesOutput`]): Output of `encode_frames`.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Number of frames of each token, 0 at padding: a segmentation of your own, instead of
                one by similarity.

        Returns:
            [`FlexiCodecEncoderOutput`]

        Raises:
            ValueError: An argument is out of its range, the lengths do not cover the frames, or `frames` are not
            as `encode_frames` makes them.
            TypeError: `frames` are of another type.
        """
        num_quantizers = _check_num_quantizers(self.config, num_quantizers)
        chunk = _chunk(self.config, chunk_length_s, chunk_context_s)
        _check_frames(self.config, frames)
        if frames.acoustic_frames is None and num_quantizers > 1:
            raise ValueError(
                f"`frames` were encoded with `num_quantizers=1`, which leaves nothing to make {num_quantizers} "
                "codebooks of. Leave it out in `encode_frames`."
            )
        segments = self.frame_merger(
            frames.semantic_frames, frames.num_frames, merging_threshold, target_frame_rate, token_lengths
        )
        quantize = partial(self._quantize, num_acoustic_quantizers=num_quantizers - 1, with_losses=False)
        with _exact_convolutions(self.exact_convolutions and frames.semantic_frames.device.type == "cuda"):
            if chunk is None:
                tokens = quantize(frames, segments)
            else:
                tokens = _quantize_in_chunks(quantize, frames, segments, chunk, _whole_frames(self.config))
        return _encoder_output(tokens, segments)

    @can_return_tuple
    def decode(
        self,
        audio_codes: Tensor | None = None,
        token_lengths: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        latents: Tensor | None = None,
        chunk_length_s: float | None = None,
        chunk_context_s: float = 5.0,
        num_frames: int | None = None,
        frame_similarities: Tensor | None = None,
        merging_threshold: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> FlexiCodecDecoderOutput:
        r"""
        Turn tokens back into speech. It takes the whole output of `encode`:
        `model.decode(**encoded)`.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
                Codes. Fewer codebooks than were encoded are fine; one codebook is the semantic one
                alone.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Number of frames of each token. Defaults to 1 for each.
            audio_codes_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for tokens, 0 for the padding after them. By default, all tokens after the last
                one with a length are padding.
            latents (`torch.Tensor` of shape `(batch_size, hidden_size, num_tokens)`, *optional*):
                Continuous vectors to decode if there are no `audio_codes`.
            chunk_length_s (`float`, *optional*):
                Decode long audio in chunks of this many seconds, which bounds the memory, apart
                from the waveform. Up to ten minutes the waveform is that without chunks, up to
                rounding: the convolutions run in chunks, and the attention sees everything. In
                longer audio, the attention sees a chunk and `chunk_context_s` around it. Chunks
                fade into each other over one frame (80 ms).
            chunk_context_s (`float`, *optional*, defaults to 5.0):
                Context on each side of a chunk, in seconds. At least 2.1 for the convolutions to be
                exact.
            num_frames (`int`, *optional*):
                Number of frames of the longest item, the largest row sum of `token_lengths`, if
                known, so that `torch.compile(model.decode, fullgraph=True)` works. Checked, except
                under `torch.compile`.
            frame_similarities, merging_threshold (*optional*):
                Ignored. They are here so that the whole output of `encode` can be passed on.
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*):
                The mask of the waveforms that were encoded, 1 for samples, 0 for the padding after
                them. The output is then as long as these: cut, or filled with zeros.

        Returns:
            [`FlexiCodecDecoderOutput`] with 1280 samples per frame, less 16, unless `padding_mask`
            asks for others.

        Raises:
            ValueError: A tensor has a wrong shape or dtype, a code, length or mask is wrong, or an
            item has no token.
            TypeError: An input is not a tensor.
        """
        tokens = latents if audio_codes is None else audio_codes
        if tokens is None:
            raise ValueError("`decode` needs `audio_codes` or `latents`.")
        _check_tensor("latents" if audio_codes is None else "audio_codes", tokens)
        if audio_codes is not None and audio_codes.dtype not in _INTEGERS:
            raise ValueError(f"`audio_codes` must be integers, got {audio_codes.dtype}.")
        if audio_codes is None and not tokens.is_floating_point():
            raise ValueError(f"`latents` must be floats, got {tokens.dtype}.")
        if num_frames is None and token_lengths is None and audio_codes_mask is None:
            num_frames = tokens.shape[-1]
        token_lengths, token_mask, covered = _check_tokens(
            self.config, tokens, token_lengths, audio_codes_mask, num_frames
        )
        is_padded = None
        if covered is not None:
            is_padded, num_frames = covered[0] < covered[1], covered[1]
        if padding_mask is not None and (padding_mask.ndim != 2 or len(padding_mask) != len(tokens)):
            raise ValueError(
                f"`padding_mask` must have the shape (batch_size, num_samples) = ({len(tokens)}, num_samples), got "
                f"{tuple(padding_mask.shape)}."
            )
        output = self._decode_tokens(
            tokens, token_lengths, token_mask, num_frames, chunk_length_s, chunk_context_s, is_padded
        )
        if padding_mask is None:
            return output
        audio_values, num_samples = output.audio_values, padding_mask.shape[1]
        audio_values = _fit_length(audio_values, num_samples) * padding_mask[:, None]  # type: ignore[arg-type]
        return FlexiCodecDecoderOutput(audio_values=audio_values, padding_mask=padding_mask.bool())

    def _decode_tokens(
        self,
        tokens: Tensor,
        token_lengths: Tensor,
        token_mask: Tensor,
        num_frames: int | None = None,
        chunk_length_s: float | None = None,
        chunk_context_s: float = 5.0,
        is_padded: bool | None = None,
    ) -> FlexiCodecDecoderOutput:
        """
        Decode codes or latents, of tokens of any number of frames: a text model may predict 0, or 9.
        `is_padded` says whether the items differ in frames, if that is known.
        """
        if tokens.is_floating_point():
            vectors = tokens.transpose(1, 2).to(self.acoustic_decoder.conv1.weight.dtype)
        else:
            codes = tokens.long() * token_mask[:, None]
            vectors = self.semantic_quantizer.from_codes(codes[:, 0], token_mask)
            if codes.shape[1] > 1:
                vectors = vectors + self.acoustic_quantizer.from_codes(codes[:, 1:])
        lengths = token_lengths.sum(dim=1)
        frames = repeat_by_token(vectors, token_lengths, int(lengths.max()) if num_frames is None else num_frames)
        chunk = _chunk(self.config, chunk_length_s, chunk_context_s)
        audio_values = self._decode_frames(frames, lengths, chunk, is_padded)
        mask = _length_mask(self.acoustic_decoder.output_length(lengths), audio_values.shape[1], audio_values.device)
        return FlexiCodecDecoderOutput(audio_values=audio_values[:, None], padding_mask=mask)

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        input_features: Tensor,
        padding_mask: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        num_quantizers: int | Tensor | None = None,
        merging_threshold: float | list[float] | Tensor | None = None,
        target_frame_rate: float | list[float] | Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlexiCodecOutput:
        r"""
        Reconstruct speech: `encode`, then `decode`, with gradients through the quantizers
        (straight-through) and with the losses of the quantizers.

        In training mode, arguments that are not given are drawn for the batch: a threshold from
        `config.merging_threshold_range`; no acoustic quantizers at all with probability
        `config.quantizer_bypass_rate`; otherwise, for a share `config.quantizer_dropout` of the
        items, a random number of them (flexicodec 0.1.2, dac_quantize.py,
        `ResidualVectorQuantize.forward`).

        Args:
            num_quantizers (`int` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                Number of codebooks, as in `encode`. A tensor says for each item how many its
                reconstruction and losses use; all codes are returned then. The other arguments are
                those of `encode`.
            kwargs: What `Trainer` and other programs pass to any model. It has no effect.

        Returns:
            [`FlexiCodecOutput`] whose `audio_values` are as long as `input_values`.
        """
        check_options(self, kwargs)
        if self.training:
            if merging_threshold is None and target_frame_rate is None:
                merging_threshold = torch.empty(()).uniform_(*self.config.merging_threshold_range)
            if num_quantizers is None and isinstance(input_values, Tensor):
                num_quantizers = _draw_num_quantizers(self.config, len(input_values))
        _check_inputs(self.config, input_values, input_features)
        if isinstance(num_quantizers, Tensor) and num_quantizers.ndim:
            _check_num_quantizers_per_item(num_quantizers, len(input_values))
            num_quantizers = num_quantizers.to(input_values.device)
        else:
            num_quantizers = _check_num_quantizers(self.config, num_quantizers)

        frames = self.encode_frames(input_values, input_features, padding_mask, input_features_mask)
        segments = self.frame_merger(frames.semantic_frames, frames.num_frames, merging_threshold, target_frame_rate)
        tokens = self._quantize(frames, segments, num_quantizers - 1)
        latents = repeat_by_token(tokens.latents, segments.token_lengths, frames.semantic_frames.shape[1])
        audio_values = self._decode_frames(latents, frames.num_frames, chunk=None)

        audio_values = _fit_length(audio_values, input_values.shape[-1])
        if padding_mask is not None:
            audio_values = audio_values * padding_mask.to(audio_values.dtype)

        return FlexiCodecOutput(
            audio_values=audio_values[:, None],
            **_losses(self.config, frames, segments, tokens),
            **_encoder_output(tokens, segments),
        )

    def get_semantic_features(self, audio_codes: Tensor, audio_codes_mask: Tensor | None = None) -> Tensor:
        r"""
        Decode semantic codes into continuous features, without the acoustic ones.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
                Codes, of which codebook 0 is used.
            audio_codes_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for tokens, 0 for the padding after them.

        Returns:
            `torch.Tensor` of shape `(batch_size, hidden_size, num_tokens)`; 0 at padding.
        """
        _check_tensor("audio_codes", audio_codes)
        if audio_codes.dtype not in _INTEGERS:
            raise ValueError(f"`audio_codes` must be integers, got {audio_codes.dtype}.")
        _, token_mask, _ = _check_tokens(self.config, audio_codes, None, audio_codes_mask)
        features = self.semantic_quantizer.from_codes(audio_codes[:, 0].long() * token_mask, token_mask)
        return (features * token_mask[..., None]).transpose(1, 2)

    def get_semantic_frames(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> Tensor:
        r"""
        Run the frozen semantic encoder alone: one vector per codec frame, before anything is merged
        or quantized.

        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_features, 560)`):
                Filterbank features from [`FlexiCodecFeatureExtractor`].
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_features)`, *optional*):
                1 for features, 0 for the padding after them.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_frames, semantic_hidden_size)`, on the
            frames that the tokens of `encode` cover; 0 at padding.
        """
        _check_features(self.config, input_features)
        (num_features,) = _valid_lengths(input_features=(input_features, input_features_mask))
        num_frames = _num_frames(self.config, num_features)
        frames = self._encode_semantic(input_features, num_features, num_frames, chunk=None)
        return frames * _length_mask(num_frames.device, frames.shape[1], frames.device)[..., None]

    def _encode_semantic(
        self, input_features: Tensor, num_features: "_Lengths", num_frames: "_Lengths", chunk: Chunk | None
    ) -> Tensor:
        """Output of the frozen semantic encoder on codec frames, `(batch_size, num_frames, size)` in float32."""
        frames = self._encode_features(input_features, num_features, chunk and _in_features(self.config, chunk))
        return _resample(frames, num_features.device, num_frames.device, int(num_frames.host.max()))

    @torch.no_grad()
    def _encode_features(self, input_features: Tensor, num_features: "_Lengths", chunk: Chunk | None) -> Tensor:
        """Output of the frozen semantic encoder, `(batch_size, num_features, size)`; chunks count features."""
        queries = self.semantic_query_embedding(self.semantic_query_ids)
        # In float32 whatever the model's dtype: the similarities of these frames decide the
        # merging.
        return _run_semantic_encoder(self.semantic_encoder, queries, input_features, num_features, chunk).float()

    def _quantize(
        self,
        frames: FlexiCodecFramesOutput,
        segments: FlexiCodecSegments,
        num_acoustic_quantizers: int | Tensor,
        with_losses: bool = True,
    ) -> _QuantizedTokens:
        """Frames to tokens; without acoustic frames, to semantic codes alone."""
        token_lengths, frame_mask, token_mask = segments.token_lengths, None, None
        if segments.is_padded:
            frame_mask, token_mask = segments.frame_mask, segments.token_mask
        dtype = self.semantic_quantizer.in_proj.weight.dtype
        semantic = self.semantic_aggregator(frames.semantic_frames.to(dtype), token_lengths, frame_mask, token_mask)
        semantic_latents, semantic_codes = self.semantic_quantizer(semantic, token_mask)
        if frames.acoustic_frames is None:
            no_loss = semantic_latents.new_zeros((), dtype=torch.float32)
            return _QuantizedTokens(semantic_codes[:, None], semantic_latents, semantic_latents, no_loss, no_loss)
        acoustic = self.acoustic_aggregator(frames.acoustic_frames, token_lengths, frame_mask, token_mask)
        acoustic_latents, acoustic_codes, commitment_loss, codebook_loss = self.acoustic_quantizer(
            acoustic - semantic_latents, num_acoustic_quantizers, token_mask, with_losses
        )
        codes = torch.cat([semantic_codes[:, None], acoustic_codes], dim=1)
        latents = semantic_latents + acoustic_latents
        return _QuantizedTokens(codes, latents, semantic_latents, commitment_loss, codebook_loss)

    def _decode_frames(
        self, frames: Tensor, lengths: Tensor, chunk: Chunk | None, is_padded: bool | None = None
    ) -> Tensor:
        """Latents `(batch_size, num_frames, hidden_size)` to waveforms `(batch_size, num_samples)`."""
        if chunk is not None:
            return self._decode_in_chunks(frames, lengths.cpu(), chunk)
        if is_padded is None:
            is_padded = _is_padded(lengths, frames.shape[1])
        padded = lengths.to(frames.device) if is_padded else None
        mask = None if padded is None else _length_mask(padded, frames.shape[1], frames.device)
        return self.acoustic_decoder(self.bottleneck(frames, mask).transpose(1, 2), padded)[:, 0]

    def _decode_in_chunks(self, frames: Tensor, lengths: Tensor, chunk: Chunk) -> Tensor:
        def padding(rows: Tensor | slice, window: slice) -> Tensor | None:
            inside = lengths[rows].clamp(max=window.stop) - window.start
            return inside.to(frames.device) if _is_padded(inside, window.stop - window.start) else None

        def attend(rows: Tensor | slice, window: slice) -> Tensor:
            part, padded = frames[rows, window], padding(rows, window)
            return self.bottleneck(part, None if padded is None else _length_mask(padded, part.shape[1], part.device))

        def decode(rows: Tensor | slice, window: slice) -> Tensor:
            return self.acoustic_decoder(hidden_states[rows, window].transpose(1, 2), padding(rows, window))[:, 0]

        hidden_states = run_in_windows(attend, lengths, chunk, whole_length=_whole_frames(self.config))
        return run_in_windows(decode, lengths, chunk, self.config.hop_length, fade_length=1)


_precision_lock = threading.Lock()
_precision_users = 0
_precision_before = ""


@contextmanager
def _exact_convolutions(enabled: bool) -> Iterator[None]:
    """
    Float32 convolutions without TF32, whose 10 bits move codes. PyTorch has one setting for all
    threads: the last user puts it back.
    """
    global _precision_users, _precision_before
    if not enabled:
        yield
        return
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    with _precision_lock:
        if _precision_users == 0:
            _precision_before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
        _precision_users += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0:
                convolutions.fp32_precision = _precision_before


def _run_semantic_encoder(
    encoder: nn.Module, queries: Tensor, input_features: Tensor, num_features: "_Lengths", chunk: Chunk | None
) -> Tensor:
    """Output `(batch_size, num_features, size)` of SenseVoice's encoder, without that of its `queries` `(n, 560)`."""
    longest = int(num_features.host.max())
    limit: int = encoder.config.max_position_embeddings - 1 - len(queries)  # type: ignore[assignment, union-attr, operator]
    if chunk is not None and longest > limit:
        longest = min(longest, chunk.size + 2 * chunk.context)
    if longest > limit:
        raise ValueError(
            f"`input_features` hold {longest} frames, the semantic encoder's positions end at {limit} (60 ms each). "
            "Pass `chunk_length_s=30` to process long audio in chunks."
        )

    def run(rows: Tensor | slice, window: slice) -> Tensor:
        features = input_features[rows, window]
        features = torch.cat([queries.to(features.dtype).expand(len(features), -1, -1), features], dim=1)
        lengths = num_features.device[rows].clamp(max=window.stop) - window.start + len(queries)
        mask = None
        if int(num_features.host[rows].min()) < window.stop:
            mask = _length_mask(lengths, features.shape[1], features.device)
        return encoder(features, mask).last_hidden_state[:, len(queries) :]

    return run_in_windows(run, num_features.host, chunk, whole_length=limit)


def _whole_frames(config: FlexiCodecConfig) -> int:
    """Codec frames of the longest recording that the semantic encoder takes in one piece: ten minutes as released."""
    num_features = config.semantic_model_config.max_position_embeddings - 1 - len(config.semantic_query_ids)
    return int(num_features / config.semantic_downsampling_factor)


def _quantize_in_chunks(
    quantize: Callable[[FlexiCodecFramesOutput, FlexiCodecSegments], _QuantizedTokens],
    frames: FlexiCodecFramesOutput,
    segments: FlexiCodecSegments,
    chunk: Chunk,
    whole_length: int,
) -> _QuantizedTokens:
    """
    The tokens of `quantize(frames, segments)`, item by item. Those of items longer than `whole_length` are made some
    whole tokens at a time, with whole tokens of context.
    """
    items = []
    for item, num_frames in enumerate(frames.num_frames.tolist()):
        parts = [
            _quantize_window(quantize, frames, segments, item, core, window)
            for core, window in windows(num_frames, chunk if num_frames > whole_length else Chunk(num_frames, 0))
        ]
        found = [(tokens.codes[0].t(), tokens.latents[0]) for tokens, _ in filter(None, parts)]
        items.append([torch.cat(tensors) for tensors in zip(*found, strict=True)])
    codes, latents = (
        nn.utils.rnn.pad_sequence(list(tensors), batch_first=True) for tensors in zip(*items, strict=True)
    )
    padding = segments.token_lengths.shape[1] - codes.shape[1]
    codes, latents = (F.pad(tensor, (0, 0, 0, padding)) for tensor in (codes, latents))
    no_loss = latents.new_zeros((), dtype=torch.float32)
    return _QuantizedTokens(codes.transpose(1, 2), latents, latents, no_loss, no_loss)


def _quantize_window(
    quantize: Callable[[FlexiCodecFramesOutput, FlexiCodecSegments], _QuantizedTokens],
    frames: FlexiCodecFramesOutput,
    segments: FlexiCodecSegments,
    item: int,
    core: slice,
    window: slice,
) -> tuple[_QuantizedTokens, Tensor] | None:
    """The tokens of an item that begin in `core`, with those in `window` as context, and their lengths; if any do."""
    starts = F.pad(segments.token_lengths[item].cumsum(dim=0), (1, 0))
    bounds = torch.tensor([window.start, core.start, core.stop, window.stop], device=starts.device)
    first_context, first, last, last_context = torch.searchsorted(starts, bounds).tolist()
    if first == last:
        return None
    last_context = max(last, min(last_context, len(starts) - 1))
    span = slice(int(starts[first_context]), int(starts[last_context]))
    tokens = quantize(frames.cut(item, span), segments.cut(item, span, slice(first_context, last_context)))
    kept = slice(first - first_context, last - first_context)
    codes, latents = tokens.codes[:, :, kept], tokens.latents[:, kept]
    return tokens._replace(codes=codes, latents=latents), segments.token_lengths[item, first:last]


def _encoder_output(tokens: _QuantizedTokens, segments: FlexiCodecSegments) -> FlexiCodecEncoderOutput:
    return FlexiCodecEncoderOutput(
        audio_codes=tokens.codes * segments.token_mask[:, None],
        token_lengths=segments.token_lengths,
        audio_codes_mask=segments.token_mask,
        latents=(tokens.latents * segments.token_mask[..., None]).transpose(1, 2),
        frame_similarities=segments.similarities,
        merging_threshold=segments.threshold,
    )


def _losses(
    config: FlexiCodecConfig, frames: FlexiCodecFramesOutput, segments: FlexiCodecSegments, tokens: _QuantizedTokens
) -> dict[str, Tensor | None]:
    """The losses of [`FlexiCodecOutput`]; without distillation where the two spaces differ in size."""
    loss = config.commitment_loss_weight * tokens.commitment_loss
    loss = loss + config.codebook_loss_weight * tokens.codebook_loss
    distillation_loss = None
    if frames.semantic_frames.shape[-1] == tokens.semantic_latents.shape[-1]:
        merged = mean_by_token(frames.semantic_frames, segments.token_lengths, segments.frame_mask)
        error = (merged - tokens.semantic_latents.float()).square().mean(dim=-1)
        distillation_loss = (error * segments.token_mask).sum() / segments.token_mask.sum()
        loss = loss + config.distillation_loss_weight * distillation_loss
    return {
        "loss": loss,
        "commitment_loss": tokens.commitment_loss,
        "codebook_loss": tokens.codebook_loss,
        "distillation_loss": distillation_loss,
    }


def _draw_num_quantizers(config: FlexiCodecConfig, batch_size: int) -> int | Tensor:
    """How many codebooks a training batch uses: the semantic one alone, or a number for each item."""
    # CODEPATH: the training of every checkpoint takes both, at random.
    if torch.rand(()).item() < config.quantizer_bypass_rate:
        return 1
    num_quantizers = torch.full((batch_size,), config.num_quantizers)
    num_dropped = int(batch_size * config.quantizer_dropout)
    num_quantizers[:num_dropped] = torch.randint(2, config.num_quantizers + 1, (num_dropped,))
    return num_quantizers


class _Lengths(NamedTuple):
    """Lengths `(batch_size,)` on the device, for kernels, and on the CPU, for decisions that must not wait."""

    device: Tensor
    host: Tensor


def _num_frames(config: FlexiCodecConfig, num_features: _Lengths) -> _Lengths:
    """Numbers of codec frames (80 ms) of numbers of features (60 ms)."""
    # The released factor is this rounded one, and lengths depend on it (flexicodec 0.1.2,
    # modeling_flexicodec.py, line 410).
    host = (num_features.host.double() / config.semantic_downsampling_factor).long().clamp(min=1)
    if num_features.device.device.type in ("cpu", "mps"):  # MPS has no float64
        return _Lengths(host.to(num_features.device.device), host)
    device = (num_features.device.double() / config.semantic_downsampling_factor).long().clamp(min=1)
    return _Lengths(device, host)


def _common_frames(config: FlexiCodecConfig, num_features: _Lengths, num_samples: _Lengths) -> _Lengths:
    """Numbers of codec frames that the features and the waveforms of the same clips have."""
    num_frames = _num_frames(config, num_features)
    acoustic = -(-num_samples.host // config.hop_length)
    surplus = num_frames.host - acoustic
    for semantic, difference in zip(num_frames.host.tolist(), surplus.tolist(), strict=True):
        # The rounded factor gives a frame too many in six hours, which goes.
        if not -2 <= difference <= semantic // 250_000:
            raise ValueError(
                "`input_features` and `input_values` do not belong together: the features of an item last "
                f"{semantic} frames, its waveform {semantic - difference}. Make both with one call of the feature "
                "extractor."
            )
    if int(surplus.max()) <= 0:
        return num_frames
    surplus = surplus.clamp(min=0)
    return _Lengths(num_frames.device - surplus.to(num_frames.device.device), num_frames.host - surplus)


def _chunk(config: FlexiCodecConfig, chunk_length_s: float | None, chunk_context_s: float) -> Chunk | None:
    """The chunk in frames, from seconds."""
    if chunk_length_s is None:
        return None
    numbers = (chunk_length_s, chunk_context_s)
    are_finite = all(isinstance(number, (int, float)) and -math.inf < number < math.inf for number in numbers)
    are_finite = are_finite and max(numbers) < 1e9  # beyond, an integer may have no float
    if not are_finite or chunk_length_s <= 0 or chunk_context_s < 0:
        raise ValueError(
            f"`chunk_length_s` must be positive and `chunk_context_s` not negative, both finite numbers of "
            f"seconds, got {chunk_length_s!r} and {chunk_context_s!r}."
        )
    # A multiple of three frames is a whole number of the semantic encoder's features.
    size = max(round(chunk_length_s * config.frame_rate / 3), 1) * 3
    return Chunk(size, math.ceil(chunk_context_s * config.frame_rate / 3) * 3)


def _in_features(config: FlexiCodecConfig, chunk: Chunk) -> Chunk:
    """A chunk of codec frames, of which there are 3 for 4 features, in features."""
    factor = config.semantic_downsampling_factor
    return Chunk(round(chunk.size * factor), round(chunk.context * factor))


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor, got {type(value).__name__}. Call the feature extractor with "
            '`return_tensors="pt"`, or use `torch.as_tensor`.'
        )
    if value.is_meta or value.layout != torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor with values, got {value.layout} on {value.device}.")


def _check_inputs(config: FlexiCodecConfig, input_values: Tensor, input_features: Tensor) -> None:
    _check_tensor("input_values", input_values)
    if input_values.ndim != 3 or input_values.shape[1] != 1:
        raise ValueError(
            f"`input_values` must have the shape (batch_size, 1, num_samples), got {tuple(input_values.shape)}."
        )
    _check_features(config, input_features)
    if len(input_features) != len(input_values):
        raise ValueError(f"`input_values` holds {len(input_values)} items, `input_features` {len(input_features)}.")


def _check_features(config: FlexiCodecConfig, input_features: Tensor) -> None:
    _check_tensor("input_features", input_features)
    feature_size = config.semantic_model_config.input_size
    if input_features.ndim != 3 or input_features.shape[-1] != feature_size:
        raise ValueError(
            f"`input_features` must have the shape (batch_size, num_features, {feature_size}), "
            f"got {tuple(input_features.shape)}."
        )


def _check_frames(config: FlexiCodecConfig, frames: Any) -> None:
    if not isinstance(frames, FlexiCodecFramesOutput):
        raise TypeError(f"`frames` must be the output of `encode_frames`, got {type(frames).__name__}.")
    for name, value in frames._asdict().items():
        if name != "acoustic_frames" or value is not None:
            _check_tensor(f"frames.{name}", value)
    semantic, acoustic, num_frames = frames
    size = config.semantic_model_config.hidden_size
    shape = tuple(semantic.shape[:2])
    is_shaped = semantic.ndim == 3 and semantic.shape[2] == size and 0 not in shape
    if not is_shaped or (acoustic is not None and tuple(acoustic.shape) != (*shape, config.hidden_size)):
        raise ValueError(
            f"`frames` must have semantic frames (batch_size, num_frames, {size}) and acoustic ones (batch_size, "
            f"num_frames, {config.hidden_size}), got {tuple(semantic.shape)} and "
            f"{None if acoustic is None else tuple(acoustic.shape)}."
        )
    if num_frames.dtype not in _INTEGERS or tuple(num_frames.shape) != shape[:1]:
        raise ValueError(
            f"`frames.num_frames` must be integers of the shape (batch_size,) = {shape[:1]}, got {num_frames.dtype} "
            f"of {tuple(num_frames.shape)}."
        )


def _check_num_quantizers(config: FlexiCodecConfig, num_quantizers: Any) -> int:
    """The number of codebooks as an `int`, at most all; all for `None`."""
    if num_quantizers is None:
        return config.num_quantizers
    try:  # also NumPy's integers, and tensors of one without an axis
        number = None if getattr(num_quantizers, "ndim", 0) else index(num_quantizers)
    except TypeError:
        number = None
    if number is None or isinstance(num_quantizers, bool):
        raise TypeError(
            f"`num_quantizers` must be an integer, got {type(num_quantizers).__name__} {num_quantizers!r}."
        )
    if number < 1:
        raise ValueError(f"`num_quantizers` counts the semantic quantizer and must be at least 1, got {number}.")
    return min(number, config.num_quantizers)


def _check_num_quantizers_per_item(num_quantizers: Tensor, batch_size: int) -> None:
    if tuple(num_quantizers.shape) != (batch_size,) or num_quantizers.dtype not in _INTEGERS:
        raise ValueError(
            f"`num_quantizers` must be one integer or integers of the shape (batch_size,) = ({batch_size},), got "
            f"{num_quantizers.dtype} of {tuple(num_quantizers.shape)}."
        )
    if int(num_quantizers.min()) < 1:
        raise ValueError(
            f"`num_quantizers` counts the semantic quantizer and must be at least 1, got {num_quantizers.tolist()}."
        )


def _check_tokens(
    config: FlexiCodecConfig,
    tokens: Tensor,
    token_lengths: Tensor | None,
    mask: Tensor | None,
    num_frames: int | None = None,
    most_frames_per_token: int | None = None,
) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """
    Lengths, with 0 at padding, and the mask of `tokens` (codes or latents), both `(batch_size, num_tokens)`;
    and the frames of the shortest and the longest item, unless compiling.

    With `most_frames_per_token`, these are tokens of a text model: up to so many frames each, or none, and items
    without tokens.

    Under `torch.compile` only shapes and dtypes are checked. Otherwise one transfer from the device
    brings all values that decide.
    """
    is_codes = tokens.dtype in _INTEGERS
    if tokens.ndim != 3:
        raise ValueError(
            "`audio_codes` must have the shape (batch_size, num_quantizers, num_tokens) and `latents` (batch_size, "
            f"hidden_size, num_tokens), got {tuple(tokens.shape)}."
        )
    shape = (tokens.shape[0], tokens.shape[2])
    for name, value in (("token_lengths", token_lengths), ("audio_codes_mask", mask)):
        if value is None:
            continue
        _check_tensor(name, value)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"`{name}` must have the shape (batch_size, num_tokens) = {shape}, got {tuple(value.shape)}."
            )
    if token_lengths is not None and token_lengths.dtype not in _INTEGERS:
        raise ValueError(f"`token_lengths` must be integers, got {token_lengths.dtype}.")
    if is_codes and not 1 <= tokens.shape[1] <= config.num_quantizers:
        raise ValueError(
            f"`audio_codes` must have 1 to {config.num_quantizers} codebooks (one for each quantizer), "
            f"got {tokens.shape[1]}."
        )
    if 0 in shape:
        raise ValueError("There is nothing to decode: an item has no tokens.")
    if not is_codes and tokens.shape[1] != config.hidden_size:
        raise ValueError(f"`latents` must have {config.hidden_size} channels, got the shape {tuple(tokens.shape)}.")

    passed_mask = mask
    if mask is not None:
        mask = mask.bool()
    elif token_lengths is None:
        mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    else:
        mask = token_lengths.flip(1).cummax(dim=1).values.flip(1) != 0
    token_lengths = mask.long() if token_lengths is None else token_lengths.long() * mask
    if torch.compiler.is_compiling():
        return token_lengths, mask, None

    inside = token_lengths.masked_fill(~mask, 1)
    expected_mask = _length_mask(mask.sum(dim=1), shape[1], mask.device)
    given_mask = mask if passed_mask is None else passed_mask
    numbers = [
        mask.any(dim=1).all(),
        (given_mask == expected_mask).all(),
        *inside.aminmax(),
        *token_lengths.sum(dim=1).aminmax(),
    ]
    if is_codes:
        codes = tokens * mask[:, None]
        for part in (codes[:, :1], codes[:, 1:]):
            numbers += part.aminmax() if part.numel() else ()
    else:
        numbers.append(_is_finite(tokens))
    values = torch.stack([n.long() for n in numbers]).tolist()
    has_tokens, is_mask, shortest, longest, fewest_frames, most_frames, *rest = values
    if not is_mask:
        raise ValueError("`audio_codes_mask` must be 1 for tokens and then 0: padding goes on the right.")
    if not has_tokens and most_frames_per_token is None:
        raise ValueError("There is nothing to decode: an item has no tokens.")
    if most_frames_per_token is not None and (shortest < 0 or longest > most_frames_per_token):
        raise ValueError(
            f"`token_lengths` must be 0 to {most_frames_per_token}, got values from {shortest} to {longest}."
        )
    if most_frames_per_token is None and (shortest < 1 or longest > config.max_frames_per_token):
        raise ValueError(
            f"`token_lengths` must be 1 to {config.max_frames_per_token}, with 0 only after the last token of an "
            f"item, got values from {shortest} to {longest}."
        )
    if num_frames is not None and num_frames != most_frames:
        raise ValueError(
            f"`num_frames` must be {most_frames}, the largest row sum of `token_lengths`, got {num_frames}. "
            "Or leave it out."
        )
    if not is_codes and not rest[0]:
        raise ValueError("`latents` must be finite, got NaN or infinity.")
    names = (
        ("the semantic codebook", config.semantic_codebook_size),
        ("an acoustic codebook", config.codebook_size),
    )
    for (name, size), lowest, highest in zip(names, rest[::2], rest[1::2], strict=False):
        if lowest < 0 or highest >= size:
            raise ValueError(
                f"`audio_codes` must be between 0 and {size - 1} in {name}, got values from {lowest} to {highest}."
            )
    return token_lengths, mask, (fewest_frames, most_frames)


def _is_finite(values: Tensor) -> Tensor:
    """Whether all values are finite, without a temporary tensor of their size."""
    return torch.stack(values.detach().aminmax()).isfinite().all()


def _valid_lengths(**inputs: tuple[Tensor, Tensor | None]) -> list[_Lengths]:
    """Lengths of inputs with masks padded on the right.

    One transfer from the device brings the lengths and what the values are checked for.
    """
    numbers, on_device = [], []
    for name, (values, mask) in inputs.items():
        mask_name = _MASK_NAMES[name]
        if not values.is_floating_point():
            raise ValueError(f"`{name}` must be floats, got {values.dtype}. Make them with the feature extractor.")
        batch_size, length = len(values), values.shape[2 if name == "input_values" else 1]
        if batch_size == 0 or length == 0:
            raise ValueError(f"The audio is empty: `{name}` has the shape {tuple(values.shape)}.")
        if mask is None:
            mask = torch.ones(1, 1, dtype=torch.bool, device=values.device).expand(batch_size, length)
        _check_tensor(mask_name, mask)
        if mask.is_complex():
            raise ValueError(f"`{mask_name}` must be real numbers, got {mask.dtype}.")
        if tuple(mask.shape) != (batch_size, length):
            raise ValueError(f"`{mask_name}` must have the shape {(batch_size, length)}, got {tuple(mask.shape)}.")
        lengths = (mask != 0).sum(dim=1)
        is_mask = (mask == _length_mask(lengths, length, mask.device)).all()
        on_device.append(lengths.to(values.device))
        peak = values.detach().aminmax()
        # A larger one is no audio in [-1, 1] that overshoots, but integer PCM without scaling.
        limit = 100.0 if name == "input_values" else math.inf
        is_valid = torch.stack(peak).isfinite().all() & (peak.max <= limit) & (peak.min >= -limit)
        numbers += [is_valid[None].long(), is_mask[None].long().to(values.device), on_device[-1]]
    device = numbers[0].device
    parts = iter(torch.cat([number.to(device) for number in numbers]).cpu().split([len(n) for n in numbers]))
    all_lengths = []
    for name, lengths_there, is_valid, is_mask, lengths in zip(inputs, on_device, parts, parts, parts, strict=True):
        if not is_mask:
            raise ValueError(
                f"`{_MASK_NAMES[name]}` must be 1 for the valid part and then 0: padding goes on the right."
            )
        if not bool((lengths > 0).all()):
            raise ValueError(f"The audio of an item is empty: a row of `{_MASK_NAMES[name]}` is 0 everywhere.")
        if not is_valid:
            scale = " and in [-1, 1], as PCM divided by its full scale" if name == "input_values" else ""
            raise ValueError(f"`{name}` must be finite{scale}, got NaN, infinity or larger values.")
        all_lengths.append(_Lengths(lengths_there, lengths))
    return all_lengths


def _length_mask(lengths: Tensor, num_positions: int, device: torch.device) -> Tensor:
    """Mask `(batch_size, num_positions)` on `device`, `True` before the `lengths` `(batch_size,)` of the items."""
    return torch.arange(num_positions, device=device) < lengths.to(device)[:, None]


def _fit_length(waveforms: Tensor, num_samples: int) -> Tensor:
    """Waveforms `(..., length)` cut, or filled with zeros, to `(..., num_samples)`."""
    return F.pad(waveforms, (0, max(num_samples - waveforms.shape[-1], 0)))[..., :num_samples]


def _is_padded(lengths: Tensor, num_positions: int) -> bool:
    """Whether an item may be shorter than the batch. A lone item is not, and lengths on a GPU are not waited for."""
    if len(lengths) == 1:
        return False
    known = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    return not known or int(lengths.min()) < num_positions


def _per_item(name: str, value: float | list[float] | Tensor, num_items: int) -> Tensor:
    """A checked number for all items `()`, or one for each `(num_items,)`."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(0, dtype=torch.bool)
    if tensor.is_complex() or tensor.dtype == torch.bool or tensor.is_meta:
        raise TypeError(
            f"`{name}` must be one number, or a list or tensor of numbers, got {type(value).__name__} {value!r}."
        )
    if tensor.ndim > 1 or (tensor.ndim == 1 and len(tensor) != num_items):
        raise ValueError(
            f"`{name}` must be one number or one for each of the {num_items} items, got shape {tuple(tensor.shape)}."
        )
    return tensor.float()


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """One number, or one for each item, as `(num_items,)` beside `like`; one number needs no transfer."""
    return like.new_full((len(like),), values.item()) if values.ndim == 0 else values.to(like.device)


def _resample(frames: Tensor, lengths: Tensor, new_lengths: Tensor, longest: int) -> Tensor:
    """Linear interpolation of each item of `(batch_size, length, size)` to its new length, at most `longest`.

    Equal to `F.interpolate(..., size=new_length)` for each item (flexicodec 0.1.2,
    modeling_flexicodec.py, line 411).
    """
    positions = torch.arange(longest, device=frames.device)
    left, right, weight = _neighbors(positions, lengths, new_lengths)
    index = torch.stack([left, right])[..., None].expand(-1, -1, -1, frames.shape[-1])
    weight = weight[..., None].to(frames.dtype)
    return frames.gather(1, index[0]) * (1 - weight) + frames.gather(1, index[1]) * weight


def _neighbors(positions: Tensor, lengths: Tensor, new_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The frames that `_resample` mixes at positions, and the share of the second, `(batch_size, num_positions)`."""
    old, new = lengths[:, None], new_lengths[:, None]
    source = ((positions + 0.5) * (old.float() / new.float()) - 0.5).clamp(min=0)
    left = torch.minimum(source.long(), old - 1)
    return left, torch.minimum(left + 1, old - 1), (source - left).clamp(max=1)


__all__ = ["FlexiCodecFrameMerger", "FlexiCodecFramesOutput", "FlexiCodecModel", "FlexiCodecPreTrainedModel"]
