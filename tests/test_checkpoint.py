"""The small trained checkpoint of this repository: what it is, and that it still does what its card says."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor, pipeline

from conftest import AUDIO, TESTS, WITHOUT_PACKAGE
from flexicodec_hf import FlexiCodecForTextToSpeech, save_repository
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.evaluation.metrics import stoi


CHECKPOINT = TESTS.parent / "checkpoints" / "flexicodec-tiny"
CLIP = AUDIO / "flite_slt_held_out.flac"  # a training voice reads a sentence that was not trained on


@pytest.fixture(scope="module")
def feature_extractor():
    return AutoFeatureExtractor.from_pretrained(CHECKPOINT)


@pytest.fixture
def codec(device):
    return AutoModel.from_pretrained(CHECKPOINT).to(device)


def test_the_repository_is_small_and_complete():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.lstat().st_size for path in files) <= 24_000_000
    # Code would fall behind the package: whoever needs it saves the repository anew, as the last test does.
    assert not any(path.is_symlink() or path.suffix == ".py" for path in files)
    text = "".join(path.read_text() for path in files if path.suffix == ".json")
    assert '_path": "/' not in text and '"auto_map"' not in text
    for file in (CHECKPOINT / "model.safetensors", CHECKPOINT / "tts" / "model.safetensors"):
        assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize(
    ("rate", "rows", "least"), [(12.5, 8, 0.72), (12.5, 1, 0.65), (8.3, 8, 0.71), (6.25, 1, 0.63)]
)
@torch.inference_mode()
def test_a_held_out_sentence_is_reconstructed(codec, feature_extractor, device, rate, rows, least):
    clip = read_audio(CLIP, 16_000)
    inputs = feature_extractor(clip.waveform, sampling_rate=16_000, return_tensors="pt", device=device)
    encoded = codec.encode(**inputs, target_frame_rate=rate)
    assert encoded.audio_codes.shape[2] / clip.seconds == pytest.approx(rate, abs=0.3)
    output = codec.decode(encoded.audio_codes[:, :rows], encoded.token_lengths).audio_values[0, 0].cpu().numpy()
    length = min(len(output), clip.num_samples)
    assert stoi(clip.waveform[:length], output[:length]) > least


def test_it_speaks(device):
    tts = pipeline("text-to-speech", model=str(CHECKPOINT), device=device)
    assert type(tts.model) is FlexiCodecForTextToSpeech and tts.model.dtype == torch.float32
    text = "I hope you will be very happy in your new house."
    for threshold in tts.model.config.ar_config.merging_thresholds:
        options = {"seed": 0, "merging_threshold": threshold}
        speech = tts(text, generate_kwargs=options)
        assert speech["sampling_rate"] == 16_000
        assert 0.5 < speech["audio"].shape[-1] / 16_000 < 6  # the training voices take about 2.7 s
        assert (tts(text, generate_kwargs=options)["audio"] == speech["audio"]).all()
    # The processor says the same words to the model.
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    audio = tts.model.generate(**processor(text).to(device), **options)
    assert (audio[0, 0].cpu().numpy() == speech["audio"].reshape(-1)).all()


@torch.inference_mode()
def test_it_expects_a_held_out_sentence_to_sound_as_it_does(codec, feature_extractor, device):
    clip = read_audio(AUDIO / "flite_rms_held_out.flac", 16_000)
    inputs = feature_extractor(clip.waveform, sampling_rate=16_000, return_tensors="pt", device=device)
    model = FlexiCodecForTextToSpeech.from_pretrained(CHECKPOINT).to(device).ar
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    for threshold in model.config.merging_thresholds:
        encoded = codec.encode(**inputs, num_quantizers=1, merging_threshold=threshold)
        speech = {"codes": encoded.audio_codes[:, 0], "token_lengths": encoded.token_lengths}
        loss = {}
        for text in (
            "I have just had the honour of receiving your letter.",
            "Their spirits were in general exhausted.",
        ):
            ids = processor(text).to(device)["input_ids"]
            stream = model.build_inputs(ids, **speech, merging_threshold=threshold, return_labels=True)
            loss[text] = model(**stream).token_loss.item()
        own, other = loss.values()
        assert own < 5 < other - 1  # nats


def test_saved_anew_it_works_without_the_package(tmp_path):
    model = FlexiCodecForTextToSpeech.from_pretrained(CHECKPOINT)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    save_repository(tmp_path / "mine", model.codec, model, processor, storage_dtype=torch.float16)
    expected = model.generate(**processor("Good morning."), seed=0)[0, 0]
    for part in ("", "tts"):
        files = (folder / part / "model.safetensors" for folder in (CHECKPOINT, tmp_path / "mine"))
        own, saved = map(load_file, files)
        assert own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in own)

    program = f"""{WITHOUT_PACKAGE}
import numpy as np
from transformers import AutoModel, pipeline
codec = AutoModel.from_pretrained("mine", trust_remote_code=True)
tts = pipeline("text-to-speech", model="mine", trust_remote_code=True)
assert codec.config.hidden_size == 192
np.save("spoken.npy", tts("Good morning.", generate_kwargs={{"seed": 0}})["audio"])
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(np.load(tmp_path / "spoken.npy"), expected, atol=1e-5)
