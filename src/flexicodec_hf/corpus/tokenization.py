"""The run: read, encode, write, by any number of processes."""

from __future__ import annotations

import hashlib
import io
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from tqdm import tqdm

from ..audio_flexicodec import AudioClip, AudioError, audio_seconds, read_audio
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from .shards import (
    Shard,
    close_corpus,
    find_shards,
    finished_blocks,
    library_versions,
    shard_path,
    write_shard,
)
from .sources import Columns, column_of, num_streams, prepare, read_stream


T = TypeVar("T")

# Batches whose audio is read while the model is busy with another.
_BATCHES_AHEAD = 4

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
class Setting:
    """One of the rates at which every clip is encoded."""

    merging_threshold: float | None = None
    target_frame_rate: float | None = None

    def __str__(self) -> str:
        if self.target_frame_rate is not None:
            return f"target_frame_rate={self.target_frame_rate}"
        return f"merging_threshold={self.merging_threshold}"


@dataclass(frozen=True)
class Source:
    """The encoded audio of a clip: its row in a block, its name, and the file or its contents."""

    row: int
    name: str
    path: str | None
    contents: bytes | None

    @property
    def file(self) -> tuple[str, BinaryIO | None]:
        """Its name in messages, and what to read if that is no file on disk."""
        return self.path or self.name, None if self.contents is None else io.BytesIO(self.contents)


@dataclass
class Tokens:
    """What is kept of a clip: its name, numbers of its audio; codes, lengths and threshold for each setting."""

    name: str
    num_samples: int
    seconds: float
    file_sampling_rate: int
    file_channels: int
    codes: list[np.ndarray]
    lengths: list[np.ndarray]
    thresholds: list[float]


