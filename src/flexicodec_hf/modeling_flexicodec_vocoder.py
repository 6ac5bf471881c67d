"""Mel spectrogram to waveform by predicting its Fourier transform frame by frame (Vocos, arXiv 2306.00814)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_flexicodec_vocoder import FlexiCodecVocoderConfig
from .linear_flexicodec import FlexiCodecLinear


@dataclass
class FlexiCodecVocoderOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.FloatTensor` of shape `(batch_size, 1, frames * hop_length)`):
            Waveform, float32, zero in the padding.
        padding_mask (`torch.BoolTensor` of shape `(batch_size, frames * hop_length)`, *optional*, returned with a mask):
            `True` for samples, `False` for padding.
    """

    audio_values: torch.Tensor | None = None
    padding_mask: torch.Tensor | None = None


class FlexiCodecVocoderDepthwiseConv(nn.Conv1d):
    """Depthwise convolution over time of `(batch, frames, channels)`.

    It is computed as a convolution of images of one row, which knows channels-last tensors: that of sequences would
    copy its input and output, half of its time.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        image = hidden_states.transpose(1, 2).unsqueeze(2)
        padding = (0, *self.padding)
        image = F.conv2d(image, self.weight.unsqueeze(2), self.bias, padding=padding, groups=self.groups)
        return image.squeeze(2).transpose(1, 2)


class FlexiCodecVocoderConvNeXtBlock(GradientCheckpointingLayer):
    """Depthwise convolution over time, then an MLP over channels, scaled per channel and added to the input."""

    def __init__(self, config: FlexiCodecVocoderConfig):
        super().__init__()
        size = config.hidden_size
        self.depthwise_conv = FlexiCodecVocoderDepthwiseConv(
            size, size, config.kernel_size, padding=config.kernel_size // 2, groups=size
        )
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.up_proj = FlexiCodecLinear(size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = FlexiCodecLinear(config.intermediate_size, size)
        self.layer_scale = nn.Parameter(torch.empty(size))

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        update = self.norm(self.depthwise_conv(hidden_states))
        update = self.down_proj(self.act_fn(self.up_proj(update)))
        hidden_states = hidden_states + self.layer_scale * update
        # The next convolution must see zeros after an item's end, as if the item were alone.
        return hidden_states if mask is None else hidden_states * mask


class FlexiCodecVocoderISTFTHead(nn.Module):
    """Log magnitude and phase of each frame, and their inverse short-time Fourier transform.

    The transform is "same"-padded: every frame yields `hop_length` samples, which `torch.istft` cannot do. Unlike the
    same head elsewhere in transformers, each item's own frames alone count in the window envelope, and a magnitude
    that overflows has a zero gradient instead of NaN.
    """

    def __init__(self, config: FlexiCodecVocoderConfig):
        super().__init__()
        self.n_fft = config.n_fft
        self.hop_length = config.hop_length
        self.max_log_magnitude = math.log(config.max_magnitude)
        self.linear = FlexiCodecLinear(config.hidden_size, config.n_fft + 2)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        # Complex numbers and their transform exist in float32 and up alone.
        log_magnitude, phase = self.linear(hidden_states.to(self.linear.weight.dtype)).float().chunk(2, dim=-1)
        spectrum = torch.polar(log_magnitude.clamp(max=self.max_log_magnitude).exp(), phase)
        window = torch.hann_window(self.n_fft, device=spectrum.device)
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=-1) * window
        weights = window.square().expand(1, frames.shape[1], -1)
        if mask is not None:
            frames, weights = frames * mask, weights * mask
        envelope = self._overlap_add(weights)
        if mask is not None:
            envelope = envelope.clamp(min=1e-11)
        return self._overlap_add(frames) / envelope

    def _overlap_add(self, frames: torch.Tensor) -> torch.Tensor:
        """(rows, frames, n_fft) to (rows, frames * hop_length), half a window's overhang cut from either end."""
        length = (frames.shape[1] - 1) * self.hop_length + self.n_fft
        overhang = (self.n_fft - self.hop_length) // 2
        signal = F.fold(frames.transpose(1, 2), (1, length), (1, self.n_fft), stride=(1, self.hop_length))
        return signal[:, 0, 0, overhang : length - overhang]


