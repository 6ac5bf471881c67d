"""Train the vocoder: mel spectrograms of recorded speech back to its waveform.

accelerate launch examples/train_vocoder.py --dataset speech --output_dir vocoder  # from nothing
accelerate launch examples/train_vocoder.py --dataset speech --model_name_or_path vocoder \
    --output_dir tuned  # from a vocoder

The losses are the codec's: multi-scale mel spectra, discriminators to fool, and the features of
their layers to match. On a small machine, `--discriminator_start` puts off the discriminators.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexicodec_hf import FlexiCodecMelFeatureExtractor, FlexiCodecVocoderConfig, FlexiCodecVocoderModel
from flexicodec_hf.data.sources import decode_audio
from flexicodec_hf.training.batches import SpeechDataArguments, load_splits, random_crop
from flexicodec_hf.training.gan import GANTrainer, GANTrainingArguments, Generated
from flexicodec_hf.training.trainer import override_config, parse_arguments, run_training


@dataclass
class ModelArguments:
    """The vocoder."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Start from these weights, a Hub id or a directory; otherwise from nothing."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Where a new vocoder differs from the released one: a JSON object or a file with one."},
    )


@dataclass
class VocoderTrainingArguments(GANTrainingArguments):
    """The training arguments, with the defaults of this recipe."""

    learning_rate: float = field(default=2e-4, metadata={"help": "The learning rate of AdamW."})
    crop_s: float = field(default=1.0, metadata={"help": "Seconds of a clip to train on."})


@dataclass
class VocoderCollator:
    """Crops of examples, padded to `num_samples`, and their mel spectrograms."""

    feature_extractor: FlexiCodecMelFeatureExtractor
    num_samples: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        waveforms = []
        for example in examples:
            waveform = decode_audio(example["audio"], self.feature_extractor.sampling_rate)
            waveform = random_crop(waveform, self.num_samples, np.random.default_rng(example["seed"]))
            waveforms.append(np.pad(waveform, (0, self.num_samples - len(waveform))))
        return mel_inputs(waveforms, self.feature_extractor)


def mel_inputs(waveforms: list[np.ndarray], feature_extractor: FlexiCodecMelFeatureExtractor) -> dict[str, Tensor]:
    """Waveforms of one length, a multiple of the hop, and their mel spectrograms."""
    features = feature_extractor(waveforms, sampling_rate=feature_extractor.sampling_rate, return_tensors="pt")
    return {"mel": features.mel, "audio_values": torch.from_numpy(np.stack(waveforms))[:, None]}


class VocoderTrainer(GANTrainer):
    def generate(self, model: nn.Module, batch: dict[str, Tensor]) -> Generated:
        real = batch["audio_values"]
        return Generated(real, model(mel=batch["mel"]).audio_values.view_as(real))

    def evaluate_clip(self, model: Any, waveform: np.ndarray) -> tuple[dict[str, float], dict[str, Tensor]]:
        hop_length = model.config.hop_length
        waveform = waveform[: len(waveform) // hop_length * hop_length]
        inputs = mel_inputs([waveform], self.processing_class)
        real = inputs["audio_values"].to(model.device)
        fake = model(inputs["mel"].to(model.device)).audio_values.view_as(real)
        return {"mel": self.mel_loss(fake, real).item()}, {"vocoded": fake[0, 0]}


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, SpeechDataArguments, VocoderTrainingArguments, argv=argv
    )
    if model_args.model_name_or_path:
        vocoder = FlexiCodecVocoderModel.from_pretrained(model_args.model_name_or_path)
    else:
        vocoder = FlexiCodecVocoderModel(override_config(FlexiCodecVocoderConfig(), model_args.config_overrides))
    config = vocoder.config
    feature_extractor = FlexiCodecMelFeatureExtractor(
        feature_size=config.num_mel_bins,
        sampling_rate=config.sampling_rate,
        n_fft=config.n_fft,
        hop_length=config.hop_length,
    )
    train_dataset, eval_dataset = load_splits(data_args, training_args.seed)
    trainer = VocoderTrainer(
        vocoder,
        feature_extractor,
        training_args,
        train_dataset,
        VocoderCollator(feature_extractor, round(training_args.crop_s * config.frame_rate) * config.hop_length),
        [decode_audio(example["audio"], config.sampling_rate) for example in eval_dataset or []],
    )
    run_training(trainer, data_args)


if __name__ == "__main__":
    main()
