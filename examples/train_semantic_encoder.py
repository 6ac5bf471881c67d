"""Train a small semantic encoder: a SAN-M speech recogniser with a CTC loss over pieces of words.

accelerate launch examples/train_semantic_encoder.py --dataset speech --output-dir semantic-encoder

A codec merges frames that its frozen semantic encoder finds alike, and its first code says what the encoder heard. The
released codec uses SenseVoice-small; this recipe makes an encoder of any size from transcribed speech, so that all can be
trained from nothing. `train_codec.py --semantic-encoder semantic-encoder/model` uses it.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerFast
from transformers.models.fun_asr_nano.configuration_fun_asr_nano import FunAsrNanoEncoderConfig

from flexicodec_hf import FlexiCodecFeatureExtractor
from flexicodec_hf.training.data import decode_audio, load_speech, speech_loader, vary_voice
from flexicodec_hf.training.loop import TrainedModel, TrainingLoop, add_loop_arguments, make_accelerator
from flexicodec_hf.training.semantic_encoder import SemanticEncoderForCTC, decode_ctc, train_tokenizer


# Examples that the normalization of the features and the pieces of words are taken from.
NUM_EXAMPLES_FOR_STATISTICS = 500
NUM_EXAMPLES_FOR_TOKENIZER = 20_000


def augment(waveform: np.ndarray, sampling_rate: int, random: np.random.Generator) -> np.ndarray:
    """Another speed and pitch, loudness and noise, so that the encoder does not hang on those."""
    waveform = vary_voice(waveform, sampling_rate, random)
    noise = np.sqrt(np.mean(waveform**2)) * 10 ** (-random.uniform(15, 60) / 20)
    waveform = waveform + noise * random.standard_normal(len(waveform))
    return np.clip(waveform, -1, 1).astype(np.float32)


def read(example: dict[str, Any], random: np.random.Generator, sampling_rate: int) -> tuple[np.ndarray, str]:
    return augment(decode_audio(example["audio"], sampling_rate), sampling_rate, random), example["text"]


def prepare(
    items: list[tuple[np.ndarray, str]],
    feature_extractor: FlexiCodecFeatureExtractor,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Tensor]:
    waveforms, texts = zip(*items, strict=True)
    inputs = feature_extractor(list(waveforms), sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    labels = tokenizer(list(texts), padding=True, return_tensors="pt")
    return {
        "input_features": inputs.input_features,
        "input_features_mask": inputs.input_features_mask,
        "labels": labels.input_ids.masked_fill(labels.attention_mask == 0, -100),
    }


class SemanticEncoderRecipe:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.accelerator = make_accelerator(args)
        load = functools.partial(
            load_speech,
            args.dataset,
            config_name=args.dataset_config,
            streaming=args.streaming,
            audio_column=args.audio_column,
            text_column=args.text_column,
        )
        self.dataset = load(split=args.split)
        self.validation = list(load(split=args.validation_split).take(args.num_validation))
        with self.accelerator.main_process_first():
            self._prepare_inputs(args.output_dir / "model")

        config = FunAsrNanoEncoderConfig(
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_heads,
            num_timestamp_prediction_layers=0,
            max_position_embeddings=10_006,  # ten minutes
            vocab_size=len(self.tokenizer),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.trained = TrainedModel(SemanticEncoderForCTC(config), args, self.accelerator, betas=(0.9, 0.98))

    def _prepare_inputs(self, directory: Path) -> None:
        """The feature extractor, which normalizes, and the tokenizer: those in `directory`, or new ones."""
        if (directory / "tokenizer.json").exists():
            self.feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(directory)
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
            return
        texts = self.dataset.take(NUM_EXAMPLES_FOR_TOKENIZER)["text"]
        self.tokenizer = train_tokenizer(list(texts), self.args.vocab_size)
        plain = FlexiCodecFeatureExtractor()
        features = []
        for example in self.dataset.take(NUM_EXAMPLES_FOR_STATISTICS):
            waveform = decode_audio(example["audio"], plain.sampling_rate)
            features.append(plain(waveform, plain.sampling_rate, return_tensors="np").input_features[0])
        mean, std = np.concatenate(features).mean(axis=0), np.concatenate(features).std(axis=0)
        self.feature_extractor = FlexiCodecFeatureExtractor(cmvn_shift=-mean, cmvn_scale=1 / np.maximum(std, 1e-3))
        self.tokenizer.save_pretrained(directory)
        self.feature_extractor.save_pretrained(directory)

    def batches(self, start: tuple[int, int]) -> DataLoader:
        lengths = None
        if isinstance(self.dataset, Dataset):
            lengths = [len(text) for text in self.dataset["text"]]  # about as long as the speech
        return speech_loader(
            self.dataset,
            functools.partial(read, sampling_rate=self.feature_extractor.sampling_rate),
            functools.partial(prepare, feature_extractor=self.feature_extractor, tokenizer=self.tokenizer),
            batch_size=self.args.batch_size,
            seed=self.args.seed,
            start=start,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=self.args.num_workers,
            lengths=lengths,
        )

    def train_step(self, inputs: dict[str, Tensor], step: int) -> Mapping[str, Tensor | float]:
        self.trained.model.train()
        inputs = {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}
        loss = self.trained.model(**inputs).loss
        norm = self.trained.update(loss)
        return {"loss": loss.detach(), "gradient_norm": norm, "learning_rate": self.trained.learning_rate}

    @torch.inference_mode()
    def evaluate(self, step: int, writer: SummaryWriter | None) -> Mapping[str, float]:
        if writer is None:
            return {}
        model = self.trained.unwrapped.eval()
        losses, texts, heard = [], [], []
        for start in range(0, len(self.validation), self.args.batch_size):
            examples = self.validation[start : start + self.args.batch_size]
            clips = [decode_audio(example["audio"], self.feature_extractor.sampling_rate) for example in examples]
            pairs = [(clip, example["text"]) for clip, example in zip(clips, examples, strict=True)]
            inputs = prepare(pairs, self.feature_extractor, self.tokenizer)
            output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
            losses += [output.loss.item()] * len(examples)
            heard += decode_ctc(self.tokenizer, output.logits, inputs["input_features_mask"])
            texts += [self.tokenizer.decode(row[row != -100]) for row in inputs["labels"]]
        writer.add_text(
            "heard", "\n\n".join(f"{text} | {words}" for text, words in zip(texts, heard, strict=True)), step
        )
        return {"loss": float(np.mean(losses)), "wer": jiwer.wer(texts, heard), "cer": jiwer.cer(texts, heard)}

    def save_pretrained(self, directory: Path) -> None:
        self.trained.unwrapped.save_pretrained(directory)
        self.feature_extractor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small semantic encoder with CTC.")
    add_loop_arguments(parser, max_steps=20_000, batch_size=32, learning_rate=1e-3, warmup_steps=1000)
    model = parser.add_argument_group("model")
    model.add_argument("--hidden-size", type=int, default=192, help="(default: %(default)s)")
    model.add_argument("--intermediate-size", type=int, default=768, help="(default: %(default)s)")
    model.add_argument("--num-layers", type=int, default=8, help="(default: %(default)s)")
    model.add_argument("--num-heads", type=int, default=4, help="(default: %(default)s)")
    model.add_argument("--vocab-size", type=int, default=512, help="pieces of words (default: %(default)s)")
    parser.add_argument("--num-validation", type=int, default=100, help="clips (default: %(default)s)")
    args = parser.parse_args(argv)

    recipe = SemanticEncoderRecipe(args)
    TrainingLoop(args, recipe.accelerator, recipe).run()


if __name__ == "__main__":
    main()
