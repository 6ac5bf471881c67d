"""A dataset as streams that processes share, each read in blocks that become shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from datasets.table import cast_table_to_features

from .files import DataError


# Compressed audio of a block in bytes: a process holds two blocks of a stream.
_MAX_BLOCK_BYTES = 1 << 29
# Shards of a dataset are joined until there are no more than this: a folder on the Hub has one for each of its files.
_MAX_STREAMS = 1024


def as_stream(dataset: Dataset | IterableDataset, clips_per_shard: int) -> IterableDataset:
    """A dataset as a stream of Arrow tables, whose shards do not depend on how many processes read them."""
    if isinstance(dataset, Dataset):
        if dataset.with_format("arrow")[:]["audio"].null_count == len(dataset):
            raise DataError("there is no audio in the dataset.")
        dataset = dataset.to_iterable_dataset(num_shards=-(-len(dataset) // clips_per_shard))
    return dataset.with_format("arrow")


def num_streams(dataset: IterableDataset) -> int:
    return min(dataset.num_shards, _MAX_STREAMS)


@dataclass(frozen=True)
class ProcessShard:
    """What one process works on: whole streams if there are enough, else blocks of each in turns."""

    rank: int
    world_size: int
    num_streams: int

    def streams(self) -> range:
        """The streams that the process reads."""
        if self.num_streams >= self.world_size:
            return range(self.rank, self.num_streams, self.world_size)
        return range(self.num_streams)

    def has(self, stream: int, block: int) -> bool:
        turn = stream if self.num_streams >= self.world_size else stream + block
        return turn % self.world_size == self.rank


def read_stream(
    dataset: IterableDataset, stream: int, sizes: Sequence[int], clips: int
) -> Iterator[tuple[pa.Table, bool]]:
    """
    Read one stream in blocks.

    Args:
        dataset: From `as_stream`, with a column `audio`.
        stream: Number of the stream.
        sizes: Rows of the first blocks, if they are known from an earlier run.
        clips: Rows of the others, or fewer if their files are large.

    Yields:
        The rows of a block, and whether it is the last. An empty stream has one empty block.
    """
    # The columns of WebDatasets change their places; `datasets` does not put such rows in one batch.
    tables = dataset.shard(num_streams(dataset), stream).iter(batch_size=1)
    pending: list[pa.Table] = []
    count = total = block = 0
    for table in tables:
        table = cast_table_to_features(table, dataset.features)
        start = 0
        for row, size in enumerate(_file_sizes(table["audio"])):
            full = count == sizes[block] if block < len(sizes) else count == clips or total + size > _MAX_BLOCK_BYTES
            if full and count:
                yield pa.concat_tables([*pending, table.slice(start, row - start)]), False
                pending, count, total, start, block = [], 0, 0, row, block + 1
            count, total = count + 1, total + size
        pending.append(table.slice(start))
    yield pa.concat_tables(pending) if pending else dataset.features.arrow_schema.empty_table(), True


def _file_sizes(audio: pa.ChunkedArray) -> Iterable[int]:
    contents = pc.struct_field(audio, "bytes")
    if contents.null_count < len(contents):
        return pc.fill_null(pc.binary_length(contents), 0).to_pylist()
    paths = pc.struct_field(audio, "path").to_pylist()
    return (os.path.getsize(path) if path and os.path.isfile(path) else 0 for path in paths)
