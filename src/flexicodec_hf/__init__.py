"""FlexiCodec for transformers: importing this package registers its classes with the Auto classes."""

# ruff: noqa: F401
from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet


# The range of pyproject.toml, checked before the imports below, which may fail with other versions.
_TRANSFORMERS = ">=5.17,<5.25"
_installed = importlib.metadata.version("transformers")
if not SpecifierSet(_TRANSFORMERS).contains(_installed, prereleases=True):
    raise ImportError(
        f"flexicodec_hf works with transformers{_TRANSFORMERS}, but {_installed} is installed: "
        f"run `pip install 'transformers{_TRANSFORMERS}'`."
    )

if TYPE_CHECKING:
    from .configuration_flexicodec import FlexiCodecConfig
    from .configuration_flexicodec_ar import FlexiCodecARConfig
    from .configuration_flexicodec_tts import FlexiCodecTTSConfig
    from .configuration_flexicodec_vocoder import FlexiCodecVocoderConfig
    from .configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig
    from .cpu_flexicodec import optimize_for_cpu
    from .feature_extraction_flexicodec import FlexiCodecFeatureExtractor
    from .feature_extraction_flexicodec_mel import FlexiCodecMelFeatureExtractor
    from .generation_flexicodec_tts import FlexiCodecFlowKwargs, FlexiCodecTTSOutput
    from .modeling_flexicodec import FlexiCodecModel, FlexiCodecPreTrainedModel
    from .modeling_flexicodec_ar import (
        FlexiCodecARForConditionalGeneration,
        FlexiCodecARModel,
        FlexiCodecARPreTrainedModel,
    )
    from .modeling_flexicodec_tts import FlexiCodecForTextToSpeech, FlexiCodecTTSPreTrainedModel
    from .modeling_flexicodec_vocoder import FlexiCodecVocoderModel
    from .modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel, FlexiCodecVoiceboxPreTrainedModel
    from .pipeline_flexicodec_tts import FlexiCodecTTSPipeline
    from .processing_flexicodec_tts import FlexiCodecTTSProcessor
    from .repository_flexicodec_tts import FlexiCodecRepositoryForTextToSpeech, save_repository
    from .speech_lm import FlexiCodecSpeechVocabulary, SpeechChatCollator, SpeechTextCollator
    from .streaming_flexicodec import decode_blocks, encode_blocks
    from .streaming_flexicodec_tts import FlexiCodecAudioStreamer
    from .voice_flexicodec import FlexiCodecVoice

__version__ = "0.1.0"

# What is imported when it is first used. Not transformers' `_LazyModule`, which needs all of transformers.
_MODULES = {
    "configuration_flexicodec": ("FlexiCodecConfig",),
    "configuration_flexicodec_ar": ("FlexiCodecARConfig",),
    "configuration_flexicodec_tts": ("FlexiCodecTTSConfig",),
    "configuration_flexicodec_vocoder": ("FlexiCodecVocoderConfig",),
    "configuration_flexicodec_voicebox": ("FlexiCodecVoiceboxConfig",),
    "cpu_flexicodec": ("optimize_for_cpu",),
    "feature_extraction_flexicodec": ("FlexiCodecFeatureExtractor",),
    "feature_extraction_flexicodec_mel": ("FlexiCodecMelFeatureExtractor",),
    "generation_flexicodec_tts": (
        "FlexiCodecFlowKwargs",
        "FlexiCodecTTSOutput",
    ),
    "modeling_flexicodec": (
        "FlexiCodecModel",
        "FlexiCodecPreTrainedModel",
    ),
    "modeling_flexicodec_ar": (
        "FlexiCodecARForConditionalGeneration",
        "FlexiCodecARModel",
        "FlexiCodecARPreTrainedModel",
    ),
    "modeling_flexicodec_tts": (
        "FlexiCodecForTextToSpeech",
        "FlexiCodecTTSPreTrainedModel",
    ),
    "modeling_flexicodec_vocoder": ("FlexiCodecVocoderModel",),
    "modeling_flexicodec_voicebox": (
        "FlexiCodecVoiceboxModel",
        "FlexiCodecVoiceboxPreTrainedModel",
    ),
    "pipeline_flexicodec_tts": ("FlexiCodecTTSPipeline",),
    "processing_flexicodec_tts": ("FlexiCodecTTSProcessor",),
    "repository_flexicodec_tts": (
        "FlexiCodecRepositoryForTextToSpeech",
        "save_repository",
    ),
    "speech_lm": (
        "FlexiCodecSpeechVocabulary",
        "SpeechChatCollator",
        "SpeechTextCollator",
    ),
    "streaming_flexicodec": (
        "decode_blocks",
        "encode_blocks",
    ),
    "streaming_flexicodec_tts": ("FlexiCodecAudioStreamer",),
    "voice_flexicodec": ("FlexiCodecVoice",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The Auto classes take classes, not names, and ours need PyTorch. That takes seconds, too long for
# `flexicodec-hf --help`: the command line registers them when a command runs.
if Path(sys.argv[0] if sys.argv else "").stem != "flexicodec-hf":
    importlib.import_module(".registration", __name__)
