import logging

import numpy as np
import pytest
import torch

from conftest import assert_close
from flexicodec_hf.feature_extraction_flexicodec_mel import FlexiCodecMelFeatureExtractor


@pytest.fixture(scope="module")
def extractor():
    return FlexiCodecMelFeatureExtractor()


@pytest.mark.parametrize(("clips", "expected"), [("in/wave24k", "mel_from_24k"), ("resample_16k_24k", "mel_from_16k")])
def test_mel_matches_the_reference(extractor, golden, device, clips, expected):
    fixture = golden("mel")
    clips = list(fixture[clips].to(device))
    features = extractor(clips, sampling_rate=24_000, return_tensors="pt")
    assert_close(features.mel, fixture[expected].transpose(1, 2))
    assert features.mel.dtype == torch.float32
    assert features.mel_mask.bool().all() and features.mel_mask.shape == features.mel.shape[:2]


def test_clips_of_a_batch_equal_single_ones(extractor, golden):
    clip = golden("mel")["in/wave24k"][0].numpy()
    clips = [clip, clip[:9000], clip[:721]]
    features = extractor(clips, sampling_rate=24_000, return_tensors="np")
    lengths = [len(clip) // 480 for clip in clips]
    assert features["mel"].shape == (3, 25, 128)
    assert features["mel_mask"].sum(axis=1).tolist() == lengths == [25, 18, 1]
    for index, length in enumerate(lengths):
        alone = extractor(clips[index], sampling_rate=24_000, return_tensors="np")["mel"]
        np.testing.assert_array_equal(features["mel"][index, :length], alone[0])
        assert (features["mel"][index, length:] == 0).all()


def test_padding_options(extractor):
    clips = [np.zeros(4800, dtype=np.float32), np.zeros(2400, dtype=np.float32)]
    unpadded = extractor(clips, sampling_rate=24_000, padding=False)
    assert [len(mel) for mel in unpadded["mel"]] == [10, 5]
    fixed = extractor(clips, sampling_rate=24_000, padding="max_length", max_length=12, return_tensors="pt")
    assert fixed.mel.shape == (2, 12, 128) and fixed.mel_mask.sum(dim=1).tolist() == [10, 5]
    assert extractor(clips, sampling_rate=24_000, pad_to_multiple_of=8, return_tensors="pt").mel.shape[1] == 16
    silence = (np.log(1e-5) + 4.92) / np.sqrt(8.14)
    assert_close(fixed.mel[1, :5], torch.full((5, 128), silence), atol=1e-5)


def test_kinds_of_input_are_one(extractor):
    clip = np.random.default_rng(0).uniform(-1, 1, 2000).astype(np.float32)
    expected = extractor(clip, sampling_rate=24_000, return_tensors="pt").mel
    for same in (clip.tolist(), torch.from_numpy(clip), [clip], [clip.tolist()], clip.astype(np.float64)):
        assert torch.equal(extractor(same, sampling_rate=24_000, return_tensors="pt").mel, expected)


def test_save_and_load(extractor, tmp_path):
    other = FlexiCodecMelFeatureExtractor(feature_size=80, mean=-5.0)
    other.save_pretrained(tmp_path)
    loaded = FlexiCodecMelFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == other.to_dict() and "mel_filters" not in other.to_dict()
    clip = np.random.default_rng(0).uniform(-1, 1, 2000)
    for one in (extractor, other):
        features = one(clip, sampling_rate=24_000, return_tensors="np")["mel"]
        same = one is other
        assert np.array_equal(features, loaded(clip, sampling_rate=24_000, return_tensors="np")["mel"]) == same


def test_a_missing_rate_is_warned_of(extractor, caplog):
    logger = logging.getLogger("flexicodec_hf.feature_extraction_flexicodec_mel")
    logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        extractor(np.zeros(2000))
    assert "`sampling_rate` was not given" in caplog.text


@pytest.mark.parametrize(
    ("clip", "rate", "message"),
    [
        (np.zeros(2000), 16_000, "`sampling_rate` is 16000, but the spectrogram is defined at 24000 Hz: resample"),
        (np.zeros((2, 2000)), 24_000, r"Clip 0 of `raw_speech` has shape \(2, 2000\), expected one dimension"),
        ([np.zeros(2000), np.zeros((1, 2000))], 24_000, r"Clip 1 of `raw_speech` has shape \(1, 2000\)"),
        (np.zeros(720), 24_000, r"Clip 0 of `raw_speech` has 720 samples, but must have more than 720 \(30 ms\)"),
        ([], 24_000, "Clip 0 of `raw_speech` has 0 samples"),
    ],
)
def test_call_names_what_is_wrong(extractor, clip, rate, message):
    with pytest.raises(ValueError, match=message):
        extractor(clip, sampling_rate=rate)
