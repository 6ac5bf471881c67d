"""Training of models that make waveforms (codec, vocoder), with discriminators or without."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.hf_argparser import HfArg

from ..data.files import atomic_directory
from .discriminators import Discriminators
from .losses import MultiScaleMelLoss, adversarial_loss, discriminator_loss, feature_matching_loss
from .samples import write_samples
from .trainer import SpeechTrainer, SpeechTrainingArguments


@dataclass
class GANTrainingArguments(SpeechTrainingArguments):
    """The training arguments, with the defaults of models that make waveforms."""

    max_steps: int = HfArg(default=1_000_000, help="Steps of the whole training.")
    per_device_train_batch_size: int = HfArg(default=16, help="Clips in a batch of each process.")
    learning_rate: float = HfArg(default=1e-4, help="The learning rate of AdamW.")
    lr_scheduler_type: str = HfArg(default="constant_with_warmup", help="The schedule of the rate.")
    adam_beta2: float = HfArg(default=0.99, help="The second beta of AdamW.")
    weight_decay: float = HfArg(default=0.01, help="The weight decay of AdamW.")
    eval_strategy: str = HfArg(default="steps", help="When to evaluate; there is one at the end.")
    eval_steps: float | None = HfArg(default=1000, help="Steps between evaluations.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints to keep.")
    dataloader_drop_last: bool = HfArg(default=True, help="Must be true: batches have one size.")
    ddp_find_unused_parameters: bool | None = HfArg(
        default=True, help="Must be true: a batch may leave out quantizers."
    )
    crop_s: float = HfArg(default=5.0, help="Seconds of a clip to train on.")
    ema_decay: float = HfArg(default=0.999, help="Share of the averaged weights that a step keeps.")
    discriminator_start: int = HfArg(default=0, help="Without discriminators before this step.")
    discriminator_size: int = HfArg(default=32, help="Channels of their first layers.")


class Generated(NamedTuple):
    """
    What `GANTrainer.generate` returns: recorded and made waveforms `(batch_size, 1, num_samples)`,
    further losses of the model, and further values to log.
    """

    real: Tensor
    fake: Tensor
    losses: Mapping[str, Tensor] = {}
    metrics: Mapping[str, Tensor] = {}


class GAN(nn.Module):
    """
    What a checkpoint holds: the model in training, its moving average and the discriminators.

    Args:
        generator: The model; its frozen parameters stay as they are.
        args: The options.
    """

    config = _keys_to_ignore_on_save = None  # `Trainer` asks for them

    def __init__(self, generator: PreTrainedModel, args: GANTrainingArguments):
        super().__init__()
        self.generator = generator
        self.averaged = copy.deepcopy(generator).requires_grad_(False)
        self.discriminators: Any = None
        if args.discriminator_start < args.max_steps:
            self.discriminators = Discriminators(size=args.discriminator_size)

    def forward(self, waveforms: Tensor | None = None, **inputs: Any) -> Any:
        """What the discriminators say of waveforms, or what the generator makes of its inputs."""
        return self.generator(**inputs) if waveforms is None else self.discriminators(waveforms)


class GANTrainer(SpeechTrainer, ABC):
    """
    Trains a model that makes waveforms: on a spectral loss, on losses of its own and, from a step
    on, against discriminators. Recipes subclass it with `generate` and `evaluate_clip`.

    The output directory gets the averaged weights and the feature extractor with each checkpoint.

    Args:
        model: The model; its frozen parameters stay as they are.
        feature_extractor: Its feature extractor; saved with it.
        args: The options.
        train_dataset: Examples of speech.
        data_collator: Makes a batch of tensors of a list of examples, which have a seed
            (`batches.with_seeds`).
        eval_waveforms: Waveforms `(num_samples,)` to evaluate on.
    """

    # Weights of the losses: a recipe adds those of its model.
    loss_weights: Mapping[str, float] = {"mel": 15.0, "adversarial": 1.0, "feature": 2.0}

    def __init__(
        self,
        model: PreTrainedModel,
        feature_extractor: Any,
        args: GANTrainingArguments,
        train_dataset: Dataset | IterableDataset,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        eval_waveforms: list[np.ndarray],
    ):
        size = args.train_batch_size * args.world_size
        if isinstance(train_dataset, Dataset) and len(train_dataset) < size:
            raise ValueError(f"There are {len(train_dataset)} clips to train on, fewer than a batch, {size}.")
        super().__init__(
            GAN(model, args),
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_waveforms,
            processing_class=feature_extractor,
        )
        self.sampling_rate: int = model.config.sampling_rate
        self.mel_loss = MultiScaleMelLoss(self.sampling_rate).to(args.device)
        self.add_callback(MovingAverage(args.ema_decay))

    @abstractmethod
    def generate(self, model: nn.Module, batch: dict[str, Tensor]) -> Generated:
        """Run `model`, which takes the generator's inputs, on a batch of this process."""

    @abstractmethod
    def evaluate_clip(
        self, model: PreTrainedModel, waveform: np.ndarray
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics of a clip, and waveforms `(num_samples,)` to listen to, by name."""

    # ******** FlexiCodec specific ********
    # Two losses a step, for two halves of the model.
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        real, fake, losses, metrics = self.generate(model, self._prepare_inputs(inputs))
        losses, metrics = {"mel": self.mel_loss(fake, real), **losses}, dict(metrics)
        adversarial = self.state.global_step >= self.args.discriminator_start
        if adversarial:
            # Without gradients for the discriminators.
            self.model.discriminators.requires_grad_(False)
            scores, features = self.model(waveforms=torch.cat([real, fake]))
            self.model.discriminators.requires_grad_(True)
            losses["adversarial"], losses["feature"] = adversarial_loss(scores), feature_matching_loss(features)
        loss = torch.stack([self.loss_weights[name] * value for name, value in losses.items()]).sum()
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
        if adversarial:
            scores, _ = model(waveforms=torch.cat([real, fake.detach()]))
            metrics["discriminator"] = discriminator_loss(scores)
            self.accelerator.backward(metrics["discriminator"] / self.current_gradient_accumulation_steps)
        self.keep_means(losses | metrics, training=True)
        return loss.detach() / self.current_gradient_accumulation_steps

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(self.model.generator.parameters(), self.args.max_grad_norm)
        if self.model.discriminators is not None:
            nn.utils.clip_grad_norm_(self.model.discriminators.parameters(), self.args.max_grad_norm)
        return norm

    @torch.inference_mode()
    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """
        The mean metrics of the averaged model over the clips; sounds of the first to `samples/`.
        """
        model = self.model.averaged.eval()
        results = []
        for number, waveform in enumerate(self.eval_dataset):
            result, sounds = self.evaluate_clip(model, waveform)
            results.append(result)
            if number == 0 and self.is_world_process_zero():
                waveforms = {"original": waveform} | {name: sound.cpu().numpy() for name, sound in sounds.items()}
                folder = Path(self.args.output_dir) / "samples"
                write_samples(folder, self.state.global_step, waveforms, self.sampling_rate)
        names = results[0] if results else ()
        metrics = {f"{metric_key_prefix}_{name}": float(np.mean([row[name] for row in results])) for name in names}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if output_dir not in (None, self.args.output_dir):  # a checkpoint
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            with atomic_directory(self.args.output_dir) as folder:
                self.model.averaged.save_pretrained(folder)
                self.processing_class.save_pretrained(folder)

    # ******** end ********


class MovingAverage(TrainerCallback):
    """
    Keeps the exponential moving average of the generator's weights. The first steps keep less than
    `decay` of it: its start, the first weights, should not last.
    """

    def __init__(self, decay: float):
        self.decay = decay

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        with torch.no_grad():
            torch._foreach_lerp_(list(model.averaged.parameters()), list(model.generator.parameters()), 1 - decay)
