"""Train a small semantic encoder: a SAN-M speech recognizer with a CTC loss over pieces of words.

accelerate launch examples/train_semantic_encoder.py --dataset speech --output_dir semantic-encoder \
    --per_device_train_batch_size 32 --learning_rate 1e-3 --warmup_steps 1000 --max_steps 20000 \
    --do_eval --eval_strategy steps --eval_steps 1000 --save_steps 1000

A codec merges frames that its frozen semantic encoder finds alike, and its first code describes the
encoder's output. The released codec uses SenseVoice-small. This recipe trains an encoder of any
size from transcribed speech, so that everything can be trained from nothing: pass its output
directory to `train_codec.py` as `--semantic_encoder`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerFast
from transformers.models.fun_asr_nano.configuration_fun_asr_nano import FunAsrNanoEncoderConfig
from transformers.utils import logging

from flexicodec_hf import FlexiCodecFeatureExtractor
from flexicodec_hf.data.sources import decode_audio
from flexicodec_hf.training.batches import SpeechDataArguments, load_splits, vary_voice
from flexicodec_hf.training.semantic_encoder import SemanticEncoderForCTC, best_paths, decode_ctc, train_tokenizer
from flexicodec_hf.training.trainer import SpeechTrainer, SpeechTrainingArguments, parse_arguments, run_training


logger = logging.get_logger("transformers.train_semantic_encoder")

# Examples that the normalization of the features and the pieces of words are taken from.
NUM_EXAMPLES_FOR_STATISTICS = 500
NUM_EXAMPLES_FOR_TOKENIZER = 20_000


@dataclass
class ModelArguments:
    """Sizes of the encoder."""

    hidden_size: int = field(default=192, metadata={"help": "Width of the encoder."})
    intermediate_size: int = field(default=768, metadata={"help": "Width of its feed-forward layers."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Number of its layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Number of its attention heads."})
    vocab_size: int = field(default=512, metadata={"help": "Pieces of words to recognize."})


@dataclass
class SemanticTrainingArguments(SpeechTrainingArguments):
    """The training arguments, with the defaults of this recipe."""

    learning_rate: float = field(default=1e-3, metadata={"help": "The peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "The schedule of the rate."})
    adam_beta2: float = field(default=0.98, metadata={"help": "The second beta of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "The weight decay of AdamW."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "Clips of similar length share a batch, or `random`."}
    )


def augment(waveform: np.ndarray, sampling_rate: int, random: np.random.Generator) -> np.ndarray:
    """
    Change speed, pitch and loudness and add noise, so that the encoder does not depend on them.
    """
    waveform = vary_voice(waveform, sampling_rate, random)
    noise = np.sqrt(np.mean(waveform**2)) * 10 ** (-random.uniform(15, 60) / 20)
    waveform = waveform + noise * random.standard_normal(len(waveform))
    return np.clip(waveform, -1, 1).astype(np.float32)


@dataclass
class CTCCollator:
    """
    Examples to a batch of features and labels. Those that have a seed, the training examples, are
    augmented.
    """

    feature_extractor: FlexiCodecFeatureExtractor
    tokenizer: PreTrainedTokenizerFast

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rate = self.feature_extractor.sampling_rate
        waveforms = [decode_audio(example["audio"], rate) for example in examples]
        if "seed" in examples[0]:
            randoms = [np.random.default_rng(example["seed"]) for example in examples]
            waveforms = [augment(waveform, rate, random) for waveform, random in zip(waveforms, randoms, strict=True)]
        inputs = self.feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt")
        labels = self.tokenizer([example["text"] for example in examples], padding=True, return_tensors="pt")
        return {
            "input_features": inputs.input_features,
            "input_features_mask": inputs.input_features_mask,
            "labels": labels.input_ids.masked_fill(labels.attention_mask == 0, -100),
        }


class CTCTrainer(SpeechTrainer):
    """
    Keeps the likeliest path of each clip in evaluations. A further loss goes into `compute_loss`,
    what it needs into the collator.
    """

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, best_paths(logits, inputs["input_features_mask"].to(logits.device)), labels


def load_inputs(output_dir: Path, dataset: Dataset | IterableDataset, vocab_size: int) -> CTCCollator:
    """
    The feature extractor, which normalizes, and the tokenizer: those of an earlier run, or new
    ones.
    """
    if (output_dir / "preprocessor_config.json").exists():  # written last
        return CTCCollator(
            FlexiCodecFeatureExtractor.from_pretrained(output_dir), PreTrainedTokenizerFast.from_pretrained(output_dir)
        )
    texts = (example["text"] for example in dataset.remove_columns("audio").take(NUM_EXAMPLES_FOR_TOKENIZER))
    tokenizer = train_tokenizer(texts, vocab_size)
    plain = FlexiCodecFeatureExtractor()
    features = []
    for example in dataset.take(NUM_EXAMPLES_FOR_STATISTICS):
        waveform = decode_audio(example["audio"], plain.sampling_rate)
        features.append(plain(waveform, plain.sampling_rate, return_tensors="np").input_features[0])
    mean, std = np.concatenate(features).mean(axis=0), np.concatenate(features).std(axis=0)
    feature_extractor = FlexiCodecFeatureExtractor(cmvn_shift=-mean, cmvn_scale=1 / np.maximum(std, 1e-3))
    tokenizer.save_pretrained(output_dir)
    feature_extractor.save_pretrained(output_dir)
    return CTCCollator(feature_extractor, tokenizer)


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, SpeechDataArguments, SemanticTrainingArguments, argv=argv
    )
    with training_args.main_process_first(local=False):
        train_dataset, eval_dataset = load_splits(
            data_args, training_args.seed, evaluate=training_args.do_eval, needs_text=True
        )
        collator = load_inputs(Path(training_args.output_dir), train_dataset, model_args.vocab_size)
    tokenizer = collator.tokenizer
    if isinstance(train_dataset, Dataset):  # about as long as the speech
        train_dataset = train_dataset.add_column("length", [len(text) for text in train_dataset["text"]])

    config = FunAsrNanoEncoderConfig(
        hidden_size=model_args.hidden_size,
        intermediate_size=model_args.intermediate_size,
        num_hidden_layers=model_args.num_hidden_layers,
        num_attention_heads=model_args.num_attention_heads,
        num_timestamp_prediction_layers=0,
        max_position_embeddings=10_006,  # ten minutes
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )

    def word_errors(prediction: EvalPrediction) -> dict[str, float]:
        texts = [tokenizer.decode(row[row >= 0]) for row in prediction.label_ids]
        recognized = decode_ctc(tokenizer, torch.from_numpy(prediction.predictions))
        for text, words in zip(texts[:5], recognized[:5], strict=True):
            logger.info(f"{text} | {words}")
        return {"wer": jiwer.wer(texts, recognized), "cer": jiwer.cer(texts, recognized)}

    trainer = CTCTrainer(
        SemanticEncoderForCTC(config),
        training_args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_metrics=word_errors,
    )
    run_training(trainer, data_args, tasks="automatic-speech-recognition")


if __name__ == "__main__":
    main()
