"""Configuration of the autoregressive text-to-speech model of FlexiCodec (arXiv 2510.00981)."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils.type_validators import interval

from .compatibility_flexicodec import CheckedConfigMixin


@strict
class FlexiCodecARTextEncoderConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    The text encoder of [`FlexiCodecARModel`]: a causal transformer with relative positions.

    Args:
        vocab_size (`int`, *optional*, defaults to 51866):
            Number of text ids (Whisper's multilingual tokenizer, padded to the released embedding).
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the text encoder.
        intermediate_size (`int`, *optional*, defaults to 3584):
            Width of its feed-forward networks.
        num_hidden_layers (`int`, *optional*, defaults to 4):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of attention heads.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the feed-forward networks.
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Dropout on embeddings, relative positions, attention outputs and in the feed-forward
            networks.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on attention weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norms.
    """

    model_type = "flexicodec_ar_text_encoder"
    base_config_key = "text_encoder_config"

    vocab_size: int = 51866
    hidden_size: int = 1024
    intermediate_size: int = 3584
    num_hidden_layers: int = interval(min=1, max=1000)(default=4)
    num_attention_heads: int = 8
    hidden_act: str = "silu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        _check_heads(self)


@strict
class FlexiCodecARConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`FlexiCodecARForConditionalGeneration`]. The defaults are the released model's
    sizes.

    Prompt and output are one stream of ids, `[start] [threshold] [text ...] [task] [speech ...] [end]`.
    All ids share one vocabulary. Speech comes first, so the ids that the model generates, speech and
    its end, are those below `vocab_size`:

    | ids | meaning |
    | --- | --- |
    | `0 ... speech_vocab_size - 1` | semantic codes of the codec |
    | `end_token_id` = `speech_vocab_size` | end of speech |
    | `start_token_id`, `task_token_id`, `padding_token_id` | the next three |
    | `no_threshold_token_id` | fills the threshold's slot if no threshold is given |
    | `threshold_token_id(merging_threshold)` | one id for each of `merging_thresholds` |
    | `text_token_offset ... input_vocab_size - 1` | text ids, shifted by `text_token_offset` |

    Args:
        text_encoder_config (`dict` or [`FlexiCodecARTextEncoderConfig`], *optional*):
            The text encoder.
        speech_vocab_size (`int`, *optional*, defaults to 32768):
            Number of semantic codes.
        num_durations (`int`, *optional*, defaults to 10):
            Number of duration classes: a token lasts `0 ... num_durations - 1` codec frames.
        merging_thresholds (`list[float]`, *optional*, defaults to `(0.86, 0.91)`):
            The codec's merging thresholds that the model was trained with.
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the language model.
        intermediate_size (`int`, *optional*, defaults to 5376):
            Width of its feed-forward networks.
        num_hidden_layers (`int`, *optional*, defaults to 16):
            Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of attention heads.
        hidden_act (`str`, *optional*, defaults to `"relu"`):
            Activation of the feed-forward networks.
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Dropout on embeddings, relative positions, attention outputs and in the feed-forward
            networks.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on attention weights.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norms.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Label smoothing of the token loss.
        focal_alpha (`float`, *optional*, defaults to 1.0):
            Weight of the focal duration loss.
        focal_gamma (`float`, *optional*, defaults to 2.0):
            Exponent of the focal duration loss (arXiv 1708.02002).
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*):
            For programs that expect them, such as `Trainer`, which sets them to a tokenizer's. They
            default to `start_token_id`, `end_token_id` and `padding_token_id`, which the model
            itself uses, whatever these are set to.

    Example:

    ```python
    >>> from flexicodec_hf import FlexiCodecARConfig, FlexiCodecARForConditionalGeneration

    >>> model = FlexiCodecARForConditionalGeneration(FlexiCodecARConfig())
    ```
    """

    model_type = "flexicodec_ar"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    sub_configs = {"text_encoder_config": FlexiCodecARTextEncoderConfig}

    text_encoder_config: Any = None
    speech_vocab_size: int = 32768
    num_durations: int = 10
    merging_thresholds: list[float] | tuple[float, ...] = (0.86, 0.91)
    hidden_size: int = 1024
    intermediate_size: int = 5376
    num_hidden_layers: int = interval(min=1, max=1000)(default=16)
    num_attention_heads: int = 8
    hidden_act: str = "relu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    label_smoothing: float | int = 0.0
    focal_alpha: float | int = 1.0
    focal_gamma: float | int = 2.0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        if self.text_encoder_config is None:
            self.text_encoder_config = FlexiCodecARTextEncoderConfig()
        elif isinstance(self.text_encoder_config, dict):
            self.text_encoder_config = FlexiCodecARTextEncoderConfig(**self.text_encoder_config)
        elif not isinstance(self.text_encoder_config, FlexiCodecARTextEncoderConfig):
            raise ValueError(f"`text_encoder_config` must be a dictionary, got {self.text_encoder_config!r}.")
        self.merging_thresholds = list(self.merging_thresholds)
        self.bos_token_id = self.start_token_id if self.bos_token_id is None else self.bos_token_id
        self.eos_token_id = self.end_token_id if self.eos_token_id is None else self.eos_token_id
        self.pad_token_id = self.padding_token_id if self.pad_token_id is None else self.pad_token_id
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        _check_heads(self)

    # ******** FlexiCodec specific ********
    def validate_token_ids(self) -> None:
        """Does nothing: the stock check warns of ids that are never generated, as start and padding are here."""

    # *************************************

    @property
    def vocab_size(self) -> int:
        """Number of ids that can be generated: the semantic codes and end of speech."""
        return self.speech_vocab_size + 1

    @property
    def end_token_id(self) -> int:
        return self.speech_vocab_size

    @property
    def start_token_id(self) -> int:
        return self.speech_vocab_size + 1

    @property
    def task_token_id(self) -> int:
        return self.speech_vocab_size + 2

    @property
    def padding_token_id(self) -> int:
        return self.speech_vocab_size + 3

    @property
    def no_threshold_token_id(self) -> int:
        return self.speech_vocab_size + 4

    @property
    def text_token_offset(self) -> int:
        """The id of text id 0."""
        return self.speech_vocab_size + 5 + len(self.merging_thresholds)

    @property
    def input_vocab_size(self) -> int:
        """Number of ids that a prompt can hold: speech, control and text."""
        return self.text_token_offset + self.text_encoder_config.vocab_size

    def threshold_token_id(self, merging_threshold: float | None) -> int:
        """
        The id that tells the model the codec's merging threshold.

        Args:
            merging_threshold (`float`, *optional*):
                One of `merging_thresholds`; `None` for no threshold.

        Raises:
            ValueError: The model was not trained with this threshold.
        """
        if merging_threshold is None:
            return self.no_threshold_token_id
        for index, trained in enumerate(self.merging_thresholds):
            if math.isclose(merging_threshold, trained, abs_tol=1e-6):
                return self.no_threshold_token_id + 1 + index
        raise ValueError(
            f"`merging_threshold` is {merging_threshold}, but the model was trained with "
            f"{list(self.merging_thresholds)}: choose one of these, or None for no conditioning."
        )


def _check_heads(config: FlexiCodecARConfig | FlexiCodecARTextEncoderConfig) -> None:
    if config.hidden_size % config.num_attention_heads or config.hidden_size % 2:
        raise ValueError(
            f"`hidden_size` is {config.hidden_size}, but must be even and a multiple of "
            f"`num_attention_heads`, which is {config.num_attention_heads}."
        )


__all__ = ["FlexiCodecARConfig", "FlexiCodecARTextEncoderConfig"]
