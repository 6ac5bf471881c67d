"""Batches for `Trainer`: utterances of text and speech, and conversations with spoken turns."""

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
    Batches of utterances with text and speech, from rows that `flexicodec-hf tokenize` writes.

    A row has `text` (`str`), `audio_codes` `(num_quantizers, num_tokens)` and `token_lengths`
    `(num_tokens,)`. Columns that `parts` does not name may be missing. Each utterance becomes a
    stream that begins with the tokenizer's bos token and ends with its eos token, if the tokenizer
    has them.

    Args:
        vocabulary (`FlexiCodecSpeechVocabulary`):
            Vocabulary of the speech.
        parts (`tuple[str, ...]`, *optional*, defaults to `("text", "speech")`):
            Parts of a stream, in this order: `("text", "speech")` for text-to-speech, `("speech",
            "text")` for speech recognition, `("speech",)` to continue speech.
        labels_on (`tuple[str, ...]`, *optional*, defaults to `("speech",)`):
            Parts that have labels. All other labels are -100. Eos has a label if the last part has.
        pad_to_multiple_of (`int`, *optional*):
            Pad batches to a multiple of this length.
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"right"` or `"left"`.

    Returns:
        Calling it on a list of rows returns a `dict[str, torch.Tensor]` with `input_ids`,
        `attention_mask` and `labels` `(batch_size, length)`. A parallel layout adds `token_lengths`
        and `duration_labels` of the same shape, delayed acoustic codes add `acoustic_codes` and
        `acoustic_labels` `(batch_size, num_quantizers - 1, length)`. A label
        stands at the position of what it labels: the model shifts `labels` and `acoustic_labels`,
        and predicts a duration where it reads the code.

    Raises:
        ValueError: A row lacks a column, or its codes and lengths are out of range.
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
            raise ValueError(
                f"`labels_on` {self.labels_on} names what `parts` {self.parts} does not: add it to `parts`."
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        streams = [self._stream(index, row) for index, row in enumerate(rows)]
        return self.vocabulary.pad(streams, self.padding_side, self.pad_to_multiple_of)

    def _stream(self, index: int, row: Mapping[str, Any]) -> dict[str, Tensor]:
        vocabulary, tokenizer = self.vocabulary, self.vocabulary.tokenizer
        sections: list[tuple[Any, bool]] = []  # what is joined, and whether it has labels
        for part in self.parts:
            column = "text" if part == "text" else "audio_codes"
            if row.get(column) is None:
                raise ValueError(f"Row {index} of the batch has no `{column}`, which `parts` {self.parts} require.")
            section = row["text"] if part == "text" else vocabulary.encode(row[column], row.get("token_lengths"))
            sections.append((section, part in self.labels_on))
        if tokenizer.bos_token_id is not None:
            sections.insert(0, ([tokenizer.bos_token_id], False))
        if tokenizer.eos_token_id is not None:
            sections.append(([tokenizer.eos_token_id], self.parts[-1] in self.labels_on))
        streams = [vocabulary.join([section]) for section, _ in sections]
        masks = [
            torch.full_like(stream["input_ids"], is_labeled, dtype=torch.bool)
            for stream, (_, is_labeled) in zip(streams, sections, strict=True)
        ]
        return _with_labels(vocabulary, vocabulary.join(streams), torch.cat(masks))


@dataclass
class SpeechChatCollator:
    """
    Batches of conversations with spoken turns, laid out by the tokenizer's chat template.

    A row has `messages`, each with a `role` and a `content`: a `str`, or a list of parts in any
    order, which are `{"type": "text", "text": ...}` or `{"type": "audio", "audio_codes": ...,
    "token_lengths": ...}`. Other keys of a message are passed to the template unchanged.

    Args:
        vocabulary (`FlexiCodecSpeechVocabulary`):
            Vocabulary of the speech. Its tokenizer has the chat template.
        roles (`tuple[str, ...]`, *optional*, defaults to `("assistant",)`):
            Roles whose turns have labels: everything after the template's generation prompt,
            including the end of the turn.
        labels_on (`tuple[str, ...]`, *optional*, defaults to `("text", "speech")`):
            What has labels in these turns. All other labels are -100.
        pad_to_multiple_of (`int`, *optional*):
            Pad batches to a multiple of this length.
        padding_side (`str`, *optional*, defaults to `"right"`):
            `"right"` or `"left"`.

    Returns:
        Calling it on a list of rows returns the same tensors as [`SpeechTextCollator`].

    Raises:
        ValueError: A message is malformed, a text holds the name of a speech token, or the template
            changes earlier turns when later ones follow, so that the ids of a turn cannot be found.
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
            streams.append(self._stream(self._ids(messages), clips, self._labeled_spans(messages)))
        return self.vocabulary.pad(streams, self.padding_side, self.pad_to_multiple_of)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """
        The stream of a conversation that ends with the template's generation prompt, for `generate`
        to continue.
        """
        flat, clips = self._flatten(messages)
        stream = self._stream(self._ids(flat, add_generation_prompt=True), clips, [])
        return {name: value for name, value in stream.items() if not name.endswith("labels")}

    def _flatten(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
        """
        Messages with strings as content, in which a pair of markers stands for each clip, and the
        clips.
        """
        vocabulary = self.vocabulary
        flat, clips = [], []
        for index, message in enumerate(messages):
            content = message["content"]
            pieces = []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    pieces.append(part["text"])
                    if vocabulary.start_token in part["text"] or vocabulary.end_token in part["text"]:
                        raise ValueError(
                            f"The text of message {index} holds the name of a speech token: pass speech as a part of "
                            "type 'audio'."
                        )
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

    def _labeled_spans(self, messages: list[dict[str, Any]]) -> list[slice]:
        """The ids of the turns that have labels."""
        whole = self._ids(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] not in self.roles:
                continue
            before = self._ids(messages[:index], add_generation_prompt=True)
            after = whole if index == len(messages) - 1 else self._ids(messages[: index + 1])
            if whole[: len(after)] != after or after[: len(before)] != before:
                raise ValueError(
                    f"The chat template does not append message {index} to the messages before it and its generation "
                    "prompt, so the ids of this message cannot be found: use another template, or other `roles`."
                )
            spans.append(slice(len(before), len(after)))
        return spans

    def _stream(self, ids: list[int], clips: list[dict[str, Tensor]], labeled_spans: list[slice]) -> dict[str, Tensor]:
        vocabulary = self.vocabulary
        all_ids = torch.tensor(ids, dtype=torch.long)
        is_labeled = torch.zeros_like(all_ids, dtype=torch.bool)
        for span in labeled_spans:
            is_labeled[span] = True
        spans = vocabulary.speech_spans(all_ids)
        if len(spans) != len(clips) or int(vocabulary.is_speech(all_ids).sum()) != 2 * len(clips):
            raise ValueError(
                "A text holds the name of a speech token, or the chat template drops or moves clips: compare the "
                "messages with what the template makes of them."
            )
        streams, masks = [], []
        previous = 0
        for span, clip in zip([*spans, slice(len(ids), len(ids))], [*clips, None], strict=True):
            streams.append(vocabulary.join([ids[previous : span.start]]))
            masks.append(is_labeled[previous : span.start] & ("text" in self.labels_on))
            if clip is not None:
                streams.append(clip)
                has_labels = bool(is_labeled[span.start]) and "speech" in self.labels_on
                masks.append(torch.full_like(clip["input_ids"], has_labels, dtype=torch.bool))
            previous = span.stop
        return _with_labels(vocabulary, vocabulary.join(streams), torch.cat(masks))


def _with_labels(
    vocabulary: FlexiCodecSpeechVocabulary, stream: dict[str, Tensor], labeled: Tensor
) -> dict[str, Tensor]:
    """A stream with labels where the mask `labeled` `(length,)` is True."""
    stream = {**stream, "labels": stream["input_ids"].masked_fill(~labeled, IGNORE_INDEX)}
    if vocabulary.is_parallel:
        is_token = labeled & (stream["token_lengths"] > 0)
        stream["duration_labels"] = stream["token_lengths"].masked_fill(~is_token, IGNORE_INDEX)
    if vocabulary.is_delayed:
        is_code = labeled & (stream["acoustic_codes"] < vocabulary.acoustic_codebook_size)
        stream["acoustic_labels"] = stream["acoustic_codes"].masked_fill(~is_code, IGNORE_INDEX)
    return stream


__all__ = ["SpeechChatCollator", "SpeechTextCollator"]
