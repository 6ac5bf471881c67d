"""
Flow matching from semantic tokens and a voice prompt to a mel spectrogram (Voicebox, arXiv
2306.15687).

The layers, the model with its `forward` (one velocity, or the training loss), and what training
draws. `sample`, the whole flow, is in generation_flexicodec_voicebox.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .compatibility_flexicodec import OffloadedDeviceMixin
from .configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig
from .generation_flexicodec_voicebox import (
    MAX_MISALIGNMENT,
    FlexiCodecVoiceboxGenerationMixin,
    check_alignment,
    check_codes,
    check_mel,
    codes_of_frames,
)


@dataclass
class FlexiCodecVoiceboxOutput(ModelOutput):
    """
    Output of [`FlexiCodecVoiceboxModel`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
            `flow_loss`, plus `repa_loss` if there is one.
        velocity (`torch.FloatTensor` of shape `(batch_size, num_frames, num_mel_bins)`):
            Predicted velocity dx/dt of the flow.
        flow_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
            Mean absolute error of the velocity outside prompt and padding.
        repa_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `semantic_features` is given):
            One minus the cosine similarity of projected hidden states and semantic features,
            weighted.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned with `output_hidden_states=True`):
            Input of the first block and output of each block, each `(batch_size, num_frames,
            hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned with `output_attentions=True`):
            Attention weights of each block, each `(batch_size, num_attention_heads, num_frames,
            num_frames)`.
    """

    loss: Tensor | None = None
    velocity: Tensor | None = None
    flow_loss: Tensor | None = None
    repa_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class FlexiCodecVoiceboxMLP(nn.Module):
    """
    Linear, SiLU, linear: projects each input into the transformer, and its output to the velocity.
    """

    def __init__(self, input_size: int, hidden_size: int, output_size: int):
        super().__init__()
        self.up_proj = nn.Linear(input_size, hidden_size)
        self.down_proj = nn.Linear(hidden_size, output_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(hidden_states)))


class FlexiCodecVoiceboxTimeEmbedding(nn.Module):
    """
    Sinusoids of the flow time, then an MLP. The time is not scaled up from [0, 1], so the slow
    sinusoids are almost constant, as in the reference: flexicodec 0.1.2, nar_tts/llama_nar.py,
    lines 22 to 26.
    """

    def __init__(self, config: FlexiCodecVoiceboxConfig):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.mlp = FlexiCodecVoiceboxMLP(config.hidden_size, 4 * config.hidden_size, config.hidden_size)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.hidden_size // 2
        exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / (half - 1)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
        sinusoids = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(sinusoids.to(self.mlp.up_proj.weight.dtype))


class FlexiCodecVoiceboxNormWeight(nn.Linear):
    """
    Flow time to the weight of a norm. It has its own type because it is initialized to a constant
    1.
    """


class FlexiCodecVoiceboxAdaptiveRMSNorm(nn.Module):
    """RMS norm whose weight is a linear function of the flow time instead of a parameter."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.to_weight = FlexiCodecVoiceboxNormWeight(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor) -> Tensor:
        normalized = F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        return normalized * self.to_weight(time_embedding)[:, None]


class FlexiCodecVoiceboxLayer(GradientCheckpointingLayer):
    """Llama block with bidirectional attention and norms that depend on the flow time."""

    def __init__(self, config: FlexiCodecVoiceboxConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = FlexiCodecVoiceboxAdaptiveRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config, layer_idx)
        self.self_attn.is_causal = False
        self.post_attention_layernorm = FlexiCodecVoiceboxAdaptiveRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        time_embedding: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states, time_embedding),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, time_embedding))


class FlexiCodecVoiceboxPreTrainedModel(OffloadedDeviceMixin, PreTrainedModel):
    config: FlexiCodecVoiceboxConfig
    config_class = FlexiCodecVoiceboxConfig
    base_model_prefix = "voicebox"
    main_input_name = "audio_codes"
    _input_embed_layer = "code_embedding"
    # The loss is a mean over frames, so `Trainer` must not divide it by a count of items.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlexiCodecVoiceboxLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": FlexiCodecVoiceboxLayer, "attentions": LlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlexiCodecVoiceboxNormWeight):
            init.zeros_(module.weight)
            init.ones_(module.bias)


class FlexiCodecVoiceboxModel(FlexiCodecVoiceboxPreTrainedModel, FlexiCodecVoiceboxGenerationMixin):  # type: ignore[override]
    """
    Semantic tokens with their lengths, and the mel spectrogram of a voice to imitate, to a mel
    spectrogram.

    [`~FlexiCodecVoiceboxModel.sample`] generates speech. `forward` computes the velocity of the
    flow at one time, or the training loss. The result for an item does not depend on the other
    items of its batch.

    With `config.latent_mean` and `config.latent_std`, the model predicts the codec's decoder
    latent, and this latent takes the place of the mel in all arguments: `codec.encode(...,
    merging_threshold=1.0).latents`, transposed, as `codec.decode(latents=...)` takes it.
    `noisy_mel` and `velocity` are always in normalized channels.
    """

    def __init__(self, config: FlexiCodecVoiceboxConfig):
        super().__init__(config)
        inner_size = 4 * config.hidden_size
        self.code_embedding = nn.Embedding(config.codebook_size, config.hidden_size)
        self.condition_mlp = FlexiCodecVoiceboxMLP(config.hidden_size, inner_size, config.hidden_size)
        self.mel_mlp = FlexiCodecVoiceboxMLP(config.num_mel_bins, inner_size, config.hidden_size)
        self.time_embedding = FlexiCodecVoiceboxTimeEmbedding(config)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.layers = nn.ModuleList([FlexiCodecVoiceboxLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = FlexiCodecVoiceboxAdaptiveRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output_mlp = FlexiCodecVoiceboxMLP(config.hidden_size, inner_size, config.num_mel_bins)
        # CODEPATH: None in models that are trained without semantic features, an index in the
        # released model.
        if config.repa_layer_index is not None:
            self.repa_projection = FlexiCodecVoiceboxMLP(
                config.hidden_size, config.repa_hidden_size, config.semantic_hidden_size
            )
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        audio_codes: Tensor | None = None,
        token_lengths: Tensor | None = None,
        noisy_mel: Tensor | None = None,
        timesteps: Tensor | None = None,
        mel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        semantic_features: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlexiCodecVoiceboxOutput:
        """
        Velocity of the flow at (`noisy_mel`, `timesteps`), or the training loss for clean mels
        (`labels`).

        In training, each item draws its time, its noise, and the length of the prompt that it sees
        clean. Each of the three may be passed instead, see [`~FlexiCodecVoiceboxModel.draw_flow`].
        Mel frames without a code count as padding; `config.upsample_factor` mel frames belong to
        each codec frame.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Semantic codes. Required in training. Without them the velocity is unconditional.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Codec frames that each code covers, 0 for padding. One each by default.
            noisy_mel (`torch.FloatTensor` of shape `(batch_size, num_frames, num_mel_bins)`, *optional*):
                Point x_t of the flow, with clean frames for the prompt.
            timesteps (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
                Flow times in [0, 1], required with `noisy_mel`.
            mel_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`, *optional*):
                True for mel frames, False for padding.
            labels (`torch.FloatTensor` of shape `(batch_size, num_frames, num_mel_bins)`, *optional*):
                Clean normalized mels to train on.
            noise (`torch.FloatTensor` of shape `(batch_size, num_frames, num_mel_bins)`, *optional*):
                Gaussian noise at t = 0, for training.
            prompt_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Mel frames of the prompt, for training. Items with 0 are trained without a
                condition.
            semantic_features (`torch.FloatTensor` of shape `(batch_size, num_frames, num_features)`, *optional*):
                Output of the codec's semantic encoder before merging, `config.semantic_hidden_size`
                wide: adds the alignment loss (REPA).

        Raises:
            ValueError: Neither or both of `noisy_mel` and `labels`, or tensors that do not match
                each other.
        """
        mel = noisy_mel if labels is None else labels
        if mel is None or (noisy_mel is not None and labels is not None):
            raise ValueError("Pass either `noisy_mel` with `timesteps` for the velocity, or `labels` for the loss.")
        mask = check_mel(
            "noisy_mel" if labels is None else "labels", mel, mel_mask, "mel_mask", self.config.num_mel_bins
        )
        condition = None
        if audio_codes is not None:
            token_lengths = check_codes(
                "audio_codes", audio_codes, "token_lengths", token_lengths, len(mel), self.config.codebook_size
            )
            check_alignment("audio_codes", token_lengths, "the mel", mask, self.config.upsample_factor)
            codes, has_code = codes_of_frames(audio_codes, token_lengths * self.config.upsample_factor, mel.shape[1])
            condition, mask = self.code_embedding(codes), mask & has_code

        if labels is None:
            if timesteps is None:
                raise ValueError("`noisy_mel` needs `timesteps`, the flow times in [0, 1] of shape (batch_size,).")
            if semantic_features is not None:
                raise ValueError("`semantic_features` are for training: pass them with `labels`.")
            return FlexiCodecVoiceboxOutput(velocity=self._velocity(mel, condition, timesteps, mask, **kwargs)[0])

        if condition is None:
            raise ValueError("Training needs `audio_codes` beside `labels`.")
        target = self._normalize(mel).float()
        if timesteps is None:
            timesteps = _flow_times(torch.rand(len(mel), device=mel.device))
        if noise is None:
            noise = torch.randn_like(target)
        if prompt_lengths is None:
            prompt_lengths = _prompt_lengths(mask.sum(dim=1), torch.rand(2, len(mel), device=mel.device), self.config)
        is_prompt = torch.arange(mel.shape[1], device=mel.device) < prompt_lengths[:, None]
        time, noise_scale = timesteps.float()[:, None, None], 1 - self.config.sigma_min
        noisy_mel = torch.where(is_prompt[..., None], target, (1 - noise_scale * time) * noise + time * target)
        condition = condition * (prompt_lengths > 0)[:, None, None]

        velocity, aligned = self._velocity(noisy_mel, condition, timesteps, mask, **kwargs)
        error = (velocity.float() - (target - noise_scale * noise)).abs().mean(dim=-1)
        loss = flow_loss = _masked_mean(error, mask & ~is_prompt)
        repa_loss = None
        if semantic_features is not None:
            repa_loss = self._repa_loss(aligned, semantic_features, mask)
            loss = flow_loss + repa_loss
        return FlexiCodecVoiceboxOutput(loss=loss, velocity=velocity, flow_loss=flow_loss, repa_loss=repa_loss)

    def _velocity(
        self,
        noisy_mel: Tensor,
        condition: Tensor | None,
        timesteps: Tensor,
        mask: Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity, and the hidden states that the alignment loss compares."""
        if condition is None:
            condition = torch.zeros(1, 1, self.config.hidden_size, dtype=self.dtype, device=noisy_mel.device)
        hidden_states = self.mel_mlp(noisy_mel.to(self.dtype)) + self.condition_mlp(condition)
        time_embedding = self.time_embedding(timesteps)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=mask
        )
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        position_embeddings = self.rotary_emb(hidden_states, positions)
        aligned = None
        for index, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, time_embedding, attention_mask, position_embeddings, **kwargs)
            # CODEPATH: never true in models that are trained without semantic features.
            if index == self.config.repa_layer_index:
                aligned = hidden_states
        return self.output_mlp(self.norm(hidden_states, time_embedding)), aligned

    def _repa_loss(self, hidden_states: Tensor | None, features: Tensor, mask: Tensor) -> Tensor:
        """
        Alignment of hidden states, averaged over each codec frame, with semantic features (arXiv
        2410.06940).
        """
        factor = self.config.upsample_factor
        num_frames = mask.shape[1] // factor
        if hidden_states is None:
            raise ValueError(
                "`semantic_features` were given, but this model has no alignment projection: its configuration says "
                "`repa_layer_index=None`."
            )
        _check_features(features, num_frames, self.config)
        num_frames = min(num_frames, features.shape[1])
        pooled = F.avg_pool1d(hidden_states.transpose(1, 2), factor).transpose(1, 2)[:, :num_frames]
        similarity = F.cosine_similarity(
            self.repa_projection(pooled).float(), features[:, :num_frames].float(), dim=-1
        )
        # Only whole codec frames count: one that reaches into the padding would depend on it.
        is_whole = mask[:, : num_frames * factor].unflatten(1, (num_frames, factor)).all(dim=-1)
        return self.config.repa_loss_weight * _masked_mean(1 - similarity, is_whole)

    def draw_flow(self, frames: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """
        Draw what `forward` needs in training with a generator for each item, so that an item's
        draws depend neither on its batch nor on the process that trains it.

        Args:
            frames (`torch.LongTensor` of shape `(batch_size,)`): Mel frames of each item.
            generators (`list[torch.Generator]`): One for each item, on any device.

        Returns:
            `dict[str, torch.Tensor]`: `timesteps` and `prompt_lengths` of shape `(batch_size,)` and
            `noise` of shape `(batch_size, frames.max(), num_mel_bins)`.
        """
        uniform = torch.stack([torch.rand(3, generator=one, device=one.device) for one in generators], dim=1)
        uniform = uniform.to(frames.device)
        noise = [
            torch.randn(count, self.config.num_mel_bins, generator=one, device=one.device)
            for count, one in zip(frames.tolist(), generators, strict=True)
        ]
        return {
            "timesteps": _flow_times(uniform[0]),
            "prompt_lengths": _prompt_lengths(frames, uniform[1:], self.config),
            "noise": nn.utils.rnn.pad_sequence(noise, batch_first=True).to(frames.device),
        }


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all frames of the batch that `mask` selects."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _flow_times(uniform: Tensor) -> Tensor:
    """
    Times of training from uniform draws: flexicodec 0.1.2, nar_tts/voicebox_models.py, lines 228 to
    232.
    """
    return 1 - torch.cos(uniform.clamp(min=1e-5) * (math.pi / 2))


def _prompt_lengths(frames: Tensor, uniform: Tensor, config: FlexiCodecVoiceboxConfig) -> Tensor:
    """
    Prompt frames in training `(batch_size,)` from uniform draws `(2, batch_size)`: for a length and
    for whether there is a prompt at all. As in flexicodec 0.1.2, nar_tts/voicebox_models.py, lines
    141 to 146, but for each item.
    """
    lowest = (frames // 4).clamp(max=5)
    span = ((frames * config.max_prompt_fraction).long() - lowest).clamp(min=1)
    return (lowest + (uniform[0] * span).long()) * (uniform[1] >= config.unconditional_probability)


def _check_features(features: Tensor, num_frames: int, config: FlexiCodecVoiceboxConfig) -> None:
    if features.ndim != 3 or features.shape[-1] != config.semantic_hidden_size:
        raise ValueError(
            f"`semantic_features` have shape {tuple(features.shape)}, expected (batch_size, num_codec_frames, "
            f"{config.semantic_hidden_size})."
        )
    if abs(features.shape[1] - num_frames) > MAX_MISALIGNMENT:
        raise ValueError(
            f"`semantic_features` have {features.shape[1]} frames, but the mel has {num_frames} codec frames "
            f"({config.upsample_factor} mel frames each): pass features of the same clips."
        )


__all__ = [
    "FlexiCodecVoiceboxModel",
    "FlexiCodecVoiceboxOutput",
    "FlexiCodecVoiceboxPreTrainedModel",
]
