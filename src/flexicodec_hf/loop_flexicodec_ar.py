"""
The whole loop of generation on the device: [`FlexiCodecARLoop`].

A step reads a token of each stream, and picks its duration and the next token. It decides nothing on
the host: limits, ends and random numbers are tensors, and keys and values have fixed places. So on an
NVIDIA GPU the step is recorded once as a CUDA graph, and replayed. The host looks every 8 tokens, on
a CPU after each; then streams that ended leave, and new ones can join.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from .compatibility_flexicodec import CACHE


# Random numbers that a generator draws at once: the host waits for each transfer to the device.
_DRAWS = 8
# What a step writes where a stream got no token or duration.
_NOTHING = -1


@dataclass
class RowSampler:
    """
    Draws for each row of a batch with the row's own generator, so that one row's draws never affect
    another row. Without generators, the numbers are PyTorch's global ones.
    """

    generators: torch.Generator | list[torch.Generator] | None
    numbers: list[Tensor] = field(default_factory=list)

    def draw(self, scores: Tensor) -> Tensor:
        """An index for each row `(num_rows,)` from scores `(num_rows, num_choices)`."""
        if not self.numbers:
            self.numbers = list(self._draw_numbers(len(scores)).to(scores.device))
        return pick_by_number(scores, self.numbers.pop(0))

    def take(self, num_draws: int, num_rows: int) -> Tensor:
        """Numbers for draws to come `(num_draws, num_rows)`, the same as `draw` would use."""
        while len(self.numbers) < num_draws:
            self.numbers += self._draw_numbers(num_rows)
        taken, self.numbers = self.numbers[:num_draws], self.numbers[num_draws:]
        return torch.stack(taken)

    def _draw_numbers(self, num_rows: int) -> Tensor:
        """Numbers for the next draws `(_DRAWS, num_rows)`, in (0, 1]: a choice of probability 0 is never drawn."""
        generators = self.generators
        if generators is None:
            return 1 - torch.rand(_DRAWS, num_rows)
        if not isinstance(generators, list):
            return 1 - torch.rand(_DRAWS, num_rows, generator=generators, device=generators.device)
        if len(generators) != num_rows:
            raise ValueError(
                f"`generator` holds {len(generators)} generators for {num_rows} rows: pass one, or one for each."
            )
        return 1 - torch.stack([torch.rand(_DRAWS, generator=one, device=one.device) for one in generators], dim=1)


def pick_by_number(scores: Tensor, numbers: Tensor) -> Tensor:
    """The index `(num_rows,)` that a number in (0, 1] picks from scores `(num_rows, num_choices)`."""
    cumulative = F.softmax(scores.float(), dim=-1).cumsum(dim=-1)
    reached = numbers[:, None] * cumulative[:, -1:]
    return (cumulative < reached).sum(dim=-1)


class FlexiCodecARRequest:
    """
    The rows of one prompt in a [`FlexiCodecARLoop`], and what was generated for them so far.

    Attributes:
        codes (`list[list[int]]`): For each row, its semantic codes.
        token_lengths (`list[list[int]]`):
            For each row, the codec frames of these tokens. That of the last token comes with the
            token after it.
        has_ended (`list[bool]`):
            For each row, whether the model ended the speech. Otherwise its limit does.
        is_done (`bool`): Whether all rows are complete.
    """

    def __init__(self, slots: list[int], sampler: RowSampler):
        self.slots, self.sampler = slots, sampler
        self.codes: list[list[int]] = [[] for _ in slots]
        self.token_lengths: list[list[int]] = [[] for _ in slots]
        self.has_ended = [False for _ in slots]
        self._is_running = [True for _ in slots]

    @property
    def is_done(self) -> bool:
        return not any(self._is_running)

    def add_token(self, row: int, token: int, end_token_id: int) -> None:
        """Called by the loop."""
        if token == end_token_id:
            self.has_ended[row] = True
        elif token != _NOTHING:
            self.codes[row].append(token)
        self._is_running[row] = token not in (end_token_id, _NOTHING)


class FlexiCodecARLoop:
    """
    Streams of tokens with durations in fixed slots, which requests join and leave while others run.

    Each request gets the tokens and durations that `generate` gives it alone with its generator, up to
    the rounding of the kernels. Make one with [`~FlexiCodecARGenerationMixin.make_loop`], after the
    model is where it stays; it is for one thread.

    Args:
        model ([`FlexiCodecARForConditionalGeneration`]): Gives the step.
        config (`GenerationConfig`): Complete settings, the same for all requests.
        processors (`LogitsProcessorList`): Shape the scores of the next token, which is all they see.
        duration_processors (`LogitsProcessorList`): Shape the scores of durations; empty for the
            likeliest.
        num_streams (`int`): Slots, the rows that can run at once.
        max_length (`int`): Ids of a prompt and its new tokens at most.
        block_size (`int`): Tokens of each stream between two looks of the host.

    Example:

    ```python
    >>> loop = model.make_loop(num_streams=32, max_length=1024)
    >>> requests = deque(prompts)  # each as `model.build_inputs` gives it, of one row
    >>> while requests or loop.num_running:
    ...     while requests and loop.num_free:
    ...         loop.add(**requests.popleft(), generator=torch.Generator().manual_seed(0))
    ...     for request in loop.advance():
    ...         print(request.codes[0], request.token_lengths[0])
    ```
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        duration_processors: LogitsProcessorList | None,
        num_streams: int,
        max_length: int,
        block_size: int,
    ):
        self.model, self.config, self.block_size = model, config, block_size
        self.processors, self.duration_processors = processors, duration_processors
        self.num_streams, self.max_length = num_streams, max_length
        self.device = model.device
        self._weights = _addresses(model)
        self.requests: list[FlexiCodecARRequest] = []
        self._free = list(range(num_streams))

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        # Of each stream: the token to read next, the duration before it, the place of its keys, the
        # new tokens so far with their limits, and whether it runs.
        self.tokens, self.previous, self.positions = (zeros(num_streams) for _ in range(3))
        self.counts, self.fewest, self.most = (zeros(num_streams) for _ in range(3))
        self.running = zeros(num_streams, dtype=torch.bool)
        # Of each step of a block: numbers to draw with, and the durations and tokens that it gave.
        self.cursor = zeros(1)
        self.num_draws = int(bool(config.do_sample)) + int(duration_processors is not None)
        self.numbers = zeros(block_size, self.num_draws, num_streams, dtype=torch.float32)
        self.history = zeros(block_size, 2, num_streams)
        layers = model.config.num_hidden_layers
        heads, width = model.config.num_attention_heads, model.config.hidden_size
        shape = (layers, num_streams, heads, self.max_length, width // heads)
        keys, values = zeros(*shape, dtype=model.dtype), zeros(*shape, dtype=model.dtype)
        self.cache = _Slots(keys, values, self.positions)
        self.key_positions = torch.arange(self.max_length, device=self.device)
        self.relative_keys = model.model.decoder.relative_keys(self.max_length, self.device)
        self._run_step: Callable[[], None] = self._record() if self.device.type == "cuda" else self._step

    def __reduce__(self) -> Any:
        # A copy of a model makes a loop of its own.
        return type(None), ()

    @property
    def num_free(self) -> int:
        """Slots without a request."""
        return len(self._free)

    @property
    def num_running(self) -> int:
        """Requests that are not done."""
        return len(self.requests)

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(
        self,
        input_ids: Tensor,
        token_lengths: Tensor,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        min_new_tokens: int | None = None,
        max_new_tokens: int | None = None,
    ) -> FlexiCodecARRequest:
        """
        Let a prompt join. Its first token is generated at once.

        Args:
            input_ids, token_lengths, attention_mask:
                The prompt of one row or several, as
                [`~FlexiCodecARForConditionalGeneration.build_inputs`] gives it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the random numbers: one for all rows, or one for each. Defaults to PyTorch's
                global one, whose numbers are used otherwise than by `generate`.
            min_new_tokens, max_new_tokens (`int`, *optional*):
                Limits of this prompt instead of those of the loop.

        Raises:
            ValueError: There are not enough free slots, or the prompt and its new tokens are longer than
                `max_length`.
        """
        num_rows, length = input_ids.shape
        if num_rows > self.num_free:
            raise ValueError(f"{num_rows} rows need as many free streams, and there are {self.num_free}: add later.")
        input_ids, token_lengths = input_ids.to(self.device), token_lengths.to(self.device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        config = copy.copy(self.config)
        config.min_new_tokens = config.min_new_tokens if min_new_tokens is None else min_new_tokens
        config.max_new_tokens = config.max_new_tokens if max_new_tokens is None else max_new_tokens
        fewest, most = self.model._limits(config, input_ids)
        fewest = fewest.clamp(min=max(config.min_new_tokens or 0, (config.min_length or 0) - length))
        sizes = mask.sum(dim=1)
        longest = int((sizes + most).max())
        if longest > self.max_length:
            raise ValueError(
                f"A prompt and its new tokens take up to {longest} places, and streams have {self.max_length}: lower "
                "`max_new_tokens` or `max_token_text_ratio`, or raise `max_length`."
            )
        slots = self._free[:num_rows]
        rows = torch.tensor(slots, device=self.device)
        output = self.model(input_ids, token_lengths, mask, use_cache=True, logits_to_keep=1)
        self._keep(rows, output[CACHE], length - sizes)

        sampler = RowSampler(generator)
        numbers = sampler.take(1, num_rows)[0].to(self.device) if self.config.do_sample else None
        counts = torch.zeros_like(sizes)
        tokens = self._next_tokens(output.logits[:, -1], counts, fewest, numbers)
        is_end = tokens == self.model.config.end_token_id
        last = token_lengths[:, -1].masked_fill(~self.model.is_code(input_ids[:, -1]), 0)
        values = (self._readable(tokens), last, sizes, counts + 1, fewest, most, ~is_end)
        state = (self.tokens, self.previous, self.positions, self.counts, self.fewest, self.most, self.running)
        for tensor, value in zip(state, values, strict=True):
            tensor[rows] = value

        request = FlexiCodecARRequest(slots, sampler)
        for row, token in enumerate(tokens.tolist()):
            request.add_token(row, token, self.model.config.end_token_id)
        self.requests.append(request)
        self._free = self._free[num_rows:]
        return request

    @torch.inference_mode(False)
    @torch.no_grad()
    def advance(self) -> list[FlexiCodecARRequest]:
        """Generate the next `block_size` tokens of each stream, and return the requests that are done."""
        if not all(request.is_done for request in self.requests):
            self._draw()
            self.cursor.zero_()
            for _ in range(self.block_size):
                self._run_step()
            for durations, tokens in self.history.tolist():  # the only wait
                self._hand_out(durations, tokens)
        done = [request for request in self.requests if request.is_done]
        self.requests = [request for request in self.requests if not request.is_done]
        for request in done:
            self._free += request.slots
        return done

    def remove(self, request: FlexiCodecARRequest) -> None:
        """Take a request out that is not done."""
        self.requests.remove(request)
        self.running[torch.tensor(request.slots, device=self.device)] = False
        self._free += request.slots

    def fits(self, config: GenerationConfig, num_streams: int, max_length: int) -> bool:
        """Whether a loop with these arguments would do the same with less than half of the places."""
        return (
            config.to_dict() == self.config.to_dict()
            and num_streams <= self.num_streams <= 2 * num_streams
            and max_length <= self.max_length <= 2 * max_length
            and self._weights == _addresses(self.model)
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Take over weights that were changed in place."""
        self.relative_keys.copy_(self.model.model.decoder.relative_keys(self.max_length, self.device))

    def _hand_out(self, durations: list[int], tokens: list[int]) -> None:
        """Give requests what a step picked."""
        for request in self.requests:
            for row, slot in enumerate(request.slots):
                if durations[slot] != _NOTHING:
                    request.token_lengths[row].append(durations[slot])
                    request.add_token(row, tokens[slot], self.model.config.end_token_id)

    def _draw(self) -> None:
        """Random numbers for a block."""
        if self.num_draws == 0:
            return
        numbers = torch.zeros(self.numbers.shape)
        for request in self.requests:
            drawn = request.sampler.take(self.block_size * self.num_draws, len(request.slots))
            numbers[:, :, request.slots] = drawn.view(self.block_size, self.num_draws, -1).to(numbers.device)
        self.numbers.copy_(numbers)

    def _keep(self, rows: Tensor, cache: DynamicCache, padding: Tensor) -> None:
        """Put keys and values of prompts into their slots, without the padding on their left."""
        length = cache.get_seq_length()
        index = torch.arange(length, device=self.device) + padding[:, None]
        index = index.clamp(max=length - 1)[:, None, :, None]
        for layer, prompt in enumerate(cache.layers):
            for slots, states in ((self.cache.keys, prompt.keys), (self.cache.values, prompt.values)):
                states = states.gather(2, index.expand_as(states))
                slots[layer, :, :, :length].index_copy_(0, rows, states)

    def _step(self) -> None:
        """Read a token of each stream, and pick its duration and the next token; all in place."""
        model, decoder = self.model, self.model.model.decoder
        embeds = model.model.speech_embedding(self.tokens) + model.model.duration_embedding(self.previous)
        distances = self.positions[:, None] - self.key_positions
        mask = (distances >= 0)[:, None, None]
        distances = distances.clamp(min=0)[:, None, None]
        states = decoder.run_layers(embeds[:, None], self.relative_keys, distances, mask, self.cache)[:, 0]

        numbers = list(self.numbers.index_select(0, self.cursor)[0])
        scores = model.duration_head(states).float()
        if self.duration_processors is None:
            durations = scores.argmax(dim=-1)
        else:
            durations = pick_by_number(self.duration_processors(None, scores), numbers.pop(0))
        goes_on = self.running & (self.counts < self.most)
        number = numbers.pop(0) if self.config.do_sample else None
        tokens = self._next_tokens(model.lm_head(states), self.counts, self.fewest, number)
        given = torch.stack([torch.where(self.running, durations, _NOTHING), torch.where(goes_on, tokens, _NOTHING)])
        self.history.index_copy_(0, self.cursor, given[None])
        self.cursor += 1
        self.running.copy_(goes_on & (tokens != model.config.end_token_id))
        self.counts += goes_on
        self.positions += self.running
        self.previous.copy_(durations)
        self.tokens.copy_(self._readable(tokens))

    def _next_tokens(self, logits: Tensor, counts: Tensor, fewest: Tensor, numbers: Tensor | None) -> Tensor:
        """Tokens `(num_rows,)` from logits `(num_rows, vocab_size)`."""
        scores = logits.float()
        is_end = torch.arange(scores.shape[-1], device=scores.device) == self.model.config.end_token_id
        scores = scores.masked_fill((counts < fewest)[:, None] & is_end, -torch.inf)
        scores = self.processors(None, scores)
        return scores.argmax(dim=-1) if numbers is None else pick_by_number(scores, numbers)

    def _readable(self, tokens: Tensor) -> Tensor:
        """The end of speech is not read; its stream reads something else, for nothing."""
        return tokens.clamp(max=self.model.config.speech_vocab_size - 1)

    def _record(self) -> Callable[[], None]:
        """The step as a CUDA graph. Nothing runs yet, so the steps that warm up change nothing that counts."""
        if any(weight.is_meta for weight in self.model.parameters()):
            raise ValueError(
                "A CUDA graph needs the weights on the device, and some are offloaded: load the model without "
                "`device_map`, or generate without `static_loop`."
            )
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.cursor.zero_()
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
        return graph.replay


@dataclass
class _Slots:
    """Keys and values `(num_layers, num_streams, num_heads, max_length, head_dim)`, each stream at its position."""

    keys: Tensor
    values: Tensor
    positions: Tensor

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        index = self.positions[:, None, None, None].expand_as(key)
        return self.keys[layer].scatter_(2, index, key), self.values[layer].scatter_(2, index, value)


def _addresses(model: Any) -> tuple[int, ...]:
    """Where the weights are: a graph reads them there."""
    return tuple(weight.data_ptr() for weight in model.parameters())


__all__ = ["FlexiCodecARLoop", "FlexiCodecARRequest"]
