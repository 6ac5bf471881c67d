"""Train the codec to reconstruct speech.

accelerate launch examples/train_codec.py --dataset speech --semantic-encoder semantic-encoder/model \
    --config examples/flexicodec_tiny.json --output-dir codec                                     # from nothing
accelerate launch examples/train_codec.py --dataset speech --init-from flexicodec --output-dir codec  # from a codec

The losses are those of the paper (arXiv:2510.00981): multi-scale mel spectra, discriminators that the codec has to fool and
whose layers' features it has to match, the quantizers', and the distance of the decoded semantic tokens from the semantic
encoder's features. The first `--fixed-rate-steps` merge nothing; after them each batch draws a merging threshold. On a small
machine, `--discriminator-start` puts off the discriminators, which cost several times what the codec does.
"""

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from flexicodec_hf import FlexiCodecConfig, FlexiCodecFeatureExtractor, FlexiCodecModel
from flexicodec_hf.training.adversarial import (
    ADVERSARIAL_WEIGHT,
    FEATURE_WEIGHT,
    add_adversarial_arguments,
    make_adversary,
)
from flexicodec_hf.training.data import decode_audio, load_speech, random_crop, speech_loader, vary_voice
from flexicodec_hf.training.ema import ExponentialMovingAverage
from flexicodec_hf.training.loop import TrainedModel, TrainingLoop, add_loop_arguments, make_accelerator
from flexicodec_hf.training.losses import MultiScaleMelLoss
from flexicodec_hf.training.samples import write_samples
from flexicodec_hf.training.semantic_encoder import SemanticEncoderForCTC


MEL_WEIGHT = 15.0  # the others are in the codec's config

# What is evaluated: the merging threshold (None is the config's) and the rows of codes.
SETTINGS = {"all_rows": (1.0, None), "semantic": (1.0, 1), "merged": (None, None), "merged_semantic": (None, 1)}


def new_codec(config_file: Path, semantic_encoder: str) -> FlexiCodecModel:
    """A codec with random weights around a trained semantic encoder."""
    recognizer = SemanticEncoderForCTC.from_pretrained(semantic_encoder)
    config = json.loads(config_file.read_text())
    recognizer.encoder.config._name_or_path = ""  # a folder of this machine
    config["semantic_model_config"] = recognizer.encoder.config.to_dict()
    codec = FlexiCodecModel(FlexiCodecConfig(**config, num_semantic_queries=1, semantic_query_ids=[0]))
    # The model's own initialization, of a fixed width, fits layers as wide as the released ones; in narrow ones the signal
    # would vanish. PyTorch's goes by the layer's size.
    for module in codec.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)):
            module.reset_parameters()
    codec.semantic_encoder.load_state_dict(recognizer.encoder.state_dict())
    codec.semantic_query_embedding.load_state_dict(recognizer.query_embedding.state_dict())
    return codec


def crop(
    example: dict[str, Any], random: np.random.Generator, sampling_rate: int, num_samples: int, vary: bool
) -> np.ndarray:
    waveform = decode_audio(example["audio"], sampling_rate)
    if vary:
        waveform = np.clip(vary_voice(waveform, sampling_rate, random), -1, 1)
    return random_crop(waveform, num_samples, random)


def prepare(
    waveforms: list[np.ndarray], feature_extractor: FlexiCodecFeatureExtractor, num_samples: int
) -> dict[str, Tensor]:
    inputs = feature_extractor(
        waveforms,
        sampling_rate=feature_extractor.sampling_rate,
        padding="max_length",
        max_length=num_samples,
        return_tensors="pt",
    )
    return dict(inputs)


