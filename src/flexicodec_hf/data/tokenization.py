"""A corpus of speech to a corpus of tokens: read, encode, write."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from tqdm import tqdm

from ..audio_flexicodec import AudioClip, AudioFile
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from .files import DataError
from .runner import CodecRunner, chunk_length, rate_settings
from .shards import Corpus
from .sources import audio_duration, is_audio, read_clip, standard_columns
from .tokens import Tokens


T = TypeVar("T")

# Batches whose audio is read while the model is busy with another.
_PREFETCHED_BATCHES = 4
# Recordings on disk that last longer are not in memory as a whole. The encoders run once for each rate.
_MAX_HELD_S = 600.0
# Bytes of audio that a dataset holds in a block: two blocks are in memory.
_MAX_BLOCK_BYTES = 1 << 29
# A folder on the Hub has a stream for each of its files: they are joined until there are no more than this.
_MAX_STREAMS = 1024

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


@dataclass
class Clip:
    """A clip to encode: its entry of the column `audio`, and what became of it: tokens at each rate, or an error."""

    id: str
    audio: Mapping[str, Any] | None
    tokens: list[Tokens] = field(default_factory=list)
    file_sampling_rate: int = 0
    file_channels: int = 0
    error: str | None = None

    def fail(self, error: object) -> None:
        self.error = " ".join(str(error).split())


# Clips of a batch, and their audio as soon as it is read.
Batch = list[tuple[Clip, "Future[AudioClip | AudioFile]"]]


@dataclass
class Block:
    """Rows of the dataset that become a shard: their clips, and their other columns."""

    stream: int
    number: int
    last: bool
    clips: list[Clip]
    columns: pa.Table
    unfinished_batches: int = 0

    @classmethod
    def from_rows(cls, stream: int, number: int, last: bool, rows: pa.Table) -> Block:
        """The rows must have the columns `id` and `audio`."""
        ids, entries = (rows[name].to_pylist() for name in ("id", "audio"))
        clips = [
            Clip(f"{stream:05d}-{number:05d}-{row}" if id is None else id, audio)
            for row, (id, audio) in enumerate(zip(ids, entries, strict=True))
        ]
        return cls(stream, number, last, clips, rows.drop_columns(["id", "audio"]))


def tokenize_corpus(
    dataset: Dataset | IterableDataset,
    output_dir: str | Path,
    codec: FlexiCodecModel,
    feature_extractor: FlexiCodecFeatureExtractor,
    *,
    source: Mapping[str, Any] | None = None,
    clips_per_shard: int = 1000,
    chunk_length_s: float = 30.0,
    **options: Any,
) -> dict[str, Any]:
    """
    Turn a dataset of speech into a dataset of tokens: Parquet files with a row for each clip and rate.

    Audio of any rate and number of channels is resampled to the codec's rate and averaged to one channel. The
    columns `file_sampling_rate` and `file_channels` keep what it was, and the manifest counts such clips. Clips that
    cannot be read are listed in `broken.jsonl` and left out.

    A run that ended, however it ended, goes on where it stopped when it is started again with the same arguments.

    Args:
        dataset: From [`load_speech`], or any other with columns of the usual names. Rename others with
            [`standard_columns`].
        output_dir: Directory to write to; made if missing.
        codec: On the device and in the type to run in.
        feature_extractor: The codec's.
        source: What to record about the origin of the dataset.
        clips_per_shard: Clips in a Parquet file. An interruption costs one such file at most.
        chunk_length_s: Clips longer than twice this are encoded alone and in chunks of so many seconds; 0 never.
        options: Those of [`Tokenization`]: `merging_thresholds`, `target_frame_rates`, `num_quantizers`,
            `batch_seconds`, `num_workers` and `split`.

    Returns:
        The manifest.

    Raises:
        DataError: `output_dir` holds tokens made with other settings, a column is missing, or a rate is out of range.
        ValueError: Another argument is out of range.
    """
    _check_positive(clips_per_shard=clips_per_shard)
    dataset = standard_columns(dataset)
    num_clips = len(dataset) if isinstance(dataset, Dataset) else None
    source = {**(source or {}), "num_clips": num_clips, "clips_per_shard": clips_per_shard}
    if isinstance(dataset, Dataset):
        if dataset.with_format("arrow")[:]["audio"].null_count == num_clips:
            raise DataError("there is no audio in the dataset.")
        source["ids_sha256"] = _digest(dataset)
    runner = CodecRunner(codec, feature_extractor, chunk_length_s)
    work = Tokenization(output_dir, runner, source, **options)
    streams = as_streams(dataset, clips_per_shard)
    blocks = (
        Block.from_rows(number, *block)
        for number, stream in enumerate(streams)
        if not work.corpus.is_complete(number)
        for block in read_blocks(stream, clips_per_shard)
        if (number, block[0]) not in work.corpus.summaries
    )
    done = sum(summary["num_clips"] for summary in work.corpus.summaries.values())
    started, seconds = time.perf_counter(), 0.0
    # In a log file, a line a minute.
    interval = 0.1 if sys.stderr.isatty() else 60
    with tqdm(total=num_clips, initial=done, unit="clip", mininterval=interval) as bar:

        def count(clips: list[Clip]) -> None:
            nonlocal seconds
            seconds += sum(clip.tokens[0].seconds for clip in clips if clip.tokens)
            hours = seconds / 3600
            speed = f"{hours:.4f} h of audio, {hours / (time.perf_counter() - started):.5f} h of audio per second"
            bar.set_postfix_str(speed, refresh=False)
            bar.update(len(clips))

        for block in work.run(blocks, count):
            for clip in block.clips:
                if clip.error is not None:
                    tqdm.write(f"skipped {clip.id}: {clip.error}", file=sys.stderr)
    manifest = work.corpus.close(len(streams))
    assert manifest is not None  # all streams are read
    return manifest


class Tokenization:
    """
    Blocks of clips to shards of a corpus: what `tokenize_corpus` and the step for clusters (cluster.py) share.

    Args:
        output_dir: Directory of the corpus.
        runner: The codec.
        source: What decides which clips there are, and how they are cut into blocks.
        merging_thresholds: Encode at each of these; the encoders run once for all. By default, if there are no
            `target_frame_rates` either, at the threshold in the codec's configuration.
        target_frame_rates: Encode at each of these tokens per second, too.
        num_quantizers: Codebooks to keep; all by default.
        batch_seconds: Seconds of audio, with padding, in a batch of the model.
        num_workers: Threads that read audio; by default one for each processor, eight at most.
        split: Name of the split of the tokens.

    Raises:
        DataError: `output_dir` holds tokens made with other settings, or a rate is out of range.
        ValueError: Another argument is out of range.
    """

    def __init__(
        self,
        output_dir: str | Path,
        runner: CodecRunner,
        source: Mapping[str, Any],
        *,
        merging_thresholds: Sequence[float] = (),
        target_frame_rates: Sequence[float] = (),
        num_quantizers: int | None = None,
        batch_seconds: float = 120.0,
        num_workers: int | None = None,
        split: str = "train",
    ):
        _check_positive(batch_seconds=batch_seconds, num_quantizers=num_quantizers)
        config = runner.config
        self.runner, self.batch_seconds = runner, batch_seconds
        self.num_workers = num_workers or min(os.cpu_count() or 1, 8)
        self.rates = rate_settings(config, merging_thresholds, target_frame_rates)
        self.num_quantizers = min(num_quantizers or config.num_quantizers, config.num_quantizers)
        settings = {
            "model": config.name_or_path,
            "revision": getattr(config, "_commit_hash", None),
            "dtype": str(runner.codec.dtype).removeprefix("torch."),
            "num_quantizers": self.num_quantizers,
            "rates": [str(rate) for rate in self.rates],
            "chunk_length_s": runner.chunk_length_s,
            "split": split,
            "source": dict(source),
        }
        self.corpus = Corpus(output_dir, settings)

    def run(
        self, blocks: Iterator[Block], on_batch: Callable[[list[Clip]], None] = lambda clips: None
    ) -> Iterator[Block]:
        """
        Encode blocks, and write their shards.

        Args:
            blocks: They are read in a thread, up to `_PREFETCHED_BATCHES` batches ahead.
            on_batch: Called with the clips of each batch when they are done.

        Yields:
            Each block, when its shard is written.
        """
        with ThreadPoolExecutor(self.num_workers) as pool:
            for block, batch in prefetch(self._batches(blocks, pool), _PREFETCHED_BATCHES):
                self._encode(batch)
                on_batch([clip for clip, _ in batch])
                block.unfinished_batches -= 1
                if block.unfinished_batches == 0:
                    self.corpus.write(block.stream, block.number, table_of(block), self._summary(block))
                    yield block

    def _batches(self, blocks: Iterator[Block], pool: ThreadPoolExecutor) -> Iterator[tuple[Block, Batch]]:
        """Clips of similar length, the longest first, whose audio is being read. An empty block has an empty batch."""
        rate = self.runner.config.sampling_rate
        for block in blocks:
            lengths = list(pool.map(_seconds, block.clips))
            batches: list[list[tuple[Clip, float]]] = [[]]
            longest = 0.0
            for clip, seconds in sorted(zip(block.clips, lengths, strict=True), key=lambda item: -item[1]):
                if batches[-1] and (len(batches[-1]) + 1) * longest > self.batch_seconds:
                    batches.append([])
                if not batches[-1]:
                    # A clip that is processed in chunks is alone.
                    longest = math.inf if chunk_length(seconds, self.runner.chunk_length_s) else seconds
                batches[-1].append((clip, seconds))
            block.unfinished_batches = len(batches)
            for batch in batches:
                reading = [pool.submit(read_clip, clip.audio, rate, seconds > _MAX_HELD_S) for clip, seconds in batch]
                yield block, list(zip((clip for clip, _ in batch), reading, strict=True))

    def _encode(self, batch: Batch) -> None:
        recordings: list[tuple[Clip, AudioClip | AudioFile]] = []
        for clip, reading in batch:
            try:
                recordings.append((clip, reading.result()))
            except ValueError as error:  # one of the network is not the clip's, and ends the run
                clip.fail(error)
        results = self.runner.encode([recording for _, recording in recordings], self.rates, self.num_quantizers)
        for (clip, recording), result in zip(recordings, results, strict=True):
            if isinstance(result, Exception):
                clip.fail(result)
            else:
                clip.tokens = result
                clip.file_sampling_rate, clip.file_channels = recording.file_sampling_rate, recording.num_channels

    def _summary(self, block: Block) -> dict[str, Any]:
        """What a shard says of itself."""
        done = [clip for clip in block.clips if clip.tokens]
        return {
            "num_clips": len(block.clips),
            "last": block.last,
            "seconds": sum(clip.tokens[0].seconds for clip in done),
            "tokens": {
                str(rate): sum(len(clip.tokens[i].token_lengths) for clip in done) for i, rate in enumerate(self.rates)
            },
            "resampled": sum(clip.file_sampling_rate != self.runner.config.sampling_rate for clip in done),
            "downmixed": sum(clip.file_channels > 1 for clip in done),
            "broken": [
                {"id": clip.id, "path": clip.audio and clip.audio.get("path"), "reason": clip.error}
                for clip in block.clips
                if clip.error is not None
            ],
        }


def _check_positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and number <= 0:
            raise ValueError(f"`{name}` must be positive, got {number}.")


def _digest(dataset: Dataset) -> str:
    """A hash of the ids: shards of another list of clips are not taken for shards of this one."""
    digest = hashlib.sha256()
    for table in dataset.select_columns(["id"]).with_format("arrow").iter(batch_size=10_000):
        digest.update("\n".join(map(str, table["id"].to_pylist())).encode() + b"\n")
    return digest.hexdigest()


def as_streams(dataset: Dataset | IterableDataset, clips_per_shard: int) -> list[IterableDataset]:
    """The dataset in parts that are read one after another: its files, or runs of `clips_per_shard` clips."""
    if isinstance(dataset, Dataset):
        dataset = dataset.to_iterable_dataset(num_shards=-(-len(dataset) // clips_per_shard))
    dataset = dataset.with_format("arrow")
    number = min(dataset.num_shards, _MAX_STREAMS)
    return [dataset.shard(number, i) for i in range(number)]


def read_blocks(stream: IterableDataset, clips: int) -> Iterator[tuple[int, bool, pa.Table]]:
    """
    Cut a stream into blocks of so many clips, or fewer if their audio is large.

    Yields:
        The number of a block, whether it is the last, and its rows. An empty stream has one empty block.
    """
    number = size = 0
    rows: list[pa.Table] = []
    for row in stream.iter(batch_size=1):
        num_bytes = pc.sum(pc.binary_length(pc.struct_field(row["audio"], ["bytes"]))).as_py() or 0
        if rows and (len(rows) == clips or size + num_bytes > _MAX_BLOCK_BYTES):
            yield number, False, pa.concat_tables(rows)
            number, size, rows = number + 1, 0, []
        rows.append(row)
        size += num_bytes
    yield number, True, pa.concat_tables(rows) if rows else stream.features.arrow_schema.empty_table()


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made in a thread, up to `depth` of them before they are asked for."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item


def _seconds(clip: Clip) -> float:
    try:
        return audio_duration(clip.audio)
    except ValueError:
        return 0.0  # reading it will say why


def table_of(block: Block) -> pa.Table:
    """The rows of a shard: a row for each clip and rate, in the order of the dataset."""
    pairs = [(row, clip, tokens) for row, clip in enumerate(block.clips) for tokens in clip.tokens]
    given = block.columns.take(pa.array([row for row, _, _ in pairs], pa.int64()))
    features, columns = Features(TOKEN_FEATURES), {"text": pa.nulls(len(pairs), pa.string())}
    for name, feature in Features.from_arrow_schema(given.schema).items():
        if is_audio(feature):
            continue
        free = name
        while free in features and name != "text":
            free = f"source_{free}"
        features[free], columns[free] = feature, given[name]
    columns |= {
        "id": [clip.id for _, clip, _ in pairs],
        "audio_codes": [tokens.audio_codes.tolist() for _, _, tokens in pairs],
        "token_lengths": [tokens.token_lengths.tolist() for _, _, tokens in pairs],
        "duration": [tokens.seconds for _, _, tokens in pairs],
        "file_sampling_rate": [clip.file_sampling_rate for _, clip, _ in pairs],
        "file_channels": [clip.file_channels for _, clip, _ in pairs],
    }
    for name in ("merging_threshold", "target_frame_rate", "frame_rate", "sampling_rate", "num_samples"):
        columns[name] = [getattr(tokens, name) for _, _, tokens in pairs]
    return pa.table({name: columns[name] for name in features}, schema=features.arrow_schema)
