"""`from_pretrained` for the authors' files as they are on the Hub, where the package is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any


# Arguments of `from_pretrained` that say where files are.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class FlexiCodecReleaseMixin:
    """
    Lets `from_pretrained` of a class of transformers take the released files too: a Hub id, such as
    `"jiaqili3/flexicodec"`, or a directory, with the files that the authors published and without a
    `config.json`.
    """

    _loads_speech = False  # Whether it needs the text-to-speech system beside the codec

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Load as any class of transformers does. The authors' own files are converted first, once,
        into the cache of the Hub: that takes minutes, and later calls load the result, offline too.

        Args:
            pretrained_model_name_or_path (`str` or `PathLike`): Hub id or directory.
            args, kwargs: See `from_pretrained` of transformers.

        Raises:
            ValueError: Released files are missing, or cannot be converted; or the files of a converted
                repository do not fit each other.
        """
        source, kwargs = find_converted(pretrained_model_name_or_path, kwargs, cls._loads_speech)
        with broken_repositories(source):
            return super().from_pretrained(source, *args, **kwargs)  # type: ignore[misc]


@contextmanager
def broken_repositories(source: Any) -> Iterator[None]:
    """Say in words what transformers fails at in the files of a broken repository."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        is_mismatch = "ignore_mismatched_sizes" in str(error)
        if is_mismatch:
            reason = "its weights do not have the sizes of its configuration (the report above names them)"
        elif isinstance(error, RuntimeError) or "argument" in str(error):  # not of the files
            raise
        else:
            reason = f"a configuration has a wrong entry ({type(error).__name__}: {error})"
        raise ValueError(f"{source} cannot be loaded: {reason}. Download or convert it again.") from error


def find_converted(source: Any, kwargs: dict[str, Any], text_to_speech: bool) -> tuple[Any, dict[str, Any]]:
    """
    What to load, and the remaining arguments of `from_pretrained`: `source` itself, unless it holds
    the authors' own files. These are converted if they were not.
    """
    if source is None or kwargs.get("config") is not None or kwargs.get("subfolder"):
        return source, kwargs
    # CODEPATH: code from a repository runs without the package, and loads only what was converted.
    try:
        from flexicodec_hf.conversion.cache import converted_release
    except ImportError:
        return source, kwargs
    options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    converted = converted_release(source, text_to_speech, **options)
    if converted is None:
        return source, kwargs
    return str(converted), {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}


__all__ = ["FlexiCodecReleaseMixin"]
