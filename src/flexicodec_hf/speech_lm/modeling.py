"""A duration head on any causal language model, for FlexiCodec's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..compatibility_flexicodec import CACHE, takes_cache
from ..generation_flexicodec_ar import DurationMixin
from .vocabulary import IGNORE_INDEX, FlexiCodecSpeechVocabulary


@dataclass
class SpeechLMOutput(CausalLMOutputWithPast):
    """
    Output of a language model with a duration head.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Loss of the tokens, plus that of the durations when `duration_labels` is given.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the token that follows each position.
        duration_logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, max_frames_per_token)`):
            Scores of the duration of the token at each position. Entry `i` stands for `i + 1`
            frames.
        cache, hidden_states, attentions (*optional*):
            Those of the language model; `cache` is `past_key_values` before transformers 5.24.
    """

    duration_logits: Tensor | None = None


class DurationLMMixin(DurationMixin):
    """
    A duration head on a causal language model, for vocabularies of `layout="parallel"`.
    [`duration_lm_class`] mixes it into a class of transformers. As in FlexiCodec's own
    autoregressive model, the output at a code scores its duration and the token that follows, and
    the duration goes into the input of that next token.

    `generate` leaves a duration of 0 at a code that ends the sequence; `vocabulary.repair` drops
    this code.
    """

    # Class 0 stands for one frame.
    duration_offset = 1

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        speech = getattr(config, "flexicodec_speech", None)
        if speech is None:
            raise ValueError(
                "The configuration lacks `flexicodec_speech`, the ids of the codes: prepare it with "
                "`duration_lm_class(config, vocabulary)`."
            )
        super().__init__(config, *args, **kwargs)
        hidden_size = config.get_text_config().hidden_size
        self.duration_embedding = nn.Embedding(speech["max_frames_per_token"] + 1, hidden_size)
        self.duration_head = nn.Linear(hidden_size, speech["max_frames_per_token"])
        self.post_init()

    def is_code(self, input_ids: Tensor) -> Tensor:
        """Mask of the ids that are semantic codes, with the shape of `input_ids`."""
        speech = self.config.flexicodec_speech
        first = speech["first_code_id"]
        return (input_ids >= first) & (input_ids < first + speech["codebook_size"])

    @takes_cache
    def forward(
        self,
        input_ids: Tensor,
        token_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        duration_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SpeechLMOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Streams of the vocabulary.
            token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Codec frames of each code, 0 elsewhere. With a cache, an extra first column holds
                the duration of the last token in the cache.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for ids, 0 for padding.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The `input_ids` to learn, -100 elsewhere. The model shifts them.
            duration_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The durations to learn, -100 elsewhere. They are not shifted.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Divisor of the summed losses. `Trainer` passes the number of labels in all its
                accumulation steps; the default is the number of labels in this batch.
            position_ids, cache, use_cache, logits_to_keep, kwargs:
                Passed on to the language model.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if token_lengths is not None:
            # The input at each position holds the duration of the token before it.
            before = F.pad(token_lengths, (1, 0))[:, token_lengths.shape[1] - input_ids.shape[1] : -1]
            embeds = embeds + self.duration_embedding(before)
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        wanted = kwargs.pop("output_hidden_states", False)
        output = super().forward(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_hidden_states=True,
            **kwargs | {"return_dict": True, CACHE: cache},
        )
        duration_logits = self.duration_head(output.hidden_states[-1][:, -output.logits.shape[1] :])

        loss = output.loss
        if labels is not None and duration_labels is not None:
            classes = torch.where(duration_labels > 0, duration_labels - 1, IGNORE_INDEX)
            losses = F.cross_entropy(duration_logits.flatten(0, 1).float(), classes.flatten(), reduction="sum")
            # Divided by the count of the tokens, so that the sum is the loss of a token with its
            # duration.
            count = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss + losses / count
        return SpeechLMOutput(
            loss=loss,
            logits=output.logits,
            duration_logits=duration_logits,
            hidden_states=output.hidden_states if wanted else None,
            attentions=output.attentions,
            **{CACHE: getattr(output, CACHE)},
        )


def duration_lm_class(
    config: PreTrainedConfig, vocabulary: FlexiCodecSpeechVocabulary | None = None
) -> type[PreTrainedModel]:
    """
    The class for a causal language model with a duration head, see [`DurationLMMixin`].

    Args:
        config (`PreTrainedConfig`):
            Configuration of any causal language model.
        vocabulary (`FlexiCodecSpeechVocabulary`, *optional*):
            A vocabulary of `layout="parallel"`. Its ids are written into `config`. The
            configuration of a saved model already holds them.

    Returns:
        `type[PreTrainedModel]`: A subclass of transformers' class for `config`, to construct with
        `config` or to load with `from_pretrained`.

    Raises:
        ValueError: The layout has no durations beside the ids, or `config` belongs to no causal
            language model.

    Example:

    ```python
    >>> config = AutoConfig.from_pretrained("Qwen/Qwen3-0.6B")
    >>> model = duration_lm_class(config, vocabulary).from_pretrained("Qwen/Qwen3-0.6B", config=config)
    >>> vocabulary.resize_embeddings(model)
    >>> model.save_pretrained("speech_lm")
    >>> model = duration_lm_class(AutoConfig.from_pretrained("speech_lm")).from_pretrained("speech_lm")
    ```
    """
    if vocabulary is not None:
        if not vocabulary.is_parallel:
            raise ValueError(
                f"`layout` must be 'parallel', got {vocabulary.layout!r}: in the other layouts durations are ids, so "
                "a plain language model is enough."
            )
        config.flexicodec_speech = {
            "first_code_id": vocabulary.first_code_id,
            "codebook_size": vocabulary.codebook_size,
            "max_frames_per_token": vocabulary.max_frames_per_token,
        }
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"`config` must belong to a causal language model, got a {type(config).__name__}.")
    return _with_durations(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


@lru_cache
def _with_durations(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(f"{model_class.__name__}WithDurations", (DurationLMMixin, model_class), {})


__all__ = ["DurationLMMixin", "SpeechLMOutput", "duration_lm_class"]
