"""A corpus of speech to a corpus of tokens: read, encode, write, by any number of processes."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from tqdm import tqdm

from ..audio_flexicodec import AudioClip, audio_seconds, read_audio
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from .runner import CodecRunner, RateSetting, chunk_length, rate_settings
from .shards import Shard, close_corpus, find_shards, finished_blocks, library_versions, shard_path, write_shard
from .sources import audio_file, fetch_audio, is_audio, standard_columns
from .streams import ProcessShard, as_stream, num_streams, read_stream
from .tokens import Tokens


T = TypeVar("T")

# Batches whose audio is read while the model is busy with another.
_PREFETCHED_BATCHES = 4

# Columns of a shard, before those of the dataset.
TOKEN_FEATURES = Features(
    {
        "id": Value("string"),
        "audio_codes": List(List(Value("int32"))),
        "token_lengths": List(Value("int32")),
        "text": Value("string"),
        "duration": Value("float64"),
        "merging_threshold": Value("float64"),
        "target_frame_rate": Value("float64"),
        "frame_rate": Value("float64"),
        "sampling_rate": Value("int32"),
        "num_samples": Value("int64"),
        "file_sampling_rate": Value("int32"),
        "file_channels": Value("int32"),
    }
)


@dataclass(frozen=True)
class Source:
    """A clip to encode: its row in a block, its name, and its entry of the column `audio`."""

    row: int
    name: str
    audio: Mapping[str, Any] | None


@dataclass(frozen=True)
class EncodedClip:
    """A clip's name, what its file was, and its tokens at each rate."""

    name: str
    file_sampling_rate: int
    file_channels: int
    tokens: list[Tokens]


@dataclass
class Block:
    """Rows of the dataset that become a shard, and by row what became of them so far."""

    stream: int
    number: int
    rows: pa.Table
    last: bool
    num_clips: int
    unfinished_batches: int = 0
    encoded: dict[int, EncodedClip] = field(default_factory=dict)
    broken: dict[int, dict[str, str | None]] = field(default_factory=dict)

    def fail(self, source: Source, reason: object) -> None:
        path = None if source.audio is None else source.audio.get("path")
        self.broken[source.row] = {"id": source.name, "path": path, "reason": " ".join(str(reason).split())}


# Clips of a batch, and their audio as soon as it is read.
Loading = list[tuple[Source, "Future[AudioClip]"]]