@dataclass
class Block:
    """Rows of the dataset that become a shard, and what became of them so far, by their place."""

    stream: int
    number: int
    rows: pa.Table
    last: bool
    num_clips: int
    unfinished_batches: int = 0
    tokens: dict[int, Tokens] = field(default_factory=dict)
    broken: dict[int, dict[str, str | None]] = field(default_factory=dict)

    def fail(self, source: Source, reason: object) -> None:
        text = " ".join(str(reason).split())
        self.broken[source.row] = {"id": source.name, "path": source.path, "reason": text}


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
    audio_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
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
    Turn a dataset of speech into a dataset of tokens: Parquet files with a row for each clip and setting.

    Audio of any rate and number of channels is resampled to the codec's rate and averaged to one channel; the columns
    `file_sampling_rate` and `file_channels` keep what it was, and the manifest counts such clips. Clips that cannot
    be read are listed in `broken.jsonl` and left out.

    A run that ended, however it ended, goes on where it stopped when it is started again with the same arguments, with
    any number of processes. Each of them calls this function, with the same `output_dir`.

    Args:
        dataset: From [`load_corpus`], or any dataset with a column of audio. Its audio is not decoded by `datasets`.
        output_dir: Directory to write to; made if missing.
        codec: On the device and in the type to run in.
        feature_extractor: The codec's.
        merging_thresholds: Encode at each of these; the encoders run once for all. By default, where there are no
            `target_frame_rates` either, at the one of the codec's configuration.
        target_frame_rates: And at each of these tokens per second.
        num_quantizers: Rows of codes to keep; all by default.
        audio_column: Column of the audio; by default the one that is of this type.
        text_column: Column to call `text`, or `column.field`; by default the first of `text`, `transcription`,
            `transcript`, `sentence`, `txt` and `json.text` that is there.
        id_column: Column to call `id`; by default `id` or `__key__`, else the audio file's name.
        source: What to record of the dataset's origin.
        split: Name of the split of the tokens.
        batch_seconds: Seconds of audio, with padding, in a batch of the model.
        clips_per_shard: Clips in a Parquet file: what an interruption costs each process at most.
        chunk_length_s: Clips longer than twice this are encoded alone and in chunks of so many seconds; 0 never.
        num_workers: Threads that read audio; by default one for each processor, eight at most.
        rank, world_size: Which of how many processes this is; by default from the environment variables `RANK` and
            `WORLD_SIZE`, as `accelerate launch` and `torchrun` set them.

    Returns:
        The manifest, once all shards of all processes are there; `None` where others are still at work.

    Raises:
        CorpusError: `output_dir` holds tokens that were made otherwise, or a column is missing.
        ValueError: An argument is out of its range.
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
    num_clips = len(dataset) if isinstance(dataset, Dataset) else None
    stream = prepare(dataset, clips_per_shard)
    columns = Columns.of(stream.features, audio_column, text_column, id_column)
    rates = _rates(codec, merging_thresholds, target_frame_rates)
    settings = {
        "model": codec.config.name_or_path,
        "revision": getattr(codec.config, "_commit_hash", None),
        "dtype": str(codec.dtype).removeprefix("torch."),
        "num_quantizers": min(num_quantizers or codec.config.num_quantizers, codec.config.num_quantizers),
        "rates": [str(rate) for rate in rates],
        "chunk_length_s": chunk_length_s,
        "clips_per_shard": clips_per_shard,
        "source": {
            **(source or {}),
            "audio_column": columns.audio,
            "text_column": columns.text,
            "id_column": columns.id,
            "num_streams": num_streams(stream),
            "num_clips": num_clips,
            "ids_sha256": _digest(dataset, columns),
        },
    }
    shards = find_shards(output_dir, split, settings)
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    streams = num_streams(stream)
    if not _complete(shards, streams):
        # It is of another time: a shard was deleted to be made again.
        (output_dir / "manifest.json").unlink(missing_ok=True)
    encoder = _Encoder(codec, feature_extractor, rates, settings["num_quantizers"], chunk_length_s)
    versions = library_versions()

    share = _Share(rank, world_size, streams)
    done = sum(shard.summary["num_clips"] for key, shard in shards.items() if share.has(*key))
    progress = _Progress(share, num_clips, done)
    with progress, ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, 8)) as pool:
        blocks = _blocks(stream, columns, clips_per_shard, shards, share)
        batches = _batches(blocks, columns, pool, codec.config.sampling_rate, batch_seconds, chunk_length_s)
        for block, loading in _ahead(batches, _BATCHES_AHEAD):
            progress.add(encoder.encode(block, loading))
            block.unfinished_batches -= 1
            if block.unfinished_batches == 0:
                path = shard_path(output_dir, split, block.stream, block.number)
                table, summary = _table(block, columns, encoder)
                write_shard(path, table, settings, summary, versions)
                progress.fail(summary["broken"])

    shards = find_shards(output_dir, split, settings)
    return close_corpus(output_dir, split, shards, versions) if _complete(shards, streams) else None


def _rates(
    codec: FlexiCodecModel, merging_thresholds: Sequence[float], target_frame_rates: Sequence[float]
) -> list[Setting]:
    """The rates that are asked for. A wrong one would fail each clip."""
    lowest = codec.config.frame_rate / codec.config.max_frames_per_token
    for name, values, low, high in (
        ("merging_thresholds", merging_thresholds, -1, 1),
        ("target_frame_rates", target_frame_rates, lowest, codec.config.frame_rate),
    ):
        if len(set(values)) < len(values) or not all(low <= value <= high for value in values):
            raise ValueError(f"`{name}` must be different numbers between {low} and {high}, got {list(values)}.")
    if not merging_thresholds and not target_frame_rates:
        merging_thresholds = [codec.config.merging_threshold]
    return [
        *(Setting(merging_threshold=float(value)) for value in merging_thresholds),
        *(Setting(target_frame_rate=float(value)) for value in target_frame_rates),
    ]


def _digest(dataset: Dataset | IterableDataset, columns: Columns) -> str | None:
    """Of the ids of a dataset that can tell them at once: shards of another list of clips are not taken for this one's."""
    if not isinstance(dataset, Dataset) or columns.id not in dataset.column_names:
        return None
    digest = hashlib.sha256()
    for table in dataset.select_columns([columns.id]).with_format("arrow").iter(batch_size=10_000):
        digest.update("\n".join(map(str, table[columns.id].to_pylist())).encode() + b"\n")
    return digest.hexdigest()


