"""Measuring speech: error rates, quality, speakers, rates and speed of the codec and of text-to-speech."""

from .asr import load_normalizer, load_recognizer
from .common import SAMPLING_RATE, EvaluationError
from .data import Clip, load_clips
from .metrics import (
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
from .report import Report
from .run import MEASURES, Judge, evaluate
from .speaker import load_speaker_encoder
from .systems import CodecReconstruction, Original, Speech, System, TextToSpeech


__all__ = [
    "MEASURES",
    "SAMPLING_RATE",
    "Clip",
    "CodecReconstruction",
    "ErrorCount",
    "EvaluationError",
    "Judge",
    "Original",
    "Report",
    "Speech",
    "System",
    "TextToSpeech",
    "character_errors",
    "cosine_similarity",
    "dnsmos",
    "evaluate",
    "load_clips",
    "load_normalizer",
    "load_recognizer",
    "load_speaker_encoder",
    "log_mel_distance",
    "mel_cepstral_distortion",
    "pesq",
    "stoi",
    "word_errors",
]
