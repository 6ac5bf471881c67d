"""Everything that the README, the docs and the model card show is run."""

import re
import runpy
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from conftest import AUDIO
from flexicodec_hf.cli import main
from test_vocabulary import byte_tokenizer


ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/codec.md",
    "docs/conversion.md",
    "docs/corpora.md",
    "docs/language_models.md",
    "model_cards/codec.md",
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(codec_dir, golden, tmp_path, monkeypatch):
    """A directory with what the pages take for granted: a recording, a converted codec, released files."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(AUDIO / "librivox_austen_0870.flac", "speech.flac")
    shutil.copy(AUDIO / "stereo_44k.flac", "stereo_44k.flac")
    shutil.copytree(codec_dir(), "flexicodec")
    Path("recordings").mkdir()
    shutil.copy(AUDIO / "short_0p08s.wav", "recordings")
    shutil.copy(AUDIO / "silence_2s.wav", "recordings")
    Path("recordings/list.jsonl").write_text('{"path": "silence_2s.wav", "sentence": ""}\n')
    Path("shards").mkdir()
    with tarfile.open("shards/0.tar", "w") as tar:
        tar.add("recordings/silence_2s.wav", "a.wav")
    byte_tokenizer().save_pretrained("language_model")
    source = codec_dir().parent
    shutil.copy(source / "source.yaml", "codec.yaml")
    weights = golden("codec_tiny").weights
    semantic = {k.removeprefix("semantic_model."): v for k, v in weights.items() if k.startswith("semantic_model.")}
    save_file({k: v for k, v in weights.items() if not k.startswith("semantic_model.")}, "codec.safetensors")
    torch.save(semantic, "model.pt")
    released = Path("jiaqili3/flexicodec")
    released.mkdir(parents=True)
    shutil.copy(source / "source.safetensors", released / "12hz_v1_half.safetensors")
    shutil.copy(source / "source.yaml", released / "12hz_v1_half_config.yaml")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(page, workplace):
    snippets = blocks(page, "python")
    if snippets:
        Path("page.py").write_text("\n".join(snippets))
        runpy.run_path("page.py", run_name="__main__")
    else:
        assert page.startswith("docs/")


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(page, workplace, monkeypatch):
    commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "accelerate":
            arguments = words[words.index("flexicodec-hf") + 1 :]
            for rank in range(int(words[words.index("--num_processes") + 1])):
                monkeypatch.setenv("RANK", str(rank))
                monkeypatch.setenv("WORLD_SIZE", words[words.index("--num_processes") + 1])
                assert main(arguments) == 0, command
        elif words[0] == "flexicodec-hf":
            extra = ["--overwrite"] if words[1] == "convert" else []
            assert main([*words[1:], *extra]) == 0, command
        elif words[0] == "make":
            assert words[1] in targets
        else:
            assert words[:2] == ["pip", "install"]
    assert commands or page.startswith(("model_cards", "docs/codec"))


def test_model_card_has_valid_metadata():
    card = ModelCard.load(ROOT / "model_cards" / "codec.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "audio-to-audio"
    assert card.data.base_model == "jiaqili3/flexicodec"
    assert "custom_code" in card.data.tags


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
