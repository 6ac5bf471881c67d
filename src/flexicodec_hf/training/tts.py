"""What the recipes of the two text-to-speech stages share: speech as tokens of a frozen codec, and a `Trainer` for it."""

from __future__ import annotations

import functools
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import soundfile
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..audio_flexicodec import resample
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_ar import IGNORE_INDEX, FlexiCodecARForConditionalGeneration
from ..modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from ..text_flexicodec import encode_text
from .data import decode_audio, load_speech
from .samples import write_samples


logger = logging.get_logger("transformers.flexicodec_hf")

CODEC_INPUTS = ("input_values", "padding_mask", "input_features", "input_features_mask")


@dataclass
class SpeechDataArguments:
    """What to train on. Sources are those of `flexicodec_hf.training.data.load_speech`."""

    dataset: str = field(
        metadata={
            "help": "A folder with metadata.jsonl or metadata.csv, such a file, or a dataset on the Hub or on disk."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The configuration of a dataset."})
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "What to evaluate on, if it is not a split of `dataset`."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "The split to evaluate on. Without it and `eval_dataset`, see `num_eval_examples`."},
    )
    num_eval_examples: int = field(
        default=64,
        metadata={
            "help": "Examples to evaluate on at most; held out from the training data if nothing else is named."
        },
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Train on so many examples at most."})
    streaming: bool = field(default=False, metadata={"help": "Read the training data while training."})
    audio_column: str = field(default="audio", metadata={"help": "The column of the audio."})
    text_column: str = field(default="text", metadata={"help": "The column of the transcripts."})
    min_duration_s: float = field(default=0.5, metadata={"help": "Leave out clips shorter than this, in seconds."})
    max_duration_s: float = field(default=30.0, metadata={"help": "Leave out clips longer than this, in seconds."})
    token_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder. What the codec makes of the data is computed once, by all processes, and kept there; "
            "without it, it is computed anew for every batch."
        },
    )
    token_cache_batch_size: int = field(default=16, metadata={"help": "Clips that the codec reads at once for it."})


