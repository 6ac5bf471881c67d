"""Reading a released checkpoint tensor by tensor, with an account of what was used; writing a repository whole."""

from __future__ import annotations

import copy
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


# Where the text-to-speech files keep the codec that their model was trained with.
TTS_CODEC_PREFIXES = ("flexicodec_model.", "dualcodec_model.")


class CheckpointError(ValueError):
    """A source file that cannot be converted: unreadable, incomplete, or with tensors nobody knows."""


class SourceCheckpoint:
    """The tensors of one released file, read one at a time.

    Both containers of the release are understood: `.safetensors`, and `.pt`/`.pth`/`.bin` files read with
    `weights_only=True`, whose tensors may sit under a top-level `model` or `state_dict`. Weight-normalised
    convolutions are read by their plain name, in both namings (`weight_g`/`weight_v` and
    `parametrizations.weight.original0/1`), and fused in float64. Fused weights are float32: the reference casts a
    half-precision file to float32 before it fuses.

    Args:
        path: The file.
        prefix: Only tensors whose name starts with `prefix` belong to this view; names are given without it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is corrupt, or is not a mapping of names to tensors.
    """

    def __init__(self, path: str | Path, prefix: str = ""):
        self.path = Path(path)
        self.prefix = prefix
        self._used: set[str] = set()
        self._tensors, names = _open(self.path)
        self._names = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    def view(self, prefix: str) -> SourceCheckpoint:
        """The tensors under a further `prefix`, with an account of their own."""
        view = copy.copy(self)
        view.prefix = self.prefix + prefix
        view._used = set()
        view._names = {name.removeprefix(prefix) for name in self._names if name.startswith(prefix)}
        return view

    def __contains__(self, name: str) -> bool:
        return name in self._names or self._weight_norm_names(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, with weight norm fused, without reading its data."""
        if (pair := self._weight_norm_names(name)) is not None:
            name = pair[1]
        if name not in self._names:
            raise CheckpointError(f"{self.path} has no tensor '{self.prefix}{name}'.")
        tensor = self._tensors[self.prefix + name] if isinstance(self._tensors, Mapping) else None
        return tuple(tensor.shape if tensor is not None else self._tensors.get_slice(self.prefix + name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, with weight norm fused, and marked as used."""
        if (pair := self._weight_norm_names(name)) is not None:
            magnitude, direction = (self._read(part) for part in pair)
            dims = tuple(range(1, direction.ndim))
            weight = direction.double()
            weight = weight * (magnitude.double() / weight.norm(dim=dims, keepdim=True))
            return weight.float()
        return self._read(name)

    def skip(self, *names: str) -> None:
        """Mark tensors as known and not needed."""
        self._used.update(names)

    def unused(self) -> list[str]:
        """Full names of the tensors that were neither read nor skipped."""
        return [self.prefix + name for name in sorted(self._names - self._used)]

    def _read(self, name: str) -> Tensor:
        if name not in self._names:
            raise CheckpointError(f"{self.path} has no tensor '{self.prefix}{name}'.")
        self._used.add(name)
        if isinstance(self._tensors, Mapping):
            return self._tensors[self.prefix + name].detach()
        return self._tensors.get_tensor(self.prefix + name)

    def _weight_norm_names(self, name: str) -> tuple[str, str] | None:
        stem, _, leaf = name.rpartition(".")
        if leaf != "weight":
            return None
        for pair in (
            (f"{stem}.weight_g", f"{stem}.weight_v"),
            (f"{stem}.parametrizations.weight.original0", f"{stem}.parametrizations.weight.original1"),
        ):
            if pair[0] in self._names and pair[1] in self._names:
                return pair
        return None


def _open(path: Path):  # type: ignore[no-untyped-def]
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    if path.suffix == ".safetensors":
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}.") from error
        return handle, list(handle.keys())
    try:
        # Files of PyTorch before 1.6 are no zip files and cannot be mapped into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
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
    return content, list(content)


@contextmanager
def written_whole(output_dir: str | Path) -> Iterator[Path]:
    """
    A folder to write the files of a repository into, which move to `output_dir` once all are complete, the weights last.

    Whatever interrupts the writing, `output_dir` never holds weights that are cut short or that belong to another
    configuration. The source may be a file of `output_dir`.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=output_dir) as folder:
        yield Path(folder)
        files = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
        for directory in {output_dir / file.parent for file in files}:
            directory.mkdir(parents=True, exist_ok=True)
            for old in directory.glob("model*.safetensors*"):
                old.unlink()
        # The index names all shards: with it, a directory of several looks complete.
        for file in sorted(files, key=lambda file: (file.match("model*.safetensors*"), file.suffix == ".json", file)):
            (Path(folder) / file).replace(output_dir / file)
