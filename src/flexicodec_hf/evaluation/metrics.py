"""
Measures of speech, as functions on arrays.

Waveforms are `(num_samples,)`, floats in [-1, 1] at 16 kHz. Measures that compare two waveforms need them aligned and
of the same length, as a codec gives them, and raise `ValueError` otherwise. A measure that is not defined for a clip
(too short, or silent) is `None`. Functions that need an optional package raise `DataError` if it is missing.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from ..data.files import require


# Of all measures, in hertz: wide-band PESQ, Whisper and most speaker encoders accept no other rate.
SAMPLING_RATE = 16_000
# Magnitudes below this are silence: about 110 dB below a full-scale tone.
_FLOOR = 1e-5
_NUM_CEPSTRA = 13
# STOI compares segments of 30 frames (of 256 samples every 128, at 10 kHz).
_STOI_SECONDS = (256 + 29 * 128) / 10_000


class ErrorCount(NamedTuple):
    """
    Edits that turn the reference into the hypothesis.

    Args:
        errors: Number of substitutions, deletions and insertions.
        length: Number of words or characters of the reference.
    """

    errors: int
    length: int


def word_errors(reference: str, hypothesis: str) -> ErrorCount:
    """Edits between the words of two normalized texts. The WER of a corpus is total errors over total length."""
    return _error_count(require("jiwer", "the error rate", "eval").process_words(reference, hypothesis))


def character_errors(reference: str, hypothesis: str) -> ErrorCount:
    """Edits between the characters of two normalized texts, including spaces."""
    return _error_count(require("jiwer", "the error rate", "eval").process_characters(reference, hypothesis))


def pesq(reference: np.ndarray, degraded: np.ndarray, band: Literal["nb", "wb"] = "wb") -> float | None:
    """
    Perceptual quality on a scale from about 1 to 4.55 (narrow band, ITU-T P.862.1) or 4.64 (wide band, P.862.2).

    Args:
        reference, degraded: `(num_samples,)` at 16 kHz.
        band: `"nb"` (telephone band) or `"wb"`.

    Returns:
        The score; `None` if one of them has no utterance, or if they are shorter than a quarter of a second.
    """
    _check_pair(reference, degraded)
    package = require("pesq", "PESQ", "eval")
    if not (reference.any() and degraded.any()):
        return None  # the package would divide by the peak
    try:
        return float(package.pesq(SAMPLING_RATE, reference, degraded, band))
    except (package.NoUtterancesError, package.BufferTooShortError):
        return None


def stoi(reference: np.ndarray, degraded: np.ndarray) -> float | None:
    """
    Short-time objective intelligibility, up to 1 (Taal et al., 2011, doi:10.1109/TASL.2011.2114881).

    Args:
        reference, degraded: `(num_samples,)` at 16 kHz.

    Returns:
        The score; `None` if fewer than 30 frames (0.4 s) of the reference are not silent.
    """
    _check_pair(reference, degraded)
    package = require("pystoi", "STOI", "eval")
    if not reference.any() or len(reference) < _STOI_SECONDS * SAMPLING_RATE:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Not enough STFT frames", category=RuntimeWarning)
        try:
            return float(package.stoi(reference, degraded, SAMPLING_RATE))
        except RuntimeWarning:
            return None


def mel_cepstral_distortion(reference: np.ndarray, degraded: np.ndarray) -> float:
    r"""
    Mel-cepstral distortion in dB (Kubichek, 1993, doi:10.1109/PACRIM.1993.407206), mean over frames:

        10 / ln 10 * sqrt(2 * sum over d = 1..13 of (c_d - c'_d)^2)

    where ln |H(k)| = c_0 + sum over d of c_d cos(pi d (k + 1/2) / K) expands the magnitudes of K = 40 mel bands
    (Slaney's scale, 0 to 8 kHz; Hann windows of 25 ms every 10 ms). It is the root mean square difference of the two
    smoothed log-mel spectra, without the loudness c_0. Frames are compared one by one, without time warping, because
    a codec keeps the timing. Implementations differ in their cepstra: compare only figures of the same one.

    Args:
        reference, degraded: `(num_samples,)` at 16 kHz.
    """
    _check_pair(reference, degraded)
    expected, actual = (_log_mel(waveform, window=400, hop=160, num_bands=40) for waveform in (reference, degraded))
    num_bands = expected.shape[1]
    orders = torch.arange(1, _NUM_CEPSTRA + 1, dtype=torch.float64)
    bands = torch.arange(num_bands, dtype=torch.float64) + 0.5
    cosines = torch.cos(torch.outer(bands, orders) * (math.pi / num_bands)) * (2 / num_bands)
    difference = (expected - actual) @ cosines
    distortion = 10 / math.log(10) * (2 * difference.square().sum(dim=1)).sqrt()
    return distortion.mean().item()


def log_mel_distance(reference: np.ndarray, degraded: np.ndarray) -> float:
    """
    Mean absolute difference of log10 mel magnitudes (80 bands, 64 ms windows every 16 ms), in decades (20 dB).

    Args:
        reference, degraded: `(num_samples,)` at 16 kHz.
    """
    _check_pair(reference, degraded)
    expected, actual = (_log_mel(waveform, window=1024, hop=256, num_bands=80) for waveform in (reference, degraded))
    return (expected - actual).abs().mean().item() / math.log(10)


def cosine_similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine similarity of two vectors `(size,)`, for example from a speaker encoder."""
    return float(np.dot(first, second) / (np.linalg.norm(first) * np.linalg.norm(second)))


def dnsmos(waveform: np.ndarray) -> dict[str, float]:
    """
    Predicted opinion scores from 1 to 5 without a reference (DNSMOS P.835, arXiv:2110.01763), from `speechmos`.

    Args:
        waveform: `(num_samples,)` at 16 kHz. Clips shorter than 9 s are repeated, because the models need 9 s.

    Returns:
        `dnsmos_signal`, `dnsmos_background`, `dnsmos_overall` and `dnsmos_p808`.
    """
    package = require("speechmos.dnsmos", "DNSMOS")
    scores = package.run(np.clip(waveform, -1, 1), SAMPLING_RATE, return_df=False)
    names = {"signal": "sig_mos", "background": "bak_mos", "overall": "ovrl_mos", "p808": "p808_mos"}
    return {f"dnsmos_{name}": float(scores[key]) for name, key in names.items()}


def _error_count(output: Any) -> ErrorCount:
    errors = output.substitutions + output.deletions + output.insertions
    return ErrorCount(errors, output.hits + output.substitutions + output.deletions)


def _check_pair(reference: np.ndarray, degraded: np.ndarray) -> None:
    if reference.ndim != 1 or reference.shape != degraded.shape or not len(reference):
        raise ValueError(
            "the waveforms to compare must have the same shape (num_samples,), got "
            f"{reference.shape} and {degraded.shape}: cut both to the shorter one."
        )


def _log_mel(waveform: np.ndarray, window: int, hop: int, num_bands: int) -> Tensor:
    """Natural logarithm of mel magnitudes, `(num_frames, num_bands)` in float64."""
    fft_length = 1 << (window - 1).bit_length()
    spectrum = torch.stft(
        torch.from_numpy(np.asarray(waveform, dtype=np.float64)),
        n_fft=fft_length,
        hop_length=hop,
        win_length=window,
        window=torch.hann_window(window, dtype=torch.float64),
        pad_mode="constant",
        return_complex=True,
    )
    filters = mel_filter_bank(
        num_frequency_bins=fft_length // 2 + 1,
        num_mel_filters=num_bands,
        min_frequency=0.0,
        max_frequency=SAMPLING_RATE / 2,
        sampling_rate=SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return (spectrum.abs().T @ torch.from_numpy(filters)).clamp(min=_FLOOR).log()