def _complete(shards: Mapping[tuple[int, int], Shard], streams: int) -> bool:
    return all(finished_blocks(shards, stream) for stream in range(streams))


@dataclass(frozen=True)
class _Share:
    """What of a dataset is a process's own: whole streams if there are enough of them, else blocks of each in turns."""

    rank: int
    world_size: int
    streams: int

    def reads(self) -> range:
        """The streams it has to read."""
        if self.streams >= self.world_size:
            return range(self.rank, self.streams, self.world_size)
        return range(self.streams)

    def has(self, stream: int, block: int) -> bool:
        turn = stream if self.streams >= self.world_size else stream + block
        return turn % self.world_size == self.rank


class _Progress:
    """A progress bar of the first process, and a line of each at its end."""

    def __init__(self, share: _Share, num_clips: int | None, done: int):
        self.rank = share.rank
        self.clips = self.broken = 0
        self.done = done
        self.seconds = 0.0
        self.started = time.perf_counter()
        total = None
        if num_clips is not None and share.streams >= share.world_size:
            each, more = divmod(num_clips, share.streams)
            total = sum(each + (stream < more) for stream in share.reads())
        # In a log file, a line a minute.
        interval = 0.1 if sys.stderr.isatty() else 60
        self.bar = tqdm(total=total, initial=done, unit="clip", disable=self.rank > 0, mininterval=interval)

    def add(self, seconds: Sequence[float]) -> None:
        self.clips += len(seconds)
        self.seconds += sum(seconds)
        self.bar.set_postfix_str(f"{self.seconds / 3600:.2f} h of audio, {self.rate:.4f} h/s", refresh=False)
        self.bar.update(len(seconds))

    def fail(self, broken: Sequence[Mapping[str, str]]) -> None:
        self.broken += len(broken)
        self.bar.update(len(broken))
        for entry in broken:
            tqdm.write(f"skipped {entry['id']}: {entry['reason']}", file=sys.stderr)

    @property
    def rate(self) -> float:
        """Hours of audio per second."""
        return self.seconds / 3600 / (time.perf_counter() - self.started)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        parts = [
            f"{self.clips} clips",
            f"{self.seconds / 3600:.4f} h of audio",
            f"{self.rate:.5f} h of audio per second",
        ]
        parts += [f"{count} {name}" for count, name in ((self.broken, "broken"), (self.done, "done before")) if count]
        tqdm.write(f"process {self.rank}: {', '.join(parts)}", file=sys.stderr)


def _blocks(
    dataset: IterableDataset,
    columns: Columns,
    clips_per_shard: int,
    shards: Mapping[tuple[int, int], Shard],
    share: _Share,
) -> Iterator[Block]:
    """What a process has to do."""
    for stream in share.reads():
        if finished_blocks(shards, stream):
            continue
        sizes: list[int] = []
        while (stream, len(sizes)) in shards:
            sizes.append(shards[stream, len(sizes)].summary["num_clips"])
        blocks = read_stream(dataset, stream, columns.audio, sizes, clips_per_shard)
        for number, (rows, last) in enumerate(blocks):
            if share.has(stream, number) and (stream, number) not in shards:
                yield Block(stream, number, rows, last, len(rows))


def _batches(
    blocks: Iterator[Block],
    columns: Columns,
    pool: ThreadPoolExecutor,
    sampling_rate: int,
    batch_seconds: float,
    chunk_length_s: float,
) -> Iterator[tuple[Block, Loading]]:
    """Clips of similar length, the longest first, whose audio is being read. A block of none has one empty batch."""
    for block in blocks:
        measured = []
        for source, future in [(source, pool.submit(_measure, source)) for source in _sources(block, columns)]:
            try:
                measured.append(future.result())
            except (ValueError, OSError) as error:
                block.fail(source, error)
        block.rows = block.rows.drop_columns([columns.audio])
        measured.sort(key=lambda item: -item[1])
        batches: list[list[Source]] = [[]]
        longest = 0.0
        for source, seconds in measured:
            if batches[-1] and (len(batches[-1]) + 1) * longest > batch_seconds:
                batches.append([])
            if not batches[-1]:
                # One that is processed in chunks is alone.
                longest = seconds if seconds <= 2 * chunk_length_s or not chunk_length_s else math.inf
            batches[-1].append(source)
        block.unfinished_batches = len(batches)
        for batch in batches:
            yield block, [(source, pool.submit(_load, source, sampling_rate)) for source in batch]


