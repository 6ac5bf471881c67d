import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from conftest import AUDIO, assert_close
from flexicodec_hf import feature_extraction_flexicodec
from flexicodec_hf.feature_extraction_flexicodec import FlexiCodecFeatureExtractor


KEYS = ["input_values", "padding_mask", "input_features", "input_features_mask"]
RUNS = ["speech", "blip", "noise", "short20ms"]


@pytest.fixture
def extractor(golden) -> FlexiCodecFeatureExtractor:
    shift, scale = golden("fbank")["cmvn"].tolist()
    return FlexiCodecFeatureExtractor(cmvn_shift=shift, cmvn_scale=scale)


def noise(num_samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


# Numbers


@pytest.mark.parametrize("run", RUNS)
def test_stages_match_the_reference(extractor, golden, device, run):
    fixture = golden("fbank")
    fbank = extractor._log_mel(extractor._frames(fixture[f"in/{run}"].to(device)))
    assert_close(fbank, fixture[f"{run}/kaldi_fbank"])
    (stacked,) = extractor._stack([fbank], len(fbank))
    assert_close(stacked, fixture[f"{run}/lfr"])
    assert_close(extractor._normalize(stacked), fixture[f"{run}/features"])


@pytest.mark.parametrize("run", RUNS)
def test_call_matches_the_reference(extractor, golden, device, run):
    fixture = golden("fbank")
    inputs = extractor(fixture[f"in/{run}"], sampling_rate=16_000, return_tensors="pt", device=device)
    assert_close(inputs.input_features[0], fixture[f"{run}/features"])
    assert inputs.input_features.device.type == device
    assert inputs.input_features.dtype == torch.float32
    assert torch.equal(inputs.input_values[0, 0].cpu(), fixture[f"in/{run}"])


def test_dither_matches_the_reference(golden, device):
    fixture = golden("fbank")
    shift, scale = fixture["cmvn"].tolist()
    extractor = FlexiCodecFeatureExtractor(cmvn_shift=shift, cmvn_scale=scale, dither=1.0)

    frames = extractor._frames(fixture["in/noise"]) + fixture["noise_dither1_seed1234/gauss"] / 32768
    fbank = extractor._log_mel(frames.to(device))
    assert_close(fbank, fixture["noise_dither1_seed1234/kaldi_fbank"])

    inputs = extractor(
        fixture["in/noise"],
        sampling_rate=16_000,
        return_tensors="pt",
        device=device,
        generator=torch.Generator().manual_seed(1234),
    )
    assert_close(inputs.input_features[0], fixture["noise_dither1_seed1234/features"])


def test_dither_draws_anew_in_every_call(device):
    extractor = FlexiCodecFeatureExtractor(dither=1.0)
    first, second = (
        extractor(noise(8000), sampling_rate=16_000, return_tensors="pt", device=device).input_features
        for _ in range(2)
    )
    assert not torch.equal(first, second)


def test_silence_is_the_floor_of_the_logarithm(device):
    inputs = FlexiCodecFeatureExtractor()(np.zeros(4000), sampling_rate=16_000, return_tensors="pt", device=device)
    floor = math.log(torch.finfo(torch.float32).eps)
    assert_close(inputs.input_features, torch.full((1, 4, 560), floor), atol=1e-5)


def test_blocks_of_frames_do_not_change_the_features(extractor, golden, device, monkeypatch):
    waveform = golden("fbank")["in/speech"].to(device)
    whole = extractor._extract_features(waveform)
    monkeypatch.setattr(feature_extraction_flexicodec, "_FRAMES_PER_BLOCK", 50)
    assert_close(extractor._extract_features(waveform), whole.cpu(), atol=0.0 if device == "cpu" else 1e-5)


def test_autocast_does_not_touch_the_features(extractor, golden, device):
    waveform = golden("fbank")["in/speech"].to(device)
    expected = extractor._extract_features(waveform)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(extractor._extract_features(waveform), expected)


@pytest.mark.parametrize(
    ("num_samples", "num_stacks"),
    [(1, 1), (2, 1), (3, 1), (17, 1), (399, 1), (400, 1), (559, 1), (560, 1), (1359, 1), (1360, 2), (16_000, 17)],
)
def test_number_of_features(extractor, device, num_samples, num_stacks):
    audio = noise(num_samples)
    inputs = extractor(audio, sampling_rate=16_000, return_tensors="pt", device=device)
    assert inputs.input_values.shape == (1, 1, num_samples)
    assert inputs.padding_mask.shape == (1, num_samples)
    assert inputs.input_features.shape == (1, num_stacks, 560)
    assert inputs.input_features_mask.shape == (1, num_stacks)
    assert inputs.input_features.isfinite().all()
    assert all(inputs[name].all() for name in ("padding_mask", "input_features_mask"))


def test_one_sample_sounds_like_silence(extractor):
    """Without its mean, nothing is left of a single sample."""
    sample = extractor([0.5], sampling_rate=16_000, return_tensors="pt")
    silence = extractor([0.0], sampling_rate=16_000, return_tensors="pt")
    assert torch.equal(sample.input_features, silence.input_features)


# Batches and padding


def test_batch_matches_the_reference(extractor, golden, device):
    fixture = golden("fbank")
    audio = [fixture["in/speech"], fixture["in/noise"]]
    inputs = extractor(audio, sampling_rate=16_000, return_tensors="pt", device=device)
    lengths = inputs.input_features_mask.sum(dim=1).tolist()
    assert lengths == fixture["batch/features_len"].tolist()
    for item, length in enumerate(lengths):
        assert_close(inputs.input_features[item, :length], fixture["batch/features"][item, :length])


@pytest.mark.parametrize(
    "options",
    [{}, {"pad_to_multiple_of": 1280}, {"padding": "max_length", "max_length": 40_000}],
    ids=["longest", "multiple", "max_length"],
)
def test_batch_equals_single_bit_for_bit(extractor, device, options):
    clips = [noise(n, seed=n) for n in (23_456, 1, 16_000, 399, 12_345)]
    batch = extractor(clips, sampling_rate=16_000, return_tensors="pt", device=device, **options)
    for item, clip in enumerate(clips):
        single = extractor(clip, sampling_rate=16_000, return_tensors="pt", device=device)
        samples, stacks = len(clip), single.input_features.shape[1]
        assert torch.equal(batch.input_values[item, :, :samples], single.input_values[0])
        assert torch.equal(batch.input_features[item, :stacks], single.input_features[0])
        assert batch.padding_mask[item].sum() == batch.padding_mask[item, :samples].sum() == samples
        assert batch.input_features_mask[item].sum() == batch.input_features_mask[item, :stacks].sum() == stacks
        assert not batch.input_values[item, :, samples:].any()
        assert not batch.input_features[item, stacks:].any()


@pytest.mark.parametrize(
    ("options", "num_samples", "num_stacks"),
    [
        ({}, 5000, 5),
        ({"padding": "longest", "max_length": 9000}, 5000, 5),
        ({"padding": "max_length", "max_length": 16_000}, 16_000, 17),
        ({"padding": "max_length", "max_length": 15_999, "pad_to_multiple_of": 1280}, 16_640, 17),
        ({"pad_to_multiple_of": 1280}, 5120, 5),
        ({"max_length": 4000, "truncation": True}, 4000, 4),
        ({"max_length": 4000, "truncation": True, "pad_to_multiple_of": 3000}, 6000, 6),
    ],
)
def test_padded_lengths(extractor, device, options, num_samples, num_stacks):
    audio = [noise(5000), noise(3000)]
    inputs = extractor(audio, sampling_rate=16_000, return_tensors="pt", device=device, **options)
    assert inputs.input_values.shape == (2, 1, num_samples)
    assert inputs.padding_mask.shape == (2, num_samples)
    assert inputs.input_features.shape == (2, num_stacks, 560)
    assert inputs.input_features_mask.shape == (2, num_stacks)


def test_features_are_those_of_the_truncated_clip(extractor, device):
    audio = noise(5000)
    options = {"sampling_rate": 16_000, "return_tensors": "pt", "device": device}
    truncated = extractor(audio, max_length=4000, truncation=True, **options)
    expected = extractor(audio[:4000], **options)
    assert all(torch.equal(truncated[key], expected[key]) for key in KEYS)


def test_padding_value_fills_both_inputs(device):
    extractor = FlexiCodecFeatureExtractor(padding_value=-1.0)
    audio = [noise(5000), noise(3000)]
    inputs = extractor(audio, sampling_rate=16_000, return_tensors="pt", device=device)
    assert (inputs.input_values[1, 0, 3000:] == -1).all()
    assert (inputs.input_features[1, 3:] == -1).all()


def test_without_padding(extractor):
    audio = [noise(5000), noise(3000)]
    inputs = extractor(audio, sampling_rate=16_000, padding=False)
    assert [values.shape for values in inputs.input_values] == [(1, 5000), (1, 3000)]
    assert [mask.shape for mask in inputs.padding_mask] == [(5000,), (3000,)]
    assert [features.shape for features in inputs.input_features] == [(5, 560), (3, 560)]
    assert [mask.shape for mask in inputs.input_features_mask] == [(5,), (3,)]
    with pytest.raises(ValueError, match="padding=True"):
        extractor(audio, sampling_rate=16_000, padding=False, return_tensors="pt")


def test_inherited_pad_collates_waveforms(extractor):
    """`SequenceFeatureExtractor.pad` works on the first of `model_input_names`."""
    padded = extractor.pad({"input_values": [noise(5).numpy(), noise(3).numpy()]}, return_tensors="pt")
    assert padded.input_values.shape == (2, 5)


# What comes in, what goes out


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.tolist,
        lambda audio: tuple(audio.tolist()),
        lambda audio: list(audio.numpy()),
        torch.Tensor.numpy,
        lambda audio: audio.numpy().astype(np.float64),
        lambda audio: audio.numpy()[None],
        lambda audio: audio.numpy()[::-1][::-1],
        lambda audio: [audio.numpy()],
        lambda audio: [audio.tolist()],
        lambda audio: audio[None],
        lambda audio: audio.double(),
        lambda audio: audio.clone().requires_grad_(),
        lambda audio: (audio,),
    ],
)
def test_forms_of_one_clip(extractor, device, convert):
    audio = noise(3000)
    options = {"sampling_rate": 16_000, "return_tensors": "pt", "device": device}
    expected, inputs = extractor(audio, **options), extractor(convert(audio), **options)
    assert list(inputs) == KEYS
    assert all(torch.equal(inputs[key], expected[key]) for key in KEYS)
    assert not inputs.input_features.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_audio(extractor, device, dtype):
    audio = noise(3000).to(dtype)
    options = {"sampling_rate": 16_000, "return_tensors": "pt", "device": device}
    assert torch.equal(extractor(audio, **options).input_features, extractor(audio.float(), **options).input_features)


