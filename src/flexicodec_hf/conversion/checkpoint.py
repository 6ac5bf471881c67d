"""Reading a released checkpoint."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


_WEIGHT_NORM = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


class CheckpointError(ValueError):
    """A released file that cannot be converted. The message says why and what to do."""


class SourceCheckpoint:
    """
    The tensors of a released model, by the reference's names.

    Weight norm (`weight_g`/`weight_v`, or `parametrizations.weight.original0/1`) is fused in float64 to
    a `weight` in float32: the reference loads a half-precision file into a float32 model, which fuses it
    (flexicodec 0.1.2, infer.py, line 42).

    Args:
        path: The file, for error messages.
        tensors: Its tensors.
        prefix: What the file has before their names, for error messages.
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, Tensor], prefix: str = ""):
        self.path, self.prefix, self.tensors = Path(path), prefix, dict(tensors)
        for magnitude_leaf, direction_leaf in _WEIGHT_NORM:
            for name in tensors:
                stem = name.removesuffix(magnitude_leaf)
                if stem != name and stem + direction_leaf in tensors:
                    magnitude, direction = (
                        self.tensors.pop(stem + leaf).detach().double() for leaf in (magnitude_leaf, direction_leaf)
                    )
                    norm = direction.norm(dim=tuple(range(1, direction.ndim)), keepdim=True)
                    self.tensors[f"{stem}.weight"] = (direction * (magnitude / norm)).float()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor '{self.prefix}{name}': is it the right file?")
        return self.tensors[name].detach()

    def shape(self, name: str, rank: int) -> torch.Size:
        """Shape of a tensor, which must have `rank` axes."""
        shape = self[name].shape
        if len(shape) != rank:
            raise CheckpointError(
                f"{self.path} has '{self.prefix}{name}' of shape {tuple(shape)}, but it must have {rank} axes: is it "
                "the right file?"
            )
        return shape


def read_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """
    Read a `.safetensors` file, or a `.pt`/`.pth`/`.bin` file with `weights_only=True`.

    The tensors of the second kind may be under a top-level `model` or `state_dict`. The data is mapped
    into memory: it is read from the disk when a tensor is used.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is corrupt, or is not a mapping of names to tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}.") from error
    try:
        # Files of PyTorch before 1.6 are no zip files and cannot be mapped into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load has no class for a broken file
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch file with `weights_only=True`: {error}. "
            "Only files that hold plain tensors are accepted."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path} does not hold a mapping of names to tensors.")
    return content
