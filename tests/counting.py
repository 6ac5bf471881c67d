"""Counts what matters on a GPU, on any machine: waits of the host for the device, and kernels that are started."""

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


_WAITS = {"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique"}
_WAITS |= {"__bool__", "__int__", "__float__", "__index__", "__array__"}
_NO_KERNEL = {"empty", "empty_like", "new_empty", "detach", "lift_fresh", "_unsafe_view", "_local_scalar_dense"}


class OnDevice(Tensor):
    """A tensor that counts as one on a device. What is computed of it does so too, until `cpu()`."""


class Waits(TorchFunctionMode):
    """Counts reads of `OnDevice` tensors by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if any(isinstance(value, OnDevice) for value in tree_leaves((args, kwargs))) and name in _WAITS:
            self.places.append(name)
            if name == "cpu":
                return result.as_subclass(Tensor)
        return result


class Kernels(TorchDispatchMode):
    """Counts operations that compute something: on a GPU each is a kernel to launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += not (func.is_view or func._schema.name.removeprefix("aten::") in _NO_KERNEL)
        return result
