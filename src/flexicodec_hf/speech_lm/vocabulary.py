"""FlexiCodec's tokens as ids of a text tokenizer, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


IGNORE_INDEX = -100

_LAYOUTS = ("separate", "joint", "parallel")
_ACOUSTIC_LAYOUTS = ("flattened", "delay")

# Where tokenizer_config.json keeps the vocabulary's settings: they are saved, pushed and loaded with the tokenizer.
_SETTINGS_KEY = "flexicodec_speech"

# Kinds of ids, as messages call them; a kind's ids are consecutive. The markers are called by their tokens.
_CODE = "a code"
_DURATION = "a duration"


def _acoustic(row: int) -> str:
    return f"a code of row {row}"


class MalformedSpeechError(ValueError):
    """
    Ids that are not speech as the vocabulary lays it out.

    Args:
        position: Of the first fault in the ids.
        fault: What is wrong there.
    """

    def __init__(self, position: int, fault: str):
        super().__init__(f"Malformed speech at position {position}: {fault}")
        self.position = position


class FlexiCodecSpeechVocabulary:
    r"""
    Speech tokens of [`FlexiCodecModel`] in the vocabulary of a text tokenizer, so that a language model reads and
    writes both. Nothing is lost: `decode` gives back the codes and durations that `encode` took.

    A *stream* is a `dict` of tensors that `encode`, `join` and `pad` make and that `decode`, `repair` and `render` take
    apart: `input_ids`, and the channels beside them that the layout has. Speech lies between `<|speech|>` and
    `<|/speech|>`, and each of its tokens, which has a semantic code and a duration of 1 to `max_frames_per_token`
    frames, is laid out as follows.

    | `layout` | ids of a token | new ids | channel |
    | --- | --- | --- | --- |
    | `"separate"` | `<\|s_CODE\|>`, `<\|d_DURATION\|>` | `codebook_size + max_frames_per_token` | |
    | `"joint"` | `<\|s_CODE_DURATION\|>` | `codebook_size * max_frames_per_token` | |
    | `"parallel"` | `<\|s_CODE\|>` | `codebook_size` | `token_lengths`: durations, 0 where there is no code |

    With `num_quantizers` above 1 acoustic codes ride along, in one of two ways.

    | `acoustic_layout` | where |
    | --- | --- |
    | `"flattened"` | In the stream, behind the ids of their token, each row with ids of its own: `<\|a1_CODE\|>`, `<\|a2_CODE\|>`, ... |
    | `"delay"` | In the channel `acoustic_codes` `(num_quantizers - 1, length)`, row `r` (from 1) `r` positions behind its token, as in MusicGen ([arXiv:2306.05284](https://huggingface.co/papers/2306.05284)); `acoustic_codebook_size` where there is none. The stream gives the last rows time to finish with `num_quantizers - 1` `<\|speech_fill\|>`. Not with `layout="separate"`, where a token has two positions. |

    The tokens are special tokens: `tokenizer.decode(ids, skip_special_tokens=True)` leaves the text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A fast tokenizer. The tokens are added to it, unless it already has them from this same vocabulary.
        layout (`str`, *optional*, defaults to `"parallel"`):
            `"separate"`, `"joint"` or `"parallel"`.
        codebook_size (`int`, *optional*, defaults to 32768):
            Number of semantic codes: the codec's `config.semantic_codebook_size`.
        max_frames_per_token (`int`, *optional*, defaults to 8):
            The longest duration: the codec's `config.max_frames_per_token`.
        num_quantizers (`int`, *optional*, defaults to 1):
            Rows of `audio_codes` that take part, the semantic one included.
        acoustic_codebook_size (`int`, *optional*, defaults to 4096):
            Number of codes of an acoustic row: the codec's `config.codebook_size`.
        acoustic_layout (`str`, *optional*, defaults to `"delay"`):
            `"flattened"` or `"delay"`.

    Raises:
        ValueError: An argument is out of its range, or the tokenizer is not a fast one or has tokens of these names
            that are not this vocabulary's.

    Example:

    ```python
    >>> vocabulary = FlexiCodecSpeechVocabulary(tokenizer, layout="separate")
    >>> stream = vocabulary.encode(audio_codes=[[17, 5]], token_lengths=[3, 1])
    >>> vocabulary.render(**stream)
    '<|speech|> 17×3 5×1 <|/speech|>'
    >>> audio_codes, token_lengths = vocabulary.decode(**stream)
    ```
    """

    start_token = "<|speech|>"
    end_token = "<|/speech|>"
    fill_token = "<|speech_fill|>"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layout: str = "parallel",
        codebook_size: int = 32_768,
        max_frames_per_token: int = 8,
        num_quantizers: int = 1,
        acoustic_codebook_size: int = 4096,
        acoustic_layout: str = "delay",
    ):
        if layout not in _LAYOUTS:
            raise ValueError(f"`layout` must be one of {', '.join(_LAYOUTS)}, got {layout!r}.")
        if acoustic_layout not in _ACOUSTIC_LAYOUTS:
            raise ValueError(
                f"`acoustic_layout` must be one of {', '.join(_ACOUSTIC_LAYOUTS)}, got {acoustic_layout!r}."
            )
        sizes = {
            "codebook_size": codebook_size,
            "max_frames_per_token": max_frames_per_token,
            "num_quantizers": num_quantizers,
            "acoustic_codebook_size": acoustic_codebook_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if num_quantizers > 1 and acoustic_layout == "delay" and layout == "separate":
            raise ValueError(
                "`acoustic_layout='delay'` needs one position for each token, and `layout='separate'` has two: use "
                "`layout='parallel'` or `'joint'`, or `acoustic_layout='flattened'`."
            )
        if not tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer must be a fast one, got {type(tokenizer).__name__}: adding and finding thousands of "
                "tokens takes a slow one minutes."
            )
        self.tokenizer = tokenizer
        self.layout = layout
        self.codebook_size = codebook_size
        self.max_frames_per_token = max_frames_per_token
        self.num_quantizers = num_quantizers
        self.acoustic_codebook_size = acoustic_codebook_size
        self.acoustic_layout = acoustic_layout
        self._add_tokens({"layout": layout, **sizes, "acoustic_layout": acoustic_layout})

    @classmethod
    def for_codec(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        codec_config: PreTrainedConfig,
        layout: str = "parallel",
        num_quantizers: int = 1,
        acoustic_layout: str = "delay",
    ) -> FlexiCodecSpeechVocabulary:
        """The vocabulary of a codec's tokens: its [`FlexiCodecConfig`] tells the sizes."""
        return cls(
            tokenizer,
            layout=layout,
            codebook_size=codec_config.semantic_codebook_size,
            max_frames_per_token=codec_config.max_frames_per_token,
            num_quantizers=num_quantizers,
            acoustic_codebook_size=codec_config.codebook_size,
            acoustic_layout=acoustic_layout,
        )

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> FlexiCodecSpeechVocabulary:
        """The vocabulary that a tokenizer was saved with. Raises `ValueError` if there was none."""
        settings = tokenizer.init_kwargs.get(_SETTINGS_KEY)
        if settings is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has no speech vocabulary: add one with "
                f"`{cls.__name__}.for_codec(tokenizer, codec.config)`."
            )
        return cls(tokenizer, **settings)

    @classmethod
    def from_pretrained(cls, model_id: str, **kwargs: Any) -> FlexiCodecSpeechVocabulary:
        """The vocabulary saved in a directory or a repository, with its tokenizer. Takes what `AutoTokenizer` does."""
        return cls.from_tokenizer(AutoTokenizer.from_pretrained(model_id, **kwargs))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> tuple[str, ...]:
        """Save the tokenizer, and this vocabulary in its `tokenizer_config.json`, as `tokenizer.save_pretrained` does."""
        return self.tokenizer.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push the tokenizer, and this vocabulary with it, as `tokenizer.push_to_hub` does."""
        return self.tokenizer.push_to_hub(repo_id, **kwargs)

    def resize_embeddings(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """
        Give a language model embeddings for all ids, and never fewer than it has.

        Args:
            model (`PreTrainedModel`): Of the tokenizer.
            kwargs: For `model.resize_token_embeddings`, `pad_to_multiple_of` say.
        """
        num_rows = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(max(num_rows, len(self.tokenizer)), **kwargs)

    @property
    def is_parallel(self) -> bool:
        """Whether streams have the channel `token_lengths`."""
        return self.layout == "parallel"

    @property
    def is_delayed(self) -> bool:
        """Whether streams have the channel `acoustic_codes`."""
        return self.num_quantizers > 1 and self.acoustic_layout == "delay"

    @property
    def first_code_id(self) -> int:
        """Id of semantic code 0. The others follow (`"joint"`: of code 0 with its durations, then of code 1 ...)."""
        return self._first_ids[_CODE]

    @property
    def duration_ids(self) -> tuple[int, int]:
        """First of the ids that tell a duration, and their number: those of codes and durations together if `"joint"`."""
        name = _DURATION if self.layout == "separate" else _CODE
        return self._first_ids[name], len(self._blocks[name])

    def is_speech(self, input_ids: Tensor) -> Tensor:
        """Mask of the ids that are speech, its markers included."""
        return (input_ids >= self._boundaries[0]) & (input_ids < self._boundaries[-1])

    def is_code(self, input_ids: Tensor) -> Tensor:
        """Mask of the ids that begin a token of speech: its semantic code, with its duration if `"joint"`."""
        return (input_ids >= self.first_code_id) & (input_ids < self.first_code_id + len(self._blocks[_CODE]))

    def encode(self, audio_codes: Any, token_lengths: Any = None, markers: bool = True) -> dict[str, Tensor]:
        """
        The stream of one clip.

        Args:
            audio_codes (`torch.LongTensor` of shape `(num_quantizers, num_tokens)`, or an array or lists):
                Codes of the clip, without padding. Rows beyond the vocabulary's `num_quantizers` are not used.
            token_lengths (`torch.LongTensor` of shape `(num_tokens,)`, or an array or a list, *optional*):
                Durations in frames. One each by default.
            markers (`bool`, *optional*, defaults to `True`):
                Whether to put the speech between `<|speech|>` and `<|/speech|>`.

        Returns:
            `dict[str, torch.Tensor]` with

            - **input_ids** (`torch.LongTensor` of shape `(length,)`),
            - **token_lengths** (`torch.LongTensor` of shape `(length,)`) with `layout="parallel"`,
            - **acoustic_codes** (`torch.LongTensor` of shape `(num_quantizers - 1, length)`) with delayed acoustic codes.

        Raises:
            ValueError: A shape or dtype is wrong, or a code or duration is out of its range.
        """
        codes = _as_integers("audio_codes", audio_codes)
        if codes.ndim != 2 or codes.shape[0] < self.num_quantizers:
            raise ValueError(
                f"`audio_codes` must have the shape (num_quantizers, num_tokens), with at least {self.num_quantizers} "
                f"rows, got {tuple(codes.shape)}."
            )
        num_tokens = codes.shape[1]
        if token_lengths is None:
            lengths = codes.new_ones(num_tokens)
        else:
            lengths = _as_integers("token_lengths", token_lengths).to(codes.device)
        if lengths.shape != (num_tokens,):
            raise ValueError(
                f"`token_lengths` must have the shape (num_tokens,) = ({num_tokens},), got {tuple(lengths.shape)}."
            )
        semantic, acoustic = codes[0], codes[1 : self.num_quantizers]
        _check_range("row 0 of `audio_codes`", semantic, 0, self.codebook_size - 1)
        _check_range("an acoustic row of `audio_codes`", acoustic, 0, self.acoustic_codebook_size - 1)
        _check_range("`token_lengths`", lengths, 1, self.max_frames_per_token)

        columns = [self.first_code_id + semantic]
        if self.layout == "joint":
            columns = [self.first_code_id + semantic * self.max_frames_per_token + lengths - 1]
        elif self.layout == "separate":
            columns.append(self._first_ids[_DURATION] + lengths - 1)
        if not self.is_delayed:
            columns += [self._first_ids[_acoustic(row)] + row_codes for row, row_codes in enumerate(acoustic, start=1)]
        ids = torch.stack(columns, dim=1)
        channel = torch.zeros_like(ids)
        channel[:, 0] = lengths
        ids, channel = ids.flatten(), channel.flatten()

        num_fills = self.num_quantizers - 1 if self.is_delayed else 0
        ids = F.pad(ids, (0, num_fills), value=self._first_ids.get(self.fill_token, 0))
        if markers:
            ids = F.pad(ids, (1, 0), value=self._first_ids[self.start_token])
            ids = F.pad(ids, (0, 1), value=self._first_ids[self.end_token])
        stream = {"input_ids": ids}
        if self.is_parallel:
            stream["token_lengths"] = F.pad(channel, (int(markers), num_fills + int(markers)))
        if self.is_delayed:
            rows = acoustic.new_full((num_fills, len(ids)), self.acoustic_codebook_size)
            starts = torch.arange(num_tokens, device=ids.device) + int(markers)
            rows.scatter_(1, self._delayed_positions(starts), acoustic)
            stream["acoustic_codes"] = rows
        return stream

    def encode_prompt(self, audio_codes: Any, token_lengths: Any = None) -> dict[str, Tensor]:
        """
        The stream of a clip that a language model is to continue: begun by `<|speech|>`, and not ended. Arguments,
        result and errors as for `encode`. (Delayed acoustic codes that would come behind the last token are not in it.)
        """
        num_closing = 1 + (self.num_quantizers - 1 if self.is_delayed else 0)
        return {name: value[..., :-num_closing] for name, value in self.encode(audio_codes, token_lengths).items()}

    def decode(
        self, input_ids: Tensor, token_lengths: Tensor | None = None, acoustic_codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Codes and durations of a stream that is one clip, with both markers or without.

        Args:
            input_ids (`torch.LongTensor` of shape `(length,)`):
                Ids. [`speech_spans`] finds the clips in a stream of text and speech.
            token_lengths (`torch.LongTensor` of shape `(length,)`, *optional*):
                The channel of durations, which `layout="parallel"` needs.
            acoustic_codes (`torch.LongTensor` of shape `(num_quantizers - 1, length)`, *optional*):
                The channel of acoustic codes, which delayed acoustic codes need.

        Returns:
            `audio_codes` (`torch.LongTensor` of shape `(num_quantizers, num_tokens)`) and `token_lengths`
            (`torch.LongTensor` of shape `(num_tokens,)`), which `codec.decode` takes with a batch dimension in front.

        Raises:
            MalformedSpeechError: The stream is not what `encode` makes; its `position` tells where it first differs.
            ValueError: A channel is missing or has another shape.
        """
        ids, lengths, acoustic = self._check_stream(input_ids, token_lengths, acoustic_codes)
        kinds = self._kinds(ids)
        opened = len(ids) > 0 and bool(kinds[0] == self._kind(self.start_token))
        first, last, closed = int(opened), len(ids), False
        if len(ends := (kinds == self._kind(self.end_token)).nonzero()):
            last, closed = int(ends[0]), True

        body = kinds[first:last]
        expected = self._expected_kinds(body)
        shared = min(len(body), len(expected))
        wrong = (body[:shared] != expected[:shared]).nonzero()
        fault: tuple[int, str] | None = None
        if len(wrong):
            fault = int(wrong[0]), list(self._blocks)[int(expected[wrong[0]])]
        elif len(body) < len(expected):
            fault = len(body), list(self._blocks)[int(expected[len(body)])]
        elif len(body) > len(expected) or closed != opened:
            fault = len(expected), self.end_token if opened else "nothing more"
        elif last + closed < len(ids):
            fault = len(body) + 1, "nothing more"
        if fault is not None:
            position = first + fault[0]
            found = self._token(int(ids[position])) if position < len(ids) else "the end"
            raise MalformedSpeechError(position, f"expected {fault[1]}, got {found}.")

        num_slots = len(body) - (self.num_quantizers - 1 if self.is_delayed else 0)
        starts = first + torch.arange(0, num_slots, len(self._pattern), device=ids.device)
        if lengths is not None:
            allowed = torch.zeros_like(lengths)
            allowed[starts] = lengths[starts].clamp(1, self.max_frames_per_token)
            rule = f"1 to {self.max_frames_per_token} at a code and 0 elsewhere"
            self._check_channel("token_lengths", lengths, allowed, rule)
        if acoustic is not None:
            slots = self._delayed_positions(starts)
            allowed = torch.full_like(acoustic, self.acoustic_codebook_size)
            allowed.scatter_(1, slots, acoustic.gather(1, slots).clamp(0, self.acoustic_codebook_size - 1))
            rule = (
                f"0 to {self.acoustic_codebook_size - 1} in row r, r positions behind each code, and "
                f"{self.acoustic_codebook_size} elsewhere"
            )
            self._check_channel("acoustic_codes", acoustic, allowed, rule)
        return self._read(starts, ids, lengths, acoustic)

    def repair(
        self, input_ids: Tensor, token_lengths: Tensor | None = None, acoustic_codes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """
        The stream that is left of one that a language model left incomplete or got wrong: every token that is whole,
        in order, between both markers. What is not whole (a code without its duration, a delayed token whose last
        acoustic codes never came, text in the middle, a duration out of its range) is left out, and what follows the
        end of speech; nothing is invented.

        Args:
            input_ids, token_lengths, acoustic_codes: As for `decode`.

        Returns:
            `dict[str, torch.Tensor]`: A stream that `decode` takes; with no token in it if none was whole.
        """
        ids, lengths, acoustic = self._check_stream(input_ids, token_lengths, acoustic_codes)
        kinds = self._kinds(ids)
        pattern = kinds.new_tensor(self._pattern)
        ended = (kinds == self._kind(self.end_token)).cumsum(dim=0) > 0
        starts = ((kinds == self._kind(_CODE)) & ~ended).nonzero()[:, 0]
        slots = starts[:, None] + torch.arange(len(pattern), device=ids.device)
        padded = F.pad(kinds, (0, len(pattern)), value=-1)
        whole = (padded[slots] == pattern).all(dim=1)
        if lengths is not None:
            whole &= (lengths[starts] >= 1) & (lengths[starts] <= self.max_frames_per_token)
        if acoustic is not None:
            padded = F.pad(acoustic, (0, self.num_quantizers), value=-1)
            codes = padded.gather(1, self._delayed_positions(starts))
            whole &= ((codes >= 0) & (codes < self.acoustic_codebook_size)).all(dim=0)
        return self.encode(*self._read(starts[whole], ids, lengths, acoustic))

    def speech_spans(self, input_ids: Tensor) -> list[slice]:
        """
        Where speech lies in a stream `(length,)` of text and speech, markers included. Speech that is not closed ends
        before the next that begins, or with the stream.
        """
        kinds = self._kinds(_as_integers("input_ids", input_ids))
        starts = (kinds == self._kind(self.start_token)).nonzero()[:, 0].tolist()
        ends = (kinds == self._kind(self.end_token)).nonzero()[:, 0]
        spans = []
        for start, limit in zip(starts, [*starts[1:], len(kinds)], strict=False):
            index = int(torch.searchsorted(ends, start))
            closed = index < len(ends) and int(ends[index]) < limit
            spans.append(slice(start, int(ends[index]) + 1 if closed else limit))
        return spans

    def join(self, parts: Iterable[str | Sequence[int] | dict[str, Tensor]]) -> dict[str, Tensor]:
        """
        One stream of several parts.

        Args:
            parts: Texts (as `str`, tokenised without special tokens, or as a list of ids) and streams.

        Returns:
            `dict[str, torch.Tensor]`: A stream; text has no duration and no acoustic codes.
        """
        streams = [part if isinstance(part, dict) else self._text(part) for part in parts]
        return {name: torch.cat([stream[name] for stream in streams], dim=-1) for name in self._channels}

    def pad(
        self,
        streams: Sequence[dict[str, Tensor]],
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, Tensor]:
        """
        A batch of streams.

        Args:
            streams: Streams; their `labels`, `duration_labels` and `acoustic_labels`, if any, are padded with -100.
            padding_side: `"right"`, or `"left"` as for prompts of `generate`.
            pad_to_multiple_of: If set, the length is a multiple of it.

        Returns:
            `dict[str, torch.Tensor]`: The tensors of the streams with a batch dimension in front, and `attention_mask`
            `(batch_size, length)`: 1 for ids, 0 for padding.

        Raises:
            ValueError: The tokenizer has no padding token.
        """
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token: set one, `tokenizer.pad_token = tokenizer.eos_token` say."
            )
        if padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` must be 'left' or 'right', got {padding_side!r}.")
        fills = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_lengths": 0,
            "acoustic_codes": self.acoustic_codebook_size,
        }
        length = max(len(stream["input_ids"]) for stream in streams)
        multiple = pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple

        def padded(name: str, values: Tensor) -> Tensor:
            missing = length - values.shape[-1]
            sides = (missing, 0) if padding_side == "left" else (0, missing)
            return F.pad(values, sides, value=fills.get(name, IGNORE_INDEX))

        streams = [{**stream, "attention_mask": torch.ones_like(stream["input_ids"])} for stream in streams]
        return {name: torch.stack([padded(name, stream[name]) for stream in streams]) for name in streams[0]}

    def render(
        self, input_ids: Tensor, token_lengths: Tensor | None = None, acoustic_codes: Tensor | None = None
    ) -> str:
        """
        A stream as a string to read, also if it is malformed: text as text, and each token of speech as
        `CODE×DURATION`, with its acoustic codes behind slashes. (`tokenizer.decode` gives the tokens' full names.)
        """
        ids, lengths, acoustic = self._check_stream(input_ids, token_lengths, acoustic_codes)
        kinds = self._kinds(ids).tolist()
        names = ["text", *self._blocks]
        pieces: list[str] = []
        text: list[int] = []
        for position, (token_id, kind) in enumerate(zip(ids.tolist(), kinds, strict=True)):
            name = names[kind + 1]
            if name == "text":
                text.append(token_id)
                continue
            if text:
                pieces.append(self.tokenizer.decode(text))
                text = []
            value = token_id - self._first_ids[name]
            if name == self.start_token:
                pieces.append(name)
            elif name == self.end_token:
                pieces.append(f" {name}")
            elif name == self.fill_token:
                pieces.append(" ·")
            elif name == _DURATION:
                pieces.append(f"×{value + 1}")
            elif name == _CODE and self.layout == "joint":
                pieces.append(f" {value // self.max_frames_per_token}×{value % self.max_frames_per_token + 1}")
            elif name == _CODE:
                pieces.append(f" {value}" if lengths is None else f" {value}×{int(lengths[position])}")
            else:
                pieces.append(f"/{value}")
            if acoustic is not None and name in (_CODE, self.fill_token):
                codes = acoustic[:, position].tolist()
                pieces.append("".join("/-" if code == self.acoustic_codebook_size else f"/{code}" for code in codes))
        if text:
            pieces.append(self.tokenizer.decode(text))
        return "".join(pieces)

    def _add_tokens(self, settings: dict[str, Any]) -> None:
        """Add the tokens, in blocks of consecutive ids, or find those that are there."""
        codes, durations = range(self.codebook_size), range(1, self.max_frames_per_token + 1)
        self._blocks = {self.start_token: [self.start_token], self.end_token: [self.end_token]}
        if self.is_delayed:
            self._blocks[self.fill_token] = [self.fill_token]
        if self.layout == "joint":
            self._blocks[_CODE] = [f"<|s_{code}_{duration}|>" for code in codes for duration in durations]
        else:
            self._blocks[_CODE] = [f"<|s_{code}|>" for code in codes]
        if self.layout == "separate":
            self._blocks[_DURATION] = [f"<|d_{duration}|>" for duration in durations]
        if not self.is_delayed:
            for row in range(1, self.num_quantizers):
                self._blocks[_acoustic(row)] = [f"<|a{row}_{code}|>" for code in range(self.acoustic_codebook_size)]
        self._channels = ["input_ids", *["token_lengths"] * self.is_parallel, *["acoustic_codes"] * self.is_delayed]
        names = [name for block in self._blocks.values() for name in block]

        tokenizer = self.tokenizer
        known = tokenizer.init_kwargs.get(_SETTINGS_KEY)
        if known is None:
            vocab = tokenizer.get_vocab()
            if (taken := next((name for name in names if name in vocab), None)) is not None:
                raise ValueError(f"The tokenizer already has a token {taken!r}, of another meaning.")
            tokens = [AddedToken(name, normalized=False, special=True) for name in names]
            tokenizer.add_tokens(tokens, special_tokens=True)
            tokenizer.init_kwargs[_SETTINGS_KEY] = settings
        elif known != settings:
            raise ValueError(
                f"The tokenizer already has another speech vocabulary: {known}, not {settings}. Load it with "
                f"`{type(self).__name__}.from_tokenizer(tokenizer)`, or start from a tokenizer without one."
            )
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(names))
        first = int(ids[0])
        if not torch.equal(ids, torch.arange(first, first + len(names))):
            raise ValueError(
                "The speech tokens of the tokenizer do not have consecutive ids: it was changed after it was saved."
            )
        ends = first + np.cumsum([len(block) for block in self._blocks.values()])
        self._boundaries = torch.tensor([first, *ends])
        self._first_ids = dict(zip(self._blocks, [first, *ends.tolist()], strict=False))
        markers = (self.start_token, self.end_token, self.fill_token)
        self._pattern = [self._kind(name) for name in self._blocks if name not in markers]

    def _kind(self, name: str) -> int:
        return list(self._blocks).index(name)

    def _kinds(self, ids: Tensor) -> Tensor:
        """For each id the index of its block, -1 for text."""
        kinds = torch.bucketize(ids, self._boundaries.to(ids.device), right=True) - 1
        return kinds.masked_fill(kinds == len(self._blocks), -1)

    def _expected_kinds(self, body: Tensor) -> Tensor:
        """The kinds that speech has which begins with these, up to the end of its last token."""
        pattern = body.new_tensor(self._pattern)
        if not self.is_delayed:
            return pattern.repeat(-(-len(body) // len(pattern)))
        num_codes = int((body == pattern).long().cumprod(dim=0).sum())
        return F.pad(pattern.repeat(num_codes), (0, self.num_quantizers - 1), value=self._kind(self.fill_token))

    def _token(self, token_id: int) -> str:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return repr(token) if token is not None else f"the id {token_id}"

    def _text(self, text: str | Sequence[int]) -> dict[str, Tensor]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
        stream = {"input_ids": torch.tensor(ids, dtype=torch.long)}
        if self.is_speech(stream["input_ids"]).any():
            raise ValueError("A text holds the name of a speech token: pass speech as streams of `encode`.")
        stream["token_lengths"] = torch.zeros_like(stream["input_ids"])
        shape = self.num_quantizers - 1, len(ids)
        stream["acoustic_codes"] = torch.full(shape, self.acoustic_codebook_size)
        return {name: stream[name] for name in self._channels}

    def _delayed_positions(self, starts: Tensor) -> Tensor:
        """Positions `(num_quantizers - 1, num_tokens)` of the acoustic codes of tokens at `starts`."""
        return starts + torch.arange(1, self.num_quantizers, device=starts.device)[:, None]

    def _check_stream(
        self, input_ids: Tensor, token_lengths: Tensor | None, acoustic_codes: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ids = _as_integers("input_ids", input_ids)
        if ids.ndim != 1:
            raise ValueError(
                f"`input_ids` must have the shape (length,), got {tuple(ids.shape)}: pass one stream at a time."
            )
        channels: list[Tensor | None] = []
        for name, value, shape in (
            ("token_lengths", token_lengths, (len(ids),)),
            ("acoustic_codes", acoustic_codes, (self.num_quantizers - 1, len(ids))),
        ):
            if name not in self._channels:
                channels.append(None)
                continue
            if value is None:
                raise ValueError(f"`{name}` is missing: in this vocabulary's layout it is a channel beside the ids.")
            value = _as_integers(name, value).to(ids.device)
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"`{name}` must have the shape {shape}, as the ids have it, got {tuple(value.shape)}."
                )
            channels.append(value)
        return ids, channels[0], channels[1]

    @staticmethod
    def _check_channel(name: str, values: Tensor, allowed: Tensor, rule: str) -> None:
        if len(wrong := (values != allowed).nonzero()):
            position = int(wrong[:, -1].min())
            found = values[..., position].tolist()
            raise MalformedSpeechError(position, f"expected `{name}` to be {rule}, got {found}.")

    def _read(
        self, starts: Tensor, ids: Tensor, lengths: Tensor | None, acoustic: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`audio_codes` and `token_lengths` of the whole tokens that begin at `starts`."""
        semantic = ids[starts] - self.first_code_id
        if self.layout == "joint":
            durations = semantic % self.max_frames_per_token + 1
            semantic = semantic // self.max_frames_per_token
        elif self.layout == "separate":
            durations = ids[starts + 1] - self._first_ids[_DURATION] + 1
        else:
            assert lengths is not None
            durations = lengths[starts]
        rows = [semantic[None]]
        if acoustic is not None:
            rows.append(acoustic.gather(1, self._delayed_positions(starts)))
        elif self.num_quantizers > 1:
            slots = len(self._pattern) - self.num_quantizers + torch.arange(1, self.num_quantizers, device=ids.device)
            first = ids.new_tensor([self._first_ids[_acoustic(row)] for row in range(1, self.num_quantizers)])
            rows.append((ids[starts[:, None] + slots] - first).T)
        return torch.cat(rows), durations


def _as_integers(name: str, values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.from_numpy(np.asarray(values))
        if values.numel() == 0:
            values = values.long()
    if values.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"`{name}` must be integers, got {values.dtype}.")
    return values.long()


def _check_range(name: str, values: Tensor, lowest: int, highest: int) -> None:
    if values.numel() and (int(values.min()) < lowest or int(values.max()) > highest):
        position = int(((values < lowest) | (values > highest)).nonzero()[:, -1].min())
        raise ValueError(
            f"{name} must be between {lowest} and {highest}, got {values[..., position].tolist()} at token {position}."
        )
