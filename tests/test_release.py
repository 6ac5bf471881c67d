"""The authors' files as they are on the Hub, loaded by their id: converted once, found again, put into the cache."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor, pipeline

from conftest import AUDIO
from flexicodec_hf import (
    FlexiCodecFeatureExtractor,
    FlexiCodecForTextToSpeech,
    FlexiCodecModel,
    FlexiCodecTTSPipeline,
    FlexiCodecTTSProcessor,
)
from flexicodec_hf.cli import main
from flexicodec_hf.conversion import CheckpointError, cache, convert, convert_codec, download
from hub_server import HubServer, use_hub


ID = "jiaqili3/flexicodec"
SPEECH = {"num_inference_steps": 1, "min_new_tokens": 2, "max_new_tokens": 4}


@pytest.fixture
def hub(released_hub, released_home, monkeypatch) -> HubServer:
    use_hub(monkeypatch, released_hub.url, released_home)
    released_hub.requests.clear()
    return released_hub


@pytest.fixture
def no_conversion(monkeypatch):
    monkeypatch.setattr(cache, "convert_release", lambda *args, **kwargs: pytest.fail("converted again"))


def test_each_class_loads_the_released_repository_that_was_converted_once(hub, released_home, no_conversion):
    codec = FlexiCodecModel.from_pretrained(ID)
    assert codec.config.hidden_size == 32 and codec.dtype == torch.float32
    extractor = FlexiCodecFeatureExtractor.from_pretrained(ID)
    assert extractor.cmvn_shift is not None
    model = FlexiCodecForTextToSpeech.from_pretrained(ID, dtype={"ar": torch.bfloat16})
    assert model.ar.dtype == torch.bfloat16 and model.codec.dtype == torch.float32
    processor = FlexiCodecTTSProcessor.from_pretrained(ID)
    assert processor.tokenizer.convert_tokens_to_ids("<|en|>") == 50259
    assert not any("safetensors" in request for request in hub.requests)
    (folder,) = (released_home / "assets" / "flexicodec_hf" / "jiaqili3--flexicodec").iterdir()
    assert folder.name.startswith(hub.refs[ID]["main"])


def test_the_pipeline_speaks_by_the_id(hub, no_conversion):
    tts = FlexiCodecTTSPipeline.from_pretrained(ID, device="cpu")
    speech = tts("Hello.", language="de", seed=0, generate_kwargs=SPEECH)
    assert speech["sampling_rate"] == 24_000 and len(speech["audio"]) > 1_000


def test_commands_use_the_released_repository_unless_told_otherwise(hub, tmp_path, no_conversion):
    assert main(["encode", str(AUDIO / "short_0p08s.wav"), "-o", str(tmp_path), "--device", "cpu"]) == 0
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [{"offline": True}, {"local_files_only": True}], ids=str)
def test_without_a_network_what_was_converted_is_found(hub, released_home, monkeypatch, no_conversion, how):
    use_hub(monkeypatch, hub.url, released_home, offline=how.pop("offline", False))
    assert FlexiCodecModel.from_pretrained(ID, **how).config.hidden_size == 32
    FlexiCodecTTSPipeline.from_pretrained(ID, device="cpu", **how)
    assert not hub.requests


def test_without_a_network_and_a_cache_the_error_says_so(released_hub, tmp_path, monkeypatch):
    use_hub(monkeypatch, released_hub.url, tmp_path, offline=True)
    with pytest.raises(OSError, match="couldn't connect to"):
        FlexiCodecModel.from_pretrained(ID)


def test_a_directory_with_the_released_files_is_converted_too(raw_release, tmp_path, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path, offline=True)
    codec = FlexiCodecModel.from_pretrained(raw_release)
    (folder,) = (tmp_path / "assets" / "flexicodec_hf" / raw_release.name).iterdir()
    assert not (folder / "tts").exists()  # the codec alone takes no other files
    assert FlexiCodecForTextToSpeech.from_pretrained(raw_release).voicebox.config.num_hidden_layers == 7
    assert not (raw_release / "config.json").exists()
    settings = raw_release / "12hz_v1_half_config.yaml"
    expected = convert_codec(raw_release / "12hz_v1_half.safetensors", None, settings, raw_release / "model.pt")
    assert codec.config.num_bottleneck_attention_heads == expected.config.num_bottleneck_attention_heads
    tensors = expected.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in codec.state_dict().items())


def test_revision_and_cache_are_those_of_the_call(hub, raw_release, tmp_path):
    settings = yaml.safe_load((raw_release / "12hz_v1_half_config.yaml").read_text())
    settings["model"]["similarity_threshold"] = 0.86
    commit = hub.commit(ID, {"12hz_v1_half_config.yaml": yaml.safe_dump(settings).encode()}, "strict")
    for revision in ("strict", commit):
        codec = FlexiCodecModel.from_pretrained(ID, revision=revision, cache_dir=tmp_path)
        assert codec.config.merging_threshold == 0.86
    (folder,) = (tmp_path / "assets" / "flexicodec_hf" / "jiaqili3--flexicodec").iterdir()
    assert folder.name.startswith(commit)
    # Anew only if asked to.
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    FlexiCodecModel.from_pretrained(ID, revision="strict", cache_dir=tmp_path)
    assert weights.stat().st_mtime_ns == before
    FlexiCodecModel.from_pretrained(ID, revision="strict", cache_dir=tmp_path, force_download=True)
    assert weights.stat().st_mtime_ns > before


def test_two_programs_at_once_convert_once(raw_release, tmp_path, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path, offline=True)
    conversions, convert_release = [], cache.convert_release

    def counted(*args, **kwargs):
        conversions.append(threading.current_thread())
        convert_release(*args, **kwargs)

    monkeypatch.setattr(cache, "convert_release", counted)
    programs = [threading.Thread(target=cache.converted_release, args=(raw_release, False)) for _ in range(3)]
    for program in programs:
        program.start()
    for program in programs:
        program.join()
    assert len(conversions) == 1


def test_an_interrupted_conversion_leaves_nothing_that_looks_finished(raw_release, tmp_path, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path, offline=True)
    convert_vocoder = convert.convert_vocoder

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert_vocoder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FlexiCodecForTextToSpeech.from_pretrained(raw_release)
    (folder,) = (tmp_path / "assets" / "flexicodec_hf" / raw_release.name).iterdir()
    assert not (folder / "tts" / "model.safetensors").exists() and not list(folder.rglob(".incomplete-*"))
    # The parts that are there are not made again.
    monkeypatch.setattr(convert, "convert_vocoder", convert_vocoder)
    monkeypatch.setattr(convert, "convert_ar", interrupted)
    monkeypatch.setattr(convert, "convert_voicebox", interrupted)
    FlexiCodecForTextToSpeech.from_pretrained(raw_release)


def test_files_that_cannot_be_had_are_named(hub, raw_release, tmp_path, monkeypatch):
    names = ("12hz_v1_half.safetensors", "12hz_v1_half_config.yaml")
    hub.add("someone/copy", raw_release, *names)
    use_hub(monkeypatch, hub.url, tmp_path)
    FlexiCodecModel.from_pretrained("someone/copy")
    with pytest.raises(CheckpointError, match=r"artts\.safetensors could not be had from someone/copy"):
        FlexiCodecForTextToSpeech.from_pretrained("someone/copy")
    monkeypatch.setattr(download, "SEMANTIC_REPO", "someone/else")
    hub.add("someone/other", raw_release, *names)
    with pytest.raises(CheckpointError, match=r"model\.pt could not be had from someone/else"):
        FlexiCodecModel.from_pretrained("someone/other")


def test_other_repositories_load_as_ever(hub, tmp_path, monkeypatch):
    use_hub(monkeypatch, hub.url, tmp_path)
    hub.commit("someone/bert", {"config.json": b"{}"})
    for repo in ("someone/bert", "someone/nothing", "no such/id at all"):
        assert cache.converted_release(repo) is None
    with pytest.raises(OSError, match="someone/nothing is not a local folder"):
        FlexiCodecModel.from_pretrained("someone/nothing")


def test_the_older_codec_converts_by_itself(raw_release, tmp_path):
    source, out = raw_release / "nartts_flexicodec_only.safetensors", tmp_path / "out"
    assert main(["convert", "--codec", str(source), "-o", str(out)]) == 0
    codec = FlexiCodecModel.from_pretrained(out)
    assert codec.config.semantic_codebook_size == 512  # as the text-to-speech models speak it
    assert AutoFeatureExtractor.from_pretrained(out).sampling_rate == 16_000


def test_errors_of_a_part_name_its_option(raw_release, tmp_path, capsys):
    weights = load_file(raw_release / "nartts.safetensors")
    weights["voicebox_model.cond_emb.weight"] = torch.zeros(512, 60)
    save_file(weights, tmp_path / "nartts.safetensors")
    assert main(["convert", "--nar", str(tmp_path / "nartts.safetensors"), "-o", str(tmp_path / "out")]) == 1
    assert "say `num_heads` in --nar-config" in capsys.readouterr().err


# Into the cache


@pytest.fixture
def installed(hub, released_home, tmp_path, monkeypatch) -> Path:
    """Caches of a user whose first try failed, after the command."""
    shutil.copytree(released_home, tmp_path / "home", symlinks=True)
    use_hub(monkeypatch, hub.url, tmp_path / "home")
    with pytest.raises((ValueError, OSError)):
        AutoModel.from_pretrained(ID)
    assert main(["convert", "--repo", ID, "--into-cache", "--no-tts"]) == 0
    assert FlexiCodecTTSProcessor.from_pretrained(ID)  # it is not taken for a repository without speech
    assert main(["convert", "--repo", ID, "--into-cache"]) == 0
    return tmp_path / "home"


def test_after_the_command_stock_programs_find_the_id(hub, installed, monkeypatch, no_conversion):
    for offline in (False, True):
        use_hub(monkeypatch, hub.url, installed, offline)
        assert type(AutoModel.from_pretrained(ID)) is FlexiCodecModel
        assert type(AutoProcessor.from_pretrained(ID)) is FlexiCodecTTSProcessor
        assert FlexiCodecModel.from_pretrained(ID).config.hidden_size == 32
        tts = pipeline("text-to-speech", model=ID, device="cpu")
        assert type(tts.model) is FlexiCodecForTextToSpeech
        assert type(tts.processor) is FlexiCodecTTSProcessor
    (snapshot,) = (installed / "hub" / "models--jiaqili3--flexicodec" / "snapshots").iterdir()
    assert not list(snapshot.rglob(".*"))
    assert not (snapshot / "README.md").exists()  # the authors' own, which was not needed


def test_the_literal_line_in_a_process_of_its_own(hub, installed):
    program = f"""
