"""
Training of the two text-to-speech stages: speech as tokens of a frozen codec, batches for the
models, a `Trainer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg

from ..audio_flexicodec import resample
from ..data.sources import decode_audio
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_ar import IGNORE_INDEX, FlexiCodecARForConditionalGeneration
from ..modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from ..text_flexicodec import encode_text
from .batches import SpeechDataArguments, cached_map, with_seeds
from .trainer import SpeechTrainer


CODEC_INPUTS = ("input_values", "padding_mask", "input_features", "input_features_mask")


@dataclass
class TTSDataArguments(SpeechDataArguments):
    """
    `SpeechDataArguments` with the limits of text-to-speech, and a cache of what the codec makes of
    the data.
    """

    min_duration_s: float = HfArg(default=0.5, help="Leave out clips shorter than this, in seconds.")
    max_duration_s: float = HfArg(default=30.0, help="Leave out clips longer than this, in seconds.")
    token_cache: str | None = HfArg(
        default=None,
        help="A folder. The codec's tokens of the data are computed once, by all processes, and kept there; "
        "without it, they are computed anew for every batch.",
    )
    token_cache_batch_size: int = HfArg(default=16, help="Clips that the codec reads at once for it.")


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
            threshold = torch.tensor(self.thresholds, device=choice.device)[choice]
            (encoded,), frames = self._encode(batch, [threshold])
            codes, lengths = encoded.audio_codes[:, 0], encoded.token_lengths
        used = int((lengths > 0).sum(dim=1).max())
        return {"codes": codes[:, :used], "token_lengths": lengths[:, :used], **frames}

    def _encode(
        self, batch: Mapping[str, Tensor], thresholds: Sequence[float | Tensor]
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Semantic tokens at each of the thresholds, and the frames that are asked for."""
        inputs = {name: batch[name] for name in CODEC_INPUTS}
        frames = self.codec.encode_frames(**inputs, num_quantizers=None if self.latents else 1)
        encoded = [self.codec.quantize_frames(frames, 1, threshold) for threshold in thresholds]
        wanted: dict[str, Any] = {}
        if self.semantic_frames:
            positions = torch.arange(frames.semantic_frames.shape[1], device=frames.num_frames.device)
            wanted["semantic_frames"] = frames.semantic_frames * (positions < frames.num_frames[:, None])[..., None]
        if self.latents:
            unmerged: Any = self.codec.quantize_frames(frames, merging_threshold=1.0)
            wanted["latents"] = unmerged.latents.mT.float()
        return encoded, wanted

    @torch.no_grad()
    def cache(self, dataset: Dataset, folder: str | Path, batch_size: int, share: slice = slice(None)) -> Dataset:
        """
        A dataset with its tokens at all thresholds, which are kept in `folder`: `codes` and
        `token_lengths` (for each threshold), `length` (frames) and, if asked for, `semantic_frames`
        and `latents` (bytes of `(num_frames, size)` in float16). `share` is of [`cached_map`].
        """
        configs = (self.codec.config.to_json_string(), self.feature_extractor.to_json_string())
        weights = {name: tensor.cpu() for name, tensor in self.codec.state_dict().items()}
        settings = Hasher.hash((weights, *configs, self.thresholds, self.semantic_frames, self.latents))
        rows = List(List(Value("int32")))
        names = [name for name in ("semantic_frames", "latents") if getattr(self, name)]
        features = {"codes": rows, "token_lengths": rows, "length": Value("int32")}
        features |= dict.fromkeys(names, Value("binary"))
        return cached_map(dataset, self._encode_examples, folder, settings, features, batch_size, share)

    def _encode_examples(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rate = self.feature_extractor.sampling_rate
        waveforms = [decode_audio(audio, rate) for audio in examples["audio"]]
        inputs = self.feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt").to(self.codec.device)
        encoded, frames = self._encode(inputs, self.thresholds)
        new: dict[str, list[Any]] = {"codes": [], "token_lengths": []}
        for item in range(len(waveforms)):
            masks = [(output, output.audio_codes_mask[item]) for output in encoded]
            new["codes"].append([output.audio_codes[item, 0, mask].tolist() for output, mask in masks])
            new["token_lengths"].append([output.token_lengths[item, mask].tolist() for output, mask in masks])
        new["length"] = [sum(lengths[0]) for lengths in new["token_lengths"]]
        for name, values in frames.items():
            items = zip(values.half().cpu(), new["length"], strict=True)
            new[name] = [item[:length].numpy().tobytes() for item, length in items]
        return new

    @torch.no_grad()
    def latent_statistics(self, dataset: Dataset | IterableDataset, num_examples: int = 256) -> dict[str, list[float]]:
        """
        `latent_mean` and `latent_std` for the configuration of a Voicebox, over some examples of a
        dataset.
        """
        collate, latents = SpeechCollator(self.feature_extractor), []
        for example in dataset.take(num_examples):
            batch = collate([example])
            inputs = {name: batch[name].to(self.codec.device) for name in CODEC_INPUTS}
            latents.append(self.codec.encode(**inputs, merging_threshold=1.0).latents[0].cpu().double())
        std, mean = torch.std_mean(torch.cat(latents, dim=1), dim=1, correction=0)
        return {"latent_mean": mean.tolist(), "latent_std": std.clamp(min=1e-4).tolist()}


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
    encoder: SpeechEncoder, train: Dataset | IterableDataset, evaluation: Dataset | None, data: TTSDataArguments
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """
    Both splits with the codec's tokens, computed once by all processes, if `data.token_cache` names
    a folder.
    """
    if data.token_cache is None:
        return train, evaluation
    if isinstance(train, IterableDataset):
        raise ValueError("`--token_cache` keeps what is read, `--streaming` does not: choose one of them.")
    state = PartialState()
    for share in (slice(state.process_index, None, state.num_processes), slice(None)):
        train_tokens, evaluation_tokens = (
            split and encoder.cache(split, data.token_cache, data.token_cache_batch_size, share)
            for split in (train, evaluation)
        )
        state.wait_for_everyone()
    return train_tokens, evaluation_tokens
