"""Reading a released checkpoint, with an account of the tensors that were used."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class CheckpointError(ValueError):
    """A released file that cannot be converted. The message says why and what to do."""


class SourceCheckpoint:
    """
    The tensors of a released file, by the reference's names.

    Weight-normalized convolutions are read by their plain name, in both namings
    (`weight_g`/`weight_v` and `parametrizations.weight.original0/1`), and fused in float64. Fused
    weights are float32: the reference loads a half-precision file into a float32 model, which
    fuses them (flexicodec 0.1.2, infer.py, line 42).

    Args:
        path: The file, for error messages.
        tensors: Its tensors.
        prefix: Only tensors whose name starts with `prefix` are seen; their names are given without
            it.
    """

    def __init__(self, path: str | Path, tensors: Mapping[str, Tensor], prefix: str = ""):
        self.path = Path(path)
        self.prefix = prefix
        self._tensors = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        # The file that each tensor is from, and its full name there.
        self._origins = {name: (self.path, prefix + name) for name in self._tensors}
        self._used: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> SourceCheckpoint:
        """
        Read a `.safetensors` file, or a `.pt`/`.pth`/`.bin` file with `weights_only=True`.

        The tensors of the second kind may be under a top-level `model` or `state_dict`. The data is
        mapped into
        memory: it is read from the disk when a tensor is used.

        Raises:
            FileNotFoundError: There is no such file.
            CheckpointError: The file is corrupt, or is not a mapping of names to tensors.
        """
        return cls(path, _read_tensors(Path(path)))

    def view(self, prefix: str) -> SourceCheckpoint:
        """The tensors whose name starts with `prefix`, with an account of their own."""
        return SourceCheckpoint(
            self.path, {self.prefix + name: self._tensors[name] for name in self}, self.prefix + prefix
        )

    def replace(self, prefix: str, part: SourceCheckpoint) -> None:
        """Put the tensors of another file in the place of those under `prefix`."""
        kept = [name for name in self if not name.startswith(prefix)]
        self._tensors = {name: self._tensors[name] for name in kept}
        self._origins = {name: self._origins[name] for name in kept}
        for name in part:
            self._tensors[prefix + name] = part._tensors[name]
            self._origins[prefix + name] = part._origins[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or self._weight_norm_names(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def shape(self, name: str, rank: int | None = None) -> tuple[int, ...]:
        """Shape of a tensor, with weight norm fused. Another number of axes than `rank` is refused."""
        pair = self._weight_norm_names(name)
        shape = tuple(self._get(pair[1] if pair is not None else name).shape)
        if rank is not None and len(shape) != rank:
            raise CheckpointError(
                f"{self.path} has '{self.full_name(name)}' of shape {shape}, but it must have {rank} axes: is it the "
                "right file?"
            )
        return shape

    def read(self, name: str) -> Tensor:
        """A tensor, with weight norm fused, which then counts as used."""
        pair = self._weight_norm_names(name)
        self._used.update(pair or (name,))
        if pair is None:
            return self._get(name).detach()
        magnitude, direction = (self._get(part).detach().double() for part in pair)
        norm = direction.norm(dim=tuple(range(1, direction.ndim)), keepdim=True)
        return (direction * (magnitude / norm)).float()

    def full_name(self, name: str) -> str:
        """The name in the file, of a tensor that may be missing."""
        return self._origins.get(name, (self.path, self.prefix + name))[1]

    def unused(self) -> list[str]:
        """Names of the tensors that were not read."""
        return sorted(self._tensors.keys() - self._used)

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor '{self.prefix}{name}': is it the right file?")
        return self._tensors[name]

    def _weight_norm_names(self, name: str) -> tuple[str, str] | None:
        stem, _, leaf = name.rpartition(".")
        if leaf != "weight":
            return None
        for pair in (
            (f"{stem}.weight_g", f"{stem}.weight_v"),
            (f"{stem}.parametrizations.weight.original0", f"{stem}.parametrizations.weight.original1"),
        ):
            if pair[0] in self._tensors and pair[1] in self._tensors:
                return pair
        return None


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
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
