import math
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from scipy.fft import dct
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from conftest import AUDIO


evaluate = pytest.importorskip("evaluate")

from flexicodec_hf.data.files import DataError  # noqa: E402
from flexicodec_hf.evaluation import metrics  # noqa: E402
from flexicodec_hf.evaluation.metrics import (  # noqa: E402
    SpeechMetric,
    mel_cepstral_distortion,
    pesq,
    speaker_similarity,
    stoi,
    token_changes,
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


def test_loudness_does_not_count():
    noise = np.random.default_rng(0).standard_normal(16_000) * 0.1
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


@pytest.mark.parametrize("measure", [pesq, stoi, mel_cepstral_distortion])
def test_waveforms_must_fit(measure, speech):
    with pytest.raises(ValueError, match=r"same shape.*\(47840,\) and \(47839,\).*cut both"):
        measure(speech, speech[:-1])
    with pytest.raises(ValueError, match="same shape"):
        measure(speech[None], speech[None])


def test_errors_are_counted():
    pytest.importorskip("jiwer")

    def words(reference: str, prediction: str) -> tuple[int, int]:
        values = word_errors(prediction, reference)
        return values["word_errors"], values["words"]

    # on -> in, mat -> today
    assert words("the cat sat on the mat", "the cat sat in the today") == (2, 6)
    assert words("the cat sat on the mat", "the cat sat on the mat") == (0, 6)
    assert words("a b", "") == (2, 2)
    assert words("a b", "a b c d e") == (3, 2)
    values = word_errors("abd", "abc d")
    assert (values["character_errors"], values["characters"]) == (2, 5)


def test_speakers_are_compared_by_the_cosine():
    first, second = np.array([1.0, 0.0]), np.array([2.0, 2.0])
    assert speaker_similarity(first, second, lambda vector: vector) == pytest.approx(math.sqrt(0.5))
    assert speaker_similarity(first, np.zeros(2), lambda vector: vector) is None


@pytest.mark.parametrize(
    ("package", "measure", "install"),
    [
        ("pesq", pesq, r"pip install 'flexicodec-hf\[eval\]'"),
        ("pystoi", stoi, r"pip install 'flexicodec-hf\[eval\]'"),
        ("jiwer", lambda *_: word_errors("a", "a"), r"pip install 'flexicodec-hf\[eval\]'"),
    ],
)
def test_missing_packages_are_named(monkeypatch, speech, package, measure, install):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"`{package}`.*{install}"):
        measure(speech, speech)


# As modules of `evaluate`


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No network, and no cache but a new one."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "evaluate_modules", raising=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pesq", lambda x, y: {"pesq_nb": pesq(x, y, "nb"), "pesq_wb": pesq(x, y, "wb")}),
        ("stoi", lambda x, y: {"stoi": stoi(x, y)}),
        ("mcd", lambda x, y: {"mcd": mel_cepstral_distortion(x, y)}),
    ],
)
def test_evaluate_loads_a_measure_by_its_path(speech, name, expected):
    """And the value of a corpus is the mean of the values of the functions, without what is not defined."""
    metric = evaluate.load(metrics.__file__, name)
    assert isinstance(metric, evaluate.Metric)
    pairs = [(speech, with_noise(speech, 20)), (speech[:24_000], with_noise(speech, 5)[:24_000])]
    silence = np.zeros(1_000, dtype=np.float32)
    undefined = [] if name == "mcd" else [(silence, silence)]
    results = metric.compute(
        predictions=[degraded for _, degraded in pairs + undefined],
        references=[reference for reference, _ in pairs + undefined],
    )
    values = [expected(*pair) for pair in pairs]
    for key in values[0]:
        assert results[key] == pytest.approx(np.mean([value[key] for value in values]), rel=1e-6)
        assert results[f"{key}_count"] == 2 and results[f"{key}_std"] > 0


def test_measures_combine(speech):
    pytest.importorskip("jiwer")
    combined = evaluate.combine([SpeechMetric("stoi"), SpeechMetric("mcd"), SpeechMetric("stability", model=list)])
    noisy = with_noise(speech, 10)
    for length in (16_000, 24_000):
        combined.add(prediction=noisy[:length], reference=speech[:length])
    results = combined.compute()
    assert results["stoi_count"] == results["mcd_count"] == 2
    assert results["compared_tokens"] == 40_000 and results["changed_by_noise"] > 0.5
    assert "references" not in SpeechMetric("stability", model=list).features


def test_error_rates_are_those_of_the_corpus():
    pytest.importorskip("jiwer")
    metric = SpeechMetric("wer", keep_in_memory=True)
    results = metric.compute(predictions=["a b", "c d e f g h"], references=["a x", "c d e f g h"])
    assert results["wer"] == 1 / 8 and results["cer"] == 1 / 14  # not the means 1/4 and 1/6


