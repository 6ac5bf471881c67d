"""FlexiCodec: a speech codec whose frame rate follows the speech (https://huggingface.co/papers/2510.00981)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedAudioTokenizerBase
from transformers.models.dac.modeling_dac import (
    DacDecoder,
    DacDecoderBlock,
    DacEncoder,
    DacEncoderBlock,
    Snake1d,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import maybe_autocast

from .configuration_flexicodec import FlexiCodecConfig


@dataclass
class FlexiCodecFramesOutput(ModelOutput):
    r"""
    Args:
        semantic_frames (`torch.FloatTensor` of shape `(batch_size, num_frames, semantic_hidden_size)`):
            What the semantic encoder hears in each frame (80 ms); anything at padding.
        acoustic_frames (`torch.Tensor` of shape `(batch_size, num_frames, hidden_size)`):
            What the acoustic encoder hears, likewise; `None` where only the semantic code is wanted.
        num_frames (`list[int]`):
            Frames of each item.
    """

    semantic_frames: Tensor | None = None
    acoustic_frames: Tensor | None = None
    num_frames: list[int] | None = None


@dataclass
class FlexiCodecEncoderOutput(ModelOutput):
    r"""
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
            Row 0 is the semantic code (0 to 32767), the others are the residual acoustic codes (0 to 4095).
        token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Frames (80 ms) that each token covers, 1 to 8; 0 at padding.
        audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`):
            `True` for tokens, `False` for padding.
        latents (`torch.Tensor` of shape `(batch_size, hidden_size, num_tokens)`):
            Quantized continuous representation: what the codes stand for.
        frame_similarities (`torch.FloatTensor` of shape `(batch_size, num_frames - 1)`):
            Cosine similarity of each semantic frame with the next; 0 at padding.
        merging_threshold (`torch.FloatTensor` of shape `(batch_size,)`):
            The threshold that merged each item: the given one, or the one found for `target_frame_rate`; `None` where the
            lengths were given.
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
        loss (`torch.Tensor` of shape `(1,)`):
            Weighted sum of the three losses below. Reconstruction losses are the trainer's own, on `audio_values`.
        audio_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`):
            Reconstructed waveform, as long as the input.
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
            As in [`FlexiCodecEncoderOutput`].
        token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            As in [`FlexiCodecEncoderOutput`].
        audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`):
            As in [`FlexiCodecEncoderOutput`].
        latents (`torch.Tensor` of shape `(batch_size, hidden_size, num_tokens)`):
            As in [`FlexiCodecEncoderOutput`].
        commitment_loss (`torch.Tensor` of shape `(1,)`):
            Mean squared distance of projected residuals from their codes, summed over the acoustic codebooks in use.
        codebook_loss (`torch.Tensor` of shape `(1,)`):
            The same distance, with gradients to the codebooks.
        distillation_loss (`torch.Tensor` of shape `(1,)`):
            Mean squared distance of decoded semantic latents from the mean semantic frame of each token.
        frame_similarities (`torch.FloatTensor` of shape `(batch_size, num_frames - 1)`):
            As in [`FlexiCodecEncoderOutput`].
        merging_threshold (`torch.FloatTensor` of shape `(batch_size,)`):
            As in [`FlexiCodecEncoderOutput`].
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


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class FlexiCodecAttention(nn.Module):
    """Bidirectional multi-head attention with rotary positions and no biases."""

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
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention_interface(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0)
        return self.o_proj(output.reshape(hidden_states.shape))


class FlexiCodecTransformerLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each with a learned scale per channel (as in Mimi, arXiv:2410.00037)."""

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
    """Bidirectional transformer without a final norm, projected where its width differs from its stream's."""

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
            config=self.config, inputs_embeds=hidden_states, attention_mask=mask
        )
        position_embeddings = self._rotary_embeddings(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings, attention_mask)
        if self.output_proj is not None:
            hidden_states = self.output_proj(hidden_states)
        return hidden_states

    def _rotary_embeddings(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        device = hidden_states.device
        exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        positions = torch.arange(hidden_states.shape[1], device=device, dtype=torch.float32)
        angles = torch.outer(positions, self.config.rope_theta**-exponent)
        angles = torch.cat([angles, angles], dim=-1)[None]
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


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
    """The vector of the token that covers each frame: `(batch_size, num_tokens, size)` to `(batch_size, num_frames, size)`."""
    index = frame_to_token(token_lengths, num_frames)
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def mean_by_token(frames: Tensor, token_lengths: Tensor, frame_mask: Tensor | None) -> Tensor:
    """Mean of the frames of each token: `(batch_size, num_frames, size)` to `(batch_size, num_tokens, size)`."""
    tokens = torch.arange(token_lengths.shape[1], device=frames.device)
    # A product with the 0/1 alignment: unlike a scatter, it adds in the same order on every device and run.
    alignment = frame_to_token(token_lengths, frames.shape[1])[:, None] == tokens[:, None]
    if frame_mask is not None:
        alignment = alignment & frame_mask[:, None]
    return (alignment.to(frames.dtype) @ frames) / token_lengths.clamp(min=1)[..., None].to(frames.dtype)


class FlexiCodecTokenAggregator(nn.Module):
    """Merges the frames of each token into one vector (arXiv:2510.00981, section 3.2).

    One query per token, the mean of its frames plus a learned vector, stands right behind the token's last frame; a
    transformer runs over the interleaved sequence and is read out at the queries.
    """

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
            frame_mask, token_mask: `(batch_size, num_frames)` and `(batch_size, num_tokens)`, or both `None` when
                nothing is padding.

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


class FlexiCodecFiniteScalarQuantizer(nn.Module):
    """Finite scalar quantization (arXiv:2309.15505): a code is a point of a small fixed grid."""

    levels: Tensor

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        levels = torch.tensor(config.semantic_quantization_levels)
        self.codebook_size = config.semantic_codebook_size
        self.project_in = nn.Linear(config.convnext_hidden_size, len(levels))
        self.project_out = nn.Linear(len(levels), config.convnext_hidden_size)
        self.register_buffer("levels", levels, persistent=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: `(batch_size, num_tokens, convnext_hidden_size)`.

        Returns:
            The quantized vectors, of the same shape, and the codes, `(batch_size, num_tokens)`.
        """
        # In float32 whatever the model's dtype: a rounding decision is not to hang on the last bits of bfloat16.
        with maybe_autocast(hidden_states.device.type, enabled=False):
            projected = F.linear(hidden_states.float(), self.project_in.weight.float(), self.project_in.bias.float())
        half_width = self.levels // 2
        half_range = (self.levels - 1) * (1 - 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        # tan, where the paper has arctanh: the released weights were trained with it.
        bounded = torch.tanh(projected + torch.tan(offset / half_range)) * half_range - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        codes = ((rounded.detach().round().long() + half_width) * self._basis()).sum(dim=-1)
        return self.project_out((rounded / half_width).to(hidden_states.dtype)), codes

    def from_codes(self, codes: Tensor) -> Tensor:
        """The quantized vectors `(batch_size, num_tokens, convnext_hidden_size)` of codes `(batch_size, num_tokens)`."""
        half_width = self.levels // 2
        digits = (codes[..., None] // self._basis()) % self.levels
        return self.project_out(((digits - half_width) / half_width).to(self.project_out.weight.dtype))

    def _basis(self) -> Tensor:
        return self.levels.cumprod(dim=0) // self.levels


class FlexiCodecVectorQuantizer(nn.Module):
    """One codebook of the residual quantizer: nearest entry by cosine in a small space (DAC, arXiv:2306.06546)."""

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.codebook_dim)
        self.out_proj = nn.Linear(config.codebook_dim, config.hidden_size)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            hidden_states: `(batch_size, num_tokens, hidden_size)`.

        Returns:
            Their projection and the chosen entries, both `(batch_size, num_tokens, codebook_dim)` in float32, and the
            codes `(batch_size, num_tokens)`.
        """
        with maybe_autocast(hidden_states.device.type, enabled=False):
            projected = F.linear(hidden_states.float(), self.in_proj.weight.float(), self.in_proj.bias.float())
            codebook = F.normalize(self.codebook.weight.float())
            # The squared distance of unit vectors, less a constant: that the norms of the entries are not exactly 1 in
            # float32 decides near ties, as it does in the released codec (transformers' `DacVectorQuantize` adds them
            # with the other sign).
            distances = codebook.square().sum(dim=1) - 2 * F.normalize(projected, dim=-1) @ codebook.t()
        codes = distances.argmin(dim=-1)
        return projected, self.codebook(codes).float(), codes


class FlexiCodecResidualVectorQuantizer(nn.Module):
    """Residual vector quantization of the acoustic latents, a codebook at a time."""

    def __init__(self, config: FlexiCodecConfig):
        super().__init__()
        self.quantizers = nn.ModuleList(FlexiCodecVectorQuantizer(config) for _ in range(config.num_quantizers - 1))

    def forward(
        self, hidden_states: Tensor, num_quantizers: int | Tensor, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            hidden_states: `(batch_size, num_tokens, hidden_size)`.
            num_quantizers: How many codebooks to use; or, of shape `(batch_size,)`, how many each item's sum and losses
                use, while codes are given for all (quantizer dropout).
            token_mask: `(batch_size, num_tokens)`, or `None`.

        Returns:
            The quantized vectors `(batch_size, num_tokens, hidden_size)`, the codes `(batch_size, num_quantizers,
            num_tokens)`, and the commitment and codebook losses.
        """
        quantized = torch.zeros_like(hidden_states)
        commitment_loss = codebook_loss = hidden_states.new_zeros((), dtype=torch.float32)
        residual, codes = hidden_states, []
        for i, quantizer in enumerate(self.quantizers):
            if isinstance(num_quantizers, int) and i >= num_quantizers:
                break
            projected, entries, indices = quantizer(residual)
            straight_through = projected + (entries - projected).detach()
            output = quantizer.out_proj(straight_through.to(hidden_states.dtype))
            residual = residual - output
            codes.append(indices)

            used = torch.ones_like(output[:, 0, 0])
            if isinstance(num_quantizers, Tensor):
                used = (i < num_quantizers).to(output.dtype)
            quantized = quantized + output * used[:, None, None]
            commitment_loss = commitment_loss + (_item_mse(projected, entries.detach(), token_mask) * used).mean()
            codebook_loss = codebook_loss + (_item_mse(entries, projected.detach(), token_mask) * used).mean()
        if not codes:
            return (
                quantized,
                hidden_states.new_empty(hidden_states.shape[0], 0, hidden_states.shape[1], dtype=torch.long),
                commitment_loss,
                codebook_loss,
            )
        return quantized, torch.stack(codes, dim=1), commitment_loss, codebook_loss

    def from_codes(self, codes: Tensor) -> Tensor:
        """Sum `(batch_size, num_tokens, hidden_size)` of the vectors of codes `(batch_size, n, num_tokens)`, n >= 1."""
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


class FlexiCodecAcousticEncoder(DacEncoder):
    """DAC's encoder, exact in padded batches: what lies past the end of an item is kept 0, as a lone item sees it."""

    def forward(self, hidden_states: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: `(batch_size, 1, num_samples)`, `num_samples` a multiple of the hop length.
            lengths: `(batch_size,)` in samples, multiples of the hop length; `None` when nothing is padding.

        Returns:
            `(batch_size, hidden_size, num_frames)`.
        """
        hidden_states = _zero_past_end(self.conv1(_zero_past_end(hidden_states, lengths)), lengths)
        for block in self.block:
            hidden_states = _residual_units(block, hidden_states, lengths)
            lengths = lengths // block.conv1.stride[0] if lengths is not None else None
            hidden_states = _zero_past_end(block.conv1(_snake(block.snake1, hidden_states)), lengths)
        return self.conv2(_snake(self.snake1, hidden_states))


class FlexiCodecAcousticDecoder(DacDecoder):
    """DAC's decoder, exact in padded batches as the encoder is."""

    def forward(self, hidden_states: Tensor, lengths: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: `(batch_size, hidden_size, num_frames)`.
            lengths: `(batch_size,)` in frames; `None` when nothing is padding.

        Returns:
            `(batch_size, 1, num_samples)` with, for each item, `output_length(lengths)` samples and then zeros.
        """
        hidden_states = _zero_past_end(self.conv1(_zero_past_end(hidden_states, lengths)), lengths)
        for block in self.block:
            lengths = _upsampled_length(block.conv_t1, lengths) if lengths is not None else None
            hidden_states = _zero_past_end(block.conv_t1(_snake(block.snake1, hidden_states)), lengths)
            hidden_states = _residual_units(block, hidden_states, lengths)
        return _zero_past_end(torch.tanh(self.conv2(_snake(self.snake1, hidden_states))), lengths)

    def output_length(self, length: Tensor) -> Tensor:
        """Samples that `length` frames decode to: 1280 a frame, less the 16 that the odd stride costs."""
        for block in self.block:
            length = _upsampled_length(block.conv_t1, length)
        return length


# Values of a tile that a processor's cache holds while three residual units run over it.
_TILE_SIZE = 2**20


def _residual_units(block: DacEncoderBlock | DacDecoderBlock, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
    """The three residual units of a block.

    Inference on a CPU is bound by memory, not arithmetic, where the sequences are longest. There the units run tile by
    tile, with as much context as they reach: the same numbers, in a third of the time.
    """
    units = (block.res_unit1, block.res_unit2, block.res_unit3)
    if not _computes_in_place() or hidden_states.device.type != "cpu":
        # Snake keeps 0 at 0, so that zeroing the units' outputs is enough.
        for unit in units:
            hidden_states = _zero_past_end(unit(hidden_states), lengths)
        return hidden_states

    output = torch.empty_like(hidden_states)
    reach = sum(unit.conv1.padding[0] for unit in units)
    size = max(_TILE_SIZE // hidden_states[..., 0].numel(), reach)
    for start, stop, begin, end in _windows(hidden_states.shape[-1], size, reach):
        tile = hidden_states[..., begin:end]
        for unit in units:
            update = unit.conv2(_snake(unit.snake2, unit.conv1(_snake(unit.snake1, tile))))
            tile = _zero_past_end(update.add_(tile), lengths - begin if lengths is not None else None)
        output[..., start:stop] = tile[..., start - begin : stop - begin]
    return output


def _snake(snake: Snake1d, hidden_states: Tensor) -> Tensor:
    if not _computes_in_place():
        return snake(hidden_states)
    waves = (hidden_states * snake.alpha).sin_().square_()
    return torch.addcmul(hidden_states, (snake.alpha + 1e-9).reciprocal(), waves, out=waves)


def _computes_in_place() -> bool:
    """Whether nobody needs the intermediate results: neither autograd nor a compiler, which fuses them itself."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def _upsampled_length(conv: nn.ConvTranspose1d, length: Tensor) -> Tensor:
    return (length - 1) * conv.stride[0] - 2 * conv.padding[0] + conv.kernel_size[0]


def _zero_past_end(hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return hidden_states
    positions = torch.arange(hidden_states.shape[-1], device=hidden_states.device)
    return hidden_states * (positions < lengths[:, None, None])


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
            The semantic latents `(batch_size, num_tokens, hidden_size)` and the codes `(batch_size, num_tokens)`.
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


class FlexiCodecPreTrainedModel(PreTrainedAudioTokenizerBase):
    config: FlexiCodecConfig
    config_class = FlexiCodecConfig
    base_model_prefix = "flexicodec"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "FunAsrNanoEncoderLayer",
        "FlexiCodecTransformerLayer",
        "FlexiCodecConvNeXtLayer",
        "FlexiCodecAcousticEncoder",
        "FlexiCodecAcousticDecoder",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        if self._auto_class is not None:
            # One class, two Auto classes; `register_for_auto_class` knows of one.
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
        elif isinstance(module, FlexiCodecFiniteScalarQuantizer):
            init.copy_(module.levels, torch.tensor(self.config.semantic_quantization_levels))


class FlexiCodecModel(FlexiCodecPreTrainedModel):
    r"""
    The FlexiCodec speech codec ([arXiv:2510.00981](https://huggingface.co/papers/2510.00981)).

    Waveforms become tokens at 3 to 12.5 a second. Neighbouring frames that a frozen speech recogniser finds alike share a
    token; each token has a semantic code, residual acoustic codes, and a length in frames.

    Batches are exact: each item of a padded batch gets the codes, lengths and waveform that it gets alone, up to the
    rounding of the kernels.

    The semantic encoder is frozen: it runs without gradients, and `train()` never reaches it.

    Args:
        config ([`FlexiCodecConfig`]): Sizes of the model.

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

    def __init__(self, config: FlexiCodecConfig):
        super().__init__(config)
        semantic_config = config.semantic_model_config
        self.semantic_encoder = AutoModel.from_config(semantic_config)
        self.semantic_query_embedding = nn.Embedding(config.num_semantic_queries, semantic_config.input_size)
        self.acoustic_encoder = FlexiCodecAcousticEncoder(config)
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
        Turns speech into tokens.

        Args:
            input_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`):
                Waveforms at `config.sampling_rate`, as [`FlexiCodecFeatureExtractor`] gives them.
            input_features (`torch.Tensor` of shape `(batch_size, num_features, 560)`):
                Their filterbank features, likewise.
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for samples, 0 for the padding behind them.
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_features)`, *optional*):
                1 for features, 0 for the padding behind them.
            num_quantizers (`int`, *optional*):
                Rows of `audio_codes`: 1 means the semantic code alone. All by default, and when there are fewer.
            merging_threshold (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                Cosine similarity above which neighbouring frames share a token, for all items or for each. 1.0 never
                merges. Defaults to `config.merging_threshold`.
            target_frame_rate (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                Average tokens per second to aim at, instead of a threshold: each item gets the threshold that comes
                closest to this rate.
            chunk_length_s (`float`, *optional*):
                Process long audio in chunks of so many seconds, in memory bounded by the chunk (and 25 MB of frames for
                each hour). Similarities, merging and the convolutions are those of the whole recording, and tokens never
                break at a seam; attention sees `chunk_context_s` beyond the chunk, so that codes may differ from those of
                the whole, most likely near seams.
            chunk_context_s (`float`, *optional*, defaults to 5.0):
                Context on each side of a chunk, in seconds. The convolutions reach 2.1 s: not less, for them to be exact.

        Returns:
            [`FlexiCodecEncoderOutput`]

        Raises:
            ValueError: The inputs have wrong shapes or do not belong together, or an argument is out of its range.
        """
        frames = self.encode_frames(
            input_values,
            input_features,
            padding_mask,
            input_features_mask,
            num_quantizers,
            chunk_length_s,
            chunk_context_s,
        )
        return self.quantize_frames(
            frames,
            num_quantizers,
            merging_threshold,
            target_frame_rate,
            chunk_length_s=chunk_length_s,
            chunk_context_s=chunk_context_s,
        )

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
        The first step of `encode`, and most of its work: both encoders, before any frames are merged. `quantize_frames`
        is the second step, and can follow several times, once for each threshold.

        Args:
            input_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`): As for `encode`.
            input_features (`torch.Tensor` of shape `(batch_size, num_features, 560)`): As for `encode`.
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*): As for `encode`.
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_features)`, *optional*): As for `encode`.
            num_quantizers (`int`, *optional*):
                As for `encode`. For 1, the semantic code alone, the acoustic encoder does not run.
            chunk_length_s (`float`, *optional*): As for `encode`.
            chunk_context_s (`float`, *optional*, defaults to 5.0): As for `encode`.

        Returns:
            [`FlexiCodecFramesOutput`]

        Raises:
            ValueError: The inputs have wrong shapes or do not belong together.
        """
        chunk = self._chunk(chunk_length_s, chunk_context_s)
        semantic_frames, acoustic_frames, num_frames = self._encode_frames(
            input_values, input_features, padding_mask, input_features_mask, chunk, acoustic=num_quantizers != 1
        )
        return FlexiCodecFramesOutput(semantic_frames, acoustic_frames, num_frames)

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
        The second step of `encode`: merges frames and turns them into tokens.

        Args:
            frames ([`FlexiCodecFramesOutput`]): What `encode_frames` returned.
            num_quantizers (`int`, *optional*): As for `encode`.
            merging_threshold (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                As for `encode`.
            target_frame_rate (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                As for `encode`.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Frames of each token, 0 at padding: another segmentation than that by similarity, instead of a threshold or
                a rate.
            chunk_length_s (`float`, *optional*): As for `encode`; what `encode_frames` was given.
            chunk_context_s (`float`, *optional*, defaults to 5.0): As for `encode`.

        Returns:
            [`FlexiCodecEncoderOutput`]

        Raises:
            ValueError: An argument is out of its range, or the lengths are not those of the frames.
        """
        if num_quantizers is None:
            num_quantizers = self.config.num_quantizers
        _check_num_quantizers(num_quantizers)
        num_quantizers = min(num_quantizers, self.config.num_quantizers)
        chunk = self._chunk(chunk_length_s, chunk_context_s)
        stored: Any = frames  # all there but the acoustic frames
        semantic_frames, acoustic_frames, lengths = stored.semantic_frames, stored.acoustic_frames, stored.num_frames
        if acoustic_frames is None and num_quantizers > 1:
            raise ValueError(
                f"`frames` were encoded with `num_quantizers=1`: there is nothing to make {num_quantizers} rows of. "
                "Leave it out in `encode_frames`."
            )
        similarities = self._frame_similarities(semantic_frames, lengths)
        threshold = None
        if token_lengths is None:
            threshold = self._threshold(similarities, lengths, merging_threshold, target_frame_rate)
            token_lengths, token_mask = self._merge(similarities, threshold, lengths)
        elif merging_threshold is not None or target_frame_rate is not None:
            raise ValueError("Pass either `token_lengths`, or `merging_threshold` or `target_frame_rate`.")
        else:
            token_lengths = self._check_segmentation(token_lengths, lengths).to(similarities.device)
            token_mask = token_lengths > 0
        if chunk is None:
            codes, latents, *_ = self._quantize(
                semantic_frames, acoustic_frames, lengths, token_lengths, token_mask, num_quantizers - 1
            )
        else:
            codes, latents = self._quantize_in_chunks(
                semantic_frames, acoustic_frames, lengths, token_lengths, num_quantizers - 1, chunk
            )
        return FlexiCodecEncoderOutput(
            audio_codes=codes * token_mask[:, None],
            token_lengths=token_lengths,
            audio_codes_mask=token_mask,
            latents=(latents * token_mask[..., None]).transpose(1, 2),
            frame_similarities=similarities,
            merging_threshold=threshold,
        )

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
    ) -> FlexiCodecDecoderOutput:
        r"""
        Turns tokens back into speech. Takes what `encode` returns: `model.decode(**encoded)`.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
                Codes; fewer rows than were encoded are fine, one row is the semantic code alone.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Frames of each token; one each by default.
            audio_codes_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for tokens, 0 for the padding behind them. By default, the tokens behind the last one that has a length
                are padding.
            latents (`torch.Tensor` of shape `(batch_size, hidden_size, num_tokens)`, *optional*):
                Continuous representation to decode when there are no `audio_codes`.
            chunk_length_s (`float`, *optional*):
                Decode long audio in chunks of so many seconds, in memory bounded by the chunk (and the waveform). The
                convolutions see what they see in one piece; the attention sees `chunk_context_s` beyond the chunk. Chunks
                are cross-faded over one frame (80 ms), so that there is no step at a seam.
            chunk_context_s (`float`, *optional*, defaults to 5.0):
                Context on each side of a chunk, in seconds. The convolutions reach 2.1 s: not less, for them to be exact.
            num_frames (`int`, *optional*):
                Frames of the longest item, the largest row sum of `token_lengths`, if known: with it `decode` waits for
                nothing on the device, and `torch.compile(model.decode, fullgraph=True)` works.
            frame_similarities, merging_threshold (*optional*):
                Not used: what else `encode` returns, so that all of it can be passed on.

        Returns:
            [`FlexiCodecDecoderOutput`] with 1280 samples a frame, less 16.

        Raises:
            ValueError: A tensor has a wrong shape or dtype, a code or length is out of its range, or an item has no token.
        """
        if audio_codes is not None:
            token_lengths, token_mask = self._check_tokens(audio_codes, token_lengths, audio_codes_mask)
            latents = self._latents_from_codes(self._check_codes(audio_codes, token_mask), token_mask)
        elif latents is not None:
            token_lengths, token_mask = self._check_tokens(latents, token_lengths, audio_codes_mask)
            latents = latents.transpose(1, 2)
        else:
            raise ValueError("`decode` needs `audio_codes` or `latents`.")

        if token_lengths is None:
            frames, lengths = latents, None
            num_frames = latents.shape[1]
        else:
            lengths = token_lengths.sum(dim=1)
            if num_frames is None:
                num_frames = int(lengths.max())
            frames = repeat_by_token(latents, token_lengths, num_frames)
            if latents.shape[0] == 1:
                lengths = None

        chunk = self._chunk(chunk_length_s, chunk_context_s)
        audio_values = self._decode_frames(frames, lengths, chunk)
        mask = torch.ones_like(audio_values, dtype=torch.bool)
        if lengths is not None:
            positions = torch.arange(audio_values.shape[1], device=audio_values.device)
            mask = positions < self.acoustic_decoder.output_length(lengths)[:, None]
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
    ) -> FlexiCodecOutput:
        r"""
        Reconstructs speech: `encode`, then `decode`, with gradients through the quantizers (straight-through) and the
        losses of the quantizers.

        In training mode, arguments that are not given are drawn for the batch: a threshold from
        `config.merging_threshold_range`; no acoustic quantizers at all with probability `config.quantizer_bypass_rate`;
        otherwise, for a share `config.quantizer_dropout` of the items, a random number of them.

        Args:
            input_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`): As for `encode`.
            input_features (`torch.Tensor` of shape `(batch_size, num_features, 560)`): As for `encode`.
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*): As for `encode`.
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_features)`, *optional*): As for `encode`.
            num_quantizers (`int` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                As for `encode`; a tensor says for each item how many quantizers its reconstruction and losses use, while
                the codes of all are returned.
            merging_threshold (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                As for `encode`.
            target_frame_rate (`float`, `list[float]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                As for `encode`.

        Returns:
            [`FlexiCodecOutput`] whose `audio_values` are as long as `input_values`.
        """
        if self.training:
            if merging_threshold is None and target_frame_rate is None:
                merging_threshold = torch.empty(()).uniform_(*self.config.merging_threshold_range).item()
            if num_quantizers is None:
                num_quantizers = self._draw_num_quantizers(input_values.shape[0])
        elif num_quantizers is None:
            num_quantizers = self.config.num_quantizers
        if isinstance(num_quantizers, Tensor):
            num_quantizers = num_quantizers.to(input_values.device)
        _check_num_quantizers(num_quantizers)

        semantic_frames, acoustic_frames, lengths = self._encode_frames(
            input_values, input_features, padding_mask, input_features_mask, chunk=None
        )
        similarities = self._frame_similarities(semantic_frames, lengths)
        threshold = self._threshold(similarities, lengths, merging_threshold, target_frame_rate)
        token_lengths, token_mask = self._merge(similarities, threshold, lengths)
        codes, latents, semantic_latents, commitment_loss, codebook_loss = self._quantize(
            semantic_frames, acoustic_frames, lengths, token_lengths, token_mask, num_quantizers - 1
        )
        frames = repeat_by_token(latents, token_lengths, semantic_frames.shape[1])
        padded_lengths = token_lengths.sum(dim=1) if min(lengths) < max(lengths) else None
        audio_values = self._decode_frames(frames, padded_lengths, chunk=None)

        num_samples = input_values.shape[-1]
        audio_values = F.pad(audio_values, (0, max(num_samples - audio_values.shape[1], 0)))[:, :num_samples]
        if padding_mask is not None:
            audio_values = audio_values * padding_mask.to(audio_values.dtype)

        loss = self.config.commitment_loss_weight * commitment_loss + self.config.codebook_loss_weight * codebook_loss
        distillation_loss = None
        if semantic_frames.shape[-1] == semantic_latents.shape[-1]:
            frame_mask = _length_mask(lengths, semantic_frames)
            merged = mean_by_token(semantic_frames, token_lengths, frame_mask)
            error = (merged - semantic_latents.float()).square().mean(dim=-1)
            distillation_loss = (error * token_mask).sum() / token_mask.sum()
            loss = loss + self.config.distillation_loss_weight * distillation_loss
        return FlexiCodecOutput(
            loss=loss,
            audio_values=audio_values[:, None],
            audio_codes=codes * token_mask[:, None],
            token_lengths=token_lengths,
            audio_codes_mask=token_mask,
            latents=(latents * token_mask[..., None]).transpose(1, 2),
            commitment_loss=commitment_loss,
            codebook_loss=codebook_loss,
            distillation_loss=distillation_loss,
            frame_similarities=similarities,
            merging_threshold=threshold,
        )

    def get_semantic_features(self, audio_codes: Tensor, audio_codes_mask: Tensor | None = None) -> Tensor:
        r"""
        Continuous features of semantic tokens: what the codec's decoder knows of the words.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
                Codes, of which row 0 is used.
            audio_codes_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for tokens, 0 for the padding behind them.

        Returns:
            `torch.Tensor` of shape `(batch_size, hidden_size, num_tokens)`; 0 at padding.
        """
        _, token_mask = self._check_tokens(audio_codes, None, audio_codes_mask)
        codes = self._check_codes(audio_codes[:, :1], token_mask)
        features = self.semantic_quantizer.from_codes(codes[:, 0], token_mask)
        if token_mask is not None:
            features = features * token_mask[..., None]
        return features.transpose(1, 2)

    def get_semantic_frames(self, input_features: Tensor, input_features_mask: Tensor | None = None) -> Tensor:
        r"""
        What the frozen semantic encoder hears, one vector a codec frame, before anything is merged or quantized.

        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_features, 560)`): As for `encode`.
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_features)`, *optional*): As for `encode`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_frames, semantic_hidden_size)`, on the frames that the tokens of
            `encode` cover; 0 at padding.
        """
        lengths = _valid_lengths(input_features_mask, input_features, "input_features_mask")
        frame_lengths = self._semantic_lengths(lengths)
        frames = _resample(self._encode_semantic(input_features, lengths, None).float(), lengths, frame_lengths)
        mask = _length_mask(frame_lengths, frames)
        return frames if mask is None else frames * mask[..., None]

    def _encode_frames(
        self,
        input_values: Tensor,
        input_features: Tensor,
        padding_mask: Tensor | None,
        input_features_mask: Tensor | None,
        chunk: tuple[int, int] | None,
        acoustic: bool = True,
    ) -> tuple[Tensor, Any, list[int]]:
        """Both streams at 12.5 Hz, `(batch_size, num_frames, size)`, and the number of frames of each item.

        Without `acoustic`, `None` in the place of that stream.
        """
        if input_values.ndim != 3 or input_values.shape[1] != 1:
            raise ValueError(
                f"`input_values` must have the shape (batch_size, 1, num_samples), got {tuple(input_values.shape)}."
            )
        feature_size = self.config.semantic_model_config.input_size
        if input_features.ndim != 3 or input_features.shape[-1] != feature_size:
            raise ValueError(
                f"`input_features` must have the shape (batch_size, num_features, {feature_size}), "
                f"got {tuple(input_features.shape)}."
            )
        if input_features.shape[0] != input_values.shape[0]:
            raise ValueError(
                f"`input_values` holds {input_values.shape[0]} items, `input_features` {input_features.shape[0]}."
            )
        sample_lengths = _valid_lengths(padding_mask, input_values[:, 0], "padding_mask")
        feature_lengths = _valid_lengths(input_features_mask, input_features, "input_features_mask")

        hop = self.config.hop_length
        acoustic_lengths = [-(-length // hop) for length in sample_lengths]
        semantic_lengths = self._semantic_lengths(feature_lengths)
        for num_acoustic, num_semantic in zip(acoustic_lengths, semantic_lengths, strict=True):
            if not 0 <= num_acoustic - num_semantic <= 2:
                raise ValueError(
                    "`input_features` and `input_values` do not belong together: the features of an item last "
                    f"{num_semantic} frames, its waveform {num_acoustic}. Make both with one call of the feature extractor."
                )

        # The similarities that decide the merging are taken in float32 even where the model runs in less.
        semantic_frames = self._encode_semantic(input_features, feature_lengths, chunk).float()
        semantic_frames = _resample(semantic_frames, feature_lengths, semantic_lengths)
        if not acoustic:
            return semantic_frames, None, semantic_lengths

        num_samples = max(acoustic_lengths) * hop
        values = F.pad(input_values[:, 0], (0, max(num_samples - input_values.shape[-1], 0)))[:, :num_samples]
        values = values.to(self.acoustic_encoder.conv1.weight.dtype)
        mask = _length_mask(sample_lengths, values)
        values = values if mask is None else values * mask

        def run(window: Tensor, window_lengths: list[int]) -> Tensor:
            padded = _length_tensor(window_lengths, window)
            padded = None if padded is None else padded * hop
            return self.acoustic_encoder(window[:, None], padded).transpose(1, 2)

        acoustic_frames = _in_windows(run, values, acoustic_lengths, chunk, in_hop=hop)
        # The acoustic stream is 0 to 2 frames longer.
        return semantic_frames, acoustic_frames[:, : semantic_frames.shape[1]], semantic_lengths

    def _semantic_lengths(self, feature_lengths: list[int]) -> list[int]:
        """Codec frames of each item."""
        return [max(int(length / self.config.semantic_downsampling_factor), 1) for length in feature_lengths]

    @torch.no_grad()
    def _encode_semantic(self, input_features: Tensor, lengths: list[int], chunk: tuple[int, int] | None) -> Tensor:
        """The semantic encoder's output `(batch_size, num_features, size)`, without its query positions."""
        query_ids = torch.tensor(self.config.semantic_query_ids, device=input_features.device)
        queries = self.semantic_query_embedding(query_ids)
        if chunk is not None:  # in codec frames; here in features, of which there are 4 for 3 frames
            factor = self.config.semantic_downsampling_factor
            chunk = round(chunk[0] * factor), round(chunk[1] * factor)
        longest = max(lengths) if chunk is None else min(max(lengths), chunk[0] + 2 * chunk[1])
        limit = self.config.semantic_model_config.max_position_embeddings - 1 - len(query_ids)
        if longest > limit:
            raise ValueError(
                f"`input_features` hold {longest} frames, the semantic encoder's positions end at {limit} (60 ms each). "
                "Pass `chunk_length_s=30` to process long audio in chunks."
            )

        def run(window: Tensor, window_lengths: list[int]) -> Tensor:
            window = torch.cat([queries.expand(window.shape[0], -1, -1).to(window.dtype), window], dim=1)
            mask = torch.arange(window.shape[1], device=window.device)
            mask = mask < torch.tensor(window_lengths, device=window.device)[:, None] + len(query_ids)
            return self.semantic_encoder(window, mask).last_hidden_state[:, len(query_ids) :]

        return _in_windows(run, input_features[:, : max(lengths)], lengths, chunk)

    def _frame_similarities(self, semantic_frames: Tensor, lengths: list[int]) -> Tensor:
        """Cosine similarity of each frame with the next `(batch_size, num_frames - 1)`, at most 1."""
        similarities = F.cosine_similarity(semantic_frames[:, :-1], semantic_frames[:, 1:], dim=-1)
        # Rounding takes the cosine of equal vectors past 1, and a threshold of 1 promises not to merge.
        similarities = similarities.clamp(max=1.0)
        mask = _length_mask([length - 1 for length in lengths], similarities)
        return similarities if mask is None else similarities * mask

    def _threshold(
        self,
        similarities: Tensor,
        lengths: list[int],
        merging_threshold: float | list[float] | Tensor | None,
        target_frame_rate: float | list[float] | Tensor | None,
    ) -> Tensor:
        """The merging threshold of each item `(batch_size,)`, in float32."""
        if merging_threshold is not None and target_frame_rate is not None:
            raise ValueError("Pass either `merging_threshold` or `target_frame_rate`, not both.")
        if target_frame_rate is None:
            if merging_threshold is None:
                merging_threshold = self.config.merging_threshold
            threshold = _per_item("merging_threshold", merging_threshold, similarities)
            if not bool(((threshold >= -1) & (threshold <= 1)).all()):
                raise ValueError(f"`merging_threshold` is a cosine, between -1 and 1, got {merging_threshold}.")
            return threshold

        rate = _per_item("target_frame_rate", target_frame_rate, similarities)
        highest = self.config.frame_rate
        lowest = highest / self.config.max_frames_per_token
        if not bool(((rate >= lowest) & (rate <= highest)).all()):
            raise ValueError(
                f"`target_frame_rate` must be between {lowest} and {highest} tokens a second, got {target_frame_rate}."
            )
        target = rate / highest * torch.tensor(lengths, device=rate.device)
        frame_mask = _length_mask(lengths, similarities, extra=1)

        # The number of tokens never falls as the threshold rises, and it changes at similarities only: search them.
        padding = None if frame_mask is None else ~frame_mask[:, 1:]
        candidates = similarities if padding is None else similarities.masked_fill(padding, 1.0)
        candidates = F.pad(candidates.sort(dim=1).values, (1, 0), value=-1.0)

        def count(index: Tensor) -> Tensor:
            return self._token_starts(similarities, candidates.gather(1, index[:, None])[:, 0], frame_mask).sum(dim=1)

        low = torch.zeros_like(target, dtype=torch.long)
        high = torch.tensor(lengths, device=rate.device) - 1
        for _ in range(candidates.shape[1].bit_length()):
            middle = (low + high) // 2
            enough = count(middle) >= target
            high = torch.where(enough, middle, high)
            low = torch.where(enough, low, (middle + 1).clamp(max=high))
        below = (high - 1).clamp(min=0)
        best = torch.where((target - count(below)).abs() < (count(high) - target).abs(), below, high)
        chosen = candidates.gather(1, best[:, None])[:, 0]
        # Half way to the next similarity, so that the threshold still merges alike where rounding differs a little.
        following = F.pad(candidates, (0, 1), value=1.0).gather(1, best[:, None] + 1)[:, 0]
        middle = (chosen + following) / 2
        return torch.where(middle < following, middle, chosen)

    def _token_starts(self, similarities: Tensor, threshold: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Whether each frame `(batch_size, num_frames)` is the first of a token."""
        starts = F.pad(similarities <= threshold[:, None], (1, 0), value=True)
        positions = torch.arange(starts.shape[1], device=starts.device)
        segment_starts = (starts * positions).cummax(dim=1).values
        starts = (positions - segment_starts) % self.config.max_frames_per_token == 0
        return starts if frame_mask is None else starts & frame_mask

    def _merge(self, similarities: Tensor, threshold: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Frames of each token, and which of them are tokens, both `(batch_size, num_tokens)`."""
        frame_mask = _length_mask(lengths, similarities, extra=1)
        starts = self._token_starts(similarities, threshold, frame_mask)
        num_tokens = starts.sum(dim=1)
        token_of_frame = starts.cumsum(dim=1) - 1
        ones = torch.ones_like(token_of_frame) if frame_mask is None else frame_mask.long()
        token_lengths = ones.new_zeros(ones.shape[0], int(num_tokens.max())).scatter_add_(1, token_of_frame, ones)
        return token_lengths, token_lengths > 0

    def _check_segmentation(self, token_lengths: Tensor, lengths: list[int]) -> Tensor:
        """Lengths of tokens `(batch_size, num_tokens)` that cover `lengths` frames."""
        if token_lengths.ndim != 2 or token_lengths.shape[0] != len(lengths) or token_lengths.is_floating_point():
            raise ValueError(
                f"`token_lengths` must be integers of the shape (batch_size, num_tokens) = ({len(lengths)}, num_tokens), "
                f"got {token_lengths.dtype} of {tuple(token_lengths.shape)}."
            )
        token_lengths = token_lengths.long()
        covered = token_lengths.sum(dim=1).tolist()
        if covered != lengths:
            raise ValueError(f"`token_lengths` must cover {lengths} frames, one number an item, and cover {covered}.")
        longest = self.config.max_frames_per_token
        in_range = (token_lengths >= 0) & (token_lengths <= longest)
        padding_last = token_lengths[:, 1:].bool() <= token_lengths[:, :-1].bool()
        if not bool(in_range.all() and padding_last.all()):
            raise ValueError(
                f"`token_lengths` must be 1 to {longest}, with 0 only behind the last token of an item, got {token_lengths.tolist()}."
            )
        return token_lengths

    def _quantize(
        self,
        semantic_frames: Tensor,
        acoustic_frames: Tensor | None,
        lengths: list[int],
        token_lengths: Tensor,
        token_mask: Tensor,
        num_acoustic_quantizers: int | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Any, Any]:
        """Frames to tokens; without acoustic frames, to semantic codes alone.

        Returns the codes `(batch_size, num_quantizers, num_tokens)`, the latents and the semantic part of them
        `(batch_size, num_tokens, hidden_size)`, and the commitment and codebook losses.
        """
        frame_mask = _length_mask(lengths, semantic_frames)
        mask = None if token_mask.shape[0] == 1 else token_mask
        if frame_mask is None and mask is not None:
            frame_mask = torch.ones_like(semantic_frames[..., 0], dtype=torch.bool)
        dtype = self.semantic_quantizer.in_proj.weight.dtype
        semantic = self.semantic_aggregator(semantic_frames.to(dtype), token_lengths, frame_mask, mask)
        semantic_latents, semantic_codes = self.semantic_quantizer(semantic, mask)
        if acoustic_frames is None:
            return semantic_codes[:, None], semantic_latents, semantic_latents, None, None
        acoustic = self.acoustic_aggregator(acoustic_frames, token_lengths, frame_mask, mask)
        acoustic_latents, acoustic_codes, commitment_loss, codebook_loss = self.acoustic_quantizer(
            acoustic - semantic_latents, num_acoustic_quantizers, mask
        )
        codes = torch.cat([semantic_codes[:, None], acoustic_codes], dim=1)
        return codes, semantic_latents + acoustic_latents, semantic_latents, commitment_loss, codebook_loss

    def _quantize_in_chunks(
        self,
        semantic_frames: Tensor,
        acoustic_frames: Tensor | None,
        lengths: list[int],
        token_lengths: Tensor,
        num_acoustic_quantizers: int,
        chunk: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Codes and latents as from `_quantize`, of whole tokens at a time with whole tokens of context."""
        size, context = chunk
        all_codes = token_lengths.new_zeros(len(lengths), num_acoustic_quantizers + 1, token_lengths.shape[1])
        dtype = self.semantic_quantizer.in_proj.weight.dtype
        all_latents = semantic_frames.new_zeros(*token_lengths.shape, self.config.hidden_size, dtype=dtype)
        for item, length in enumerate(lengths):
            starts = F.pad(token_lengths[item].cumsum(dim=0), (1, 0))
            for start, stop, begin, end in _windows(length, size, context):
                # Tokens that begin in the chunk, and those that lie in its context.
                bounds = torch.searchsorted(starts, torch.tensor([begin, start, stop, end], device=starts.device))
                first_context, first, last, last_context = bounds.tolist()
                if first == last:
                    continue
                last_context = max(last, min(last_context, token_lengths.shape[1]))
                frames = slice(int(starts[first_context]), int(starts[last_context]))
                tokens = token_lengths[item : item + 1, first_context:last_context]
                codes, latents, *_ = self._quantize(
                    semantic_frames[item : item + 1, frames],
                    None if acoustic_frames is None else acoustic_frames[item : item + 1, frames],
                    [frames.stop - frames.start],
                    tokens,
                    tokens > 0,
                    num_acoustic_quantizers,
                )
                core = slice(first - first_context, last - first_context)
                all_codes[item, :, first:last] = codes[0, :, core]
                all_latents[item, first:last] = latents[0, core]
        return all_codes, all_latents

    def _latents_from_codes(self, codes: Tensor, token_mask: Tensor | None) -> Tensor:
        latents = self.semantic_quantizer.from_codes(codes[:, 0], token_mask)
        if codes.shape[1] > 1:
            latents = latents + self.acoustic_quantizer.from_codes(codes[:, 1:])
        return latents

    def _decode_frames(self, frames: Tensor, lengths: Tensor | None, chunk: tuple[int, int] | None) -> Tensor:
        """Latents at 12.5 Hz `(batch_size, num_frames, hidden_size)` to waveforms `(batch_size, num_samples)`."""
        if chunk is None:
            mask = None
            if lengths is not None:
                mask = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
            frames = self.bottleneck(frames, mask)
            return self.acoustic_decoder(frames.transpose(1, 2), lengths)[:, 0]

        def run(window: Tensor, window_lengths: list[int]) -> Tensor:
            return self._decode_frames(window, _length_tensor(window_lengths, window), chunk=None)

        frame_lengths = [frames.shape[1]] * len(frames) if lengths is None else lengths.tolist()
        return _in_windows(run, frames, frame_lengths, chunk, out_hop=self.config.hop_length, fade=True)

    def _draw_num_quantizers(self, batch_size: int) -> int | Tensor:
        """How many quantizers a training batch uses: the semantic one alone, or a number for each item."""
        if torch.rand(()).item() < self.config.quantizer_bypass_rate:
            return 1
        num_quantizers = torch.full((batch_size,), self.config.num_quantizers)
        num_dropped = int(batch_size * self.config.quantizer_dropout)
        num_quantizers[:num_dropped] = torch.randint(2, self.config.num_quantizers + 1, (num_dropped,))
        return num_quantizers

    def _chunk(self, chunk_length_s: float | None, chunk_context_s: float) -> tuple[int, int] | None:
        """Frames of a chunk and of its context on each side."""
        if chunk_length_s is None:
            return None
        if chunk_length_s <= 0 or chunk_context_s < 0:
            raise ValueError(
                f"`chunk_length_s` must be positive and `chunk_context_s` not negative, got {chunk_length_s} and "
                f"{chunk_context_s}."
            )
        # A multiple of three frames is a whole number of the semantic encoder's features.
        size = max(round(chunk_length_s * self.config.frame_rate / 3), 1) * 3
        return size, math.ceil(chunk_context_s * self.config.frame_rate / 3) * 3

    def _check_tokens(
        self, tokens: Tensor, token_lengths: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The lengths with 0 at padding, and the mask; `None` for both where each token is one valid frame."""
        if tokens.ndim != 3:
            raise ValueError(
                "`audio_codes` must have the shape (batch_size, num_quantizers, num_tokens) and `latents` (batch_size, "
                f"hidden_size, num_tokens), got {tuple(tokens.shape)}."
            )
        shape = (tokens.shape[0], tokens.shape[2])
        for name, value in (("token_lengths", token_lengths), ("audio_codes_mask", mask)):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"`{name}` must have the shape (batch_size, num_tokens) = {shape}, got {tuple(value.shape)}."
                )
        if token_lengths is None and mask is None:
            if shape[1] == 0:
                raise ValueError("There is nothing to decode: an item has no tokens.")
            return None, None
        if token_lengths is None:
            mask = mask.bool()
            token_lengths = mask.long()
        else:
            if token_lengths.is_floating_point():
                raise ValueError(f"`token_lengths` must be integers, got {token_lengths.dtype}.")
            mask = token_lengths.flip(1).cummax(dim=1).values.flip(1) > 0 if mask is None else mask.bool()
            token_lengths = token_lengths.long() * mask
        if not torch.compiler.is_compiling():
            if shape[1] == 0 or not bool((token_lengths.sum(dim=1) > 0).all()):
                raise ValueError("There is nothing to decode: an item has no tokens.")
            if bool((token_lengths < 0).any()):
                raise ValueError(f"`token_lengths` must not be negative, got {int(token_lengths.min())}.")
        return token_lengths, mask

    def _check_codes(self, codes: Tensor, token_mask: Tensor | None) -> Tensor:
        """The codes with 0 at padding."""
        if codes.dtype not in (torch.int16, torch.int32, torch.int64):
            raise ValueError(f"`audio_codes` must be integers, got {codes.dtype}.")
        if not 1 <= codes.shape[1] <= self.config.num_quantizers:
            raise ValueError(
                f"`audio_codes` must have 1 to {self.config.num_quantizers} rows (one for each quantizer), "
                f"got {codes.shape[1]}."
            )
        codes = codes.long()
        if token_mask is not None:
            codes = codes * token_mask[:, None]
        if not torch.compiler.is_compiling():
            for name, rows, size in (
                ("the semantic row", codes[:, :1], self.config.semantic_codebook_size),
                ("an acoustic row", codes[:, 1:], self.config.codebook_size),
            ):
                if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= size):
                    raise ValueError(
                        f"`audio_codes` must be between 0 and {size - 1} in {name}, "
                        f"got values from {int(rows.min())} to {int(rows.max())}."
                    )
        return codes


def _check_num_quantizers(num_quantizers: int | Tensor) -> None:
    if (num_quantizers if isinstance(num_quantizers, int) else int(num_quantizers.min())) < 1:
        raise ValueError(
            f"`num_quantizers` counts the semantic quantizer and must be at least 1, got {num_quantizers}."
        )


def _valid_lengths(mask: Tensor | None, values: Tensor, name: str) -> list[int]:
    """Valid length of each item of `values` `(batch_size, length, ...)`, from a mask that is padded on the right."""
    batch_size, length = values.shape[:2]
    if length == 0:
        raise ValueError("The audio is empty.")
    if mask is None:
        return [length] * batch_size
    if tuple(mask.shape) != (batch_size, length):
        raise ValueError(f"`{name}` must have the shape {(batch_size, length)}, got {tuple(mask.shape)}.")
    lengths = mask.sum(dim=1)
    if bool((mask.bool() != (torch.arange(length, device=mask.device) < lengths[:, None])).any()):
        raise ValueError(f"`{name}` must be 1 for the valid part and then 0: padding goes on the right.")
    if not bool((lengths > 0).all()):
        raise ValueError(f"The audio of an item is empty: a row of `{name}` is 0 everywhere.")
    return [int(length) for length in lengths.tolist()]


def _length_tensor(lengths: list[int], like: Tensor) -> Tensor | None:
    """The lengths on the device of `like`, or `None` where they are all the same: nothing is padding."""
    return None if min(lengths) == max(lengths) else torch.tensor(lengths, device=like.device)


def _length_mask(lengths: list[int], like: Tensor, extra: int = 0) -> Tensor | None:
    """Mask `(batch_size, like.shape[1] + extra)` of the valid positions, or `None` where nothing is padding."""
    num_positions = like.shape[1] + extra
    if min(lengths) >= num_positions:
        return None
    return torch.arange(num_positions, device=like.device) < torch.tensor(lengths, device=like.device)[:, None]


def _per_item(name: str, value: float | list[float] | Tensor, like: Tensor) -> Tensor:
    """A number for each item `(batch_size,)`, from one for all or one for each."""
    tensor = torch.as_tensor(value, dtype=torch.float32, device=like.device)
    if tensor.ndim > 1 or (tensor.ndim == 1 and tensor.shape[0] != like.shape[0]):
        raise ValueError(
            f"`{name}` must be one number or one for each of the {like.shape[0]} items, got shape {tuple(tensor.shape)}."
        )
    return tensor.expand(like.shape[0])


def _resample(frames: Tensor, lengths: list[int], new_lengths: list[int]) -> Tensor:
    """Linear interpolation of each item `(batch_size, length, size)` to its new length, as `F.interpolate` does one."""
    old = torch.tensor(lengths, device=frames.device)[:, None]
    new = torch.tensor(new_lengths, device=frames.device)[:, None]
    positions = torch.arange(max(new_lengths), device=frames.device)
    source = ((positions + 0.5) * (old.float() / new.float()) - 0.5).clamp(min=0)
    left = torch.minimum(source.long(), old - 1)
    right = torch.minimum(left + 1, old - 1)
    weight = (source - left).clamp(max=1)[..., None].to(frames.dtype)
    index = torch.stack([left, right])[..., None].expand(-1, -1, -1, frames.shape[-1])
    return frames.gather(1, index[0]) * (1 - weight) + frames.gather(1, index[1]) * weight


def _windows(length: int, size: int, context: int) -> Iterator[tuple[int, int, int, int]]:
    """Start and stop of each chunk of a sequence, and begin and end of the window that gives it context."""
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield start, stop, max(start - context, 0), min(stop + context, length)


def _in_windows(
    run: Callable[[Tensor, list[int]], Tensor],
    values: Tensor,
    lengths: list[int],
    chunk: tuple[int, int] | None,
    in_hop: int = 1,
    out_hop: int = 1,
    fade: bool = False,
) -> Tensor:
    """`run(values, lengths)` on chunks of the time axis, each with context, put together again.

    Args:
        run: Takes a window of `values` and the lengths of its items in frames.
        values: `(batch_size, num_frames * in_hop, ...)`.
        lengths: Frames of each item.
        chunk: Frames of a chunk and of its context; `None` runs everything at once.
        in_hop: Values for each frame.
        out_hop: Outputs of `run` for each frame (the last frame of a window may give fewer).
        fade: Whether to fade from one chunk into the next over one frame.
    """
    if chunk is None:
        return run(values, lengths)
    output = values.new_zeros(())
    for start, stop, begin, end in _windows(max(lengths), *chunk):
        # Items that ended before this chunk stay out of it.
        rows = [row for row, length in enumerate(lengths) if length > start]
        window = values[rows, begin * in_hop : end * in_hop]
        window = run(window, [min(lengths[row], end) - begin for row in rows])
        # One frame more than the chunk, for the next to fade from.
        window = window[:, (start - begin) * out_hop : (min(stop + fade, end) - begin) * out_hop]
        if start == 0:
            output = window.new_zeros(len(lengths), max(lengths) * out_hop, *window.shape[2:])
        elif fade:
            ramp = torch.linspace(0, 1, min(out_hop, window.shape[1]), device=window.device, dtype=window.dtype)
            faded = slice(start * out_hop, start * out_hop + len(ramp))
            before = output[rows, faded]
            window[:, : len(ramp)] = before + (window[:, : len(ramp)] - before) * ramp
        output[rows, start * out_hop : start * out_hop + window.shape[1]] = window
        num_outputs = start * out_hop + window.shape[1]
    return output[:, :num_outputs]


__all__ = ["FlexiCodecModel", "FlexiCodecPreTrainedModel"]