import flexicodec_hf
from transformers import pipeline
tts = pipeline("text-to-speech", model="{ID}", device="cpu")
speech = tts("Hallo.", language="de", generate_kwargs={SPEECH | {"seed": 0}})
assert speech["sampling_rate"] == 24000
"""
    program = program.replace(', language="de"', "")
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(installed),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_what_has_no_place_in_the_cache_is_refused(hub, raw_release, tmp_path, monkeypatch, capsys):
    use_hub(monkeypatch, hub.url, tmp_path)
    assert main(["convert", "--repo", str(raw_release), "--into-cache"]) == 1
    assert "only what comes from the Hub has a place in its cache" in capsys.readouterr().err
    hub.add("someone/both", raw_release, "12hz_v1_half.safetensors", "12hz_v1_half_config.yaml")
    hub.commit("someone/both", {"config.json": b"{}"})
    huggingface_hub.hf_hub_download("someone/both", "config.json")
    assert main(["convert", "--repo", "someone/both", "--into-cache"]) == 1
    assert "has a config.json of its own" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", "--repo", ID, "--into-cache", "--dtype", "bfloat16"])
    assert "--into-cache: does not go with --dtype" in capsys.readouterr().err


# To the Hub


def test_a_pull_request_adds_files_only(hub, raw_release, tmp_path, monkeypatch, capsys):
    use_hub(monkeypatch, hub.url, tmp_path)
    before, number = hub.files(ID), len(hub.pull_requests) + 1
    options = ["--repo", str(raw_release), "-o", str(tmp_path / "out"), "--push-to-hub", ID, "--create-pr"]
    assert main(["convert", *options]) == 0
    assert f"Pushed: {hub.url}/{ID}/discussions/{number}" in capsys.readouterr().out
    assert hub.files(ID) == before  # the main branch
    after = hub.files(ID, f"refs/pr/{number}")
    assert after.items() >= before.items() and after.keys() - before.keys() >= {"config.json", "tts/config.json"}
    assert not any(part.startswith(".") for name in after for part in name.split("/"))
    description = hub.pull_requests[-1]
    assert f'model="{ID}"' in description and "library_name" not in description

    codec = FlexiCodecModel.from_pretrained(ID, revision=f"refs/pr/{number}", cache_dir=tmp_path / "cache")
    assert codec.config.hidden_size == 32
    assert not (tmp_path / "cache" / "assets").exists()
    tts = pipeline("text-to-speech", model=ID, revision=f"refs/pr/{number}", device="cpu")
    assert type(tts.model) is FlexiCodecForTextToSpeech


def test_each_push_writes_the_card_for_its_id(hub, raw_release, tmp_path, monkeypatch, capsys):
    use_hub(monkeypatch, hub.url, tmp_path)
    out = tmp_path / "out"
    convert_and_push = ["convert", "--repo", str(raw_release), "--no-tts", "-o", str(out), "--push-to-hub", "me/mine"]
    failing = ["convert", "-o", str(tmp_path / "nothing"), "--push-to-hub", "me/mine"]
    assert main(failing) == 1
    assert "holds no model to push" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(convert_and_push) == 1
    error = capsys.readouterr().err
    assert "The upload to me/mine failed" in error
    again = re.search("`flexicodec-hf (convert .*)`", error)[1].split()
    written = (out / "model.safetensors").stat().st_mtime_ns

    # The upload alone is done again.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert main(again) == 0
    assert f"Pushed: {hub.url}/me/mine/commit/" in capsys.readouterr().out
    assert b'model_id = "me/mine"' in hub.files("me/mine")["README.md"]
    assert main(["convert", "-o", str(out), "--push-to-hub", "me/other"]) == 0
    assert b'model_id = "me/other"' in hub.files("me/other")["README.md"]
    assert FlexiCodecModel.from_pretrained("me/other").config.hidden_size == 32
    # A card of the user's own goes as it is.
    (out / "README.md").write_text("mine")
    assert main(["convert", "-o", str(out), "--push-to-hub", "me/other"]) == 0
    assert hub.files("me/other")["README.md"] == b"mine"
    assert (out / "model.safetensors").stat().st_mtime_ns == written