def tokenize_corpus(
    dataset: Dataset | IterableDataset,
    output_dir: str | Path,
    codec: FlexiCodecModel,
    feature_extractor: FlexiCodecFeatureExtractor,
    *,
    merging_thresholds: Sequence[float] = (),
    target_frame_rates: Sequence[float] = (),
    num_quantizers: int | None = None,
    source: Mapping[str, Any] | None = None,
    split: str = "train",
    batch_seconds: float = 120.0,
    clips_per_shard: int = 1000,
    chunk_length_s: float = 30.0,
    num_workers: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> dict[str, Any] | None:
    """
    Turn a dataset of speech into a dataset of tokens: Parquet files with a row for each clip and rate.

    Audio of any rate and number of channels is resampled to the codec's rate and averaged to one channel. The
    columns `file_sampling_rate` and `file_channels` keep what it was, and the manifest counts such clips. Clips that
    cannot be read are listed in `broken.jsonl` and left out.

    A run that ended, however it ended, goes on where it stopped when it is started again with the same arguments,
    with any number of processes. Each of them calls this function with the same `output_dir`.

    Args:
        dataset: From [`load_speech`], or any other with columns of the usual names. Rename others with
            [`standard_columns`].
        output_dir: Directory to write to; made if missing.
        codec: On the device and in the type to run in.
        feature_extractor: The codec's.
        merging_thresholds: Encode at each of these; the encoders run once for all. By default, if there are no
            `target_frame_rates` either, at the threshold in the codec's configuration.
        target_frame_rates: Encode at each of these tokens per second, too.
        num_quantizers: Codebooks to keep; all by default.
        source: What to record about the origin of the dataset.
        split: Name of the split of the tokens.
        batch_seconds: Seconds of audio, with padding, in a batch of the model.
        clips_per_shard: Clips in a Parquet file. An interruption costs each process one such file at most.
        chunk_length_s: Clips longer than twice this are encoded alone and in chunks of so many seconds; 0 never.
        num_workers: Threads that read audio; by default one for each processor, eight at most.
        rank, world_size: The number of this process, and of all processes; by default from the environment variables
            `RANK` and `WORLD_SIZE`, as `accelerate launch` and `torchrun` set them.

    Returns:
        The manifest, once all shards of all processes exist; `None` while others are still at work.

    Raises:
        DataError: `output_dir` holds tokens made with other settings, a column is missing, or a rate is out of range.
        ValueError: Another argument is out of range.
    """
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be between 0 and `world_size` - 1, got {rank} of {world_size}.")
    for name, number in (
        ("clips_per_shard", clips_per_shard),
        ("batch_seconds", batch_seconds),
        ("num_quantizers", num_quantizers),
    ):
        if number is not None and number <= 0:
            raise ValueError(f"`{name}` must be positive, got {number}.")
    output_dir = Path(output_dir)
    dataset = standard_columns(dataset)
    num_clips = len(dataset) if isinstance(dataset, Dataset) else None
    stream = as_stream(dataset, clips_per_shard)
    rates = rate_settings(codec.config, merging_thresholds, target_frame_rates)
    num_quantizers = min(num_quantizers or codec.config.num_quantizers, codec.config.num_quantizers)
    settings = {
        "model": codec.config.name_or_path,
        "revision": getattr(codec.config, "_commit_hash", None),
        "dtype": str(codec.dtype).removeprefix("torch."),
        "num_quantizers": num_quantizers,
        "rates": [str(rate) for rate in rates],
        "chunk_length_s": chunk_length_s,
        "clips_per_shard": clips_per_shard,
        "source": {
            **(source or {}),
            "num_streams": num_streams(stream),
            "num_clips": num_clips,
            "ids_sha256": _digest(dataset) if isinstance(dataset, Dataset) else None,
        },
    }
    shards = find_shards(output_dir, settings)
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    share = ProcessShard(rank, world_size, num_streams(stream))
    if not _complete(shards, share):
        # It is outdated: a shard was deleted to be made again.
        (output_dir / "manifest.json").unlink(missing_ok=True)
    runner = CodecRunner(codec, feature_extractor, chunk_length_s)
    versions = library_versions()

    done = sum(shard.summary["num_clips"] for key, shard in shards.items() if share.has(*key))
    progress = _Progress(share, num_clips, done)
    with closing(progress):
        blocks = _blocks(stream, clips_per_shard, shards, share)
        for block in encoded_blocks(blocks, runner, rates, num_quantizers, batch_seconds, num_workers, progress.add):
            path = shard_path(output_dir, split, block.stream, block.number)
            summary = summary_of(block, rates, codec.config.sampling_rate)
            write_shard(path, table_of(block), settings, summary, versions)
            progress.add([], summary["broken"])

    shards = find_shards(output_dir, settings)
    return close_corpus(output_dir, split, shards, versions) if _complete(shards, share) else None


def encoded_blocks(
    blocks: Iterator[Block],
    runner: CodecRunner,
    rates: Sequence[RateSetting],
    num_quantizers: int,
    batch_seconds: float,
    num_workers: int | None = None,
    on_batch: Callable[[list[float]], None] = lambda seconds: None,
) -> Iterator[Block]:
    """
    Encode blocks: the core of `tokenize_corpus`, and of the step for clusters (cluster.py).

    Args:
        blocks: They are read in a thread, up to `_PREFETCHED_BATCHES` batches ahead.
        runner: The codec.
        rates, num_quantizers, batch_seconds, num_workers: See `tokenize_corpus`.
        on_batch: Called with the seconds of the clips of each batch.

    Yields:
        The blocks, each complete: every row is encoded or broken.
    """
    with ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, 8)) as pool:
        batches = _batches(blocks, pool, runner.config.sampling_rate, batch_seconds, runner.chunk_length_s)
        for block, loading in prefetch(batches, _PREFETCHED_BATCHES):
            on_batch(_encode(runner, block, loading, rates, num_quantizers))
            block.unfinished_batches -= 1
            if block.unfinished_batches == 0:
                yield block


