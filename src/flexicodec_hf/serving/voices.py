"""The voices of a server: those of the repository, and those that clients added, as files in one folder."""

from __future__ import annotations

import re
import time
from pathlib import Path

from ..data.files import atomic_file
from ..voice_flexicodec import FlexiCodecVoice


DEFAULT = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class VoiceError(ValueError):
    """A voice cannot be found, added or deleted. `status` is that of the HTTP answer."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Voices:
    """
    Voices by name.

    Args:
        built_in: The repository's. They cannot be changed.
        folder: Where added voices are kept; `None` keeps them until the server ends.
        max_voices: How many may be added.

    Raises:
        ValueError: A file in the folder holds no voice.
    """

    def __init__(self, built_in: dict[str, FlexiCodecVoice], folder: Path | None = None, max_voices: int = 100):
        self.built_in = built_in
        self.folder = folder
        self.max_voices = max_voices
        self.added: dict[str, FlexiCodecVoice] = {}
        self.created: dict[str, int] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.safetensors")):
                if _NAME.fullmatch(path.stem):
                    self.added[path.stem] = FlexiCodecVoice.load(path)
                    self.created[path.stem] = int(path.stat().st_mtime)

    def names(self) -> list[str]:
        """`default` first."""
        return list(dict.fromkeys([DEFAULT, *self.built_in, *self.added]))

    def find(self, name: str) -> FlexiCodecVoice | None:
        """
        A voice by name. `None` for the default one of a model without voices, which invents one.

        Raises:
            VoiceError: There is none of this name.
        """
        voices = {**self.built_in, **self.added}
        if name in voices:
            return voices[name]
        if name == DEFAULT:
            return next(iter(self.built_in.values()), None)
        raise VoiceError(f"There is no voice {name[:64]!r}. There are: {', '.join(self.names())}.")

    def check_new(self, name: str) -> None:
        """Raise [`VoiceError`] if a voice of this name cannot be added."""
        if not _NAME.fullmatch(name):
            raise VoiceError(
                "`name` must be 1 to 64 lower-case letters, digits, hyphens and underscores, and begin with a letter "
                f"or digit, got {name[:64]!r}."
            )
        if name in self.names():
            raise VoiceError(f"There is a voice {name!r} already: delete it first, or choose another name.", 409)
        if len(self.added) >= self.max_voices:
            raise VoiceError(f"There are {self.max_voices} added voices, as many as there may be: delete one.", 409)

    def add(self, name: str, voice: FlexiCodecVoice) -> None:
        """Keep a voice. Raises [`VoiceError`] as `check_new`."""
        self.check_new(name)
        if self.folder is not None:
            with atomic_file(self.folder / f"{name}.safetensors") as path:
                voice.save(path)
        self.added[name] = voice
        self.created[name] = int(time.time())

    def delete(self, name: str) -> None:
        """Forget an added voice. Raises [`VoiceError`] if it is not one."""
        if name not in self.added:
            self.find(name)
            raise VoiceError(f"The voice {name!r} belongs to the model, and cannot be deleted.", 403)
        if self.folder is not None:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)
        del self.added[name], self.created[name]