def test_rates_are_those_of_the_corpus():
    results = SpeechMetric("rate").compute(predictions=[10, 18], references=[1.0, 3.0], bits_per_token=15)
    assert results == {"tokens_per_second": 7.0, "bits_per_second": 105.0, "tokens_per_second_std": 2.0}
    assert "bits_per_second" not in SpeechMetric("rate").compute(predictions=[10], references=[1.0])


def test_tokens_that_change_are_counted():
    waveform = np.linspace(-1, 1, 16_000, dtype=np.float32)
    values = token_changes(waveform, lambda waveform: [len(waveform) > 15_900, bool(np.abs(waveform).max() > 0.7), 7])
    assert values == {
        "compared_tokens": 3,
        "noise_changes": 0,
        "gain_changes": 1,
        "resampling_changes": 0,
        "shift_changes": 1,
    }


def test_a_token_more_changes_no_other():
    waveform = np.zeros(16_000, dtype=np.float32)
    values = token_changes(waveform, lambda waveform: [0] * (len(waveform) < 16_000) + [1, 2, 3, 2])
    assert values["shift_changes"] == 0 and values["compared_tokens"] == 4


def test_changes_are_of_the_size_that_is_documented(speech):
    inputs: list[np.ndarray] = []
    token_changes(speech, lambda waveform: inputs.append(waveform) or [0])
    clean, noisy, soft, resampled, late = inputs
    assert all(waveform.dtype == np.float32 for waveform in inputs)
    powers = [np.mean(np.square(waveform)) for waveform in (clean, noisy - clean, soft)]
    assert 10 * np.log10(powers[0] / powers[1]) == pytest.approx(20, abs=0.1)
    assert 10 * np.log10(powers[2] / powers[0]) == pytest.approx(-6)
    assert resampled.shape == clean.shape and 0 < np.abs(resampled - clean).max() < 0.05
    np.testing.assert_array_equal(late, clean[160:])


def test_ds_wed_is_a_weighted_edit_distance():
    pytest.importorskip("rapidfuzz")
    metric = SpeechMetric("ds_wed")
    pair = {"predictions": [[1, 2, 2, 3]], "references": [[1, 4, 3]]}  # a deletion and a substitution
    assert metric.compute(**pair)["ds_wed"] == 2
    assert metric.compute(**pair, weights=(1, 3, 2))["ds_wed"] == 5
    assert metric.compute(**pair, weights=(1, 3, 9))["ds_wed"] == 7  # two deletions and an insertion are cheaper
    with pytest.raises(ValueError, match=r"`weights` must be whole numbers, got \(1, 1, 1.2\)"):
        metric.compute(**pair, weights=(1, 1, 1.2))


def test_distill_mos_is_lower_for_noise(speech):
    pytest.importorskip("distillmos", exc_type=(ImportError, OSError))
    results = SpeechMetric("mos").compute(predictions=[speech, with_noise(speech, 0)])
    assert results["mos_count"] == 2 and 1 < results["mos"] < 5
    measure = SpeechMetric("mos").measure
    assert measure(speech)["mos"] > measure(with_noise(speech, 0))["mos"] + 0.5


def test_distill_mos_of_a_fake_package_gets_a_batch_of_one(speech, monkeypatch, capsys):
    class Network(torch.nn.Module):
        def forward(self, waveforms):
            assert waveforms.shape == (1, len(speech)) and waveforms.dtype == torch.float32
            return waveforms.abs().amax(dim=1, keepdim=True)

    fake = SimpleNamespace(ConvTransformerSQAModel=lambda: print("weights loaded") or Network())
    monkeypatch.setitem(sys.modules, "distillmos", fake)
    assert SpeechMetric("mos").compute(predictions=[speech])["mos"] == pytest.approx(np.abs(speech).max())
    assert capsys.readouterr().out == ""


def test_a_measure_without_what_it_needs_says_so(monkeypatch, speech):
    with pytest.raises(ValueError, match="unknown measure 'snr': choose from wer, pesq"):
        SpeechMetric("snr")
    with pytest.raises(ValueError, match="unknown measure None"):
        evaluate.load(metrics.__file__)
    with pytest.raises(ValueError, match="the measure speaker needs a `model`: a speaker encoder"):
        SpeechMetric("speaker")
    with pytest.raises(ValueError, match="the measure stability needs a `model`: a function that makes tokens"):
        SpeechMetric("stability")
    with pytest.raises(DataError, match="cannot load the speaker encoder nothing/here"):
        SpeechMetric("speaker", model="nothing/here")
    monkeypatch.setitem(sys.modules, "distillmos", None)
    with pytest.raises(DataError, match=r"the measure mos needs the package `distillmos`.*pip install distillmos"):
        SpeechMetric("mos")
    monkeypatch.undo()
    monkeypatch.setattr(
        "flexicodec_hf.data.files.importlib.import_module", Mock(side_effect=OSError("no libtorch_cuda"))
    )
    with pytest.raises(DataError, match=r"the package `distillmos` \(no libtorch_cuda\)"):
        SpeechMetric("mos")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="same shape"):
        SpeechMetric("mcd").compute(predictions=[speech], references=[speech[1:]])
