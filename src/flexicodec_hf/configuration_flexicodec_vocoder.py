"""Configuration of the Vocos vocoder: mel spectrogram in, 24 kHz waveform out."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.type_validators import activation_fn_key, interval, positive_int_field

from .compatibility_flexicodec import CheckedConfigMixin


@strict
class FlexiCodecVocoderConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`FlexiCodecVocoderModel`]. The defaults are the released model's.

    Args:
        num_mel_bins (`int`, *optional*, defaults to 128):
            Channels of the mel spectrogram.
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the backbone.
        intermediate_size (`int`, *optional*, defaults to 4096):
            Width inside a ConvNeXt block.
        num_hidden_layers (`int`, *optional*, defaults to 30):
            Number of ConvNeXt blocks.
        kernel_size (`int`, *optional*, defaults to 7):
            Kernel of every convolution, odd, in frames.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation inside a ConvNeXt block.
        layer_norm_eps (`float`, *optional*, defaults to 1e-06):
            Epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of fresh weights.
        n_fft (`int`, *optional*, defaults to 1920):
            Size of the inverse Fourier transform and of its Hann window, in samples.
        hop_length (`int`, *optional*, defaults to 480):
            Samples per mel frame.
        max_magnitude (`float`, *optional*, defaults to 100.0):
            Upper limit of the predicted spectral magnitude.
        sampling_rate (`int`, *optional*, defaults to 24000):
            Rate of the waveform, in Hz.
    """

    model_type = "flexicodec_vocoder"

    num_mel_bins: int = positive_int_field(default=128)
    hidden_size: int = positive_int_field(default=1024)
    intermediate_size: int = positive_int_field(default=4096)
    num_hidden_layers: int = interval(min=1, max=1000)(default=30)
    kernel_size: int = positive_int_field(default=7)
    hidden_act: str = activation_fn_key(default="gelu")
    layer_norm_eps: float = interval(min=0.0)(default=1e-6)
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    n_fft: int = positive_int_field(default=1920)
    hop_length: int = positive_int_field(default=480)
    max_magnitude: float = interval(min=0.0)(default=100.0)
    sampling_rate: int = positive_int_field(default=24_000)

    def validate_architecture(self) -> None:
        """Part of the `@strict` validation: sizes that must fit each other."""
        if self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd to keep the number of frames, but is {self.kernel_size}.")
        if self.hop_length > self.n_fft or (self.n_fft - self.hop_length) % 2 != 0 or self.n_fft % 2 != 0:
            raise ValueError(
                f"`n_fft` ({self.n_fft}) must be even and exceed `hop_length` ({self.hop_length}) by an even number "
                "of samples: half of the difference is cut from either end of the waveform."
            )

    @property
    def frame_rate(self) -> float:
        """Mel frames per second."""
        return self.sampling_rate / self.hop_length

    @property
    def context_frames(self) -> int:
        """Mel frames on either side that a sample of the waveform depends on."""
        convolutions = (self.num_hidden_layers + 1) * (self.kernel_size // 2)
        # Half of the analysis window beyond the own frame, in whole frames.
        overlap = -(-(self.n_fft - self.hop_length) // (2 * self.hop_length))
        return convolutions + overlap


__all__ = ["FlexiCodecVocoderConfig"]