def test_clips_may_be_called_raw_audio(extractor):
    clip = np.sin(np.arange(5_000) / 9)
    expected = extractor([clip, clip[:3_000]], sampling_rate=16_000, return_tensors="np")
    for name, values in extractor(
        raw_audio=[clip, clip[:3_000]], sampling_rate=16_000, return_tensors="np", padding=True
    ).items():
        assert np.array_equal(values, expected[name])
    with pytest.raises(ValueError, match="`raw_audio` is another name of `audio`"):
        extractor(clip, raw_audio=clip, sampling_rate=16_000)


def test_input_is_not_shared(extractor):
    audio = noise(3000)
    for options in ({"return_tensors": "pt"}, {"return_tensors": "np"}, {}):
        values = extractor(audio, sampling_rate=16_000, **options).input_values
        values[0][:] = 0
        assert audio.any()


def test_downmix_averages_the_channels(extractor, device):
    left, right = noise(3000, seed=1), noise(3000, seed=2)
    options = {"sampling_rate": 16_000, "return_tensors": "pt", "device": device}
    inputs = extractor([torch.stack([left, right]), left], downmix=True, **options)
    expected = extractor([(left + right) / 2, left], **options)
    assert all(torch.equal(inputs[key], expected[key]) for key in KEYS)


def test_types_of_output(extractor):
    audio = [noise(5000), noise(3000)]
    tensors = extractor(audio, sampling_rate=16_000, return_tensors="pt")
    arrays = extractor(audio, sampling_rate=16_000, return_tensors="np")
    lists = extractor(audio, sampling_rate=16_000)
    for key in KEYS:
        assert isinstance(arrays[key], np.ndarray)
        assert isinstance(lists[key], list)
        assert tensors[key].dtype == (torch.int32 if key.endswith("mask") else torch.float32)
        np.testing.assert_array_equal(arrays[key], tensors[key].numpy())
        np.testing.assert_array_equal(np.stack(lists[key]), arrays[key])


