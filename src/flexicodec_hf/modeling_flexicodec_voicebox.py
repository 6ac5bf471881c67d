"""Flow matching from semantic tokens and a voice prompt to a mel spectrogram (Voicebox, arXiv 2306.15687)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig
from .linear_flexicodec import FlexiCodecLinear
from .scheduling_flexicodec import FlexiCodecMidpointScheduler


# The codec drops up to two frames at the end of a clip, and the mel's last frame may be incomplete: an honest pair of
# codes and mel never differs by more codec frames than this.
_MAX_MISALIGNMENT = 3


@dataclass
class FlexiCodecVoiceboxOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` are given):
            Flow-matching loss, plus the weighted alignment loss when semantic features are given.
        velocity (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
            Predicted velocity dx/dt of the flow.
        flow_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` are given):
            Mean absolute error of the velocity outside prompt and padding.
        repa_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `semantic_features` are given):
            One minus the cosine between projected hidden states and semantic features, weighted.
        hidden_states (`tuple(torch.Tensor)`, *optional*, returned with `output_hidden_states=True`):
            Input of the first block and output of every block, each `(batch_size, frames, hidden_size)`.
        attentions (`tuple(torch.Tensor)`, *optional*, returned with `output_attentions=True`, eager attention):
            Attention weights of every block, each `(batch_size, num_attention_heads, frames, frames)`.
    """

    loss: torch.Tensor | None = None
    velocity: torch.Tensor | None = None
    flow_loss: torch.Tensor | None = None
    repa_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FlexiCodecVoiceboxSampleOutput(ModelOutput):
    """
    Args:
        mel (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
            Normalised log mel spectrogram of the target (or the codec's decoder latent, for `codec.decode`), float32,
            zero in the padding.
        mel_mask (`torch.BoolTensor` of shape `(batch_size, frames)`):
            Which frames belong to each item.
    """

    mel: torch.Tensor | None = None
    mel_mask: torch.Tensor | None = None


class FlexiCodecVoiceboxMLP(nn.Module):
    """Linear, SiLU, Linear: what leads every input into the transformer and the velocity out of it."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int):
        super().__init__()
        self.up_proj = FlexiCodecLinear(input_size, hidden_size)
        self.down_proj = FlexiCodecLinear(hidden_size, output_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.up_proj(hidden_states)))


class FlexiCodecVoiceboxTimeEmbedding(nn.Module):
    """Sinusoids of the flow time t in [0, 1] (not scaled up, so the slow ones are nearly constant), then an MLP."""

    def __init__(self, config: FlexiCodecVoiceboxConfig):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.mlp = FlexiCodecVoiceboxMLP(config.hidden_size, 4 * config.hidden_size, config.hidden_size)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = self.hidden_size // 2
        exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / (half - 1)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
        sinusoids = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(sinusoids.to(self.mlp.up_proj.weight.dtype))


class FlexiCodecVoiceboxNormWeight(nn.Linear):
    """Flow time to the weight of a norm. A type of its own, for it starts out as the constant one."""


class FlexiCodecVoiceboxAdaptiveRMSNorm(nn.Module):
    """RMS norm whose weight is a linear function of the flow time instead of a parameter."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.to_weight = FlexiCodecVoiceboxNormWeight(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, time_embedding: torch.Tensor) -> torch.Tensor:
        normalised = F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        return normalised * self.to_weight(time_embedding)[:, None]


