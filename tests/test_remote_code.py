"""A saved repository carries its code: it works where the package cannot be imported."""

import json
import subprocess
import sys

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel

from conftest import AUDIO


# Runs in a process of its own, on files alone.
SCRIPT = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flexicodec_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())

import soundfile, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

repository, clip, output, again = sys.argv[1:]
assert AutoConfig.from_pretrained(repository, trust_remote_code=True).model_type == "flexicodec"
extractor = AutoFeatureExtractor.from_pretrained(repository, trust_remote_code=True)
model = AutoModel.from_pretrained(repository, trust_remote_code=True)
audio, sampling_rate = soundfile.read(clip, dtype="float32")
inputs = extractor(audio, sampling_rate=sampling_rate, return_tensors="pt")
encoded = model.encode(**inputs, merging_threshold=0.9)
audio_values = model.decode(**encoded).audio_values

# What was loaded from a repository makes a repository again.
model.save_pretrained(again)
extractor.save_pretrained(again)
AutoFeatureExtractor.from_pretrained(again, trust_remote_code=True)
same = AutoModelForAudioTokenization.from_pretrained(again, trust_remote_code=True)
assert torch.equal(same.decode(**encoded).audio_values, audio_values)
save_file({"codes": encoded.audio_codes, "lengths": encoded.token_lengths, "audio": audio_values.detach()}, output)
"""


def test_repository_works_without_the_package(codec_dir, tmp_path):
    repository, clip = codec_dir(), AUDIO / "librivox_austen_0880.flac"
    auto_map = json.loads((repository / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForAudioTokenization"}

    output = tmp_path / "output.safetensors"
    arguments = [str(repository), str(clip), str(output), str(tmp_path / "again")]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        pytest.fail(result.stderr)

    extractor = AutoFeatureExtractor.from_pretrained(repository)
    model = AutoModel.from_pretrained(repository)
    audio, sampling_rate = soundfile.read(clip, dtype="float32")
    encoded = model.encode(**extractor(audio, sampling_rate=sampling_rate, return_tensors="pt"), merging_threshold=0.9)
    remote = load_file(output)
    assert torch.equal(remote["codes"], encoded.audio_codes)
    assert torch.equal(remote["lengths"], encoded.token_lengths)
    torch.testing.assert_close(remote["audio"], model.decode(**encoded).audio_values.detach(), atol=1e-6, rtol=0)
