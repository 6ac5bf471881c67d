"""Speech to train on: which clips, in which order, and with which random choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import Sampler
from transformers.hf_argparser import HfArg

from ..audio_flexicodec import resample
from ..data.sources import audio_duration, load_speech


# Examples that a streamed dataset holds back to shuffle them.
_SHUFFLE_BUFFER = 1000
# Clips whose new columns are kept together: an interruption loses no more than these.
CLIPS_PER_FILE = 500


@dataclass
class SpeechDataArguments:
    """
    What to train and evaluate on. Sources are those of `flexicodec_hf.data.sources.load_speech`.
    """

    dataset: str = HfArg(help="A folder of audio, a metadata file, or a dataset on the Hub or on disk.")
    dataset_config: str | None = HfArg(default=None, help="The configuration of a dataset.")
    train_split: str = HfArg(default="train", help="The split to train on.")
    eval_dataset: str | None = HfArg(default=None, help="What to evaluate on, if it is not a split of `dataset`.")
    eval_split: str | None = HfArg(
        default=None, help="The split to evaluate on. Without it and `eval_dataset`, see `num_eval_examples`."
    )
    num_eval_examples: int = HfArg(
        default=64, help="Examples to evaluate on at most; held out from the training data if no split is named."
    )
    max_train_examples: int | None = HfArg(default=None, help="Examples to train on at most.")
    streaming: bool = HfArg(default=False, help="Read the training data while training.")
    audio_column: str | None = HfArg(default=None, help="The column of the audio, if not a usual one.")
    text_column: str | None = HfArg(default=None, help="The column of the text, if not a usual one.")
    min_duration_s: float = HfArg(default=0.0, help="Leave out clips shorter than this, in seconds.")
    max_duration_s: float = HfArg(default=float("inf"), help="Leave out clips longer than this, in seconds.")


def load_splits(
    data: SpeechDataArguments, seed: int, *, evaluate: bool = True, needs_text: bool = False
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """
    Load the examples to train and to evaluate on.

    Args:
        data: Names the sources and the limits.
        seed: Seed of the order of streamed training data.
        evaluate: Whether to load or hold out `data.num_eval_examples` to evaluate on.
        needs_text: Whether to keep only examples whose text has a letter or digit.

    Returns:
        The training examples (shuffled if they are streamed) and the evaluation examples (`None` if
        there are none).

    Raises:
        ValueError: There is no text column, or nothing is left to train or to evaluate on.
    """

    def load(source: str, split: str, streaming: bool) -> Dataset | IterableDataset:
        dataset = load_speech(
            source,
            config_name=data.dataset_config,
            split=split,
            streaming=streaming,
            audio_column=data.audio_column,
            text_column=data.text_column,
        )
        if needs_text and "text" not in (dataset.column_names or ["text"]):
            raise ValueError(f"{source} has no texts: name their column with `--text_column`.")
        return dataset.filter(suits) if needs_text or limited else dataset

    # Plain numbers: the fingerprint of the filtered data, and so the token cache, depends on
    # nothing else.
    shortest, longest = data.min_duration_s, data.max_duration_s
    limited = shortest > 0 or longest < float("inf")

    def suits(example: dict[str, Any]) -> bool:
        if needs_text and not any(map(str.isalnum, example["text"] or "")):
            return False
        return not limited or shortest <= audio_duration(example["audio"]) <= longest

    train = load(data.dataset, data.train_split, data.streaming)
    evaluate = evaluate and data.num_eval_examples > 0
    evaluation = None
    if evaluate and (data.eval_dataset or data.eval_split):
        held_out = load(data.eval_dataset or data.dataset, data.eval_split or data.train_split, False)
        evaluation = held_out.select(range(min(data.num_eval_examples, len(held_out))))
    elif evaluate and isinstance(train, IterableDataset):
        evaluation = Dataset.from_list(list(train.take(data.num_eval_examples)))
        train = train.skip(data.num_eval_examples)
    elif evaluate:
        parts = train.train_test_split(min(data.num_eval_examples, len(train) // 2), seed=0)
        train, evaluation = parts["train"], parts["test"]

    if isinstance(train, IterableDataset):
        if data.max_train_examples is not None:
            train = train.take(data.max_train_examples)
        train = train.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    elif data.max_train_examples is not None:
        train = train.select(range(min(data.max_train_examples, len(train))))
    for name, dataset in (("train", train), ("evaluate", evaluation)):
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(
                f"Nothing is left of {data.dataset} to {name} on: no clip lasts {data.min_duration_s} to "
                f"{data.max_duration_s} s{' and has a text' if needs_text else ''}."
            )
    return train, evaluation


class SeededExamples(TorchDataset):
    """
    A dataset whose examples carry the seed of their random choices, in `"seed"`: `(seed, epoch,
    index)`. What is drawn with it is the same in any batch, process and worker.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """
        The example of an epoch and an index, as `EpochSampler` gives them, or of an index in epoch
        0.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.dataset[index] | {"seed": (self.seed, epoch, index)}


class SeededStream(TorchIterableDataset):
    """A streamed dataset whose examples carry their seeds, as [`SeededExamples`] has them."""

    def __init__(self, dataset: IterableDataset, seed: int):
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, example in enumerate(self.dataset):
            yield example | {"seed": (self.seed, self.epoch, index)}


def with_seeds(dataset: Dataset | IterableDataset, seed: int) -> SeededExamples | SeededStream:
    """
    The dataset with a seed in each example: `SeededExamples` or, for a streamed dataset,
    `SeededStream`.
    """
    return SeededStream(dataset, seed) if isinstance(dataset, IterableDataset) else SeededExamples(dataset, seed)


class EpochSampler(Sampler[tuple[int, int]]):
    """
    A random order of examples, another in each epoch, that depends on nothing but the seed and the
    epoch. It gives the epoch with each index, because Accelerate passes `set_epoch` on to samplers,
    but not always to datasets.

    Args:
        num_examples: Number of examples.
        seed: Seed of the order.
        lengths: How long each example is, in any unit: then examples of similar length share a
            batch.
        batch_size: Examples in a batch of all processes together; needed with `lengths`.
    """

    def __init__(self, num_examples: int, seed: int, lengths: Sequence[float] | None = None, batch_size: int = 1):
        self.num_examples, self.seed, self.batch_size, self.epoch = num_examples, seed, batch_size, 0
        self.lengths = None if lengths is None else np.asarray(lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_examples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(self.num_examples)
        if self.lengths is not None:
            whole, rest = np.split(order, [len(order) // self.batch_size * self.batch_size])
            batches = whole[np.argsort(self.lengths[whole], kind="stable")].reshape(-1, self.batch_size)
            order = np.concatenate([random.permutation(batches).ravel(), rest])
        return iter([(self.epoch, index) for index in order.tolist()])


def random_crop(waveform: np.ndarray, num_samples: int, random: np.random.Generator) -> np.ndarray:
    """`num_samples` in a row from a random place, or all of a waveform that is shorter."""
    start = random.integers(max(len(waveform) - num_samples, 0) + 1)
    return waveform[start : start + num_samples]


def vary_voice(waveform: np.ndarray, sampling_rate: int, random: np.random.Generator) -> np.ndarray:
    """
    Change speed and pitch together (by up to 15 %) and loudness (by -12 to 4 dB): few speakers
    become many voices.
    """
    speed = random.uniform(0.85, 1.15)
    waveform = resample(waveform, round(sampling_rate * speed), sampling_rate)
    return waveform * np.float32(10 ** (random.uniform(-12, 4) / 20))


def cached_map(
    dataset: Dataset,
    function: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
    folder: str | Path,
    settings: Any,
    features: dict[str, Any],
    batch_size: int,
    share: slice = slice(None),
) -> Dataset:
    """
    A dataset with new columns, which are computed once and kept in a folder. They are kept in parts:
    an interrupted run goes on, and processes can share the parts.

    Args:
        dataset: Speech, as `load_splits` gives it.
        function: From the columns of some examples to the new ones, as `Dataset.map` takes it.
        folder: Where to keep them.
        settings: What decides the new columns, beside the audio.
        features: Types of the new columns.
        batch_size: Examples for the function at once.
        share: Which of the parts to compute and return.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(dataset), CLIPS_PER_FILE)[share]:
        part = dataset.select(range(start, min(start + CLIPS_PER_FILE, len(dataset))))
        key = Hasher.hash((part["audio"][:], settings))
        new = part.map(
            function,
            batched=True,
            batch_size=batch_size,
            remove_columns=part.column_names,
            features=Features(features),
            cache_file_name=str(Path(folder) / f"{key}.arrow"),
            new_fingerprint=key,
            load_from_cache_file=True,
            desc=f"{Path(folder).name}, from clip {start + 1} of {len(dataset)}",
        )
        parts.append(concatenate_datasets([part, new], axis=1))
    return concatenate_datasets(parts) if parts else dataset.select([])
