"""Speech to train on: folders, manifests and `datasets` of the Hub, in an order that a resumed run takes up where it left."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import soundfile
import torch
from datasets import Dataset, IterableDataset, Value, load_dataset
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from ..audio_flexicodec import resample


# Examples that a streamed dataset holds back to shuffle them.
_SHUFFLE_BUFFER = 1000


def load_speech(
    source: str | Path,
    split: str = "train",
    *,
    config_name: str | None = None,
    streaming: bool = False,
    audio_column: str = "audio",
    text_column: str = "text",
) -> Dataset | IterableDataset:
    """
    Load speech, undecoded: `decode_audio` reads what is in the column `"audio"`.

    Args:
        source: One of

            - a folder with a `metadata.jsonl` or `metadata.csv` in it or in its subfolder `split`. Its `file_name` (or
              `audio`) is a path relative to the metadata, its other columns (`text`, `speaker`, ...) are kept;
            - such a file itself, under any name;
            - a folder of audio files, without text;
            - a dataset on the Hub or on disk, as `datasets.load_dataset` takes it, with an `Audio` column.
        split: The split, or a part of one (`"train[:1000]"`). Of a folder, the subfolder, where there is one of that name.
        config_name: The configuration of a dataset.
        streaming: Read the dataset while it trains, instead of downloading it first.
        audio_column, text_column: How the columns `"audio"` and `"text"` are called in `source`.

    Returns:
        A dataset with a column `"audio"` of `{"path", "bytes"}`, and `"text"` if there is one.

    Raises:
        FileNotFoundError: A folder holds neither metadata nor audio.
        ValueError: There is no column of that name, or a part was asked of a folder without metadata.
    """
    path = Path(source)
    whole_split = split.split("[")[0]
    manifest = _find_manifest(path, whole_split)
    if manifest is not None:
        kind = "csv" if manifest.suffix == ".csv" else "json"
        dataset = load_dataset(kind, data_files={whole_split: str(manifest)}, split=split)
        column = "file_name" if "file_name" in dataset.column_names else audio_column
        _check_column(dataset, column, manifest)
        files = [{"path": str(manifest.parent / name), "bytes": None} for name in dataset[column]]
        dataset = dataset.remove_columns(column).add_column("audio", files)
    elif path.is_dir() and not _holds_a_dataset(path):
        if split != whole_split:
            raise ValueError(
                f"`split` is {split!r}, but {source} has no metadata to take a part of: pass a whole split."
            )
        folder = path / split if (path / split).is_dir() else path
        suffixes = {f".{name.lower()}" for name in soundfile.available_formats()}
        found = sorted(str(file) for file in folder.rglob("*") if file.suffix.lower() in suffixes - {".raw"})
        if not found:
            raise FileNotFoundError(
                f"`source` {str(source)!r} has neither a metadata.jsonl or metadata.csv nor audio files, nor a subfolder "
                f"{split!r} with them."
            )
        dataset = Dataset.from_dict({"audio": [{"path": file, "bytes": None} for file in found]})
    else:
        dataset = load_dataset(str(source), config_name, split=split, streaming=streaming)
        _check_column(dataset, audio_column, source)
        # Undecoded: `datasets` reads audio with torchcodec, we with soundfile, and only what is used. The plain struct, because
        # even `Audio(decode=False)` asks for torchcodec where a dataset is streamed.
        dataset = dataset.cast_column(audio_column, {"bytes": Value("binary"), "path": Value("string")})
        if audio_column != "audio":
            dataset = dataset.rename_column(audio_column, "audio")
    if text_column != "text":
        _check_column(dataset, text_column, source)
        dataset = dataset.rename_column(text_column, "text")
    return dataset.to_iterable_dataset() if streaming and isinstance(dataset, Dataset) else dataset


def decode_audio(audio: dict[str, Any], sampling_rate: int) -> np.ndarray:
    """
    The waveform `(num_samples,)` at `sampling_rate`, float32 in [-1, 1], of an entry of the column `"audio"`: channels
    averaged, resampled where needed.
    """
    if audio["bytes"] is not None:
        file = io.BytesIO(audio["bytes"])
    else:
        with fsspec.open(audio["path"], "rb") as remote:  # a path, or a URL of a dataset that is streamed
            file = io.BytesIO(remote.read())
    try:
        waveform, file_sampling_rate = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{audio['path']}: not an audio file, or a damaged one: {error.error_string}") from error
    return resample(waveform.mean(axis=1), file_sampling_rate, sampling_rate)


def vary_voice(waveform: np.ndarray, sampling_rate: int, random: np.random.Generator) -> np.ndarray:
    """Another speed and with it pitch (up to 15 %), and another loudness (-12 to 4 dB): a few speakers become many voices."""
    speed = random.uniform(0.85, 1.15)
    waveform = resample(waveform, round(sampling_rate * speed), sampling_rate)
    return waveform * np.float32(10 ** (random.uniform(-12, 4) / 20))


def random_crop(waveform: np.ndarray, num_samples: int, random: np.random.Generator) -> np.ndarray:
    """`num_samples` in a row from a random place; all of a waveform that is shorter."""
    start = random.integers(max(len(waveform) - num_samples, 0) + 1)
    return waveform[start : start + num_samples]


def speech_loader(
    dataset: Dataset | IterableDataset,
    transform: Callable[[dict[str, Any], np.random.Generator], Any],
    collate: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    seed: int,
    start: tuple[int, int] = (0, 0),
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    lengths: Sequence[float] | None = None,
) -> DataLoader:
    """
    Batches without end, epoch after epoch, each in another order. What is in a batch depends on `seed` and on its place
    alone, not on the number of processes or workers: `batch_size` counts the items of all processes, which share each batch.
    What does not fill a batch at the end of an epoch is left out.

    Args:
        dataset: From `load_speech`. A streamed one is shuffled in a buffer.
        transform: Makes an item of an example, with a random generator of its own.
        collate: Makes a batch of a list of items. Both travel to worker processes: no lambdas, no models inside.
        start: The epoch, and the batch in it, to begin with.
        num_workers: Worker processes. A streamed dataset has always one.
        lengths: How long each example is, in any unit, to batch examples of about the same length.

    Returns:
        A loader of `((epoch, batch), collated batch)`: the place of a batch, for `start`.
    """
    if batch_size % num_processes:
        raise ValueError(
            f"`batch_size` ({batch_size}) must be a multiple of the number of processes, {num_processes}."
        )

    collate_places = functools.partial(_collate_places, collate)
    if isinstance(dataset, IterableDataset):
        stream = _Stream(dataset, transform, seed, start, batch_size, process_index, num_processes)
        # `datasets` shuffles otherwise in a worker than outside, so that the number of workers has to be fixed.
        local_size = batch_size // num_processes
        return DataLoader(
            stream,
            local_size,
            num_workers=1,
            collate_fn=collate_places,
            persistent_workers=True,
            generator=torch.Generator(),
        )
    if len(dataset) < batch_size:
        raise ValueError(f"The dataset has {len(dataset)} examples, fewer than `batch_size`={batch_size}.")
    sampler = _PlaceSampler(len(dataset), batch_size, seed, start, process_index, num_processes, lengths)
    examples = _Examples(dataset, transform, seed)
    return DataLoader(
        examples,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_places,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # without one, each loader that is made draws from the random numbers of the model
    )


def _collate_places(
    collate: Callable[[list[Any]], Any], items: list[tuple[tuple[int, int], Any]]
) -> tuple[tuple[int, int], Any]:
    return items[0][0], collate([item for _, item in items])


class _PlaceSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of (epoch, batch, index of an example), of this process."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: tuple[int, int],
        process_index: int,
        num_processes: int,
        lengths: Sequence[float] | None,
    ):
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.part = slice(process_index, None, num_processes)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, first = self.start
        while True:
            batches = self._batches(np.random.default_rng((self.seed, epoch)))
            for batch in range(first, len(batches)):
                yield [(epoch, batch, index) for index in batches[batch, self.part].tolist()]
            epoch, first = epoch + 1, 0

    def _batches(self, random: np.random.Generator) -> np.ndarray:
        """All batches of an epoch, `(num_batches, batch_size)`."""
        order = random.permutation(self.length)[: self.length // self.batch_size * self.batch_size]
        if self.lengths is not None:
            order = order[np.argsort(self.lengths[order], kind="stable")]
            return random.permutation(order.reshape(-1, self.batch_size))
        return order.reshape(-1, self.batch_size)


class _Examples(TorchDataset):
    def __init__(self, dataset: Dataset, transform: Callable[[dict[str, Any], np.random.Generator], Any], seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[tuple[int, int], Any]:
        epoch, batch, index = key
        random = np.random.default_rng((self.seed, epoch, index))
        return (epoch, batch), self.transform(self.dataset[index], random)


class _Stream(TorchIterableDataset):
    """
    Items of this process from a streamed dataset. Every process reads the whole stream and decodes its own part, so that
    all agree where an epoch ends; what comes before `start` in its epoch is read again, undecoded.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        transform: Callable[[dict[str, Any], np.random.Generator], Any],
        seed: int,
        start: tuple[int, int],
        batch_size: int,
        process_index: int,
        num_processes: int,
    ):
        self.dataset = dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        self.transform, self.seed, self.start, self.batch_size = transform, seed, start, batch_size
        self.part = slice(process_index, None, num_processes)

    def __iter__(self) -> Iterator[tuple[tuple[int, int], Any]]:
        epoch, first = self.start
        while True:
            self.dataset.set_epoch(epoch)
            examples: list[tuple[int, dict[str, Any]]] = []
            for number, example in enumerate(self.dataset):
                batch = number // self.batch_size
                if batch < first:
                    continue
                examples.append((number, example))
                if len(examples) == self.batch_size:
                    for number, example in examples[self.part]:
                        random = np.random.default_rng((self.seed, epoch, number))
                        yield (epoch, batch), self.transform(example, random)
                    examples = []
            epoch, first = epoch + 1, 0


def _find_manifest(path: Path, split: str) -> Path | None:
    if path.is_file():
        return path
    for folder in (path / split, path):
        for name in ("metadata.jsonl", "metadata.csv"):
            if (folder / name).is_file():
                return folder / name
    return None


def _holds_a_dataset(folder: Path) -> bool:
    return any(file.suffix in (".parquet", ".arrow", ".tar") for file in folder.rglob("*"))


def _check_column(dataset: Dataset | IterableDataset, column: str, source: str | Path) -> None:
    columns = dataset.column_names
    if columns is not None and column not in columns:
        raise ValueError(f"{source} has no column {column!r}: its columns are {', '.join(columns)}.")


__all__ = ["decode_audio", "load_speech", "random_crop", "speech_loader", "vary_voice"]
