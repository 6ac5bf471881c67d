"""
Training of the two text-to-speech stages: speech as tokens of a frozen codec, batches for the
models, a `Trainer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, TrainingArguments

from ..audio_flexicodec import resample
from ..data.sources import decode_audio
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_ar import IGNORE_INDEX, FlexiCodecARForConditionalGeneration
from ..modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from ..text_flexicodec import encode_text
from .batches import SpeechDataArguments, with_seeds
from .trainer import SpeechTrainer


CODEC_INPUTS = ("input_values", "padding_mask", "input_features", "input_features_mask")


@dataclass
class TTSDataArguments(SpeechDataArguments):
    """
    `SpeechDataArguments` with the limits of text-to-speech, and a cache of what the codec makes of
    the data.
    """

    min_duration_s: float = field(default=0.5, metadata={"help": "Leave out clips shorter than this, in seconds."})
    max_duration_s: float = field(default=30.0, metadata={"help": "Leave out clips longer than this, in seconds."})
    token_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder. The codec's tokens of the data are computed once, by all processes, and kept there; "
            "without it, they are computed anew for every batch."
        },
    )
    token_cache_batch_size: int = field(default=16, metadata={"help": "Clips that the codec reads at once for it."})


def train_text_tokenizer(texts: Iterator[str], vocab_size: int, languages: Sequence[str]) -> PreTrainedTokenizerFast:
    """
    A small tokenizer for a model that is trained from nothing: a byte-level BPE of the texts as the
    model reads them (`text_flexicodec.prepare_text`), with a token for each of `languages`.

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
    A frozen codec, and what the text-to-speech stages learn of it: semantic tokens at a merging
    threshold drawn for each clip and, for the Voicebox, semantic frames and decoder latents.

    Args:
        codec: The codec.
        feature_extractor: Its feature extractor.
        thresholds: The merging thresholds to draw from.
        semantic_frames: Whether its semantic frames are learned too (the Voicebox's alignment loss).
        latents: Whether its decoder latents are, at 12.5 Hz with nothing merged (a Voicebox that
            predicts them).
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
            batch: The codec's inputs, or what `cache` made of them, as `SpeechCollator` gives
                either.
            choice (`torch.LongTensor` of shape `(batch_size,)`): Which of the thresholds each clip
                is merged at.

        Returns:
            `codes` and `token_lengths` of shape `(batch_size, num_tokens)`, 0 at padding;
            `semantic_frames` and `latents` of shape `(batch_size, num_frames, size)`.
        """
        if "codes" in batch:
            rows = torch.arange(len(choice), device=choice.device)
            codes, lengths = batch["codes"][rows, choice], batch["token_lengths"][rows, choice]
            frames = {name: batch[name].float() for name in ("semantic_frames", "latents") if name in batch}
        else:
            inputs = {name: batch[name] for name in CODEC_INPUTS}
            threshold = torch.tensor(self.thresholds, device=choice.device)[choice]
            encoded = self.codec.encode(**inputs, num_quantizers=1, merging_threshold=threshold)
            codes, lengths, frames = encoded.audio_codes[:, 0], encoded.token_lengths, self._frames(inputs)
        used = int((lengths > 0).sum(dim=1).max())
        return {"codes": codes[:, :used], "token_lengths": lengths[:, :used], **frames}

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
        Compute the tokens of a share of a dataset at all thresholds, unless they are in `folder`,
        and keep them there.

        Returns:
            A function that opens the whole dataset, to be called when all processes are done:
            `codes` and `token_lengths` (for each threshold), `length` (frames) and, if asked for,
            `semantic_frames` and `latents` (bytes of `(num_frames, size)` in float16), beside the
            columns of `dataset`.
        """
        settings = (self.thresholds, self.semantic_frames, self.latents)
        configs = (self.codec.config.to_json_string(), self.feature_extractor.to_json_string())
        weights = {name: tensor.cpu() for name, tensor in self.codec.state_dict().items()}
        key = Hasher.hash((dataset._fingerprint, weights, *configs, *settings))
        features = dataset.features | {
            "codes": List(List(Value("int32"))),
            "token_lengths": List(List(Value("int32"))),
            "length": Value("int32"),
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
        new["length"] = [sum(lengths[0]) for lengths in new["token_lengths"]]
        for name, frames in self._frames(inputs).items():
            frames = frames.half().cpu()
            new[name] = [item[:length].numpy().tobytes() for item, length in zip(frames, new["length"], strict=True)]
        return new

    def latent_statistics(self, dataset: Dataset | IterableDataset, num_examples: int = 256) -> dict[str, list[float]]:
        """
        `latent_mean` and `latent_std` for the configuration of a Voicebox, over some examples of a
        dataset.
        """
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
    Examples to a batch on the CPU: the codec's inputs or cached tokens, and beside them text ids
    (`tokenizer`) and mel spectrograms (`mel_feature_extractor`) where they are asked for.

    `seeds` of shape `(batch_size, 3)` are those of `SeededExamples`: what is drawn for an item
    comes from its own seed, and is the same in any process and at any place of the batch.

    The mel spectrogram is taken from the audio at the codec's sampling rate, as for a voice prompt
    in generation.
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
            for name in ("codes", "token_lengths"):
                batch[name] = _pad_lists([example[name] for example in examples])
            for name in {"semantic_frames", "latents"} & examples[0].keys():
                frames = [torch.frombuffer(bytearray(example[name]), dtype=torch.float16) for example in examples]
                frames = [item.view(example["length"], -1) for item, example in zip(frames, examples, strict=True)]
                batch[name] = pad_sequence(frames, batch_first=True)
        else:
            batch |= self.feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt")
        if self.mel_feature_extractor is not None:
            mel_rate = self.mel_feature_extractor.sampling_rate
            clips = [resample(waveform, rate, mel_rate) for waveform in waveforms]
            batch |= self.mel_feature_extractor(clips, sampling_rate=mel_rate, return_tensors="pt")
        if self.tokenizer is not None:
            ids = [_text_ids(self.tokenizer, example["text"], self.language, self.phonemes) for example in examples]
            batch["text_ids"] = pad_sequence(ids, batch_first=True)
            batch["text_attention_mask"] = pad_sequence([torch.ones_like(item) for item in ids], batch_first=True)
        if "seed" in examples[0]:
            batch["seeds"] = torch.tensor([example["seed"] for example in examples])
        return batch


# Phonemes take milliseconds a text: as long as a small model's step.
@functools.lru_cache(maxsize=1 << 17)
def _text_ids(tokenizer: Any, text: str, language: str, phonemes: bool) -> Tensor:
    return torch.tensor(encode_text(tokenizer, text, language, phonemes=phonemes))


def _pad_lists(items: list[list[list[int]]]) -> Tensor:
    """
    As many rows for each item, of any length, to `(batch_size, num_rows, longest)`, 0 at padding.
    """
    longest = max(len(row) for rows in items for row in rows)
    return torch.tensor([[row + [0] * (longest - len(row)) for row in rows] for rows in items])


class ARBatches:
    """
    What `TTSTrainer` feeds the AR model: the tokens of each clip at one of the model's merging
    thresholds, drawn in each epoch, and which one that is.
    """

    def __init__(self, model: FlexiCodecARForConditionalGeneration, encoder: SpeechEncoder):
        self.model, self.encoder = model, encoder

    def __call__(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        thresholds = self.encoder.thresholds
        choice = torch.tensor([int(random.integers(len(thresholds))) for random in _item_randoms(batch["seeds"])])
        tokens = self.encoder(batch, choice.to(batch["seeds"].device))
        codes, lengths = tokens["codes"], tokens["token_lengths"]
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
    """
    What `TTSTrainer` feeds the Voicebox: tokens at a threshold, the mel spectrogram or latent to
    predict, cut to whole codec frames, and the time, noise and prompt of each clip. Threshold,
    time, noise and prompt are drawn in each epoch.
    """

    def __init__(self, model: FlexiCodecVoiceboxModel, encoder: SpeechEncoder):
        self.model, self.encoder = model, encoder

    def __call__(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        device = batch["seeds"].device
        factor = self.model.config.upsample_factor
        randoms = _item_randoms(batch["seeds"])
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


def _item_randoms(seeds: Tensor) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in seeds.tolist()]


class TTSTrainer(SpeechTrainer):
    """
    A `Trainer` that makes the model's inputs of a batch on the model's device, with the frozen
    codec, and takes its losses over the batch of all processes: two processes have the losses of one
    with twice the batch.

    Args:
        prepare: `ARBatches` or `VoiceboxBatches`: called with a batch, it returns the model's
            inputs and, for each loss of the model's output, the number of values that it is a mean
            of.
    """

    def __init__(
        self,
        *args: Any,
        eval_dataset: Any = None,
        prepare: Callable[..., tuple[dict[str, Any], dict[str, Tensor]]],
        **kwargs: Any,
    ):
        super().__init__(*args, eval_dataset=eval_dataset, **kwargs)
        if eval_dataset is not None:
            self.eval_dataset = with_seeds(eval_dataset, self.args.seed)
        self.prepare = prepare

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        model_inputs, counts = self.prepare(super()._prepare_inputs(inputs))
        return model_inputs | {"loss_counts": counts}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        counts: dict[str, Tensor] = inputs.pop("loss_counts")
        outputs = model(**inputs)
        # Each process's share of all values, times the number of processes: their mean, which is
        # what distributed training makes of losses and gradients, is then the mean over all values.
        local = torch.stack(list(counts.values())).float()
        shares = local * self.accelerator.num_processes / self.accelerator.reduce(local, "sum")
        losses = {name: outputs[name] * share for name, share in zip(counts, shares, strict=True)}
        self.keep_means(losses, model.training)
        loss = torch.stack(list(losses.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # a batch of audio does not tell what the model computes


def cache_splits(
    encoder: SpeechEncoder,
    train: Dataset | IterableDataset,
    evaluation: Dataset | None,
    data: TTSDataArguments,
    training: TrainingArguments,
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """
    Both splits with the codec's tokens, computed once by all processes, if `data.token_cache` names
    a folder.
    """
    if data.token_cache is None:
        return train, evaluation
    if isinstance(train, IterableDataset):
        raise ValueError("`--token_cache` keeps what is read, `--streaming` does not: choose one of them.")
    folder, size, share = data.token_cache, data.token_cache_batch_size, (training.process_index, training.world_size)
    open_train = encoder.cache(train, folder, size, *share)
    open_evaluation = None if evaluation is None else encoder.cache(evaluation, folder, size, *share)
    PartialState().wait_for_everyone()
    return open_train(), None if open_evaluation is None else open_evaluation()


__all__ = [
    "CODEC_INPUTS",
    "ARBatches",
    "SpeechCollator",
    "SpeechEncoder",
    "TTSDataArguments",
    "TTSTrainer",
    "VoiceboxBatches",
    "cache_splits",
    "train_text_tokenizer",
]
