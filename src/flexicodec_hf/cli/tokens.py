"""Files of tokens: what `encode` writes and `decode` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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


@dataclass(frozen=True)
class TokensRow:
    """
    A row of a Parquet file that `tokenize` wrote.

    Args:
        path: The file.
        row: Counted from 0.
        stem: Name of a file to make of it: the clip's id and the setting, without what no file name should have.
        table: The row, as an Arrow table.
        settings: How all rows were made, as text.
    """

    path: Path
    row: int
    stem: str
    table: Any = field(compare=False, repr=False)
    settings: Mapping[str, str] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}"


_ROW_COLUMNS = [
    "id",
    "audio_codes",
    "token_lengths",
    "merging_threshold",
    "target_frame_rate",
    "frame_rate",
    "sampling_rate",
    "num_samples",
]


def parquet_rows(path: Path) -> list[TokensRow]:
    """
    The rows of a Parquet file of tokens.

    Raises:
        CommandError: There is no such file, or it is not one that `tokenize` wrote.
    """
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ImportError as error:
        raise CommandError(f"{path}: Parquet files need `datasets`: pip install datasets.") from error

    if not path.is_file():
        raise CommandError(f"{path}: there is no such file.")
    try:
        schema = pq.read_schema(path)
        missing = [name for name in _ROW_COLUMNS if name not in schema.names]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
        table = pq.read_table(path, columns=_ROW_COLUMNS, partitioning=None)
        told = json.loads((schema.metadata or {}).get(b"flexicodec_hf", "{}"))
    except (ArrowException, ValueError) as error:
        raise CommandError(f"{path}: not a file of tokens from `tokenize`: {error}.") from error
    settings = {"model": told["settings"]["model"]} if "settings" in told else {}
    rows = []
    names = table.select(["id", "merging_threshold", "target_frame_rate"]).to_pylist()
    for i, (clip, threshold, rate) in enumerate(row.values() for row in names):
        setting = f"{threshold:g}" if rate is None else f"{rate:g}hz"
        stem = re.sub(r"[^\w.=+-]+", "_", f"{clip}-{setting}").lstrip(".")
        rows.append(TokensRow(path, i, stem, table.slice(i, 1), settings))
    return rows


def read_tokens(source: Path | TokensRow) -> Tokens:
    """
    Read a file of tokens, or a row of one.

    Raises:
        CommandError: There is no such file, or it is not one that `encode` or `tokenize` wrote.
    """
    if isinstance(source, TokensRow):
        values = source.table.to_pylist()[0]
        try:
            codes, lengths = (
                torch.from_numpy(np.array(values[name], dtype=np.int32)) for name in ("audio_codes", "token_lengths")
            )
            numbers = int(values["num_samples"]), int(values["sampling_rate"]), float(values["frame_rate"])
        except (TypeError, ValueError, OverflowError) as error:
            raise CommandError(f"{source}: malformed tokens ({error}).") from error
        return _checked(source, Tokens(codes, lengths, *numbers, source.settings))
    settings = read_settings(source)
    try:
        numbers = int(settings["num_samples"]), int(settings["sampling_rate"]), float(settings["frame_rate"])
        with safe_open(source, framework="pt") as file:
            codes, lengths = file.get_tensor("audio_codes"), file.get_tensor("token_lengths")
    except (KeyError, ValueError, SafetensorError) as error:
        raise CommandError(
            f"{source}: not a file of tokens from `encode`: missing or malformed entry ({error})."
        ) from error
    return _checked(source, Tokens(codes, lengths, *numbers, settings))


def _checked(source: Path | TokensRow, tokens: Tokens) -> Tokens:
    codes, lengths = tokens.audio_codes, tokens.token_lengths
    if (
        codes.ndim != 2
        or lengths.shape != codes.shape[1:]
        or codes.dtype != torch.int32
        or lengths.dtype != torch.int32
    ):
        raise CommandError(
            f"{source}: not tokens from `encode`: `audio_codes` {tuple(codes.shape)} {codes.dtype} and "
            f"`token_lengths` {tuple(lengths.shape)} {lengths.dtype} are not int32 of shapes (num_quantizers, num_tokens) "
            "and (num_tokens,)."
        )
    num_frames = int(lengths.sum())
    positive = min(tokens.num_samples, tokens.sampling_rate) > 0 and bool((lengths > 0).all())
    # The codec drops up to two frames at the end of a clip.
    if not (positive and -2 <= num_frames - tokens.seconds * tokens.frame_rate < 1):
        raise CommandError(
            f"{source}: the tokens cover {num_frames} frames, which does not fit its {tokens.num_samples} samples at "
            f"{tokens.sampling_rate} Hz and {tokens.frame_rate} frames per second: the file is damaged."
        )
    return tokens


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
