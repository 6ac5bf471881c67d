"""Speech from any source: folders and tables of audio files, and whatever `datasets` loads, with the same columns."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TextIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import soundfile
from datasets import (
    Audio,
    Dataset,
    DatasetInfo,
    Features,
    IterableDataset,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.table import InMemoryTable, Table, cast_table_to_features, concat_tables

from ..audio_flexicodec import AudioClip, AudioError, AudioFile, audio_seconds, open_audio, read_audio
from .files import DataError


# Audio files in a folder: what libsndfile reads, and what it does not read, to be reported as broken.
AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw"}
AUDIO_SUFFIXES |= {".aac", ".aif", ".aifc", ".m4a", ".mka", ".mp4", ".oga", ".opus", ".webm", ".wma"}
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
# Usual names of columns, best first.
AUDIO_NAMES = ("audio", "file_name", "path", "file", "audio_filepath", "audio_path", "wav")
TEXT_NAMES = ("text", "transcription", "transcript", "sentence", "normalized_text", "txt", "json.text")
ID_NAMES = ("id", "__key__")

# An undecoded clip, as the type of a column. Not `Audio(decode=False)`: `datasets` asks for torchcodec when it encodes
# or streams that type. TODO: drop once `datasets` reads undecoded audio without torchcodec.
UNDECODED = {"bytes": Value("binary"), "path": Value("string")}
_AUDIO_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def load_speech(
    source: str | Path,
    *,
    config_name: str | None = None,
    split: str | None = None,
    default_split: str | None = None,
    revision: str | None = None,
    streaming: bool | None = False,
    audio_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    on_bad_row: Callable[[str], None] | None = None,
) -> Dataset | IterableDataset:
    """
    Load speech without decoding its audio.

    Args:
        source: One of

            - a folder of audio files, with subfolders. `metadata.jsonl`, `.csv`, `.tsv` or `.parquet` in any of
              them may describe files by a column of paths, such as `file_name`;
            - a `.jsonl`, `.json`, `.csv` or `.tsv` file with a column of paths or of texts to speak. Paths are
              relative to the file;
            - an audio file;
            - a `.parquet` or `.tar` (WebDataset) file, a folder of them, or a pattern (`"data/*.tar"`);
            - a folder that `save_to_disk` wrote;
            - the id of a dataset on the Hub.

            A text file `clip.txt` beside an audio file `clip.wav` is its text, if no metadata give one.
        config_name: The configuration of a dataset on the Hub.
        split: The split, or a part of it such as `"train[:1000]"` (not of a stream). By default the only one. A
            folder or table of files is one split, `train`, unless the folder has a subfolder named as the split.
        default_split: The split to take if `split` is `None` and there are several.
        revision: Branch, tag or commit of a dataset on the Hub.
        streaming: Read as needed and return an `IterableDataset`, instead of downloading (the Hub) or copying to
            the cache (Parquet and tar files) first. `None` streams only Parquet and tar files on disk.
        audio_column: By default the column of type `Audio`, else the first of `audio`, `file_name`, `path`, `file`,
            `audio_filepath`, `audio_path` and `wav`.
        text_column: A column, or a field `column.field` of one. By default the first of `text`, `transcription`,
            `transcript`, `sentence`, `normalized_text`, `txt` and `json.text`.
        id_column: By default `id` or `__key__`.
        on_bad_row: Called with a message for each file or row of a folder or table that cannot be used, such as a
            line that is no JSON; the others are loaded. By default the first one is an error.

    Returns:
        A dataset with the columns

        - `audio`: `{"path", "bytes"}` for [`decode_audio`], or `None` if there is none (a text to speak);
        - `text`: only if the source has it;
        - `id`: a string. Without a column of ids, the path of the file: as the source has it, but only the file name
          of absolute paths and URLs; `None` if the audio has no path;
        - `reference_audio` like `audio`, and `reference_text`, if the source has columns of these names;
        - all other columns. One whose name is taken by the above is called `source_...`.

    Raises:
        DataError: There is no such source, split or column, or it is empty.
    """
    path = Path(source)
    splits: Mapping[str, Dataset | IterableDataset]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(source))
        splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    else:
        name = (split or default_split or "").split("[")[0]
        given = _Columns(audio_column, text_column, id_column)
        files = _load_files(path, name, given, on_bad_row or _refuse)
        splits = files or _load_dataset(str(source), config_name, revision, streaming)
    dataset = _select(source, splits, split, default_split)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DataError(f"{source}: there are no rows in it.")
    try:
        dataset = standard_columns(dataset, audio_column, text_column, id_column)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return dataset.to_iterable_dataset() if streaming and isinstance(dataset, Dataset) else dataset


def decode_audio(audio: Mapping[str, Any] | None, sampling_rate: int) -> np.ndarray:
    """
    Decode an entry of the column `audio`.

    Args:
        audio: `{"path", "bytes"}`: the bytes of an audio file, or else its path or URL.
        sampling_rate: The rate to resample to, in hertz.

    Returns:
        The waveform `(num_samples,)`, float32 in [-1, 1], with its channels averaged.

    Raises:
        AudioError: There is no audio, or it is damaged, empty, or has NaN or infinite samples.
        OSError: A URL cannot be fetched.
    """
    return np.concatenate(list(read_clip(audio, sampling_rate)))


def read_clip(audio: Mapping[str, Any] | None, sampling_rate: int, in_blocks: bool = False) -> AudioClip | AudioFile:
    """The waveform of `decode_audio`, with the format of its file. With `in_blocks`, a file on disk is not held."""
    path, file = _audio_file(audio)
    if file is None and _is_url(path):
        try:
            with fsspec.open(path, "rb") as remote:
                file = io.BytesIO(remote.read())
        except FileNotFoundError as error:
            raise AudioError(f"{path}: there is no such file.") from error
    if in_blocks and file is None:
        return open_audio(path, sampling_rate)
    return read_audio(path, sampling_rate, file)


def audio_duration(audio: Mapping[str, Any] | None) -> float:
    """Seconds that an entry of the column `audio` lasts, from its header. Raises the errors of `decode_audio`."""
    path, file = _audio_file(audio)
    if file is None and _is_url(path):
        with fsspec.open(path, "rb") as remote:  # reads no more than it needs
            return audio_seconds(path, remote)
    return audio_seconds(path, file)


def _audio_file(audio: Mapping[str, Any] | None) -> tuple[str, BinaryIO | None]:
    path, contents = (None, None) if audio is None else (audio.get("path"), audio.get("bytes"))
    if path is None and contents is None:
        raise AudioError("the row has no audio.")
    return path or "the audio", None if contents is None else io.BytesIO(contents)


def _is_url(path: str) -> bool:
    return "://" in path


# Columns


def standard_columns(
    dataset: Dataset | IterableDataset,
    audio_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
) -> Dataset | IterableDataset:
    """
    Give the columns of a dataset of speech the names that [`load_speech`] describes, without decoding audio.

    Args:
        dataset: Any dataset with a column of audio, of paths of audio files, or of texts to speak.
        audio_column, text_column, id_column: How they are called now, if not as usual. See [`load_speech`].

    Raises:
        DataError: There is no such column, or no column of audio or text.
    """
    dataset = _with_features(dataset)
    features = Features({n: UNDECODED if isinstance(kind, Audio) else kind for n, kind in dataset.features.items()})
    for name in (audio_column, text_column, id_column):
        if name is not None and not _has(features, name):
            raise DataError(f"there is no column {name!r} among {list(features)}.")
    roles = {
        "audio": audio_column or _find_audio(features),
        "text": text_column or next((name for name in TEXT_NAMES if _has(features, name)), None),
        "id": id_column or _first(ID_NAMES, features),
    }
    if roles["audio"] is None and roles["text"] is None:
        raise DataError(_nothing_in(features))
    # The new columns, and what each is made of. One whose name is taken makes room.
    columns: dict[str, str | None] = {}
    for name in features:
        role = next((role for role, column in roles.items() if column == name), name)
        columns[f"source_{name}" if role == name and roles.get(name) not in (None, name) else role] = name
    columns |= {name: column for name, column in roles.items() if name not in columns and (column or name != "text")}
    types = Features({name: _type(name, features.get(column)) for name, column in columns.items()})
    if types == dataset.features and all(name == column for name, column in columns.items()):
        return dataset
    options = {"columns": columns, "features": features, "types": types}
    if isinstance(dataset, IterableDataset):
        for name, kind in dataset.features.items():
            if isinstance(kind, Audio):
                dataset = dataset.cast_column(name, UNDECODED)
        dataset = dataset.with_format("arrow")
        dataset = dataset.map(partial(_converted_row, **options), batched=True, batch_size=1, features=types)
        return dataset.with_format(None)
    dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
    return Dataset(_converted(dataset.data, **options), info=DatasetInfo(features=types), split=dataset.split)


class _Columns(NamedTuple):
    """The names of columns that a user gave."""

    audio: str | None
    text: str | None
    id: str | None


def _first(names: Iterable[str], columns: Iterable[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _nothing_in(columns: Iterable[str]) -> str:
    return f"there is no column of audio or text among {list(columns)}: pass `audio_column` or `text_column`."


def _with_features(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """A stream whose types are not known gets those of its first rows."""
    if dataset.features is not None:
        return dataset
    first = next(iter(dataset.with_format("arrow").iter(batch_size=100)), None)
    if first is None:
        raise DataError("there are no rows in it.")
    return dataset.cast(Features.from_arrow_schema(first.schema))


def _find_audio(features: Features) -> str | None:
    structs = [name for name in features if is_audio(features[name]) and name != "reference_audio"]
    if len(structs) > 1 and "audio" not in structs:
        raise DataError(f"which column holds the audio? Pass one of {structs} as `audio_column`.")
    return structs[0] if len(structs) == 1 else _first(AUDIO_NAMES, features)


def is_audio(feature: Any) -> bool:
    """Whether a column of this type holds undecoded audio."""
    return isinstance(feature, dict) and feature.keys() == UNDECODED.keys()


def _has(features: Features, name: str) -> bool:
    """Whether there is a column, or a field `column.field` of one."""
    column, _, field = name.partition(".")
    kind = features.get(column)
    return name in features or (isinstance(kind, dict) and field in kind)


def _type(name: str, feature: Any) -> Any:
    if name in ("audio", "reference_audio"):
        return feature if is_audio(feature) else UNDECODED
    return Value("string") if name in ("text", "id") else feature


def _converted(table: Table, columns: Mapping[str, str | None], features: Features, types: Features) -> Table:
    """A table with the new columns. Audio that it holds is not copied."""
    made: dict[str, Any] = {}
    for name, column in columns.items():
        if is_audio(types[name]) and not is_audio(features.get(column)):
            made[name] = _audio_entries([None] * len(table) if column is None else table[column].to_pylist())
        elif column is None:
            audio = made["audio"] if "audio" in made else table[columns["audio"]]
            made[name] = pa.array(map(_name_of, pc.struct_field(audio, ["path"]).to_pylist()), pa.string())
        elif column not in features:
            outer, _, field = column.partition(".")
            made[name] = pc.struct_field(table[outer].combine_chunks(), [field])
    sources = [f"new {name}" if name in made else column for name, column in columns.items()]
    if made:
        new = InMemoryTable.from_pydict({f"new {name}": column for name, column in made.items()})
        table = concat_tables([table, new], axis=1)
    return table.select(sources).rename_columns(list(columns)).cast(types.arrow_schema)


def _converted_row(row: pa.Table, features: Features, **options: Any) -> pa.Table:
    # The columns of WebDatasets change their places.
    return _converted(InMemoryTable(cast_table_to_features(row, features)), features=features, **options).table


def _audio_entries(audio: Iterable[Any]) -> pa.StructArray:
    """Entries of paths. What is an entry already, of another type because all its paths are missing, stays."""
    return pa.array([{"bytes": None, "path": one} if isinstance(one, str) else one for one in audio], _AUDIO_TYPE)


def _name_of(path: str | None) -> str | None:
    return None if path is None else PurePosixPath(path).name if _is_url(path) or os.path.isabs(path) else path


# Files and tables


def _refuse(message: str) -> None:
    raise DataError(message)


def _load_files(
    path: Path, split: str, given: _Columns, on_bad_row: Callable[[str], None]
) -> dict[str, Dataset] | None:
    """
    Audio files, and what tables and text files tell about them, as the only split; `None` if the path leads to
    something else.
    """
    name, folder = "train", path.parent
    # Names in the folder.
    tables: list[str] = []
    files: list[str] = []
    if path.is_dir():
        if split and (path / split).is_dir():
            name, path = split, path / split
        folder, found = path, _names(path)
        files = [file for file in found if PurePath(file).suffix.lower() in AUDIO_SUFFIXES]
        # One for each folder.
        described = [file for kind in reversed(METADATA_NAMES) for file in found if PurePath(file).name == kind]
        tables = [file for _, file in sorted({posixpath.dirname(file): file for file in described}.items())]
        if not files and not tables:
            if any(file.endswith((".parquet", ".arrow", ".tar")) for file in found):
                return None
            raise DataError(
                f"{path}: there are no audio files in this folder, no metadata, and no .parquet or .tar files."
            )
    elif path.suffix.lower() in {*AUDIO_SUFFIXES, *TABLE_SUFFIXES}:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file.")
        (tables if path.suffix.lower() in TABLE_SUFFIXES else files).append(path.name)
    else:
        return None

    rows = [row for file in tables for row in _described(folder, file, given, on_bad_row)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    audio = given.audio or "audio"
    id = given.id or _first(ID_NAMES, columns) or "id"
    text = given.text or _first(TEXT_NAMES, columns) or "text"
    named = {row.get(column) for row in rows for column in (audio, "reference_audio")}
    for file in files:
        place = os.path.join(folder, file)
        if not _is_unicode(file):
            on_bad_row(f"{place!a}: the name of the file is not UTF-8: rename it.")
        elif place not in named:
            rows.append({id: file, audio: place})
    for row in rows:
        beside = os.path.splitext(row.get(audio) or "")[0] + ".txt"
        if row.get(text) is None and os.path.isfile(beside):
            try:
                row[text] = Path(beside).read_text(encoding="utf-8").strip()
            except UnicodeDecodeError as error:
                on_bad_row(f"{beside}: a text in UTF-8 was expected: {error}")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return {name: Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})}
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path}: the rows of its tables do not fit together: {error}") from error


def _names(folder: Path) -> list[str]:
    """All files in a folder and its subfolders, relative to it, in order; without hidden ones."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(parent).relative_to(folder)
        found += [(inside / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _described(folder: Path, file: str, given: _Columns, on_bad_row: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of a table, with full paths of audio, and with ids."""
    rows = read_rows(folder / file, on_bad_row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    audio = given.audio or _first(AUDIO_NAMES, columns)
    if rows and given.audio is not None and given.audio not in columns:
        raise DataError(f"{folder / file}: there is no column {given.audio!r} among {columns}.")
    if rows and audio is None and not {given.text, *TEXT_NAMES} & {*columns}:
        raise DataError(f"{folder / file}: {_nothing_in(columns)}")
    for row in rows:
        for column in [name for name in row if name in (audio, "reference_audio")]:
            path = row.pop(column) or None
            if not isinstance(path, str | None):
                raise DataError(f"{folder / file}: the column {column!r} does not hold paths, but {str(path)[:40]!a}.")
            if path is not None and not _is_url(path):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
            if column == audio and (given.id or _first(ID_NAMES, columns)) is None:
                row["id"] = _name_of(path)
            if path is not None and not _is_url(path):
                path = os.path.join(folder, path)
            row[column if column in (given.audio, "reference_audio") else "audio"] = path
    return rows


def read_rows(path: Path, on_bad_row: Callable[[str], None] = _refuse) -> list[dict[str, Any]]:
    """
    The rows of a JSON Lines, JSON, CSV, TSV or Parquet file. Fields of CSV and TSV are strings, empty ones `None`.

    `on_bad_row` is called with a message for each row that cannot be used, which is left out.
    """
    if path.suffix == ".parquet":
        try:
            return pq.read_table(path).to_pylist()
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a Parquet file: {error}") from error
    rows: dict[int, dict[str, Any]] = {}

    def bad(line: int, reason: object) -> None:
        rows.pop(line, None)
        on_bad_row(f"{path}: not a table of rows in line {line}: {reason}")

    # What is not UTF-8 becomes surrogates, which are found row by row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for line, row in (_csv_rows if path.suffix.lower() in (".csv", ".tsv") else _json_rows)(path, file):
            if isinstance(row, Exception):
                bad(line, row)
            elif not isinstance(row, dict):
                bad(line, f"expected an object with columns, got {str(row)[:40]!a}")
            elif not _is_unicode(json.dumps(row, ensure_ascii=False)):
                bad(line, "it has characters that are not UTF-8.")
            else:
                rows[line] = row
    for name in dict.fromkeys(name for row in rows.values() for name in row):
        kinds = Counter(_kind(row[name]) for row in rows.values() if row.get(name) is not None)
        for line, row in list(rows.items()) if len(kinds) > 1 else ():
            if row.get(name) is not None and _kind(row[name]) != kinds.most_common(1)[0][0]:
                bad(line, f"{name!r} is {str(row[name])[:40]!a}, of another type than in most rows.")
    return list(rows.values())


def _json_rows(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """Number and value of each line of JSON Lines, or element of a JSON list; or the error of it."""
    lines = path.suffix.lower() == ".jsonl"
    try:
        values = file if lines else list(json.load(file))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a table of rows: {error}") from error
    for number, value in enumerate(values, start=1):
        if not lines:
            yield number, value
        elif value.strip():
            try:
                row = json.loads(value)
            except (ValueError, RecursionError) as error:
                row = error
            yield number, row


def _csv_rows(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """Number and row of each line; or the error of it."""
    # Transcripts in TSV files have quotation marks that quote nothing.
    tabs = path.suffix.lower() == ".tsv"
    delimiter, quoting = ("\t", csv.QUOTE_NONE) if tabs else (",", csv.QUOTE_MINIMAL)
    table = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[call-overload]
    try:
        header = [name for name in table.fieldnames or [] if name]
        if len(set(header)) < len(header):
            raise csv.Error(f"columns of one name: {header}")
    except csv.Error as error:
        raise DataError(f"{path}: not a table of rows: line 1: {error}") from error
    while True:
        row: Any = None
        try:
            row = next(table)
            surplus = row.pop(None, [])
            if any(surplus):
                row = ValueError(f"{len(row) + len(surplus)} fields, but {len(row)} columns.")
            else:
                row = {name: value or None for name, value in row.items() if name}
        except StopIteration:
            return
        except csv.Error as error:
            row = error
        yield table.reader.line_num, row


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


# Datasets


def _load_dataset(
    source: str, config_name: str | None, revision: str | None, streaming: bool | None
) -> Mapping[str, Dataset | IterableDataset]:
    builder = {".tar": "webdataset", ".parquet": "parquet"}.get(Path(source).suffix.lower())
    if streaming is None:
        streaming = builder is not None or Path(source).exists()
    try:
        if builder is not None:
            return load_dataset(builder, data_files=source, streaming=streaming)
        return load_dataset(source, config_name, revision=revision, streaming=streaming)
    except (OSError, ValueError, ImportError, DatasetGenerationError, tarfile.TarError) as error:
        cause = error.__cause__ or error
        advice = " Stream it, which does not need torchcodec." if "torchcodec" in str(cause) else ""
        raise DataError(f"{source}: cannot be loaded: {str(cause).splitlines()[0]}{advice}") from error


def _select(
    source: str | Path,
    splits: Mapping[str, Dataset | IterableDataset],
    split: str | None,
    default_split: str | None,
) -> Dataset | IterableDataset:
    if split is None:
        split = default_split or ""
        if split not in splits and len(splits) == 1:
            split = next(iter(splits))
    if split in splits:
        return splits[split]
    error = f"{source} has the splits {', '.join(splits)}: pass one of them as `split`"
    if "[" not in split and "+" not in split:
        raise DataError(f"{error}, not {split!r}." if split else f"{error}.")
    lengths = {name: len(dataset) for name, dataset in splits.items() if isinstance(dataset, Dataset)}
    if not lengths:
        raise DataError(f"{source}: `split` is {split!r}, but a part of a split cannot be streamed: pass a whole one.")
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as cause:
        raise DataError(f"{error}, or a part of one such as 'train[:1000]', not {split!r}.") from cause
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)
