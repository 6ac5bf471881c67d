"""What is written to disk: files and directories that are complete or absent, and settings of earlier runs."""

from __future__ import annotations

import filecmp
import functools
import importlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout


class DataError(ValueError):
    """Data that cannot be read, written or continued as asked. The message says why and what to do."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """
    A path to write a file to, which is renamed to `path` at the end.

    Whoever sees `path` sees a complete file. The temporary file lies hidden beside it and has the same
    suffix. It is removed if the body raises, and after a kill by the next process that writes there.
    """
    path = Path(path)
    _remove_leftovers(path.parent.resolve())
    temporary = path.with_name(f".incomplete-{path.stem}.{_process()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """
    A directory to write files to, which becomes `path` at the end.

    It is renamed if `path` does not exist. If it does, for example because `path` is a repository with
    other files, the new files move into it. Weights of models (`model*.safetensors*`) move last. Those of
    one file and the same `config.json` take the place of the old ones at once; otherwise the old ones are
    removed first. So `path` never holds incomplete weights, or weights that belong to another
    configuration. The body may read files of `path`.

    Raises:
        FileExistsError: `path` is a file.
    """
    path = Path(path)
    (path if path.exists() else path.parent).mkdir(parents=True, exist_ok=True)
    # On the same file system as `path`, which may be a mount point.
    parent = path if path.exists() else path.parent
    _remove_leftovers(parent.resolve())
    temporary = parent / f".incomplete-{path.name}.{_process()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            _merge(temporary, path)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def only_run(directory: str | Path, main: bool = True) -> Iterator[None]:
    """
    Keep other runs out of an output directory, which is made if it does not exist, until the process ends, however it
    ends. What killed runs left incomplete in it is removed. Does nothing if this is not the `main` process of the run.

    Raises:
        DataError: Another run works in the directory.
    """
    if not main:
        yield
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / "_lock", timeout=0):
            for leftover in [*directory.glob(".incomplete-*"), *directory.glob("*/.incomplete-*")]:
                _remove(leftover)
            yield
    except Timeout as error:
        raise DataError(
            f"{directory}: another run works in this directory: wait for its end, or choose another output."
        ) from error


def check_settings(path: str | Path, settings: Mapping[str, Any]) -> None:
    """
    Check that a run continues with the settings that its first run wrote to a JSON file; write it if it is not there.

    Raises:
        DataError: The file is damaged, or some settings differ; the message names them.
    """
    path = Path(path)
    if path.exists():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}: expected the settings of an earlier run as a JSON object, but it is damaged ({error}): "
                "delete the file if you know that they were the same, or choose another output."
            ) from error
        check_same_settings(path.parent, found, settings)
        return
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_same_settings(
    place: str | Path,
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    remedy: str = "use these settings again, or choose another output",
) -> None:
    """Raise [`DataError`] if the settings with which `place` was made differ from those of this run."""
    expected = json.loads(json.dumps(settings))  # lists for tuples, as `found` has them
    differences = [
        f"{name} {found.get(name)!r}, not {expected.get(name)!r}"
        for name in dict.fromkeys([*found, *expected])
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise DataError(f"{place} was made with other settings ({'; '.join(differences)}): {remedy}.")


def require(module: str, purpose: str, extra: str | None = None) -> ModuleType:
    """Import an optional package that `purpose` needs, and that `extra` of this package installs; or [`DataError`]."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library of the package does not fit this build of PyTorch
        install = f"'flexicodec-hf[{extra}]'" if extra else module.split(".")[0].replace("_", "-")
        raise DataError(f"{purpose} needs the package `{module}` ({error}): pip install {install}") from error


def _process() -> str:
    """A name that no other process has, also on other machines that share the file system."""
    return f"{socket.gethostname()}.{os.getpid()}"


@functools.cache
def _remove_leftovers(directory: Path) -> None:
    """Remove what processes of this machine that were killed left incomplete; once for each directory."""
    if os.name != "posix":
        return  # only there, signal 0 asks whether a process lives
    for path in directory.glob(".incomplete-*"):
        process = re.search(rf"\.{re.escape(socket.gethostname())}\.(\d+)(\.\w+)?$", path.name)
        if process is None:
            continue
        try:
            os.kill(int(process[1]), 0)
        except ProcessLookupError:
            _remove(path)
        except (PermissionError, OverflowError):
            continue  # another user's, or no process


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _merge(source: Path, target: Path) -> None:
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    for directory in {file.parent for file in files}:
        (target / directory).mkdir(parents=True, exist_ok=True)
        new, old = (list((folder / directory).glob("model*.safetensors*")) for folder in (source, target))
        config, earlier = (folder / directory / "config.json" for folder in (source, target))
        same = config.is_file() and earlier.is_file() and filecmp.cmp(config, earlier, shallow=False)
        if not (same and [file.name for file in new] == [file.name for file in old] == ["model.safetensors"]):
            for file in old:
                file.unlink()
    # Weights last, and last of all their index: once it is there, the directory looks complete.
    for file in sorted(files, key=lambda file: (file.match("model*.safetensors*"), file.suffix == ".json", file)):
        (source / file).replace(target / file)
