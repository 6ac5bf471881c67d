"""
Generation with FlexiCodec's autoregressive text-to-speech model: stock `generate`, with a duration beside each token.

A step's output scores the duration of the token just read and the token that follows; the duration goes into the input
of that next token. The hooks of the stock loop carry it: `_update_model_kwargs_for_generation` picks it and
`prepare_inputs_for_generation` feeds it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import ModelOutput

from .compatibility_flexicodec import CACHE
from .configuration_flexicodec_ar import FlexiCodecARConfig


# The reference's defaults; `generate` reads them where a generation config does not say.
DURATION_DEFAULTS = {
    "duration_temperature": 1.0,
    "duration_top_k": 1,
    "min_token_text_ratio": 0.0,
    "max_token_text_ratio": 20.0,
}

# Stock processors that look at scores alone. All others may look them up by the ids of the prompt.
_PROMPT_FREE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Stands for the duration of a token that has been drawn but not yet been read by the model.
_UNKNOWN = -1


@dataclass
class FlexiCodecARGenerateOutput(GenerateDecoderOnlyOutput):
    """
    Output of [`FlexiCodecARForConditionalGeneration.generate`].

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The stream, prompt included; finished rows end with end of speech and padding.
        token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Duration in codec frames of each speech token in `sequences`, 0 elsewhere.
        scores, logits (`tuple[torch.FloatTensor]`, *optional*):
            For each step, scores of shape `(batch_size, vocab_size)`, after and before processing.
        duration_scores, duration_logits (`tuple[torch.FloatTensor]`, *optional*):
            With `output_scores` and `output_logits`. For each new token that a duration was picked for, scores of
            shape `(batch_size, num_durations)`, after and before processing. Entry `i` is of the `i`-th new token.
        attentions, hidden_states, cache (*optional*):
            As usual.
    """

    token_lengths: Tensor | None = None
    duration_scores: tuple[Tensor, ...] | None = None
    duration_logits: tuple[Tensor, ...] | None = None


@dataclass
class RowSampler:
    """Draws for each row of a batch with the row's own generator, so that no row has a say in another's speech."""

    generators: torch.Generator | list[torch.Generator]

    def draw(self, scores: Tensor) -> Tensor:
        """An index for each row `(num_rows,)`, of scores `(num_rows, num_choices)`."""
        generators = self.generators
        if not isinstance(generators, list):
            generators = [generators] * len(scores)
        if len(generators) != len(scores):
            raise ValueError(f"`generator` holds {len(generators)} generators for {len(scores)} rows.")
        # In (0, 1], so that a choice without any probability is never drawn.
        draws = [1 - torch.rand(1, generator=generator, device=generator.device).cpu() for generator in generators]
        cumulative = F.softmax(scores.float(), dim=-1).cumsum(dim=-1)
        reached = torch.cat(draws).to(scores.device)[:, None] * cumulative[:, -1:]
        return (cumulative < reached).sum(dim=-1)


class RowSamplingLogitsProcessor(LogitsProcessor):
    """Draws the next token of each row, and leaves the stock loop no other choice."""

    def __init__(self, sampler: RowSampler):
        self.sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = self.sampler.draw(scores)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


@dataclass
class DurationSampler:
    """Picks the durations in one call of `generate`, and keeps what the stock loop has no place to return."""

    row_sampler: RowSampler | None = None
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    do_sample: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def configure(self, generation_config: GenerationConfig) -> None:
        top_k = generation_config.duration_top_k
        # With one candidate there is nothing to draw, and the random numbers of the tokens stay their own.
        self.do_sample = bool(generation_config.do_sample) and top_k != 1
        if self.do_sample:
            self.processors.append(TemperatureLogitsWarper(float(generation_config.duration_temperature)))
            if top_k:
                self.processors.append(TopKLogitsWarper(top_k))

    def pick(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        scores = self.processors(None, logits)
        self.logits.append(logits)
        self.scores.append(scores)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        if self.row_sampler is not None:
            return self.row_sampler.draw(scores)
        return torch.multinomial(F.softmax(scores, dim=-1), num_samples=1)[:, 0]


class PromptVocabularyLogitsProcessor(LogitsProcessor):
    """
    Lets a processor see scores for all ids of the stream.

    The model scores the ids that it can generate, the lowest; processors such as the repetition penalty look scores up
    by the ids of the prompt, text and control among them.
    """

    def __init__(self, processor: LogitsProcessor, input_vocab_size: int):
        self.processor = processor
        self.input_vocab_size = input_vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        padded = F.pad(scores, (0, self.input_vocab_size - width), value=-torch.inf)
        return self.processor(input_ids, padded)[:, :width]


class MinSpeechLogitsProcessor(LogitsProcessor):
    """Forbids end of speech until a row has its minimum of new tokens."""

    def __init__(self, min_new_tokens: Tensor, prompt_length: int, end_token_id: int):
        self.min_new_tokens = min_new_tokens
        self.prompt_length = prompt_length
        self.end_token_id = end_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        too_early = input_ids.shape[1] - self.prompt_length < self.min_new_tokens.to(scores.device)
        is_end = torch.arange(scores.shape[-1], device=scores.device) == self.end_token_id
        return scores.masked_fill(too_early[:, None] & is_end, -torch.inf)


class MaxSpeechCriteria(StoppingCriteria):
    """Stops a row at its maximum of new tokens."""

    def __init__(self, max_new_tokens: Tensor, prompt_length: int):
        self.max_new_tokens = max_new_tokens
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - self.prompt_length >= self.max_new_tokens.to(input_ids.device)


class FlexiCodecARGenerationMixin(GenerationMixin):
    # Beam search and assisted decoding reorder or withdraw tokens, whose durations would not follow.
    _supported_generation_modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

    @staticmethod
    def default_generation_config(config: FlexiCodecARConfig) -> GenerationConfig:
        """The reference's way to sample; saved with the model as `generation_config.json`."""
        return GenerationConfig(
            bos_token_id=config.start_token_id,
            eos_token_id=config.end_token_id,
            pad_token_id=config.pad_token_id,
            do_sample=True,
            temperature=1.0,
            top_k=25,
            **DURATION_DEFAULTS,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> FlexiCodecARGenerateOutput | Tensor:
        """
        Generate speech tokens, and the duration of each, after a prompt laid out by
        [`~FlexiCodecARForConditionalGeneration.build_inputs`]. Everything in [`~GenerationMixin.generate`] applies but
        beam search and assisted decoding.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                The prompt's ids, also accepted as `input_ids`; rows are padded on the left.
            token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Durations of the prompt's speech tokens in codec frames, 0 elsewhere; required if there are any.
            duration_temperature (`float`, *optional*, defaults to 1.0):
                Temperature of the durations.
            duration_top_k (`int`, *optional*, defaults to 1):
                How many durations to draw from; 1 takes the likeliest, 0 means all. Without `do_sample` always the
                likeliest.
            min_token_text_ratio, max_token_text_ratio (`float`, *optional*, default to 0 and 20):
                Limits on the new tokens of a row as a ratio of its text ids (rounded down). `max_new_tokens` and
                `min_new_tokens` apply too; the stricter one wins.
            compile_config (`CompileConfig`, *optional*):
                Compiles the step, on a CPU too; goes with `cache_implementation="static"`.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of what sampling draws, instead of torch's global one: one for all rows, drawn from in turn, or
                one for each, and then a row is the same in any batch. `scores` then show nothing but the drawn token.

        Returns:
            [`FlexiCodecARGenerateOutput`] with `return_dict_in_generate=True`, else its `sequences`. A prompt answered
            by end of speech at once gives no new speech token, and is no error.

        Raises:
            ValueError: The prompt holds speech without `token_lengths`, or the generation mode is not supported.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if kwargs.get("token_lengths") is None and input_ids is not None:
            if (input_ids < self.config.speech_vocab_size).any():
                raise ValueError(
                    "The prompt holds speech tokens but token_lengths is missing: pass their durations, as "
                    "`build_inputs` returns them."
                )
            kwargs["token_lengths"] = torch.zeros_like(input_ids)
        sampler = DurationSampler(None if generator is None else RowSampler(generator))
        output = super().generate(inputs, generation_config, duration_sampler=sampler, **kwargs)
        if not isinstance(output, ModelOutput):
            return output
        return self._add_durations(output, sampler)

    def _add_durations(
        self, output: GenerateDecoderOnlyOutput, sampler: DurationSampler
    ) -> FlexiCodecARGenerateOutput:
        sequences = output.sequences
        length = sequences.shape[1]
        is_speech = sequences < self.config.speech_vocab_size
        token_lengths = sampler.model_kwargs["token_lengths"][:, :length].to(sequences.device)
        # The loop can stop (at a limit, say) with a token that the model has not read: read it for its duration.
        unread = is_speech & (token_lengths == _UNKNOWN)
        if unread.any():
            model_kwargs = sampler.model_kwargs
            step = 1 if model_kwargs["use_cache"] else None
            model_inputs = self.prepare_inputs_for_generation(sequences, next_sequence_length=step, **model_kwargs)
            durations = sampler.pick(self(**model_inputs).duration_logits[:, -1])
            token_lengths = torch.where(unread, durations[:, None].to(sequences.device), token_lengths)
            cache = getattr(output, CACHE)
            if cache is not None and not cache.is_compileable:
                cache.crop(-1)
        return FlexiCodecARGenerateOutput(
            **output,
            token_lengths=token_lengths.masked_fill(~is_speech, 0),
            duration_scores=tuple(sampler.scores) if output.scores is not None else None,
            duration_logits=tuple(sampler.logits) if output.logits is not None else None,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        token_lengths: Tensor | None = None,
        duration_sampler: DurationSampler | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        length = model_inputs["input_ids"].shape[1]
        key_length = length
        if (cache := model_inputs.get(CACHE)) is not None:
            key_length, _ = cache.get_mask_sizes(length, 0)
        if token_lengths is not None:
            # With a cache, also the duration of the token before. A compiled step needs strides that do not grow.
            kept = token_lengths[:, -length - 1 :].to(self.device)
            model_inputs["token_lengths"] = kept.clone(memory_format=torch.contiguous_format)
        model_inputs["encode_text"] = bool(is_first_iteration) or not model_inputs.get("use_cache", True)
        model_inputs["relative_keys"] = self.model.decoder.relative_keys(key_length)
        return model_inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        sampler = model_kwargs["duration_sampler"]
        token_lengths = model_kwargs["token_lengths"]
        # The prompt brings its durations; every later token comes here with its own unknown.
        if len(sampler.model_kwargs):
            durations = sampler.pick(outputs.duration_logits[:, -1]).to(token_lengths)
            token_lengths = torch.cat([token_lengths[:, :-1], durations[:, None]], dim=1)
        model_kwargs["token_lengths"] = F.pad(token_lengths, (0, 1), value=_UNKNOWN)
        sampler.model_kwargs = model_kwargs
        return model_kwargs

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        # A generation config that is not the model's own need not know these names.
        given = {name: kwargs.pop(name) for name in DURATION_DEFAULTS if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, default in DURATION_DEFAULTS.items():
            value = given.get(name, getattr(generation_config, name, None))
            setattr(generation_config, name, default if value is None else value)
        if generation_config.min_token_text_ratio > generation_config.max_token_text_ratio:
            raise ValueError(
                f"min_token_text_ratio={generation_config.min_token_text_ratio} is above "
                f"max_token_text_ratio={generation_config.max_token_text_ratio}."
            )
        model_kwargs["duration_sampler"].configure(generation_config)
        return generation_config, model_kwargs

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, has_default_max_length: bool, **kwargs: Any
    ) -> GenerationConfig:
        input_ids = kwargs["inputs_tensor"]
        text_lengths = (input_ids >= self.config.text_token_offset).sum(dim=1)
        text_lengths = text_lengths.repeat_interleave(generation_config.num_return_sequences)
        # A row without text has no limit of this kind.
        no_limit = torch.iinfo(torch.long).max
        longest = (
            (text_lengths * generation_config.max_token_text_ratio).long().masked_fill(text_lengths == 0, no_limit)
        )
        generation_config._speech_limits = {
            "min": (text_lengths * generation_config.min_token_text_ratio).long(),
            "max": longest,
            "prompt_length": kwargs["input_ids_length"],
        }
        if has_default_max_length and generation_config.max_new_tokens is None and (text_lengths > 0).all():
            generation_config.max_new_tokens = int(longest.max())
        return super()._prepare_generated_length(
            generation_config=generation_config, has_default_max_length=has_default_max_length, **kwargs
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        # Room for the last token too: it is read for its duration.
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length + 1
        )

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        # By itself the stock loop compiles on accelerators alone. Who passes a configuration wants it on a CPU too.
        if generation_config.compile_config is not None:
            generation_config.compile_config._compile_all_devices = True
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        limits = generation_config._speech_limits
        if (limits["min"] > 0).any():
            processors.append(
                MinSpeechLogitsProcessor(limits["min"], limits["prompt_length"], self.config.end_token_id)
            )
        for processor in super()._get_logits_processor(generation_config=generation_config, **kwargs):
            if not isinstance(processor, _PROMPT_FREE):
                processor = PromptVocabularyLogitsProcessor(processor, self.config.input_vocab_size)
            processors.append(processor)
        row_sampler = kwargs["model_kwargs"]["duration_sampler"].row_sampler
        if generation_config.do_sample and row_sampler is not None:
            processors.append(RowSamplingLogitsProcessor(row_sampler))
        return processors

    def _get_stopping_criteria(self, generation_config: GenerationConfig, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config=generation_config, **kwargs)
        limits = generation_config._speech_limits
        criteria.append(MaxSpeechCriteria(limits["max"], limits["prompt_length"]))
        return criteria


__all__ = ["FlexiCodecARGenerateOutput", "FlexiCodecARGenerationMixin"]
