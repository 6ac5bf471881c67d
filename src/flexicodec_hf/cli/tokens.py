"""Files of tokens: what `encode` writes and `decode` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .common import CommandError


@dataclass(frozen=True)
class Tokens:
    """
    The tokens of one clip.

    Args:
        audio_codes: `(num_quantizers, num_tokens)`, integers.
        token_lengths: `(num_tokens,)`, integers: frames of each token.
        num_samples: Of the clip, at `sampling_rate`.
        sampling_rate: Of the codec, in hertz.
        frame_rate: Of the codec, in hertz.
        settings: How it was encoded and with what, as text.
    """

    audio_codes: Tensor
    token_lengths: Tensor
    num_samples: int
    sampling_rate: int
    frame_rate: float
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.num_samples / self.sampling_rate

    def save(self, path: Path) -> None:
        tensors = {"audio_codes": self.audio_codes, "token_lengths": self.token_lengths}
        numbers = {
            "sampling_rate": str(self.sampling_rate),
            "num_samples": str(self.num_samples),
            "frame_rate": str(self.frame_rate),
        }
        save_file(
            {name: tensor.to("cpu", torch.int32).contiguous() for name, tensor in tensors.items()},
            path,
            metadata={**self.settings, **numbers},
        )


def read_tokens(path: Path) -> Tokens:
    """
    Read a file of tokens.

    Raises:
        CommandError: There is no such file, or it is not one that `encode` wrote.
    """
    settings = read_settings(path)
    try:
        numbers = int(settings["num_samples"]), int(settings["sampling_rate"]), float(settings["frame_rate"])
        with safe_open(path, framework="pt") as file:
            codes, lengths = file.get_tensor("audio_codes"), file.get_tensor("token_lengths")
    except (KeyError, ValueError, SafetensorError) as error:
        raise CommandError(
            f"{path}: not a file of tokens from `encode`: missing or malformed entry ({error})."
        ) from error
    if (
        codes.ndim != 2
        or lengths.shape != codes.shape[1:]
        or codes.dtype != torch.int32
        or lengths.dtype != torch.int32
    ):
        raise CommandError(
            f"{path}: not a file of tokens from `encode`: `audio_codes` {tuple(codes.shape)} {codes.dtype} and "
            f"`token_lengths` {tuple(lengths.shape)} {lengths.dtype} are not int32 of shapes (num_quantizers, num_tokens) "
            "and (num_tokens,)."
        )
    num_samples, sampling_rate, frame_rate = numbers
    num_frames = int(lengths.sum())
    positive = min(num_samples, sampling_rate) > 0 and bool((lengths > 0).all())
    # The codec drops up to two frames at the end of a clip.
    if not (positive and -2 <= num_frames - num_samples / sampling_rate * frame_rate < 1):
        raise CommandError(
            f"{path}: the tokens cover {num_frames} frames, which does not fit its {num_samples} samples at "
            f"{sampling_rate} Hz and {frame_rate} frames per second: the file is damaged."
        )
    return Tokens(codes, lengths, num_samples, sampling_rate, frame_rate, settings)


def read_settings(path: Path) -> dict[str, str]:
    """The metadata of a file of tokens. Raises [`CommandError`] if there is none."""
    if not path.is_file():
        raise CommandError(f"{path}: there is no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            settings = file.metadata()
    except SafetensorError as error:
        raise CommandError(f"{path}: not a file of tokens from `encode`: {error}.") from error
    return settings or {}
