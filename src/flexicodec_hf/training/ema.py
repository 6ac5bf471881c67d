"""A moving average of the weights, which sounds better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class ExponentialMovingAverage:
    """
    Exponential moving average of the trained parameters of a model.

    Args:
        model: Its frozen parameters are left alone.
        decay: Share of the average that stays at each update. The first updates keep less, since there is little to keep.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages as parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, parameter in enumerate(self._parameters):
            parameter.data, self._average[i] = self._average[i], parameter.data

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(saved)


__all__ = ["ExponentialMovingAverage"]
