"""
Training of models that make waveforms (codec, vocoder), with discriminators or without, on
Accelerate: the two optimizers of a GAN do not fit `Trainer`.
"""

from __future__ import annotations

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, skip_first_batches
from accelerate.utils import ProjectConfiguration
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler

from ..data.files import atomic_directory, atomic_file
from .batches import EpochSampler, with_seeds
from .discriminators import Discriminators
from .losses import MultiScaleMelLoss, adversarial_loss, discriminator_loss, feature_matching_loss
from .samples import write_samples
from .trainer import time_is_up


@dataclass
class GANTrainingArguments:
    """The options of `GANTrainer`, named as in transformers' `TrainingArguments`."""

    output_dir: str = field(metadata={"help": "For checkpoints, logs, samples, and the model in `model`."})
    max_steps: int = field(default=1_000_000, metadata={"help": "Steps of the whole training."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Clips in a batch of each process."})
    learning_rate: float = field(default=1e-4, metadata={"help": "The learning rate of AdamW."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "A schedule of transformers, such as cosine."}
    )
    warmup_steps: int = field(default=0, metadata={"help": "Steps in which the learning rate rises to its value."})
    crop_s: float = field(default=5.0, metadata={"help": "Seconds of a clip to train on."})
    ema_decay: float = field(default=0.999, metadata={"help": "Share of the averaged weights that a step keeps."})
    discriminator_start: int = field(default=0, metadata={"help": "Without discriminators before this step."})
    discriminator_size: int = field(default=32, metadata={"help": "Channels of their first layers."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights, the data and all random choices."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that read audio; a streamed dataset always has one."}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 mixed precision."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU, even if there is a GPU."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between logs."})
    eval_steps: int = field(default=1000, metadata={"help": "Steps between evaluations; there is one at the end."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between checkpoints; there is one at the end."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep, at least 2."})
    time_limit: float | None = field(
        default=None, metadata={"help": "Save and stop after so many minutes; the same command goes on."}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "A tracker of Accelerate, or none."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push the model to the Hub at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "The repository to push to."})

    def __post_init__(self) -> None:
        if self.save_total_limit < 2:
            raise ValueError(
                f"`save_total_limit` must be at least 2, got {self.save_total_limit}: the oldest checkpoint is "
                "deleted before the new one is written."
            )
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("`push_to_hub` needs `hub_model_id`, the repository to push to.")


class Generated(NamedTuple):
    """
    What `GANTrainer.generate` returns: recorded and made waveforms `(batch_size, 1, num_samples)`,
    further losses of the model, and further values to log.
    """

    real: Tensor
    fake: Tensor
    losses: Mapping[str, Tensor] = {}
    metrics: Mapping[str, Tensor] = {}


@dataclass
class GANTrainerState:
    """How far a training is; `epoch` and `batch` are the place of the next batch in the data."""

    global_step: int = 0
    epoch: int = 0
    batch: int = 0
    checkpoint: int = -1
    log_history: list[dict[str, float]] = field(default_factory=list)


class GANTrainer(ABC):
    """
    Trains a model that makes waveforms: on a spectral loss, on losses of its own and, from a step
    on, against discriminators. Recipes subclass it with `generate` and `evaluate_clip`.

    The output directory gets `checkpoints/` (all that it takes to go on with the same losses),
    `model/` (the averaged weights and the feature extractor), `trainer_state.json` (with the log)
    and the files of the tracker in `logs/`. A training that was killed while it saved goes on from
    the last whole checkpoint, and writes `model/` again.

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
        self.args, self.feature_extractor, self.eval_waveforms = args, feature_extractor, eval_waveforms
        self.output_dir = Path(args.output_dir)
        self.state = GANTrainerState()
        self.sampling_rate: int = model.config.sampling_rate
        self.accelerator = make_accelerator(args)
        model.to(self.accelerator.device)
        self.averaged = averaged_model(model, args.ema_decay)
        self.mel_loss = MultiScaleMelLoss(self.sampling_rate).to(self.accelerator.device)
        self.trained = TrainedModel(model, args, self.accelerator)
        self.accelerator.register_for_checkpointing(self.averaged)
        self.discriminators = None
        if args.discriminator_start < args.max_steps:
            self.discriminators = TrainedModel(Discriminators(size=args.discriminator_size), args, self.accelerator)
        self.loader = self.accelerator.prepare(train_loader(train_dataset, data_collator, args))

    @abstractmethod
    def generate(self, batch: dict[str, Tensor]) -> Generated:
        """Run `self.trained.model` on a batch of this process."""

    @abstractmethod
    def evaluate_clip(
        self, model: PreTrainedModel, waveform: np.ndarray
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics of a clip, and waveforms `(num_samples,)` to listen to, by name."""

    def train(self) -> None:
        """
        Train until `max_steps`, from the last checkpoint in the output directory if there is one.
        """
        args, accelerator, state = self.args, self.accelerator, self.state
        self._resume()
        accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": state.global_step + 1}})
        start = time.monotonic()
        progress = tqdm(
            total=args.max_steps,
            initial=state.global_step,
            disable=not accelerator.is_main_process,
            unit="step",
            mininterval=1,
        )
        for batch in self._batches():
            metrics = self.training_step(batch)
            state.global_step += 1
            progress.update()
            finished = state.global_step == args.max_steps
            last = finished or time_is_up(start, args.time_limit)
            if state.global_step % args.logging_steps == 0 or last:
                self._log(self._mean(metrics))
            if state.global_step % args.eval_steps == 0 or finished:
                self._log({f"eval_{name}": value for name, value in self.evaluate().items()})
            if state.global_step % args.save_steps == 0 or last:
                self._save()
            if last:
                break
        progress.close()
        if args.push_to_hub and accelerator.is_main_process and state.global_step >= args.max_steps:
            api = HfApi()
            api.create_repo(args.hub_model_id, exist_ok=True)
            api.upload_folder(repo_id=args.hub_model_id, folder_path=str(self.output_dir / "model"))
        accelerator.end_training()

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """
        Update the weights with a batch. Returns what to log: means over the clips of this process.
        """
        self.trained.model.train()
        real, fake, losses, metrics = self.generate(batch)
        losses, metrics = {"mel": self.mel_loss(fake, real), **losses}, dict(metrics)
        if self.discriminators is not None and self.state.global_step >= self.args.discriminator_start:
            metrics["discriminator"] = train_discriminators(self.discriminators, real, fake)
            losses["adversarial"], losses["feature"] = generator_losses(self.discriminators, real, fake)
        loss = torch.stack([self.loss_weights[name] * value for name, value in losses.items()]).sum()
        norm = self.trained.update(loss)
        self.averaged.update_parameters(self.trained.unwrapped)
        return {
            "loss": loss.detach(),
            **{name: value.detach() for name, value in losses.items()},
            **metrics,
            "grad_norm": norm,
            "learning_rate": self.trained.scheduler.get_last_lr()[0],
        }

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """
        The mean metrics of the averaged model over the clips, on the main process; sounds of the
        first to `samples/`.
        """
        if not self.accelerator.is_main_process or not self.eval_waveforms:
            return {}
        model = self.averaged.module.eval()
        results = []
        for number, waveform in enumerate(self.eval_waveforms):
            metrics, sounds = self.evaluate_clip(model, waveform)
            results.append(metrics)
            if number == 0:
                waveforms = {"original": waveform} | {name: sound.cpu().numpy() for name, sound in sounds.items()}
                writers = [tracker.writer for tracker in self.accelerator.trackers if tracker.name == "tensorboard"]
                folder = self.output_dir / "samples"
                write_samples(folder, self.state.global_step, waveforms, self.sampling_rate, *writers)
        return {name: float(np.mean([metrics[name] for metrics in results])) for name in results[0]}

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches without end, from the place where the training is."""
        state = self.state
        while state.global_step < self.args.max_steps:
            self.loader.set_epoch(state.epoch)
            for batch in skip_first_batches(self.loader, state.batch):
                state.batch += 1
                yield batch
            if state.batch == 0:
                raise ValueError(
                    "The training data have fewer clips than a batch of all processes, "
                    f"{self.args.per_device_train_batch_size * self.accelerator.num_processes}."
                )
            state.epoch, state.batch = state.epoch + 1, 0

    def _mean(self, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
        """The means over all processes."""
        values = torch.tensor([float(value) for value in metrics.values()], device=self.accelerator.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _log(self, metrics: dict[str, float]) -> None:
        if metrics and self.accelerator.is_main_process:
            step = self.state.global_step
            self.state.log_history.append({"step": step, **metrics})
            self.accelerator.log(metrics, step)
            tqdm.write(f"{step}: " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def _save(self) -> None:
        self.state.checkpoint = self.accelerator.save_iteration
        self.accelerator.save_state()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            # Only now does the checkpoint count: `_resume` deletes one that the state does not
            # name.
            with atomic_file(self.output_dir / "trainer_state.json") as path:
                path.write_text(json.dumps(asdict(self.state), indent=1))
            self._save_model()
        self.accelerator.wait_for_everyone()

    def _save_model(self) -> None:
        model: Any = self.averaged.module
        with atomic_directory(self.output_dir / "model") as folder:
            model.save_pretrained(folder)
            self.feature_extractor.save_pretrained(folder)

    def _resume(self) -> None:
        accelerator, checkpoints = self.accelerator, self.output_dir / "checkpoints"
        state_file = self.output_dir / "trainer_state.json"
        if state_file.exists():
            vars(self.state).update(json.loads(state_file.read_text()))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for checkpoint in checkpoints.glob("checkpoint_*"):
                if int(checkpoint.name.split("_")[1]) > self.state.checkpoint:
                    shutil.rmtree(checkpoint)
        accelerator.wait_for_everyone()
        accelerator.project_configuration.iteration = self.state.checkpoint + 1
        if self.state.checkpoint >= 0:
            accelerator.load_state(str(checkpoints / f"checkpoint_{self.state.checkpoint}"))
            accelerator.print(f"Going on from step {self.state.global_step}.")
            if accelerator.is_main_process:
                self._save_model()  # again: the run may have been killed before it did


class TrainedModel:
    """
    A model with its optimizer (AdamW) and its learning rate schedule.

    Args:
        model: The model; its frozen parameters stay as they are.
        args: The options.
        accelerator: Prepares the model and the optimizer; its checkpoints hold all three.

    Attributes:
        model: The prepared model.
        unwrapped: The model itself.
    """

    def __init__(self, model: nn.Module, args: GANTrainingArguments, accelerator: Accelerator):
        self.accelerator, self.unwrapped = accelerator, model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        # Not prepared: Accelerate would take a step for each process.
        self.scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps)
        accelerator.register_for_checkpointing(self.scheduler)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def update(self, loss: Tensor) -> Tensor:
        """A step down the gradient, clipped to a norm of 1. Returns the norm."""
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return norm


def train_discriminators(discriminators: TrainedModel, real: Tensor, fake: Tensor) -> Tensor:
    """Update the discriminators with waveforms `(batch_size, 1, num_samples)`. Returns their loss."""
    scores, _ = discriminators.model(torch.cat([real, fake.detach()]))
    halves = [score.chunk(2) for score in scores]
    loss = discriminator_loss([half[0] for half in halves], [half[1] for half in halves])
    discriminators.update(loss)
    return loss.detach()


def generator_losses(discriminators: TrainedModel, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The adversarial and the feature matching loss of `fake`."""
    unwrapped = discriminators.unwrapped.requires_grad_(False)
    scores, features = unwrapped(torch.cat([real, fake]))
    unwrapped.requires_grad_(True)
    halves = [[feature.chunk(2) for feature in layers] for layers in features]
    matching = feature_matching_loss(
        [[half[0] for half in layers] for layers in halves], [[half[1] for half in layers] for layers in halves]
    )
    return adversarial_loss([score.chunk(2)[1] for score in scores]), matching


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """
    The exponential moving average of a model's weights. The first updates keep less than `decay` of
    it: its start, the first weights, should not last.
    """

    def update(averages: Any, weights: Any, num_averaged: Any) -> None:
        count = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averages, weights, num_averaged)

    averaged = AveragedModel(model, multi_avg_fn=update)
    averaged.n_averaged.fill_(1)  # the weights of the start count: at 0 the first update would only copy
    return averaged


def make_accelerator(args: GANTrainingArguments) -> Accelerator:
    """The accelerator that `accelerate launch` and the options describe."""
    return Accelerator(
        cpu=args.use_cpu,
        mixed_precision="bf16" if args.bf16 else None,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            args.output_dir,
            logging_dir=args.output_dir,
            automatic_checkpoint_naming=True,
            total_limit=args.save_total_limit,
        ),
        # Each process reads a stream and takes its share.
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        # Quantizers that a batch leaves out have no gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def train_loader(
    dataset: Dataset | IterableDataset,
    data_collator: Callable[[list[dict[str, Any]]], Any],
    args: GANTrainingArguments,
) -> DataLoader:
    """
    Batches of one process, to be prepared by Accelerate: each epoch in another order, which depends
    on the seed alone, and without the clips that do not fill a batch.
    """
    streamed = isinstance(dataset, IterableDataset)
    return DataLoader(
        with_seeds(dataset, args.seed),
        args.per_device_train_batch_size,
        sampler=None if streamed else EpochSampler(len(dataset), args.seed),
        # `datasets` shuffles a stream differently in a worker: always one, so that their number
        # changes nothing.
        num_workers=1 if streamed else args.dataloader_num_workers,
        collate_fn=data_collator,
        drop_last=True,
        generator=torch.Generator(),  # without one, each epoch would draw from the random numbers of the model
    )


__all__ = ["GANTrainer", "GANTrainingArguments", "Generated", "averaged_model", "make_accelerator", "train_loader"]
