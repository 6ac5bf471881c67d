"""The ids of speech in a text tokenizer, and streams of such ids read back into codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase


if TYPE_CHECKING:
    from .vocabulary import FlexiCodecSpeechVocabulary

# Where tokenizer_config.json keeps the vocabulary's settings: they are saved, pushed and loaded
# with the tokenizer.
SETTINGS_KEY = "flexicodec_speech"

# Names of blocks, as error messages use them. The blocks of the markers have the names of their
# tokens.
CODE = "a code"
DURATION = "a duration"


def acoustic_block(codebook: int) -> str:
    """Name of the block of an acoustic codebook, counted from 1."""
    return f"a code of codebook {codebook}"


class MalformedSpeechError(ValueError):
    """
    Ids that are not speech in the vocabulary's layout.

    Args:
        position: Index of the first fault in the ids.
        fault: What is wrong there.
    """

    def __init__(self, position: int, fault: str):
        super().__init__(f"Malformed speech at position {position}: {fault}")
        self.position = position


class SpeechTokens:
    """
    Blocks of consecutive ids in a tokenizer: the markers, the codes, the durations and the acoustic
    codes.

    Args:
        tokenizer: The tokens are added to it, unless it already has them with the same settings.
        blocks: Names of the tokens in each block.
        settings: Settings of the vocabulary, stored in the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, blocks: dict[str, list[str]], settings: dict[str, Any]):
        self.tokenizer = tokenizer
        self.names = list(blocks)
        self.sizes = {name: len(block) for name, block in blocks.items()}
        tokens = [token for block in blocks.values() for token in block]
        self._add(tokens, settings)
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
        first = int(ids[0])
        if not torch.equal(ids, torch.arange(first, first + len(tokens))):
            raise ValueError(
                "The speech tokens of the tokenizer do not have consecutive ids: it was changed after it was saved. "
                "Start from the tokenizer without speech tokens."
            )
        self.boundaries = torch.tensor([first, *(first + np.cumsum(list(self.sizes.values())))])
        self.first_ids = dict(zip(self.names, self.boundaries.tolist(), strict=False))

    def _add(self, tokens: list[str], settings: dict[str, Any]) -> None:
        known = self.tokenizer.init_kwargs.get(SETTINGS_KEY)
        if known is None:
            vocab = self.tokenizer.get_vocab()
            if (taken := next((token for token in tokens if token in vocab), None)) is not None:
                raise ValueError(
                    f"The tokenizer already has a token {taken!r} with another meaning: use another tokenizer."
                )
            added = [AddedToken(token, normalized=False, special=True) for token in tokens]
            self.tokenizer.add_tokens(added, special_tokens=True)
            self.tokenizer.init_kwargs[SETTINGS_KEY] = settings
        elif known != settings:
            raise ValueError(
                f"The tokenizer already has another speech vocabulary: {known}, not {settings}. Load it with "
                "`FlexiCodecSpeechVocabulary.from_tokenizer(tokenizer)`, or start from a tokenizer without one."
            )

    def contains(self, ids: Tensor) -> Tensor:
        """Mask of the ids that belong to any block."""
        return (ids >= self.boundaries[0]) & (ids < self.boundaries[-1])

    def kind(self, name: str) -> int:
        """Index of a block."""
        return self.names.index(name)

    def kinds(self, ids: Tensor) -> Tensor:
        """For each id the index of its block, -1 for text."""
        kinds = torch.bucketize(ids, self.boundaries.to(ids.device), right=True) - 1
        return kinds.masked_fill(kinds == len(self.names), -1)

    def describe(self, token_id: int) -> str:
        """A token for an error message."""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return repr(token) if token is not None else f"the id {token_id}"


