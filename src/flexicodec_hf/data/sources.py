"""Speech from any source: folders and tables of audio files, and whatever `datasets` loads, with the same columns."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
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


# Suffixes of audio files in a folder. Some that libsndfile cannot read are among them, so that they are reported as
# broken instead of being overlooked.
AUDIO_SUFFIXES = frozenset(
    [
        ".aac",
        ".aif",
        ".aifc",
        ".aiff",
        ".au",
        ".caf",
        ".flac",
        ".m4a",
        ".mka",
        ".mp3",
        ".mp4",
        ".oga",
        ".ogg",
        ".opus",
        ".w64",
        ".wav",
        ".webm",
        ".wma",
    ]
)
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
# Usual names of columns, best first.
AUDIO_NAMES = ("audio", "file_name", "path", "file", "audio_filepath", "audio_path", "wav")
TEXT_NAMES = (
    "text",
    "transcription",
    "transcript",
    "sentence",
    "normalized_text",
    "txt",
    "json.text",
)
ID_NAMES = ("id", "__key__")

# An undecoded clip, as the type of a column. Not `Audio(decode=False)`: when `datasets` encodes or streams that type, it
# asks for torchcodec. TODO: drop once `datasets` reads undecoded audio without torchcodec.
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
        files = _load_files(path, name, audio_column, text_column, id_column)
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
        raise DataError(
            f"there is no column of audio or text among {list(features)}: pass `audio_column` or `text_column`."
        )
    # A field of a column is copied, a column renamed. What has the name already makes room.
    field = text if text is not None and text not in features else None
    for role, name in (("audio", audio), ("text", text), ("id", id)):
        if name is not None and name != role:
            if role in features:
                dataset = dataset.rename_column(role, f"source_{role}")
            if name != field:
                dataset = dataset.rename_column(name, role)
    return _with_computed_columns(dataset, field)


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
    structs = [name for name in features if _is_audio(features, name) and name != "reference_audio"]
    if len(structs) > 1 and "audio" not in structs:
        raise DataError(f"which column holds the audio? Pass one of {structs} as `audio_column`.")
    names = structs if len(structs) == 1 else [name for name in AUDIO_NAMES if name in features]
    return names[0] if names else None


def _is_audio(features: Features, name: str) -> bool:
    kind = features[name]
    return isinstance(kind, dict) and kind.keys() == UNDECODED.keys()


def _has(features: Features, name: str) -> bool:
    """Whether there is a column, or a field `column.field` of one."""
    column, _, field = name.partition(".")
    kind = features.get(column)
    return name in features or (isinstance(kind, dict) and field in kind)


def _with_computed_columns(dataset: Dataset | IterableDataset, field: str | None) -> Dataset | IterableDataset:
    """Paths become entries of audio, texts and ids strings, and ids that are missing are made of the paths."""
    features = dataset.features
    types: dict[str, Any] = {}
    for name in ("audio", "reference_audio"):
        if not (name in features and _is_audio(features, name)) and (name == "audio" or name in features):
            types[name] = UNDECODED
    for name in ("text", "id"):
        if features.get(name) != Value("string") and (name == "id" or name in features or field):
            types[name] = Value("string")
    if not types:
        return dataset
    computed = partial(_computed, names=tuple(types), field=field)
    if isinstance(dataset, IterableDataset):
        return (
            dataset.with_format("arrow")
            .map(
                partial(_append, features=features, computed=computed),
                batched=True,
                batch_size=1,
                features=Features({**features, **types}),
            )
            .with_format(None)
        )
    columns = computed(dataset.with_format("arrow")[:])
    dataset = dataset.remove_columns([name for name in types if name in features])
    for name, column in columns.items():
        dataset = dataset.add_column(name, column, feature=types[name])
    return dataset


def _append(table: pa.Table, features: Features, computed: Callable[[pa.Table], dict[str, pa.Array]]) -> pa.Table:
    # The columns of WebDatasets change their places.
    table = cast_table_to_features(table, features)
    for name, column in computed(table).items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, column)
    return table


def _computed(table: pa.Table, names: Iterable[str], field: str | None) -> dict[str, pa.Array]:
    columns: dict[str, Any] = {}
    for name in names:
        if name.endswith("audio"):
            paths = table[name].to_pylist() if name in table.column_names else [None] * len(table)
            columns[name] = _audio_entries(paths)
        elif name == "text" and field is not None:
            column, _, entry = field.partition(".")
            columns[name] = pc.struct_field(table[column], [entry]).cast(pa.string())
        elif name in table.column_names:
            columns[name] = table[name].cast(pa.string())
        else:
            audio = columns.get("audio", table["audio"] if "audio" in table.column_names else None)
            columns[name] = pa.array(map(_name_of, _paths(audio)), pa.string())
    return {
        name: column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        for name, column in columns.items()
    }


def _audio_entries(paths: Iterable[str | None]) -> pa.StructArray:
    return pa.array([None if path is None else {"bytes": None, "path": path} for path in paths], _AUDIO_TYPE)


def _paths(audio: pa.ChunkedArray) -> list[str | None]:
    return pc.struct_field(audio, ["path"]).to_pylist()


def _name_of(path: str | None) -> str | None:
    return None if path is None else PurePosixPath(path).name if "://" in path or os.path.isabs(path) else path


# Files and tables


@dataclass(frozen=True)
class _Files:
    """
    What a folder holds, with its subfolders, in order; hidden files and folders left out.

    Args:
        folder: The folder.
        audio: Paths of audio files, relative to the folder.
        texts: Paths of the text files.
        metadata: Paths of tables that describe files, one of each folder.
        has_shards: Whether there are Parquet, Arrow or tar files.
    """

    folder: Path
    audio: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    metadata: list[Path] = field(default_factory=list)
    has_shards: bool = False

    @classmethod
    def of(cls, folder: Path) -> _Files:
        audio, texts, metadata, has_shards = [], set(), [], False
        for parent, folders, names in os.walk(folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = Path(parent).relative_to(folder)
            for name in sorted(names):
                suffix = Path(name).suffix.lower()
                if name.startswith("."):
                    continue
                if suffix in AUDIO_SUFFIXES:
                    audio.append((inside / name).as_posix())
                elif suffix == ".txt":
                    texts.add(os.path.join(folder, inside, name))
                has_shards |= suffix in (".parquet", ".arrow", ".tar") and name not in METADATA_NAMES
            metadata += [Path(parent) / name for name in METADATA_NAMES if name in names][:1]
        return cls(folder, sorted(audio), texts, metadata, has_shards)


def _load_files(
    path: Path, split: str, audio_column: str | None, text_column: str | None, id_column: str | None
) -> dict[str, Dataset] | None:
    """
    Audio files, and what tables and text files tell about them, as the only split.

    Returns:
        The files, or `None` if the path leads to something else.
    """
    suffix = path.suffix.lower()
    name = "train"
    if path.is_dir():
        if split and (path / split).is_dir():
            path, name = path / split, split
        files = _Files.of(path)
        if not files.audio and not files.metadata:
            if files.has_shards:
                return None
            raise DataError(
                f"{path}: there are no audio files in this folder, no metadata, and no .parquet or .tar files."
            )
    elif suffix in AUDIO_SUFFIXES or suffix in TABLE_SUFFIXES:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file.")
        files = _Files(path.parent)
        if suffix in TABLE_SUFFIXES:
            files.metadata.append(path)
        else:
            files.audio.append(path.name)
            files.texts.update(str(file) for file in [path.with_suffix(".txt")] if file.is_file())
    else:
        return None

    tables = [_described(table, files, audio_column, id_column) for table in files.metadata]
    audio = audio_column or "audio"
    named = {path for table in tables if audio in table.column_names for path in _paths(table[audio])}
    others = [name for name in files.audio if os.path.join(files.folder, name) not in named]
    if others:
        id = id_column or next((name for name in ID_NAMES for table in tables if name in table.column_names), "id")
        paths = [os.path.join(files.folder, name) for name in others]
        tables.append(pa.table({id: others, audio: _audio_entries(paths)}))
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{path}: the metadata of its subfolders do not fit together: {error}") from error
    if files.texts:
        text = text_column or next((name for name in TEXT_NAMES if name in table.column_names), "text")
        table = _with_texts_beside(table, files.texts, audio, text)
    return {name: Dataset(table, info=DatasetInfo(features=Features.from_arrow_schema(table.schema)))}


def _with_texts_beside(table: pa.Table, files: set[str], audio: str, text: str) -> pa.Table:
    """Rows without a text get that of the text file beside their audio file."""
    texts = table[text].to_pylist() if text in table.column_names else [None] * len(table)
    for row, path in enumerate(_paths(table[audio])):
        beside = os.path.splitext(path or "")[0] + ".txt"
        if texts[row] is None and beside in files:
            texts[row] = Path(beside).read_text(encoding="utf-8").strip()
    table = table.drop_columns([text]) if text in table.column_names else table
    return table.append_column(text, pa.array(texts))


def _described(path: Path, files: _Files, audio_column: str | None, id_column: str | None) -> pa.Table:
    """A table with entries of audio instead of paths, and with ids."""
    table = read_table(path)
    inside = path.parent.relative_to(files.folder).as_posix()
    audio = audio_column or next((name for name in AUDIO_NAMES if name in table.column_names), None)
    if audio is not None and audio not in table.column_names:
        raise DataError(f"{path}: there is no column {audio!r} among {table.column_names}.")
    for column in (audio, "reference_audio"):
        if column not in table.column_names:
            continue
        try:
            names = [name and _inside(inside, name) for name in table[column].cast(pa.string()).to_pylist()]
        except pa.ArrowException as error:
            raise DataError(f"{path}: the column {column!r} does not hold paths: {error}") from error
        paths = [name and (name if "://" in name else os.path.join(files.folder, name)) for name in names]
        new = column if column in (audio_column, "reference_audio") else "audio"
        table = table.set_column(table.column_names.index(column), new, _audio_entries(paths))
        if column == audio and id_column is None and not {*ID_NAMES} & {*table.column_names}:
            table = table.append_column("id", pa.array(map(_name_of, names), pa.string()))
    return table


def _inside(folder: str, name: str) -> str:
    return name if "://" in name else posixpath.normpath(posixpath.join(folder, name))


def read_table(path: Path) -> pa.Table:
    """A JSON Lines, JSON, CSV, TSV or Parquet file. Fields of CSV and TSV are strings, empty ones missing values."""
    if path.suffix == ".parquet":
        return pq.read_table(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            if path.suffix.lower() == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            elif path.suffix.lower() == ".json":
                rows = json.load(file)
            else:
                # Transcripts in TSV files have quotation marks that quote nothing.
                tabs = path.suffix.lower() == ".tsv"
                reader = csv.DictReader(
                    file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
                )
                rows = [{name: value or None for name, value in row.items() if name} for row in reader]
            columns = list(dict.fromkeys(name for row in rows for name in row))
            return pa.table({name: pa.array([row.get(name) for row in rows]) for name in columns})
        except (ValueError, AttributeError, TypeError, pa.ArrowException, csv.Error) as error:
            raise DataError(f"{path}: not a table of rows: {error}") from error


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
    except (OSError, ValueError, ImportError, DatasetGenerationError) as error:
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
