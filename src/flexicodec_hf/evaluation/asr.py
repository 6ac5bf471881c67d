"""Speech recognisers and the text normalisers that go with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from transformers import pipeline
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from ..audio_flexicodec import resample
from .common import SAMPLING_RATE, EvaluationError, require


# Names of the table of British spellings: in Whisper's repositories on the Hub, and in the package openai-whisper.
_SPELLING_FILES = ("normalizer.json", "english.json")
# Whisper sees 30 s at once.
_WHISPER_SECONDS = 30

Recognizer = Callable[[np.ndarray], str]
Normalizer = Callable[[str], str]


def load_recognizer(model: str, language: str = "en", device: str = "cpu") -> Recognizer:
    """
    A function from a waveform (`(num_samples,)` at 16 kHz) to its text. It gives the same words each time.

    Args:
        model: A directory in CTranslate2's format (it holds a `model.bin`), run by faster-whisper with a beam of 5; or any
            model of the `automatic-speech-recognition` pipeline, a Hub id or a directory.
        language: ISO 639-1 code of what is spoken, for models of several languages.
        device: Where to run: `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        EvaluationError: A package is missing, or there is no such model.
    """
    if (Path(model) / "model.bin").is_file():
        return _faster_whisper(model, language, device)
    try:
        recognizer = pipeline("automatic-speech-recognition", model=model, device=device)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"cannot load the speech recogniser {model}: {str(error).splitlines()[0]} Pass a model of the "
            "`automatic-speech-recognition` pipeline, or a directory in CTranslate2's format."
        ) from error
    is_whisper = recognizer.model.config.model_type == "whisper"
    generate_kwargs = {}
    if is_whisper and getattr(recognizer.model.generation_config, "is_multilingual", False):
        generate_kwargs = {"language": language, "task": "transcribe"}
    model_rate = recognizer.feature_extractor.sampling_rate

    def recognize(waveform: np.ndarray) -> str:
        options: dict[str, Any] = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}
        if is_whisper and len(waveform) > _WHISPER_SECONDS * SAMPLING_RATE:
            options["return_timestamps"] = True  # how Whisper goes on beyond its 30 s
        raw = resample(waveform, SAMPLING_RATE, model_rate)
        return recognizer({"raw": raw, "sampling_rate": model_rate}, **options)["text"].strip()

    return recognize


def load_normalizer(language: str = "en", sources: tuple[str, ...] = ()) -> Normalizer:
    """
    Whisper's normaliser of texts (arXiv:2212.04356, appendix C): the English one for `en`, else its basic one.

    The English one also turns British spellings into American ones. transformers lacks the table of these; it is taken
    from `normalizer.json` of a Whisper model.

    Args:
        language: ISO 639-1 code of the texts.
        sources: Where to look for the table: JSON files, directories or Hub ids of models, the first that has one. Then
            the package `whisper-normalizer`.

    Raises:
        EvaluationError: The language is English and there is no table.
    """
    if language != "en":
        return BasicTextNormalizer()
    for path in (*map(_spelling_file, sources), _packaged_spelling_file()):
        if path is not None:
            return EnglishTextNormalizer(json.loads(path.read_text(encoding="utf-8")))
    raise EvaluationError(
        "Whisper's English normaliser needs its table of spellings, and there is none in "
        f"{', '.join(sources) or 'the sources given (none)'}: pass the `normalizer.json` of a Whisper model "
        "(`--normalizer openai/whisper-base`), or pip install whisper-normalizer"
    )


def _faster_whisper(model: str, language: str, device: str) -> Recognizer:
    package = require("faster_whisper", "a recogniser in CTranslate2's format", "pip install faster-whisper")
    where = torch.device(device)
    kind = "cuda" if where.type == "cuda" else "cpu"
    recognizer = package.WhisperModel(
        str(model),
        device=kind,
        device_index=where.index or 0,
        compute_type="float16" if kind == "cuda" else "int8",
        cpu_threads=torch.get_num_threads(),
        local_files_only=True,
    )

    def recognize(waveform: np.ndarray) -> str:
        segments, _ = recognizer.transcribe(
            waveform,
            language=language,
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            # Timestamps are how Whisper goes on beyond its 30 s; without them it hears better.
            without_timestamps=len(waveform) < (_WHISPER_SECONDS - 2) * SAMPLING_RATE,
            # What was said is scored: nothing is dropped because it sounds like noise.
            no_speech_threshold=None,
            log_prob_threshold=None,
            compression_ratio_threshold=None,
        )
        return " ".join(segment.text.strip() for segment in segments)

    return recognize


def _spelling_file(source: str) -> Path | None:
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return next((path / name for name in _SPELLING_FILES if (path / name).is_file()), None)
    try:
        return Path(hf_hub_download(source, _SPELLING_FILES[0]))
    except (OSError, ValueError):  # no such repository, no such file in it, or no network
        return None


def _packaged_spelling_file() -> Path | None:
    spec = find_spec("whisper_normalizer")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders for path in Path(folder).rglob(_SPELLING_FILES[1])), None)
