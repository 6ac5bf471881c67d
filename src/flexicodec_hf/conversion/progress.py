"""What a conversion has done so far, so that an interrupted one continues where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..data.files import atomic_directory
from .checkpoint import CheckpointError


RECORD = ".conversion.json"
"""Beside the weights while a conversion is unfinished: the files and options of its making."""

# Where a converted repository has weights, and so records and what a killed process left.
_WEIGHT_FOLDERS = ("", "tts/", "tts/*/")


class Progress:
    """
    The parts of a conversion that an interrupted run need not do again.

    Each part has a record of what it was made of beside its weights, until all parts are done.

    Args:
        output_dir: Directory of the conversion.
        overwrite: Whether to replace models of other conversions, or of other files and options.
    """

    def __init__(self, output_dir: Path, overwrite: bool = False):
        self.output_dir = output_dir
        self.overwrite = overwrite
        for where in _WEIGHT_FOLDERS:
            for leftover in output_dir.glob(f"{where}.incomplete-*"):
                if _is_written(leftover):
                    raise CheckpointError(
                        f"Another conversion still writes to {output_dir} ({leftover.name}): wait for its end, or "
                        "choose another directory."
                    )
                shutil.rmtree(leftover)

    def convert(
        self, name: str, directory: Path, sources: Sequence[Any], convert: Callable[[Path], Any], weights: str = ""
    ) -> bool:
        """
        Convert a part, unless it is done.

        Args:
            name: Name of the part, for error messages.
            directory: Where its files go.
            sources: What decides the result: files, and other values.
            convert: Called with a folder to write the files to.
            weights: Folder of the weights inside the directory.

        Returns:
            Whether it was converted now.

        Raises:
            CheckpointError: There is a model already, of another conversion or of other sources,
                and `overwrite` is not set.
        """
        result, record = (directory / weights / file for file in ("model.safetensors", RECORD))
        made_of = json.dumps([_fingerprint(source) for source in sources])
        if result.exists():
            if record.exists() and record.read_text() == made_of:
                return False
            if not self.overwrite and record.exists():
                raise CheckpointError(
                    f"{self.output_dir} holds an unfinished conversion whose {name} is of other files or options: "
                    "repeat it with those, or pass `overwrite`."
                )
            if not self.overwrite:
                raise CheckpointError(f"{result} exists: pass `overwrite` to replace it.")
        # What a killed process leaves is then inside, where the next run looks.
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_directory(directory) as folder:
                convert(folder)
                (folder / weights / RECORD).write_text(made_of)
        except BaseException:
            with suppress(OSError):  # it holds something
                directory.rmdir()
            raise
        return True

    def finish(self) -> None:
        """Remove the records: a later conversion to the directory is another one."""
        for where in _WEIGHT_FOLDERS:
            for record in self.output_dir.glob(where + RECORD):
                record.unlink()


def _is_written(leftover: Path) -> bool:
    """Whether the process that made a hidden folder still runs: here, or unknown on another machine."""
    host, _, process = leftover.name.rpartition(".")
    if not process.isdecimal() or int(process) == os.getpid():
        return False
    if not host.endswith(f".{socket.gethostname()}"):
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True


def _fingerprint(source: Any) -> Any:
    path = Path(str(source))
    if source is None or not path.is_file():
        return str(source)
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
