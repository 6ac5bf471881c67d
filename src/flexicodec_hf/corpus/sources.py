"""Where clips come from: anything `datasets` loads, and folders and tables of audio files."""

from __future__ import annotations

import csv
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Audio, Dataset, DatasetInfo, Features, IterableDataset, load_dataset, load_from_disk
from datasets.table import cast_table_to_features

from .shards import CorpusError


if TYPE_CHECKING:
    from collections.abc import Iterable

# Of files in a folder; those that libsndfile cannot read are among them, so that a run lists them as broken.
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
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
# Columns that hold paths of audio files in tables, and transcripts anywhere, best first.
AUDIO_NAMES = ("audio", "file_name", "path", "file", "audio_filepath", "audio_path", "wav")
TEXT_NAMES = ("text", "transcription", "transcript", "sentence", "txt", "json.text")
ID_NAMES = ("id", "__key__")

# Compressed audio of a block: what a process holds of a stream, twice.
_MAX_BLOCK_BYTES = 1 << 29
# Shards of a dataset are joined until there are no more than this: a folder on the Hub has one for each of its files.
_MAX_STREAMS = 1024


def load_corpus(
    dataset: str,
    *,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
    audio_column: str | None = None,
) -> Dataset | IterableDataset:
    """
    Load a dataset of speech without decoding its audio.

    Args:
        dataset: One of

            - a folder of audio files, with subfolders, and with what `metadata.jsonl`, `.csv`, `.tsv` or `.parquet` in any of
              them says of the files that its column `file_name` names;
            - a `.jsonl`, `.json`, `.csv` or `.tsv` file with a column of paths, relative to the file's folder;
            - a `.parquet` or `.tar` (WebDataset) file, a folder of such, or a pattern (`"data/*.tar"`), which are streamed;
            - a folder that `Dataset.save_to_disk` wrote;
            - the id of a dataset on the Hub.
        name: Configuration of a dataset on the Hub.
        split: Which part of the dataset; files and folders of audio have one part, "train".
        revision: Branch, tag or commit of a dataset on the Hub.
        streaming: Read a dataset on the Hub as it comes, without downloading it first.
        audio_column: Column of paths in a table; by default the first of `audio`, `file_name`, `path`, `file`,
            `audio_filepath`, `audio_path` and `wav` that is there.

    Raises:
        CorpusError: There is nothing of this kind, or no column of paths.
    """
    path = Path(dataset)
    if path.is_dir():
        if (path / "state.json").is_file():
            return load_from_disk(dataset)
        files = _audio_files(path)
        if files:
            return _folder(path, files)
        for suffix, builder in ((".tar", "webdataset"), (".parquet", "parquet")):
            found = sorted(str(file) for file in path.rglob(f"*{suffix}"))
            if found:
                return load_dataset(builder, data_files={split: found}, split=split, streaming=True)
        raise CorpusError(f"{dataset}: there are no audio files in this folder, no .tar and no .parquet files.")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json", ".csv", ".tsv"):
        if not path.is_file():
            raise CorpusError(f"{dataset}: there is no such file.")
        table = read_table(path)
        column = audio_column or next((name for name in AUDIO_NAMES if name in table.column_names), "audio")
        if column not in table.column_names:
            raise CorpusError(f"{dataset}: there is no column {column!r} of paths among {table.column_names}.")
        return _with_audio(table, column, path.parent)
    if suffix in (".parquet", ".tar"):
        builder = "webdataset" if suffix == ".tar" else "parquet"
        return load_dataset(builder, data_files={split: dataset}, split=split, streaming=True)
    try:
        return load_dataset(dataset, name, split=split, revision=revision, streaming=streaming)
    except Exception as error:
        if "torchcodec" not in str(error.__cause__ or error):
            raise
        raise CorpusError(
            f"{dataset}: `datasets` needs torchcodec to prepare these audio files. Stream them, which does not."
        ) from error