class FlexiCodecVocoderPreTrainedModel(PreTrainedModel):
    config: FlexiCodecVocoderConfig
    config_class = FlexiCodecVocoderConfig
    base_model_prefix = "vocoder"
    main_input_name = "mel"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlexiCodecVocoderConvNeXtBlock"]
    # The phase is an angle: with the 8 bits of bfloat16 it would be off by up to a hundredth of a turn.
    # Parts of names count: "head" alone would also keep the `lm_head` of a language model beside the vocoder.
    _keep_in_fp32_modules_strict = ["head.linear"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlexiCodecVocoderConvNeXtBlock):
            init.constant_(module.layer_scale, 1 / self.config.num_hidden_layers)


class FlexiCodecVocoderModel(FlexiCodecVocoderPreTrainedModel):
    """Normalised log mel spectrogram to waveform; the waveform is differentiable in the mel and the weights."""

    def __init__(self, config: FlexiCodecVocoderConfig):
        super().__init__(config)
        self.embed = nn.Conv1d(
            config.num_mel_bins, config.hidden_size, config.kernel_size, padding=config.kernel_size // 2
        )
        self.input_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([FlexiCodecVocoderConvNeXtBlock(config) for _ in range(config.num_hidden_layers)])
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = FlexiCodecVocoderISTFTHead(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        mel: torch.Tensor,
        mel_mask: torch.Tensor | None = None,
        chunk_length_s: float | None = None,
    ) -> FlexiCodecVocoderOutput:
        """Turn mel spectrograms into waveforms.

        Args:
            mel (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
                Normalised log mel spectrograms, padded on the right.
            mel_mask (`torch.BoolTensor` of shape `(batch_size, frames)`, *optional*):
                Which frames are not padding. An item's waveform is that of the item alone.
            chunk_length_s (`float`, *optional*):
                Work through the mel in chunks of that many seconds, in memory that does not grow with its length but
                for the waveform. Each chunk carries the whole receptive field on either side
                (`config.context_frames`, 1.9 s in the released model), so the waveform is that of the whole mel but
                for the rounding of the last bits.

        Raises:
            ValueError: Shapes that do not fit, or a chunk below one frame.
        """
        if mel.ndim != 3 or mel.shape[-1] != self.config.num_mel_bins or mel.shape[1] == 0:
            raise ValueError(
                f"`mel` has shape {tuple(mel.shape)}, expected (batch_size, frames, {self.config.num_mel_bins}) with "
                "at least one frame."
            )
        if mel_mask is not None:
            if mel_mask.shape != mel.shape[:2]:
                raise ValueError(
                    f"`mel_mask` has shape {tuple(mel_mask.shape)}, expected {tuple(mel.shape[:2])} as `mel`."
                )
            mel_mask = mel_mask.bool()
        if chunk_length_s is None:
            audio_values = self._vocode(mel, mel_mask)
        else:
            chunk_frames = int(chunk_length_s * self.config.frame_rate)
            if chunk_frames < 1:
                raise ValueError(
                    f"`chunk_length_s` is {chunk_length_s}, but a chunk needs at least one frame, "
                    f"{1 / self.config.frame_rate} s."
                )
            audio_values = torch.cat(
                [self._vocode_chunk(mel, mel_mask, i, i + chunk_frames) for i in range(0, mel.shape[1], chunk_frames)],
                dim=1,
            )
        padding_mask = None
        if mel_mask is not None:
            padding_mask = mel_mask.repeat_interleave(self.config.hop_length, dim=1)
            audio_values = audio_values * padding_mask
        return FlexiCodecVocoderOutput(audio_values=audio_values[:, None], padding_mask=padding_mask)

    def _vocode_chunk(self, mel: torch.Tensor, mel_mask: torch.Tensor | None, start: int, end: int) -> torch.Tensor:
        first = max(start - self.config.context_frames, 0)
        window = slice(first, end + self.config.context_frames)
        audio_values = self._vocode(mel[:, window], None if mel_mask is None else mel_mask[:, window])
        return audio_values[:, (start - first) * self.config.hop_length : (end - first) * self.config.hop_length]

    def _vocode(self, mel: torch.Tensor, mel_mask: torch.Tensor | None) -> torch.Tensor:
        mask = None
        mel = mel.to(self.embed.weight.dtype)
        if mel_mask is not None:
            mask = mel_mask[..., None].to(mel.dtype)
            mel = mel * mask
        hidden_states = self.input_norm(self.embed(mel.transpose(1, 2)).transpose(1, 2))
        if mask is not None:
            hidden_states = hidden_states * mask
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        return self.head(self.output_norm(hidden_states), mask)


__all__ = ["FlexiCodecVocoderModel", "FlexiCodecVocoderOutput", "FlexiCodecVocoderPreTrainedModel"]
