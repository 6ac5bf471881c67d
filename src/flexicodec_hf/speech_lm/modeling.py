"""A second head on any causal language model, for the durations of FlexiCodec's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..generation_flexicodec_ar import DurationSampler
from .vocabulary import IGNORE_INDEX, FlexiCodecSpeechVocabulary


@dataclass
class SpeechLMOutput(CausalLMOutputWithPast):
    """
    Output of a language model with a head for durations.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            The loss of the tokens, and that of the durations when `duration_labels` is given.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the token that follows each position.
        duration_logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, max_frames_per_token)`):
            Scores of the duration of the token at each position: entry `i` is for `i + 1` frames.
        past_key_values, hidden_states, attentions (*optional*):
            As usual.
    """

    duration_logits: Tensor | None = None


@dataclass
class SpeechLMGenerateOutput(GenerateDecoderOnlyOutput):
    """
    Output of `generate` of a language model with a head for durations.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Prompt and continuation.
        token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Durations in frames where `sequences` are codes, 0 elsewhere, and 0 for a code at the very end that the model
            did not go on from (`vocabulary.repair` leaves it out).
        scores, logits, attentions, hidden_states, past_key_values (*optional*):
            As usual.
    """

    token_lengths: Tensor | None = None


class DurationLMMixin:
    """
    Durations beside the tokens of a causal language model, for `layout="parallel"`; [`duration_lm_class`] mixes it into
    a class of transformers. As in FlexiCodec's own autoregressive model, the output at a code scores its duration and
    the token that follows it, and the duration goes into the input of that next token.
    """

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        speech = getattr(config, "flexicodec_speech", None)
        if speech is None:
            raise ValueError(
                "The configuration lacks `flexicodec_speech`, which tells where the codes are: make it with "
                "`duration_lm_class(config, vocabulary)`."
            )
        super().__init__(config, *args, **kwargs)
        hidden_size = config.get_text_config().hidden_size
        self.duration_embedding = nn.Embedding(speech["max_frames_per_token"] + 1, hidden_size)
        self.duration_head = nn.Linear(hidden_size, speech["max_frames_per_token"])
        self.post_init()

    def is_code(self, input_ids: Tensor) -> Tensor:
        """Mask of the ids that are semantic codes."""
        speech = self.config.flexicodec_speech
        first = speech["first_code_id"]
        return (input_ids >= first) & (input_ids < first + speech["codebook_size"])

    def forward(
        self,
        input_ids: Tensor,
        token_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        duration_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SpeechLMOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Streams of the vocabulary.
            token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)` or longer by one, *optional*):
                Their channel of durations, with that of the token before the first in front, if there is one.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                `input_ids` to learn, -100 elsewhere. They are shifted inside.
            duration_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Durations to learn, -100 elsewhere. They are not shifted.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                What the sum of the losses is divided by: `Trainer` passes the number of labels in all of its
                accumulation steps. By default the number of labels here.
            kwargs: For the language model.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if token_lengths is not None:
            length = input_ids.shape[1]
            before = F.pad(token_lengths, (1, 0))[:, token_lengths.shape[1] - length : -1]
            embeds = embeds + self.duration_embedding(before[:, -length:])
        kwargs["output_hidden_states"], wanted = True, kwargs.get("output_hidden_states")
        kwargs["return_dict"] = True
        output = super().forward(inputs_embeds=embeds, **kwargs)
        duration_logits = self.duration_head(output.hidden_states[-1][:, -output.logits.shape[1] :])

        loss = None
        if labels is not None:
            losses = _cross_entropy_sum(output.logits[:, :-1], labels[:, 1:])
            if duration_labels is not None:
                classes = torch.where(duration_labels > 0, duration_labels - 1, IGNORE_INDEX)
                losses = losses + _cross_entropy_sum(duration_logits, classes)
            if num_items_in_batch is None:
                num_items_in_batch = (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
            loss = losses / num_items_in_batch
        return SpeechLMOutput(
            loss=loss,
            logits=output.logits,
            duration_logits=duration_logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states if wanted else None,
            attentions=output.attentions,
        )
