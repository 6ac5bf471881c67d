"""
Distill a trained Voicebox into one that speaks in 1, 2 or 4 evaluations instead of 30, with the
guidance folded in.

The student starts as the teacher, and learns for each of its steps the mean velocity of the
teacher's guided flow over that step (as IntMeanFlow, arXiv 2510.07979, on the teacher's own paths).
Its steps have their middles at different times, so the time says how long the step is, and model
and sampling stay as they are: `sample(..., num_inference_steps=4, guidance_scale=0)`.

accelerate launch examples/distill_voicebox.py --codec flexicodec --teacher voicebox --dataset my_speech \
    --output_dir voicebox-fast --per_device_train_batch_size 16 --learning_rate 5e-5 --warmup_steps 200 \
    --max_steps 10000 --do_eval --eval_strategy steps --eval_steps 500 --save_steps 500
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor

from flexicodec_hf import FlexiCodecModel, FlexiCodecVoiceboxModel
from flexicodec_hf.generation_flexicodec_voicebox import codes_of_frames
from flexicodec_hf.training.batches import load_splits
from flexicodec_hf.training.trainer import SpeechTrainingArguments, parse_arguments, run_training
from flexicodec_hf.training.tts import (
    SpeechCollator,
    SpeechEncoder,
    TTSDataArguments,
    TTSTrainer,
    VoiceboxBatches,
    cache_splits,
)


@dataclass
class ModelArguments:
    """The teacher, and what the student learns of it."""

    codec: str = field(metadata={"help": "The codec, a Hub id or a directory."})
    teacher: str = field(metadata={"help": "A trained Voicebox, a Hub id or a directory."})
    merging_thresholds: list[float] = field(
        default_factory=lambda: [0.86, 0.91, 1.0],
        metadata={"help": "The codec's merging thresholds to learn from, one drawn for each clip in each step."},
    )
    student_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4], metadata={"help": "Numbers of steps that the student can be used with."}
    )
    teacher_steps: int = field(
        default=16, metadata={"help": "Steps of the teacher's flow, a multiple of each number in `student_steps`."}
    )
    guidance_scale: float = field(default=2.0, metadata={"help": "Guidance of the teacher."})
    guidance_rescale: float = field(default=0.75, metadata={"help": "See `FlexiCodecVoiceboxModel.sample`."})

    def __post_init__(self) -> None:
        if any(steps < 1 or self.teacher_steps % steps for steps in self.student_steps):
            raise ValueError(
                f"`--teacher_steps` must be a multiple of each of `--student_steps`, got {self.teacher_steps} and "
                f"{self.student_steps}."
            )
        middles = [(step + 0.5) / steps for steps in self.student_steps for step in range(steps)]
        if len(set(middles)) < len(middles):
            raise ValueError(
                f"`--student_steps` {self.student_steps} have steps with the same middle, which the student cannot "
                "tell apart: use powers of two."
            )


@dataclass
class DistillationBatches:
    """
    What `TTSTrainer` feeds the student: for each clip a step, drawn in each epoch, as a straight
    flow that leaves the teacher's path at the start of the step and meets it at its end.
    """

    teacher: FlexiCodecVoiceboxModel
    encoder: SpeechEncoder
    args: ModelArguments

    def __call__(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        teacher, factor = self.teacher, self.teacher.config.upsample_factor
        clips = self.clips(batch)
        path = self.path(clips, self.args.teacher_steps, self.args.guidance_scale)

        choices = [(steps, step) for steps in self.args.student_steps for step in range(steps)]
        # Another draw than those of `VoiceboxBatches`, which has the same seeds.
        randoms = [np.random.default_rng((*seed, 1)) for seed in batch["seeds"].tolist()]
        drawn = [choices[int(random.integers(len(choices)))] for random in randoms]
        size = [self.args.teacher_steps // steps for steps, _ in drawn]
        ends = [(step * one, (step + 1) * one) for (_, step), one in zip(drawn, size, strict=True)]
        rows = torch.arange(len(drawn))
        start, stop = (path[torch.tensor(times), rows] for times in zip(*ends, strict=True))
        number, step = torch.tensor(drawn, device=start.device).T
        middle = (step + 0.5) / number
        velocity = (stop - start) * number[:, None, None]

        # `forward` makes the point x = (1 - s t) noise + t mel, with s = 1 - sigma_min, and expects
        # the velocity mel - s noise there. Solved for point and velocity:
        noise = start - middle[:, None, None] * velocity
        mel = velocity + (1 - teacher.config.sigma_min) * noise
        # The target comes after the prompt, which is clean.
        source = torch.arange(clips["mel"].shape[1], device=mel.device) - clips["prompt_frames"][:, None] * factor
        is_prompt = (source < 0)[..., None]
        index = source.clamp(0, mel.shape[1] - 1)[..., None].expand(-1, -1, mel.shape[2])
        labels = torch.where(is_prompt, clips["mel"], teacher._denormalize(mel.gather(1, index)))
        inputs = {
            "audio_codes": clips["codes"],
            "token_lengths": clips["has_code"].long(),
            "labels": labels,
            "noise": noise.gather(1, index),
            "timesteps": middle,
            "prompt_lengths": clips["prompt_frames"] * factor,
            "mel_mask": clips["has_code"].repeat_interleave(factor, dim=1),
        }
        return inputs, {"flow_loss": (clips["has_code"].sum(dim=1) - clips["prompt_frames"]).sum() * factor}

    def clips(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Codes and mel of each codec frame, and the length of the prompt, at least one frame."""
        inputs, _ = VoiceboxBatches(self.teacher, self.encoder)(batch)
        factor = self.teacher.config.upsample_factor
        frames = inputs["mel_mask"].sum(dim=1) // factor
        codes, _ = codes_of_frames(inputs["audio_codes"], inputs["token_lengths"], int(frames.max()))
        prompt_frames = torch.minimum((inputs["prompt_lengths"] // factor).clamp(min=1), frames - 1)
        return {
            "codes": codes,
            "has_code": torch.arange(codes.shape[1], device=codes.device) < frames[:, None],
            "mel": inputs["labels"][:, : codes.shape[1] * factor].float(),
            "noise": inputs["noise"],
            "prompt_frames": prompt_frames,
        }

    def path(self, clips: dict[str, Tensor], num_steps: int, guidance_scale: float, model: Any = None) -> Tensor:
        """
        Where a flow passes after each step, `(num_steps + 1, batch_size, num_frames, num_mel_bins)`,
        in normalized channels; the teacher's by default.
        """
        factor, prompt_frames = self.teacher.config.upsample_factor, clips["prompt_frames"]
        frames, width = clips["has_code"].sum(dim=1), clips["codes"].shape[1]
        positions = torch.arange(width, device=frames.device)
        target = (positions + prompt_frames[:, None]).clamp(max=width - 1)
        lengths = frames - prompt_frames
        longest = int(lengths.max())
        noise = clips["noise"][:, : longest * factor]
        points = [noise]
        (model or self.teacher).sample(
            clips["codes"].gather(1, target)[:, :longest],
            (positions < lengths[:, None]).long()[:, :longest],
            prompt_codes=clips["codes"],
            prompt_token_lengths=(positions < prompt_frames[:, None]).long(),
            prompt_mel=clips["mel"],
            prompt_mel_mask=torch.arange(width * factor, device=frames.device) < prompt_frames[:, None] * factor,
            noise=noise,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=self.args.guidance_rescale,
            callback_on_step_end=lambda _model, _step, _time, tensors: points.append(tensors["mel"]),
        )
        return torch.stack(points)

    @torch.no_grad()
    def distances(self, student: FlexiCodecVoiceboxModel, batch: dict[str, Tensor]) -> dict[str, float]:
        """How far student and teacher are from the teacher's whole flow, by their numbers of steps."""
        clips = self.clips(batch)
        scale, exact = (
            self.args.guidance_scale,
            self.path(clips, self.args.teacher_steps, self.args.guidance_scale)[-1],
        )
        runs = {"student": (student, 0.0), "teacher": (self.teacher, scale)}
        return {
            f"{name}_{steps}_steps": float(
                (self.path(clips, steps, guidance, model)[-1] - exact).norm() / exact.norm()
            )
            for name, (model, guidance) in runs.items()
            for steps in self.args.student_steps
        }


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, training_args = parse_arguments(
        ModelArguments, TTSDataArguments, SpeechTrainingArguments, argv=argv
    )
    with training_args.main_process_first(local=False):
        train_dataset, eval_dataset = load_splits(
            data_args, training_args.seed, evaluate=training_args.do_eval, needs_text=False
        )
    codec = FlexiCodecModel.from_pretrained(model_args.codec).to(training_args.device)
    feature_extractor = AutoFeatureExtractor.from_pretrained(model_args.codec)
    teacher = FlexiCodecVoiceboxModel.from_pretrained(model_args.teacher).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    if student.config.repa_layer_index is not None:
        student.repa_projection.requires_grad_(False)  # there is no alignment loss here
    teacher = teacher.to(training_args.device)
    latents = teacher.config.predicts_latent
    encoder = SpeechEncoder(codec, feature_extractor, model_args.merging_thresholds, latents=latents)
    train_dataset, eval_dataset = cache_splits(encoder, train_dataset, eval_dataset, data_args)
    mel_feature_extractor = None if latents else AutoFeatureExtractor.from_pretrained(model_args.teacher)
    batches = DistillationBatches(teacher, encoder, model_args)
    trainer = TTSTrainer(
        student,
        training_args,
        data_collator=SpeechCollator(feature_extractor, mel_feature_extractor=mel_feature_extractor),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=mel_feature_extractor,
        prepare=batches,
    )
    run_training(trainer, data_args, tasks="text-to-speech")
    if eval_dataset is not None:
        batch = next(iter(trainer.get_eval_dataloader()))
        batch = {name: value.to(training_args.device) for name, value in batch.items()}
        metrics = batches.distances(trainer.accelerator.unwrap_model(trainer.model).eval(), batch)
        trainer.log_metrics("distances", metrics)
        trainer.save_metrics("distances", metrics)


if __name__ == "__main__":
    main()
