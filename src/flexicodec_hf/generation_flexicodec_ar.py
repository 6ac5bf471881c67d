"""
Generation of speech tokens that each last a number of codec frames.

The stock `generate` of transformers writes the tokens. The output at a token scores the token's own
duration and the token that follows, and the duration goes into the input of that next token, as in
the reference (flexicodec 0.1.2, ar_tts/modeling_artts.py, lines 553 to 632). So durations travel
among the keyword arguments of the loop: one is picked after each step and fed to the next.

[`DurationMixin`] does this for every model with a duration head, [`FlexiCodecARGenerationMixin`]
adds what only the text-to-speech model needs.

These private names of transformers (5.17 to 5.24) are overridden or set. All else goes through
public arguments.

- `_supported_generation_modes`: beam search and assisted decoding reorder or withdraw tokens
  without their durations.
- `_update_model_kwargs_for_generation`: the only hook between two steps; here a duration is picked.
- `_get_logits_processor`: processors passed by `logits_processor` run before temperature and top-k,
  but a draw per row must come after them; and stock processors must see scores for the text ids of
  the prompt.
- `CompileConfig._compile_all_devices`: otherwise the loop ignores `compile_config` on a CPU.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    GenerationMixin,
    LogitNormalization,
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
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .compatibility_flexicodec import CACHE
from .configuration_flexicodec_ar import FlexiCodecARConfig
from .loop_flexicodec_ar import FlexiCodecARLoop, FlexiCodecARRequest, RowSampler


# Used where neither the call nor a generation config gives a value.
DURATION_DEFAULTS = {"duration_temperature": 1.0, "duration_top_k": 1}
# The reference's limit: flexicodec 0.1.2, ar_tts/modeling_artts.py, line 460.
LIMIT_DEFAULTS = {"min_token_text_ratio": 0.0, "max_token_text_ratio": 20.0}
LOOP_DEFAULTS = {"static_loop": False}

# Settings that need the host at each step.
_NOT_IN_LOOP = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "stop_strings",
    "max_time",
    "compile_config",
)

# Marks the duration of a token that was generated but not yet read by the model.
_UNKNOWN = -1
# Keys and their places are reserved in multiples of this length, so that few sizes occur.
_LENGTH_BLOCK = 256


@dataclass
class FlexiCodecGenerateOutput(GenerateDecoderOnlyOutput):
    """
    Output of [`DurationMixin.generate`].

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The stream, prompt included. Finished rows end with the end-of-speech id and padding.
        token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Codec frames that each speech token of `sequences` lasts, 0 elsewhere.
        scores, logits (`tuple[torch.FloatTensor]`, *optional*):
            For each step, scores of shape `(batch_size, vocab_size)`, after and before processing.
        duration_scores, duration_logits (`tuple[torch.FloatTensor]`, *optional*):
            Scores of shape `(batch_size, num_durations)`, after and before processing. Entry `i`
            belongs to the `i`-th new token; there is none for a last token that the model did not
            read.
        attentions, hidden_states, cache (*optional*):
            As in [`~generation.GenerateDecoderOnlyOutput`]; `cache` is `past_key_values` before
            transformers 5.24.
    """

    token_lengths: Tensor | None = None
    duration_scores: tuple[Tensor, ...] | None = None
    duration_logits: tuple[Tensor, ...] | None = None


class DurationStreamer(BaseStreamer):
    """A streamer that takes durations, too."""

    def put_durations(self, value: Tensor) -> None:
        """
        Called when the model has read a token, with its duration in codec frames `(batch_size,)`.
        """
        raise NotImplementedError


@dataclass
class DurationSampler:
    """
    Picks the durations in one call of `generate`.

    Args:
        prompt_length: Ids of the prompt. Their durations are given, not picked.
        do_sample: Whether durations are drawn. Otherwise the most likely one is taken.
        processors: Temperature and top-k of the durations.
        row_sampler: Draws with generators; without one, PyTorch's global generator is used.
        keeps_scores: Whether `logits` and `scores` are filled.
        streamer: Takes what is picked.
        logits, scores: What was picked from, before and after processing, one entry for each pick.
        model_kwargs: The keyword arguments of the loop after its last step, which the loop does not
            return.
    """

    prompt_length: int
    do_sample: bool
    processors: LogitsProcessorList
    row_sampler: RowSampler | None
    keeps_scores: bool = False
    streamer: DurationStreamer | None = None
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls, config: GenerationConfig, prompt_length: int, row_sampler: RowSampler | None
    ) -> "DurationSampler":
        # With one candidate there is nothing to draw, and the tokens keep their random numbers.
        do_sample = bool(config.do_sample) and config.duration_top_k != 1
        processors = LogitsProcessorList()
        if do_sample:
            processors.append(TemperatureLogitsWarper(float(config.duration_temperature)))
            if config.duration_top_k:
                processors.append(TopKLogitsWarper(config.duration_top_k))
        keeps_scores = bool(config.output_scores or config.output_logits)
        return cls(prompt_length, do_sample, processors, row_sampler, keeps_scores)

    def pick(self, logits: Tensor) -> Tensor:
        """Classes of duration `(batch_size,)` from logits `(batch_size, num_durations)`."""
        # A copy: a compiled step with CUDA graphs writes the next logits to the same place.
        logits = logits.to(torch.float32, copy=self.keeps_scores)
        scores = self.processors(None, logits)
        if self.keeps_scores:
            self.logits.append(logits)
            self.scores.append(scores)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        if self.row_sampler is not None:
            return self.row_sampler.draw(scores)
        return torch.multinomial(F.softmax(scores, dim=-1), num_samples=1)[:, 0]


class RowSamplingLogitsProcessor(LogitsProcessor):
    """Draws the next token of each row and leaves the stock loop no other choice."""

    def __init__(self, sampler: RowSampler):
        self.sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = self.sampler.draw(scores)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


class DurationMixin(GenerationMixin):
    """
    `generate` for models whose tokens last a number of codec frames.

    A model's `forward` takes `token_lengths` beside `input_ids`, possibly with one more column in
    front, and returns `duration_logits`: the output at a token scores that token's duration.
    """

    # Frames of class 0 of `duration_logits`.
    duration_offset = 0
    # Whether the model reads the last token once more for its duration. Otherwise its duration
    # stays 0.
    reads_last_token = False

    # ******** FlexiCodec specific ********
    # Beam search and assisted decoding reorder or withdraw tokens, and the durations would not
    # follow.
    _supported_generation_modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    # *************************************

    def is_code(self, input_ids: Tensor) -> Tensor:
        """Mask of the ids that have a duration, with the shape of `input_ids`."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> FlexiCodecGenerateOutput | Tensor:
        """
        Generate tokens, and a duration for each speech token among them. All arguments of
        [`~GenerationMixin.generate`] apply, except those of beam search and assisted decoding.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Ids of the prompts, padded on the left. Also accepted as `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                Settings of this call. It may hold the duration settings below, too.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the random numbers instead of PyTorch's global one: one generator for all
                rows, or one for each row. With one for each, a row does not depend on its batch.
                `scores` then show only the drawn token.
            token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Codec frames of the prompt's speech tokens, 0 elsewhere. Required if the prompt
                holds speech tokens.
            duration_temperature (`float`, *optional*, defaults to 1.0):
                Temperature of the durations.
            duration_top_k (`int`, *optional*, defaults to 1):
                How many durations to draw from: 1 takes the most likely one, 0 draws from all.
                Without `do_sample` the most likely one is always taken.

        Returns:
            [`FlexiCodecGenerateOutput`] with `return_dict_in_generate=True`, otherwise its
            `sequences`.

        Raises:
            ValueError: The prompt is missing, holds speech tokens without `token_lengths`, or the
                generation mode is not supported.
        """
        config, kwargs = self._merge_settings(generation_config, DURATION_DEFAULTS, kwargs)
        input_ids = self._prompt_ids(inputs, kwargs)
        kwargs["token_lengths"] = self._prompt_durations(input_ids, kwargs.get("token_lengths"))
        row_sampler = None if generator is None else RowSampler(generator)
        sampler = DurationSampler.from_config(config, input_ids.shape[1], row_sampler)
        if isinstance(kwargs.get("streamer"), DurationStreamer):
            sampler.streamer = kwargs["streamer"]
        output = super().generate(inputs, config, duration_sampler=sampler, **kwargs)
        return self._add_durations(output, sampler) if isinstance(output, ModelOutput) else output

    def _merge_settings(
        self, generation_config: GenerationConfig | None, defaults: dict[str, float], kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """
        All settings of a call in one generation config, and the keyword arguments that are no
        settings. The order is that of the stock loop: keyword arguments, the config of the call,
        the model's own, the defaults.
        """
        config = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        config.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        config.update(**defaults, defaults_only=True, allow_custom_entries=True)
        unset = {name for name in defaults if kwargs.get(name, 0) is None}
        return config, config.update(**{name: value for name, value in kwargs.items() if name not in unset})

    def _prompt_ids(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is None:
            raise ValueError("`inputs` is missing: pass the ids of a prompt.")
        return input_ids

    def _prompt_durations(self, input_ids: Tensor, token_lengths: Tensor | None) -> Tensor:
        if token_lengths is None and self.is_code(input_ids).any():
            raise ValueError(
                "The prompt holds speech tokens but `token_lengths` is missing: pass the codec frames of each of "
                "them, and 0 elsewhere."
            )
        return torch.zeros_like(input_ids) if token_lengths is None else token_lengths

    def _add_durations(self, output: GenerateDecoderOnlyOutput, sampler: DurationSampler) -> FlexiCodecGenerateOutput:
        is_code = self.is_code(output.sequences)
        token_lengths = sampler.model_kwargs["token_lengths"][:, : output.sequences.shape[1]].to(is_code.device)
        # At a limit the loop stops with a token that the model has not read.
        unread = is_code & (token_lengths == _UNKNOWN)
        if self.reads_last_token and unread.any():
            durations = self._read_last_token(output, sampler).to(token_lengths)
            token_lengths = torch.where(unread, durations[:, None], token_lengths)
        return FlexiCodecGenerateOutput(
            **output,
            token_lengths=token_lengths.clamp(min=0).masked_fill(~is_code, 0),
            duration_scores=tuple(sampler.scores) if output.scores is not None else None,
            duration_logits=tuple(sampler.logits) if output.logits is not None else None,
        )

    def _read_last_token(self, output: GenerateDecoderOnlyOutput, sampler: DurationSampler) -> Tensor:
        step = 1 if sampler.model_kwargs["use_cache"] else None
        model_inputs = self.prepare_inputs_for_generation(
            output.sequences, next_sequence_length=step, **sampler.model_kwargs
        )
        durations = self._pick_durations(sampler, self(**model_inputs))
        cache = getattr(output, CACHE)
        if cache is not None and not cache.is_compileable:
            cache.crop(-1)
        return durations

    def _pick_durations(self, sampler: DurationSampler, outputs: ModelOutput) -> Tensor:
        durations = sampler.pick(outputs.duration_logits[:, -1]) + self.duration_offset
        if sampler.streamer is not None:
            sampler.streamer.put_durations(durations.cpu())
        return durations

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        token_lengths: Tensor | None = None,
        duration_sampler: DurationSampler | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        # ******** FlexiCodec specific ********
        # A token's input holds the duration of the token before it: with a cache, one more column
        # is needed.
        if token_lengths is not None:
            kept = slice(-model_inputs["input_ids"].shape[1] - 1, None)
            is_code = self.is_code(input_ids[:, kept]).to(token_lengths.device)
            model_inputs["token_lengths"] = token_lengths[:, kept].masked_fill(~is_code, 0).to(self.device)
        # *************************************
        return model_inputs

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        # ******** FlexiCodec specific ********
        # The token just read gets its duration. The prompt brings its own.
        sampler, token_lengths = model_kwargs["duration_sampler"], model_kwargs["token_lengths"]
        if token_lengths.shape[1] > sampler.prompt_length:
            durations = self._pick_durations(sampler, outputs).to(token_lengths)
            token_lengths = torch.cat([token_lengths[:, :-1], durations[:, None]], dim=1)
        model_kwargs["token_lengths"] = F.pad(token_lengths, (0, 1), value=_UNKNOWN)
        sampler.model_kwargs = model_kwargs
        # *************************************
        return model_kwargs

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config=generation_config, **kwargs)
        # ******** FlexiCodec specific ********
        # The draw of a row comes after everything that shapes the scores, temperature and top-k
        # included.
        row_sampler = kwargs["model_kwargs"]["duration_sampler"].row_sampler
        if generation_config.do_sample and row_sampler is not None:
            processors.append(RowSamplingLogitsProcessor(row_sampler))
        # *************************************
        return processors


class RelativeKeys:
    """
    The relative keys of one call of `generate`, projected when the sequence outgrows them instead
    of at each step.
    """

    def __init__(self, project: Callable[[int, torch.device], Tensor], is_static: bool):
        self.project, self.is_static = project, is_static
        self.keys: Tensor | None = None

    def __call__(self, length: int, device: torch.device) -> Tensor:
        """Keys for at least `length` positions."""
        if self.keys is None or self.keys.shape[2] < length:
            self.keys = self.project(_in_blocks(length), device)
            if self.is_static:
                # They do not move either: a CUDA graph would copy what may.
                torch._dynamo.mark_static_address(self.keys)
        return self.keys


class PromptVocabularyLogitsProcessor(LogitsProcessor):
    """
    Lets a processor see scores for all ids of the stream.

    The model scores the ids that it can generate, which are the lowest. Processors such as the
    repetition penalty look up scores by the ids of the prompt, including text and control ids.
    """

    def __init__(self, processor: LogitsProcessor, input_vocab_size: int):
        self.processor = processor
        self.input_vocab_size = input_vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        padded = F.pad(scores, (0, self.input_vocab_size - width), value=-torch.inf)
        return self.processor(input_ids, padded)[:, :width]


class MinSpeechLogitsProcessor(LogitsProcessor):
    """
    Forbids the end of speech until a row has its minimum of new tokens, `min_new_tokens` of shape
    `(batch_size,)`.
    """

    def __init__(self, min_new_tokens: Tensor, prompt_length: int, end_token_id: int):
        self.min_new_tokens = min_new_tokens
        self.prompt_length = prompt_length
        self.end_token_id = end_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        too_early = input_ids.shape[1] - self.prompt_length < self.min_new_tokens.to(scores.device)
        is_end = torch.arange(scores.shape[-1], device=scores.device) == self.end_token_id
        return scores.masked_fill(too_early[:, None] & is_end, -torch.inf)


class MaxSpeechCriteria(StoppingCriteria):
    """Stops a row at its maximum of new tokens, `max_new_tokens` of shape `(batch_size,)`."""

    def __init__(self, max_new_tokens: Tensor, prompt_length: int):
        self.max_new_tokens = max_new_tokens
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - self.prompt_length >= self.max_new_tokens.to(input_ids.device)


# Processors that look only at scores.
_SCORE_WARPERS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# Processors that look at scores and the number of tokens. All others may look scores up by the ids of
# the prompt.
_PROMPT_FREE = (
    *_SCORE_WARPERS,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinSpeechLogitsProcessor,
    RowSamplingLogitsProcessor,
)


def _in_blocks(length: int) -> int:
    return _LENGTH_BLOCK * math.ceil(length / _LENGTH_BLOCK)


class FlexiCodecARGenerationMixin(DurationMixin):
    """
    [`DurationMixin`] for the text-to-speech model: limits by the length of the text, and relative
    keys.
    """

    # The reference returns one duration too few at the limit (flexicodec 0.1.2,
    # ar_tts/modeling_artts.py, line 608).
    reads_last_token = True

    @staticmethod
    def default_generation_config(config: FlexiCodecARConfig) -> GenerationConfig:
        """The reference's way to sample, saved with the model as `generation_config.json`."""
        return GenerationConfig(
            bos_token_id=config.start_token_id,
            eos_token_id=config.end_token_id,
            pad_token_id=config.padding_token_id,
            do_sample=True,
            temperature=1.0,
            top_k=25,
            **DURATION_DEFAULTS,
            **LIMIT_DEFAULTS,
        )

    def is_code(self, input_ids: Tensor) -> Tensor:
        return input_ids < self.config.speech_vocab_size

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> FlexiCodecGenerateOutput | Tensor:
        """
        Generate speech tokens, and the duration of each, after a prompt laid out by
        [`~FlexiCodecARForConditionalGeneration.build_inputs`]. Takes everything that
        [`DurationMixin.generate`] takes.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Ids of the prompts, padded on the left. Also accepted as `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                Settings of this call.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the random numbers, one for all rows or one for each.
            token_lengths (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Codec frames of the prompt's speech tokens, 0 elsewhere. Required if the prompt
                holds speech tokens.
            min_token_text_ratio, max_token_text_ratio (`float`, *optional*, default to 0 and 20):
                Limits on the new tokens of a row, as a ratio to its text ids (rounded down).
                `min_new_tokens` and `max_new_tokens` apply too; the stricter limit wins.
            static_loop (`bool`, *optional*, defaults to `False`):
                Runs the whole loop on the device, as a CUDA graph on an NVIDIA GPU: see
                [`FlexiCodecARLoop`]. Same tokens and durations (with PyTorch's global generator, other
                ones of the same distribution). A streamer gets 8 tokens at a time on a GPU. There are no
                scores, no beams, and only those processors that look at nothing but scores:
                temperature, top-k, top-p, ... Buffers and graph are kept for the next call with the
                same settings and a similar size.
            compile_config (`CompileConfig`, *optional*):
                Compiles the step, also on a CPU. Needs `cache_implementation="static"`.

        Returns:
            [`FlexiCodecGenerateOutput`] with `return_dict_in_generate=True`, otherwise its
            `sequences`. If the model ends at once, there is no new speech token; this is not an
            error.

        Raises:
            ValueError: The prompt is missing, holds speech tokens without `token_lengths`, the
                ratios contradict each other, or the generation mode is not supported.
        """
        config, kwargs = self._merge_all_settings(generation_config, kwargs)
        prompt_ids = self._prompt_ids(inputs, kwargs)
        if config.static_loop:
            return self._generate_in_loop(config, generator, **(kwargs | {"input_ids": prompt_ids}))
        prompt_length = prompt_ids.shape[1]
        num_copies = config.num_return_sequences or 1
        fewest, most = (limit.repeat_interleave(num_copies) for limit in self._limits(config, prompt_ids))
        longest = int(most.max())
        config.max_new_tokens, config.max_length = longest, None
        is_static = "static" in (config.cache_implementation or "")
        if is_static:
            # The stock loop leaves no room for the last token, which is read for its duration.
            length = _in_blocks(prompt_length + longest)
            config.max_cache_len = max(length, config.max_cache_len or 0)
        if config.compile_config is not None:
            config.compile_config = copy.copy(config.compile_config)
            config.compile_config._compile_all_devices = True
        processors = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
        if (fewest > 0).any():
            processors.insert(0, MinSpeechLogitsProcessor(fewest, prompt_length, self.config.end_token_id))
        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        criteria.append(MaxSpeechCriteria(most, prompt_length))
        return super().generate(
            inputs,
            config,
            generator,
            logits_processor=processors,
            stopping_criteria=criteria,
            key_source=RelativeKeys(self.model.decoder.relative_keys, is_static),
            **kwargs,
        )

    def make_loop(
        self, num_streams: int, max_length: int, block_size: int | None = None, **settings: Any
    ) -> FlexiCodecARLoop:
        """
        A loop that serves many requests at once, which join and leave it: see [`FlexiCodecARLoop`].

        Args:
            num_streams (`int`): Rows that can run at once.
            max_length (`int`): Ids of a prompt and its new tokens at most, rounded up to 256.
            block_size (`int`, *optional*):
                Tokens of each stream between two looks of the host. Defaults to 8, and on a CPU, where
                looking costs nothing, to 1.
            settings:
                Those of `generate` for all requests: `do_sample`, `temperature`, `top_k`,
                `max_new_tokens`, ...

        Raises:
            ValueError: A setting is unknown, or `static_loop` of `generate` does not support it.
        """
        config, unknown = self._merge_all_settings(None, settings)
        if unknown:
            raise ValueError(f"`make_loop` got unknown settings: {', '.join(sorted(unknown))}.")
        return self._make_loop(config, num_streams, max_length, block_size)

    def _merge_all_settings(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        # A generation config may hold the ids of the text's tokenizer, which mean codes here: `Trainer`
        # writes them into it.
        layout = self.default_generation_config(self.config)
        kwargs = {name: getattr(layout, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")} | kwargs
        return self._merge_settings(generation_config, DURATION_DEFAULTS | LIMIT_DEFAULTS | LOOP_DEFAULTS, kwargs)

    def _make_loop(
        self, config: GenerationConfig, num_streams: int, max_length: int, block_size: int | None = None
    ) -> FlexiCodecARLoop:
        complete, _ = self._prepare_generation_config(config)
        complete._eos_token_tensor = None  # the loop itself counts towards the minimum
        processors = GenerationMixin._get_logits_processor(
            self, generation_config=complete, input_ids_seq_length=1, device=self.device
        )
        expected = {"use_cache": (True,), "cache_implementation": (None, "static")}
        expected["eos_token_id"] = (self.config.end_token_id,)
        unsupported = [name for name in _NOT_IN_LOOP if getattr(complete, name, None)]
        unsupported += [name for name, values in expected.items() if getattr(complete, name) not in values]
        unsupported += [type(one).__name__ for one in processors if not isinstance(one, _SCORE_WARPERS)]
        mode = complete.get_generation_mode()
        unsupported += [] if mode in self._supported_generation_modes else [f"the generation mode {mode.value}"]
        if unsupported:
            raise ValueError(f"The static loop does not support {', '.join(unsupported)}: generate without it.")
        durations = DurationSampler.from_config(config, 0, None)
        duration_processors = durations.processors if durations.do_sample else None
        block_size = block_size or (1 if self.device.type == "cpu" else 8)
        return FlexiCodecARLoop(
            self, config, processors, duration_processors, num_streams, _in_blocks(max_length), block_size
        )

    def _generate_in_loop(
        self,
        config: GenerationConfig,
        generator: torch.Generator | list[torch.Generator] | None,
        input_ids: Tensor,
        token_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> FlexiCodecGenerateOutput | Tensor:
        if unsupported := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(f"The static loop does not support {', '.join(unsupported)}: generate without it.")
        durations = self._prompt_durations(input_ids, token_lengths)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        needed = _in_blocks(int((mask.sum(dim=1) + self._limits(config, input_ids)[1].to(mask.device)).max()))
        num_copies = config.num_return_sequences or 1
        input_ids, durations, mask = (one.repeat_interleave(num_copies, dim=0) for one in (input_ids, durations, mask))

        # The loop of the call before serves this one, too, if it fits. It is not shared meanwhile.
        loop = self.__dict__.pop("_kept_loop", None)
        if loop is not None and loop.fits(config, len(input_ids), needed):
            loop.refresh()
        else:
            del loop
            loop = self._make_loop(config, len(input_ids), needed)
        request = loop.add(input_ids, durations, mask, generator)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        new_ids = input_ids[:, :0].cpu()
        is_over = False
        while not is_over:
            is_over = request in loop.advance()
            num_told = new_ids.shape[1]
            new_ids, new_durations = self._loop_tokens(request)
            if streamer is not None:
                self._tell(streamer, new_ids, new_durations, num_told)
        if streamer is not None:
            streamer.end()
            if isinstance(streamer, DurationStreamer) and not all(request.has_ended):
                streamer.put_durations(new_durations[:, -1])
        self._kept_loop = loop
        sequences = torch.cat([input_ids, new_ids.to(input_ids.device)], dim=1)
        durations = torch.cat([durations, new_durations.to(durations.device)], dim=1)
        if not config.return_dict_in_generate:
            return sequences
        return FlexiCodecGenerateOutput(sequences=sequences, token_lengths=durations)

    def _loop_tokens(self, request: FlexiCodecARRequest) -> tuple[Tensor, Tensor]:
        """New ids and their durations, both `(batch_size, num_new_ids)`, as in a generated sequence."""
        ends = [[self.config.end_token_id] * has_ended for has_ended in request.has_ended]
        rows = [torch.tensor(codes + end) for codes, end in zip(request.codes, ends, strict=True)]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.config.padding_token_id)
        durations = torch.zeros_like(ids)
        for row, values in enumerate(request.token_lengths):
            durations[row, : len(values)] = torch.tensor(values, dtype=torch.long)
        return ids, durations

    @staticmethod
    def _tell(streamer: BaseStreamer, ids: Tensor, durations: Tensor, num_told: int) -> None:
        """Give a streamer the ids after the first `num_told`, and the durations before them, as a stock loop does."""
        for column in range(num_told, ids.shape[1]):
            if isinstance(streamer, DurationStreamer) and column > 0:
                streamer.put_durations(durations[:, column - 1])
            streamer.put(ids[:, column])

    def _limits(self, config: GenerationConfig, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """
        Of each row, `(batch_size,)`: the fewest new tokens by the length of its text, and the most by all
        settings.
        """
        lowest, highest = config.min_token_text_ratio, config.max_token_text_ratio
        for name, ratio in (("min_token_text_ratio", lowest), ("max_token_text_ratio", highest)):
            if not isinstance(ratio, int | float):
                raise TypeError(f"`{name}` must be a number, got {ratio!r}.")
        if lowest > highest:
            raise ValueError(
                f"`min_token_text_ratio` is {lowest}, above `max_token_text_ratio`, which is {highest}: lower it."
            )
        prompt_length, ceiling = prompt_ids.shape[1], config.max_new_tokens
        if ceiling is None and config.max_length is not None:
            ceiling = config.max_length - prompt_length
        if ceiling is not None and ceiling < 1:
            raise ValueError(
                f"There is no room for new tokens: the prompt has {prompt_length} ids, `max_length` is "
                f"{config.max_length} and `max_new_tokens` {config.max_new_tokens}. Raise one of them."
            )
        text_lengths = (prompt_ids >= self.config.text_token_offset).sum(dim=1)
        # A row without text has no limit of its own; 20 is the default of transformers.
        most = (text_lengths * highest).long().masked_fill(text_lengths == 0, 20 if ceiling is None else ceiling)
        return (text_lengths * lowest).long(), most.clamp(min=1, max=ceiling)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        token_lengths: Tensor | None = None,
        duration_sampler: DurationSampler | None = None,
        key_source: RelativeKeys | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, token_lengths, duration_sampler, is_first_iteration=is_first_iteration, **kwargs
        )
        # ******** FlexiCodec specific ********
        # The text encoder runs over the prompt only, and the relative keys serve all steps.
        model_inputs["encode_text"] = bool(is_first_iteration) or not model_inputs.get("use_cache", True)
        if key_source is not None:
            key_length = model_inputs["input_ids"].shape[1]
            if (cache := model_inputs.get(CACHE)) is not None:
                key_length, _ = cache.get_mask_sizes(key_length, 0)
            model_inputs["relative_keys"] = key_source(key_length, model_inputs["input_ids"].device)
        # *************************************
        return model_inputs

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config=generation_config, **kwargs)
        # ******** FlexiCodec specific ********
        # Stock processors look scores up by the ids of the prompt, which go beyond those that are
        # scored.
        return LogitsProcessorList(
            processor
            if isinstance(processor, _PROMPT_FREE)
            else PromptVocabularyLogitsProcessor(processor, self.config.input_vocab_size)
            for processor in processors
        )
        # *************************************


__all__ = ["DurationMixin", "FlexiCodecARGenerationMixin", "FlexiCodecGenerateOutput"]
