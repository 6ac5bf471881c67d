"""
One repository on disk or on the Hub for codec and text-to-speech:

```
config.json, model.safetensors, preprocessor_config.json     the codec (AutoModel)
processor_config.json, tokenizer files, chat_template.jinja  the processor (AutoProcessor, AutoTokenizer)
tts/                                                         the whole system (AutoModelForTextToWaveform)
voices/                                                      its voices
*.py                                                         the code, for `trust_remote_code=True`
```
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForTextToWaveform, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .configuration_flexicodec import FlexiCodecConfig
from .modeling_flexicodec import FlexiCodecModel
from .release_flexicodec import HUB_OPTIONS
from .voice_flexicodec import FlexiCodecVoice


logger = logging.get_logger(__name__)

TTS_DIR, VOICES_DIR = "tts", "voices"


class FlexiCodecRepositoryForTextToSpeech:
    """
    Entry of [`AutoModelForTextToWaveform`] for repositories with the codec at their root, such as
    the released one. It is no model: `from_pretrained` loads the text-to-speech system in `tts/`.
    """

    config_class = FlexiCodecConfig
    _auto_class: str | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """
        Called by the Auto classes for code from a repository. There is nothing to save, so nothing
        to register.
        """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *model_args: Any,
        config: FlexiCodecConfig | None = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> PreTrainedModel:
        """
        Load the text-to-speech system of a repository.

        Args:
            pretrained_model_name_or_path (`str` or `PathLike`): Hub id or directory.
            config ([`FlexiCodecConfig`], *optional*):
                Configuration of the codec at the root; unused.
            subfolder (`str`, *optional*): Folder of the codec inside the repository.
            kwargs: See [`FlexiCodecForTextToSpeech.from_pretrained`].

        Returns:
            [`FlexiCodecForTextToSpeech`]

        Raises:
            OSError: The repository holds the codec alone.
        """
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        folder = find_tts(pretrained_model_name_or_path, subfolder, **options)
        return AutoModelForTextToWaveform.from_pretrained(
            pretrained_model_name_or_path, *model_args, subfolder=folder, **kwargs
        )


def find_tts(source: str | PathLike[str], subfolder: str = "", **options: Any) -> str:
    """
    Where the text-to-speech system of a repository is.

    Args:
        source: Hub id or directory.
        subfolder: Folder inside the repository.
        options: Those of `HUB_OPTIONS`.

    Returns:
        `subfolder`, or `tts/` inside it if it holds the codec.

    Raises:
        OSError: There is no `tts/`.
    """
    config, _ = PreTrainedConfig.get_config_dict(source, subfolder=subfolder, **options)
    if config.get("model_type") != FlexiCodecConfig.model_type:
        return subfolder
    folder = f"{subfolder}/{TTS_DIR}".lstrip("/")
    if _find_file(source, f"{folder}/config.json", **options) is None:
        raise OSError(
            f"{source} cannot speak: it holds the codec alone, there is no {folder}/config.json. Use a repository "
            "with a text-to-speech system, or load this one with `AutoModel`."
        )
    return folder


def load_shared_codec(model: PreTrainedModel, source: str | PathLike[str], subfolder: str, **options: Any) -> None:
    """
    Load the weights of a codec that is stored once, at the root of the repository, into the
    text-to-speech system.

    Args:
        model ([`FlexiCodecForTextToSpeech`]):
            The system. When it is saved again, it holds these weights itself.
        source: Hub id or directory.
        subfolder: Folder of the system inside the repository.
        options: Those of `HUB_OPTIONS`.

    Raises:
        OSError: The repository has no weights of the codec.
    """
    root = (source, subfolder.rpartition("/")[0]) if subfolder else (Path(source).parent, "")
    codec = FlexiCodecModel.from_pretrained(root[0], subfolder=root[1], dtype=torch.float32, **options)
    model.codec.load_state_dict(codec.state_dict())
    model.config.shares_codec = False


def load_voices(
    names: Iterable[str], source: str | PathLike[str], subfolder: str, **options: Any
) -> dict[str, FlexiCodecVoice]:
    """
    Load voices from `voices/`, beside the text-to-speech system or at the root of its repository.

    Args:
        names: Of the voices. A warning names those without a file, and they are left out.
        source: Hub id or directory.
        subfolder: Folder of the system inside the repository.
        options: Those of `HUB_OPTIONS`.

    Returns:
        The voices by name.

    Raises:
        ValueError: A name cannot be the name of a file, or a file holds no voice.
    """
    folders = [f"{subfolder}/{VOICES_DIR}"] if subfolder else []
    folders += [VOICES_DIR, f"../{VOICES_DIR}"] if Path(source).is_dir() else [VOICES_DIR]
    voices = {}
    for name in names:
        found = (_find_file(source, f"{folder}/{check_voice_name(name)}.safetensors", **options) for folder in folders)
        path = next((path for path in found if path is not None), None)
        if path is None:
            logger.warning(f"The voice {name!r} of {source} has no file in {VOICES_DIR}/: it is left out.")
        else:
            voices[name] = FlexiCodecVoice.load(path)
    return voices


def save_voices(voices: Mapping[str, FlexiCodecVoice], directory: Path) -> None:
    """
    Write each voice to `voices/<name>.safetensors`.

    Args:
        voices: By name.
        directory: Where `voices/` is made, if there are any.

    Raises:
        ValueError: A name cannot be the name of a file.
    """
    files = {f"{check_voice_name(name)}.safetensors": voice for name, voice in voices.items()}
    if files:
        (directory / VOICES_DIR).mkdir(parents=True, exist_ok=True)
    for file, voice in files.items():
        voice.save(directory / VOICES_DIR / file)


def check_voice_name(name: str) -> str:
    """Return the name of a voice, or raise a `ValueError` if it cannot be the name of its file."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w .-]{0,199}", name):
        raise ValueError(
            f"The name of a voice must be up to 200 letters, digits, spaces, '.', '-' and '_', got {name!r}."
        )
    return name


