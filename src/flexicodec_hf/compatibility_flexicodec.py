"""The one place for what differs between the supported versions of transformers."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version


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


__all__ = ["CACHE", "takes_cache"]