class FlexiCodecVoiceboxAttention(LlamaAttention):
    """Llama's attention, looking both ways, with the linear layers of this package."""

    def __init__(self, config: FlexiCodecVoiceboxConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False
        size = config.hidden_size
        self.q_proj = FlexiCodecLinear(size, size, bias=False)
        self.k_proj = FlexiCodecLinear(size, size, bias=False)
        self.v_proj = FlexiCodecLinear(size, size, bias=False)
        self.o_proj = FlexiCodecLinear(size, size, bias=False)


class FlexiCodecVoiceboxGatedMLP(LlamaMLP):
    """Llama's gated MLP, with the linear layers of this package."""

    def __init__(self, config: FlexiCodecVoiceboxConfig):
        super().__init__(config)
        size, inner_size = config.hidden_size, config.intermediate_size
        self.gate_proj = FlexiCodecLinear(size, inner_size, bias=False)
        self.up_proj = FlexiCodecLinear(size, inner_size, bias=False)
        self.down_proj = FlexiCodecLinear(inner_size, size, bias=False)


class FlexiCodecVoiceboxLayer(GradientCheckpointingLayer):
    """Llama block with bidirectional attention and norms that depend on the flow time."""

    def __init__(self, config: FlexiCodecVoiceboxConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = FlexiCodecVoiceboxAdaptiveRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = FlexiCodecVoiceboxAttention(config, layer_idx)
        self.post_attention_layernorm = FlexiCodecVoiceboxAdaptiveRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FlexiCodecVoiceboxGatedMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        time_embedding: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states, time_embedding),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states, time_embedding))


class FlexiCodecVoiceboxPreTrainedModel(PreTrainedModel):
    config: FlexiCodecVoiceboxConfig
    config_class = FlexiCodecVoiceboxConfig
    base_model_prefix = "voicebox"
    main_input_name = "audio_codes"
    # The loss is a mean over frames: `Trainer` must not count items for it.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlexiCodecVoiceboxLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": FlexiCodecVoiceboxLayer, "attentions": FlexiCodecVoiceboxAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlexiCodecVoiceboxNormWeight):
            init.zeros_(module.weight)
            init.ones_(module.bias)


class _Pass(NamedTuple):
    """What one evaluation of the velocity keeps over all steps of the flow."""

    static: torch.Tensor  # (rows, prompt + target frames, hidden_size): condition everywhere, mel too in the prompt
    prompt_frames: int
    attention_mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor]


