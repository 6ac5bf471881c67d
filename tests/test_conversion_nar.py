import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from conftest import assert_close
from flexicodec_hf.configuration_flexicodec_vocoder import FlexiCodecVocoderConfig
from flexicodec_hf.configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig
from flexicodec_hf.conversion import CheckpointError, convert_vocoder, convert_voicebox
from flexicodec_hf.modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from flexicodec_hf.modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel


@pytest.fixture
def nar(golden):
    """Tensors and settings of a tiny `nartts.safetensors`, with an older codec beside the model."""
    fixture = golden("tts")
    tensors = {k.removeprefix("nartts/"): v for k, v in fixture.weights.items() if k.startswith("nartts/")}
    codec = {
        k.removeprefix("artts/"): v for k, v in fixture.weights.items() if k.startswith("artts/flexicodec_model.")
    }
    assert codec
    return tensors | codec, dict(fixture.spec["voicebox_config"])


@pytest.fixture
def vocos(golden):
    fixture = golden("vocos")
    return dict(fixture.weights), dict(fixture.spec["config"])


def write(path, tensors):
    """A file in the container that its suffix says."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path)
    return path


@pytest.mark.parametrize("name", ["nartts.safetensors", "nartts.pt"])
@pytest.mark.parametrize("codec", ["flexicodec_model.", "dualcodec_model."])
def test_voicebox_converts_and_loads(nar, tmp_path, name, codec):
    tensors, settings = nar
    tensors = {key.replace("flexicodec_model.", codec): tensor for key, tensor in tensors.items()}
    settings_file = tmp_path / "nar.json"
    settings_file.write_text(json.dumps(settings))
    convert_voicebox(write(tmp_path / name, tensors), tmp_path / "out", settings_file)
    model, info = FlexiCodecVoiceboxModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (model.config.num_attention_heads, model.config.repa_layer_index) == (4, 1)
    assert (model.config.codebook_size, model.config.num_mel_bins, model.config.semantic_hidden_size) == (64, 128, 12)
    assert_close(model.code_embedding.weight, tensors["voicebox_model.cond_emb.weight"], atol=0)
    assert_close(model.repa_projection.down_proj.bias, tensors["repa_projection.2.bias"], atol=0)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(v.numel() for k, v in tensors.items() if k.startswith(("voicebox_model.", "repa_projection.")))


@pytest.mark.parametrize("name", ["vocos.safetensors", "vocos.pt"])
def test_vocoder_converts_and_loads(vocos, tmp_path, name):
    tensors, settings = vocos
    convert_vocoder(write(tmp_path / name, tensors), tmp_path / "out", settings)
    model, info = FlexiCodecVocoderModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (model.config.n_fft, model.config.hop_length, model.config.num_hidden_layers) == (64, 16, 3)
    assert_close(model.layers[2].layer_scale, tensors["backbone.convnext.2.gamma"], atol=0)
    assert_close(model.head.linear.weight, tensors["head.out.weight"], atol=0)


def test_default_sizes_are_the_released_ones():
    with torch.device("meta"):
        voicebox = FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig())
        vocoder = FlexiCodecVocoderModel(FlexiCodecVocoderConfig())
    assert sum(parameter.numel() for parameter in voicebox.parameters()) == 366_008_960
    assert sum(parameter.numel() for parameter in vocoder.parameters()) == 255_042_434


def test_what_shapes_do_not_tell_is_as_released(nar, vocos, tmp_path):
    vocoder = convert_vocoder(write(tmp_path / "vocos.safetensors", vocos[0]))
    assert (
        vocoder.config.to_dict() == convert_vocoder(tmp_path / "vocos.safetensors", config=vocos[1]).config.to_dict()
    )
    wide = FlexiCodecVoiceboxModel(tiny_config()).state_dict()
    assert wide["norm.to_weight.weight"].shape == (128, 128)
    source = write(tmp_path / "wide.safetensors", {released_name(k): v.contiguous() for k, v in wide.items()})
    config = convert_voicebox(source).config
    assert (config.num_attention_heads, config.upsample_factor, config.sigma_min) == (2, 4, 1e-5)
    assert config.repa_layer_index is None  # no projection in the file


def tiny_config() -> FlexiCodecVoiceboxConfig:
    return FlexiCodecVoiceboxConfig(
        codebook_size=5, hidden_size=128, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_mel_bins=4, repa_layer_index=None,
    )  # fmt: skip


def released_name(name: str) -> str:
    """Written out here once more, so that a slip in the converter's table does not go unseen."""
    first, _, rest = name.partition(".")
    table = {
        "code_embedding": "cond_emb",
        "condition_mlp": "diff_estimator.cond_mlp",
        "mel_mlp": "diff_estimator.mel_mlp",
        "output_mlp": "diff_estimator.mel_out_mlp",
        "time_embedding": "diff_estimator.diff_step_mlp",
        "layers": "diff_estimator.layers",
        "norm": "diff_estimator.norm",
    }
    if first.endswith("_mlp") or first == "time_embedding":
        rest = rest.removeprefix("mlp.").replace("up_proj", "0").replace("down_proj", "2")
    return f"voicebox_model.{table[first]}.{rest}"


