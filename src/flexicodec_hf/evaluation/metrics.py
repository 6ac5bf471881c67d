"""
Measures of speech, as a module of the library `evaluate`:

    metric = SpeechMetric("pesq")  # or evaluate.load(metrics.__file__, "pesq")
    metric.compute(predictions=[degraded], references=[reference])  # {"pesq_nb": ..., "pesq_wb": ..., ...}

Waveforms are `(num_samples,)`, floats in [-1, 1] at 16 kHz. Measures that compare two waveforms need them aligned and
of the same length, as a codec gives them, and raise `ValueError` otherwise. A measure that is not defined for a clip
(too short, or silent) is `None`, and is left out of means.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import datasets
import evaluate
import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

# `evaluate.load` copies this file out of the package.
from flexicodec_hf.audio_flexicodec import resample
from flexicodec_hf.data.files import require
from flexicodec_hf.evaluation.recognizers import (
    SAMPLING_RATE,
    SpeakerEncoder,
    load_mos_predictor,
    load_speaker_encoder,
)


# Magnitudes below this are silence: about 110 dB below a full-scale tone.
_FLOOR = 1e-5
_NUM_CEPSTRA = 13
# STOI compares segments of 30 frames (of 256 samples every 128, at 10 kHz).
_STOI_SECONDS = (256 + 29 * 128) / 10_000

Values = dict[str, Any]
Tokenizer = Callable[[np.ndarray], Sequence[Hashable]]


def word_errors(prediction: str, reference: str) -> Values:
    """
    Edits (substitutions, deletions, insertions) that turn a normalized text into another, in words and in characters
    including spaces, and their numbers in the reference.
    """
    jiwer = require("jiwer", "the error rate", "eval")
    values: Values = {}
    for unit, process in (("word", jiwer.process_words), ("character", jiwer.process_characters)):
        edits = process(reference, prediction)
        values[f"{unit}_errors"] = edits.substitutions + edits.deletions + edits.insertions
        values[f"{unit}s"] = edits.hits + edits.substitutions + edits.deletions
    return values


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
    num_bands, window = 40, 400
    filters = mel_filter_bank(
        num_frequency_bins=257,
        num_mel_filters=num_bands,
        min_frequency=0.0,
        max_frequency=SAMPLING_RATE / 2,
        sampling_rate=SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    spectra = torch.stft(
        torch.from_numpy(np.stack([reference, degraded]).astype(np.float64)),
        n_fft=512,
        hop_length=160,
        win_length=window,
        window=torch.hann_window(window, dtype=torch.float64),
        pad_mode="constant",
        return_complex=True,
    )
    expected, actual = (spectra.abs().mT @ torch.from_numpy(filters)).clamp(min=_FLOOR).log()
    orders = torch.arange(1, _NUM_CEPSTRA + 1, dtype=torch.float64)
    bands = torch.arange(num_bands, dtype=torch.float64) + 0.5
    cosines = torch.cos(torch.outer(bands, orders) * (math.pi / num_bands)) * (2 / num_bands)
    difference = (expected - actual) @ cosines
    return (10 / math.log(10) * (2 * difference.square().sum(dim=1)).sqrt()).mean().item()


def speaker_similarity(first: np.ndarray, second: np.ndarray, model: SpeakerEncoder) -> float | None:
    """Cosine similarity of the vectors of two recordings; `None` if one is silent."""
    if not (first.any() and second.any()):
        return None
    a, b = model(first), model(second)
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def token_rate(num_tokens: int, seconds: float, bits_per_token: float | None = None) -> Values:
    """The counts of a clip from which the tokens and bits per second of all clips are computed."""
    bits = {} if bits_per_token is None else {"bits": num_tokens * bits_per_token}
    return {"num_tokens": num_tokens, "seconds": seconds, **bits}


def token_changes(waveform: np.ndarray, model: Tokenizer) -> Values:
    """
    How many tokens of a recording change when it does, in ways that a listener would not mind: white noise 20 dB
    below the speech, 6 dB less gain, resampling to 44.1 kHz and back, and a start that is 10 ms later.

    A token is unchanged if it is in the longest common subsequence of the tokens before and after, so that what is
    inserted or dropped at one place changes no other token.

    Args:
        waveform: `(num_samples,)` at 16 kHz.
        model: Makes tokens, which can be compared, of a waveform; [`CodecReconstruction.tokenize`] is one.

    Returns:
        `noise_changes`, `gain_changes`, `resampling_changes`, `shift_changes`, and `compared_tokens`: counts.
    """
    similarity = require("rapidfuzz.distance", "token stability", "eval").LCSseq.similarity
    noise = np.random.default_rng(0).standard_normal(len(waveform))
    changed = {
        "noise": waveform + 0.1 * np.sqrt(np.mean(np.square(waveform))) * noise,
        "gain": waveform * 10 ** (-6 / 20),
        "resampling": resample(resample(waveform, SAMPLING_RATE, 44_100), 44_100, SAMPLING_RATE),
        "shift": waveform[SAMPLING_RATE // 100 :],
    }
    tokens = model(waveform)
    values = {"compared_tokens": len(tokens)}
    for name, other in changed.items():
        values[f"{name}_changes"] = len(tokens) - similarity(tokens, model(other.astype(np.float32)))
    return values


def ds_wed(
    prediction: Sequence[int], reference: Sequence[int], weights: tuple[float, float, float] = (1, 1, 1)
) -> int:
    """
    DS-WED, the discretized speech weighted edit distance (arXiv:2509.19928): how much the prosody of two utterances
    of one text by one voice differs. A text-to-speech system that varies its prosody has a high mean over pairs.

    Args:
        prediction, reference: Discrete units of the utterances.
        weights: Costs of an insertion, a deletion and a substitution, whole numbers. The default is that of the
            authors' package (`dswed` 1.0.0, `ds_wed.py`).
    """
    if any(weight != int(weight) for weight in weights):
        raise ValueError(f"`weights` must be whole numbers, got {tuple(weights)}: scale them, for example by 10.")
    levenshtein = require("rapidfuzz.distance", "DS-WED", "eval").Levenshtein
    return levenshtein.distance(prediction, reference, weights=tuple(int(weight) for weight in weights))


class _Measure(NamedTuple):
    """The features of predictions and (if any) references, the values of an item, and the package that they need."""

    inputs: tuple[Any, ...]
    values: Callable[..., Values]
    package: str | None = None


_WAVEFORM, _TOKENS = datasets.Sequence(datasets.Value("float32")), datasets.Sequence(datasets.Value("int64"))
_TEXT, _NUMBER, _SECONDS = datasets.Value("string"), datasets.Value("int64"), datasets.Value("float64")
_PAIR = (_WAVEFORM, _WAVEFORM)
MEASURES: dict[str, _Measure] = {
    "wer": _Measure((_TEXT, _TEXT), word_errors, "jiwer"),
    "pesq": _Measure(_PAIR, lambda p, r: {f"pesq_{band}": pesq(r, p, band) for band in ("nb", "wb")}, "pesq"),
    "stoi": _Measure(_PAIR, lambda p, r: {"stoi": stoi(r, p)}, "pystoi"),
    "mcd": _Measure(_PAIR, lambda p, r: {"mcd": mel_cepstral_distortion(r, p)}),
    "speaker": _Measure(_PAIR, lambda p, r, model: {"speaker_similarity": speaker_similarity(r, p, model)}),
    "mos": _Measure((_WAVEFORM,), lambda p, model: {"mos": model(p)}, "distillmos"),
    "rate": _Measure((_NUMBER, _SECONDS), token_rate),
    "stability": _Measure((_WAVEFORM,), token_changes, "rapidfuzz"),
    "ds_wed": _Measure((_TOKENS, _TOKENS), lambda *pair, **weights: {"ds_wed": ds_wed(*pair, **weights)}, "rapidfuzz"),
}


class SpeechMetric(evaluate.Metric):
    """
    A measure of speech, for `compute(predictions=..., references=...)`, `add`, `add_batch` and `evaluate.combine`.

    | `config_name` | predictions | references | results |
    | --- | --- | --- | --- |
    | `wer` | normalized texts | normalized texts | `wer`, `cer`: all errors over all words and characters |
    | `pesq` | waveforms | waveforms | `pesq_nb`, `pesq_wb` |
    | `stoi`, `mcd` | waveforms | waveforms | `stoi`, `mcd` (dB) |
    | `speaker` | waveforms | waveforms | `speaker_similarity` |
    | `mos` | waveforms | | `mos`: an opinion score from 1 to 5, predicted by Distill-MOS (arXiv:2502.05356) |
    | `rate` | numbers of tokens | seconds | `tokens_per_second`, and with `bits_per_token=...` `bits_per_second` |
    | `stability` | waveforms | | `changed_by_noise`, `..._gain`, `..._resampling`, `..._shift`: shares of the tokens |
    | `ds_wed` | discrete units | discrete units | `ds_wed`; `weights=...` are those of [`ds_wed`] |

    Results are means over the items for which they are defined, with `..._std` and `..._count`, or ratios of sums,
    with these sums. What is defined for no item is missing.

    Args:
        config_name: One of these names.
        model: For `speaker`, what [`load_speaker_encoder`] takes, or a function from a waveform to a vector. For
            `stability`, a function from a waveform to its tokens, such as [`CodecReconstruction.tokenize`].
        device: Where models run.
        kwargs: The arguments of `evaluate.Metric`.

    Raises:
        ValueError: The name is unknown, or `model` is missing.
        DataError: A package is missing, or the model cannot be loaded.
    """

    def __init__(
        self,
        config_name: str | None = None,
        model: str | SpeakerEncoder | Tokenizer | None = None,
        device: str = "cpu",
        **kwargs: Any,
    ):
        if config_name not in MEASURES:
            raise ValueError(f"unknown measure {config_name!r}: choose from {', '.join(MEASURES)}.")
        super().__init__(config_name=config_name, **kwargs)
        measure = MEASURES[config_name]
        if measure.package is not None:
            require(measure.package, f"the measure {config_name}", None if config_name == "mos" else "eval")
        if config_name in ("speaker", "stability") and model is None:
            kind = "speaker encoder" if config_name == "speaker" else "function that makes tokens"
            raise ValueError(f"the measure {config_name} needs a `model`: a {kind}.")
        loaded: Any = load_speaker_encoder(model, device) if isinstance(model, str) else model
        if config_name == "mos":
            loaded = load_mos_predictor(device)
        #: The values and counts of one item: `measure(prediction)` or `measure(prediction, reference)`.
        self.measure = measure.values if loaded is None else partial(measure.values, model=loaded)

    def _info(self) -> evaluate.MetricInfo:
        inputs = MEASURES[self.config_name].inputs
        return evaluate.MetricInfo(
            description=f"The measure {self.config_name} of flexicodec-hf.",
            citation="",
            inputs_description=type(self).__doc__,
            features=datasets.Features(dict(zip(("predictions", "references"), inputs, strict=False))),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any] | None = None, **options: Any) -> Values:
        columns: list[Any] = [predictions] if references is None else [predictions, references]
        if MEASURES[self.config_name].inputs[0] is _WAVEFORM:
            columns = [[np.array(waveform, dtype=np.float32) for waveform in column] for column in columns]
        return totals([self.measure(*item, **options) for item in zip(*columns, strict=True)])


# Sums over all items divided by sums over all items: rate, numerator, denominator.
_RATIOS = (
    ("wer", "word_errors", "words"),
    ("cer", "character_errors", "characters"),
    ("tokens_per_second", "num_tokens", "seconds"),
    ("bits_per_second", "bits", "seconds"),
    ("real_time_factor", "processing_seconds", "seconds"),
    *((f"changed_by_{way}", f"{way}_changes", "compared_tokens") for way in ("noise", "gain", "resampling", "shift")),
)
# Means over the items that have a value.
_MEANS = ("pesq_nb", "pesq_wb", "stoi", "mcd", "speaker_similarity", "mos", "ds_wed")


def totals(rows: Sequence[Mapping[str, Any]]) -> Values:
    """The results of all items, from the values and counts of each, as [`SpeechMetric`] describes them."""
    total: Values = {}
    for rate, numerator, denominator in _RATIOS:
        having = [row for row in rows if row.get(numerator) is not None]
        sums = {name: sum(row[name] for row in having) for name in (numerator, denominator)}
        if having and sums[denominator]:  # 0 seconds if text-to-speech generated nothing
            total |= {rate: sums[numerator] / sums[denominator]} | (sums if denominator != "seconds" else {})
    for name in _MEANS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            total[name], total[f"{name}_std"] = statistics.fmean(values), statistics.pstdev(values)
            total[f"{name}_count"] = len(values)
    rates = [row["num_tokens"] / row["seconds"] for row in rows if row.get("num_tokens") is not None]
    if len(rates) > 1:
        total["tokens_per_second_std"] = statistics.pstdev(rates)
    return total


def _check_pair(reference: np.ndarray, degraded: np.ndarray) -> None:
    if reference.ndim != 1 or reference.shape != degraded.shape or not len(reference):
        raise ValueError(
            "the waveforms to compare must have the same shape (num_samples,), got "
            f"{reference.shape} and {degraded.shape}: cut both to the shorter one."
        )
