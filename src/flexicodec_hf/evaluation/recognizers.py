"""Models that the measures use: speech recognizers, text normalizers, encoders of speakers, predictors of opinions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioXVector, pipeline
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from ..audio_flexicodec import resample
from ..data.files import DataError, require


# Of all measures, in hertz: wide-band PESQ, Whisper and most speaker encoders accept no other rate.
SAMPLING_RATE = 16_000
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


def load_normalizer(language: str = "en") -> Normalizer:
    """
    Load Whisper's text normalizer (arXiv:2212.04356, appendix C): the English one for `en`, otherwise the basic one.

    Args:
        language: ISO 639-1 code of the texts.

    Raises:
        DataError: The language is English, and `whisper-normalizer`, which has the table of spellings, is missing.
    """
    if language != "en":
        return BasicTextNormalizer()
    require("whisper_normalizer", "Whisper's English normalizer", "eval")
    table = files("whisper_normalizer").joinpath("normalizers", "english.json")
    return EnglishTextNormalizer(json.loads(table.read_text(encoding="utf-8")))


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


def load_mos_predictor(device: str = "cpu") -> Callable[[np.ndarray], float]:
    """
    Load Distill-MOS (arXiv:2502.05356), as a function from a waveform (`(num_samples,)` at 16 kHz) to its predicted
    mean opinion score from 1 to 5.

    Args:
        device: Where to run.

    Raises:
        DataError: The package `distillmos`, which includes the weights, is missing.
    """
    package = require("distillmos", "the measure mos")
    with redirect_stdout(StringIO()):  # it prints the path of its weights
        network = package.ConvTransformerSQAModel().to(device).eval()

    @torch.inference_mode()
    def predict(waveform: np.ndarray) -> float:
        return network(torch.from_numpy(waveform).float()[None].to(device)).item()

    return predict


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
