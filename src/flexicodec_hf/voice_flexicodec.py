"""
A voice to speak with: tokens and mel spectrogram (or latents) of a short recording, encoded once
and used again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class FlexiCodecVoice:
    """
    A voice of [`FlexiCodecForTextToSpeech`], encoded from a recording by its `encode_voice`. All
    tensors are on the CPU.

    A voice works with the codec that made it: the tokens of another codec mean something else.

    Args:
        tokens (`dict[float, tuple[Tensor, Tensor]]`):
            For each merging threshold, the semantic codes and the token lengths in codec frames,
            both `torch.LongTensor` of shape `(num_tokens,)`.
        mel (`torch.FloatTensor` of shape `(num_frames, num_mel_bins)`, *optional*):
            What the Voicebox imitates: the normalized log mel spectrogram at 50 Hz, or the codec's
            decoder latents at 12.5 Hz (without merging) if the Voicebox predicts latents.
        text_ids (`torch.LongTensor` of shape `(num_ids,)`, *optional*):
            Ids of what the recording says, which go in front of the ids of a text. Without them,
            only the tokens go in front: speech is less clear, and words of the recording may leak
            into it.
        metadata (`dict[str, str]`):
            Anything worth storing with the voice: `"text"` (what the recording says), `"name"`,
            `"license"`, ...

    Example:

    ```python
    >>> voice = model.encode_voice(**processor(audio="me.wav", reference_text="what I said"))
    >>> voice.save("me.safetensors")
    >>> model.voices["me"] = FlexiCodecVoice.load("me.safetensors")
    >>> model.generate(**processor("Hello there."), voice="me")
    ```
    """

    tokens: dict[float, tuple[Tensor, Tensor]]
    mel: Tensor | None = None
    text_ids: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def tokens_at(self, merging_threshold: float) -> tuple[Tensor, Tensor]:
        """
        The tokens at a merging threshold.

        Returns:
            Semantic codes and token lengths in codec frames, both `torch.LongTensor` of shape
            `(num_tokens,)`.

        Raises:
            ValueError: The voice was not encoded at this threshold.
        """
        for threshold, tokens in self.tokens.items():
            if math.isclose(threshold, merging_threshold, abs_tol=1e-6):
                return tokens
        raise ValueError(
            f"The voice has no tokens at `merging_threshold`={merging_threshold}, only at {sorted(self.tokens)}: "
            f"encode it again with `model.encode_voice(..., merging_thresholds=[{merging_threshold}])`."
        )

    def save(self, path: str | PathLike[str]) -> None:
        """
        Write the voice to a `.safetensors` file (about 25 kB for each second of the recording).

        Raises:
            OSError: The file cannot be written.
        """
        tensors = {}
        for threshold, (codes, lengths) in self.tokens.items():
            tensors[f"audio_codes/{threshold}"] = codes.to("cpu", torch.int32).contiguous()
            tensors[f"token_lengths/{threshold}"] = lengths.to("cpu", torch.int32).contiguous()
        if self.mel is not None:
            tensors["mel"] = self.mel.float().cpu().contiguous()
        if self.text_ids is not None:
            tensors["text_ids"] = self.text_ids.to("cpu", torch.int32).contiguous()
        try:
            save_file(tensors, path, metadata={"format": "flexicodec_voice", "voice": json.dumps(self.metadata)})
        except SafetensorError as error:
            raise OSError(f"{path}: the voice cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FlexiCodecVoice:
        """
        Read a voice that `save` wrote.

        Raises:
            ValueError: There is no such file, it holds no voice, or a tensor in it is wrong.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path}: there is no such voice file.")
        try:
            with safe_open(path, "pt") as file:
                header: Mapping[str, Any] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        prefix = "audio_codes/"
        thresholds = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        if header.get("format") != "flexicodec_voice" or not thresholds:
            raise ValueError(f"{path} holds no voice: make one with `model.encode_voice(...).save(path)`.")
        try:
            tokens = {float(one): (tensors[prefix + one], tensors[f"token_lengths/{one}"]) for one in thresholds}
            metadata = json.loads(header.get("voice", "{}"))
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds a damaged voice ({error}): encode the recording again.") from error
        voice = cls(tokens, tensors.get("mel"), tensors.get("text_ids"), metadata)
        try:
            voice.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        voice.tokens = {threshold: (codes.long(), lengths.long()) for threshold, (codes, lengths) in tokens.items()}
        voice.text_ids = None if voice.text_ids is None else voice.text_ids.long()
        return voice

    def check(self, codebook_size: int | None = None, max_frames_per_token: int | None = None) -> None:
        """
        Check that a model can speak with the voice.

        Args:
            codebook_size: Size of the codec's semantic codebook, if it is known.
            max_frames_per_token: How many codec frames a token of the codec covers at most, if known.

        Raises:
            ValueError: There are no tokens, codes or lengths are no whole numbers or out of range,
                or `mel`, `text_ids` or `metadata` are of a wrong kind.
        """
        if not self.tokens:
            raise ValueError("The voice has no tokens: encode the recording again.")
        for threshold, (codes, lengths) in self.tokens.items():
            if not -1 <= threshold <= 1:
                raise ValueError(f"A merging threshold of the voice is {threshold}, not between -1 and 1.")
            for name, tensor, low, high in (
                ("codes", codes, 0, None if codebook_size is None else codebook_size - 1),
                ("token lengths", lengths, 1, max_frames_per_token),
            ):
                if not torch.is_tensor(tensor) or tensor.dtype not in _INTEGERS or tensor.shape != codes.shape[:1]:
                    raise ValueError(
                        f"The {name} of the voice at merging threshold {threshold} must be integers of shape "
                        f"(num_tokens,), the same for codes and lengths, got {_kind(tensor)}: encode the recording "
                        "again."
                    )
                if len(tensor) == 0:
                    raise ValueError(f"The voice has no tokens at merging threshold {threshold}: encode it again.")
                smallest, largest = int(tensor.min()), int(tensor.max())
                if smallest < low or (high is not None and largest > high):
                    raise ValueError(
                        f"The {name} of the voice at merging threshold {threshold} must be at least {low}"
                        f"{'' if high is None else f' and at most {high}'}, got values from {smallest} to {largest}: "
                        "the voice is damaged, or was made with another codec."
                    )
        mel, text_ids = self.mel, self.text_ids
        if mel is not None and not (torch.is_tensor(mel) and mel.ndim == 2 and mel.is_floating_point()):
            raise ValueError(f"`mel` of the voice must be floats (num_frames, num_mel_bins), got {_kind(mel)}.")
        if mel is not None and not mel.isfinite().all():
            raise ValueError("`mel` of the voice holds NaN or infinite values: encode the recording again.")
        if text_ids is not None and not (
            torch.is_tensor(text_ids) and text_ids.ndim == 1 and text_ids.dtype in _INTEGERS
        ):
            raise ValueError(f"`text_ids` of the voice must be integers (num_ids,), got {_kind(text_ids)}.")
        if not isinstance(self.metadata, Mapping):
            raise ValueError(f"`metadata` of the voice must be a dictionary, got {self.metadata!r}.")


def _kind(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if torch.is_tensor(value) else repr(value)


__all__ = ["FlexiCodecVoice"]
