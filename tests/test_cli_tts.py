"""`flexicodec-hf convert` with the files of the text-to-speech system."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextToWaveform,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import flexicodec_hf
from conftest import AUDIO, WITHOUT_PACKAGE
from flexicodec_hf.cli import main
from flexicodec_hf.data.files import only_run
from whisper_files import write_tokenizer_json


@pytest.fixture
def files(golden, tmp_path):
    """The options of `convert` for the fixture's checkpoints, in the released files' names and form."""
    fixture = golden("tts")
    options = []
    for option, prefix, config in (
        ("ar", "artts/", "ar_config"),
        ("nar", "nartts/", "voicebox_config"),
        ("vocoder", "vocos/", "vocos_config"),
    ):
        tensors = {k.removeprefix(prefix): v for k, v in fixture.weights.items() if k.startswith(prefix)}
        save_file(tensors, tmp_path / f"{option}.safetensors")
        (tmp_path / f"{option}.json").write_text(json.dumps(fixture.spec[config]))
        options += [
            f"--{option}",
            tmp_path / f"{option}.safetensors",
            f"--{option}-config",
            tmp_path / f"{option}.json",
        ]
    (tmp_path / "codec.yaml").write_text(yaml.safe_dump(fixture.spec["codec_config"]))
    options += ["--tts-codec-config", tmp_path / "codec.yaml"]
    (tmp_path / "whisper").mkdir()
    return [*options, "--tokenizer", write_tokenizer_json(tmp_path / "whisper")]


def test_convert_text_to_speech_files(files, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["convert", *map(str, files), "-o", str(out)]) == 0
    output = capsys.readouterr().out
    for auto_class, part, name in (
        (AutoModelForCausalLM, "ar", "FlexiCodecARForConditionalGeneration"),
        (AutoModel, "voicebox", "FlexiCodecVoiceboxModel"),
        (AutoModel, "vocoder", "FlexiCodecVocoderModel"),
        (AutoModel, "codec", "FlexiCodecModel"),
    ):
        model, loading = auto_class.from_pretrained(out / "tts" / part, output_loading_info=True)
        assert type(model).__name__ == name
        assert not any(loading.values())
        assert f"{out / 'tts' / part}: " in output
    assert ModelCard.load(out / "tts" / "voicebox" / "README.md").data.pipeline_tag == "audio-to-audio"
    tokenizer = AutoTokenizer.from_pretrained(out / "tts" / "ar")
    assert tokenizer("two").input_ids[0] == tokenizer.convert_tokens_to_ids("<|en|>")


def test_convert_a_tokenizer_alone(files, tmp_path):
    assert main(["convert", *map(str, files[-2:]), "-o", str(tmp_path / "model")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "model" / "tts" / "ar").convert_tokens_to_ids("<|en|>") == 50259


def test_convert_refuses_what_is_there(files, tmp_path, capsys):
    arguments = ["convert", *map(str, files[8:12]), "-o", str(tmp_path / "model")]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(arguments) == 1
    assert "exists: pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_convert_names_a_broken_configuration(files, tmp_path, capsys):
    (tmp_path / "vocoder.json").write_text("{")
    assert main(["convert", *map(str, files[8:12]), "-o", str(tmp_path / "model")]) == 1
    assert f"{tmp_path / 'vocoder.json'}" in capsys.readouterr().err


# The whole system


@pytest.fixture(scope="module")
def released(release):
    """The options of `convert` for the tiny release, without the output directory and the voices."""
    configs = {"--ar-config": "ar", "--nar-config": "nar", "--vocoder-config": "vocoder"}
    options = [word for option, name in configs.items() for word in (option, release / f"{name}.json")]
    options += ["--tts-codec-config", release / "12hz_v1_half_config.yaml", "--tokenizer", release / "whisper"]
    return ["convert", "--repo", release, *options]


def convert(released, *options: object) -> int:
    return main([*map(str, released), *map(str, options)])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A recording of two seconds, with what it says beside it."""
    path = tmp_path_factory.mktemp("clip") / "re:cording.wav"
    waveform, rate = soundfile.read(AUDIO / "librivox_austen_0890.flac", dtype="float32")
    soundfile.write(path, waveform[: 2 * rate], rate)
    path.with_suffix(".txt").write_text("What it says.\n")
    return path


