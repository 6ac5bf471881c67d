"""Opt-in kernels for CPUs."""

from __future__ import annotations

from typing import TypeVar

from torch import nn


ModelT = TypeVar("ModelT", bound=nn.Module)


def optimize_for_cpu(model: ModelT) -> ModelT:
    """The model, unchanged so far."""
    return model