def _sources(block: Block, columns: Columns) -> Iterator[Source]:
    rows = block.rows
    names = column_of(rows, columns.id).to_pylist() if columns.id else [None] * len(rows)
    for row, (name, audio) in enumerate(zip(names, rows[columns.audio].to_pylist(), strict=True)):
        audio = audio if isinstance(audio, dict) else {"path": audio}
        path, contents = audio.get("path"), audio.get("bytes")
        if name is None:
            name = f"{block.stream:05d}-{block.number:05d}-{row}" if path is None else PurePosixPath(path).name
        yield Source(row, str(name), path, contents)


def _measure(source: Source) -> tuple[Source, float]:
    if source.contents is None and source.path is None:
        raise AudioError(f"{source.name}: the row has no audio.")
    if source.contents is None and "://" in str(source.path):
        try:
            with fsspec.open(source.path, "rb") as file:
                source = replace(source, contents=file.read())
        except FileNotFoundError as error:
            raise AudioError(f"{source.path}: there is no such file.") from error
        except OSError as error:  # the network's fault, not the file's
            raise RuntimeError(f"{source.path}: cannot be fetched: {error}") from error
    return source, audio_seconds(*source.file)


def _load(source: Source, sampling_rate: int) -> AudioClip:
    path, file = source.file
    return read_audio(path, sampling_rate, file)


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made in a thread, up to so many before they are asked for."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item


