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
from typing import Any, BinaryIO

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
from datasets.table import cast_table_to_features

from ..audio_flexicodec import AudioError, audio_seconds, read_audio
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
        files = _load_files(path, name, audio_column, text_column, id_column, on_bad_row or _refuse)
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
    path, file = audio_file(fetch_audio(audio))
    return read_audio(path, sampling_rate, file).waveform


def audio_duration(audio: Mapping[str, Any] | None) -> float:
    """Seconds that an entry of the column `audio` lasts, from its header. Raises the errors of `decode_audio`."""
    if audio is not None and audio.get("bytes") is None and "://" in str(audio.get("path")):
        with fsspec.open(audio["path"], "rb") as file:  # reads no more than it needs
            return audio_seconds(audio["path"], file)
    return audio_seconds(*audio_file(audio))


def fetch_audio(audio: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """An entry of the column `audio`, with the bytes of its file if it has only a URL. Raises `OSError`."""
    if audio is None or audio.get("bytes") is not None or "://" not in str(audio.get("path")):
        return audio
    try:
        with fsspec.open(audio["path"], "rb") as file:
            return {"path": audio["path"], "bytes": file.read()}
    except FileNotFoundError as error:
        raise AudioError(f"{audio['path']}: there is no such file.") from error


def audio_file(audio: Mapping[str, Any] | None, name: str = "the audio") -> tuple[str, BinaryIO | None]:
    """
    The arguments `path` and `file` of [`read_audio`] for an entry of the column `audio`.

    Args:
        audio: The entry, fetched if it was a URL.
        name: What to call it in errors if it has no path.
    """
    path, contents = (None, None) if audio is None else (audio.get("path"), audio.get("bytes"))
    if path is None and contents is None:
        raise AudioError(f"{name}: the row has no audio.")
    return path or name, None if contents is None else io.BytesIO(contents)


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
    dataset = _undecoded(_with_features(dataset))
    features = dataset.features
    for name in (audio_column, text_column, id_column):
        if name is not None and not _has(features, name):
            raise DataError(f"there is no column {name!r} among {list(features)}.")
    audio = audio_column or _find_audio(features)
    text = text_column or next((name for name in TEXT_NAMES if _has(features, name)), None)
    id = id_column or next((name for name in ID_NAMES if name in features), None)
    if audio is None and text is None:
        raise DataError(_nothing_in(features))
    # A field of a column is copied, a column renamed. What has the name already makes room.
    field = text if text is not None and text not in features else None
    for role, name in (("audio", audio), ("text", text), ("id", id)):
        if name is not None and name != role:
            if role in features:
                dataset = dataset.rename_column(role, f"source_{role}")
            if name != field:
                dataset = dataset.rename_column(name, role)
    return _with_computed_columns(dataset, field)


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


def _undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same dataset with plain structs for audio."""
    features = dataset.features
    audio = [name for name, kind in features.items() if isinstance(kind, Audio)]
    if isinstance(dataset, IterableDataset):
        for name in audio:
            dataset = dataset.cast_column(name, UNDECODED)
        return dataset
    if not audio:
        return dataset
    # The stored type is the same. `cast_column` would copy all audio.
    plain = Features({name: UNDECODED if name in audio else kind for name, kind in features.items()})
    dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
    return Dataset(dataset.data.cast(plain.arrow_schema), info=DatasetInfo(features=plain), split=dataset.split)


def _find_audio(features: Features) -> str | None:
    structs = [name for name in features if is_audio(features[name]) and name != "reference_audio"]
    if len(structs) > 1 and "audio" not in structs:
        raise DataError(f"which column holds the audio? Pass one of {structs} as `audio_column`.")
    names = structs if len(structs) == 1 else [name for name in AUDIO_NAMES if name in features]
    return names[0] if names else None


def is_audio(feature: Any) -> bool:
    """Whether a column of this type holds undecoded audio."""
    return isinstance(feature, dict) and feature.keys() == UNDECODED.keys()


def _has(features: Features, name: str) -> bool:
    """Whether there is a column, or a field `column.field` of one."""
    column, _, field = name.partition(".")
    kind = features.get(column)
    return name in features or (isinstance(kind, dict) and field in kind)


def _with_computed_columns(dataset: Dataset | IterableDataset, field: str | None) -> Dataset | IterableDataset:
    """Paths become entries of audio, texts and ids strings, and ids that are missing are made of the paths."""
    features = dataset.features
    types: dict[str, Any] = {
        name: UNDECODED
        for name in ("audio", "reference_audio")
        if (not is_audio(features[name]) if name in features else name == "audio")
    }
    for name in ("text", "id"):
        if features[name] != Value("string") if name in features else name == "id" or field:
            types[name] = Value("string")
    if not types:
        return dataset
    if isinstance(dataset, IterableDataset):
        append = partial(_append, features=features, names=tuple(types), field=field)
        dataset = dataset.with_format("arrow")
        dataset = dataset.map(append, batched=True, batch_size=1, features=Features({**features, **types}))
        return dataset.with_format(None)
    columns = _computed(dataset.with_format("arrow")[:], tuple(types), field)
    dataset = dataset.remove_columns([name for name in types if name in features])
    for name, column in columns.items():
        dataset = dataset.add_column(name, column, feature=types[name])
    return dataset


def _append(table: pa.Table, features: Features, names: tuple[str, ...], field: str | None) -> pa.Table:
    # The columns of WebDatasets change their places.
    table = cast_table_to_features(table, features)
    for name, column in _computed(table, names, field).items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, column)
    return table


def _computed(table: pa.Table, names: tuple[str, ...], field: str | None) -> dict[str, pa.Array]:
    columns: dict[str, Any] = {}
    for name in names:
        if name.endswith("audio"):
            paths = table[name].to_pylist() if name in table.column_names else [None] * len(table)
            columns[name] = _audio_entries(paths)
        elif name == "text" and field is not None:
            column, _, entry = field.partition(".")
            columns[name] = pc.struct_field(table[column].combine_chunks(), [entry]).cast(pa.string())
        elif name in table.column_names:
            columns[name] = table[name].cast(pa.string()).combine_chunks()
        else:
            audio = columns["audio"] if "audio" in columns else table["audio"]
            columns[name] = pa.array(map(_name_of, _paths(audio)), pa.string())
    return columns


def _audio_entries(audio: Iterable[Any]) -> pa.StructArray:
    """Entries of paths. What is an entry already, of another type because all its paths are missing, stays."""
    return pa.array([{"bytes": None, "path": one} if isinstance(one, str) else one for one in audio], _AUDIO_TYPE)


def _paths(audio: pa.ChunkedArray) -> list[str | None]:
    return pc.struct_field(audio, ["path"]).to_pylist()


def _name_of(path: str | None) -> str | None:
    return None if path is None else PurePosixPath(path).name if "://" in path or os.path.isabs(path) else path


# Files and tables


def _refuse(message: str) -> None:
    raise DataError(message)


def _load_files(
    path: Path,
    split: str,
    audio_column: str | None,
    text_column: str | None,
    id_column: str | None,
    on_bad_row: Callable[[str], None],
) -> dict[str, Dataset] | None:
    """
    Audio files, and what tables and text files tell about them, as the only split.

    Returns:
        The files, or `None` if the path leads to something else.
    """
    name, folder = "train", path.parent
    # Names in the folder: of tables, of audio files, and of text files.
    metadata, files, texts = [], [], {path.with_suffix(".txt").name}
    if path.is_dir():
        if split and (path / split).is_dir():
            name, path = split, path / split
        folder, found = path, _names(path)
        files = [file for file in found if PurePath(file).suffix.lower() in AUDIO_SUFFIXES]
        for file in [file for file in files if not _is_unicode(file)]:
            files.remove(file)
            on_bad_row(f"{os.path.join(path, file)!a}: the name of the file is not UTF-8: rename it.")
        texts = {file for file in found if file.endswith(".txt")}
        by_folder: dict[str, str] = {}
        for kind in METADATA_NAMES:
            for file in found:
                if PurePath(file).name == kind:
                    by_folder.setdefault(posixpath.dirname(file), file)
        metadata = [by_folder[inside] for inside in sorted(by_folder)]
        if not files and not metadata:
            if any(file.endswith((".parquet", ".arrow", ".tar")) for file in found):
                return None
            raise DataError(
                f"{path}: there are no audio files in this folder, no metadata, and no .parquet or .tar files."
            )
    elif path.suffix.lower() in {*AUDIO_SUFFIXES, *TABLE_SUFFIXES}:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file.")
        (metadata if path.suffix.lower() in TABLE_SUFFIXES else files).append(path.name)
    else:
        return None

    tables = [_described(folder, file, audio_column, text_column, id_column, on_bad_row) for file in metadata]
    audio = audio_column or "audio"
    pairs = [(table, column) for table in tables for column in (audio, "reference_audio")]
    named = {entry for table, column in pairs if column in table.column_names for entry in _paths(table[column])}
    paths = {file: os.path.join(folder, file) for file in files}
    others = {file: path for file, path in paths.items() if path not in named}
    if others:
        id = id_column or next((name for name in ID_NAMES for table in tables if name in table.column_names), "id")
        tables.append(pa.table({id: list(others), audio: _audio_entries(others.values())}))
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{path}: the metadata of its subfolders do not fit together: {error}") from error
    if texts and audio in table.column_names:
        text = text_column or next((name for name in TEXT_NAMES if name in table.column_names), "text")
        beside = {os.path.join(folder, file) for file in texts}
        table = _with_texts_beside(table, beside, audio, text, on_bad_row)
    return {name: Dataset(table, info=DatasetInfo(features=Features.from_arrow_schema(table.schema)))}


def _names(folder: Path) -> list[str]:
    """All files in a folder and its subfolders, relative to it, in order; without hidden ones."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(parent).relative_to(folder)
        found += [(inside / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _described(
    folder: Path,
    file: str,
    audio_column: str | None,
    text_column: str | None,
    id_column: str | None,
    on_bad_row: Callable[[str], None],
) -> pa.Table:
    """A table with entries of audio instead of paths, and with ids."""
    table = read_table(folder / file, on_bad_row)
    columns = table.column_names
    audio = audio_column or next((name for name in AUDIO_NAMES if name in columns), None)
    if audio is not None and audio not in columns:
        raise DataError(f"{folder / file}: there is no column {audio!r} among {columns}.")
    if audio is None and len(table) and not {text_column, *TEXT_NAMES} & {*columns}:
        raise DataError(f"{folder / file}: {_nothing_in(columns)}")

    def inside(name: str | None) -> str | None:
        if name is None or "://" in name:
            return name
        return posixpath.normpath(posixpath.join(posixpath.dirname(file), name))

    for column in {audio, "reference_audio"} & {*columns}:
        try:
            names = [inside(name or None) for name in table[column].cast(pa.string()).to_pylist()]
        except pa.ArrowException as error:
            raise DataError(f"{folder / file}: the column {column!r} does not hold paths: {error}") from error
        paths = [name if name is None or "://" in name else os.path.join(folder, name) for name in names]
        new = column if column in (audio_column, "reference_audio") else "audio"
        table = table.set_column(columns.index(column), new, _audio_entries(paths))
        if column == audio and id_column is None and not {*ID_NAMES} & {*columns}:
            table = table.append_column("id", pa.array(map(_name_of, names), pa.string()))
    return table


def _with_texts_beside(
    table: pa.Table, files: set[str], audio: str, text: str, on_bad_row: Callable[[str], None]
) -> pa.Table:
    """Rows without a text get the text in the file beside their audio file, if there is one."""
    texts = table[text].to_pylist() if text in table.column_names else [None] * len(table)
    for row, path in enumerate(_paths(table[audio])):
        beside = os.path.splitext(path or "")[0] + ".txt"
        if texts[row] is None and beside in files and os.path.isfile(beside):
            try:
                texts[row] = Path(beside).read_text(encoding="utf-8").strip()
            except UnicodeDecodeError as error:
                on_bad_row(f"{beside}: a text in UTF-8 was expected: {error}")
    if text in table.column_names:
        return table.set_column(table.column_names.index(text), text, pa.array(texts))
    return table.append_column(text, pa.array(texts)) if any(texts) else table


def read_table(path: Path, on_bad_row: Callable[[str], None] = _refuse) -> pa.Table:
    """
    A JSON Lines, JSON, CSV, TSV or Parquet file. Fields of CSV and TSV are strings, empty ones missing values.

    `on_bad_row` is called with a message for each row that cannot be used, which is left out.
    """
    if path.suffix == ".parquet":
        try:
            return pq.read_table(path)
        except pa.ArrowException as error:
            raise DataError(f"{path}: not a Parquet file: {error}") from error
    rows: dict[int, Any] = {}

    def bad(line: int, reason: object) -> None:
        rows.pop(line, None)
        on_bad_row(f"{path}: not a table of rows in line {line}: {reason}")

    # What is not UTF-8 becomes surrogates, which are found row by row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix.lower() in (".jsonl", ".json"):
            try:
                lines = json.load(file) if path.suffix.lower() == ".json" else file
                lines = list(lines)
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{path}: not a table of rows: {error}") from error
            for number, line in enumerate(lines, start=1):
                try:
                    if not isinstance(line, str) or line.strip():
                        rows[number] = json.loads(line) if path.suffix.lower() == ".jsonl" else line
                except (ValueError, RecursionError) as error:
                    bad(number, error)
        else:
            for number, row, problem in _csv_rows(path, file):
                rows[number] = row
                if problem is not None:
                    bad(number, problem)
    for number, row in list(rows.items()):
        if not isinstance(row, dict):
            bad(number, f"expected an object with columns, got {str(row)[:40]!a}")
        elif not _is_unicode(json.dumps(row, ensure_ascii=False)):
            bad(number, "it has characters that are not UTF-8.")
    columns: dict[str, pa.Array] = {}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    for name in names:
        kinds = Counter(_kind(row[name]) for row in rows.values() if row.get(name) is not None)
        for number, row in list(rows.items()) if len(kinds) > 1 else ():
            if row.get(name) is not None and _kind(row[name]) != kinds.most_common(1)[0][0]:
                bad(number, f"{name!r} is {str(row[name])[:40]!a}, of another type than in most rows.")
    try:
        columns = {name: pa.array([row.get(name) for row in rows.values()]) for name in names}
        return pa.table(columns)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a table of rows: {error}") from error


def _csv_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, str | None], str | None]]:
    """Line, row and what is wrong with it."""
    # Transcripts in TSV files have quotation marks that quote nothing.
    tabs = path.suffix.lower() == ".tsv"
    delimiter, quoting = ("\t", csv.QUOTE_NONE) if tabs else (",", csv.QUOTE_MINIMAL)
    reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    header: list[str] | None = None
    while True:
        row, error = [], None
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as wrong:
            error = str(wrong)
        if header is None:
            if error or any(count > 1 for name, count in Counter(row).items() if name):
                raise DataError(f"{path}: not a table of rows: line 1: {error or f'columns of one name: {row}'}")
            header = row
        elif row or error:
            if any(row[len(header) :]):
                error = f"{len(row)} fields, but {len(header)} columns."
            values = dict(zip(header, [*row, *[""] * (len(header) - len(row))], strict=False))
            yield reader.line_num, {name: value or None for name, value in values.items() if name}, error


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
