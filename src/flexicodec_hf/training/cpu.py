"""Layers with which the codec trains faster on a CPU, most of all with `--bf16`."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modeling_flexicodec import FlexiCodecSnake1d


ModelT = TypeVar("ModelT", bound=nn.Module)


def optimize_for_cpu_training(model: ModelT) -> ModelT:
    """
    Replace the convolutions over time and the Snake activations of a model, in place, by ones that
    keep `(batch_size, channels, length)` channels last and save one tensor for the gradients.

    Parameters and their names stay the same; outputs and gradients are equal up to rounding.

    Returns:
        The same model.
    """
    for module in model.modules():
        # Exact types: subclasses have a `forward` of their own.
        fast = _FAST_CLASSES.get(type(module))
        if fast is not None and (fast is _Snake1d or (module.groups == 1 and module.padding_mode == "zeros")):
            module.__class__ = fast
    return model


def _image(values: Tensor) -> Tensor:
    """A sequence or a kernel as an image of one row: oneDNN copies neither if its channels come last."""
    return values.unsqueeze(2).contiguous(memory_format=torch.channels_last)


class _Conv1d(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        output = F.conv2d(
            _image(input),
            _image(self.weight),
            self.bias,
            stride=(1, *self.stride),
            padding=(0, *self.padding),
            dilation=(1, *self.dilation),
        )
        return output.squeeze(2)


class _ConvTranspose1d(nn.ConvTranspose1d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output = F.conv_transpose2d(
            _image(input),
            _image(self.weight),
            self.bias,
            stride=(1, *self.stride),
            padding=(0, *self.padding),
            output_padding=(0, *self.output_padding),
            dilation=(1, *self.dilation),
        )
        return output.squeeze(2)


class _SnakeFunction(torch.autograd.Function):
    """x + sin(ax)^2 / a"""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_states, alpha)
        alpha = alpha.to(hidden_states.dtype)
        waves = (hidden_states * alpha).sin_().square_()
        return torch.addcmul(hidden_states, alpha.reciprocal(), waves, out=waves)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, alpha = ctx.saved_tensors
        angles = hidden_states * (2 * alpha).to(hidden_states.dtype)
        sines = angles.sin()
        grad_input = torch.addcmul(grad, grad, sines)
        # x sin(2ax) / a + (cos(2ax) - 1) / (2a^2)
        slopes = sines.mul_(hidden_states).mul_(grad).sum(dim=(0, 2), keepdim=True).to(alpha.dtype)
        waves = angles.cos_().sub_(1).mul_(grad).sum(dim=(0, 2), keepdim=True).to(alpha.dtype)
        return grad_input, slopes / alpha + waves / (2 * alpha.square())


class _Snake1d(FlexiCodecSnake1d):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _SnakeFunction.apply(hidden_states, self.alpha + 1e-9)


_FAST_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: _Conv1d,
    nn.ConvTranspose1d: _ConvTranspose1d,
    FlexiCodecSnake1d: _Snake1d,
}