class SpeechStream:
    """
    A stream of a vocabulary, to be read.

    Args:
        vocabulary: The vocabulary.
        input_ids: Ids `(length,)`.
        token_lengths: The channel of token lengths `(length,)`, if the layout has it.
        acoustic_codes: The channel of acoustic codes `(num_quantizers - 1, length)`, if the layout
            has it.

    Raises:
        ValueError: A channel is missing, or a shape or dtype is wrong.
    """

    def __init__(
        self,
        vocabulary: FlexiCodecSpeechVocabulary,
        input_ids: Tensor,
        token_lengths: Tensor | None,
        acoustic_codes: Tensor | None,
    ):
        self.vocabulary, self.tokens = vocabulary, vocabulary.tokens
        self.ids = as_integers("input_ids", input_ids)
        if self.ids.ndim != 1:
            raise ValueError(
                f"`input_ids` must have the shape (length,), got {tuple(self.ids.shape)}: pass one stream at a time."
            )
        length = len(self.ids)
        self.lengths = self._channel("token_lengths", token_lengths, (length,))
        self.acoustic = self._channel("acoustic_codes", acoustic_codes, (vocabulary.num_quantizers - 1, length))
        self.kinds = self.tokens.kinds(self.ids)

    def _channel(self, name: str, values: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        if name not in self.vocabulary.channels:
            return None
        if values is None:
            raise ValueError(f"`{name}` is missing: in this vocabulary's layout it is a channel beside the ids.")
        values = as_integers(name, values).to(self.ids.device)
        if tuple(values.shape) != shape:
            raise ValueError(f"`{name}` must have the shape {shape} to match the ids, got {tuple(values.shape)}.")
        return values

    def decode(self) -> tuple[Tensor, Tensor]:
        """
        `audio_codes` and `token_lengths` of a stream that is one clip, or `MalformedSpeechError`.
        """
        vocabulary, tokens = self.vocabulary, self.tokens
        opened = len(self.ids) > 0 and bool(self.kinds[0] == tokens.kind(vocabulary.start_token))
        first, last, closed = int(opened), len(self.ids), False
        if len(ends := (self.kinds == tokens.kind(vocabulary.end_token)).nonzero()):
            last, closed = int(ends[0]), True

        # 1. The ids
        body = self.kinds[first:last]
        expected = self._expected_kinds(body)
        shared = min(len(body), len(expected))
        wrong = (body[:shared] != expected[:shared]).nonzero()
        fault: tuple[int, str] | None = None
        if len(wrong):
            fault = int(wrong[0]), tokens.names[int(expected[wrong[0]])]
        elif len(body) < len(expected):
            fault = len(body), tokens.names[int(expected[len(body)])]
        elif len(body) > len(expected) or closed != opened:
            fault = len(expected), vocabulary.end_token if opened else "nothing more"
        elif last + closed < len(self.ids):
            fault = len(body) + 1, "nothing more"
        if fault is not None:
            position = first + fault[0]
            found = tokens.describe(int(self.ids[position])) if position < len(self.ids) else "the end"
            raise MalformedSpeechError(position, f"expected {fault[1]}, got {found}.")

        # 2. The channels
        num_slots = len(body) - vocabulary.num_fills
        starts = first + torch.arange(0, num_slots, len(vocabulary.pattern), device=self.ids.device)
        if self.lengths is not None:
            allowed = torch.zeros_like(self.lengths)
            allowed[starts] = self.lengths[starts].clamp(1, vocabulary.max_frames_per_token)
            rule = f"1 to {vocabulary.max_frames_per_token} at a code and 0 elsewhere"
            _check_channel("token_lengths", self.lengths, allowed, rule)
        if self.acoustic is not None:
            none = vocabulary.acoustic_codebook_size
            slots = vocabulary.delayed_positions(starts)
            allowed = torch.full_like(self.acoustic, none)
            allowed.scatter_(1, slots, self.acoustic.gather(1, slots).clamp(0, none - 1))
            rule = f"0 to {none - 1} in codebook r, r positions after each code, and {none} elsewhere"
            _check_channel("acoustic_codes", self.acoustic, allowed, rule)
        return self._read(starts)

    def whole_tokens(self) -> tuple[Tensor, Tensor]:
        """`audio_codes` and `token_lengths` of all whole tokens before the end of speech."""
        vocabulary, tokens = self.vocabulary, self.tokens
        pattern = self.kinds.new_tensor(vocabulary.pattern)
        ended = (self.kinds == tokens.kind(vocabulary.end_token)).cumsum(dim=0) > 0
        starts = ((self.kinds == tokens.kind(CODE)) & ~ended).nonzero()[:, 0]
        slots = starts[:, None] + torch.arange(len(pattern), device=self.ids.device)
        whole = (F.pad(self.kinds, (0, len(pattern)), value=-1)[slots] == pattern).all(dim=1)
        if self.lengths is not None:
            whole &= (self.lengths[starts] >= 1) & (self.lengths[starts] <= vocabulary.max_frames_per_token)
        if self.acoustic is not None:
            padded = F.pad(self.acoustic, (0, vocabulary.num_quantizers), value=-1)
            codes = padded.gather(1, vocabulary.delayed_positions(starts))
            whole &= ((codes >= 0) & (codes < vocabulary.acoustic_codebook_size)).all(dim=0)
        return self._read(starts[whole])

    def render(self) -> str:
        """The stream as a string for people."""
        vocabulary, tokens = self.vocabulary, self.tokens
        names = ["text", *tokens.names]
        pieces: list[str] = []
        text: list[int] = []
        for position, (token_id, kind) in enumerate(zip(self.ids.tolist(), self.kinds.tolist(), strict=True)):
            name = names[kind + 1]
            if name == "text":
                text.append(token_id)
                continue
            if text:
                pieces.append(tokens.tokenizer.decode(text))
                text = []
            pieces.append(self._render_token(name, token_id - tokens.first_ids[name], position))
            if self.acoustic is not None and name in (CODE, vocabulary.fill_token):
                none = vocabulary.acoustic_codebook_size
                codes = self.acoustic[:, position].tolist()
                pieces.append("".join("/-" if code == none else f"/{code}" for code in codes))
        if text:
            pieces.append(tokens.tokenizer.decode(text))
        return "".join(pieces)

    def _render_token(self, name: str, value: int, position: int) -> str:
        vocabulary = self.vocabulary
        if name == vocabulary.start_token:
            return name
        if name == vocabulary.end_token:
            return f" {name}"
        if name == vocabulary.fill_token:
            return " ·"
        if name == DURATION:
            return f"×{value + 1}"
        if name != CODE:
            return f"/{value}"
        if vocabulary.layout == "joint":
            code, duration = divmod(value, vocabulary.max_frames_per_token)
            return f" {code}×{duration + 1}"
        return f" {value}" if self.lengths is None else f" {value}×{int(self.lengths[position])}"

    def _expected_kinds(self, body: Tensor) -> Tensor:
        """The kinds of the speech that begins with `body`, up to the end of its last token."""
        vocabulary = self.vocabulary
        pattern = body.new_tensor(vocabulary.pattern)
        if not vocabulary.is_delayed:
            return pattern.repeat(-(-len(body) // len(pattern)))
        num_codes = int((body == pattern).long().cumprod(dim=0).sum())
        fill = self.tokens.kind(vocabulary.fill_token)
        return F.pad(pattern.repeat(num_codes), (0, vocabulary.num_fills), value=fill)

    def _read(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """`audio_codes` and `token_lengths` of the whole tokens that begin at `starts`."""
        vocabulary, first_ids = self.vocabulary, self.tokens.first_ids
        semantic = self.ids[starts] - first_ids[CODE]
        if vocabulary.layout == "joint":
            lengths = semantic % vocabulary.max_frames_per_token + 1
            semantic = semantic // vocabulary.max_frames_per_token
        elif vocabulary.layout == "separate":
            lengths = self.ids[starts + 1] - first_ids[DURATION] + 1
        else:
            assert self.lengths is not None
            lengths = self.lengths[starts]
        codes = [semantic[None]]
        if self.acoustic is not None:
            codes.append(self.acoustic.gather(1, vocabulary.delayed_positions(starts)))
        elif vocabulary.num_quantizers > 1:
            codebooks = range(1, vocabulary.num_quantizers)
            slots = len(vocabulary.pattern) - vocabulary.num_quantizers + self.ids.new_tensor(list(codebooks))
            first = self.ids.new_tensor([first_ids[acoustic_block(codebook)] for codebook in codebooks])
            codes.append((self.ids[starts[:, None] + slots] - first).T)
        return torch.cat(codes), lengths


def as_integers(name: str, values: Any) -> Tensor:
    """An argument as an int64 tensor."""
    if not isinstance(values, Tensor):
        values = torch.from_numpy(np.asarray(values))
        if values.numel() == 0:
            values = values.long()
    if values.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"`{name}` must be integers, got {values.dtype}.")
    return values.long()


def _check_channel(name: str, values: Tensor, allowed: Tensor, rule: str) -> None:
    if len(wrong := (values != allowed).nonzero()):
        position = int(wrong[:, -1].min())
        found = values[..., position].tolist()
        raise MalformedSpeechError(position, f"expected `{name}` to be {rule}, got {found}.")
