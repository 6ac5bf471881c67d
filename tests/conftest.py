import json
import os
import shutil
from pathlib import Path


# Before any import that reads it. No test needs the network: those of the Hub have a server of their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexicodec_hf import (
    FlexiCodecARForConditionalGeneration,
    FlexiCodecFeatureExtractor,
    FlexiCodecForTextToSpeech,
    FlexiCodecModel,
    FlexiCodecTTSProcessor,
    FlexiCodecVoiceboxConfig,
    FlexiCodecVoiceboxModel,
    save_repository,
)
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.conversion import convert_ar, convert_codec, convert_vocoder, convert_voicebox
from flexicodec_hf.conversion.cache import converted_release
from flexicodec_hf.conversion.tables import VOICEBOX
from hub_server import hub_server, use_hub
from whisper_files import write_tokenizer_json


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores,
    os.environ["OMP_NUM_THREADS"] = "1"  # and so do the processes that they start

# Golden values are those of a CPU; by default, cuDNN reads only 10 bits of what it convolves.
torch.backends.cudnn.allow_tf32 = False

TESTS = Path(__file__).parent
AUDIO = TESTS / "audio"
FIXTURES = TESTS / "fixtures"


def devices() -> list[str]:
    """Every device at hand: tests that touch tensors run on each."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> str:
    return request.param


class Fixture:
    """Golden tensors of the reference `flexicodec==0.1.2` (see tests/fixtures/README.md).

    `fixture.spec` is the JSON, `fixture["run/name"]` a tensor under `io/`, `fixture.weights` the reference's weights.
    """

    def __init__(self, name: str):
        self.spec = json.loads((FIXTURES / f"{name}.json").read_text())
        tensors = {}
        for path in (FIXTURES / f"{name}.safetensors", FIXTURES / f"{name}.io.safetensors"):
            tensors |= load_file(path) if path.exists() else {}
        self.weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        self._io = {k.removeprefix("io/"): v for k, v in tensors.items() if k.startswith("io/")}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._io[name].clone()

    def __contains__(self, name: str) -> bool:
        return name in self._io


@pytest.fixture(scope="session")
def golden():
    """`golden("fbank")` loads a golden fixture, once a session."""
    loaded: dict[str, Fixture] = {}

    def load(name: str) -> Fixture:
        if name not in loaded:
            loaded[name] = Fixture(name)
        return loaded[name]

    return load


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected, atol=atol, rtol=rtol, check_dtype=False)


# How scripts begin that run in a process of their own, where the package cannot be imported.
WITHOUT_PACKAGE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flexicodec_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="session")
def codec_dir(golden, tmp_path_factory):
    """`codec_dir("codec_tiny")`: the reference's codec of a fixture, converted to a repository on disk."""
    converted: dict[str, Path] = {}

    def convert(name: str = "codec_tiny") -> Path:
        if name not in converted:
            folder = tmp_path_factory.mktemp(name)
            save_file(golden(name).weights, folder / "source.safetensors")
            (folder / "source.yaml").write_text(yaml.safe_dump({"model": golden(name).spec["config"]}))
            convert_codec(folder / "source.safetensors", folder / "codec", folder / "source.yaml")
            converted[name] = folder / "codec"
        return converted[name]

    return convert