class FlexiCodecVoiceboxModel(FlexiCodecVoiceboxPreTrainedModel):
    """Semantic tokens with durations, and the mel spectrogram of a voice to imitate, to a mel spectrogram.

    [`~FlexiCodecVoiceboxModel.sample`] speaks; `forward` gives the velocity of the flow at one time, or the training
    loss. What an item gives does not depend on the items it is batched with.

    With `config.latent_mean` and `config.latent_std`, the codec's decoder latent stands for the mel wherever this class
    says mel: what `codec.encode(..., merging_threshold=1.0).latents` gives and `codec.decode(latents=...)` takes,
    transposed, as it is (the flow itself, `noisy_mel` and `velocity`, is in normalised channels).
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
        if config.repa_layer_index is not None:
            self.repa_projection = FlexiCodecVoiceboxMLP(
                config.hidden_size, config.repa_hidden_size, config.semantic_hidden_size
            )
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        audio_codes: torch.Tensor | None = None,
        token_lengths: torch.Tensor | None = None,
        noisy_mel: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        mel_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
        semantic_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlexiCodecVoiceboxOutput:
        """Velocity of the flow at (`noisy_mel`, `timesteps`), or the training loss of clean mels (`labels`).

        In training, each item draws its time t = 1 - cos(u pi / 2), its noise, and the length of the prompt that it
        sees clean; any of the three may be given instead. Mel frames without a code (`upsample_factor` frames belong
        to a codec frame) count as padding.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, groups)`, *optional*):
                Semantic codes. Required in training; without them the velocity is unconditional.
            token_lengths (`torch.LongTensor` of shape `(batch_size, groups)`, *optional*):
                Duration of each code in codec frames, 0 for padding. One frame each by default.
            noisy_mel (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`, *optional*):
                Point x_t of the flow, its prompt frames clean.
            timesteps (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
                Flow times in [0, 1], required with `noisy_mel`.
            mel_mask (`torch.BoolTensor` of shape `(batch_size, frames)`, *optional*):
                Which mel frames are not padding. All by default.
            labels (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`, *optional*):
                Clean normalised mels to train on.
            noise (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`, *optional*):
                Gaussian noise at t = 0 of the training.
            prompt_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Frames of the prompt in training. Items with 0 see no condition either.
            semantic_features (`torch.FloatTensor` of shape `(batch_size, codec_frames, features)`, *optional*):
                Features of the codec's semantic encoder before merging, `semantic_hidden_size` wide: adds the
                alignment loss (REPA).

        Raises:
            ValueError: Neither or both of `noisy_mel` and `labels`, or tensors that do not fit each other.
        """
        mel = noisy_mel if labels is None else labels
        if mel is None or (labels is not None and noisy_mel is not None):
            raise ValueError("Pass either `noisy_mel` with `timesteps` for the velocity, or `labels` for the loss.")
        _check_mel(mel, "labels" if labels is not None else "noisy_mel", self.config.num_mel_bins)
        batch_size, num_frames = mel.shape[:2]
        mask = mel.new_ones(batch_size, num_frames, dtype=torch.bool) if mel_mask is None else mel_mask.bool()
        if mask.shape != mel.shape[:2]:
            raise ValueError(f"`mel_mask` has shape {tuple(mask.shape)}, expected {tuple(mel.shape[:2])} as the mel.")
        condition = None
        if audio_codes is not None:
            token_lengths = self._check_codes(audio_codes, token_lengths, "", batch_size)
            code_frames = token_lengths.sum(dim=1) * self.config.upsample_factor
            self._check_alignment(code_frames, mask.sum(dim=1), "audio_codes", "the mel")
            codes, has_code = self._spread(audio_codes, token_lengths, num_frames)
            mask = mask & has_code
            condition = self.code_embedding(codes)

        if labels is None:
            if timesteps is None:
                raise ValueError("`noisy_mel` needs `timesteps`, the flow times in [0, 1] of shape (batch_size,).")
            if semantic_features is not None:
                raise ValueError("`semantic_features` are for training: pass them with `labels`.")
            velocity, _ = self._estimate(mel, condition, timesteps, mask, **kwargs)
            return FlexiCodecVoiceboxOutput(velocity=velocity)

        if condition is None:
            raise ValueError("Training needs `audio_codes` beside `labels`.")
        target = self._normalize(mel).float()
        if timesteps is None:
            timesteps = self._flow_times(torch.rand(batch_size, device=mel.device))
        if noise is None:
            noise = torch.randn_like(target)
        if prompt_lengths is None:
            prompt_lengths = self._draw_prompt_lengths(mask.sum(dim=1))
        is_prompt = torch.arange(num_frames, device=mel.device) < prompt_lengths[:, None]
        time = timesteps.float()[:, None, None]
        noise_scale = 1 - self.config.sigma_min
        noisy_mel = torch.where(is_prompt[..., None], target, (1 - noise_scale * time) * noise + time * target)
        condition = condition * (prompt_lengths > 0)[:, None, None]

        velocity, aligned = self._estimate(noisy_mel, condition, timesteps, mask, **kwargs)
        error = (velocity.float() - (target - noise_scale * noise)).abs().mean(dim=-1)
        flow_loss = _masked_mean(error, mask & ~is_prompt)
        repa_loss = None
        if semantic_features is not None:
            repa_loss = self.config.repa_loss_weight * self._repa_loss(aligned, semantic_features, mask)
        return FlexiCodecVoiceboxOutput(
            loss=flow_loss if repa_loss is None else flow_loss + repa_loss,
            velocity=velocity,
            flow_loss=flow_loss,
            repa_loss=repa_loss,
        )

    @torch.no_grad()
    def sample(
        self,
        audio_codes: torch.Tensor,
        token_lengths: torch.Tensor | None = None,
        prompt_codes: torch.Tensor | None = None,
        prompt_token_lengths: torch.Tensor | None = None,
        prompt_mel: torch.Tensor | None = None,
        prompt_mel_mask: torch.Tensor | None = None,
        num_inference_steps: int = 15,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.75,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        scheduler: Any = None,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None] | None = None,
    ) -> FlexiCodecVoiceboxSampleOutput:
        """Speak semantic tokens with the voice of a prompt.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, groups)`):
                Semantic codes to speak.
            token_lengths (`torch.LongTensor` of shape `(batch_size, groups)`, *optional*):
                Duration of each code in codec frames, 0 for padding (its code is not read). One frame each by default.
            prompt_codes (`torch.LongTensor` of shape `(batch_size, prompt_groups)`, *optional*):
                Semantic codes of the prompt. Without a prompt the model invents a voice.
            prompt_token_lengths (`torch.LongTensor` of shape `(batch_size, prompt_groups)`, *optional*):
                Their durations. One frame each by default.
            prompt_mel (`torch.FloatTensor` of shape `(batch_size, prompt_frames, num_mel_bins)`, *optional*):
                Normalised mel of the prompt, required with `prompt_codes`. Mel and codes are cut to the same frames;
                they may differ by the few frames at the end of a clip that the codec drops.
            prompt_mel_mask (`torch.BoolTensor` of shape `(batch_size, prompt_frames)`, *optional*):
                Which frames of `prompt_mel` are not padding (on the right). All by default.
            num_inference_steps (`int`, *optional*, defaults to 15):
                Steps of the flow.
            guidance_scale (`float`, *optional*, defaults to 2.0):
                Weight g of classifier-free guidance, v = v_cond + g (v_cond - v_uncond). 0 is none, at half the cost.
            guidance_rescale (`float`, *optional*, defaults to 0.75):
                How far the guided velocity is brought back to the standard deviation of the conditional one, 0 to 1
                (arXiv 2305.08891).
            generator (`torch.Generator` or list of them, *optional*):
                Source of the noise. With one per item, an item's noise is the same in any batch; with a single one it
                depends on the position in the batch, never on the other items' lengths or on the device of the model.
            noise (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`, *optional*):
                The noise itself, for `upsample_factor` frames per codec frame of the longest item.
            scheduler (*optional*):
                Time grid and integrator, [`FlexiCodecMidpointScheduler`] by default.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(model, step, timestep, {"mel": mel})`; a returned dictionary may
                hold another `mel` to go on with.

        Returns:
            [`FlexiCodecVoiceboxSampleOutput`]: the mel spectrogram and its mask.

        Raises:
            ValueError: Tensors that do not fit each other, codes out of range, half a prompt, nothing to speak.
        """
        token_lengths = self._check_codes(audio_codes, token_lengths, "", audio_codes.shape[0])
        frames = token_lengths.sum(dim=1) * self.config.upsample_factor
        if (frames == 0).any():
            raise ValueError(f"Every item needs at least one frame to speak, but `token_lengths` sum up to {frames}.")
        codes, mask = self._spread(audio_codes, token_lengths, int(frames.max()))
        prompt = self._align_prompt(
            prompt_codes, prompt_token_lengths, prompt_mel, prompt_mel_mask, batch_size=len(codes)
        )
        if noise is None:
            noise = self.draw_noise(frames.tolist(), generator)
        if noise.shape != (*codes.shape, self.config.num_mel_bins):
            raise ValueError(
                f"`noise` has shape {tuple(noise.shape)}, expected {(*codes.shape, self.config.num_mel_bins)}."
            )
        if scheduler is None:
            scheduler = FlexiCodecMidpointScheduler()
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        # The integral is kept in float32, whatever the model computes in: its steps are small against its value.
        mel = noise.to(self.device, torch.float32)
        return self._integrate(
            codes, mask, *prompt, mel, scheduler, guidance_scale, guidance_rescale, callback_on_step_end
        )

    def _integrate(
        self,
        codes: torch.Tensor,
        mask: torch.Tensor,
        prompt_codes: torch.Tensor,
        prompt_mask: torch.Tensor,
        prompt_mel: torch.Tensor,
        mel: torch.Tensor,
        scheduler: Any,
        guidance_scale: float,
        guidance_rescale: float,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor] | None] | None,
    ) -> FlexiCodecVoiceboxSampleOutput:
        """The flow from noise to mel. Codes are given per mel frame; prompts are padded on the left, targets on the
        right, so that the target begins in the same column for all."""
        passes = self._prepare_passes(codes, mask, prompt_codes, prompt_mask, prompt_mel, guidance_scale != 0)
        for step, timestep in enumerate(scheduler.timesteps):
            time_embedding = self.time_embedding(timestep[None])
            mel_hidden = self.mel_mlp(mel.to(self.dtype))
            velocities = torch.cat([self._run_pass(mel_hidden, time_embedding, item) for item in passes]).float()
            velocity = velocities[: len(mel)]
            if guidance_scale != 0:
                unconditional = velocities[len(mel) :]
                guided = velocity + guidance_scale * (velocity - unconditional)
                ratio = _masked_std(velocity, mask) / _masked_std(guided, mask)
                velocity = guided * (guidance_rescale * ratio + 1 - guidance_rescale)
            mel = scheduler.step(velocity, timestep, mel).prev_sample
            if callback_on_step_end is not None:
                mel = (callback_on_step_end(self, step, timestep, {"mel": mel}) or {}).get("mel", mel)
        return FlexiCodecVoiceboxSampleOutput(mel=self._denormalize(mel) * mask[..., None], mel_mask=mask)

    def _prepare_passes(
        self,
        codes: torch.Tensor,
        mask: torch.Tensor,
        prompt_codes: torch.Tensor,
        prompt_mask: torch.Tensor,
        prompt_mel: torch.Tensor,
        guided: bool,
    ) -> list[_Pass]:
        """One pass, or one for the condition and one for guidance: together they hold the conditional rows first."""
        prompt_frames = prompt_codes.shape[1]
        static = self.condition_mlp(self.code_embedding(torch.cat([prompt_codes, codes], dim=1)))
        static[:, :prompt_frames] += self.mel_mlp(prompt_mel.to(self.dtype))
        full_mask = torch.cat([prompt_mask, mask], dim=1)
        columns = torch.arange(full_mask.shape[1], device=codes.device)
        positions = columns - (prompt_frames - prompt_mask.sum(dim=1, keepdim=True))
        if not guided:
            return [self._make_pass(static, full_mask, positions, prompt_frames)]

        # Guidance knows neither codes nor prompt, and counts its positions from the start of the target.
        blank = self.condition_mlp(static.new_zeros(1, 1, self.config.hidden_size)).expand(*mask.shape, -1)
        blank_positions = (columns - prompt_frames).expand_as(positions)
        if not self._shares_batch(prompt_frames):
            return [
                self._make_pass(static, full_mask, positions, prompt_frames),
                self._make_pass(blank, mask, blank_positions[:, prompt_frames:], 0),
            ]
        return [
            self._make_pass(
                torch.cat([static, F.pad(blank, (0, 0, prompt_frames, 0))]),
                torch.cat([full_mask, F.pad(mask, (prompt_frames, 0))]),
                torch.cat([positions, blank_positions]),
                prompt_frames,
            )
        ]

    def _shares_batch(self, prompt_frames: int) -> bool:
        """Whether guidance runs in one batch with the condition. A CPU is bound by arithmetic, and there the prompt's
        columns, mere padding in the unconditional rows, cost more than a second pass."""
        return self.device.type != "cpu" or prompt_frames == 0

    def _make_pass(
        self, static: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, prompt_frames: int
    ) -> _Pass:
        return _Pass(
            static,
            prompt_frames,
            create_bidirectional_mask(config=self.config, inputs_embeds=static, attention_mask=mask),
            self.rotary_emb(static, positions.clamp(min=0)),
        )

    def _run_pass(self, mel_hidden: torch.Tensor, time_embedding: torch.Tensor, item: _Pass) -> torch.Tensor:
        prompt, target = item.static[:, : item.prompt_frames], item.static[:, item.prompt_frames :]
        mel_hidden = mel_hidden.repeat(len(target) // len(mel_hidden), 1, 1)
        hidden_states = torch.cat([prompt, target + mel_hidden], dim=1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, time_embedding, item.attention_mask, item.position_embeddings)
        return self.output_mlp(self.norm(hidden_states[:, item.prompt_frames :], time_embedding))

    def _estimate(
        self,
        noisy_mel: torch.Tensor,
        condition: torch.Tensor | None,
        timesteps: torch.Tensor,
        mask: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Velocity, and the hidden states that the alignment loss looks at."""
        if condition is None:
            condition = self.code_embedding.weight.new_zeros(1, 1, self.config.hidden_size)
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
            if index == self.config.repa_layer_index:
                aligned = hidden_states
        return self.output_mlp(self.norm(hidden_states, time_embedding)), aligned

    def _repa_loss(
        self, hidden_states: torch.Tensor | None, features: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        factor = self.config.upsample_factor
        num_pools = mask.shape[1] // factor
        if hidden_states is None:
            raise ValueError(
                "`semantic_features` were given, but this model has no alignment projection: its configuration says "
                "`repa_layer_index=None`."
            )
        if features.ndim != 3 or features.shape[-1] != self.config.semantic_hidden_size:
            raise ValueError(
                f"`semantic_features` have shape {tuple(features.shape)}, expected (batch_size, codec_frames, "
                f"{self.config.semantic_hidden_size})."
            )
        if abs(features.shape[1] - num_pools) > _MAX_MISALIGNMENT:
            raise ValueError(
                f"`semantic_features` have {features.shape[1]} frames, but the mel has {num_pools} codec frames "
                f"({factor} mel frames each)."
            )
        num_pools = min(num_pools, features.shape[1])
        pooled = F.avg_pool1d(hidden_states.transpose(1, 2), factor).transpose(1, 2)[:, :num_pools]
        similarity = F.cosine_similarity(self.repa_projection(pooled).float(), features[:, :num_pools].float(), dim=-1)
        # Whole pools alone: one that reaches into the padding would depend on it.
        return _masked_mean(
            1 - similarity, mask[:, : num_pools * factor].unflatten(1, (num_pools, factor)).all(dim=-1)
        )

    def draw_flow(self, frames: torch.Tensor, generators: list[torch.Generator]) -> dict[str, torch.Tensor]:
        """What `forward` draws in training, from a generator for each item: then it does not depend on the other items
        of the batch, nor on the process that an item is given to.

        Args:
            frames (`torch.LongTensor` of shape `(batch_size,)`): Mel frames of each item.
            generators: As many as there are items, on any device.

        Returns:
            `timesteps` and `prompt_lengths` of shape `(batch_size,)` and `noise` of shape `(batch_size, longest item,
            num_mel_bins)`, to be passed to `forward`.
        """
        uniform = torch.stack([torch.rand(3, generator=one, device=one.device) for one in generators], dim=1)
        uniform = uniform.to(frames.device)
        noise = [
            torch.randn(count, self.config.num_mel_bins, generator=one, device=one.device)
            for count, one in zip(frames.tolist(), generators, strict=True)
        ]
        return {
            "timesteps": self._flow_times(uniform[0]),
            "prompt_lengths": self._draw_prompt_lengths(frames, uniform[1:]),
            "noise": nn.utils.rnn.pad_sequence(noise, batch_first=True).to(frames.device),
        }

    def _flow_times(self, uniform: torch.Tensor) -> torch.Tensor:
        return 1 - torch.cos(uniform.clamp(min=1e-5) * (math.pi / 2))

    def _draw_prompt_lengths(self, frames: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
        if uniform is None:
            uniform = torch.rand(2, *frames.shape, device=frames.device)
        lowest = (frames // 4).clamp(max=5)
        span = ((frames * self.config.max_prompt_fraction).long() - lowest).clamp(min=1)
        lengths = lowest + (uniform[0] * span).long()
        return lengths * (uniform[1] >= self.config.unconditional_probability)

    def _normalize(self, latent: torch.Tensor) -> torch.Tensor:
        if not self.config.predicts_latent:
            return latent
        latent = latent.float()
        return (latent - latent.new_tensor(self.config.latent_mean)) / latent.new_tensor(self.config.latent_std)

    def _denormalize(self, latent: torch.Tensor) -> torch.Tensor:
        if not self.config.predicts_latent:
            return latent
        return latent * latent.new_tensor(self.config.latent_std) + latent.new_tensor(self.config.latent_mean)

    def draw_noise(self, frames: list[int], generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        """Noise for `sample`, of shape `(batch_size, longest, num_mel_bins)`, for items of so many mel frames.

        One seed per item, and from it the item's own noise, always on the CPU: so neither the other items nor the device
        have a say in it.
        """
        if isinstance(generator, list):
            if len(generator) != len(frames):
                raise ValueError(f"`generator` holds {len(generator)} generators for {len(frames)} items.")
            seeds = [int(torch.randint(2**63 - 1, (), generator=one, device=one.device)) for one in generator]
        else:
            device = "cpu" if generator is None else generator.device
            seeds = torch.randint(2**63 - 1, (len(frames),), generator=generator, device=device).tolist()
        noise = [
            torch.randn(count, self.config.num_mel_bins, generator=torch.Generator().manual_seed(seed))
            for count, seed in zip(frames, seeds, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(noise, batch_first=True)

    def _align_prompt(
        self,
        codes: torch.Tensor | None,
        token_lengths: torch.Tensor | None,
        mel: torch.Tensor | None,
        mel_mask: torch.Tensor | None,
        batch_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes per mel frame, mask and mel of the prompts, cut to the same frames and padded on the left."""
        if codes is None and mel is None:
            empty = torch.zeros(batch_size, 0, dtype=torch.long, device=self.device)
            return empty, empty.bool(), torch.zeros(batch_size, 0, self.config.num_mel_bins, device=self.device)
        if codes is None or mel is None:
            given, missing = ("prompt_mel", "prompt_codes") if codes is None else ("prompt_codes", "prompt_mel")
            raise ValueError(f"`{given}` came without `{missing}`: a prompt is both, the codes and the mel of a clip.")

        token_lengths = self._check_codes(codes, token_lengths, "prompt_", batch_size)
        _check_mel(mel, "prompt_mel", self.config.num_mel_bins, batch_size)
        mel = self._normalize(mel)
        mel_frames = codes.new_full((batch_size,), mel.shape[1])
        if mel_mask is not None:
            if mel_mask.shape != mel.shape[:2]:
                raise ValueError(
                    f"`prompt_mel_mask` has shape {tuple(mel_mask.shape)}, expected {tuple(mel.shape[:2])}."
                )
            mel_frames = mel_mask.sum(dim=1).long()
        code_frames = token_lengths.sum(dim=1) * self.config.upsample_factor
        self._check_alignment(code_frames, mel_frames, "prompt_codes", "`prompt_mel`")

        frames = torch.minimum(code_frames, mel_frames)
        width = int(frames.max())
        codes, _ = self._spread(codes, token_lengths, width)
        index = torch.arange(width, device=codes.device) - (width - frames[:, None])
        mask = index >= 0
        index = index.clamp(min=0)
        return codes.gather(1, index), mask, mel.gather(1, index[..., None].expand(-1, -1, mel.shape[-1]))

    def _spread(
        self, codes: torch.Tensor, token_lengths: torch.Tensor, num_frames: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes per group to codes per mel frame, and which frames have one."""
        ends = token_lengths.cumsum(dim=1) * self.config.upsample_factor
        frame = torch.arange(num_frames, device=codes.device).expand(len(codes), -1).contiguous()
        group = torch.searchsorted(ends, frame, right=True).clamp(max=codes.shape[1] - 1)
        mask = frame < ends[:, -1:]
        return codes.gather(1, group) * mask, mask

    def _check_codes(
        self, codes: torch.Tensor, token_lengths: torch.Tensor | None, prefix: str, batch_size: int
    ) -> torch.Tensor:
        """Token lengths, one frame each by default, after a look at both tensors."""
        codes_name, lengths_name = ("prompt_codes" if prefix else "audio_codes"), f"{prefix}token_lengths"
        if codes.ndim != 2 or codes.shape[0] != batch_size or codes.shape[1] == 0:
            raise ValueError(
                f"`{codes_name}` has shape {tuple(codes.shape)}, expected ({batch_size}, groups) with at least one "
                "group. Of codes with several codebooks pass the semantic ones, `audio_codes[:, 0]`."
            )
        if token_lengths is None:
            token_lengths = torch.ones_like(codes)
        if token_lengths.shape != codes.shape:
            raise ValueError(
                f"`{lengths_name}` has shape {tuple(token_lengths.shape)}, expected {tuple(codes.shape)} as "
                f"`{codes_name}`."
            )
        for name, tensor in ((codes_name, codes), (lengths_name, token_lengths)):
            if tensor.is_floating_point() or tensor.dtype == torch.bool:
                raise ValueError(f"`{name}` must hold integers, but has dtype {tensor.dtype}.")
        if not torch.compiler.is_compiling():
            if (token_lengths < 0).any():
                raise ValueError(f"`{lengths_name}` must not be negative, but its minimum is {token_lengths.min()}.")
            spoken = codes[token_lengths > 0]
            if ((spoken < 0) | (spoken >= self.config.codebook_size)).any():
                raise ValueError(
                    f"`{codes_name}` must lie in 0..{self.config.codebook_size - 1}, but range from {spoken.min()} to "
                    f"{spoken.max()}."
                )
        return token_lengths

    def _check_alignment(
        self, code_frames: torch.Tensor, mel_frames: torch.Tensor, codes_name: str, mel_name: str
    ) -> None:
        if torch.compiler.is_compiling():
            return
        tolerance = _MAX_MISALIGNMENT * self.config.upsample_factor
        for item, (of_codes, of_mel) in enumerate(zip(code_frames.tolist(), mel_frames.tolist(), strict=True)):
            if abs(of_codes - of_mel) > tolerance:
                raise ValueError(
                    f"`{codes_name}` of item {item} last {of_codes} mel frames, but {mel_name} has {of_mel}: they are "
                    f"not of the same clip, or its durations are missing (up to {tolerance} frames may differ)."
                )


def _check_mel(mel: torch.Tensor, name: str, num_mel_bins: int, batch_size: int | None = None) -> None:
    if mel.ndim != 3 or mel.shape[-1] != num_mel_bins or batch_size not in (None, mel.shape[0]):
        rows = "batch_size" if batch_size is None else batch_size
        raise ValueError(f"`{name}` has shape {tuple(mel.shape)}, expected ({rows}, frames, {num_mel_bins}).")


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over all frames of the batch that `mask` selects."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _masked_std(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Unbiased standard deviation of each item over its own frames and all channels, shape `(batch_size, 1, 1)`."""
    mask = mask[..., None]
    count = mask.sum(dim=1, keepdim=True) * values.shape[-1]
    mean = (values * mask).sum(dim=(1, 2), keepdim=True) / count
    squares = ((values - mean).square() * mask).sum(dim=(1, 2), keepdim=True)
    return (squares / (count - 1)).sqrt()


__all__ = [
    "FlexiCodecVoiceboxModel",
    "FlexiCodecVoiceboxOutput",
    "FlexiCodecVoiceboxPreTrainedModel",
    "FlexiCodecVoiceboxSampleOutput",
]