def _digest(dataset: Dataset) -> str:
    """A hash of the ids: shards of another list of clips are not taken for shards of this one."""
    digest = hashlib.sha256()
    for table in dataset.select_columns(["id"]).with_format("arrow").iter(batch_size=10_000):
        digest.update("\n".join(map(str, table["id"].to_pylist())).encode() + b"\n")
    return digest.hexdigest()


def _complete(shards: Mapping[tuple[int, int], Shard], share: ProcessShard) -> bool:
    return all(finished_blocks(shards, stream) for stream in range(share.num_streams))


class _Progress:
    """A progress bar of the first process, and a line of each at its end."""

    def __init__(self, share: ProcessShard, num_clips: int | None, done: int):
        self.rank, self.done = share.rank, done
        self.clips = self.broken = 0
        self.seconds = 0.0
        self.started = time.perf_counter()
        total = None
        if num_clips is not None and share.num_streams >= share.world_size:
            each, more = divmod(num_clips, share.num_streams)
            total = sum(each + (stream < more) for stream in share.streams())
        # In a log file, a line a minute.
        interval = 0.1 if sys.stderr.isatty() else 60
        self.bar = tqdm(total=total, initial=done, unit="clip", disable=self.rank > 0, mininterval=interval)

    def add(self, seconds: Sequence[float], broken: Sequence[Mapping[str, str]] = ()) -> None:
        """Count clips that were encoded, by their durations, and clips that cannot be."""
        self.clips += len(seconds)
        self.seconds += sum(seconds)
        self.broken += len(broken)
        for entry in broken:
            tqdm.write(f"skipped {entry['id']}: {entry['reason']}", file=sys.stderr)
        self.bar.set_postfix_str(self._speed(), refresh=False)
        self.bar.update(len(seconds) + len(broken))

    def _speed(self) -> str:
        hours = self.seconds / 3600
        return f"{hours:.4f} h of audio, {hours / (time.perf_counter() - self.started):.5f} h of audio per second"

    def close(self) -> None:
        self.bar.close()
        counts = ((self.broken, "broken"), (self.done, "done before"))
        parts = [f"{self.clips} clips", self._speed(), *(f"{count} {name}" for count, name in counts if count)]
        tqdm.write(f"process {self.rank}: {', '.join(parts)}", file=sys.stderr)


def _blocks(
    dataset: IterableDataset, clips_per_shard: int, shards: Mapping[tuple[int, int], Shard], share: ProcessShard
) -> Iterator[Block]:
    """The blocks that a process has to encode."""
    for stream in share.streams():
        if finished_blocks(shards, stream):
            continue
        sizes: list[int] = []
        while (stream, len(sizes)) in shards:
            sizes.append(shards[stream, len(sizes)].summary["num_clips"])
        for number, (rows, last) in enumerate(read_stream(dataset, stream, sizes, clips_per_shard)):
            if share.has(stream, number) and (stream, number) not in shards:
                yield Block(stream, number, rows, last, len(rows))


def _batches(
    blocks: Iterator[Block],
    pool: ThreadPoolExecutor,
    sampling_rate: int,
    batch_seconds: float,
    chunk_length_s: float,
) -> Iterator[tuple[Block, Loading]]:
    """Clips of similar length, the longest first, whose audio is being read. An empty block has one empty batch."""
    for block in blocks:
        ids, entries = (block.rows[name].to_pylist() for name in ("id", "audio"))
        sources = [
            Source(row, f"{block.stream:05d}-{block.number:05d}-{row}" if id is None else id, audio)
            for row, (id, audio) in enumerate(zip(ids, entries, strict=True))
        ]
        measured = []
        for source, future in [(source, pool.submit(_measure, source)) for source in sources]:
            try:
                measured.append(future.result())
            except ValueError as error:
                block.fail(source, error)
        block.rows = block.rows.drop_columns(["audio"])
        measured.sort(key=lambda item: -item[1])
        batches: list[list[Source]] = [[]]
        longest = 0.0
        for source, seconds in measured:
            if batches[-1] and (len(batches[-1]) + 1) * longest > batch_seconds:
                batches.append([])
            if not batches[-1]:
                # A clip that is processed in chunks is alone.
                longest = seconds if chunk_length(seconds, chunk_length_s) is None else math.inf
            batches[-1].append(source)
        block.unfinished_batches = len(batches)
        for batch in batches:
            yield block, [(source, pool.submit(_load, source, sampling_rate)) for source in batch]


