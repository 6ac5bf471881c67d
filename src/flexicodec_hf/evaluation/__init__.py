"""Measure a codec or text-to-speech on a dataset: error rates, quality, speakers, token rates and speed."""

from .methods import Clip, CodecReconstruction, Method, Original, Speech, TextToSpeech
from .metrics import (
    SAMPLING_RATE,
    ErrorCount,
    character_errors,
    cosine_similarity,
    dnsmos,
    log_mel_distance,
    mel_cepstral_distortion,
    pesq,
    stoi,
    word_errors,
)
from .recognizers import load_normalizer, load_recognizer, load_speaker_encoder
from .report import Report
from .run import MEASURES, Evaluator, evaluate


__all__ = [
    "MEASURES",
    "SAMPLING_RATE",
    "Clip",
    "CodecReconstruction",
    "ErrorCount",
    "Evaluator",
    "Method",
    "Original",
    "Report",
    "Speech",
    "TextToSpeech",
    "character_errors",
    "cosine_similarity",
    "dnsmos",
    "evaluate",
    "load_normalizer",
    "load_recognizer",
    "load_speaker_encoder",
    "log_mel_distance",
    "mel_cepstral_distortion",
    "pesq",
    "stoi",
    "word_errors",
]