def test_half_precision_sources_and_targets(nar, vocos, tmp_path):
    source = write(tmp_path / "nartts.safetensors", {k: v.half() for k, v in nar[0].items()})
    assert convert_voicebox(source, config=nar[1]).dtype == torch.float32
    convert_voicebox(source, tmp_path / "out", nar[1], dtype=torch.bfloat16)
    model = FlexiCodecVoiceboxModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    convert_vocoder(write(tmp_path / "v.safetensors", vocos[0]), tmp_path / "vocoder", vocos[1], dtype=torch.float16)
    assert FlexiCodecVocoderModel.from_pretrained(tmp_path / "vocoder", dtype="auto").dtype == torch.float16


def test_training_settings_are_understood(nar, tmp_path):
    source = write(tmp_path / "nartts.safetensors", nar[0])
    settings = {
        "voicebox_config": nar[1] | {"sigma": 1e-4, "cfg_scale": 0.1},
        "repa_layer_idx": 9,  # never read by the code that it is for
        "repa_loss_weight": 0.5,
        "repa_projection_dim": 12,
        "ssl_feature_dim": 12,
        "use_repa_loss": True,
    }
    config = convert_voicebox(source, config=settings).config
    assert (config.sigma_min, config.unconditional_probability, config.repa_loss_weight) == (1e-4, 0.1, 0.5)
    assert config.repa_layer_index == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "says `num_layers: 3`; the tensors show 2"),
        ({"cond_codebook_size": 65}, "says `cond_codebook_size: 65`; the tensors show 64"),
        ({"time_scheduler": "linear"}, "`time_scheduler: linear`; only `time_scheduler: cos`"),
        ({"use_cond_code": False}, "`use_cond_code: False`; only `use_cond_code: True`"),
        ({"use_repa_loss": False}, "`use_repa_loss: False`; the tensors show True"),
        ({"layers": 2}, "unknown settings layers; known are"),
    ],
)
def test_contradicting_settings_are_refused(nar, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        convert_voicebox(write(tmp_path / "nartts.safetensors", nar[0]), config=nar[1] | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 25}, "says `dim: 25`; the tensors show 24"),
        ({"padding": "center"}, "`padding: center`; only `padding: same`"),
        ({"hop": 16}, "unknown settings hop; known are"),
    ],
)
def test_contradicting_vocoder_settings_are_refused(vocos, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        convert_vocoder(write(tmp_path / "vocos.safetensors", vocos[0]), config=vocos[1] | change)


def test_heads_that_nobody_knows_are_asked_for(nar, tmp_path):
    with pytest.raises(CheckpointError, match="width 32 is not a multiple of 64: say `num_heads`"):
        convert_voicebox(write(tmp_path / "nartts.safetensors", nar[0]), config={"repa_layer_idx": 1})


def test_missing_and_unknown_tensors_are_named(nar, tmp_path, caplog):
    tensors, settings = nar
    tensors["voicebox_model.extra"] = tensors.pop("voicebox_model.diff_estimator.norm.to_weight.bias")
    source = write(tmp_path / "nartts.safetensors", tensors)
    missing = r"Missing \(1\): voicebox_model.diff_estimator.norm.to_weight.bias. "
    with pytest.raises(CheckpointError, match=rf"{missing}Unknown \(1\): voicebox_model.extra. "):
        convert_voicebox(source, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING):
        convert_voicebox(source, tmp_path / "out", settings, allow_partial=True)
    assert "Missing (1)" in caplog.text and "voicebox_model.extra" in caplog.text
    assert FlexiCodecVoiceboxModel.from_pretrained(tmp_path / "out").norm.to_weight.bias.shape == (32,)


def test_wrong_shapes_and_wrong_files_are_refused(nar, vocos, tmp_path):
    vocos[0]["head.out.bias"] = torch.zeros(65)
    with pytest.raises(
        CheckpointError, match=r"'head.out.bias' \(65,\), which does not make a `head.linear.bias` of shape \(66,\)"
    ):
        convert_vocoder(write(tmp_path / "vocos.safetensors", vocos[0]), config=vocos[1])
    with pytest.raises(CheckpointError, match=r"has no tensor 'voicebox_model\.cond_emb\.weight'"):
        convert_voicebox(tmp_path / "vocos.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor 'backbone\.embed\.weight'"):
        convert_vocoder(write(tmp_path / "nartts.safetensors", nar[0]))
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        convert_vocoder(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not a JSON file"), ("[1]", "must hold a mapping of names of settings to values")]
)
def test_bad_settings_files_are_refused(nar, tmp_path, text, message):
    settings = tmp_path / "settings.json"
    settings.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        convert_voicebox(write(tmp_path / "nartts.safetensors", nar[0]), config=settings)


@pytest.mark.parametrize("content", ["[1]", '{"voicebox_config": [1]}', '"x"', "[" * 100_000])
def test_settings_that_are_no_mapping_are_refused(tmp_path, content):
    config = tmp_path / "nar.json"
    config.write_text(content)
    with pytest.raises(CheckpointError, match=r"nar\.json"):
        convert_voicebox(tmp_path / "nartts.safetensors", config=config)