def _measure(source: Source) -> tuple[Source, float]:
    # An error of the network is not the file's: it ends the run.
    source = Source(source.row, source.name, fetch_audio(source.audio))
    return source, audio_seconds(*audio_file(source.audio, source.name))


def _load(source: Source, sampling_rate: int) -> AudioClip:
    path, file = audio_file(source.audio, source.name)
    return read_audio(path, sampling_rate, file)


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made in a thread, up to `depth` of them before they are asked for."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item


def _encode(
    runner: CodecRunner, block: Block, loading: Loading, rates: Sequence[RateSetting], num_quantizers: int
) -> list[float]:
    """Add what becomes of a batch to its block. Returns the seconds of its clips."""
    clips: list[tuple[Source, AudioClip]] = []
    for source, future in loading:
        try:
            clips.append((source, future.result()))
        except (ValueError, OSError) as error:
            block.fail(source, error)
    results = runner.encode([clip for _, clip in clips], rates, num_quantizers)
    seconds = []
    for (source, clip), result in zip(clips, results, strict=True):
        if isinstance(result, Exception):
            block.fail(source, result)
        else:
            block.encoded[source.row] = EncodedClip(source.name, clip.file_sampling_rate, clip.num_channels, result)
            seconds.append(clip.seconds)
    return seconds


def summary_of(block: Block, rates: Sequence[RateSetting], sampling_rate: int) -> dict[str, Any]:
    """What the metadata of a shard tell about its rows."""
    clips = block.encoded.values()
    return {
        "num_clips": block.num_clips,
        "last": block.last,
        "seconds": sum(clip.tokens[0].seconds for clip in clips),
        "tokens": {
            str(rate): sum(len(clip.tokens[i].token_lengths) for clip in clips) for i, rate in enumerate(rates)
        },
        "resampled": sum(clip.file_sampling_rate != sampling_rate for clip in clips),
        "downmixed": sum(clip.file_channels > 1 for clip in clips),
        "broken": [block.broken[row] for row in sorted(block.broken)],
    }


def table_of(block: Block) -> pa.Table:
    """The rows of a shard: a row for each clip and rate, in the order of the dataset."""
    pairs = [(row, tokens) for row in sorted(block.encoded) for tokens in block.encoded[row].tokens]
    rows = pa.array([row for row, _ in pairs], pa.int64())
    clips, tokens = [block.encoded[row] for row, _ in pairs], [tokens for _, tokens in pairs]

    features, columns = Features(TOKEN_FEATURES), {}
    for name, feature in Features.from_arrow_schema(block.rows.schema).items():
        if name in ("id", "text") or is_audio(feature):
            continue
        free = name
        while free in features:
            free = f"source_{free}"
        features[free], columns[free] = feature, block.rows[name].take(rows)
    schema = features.arrow_schema
    if not pairs:
        return schema.empty_table()
    texts = block.rows["text"].take(rows) if "text" in block.rows.column_names else pa.nulls(len(rows), pa.string())
    values: dict[str, Any] = {
        "id": [clip.name for clip in clips],
        "audio_codes": _lists([item.audio_codes.numpy() for item in tokens]),
        "token_lengths": _lists([item.token_lengths.numpy() for item in tokens]),
        "text": texts,
        "duration": [item.seconds for item in tokens],
        "file_sampling_rate": [clip.file_sampling_rate for clip in clips],
        "file_channels": [clip.file_channels for clip in clips],
    }
    for name in ("merging_threshold", "target_frame_rate", "frame_rate", "sampling_rate", "num_samples"):
        values[name] = [getattr(item, name) for item in tokens]
    return pa.table({name: (values | columns)[name] for name in schema.names}, schema=schema)


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Each array `(length,)` as a list, or `(num_rows, length)` as a list of lists."""
    lists = pa.array(np.concatenate([array.ravel() for array in arrays]))
    lengths = [[array.shape[-1]] * (array.size // array.shape[-1]) for array in arrays]
    lists = _cut(lists, np.concatenate(lengths))
    return lists if arrays[0].ndim == 1 else _cut(lists, [len(array) for array in arrays])


def _cut(values: pa.Array, lengths: Sequence[int] | np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)
