"""
Configuration of the flow-matching stage: semantic tokens and a voice prompt in, mel spectrogram
out.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils.type_validators import activation_fn_key, interval, positive_int_field

from .compatibility_flexicodec import CheckedConfigMixin


@strict
class FlexiCodecVoiceboxConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`FlexiCodecVoiceboxModel`]. The defaults are the released model's.

    Args:
        codebook_size (`int`, *optional*, defaults to 32768):
            Number of semantic codes of the codec whose tokens are the condition.
        num_mel_bins (`int`, *optional*, defaults to 128):
            Channels of the mel spectrogram.
        upsample_factor (`int`, *optional*, defaults to 4):
            Mel frames per codec frame (50 Hz over 12.5 Hz).
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the transformer. The MLPs around it (mel, condition, time, output) are four
            times as wide inside.
        intermediate_size (`int`, *optional*, defaults to 4096):
            Width inside the SwiGLU of a block.
        num_hidden_layers (`int`, *optional*, defaults to 16):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of attention heads.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the SwiGLU.
        max_position_embeddings (`int`, *optional*, defaults to 4096):
            Longest sequence of the training, in mel frames. Longer ones are computed all the same.
        rope_parameters (`dict`, *optional*):
            Rotary embedding parameters; base 10000 without any.
        rms_norm_eps (`float`, *optional*, defaults to 1e-06):
            Epsilon of the adaptive RMS norms.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights in training.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of fresh weights.
        sigma_min (`float`, *optional*, defaults to 1e-05):
            Noise left at the end of the flow, x_1 = x + sigma_min * z.
        unconditional_probability (`float`, *optional*, defaults to 0.2):
            Share of the training items that see neither condition nor prompt.
        max_prompt_fraction (`float`, *optional*, defaults to 0.4):
            Longest prompt in training, as a fraction of the item.
        repa_layer_index (`int`, *optional*, defaults to 6):
            Block, counted from 0, whose output is aligned with semantic features in training (REPA,
            arXiv 2410.06940). `None` leaves the projection out of the model.
        repa_hidden_size (`int`, *optional*, defaults to 2048):
            Width inside that projection.
        semantic_hidden_size (`int`, *optional*, defaults to 512):
            Width of the semantic features that it is compared with.
        repa_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the alignment loss.
        latent_mean, latent_std (`list[float]`, *optional*):
            Mean and standard deviation of each channel of the codec's decoder latent, for a model
            that predicts this latent instead of a mel spectrogram: `num_mel_bins` is then the
            codec's `hidden_size` and `upsample_factor` 1, so that the flow runs at 12.5 Hz and the
            codec's own decoder takes the place of a vocoder.
    """

    model_type = "flexicodec_voicebox"

    codebook_size: int = positive_int_field(default=32768)
    num_mel_bins: int = positive_int_field(default=128)
    upsample_factor: int = positive_int_field(default=4)
    hidden_size: int = positive_int_field(default=1024)
    intermediate_size: int = positive_int_field(default=4096)
    num_hidden_layers: int = interval(min=1, max=1000)(default=16)
    num_attention_heads: int = positive_int_field(default=16)
    hidden_act: str = activation_fn_key(default="silu")
    max_position_embeddings: int = positive_int_field(default=4096)
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = interval(min=0.0)(default=1e-6)
    attention_dropout: float = interval(min=0.0, max=1.0)(default=0.0)
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    sigma_min: float = interval(min=0.0, max=1.0)(default=1e-5)
    unconditional_probability: float = interval(min=0.0, max=1.0)(default=0.2)
    max_prompt_fraction: float = interval(min=0.0, max=1.0)(default=0.4)
    repa_layer_index: int | None = 6
    repa_hidden_size: int = positive_int_field(default=2048)
    semantic_hidden_size: int = positive_int_field(default=512)
    repa_loss_weight: float = interval(min=0.0)(default=1.0)
    latent_mean: list[float] | None = None
    latent_std: list[float] | None = None

    def validate_architecture(self) -> None:
        """Part of the `@strict` validation: sizes that must fit each other."""
        if self.hidden_size % (2 * self.num_attention_heads) != 0:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of twice `num_attention_heads` "
                f"({self.num_attention_heads}): every head rotates pairs of channels."
            )
        if self.repa_layer_index is not None and not 0 <= self.repa_layer_index < self.num_hidden_layers:
            raise ValueError(
                f"`repa_layer_index` is {self.repa_layer_index}, but the model has {self.num_hidden_layers} blocks, "
                "counted from 0. Set it to None for a model without the alignment projection."
            )

        statistics = (self.latent_mean, self.latent_std)
        if statistics != (None, None):
            sizes = [None if values is None else len(values) for values in statistics]
            if sizes != [self.num_mel_bins] * 2:
                raise ValueError(
                    f"`latent_mean` and `latent_std` must both have `num_mel_bins` ({self.num_mel_bins}) values, or "
                    f"both be None for a model of mel spectrograms, got {sizes[0]} and {sizes[1]}."
                )
            if min(self.latent_std or ()) <= 0:
                raise ValueError(f"`latent_std` must be positive, but its minimum is {min(self.latent_std or ())}.")

    @property
    def predicts_latent(self) -> bool:
        """Whether the model predicts the codec's decoder latent and not a mel spectrogram."""
        return self.latent_mean is not None

    # What the Llama attention and MLP of transformers also ask for, fixed in this architecture.
    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def attention_bias(self) -> bool:
        return False

    @property
    def mlp_bias(self) -> bool:
        return False


__all__ = ["FlexiCodecVoiceboxConfig"]
