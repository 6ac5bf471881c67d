"""The loop that the recipes share: steps, logs, evaluations, checkpoints, and going on where a run was interrupted."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, set_seed
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import SchedulerType, get_scheduler


class Recipe(Protocol):
    """What a recipe brings to the loop. Models and optimizers it prepares itself with the loop's accelerator."""

    def batches(self, start: tuple[int, int]) -> DataLoader:
        """A loader of `((epoch, batch), inputs)`, as `speech_loader` makes it, that begins at the place `start`."""

    def train_step(self, inputs: Any, step: int) -> Mapping[str, Tensor | float]:
        """Update the weights with a batch. Returns what to log: means over the items of this process."""

    def evaluate(self, step: int, writer: SummaryWriter | None) -> Mapping[str, float]:
        """Called on every process; the main one alone has a `writer`, for sounds and pictures, and returns figures."""

    def save_pretrained(self, directory: Path) -> None:
        """Save what others load: the model, and what prepares its inputs. Called on the main process."""


def add_loop_arguments(
    parser: argparse.ArgumentParser, *, max_steps: int, batch_size: int, learning_rate: float, warmup_steps: int = 0
) -> None:
    """Add the options that `TrainingLoop` and `speech_loader` need, with the defaults of the recipe."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, help="folder, metadata file, or dataset on the Hub or on disk")
    data.add_argument("--dataset-config", help="configuration of a dataset on the Hub")
    data.add_argument("--split", default="train", help="to train on (default: %(default)s)")
    data.add_argument("--validation-split", default="validation", help="to evaluate on (default: %(default)s)")
    data.add_argument("--streaming", action="store_true", help="read the dataset while training, do not download it")
    data.add_argument("--audio-column", default="audio")
    data.add_argument("--text-column", default="text")
    data.add_argument("--num-workers", type=int, default=0, help="processes that read audio (default: %(default)s)")

    training = parser.add_argument_group("training")
    training.add_argument("--output-dir", type=Path, required=True, help="checkpoints, logs, and the model in `model`")
    training.add_argument("--max-steps", type=int, default=max_steps, help="(default: %(default)s)")
    training.add_argument(
        "--batch-size", type=int, default=batch_size, help="clips of all processes together (default: %(default)s)"
    )
    training.add_argument("--learning-rate", type=float, default=learning_rate, help="(default: %(default)s)")
    training.add_argument(
        "--lr-schedule",
        default="constant_with_warmup",
        choices=[kind.value for kind in SchedulerType],
        metavar="NAME",
        help="a schedule of transformers, such as cosine (default: %(default)s)",
    )
    training.add_argument("--warmup-steps", type=int, default=warmup_steps, help="(default: %(default)s)")
    training.add_argument("--seed", type=int, default=0)

    loop = parser.add_argument_group("checkpoints and logs")
    loop.add_argument("--save-every", type=int, default=1000, metavar="STEPS", help="(default: %(default)s)")
    loop.add_argument("--evaluate-every", type=int, default=1000, metavar="STEPS", help="(default: %(default)s)")
    loop.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="(default: %(default)s)")
    loop.add_argument(
        "--time-limit",
        type=float,
        metavar="MINUTES",
        help="save and stop after so many minutes; the same command goes on",
    )
    loop.add_argument("--push-to-hub", metavar="ID", help="push the model to this repository at the end")


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator that `accelerate launch` describes, with the same seed on every process."""
    # Quantizers that a batch leaves out have no gradients.
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
    set_seed(args.seed)
    return Accelerator(kwargs_handlers=[kwargs])


class TrainedModel:
    """
    A model with its optimizer (AdamW) and its learning rate schedule.

    Args:
        model: Its frozen parameters stay as they are.
        args: With the options of `add_loop_arguments`.
        accelerator: Prepares them; its checkpoints hold them.
        betas: Of AdamW.

    Attributes:
        model: Prepared: call this one.
    """

    def __init__(
        self,
        model: nn.Module,
        args: argparse.Namespace,
        accelerator: Accelerator,
        betas: tuple[float, float] = (0.9, 0.99),
    ):
        self.accelerator = accelerator
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=betas, weight_decay=0.01)
        self.scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_steps, args.max_steps)
        accelerator.register_for_checkpointing(self.scheduler)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    @property
    def unwrapped(self) -> nn.Module:
        """The model itself."""
        return self.accelerator.unwrap_model(self.model)

    def update(self, loss: Tensor) -> Tensor:
        """A step down the gradient, clipped to a norm of 1. Returns the norm."""
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return norm

    @property
    def learning_rate(self) -> float:
        return self.scheduler.get_last_lr()[0]


