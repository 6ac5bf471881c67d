"""
Mel spectrogram to waveform by predicting its Fourier transform frame by frame (Vocos, arXiv
2306.00814).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .chunking_flexicodec import Chunk, run_in_windows
from .compatibility_flexicodec import OffloadedDeviceMixin, check_options
from .configuration_flexicodec_vocoder import FlexiCodecVocoderConfig


@dataclass
class FlexiCodecVocoderOutput(ModelOutput):
    """
    Output of [`FlexiCodecVocoderModel`].

    Args:
        audio_values (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)`):
            Waveform in float32 at `config.sampling_rate`, 0 in the padding. `num_samples` is
            `config.hop_length` for each mel frame.
        padding_mask (`torch.BoolTensor` of shape `(batch_size, num_samples)`):
            True for samples, False for padding.
    """

    audio_values: Tensor | None = None
    padding_mask: Tensor | None = None


class FlexiCodecVocoderConvNeXtBlock(GradientCheckpointingLayer):
    """
    Depthwise convolution over time, then an MLP over channels, scaled per channel and added to the
    input.
    """

    def __init__(self, config: FlexiCodecVocoderConfig):
        super().__init__()
        size = config.hidden_size
        self.depthwise_conv = nn.Conv1d(size, size, config.kernel_size, padding=config.kernel_size // 2, groups=size)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, size)
        self.layer_scale = nn.Parameter(torch.empty(size))

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        update = self.norm(self.depthwise_conv(hidden_states.transpose(1, 2)).transpose(1, 2))
        update = self.down_proj(self.act_fn(self.up_proj(update)))
        # Zeros after the end of an item, so that the next convolution sees it as if it were alone.
        return (hidden_states + self.layer_scale * update) * mask


class FlexiCodecVocoderISTFTHead(nn.Module):
    """
    Log magnitude and phase of each frame, and their inverse short-time Fourier transform.

    The transform has "same" padding: every frame gives `hop_length` samples, which `torch.istft`
    cannot do. The window envelope counts only an item's own frames, and a magnitude that overflows
    has a gradient of 0 instead of NaN. In both it differs from the reference (flexicodec 0.1.2,
    nar_tts/vocoder_model.py, lines 88 to 175).
    """

    def __init__(self, config: FlexiCodecVocoderConfig):
        super().__init__()
        self.n_fft = config.n_fft
        self.hop_length = config.hop_length
        self.max_log_magnitude = math.log(config.max_magnitude)
        self.linear = nn.Linear(config.hidden_size, config.n_fft + 2)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        # In float32, since complex numbers and their transform do not exist in half precision, and
        # a phase of 8 bits is off by up to a hundredth of a turn: under autocast too.
        with maybe_autocast(hidden_states.device.type, enabled=False):
            log_magnitude, phase = self.linear(hidden_states.to(self.linear.weight.dtype)).float().chunk(2, dim=-1)
        spectrum = torch.polar(log_magnitude.clamp(max=self.max_log_magnitude).exp(), phase)
        window = torch.hann_window(self.n_fft, device=spectrum.device)
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=-1) * window
        # Between the last frame of an item and the end of the batch the envelope is 0.
        envelope = self._overlap_add(window.square() * mask).clamp(min=1e-11)
        return self._overlap_add(frames * mask) / envelope

    def _overlap_add(self, frames: Tensor) -> Tensor:
        """
        `(batch_size, num_frames, n_fft)` to `(batch_size, num_samples)`, without the overhang on
        either side.
        """
        length = (frames.shape[1] - 1) * self.hop_length + self.n_fft
        overhang = (self.n_fft - self.hop_length) // 2
        signal = F.fold(frames.transpose(1, 2), (1, length), (1, self.n_fft), stride=(1, self.hop_length))
        return signal[:, 0, 0, overhang : length - overhang]


class FlexiCodecVocoderPreTrainedModel(OffloadedDeviceMixin, PreTrainedModel):
    config: FlexiCodecVocoderConfig
    config_class = FlexiCodecVocoderConfig
    base_model_prefix = "vocoder"
    main_input_name = "mel"
    _input_embed_layer = "embed"
    # A loss that a trainer computes of the waveform is a mean over the batch: `Trainer` itself
    # averages over accumulation steps.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlexiCodecVocoderConvNeXtBlock"]
    # The phase is an angle: in bfloat16, with 8 bits, it would be off by up to a hundredth of a
    # turn. "head" alone would also match the `lm_head` of a language model beside the vocoder.
    _keep_in_fp32_modules_strict = ["head.linear"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlexiCodecVocoderConvNeXtBlock):
            init.constant_(module.layer_scale, 1 / self.config.num_hidden_layers)


class FlexiCodecVocoderModel(FlexiCodecVocoderPreTrainedModel):
    """Normalized log mel spectrogram to waveform, differentiable in the mel and the weights."""

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
        mel: Tensor,
        mel_mask: Tensor | None = None,
        chunk_length_s: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlexiCodecVocoderOutput:
        """
        Turn mel spectrograms into waveforms.

        Args:
            mel (`torch.FloatTensor` of shape `(batch_size, num_frames, num_mel_bins)`):
                Normalized log mel spectrograms, padded on the right.
            mel_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`, *optional*):
                True for frames, False for padding. The padding never changes a waveform.
            chunk_length_s (`float`, *optional*):
                Compute the waveform in chunks of that many seconds, so that memory grows only with
                the waveform. Each chunk sees its whole receptive field on either side
                (`config.context_frames`, 1.9 s in the released model), so the waveform is the same
                up to rounding.
            kwargs: What `Trainer` and other programs pass to any model. It has no effect.

        Raises:
            ValueError: Shapes that do not match, or a chunk below one frame.
        """
        check_options(self, kwargs)
        if mel.ndim != 3 or mel.shape[-1] != self.config.num_mel_bins or mel.shape[1] == 0:
            raise ValueError(
                f"`mel` has shape {tuple(mel.shape)}, expected (batch_size, num_frames, {self.config.num_mel_bins}) "
                "with at least one frame."
            )
        mask = mel.new_ones(mel.shape[:2], dtype=torch.bool) if mel_mask is None else mel_mask.bool()
        if mask.shape != mel.shape[:2]:
            raise ValueError(f"`mel_mask` has shape {tuple(mask.shape)}, expected {tuple(mel.shape[:2])} as `mel`.")
        if chunk_length_s is None:
            waveform = self._vocode(mel, mask)
        else:
            chunk_frames = int(chunk_length_s * self.config.frame_rate)
            if chunk_frames < 1:
                raise ValueError(
                    f"`chunk_length_s` is {chunk_length_s}, but a chunk needs at least one frame: pass at least "
                    f"{1 / self.config.frame_rate}."
                )
            waveform = run_in_windows(
                lambda rows, window: self._vocode(mel[rows, window], mask[rows, window]),
                mask.sum(dim=1),
                Chunk(chunk_frames, self.config.context_frames),
                hop_length=self.config.hop_length,
            )
            waveform = F.pad(waveform, (0, mel.shape[1] * self.config.hop_length - waveform.shape[1]))
        padding_mask = mask.repeat_interleave(self.config.hop_length, dim=1)
        return FlexiCodecVocoderOutput(audio_values=(waveform * padding_mask)[:, None], padding_mask=padding_mask)

    def _vocode(self, mel: Tensor, mask: Tensor) -> Tensor:
        mel = mel.to(self.embed.weight.dtype)
        factor = mask[..., None].to(mel.dtype)
        hidden_states = self.embed((mel * factor).transpose(1, 2)).transpose(1, 2)
        hidden_states = self.input_norm(hidden_states) * factor
        for layer in self.layers:
            hidden_states = layer(hidden_states, factor)
        return self.head(self.output_norm(hidden_states), factor)


__all__ = ["FlexiCodecVocoderModel", "FlexiCodecVocoderOutput", "FlexiCodecVocoderPreTrainedModel"]