def _audio_files(folder: Path) -> list[str]:
    """Paths of the audio files in a folder, relative to it, in order."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(parent).relative_to(folder)
        found += [
            (inside / name).as_posix()
            for name in names
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _folder(folder: Path, files: list[str]) -> Dataset:
    """The files of a folder, with what metadata in it and its subfolders say of them; last those that none names."""
    metadata: dict[Path, Path] = {}
    for name in METADATA_NAMES:
        for path in sorted(folder.rglob(name)):
            metadata.setdefault(path.parent, path)
    tables = []
    for parent, path in sorted(metadata.items()):
        table = read_table(path)
        if "file_name" not in table.column_names:
            raise CorpusError(f"{path}: there is no column 'file_name' among {table.column_names}.")
        inside = parent.relative_to(folder).as_posix()
        names = [name and posixpath.normpath(posixpath.join(inside, name)) for name in table["file_name"].to_pylist()]
        column = table.column_names.index("file_name")
        tables.append(table.set_column(column, "file_name", pa.array(names, pa.string())))
    named = {name for table in tables for name in table["file_name"].to_pylist()}
    tables.append(pa.table({"file_name": pa.array([name for name in files if name not in named], pa.string())}))
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise CorpusError(f"{folder}: the metadata of its subfolders do not fit together: {error}") from error
    return _with_audio(table, "file_name", folder)


def _with_audio(table: pa.Table, column: str, folder: Path) -> Dataset:
    """A table whose column of paths is one of audio, and whose `id` is the path as it was, unless it has one."""
    names = table[column].cast(pa.string())
    paths = [None if name is None else os.path.join(folder, name) for name in names.to_pylist()]
    audio = pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], ["bytes", "path"]
    )
    table = table.drop_columns([column])
    if "id" not in table.column_names:
        table = table.append_column("id", names)
    table = table.append_column("audio" if column in AUDIO_NAMES else column, audio)
    features = Features.from_arrow_schema(table.schema)
    features[table.column_names[-1]] = Audio()
    return Dataset(table, info=DatasetInfo(features=features))


def read_table(path: Path) -> pa.Table:
    """A JSON Lines, JSON, CSV, TSV or Parquet file. Empty fields of CSV and TSV are missing values, all others text."""
    if path.suffix == ".parquet":
        return pq.read_table(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            if path.suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            elif path.suffix == ".json":
                rows = json.load(file)
            else:
                # Transcripts in TSV files have quotation marks that quote nothing.
                tabs = path.suffix == ".tsv"
                reader = csv.DictReader(
                    file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
                )
                rows = [{name: value or None for name, value in row.items() if name} for row in reader]
            columns = list(dict.fromkeys(name for row in rows for name in row))
            return pa.table({name: pa.array([row.get(name) for row in rows]) for name in columns})
        except (ValueError, AttributeError, TypeError, pa.ArrowException, csv.Error) as error:
            raise CorpusError(f"{path}: not a table of rows: {error}") from error


@dataclass(frozen=True)
class Columns:
    """
    What the columns of a dataset are for.

    Args:
        audio: The clips.
        text: Their transcripts, if there are.
        id: Their names, if they have others than those of their files.
        metadata: All others that are not audio, and their types.
    """

    audio: str
    text: str | None
    id: str | None
    metadata: Features

    @classmethod
    def of(cls, features: Features, audio: str | None, text: str | None, id: str | None) -> Columns:
        """The columns asked for, or those that look like it. Raises [`CorpusError`] if they are not there."""
        for asked in (audio, text, id):
            if asked is not None and not _has(features, asked):
                raise CorpusError(f"there is no column {asked!r} among {list(features)}.")
        heard = [name for name, feature in features.items() if isinstance(feature, Audio)]
        if audio is None:
            candidates = heard or [name for name in AUDIO_NAMES if name in features]
            if not candidates or len(heard) > 1:
                raise CorpusError(
                    f"which column holds the audio? Name one of {heard or list(features)} (audio_column)."
                )
            audio = candidates[0]
        text = text or next((name for name in TEXT_NAMES if _has(features, name)), None)
        id = id or next((name for name in ID_NAMES if name in features), None)
        others = {name: kind for name, kind in features.items() if name not in {audio, text, id, *heard}}
        return cls(audio, text, id, Features(others))


def _has(features: Features, name: str) -> bool:
    """Whether there is a column, or a field `column.field` of one."""
    column, _, entry = name.partition(".")
    kind = features.get(column)
    return name in features or (isinstance(kind, dict) and entry in kind)


def column_of(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column, or a field `column.field` of one."""
    if name in table.column_names:
        return table[name]
    column, _, entry = name.partition(".")
    return pc.struct_field(table[column], [entry])


def prepare(dataset: Dataset | IterableDataset, clips_per_shard: int) -> IterableDataset:
    """A dataset as a stream of Arrow tables with types, in shards that do not depend on how many processes read them."""
    if isinstance(dataset, Dataset):
        if len(dataset) == 0:
            raise CorpusError("the dataset has no rows.")
        dataset = dataset.to_iterable_dataset(num_shards=-(-len(dataset) // clips_per_shard))
    if dataset.features is None:
        first = next(iter(dataset.with_format("arrow").iter(batch_size=100)), None)
        if first is None:
            raise CorpusError("the dataset has no rows.")
        dataset = dataset.cast(Features.from_arrow_schema(first.schema))
    return dataset.with_format("arrow")


def num_streams(dataset: IterableDataset) -> int:
    return min(dataset.num_shards, _MAX_STREAMS)


def read_stream(
    dataset: IterableDataset, stream: int, audio_column: str, sizes: Sequence[int], clips: int
) -> Iterator[tuple[pa.Table, bool]]:
    """
    Read one stream in blocks.

    Args:
        dataset: From `prepare`.
        stream: Which one.
        audio_column: Its bytes or files bound a block.
        sizes: Rows of the first blocks, where they are known from an earlier run.
        clips: Rows of the others, or fewer where their files are large.

    Yields:
        The rows of a block, and whether it is the last. An empty stream has one empty block.
    """
    # The columns of WebDatasets change their places, which `datasets` does not put in one batch.
    tables = dataset.shard(num_streams(dataset), stream).iter(batch_size=1)
    pending: list[pa.Table] = []
    count = total = block = 0
    for table in tables:
        table = cast_table_to_features(table, dataset.features)
        start = 0
        for row, size in enumerate(_file_sizes(table[audio_column])):
            full = count == sizes[block] if block < len(sizes) else count == clips or total + size > _MAX_BLOCK_BYTES
            if full and count:
                yield pa.concat_tables([*pending, table.slice(start, row - start)]), False
                pending, count, total, start, block = [], 0, 0, row, block + 1
            count, total = count + 1, total + size
        pending.append(table.slice(start))
    yield pa.concat_tables(pending) if pending else dataset.features.arrow_schema.empty_table(), True


def _file_sizes(audio: pa.ChunkedArray) -> Iterable[int]:
    if not pa.types.is_struct(audio.type):
        return (os.path.getsize(path) if path and os.path.isfile(path) else 0 for path in audio.to_pylist())
    contents = pc.struct_field(audio, "bytes")
    if contents.null_count < len(contents):
        return pc.fill_null(pc.binary_length(contents), 0).to_pylist()
    return _file_sizes(pc.struct_field(audio, "path"))
