"""Configuration of the FlexiCodec codec."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils.type_validators import interval

from .compatibility_flexicodec import CheckedConfigMixin, check_entries


_size = interval(min=1, max=1 << 20)
_SEMANTIC_RANGES = {
    "num_hidden_layers": (1, 1000),
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "fsmn_kernel_size"), (1, 1 << 20)),
    **dict.fromkeys(("num_mel_bins", "num_stacked_frames", "max_position_embeddings"), (1, 1 << 20)),
    **dict.fromkeys(("layer_norm_eps", "hidden_dropout", "attention_dropout"), (0, 1)),
}


@strict
class FlexiCodecConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`FlexiCodecModel`]. The defaults are the sizes of the released 12.5 Hz codec
    `jiaqili3/flexicodec` ([arXiv 2510.00981](https://huggingface.co/papers/2510.00981)).

    Args:
        sampling_rate (`int`, *optional*, defaults to 16000):
            Sampling rate of input and output waveforms, in hertz.
        semantic_model_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the frozen semantic encoder, a `fun_asr_nano_encoder` (the encoder of
            SenseVoice-small). Defaults to its 50 blocks without the timestamp-prediction blocks, which the
            codec does not use.
        num_semantic_queries (`int`, *optional*, defaults to 16):
            Size of the table of learned query vectors that SenseVoice puts before the features.
        semantic_query_ids (`list[int]`, *optional*, defaults to `(0, 1, 2, 15)`):
            The queries that go before the features, in this order: language "auto", event, emotion, text
            norm "woitn" (flexicodec 0.1.2, customized_sensevoice/model.py).
        semantic_downsampling_factor (`float`, *optional*, defaults to 1.33333):
            Semantic frames (60 ms) per codec frame (80 ms). The released codec uses this rounded value, and
            the number of frames depends on it.
        hidden_size (`int`, *optional*, defaults to 512):
            Channels of the acoustic frames and of the latents.
        encoder_hidden_size (`int`, *optional*, defaults to 32):
            Channels after the first convolution of the acoustic encoder; they double with each block.
        downsampling_ratios (`list[int]`, *optional*, defaults to `(4, 4, 5, 8, 2)`):
            Strides of the blocks of the acoustic encoder. Their product is the hop length.
        decoder_hidden_size (`int`, *optional*, defaults to 1536):
            Channels after the first convolution of the acoustic decoder; they halve with each block.
        upsampling_ratios (`list[int]`, *optional*, defaults to `(2, 8, 5, 4, 4)`):
            Strides of the blocks of the acoustic decoder.
        merging_threshold (`float`, *optional*, defaults to 0.91):
            Cosine similarity above which neighboring frames share a token, if a call does not pass another one.
        merging_threshold_range (`list[float]`, *optional*, defaults to `(0.8, 1.0)`):
            Range from which a threshold is drawn for each training batch.
        max_frames_per_token (`int`, *optional*, defaults to 8):
            Most frames that a token covers.
        aggregator_hidden_size (`int`, *optional*, defaults to 512):
            Width of the transformer that merges semantic frames. The one that merges acoustic frames is
            `hidden_size` wide (flexicodec 0.1.2, modeling_flexicodec.py, `acoustic_aggregator`).
        aggregator_intermediate_size (`int`, *optional*, defaults to 2048):
            Width of the feed-forward layers of both aggregators.
        num_aggregator_layers (`int`, *optional*, defaults to 6):
            Layers of each aggregator.
        num_aggregator_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of each aggregator.
        convnext_hidden_size (`int`, *optional*, defaults to 768):
            Width of the ConvNeXt layers before and after the semantic quantizer.
        convnext_intermediate_size (`int`, *optional*, defaults to 2048):
            Width inside the ConvNeXt layers.
        num_convnext_layers (`int`, *optional*, defaults to 4):
            ConvNeXt layers before, and again after, the semantic quantizer.
        semantic_quantization_levels (`list[int]`, *optional*, defaults to `(8, 8, 8, 8, 8)`):
            Levels of the finite scalar quantizer; their product is the size of the semantic vocabulary.
        num_quantizers (`int`, *optional*, defaults to 25):
            Number of codebooks: the semantic one and the residual acoustic ones.
        codebook_size (`int`, *optional*, defaults to 4096):
            Entries of each acoustic codebook.
        codebook_dim (`int`, *optional*, defaults to 8):
            Dimension of the entries of the acoustic codebooks.
        quantizer_dropout (`float`, *optional*, defaults to 1.0):
            Share of the items of a training batch that keep a random number of acoustic quantizers instead of all.
        quantizer_bypass_rate (`float`, *optional*, defaults to 0.125):
            Probability that a training batch is decoded from its semantic tokens alone.
        bottleneck_hidden_size (`int`, *optional*, defaults to 512):
            Width of the transformer that runs over the repeated latents before the acoustic decoder.
        bottleneck_intermediate_size (`int`, *optional*, defaults to 2048):
            Width of the feed-forward layers of that transformer.
        num_bottleneck_layers (`int`, *optional*, defaults to 32):
            Layers of that transformer.
        num_bottleneck_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of that transformer.
        rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of the rotary positions of all these transformers.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norms of all these transformers.
        layer_scale_initial_scale (`float`, *optional*, defaults to 0.01):
            Initial value of the per-channel layer scales of all these transformers.
        commitment_loss_weight (`float`, *optional*, defaults to 0.25):
            Weight of the commitment loss in the training loss.
        codebook_loss_weight (`float`, *optional*, defaults to 1.0):
            Weight of the codebook loss in the training loss.
        distillation_loss_weight (`float`, *optional*, defaults to 15.0):
            Weight of the distance between decoded semantic latents and merged semantic frames.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of freshly initialized weights.

    Example:

    ```python
    >>> from flexicodec_hf import FlexiCodecConfig, FlexiCodecModel

    >>> config = FlexiCodecConfig()
    >>> config.frame_rate, config.hop_length, config.semantic_codebook_size
    (12.5, 1280, 32768)
    >>> model = FlexiCodecModel(config)  # random weights
    ```
    """

    model_type = "flexicodec"
    sub_configs = {"semantic_model_config": AutoConfig}

    sampling_rate: int = 16_000
    semantic_model_config: Any = None
    num_semantic_queries: int = 16
    semantic_query_ids: list[int] | tuple[int, ...] = (0, 1, 2, 15)
    semantic_downsampling_factor: float = 1.33333
    hidden_size: int = _size(default=512)
    encoder_hidden_size: int = _size(default=32)
    downsampling_ratios: list[int] | tuple[int, ...] = (4, 4, 5, 8, 2)
    decoder_hidden_size: int = _size(default=1536)
    upsampling_ratios: list[int] | tuple[int, ...] = (2, 8, 5, 4, 4)
    merging_threshold: float = 0.91
    merging_threshold_range: list[float] | tuple[float, ...] = (0.8, 1.0)
    max_frames_per_token: int = 8
    aggregator_hidden_size: int = _size(default=512)
    aggregator_intermediate_size: int = _size(default=2048)
    num_aggregator_layers: int = interval(min=1, max=1000)(default=6)
    num_aggregator_attention_heads: int = _size(default=8)
    convnext_hidden_size: int = _size(default=768)
    convnext_intermediate_size: int = _size(default=2048)
    num_convnext_layers: int = interval(min=1, max=1000)(default=4)
    semantic_quantization_levels: list[int] | tuple[int, ...] = (8, 8, 8, 8, 8)
    num_quantizers: int = 25
    codebook_size: int = _size(default=4096)
    codebook_dim: int = _size(default=8)
    quantizer_dropout: float = 1.0
    quantizer_bypass_rate: float = 0.125
    bottleneck_hidden_size: int = _size(default=512)
    bottleneck_intermediate_size: int = _size(default=2048)
    num_bottleneck_layers: int = interval(min=1, max=1000)(default=32)
    num_bottleneck_attention_heads: int = _size(default=8)
    rope_theta: float = 10_000.0
    layer_norm_eps: float = 1e-5
    layer_scale_initial_scale: float = 0.01
    commitment_loss_weight: float = 0.25
    codebook_loss_weight: float = 1.0
    distillation_loss_weight: float = 15.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if "encoder_rates" in kwargs:  # of `FlexiCodecConfig` in the authors' training code
            raise ValueError(
                "This is a checkpoint of the authors' training code, whose configuration has the same model type and "
                "other names. Convert it: `flexicodec-hf convert --codec DIR/model.safetensors --codec-config "
                "DIR/config.json --output-dir OTHER_DIR`."
            )
        semantic = self.semantic_model_config
        if not isinstance(semantic, PreTrainedConfig):
            defaults = {
                "model_type": "fun_asr_nano_encoder",
                "num_hidden_layers": 50,
                "num_timestamp_prediction_layers": 0,
                # Ten minutes at 60 ms per frame; the default of transformers ends after two.
                "max_position_embeddings": 10_006,
            }
            if not isinstance(semantic, dict | None):
                raise ValueError(f"`semantic_model_config` must be a dictionary, got {semantic!r}.")
            semantic = defaults | (semantic or {})
            try:
                self.semantic_model_config = CONFIG_MAPPING[semantic["model_type"]](**semantic)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"`semantic_model_config` has a wrong entry: {error!r}.") from error
        check_entries(self.semantic_model_config)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check the values together; `@strict` calls this."""
        for name, (low, high) in _SEMANTIC_RANGES.items():
            value = getattr(self.semantic_model_config, name, low)
            if not (isinstance(value, int | float) and low <= value <= high):
                raise ValueError(f"`semantic_model_config.{name}` must be from {low:g} to {high:g}, got {value!r}.")
        if math.prod(self.downsampling_ratios) != math.prod(self.upsampling_ratios):
            raise ValueError(
                f"The strides of encoder and decoder must have the same product, got `downsampling_ratios` "
                f"{self.downsampling_ratios} and `upsampling_ratios` {self.upsampling_ratios}."
            )
        for name, size, heads in (
            ("aggregator_hidden_size", self.aggregator_hidden_size, self.num_aggregator_attention_heads),
            ("hidden_size", self.hidden_size, self.num_aggregator_attention_heads),
            ("bottleneck_hidden_size", self.bottleneck_hidden_size, self.num_bottleneck_attention_heads),
        ):
            if size % (2 * heads) != 0:
                raise ValueError(f"`{name}` ({size}) must give each of its {heads} attention heads an even size.")
        if not 1 <= self.num_quantizers <= 1000:
            raise ValueError(
                f"`num_quantizers` counts the semantic quantizer and must be at least 1 and at most 1000, got "
                f"{self.num_quantizers}."
            )
        if not 1 <= self.max_frames_per_token <= 1 << 20:
            raise ValueError(
                f"`max_frames_per_token` must be at least 1 and at most {1 << 20}, got {self.max_frames_per_token}."
            )
        if (
            len(self.merging_threshold_range) != 2
            or not self.merging_threshold_range[0] <= self.merging_threshold_range[1]
        ):
            raise ValueError(
                f"`merging_threshold_range` must be a lower and an upper bound, got {self.merging_threshold_range}."
            )

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.downsampling_ratios)

    @property
    def frame_rate(self) -> float:
        """Frames per second, in hertz: the token rate when nothing is merged."""
        return self.sampling_rate / self.hop_length

    @property
    def semantic_codebook_size(self) -> int:
        """Number of semantic codes."""
        return math.prod(self.semantic_quantization_levels)

    def bits_per_token(self, num_quantizers: int) -> float:
        """Bits per token without entropy coding: its semantic code, its acoustic codes and its length."""
        acoustic = (num_quantizers - 1) * math.log2(self.codebook_size)
        return math.log2(self.semantic_codebook_size) + acoustic + math.log2(self.max_frames_per_token)


__all__ = ["FlexiCodecConfig"]
