"""Data sets to evaluate on: folders, tables, and `datasets`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..audio_flexicodec import AudioError, read_audio, resample
from .common import SAMPLING_RATE, EvaluationError, require


METADATA_FILES = ("metadata.jsonl", "metadata.csv")
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
# Usual names of columns, the first that is there is taken.
AUDIO_COLUMNS = ("audio", "file_name", "path", "file", "audio_filepath")
TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text")
REFERENCE_COLUMN, REFERENCE_TEXT_COLUMN = "reference_audio", "reference_text"
_AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"} | {".opus"}


@dataclass(frozen=True)
class Clip:
    """
    One item of a data set. Its audio is read when it is asked for.

    Args:
        name: Of the item in its data set: the path of its file, or its number.
        text: What is said; `None` if unknown.
        audio: A file, the bytes of one, or `None` if the item has no audio (a text to speak).
        reference_audio: For text-to-speech, a recording of the voice to speak with; a file or the bytes of one.
        reference_text: What is said in it.
    """

    name: str
    text: str | None = None
    audio: Path | bytes | None = None
    reference_audio: Path | bytes | None = None
    reference_text: str | None = None

    def waveform(self) -> np.ndarray | None:
        """`(num_samples,)` at 16 kHz, float32; `None` if there is no audio. Raises [`AudioError`]."""
        return None if self.audio is None else self._read(self.audio)

    def reference_waveform(self) -> np.ndarray | None:
        """The recording of the voice, as `waveform`."""
        return None if self.reference_audio is None else self._read(self.reference_audio)

    def _read(self, audio: Path | bytes) -> np.ndarray:
        if isinstance(audio, Path):
            return read_audio(audio, SAMPLING_RATE).waveform
        try:
            samples, sampling_rate = soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{self.name}: not audio, or damaged: {error.error_string}") from error
        waveform = resample(samples.mean(axis=1), sampling_rate, SAMPLING_RATE)
        if not len(waveform) or not np.isfinite(waveform).all():
            raise AudioError(f"{self.name}: the audio is empty, or has NaN or infinite samples.")
        return waveform


def load_clips(
    data: str | Path,
    config_name: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    audio_column: str | None = None,
    text_column: str | None = None,
) -> Iterable[Clip]:
    """
    The items of a data set.

    Args:
        data: One of

            - a folder with `metadata.jsonl` or `metadata.csv` (paths relative to it), or else with audio files, at any
              depth, and the text of each in a `.txt` of the same name;
            - a `.jsonl`, `.csv` or `.tsv` with a column of paths (relative to it);
            - an audio file;
            - a Hub id, a folder of `datasets.load_from_disk`, or whatever else `datasets.load_dataset` takes.
        config_name: Of the data set on the Hub.
        split: Of a data set of `datasets`. By default `test`, or the only one.
        streaming: Do not download the data set first. Read what is needed.
        audio_column: By default, the first of `audio`, `file_name`, `path`, `file`, `audio_filepath`. A table may lack it,
            for texts to speak.
        text_column: By default, the first of `text`, `transcription`, `transcript`, `sentence`, `normalized_text`; clips
            without a text have no error rates. The columns `reference_audio` and `reference_text` hold voices to speak with.

    Returns:
        The clips, in the order of the data set.

    Raises:
        EvaluationError: There is no such data set, split or column; or a package is missing.
    """
    path = Path(data)
    if path.is_dir():
        metadata = next((path / name for name in METADATA_FILES if (path / name).is_file()), None)
        if metadata is not None:
            return _table_clips(metadata, audio_column, text_column)
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _AUDIO_SUFFIXES)
        if files:
            return [Clip(file.relative_to(path).as_posix(), _text_beside(file), file) for file in files]
    elif path.is_file():
        if path.suffix.lower() in TABLE_SUFFIXES:
            return _table_clips(path, audio_column, text_column)
        return [Clip(path.name, _text_beside(path), path)]
    return _dataset_clips(str(data), config_name, split, streaming, audio_column, text_column)


def _text_beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else None


def _table_clips(table: Path, audio_column: str | None, text_column: str | None) -> list[Clip]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        if table.suffix.lower() in (".csv", ".tsv"):
            rows: list[dict[str, Any]] = list(csv.DictReader(file, delimiter="," if table.suffix == ".csv" else "\t"))
        else:
            try:
                rows = [json.loads(line) for line in file if line.strip()]
            except json.JSONDecodeError as error:
                raise EvaluationError(f"{table}: not a JSON object a line: {error}") from error
    if not rows:
        raise EvaluationError(f"{table}: there are no rows in it.")
    make = _clip_maker(str(table), list(rows[0]), audio_column, text_column)

    def audio_of(value: str | None) -> Path | None:
        return table.parent / value if value else None

    return [make(i, row, audio_of) for i, row in enumerate(rows)]


def _dataset_clips(
    data: str,
    config_name: str | None,
    split: str | None,
    streaming: bool,
    audio_column: str | None,
    text_column: str | None,
) -> Iterator[Clip]:
    datasets = require("datasets", "a data set of `datasets`")
    try:
        if (Path(data) / "state.json").is_file() or (Path(data) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(data)
        else:
            loaded = datasets.load_dataset(data, config_name, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        advice = " Pass --streaming, which needs no torchcodec." if isinstance(cause, ImportError) else ""
        raise EvaluationError(f"cannot load the data set {data}: {str(cause).splitlines()[0]}{advice}") from error
    if isinstance(loaded, Mapping):
        splits = list(loaded)
        chosen = split or ("test" if "test" in splits else splits[0] if len(splits) == 1 else None)
        if chosen not in splits:
            raise EvaluationError(f"the data set {data} has the splits {', '.join(splits)}: pass one as --split.")
        loaded = loaded[chosen]
    elif split is not None:
        raise EvaluationError(f"the data set {data} has no splits: leave --split {split} out.")

    # Arrow's own rows: the bytes or the path of the audio, where `datasets` would decode it, which takes torchcodec.
    tables = loaded.with_format("arrow").iter(batch_size=1)
    first = next(tables, None)
    if first is None:
        raise EvaluationError(f"the data set {data} is empty.")
    make = _clip_maker(f"the data set {data}", first.column_names, audio_column, text_column)

    def audio_of(value: Any) -> Path | bytes | None:
        if not isinstance(value, Mapping):
            return Path(value) if value else None
        if value.get("bytes") is not None:
            return value["bytes"]
        if value.get("path") is None:
            return None
        if Path(value["path"]).is_file():
            return Path(value["path"])
        with datasets.utils.file_utils.xopen(value["path"], "rb") as file:  # on the Hub, or in an archive
            return file.read()

    def clips() -> Iterator[Clip]:
        yield make(0, first.to_pylist()[0], audio_of)
        for i, table in enumerate(tables, start=1):
            yield make(i, table.to_pylist()[0], audio_of)

    return clips()


def _clip_maker(source: str, columns: list[str], audio_column: str | None, text_column: str | None) -> Any:
    """`make(index, row, audio_of)` for rows of these columns."""
    audio = _column(source, columns, audio_column, AUDIO_COLUMNS)
    text = _column(source, columns, text_column, TEXT_COLUMNS)
    if audio is None and text is None:
        raise EvaluationError(
            f"{source}: no column of audio or text among {', '.join(columns)}: pass --audio-column or --text-column."
        )
    return partial(_make_clip, audio, text)


def _column(source: str, columns: list[str], asked: str | None, usual: tuple[str, ...]) -> str | None:
    if asked is not None and asked not in columns:
        raise EvaluationError(f"{source}: there is no column {asked}; there are {', '.join(columns)}.")
    return asked or next((name for name in usual if name in columns), None)


def _make_clip(audio: str | None, text: str | None, index: int, row: Mapping[str, Any], audio_of: Any) -> Clip:
    value = row[audio] if audio else None
    path = value.get("path") if isinstance(value, Mapping) else value
    return Clip(
        name=str(path) if path else f"{index:06d}",
        text=(row[text] or None) if text else None,
        audio=audio_of(value),
        reference_audio=audio_of(row.get(REFERENCE_COLUMN)),
        reference_text=row.get(REFERENCE_TEXT_COLUMN),
    )
