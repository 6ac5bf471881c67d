"""Train the codec to reconstruct speech.

accelerate launch examples/train_codec.py --dataset speech --semantic_encoder semantic-encoder \
    --config_overrides examples/flexicodec_tiny.json --output_dir codec  # from nothing
accelerate launch examples/train_codec.py --dataset speech --model_name_or_path flexicodec \
    --output_dir tuned  # from a codec; with --semantic_encoder, around another encoder

The losses are those of the paper (arXiv:2510.00981): multi-scale mel spectra, discriminators that
the codec has to fool and whose layers' features it has to match, the quantizers' losses, and the
distance of the decoded semantic tokens from the semantic encoder's features. The first
`--fixed_rate_steps` merge nothing; after them each batch draws a merging threshold. On a small
machine, `--discriminator_start` puts off the discriminators, which cost several times what the
codec does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from flexicodec_hf import FlexiCodecConfig, FlexiCodecFeatureExtractor, FlexiCodecModel
from flexicodec_hf.data.sources import decode_audio
from flexicodec_hf.training.batches import SpeechDataArguments, load_splits, random_crop, vary_voice
from flexicodec_hf.training.gan import GANTrainer, GANTrainingArguments, Generated
from flexicodec_hf.training.semantic_encoder import SemanticEncoderForCTC
from flexicodec_hf.training.trainer import override_config, parse_arguments, run_training


logger = logging.get_logger("transformers.train_codec")

# What `--semantic_encoder` brings to a codec.
ENCODER = ("semantic_encoder.", "semantic_query_embedding.")
# Seconds of a clip that are evaluated at most.
EVAL_SECONDS = 10
# What is evaluated: the merging threshold (None: the config's) and the number of quantizers (None:
# all).
SETTINGS = {"all_quantizers": (1.0, None), "semantic": (1.0, 1), "merged": (None, None), "merged_semantic": (None, 1)}


@dataclass
class ModelArguments:
    """
    The codec to start from: `model_name_or_path`, a new one around `semantic_encoder`, or the former
    around the latter.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "A codec, a Hub id or a directory."})
    keep_tokens: bool = field(
        default=False,
        metadata={"help": "Train only what decodes the tokens, so that tokens, and models of them, stay as they are."},
    )
    semantic_encoder: str | None = field(
        default=None,
        metadata={
            "help": "The output of train_semantic_encoder.py: to train a new codec around, or in place of the encoder "
            "of `model_name_or_path`."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Where the new codec differs from the released one, or from `model_name_or_path`: a JSON object "
            "or a file with one."
        },
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and self.semantic_encoder is None:
            raise ValueError("pass --model_name_or_path, or --semantic_encoder, or both")
        if self.config_overrides is not None and self.semantic_encoder is None:
            raise ValueError("--config_overrides needs --semantic_encoder: a trained codec stays what it is")
        if self.keep_tokens and (self.model_name_or_path is None or self.semantic_encoder is not None):
            raise ValueError("--keep_tokens needs --model_name_or_path alone: a new encoder has other tokens")


@dataclass
class CodecTrainingArguments(GANTrainingArguments):
    """The training arguments of the codec."""

    max_steps: int = field(default=800_000, metadata={"help": "Steps of the whole training."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Clips in a batch of each process."})
    fixed_rate_steps: int = field(default=0, metadata={"help": "Steps at the start that merge nothing."})
    merging_threshold_range: list[float] = field(
        default_factory=lambda: [0.85, 1.0], metadata={"help": "Range of the merging thresholds after them."}
    )
    vary_voices: bool = field(
        default=False, metadata={"help": "Play each clip at another speed, pitch and loudness in each epoch."}
    )


def new_codec(config: FlexiCodecConfig, semantic_encoder: str) -> FlexiCodecModel:
    """A codec with random weights around a trained semantic encoder."""
    recognizer = SemanticEncoderForCTC.from_pretrained(semantic_encoder)
    recognizer.encoder.config._name_or_path = ""  # a folder of this machine
    config.num_semantic_queries, config.semantic_query_ids = 1, [0]
    config.semantic_model_config = recognizer.encoder.config
    codec = FlexiCodecModel(config)
    # The model's own initialization, of a fixed width, fits layers as wide as the released ones; in
    # narrow ones the signal would vanish. PyTorch's goes by the layer's size.
    for module in codec.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
            module.reset_parameters()
    start_codebooks(codec)
    codec.semantic_encoder.load_state_dict(recognizer.encoder.state_dict())
    codec.semantic_query_embedding.load_state_dict(recognizer.query_embedding.state_dict())
    return codec


@torch.no_grad()
def start_codebooks(codec: FlexiCodecModel) -> None:
    """
    Let each codebook begin with directions of its own and entries as large as the latents soon are.
    Smaller ones take thousands of steps to grow, in which the residuals explode.
    """
    quantizers, size = codec.acoustic_quantizer.quantizers, codec.config.codebook_dim
    directions = torch.empty(len(quantizers) * size, codec.config.hidden_size)
    for quantizer, rows in zip(quantizers, nn.init.orthogonal_(directions).split(size), strict=True):
        quantizer.in_proj.weight.copy_(rows)
        quantizer.out_proj.weight.copy_(rows.T)
        nn.init.zeros_(quantizer.in_proj.bias)
        nn.init.zeros_(quantizer.out_proj.bias)
        nn.init.normal_(quantizer.codebook.weight, std=0.5)


def load_codec(model_args: ModelArguments) -> FlexiCodecModel:
    if model_args.model_name_or_path is None:
        return new_codec(override_config(FlexiCodecConfig(), model_args.config_overrides), model_args.semantic_encoder)
    codec = FlexiCodecModel.from_pretrained(model_args.model_name_or_path)
    if model_args.semantic_encoder is not None:
        config = override_config(codec.config, model_args.config_overrides)
        old, codec = codec.state_dict(), new_codec(config, model_args.semantic_encoder)
        shapes = {name: weight.shape for name, weight in codec.state_dict().items()}
        kept = {name: weight for name, weight in old.items() if not name.startswith(ENCODER)}
        kept = {name: weight for name, weight in kept.items() if weight.shape == shapes[name]}
        new = [name for name in codec.load_state_dict(kept, strict=False).missing_keys if not name.startswith(ENCODER)]
        if new:
            logger.warning(f"Starts with random weights, because the encoder has another size: {', '.join(new)}.")
    if model_args.keep_tokens:
        codec.requires_grad_(False)
        codec.bottleneck.requires_grad_(True)
        codec.acoustic_decoder.requires_grad_(True)
    return codec


@dataclass
class CodecCollator:
    """
    Crops of examples, in other voices if `vary`, as the codec's inputs of `num_samples` samples.
    """

    feature_extractor: FlexiCodecFeatureExtractor
    num_samples: int
    vary: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        waveforms, rate = [], self.feature_extractor.sampling_rate
        for example in examples:
            random = np.random.default_rng(example["seed"])
            waveform = decode_audio(example["audio"], rate)
            if self.vary:
                waveform = np.clip(vary_voice(waveform, rate, random), -1, 1)
            waveforms.append(random_crop(waveform, self.num_samples, random))
        padding = {"padding": "max_length", "max_length": self.num_samples}
        return dict(self.feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt", **padding))


class CodecTrainer(GANTrainer):
    def generate(self, model: nn.Module, batch: dict[str, Tensor]) -> Generated:
        config = self.model.generator.config
        threshold, num_quantizers = self._draw()
        output = model(**batch, merging_threshold=threshold, num_quantizers=num_quantizers)
        losses = {"commitment": output.commitment_loss, "codebook": output.codebook_loss}
        num_tokens = output.audio_codes_mask.sum().float()
        if output.distillation_loss is not None:
            # A mean over tokens, of which processes have different numbers.
            share = num_tokens / self.accelerator.reduce(num_tokens, "mean")
            losses["distillation"] = output.distillation_loss * share
        rate = num_tokens / output.token_lengths.sum() * config.frame_rate
        return Generated(batch["input_values"], output.audio_values, losses, {"tokens_per_second": rate})

    def _draw(self) -> tuple[float, int | Tensor]:
        """
        A merging threshold for the batch, and how many quantizers it uses: one, or a number for
        each item.
        """
        args, config = self.args, self.model.generator.config
        random = np.random.default_rng((args.seed, self.state.global_step))
        threshold = random.uniform(*args.merging_threshold_range)
        if self.state.global_step < args.fixed_rate_steps:
            threshold = 1.0
        if random.random() < config.quantizer_bypass_rate:
            return threshold, 1
        # Drawn for the batch of all processes, so that their number changes nothing.
        size, most = args.per_device_train_batch_size, config.num_quantizers
        total = size * self.accelerator.num_processes
        counts = random.integers(min(2, most), most + 1, size=total)
        counts[random.random(total) >= config.quantizer_dropout] = most
        start = size * self.accelerator.process_index
        return threshold, torch.from_numpy(counts[start : start + size])

    def evaluate_clip(self, model: Any, waveform: np.ndarray) -> tuple[dict[str, float], dict[str, Tensor]]:
        rate = self.sampling_rate
        inputs = self.processing_class(waveform, sampling_rate=rate, return_tensors="pt").to(model.device)
        metrics, sounds = {}, {}
        for name, (threshold, num_quantizers) in SETTINGS.items():
            output = model(**inputs, merging_threshold=threshold, num_quantizers=num_quantizers)
            sounds[name] = output.audio_values[0, 0]
            metrics[f"mel_{name}"] = self.mel_loss(output.audio_values, inputs["input_values"]).item()
            tokens = output.token_lengths.shape[1] / output.token_lengths.sum() * model.config.frame_rate
            metrics[f"tokens_per_second_{name}"] = tokens.item()
        return metrics, sounds


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, SpeechDataArguments, CodecTrainingArguments, argv=argv
    )
    codec = load_codec(model_args)
    config = codec.config
    config.merging_threshold_range = list(training_args.merging_threshold_range)
    feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(
        model_args.semantic_encoder or model_args.model_name_or_path
    )
    train_dataset, eval_dataset = load_splits(data_args, training_args.seed)
    num_samples = round(training_args.crop_s * config.sampling_rate)
    longest = EVAL_SECONDS * config.sampling_rate
    trainer = CodecTrainer(
        codec,
        feature_extractor,
        training_args,
        train_dataset,
        CodecCollator(feature_extractor, num_samples, training_args.vary_voices),
        [decode_audio(example["audio"], config.sampling_rate)[:longest] for example in eval_dataset or []],
    )
    trainer.loss_weights = {
        **GANTrainer.loss_weights,
        "commitment": config.commitment_loss_weight,
        "codebook": config.codebook_loss_weight,
        "distillation": config.distillation_loss_weight,
    }
    run_training(trainer, data_args)


if __name__ == "__main__":
    main()
