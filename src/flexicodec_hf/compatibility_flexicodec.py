"""What differs between the supported versions of transformers, and what it passes to any model."""

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.utils import TransformersKwargs


# transformers 5.24 renamed `past_key_values` to `cache`, in the arguments of models and in the
# fields of their outputs.
# TODO: write `cache` instead, and drop this file, once 5.24 is the lowest supported version.
CACHE = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method with an argument `cache` be called with `past_key_values` too; its signature shows [`CACHE`]."""

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            kwargs["cache"] = kwargs.pop("past_key_values")
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [p.replace(name=CACHE) if name == "cache" else p for name, p in signature.parameters.items()]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapper


class CheckedConfigMixin:
    """Says in words what is wrong with entries of a configuration that transformers does not look at."""

    # ******** FlexiCodec specific ********
    def __post_init__(self, **kwargs: Any) -> None:
        try:
            super().__post_init__(**kwargs)  # type: ignore[misc]
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"{type(self).__name__} has a wrong entry: {error}.") from error
        check_entries(self)

    # *************************************


def check_entries(config: Any) -> None:
    """Refuse a `dtype` that is none (a dictionary has one for each part), and switches of outputs that are none."""
    dtypes = config.dtype.values() if config.dtype and isinstance(config.dtype, dict) else [config.dtype]
    if not all(dtype is None or isinstance(getattr(torch, str(dtype), dtype), torch.dtype) for dtype in dtypes):
        raise ValueError(f"`dtype` must be a type of PyTorch, such as 'float32', got {config.dtype!r}.")
    for name in ("output_attentions", "output_hidden_states", "return_dict"):
        value = getattr(config, name, None)
        if not isinstance(value, bool | None):
            raise ValueError(f"`{name}` must be true or false, got {value!r}.")


class OffloadedDeviceMixin:
    """Makes `device` the device that a model computes on, also while accelerate keeps its weights elsewhere."""

    # ******** FlexiCodec specific: weights that are offloaded say "meta" ********
    @property
    def device(self) -> torch.device:
        device: torch.device = super().device  # type: ignore[misc]
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())  # type: ignore[attr-defined]
            places = (getattr(hook, "execution_device", None) for hook in hooks)
            return torch.device(next((place for place in places if place is not None), device))
        return device

    # *************************************


def is_number(value: Any, whole: bool = False) -> bool:
    """Whether a value is a number that a float can hold, or a whole one, of Python or NumPy."""
    kind: Any = numbers.Integral if whole else numbers.Real
    return isinstance(value, kind) and -1e300 < value < 1e300


def check_options(model: torch.nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse arguments that no model of transformers has: they would be left out in silence."""
    if unknown := sorted(options.keys() - TransformersKwargs.__annotations__.keys()):
        raise TypeError(f"{type(model).__name__}.forward() got unexpected arguments: {', '.join(unknown)}.")


__all__ = [
    "CACHE",
    "CheckedConfigMixin",
    "OffloadedDeviceMixin",
    "check_entries",
    "check_options",
    "is_number",
    "takes_cache",
]