@pytest.fixture(scope="module")
def converted(released, clip, tmp_path_factory):
    """A repository with two voices, in bfloat16, and what the command printed."""
    out = tmp_path_factory.mktemp("converted") / "model"
    voices = ["--voice", f"anna={clip}:With a text of its own: yes.", "--voice", f"default={clip}"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert convert(released, *voices, "-o", out, "--dtype", "bfloat16") == 0
    return out, printed.getvalue()


def test_convert_makes_one_repository(converted):
    out, output = converted
    assert f"load it with pipeline('text-to-speech', model='{out}')" in output

    codec, loading = AutoModel.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert type(codec).__name__ == "FlexiCodecModel" and not any(loading.values())
    model, loading = AutoModelForTextToWaveform.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == "FlexiCodecForTextToSpeech" and not any(loading.values())
    assert type(AutoProcessor.from_pretrained(out)).__name__ == "FlexiCodecTTSProcessor"
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|en|>") == 50259
    assert list(model.voices) == ["default", "anna"]
    assert model.voices["anna"].metadata == {"text": "With a text of its own: yes."}
    assert model.voices["default"].metadata == {"text": "What it says."}
    assert model.generation_config.max_new_tokens > 256
    assert sorted(path.name for path in (out / "tts").iterdir() if path.suffix != ".py") == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert {"pipeline_flexicodec_tts.py", "modeling_flexicodec_tts.py", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    assert not list(out.rglob(".*"))
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "text-to-speech" and 'model="flexicodec"' in card.text

    weights = load_file(out / "tts" / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"ar", "codec", "vocoder", "voicebox"}
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())


def test_a_whole_repository_is_replaced_only_if_asked(converted, released, clip, tmp_path, capsys):
    out = Path(shutil.copytree(converted[0], tmp_path / "model"))
    assert convert(released, "-o", out) == 1
    assert "exists: pass --overwrite to replace it" in capsys.readouterr().err
    (out / "voices" / "default.safetensors").unlink()
    assert convert(released, "--voice", f"ben={clip}", "-o", out, "--overwrite") == 0
    assert [path.name for path in (out / "voices").iterdir()] == ["ben.safetensors"]
    assert AutoModelForTextToWaveform.from_pretrained(out).ar.dtype == torch.float32


def test_an_interrupted_conversion_goes_on(released, tmp_path, capsys, monkeypatch):
    out = tmp_path / "model"
    done: list[str] = []

    def interrupt(part: str, exception: type[BaseException]) -> None:
        """Count the conversions, and interrupt that of one part when half of its files are there."""
        for name in ("codec", "ar", "voicebox", "vocoder"):
            path = f"flexicodec_hf.conversion.convert.convert_{name}"
            function = originals.setdefault(name, getattr(flexicodec_hf.conversion, f"convert_{name}"))

            def counted(source, folder, *args, name=name, function=function, **kwargs):
                if name == part:
                    leftover = folder.parent / ".incomplete-x"  # as a killed process leaves it
                    leftover.mkdir()
                    (leftover / "model.safetensors").write_bytes(b"half")
                    raise exception
                done.append(name)
                return function(source, folder, *args, **kwargs)

            monkeypatch.setattr(path, counted)

    originals: dict = {}
    interrupt("vocoder", KeyboardInterrupt)
    assert convert(released, "-o", out) == 130
    assert done == ["codec", "ar", "voicebox"]
    assert [path.name for path in out.iterdir()] == [".conversion"]

    done.clear()
    interrupt("", KeyboardInterrupt)
    save = "flexicodec_hf.conversion.repository.save_repository"
    saved = flexicodec_hf.save_repository

    def half(folder, codec, model, processor, **kwargs):
        saved(folder, codec, model, processor, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(save, half)
    assert convert(released, "-o", out) == 130
    assert done == ["vocoder", "codec"]
    assert [path.name for path in out.iterdir()] == [".conversion"]

    # Another run is not this one.
    assert convert(released, "-o", out, "--codec", released[2] / "vocos_emilia.safetensors") == 1
    done.clear()
    assert convert(released, "-o", out, "--dtype", "bfloat16") == 130
    assert done == ["codec", "ar", "voicebox", "vocoder", "codec"]

    done.clear()
    monkeypatch.setattr(save, saved)
    assert convert(released, "-o", out) == 0
    assert done == [] and "vocoder: converted before the interruption" in capsys.readouterr().out
    assert not list(out.rglob(".*"))
    _, loading = AutoModelForTextToWaveform.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())


# Runs in a process of its own, on files alone.
SCRIPT = (
    WITHOUT_PACKAGE
    + """
import numpy as np
from transformers import pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

repository, text, output = sys.argv[1:]
pipeline_class = get_class_from_dynamic_module("pipeline_flexicodec_tts.FlexiCodecTTSPipeline", repository)
tts = pipeline("text-to-speech", model=repository, pipeline_class=pipeline_class, trust_remote_code=True, device="cpu")
options = {"num_inference_steps": 1, "max_new_tokens": 6}
np.save(output, tts(text, language="de", seed=0, max_piece_length=20, generate_kwargs=options)["audio"])
"""
)


def test_the_pipeline_works_without_the_package(converted, tmp_path):
    out, text = converted[0], "Das ist ein Satz. Das ist noch ein Satz."
    arguments = [str(out), text, str(tmp_path / "audio.npy")]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        pytest.fail(result.stderr)
    pipeline_class = flexicodec_hf.FlexiCodecTTSPipeline
    tts = pipeline("text-to-speech", model=str(out), pipeline_class=pipeline_class, device="cpu")
    options = {"num_inference_steps": 1, "max_new_tokens": 6}
    speech = tts(text, language="de", seed=0, max_piece_length=20, generate_kwargs=options)
    np.testing.assert_allclose(np.load(tmp_path / "audio.npy"), speech["audio"], atol=1e-6)


@pytest.mark.parametrize(
    ("voice", "status", "message"),
    [
        ("anna", 2, "argument --voice: must be NAME=FILE or NAME=FILE:TEXT, with a file that is there; got 'anna'"),
        ("anna=missing.wav:Text.", 2, "got 'anna=missing.wav:Text.'"),
        ("anna={mute}", 1, "mute.wav: what it says is needed, word for word"),
        ("anna={mute}:Text.", 1, "mute.wav makes no voice: the recording is silent"),
        ("an/na={clip}", 2, "argument --voice: The name of a voice must be up to 200 letters"),
    ],
)
def test_voices_that_cannot_be_used(released, clip, tmp_path, capsys, voice, status, message):
    mute = tmp_path / "mute.wav"
    soundfile.write(mute, np.zeros(16_000), 16_000)
    arguments = ("-o", tmp_path / "model", "--voice", voice.format(mute=mute, clip=clip))
    try:
        result = convert(released, *arguments)
    except SystemExit as error:
        result = error.code
    assert result == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model" / "tts" / "config.json").exists()


def test_what_the_whole_system_needs(released, release, clip, tmp_path, capsys):
    partial = tmp_path / "partial"
    partial.mkdir()
    for name in ("12hz_v1_half.safetensors", "12hz_v1_half_config.yaml"):
        shutil.copy(release / name, partial)
    assert main(["convert", "--repo", str(partial), "-o", str(tmp_path / "model")]) == 1
    assert "no file artts.safetensors" in (error := capsys.readouterr().err) and "Pass --no-tts" in error
    with pytest.raises(SystemExit):
        main(["convert", "--repo", str(partial), "--no-tts", "--voice", f"a={clip}", "-o", str(tmp_path / "model")])
    assert "goes with the whole text-to-speech system" in capsys.readouterr().err

    # Text-to-speech files without the codec need it from another file.
    for name in ("artts", "nartts"):
        tensors = load_file(release / f"{name}.safetensors")
        codec = {k: v for k, v in tensors.items() if k.startswith("flexicodec_model.")}
        save_file({k: v for k, v in tensors.items() if k not in codec}, partial / f"{name}.safetensors")
        if codec:
            save_file(codec, partial / "nartts_flexicodec_only.safetensors")
    shutil.copy(release / "vocos_emilia.safetensors", partial)
    assert convert(["convert", "--repo", partial, *released[3:]], "-o", tmp_path / "model") == 0
    model = AutoModelForTextToWaveform.from_pretrained(tmp_path / "model")
    assert model.codec.num_parameters() > 0


def test_two_conversions_to_a_directory_are_refused(files, tmp_path, capsys):
    with only_run(tmp_path / "model" / ".conversion"):
        assert main(["convert", *map(str, files[8:12]), "-o", str(tmp_path / "model")]) == 1
        assert "another run works in this directory" in capsys.readouterr().err
        assert (tmp_path / "model" / ".conversion").exists()
