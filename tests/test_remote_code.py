"""A saved repository carries its code: it works where the package cannot be imported."""

import json
import subprocess
import sys

import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel, pipeline

from conftest import AUDIO, WITHOUT_PACKAGE


# Both run in one process of their own, on files alone.
CODEC_SCRIPT = """
import soundfile, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

repository, clip, output, again = sys.argv[1:5]
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
SPEECH_SCRIPT = """
import torch
from safetensors.torch import save_file
from transformers import (
    AutoFeatureExtractor, AutoModel, AutoModelForTextToWaveform, AutoProcessor, AutoTokenizer, pipeline
)

repository, clip, output, again = sys.argv[5:]
trust = {"trust_remote_code": True}
speaker = pipeline("text-to-speech", model=repository, **trust)
spoken = {"text": speaker("Hello there.", generate_kwargs={"seed": 1})}
chat = [
    {"role": "voice", "content": [{"type": "audio", "path": clip}, {"type": "text", "text": "What I said."}]},
    {"role": "user", "content": "Hello there."},
]
spoken["chat"] = speaker(chat, generate_kwargs={"seed": 1})
assert type(AutoModel.from_pretrained(repository, **trust)).__name__ == "FlexiCodecModel"
AutoTokenizer.from_pretrained(repository, **trust)
AutoFeatureExtractor.from_pretrained(repository, **trust)

processor = AutoProcessor.from_pretrained(repository, **trust)
for path, options in ((repository, {}), (repository, {"subfolder": "tts"}), (repository + "/tts", {})):
    model = AutoModelForTextToWaveform.from_pretrained(path, **options, **trust)
    same = model.generate(**processor("Hello there."), seed=1)[0, 0]
    torch.testing.assert_close(same, torch.from_numpy(spoken["text"]["audio"]), atol=1e-5, rtol=0)
voice = model.encode_voice(**processor(audio=clip, reference_text="What I said."))
voice.save(output + ".voice.safetensors")
same = model.generate(**processor("Hello there."), voice=output + ".voice.safetensors", seed=1)[0, 0]
torch.testing.assert_close(same, torch.from_numpy(spoken["chat"]["audio"]), atol=1e-5, rtol=0)

# What was loaded from a repository makes a repository again.
model.save_pretrained(again)
processor.save_pretrained(again)
once_more = pipeline("text-to-speech", model=again, **trust)("Hello there.", generate_kwargs={"seed": 1})
same = torch.from_numpy(once_more["audio"])
torch.testing.assert_close(same, torch.from_numpy(spoken["text"]["audio"]), atol=1e-5, rtol=0)
save_file({name: torch.from_numpy(one["audio"]) for name, one in spoken.items()}, output)
"""


def test_repositories_work_without_the_package(codec_dir, tts_repository, tmp_path):
    clip = AUDIO / "librivox_austen_0880.flac"
    for folder, classes in (
        (codec_dir(), {"AutoConfig", "AutoModel", "AutoModelForAudioTokenization"}),
        (tts_repository, {"AutoConfig", "AutoModel", "AutoModelForAudioTokenization", "AutoModelForTextToWaveform"}),
        (tts_repository / "tts", {"AutoConfig", "AutoModel", "AutoModelForTextToWaveform"}),
    ):
        assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == classes

    arguments = [codec_dir(), clip, tmp_path / "codec.safetensors", tmp_path / "codec"]
    arguments += [tts_repository, clip, tmp_path / "speech.safetensors", tmp_path / "speech"]
    command = [sys.executable, "-c", WITHOUT_PACKAGE + CODEC_SCRIPT + SPEECH_SCRIPT, *map(str, arguments)]
    # Threads that wait for each other take more time than such small models.
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

    extractor = AutoFeatureExtractor.from_pretrained(codec_dir())
    model = AutoModel.from_pretrained(codec_dir())
    audio, sampling_rate = soundfile.read(clip, dtype="float32")
    encoded = model.encode(**extractor(audio, sampling_rate=sampling_rate, return_tensors="pt"), merging_threshold=0.9)
    remote = load_file(tmp_path / "codec.safetensors")
    assert torch.equal(remote["codes"], encoded.audio_codes)
    assert torch.equal(remote["lengths"], encoded.token_lengths)
    torch.testing.assert_close(remote["audio"], model.decode(**encoded).audio_values.detach(), atol=1e-6, rtol=0)

    speaker = pipeline("text-to-speech", model=str(tts_repository))
    chat = [
        {
            "role": "voice",
            "content": [{"type": "audio", "path": str(clip)}, {"type": "text", "text": "What I said."}],
        },
        {"role": "user", "content": "Hello there."},
    ]
    remote = load_file(tmp_path / "speech.safetensors")
    for name, text in (("text", "Hello there."), ("chat", chat)):
        spoken = speaker(text, generate_kwargs={"seed": 1})["audio"]
        torch.testing.assert_close(remote[name], torch.from_numpy(spoken), atol=1e-5, rtol=0)
