"""`flexicodec-hf convert` with the files of the text-to-speech system."""

import json

import pytest
import yaml
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from flexicodec_hf.cli import main
from whisper_files import write_vocabulary_and_merges


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
    return [*options, "--tokenizer", write_vocabulary_and_merges(tmp_path / "whisper")]


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
        assert f"{auto_class.__name__}.from_pretrained('{out / 'tts' / part}')" in output
    tokenizer = AutoTokenizer.from_pretrained(out / "tts" / "ar")
    assert tokenizer("two").input_ids[0] == tokenizer.convert_tokens_to_ids("<|en|>")


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