def save_repository(
    directory: str | PathLike[str],
    codec: FlexiCodecModel,
    model: PreTrainedModel,
    processor: Any,
    storage_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> None:
    """
    Write one repository for codec and text-to-speech, with its code.

    Args:
        directory: Where to write; existing files are replaced.
        codec: The codec at the root. It may have other weights than the codec inside `model`. If it
            is the same object, its weights are stored once.
        model ([`FlexiCodecForTextToSpeech`]): The text-to-speech system, with its `voices`.
        processor ([`FlexiCodecTTSProcessor`]): The processor of the system.
        storage_dtype: Type of the weights in the files, such as float16 for half the size. They
            load in the types that the models have now. These are stored too by default.
        kwargs: For `save_pretrained` of both models, such as `max_shard_size`.
    """
    # 1. Code, and the entry for `AutoModelForTextToWaveform` in the configuration of the codec
    root = Path(directory)
    auto_map = getattr(codec.config, "auto_map", None)
    if codec._auto_class is not None:
        root.mkdir(parents=True, exist_ok=True)
        custom_object_save(model, root)
        entry = FlexiCodecRepositoryForTextToSpeech.__name__
        codec.config.auto_map = (auto_map or {}) | {
            "AutoModelForTextToWaveform": f"repository_flexicodec_tts.{entry}",
        }

    # 2. Codec
    codec.save_pretrained(root, state_dict=_cast(codec.state_dict(), storage_dtype), **kwargs)
    codec.config.auto_map = auto_map

    # 3. Processor
    processor.feature_extractor.save_pretrained(root)
    processor.save_pretrained(root)

    # 4. Text-to-speech system and voices
    weights = model.state_dict()
    model.config.shares_codec = model.codec is codec
    if model.config.shares_codec:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("codec.")}
    model.save_pretrained(root / TTS_DIR, voices_directory=root, state_dict=_cast(weights, storage_dtype), **kwargs)
    model.config.shares_codec = False


def _cast(weights: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in weights.items()
    }


def _find_file(source: str | PathLike[str], path: str, **options: Any) -> str | None:
    return cached_file(source, path, _raise_exceptions_for_missing_entries=False, **options)


__all__ = ["FlexiCodecRepositoryForTextToSpeech", "check_voice_name", "save_repository"]
