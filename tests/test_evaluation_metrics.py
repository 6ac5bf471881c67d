import math
import sys

import numpy as np
import pytest
import soundfile
from scipy.fft import dct
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from conftest import AUDIO
from flexicodec_hf.data.files import DataError
from flexicodec_hf.evaluation.metrics import (
    character_errors,
    cosine_similarity,
    dnsmos,
    log_mel_distance,
    mel_cepstral_distortion,
    pesq,
    stoi,
    word_errors,
)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return soundfile.read(AUDIO / "librivox_austen_0880.flac", dtype="float32")[0]


def with_noise(speech: np.ndarray, snr: float) -> np.ndarray:
    """Add white noise, `snr` dB below the speech."""
    noise = np.random.default_rng(0).standard_normal(len(speech)).astype(np.float32)
    return speech + noise * (np.std(speech) / np.std(noise) * 10 ** (-snr / 20))


def test_identical_speech_is_perfect(speech):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    # The highest scores of ITU-T P.862.1 and P.862.2.
    assert pesq(speech, speech, "nb") == pytest.approx(4.5486, abs=1e-3)
    assert pesq(speech, speech, "wb") == pytest.approx(4.6439, abs=1e-3)
    assert stoi(speech, speech) == pytest.approx(1.0)
    assert mel_cepstral_distortion(speech, speech) == 0
    assert log_mel_distance(speech, speech) == 0


@pytest.mark.parametrize("band", ["nb", "wb"])
def test_pesq_equals_the_package(speech, band):
    package = pytest.importorskip("pesq")
    noisy = with_noise(speech, 10)
    assert pesq(speech, noisy, band) == package.pesq(16_000, speech, noisy, band)


def test_stoi_equals_the_package(speech):
    package = pytest.importorskip("pystoi")
    noisy = with_noise(speech, 10)
    assert stoi(speech, noisy) == package.stoi(speech, noisy, 16_000)


def test_less_noise_is_better(speech):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    loud, soft = with_noise(speech, 0), with_noise(speech, 20)
    assert pesq(speech, soft, "wb") > pesq(speech, loud, "wb")
    assert pesq(speech, soft, "nb") > pesq(speech, loud, "nb")
    assert stoi(speech, soft) > stoi(speech, loud)
    assert mel_cepstral_distortion(speech, soft) < mel_cepstral_distortion(speech, loud)
    assert log_mel_distance(speech, soft) < log_mel_distance(speech, loud)


def test_mel_cepstral_distortion_is_the_formula(speech):
    """Against mel cepstra by other means: transformers' spectrogram, scipy's cosine transform."""
    filters = mel_filter_bank(257, 40, 0.0, 8_000.0, 16_000, norm="slaney", mel_scale="slaney")

    def cepstra(waveform: np.ndarray) -> np.ndarray:
        mel = spectrogram(
            waveform,
            window_function(400, "hann"),
            frame_length=400,
            hop_length=160,
            fft_length=512,
            power=1.0,
            pad_mode="constant",
            mel_filters=filters,
            mel_floor=1e-5,
        )
        # From the orthonormal transform to the coefficients of a cosine series.
        return dct(np.log(mel.T), norm="ortho")[:, 1:14] * math.sqrt(2 / 40)

    noisy = with_noise(speech, 10)
    difference = cepstra(speech) - cepstra(noisy)
    expected = 10 / math.log(10) * np.sqrt(2 * (difference**2).sum(axis=1)).mean()
    assert mel_cepstral_distortion(speech, noisy) == pytest.approx(expected, rel=1e-4)


def test_loudness_counts_in_the_mel_distance_only():
    noise = np.random.default_rng(0).standard_normal(16_000) * 0.1
    assert log_mel_distance(noise, noise / 10) == pytest.approx(1.0)  # 20 dB
    assert mel_cepstral_distortion(noise, noise / 10) == pytest.approx(0.0, abs=1e-9)


def test_undefined_scores_are_none(speech):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    silence = np.zeros_like(speech)
    assert pesq(silence, speech) is pesq(speech, silence) is stoi(silence, speech) is None
    assert pesq(speech[:1_000], speech[:1_000]) is None
    assert stoi(speech[:1_000], speech[:1_000]) is None
    assert stoi(speech[:300], speech[:300]) is None
    assert stoi(speech, silence) == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("measure", [pesq, stoi, mel_cepstral_distortion, log_mel_distance])
def test_waveforms_must_fit(measure, speech):
    with pytest.raises(ValueError, match=r"same shape.*\(47840,\) and \(47839,\).*cut both"):
        measure(speech, speech[:-1])
    with pytest.raises(ValueError, match="same shape"):
        measure(speech[None], speech[None])


def test_errors_are_counted():
    pytest.importorskip("jiwer")
    # on -> in, mat -> today
    assert word_errors("the cat sat on the mat", "the cat sat in the today") == (2, 6)
    assert word_errors("the cat sat on the mat", "the cat sat on the mat") == (0, 6)
    assert word_errors("a b", "") == (2, 2)
    assert word_errors("a b", "a b c d e") == (3, 2)
    assert character_errors("abc d", "abd") == (2, 5)


def test_cosine_similarity():
    assert cosine_similarity(np.array([1.0, 0.0]), np.array([2.0, 2.0])) == pytest.approx(math.sqrt(0.5))


def test_dnsmos_is_lower_for_noise(speech):
    pytest.importorskip("speechmos")
    clean, noisy = dnsmos(speech), dnsmos(with_noise(speech, 0))
    assert clean.keys() == {"dnsmos_signal", "dnsmos_background", "dnsmos_overall", "dnsmos_p808"}
    assert all(clean[name] > noisy[name] for name in clean)


@pytest.mark.parametrize(
    ("package", "measure", "install"),
    [
        ("pesq", pesq, r"pip install 'flexicodec-hf\[eval\]'"),
        ("pystoi", stoi, r"pip install 'flexicodec-hf\[eval\]'"),
        ("jiwer", lambda *_: word_errors("a", "a"), r"pip install 'flexicodec-hf\[eval\]'"),
        ("speechmos.dnsmos", lambda speech, _: dnsmos(speech), "pip install speechmos"),
    ],
)
def test_missing_packages_are_named(monkeypatch, speech, package, measure, install):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"`{package}`.*{install}"):
        measure(speech, speech)