class _Encoder:
    """The codec at several settings."""

    def __init__(
        self,
        codec: FlexiCodecModel,
        feature_extractor: FlexiCodecFeatureExtractor,
        settings: Sequence[Setting],
        num_quantizers: int,
        chunk_length_s: float,
    ):
        self.codec = codec
        self.feature_extractor = feature_extractor
        self.settings = settings
        self.num_quantizers = num_quantizers
        self.chunk_length_s = chunk_length_s

    def encode(self, block: Block, loading: Loading) -> list[float]:
        """Add what becomes of a batch to its block; returns the seconds of its clips."""
        clips = []
        for source, future in loading:
            try:
                clips.append((source, future.result()))
            except (ValueError, OSError) as error:
                block.fail(source, error)
        before = len(block.tokens)
        whole = [item for item in clips if self._chunk(item[1]) is None]
        for group in (whole, *([item] for item in clips if self._chunk(item[1]) is not None)):
            if group:
                self._encode(block, group)
        return [tokens.seconds for tokens in list(block.tokens.values())[before:]]

    def _chunk(self, clip: AudioClip) -> float | None:
        return self.chunk_length_s if 0 < 2 * self.chunk_length_s < clip.seconds else None

    def _encode(self, block: Block, clips: list[tuple[Source, AudioClip]]) -> None:
        reason: object
        try:
            tokens = self._tokens(clips)
        except torch.OutOfMemoryError:
            reason = f"out of memory on {self.codec.device}."
        except ValueError as error:
            reason = error
        else:
            block.tokens |= {source.row: item for (source, _), item in zip(clips, tokens, strict=True)}
            return
        # Outside of the handlers: they keep the failed batch's memory.
        if len(clips) == 1:
            block.fail(clips[0][0], reason)
        else:
            self._encode(block, clips[: len(clips) // 2])
            self._encode(block, clips[len(clips) // 2 :])

    @torch.inference_mode()
    def _tokens(self, clips: Sequence[tuple[Source, AudioClip]]) -> list[Tokens]:
        chunk = self._chunk(clips[0][1])
        inputs = self.feature_extractor(
            [clip.waveform for _, clip in clips],
            sampling_rate=self.codec.config.sampling_rate,
            return_tensors="pt",
            device=self.codec.device,
        )
        frames = self.codec.encode_frames(**inputs, num_quantizers=self.num_quantizers, chunk_length_s=chunk)
        tokens = [
            Tokens(source.name, clip.num_samples, clip.seconds, clip.file_sampling_rate, clip.num_channels, [], [], [])
            for source, clip in clips
        ]
        for setting in self.settings:
            encoded = self.codec.quantize_frames(
                frames, self.num_quantizers, setting.merging_threshold, setting.target_frame_rate, chunk_length_s=chunk
            )
            all_codes, all_lengths = (
                encoded[name].to("cpu", torch.int32).numpy() for name in ("audio_codes", "token_lengths")
            )
            found = encoded["merging_threshold"].tolist()
            for item, codes, lengths, threshold in zip(tokens, all_codes, all_lengths, found, strict=True):
                num_tokens = np.count_nonzero(lengths)
                item.codes.append(codes[:, :num_tokens])
                item.lengths.append(lengths[:num_tokens])
                item.thresholds.append(threshold if setting.merging_threshold is None else setting.merging_threshold)
        return tokens


def _table(block: Block, columns: Columns, encoder: _Encoder) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of a shard, in the order of the dataset, and what its metadata say of them."""
    config, settings = encoder.codec.config, encoder.settings
    done = sorted(block.tokens)
    clips = [block.tokens[row] for row in done]
    rows = pa.array([row for row in done for _ in settings], pa.int64())
    codes = [codes for clip in clips for codes in clip.codes]
    lengths = [lengths for clip in clips for lengths in clip.lengths]

    def each(values: Iterable[Any]) -> list[Any]:
        return [value for value in values for _ in settings]

    def given(name: str | None) -> pa.Array | pa.ChunkedArray:
        return (
            pa.nulls(len(rows), pa.string())
            if name is None
            else column_of(block.rows, name).take(rows).cast(pa.string())
        )

    features, kept = Features(TOKEN_FEATURES), {}
    for name, feature in columns.metadata.items():
        free = name
        while free in features:
            free = f"source_{free}"
        features[free], kept[free] = feature, name
    schema = features.arrow_schema
    table = schema.empty_table()
    if clips:
        values: dict[str, Any] = {
            "id": each(clip.name for clip in clips),
            "audio_codes": _lists(codes),
            "token_lengths": _lists(lengths),
            "text": given(columns.text),
            "duration": each(clip.seconds for clip in clips),
            "merging_threshold": [threshold for clip in clips for threshold in clip.thresholds],
            "target_frame_rate": [setting.target_frame_rate for _ in clips for setting in settings],
            "frame_rate": [config.frame_rate] * len(rows),
            "sampling_rate": [config.sampling_rate] * len(rows),
            "num_samples": each(clip.num_samples for clip in clips),
            "file_sampling_rate": each(clip.file_sampling_rate for clip in clips),
            "file_channels": each(clip.file_channels for clip in clips),
        }
        values |= {free: block.rows[name].take(rows) for free, name in kept.items()}
        table = pa.table(values, schema=schema)

    num_tokens = [sum(len(clip.lengths[i]) for clip in clips) for i in range(len(settings))]
    return table, {
        "num_clips": block.num_clips,
        "last": block.last,
        "seconds": sum(clip.seconds for clip in clips),
        "tokens": {str(setting): tokens for setting, tokens in zip(settings, num_tokens, strict=True)},
        "resampled": sum(clip.file_sampling_rate != config.sampling_rate for clip in clips),
        "downmixed": sum(clip.file_channels > 1 for clip in clips),
        "broken": [block.broken[row] for row in sorted(block.broken)],
    }


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Each array `(length,)` as a list, or `(num_rows, length)` as a list of lists."""
    lists = pa.array(np.concatenate([array.ravel() for array in arrays]))
    lengths = [[array.shape[-1]] * (array.size // array.shape[-1]) for array in arrays]
    lists = _cut(lists, np.concatenate(lengths))
    return lists if arrays[0].ndim == 1 else _cut(lists, [len(array) for array in arrays])


def _cut(values: pa.Array, lengths: Sequence[int] | np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), values)
