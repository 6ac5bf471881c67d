"""A second head on any causal language model, for the durations of FlexiCodec's tokens."""

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
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from ..compatibility_flexicodec import CACHE, takes_cache
from ..generation_flexicodec_ar import DurationSampler
from .vocabulary import IGNORE_INDEX, FlexiCodecSpeechVocabulary


# Stands for the duration of a token that has been drawn but not yet been read by the model.
_UNKNOWN = -1


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
        cache, hidden_states, attentions (*optional*):
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
        scores, logits, attentions, hidden_states, cache (*optional*):
            As usual.
    """

    token_lengths: Tensor | None = None


class DurationLMMixin(GenerationMixin):
    """
    Durations beside the tokens of a causal language model, for `layout="parallel"`; [`duration_lm_class`] mixes it into
    a class of transformers. As in FlexiCodec's own autoregressive model, the output at a code scores its duration and
    the token that follows it, and the duration goes into the input of that next token.
    """

    # Beam search and assisted decoding reorder or withdraw tokens, whose durations would not follow.
    _supported_generation_modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

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
            token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)` or longer by one, *optional*):
                Their channel of durations, with that of the token before the first in front, if there is one.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                `input_ids` to learn, -100 elsewhere. They are shifted inside.
            duration_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Durations to learn, -100 elsewhere. They are not shifted.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                What the sum of the losses is divided by: `Trainer` passes the number of labels in all of its
                accumulation steps. By default the number of labels here.
            attention_mask, position_ids, cache, use_cache, logits_to_keep, kwargs: For the language model.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if token_lengths is not None:
            # Each position's input has the duration of the token before it.
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
            # By the same count as the tokens, so that the sum of the two is of a token with its duration.
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

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        token_lengths: Tensor | None = None,
        duration_temperature: float = 1.0,
        duration_top_k: int = 1,
        **kwargs: Any,
    ) -> SpeechLMGenerateOutput | Tensor:
        """
        Generate tokens, and a duration for each code among them. Everything in [`~GenerationMixin.generate`] applies but
        beam search and assisted decoding.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Prompts, padded on the left; also accepted as `input_ids`.
            token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Their durations, as the vocabulary gives them; required if they hold codes.
            duration_temperature (`float`, *optional*, defaults to 1.0):
                Temperature of the durations, where they are drawn.
            duration_top_k (`int`, *optional*, defaults to 1):
                How many durations to draw from: 1 takes the likeliest, 0 means all.

        Returns:
            [`SpeechLMGenerateOutput`] with `return_dict_in_generate=True`, else its `sequences`.

        Raises:
            ValueError: The prompt holds codes without durations, or the generation mode is not supported.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if token_lengths is None and input_ids is not None:
            if self.is_code(input_ids).any():
                raise ValueError(
                    "The prompt holds codes but `token_lengths` is missing: pass the channel of its stream."
                )
            token_lengths = torch.zeros_like(input_ids)
        sampler = DurationSampler(do_sample=duration_top_k != 1)
        if sampler.do_sample:
            sampler.processors.append(TemperatureLogitsWarper(float(duration_temperature)))
            if duration_top_k:
                sampler.processors.append(TopKLogitsWarper(duration_top_k))
        output = super().generate(
            inputs, generation_config, token_lengths=token_lengths, duration_sampler=sampler, **kwargs
        )
        if not isinstance(output, ModelOutput):
            return output
        lengths = sampler.model_kwargs["token_lengths"].to(output.sequences.device)
        # The last token has been drawn, but not read for its duration.
        lengths = lengths.clamp(min=0).masked_fill(~self.is_code(output.sequences), 0)
        return SpeechLMGenerateOutput(**output, token_lengths=lengths)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        token_lengths: Tensor | None = None,
        duration_sampler: DurationSampler | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if token_lengths is not None:
            token_lengths = token_lengths.to(input_ids.device).masked_fill(~self.is_code(input_ids), 0)
            model_inputs["token_lengths"] = token_lengths[:, -model_inputs["input_ids"].shape[1] - 1 :].contiguous()
        return model_inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        sampler, token_lengths = model_kwargs["duration_sampler"], model_kwargs["token_lengths"]
        # The prompt brings its durations; every later token comes here with its own unknown.
        if sampler.model_kwargs:
            durations = sampler.pick(outputs.duration_logits[:, -1]).to(token_lengths) + 1
            token_lengths = torch.cat([token_lengths[:, :-1], durations[:, None]], dim=1)
        model_kwargs["token_lengths"] = F.pad(token_lengths, (0, 1), value=_UNKNOWN)
        sampler.model_kwargs = model_kwargs
        return model_kwargs


def duration_lm_class(
    config: PreTrainedConfig, vocabulary: FlexiCodecSpeechVocabulary | None = None
) -> type[PreTrainedModel]:
    """
    The class of causal language model that a configuration belongs to, with [`DurationLMMixin`].

    Args:
        config (`PreTrainedConfig`):
            Of any causal language model.
        vocabulary (`FlexiCodecSpeechVocabulary`, *optional*):
            Of `layout="parallel"`. It is written into `config`, once; a saved model's configuration has it.

    Returns:
        A subclass of transformers' class, to construct with `config` or to load with `from_pretrained`.

    Raises:
        ValueError: The layout has no channel of durations, or the configuration is not that of a causal language model.

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
                f"`layout` must be 'parallel', got {vocabulary.layout!r}: in the others durations are ids, and any "
                "language model does without a head for them."
            )
        config.flexicodec_speech = {
            "first_code_id": vocabulary.first_code_id,
            "codebook_size": vocabulary.codebook_size,
            "max_frames_per_token": vocabulary.max_frames_per_token,
        }
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"`config` must be that of a causal language model, got a {type(config).__name__}.")
    return _with_durations(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


@lru_cache
def _with_durations(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(f"{model_class.__name__}WithDurations", (DurationLMMixin, model_class), {})


__all__ = ["DurationLMMixin", "SpeechLMGenerateOutput", "SpeechLMOutput", "duration_lm_class"]
