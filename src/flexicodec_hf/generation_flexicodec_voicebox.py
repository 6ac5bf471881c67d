"""
Sampling of the Voicebox: classifier-free guidance and the integration of the flow from noise to a
mel spectrogram.

From top to bottom: the mixin with `sample`, what it computes once for all steps of a flow, and the
checks of arguments that `forward` shares.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput

from .compatibility_flexicodec import is_number
from .modeling_flexicodec import frame_to_token


# Codec frames by which codes and mel of one clip can differ: the codec drops up to two frames at
# the end of a clip, and the last frame of the mel may be incomplete.
MAX_MISALIGNMENT = 3


@dataclass
class FlexiCodecVoiceboxSampleOutput(ModelOutput):
    """
    Output of [`FlexiCodecVoiceboxModel.sample`].

    Args:
        mel (`torch.FloatTensor` of shape `(batch_size, num_frames, num_mel_bins)`):
            Normalized log mel spectrogram of the target (or the codec's decoder latent, for
            `codec.decode`), in float32, 0 in the padding.
        mel_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`):
            True for frames, False for padding.
    """

    mel: Tensor | None = None
    mel_mask: Tensor | None = None


class FlexiCodecVoiceboxGenerationMixin:
    """`sample` for [`FlexiCodecVoiceboxModel`]."""

    # Attributes of the model that this class is mixed into.
    config: Any
    device: torch.device

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
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        time_grid: str = "uniform",
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
                Codec frames that each code covers, 0 for padding (its code is not read). One each
                by default.
            prompt_codes (`torch.LongTensor` of shape `(batch_size, num_prompt_tokens)`, *optional*):
                Semantic codes of the prompt. Without a prompt the model invents a voice.
            prompt_token_lengths (`torch.LongTensor` of shape `(batch_size, num_prompt_tokens)`, *optional*):
                Codec frames that each of them covers. One each by default.
            prompt_mel (`torch.FloatTensor` of shape `(batch_size, num_prompt_frames, num_mel_bins)`, *optional*):
                Normalized mel of the prompt, required with `prompt_codes`. Mel and codes are cut to
                the same frames. They may differ by the few frames at the end of a clip that the
                codec drops.
            prompt_mel_mask (`torch.BoolTensor` of shape `(batch_size, num_prompt_frames)`, *optional*):
                True for frames of `prompt_mel`, False for padding on the right.
            num_inference_steps (`int`, *optional*, defaults to 15):
                Steps of the flow.
            guidance_scale (`float`, *optional*, defaults to 2.0):
                Weight g of classifier-free guidance, v = v_cond + g (v_cond - v_uncond). 0 turns it
                off and halves the cost.
            guidance_rescale (`float`, *optional*, defaults to 0.75):
                How far the guided velocity is brought back to the standard deviation of the
                conditional one, 0 to 1 (arXiv 2305.08891).
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
                Times of the flow with guidance, from 0 (noise) to 1 (mel). A step outside costs
                half (arXiv 2404.07724).
            time_grid (`str`, *optional*, defaults to `"uniform"`):
                Where the steps lie. `"uniform"`: all of one length, as in the reference. `"sway"`:
                short at the start, where speech takes shape (sway sampling, arXiv 2410.06885,
                with s = -1). `"epss"`: 5, 6, 7, 10, 12 or 16 of 32 such steps, with the late ones
                joined (EPSS, arXiv 2505.19931).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise, see [`~FlexiCodecVoiceboxModel.draw_noise`].
            noise (`torch.FloatTensor` of shape `(batch_size, num_frames, num_mel_bins)`, *optional*):
                The noise itself, with `config.upsample_factor` frames for each codec frame of the
                longest item.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(model, step, timestep, {"mel": mel})`. It may
                return a dictionary with another `mel` to continue with.

        Returns:
            [`FlexiCodecVoiceboxSampleOutput`]: The mel spectrogram and its mask.

        Raises:
            ValueError: Tensors that do not match each other, codes out of range, half a prompt,
                nothing to speak.
        """
        # 1. Codes and prompt for each mel frame
        token_lengths = check_codes(
            "audio_codes", audio_codes, "token_lengths", token_lengths, len(audio_codes), self.config.codebook_size
        )
        token_lengths = token_lengths * self.config.upsample_factor
        frames = token_lengths.sum(dim=1)
        if (frames == 0).any():
            raise ValueError(
                f"Every item needs at least one frame to speak, but its mel frames are {frames.tolist()}: "
                "pass `token_lengths` with one frame or more."
            )
        codes, mask = codes_of_frames(audio_codes, token_lengths, int(frames.max()))
        prompt = self._align_prompt(prompt_codes, prompt_token_lengths, prompt_mel, prompt_mel_mask, len(codes))

        # 2. Noise and time grid
        if noise is None:
            noise = self.draw_noise(frames.tolist(), generator)
        if noise.shape != (*codes.shape, self.config.num_mel_bins):
            raise ValueError(
                f"`noise` has shape {tuple(noise.shape)}, expected {(*codes.shape, self.config.num_mel_bins)}."
            )
        for name, number in (("guidance_scale", guidance_scale), ("guidance_rescale", guidance_rescale)):
            if not is_number(number):
                raise ValueError(f"`{name}` must be a finite number, got {number!r}.")
        times = _time_grid(time_grid, num_inference_steps, self.device)
        with_guidance = _guided_steps(times, guidance_interval)

        # 3. The flow, in float32 whatever the model computes in: steps are small compared to values
        mel = noise.to(self.device, torch.float32)
        velocity = _GuidedVelocity(self, codes, mask, prompt, guidance_scale, guidance_rescale)
        for step, (start, end) in enumerate(itertools.pairwise(times)):
            # Euler steps with the velocity at the middle of their time, as in the reference:
            # flexicodec 0.1.2, nar_tts/voicebox_models.py, lines 309 to 333.
            timestep = (start + end) / 2
            mel = mel + (end - start) * velocity(mel, timestep, with_guidance[step])
            if callback_on_step_end is not None:
                mel = (callback_on_step_end(self, step, timestep, {"mel": mel}) or {}).get("mel", mel)
        return FlexiCodecVoiceboxSampleOutput(mel=self._denormalize(mel) * mask[..., None], mel_mask=mask)

    def draw_noise(self, num_frames: list[int], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """
        Noise for `sample`, on the CPU.

        Args:
            num_frames (`list[int]`): Mel frames of each item.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator for each item: then an item's noise is the same in any batch. A single
                one, or PyTorch's global one by default: then it depends on the item's place in the
                batch, but not on the other lengths. It never depends on the device of the model.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, max(num_frames), num_mel_bins)`, 0 in the
            padding.
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
        token_lengths = check_codes(
            "prompt_codes", codes, "prompt_token_lengths", token_lengths, batch_size, self.config.codebook_size
        )
        mask = check_mel("prompt_mel", mel, mel_mask, "prompt_mel_mask", num_bins, batch_size)
        check_alignment("prompt_codes", token_lengths, "`prompt_mel`", mask, self.config.upsample_factor)

        token_lengths = token_lengths * self.config.upsample_factor
        frames = torch.minimum(token_lengths.sum(dim=1), mask.sum(dim=1))
        width = int(frames.max())
        codes, _ = codes_of_frames(codes, token_lengths, width)
        source = torch.arange(width, device=codes.device) - (width - frames[:, None])
        mask, source = source >= 0, source.clamp(min=0)
        mel = self._normalize(mel).gather(1, source[..., None].expand(-1, -1, num_bins))
        return _Prompt(codes.gather(1, source), mask, mel)

    def _normalize(self, latent: Tensor) -> Tensor:
        # CODEPATH: the released model predicts a mel spectrogram, the one of checkpoints/ the
        # codec's latent.
        if not self.config.predicts_latent:
            return latent
        latent = latent.float()
        return (latent - latent.new_tensor(self.config.latent_mean)) / latent.new_tensor(self.config.latent_std)

    def _denormalize(self, latent: Tensor) -> Tensor:
        # CODEPATH: the released model predicts a mel spectrogram, the one of checkpoints/ the
        # codec's latent.
        if not self.config.predicts_latent:
            return latent
        return latent * latent.new_tensor(self.config.latent_std) + latent.new_tensor(self.config.latent_mean)


# Of 32 steps, the ends of those that EPSS keeps, by the number of its steps (arXiv 2505.19931, as in
# F5-TTS 1.1).
_EPSS_GRIDS = {
    5: (0, 2, 4, 8, 16, 32),
    6: (0, 2, 4, 6, 8, 16, 32),
    7: (0, 2, 4, 6, 8, 16, 24, 32),
    10: (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    12: (0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    16: (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32),
}


def _time_grid(name: str, num_steps: int, device: torch.device) -> Tensor:
    """
    Times `(num_steps + 1,)` from 0 (noise) to 1 (mel) between which the steps of the flow lie.
    """
    if name not in ("uniform", "sway", "epss"):
        raise ValueError(f"`time_grid` must be 'uniform', 'sway' or 'epss', got {name!r}.")
    if not is_number(num_steps, whole=True) or num_steps < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, and a whole number, got {num_steps!r}.")
    if name == "epss" and num_steps not in _EPSS_GRIDS:
        raise ValueError(
            f"`time_grid='epss'` has {list(_EPSS_GRIDS)} steps, got `num_inference_steps`={num_steps}: pass one of "
            "these, or another grid."
        )
    times = torch.arange(num_steps + 1, device=device) / num_steps
    if name == "epss":
        times = torch.tensor(_EPSS_GRIDS[num_steps], device=device) / 32
    return times if name == "uniform" else 1 - torch.cos(times * (math.pi / 2))


def _guided_steps(times: Tensor, interval: tuple[float, float]) -> list[bool]:
    """Which steps between `times` have their middle in the interval."""
    is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_number, interval))
    if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"`guidance_interval` must be two times, 0 <= first <= last <= 1, got {interval!r}.")
    middles = (times[:-1] + times[1:]) / 2
    return ((middles >= interval[0]) & (middles <= interval[1])).tolist()


class _Prompt(NamedTuple):
    """Prompts padded on the left, with what belongs to each of their mel frames."""

    codes: Tensor  # (batch_size, num_prompt_frames)
    mask: Tensor  # (batch_size, num_prompt_frames)
    mel: Tensor  # (batch_size, num_prompt_frames, num_mel_bins)


class _GuidedVelocity:
    """
    The velocity with classifier-free guidance, for all steps of one flow.

    The conditional rows are prompt and target, the unconditional ones only the target, with
    positions that start there (flexicodec 0.1.2, nar_tts/voicebox_models.py, lines 318 to 329).
    What depends neither on the mel nor on the time is computed once, here. Prompts are padded on
    the left, so all targets begin in the same column.
    """

    def __init__(
        self,
        model: Any,
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
        self.conditional = self._prepare(condition, full_mask)
        if guidance_scale == 0:
            return
        # Without a condition, the MLP sees zeros.
        blank = model.condition_mlp(condition.new_zeros(1, 1, condition.shape[-1])).expand(*mask.shape, -1)
        if model.device.type == "cpu" and num_prompt:
            # A CPU is bound by arithmetic: there, prompt columns of mere padding cost more than a
            # second pass.
            self.guided = [self.conditional, self._prepare(blank, mask)]
        else:
            blank, mask = F.pad(blank, (0, 0, num_prompt, 0)), F.pad(mask, (num_prompt, 0))
            self.guided = [self._prepare(torch.cat([condition, blank]), torch.cat([full_mask, mask]))]

    def _prepare(self, condition: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        attention_mask = create_bidirectional_mask(
            config=self.model.config, inputs_embeds=condition, attention_mask=mask
        )
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return condition, attention_mask, self.model.rotary_emb(condition, positions)

    def __call__(self, mel: Tensor, timestep: Tensor, with_guidance: bool) -> Tensor:
        """
        The velocity, of the shape of `mel` `(batch_size, num_frames, num_mel_bins)`, at a time of
        shape `()`.
        """
        with_guidance = with_guidance and self.scale != 0
        time_embedding = self.model.time_embedding(timestep[None])
        mel_hidden = self.model.mel_mlp(mel.to(self.model.dtype))
        passes = self.guided if with_guidance else [self.conditional]
        velocities = torch.cat([self._run(mel_hidden, time_embedding, *one) for one in passes]).float()
        if not with_guidance:
            return velocities
        conditional, unconditional = velocities.chunk(2)
        guided = conditional + self.scale * (conditional - unconditional)
        # Of each item on its own: the reference takes the deviations over the batch with its
        # padding.
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


def _masked_std(values: Tensor, mask: Tensor) -> Tensor:
    """
    Unbiased standard deviation of each item over its own frames and all channels, shape
    `(batch_size, 1, 1)`.
    """
    mask = mask[..., None]
    count = mask.sum(dim=1, keepdim=True) * values.shape[-1]
    mean = (values * mask).sum(dim=(1, 2), keepdim=True) / count
    squares = ((values - mean).square() * mask).sum(dim=(1, 2), keepdim=True)
    return (squares / (count - 1)).sqrt()


def codes_of_frames(codes: Tensor, token_lengths: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """
    Codes for each mel frame.

    Args:
        codes: Codes of shape `(batch_size, num_tokens)`.
        token_lengths: Mel frames that each code covers, of the same shape.
        num_frames: Mel frames of the result.

    Returns:
        The code of each frame, 0 without one, and whether it has one, both `(batch_size,
        num_frames)`.
    """
    mask = torch.arange(num_frames, device=codes.device) < token_lengths.sum(dim=1, keepdim=True)
    return codes.gather(1, frame_to_token(token_lengths, num_frames)) * mask, mask


def check_mel(
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


def check_codes(
    name: str, codes: Tensor, lengths_name: str, token_lengths: Tensor | None, batch_size: int, codebook_size: int
) -> Tensor:
    """The token lengths, one frame each by default, after a check of both tensors."""
    if codes.ndim != 2 or codes.shape[0] != batch_size or codes.shape[1] == 0:
        raise ValueError(
            f"`{name}` has shape {tuple(codes.shape)}, expected ({batch_size}, num_tokens) with at least one token. "
            "Of codes with several codebooks pass the semantic one, `audio_codes[:, 0]`."
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
                f"`{name}` must lie between 0 and {codebook_size - 1}, but range from {spoken.min()} to "
                f"{spoken.max()}."
            )
    return token_lengths


def check_alignment(
    codes_name: str, token_lengths: Tensor, mel_name: str, mel_mask: Tensor, upsample_factor: int
) -> None:
    """Check that codes and mel are of one clip, by their lengths."""
    if torch.compiler.is_compiling():
        return
    tolerance = MAX_MISALIGNMENT * upsample_factor
    code_frames = (token_lengths.sum(dim=1) * upsample_factor).tolist()
    for item, (of_codes, of_mel) in enumerate(zip(code_frames, mel_mask.sum(dim=1).tolist(), strict=True)):
        if abs(of_codes - of_mel) > tolerance:
            raise ValueError(
                f"`{codes_name}` of item {item} cover {of_codes} mel frames, but {mel_name} has {of_mel} (up to "
                f"{tolerance} may differ): pass both of the same clip, and the token lengths of the codes."
            )


__all__ = ["FlexiCodecVoiceboxGenerationMixin", "FlexiCodecVoiceboxSampleOutput"]
