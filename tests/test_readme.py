"""Everything that the README, the docs and the model card show is run."""

import re
import runpy
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
import soundfile
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from conftest import AUDIO, byte_tokenizer
from flexicodec_hf.cli import main
from flexicodec_hf.conversion.cache import install_release
from hub_server import use_hub


ROOT = Path(__file__).parent.parent
CARDS = ("model_cards/codec.md", "model_cards/tts.md", "model_cards/voicebox.md")
PAGES = (
    "README.md",
    "docs/codec.md",
    "docs/conversion.md",
    "docs/corpora.md",
    "docs/gpu.md",
    "docs/language_models.md",
    "docs/migration.md",
    "docs/tts.md",
    *CARDS,
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(
    tts_repository, tts_parts, codec_dir, raw_release, released_hub, released_home, golden, tmp_path, monkeypatch
):
    """A directory with what the pages take for granted: recordings, texts, a converted repository, released files."""
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoints", "tests"):  # the README's examples use the files of a clone
        Path(name).symlink_to(ROOT / name)
    shutil.copy(AUDIO / "librivox_austen_0870.flac", "speech.flac")
    shutil.copy(AUDIO / "stereo_44k.flac", "stereo_44k.flac")
    voice, rate = soundfile.read(AUDIO / "librivox_austen_0890.flac", dtype="float32")
    soundfile.write("me.wav", voice[: 2 * rate], rate)
    Path("me.txt").write_text("What I say in this recording.")
    Path("book.txt").write_text("A first sentence of the book.\n\nAnd a second one.\n")
    shutil.copytree(tts_repository, "flexicodec")
    shutil.copy("flexicodec/voices/ben.safetensors", "me.safetensors")
    shutil.copytree(tts_parts / "voicebox", "voicebox")
    shutil.copy(codec_dir().parent / "source.yaml", "codec.yaml")
    Path("recordings").mkdir()
    shutil.copy(AUDIO / "short_0p08s.wav", "recordings")
    shutil.copy(AUDIO / "silence_2s.wav", "recordings")
    Path("recordings/list.jsonl").write_text('{"path": "silence_2s.wav", "sentence": ""}\n')
    Path("shards").mkdir()
    with tarfile.open("shards/0.tar", "w") as tar:
        tar.add("recordings/silence_2s.wav", "a.wav")
    byte_tokenizer().save_pretrained("language_model")
    weights = golden("codec_tiny").weights
    semantic = {k.removeprefix("semantic_model."): v for k, v in weights.items() if k.startswith("semantic_model.")}
    save_file({k: v for k, v in weights.items() if not k.startswith("semantic_model.")}, "codec.safetensors")
    torch.save(semantic, "model.pt")
    shutil.copy(raw_release / "nartts_flexicodec_only.safetensors", tmp_path)
    shutil.copytree(released_home, tmp_path / "home", symlinks=True)
    use_hub(monkeypatch, released_hub.url, tmp_path / "home")
    return tmp_path


def test_promises_name_tests_that_exist():
    promises = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (ROOT / "docs/reliability.md").read_text())
    assert len(promises) > 30
    for file, test in promises:
        assert not test or f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(page, workplace):
    snippets = blocks(page, "python")
    if snippets:
        if any('pipeline("text-to-speech", model="jiaqili3' in snippet for snippet in snippets):
            install_release("jiaqili3/flexicodec")
        Path("page.py").write_text("\n".join(snippets))
        runpy.run_path("page.py", run_name="__main__")
    else:
        assert page.startswith("docs/")


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(page, workplace):
    commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[0] == "flexicodec-hf":
            again = ["--overwrite"] if words[1] == "convert" and "--output-dir" in words else []
            assert main([*words[1:], *again]) == 0, command
        elif words[0] == "make":
            assert words[1] in targets
        else:
            assert words[:2] == ["pip", "install"]
    assert commands or page.startswith(("model_cards", "docs/codec", "docs/migration"))


@pytest.mark.parametrize(
    ("page", "task"), list(zip(CARDS, ("audio-to-audio", "text-to-speech", "audio-to-audio"), strict=True))
)
def test_model_cards_have_valid_metadata(page, task):
    card = ModelCard.load(ROOT / page)
    assert isinstance(card.data, ModelCardData)
    assert card.data.pipeline_tag == task
    assert card.data.library_name == "transformers"  # pipelines of other libraries' models are refused
    assert card.data.base_model == "jiaqili3/flexicodec"
    assert card.data.license == "other" and card.data.license_name and card.data.license_link.startswith("https://")
    assert {"flexicodec", "custom_code"} <= set(card.data.tags)
    for name in card.data.datasets:
        validate_repo_id(name)
    validate_repo_id(card.data.base_model)
    assert all(language in LANGUAGES for language in card.data.language)
    # Written and read again, nothing changes: no field that the Hub would read differently.
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    sections = re.findall(r"^## (.+)$", card.text, flags=re.MULTILINE)
    assert {"What it is for", "Limits", "Risks", "Published results", "Licenses", "Citation"} <= set(sections)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
