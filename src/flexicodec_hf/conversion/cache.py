"""The authors' files, converted once into the cache of the Hub."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..data.files import atomic_file
from .checkpoint import CheckpointError
from .download import CODEC_CONFIG_FILE, CODEC_FILE, ReleasedFiles, fetch
from .repository import convert_release, fingerprint


logger = logging.get_logger(__name__)

# Raised when the same files give other results: what an older version converted is then left alone.
_VERSION = 1


def converted_release(
    source: str | os.PathLike[str],
    text_to_speech: bool = True,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **ignored: Any,
) -> Path | None:
    """
    The converted form of a repository or directory with the authors' files.

    Args:
        source: Hub id or directory.
        text_to_speech: Whether the text-to-speech system is needed too.
        revision: Branch, tag or commit of `source`.
        cache_dir: Where to look for downloads and to convert to; by default the caches of the Hub,
            `HF_HUB_CACHE` and `HF_ASSETS_CACHE`.
        token, local_files_only, force_download: As for `from_pretrained`.
        ignored: Other arguments of `from_pretrained`.

    Returns:
        A directory for `from_pretrained`, named after the commit; None if `source` is anything else.

    Raises:
        CheckpointError: A file cannot be had, or cannot be converted.
    """
    hub: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    if os.path.isdir(source):
        source = Path(source).resolve()
        if (source / "config.json").is_file() or not (source / CODEC_FILE).is_file():
            return None
        files = sorted(file for file in source.iterdir() if file.suffix in (".safetensors", ".yaml", ".pt", ".json"))
        version = hashlib.sha256(str([fingerprint(file) for file in files]).encode()).hexdigest()[:40]
    else:
        source = str(source)
        revision = _released_commit(source, revision, hub)
        if revision is None:
            return None
        version = revision
    return _convert_once(source, version, text_to_speech, revision, force_download, **hub)


def install_release(source: str, text_to_speech: bool = True) -> Path:
    """
    Put the converted files to the downloads of their repository, for programs that load by its id.

    Args:
        source: Hub id with the authors' files.
        text_to_speech: Whether to put the text-to-speech system there too.

    Returns:
        The snapshot in the cache of the Hub, which `pipeline`, `AutoModel` and `AutoProcessor` find
        by the id.

    Raises:
        CheckpointError: A file cannot be had, or cannot be converted, or `source` is no Hub id with
            the authors' files.
    """
    if os.path.isdir(source):
        raise CheckpointError(f"{source} is a directory here: only what comes from the Hub has a place in its cache.")
    snapshot = fetch(source, CODEC_CONFIG_FILE).parent
    if (snapshot / "config.json").exists() and not _is_installed(snapshot):
        raise CheckpointError(f"{source} has a config.json of its own: `from_pretrained` loads it as it is.")
    folder = _convert_once(source, snapshot.name, text_to_speech, snapshot.name)
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    # The configuration last: with it, the snapshot is a repository of transformers.
    for file in sorted(files, key=lambda file: (file == Path("config.json"), file)):
        if any(part.startswith(".") for part in file.parts):
            continue
        target, mark = snapshot / file, _marks(snapshot) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as temporary:
            try:
                os.link(folder / file, temporary)
            except OSError:  # another disk
                shutil.copyfile(folder / file, temporary)
        # The cache marks what a repository lacks by an empty file. A directory is no mark, and keeps
        # the next program that asks the Hub from making one.
        if mark.is_file():
            mark.unlink()
        mark.mkdir(parents=True, exist_ok=True)
    return snapshot


def _released_commit(source: str, revision: str | None, hub: dict[str, Any]) -> str | None:
    """The commit of a Hub repository that has the authors' files and no `config.json` of its own."""
    try:
        config, settings = (
            try_to_load_from_cache(source, name, hub["cache_dir"], revision)
            for name in ("config.json", CODEC_CONFIG_FILE)
        )
        if isinstance(config, str) and not isinstance(settings, str):
            return None  # any other repository; it takes no request to know
        snapshot = Path(hf_hub_download(source, CODEC_CONFIG_FILE, revision=revision, **hub)).parent
    except (OSError, ValueError):  # the Hub's own errors are one or the other; loading `source` says what is wrong
        return None
    config = cached_file(
        source,
        "config.json",
        revision=snapshot.name,
        **hub,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return snapshot.name if config is None or _is_installed(snapshot) else None


def _is_installed(snapshot: Path) -> bool:
    """Whether [`install_release`] put the `config.json` there."""
    return (_marks(snapshot) / "config.json").is_dir()


def _marks(snapshot: Path) -> Path:
    """Where the cache of the Hub marks what a snapshot lacks."""
    return snapshot.parents[1] / ".no_exist" / snapshot.name


def _convert_once(
    source: str | Path, version: str, text_to_speech: bool, revision: str | None, force: bool = False, **hub: Any
) -> Path:
    cache_dir = hub.get("cache_dir")
    namespace = source.name or "root" if isinstance(source, Path) else source
    assets = None if cache_dir is None else Path(cache_dir) / "assets"
    folder = cached_assets_path("flexicodec_hf", namespace, f"{version}-{_VERSION}", assets_dir=assets)
    weights = folder / ("tts/model.safetensors" if text_to_speech else "model.safetensors")
    if force or not weights.is_file():
        with WeakFileLock(folder / ".lock"):
            if force or not weights.is_file():
                files = ReleasedFiles()
                files.fetch(source, text_to_speech, revision, force_download=force, **hub)
                logger.warning(f"The files of {source} are converted, once, to {folder}.")
                convert_release(files, folder, overwrite=True, report=logger.info)
    return folder
