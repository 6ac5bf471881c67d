"""Train a small semantic encoder: a SAN-M speech recognizer with a CTC loss over pieces of words.

accelerate launch examples/train_semantic_encoder.py --dataset speech --output_dir semantic-encoder \
    --per_device_train_batch_size 32 --learning_rate 1e-3 --warmup_steps 1000 --max_steps 20000 \
    --do_eval --eval_strategy steps --eval_steps 1000 --save_steps 1000

A codec merges frames that its frozen semantic encoder finds alike, and its first code describes the
encoder's output. The released codec uses SenseVoice-small. This recipe trains an encoder of any
size from transcribed speech, so that everything can be trained from nothing: pass its output
directory to `train_codec.py` as `--semantic_encoder`.

`--teacher` names a Whisper model in CTranslate2's format, whose encoder the new one imitates as well:
it hears more, and learns from clips without text too. With `--similarity_rates 0.91 8.3 0.86 6.25`
merging thresholds mean what they mean for the released codec: `OUTPUT_DIR/calibrated` has the encoder
to use.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedTokenizerFast
from transformers.models.fun_asr_nano.configuration_fun_asr_nano import FunAsrNanoEncoderConfig
from transformers.utils import logging

from flexicodec_hf import FlexiCodecConfig, FlexiCodecFeatureExtractor
from flexicodec_hf.data.files import atomic_directory, atomic_file
from flexicodec_hf.data.sources import decode_audio
from flexicodec_hf.training.batches import SpeechDataArguments, load_splits, vary_voice
from flexicodec_hf.training.semantic_encoder import (
    SemanticEncoderForCTC,
    best_paths,
    calibrate_similarities,
    decode_ctc,
    similarity_spread_loss,
    teacher_loss,
    train_tokenizer,
)
from flexicodec_hf.training.teacher import TeacherProjection, with_teacher_states
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
    teacher: str | None = field(
        default=None, metadata={"help": "Whisper in CTranslate2's format, a directory, to learn from."}
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Where its states are kept. Default: `teacher` in the output directory."}
    )


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
    dropout: float = field(default=0.1, metadata={"help": "The dropout of the encoder."})
    teacher_weight: float = field(default=5.0, metadata={"help": "The weight of the distance from the teacher."})
    similarity_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Two merging thresholds, each with the tokens per second it should give."},
    )
    similarity_weight: float = field(default=2.0, metadata={"help": "The weight of the loss that serves them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity_rates is not None and len(self.similarity_rates) != 4:
            raise ValueError(
                "`--similarity_rates` needs a threshold, a rate, another threshold and another rate, such as "
                f"0.91 8.3 0.86 6.25, got {self.similarity_rates}."
            )

    @property
    def rates(self) -> dict[float, float]:
        """Tokens per second by merging threshold."""
        numbers = self.similarity_rates or []
        return dict(zip(numbers[::2], numbers[1::2], strict=True))


def augment(waveform: np.ndarray, sampling_rate: int, random: np.random.Generator) -> np.ndarray:
    """
    Change speed, pitch and loudness and add noise, so that the encoder does not depend on them.
    """
    waveform = vary_voice(waveform, sampling_rate, random)
    noise = np.sqrt(np.mean(waveform**2)) * 10 ** (-random.uniform(15, 60) / 20)
    waveform = waveform + noise * random.standard_normal(len(waveform))
    return np.clip(waveform, -1, 1).astype(np.float32)


def warp_spectrum(features: Tensor, factor: float, num_mel_bins: int) -> Tensor:
    """
    Stretch the bands of stacked mel features `(num_features, size)`: a factor above 1 makes the vocal
    tract longer.
    """
    frames = features.unflatten(-1, (-1, num_mel_bins))
    places = (torch.arange(num_mel_bins) * factor).clamp(max=num_mel_bins - 1)
    left = places.long()
    right = (left + 1).clamp(max=num_mel_bins - 1)
    return torch.lerp(frames[..., left], frames[..., right], places - left).flatten(-2)


@dataclass
class CTCCollator:
    """
    Examples to a batch of features and labels, and what a teacher heard in them. Those that have a
    seed, the training examples, are augmented.
    """

    feature_extractor: FlexiCodecFeatureExtractor
    tokenizer: PreTrainedTokenizerFast
    projection: TeacherProjection | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rate = self.feature_extractor.sampling_rate
        waveforms = [decode_audio(example["audio"], rate) for example in examples]
        randoms = [np.random.default_rng(example["seed"]) for example in examples if "seed" in example]
        if randoms:
            waveforms = [augment(waveform, rate, random) for waveform, random in zip(waveforms, randoms, strict=True)]
        inputs = self.feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt")
        features = inputs.input_features
        for row, random in enumerate(randoms):
            features[row] = warp_spectrum(features[row], random.uniform(0.9, 1.1), self.feature_extractor.num_mel_bins)
        ids = [torch.tensor(self.tokenizer(example.get("text") or "").input_ids).long() for example in examples]
        batch = {
            "input_features": features,
            "input_features_mask": inputs.input_features_mask,
            "labels": pad_sequence(ids, batch_first=True, padding_value=-100),
        }
        if self.projection is not None:
            lengths = inputs.input_features_mask.sum(dim=1).tolist()
            states = map(_teacher_states, examples)
            targets = [self.projection.targets(*pair) for pair in zip(states, lengths, strict=True)]
            batch["teacher_targets"] = pad_sequence(targets, batch_first=True)
        return batch


def _teacher_states(example: dict[str, Any]) -> Tensor:
    states = torch.frombuffer(bytearray(example["teacher_states"]), dtype=torch.float16)
    return states.view(example["length"], -1).float()


class CTCTrainer(SpeechTrainer):
    """Adds the losses of a teacher and of similarities, and keeps the likeliest path of each clip in evaluations."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        targets, mask = inputs.pop("teacher_targets", None), inputs["input_features_mask"]
        outputs = model(**inputs)
        losses = {"ctc": outputs.loss}
        if targets is not None:
            losses["teacher"] = self.args.teacher_weight * teacher_loss(outputs.last_hidden_state, targets, mask)
        if self.args.rates:
            spread = similarity_spread_loss(outputs.last_hidden_state, mask, self.args.rates)
            losses["similarity"] = self.args.similarity_weight * spread
        self.keep_means(losses, model.training)
        loss = torch.stack(list(losses.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys=["last_hidden_state"]
        )
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
    texts = (example.get("text") or "" for example in dataset.remove_columns("audio").take(NUM_EXAMPLES_FOR_TOKENIZER))
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


def load_projection(output_dir: Path, dataset: Dataset, size: int) -> TeacherProjection:
    """What the encoder learns of the teacher's states: that of an earlier run, or a new one."""
    file = output_dir / "teacher_projection.safetensors"
    if not file.exists():
        states = [_teacher_states(example) for example in dataset.take(NUM_EXAMPLES_FOR_STATISTICS)]
        with atomic_file(file) as path:
            save_file(TeacherProjection.fit(torch.cat(states), size)._asdict(), path)
    return TeacherProjection(**load_file(file))


@torch.no_grad()
def save_calibrated(
    model: SemanticEncoderForCTC, collator: CTCCollator, dataset: Dataset, rates: dict[float, float], folder: Path
) -> None:
    """Save a copy of the encoder whose merging thresholds have the rates asked for on a dataset."""
    model = copy.deepcopy(model).float().cpu().eval()
    clips = []
    for example in dataset:
        batch = collator([example])
        states = model(batch["input_features"], batch["input_features_mask"]).last_hidden_state
        length = int(states.shape[1] / FlexiCodecConfig().semantic_downsampling_factor)
        clips.append(F.interpolate(states.mT, max(length, 1), mode="linear")[0].T)
    num_frames = torch.tensor([len(clip) for clip in clips])
    reached = calibrate_similarities(model, pad_sequence(clips, batch_first=True), num_frames, rates)
    logger.info(", ".join(f"{rate:.2f} tokens per second at {threshold}" for threshold, rate in reached.items()))
    with atomic_directory(folder) as path:
        model.save_pretrained(path)
        collator.feature_extractor.save_pretrained(path)
        collator.tokenizer.save_pretrained(path)


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, SpeechDataArguments, SemanticTrainingArguments, argv=argv
    )
    output_dir = Path(training_args.output_dir)
    if training_args.rates and not training_args.do_eval:
        raise ValueError(
            "`--similarity_rates` needs `--do_eval`: the encoder is calibrated on the clips to evaluate on."
        )
    if model_args.teacher and data_args.streaming:
        raise ValueError(
            "`--teacher` hears the data before the training, `--streaming` reads them during it: choose one of them."
        )
    with training_args.main_process_first(local=False):
        train_dataset, eval_dataset = load_splits(
            data_args, training_args.seed, evaluate=training_args.do_eval, needs_text=model_args.teacher is None
        )
        collator = load_inputs(output_dir, train_dataset, model_args.vocab_size)
        if model_args.teacher:
            cache = model_args.teacher_cache or output_dir / "teacher"
            train_dataset = with_teacher_states(train_dataset, model_args.teacher, cache)
            if eval_dataset is not None:
                eval_dataset = with_teacher_states(eval_dataset, model_args.teacher, cache)
            collator.projection = load_projection(output_dir, train_dataset, model_args.hidden_size)
        elif isinstance(train_dataset, Dataset):  # about as long as the speech
            train_dataset = train_dataset.add_column("length", [len(text) for text in train_dataset["text"]])
    tokenizer = collator.tokenizer

    config = FunAsrNanoEncoderConfig(
        hidden_size=model_args.hidden_size,
        intermediate_size=model_args.intermediate_size,
        num_hidden_layers=model_args.num_hidden_layers,
        num_attention_heads=model_args.num_attention_heads,
        num_timestamp_prediction_layers=0,
        max_position_embeddings=10_006,  # ten minutes
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout=training_args.dropout,
        attention_dropout=training_args.dropout,
    )

    def word_errors(prediction: EvalPrediction) -> dict[str, float]:
        known = prediction.label_ids[:, 0] >= 0
        texts = [tokenizer.decode(row[row >= 0]) for row in prediction.label_ids[known]]
        recognized = decode_ctc(tokenizer, torch.from_numpy(prediction.predictions[known]))
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
    if training_args.rates and trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_calibrated(model, collator, eval_dataset, training_args.rates, output_dir / "calibrated")


if __name__ == "__main__":
    main()
