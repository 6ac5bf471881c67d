"""
What the recipes that use transformers' `Trainer` share: options, time limits, samples along the
way, and going on.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data.files import atomic_directory, atomic_file, only_run
from .batches import EpochSampler, SeededExamples, SpeechDataArguments, with_seeds
from .samples import write_samples


logger = logging.get_logger("transformers.flexicodec_hf")


def parse_arguments(*classes: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """
    Parse the options of a recipe, and set the seed of the last dataclass, the training arguments.

    Args:
        classes: Dataclasses with the options.
        argv: The command line without the script (default: `sys.argv`). A single JSON file is read
            instead of options.

    Returns:
        An instance of each class.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    from_file = len(argv) == 1 and argv[0].endswith(".json")
    parser = HfArgumentParser(classes)
    arguments = parser.parse_json_file(argv[0]) if from_file else parser.parse_args_into_dataclasses(argv)
    set_seed(arguments[-1].seed)
    logging.enable_explicit_format()
    return arguments


def override_config(config: PreTrainedConfig, overrides: str | None, **values: Any) -> PreTrainedConfig:
    """
    A configuration with other values in place of its own, at any depth.

    Args:
        config: The configuration, for a model to train from nothing the defaults.
        overrides: A JSON object, or the path of a file with one.
        values: Values that follow from the codec or the tokenizer; `overrides` goes before them.

    Raises:
        ValueError: `overrides` is no JSON object, or has a key that the configuration does not
            have.
    """
    given = (overrides or "{}").lstrip()
    try:
        changes = json.loads(given if given.startswith("{") else Path(given).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`--config_overrides` must be a JSON object, or a file with one: {error}.") from error
    return type(config).from_dict(_merge(_merge(config.to_dict(), values), changes))


def _merge(values: dict[str, Any], changes: dict[str, Any], where: str = "") -> dict[str, Any]:
    if unknown := changes.keys() - values.keys():
        raise ValueError(
            f"`--config_overrides` names {where}{min(unknown)}, which the configuration does not have. It has: "
            f"{', '.join(sorted(values))}."
        )
    nested = {name for name, new in changes.items() if isinstance(values[name], dict) and isinstance(new, dict)}
    return values | changes | {name: _merge(values[name], changes[name], f"{where}{name}.") for name in nested}


@dataclass
class SpeechTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` with a time limit, and with the defaults that recipes of raw audio need.
    """

    time_limit: float | None = HfArg(
        default=None, help="Save and stop after so many minutes; the same command goes on."
    )
    do_train: bool = HfArg(default=True, help="Whether to train.")
    remove_unused_columns: bool = HfArg(default=False, help="Must be false: collators read the columns.")
    # `Trainer` writes it into the model's configuration: false would make what is trained slow to
    # generate.
    use_cache: bool = HfArg(default=True, help="Whether the trained model generates with a cache.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # Each process reads a stream and takes its share: batches of one process could not be cut
        # up for the others.
        self.accelerator_config.dispatch_batches = False
        # From pinned memory, batches go to a GPU while it computes.
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        if self.should_log:
            logging.set_verbosity_info()


class SafeTrainer(Trainer):
    """`Trainer` that leaves a complete model if it is killed while it saves."""

    # ******** FlexiCodec specific ********
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        with atomic_directory(output_dir or self.args.output_dir) as folder:
            super()._save(str(folder), state_dict)

    # ******** end ********


class SpeechTrainer(SafeTrainer):
    """
    `Trainer` whose training examples have seeds for their random choices (`batches.with_seeds`),
    whose order a resumed run repeats, that logs means beside the loss, and that heeds the time limit.
    """

    def __init__(self, *args: Any, train_dataset: Any = None, **kwargs: Any):
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        if train_dataset is not None:
            self.train_dataset = with_seeds(train_dataset, self.args.seed)
        self._kept: dict[bool, dict[str, list[Tensor]]] = {True: {}, False: {}}
        if self.args.n_gpu > 1:
            raise ValueError(
                f"There are {self.args.n_gpu} GPUs, and one process: start one for each with `accelerate launch` or "
                "`torchrun --nproc_per_node`, or show it one with CUDA_VISIBLE_DEVICES."
            )
        if getattr(self.args, "time_limit", None) is not None:
            self.add_callback(TimeLimit(self.args.time_limit))

    def keep_means(self, values: Mapping[str, Tensor], training: bool) -> None:
        """Log the means of values, such as parts of the loss, beside the next loss."""
        for name, value in values.items():
            self._kept[training].setdefault(name, []).append(value.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for training, prefix in ((True, ""), (False, "eval_")):
            if f"{prefix}loss" in logs:
                for name, values in self._kept[training].items():
                    logs[prefix + name] = self.accelerator.reduce(torch.stack(values).mean(), "mean").item()
                self._kept[training] = {}
        super().log(logs, start_time)

    # ******** FlexiCodec specific ********
    # An order that does not depend on the global random state, which a resumed run does not have at
    # the start of its epoch, nor on the number of processes, and that tells the examples the epoch.
    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler | None:
        args, dataset = self.args, self.train_dataset
        if not isinstance(dataset, SeededExamples):
            return None
        grouped = args.train_sampling_strategy == "group_by_length"
        lengths = dataset.dataset[args.length_column_name][:] if grouped else None
        sampler = EpochSampler(len(dataset), args.seed, lengths, args.train_batch_size * args.world_size)
        self.add_callback(_SetEpoch(sampler))
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        return None

    # ******** end ********


class _SetEpoch(TrainerCallback):
    """TODO: drop once `Trainer` sets the epoch of samplers in resumed runs of several processes."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class TimeLimit(TrainerCallback):
    """Saves and stops after some minutes, in all processes at the same step."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self._start = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if broadcast_object_list([time.monotonic() - self._start > self.minutes * 60])[0]:
            control.should_save = control.should_training_stop = True


class SpeechSamples(TrainerCallback):
    """
    Lets the model speak at regular steps and at the end, into `output_dir/samples` and TensorBoard.
    Training goes on as if it had not: random states are put back.

    Args:
        speak: Called with the model, yields names and waveforms `(num_samples,)`.
        sampling_rate: Sampling rate of the waveforms, in hertz.
        every: Steps between samples.
    """

    def __init__(self, speak: Callable[[Any], Iterator[tuple[str, Tensor]]], sampling_rate: int, every: int):
        self.speak, self.sampling_rate, self.every = speak, sampling_rate, every
        self._last_step = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.on_train_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self._last_step or not state.is_world_process_zero:
            return
        self._last_step = state.global_step
        folder = Path(args.output_dir) / "samples"
        training = model.training
        model.eval()
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(args.seed)
            waveforms = {name: waveform.cpu().numpy() for name, waveform in self.speak(model)}
        model.train(training)
        if waveforms:
            write_samples(folder, state.global_step, waveforms, self.sampling_rate)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """
    The last whole checkpoint of `Trainer` in a directory. One that was cut off, after it, is
    deleted.
    """
    while Path(output_dir).is_dir() and (checkpoint := get_last_checkpoint(str(output_dir))) is not None:
        try:
            json.loads((Path(checkpoint) / "trainer_state.json").read_text())  # `Trainer` writes it last
            return checkpoint
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning(f"{checkpoint} is not whole and is deleted: the run was stopped while it was written.")
            shutil.rmtree(checkpoint)
    return None


def run_training(trainer: Trainer, data: SpeechDataArguments, **card: Any) -> None:
    """
    Train, from the last checkpoint in the output directory if there is one (unless
    `--resume_from_checkpoint` names another); evaluate; write the metrics, the model and its card;
    and push them to the Hub if asked to. A second training in the same directory is refused.

    Args:
        trainer: The trainer.
        data: Names the data set for the card.
        card: More about the model, as `Trainer.create_model_card` takes it.
    """
    args = trainer.args
    with only_run(args.output_dir, trainer.is_world_process_zero()):
        if args.do_train:
            with args.main_process_first(local=False):
                checkpoint = args.resume_from_checkpoint or last_checkpoint(args.output_dir)
            if checkpoint is not None:
                logger.info(f"Going on from {checkpoint}.")
            result = trainer.train(resume_from_checkpoint=checkpoint)
            trainer.save_model()
            _write_metrics(trainer, "train", result.metrics)
            if trainer.is_world_process_zero():
                with atomic_file(Path(args.output_dir) / "trainer_state.json") as path:
                    trainer.state.save_to_json(str(path))
        if args.do_eval:
            _write_metrics(trainer, "eval", trainer.evaluate())
        card = {"tags": ["speech", "flexicodec"], "dataset": data.dataset, **card}
        if args.push_to_hub:
            trainer.push_to_hub(**card)
        else:
            trainer.create_model_card(**card)


def _write_metrics(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    """`Trainer.save_metrics`, which would leave a part of a file if it were killed, and not resume from it."""
    trainer.log_metrics(split, metrics)
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        with atomic_file(folder / f"{split}_results.json") as path:
            path.write_text(json.dumps(metrics, indent=4, sort_keys=True))
