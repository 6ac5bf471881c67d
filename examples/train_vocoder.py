"""Train the vocoder: mel spectrograms of recorded speech back to its waveform.

accelerate launch examples/train_vocoder.py --dataset speech --output-dir vocoder                    # from nothing
accelerate launch examples/train_vocoder.py --dataset speech --init-from vocoder --output-dir tuned  # from a vocoder

The losses are the codec's: multi-scale mel spectra, discriminators to fool, and the features of their layers to match.
`--config` is a JSON of FlexiCodecVocoderConfig with what differs from the released sizes. On a small machine,
`--discriminator-start` puts off the discriminators.
"""

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from flexicodec_hf import FlexiCodecMelFeatureExtractor, FlexiCodecVocoderConfig, FlexiCodecVocoderModel
from flexicodec_hf.training.adversarial import (
    ADVERSARIAL_WEIGHT,
    FEATURE_WEIGHT,
    add_adversarial_arguments,
    make_adversary,
)
from flexicodec_hf.training.data import decode_audio, load_speech, random_crop, speech_loader
from flexicodec_hf.training.ema import ExponentialMovingAverage
from flexicodec_hf.training.loop import TrainedModel, TrainingLoop, add_loop_arguments, make_accelerator
from flexicodec_hf.training.losses import MultiScaleMelLoss
from flexicodec_hf.training.samples import write_samples


MEL_WEIGHT = 15.0


def crop(example: dict[str, Any], random: np.random.Generator, sampling_rate: int, num_samples: int) -> np.ndarray:
    waveform = random_crop(decode_audio(example["audio"], sampling_rate), num_samples, random)
    return np.pad(waveform, (0, num_samples - len(waveform)))


def prepare(waveforms: list[np.ndarray], feature_extractor: FlexiCodecMelFeatureExtractor) -> tuple[Tensor, Tensor]:
    """Mel spectrograms, and the waveforms that they are of."""
    features = feature_extractor(waveforms, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    return features.mel, torch.from_numpy(np.stack(waveforms))[:, None]


class VocoderRecipe:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.accelerator = make_accelerator(args)
        if args.init_from:
            vocoder = FlexiCodecVocoderModel.from_pretrained(args.init_from)
        else:
            changes = json.loads(args.config.read_text()) if args.config else {}
            vocoder = FlexiCodecVocoderModel(FlexiCodecVocoderConfig(**changes))
        self.config = vocoder.config
        self.feature_extractor = FlexiCodecMelFeatureExtractor(
            feature_size=self.config.num_mel_bins,
            sampling_rate=self.config.sampling_rate,
            n_fft=self.config.n_fft,
            hop_length=self.config.hop_length,
        )
        self.num_samples = round(args.crop_s * self.config.frame_rate) * self.config.hop_length

        options = {"config_name": args.dataset_config, "streaming": args.streaming, "audio_column": args.audio_column}
        self.dataset = load_speech(args.dataset, args.split, **options)
        validation = load_speech(args.dataset, args.validation_split, **options).take(args.num_validation)
        self.validation = [
            self._whole_frames(decode_audio(row["audio"], self.config.sampling_rate)) for row in validation
        ]

        self.mel_loss = MultiScaleMelLoss(self.config.sampling_rate).to(self.accelerator.device)
        self.ema = ExponentialMovingAverage(vocoder.to(self.accelerator.device), args.ema_decay)
        self.trained = TrainedModel(vocoder, args, self.accelerator)
        self.accelerator.register_for_checkpointing(self.ema)
        self.adversary = make_adversary(args, self.accelerator)

    def _whole_frames(self, waveform: np.ndarray) -> np.ndarray:
        return waveform[: len(waveform) // self.config.hop_length * self.config.hop_length]

    def batches(self, start: tuple[int, int]) -> DataLoader:
        return speech_loader(
            self.dataset,
            functools.partial(crop, sampling_rate=self.config.sampling_rate, num_samples=self.num_samples),
            functools.partial(prepare, feature_extractor=self.feature_extractor),
            batch_size=self.args.batch_size,
            seed=self.args.seed,
            start=start,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=self.args.num_workers,
        )

    def train_step(self, inputs: tuple[Tensor, Tensor], step: int) -> Mapping[str, Tensor | float]:
        self.trained.model.train()
        mel, real = (tensor.to(self.accelerator.device) for tensor in inputs)
        fake = self.trained.model(mel).audio_values[:, None]
        losses = {"mel": self.mel_loss(fake, real)}
        loss = MEL_WEIGHT * losses["mel"]
        if self.adversary is not None and step >= self.args.discriminator_start:
            losses["discriminator"] = self.adversary.train(real, fake)
            losses["adversarial"], losses["feature"] = self.adversary.judge(real, fake)
            loss = loss + ADVERSARIAL_WEIGHT * losses["adversarial"] + FEATURE_WEIGHT * losses["feature"]
        norm = self.trained.update(loss)
        self.ema.update()
        return {
            "loss": loss.detach(),
            **{name: value.detach() for name, value in losses.items()},
            "gradient_norm": norm,
            "learning_rate": self.trained.learning_rate,
        }

    @torch.inference_mode()
    def evaluate(self, step: int, writer: SummaryWriter | None) -> Mapping[str, float]:
        if writer is None:
            return {}
        vocoder = self.trained.unwrapped.eval()
        distances = []
        with self.ema.applied():
            for number, waveform in enumerate(self.validation):
                mel, real = (tensor.to(vocoder.device) for tensor in prepare([waveform], self.feature_extractor))
                fake = vocoder(mel).audio_values[:, None]
                distances.append(self.mel_loss(fake, real).item())
                if number == 0:
                    sounds = {"original": waveform, "vocoded": fake[0, 0].cpu().numpy()}
                    write_samples(writer, self.args.output_dir / "samples", step, sounds, self.config.sampling_rate)
        return {"mel": float(np.mean(distances))}

    def save_pretrained(self, directory: Path) -> None:
        with self.ema.applied():
            self.trained.unwrapped.save_pretrained(directory)
        self.feature_extractor.save_pretrained(directory)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the vocoder.")
    add_loop_arguments(parser, max_steps=1_000_000, batch_size=16, learning_rate=2e-4)
    model = parser.add_argument_group("model")
    model.add_argument("--init-from", metavar="ID_OR_DIR", help="vocoder to start from")
    model.add_argument("--config", type=Path, help="JSON of FlexiCodecVocoderConfig, to start from nothing")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--crop-s", type=float, default=1.0, help="seconds of a clip (default: %(default)s)")
    add_adversarial_arguments(recipe)
    recipe.add_argument("--ema-decay", type=float, default=0.999, help="(default: %(default)s)")
    recipe.add_argument("--num-validation", type=int, default=16, help="clips (default: %(default)s)")
    args = parser.parse_args(argv)

    recipe = VocoderRecipe(args)
    TrainingLoop(args, recipe.accelerator, recipe).run()


if __name__ == "__main__":
    main()
