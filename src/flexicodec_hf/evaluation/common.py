"""What the evaluation shares: its error, its sampling rate, packages that may be missing."""

from __future__ import annotations

import importlib
from types import ModuleType


# Of all measures, in hertz: wide-band PESQ, Whisper and most speaker encoders know no other.
SAMPLING_RATE = 16_000

EXTRA = "pip install 'flexicodec-hf[eval]'"


class EvaluationError(ValueError):
    """Something that the user can mend: a missing package, an unknown column, results of other settings."""


def require(module: str, purpose: str, install: str = EXTRA) -> ModuleType:
    """
    Import an optional package.

    Args:
        module: Its name.
        purpose: What needs it, for the error.
        install: The command that installs it, for the error.

    Raises:
        EvaluationError: It cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EvaluationError(f"{purpose} needs the package `{module}` ({error}): {install}") from error
