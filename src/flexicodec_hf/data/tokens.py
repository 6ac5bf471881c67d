"""The tokens of a clip: a safetensors file of its own, or a row of a Parquet file."""

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

from .files import DataError, require


# Metadata of a Parquet file: JSON with `settings`, `summary` and `versions`.
METADATA_KEY = b"flexicodec_hf"

_TENSORS = ("audio_codes", "token_lengths")
_NUMBERS = {"num_samples": int, "sampling_rate": int, "frame_rate": float}
_RATES = ("merging_threshold", "target_frame_rate")


@dataclass(frozen=True)
class Tokens:
    """
    The tokens of one clip.

    Args:
        audio_codes: `(num_quantizers, num_tokens)`, int32.
        token_lengths: `(num_tokens,)`, int32, the codec frames that each token covers.
        num_samples: Length of the clip at `sampling_rate`.
        sampling_rate: Sampling rate of the codec, in hertz.
        frame_rate: Frame rate of the codec, in hertz.
        merging_threshold: The threshold that merged the frames, if known.
        target_frame_rate: The tokens per second that the threshold was chosen for, if any.
        metadata: The `model` and whatever else is known, as strings.

    Raises:
        DataError: The shapes, types and numbers do not fit together.
    """

    audio_codes: Tensor
    token_lengths: Tensor
    num_samples: int
    sampling_rate: int
    frame_rate: float
    merging_threshold: float | None = None
    target_frame_rate: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        codes, lengths = self.audio_codes, self.token_lengths
        if (
            codes.ndim != 2
            or lengths.shape != codes.shape[1:]
            or codes.dtype != torch.int32
            or lengths.dtype != torch.int32
        ):
            raise DataError(
                f"`audio_codes` {tuple(codes.shape)} {codes.dtype} and `token_lengths` {tuple(lengths.shape)} "
                f"{lengths.dtype} are not int32 of shapes (num_quantizers, num_tokens) and (num_tokens,)."
            )
        if codes.numel() == 0:
            raise DataError(f"there are no tokens: `audio_codes` have the shape {tuple(codes.shape)}.")
        num_frames = int(lengths.sum(dtype=torch.int64))
        # No audio has such numbers, and floats can hold those below them.
        plausible = 0 < self.num_samples < 2**53 and 0 < self.sampling_rate < 2**31 and 0 < self.frame_rate < 1e6
        positive = plausible and bool((lengths > 0).all())
        # The codec drops up to two frames at the end of a clip.
        if not (positive and -2 <= num_frames - self.seconds * self.frame_rate < 1):
            raise DataError(
                f"the tokens cover {num_frames} frames, which does not fit its {self.num_samples} samples at "
                f"{self.sampling_rate} Hz and {self.frame_rate} frames per second: the file is damaged."
            )

    @property
    def seconds(self) -> float:
        return self.num_samples / self.sampling_rate

    @property
    def settings(self) -> dict[str, Any]:
        """What decided the codes. With a target rate, the threshold was found for the clip and is not among them."""
        rate = "merging_threshold" if self.target_frame_rate is None else "target_frame_rate"
        return {
            "model": self.metadata.get("model"),
            "num_quantizers": len(self.audio_codes),
            rate: getattr(self, rate),
        }

    def save(self, path: Path) -> None:
        """Write a safetensors file, with all but the tensors in its metadata."""
        numbers = {name: getattr(self, name) for name in (*_NUMBERS, *_RATES)} | {
            "num_quantizers": len(self.audio_codes)
        }
        save_file(
            {name: getattr(self, name).contiguous() for name in _TENSORS},
            path,
            metadata={**self.metadata, **{name: str(value) for name, value in numbers.items() if value is not None}},
        )


@dataclass(frozen=True)
class TokenSource:
    """
    A safetensors file of tokens, or a row of a Parquet file.

    Args:
        path: The file.
        stem: Name of a file to make of the tokens, without its suffix.
        row: Number of the row, from 0.
        table: The row, as an Arrow table.
        metadata: Of the Parquet file's tokens.
    """

    path: Path
    stem: str
    row: int | None = None
    table: Any = field(default=None, compare=False, repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.path) if self.row is None else f"{self.path}, row {self.row}"

    def read(self) -> Tokens:
        """Read the tokens. Raises [`DataError`] if there is no such file, or it does not hold tokens."""
        if not self.path.is_file():
            raise DataError(f"{self.path}: there is no such file.")
        try:
            if self.row is None:
                with safe_open(self.path, framework="pt") as file:
                    metadata = file.metadata() or {}
                    values = {**metadata, **{name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
            else:
                metadata, values = dict(self.metadata), self.table.to_pylist()[0]
                values |= {name: torch.from_numpy(np.array(values[name], dtype=np.int32)) for name in _TENSORS}
            numbers: dict[str, Any] = {name: kind(values[name]) for name, kind in _NUMBERS.items()}
            numbers |= {name: float(values[name]) for name in _RATES if values.get(name) is not None}
            tensors = {name: values[name] for name in _TENSORS}
        except (KeyError, TypeError, ValueError, OverflowError, SafetensorError) as error:
            raise DataError(
                f"{self}: not tokens from `encode` or `tokenize`: missing or malformed entry ({error})."
            ) from error
        try:
            return Tokens(**tensors, **numbers, metadata=metadata)
        except DataError as error:
            raise DataError(f"{self}: {error}") from error


def token_sources(path: Path) -> list[TokenSource]:
    """
    What a file of tokens holds: itself, or all rows if it is a Parquet file.

    Raises:
        DataError: A Parquet file does not exist, or was not written by `flexicodec-hf tokenize`.
    """
    if path.suffix != ".parquet":
        return [TokenSource(path, path.stem)]
    pq = require("pyarrow.parquet", f"{path}: a Parquet file", "train")
    from pyarrow import ArrowException

    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    try:
        schema = pq.read_schema(path)
        columns = ["id", *_TENSORS, *_NUMBERS, *_RATES]
        missing = [name for name in columns if name not in schema.names]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
        table = pq.read_table(path, columns=columns, partitioning=None)
        metadata = json.loads((schema.metadata or {}).get(METADATA_KEY, "{}"))
        model = {"model": metadata["settings"]["model"]} if "settings" in metadata else {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ArrowException) as error:
        raise DataError(f"{path}: not a file of tokens from `tokenize`: {error}.") from error
    sources = []
    names = table.select(["id", *_RATES]).to_pylist()
    for i, (clip, threshold, rate) in enumerate(row.values() for row in names):
        setting = f"{threshold:g}" if rate is None else f"{rate:g}hz"
        stem = re.sub(r"[^\w.=+-]+", "_", f"{clip}-{setting}").lstrip(".")
        sources.append(TokenSource(path, stem, i, table.slice(i, 1), model))
    return sources
