"""What a conversion has done so far, so that an interrupted one goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError


RECORD = ".conversion.json"


class Progress:
    """
    The record of an unfinished conversion, a file in its output directory.

    It names the parts that were begun and what each is made of. It is gone when all is done.

    Args:
        output_dir: Of the conversion; made when missing.
        overwrite: Begin again where the record is of other sources, and replace what other conversions left.

    Raises:
        CheckpointError: The directory holds a record that cannot be read.
    """

    def __init__(self, output_dir: Path, overwrite: bool = False):
        self.output_dir = output_dir
        self.overwrite = overwrite
        self._path = output_dir / RECORD
        self._begun: dict[str, Any] = {}
        if self._path.exists():
            try:
                self._begun = json.loads(self._path.read_text())
            except ValueError as error:
                raise CheckpointError(f"{self._path} is no record of a conversion: {error}. Remove it.") from error
        for leftover in output_dir.glob("**/.incomplete-*"):
            shutil.rmtree(leftover)

    def is_done(self, part: str, result: Path, sources: Sequence[Any]) -> bool:
        """
        Whether a part is done already, of the same sources.

        Args:
            part: Its name in the record.
            result: Its last file, which is there when it is done.
            sources: What it is made of: files, and options in plain words.

        Raises:
            CheckpointError: `result` is there but of other sources, or of another conversion, and is not to be replaced.
        """
        if not result.exists():
            return False
        begun = self._begun.get(part)
        finished = begun is not None and begun["replaces"] != _fingerprint(result)
        if begun is not None and finished and begun["made_of"] == _fingerprints(sources):
            return True
        if self.overwrite:
            return False
        if finished:
            raise CheckpointError(
                f"{self.output_dir} holds an unfinished conversion whose {part} is of other files or options: repeat it "
                "with those, or pass --overwrite."
            )
        raise CheckpointError(f"{result} exists: pass --overwrite to replace it.")

    @contextmanager
    def making(self, part: str, result: Path, sources: Sequence[Any]) -> Iterator[None]:
        """
        Make a part in the body. What it is made of is noted before: it is done as soon as `result`, its last file, is there
        anew, even if nothing runs after that.
        """
        before = dict(self._begun)
        replaces = _fingerprint(result)
        self._write(self._begun | {part: {"made_of": _fingerprints(sources), "replaces": replaces}})
        try:
            yield
        except BaseException:
            if _fingerprint(result) == replaces:
                self._write(before)
            raise

    def finish(self) -> None:
        """All is done: a later conversion to the directory is another one."""
        self._path.unlink(missing_ok=True)

    def _write(self, begun: dict[str, Any]) -> None:
        self._begun = begun
        if not begun:
            self.finish()
            with suppress(OSError):  # it holds something
                self.output_dir.rmdir()
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(begun))
        temporary.replace(self._path)


def _fingerprints(sources: Sequence[Any]) -> list[Any]:
    return [_fingerprint(source) for source in sources]


def _fingerprint(source: Any) -> Any:
    path = Path(str(source))
    if source is None or not path.is_file():
        return str(source)
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
