"""Models that the measures use: speech recognizers, text normalizers, speaker encoders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoFeatureExtractor, AutoModelForAudioXVector, pipeline
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from ..audio_flexicodec import resample
from ..data.files import DataError, require
from .metrics import SAMPLING_RATE


# Names of the table of British spellings: in Whisper's repositories on the Hub, and in the package openai-whisper.
_SPELLING_FILES = ("normalizer.json", "english.json")
# Whisper sees 30 s at once.
_WHISPER_SAMPLES = 30 * SAMPLING_RATE

Recognizer = Callable[[np.ndarray], str]
Normalizer = Callable[[str], str]
SpeakerEncoder = Callable[[np.ndarray], np.ndarray]


def load_recognizer(model: str, language: str = "en", device: str = "cpu") -> Recognizer:
    """
    Load a speech recognizer, as a function from a waveform (`(num_samples,)` at 16 kHz) to its text.

    It gives the same text each time.

    Args:
        model: A directory in CTranslate2's format (it holds a `model.bin`), which faster-whisper runs with a
            beam of 5; or any model of the `automatic-speech-recognition` pipeline, a Hub id or a directory.
        language: ISO 639-1 code of the spoken language, for multilingual models.
        device: Where to run: `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        DataError: A package is missing, or the model cannot be loaded.
    """
    if (Path(model) / "model.bin").is_file():
        return _faster_whisper(model, language, device)
    advice = "Pass a model of the `automatic-speech-recognition` pipeline, or a directory in CTranslate2's format."
    with _loading(f"the speech recognizer {model}", advice):
        recognizer = pipeline("automatic-speech-recognition", model=model, device=device)
    is_whisper = recognizer.model.config.model_type == "whisper"
    options: dict[str, Any] = {}
    if is_whisper and getattr(recognizer.model.generation_config, "is_multilingual", False):
        options["generate_kwargs"] = {"language": language, "task": "transcribe"}
    model_rate = recognizer.feature_extractor.sampling_rate

    def recognize(waveform: np.ndarray) -> str:
        # Whisper needs timestamps to go on after its 30 s.
        long = {"return_timestamps": True} if is_whisper and len(waveform) > _WHISPER_SAMPLES else {}
        raw = resample(waveform, SAMPLING_RATE, model_rate)
        return recognizer({"raw": raw, "sampling_rate": model_rate}, **options, **long)["text"].strip()

    return recognize


def load_normalizer(language: str = "en", sources: tuple[str, ...] = ()) -> Normalizer:
    """
    Load Whisper's text normalizer (arXiv:2212.04356, appendix C): the English one for `en`, otherwise the basic one.

    The English one also turns British spellings into American ones. Their table is not in transformers; it is taken
    from `normalizer.json` of a Whisper model.

    Args:
        language: ISO 639-1 code of the texts.
        sources: Where to look for the table: JSON files, directories or Hub ids of models. The first that has one is
            used, or else the package `whisper-normalizer`.

    Raises:
        DataError: The language is English, and no table was found.
    """
    if language != "en":
        return BasicTextNormalizer()
    for path in (*map(_spelling_file, sources), _packaged_spelling_file()):
        if path is not None:
            return EnglishTextNormalizer(json.loads(path.read_text(encoding="utf-8")))
    raise DataError(
        "Whisper's English normalizer needs its table of spellings, which is not in "
        f"{', '.join(sources) or 'the sources given (none)'}: pass the `normalizer.json` of a Whisper model "
        "(`--normalizer openai/whisper-base`), or pip install whisper-normalizer"
    )


def load_speaker_encoder(model: str, device: str = "cpu") -> SpeakerEncoder:
    """
    Load a speaker encoder, as a function from a waveform (`(num_samples,)` at 16 kHz) to a vector (`(size,)`).

    Args:
        model: `"resemblyzer"` for the package of that name (GE2E, arXiv:1710.10467; it includes the weights), or a
            model for `AutoModelForAudioXVector`, a Hub id (such as `microsoft/wavlm-base-plus-sv`) or a directory.
        device: Where to run.

    Raises:
        DataError: The package is missing, or the model cannot be loaded.
    """
    if model == "resemblyzer":
        # TODO: drop the note once webrtcvad does without pkg_resources, which setuptools 81 removed.
        package = require("resemblyzer", "the speaker encoder resemblyzer (with `setuptools<81`)")
        encoder = package.VoiceEncoder(device, verbose=False)
        return lambda waveform: encoder.embed_utterance(package.preprocess_wav(waveform, source_sr=SAMPLING_RATE))
    advice = "Pass `resemblyzer` or a model with an x-vector head, such as `microsoft/wavlm-base-plus-sv`."
    with _loading(f"the speaker encoder {model}", advice):
        extractor = AutoFeatureExtractor.from_pretrained(model)
        network = AutoModelForAudioXVector.from_pretrained(model).to(device).eval()

    @torch.inference_mode()
    def encode(waveform: np.ndarray) -> np.ndarray:
        waveform = resample(waveform, SAMPLING_RATE, extractor.sampling_rate)
        inputs = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt").to(device)
        return network(**inputs).embeddings[0].cpu().numpy()

    return encode


@contextmanager
def _loading(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load {what}: {str(error).splitlines()[0]} {advice}") from error


def _faster_whisper(model: str, language: str, device: str) -> Recognizer:
    package = require("faster_whisper", "a recognizer in CTranslate2's format")
    where = torch.device(device)
    kind = "cuda" if where.type == "cuda" else "cpu"
    recognizer = package.WhisperModel(
        model,
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
            # Whisper needs timestamps to go on after its 30 s. Without them it makes fewer errors.
            without_timestamps=len(waveform) < _WHISPER_SAMPLES - 2 * SAMPLING_RATE,
            # Everything is scored: no segment is dropped because it sounds like noise.
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
