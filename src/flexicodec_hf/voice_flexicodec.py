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
        """
        tensors = {}
        for threshold, (codes, lengths) in self.tokens.items():
            tensors[f"audio_codes/{threshold}"] = codes.to("cpu", torch.int32).contiguous()
            tensors[f"token_lengths/{threshold}"] = lengths.to("cpu", torch.int32).contiguous()
        if self.mel is not None:
            tensors["mel"] = self.mel.float().cpu().contiguous()
        if self.text_ids is not None:
            tensors["text_ids"] = self.text_ids.to("cpu", torch.int32).contiguous()
        save_file(tensors, path, metadata={"format": "flexicodec_voice", "voice": json.dumps(self.metadata)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> FlexiCodecVoice:
        """
        Read a voice that `save` wrote.

        Raises:
            ValueError: There is no such file, or it holds no voice.
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
        text_ids = tensors.get("text_ids")
        return cls(
            tokens={
                float(threshold): (tensors[prefix + threshold].long(), tensors[f"token_lengths/{threshold}"].long())
                for threshold in thresholds
            },
            mel=tensors.get("mel"),
            text_ids=None if text_ids is None else text_ids.long(),
            metadata=json.loads(header.get("voice", "{}")),
        )


__all__ = ["FlexiCodecVoice"]
