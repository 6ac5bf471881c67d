"""Exported models: the steps as `torch.export` programs, and as ONNX files that run without PyTorch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from conftest import AUDIO
from flexicodec_hf import (
    FlexiCodecFeatureExtractor,
    FlexiCodecForTextToSpeech,
    FlexiCodecModel,
    FlexiCodecTTSProcessor,
)
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.cli import main
from flexicodec_hf.export import codec_graphs, onnx, tts_graphs


pytest.importorskip("onnxscript")
runner = pytest.importorskip("flexicodec_hf.export.runner")

CLIPS = ("librivox_austen_0880.flac", "asterisk_fr_agent-newlocation.flac", "short_0p08s.wav", "silence_2s.wav")
# The runner as it runs elsewhere: whoever imports one of these fails.
WITHOUT_TORCH = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "flexicodec_hf"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from flexicodec_onnx import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def exported(tts_repository, tmp_path_factory):
    """The command's output for a repository with a codec, a text-to-speech system with another, and two voices."""
    folder = tmp_path_factory.mktemp("export") / "onnx"
    assert main(["export", str(folder), "--format", "onnx", "--model", str(tts_repository)]) == 0
    return folder


@pytest.fixture(scope="module")
def codec(tts_repository):
    return FlexiCodecModel.from_pretrained(tts_repository).eval()


@pytest.fixture(scope="module")
def extractor(tts_repository):
    return FlexiCodecFeatureExtractor.from_pretrained(tts_repository)


@pytest.fixture(scope="module", params=["steps", pytest.param("onnx", marks=pytest.mark.slow)])
def onnx_model(request, codec, extractor, tts_repository, tmp_path_factory):
    """The runner, with its graphs or, in a moment, with the steps that they are made of."""
    if request.param == "onnx":
        return runner.FlexiCodecOnnx(request.getfixturevalue("exported"), num_threads=1)
    folder = tmp_path_factory.mktemp("export") / "steps"
    tts = FlexiCodecForTextToSpeech.from_pretrained(tts_repository).eval()
    processor = FlexiCodecTTSProcessor.from_pretrained(tts_repository)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_write_graphs", lambda *_: None)
        onnx.export_onnx(folder, codec, extractor, tts, processor)
    graphs = {graph.name: graph for graph in codec_graphs(codec)}
    graphs |= {f"tts/{graph.name}": graph for graph in tts_graphs(tts)}

    @torch.no_grad()
    def run(name, **inputs):
        graph = graphs[name]
        outputs = graph.module.eval()(*(torch.from_numpy(inputs[name]) for name in graph.inputs))
        return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else [outputs])]

    model = runner.FlexiCodecOnnx(folder)
    model.run = run
    return model


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("rate", [{}, {"merging_threshold": 0.3}, {"target_frame_rate": 6.25}])
def test_tokens_are_exactly_those_of_pytorch(onnx_model, codec, extractor, clip, rate):
    waveform = read_audio(AUDIO / clip, 16_000).waveform
    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        expected = codec.encode(**inputs, **rate)
    tokens = onnx_model.encode(waveform, **rate)
    np.testing.assert_array_equal(tokens.token_lengths, expected.token_lengths[0].numpy())
    np.testing.assert_array_equal(tokens.audio_codes, expected.audio_codes[0].numpy())
    assert abs(tokens.merging_threshold - expected.merging_threshold.item()) < 1e-6