def parse_arguments(model_arguments: type) -> tuple[Any, SpeechDataArguments, TrainingArguments]:
    """
    The arguments of a recipe, from the command line or from the JSON file that is its only argument, with the settings
    that recipes of raw audio need; and the log and the seed set up by them.
    """
    parser = HfArgumentParser((model_arguments, SpeechDataArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    training_args.remove_unused_columns = False
    # Trainer writes it into the model's configuration: without it, what is trained would be slow to generate.
    training_args.use_cache = True
    # Each process reads the stream and takes its share: batches of one process could not be cut up for the others.
    training_args.accelerator_config.dispatch_batches = False
    if training_args.should_log:
        logging.set_verbosity_info()
    logging.enable_explicit_format()
    set_seed(training_args.seed)
    return model_args, data_args, training_args


def load_splits(
    data: SpeechDataArguments, seed: int, evaluate: bool, needs_text: bool
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """
    The examples to train on, shuffled if they are streamed, and those to evaluate on: of the asked duration and, if
    `needs_text`, with a text that can be spoken.

    Raises:
        ValueError: There is no text, or nothing is left to train or to evaluate on.
    """

    def load(source: str, split: str, streaming: bool) -> Dataset | IterableDataset:
        dataset = load_speech(
            source,
            split,
            config_name=data.dataset_config,
            streaming=streaming,
            audio_column=data.audio_column,
            text_column=data.text_column,
        )
        if needs_text and "text" not in (dataset.column_names or ["text"]):
            raise ValueError(f"{source} has no texts: name their column with `--text_column`.")
        return dataset

    # Captured by value: the fingerprint of what is left over, and so the token cache, depends on nothing else.
    shortest, longest = data.min_duration_s, data.max_duration_s

    def suits(example: dict[str, Any]) -> bool:
        if needs_text and not any(map(str.isalnum, example["text"] or "")):
            return False
        return shortest <= _duration(example["audio"]) <= longest

    train = load(data.dataset, data.train_split, data.streaming).filter(suits)
    evaluation = None
    if evaluate and (data.eval_dataset or data.eval_split):
        held_out = load(data.eval_dataset or data.dataset, data.eval_split or data.train_split, False).filter(suits)
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
        train = train.shuffle(seed=seed, buffer_size=1000)
    elif data.max_train_examples is not None:
        train = train.select(range(min(data.max_train_examples, len(train))))
    for name, dataset in (("train", train), ("evaluate", evaluation)):
        if isinstance(dataset, Dataset) and len(dataset) == 0:
            raise ValueError(
                f"Nothing is left of {data.dataset} to {name} on: no clip lasts {data.min_duration_s} to "
                f"{data.max_duration_s} s{' and has a text' if needs_text else ''}."
            )
    return train, evaluation


def _duration(audio: dict[str, Any]) -> float:
    """Seconds, from the header."""
    if audio["bytes"] is not None:
        return float(soundfile.info(io.BytesIO(audio["bytes"])).duration)
    with fsspec.open(audio["path"], "rb") as file:
        return float(soundfile.info(file).duration)


def fresh_config(config_class: type[PreTrainedConfig], overrides: str | None, **values: Any) -> PreTrainedConfig:
    """
    The configuration of a model to be trained from nothing: the defaults, with other values in their place, at any depth.

    Args:
        config_class: The class of the configuration.
        overrides: A JSON object, or the path of a file with one.
        values: What the codec and the tokenizer ask for; `overrides` has the last word.

    Raises:
        ValueError: `overrides` is no JSON object, or has a key that the configuration does not have.
    """
    config = _merge(config_class().to_dict(), values, "")
    if overrides is not None:
        text = overrides if overrides.lstrip().startswith("{") else Path(overrides).read_text(encoding="utf-8")
        try:
            config = _merge(config, json.loads(text), "")
        except json.JSONDecodeError as error:
            raise ValueError(f"`--config_overrides` must be a JSON object, or a file with one: {error}.") from error
    return config_class.from_dict(config)


def _merge(values: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    unknown = sorted(set(changes) - set(values))
    if unknown:
        raise ValueError(
            f"`--config_overrides` names {where}{unknown[0]}, which the configuration does not have. It has: "
            f"{', '.join(sorted(values))}."
        )
    merged = {}
    for key, value in values.items():
        new = changes.get(key, value)
        nested = isinstance(value, dict) and isinstance(new, dict)
        merged[key] = _merge(value, new, f"{where}{key}.") if nested else new
    return merged


def train_text_tokenizer(texts: Iterator[str], vocab_size: int, languages: Sequence[str]) -> PreTrainedTokenizerFast:
    """
    A small tokenizer for a model that is trained from nothing: a byte-level BPE of the texts as the model reads them
    (`text_flexicodec.prepare_text`), with a token for each of `languages`.

    Args:
        texts: What `prepare_text` gives.
        vocab_size: Number of ids: at least the 256 bytes and the languages.
        languages: Whisper's codes, such as `"en"`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in ("<|endoftext|>", *(f"<|{code}|>" for code in languages))]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` must be at least {smallest}, the bytes and the special tokens, got {vocab_size}."
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


class SpeechEncoder:
    """
    A frozen codec, and what the text-to-speech stages learn of it: semantic tokens at a merging threshold drawn for each
    clip and, for the Voicebox, semantic frames and decoder latents.

    Args:
        codec: The codec.
        feature_extractor: Its feature extractor.
        thresholds: The merging thresholds to draw from.
        semantic_frames: Whether its semantic frames are learnt too (the Voicebox's alignment loss).
        latents: Whether its decoder latents are, at 12.5 Hz with nothing merged (a Voicebox that predicts them).
    """

    def __init__(
        self,
        codec: FlexiCodecModel,
        feature_extractor: Any,
        thresholds: Sequence[float],
        semantic_frames: bool = False,
        latents: bool = False,
    ):
        self.codec = codec.eval().requires_grad_(False)
        self.feature_extractor = feature_extractor
        self.thresholds = list(thresholds)
        self.semantic_frames = semantic_frames
        self.latents = latents

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], choice: Tensor) -> dict[str, Tensor]:
        """
        Args:
            batch: The codec's inputs, or what `cache` made of them, as `SpeechCollator` gives either.
            choice (`torch.LongTensor` of shape `(batch_size,)`): Which of the thresholds each clip is merged at.

        Returns:
            `codes` and `token_lengths` of shape `(batch_size, num_tokens)`, 0 at padding; `semantic_frames` and `latents`
            of shape `(batch_size, num_frames, size)`.
        """
        if "codes" in batch:
            rows = torch.arange(len(choice), device=choice.device)
            tokens = {name: batch[name][rows, choice] for name in ("codes", "token_lengths")}
            return tokens | {name: batch[name].float() for name in ("semantic_frames", "latents") if name in batch}
        inputs = {name: batch[name] for name in CODEC_INPUTS}
        threshold = torch.tensor(self.thresholds, device=choice.device)[choice]
        encoded = self.codec.encode(**inputs, num_quantizers=1, merging_threshold=threshold)
        return {"codes": encoded.audio_codes[:, 0], "token_lengths": encoded.token_lengths, **self._frames(inputs)}

    def _frames(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        frames = {}
        if self.semantic_frames:
            features = inputs["input_features"], inputs["input_features_mask"]
            frames["semantic_frames"] = self.codec.get_semantic_frames(*features)
        if self.latents:
            frames["latents"] = self.codec.encode(**inputs, merging_threshold=1.0).latents.transpose(1, 2).float()
        return frames

    @torch.no_grad()
    def cache(
        self, dataset: Dataset, folder: str | Path, batch_size: int, process_index: int, num_processes: int
    ) -> Callable[[], Dataset]:
        """
        Compute the tokens of a share of a dataset at all thresholds, unless they are in `folder`, and keep them there.

        Returns:
            A function that opens the whole dataset, to be called when all processes are done: `codes` and
            `token_lengths` (for each threshold), `length` (frames), `item_seed` (of `SpeechCollator`) and, if asked for,
            `semantic_frames` and `latents` (bytes of `(num_frames, size)` in float16), beside the columns of `dataset`.
        """
        key = Hasher.hash(
            (dataset._fingerprint, self._digest(), self.thresholds, self.semantic_frames, self.latents, "1")
        )
        features = dataset.features | {
            "codes": List(List(Value("int32"))),
            "token_lengths": List(List(Value("int32"))),
            "length": Value("int32"),
            "item_seed": Value("int64"),
        }
        names = [name for name in ("semantic_frames", "latents") if getattr(self, name)]
        features |= dict.fromkeys(names, Value("binary"))
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = [Path(folder) / f"{key}-{i + 1:05d}-of-{num_processes:05d}.arrow" for i in range(num_processes)]
        dataset.shard(num_processes, process_index, contiguous=True).map(
            self._encode_examples,
            batched=True,
            batch_size=batch_size,
            features=Features(features),
            cache_file_name=str(files[process_index]),
            new_fingerprint=f"{key}{process_index}",
            load_from_cache_file=True,
            desc="Tokens of the codec",
        )
        return lambda: concatenate_datasets([Dataset.from_file(str(file)) for file in files])

    def _encode_examples(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rate = self.feature_extractor.sampling_rate
        waveforms = [decode_audio(audio, rate) for audio in examples["audio"]]
        inputs = dict(self.feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt").to(self.codec.device))
        new: dict[str, list[Any]] = {"codes": [[] for _ in waveforms], "token_lengths": [[] for _ in waveforms]}
        frames = self.codec.encode_frames(**inputs, num_quantizers=1)
        for threshold in self.thresholds:
            encoded = self.codec.quantize_frames(frames, num_quantizers=1, merging_threshold=threshold)
            rows = zip(encoded.audio_codes[:, 0], encoded.token_lengths, encoded.audio_codes_mask, strict=True)
            for item, (codes, lengths, mask) in enumerate(rows):
                new["codes"][item].append(codes[mask].tolist())
                new["token_lengths"][item].append(lengths[mask].tolist())
        new["item_seed"] = [_checksum(waveform) for waveform in waveforms]
        new["length"] = [sum(lengths[0]) for lengths in new["token_lengths"]]
        for name, frames in self._frames(inputs).items():
            frames = frames.half().cpu()
            new[name] = [item[:length].numpy().tobytes() for item, length in zip(frames, new["length"], strict=True)]
        return new

    def _digest(self) -> str:
        digest = 0
        for tensor in self.codec.state_dict().values():
            digest = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, digest)
        return f"{digest:08x}{self.codec.config.to_json_string()}{self.feature_extractor.to_json_string()}"

    def latent_statistics(self, dataset: Dataset | IterableDataset, num_examples: int = 256) -> dict[str, list[float]]:
        """`latent_mean` and `latent_std` for the configuration of a Voicebox, over some examples of a dataset."""
        total = squares = torch.zeros((), dtype=torch.float64)
        count = 0
        for example in dataset.take(num_examples):
            inputs = SpeechCollator(self.feature_extractor)([example])
            inputs = {name: value.to(self.codec.device) for name, value in inputs.items()}
            with torch.no_grad():
                frames = self.codec.encode(**{k: inputs[k] for k in CODEC_INPUTS}, merging_threshold=1.0).latents[0]
            frames = frames.cpu().double()
            total, squares = total + frames.sum(dim=1), squares + frames.square().sum(dim=1)
            count += frames.shape[1]
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=1e-8).sqrt()
        return {"latent_mean": mean.tolist(), "latent_std": std.tolist()}


@dataclass
class SpeechCollator:
    """
    Examples to a batch on the CPU: the codec's inputs or cached tokens, and beside them text ids (`tokenizer`) and mel
    spectrograms (`mel_feature_extractor`) where they are asked for.

    `item_seeds` of shape `(batch_size,)` are checksums of the items: what is drawn for an item in training comes from
    its own seed, so that it is the same in whatever process and at whatever place of the batch it is.

    The mel is that of the audio at the codec's sampling rate, as for a voice prompt in generation.
    """

    feature_extractor: Any
    tokenizer: Any = None
    language: str = "en"
    phonemes: bool = True
    mel_feature_extractor: Any = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        cached = "codes" in examples[0]
        rate = self.feature_extractor.sampling_rate
        waveforms: list[np.ndarray] = []
        if not cached or self.mel_feature_extractor is not None:
            waveforms = [decode_audio(example["audio"], rate) for example in examples]
        if cached:
            seeds = [example["item_seed"] for example in examples]
            for name in ("codes", "token_lengths"):
                batch[name] = _pad_lists([example[name] for example in examples])
            for name in {"semantic_frames", "latents"} & examples[0].keys():
                frames = [torch.frombuffer(bytearray(example[name]), dtype=torch.float16) for example in examples]
                frames = [item.view(example["length"], -1) for item, example in zip(frames, examples, strict=True)]
                batch[name] = pad_sequence(frames, batch_first=True)
        else:
            seeds = [_checksum(waveform) for waveform in waveforms]
            batch |= self.feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt")
        if self.mel_feature_extractor is not None:
            mel_rate = self.mel_feature_extractor.sampling_rate
            clips = [resample(waveform, rate, mel_rate) for waveform in waveforms]
            batch |= self.mel_feature_extractor(clips, sampling_rate=mel_rate, return_tensors="pt")
        if self.tokenizer is not None:
            ids = [_text_ids(self.tokenizer, example["text"], self.language, self.phonemes) for example in examples]
            batch["text_ids"] = pad_sequence(ids, batch_first=True)
            batch["text_attention_mask"] = pad_sequence([torch.ones_like(item) for item in ids], batch_first=True)
        batch["item_seeds"] = torch.tensor(seeds)
        return batch


# Phonemes take milliseconds a text: as long as a small model's step.
@functools.lru_cache(maxsize=1 << 17)
def _text_ids(tokenizer: Any, text: str, language: str, phonemes: bool) -> Tensor:
    return torch.tensor(encode_text(tokenizer, text, language, phonemes=phonemes))


def _checksum(waveform: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(waveform).data)


def _pad_lists(items: list[list[list[int]]]) -> Tensor:
    """As many rows for each item, of any length, to `(batch_size, num_rows, longest)`, 0 at padding."""
    longest = max(len(row) for rows in items for row in rows)
    return torch.tensor([[row + [0] * (longest - len(row)) for row in rows] for rows in items])


class ARBatches:
    """
    What `TTSTrainer` feeds the AR model: the tokens of each clip at one of the model's merging thresholds, drawn anew in
    each step, the model being told which.
    """

    def __init__(self, model: FlexiCodecARForConditionalGeneration, encoder: SpeechEncoder, seed: int):
        self.model, self.encoder, self.seed = model, encoder, seed

    def __call__(self, batch: dict[str, Tensor], step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        randoms = _item_randoms(batch["item_seeds"], self.seed, step)
        thresholds = self.encoder.thresholds
        choice = [int(random.integers(len(thresholds))) for random in randoms]
        tokens = self.encoder(batch, torch.tensor(choice, device=batch["item_seeds"].device))
        codes, lengths = tokens["codes"], tokens["token_lengths"]
        used = int((lengths > 0).sum(dim=1).max())
        codes, lengths = codes[:, :used], lengths[:, :used]
        inputs = self.model.build_inputs(
            batch["text_ids"],
            batch["text_attention_mask"],
            codes,
            lengths,
            lengths > 0,
            merging_threshold=[thresholds[item] for item in choice] if self.model.config.merging_thresholds else None,
            return_labels=True,
        )
        counts = {
            "token_loss": (inputs["labels"] != IGNORE_INDEX).sum(),
            "duration_loss": (inputs["duration_labels"] != IGNORE_INDEX).sum(),
        }
        return inputs | {"use_cache": False}, counts


class VoiceboxBatches:
    """What `TTSTrainer` feeds the Voicebox: tokens at a threshold drawn for each clip in each step, the mel or latent to
    predict, cut to whole codec frames, and the time, noise and prompt of each clip."""

    def __init__(self, model: FlexiCodecVoiceboxModel, encoder: SpeechEncoder, seed: int):
        self.model, self.encoder, self.seed = model, encoder, seed

    def __call__(self, batch: dict[str, Tensor], step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        device = batch["item_seeds"].device
        factor = self.model.config.upsample_factor
        randoms = _item_randoms(batch["item_seeds"], self.seed, step)
        choice = torch.tensor([int(random.integers(len(self.encoder.thresholds))) for random in randoms])
        tokens = self.encoder(batch, choice.to(device))
        frames = tokens["token_lengths"].sum(dim=1)
        if self.model.config.predicts_latent:
            target = tokens["latents"]
        else:
            target = batch["mel"]
            frames = torch.minimum(frames, batch["mel_mask"].sum(dim=1) // factor)
        frames = frames * factor
        generators = [torch.Generator(device).manual_seed(int(random.integers(2**63))) for random in randoms]
        drawn = self.model.draw_flow(frames, generators)
        target = target[:, : drawn["noise"].shape[1]]
        inputs = {
            "audio_codes": tokens["codes"],
            "token_lengths": tokens["token_lengths"],
            "labels": target,
            "mel_mask": torch.arange(target.shape[1], device=device) < frames[:, None],
            **drawn,
        }
        counts = {"flow_loss": (frames - drawn["prompt_lengths"]).sum()}
        if "semantic_frames" in tokens:
            inputs["semantic_features"] = tokens["semantic_frames"]
            counts["repa_loss"] = (frames // factor).sum()
        return inputs, counts


def _item_randoms(item_seeds: Tensor, seed: int, step: int) -> list[np.random.Generator]:
    return [np.random.default_rng((seed, step, item_seed)) for item_seed in item_seeds.tolist()]


class TTSTrainer(Trainer):
    """
    A `Trainer` that makes the model's inputs of a batch on the model's device, with the frozen codec, and takes its losses
    over the batch of all processes: in two processes they are those of one with twice the batch. It logs the parts of the
    loss too.

    Args:
        prepare: `ARBatches` or `VoiceboxBatches`: called with a batch and the step, which is always 0 in evaluation, it
            returns the model's inputs and, for each loss that the model's output has, over how many values it is a mean.
    """

    def __init__(self, *args: Any, prepare: Callable[..., tuple[dict[str, Any], dict[str, Tensor]]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"There are {self.args.n_gpu} GPUs, and one process: start one for each with `accelerate launch` or "
                "`torchrun --nproc_per_node`, or show it one with CUDA_VISIBLE_DEVICES."
            )
        self.prepare = prepare
        self._parts: dict[bool, dict[str, list[Tensor]]] = {True: {}, False: {}}

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            # A column of `datasets` reads each item from its file, in milliseconds; sorting asks for all in each epoch.
            sampler.lengths = sampler.lengths[:]
        return sampler

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        step = self.state.global_step if self.model.training else 0
        model_inputs, counts = self.prepare(inputs, step)
        return model_inputs | {"loss_counts": counts}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counts: dict[str, Tensor] = inputs.pop("loss_counts")
        outputs = model(**inputs)
        # Each process's share of all values, times the number of processes: their mean, which is what distributed
        # training makes of losses and gradients, is then the mean over all values.
        local = torch.stack(list(counts.values())).float()
        shares = local * self.accelerator.num_processes / self.accelerator.reduce(local, "sum")
        losses = {name: outputs[name] * share for name, share in zip(counts, shares, strict=True)}
        for name, value in losses.items():
            self._parts[model.training].setdefault(name, []).append(value.detach())
        loss = torch.stack(list(losses.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for training, prefix in ((True, ""), (False, "eval_")):
            if f"{prefix}loss" in logs:
                for name, values in self._parts[training].items():
                    logs[prefix + name] = self.accelerator.reduce(torch.stack(values).mean(), "mean").item()
                self._parts[training] = {}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # nothing in the batch of audio says what the model computes


class SpeechSamples(TrainerCallback):
    """
    Lets the model speak every `every` steps and at the end, into `output_dir/samples` and TensorBoard. Training goes on as
    if it had not: random states are put back.

    Args:
        speak: Called with the model, gives names and waveforms `(num_samples,)`.
        sampling_rate: Of the waveforms, in hertz.
        every: Steps between samples.
    """

    def __init__(self, speak: Callable[[Any], Iterator[tuple[str, Tensor]]], sampling_rate: int, every: int):
        self.speak, self.sampling_rate, self.every = speak, sampling_rate, every
        self._last_step = -1

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._write(args, state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step != self._last_step:
            self._write(args, state, model)

    def _write(self, args: Any, state: Any, model: Any) -> None:
        self._last_step = state.global_step
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "samples"
        training = model.training
        model.eval()
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(args.seed)
            waveforms = {name: waveform.cpu().numpy() for name, waveform in self.speak(model)}
        model.train(training)
        if waveforms:
            with SummaryWriter(str(folder)) as writer:
                write_samples(writer, folder, state.global_step, waveforms, self.sampling_rate)


def cache_splits(
    encoder: SpeechEncoder,
    train: Dataset | IterableDataset,
    evaluation: Dataset | None,
    data: SpeechDataArguments,
    training: TrainingArguments,
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Both splits with the codec's tokens, computed once by all processes, if `data.token_cache` names a folder."""
    if data.token_cache is None:
        return train, evaluation
    if isinstance(train, IterableDataset):
        raise ValueError("`--token_cache` keeps what is read, `--streaming` does not: choose one of them.")
    folder, size, share = data.token_cache, data.token_cache_batch_size, (training.process_index, training.world_size)
    open_train = encoder.cache(train, folder, size, *share)
    open_evaluation = None if evaluation is None else encoder.cache(evaluation, folder, size, *share)
    PartialState().wait_for_everyone()
    return open_train(), None if open_evaluation is None else open_evaluation()


def run_training(trainer: Trainer, data: SpeechDataArguments) -> None:
    """Train, from the last checkpoint in the output directory if there is one (unless `--resume_from_checkpoint` names
    another); evaluate; write the metrics, the model and its card; and push them to the Hub if asked to."""
    args = trainer.args
    if args.do_train:
        found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        checkpoint = args.resume_from_checkpoint or found
        if checkpoint is not None:
            logger.info(f"Going on from {checkpoint}.")
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    card = {"tasks": "text-to-speech", "tags": ["speech", "flexicodec"], "dataset": data.dataset}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


__all__ = [
    "CODEC_INPUTS",
    "ARBatches",
    "SpeechCollator",
    "SpeechDataArguments",
    "SpeechEncoder",
    "SpeechSamples",
    "TTSTrainer",
    "VoiceboxBatches",
    "cache_splits",
    "fresh_config",
    "load_splits",
    "parse_arguments",
    "run_training",
    "train_text_tokenizer",
]