class TrainingLoop:
    """
    Runs a recipe for `args.max_steps` steps, from the last checkpoint in `args.output_dir` if there is one.

    The folder gets `checkpoints/` (the last two, all that it takes to go on with identical losses), `model/` (what
    `save_pretrained` of the recipe writes, anew with each checkpoint), `metrics.jsonl`, and logs for TensorBoard.

    Args:
        args: With the options of `add_loop_arguments`.
        accelerator: With the recipe's models and optimizers prepared, and the rest of its state registered.
        recipe: What to train.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, recipe: Recipe):
        self.args, self.accelerator, self.recipe = args, accelerator, recipe
        self.step = 0
        self.place = (0, 0)
        self._checkpoints = args.output_dir / "checkpoints"
        self._metrics = args.output_dir / "metrics.jsonl"
        accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.place = state["step"], tuple(state["place"])

    def run(self) -> None:
        """Train to the end, or to the time limit."""
        args, accelerator = self.args, self.accelerator
        started = time.monotonic()
        # From here on the random numbers of the processes differ (dropout); those of a checkpoint replace them.
        set_seed(args.seed, device_specific=True)
        self._resume()
        writer = None
        if accelerator.is_main_process:
            writer = SummaryWriter(str(args.output_dir / "logs"), purge_step=self.step + 1)
        progress = tqdm(
            total=args.max_steps,
            initial=self.step,
            disable=not accelerator.is_main_process,
            unit="step",
            mininterval=1,
        )
        batches: Iterator[tuple[tuple[int, int], Any]] = iter(())
        if self.step < args.max_steps:
            batches = iter(self.recipe.batches(self.place))
        for (epoch, batch), inputs in batches:
            metrics = self.recipe.train_step(inputs, self.step)
            self.step += 1
            self.place = (epoch, batch + 1)
            progress.update()
            last = self.step == args.max_steps or self._out_of_time(started)
            if self.step % args.log_every == 0 or last:
                self._log("train", self._mean(metrics), writer)
            if self.step % args.evaluate_every == 0 or self.step == args.max_steps:
                self._log("validation", self.recipe.evaluate(self.step, writer), writer)
            if self.step % args.save_every == 0 or last:
                self._save()
            if last:
                break
        progress.close()
        if writer is not None:
            writer.close()
            if args.push_to_hub and self.step >= args.max_steps:
                api = HfApi()
                api.create_repo(args.push_to_hub, exist_ok=True)
                api.upload_folder(repo_id=args.push_to_hub, folder_path=str(args.output_dir / "model"))
        accelerator.end_training()

    def _resume(self) -> None:
        found = sorted(self._checkpoints.glob("step-*"))
        if found:
            self.accelerator.load_state(str(found[-1]))
            self.accelerator.print(f"Going on from {found[-1]}.")
        if self.accelerator.is_main_process:
            self.args.output_dir.mkdir(parents=True, exist_ok=True)
            lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            self._metrics.write_text("".join(f"{line}\n" for line in kept))

    def _save(self) -> None:
        accelerator = self.accelerator
        name = f"step-{self.step:08d}"
        partial = self._checkpoints / f"partial-{name}"
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            target = self._checkpoints / name
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in sorted(self._checkpoints.glob("step-*"))[:-2]:
                shutil.rmtree(old)
            self.recipe.save_pretrained(self.args.output_dir / "model")
        accelerator.wait_for_everyone()

    def _mean(self, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
        """The means over all processes."""
        values = torch.tensor([float(value) for value in metrics.values()], device=self.accelerator.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _log(self, group: str, metrics: Mapping[str, float], writer: SummaryWriter | None) -> None:
        if writer is None or not metrics:
            return
        for name, value in metrics.items():
            writer.add_scalar(f"{group}/{name}", value, self.step)
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": self.step, "group": group, **metrics}) + "\n")
        figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        tqdm.write(f"{group} {self.step}: {figures}")

    def _out_of_time(self, started: float) -> bool:
        if self.args.time_limit is None:
            return False
        over = [time.monotonic() - started > self.args.time_limit * 60]
        return broadcast_object_list(over)[0]  # the processes stop together


__all__ = ["Recipe", "TrainedModel", "TrainingLoop", "add_loop_arguments", "make_accelerator"]
