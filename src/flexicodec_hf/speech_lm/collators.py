"""Batches for `Trainer`: speech beside its text, and turns of a conversation that hold both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .vocabulary import IGNORE_INDEX, FlexiCodecSpeechVocabulary


_MODALITIES = ("text", "speech")


@dataclass
class SpeechTextCollator:
    """
    Batches of utterances, each a stream of its parts, as rows of `flexicodec-hf tokenize` hold them.

    A row has `text` (`str`), `audio_codes` `(num_quantizers, num_tokens)` and `token_lengths` `(num_tokens,)`; what
    `parts` does not name may be missing. A stream begins with the tokenizer's bos token and ends with its eos token, if
    it has them.

    Args:
        vocabulary (`FlexiCodecSpeechVocabulary`):
            Lays out the speech.
        parts (`tuple[str, ...]`, *optional*, defaults to `("text", "speech")`):
            What a stream holds, in this order: `("text", "speech")` to speak, `("speech", "text")` to transcribe,
            `("speech",)` to go on speaking.
        labels_on (`tuple[str, ...]`, *optional*, defaults to `("speech",)`):
            The parts that have labels; other labels are -100. Eos has one if the last part has.
        pad_to_multiple_of (`int`, *optional*):
            If set, batches are padded to a multiple of this length.
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"right"` or `"left"`.

    Returns:
        Calling it on a list of rows gives a `dict[str, torch.Tensor]` with `input_ids`, `attention_mask` and `labels`
        `(batch_size, length)`; with a parallel layout also `token_lengths` and `duration_labels`, with delayed acoustic
        codes also `acoustic_codes` and `acoustic_labels` `(batch_size, num_quantizers - 1, length)`. Labels are those of
        their position: the model shifts `labels` and `acoustic_labels`, and predicts a duration where its code is read.

    Raises:
        ValueError: A row lacks a part, or codes and durations that the vocabulary refuses.
    """

    vocabulary: FlexiCodecSpeechVocabulary
    parts: tuple[str, ...] = ("text", "speech")
    labels_on: tuple[str, ...] = ("speech",)
    pad_to_multiple_of: int | None = None
    padding_side: str = "right"

    def __post_init__(self) -> None:
        for name, values in (("parts", self.parts), ("labels_on", self.labels_on)):
            if not values or set(values) - set(_MODALITIES):
                raise ValueError(f"`{name}` must name 'text', 'speech' or both, got {values}.")
        if set(self.labels_on) - set(self.parts):
            raise ValueError(f"`labels_on` {self.labels_on} names what `parts` {self.parts} does not hold.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        streams = [self._stream(index, row) for index, row in enumerate(rows)]
        return self.vocabulary.pad(streams, self.padding_side, self.pad_to_multiple_of)

    def _stream(self, index: int, row: Mapping[str, Any]) -> dict[str, Tensor]:
        vocabulary, tokenizer = self.vocabulary, self.vocabulary.tokenizer
        sections: list[tuple[Any, bool]] = []
        for part in self.parts:
            column = "text" if part == "text" else "audio_codes"
            if row.get(column) is None:
                raise ValueError(f"Row {index} of the batch has no `{column}`, which `parts` {self.parts} needs.")
            section = (
                row["text"] if part == "text" else vocabulary.encode(row["audio_codes"], row.get("token_lengths"))
            )
            sections.append((section, part in self.labels_on))
        if tokenizer.bos_token_id is not None:
            sections.insert(0, ([tokenizer.bos_token_id], False))
        if tokenizer.eos_token_id is not None:
            sections.append(([tokenizer.eos_token_id], self.parts[-1] in self.labels_on))
        streams = [vocabulary.join([section]) for section, _ in sections]
        labelled = [
            torch.full_like(stream["input_ids"], learnt, dtype=torch.bool)
            for stream, (_, learnt) in zip(streams, sections, strict=True)
        ]
        return _with_labels(vocabulary, vocabulary.join(streams), torch.cat(labelled))


@dataclass
class SpeechChatCollator:
    """
    Batches of conversations with spoken turns, laid out by the tokenizer's chat template.

    A row has `messages`, each with a `role` and a `content`: a `str`, or a list of parts, `{"type": "text", "text": ...}`
    or `{"type": "audio", "audio_codes": ..., "token_lengths": ...}` in any order. Other keys of a message go to the
    template as they are.

    Args:
        vocabulary (`FlexiCodecSpeechVocabulary`):
            Lays out the speech; its tokenizer has the chat template.
        roles (`tuple[str, ...]`, *optional*, defaults to `("assistant",)`):
            Whose turns have labels: what the template puts behind its generation prompt, the end of the turn included.
        labels_on (`tuple[str, ...]`, *optional*, defaults to `("text", "speech")`):
            What of these turns has labels; other labels are -100.
        pad_to_multiple_of (`int`, *optional*):
            If set, batches are padded to a multiple of this length.
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"right"` or `"left"`.

    Returns:
        As [`SpeechTextCollator`].

    Raises:
        ValueError: A message is malformed, a text holds names of speech tokens, or the template changes earlier turns
            when later ones come (so that nobody can tell which ids are whose).
    """

    vocabulary: FlexiCodecSpeechVocabulary
    roles: tuple[str, ...] = ("assistant",)
    labels_on: tuple[str, ...] = ("text", "speech")
    pad_to_multiple_of: int | None = None
    padding_side: str = "right"

    def __post_init__(self) -> None:
        if not self.labels_on or set(self.labels_on) - set(_MODALITIES):
            raise ValueError(f"`labels_on` must name 'text', 'speech' or both, got {self.labels_on}.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        streams = []
        for row in rows:
            messages, clips = self._flatten(row["messages"])
            streams.append(self._stream(self._ids(messages), clips, self._learnt_ids(messages)))
        return self.vocabulary.pad(streams, self.padding_side, self.pad_to_multiple_of)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The stream of a conversation, with the template's generation prompt behind it: what `generate` goes on from."""
        flat, clips = self._flatten(messages)
        stream = self._stream(self._ids(flat, add_generation_prompt=True), clips, [])
        return {name: value for name, value in stream.items() if not name.endswith("labels")}

    def _flatten(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
        """Messages whose content is a string, with a pair of markers in the place of each clip; and the clips."""
        vocabulary = self.vocabulary
        flat, clips = [], []
        for index, message in enumerate(messages):
            content = message["content"]
            pieces = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    pieces.append(part["text"])
                    if vocabulary.start_token in part["text"] or vocabulary.end_token in part["text"]:
                        raise ValueError(f"The text of message {index} holds the name of a speech token.")
                elif part["type"] == "audio":
                    pieces.append(vocabulary.start_token + vocabulary.end_token)
                    clips.append(vocabulary.encode(part["audio_codes"], part.get("token_lengths")))
                else:
                    raise ValueError(
                        f"Message {index}: a part must be of type 'text' or 'audio', got {part['type']!r}."
                    )
            flat.append({**message, "content": "".join(pieces)})
        return flat, clips

    def _ids(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> list[int]:
        if not messages:
            return []
        return self.vocabulary.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )

    def _learnt_ids(self, messages: list[dict[str, Any]]) -> list[slice]:
        """Which ids of the whole conversation are those of turns to learn."""
        whole = self._ids(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] not in self.roles:
                continue
            before = self._ids(messages[:index], add_generation_prompt=True)
            after = whole if index == len(messages) - 1 else self._ids(messages[: index + 1])
            if whole[: len(after)] != after or after[: len(before)] != before:
                raise ValueError(
                    f"The chat template does not put message {index} behind what it makes of the messages before it and "
                    "its generation prompt, so its labels cannot be told: use another template, or other `roles`."
                )
            spans.append(slice(len(before), len(after)))
        return spans

    def _stream(self, ids: list[int], clips: list[dict[str, Tensor]], learnt: list[slice]) -> dict[str, Tensor]:
        vocabulary = self.vocabulary
        all_ids = torch.tensor(ids, dtype=torch.long)
        is_learnt = torch.zeros_like(all_ids, dtype=torch.bool)
        for span in learnt:
            is_learnt[span] = True
        spans = vocabulary.speech_spans(all_ids)
        if len(spans) != len(clips) or int(vocabulary.is_speech(all_ids).sum()) != 2 * len(clips):
            raise ValueError("A text holds the name of a speech token, or the chat template drops or moves clips.")
        streams, labelled = [], []
        previous = 0
        for span, clip in zip([*spans, slice(len(ids), len(ids))], [*clips, None], strict=True):
            streams.append(vocabulary.join([ids[previous : span.start]]))
            labelled.append(is_learnt[previous : span.start] & ("text" in self.labels_on))
            if clip is not None:
                streams.append(clip)
                learn = bool(is_learnt[span.start]) and "speech" in self.labels_on
                labelled.append(torch.full_like(clip["input_ids"], learn, dtype=torch.bool))
            previous = span.stop
        return _with_labels(vocabulary, vocabulary.join(streams), torch.cat(labelled))


def _with_labels(
    vocabulary: FlexiCodecSpeechVocabulary, stream: dict[str, Tensor], learnt: Tensor
) -> dict[str, Tensor]:
    """A stream with labels where `learnt` `(length,)` is true."""
    stream = {**stream, "labels": stream["input_ids"].masked_fill(~learnt, IGNORE_INDEX)}
    if vocabulary.is_parallel:
        is_token = learnt & (stream["token_lengths"] > 0)
        stream["duration_labels"] = stream["token_lengths"].masked_fill(~is_token, IGNORE_INDEX)
    if vocabulary.is_delayed:
        is_code = learnt & (stream["acoustic_codes"] < vocabulary.acoustic_codebook_size)
        stream["acoustic_labels"] = stream["acoustic_codes"].masked_fill(~is_code, IGNORE_INDEX)
    return stream


__all__ = ["SpeechChatCollator", "SpeechTextCollator"]
