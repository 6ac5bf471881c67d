"""Batches of clips through the codec: the rule of chunks, the order of results, halves of batches that fail."""

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel

from conftest import AUDIO
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.data.files import DataError
from flexicodec_hf.data.runner import CodecRunner, RateSetting, chunk_length, rate_settings


CLIPS = ("silence_2s.wav", "librivox_austen_0880.flac", "short_0p02s.wav")


@pytest.fixture
def runner(codec_dir, device):
    codec = AutoModel.from_pretrained(codec_dir()).to(device).eval()
    return CodecRunner(codec, AutoFeatureExtractor.from_pretrained(codec_dir()), chunk_length_s=1.2)


def test_a_clip_is_in_chunks_if_longer_than_two_of_them():
    assert chunk_length(60, 30.0) is None
    assert chunk_length(60.1, 30.0) == 30
    assert chunk_length(60.1, 0.0) is None and chunk_length(60.1, None) is None


def test_results_come_in_the_order_of_the_clips(runner):
    clips = [read_audio(AUDIO / name, 16_000) for name in CLIPS]
    assert [runner.chunk_of(clip) for clip in clips] == [None, 1.2, None]
    rates = [RateSetting(merging_threshold=1.0), RateSetting(target_frame_rate=6.25)]
    encoded = runner.encode(clips, rates, num_quantizers=2)
    for clip, pair in zip(clips, encoded, strict=True):
        [alone] = runner.encode([clip], rates, num_quantizers=2)
        for tokens, expected, rate in zip(pair, alone, rates, strict=True):
            assert torch.equal(tokens.audio_codes, expected.audio_codes)
            assert torch.equal(tokens.token_lengths, expected.token_lengths)
            assert tokens.target_frame_rate == rate.target_frame_rate and tokens.num_samples == clip.num_samples
        [parts] = runner.decode(pair[:1])
        waveform = np.concatenate(list(parts))
        assert isinstance(waveform, np.ndarray) and waveform.shape == (clip.num_samples,)


def test_only_the_clip_at_fault_fails(runner):
    clips = [read_audio(AUDIO / name, 16_000) for name in ("short_0p08s.wav", "short_0p02s.wav", "silence_2s.wav")]
    clips[1].waveform[:] = 20_000
    first, second, third = runner.encode(clips, [RateSetting(merging_threshold=0.91)])
    assert isinstance(second, ValueError) and "must hold floats in [-1, 1]" in str(second)
    assert first[0].num_samples == 1280 and third[0].num_samples == 32_000


def test_rates_are_checked(runner):
    config = runner.config
    assert rate_settings(config) == [RateSetting(merging_threshold=0.91)]
    settings = rate_settings(config, [1], [6.25])
    assert [str(setting) for setting in settings] == ["merging_threshold=1.0", "target_frame_rate=6.25"]
    with pytest.raises(DataError, match=r"`target_frame_rates` must be different numbers between 1\.5625 and 12\.5"):
        rate_settings(config, target_frame_rates=[13])


def test_kernels_for_cpus_are_used_on_cpus_only(codec_dir, device, monkeypatch):
    optimized = []
    monkeypatch.setattr("flexicodec_hf.data.runner.optimize_for_cpu", lambda codec: optimized.append(codec) or codec)
    runner = CodecRunner.from_pretrained(str(codec_dir()), device, "float32")
    assert optimized == ([runner.codec] if device == "cpu" else [])
