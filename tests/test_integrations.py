"""Programs of others with FlexiCodec in place of their codec, by the adapters of `examples/integrations`."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import AUDIO
from flexicodec_hf import FlexiCodecFeatureExtractor, FlexiCodecModel
from flexicodec_hf.audio_flexicodec import read_audio


INTEGRATIONS = Path(__file__).parent.parent / "examples" / "integrations"


@pytest.fixture
def adapter(monkeypatch):
    """`adapter("moshi_finetune")`: the module of that name."""

    def load(name: str):
        monkeypatch.syspath_prepend(INTEGRATIONS)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


@pytest.fixture
def speech() -> np.ndarray:
    return read_audio(AUDIO / "librivox_austen_0880.flac", 16_000).waveform


@pytest.fixture
def unmerged(codec_dir, speech):
    """Two clips, the second shorter, and the codes of each on its own, without merging."""
    model = FlexiCodecModel.from_pretrained(codec_dir()).eval()
    extractor = FlexiCodecFeatureExtractor.from_pretrained(codec_dir())
    clips = [speech, speech[: len(speech) // 2]]
    inputs = (extractor(clip, sampling_rate=16_000, return_tensors="pt") for clip in clips)
    with torch.no_grad():
        codes = [
            model.encode(**features, merging_threshold=1.0, num_quantizers=3).audio_codes[0] for features in inputs
        ]
    return model, clips, codes


def test_speechbrain_encodes_and_decodes_with_it(adapter, codec_dir, unmerged):
    pytest.importorskip("speechbrain", exc_type=(ImportError, OSError))
    model, clips, codes = unmerged
    codec = adapter("speechbrain_codec").FlexiCodec(str(codec_dir()), num_codebooks=3)
    batch = torch.zeros(2, len(clips[0]))
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    length = torch.tensor([1.0, 0.5])
    tokens, embeddings, audio = codec(batch, length)
    for row, expected in zip(tokens, codes, strict=True):
        assert torch.equal(row[:, : expected.shape[1]], expected)
    assert embeddings.shape == (*tokens.shape, model.config.hidden_size)
    latents = embeddings[0].sum(dim=0).T[None]
    with torch.no_grad():
        expected = model.decode(latents=latents).audio_values
    torch.testing.assert_close(audio[:1], expected, atol=1e-5, rtol=1e-4)
    assert audio.shape[1] == 1 and not audio[1, 0, audio.shape[2] // 2 + 1 :].any()
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    semantic = adapter("speechbrain_codec").FlexiCodec(str(codec_dir()), num_codebooks=1)
    semantic_tokens, semantic_embeddings = semantic.encode(batch[:1], length[:1])
    assert torch.equal(semantic_tokens, tokens[:1, :1]) and torch.equal(semantic_embeddings, embeddings[:1, :1])


def test_codec_superb_synthesizes_with_it(adapter, codec_dir, speech):
    general = pytest.importorskip("SoundCodec.base_codec.general", exc_type=(ImportError, OSError))
    codec_class = adapter("codec_superb").Codec
    codec_class.source = str(codec_dir())
    codec = codec_class()
    assert isinstance(codec, general.BaseCodec) and codec.sampling_rate == 16_000
    data = [{"id": str(n), "audio": {"array": speech[:n], "sampling_rate": 16_000}} for n in (16_000, 24_000)]
    units = [codec.extract_unit(item).unit for item in data]
    assert all(unit.ndim == 2 and len(unit) == codec.model.config.num_quantizers for unit in units)
    for item, result in zip(data, codec.batch_synth([dict(item) for item in data], local_save=False), strict=True):
        inputs = codec.feature_extractor(speech[: int(item["id"])], sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            expected = codec.model.decode(**codec.model.encode(**inputs, merging_threshold=0.91)).audio_values[0]
        assert torch.equal(torch.as_tensor(result["audio"]["array"]), expected)


def test_moshi_finetune_gets_frames_of_mimis_rate(adapter, codec_dir, unmerged):
    """The calls of `InterleavedTokenizer.__call__` of moshi-finetune, which is not on PyPI."""
    _, clips, codes = unmerged
    mimi = adapter("moshi_finetune").FlexiCodecAsMimi(codec_dir(), num_codebooks=3)
    stereo = torch.from_numpy(np.stack([clips[0], clips[0]]))
    tokens = mimi.encode(stereo[:, None])
    assert torch.equal(tokens, torch.stack([codes[0], codes[0]]))
    assert (mimi.frame_rate, mimi.sample_rate, mimi.frame_size) == (12.5, 16_000, 1280)
    assert tokens.max() < mimi.cardinality
    num_frames = -(-len(clips[0]) * 12.5 // 16_000)
    assert 0 <= num_frames - tokens.shape[-1] <= 1  # the interleaver pads what is missing at the end
    assert mimi.decode(tokens).shape[:2] == (2, 1)
    mimi.set_num_codebooks(1)
    assert mimi.encode(stereo[:, None]).shape[1] == 1


def test_the_adapter_for_moshi_has_all_of_its_interface(adapter, codec_dir):
    compression = pytest.importorskip("moshi.models.compression")
    names = {name for name in compression.CompressionModel.__abstractmethods__ if not name.startswith("_")}
    mimi = adapter("moshi_finetune").FlexiCodecAsMimi(codec_dir())
    assert {"encode", "decode", "frame_rate"} <= names
    # Latents are for training the codec.
    assert {name for name in names if not hasattr(mimi, name)} == {"decode_latent"}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_parler_tts_gets_labels_from_its_encoding_step(adapter, codec_dir, unmerged, batch_size):
    """The lines of `apply_audio_decoder` of parler-tts 0.2.3, which cannot be installed beside this package."""
    _, clips, codes = unmerged
    audio_decoder = adapter("parler_tts_codec").FlexiCodecForParlerTTS.from_pretrained(codec_dir()).eval()
    extractor = FlexiCodecFeatureExtractor.from_pretrained(codec_dir())
    clips, codes = clips[:batch_size], codes[:batch_size]
    batch = extractor(clips, sampling_rate=16_000, return_tensors="pt", padding="longest", max_length=480_000)
    with torch.no_grad():
        labels = audio_decoder.encode(**batch, bandwidth=None)["audio_codes"]
    output = labels.squeeze(0).transpose(1, 2)
    assert output.shape[:2] == (batch_size, codes[0].shape[1])
    for row, expected in zip(output, codes, strict=True):
        assert torch.equal(row[: expected.shape[1], :3].T, expected)
    assert extractor.model_input_names[0] == "input_values"


@pytest.mark.slow  # an interpreter, and two processes with the model
def test_datasets_map_in_several_processes_ends_after_the_model_ran(codec_dir, tmp_path):
    """The way that `docs/language_models.md` shows, in a process whose threads have worked."""
    page = (INTEGRATIONS.parent.parent / "docs" / "language_models.md").read_text()
    (snippet,) = re.findall(r"^```python\n([^`]*num_proc=2[^`]*)^```$", page, flags=re.MULTILINE)
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, flexicodec_hf\nfrom transformers import AutoFeatureExtractor, AutoModel\n"
        f"codec = AutoModel.from_pretrained({str(codec_dir())!r})\n"
        f"feature_extractor = AutoFeatureExtractor.from_pretrained({str(codec_dir())!r})\n"
        "torch.set_num_threads(2)\n"
        "audio = torch.randn(32_000, generator=torch.Generator().manual_seed(0)).numpy()\n"
        "inputs = feature_extractor(audio[:20_000], sampling_rate=16_000, return_tensors='pt')\n"
        "expected = codec.encode(**inputs).audio_codes[0].tolist()\n"
        f"{snippet}assert tokens[1]['audio_codes'] == expected and torch.get_num_threads() == 2\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, program], check=True, timeout=180, env=environment)