@pytest.fixture(scope="session")
def tts_parts(golden, tmp_path_factory):
    """The text-to-speech files of the fixture `tts`, converted: a directory with codec, ar, voicebox, vocoder."""
    fixture, folder = golden("tts"), tmp_path_factory.mktemp("tts")
    sources = {}
    for name in ("artts", "nartts", "vocos"):
        tensors = {k.removeprefix(f"{name}/"): v for k, v in fixture.weights.items() if k.startswith(f"{name}/")}
        sources[name] = folder / f"{name}.safetensors"
        save_file(tensors, sources[name])
    (folder / "codec.yaml").write_text(yaml.safe_dump(fixture.spec["codec_config"]))
    convert_codec(sources["artts"], folder / "codec", folder / "codec.yaml")
    convert_ar(sources["artts"], folder / "ar", fixture.spec["ar_config"])
    convert_voicebox(sources["nartts"], folder / "voicebox", fixture.spec["voicebox_config"])
    convert_vocoder(sources["vocos"], folder / "vocoder", fixture.spec["vocos_config"])
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as the released one is, but for its BPE, which has no merges: ids 0 to 255 are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|en|>", "<|zh|>", "<|fr|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tts_repository(tts_parts, codec_dir, tmp_path_factory):
    """A whole repository: another codec at the root, the fixture `tts` in `tts/`, and two voices.

    The text vocabulary of the autoregressive model is enlarged for `byte_tokenizer`; the first 120
    ids are those of the fixture.
    """
    ar = FlexiCodecARForConditionalGeneration.from_pretrained(tts_parts / "ar")
    encoder, vocabulary = ar.model.text_encoder, 300
    table = torch.randn(vocabulary, encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    table[: encoder.config.vocab_size] = encoder.embed_tokens.weight.data
    encoder.embed_tokens = torch.nn.Embedding.from_pretrained(table, freeze=False)
    encoder.config.vocab_size = ar.config.text_encoder_config.vocab_size = vocabulary

    model = FlexiCodecForTextToSpeech.from_parts_pretrained(
        tts_parts / "codec", ar, tts_parts / "voicebox", tts_parts / "vocoder"
    )
    # Random weights do not know when to end, and more steps make their speech no better.
    model.generation_config.update(min_new_tokens=4, max_new_tokens=8, num_inference_steps=2)
    extractor = FlexiCodecFeatureExtractor.from_pretrained(tts_parts / "codec")
    processor = FlexiCodecTTSProcessor(extractor, byte_tokenizer(), mel_config={})
    for name, file, said in (
        ("anna", "librivox_austen_0880.flac", "It is a truth universally acknowledged."),
        ("ben", "librivox_austen_0890.flac", None),
    ):
        clip = read_audio(AUDIO / file, extractor.sampling_rate).waveform[: 3 * extractor.sampling_rate // 2]
        inputs = processor(audio=clip, reference_text=said, sampling_rate=extractor.sampling_rate)
        model.voices[name] = model.encode_voice(**inputs, metadata={"text": said or ""})
    folder = tmp_path_factory.mktemp("repository")
    save_repository(folder, FlexiCodecModel.from_pretrained(codec_dir()), model, processor)
    return folder


@pytest.fixture(scope="session")
def release(golden, tmp_path_factory):
    """A directory with the fixture `tts` in the names and the form of the released files, and their tokenizer.

    The text vocabulary of the autoregressive model is enlarged to that of the released one; the first 120 ids are the
    fixture's.
    """
    fixture, folder = golden("tts"), tmp_path_factory.mktemp("release")
    files = {
        name: {k.removeprefix(f"{name}/"): v for k, v in fixture.weights.items() if k.startswith(f"{name}/")}
        for name in ("artts", "nartts", "vocos")
    }
    files["vocos_emilia"] = files.pop("vocos")
    embedding = "transformer_lm.text_embedding.weight"
    few = files["artts"][embedding]
    table = torch.randn(51866, few.shape[1], generator=torch.Generator().manual_seed(0))
    table[: len(few)] = few
    files["artts"][embedding] = table
    codec = {k: v for k, v in files["artts"].items() if k.startswith("flexicodec_model.")}
    files["12hz_v1_half"] = {k.removeprefix("flexicodec_model."): v for k, v in codec.items()}
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "12hz_v1_half_config.yaml").write_text(yaml.safe_dump({"model": fixture.spec["codec_config"]}))
    (folder / "ar.json").write_text(json.dumps(fixture.spec["ar_config"] | {"text_token_size": len(table)}))
    (folder / "nar.json").write_text(json.dumps(fixture.spec["voicebox_config"]))
    (folder / "vocoder.json").write_text(json.dumps(fixture.spec["vocos_config"]))
    (folder / "whisper").mkdir()
    write_tokenizer_json(folder / "whisper")
    return folder


@pytest.fixture(scope="session")
def raw_release(release, tmp_path_factory):
    """The authors' files as they are on the Hub, with sizes that need no configuration beside them.

    The codec at the root lacks its semantic encoder, which is in `model.pt`, as SenseVoice has it.
    """
    folder = tmp_path_factory.mktemp("raw_release")
    generator = torch.Generator().manual_seed(0)
    codec, artts = load_file(release / "12hz_v1_half.safetensors"), load_file(release / "artts.safetensors")
    inside = "semantic_model."
    torch.save({k.removeprefix(inside): v for k, v in codec.items() if k.startswith(inside)}, folder / "model.pt")
    save_file({k: v for k, v in codec.items() if not k.startswith(inside)}, folder / "12hz_v1_half.safetensors")
    # Three dimensions of 8 levels, and not the 4 of the fixture, are what shapes show.
    for name, rows in (("speech_embedding.weight", 512), ("llm_decoder.weight", 513), ("llm_decoder.bias", 513)):
        shape = (rows, *artts[f"transformer_lm.{name}"].shape[1:])
        artts[f"transformer_lm.{name}"] = 0.1 * torch.randn(shape, generator=generator)
    artts["transformer_lm.llm_decoder.bias"][-1] += 5  # random weights do not know when to end
    save_file(artts, folder / "artts.safetensors")
    config = FlexiCodecVoiceboxConfig(
        codebook_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=7, num_attention_heads=1,
        repa_hidden_size=16, semantic_hidden_size=12,
    )  # fmt: skip
    voicebox = FlexiCodecVoiceboxModel(config).state_dict()
    save_file(
        {VOICEBOX.source_names(name, config)[0]: tensor for name, tensor in voicebox.items()},
        folder / "nartts.safetensors",
    )
    older = {k: v for k, v in artts.items() if k.startswith("flexicodec_model.")}
    save_file(older, folder / "nartts_flexicodec_only.safetensors")
    shutil.copy(release / "vocos_emilia.safetensors", folder)
    shutil.copy(release / "whisper" / "tokenizer.json", folder)
    shutil.copy(release / "12hz_v1_half_config.yaml", folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe authors' own card.\n")
    return folder


@pytest.fixture(scope="session")
def released_hub(raw_release):
    """A server in place of the Hub, with the four repositories that the released files are in."""
    elsewhere = {
        "vocos_emilia.safetensors": "amphion/dualcodec-tts",
        "model.pt": "FunAudioLLM/SenseVoiceSmall",
        "tokenizer.json": "openai/whisper-tiny",
    }
    with hub_server() as hub:
        hub.add("jiaqili3/flexicodec", raw_release, *({path.name for path in raw_release.iterdir()} - {*elsewhere}))
        for file, repo in elsewhere.items():
            hub.add(repo, raw_release, file)
        yield hub


@pytest.fixture(scope="session")
def released_home(released_hub, tmp_path_factory):
    """Caches after the whole system was loaded by its id once."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_hub(monkeypatch, released_hub.url, home)
        converted_release("jiaqili3/flexicodec")
    return home
