"""
Flow matching from semantic tokens and a voice prompt to a mel spectrogram (Voicebox, arXiv 2306.15687).

From top to bottom: the layers, the model with its `forward` (one velocity, or the training loss) and `sample` (the whole
flow), what `sample` computes once for all its steps, what training draws, and the checks of arguments.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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

from .configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig
from .modeling_flexicodec import frame_to_token


# Codec frames by which codes and mel of one clip can differ: the codec drops up to two frames at the end of a clip, and
# the last frame of the mel may be incomplete.
_MAX_MISALIGNMENT = 3


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
            One minus the cosine similarity of projected hidden states and semantic features, weighted.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned with `output_hidden_states=True`):
            Input of the first block and output of each block, each `(batch_size, num_frames, hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, returned with `output_attentions=True`, eager attention only):
            Attention weights of each block, each `(batch_size, num_attention_heads, num_frames, num_frames)`.
    """

    loss: Tensor | None = None
    velocity: Tensor | None = None
    flow_loss: Tensor | None = None
    repa_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class FlexiCodecVoiceboxSampleOutput(ModelOutput):
    """
    Output of [`FlexiCodecVoiceboxModel.sample`].

    Args:
        mel (`torch.FloatTensor` of shape `(batch_size, num_frames, num_mel_bins)`):
            Normalized log mel spectrogram of the target (or the codec's decoder latent, for `codec.decode`), in
            float32, 0 in the padding.
        mel_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`):
            True for frames, False for padding.
    """

    mel: Tensor | None = None
    mel_mask: Tensor | None = None


class FlexiCodecVoiceboxMLP(nn.Module):
    """Linear, SiLU, linear: projects each input into the transformer, and its output to the velocity."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int):
        super().__init__()
        self.up_proj = nn.Linear(input_size, hidden_size)
        self.down_proj = nn.Linear(hidden_size, output_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(hidden_states)))


class FlexiCodecVoiceboxTimeEmbedding(nn.Module):
    """
    Sinusoids of the flow time, then an MLP. The time is not scaled up from [0, 1], so the slow sinusoids are almost
    constant, as in the reference: flexicodec 0.1.2, nar_tts/llama_nar.py, lines 22 to 26.
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
    """Flow time to the weight of a norm. It has its own type because it is initialized to a constant 1."""


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


class FlexiCodecVoiceboxPreTrainedModel(PreTrainedModel):
    config: FlexiCodecVoiceboxConfig
    config_class = FlexiCodecVoiceboxConfig
    base_model_prefix = "voicebox"
    main_input_name = "audio_codes"
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


