"""The flow's time grid and integrator, in the manner of diffusers' schedulers."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class FlexiCodecSchedulerOutput(ModelOutput):
    """
    Args:
        prev_sample (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
            The sample after the step, the input of the next one.
    """

    prev_sample: torch.Tensor | None = None


class FlexiCodecMidpointScheduler:
    """Euler steps of equal length from t = 0 (noise) to t = 1 (mel), each with the velocity at its midpoint in time.

    Any object with `timesteps`, `set_timesteps` and `step` as here can take its place in
    [`FlexiCodecVoiceboxModel.sample`]: the model gives the velocity dx/dt at every entry of `timesteps`, in order.

    Attributes:
        timesteps (`torch.FloatTensor` of shape `(num_inference_steps,)`):
            Times in [0, 1] at which the velocity is asked for, (i + 0.5) / n.
    """

    timesteps: torch.Tensor

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lay out the times of a run.

        Args:
            num_inference_steps (`int`): Number of steps, at least 1.
            device (`str` or `torch.device`, *optional*): Where `timesteps` shall live.

        Raises:
            ValueError: `num_inference_steps` is below 1.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, but is {num_inference_steps}.")
        self.timesteps = (torch.arange(num_inference_steps, device=device) + 0.5) / num_inference_steps

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> FlexiCodecSchedulerOutput:
        """Advance the sample by one step.

        Args:
            model_output (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
                The velocity at `timestep`.
            timestep (`torch.FloatTensor` of shape `()`):
                The entry of `timesteps` it belongs to. Equal steps need it not.
            sample (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
                The sample before the step.
        """
        return FlexiCodecSchedulerOutput(prev_sample=sample + model_output / len(self.timesteps))


__all__ = ["FlexiCodecMidpointScheduler", "FlexiCodecSchedulerOutput"]
