"""FlexiCodec's tokens as ids of a text tokenizer, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .tokens import CODE, DURATION, SETTINGS_KEY, SpeechStream, SpeechTokens, acoustic_block, as_integers


IGNORE_INDEX = -100

_LAYOUTS = ("separate", "joint", "parallel")
_ACOUSTIC_LAYOUTS = ("flattened", "delay")


class FlexiCodecSpeechVocabulary:
    r"""
    Speech tokens of [`FlexiCodecModel`] in the vocabulary of a text tokenizer, so that a language
    model reads and writes both. Nothing is lost: `decode` returns the codes and token lengths that
    were passed to `encode`.

    A *stream* is a `dict` of tensors: `input_ids`, and the channels beside them that the layout
    has. `encode` and `join` make streams, `pad` makes batches of them, and `decode`, `repair` and
    `render` read them. Speech lies between `<|speech|>` and `<|/speech|>`. Each speech token has a
    semantic code and a length of 1 to `max_frames_per_token` codec frames, laid out as follows.

    | `layout` | ids of a token | new ids | channel |
    | --- | --- | --- | --- |
    | `"separate"` | `<\|s_CODE\|>`, `<\|d_LENGTH\|>` | `codebook_size + max_frames_per_token` | |
    | `"joint"` | `<\|s_CODE_LENGTH\|>` | `codebook_size * max_frames_per_token` | |
    | `"parallel"` | `<\|s_CODE\|>` | `codebook_size` | `token_lengths`, 0 where there is no code |

    With `num_quantizers` above 1, acoustic codes are added in one of two ways.

    - `acoustic_layout="flattened"`: in the stream, after the other ids of their token. Each
      codebook has ids of its own: `<|a1_CODE|>`, `<|a2_CODE|>`, ...
    - `acoustic_layout="delay"`: in the channel `acoustic_codes` `(num_quantizers - 1, length)`.
      Codebook `r`, from 1, is `r` positions behind its token, as in MusicGen (arXiv 2306.05284),
      with `acoustic_codebook_size` where there is no code. `num_quantizers - 1` ids
      `<|speech_fill|>` at the end leave room for the last codes. Not for `layout="separate"`, where
      a token has two positions.

    All these tokens are special tokens, so `tokenizer.decode(ids, skip_special_tokens=True)` leaves
    only the text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            A fast tokenizer. The tokens are added to it, unless it already has this vocabulary.
        layout (`str`, *optional*, defaults to `"parallel"`):
            `"separate"`, `"joint"` or `"parallel"`.
        codebook_size (`int`, *optional*, defaults to 32768):
            Number of semantic codes: `config.semantic_codebook_size` of the codec.
        max_frames_per_token (`int`, *optional*, defaults to 8):
            Longest token: `config.max_frames_per_token` of the codec.
        num_quantizers (`int`, *optional*, defaults to 1):
            Codebooks of `audio_codes` to use, including the semantic one.
        acoustic_codebook_size (`int`, *optional*, defaults to 4096):
            Number of codes in an acoustic codebook: `config.codebook_size` of the codec.
        acoustic_layout (`str`, *optional*, defaults to `"delay"`):
            `"flattened"` or `"delay"`.

    Raises:
        ValueError: An argument is out of range, the tokenizer is not a fast one, or it has other
            tokens of these names.

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
                f"The tokenizer must be a fast one, got {type(tokenizer).__name__}: with a slow one, adding thousands "
                "of tokens takes minutes."
            )
        self.tokenizer = tokenizer
        self.layout = layout
        self.codebook_size = codebook_size
        self.max_frames_per_token = max_frames_per_token
        self.num_quantizers = num_quantizers
        self.acoustic_codebook_size = acoustic_codebook_size
        self.acoustic_layout = acoustic_layout
        settings = {"layout": layout, **sizes, "acoustic_layout": acoustic_layout}
        self.tokens = SpeechTokens(tokenizer, self._make_blocks(), settings)
        markers = (self.start_token, self.end_token, self.fill_token)
        # Kinds of the ids that a token consists of, and the names of the tensors of a stream.
        self.pattern = [self.tokens.kind(name) for name in self.tokens.names if name not in markers]
        self.channels = ["input_ids", *["token_lengths"] * self.is_parallel, *["acoustic_codes"] * self.is_delayed]

    def _make_blocks(self) -> dict[str, list[str]]:
        """Names of the tokens of each block, in the order of their ids."""
        codes, lengths = range(self.codebook_size), range(1, self.max_frames_per_token + 1)
        blocks = {self.start_token: [self.start_token], self.end_token: [self.end_token]}
        if self.is_delayed:
            blocks[self.fill_token] = [self.fill_token]
        if self.layout == "joint":
            blocks[CODE] = [f"<|s_{code}_{length}|>" for code in codes for length in lengths]
        else:
            blocks[CODE] = [f"<|s_{code}|>" for code in codes]
        if self.layout == "separate":
            blocks[DURATION] = [f"<|d_{length}|>" for length in lengths]
        if not self.is_delayed:
            for codebook in range(1, self.num_quantizers):
                names = [f"<|a{codebook}_{code}|>" for code in range(self.acoustic_codebook_size)]
                blocks[acoustic_block(codebook)] = names
        return blocks

    @classmethod
    def for_codec(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        codec_config: PreTrainedConfig,
        layout: str = "parallel",
        num_quantizers: int = 1,
        acoustic_layout: str = "delay",
    ) -> FlexiCodecSpeechVocabulary:
        """A vocabulary with the sizes of a codec's [`FlexiCodecConfig`]."""
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
        """The vocabulary saved in a tokenizer. Raises `ValueError` if there is none."""
        settings = tokenizer.init_kwargs.get(SETTINGS_KEY)
        if settings is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has no speech vocabulary: add one with "
                f"`{cls.__name__}.for_codec(tokenizer, codec.config)`."
            )
        return cls(tokenizer, **settings)

    @classmethod
    def from_pretrained(cls, model_id: str, **kwargs: Any) -> FlexiCodecSpeechVocabulary:
        """
        Load a tokenizer by `AutoTokenizer.from_pretrained(model_id, **kwargs)`, with the vocabulary
        saved in it.
        """
        return cls.from_tokenizer(AutoTokenizer.from_pretrained(model_id, **kwargs))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> tuple[str, ...]:
        """
        The same as `tokenizer.save_pretrained`, which saves this vocabulary in
        `tokenizer_config.json`.
        """
        return self.tokenizer.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """The same as `tokenizer.push_to_hub`, which pushes this vocabulary, too."""
        return self.tokenizer.push_to_hub(repo_id, **kwargs)

    def resize_embeddings(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """
        Give a language model embeddings for all ids. Their number never shrinks.

        Args:
            model (`PreTrainedModel`): The tokenizer's model.
            kwargs: Passed to `model.resize_token_embeddings`, for example `pad_to_multiple_of`.
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
    def num_fills(self) -> int:
        """Number of `<|speech_fill|>` at the end of speech."""
        return self.num_quantizers - 1 if self.is_delayed else 0

    @property
    def first_code_id(self) -> int:
        """
        Id of semantic code 0. The others follow; with `"joint"` each code has an id for every
        length.
        """
        return self.tokens.first_ids[CODE]

    @property
    def duration_ids(self) -> tuple[int, int]:
        """
        First id that holds a length, and how many there are. With `"joint"` these are the ids of
        the codes.
        """
        name = DURATION if self.layout == "separate" else CODE
        return self.tokens.first_ids[name], self.tokens.sizes[name]

    def is_speech(self, input_ids: Tensor) -> Tensor:
        """Mask of the ids that are speech, including its markers."""
        return self.tokens.contains(input_ids)

    def is_code(self, input_ids: Tensor) -> Tensor:
        """
        Mask of the ids with which a speech token begins: its semantic code (with its length if
        `"joint"`).
        """
        return (input_ids >= self.first_code_id) & (input_ids < self.first_code_id + self.tokens.sizes[CODE])

    def delayed_positions(self, starts: Tensor) -> Tensor:
        """
        Positions `(num_quantizers - 1, num_tokens)` of the acoustic codes of tokens at `starts`.
        """
        return starts + torch.arange(1, self.num_quantizers, device=starts.device)[:, None]

    def encode(self, audio_codes: Any, token_lengths: Any = None, markers: bool = True) -> dict[str, Tensor]:
        """
        The stream of one clip.

        Args:
            audio_codes (`torch.LongTensor` of shape `(num_quantizers, num_tokens)`, or an array or lists):
                Codes of the clip, without padding. Codebooks beyond the vocabulary's
                `num_quantizers` are not used.
            token_lengths (`torch.LongTensor` of shape `(num_tokens,)`, or an array or a list, *optional*):
                Codec frames of each token. One each by default.
            markers (`bool`, *optional*, defaults to `True`):
                Whether to put the speech between `<|speech|>` and `<|/speech|>`.

        Returns:
            `dict[str, torch.Tensor]` with

            - **input_ids** (`torch.LongTensor` of shape `(length,)`),
            - **token_lengths** (`torch.LongTensor` of shape `(length,)`) with `layout="parallel"`,
            - **acoustic_codes** (`torch.LongTensor` of shape `(num_quantizers - 1, length)`) with
              delayed acoustic codes.

        Raises:
            ValueError: A shape or dtype is wrong, or a code or duration is out of its range.
        """
        codes = as_integers("audio_codes", audio_codes)
        if codes.ndim != 2 or codes.shape[0] < self.num_quantizers:
            raise ValueError(
                f"`audio_codes` must have the shape (num_quantizers, num_tokens), with at least {self.num_quantizers} "
                f"codebooks, got {tuple(codes.shape)}."
            )
        num_tokens = codes.shape[1]
        if token_lengths is None:
            lengths = codes.new_ones(num_tokens)
        else:
            lengths = as_integers("token_lengths", token_lengths).to(codes.device)
        if lengths.shape != (num_tokens,):
            raise ValueError(
                f"`token_lengths` must have the shape (num_tokens,) = ({num_tokens},), got {tuple(lengths.shape)}."
            )
        semantic, acoustic = codes[0], codes[1 : self.num_quantizers]
        _check_range("codebook 0 of `audio_codes`", semantic, 0, self.codebook_size - 1)
        _check_range("an acoustic codebook of `audio_codes`", acoustic, 0, self.acoustic_codebook_size - 1)
        _check_range("`token_lengths`", lengths, 1, self.max_frames_per_token)

        # 1. One column for each id of a token
        first_ids = self.tokens.first_ids
        columns = [self.first_code_id + semantic]
        if self.layout == "joint":
            columns = [self.first_code_id + semantic * self.max_frames_per_token + lengths - 1]
        elif self.layout == "separate":
            columns.append(first_ids[DURATION] + lengths - 1)
        if not self.is_delayed:
            columns += [first_ids[acoustic_block(i)] + column for i, column in enumerate(acoustic, start=1)]
        ids = torch.stack(columns, dim=1)
        channel = torch.zeros_like(ids)
        channel[:, 0] = lengths
        ids, channel = ids.flatten(), channel.flatten()

        # 2. What comes around the tokens
        ids = F.pad(ids, (0, self.num_fills), value=first_ids.get(self.fill_token, 0))
        if markers:
            ids = F.pad(ids, (1, 0), value=first_ids[self.start_token])
            ids = F.pad(ids, (0, 1), value=first_ids[self.end_token])

        # 3. The channels
        stream = {"input_ids": ids}
        if self.is_parallel:
            stream["token_lengths"] = F.pad(channel, (int(markers), self.num_fills + int(markers)))
        if self.is_delayed:
            delayed = acoustic.new_full((self.num_fills, len(ids)), self.acoustic_codebook_size)
            starts = torch.arange(num_tokens, device=ids.device) + int(markers)
            stream["acoustic_codes"] = delayed.scatter_(1, self.delayed_positions(starts), acoustic)
        return stream

    def encode_prompt(self, audio_codes: Any, token_lengths: Any = None) -> dict[str, Tensor]:
        """
        The stream of a clip that a language model is to continue: `<|speech|>` and the tokens, but
        no end. Delayed acoustic codes that would come after the last token are left out.

        Args:
            audio_codes, token_lengths: The same as for [`~FlexiCodecSpeechVocabulary.encode`].

        Returns:
            `dict[str, torch.Tensor]`: A stream.
        """
        num_closing = 1 + self.num_fills
        return {name: value[..., :-num_closing] for name, value in self.encode(audio_codes, token_lengths).items()}

    def decode(
        self, input_ids: Tensor, token_lengths: Tensor | None = None, acoustic_codes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Codes and token lengths of a stream that is one clip, with both markers or with none.

        Args:
            input_ids (`torch.LongTensor` of shape `(length,)`):
                Ids. [`~FlexiCodecSpeechVocabulary.speech_spans`] finds the clips in a stream of
                text and speech.
            token_lengths (`torch.LongTensor` of shape `(length,)`, *optional*):
                The channel of token lengths, required with `layout="parallel"`.
            acoustic_codes (`torch.LongTensor` of shape `(num_quantizers - 1, length)`, *optional*):
                The channel of acoustic codes, required with delayed acoustic codes.

        Returns:
            `audio_codes` (`torch.LongTensor` of shape `(num_quantizers, num_tokens)`) and
            `token_lengths` (`torch.LongTensor` of shape `(num_tokens,)`). `codec.decode` takes them
            with a batch dimension in front.

        Raises:
            MalformedSpeechError: The stream is not one that `encode` makes. `position` is where it
                first differs.
            ValueError: A channel is missing or has the wrong shape.
        """
        return SpeechStream(self, input_ids, token_lengths, acoustic_codes).decode()

    def repair(
        self, input_ids: Tensor, token_lengths: Tensor | None = None, acoustic_codes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """
        Turn a stream that a language model cut off or got wrong into one that `decode` takes. All
        whole tokens before the end of speech are kept, in order. The rest is dropped: a code
        without its length, a delayed token without its last acoustic codes, text in between, a
        length out of range. Nothing is invented.

        Args:
            input_ids, token_lengths, acoustic_codes: The same as for
                [`~FlexiCodecSpeechVocabulary.decode`].

        Returns:
            `dict[str, torch.Tensor]`: A stream with both markers, without tokens if none was whole.
        """
        return self.encode(*SpeechStream(self, input_ids, token_lengths, acoustic_codes).whole_tokens())

    def render(
        self, input_ids: Tensor, token_lengths: Tensor | None = None, acoustic_codes: Tensor | None = None
    ) -> str:
        """
        A stream as a string for people, even if it is malformed: text as text, and each speech
        token as `CODE×LENGTH`, with its acoustic codes after slashes. `tokenizer.decode` gives the
        full names of the tokens instead.

        Args:
            input_ids, token_lengths, acoustic_codes: The same as for
                [`~FlexiCodecSpeechVocabulary.decode`].
        """
        return SpeechStream(self, input_ids, token_lengths, acoustic_codes).render()

    def speech_spans(self, input_ids: Tensor) -> list[slice]:
        """
        Find the speech in ids `(length,)` of text and speech, as slices that include the markers.
        Speech without an end marker ends where the next speech begins, or with the ids.
        """
        kinds = self.tokens.kinds(as_integers("input_ids", input_ids))
        starts = (kinds == self.tokens.kind(self.start_token)).nonzero()[:, 0].tolist()
        ends = (kinds == self.tokens.kind(self.end_token)).nonzero()[:, 0]
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
            parts: Texts, as `str` (tokenized without special tokens) or as a list of ids, and
                streams.

        Returns:
            `dict[str, torch.Tensor]`: A stream. In the channels, text has no length and no acoustic
            codes.
        """
        streams = [part if isinstance(part, dict) else self._text(part) for part in parts]
        return {name: torch.cat([stream[name] for stream in streams], dim=-1) for name in self.channels}

    def pad(
        self,
        streams: Sequence[dict[str, Tensor]],
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, Tensor]:
        """
        A batch of streams.

        Args:
            streams: Streams; their `labels`, `duration_labels` and `acoustic_labels`, if any, are
                padded with -100.
            padding_side: `"right"`, or `"left"` as for prompts of `generate`.
            pad_to_multiple_of: If set, the length is a multiple of it.

        Returns:
            `dict[str, torch.Tensor]`: The tensors of the streams with a batch dimension in front,
            and `attention_mask` `(batch_size, length)`: 1 for ids, 0 for padding.

        Raises:
            ValueError: The tokenizer has no padding token.
        """
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no padding token: set one, for example `tokenizer.pad_token = tokenizer.eos_token`."
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

    def _text(self, text: str | Sequence[int]) -> dict[str, Tensor]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
        stream = {"input_ids": torch.tensor(ids, dtype=torch.long)}
        if self.is_speech(stream["input_ids"]).any():
            raise ValueError("A text holds the name of a speech token: pass speech as a stream, which `encode` makes.")
        stream["token_lengths"] = torch.zeros_like(stream["input_ids"])
        shape = self.num_quantizers - 1, len(ids)
        stream["acoustic_codes"] = torch.full(shape, self.acoustic_codebook_size)
        return {name: stream[name] for name in self.channels}


def _check_range(name: str, values: Tensor, lowest: int, highest: int) -> None:
    if values.numel() and (int(values.min()) < lowest or int(values.max()) > highest):
        position = int(((values < lowest) | (values > highest)).nonzero()[:, -1].min())
        raise ValueError(
            f"{name} must be between {lowest} and {highest}, got {values[..., position].tolist()} at token {position}."
        )


__all__ = ["IGNORE_INDEX", "FlexiCodecSpeechVocabulary"]