@pytest.mark.parametrize(
    "name", sorted(path.name for path in AUDIO.iterdir() if path.suffix in (".wav", ".flac")), ids=str
)
def test_recorded_clips(extractor, device, name):
    audio, rate = soundfile.read(AUDIO / name, dtype="float32", always_2d=True)
    channels = soxr.resample(audio, rate, 16_000).T
    inputs = extractor(channels, sampling_rate=16_000, downmix=True, return_tensors="pt", device=device)
    num_samples = channels.shape[1]
    assert inputs.input_values.shape == (1, 1, num_samples)
    assert inputs.input_features.shape == (1, math.ceil((1 + max(num_samples - 400, 0) // 160) / 6), 560)
    assert inputs.input_features.isfinite().all()
    assert_close(inputs.input_values[0, 0], torch.from_numpy(channels.mean(axis=0)), atol=1e-7)


# Errors


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([], "`audio` is an empty list"),
        (np.zeros(0), r"`audio` is empty: it has the shape \(0,\)"),
        ([[]], r"`audio` is empty: it has the shape \(0,\)"),
        (torch.zeros(0, 5), r"`audio` is empty: it has the shape \(0, 5\)"),
        ([np.ones(5), np.zeros((1, 0))], r"`audio\[1\]` is empty"),
        ([0.1, float("nan")], "`audio` has NaN or infinite samples"),
        (torch.tensor([0.1, -math.inf, 0.2]), "`audio` has NaN or infinite samples"),
        ([np.ones(5), np.array([math.nan, 1.0])], r"`audio\[1\]` has NaN or infinite samples"),
        (np.zeros(5, dtype=np.int16), r"floats in \[-1, 1\], got int16. Divide"),
        (torch.zeros(5, dtype=torch.int32), r"floats in \[-1, 1\], got torch.int32. Divide"),
        ([1, 2, 3], r"floats in \[-1, 1\], got int64. Divide"),
        (np.array([-20_000.0, 3.0]), r"floats in \[-1, 1\], but reaches 20000. Divide"),
        ("speech.wav", "must be a waveform, got the path .speech.wav.. Read the file first"),
        (None, r"must hold floats in \[-1, 1\], got object"),
        (torch.zeros(5, dtype=torch.complex64), r"must hold floats in \[-1, 1\], got torch.complex64"),
        ([[[0.1, 0.2], [0.1]]], "`audio` is not a regular array of samples"),
        (np.float32(0.5), r"shape \(num_samples,\) or \(num_channels, num_samples\), got \(\)"),
        (np.zeros((2, 1, 5)), r"got \(2, 1, 5\). Pass several clips as a list"),
        (np.zeros((2, 5)), r"`audio` has 2 channels \(shape \(2, 5\)\).*downmix=True.*list"),
        (np.zeros((5, 2)), r"got \(5, 2\), which has more channels than samples: transpose it"),
        ([np.zeros(5), np.zeros((2, 5))], r"`audio\[1\]` has 2 channels"),
    ],
)
def test_unusable_audio(extractor, audio, message):
    with pytest.raises(ValueError, match=message):
        extractor(audio, sampling_rate=16_000)


def test_channels_last_audio_is_refused_even_with_downmix(extractor):
    with pytest.raises(ValueError, match=r"got \(5, 2\), which has more channels than samples: transpose it"):
        extractor(np.zeros((5, 2)), sampling_rate=16_000, downmix=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_rate": 8000}, "`sampling_rate` is 8000, but this feature extractor works at 16000 Hz: resample"),
        ({"max_length": 4999}, "`audio` has 5000 samples, more than `max_length`=4999. Pass `truncation=True`"),
        ({"padding": "max_length", "max_length": 4999}, "more than `max_length`=4999"),
        ({"max_length": 0}, "`max_length` must be a whole number of samples, at least one"),
        ({"pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be a whole number of samples, at least one"),
        ({"truncation": True}, "`truncation=True` needs `max_length`"),
        ({"padding": "max_length"}, "max_length is defined"),
        ({"padding": "widest"}, "widest"),
        ({"padding": False, "pad_to_multiple_of": 1280}, "`pad_to_multiple_of` needs `padding`"),
    ],
)
def test_unusable_options(extractor, options, message):
    with pytest.raises(ValueError, match=message):
        extractor(noise(5000), **{"sampling_rate": 16_000, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_size": 80}, "`feature_size` must be 1, .* got 80"),
        ({"padding_side": "left"}, "`padding_side` must be 'right' for FlexiCodec, got 'left'"),
        ({"cmvn_shift": [0.0] * 560}, "`cmvn_shift` and `cmvn_scale` belong together, but `cmvn_scale` is missing"),
        ({"cmvn_scale": [1.0] * 560}, "`cmvn_shift` and `cmvn_scale` belong together, but `cmvn_shift` is missing"),
        (
            {"cmvn_shift": [0.0] * 80, "cmvn_scale": [1.0] * 560},
            r"`cmvn_shift` has 80 values, expected `num_stacked_frames \* num_mel_bins` = 560",
        ),
    ],
)
def test_unusable_settings(options, message):
    with pytest.raises(ValueError, match=message):
        FlexiCodecFeatureExtractor(**options)


def test_missing_sampling_rate_warns_once(extractor, caplog):
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            extractor(noise(500))
    warnings = [record.message for record in caplog.records if "sampling_rate" in record.message]
    assert len(warnings) == 1


# Saving and loading


def test_save_and_load(extractor, tmp_path):
    audio = noise(3000)
    expected = extractor(audio, sampling_rate=16_000, return_tensors="pt")
    (path,) = extractor.save_pretrained(tmp_path)
    loaded = FlexiCodecFeatureExtractor.from_pretrained(tmp_path)
    inputs = loaded(audio, sampling_rate=16_000, return_tensors="pt")
    assert all(torch.equal(inputs[key], expected[key]) for key in KEYS)
    assert loaded.to_dict() == extractor.to_dict()

    saved = json.loads(Path(path).read_text())
    assert saved == {
        "auto_map": {"AutoFeatureExtractor": "feature_extraction_flexicodec.FlexiCodecFeatureExtractor"},
        "feature_extractor_type": "FlexiCodecFeatureExtractor",
        "feature_size": 1,
        "sampling_rate": 16_000,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": True,
        "num_mel_bins": 80,
        "frame_length_ms": 25.0,
        "frame_shift_ms": 10.0,
        "num_stacked_frames": 7,
        "stack_stride": 6,
        "cmvn_shift": extractor.cmvn_shift,
        "cmvn_scale": extractor.cmvn_scale,
        "dither": 0.0,
    }


def test_cmvn_may_be_tensors(golden):
    shift, scale = golden("fbank")["cmvn"]
    extractor = FlexiCodecFeatureExtractor(cmvn_shift=shift, cmvn_scale=scale.numpy())
    assert extractor.cmvn_shift == shift.tolist()
    assert extractor.cmvn_scale == scale.tolist()


def test_saved_code_works_without_the_package(extractor, tmp_path, monkeypatch):
    """A saved repository carries the feature extractor's own file."""
    monkeypatch.setattr(FlexiCodecFeatureExtractor, "_auto_class", None)
    FlexiCodecFeatureExtractor.register_for_auto_class()
    extractor.save_pretrained(tmp_path / "repository")
    audio = noise(3000)
    np.save(tmp_path / "audio.npy", audio.numpy())
    script = """
import sys
sys.modules["flexicodec_hf"] = None  # importing it fails
import numpy as np
from transformers import AutoFeatureExtractor
extractor = AutoFeatureExtractor.from_pretrained(sys.argv[1] + "/repository", trust_remote_code=True)
inputs = extractor(np.load(sys.argv[1] + "/audio.npy"), sampling_rate=16_000, return_tensors="np")
np.save(sys.argv[1] + "/features.npy", inputs["input_features"])
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    expected = extractor(audio, sampling_rate=16_000, return_tensors="pt").input_features
    assert_close(torch.from_numpy(np.load(tmp_path / "features.npy")), expected, atol=1e-6)


@pytest.mark.parametrize("path", ["speech.wav", Path("speech.wav"), b"speech.wav"])
def test_a_path_asks_for_a_waveform(extractor, path):
    with pytest.raises(
        ValueError, match=r"`audio` must be a waveform, got the path .*speech.wav.*Read the file first"
    ):
        extractor(path, sampling_rate=16_000)


def test_memory_above_input_and_output_does_not_grow(extractor):
    """The peak of an hour, in a process of its own, is that of its input and output and a few blocks."""
    code = """
import torch
from flexicodec_hf import FlexiCodecFeatureExtractor
extractor = FlexiCodecFeatureExtractor(cmvn_shift=[0.0] * 560, cmvn_scale=[1.0] * 560)
def memory(name):  # not `ru_maxrss`, which begins with what the parent process had
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024
audio = torch.rand(16_000 * 3600)
extractor(audio[:160_000], sampling_rate=16_000, return_tensors="pt")
before = memory("VmRSS")
outputs = extractor(audio, sampling_rate=16_000, return_tensors="pt")
print(memory("VmHWM") - before - sum(tensor.numel() * 4 for tensor in outputs.values()) / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 100  # MiB; the features have 128, the audio 220