class FlexiCodecVoiceboxModel(FlexiCodecVoiceboxPreTrainedModel):
    """
    Semantic tokens with their lengths, and the mel spectrogram of a voice to imitate, to a mel spectrogram.

    [`~FlexiCodecVoiceboxModel.sample`] generates speech. `forward` computes the velocity of the flow at one time, or the
    training loss. The result for an item does not depend on the other items of its batch.

    With `config.latent_mean` and `config.latent_std`, the model predicts the codec's decoder latent, and this latent
    takes the place of the mel in all arguments: `codec.encode(..., merging_threshold=1.0).latents`, transposed, as
    `codec.decode(latents=...)` takes it. `noisy_mel` and `velocity` are always in normalized channels.
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
        # CODEPATH: None in models that are trained without semantic features, an index in the released model.
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
        Velocity of the flow at (`noisy_mel`, `timesteps`), or the training loss for clean mels (`labels`).

        In training, each item draws its time, its noise, and the length of the prompt that it sees clean. Each of the
        three may be passed instead, see [`~FlexiCodecVoiceboxModel.draw_flow`]. Mel frames without a code count as
        padding; `config.upsample_factor` mel frames belong to each codec frame.

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
                Mel frames of the prompt, for training. Items with 0 are trained without a condition.
            semantic_features (`torch.FloatTensor` of shape `(batch_size, num_codec_frames, semantic_hidden_size)`, *optional*):
                Output of the codec's semantic encoder before merging: adds the alignment loss (REPA).

        Raises:
            ValueError: Neither or both of `noisy_mel` and `labels`, or tensors that do not match each other.
        """
        if (noisy_mel is None) == (labels is None):
            raise ValueError("Pass either `noisy_mel` with `timesteps` for the velocity, or `labels` for the loss.")
        mel, name = (noisy_mel, "noisy_mel") if labels is None else (labels, "labels")
        mask = _check_mel(name, mel, mel_mask, "mel_mask", self.config.num_mel_bins)
        condition = None
        if audio_codes is not None:
            token_lengths = _check_codes(
                "audio_codes", audio_codes, "token_lengths", token_lengths, len(mel), self.config.codebook_size
            )
            self._check_alignment("audio_codes", token_lengths, "the mel", mask)
            codes, has_code = self._codes_of_frames(audio_codes, token_lengths, mel.shape[1])
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
            # CODEPATH: never true in models that are trained without semantic features.
            if index == self.config.repa_layer_index:
                aligned = hidden_states
        return self.output_mlp(self.norm(hidden_states, time_embedding)), aligned

    def _repa_loss(self, hidden_states: Tensor | None, features: Tensor, mask: Tensor) -> Tensor:
        """Alignment of hidden states, averaged over each codec frame, with semantic features (arXiv 2410.06940)."""
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

    @torch.no_grad()
    def sample(
        self,
        audio_codes: Tensor,
        token_lengths: Tensor | None = None,
        prompt_codes: Tensor | None = None,
        prompt_token_lengths: Tensor | None = None,
        prompt_mel: Tensor | None = None,
        prompt_mel_mask: Tensor | None = None,
        num_inference_steps: int = 15,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.75,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
    ) -> FlexiCodecVoiceboxSampleOutput:
        """
        Speak semantic tokens with the voice of a prompt.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
                Semantic codes to speak.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Codec frames that each code covers, 0 for padding (its code is not read). One each by default.
            prompt_codes (`torch.LongTensor` of shape `(batch_size, num_prompt_tokens)`, *optional*):
                Semantic codes of the prompt. Without a prompt the model invents a voice.
            prompt_token_lengths (`torch.LongTensor` of shape `(batch_size, num_prompt_tokens)`, *optional*):
                Codec frames that each of them covers. One each by default.
            prompt_mel (`torch.FloatTensor` of shape `(batch_size, num_prompt_frames, num_mel_bins)`, *optional*):
                Normalized mel of the prompt, required with `prompt_codes`. Mel and codes are cut to the same frames.
                They may differ by the few frames at the end of a clip that the codec drops.
            prompt_mel_mask (`torch.BoolTensor` of shape `(batch_size, num_prompt_frames)`, *optional*):
                True for frames of `prompt_mel`, False for padding on the right.
            num_inference_steps (`int`, *optional*, defaults to 15):
                Steps of the flow.
            guidance_scale (`float`, *optional*, defaults to 2.0):
                Weight g of classifier-free guidance, v = v_cond + g (v_cond - v_uncond). 0 turns it off and halves the
                cost.
            guidance_rescale (`float`, *optional*, defaults to 0.75):
                How far the guided velocity is brought back to the standard deviation of the conditional one, 0 to 1
                (arXiv 2305.08891).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise, see [`~FlexiCodecVoiceboxModel.draw_noise`].
            noise (`torch.FloatTensor` of shape `(batch_size, num_frames, num_mel_bins)`, *optional*):
                The noise itself, with `config.upsample_factor` frames for each codec frame of the longest item.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(model, step, timestep, {"mel": mel})`. It may return a dictionary
                with another `mel` to continue with.

        Returns:
            [`FlexiCodecVoiceboxSampleOutput`]: The mel spectrogram and its mask.

        Raises:
            ValueError: Tensors that do not match each other, codes out of range, half a prompt, nothing to speak.
        """
        # 1. Codes and prompt for each mel frame
        token_lengths = _check_codes(
            "audio_codes", audio_codes, "token_lengths", token_lengths, len(audio_codes), self.config.codebook_size
        )
        frames = token_lengths.sum(dim=1) * self.config.upsample_factor
        if (frames == 0).any():
            raise ValueError(
                f"Every item needs at least one frame to speak, but `token_lengths` have the sums {frames.tolist()}."
            )
        codes, mask = self._codes_of_frames(audio_codes, token_lengths, int(frames.max()))
        prompt = self._align_prompt(prompt_codes, prompt_token_lengths, prompt_mel, prompt_mel_mask, len(codes))

        # 2. Noise and time grid
        if noise is None:
            noise = self.draw_noise(frames.tolist(), generator)
        if noise.shape != (*codes.shape, self.config.num_mel_bins):
            raise ValueError(
                f"`noise` has shape {tuple(noise.shape)}, expected {(*codes.shape, self.config.num_mel_bins)}."
            )
        times = _time_grid(num_inference_steps, self.device)

        # 3. The flow, in float32 whatever the model computes in: steps are small compared to values
        mel = noise.to(self.device, torch.float32)
        velocity = _GuidedVelocity(self, codes, mask, prompt, guidance_scale, guidance_rescale)
        for step, (start, end) in enumerate(itertools.pairwise(times)):
            # Euler steps with the velocity at the middle of their time, as in the reference:
            # flexicodec 0.1.2, nar_tts/voicebox_models.py, lines 309 to 333.
            timestep = (start + end) / 2
            mel = mel + (end - start) * velocity(mel, timestep)
            if callback_on_step_end is not None:
                mel = (callback_on_step_end(self, step, timestep, {"mel": mel}) or {}).get("mel", mel)
        return FlexiCodecVoiceboxSampleOutput(mel=self._denormalize(mel) * mask[..., None], mel_mask=mask)

    def draw_noise(self, num_frames: list[int], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """
        Noise for `sample`, on the CPU.

        Args:
            num_frames (`list[int]`): Mel frames of each item.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator for each item: then an item's noise is the same in any batch. A single one, or PyTorch's
                global one by default: then it depends on the item's place in the batch, but not on the other lengths.
                It never depends on the device of the model.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, max(num_frames), num_mel_bins)`, 0 in the padding.
        """
        if isinstance(generator, list):
            if len(generator) != len(num_frames):
                raise ValueError(f"`generator` holds {len(generator)} generators for {len(num_frames)} items.")
            seeds = [int(torch.randint(2**63 - 1, (), generator=one, device=one.device)) for one in generator]
        else:
            device = "cpu" if generator is None else generator.device
            seeds = torch.randint(2**63 - 1, (len(num_frames),), generator=generator, device=device).tolist()
        noise = [
            torch.randn(count, self.config.num_mel_bins, generator=torch.Generator().manual_seed(seed))
            for count, seed in zip(num_frames, seeds, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(noise, batch_first=True)

    def draw_flow(self, frames: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        """
        Draw what `forward` needs in training with a generator for each item, so that an item's draws depend neither on
        its batch nor on the process that trains it.

        Args:
            frames (`torch.LongTensor` of shape `(batch_size,)`): Mel frames of each item.
            generators (`list[torch.Generator]`): One for each item, on any device.

        Returns:
            `dict[str, torch.Tensor]`: `timesteps` and `prompt_lengths` of shape `(batch_size,)` and `noise` of shape
            `(batch_size, frames.max(), num_mel_bins)`.
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

    def _codes_of_frames(self, codes: Tensor, token_lengths: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """The code of each mel frame, 0 without one, and which frames have one, both `(batch_size, num_frames)`."""
        token_lengths = token_lengths * self.config.upsample_factor
        mask = torch.arange(num_frames, device=codes.device) < token_lengths.sum(dim=1, keepdim=True)
        return codes.gather(1, frame_to_token(token_lengths, num_frames)) * mask, mask

    def _align_prompt(
        self,
        codes: Tensor | None,
        token_lengths: Tensor | None,
        mel: Tensor | None,
        mel_mask: Tensor | None,
        batch_size: int,
    ) -> "_Prompt":
        """Codes and mel of the prompts, cut to the same frames and moved to the right."""
        num_bins = self.config.num_mel_bins
        if codes is None and mel is None:
            empty = torch.zeros(batch_size, 0, dtype=torch.long, device=self.device)
            return _Prompt(empty, empty.bool(), torch.zeros(batch_size, 0, num_bins, device=self.device))
        if codes is None or mel is None:
            given, missing = ("prompt_mel", "prompt_codes") if codes is None else ("prompt_codes", "prompt_mel")
            raise ValueError(f"`{given}` came without `{missing}`: a prompt is both the codes and the mel of a clip.")
        token_lengths = _check_codes(
            "prompt_codes", codes, "prompt_token_lengths", token_lengths, batch_size, self.config.codebook_size
        )
        mask = _check_mel("prompt_mel", mel, mel_mask, "prompt_mel_mask", num_bins, batch_size)
        self._check_alignment("prompt_codes", token_lengths, "`prompt_mel`", mask)

        frames = torch.minimum(token_lengths.sum(dim=1) * self.config.upsample_factor, mask.sum(dim=1))
        width = int(frames.max())
        codes, _ = self._codes_of_frames(codes, token_lengths, width)
        source = torch.arange(width, device=codes.device) - (width - frames[:, None])
        mask, source = source >= 0, source.clamp(min=0)
        mel = self._normalize(mel).gather(1, source[..., None].expand(-1, -1, num_bins))
        return _Prompt(codes.gather(1, source), mask, mel)

    def _check_alignment(self, codes_name: str, token_lengths: Tensor, mel_name: str, mel_mask: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        tolerance = _MAX_MISALIGNMENT * self.config.upsample_factor
        code_frames = (token_lengths.sum(dim=1) * self.config.upsample_factor).tolist()
        for item, (of_codes, of_mel) in enumerate(zip(code_frames, mel_mask.sum(dim=1).tolist(), strict=True)):
            if abs(of_codes - of_mel) > tolerance:
                raise ValueError(
                    f"`{codes_name}` of item {item} cover {of_codes} mel frames, but {mel_name} has {of_mel} (up to "
                    f"{tolerance} may differ): pass both of the same clip, and the token lengths of the codes."
                )

    def _normalize(self, latent: Tensor) -> Tensor:
        # CODEPATH: the released model predicts a mel spectrogram, the one of checkpoints/ the codec's latent.
        if not self.config.predicts_latent:
            return latent
        latent = latent.float()
        return (latent - latent.new_tensor(self.config.latent_mean)) / latent.new_tensor(self.config.latent_std)

    def _denormalize(self, latent: Tensor) -> Tensor:
        # CODEPATH: the released model predicts a mel spectrogram, the one of checkpoints/ the codec's latent.
        if not self.config.predicts_latent:
            return latent
        return latent * latent.new_tensor(self.config.latent_std) + latent.new_tensor(self.config.latent_mean)


def _time_grid(num_steps: int, device: torch.device) -> Tensor:
    """Times `(num_steps + 1,)` from 0 (noise) to 1 (mel) between which the steps of the flow lie, all of one length."""
    if num_steps < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, got {num_steps}.")
    return torch.arange(num_steps + 1, device=device) / num_steps


class _Prompt(NamedTuple):
    """Prompts padded on the left, with what belongs to each of their mel frames."""

    codes: Tensor  # (batch_size, num_prompt_frames)
    mask: Tensor  # (batch_size, num_prompt_frames)
    mel: Tensor  # (batch_size, num_prompt_frames, num_mel_bins)


class _GuidedVelocity:
    """
    The velocity with classifier-free guidance, for all steps of one flow.

    The conditional rows are prompt and target, the unconditional ones only the target, with positions that start there
    (flexicodec 0.1.2, nar_tts/voicebox_models.py, lines 318 to 329). What depends neither on the mel nor on the time is
    computed once, here. Prompts are padded on the left, so all targets begin in the same column.
    """

    def __init__(
        self,
        model: FlexiCodecVoiceboxModel,
        codes: Tensor,
        mask: Tensor,
        prompt: _Prompt,
        guidance_scale: float,
        guidance_rescale: float,
    ):
        self.model, self.mask = model, mask
        self.scale, self.rescale = guidance_scale, guidance_rescale
        num_prompt = prompt.mask.shape[1]
        condition = model.condition_mlp(model.code_embedding(torch.cat([prompt.codes, codes], dim=1)))
        condition[:, :num_prompt] += model.mel_mlp(prompt.mel.to(model.dtype))
        full_mask = torch.cat([prompt.mask, mask], dim=1)
        if guidance_scale == 0:
            self.passes = [self._prepare(condition, full_mask)]
            return
        # Without a condition, the MLP sees zeros.
        blank = model.condition_mlp(condition.new_zeros(1, 1, condition.shape[-1])).expand(*mask.shape, -1)
        if model.device.type == "cpu" and num_prompt:
            # A CPU is bound by arithmetic: there, prompt columns of mere padding cost more than a second pass.
            self.passes = [self._prepare(condition, full_mask), self._prepare(blank, mask)]
        else:
            blank, mask = F.pad(blank, (0, 0, num_prompt, 0)), F.pad(mask, (num_prompt, 0))
            self.passes = [self._prepare(torch.cat([condition, blank]), torch.cat([full_mask, mask]))]

    def _prepare(self, condition: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        attention_mask = create_bidirectional_mask(
            config=self.model.config, inputs_embeds=condition, attention_mask=mask
        )
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return condition, attention_mask, self.model.rotary_emb(condition, positions)

    def __call__(self, mel: Tensor, timestep: Tensor) -> Tensor:
        """The velocity, of the shape of `mel` `(batch_size, num_frames, num_mel_bins)`, at a time of shape `()`."""
        time_embedding = self.model.time_embedding(timestep[None])
        mel_hidden = self.model.mel_mlp(mel.to(self.model.dtype))
        velocities = torch.cat([self._run(mel_hidden, time_embedding, *one) for one in self.passes]).float()
        if self.scale == 0:
            return velocities
        conditional, unconditional = velocities.chunk(2)
        guided = conditional + self.scale * (conditional - unconditional)
        # Of each item on its own: the reference takes the deviations over the batch with its padding.
        ratio = _masked_std(conditional, self.mask) / _masked_std(guided, self.mask)
        return guided * (self.rescale * ratio + 1 - self.rescale)

    def _run(
        self,
        mel_hidden: Tensor,
        time_embedding: Tensor,
        condition: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
    ) -> Tensor:
        num_prompt = condition.shape[1] - mel_hidden.shape[1]
        mel_hidden = mel_hidden.repeat(len(condition) // len(mel_hidden), 1, 1)
        hidden_states = condition + F.pad(mel_hidden, (0, 0, num_prompt, 0))
        for layer in self.model.layers:
            hidden_states = layer(hidden_states, time_embedding, attention_mask, position_embeddings)
        return self.model.output_mlp(self.model.norm(hidden_states[:, num_prompt:], time_embedding))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all frames of the batch that `mask` selects."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _masked_std(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased standard deviation of each item over its own frames and all channels, shape `(batch_size, 1, 1)`."""
    mask = mask[..., None]
    count = mask.sum(dim=1, keepdim=True) * values.shape[-1]
    mean = (values * mask).sum(dim=(1, 2), keepdim=True) / count
    squares = ((values - mean).square() * mask).sum(dim=(1, 2), keepdim=True)
    return (squares / (count - 1)).sqrt()


def _flow_times(uniform: Tensor) -> Tensor:
    """Times of training from uniform draws: flexicodec 0.1.2, nar_tts/voicebox_models.py, lines 228 to 232."""
    return 1 - torch.cos(uniform.clamp(min=1e-5) * (math.pi / 2))


def _prompt_lengths(frames: Tensor, uniform: Tensor, config: FlexiCodecVoiceboxConfig) -> Tensor:
    """
    Prompt frames in training `(batch_size,)` from uniform draws `(2, batch_size)`: for a length and for whether there
    is a prompt at all. As in flexicodec 0.1.2, nar_tts/voicebox_models.py, lines 141 to 146, but for each item.
    """
    lowest = (frames // 4).clamp(max=5)
    span = ((frames * config.max_prompt_fraction).long() - lowest).clamp(min=1)
    return (lowest + (uniform[0] * span).long()) * (uniform[1] >= config.unconditional_probability)


def _check_mel(
    name: str, mel: Tensor, mask: Tensor | None, mask_name: str, num_mel_bins: int, batch_size: int | None = None
) -> Tensor:
    """The mask of a mel spectrogram, all True by default, after a check of both shapes."""
    if mel.ndim != 3 or mel.shape[-1] != num_mel_bins or batch_size not in (None, mel.shape[0]):
        rows = "batch_size" if batch_size is None else batch_size
        raise ValueError(f"`{name}` has shape {tuple(mel.shape)}, expected ({rows}, num_frames, {num_mel_bins}).")
    if mask is None:
        return mel.new_ones(mel.shape[:2], dtype=torch.bool)
    if mask.shape != mel.shape[:2]:
        raise ValueError(f"`{mask_name}` has shape {tuple(mask.shape)}, expected {tuple(mel.shape[:2])} as `{name}`.")
    return mask.bool()


def _check_codes(
    name: str, codes: Tensor, lengths_name: str, token_lengths: Tensor | None, batch_size: int, codebook_size: int
) -> Tensor:
    """The token lengths, one frame each by default, after a check of both tensors."""
    if codes.ndim != 2 or codes.shape[0] != batch_size or codes.shape[1] == 0:
        raise ValueError(
            f"`{name}` has shape {tuple(codes.shape)}, expected ({batch_size}, num_tokens) with at least one token. Of "
            "codes with several codebooks pass the semantic one, `audio_codes[:, 0]`."
        )
    if token_lengths is None:
        token_lengths = torch.ones_like(codes)
    if token_lengths.shape != codes.shape:
        raise ValueError(
            f"`{lengths_name}` has shape {tuple(token_lengths.shape)}, expected {tuple(codes.shape)} as `{name}`."
        )
    for tensor_name, tensor in ((name, codes), (lengths_name, token_lengths)):
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise ValueError(f"`{tensor_name}` must hold integers, but has dtype {tensor.dtype}.")
    if not torch.compiler.is_compiling():
        if (token_lengths < 0).any():
            raise ValueError(f"`{lengths_name}` must not be negative, but its minimum is {token_lengths.min()}.")
        spoken = codes[token_lengths > 0]
        if ((spoken < 0) | (spoken >= codebook_size)).any():
            raise ValueError(
                f"`{name}` must lie between 0 and {codebook_size - 1}, but range from {spoken.min()} to {spoken.max()}."
            )
    return token_lengths


def _check_features(features: Tensor, num_frames: int, config: FlexiCodecVoiceboxConfig) -> None:
    if features.ndim != 3 or features.shape[-1] != config.semantic_hidden_size:
        raise ValueError(
            f"`semantic_features` have shape {tuple(features.shape)}, expected (batch_size, num_codec_frames, "
            f"{config.semantic_hidden_size})."
        )
    if abs(features.shape[1] - num_frames) > _MAX_MISALIGNMENT:
        raise ValueError(
            f"`semantic_features` have {features.shape[1]} frames, but the mel has {num_frames} codec frames "
            f"({config.upsample_factor} mel frames each): pass features of the same clips."
        )


__all__ = [
    "FlexiCodecVoiceboxModel",
    "FlexiCodecVoiceboxOutput",
    "FlexiCodecVoiceboxPreTrainedModel",
    "FlexiCodecVoiceboxSampleOutput",
]