@pytest.mark.parametrize("num_quantizers", [1, 3])
def test_decoded_speech_is_that_of_pytorch(onnx_model, codec, extractor, num_quantizers):
    inputs = extractor(read_audio(AUDIO / CLIPS[0], 16_000).waveform, sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        tokens = codec.encode(**inputs, num_quantizers=num_quantizers)
        expected = codec.decode(tokens.audio_codes, tokens.token_lengths).audio_values[0, 0].numpy()
    waveform = onnx_model.decode(tokens.audio_codes[0].numpy(), tokens.token_lengths[0].numpy())
    np.testing.assert_allclose(waveform, expected, atol=1e-5)


@pytest.mark.parametrize("voice", ["anna", "ben"])  # with and without the text of the recording
def test_speech_is_that_of_pytorch(onnx_model, tts_repository, monkeypatch, voice):
    model = FlexiCodecForTextToSpeech.from_pretrained(tts_repository).eval()
    processor = FlexiCodecTTSProcessor.from_pretrained(tts_repository)
    noise = {}

    def draw_noise(num_frames, generator):
        shape = (1, num_frames[0], model.voicebox.config.num_mel_bins)
        noise["drawn"] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise["drawn"]

    monkeypatch.setattr(model.voicebox, "draw_noise", draw_noise)
    inputs = processor("A single man.", phonemes=False)
    expected = model.generate(**inputs, voice=voice, do_sample=False, return_dict_in_generate=True)
    waveform, rate = onnx_model.speak(
        "A single man.", voice, phonemes=False, do_sample=False, noise=noise["drawn"][0].numpy()
    )
    assert rate == expected.sampling_rate.item()
    assert expected.audio_codes.shape[-1] > 3
    np.testing.assert_allclose(waveform, expected.audio[0, 0].numpy(), atol=1e-4)


def test_a_seed_makes_speech_repeatable(onnx_model):
    speech = [onnx_model.speak("A single man.", phonemes=False, do_sample=True, seed=seed)[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(speech[0], speech[1])
    assert speech[0].shape != speech[2].shape or (speech[0] != speech[2]).any()


@pytest.mark.slow
def test_the_files_run_where_neither_pytorch_nor_this_package_is(exported, codec, extractor, tmp_path):
    clip, tokens, decoded, spoken = (
        AUDIO / CLIPS[0],
        tmp_path / "tokens.safetensors",
        tmp_path / "decoded.wav",
        tmp_path / "spoken.wav",
    )
    for arguments in (
        ["encode", clip, tokens],
        ["decode", tokens, decoded],
        ["speak", "A single man.", spoken, "--no-phonemes", "--seed", "1"],
    ):
        subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, "--threads", "1", *map(str, arguments)], cwd=exported, check=True
        )
    waveform = read_audio(clip, 16_000).waveform
    with torch.inference_mode():
        expected = codec.encode(**extractor(waveform, sampling_rate=16_000, return_tensors="pt"))
    np.testing.assert_array_equal(load_file(tokens)["audio_codes"], expected.audio_codes[0].numpy())
    assert read_audio(decoded, 16_000).num_samples == len(waveform)
    assert read_audio(spoken, 24_000).num_samples > 0
    # The tokens are those of `flexicodec-hf encode`: its `decode` takes them.
    assert main(["decode", str(tokens), "-o", str(tmp_path / "again.wav"), "--model", str(codec.name_or_path)]) == 0


def test_programs_take_any_length(tts_repository):
    model = FlexiCodecForTextToSpeech.from_pretrained(tts_repository).eval()
    graph = next(graph for graph in tts_graphs(model) if graph.name == "ar_decoder")
    # Attention asks whether there is one query, and has a mask for either answer.
    program = graph.program().module(check_guards=False)
    config = model.config.ar_config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    ids = torch.randint(0, config.speech_vocab_size, (1, 6))
    keys = model.ar.model.decoder.relative_keys(8)
    with torch.inference_mode():
        expected = model.ar(ids, token_lengths=torch.ones_like(ids), relative_keys=keys).logits[:, -1]
        past = [torch.zeros(config.num_hidden_layers, 1, heads, 0, size)] * 2
        for position in range(6):
            one = ids[:, position, None]
            previous = torch.ones_like(one) * (position > 0)
            logits, _, *past = program(one, previous, torch.zeros(1, 1, config.hidden_size), keys, *past)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_settings_that_the_runner_lacks_are_refused(codec, extractor, tts_repository, tmp_path):
    model = FlexiCodecForTextToSpeech.from_pretrained(tts_repository)
    model.generation_config.update(repetition_penalty=1.2)
    processor = FlexiCodecTTSProcessor.from_pretrained(tts_repository)
    with pytest.raises(ValueError, match="repetition_penalty"):
        onnx.export_onnx(tmp_path / "onnx", codec, extractor, model, processor)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", AUDIO / "short_0p02s.wav", "OUT"], "at least 400"),
        (["encode", AUDIO / CLIPS[0], "OUT", "--merging-threshold", "2"], "cosine"),
        (["encode", AUDIO / CLIPS[0], "OUT", "--target-frame-rate", "20"], "tokens per second"),
        (["decode", AUDIO / CLIPS[0], "OUT"], "no safetensors file"),
        (["speak", "Hello.", "OUT", "--no-phonemes", "--voice", "clara"], "no voice 'clara'"),
        (["speak", "Hello.", "OUT", "--no-phonemes", "--language", "xx"], "no language 'xx'"),
        (["speak", "Hello.", "OUT", "--no-phonemes", "--merging-threshold", "0.5"], "merging_threshold"),
    ],
)
def test_errors_are_one_line(exported, tmp_path, capsys, arguments, message):
    arguments = [str(tmp_path / "out.wav") if one == "OUT" else str(one) for one in arguments]
    assert runner.main(["--model", str(exported), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.wav").exists()


def test_wrong_tokens_are_refused(onnx_model):
    codes, lengths = np.zeros((3, 4), dtype=np.int64), np.ones(4, dtype=np.int64)
    for wrong_codes, wrong_lengths, message in (
        (codes[0], lengths, "shapes"),
        (codes, lengths[:3], "shapes"),
        (codes, lengths * 9, "token_lengths"),
        (codes - 1, lengths, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            onnx_model.decode(wrong_codes, wrong_lengths)


@pytest.mark.slow
def test_an_existing_directory_is_kept(exported, tts_repository, capsys):
    assert main(["export", str(exported), "--model", str(tts_repository)]) == 1
    assert "exists" in capsys.readouterr().err
    assert json.loads((exported / "settings.json").read_text())["sampling_rate"] == 16_000