class CodecRecipe:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.accelerator = make_accelerator(args)
        source = args.init_from or args.semantic_encoder
        self.feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(source)
        if args.init_from:
            codec = FlexiCodecModel.from_pretrained(args.init_from)
            if args.keep_tokens:
                codec.requires_grad_(False)
                codec.bottleneck.requires_grad_(True)
                codec.acoustic_decoder.requires_grad_(True)
        else:
            codec = new_codec(args.config, args.semantic_encoder)
        codec.config.merging_threshold_range = list(args.merging_threshold_range)
        self.config = codec.config
        self.num_samples = round(args.crop_s * self.config.sampling_rate)

        options = {"config_name": args.dataset_config, "streaming": args.streaming, "audio_column": args.audio_column}
        self.dataset = load_speech(args.dataset, args.split, **options)
        validation = load_speech(args.dataset, args.validation_split, **options).take(args.num_validation)
        limit = 10 * self.config.sampling_rate
        self.validation = [decode_audio(row["audio"], self.config.sampling_rate)[:limit] for row in validation]

        self.mel_loss = MultiScaleMelLoss(self.config.sampling_rate).to(self.accelerator.device)
        self.ema = ExponentialMovingAverage(codec.to(self.accelerator.device), args.ema_decay)
        self.trained = TrainedModel(codec, args, self.accelerator)
        self.accelerator.register_for_checkpointing(self.ema)
        self.adversary = make_adversary(args, self.accelerator)

    def batches(self, start: tuple[int, int]) -> DataLoader:
        return speech_loader(
            self.dataset,
            functools.partial(
                crop,
                sampling_rate=self.config.sampling_rate,
                num_samples=self.num_samples,
                vary=self.args.vary_voices,
            ),
            functools.partial(prepare, feature_extractor=self.feature_extractor, num_samples=self.num_samples),
            batch_size=self.args.batch_size,
            seed=self.args.seed,
            start=start,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=self.args.num_workers,
        )

    def train_step(self, inputs: dict[str, Tensor], step: int) -> Mapping[str, Tensor | float]:
        self.trained.model.train()
        inputs = {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}
        real = inputs["input_values"]
        threshold, num_quantizers = self._draw(step)
        output = self.trained.model(**inputs, merging_threshold=threshold, num_quantizers=num_quantizers)
        fake = output.audio_values

        losses = {
            "mel": self.mel_loss(fake, real),
            "commitment": output.commitment_loss,
            "codebook": output.codebook_loss,
        }
        loss = (
            MEL_WEIGHT * losses["mel"]
            + self.config.commitment_loss_weight * losses["commitment"]
            + self.config.codebook_loss_weight * losses["codebook"]
        )
        if output.distillation_loss is not None:
            # A mean over tokens, of which processes have different numbers.
            num_tokens = output.audio_codes_mask.sum().float()
            share = num_tokens / self.accelerator.reduce(num_tokens, "mean")
            losses["distillation"] = output.distillation_loss * share
            loss = loss + self.config.distillation_loss_weight * losses["distillation"]
        if self.adversary is not None and step >= self.args.discriminator_start:
            losses["discriminator"] = self.adversary.train(real, fake)
            losses["adversarial"], losses["feature"] = self.adversary.judge(real, fake)
            loss = loss + ADVERSARIAL_WEIGHT * losses["adversarial"] + FEATURE_WEIGHT * losses["feature"]

        norm = self.trained.update(loss)
        self.ema.update()
        duration = output.token_lengths.sum() / self.config.frame_rate
        return {
            "loss": loss.detach(),
            **{name: value.detach() for name, value in losses.items()},
            "gradient_norm": norm,
            "tokens_per_second": output.audio_codes_mask.sum() / duration,
            "learning_rate": self.trained.learning_rate,
        }

    def _draw(self, step: int) -> tuple[float, int | Tensor]:
        """A merging threshold for the batch, and how many quantizers it uses: one, or a number for each item."""
        random = np.random.default_rng((self.args.seed, step))
        threshold = random.uniform(*self.config.merging_threshold_range)
        if step < self.args.fixed_rate_steps:
            threshold = 1.0
        if random.random() < self.config.quantizer_bypass_rate:
            return threshold, 1
        most = self.config.num_quantizers
        counts = random.integers(min(2, most), most + 1, size=self.args.batch_size)
        counts[random.random(self.args.batch_size) >= self.config.quantizer_dropout] = most
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return threshold, torch.from_numpy(counts[mine])

    @torch.inference_mode()
    def evaluate(self, step: int, writer: SummaryWriter | None) -> Mapping[str, float]:
        if writer is None:
            return {}
        codec = self.trained.unwrapped.eval()
        metrics: dict[str, list[float]] = {}
        with self.ema.applied():
            for number, waveform in enumerate(self.validation):
                inputs = self.feature_extractor(
                    waveform, sampling_rate=self.config.sampling_rate, return_tensors="pt"
                ).to(codec.device)
                sounds = {"original": waveform}
                for name, (threshold, rows) in SETTINGS.items():
                    output = codec(**inputs, merging_threshold=threshold, num_quantizers=rows)
                    sounds[name] = output.audio_values[0, 0].cpu().numpy()
                    mel = self.mel_loss(output.audio_values, inputs["input_values"])
                    metrics.setdefault(f"mel_{name}", []).append(mel.item())
                    rate = output.token_lengths.shape[1] / output.token_lengths.sum() * self.config.frame_rate
                    metrics.setdefault(f"tokens_per_second_{name}", []).append(rate.item())
                if number == 0:
                    write_samples(writer, self.args.output_dir / "samples", step, sounds, self.config.sampling_rate)
        return {name: float(np.mean(values)) for name, values in metrics.items()}

    def save_pretrained(self, directory: Path) -> None:
        with self.ema.applied():
            self.trained.unwrapped.save_pretrained(directory)
        self.feature_extractor.save_pretrained(directory)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the codec to reconstruct speech.")
    add_loop_arguments(parser, max_steps=800_000, batch_size=32, learning_rate=1e-4)
    model = parser.add_argument_group("model")
    model.add_argument("--init-from", metavar="ID_OR_DIR", help="codec to start from")
    model.add_argument(
        "--keep-tokens",
        action="store_true",
        help="train what decodes the tokens alone, so that the tokens, and models that know them, stay as they are",
    )
    model.add_argument("--config", type=Path, help="JSON of FlexiCodecConfig, to start from nothing")
    model.add_argument("--semantic-encoder", metavar="ID_OR_DIR", help="from train_semantic_encoder.py, likewise")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--crop-s", type=float, default=5.0, help="seconds of a clip (default: %(default)s)")
    recipe.add_argument(
        "--fixed-rate-steps", type=int, default=0, help="steps that merge nothing (default: %(default)s)"
    )
    recipe.add_argument(
        "--merging-threshold-range",
        type=float,
        nargs=2,
        default=(0.85, 1.0),
        help="of the thresholds after them (default: 0.85 1.0)",
    )
    recipe.add_argument(
        "--vary-voices", action="store_true", help="play each clip at another speed, pitch and loudness each time"
    )
    add_adversarial_arguments(recipe)
    recipe.add_argument("--ema-decay", type=float, default=0.999, help="(default: %(default)s)")
    recipe.add_argument("--num-validation", type=int, default=16, help="clips (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.init_from) == bool(args.config and args.semantic_encoder):
        parser.error("pass either --init-from, or --config and --semantic-encoder")
    if args.keep_tokens and not args.init_from:
        parser.error("--keep-tokens needs --init-from: there are no tokens to keep yet")

    recipe = CodecRecipe(args)
    TrainingLoop(args, recipe.accelerator, recipe).run()


if __name__ == "__main__":
    main()
