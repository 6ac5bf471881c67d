import json

import pytest
import torch
from safetensors.torch import save_file

from conftest import assert_close
from flexicodec_hf.configuration_flexicodec_ar import FlexiCodecARConfig
from flexicodec_hf.conversion import CheckpointError, convert_ar
from flexicodec_hf.modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration


PREFIX = "transformer_lm."


@pytest.fixture
def source(golden, tmp_path):
    def write(changes=None, without=(), suffix="safetensors", prefix="flexicodec_model."):
        weights = golden("ar").weights | {f"{prefix}encoder.weight": torch.zeros(2)} | (changes or {})
        weights = {name: tensor for name, tensor in weights.items() if name.removeprefix(PREFIX) not in without}
        path = tmp_path / f"artts.{suffix}"
        if suffix == "safetensors":
            save_file(weights, path)
        else:
            torch.save({"model": weights}, path)
        return path

    return write


def test_sizes_are_read_off_the_tensors(golden, source, tmp_path):
    spec = golden("ar").spec["config"]
    config = convert_ar(source(), tmp_path / "model").config
    assert config.hidden_size == spec["llm_input_size"]
    assert config.intermediate_size == spec["llm_linear_units"]
    assert config.num_hidden_layers == spec["llm_num_blocks"]
    assert config.num_attention_heads == spec["llm_attention_heads"]
    assert config.speech_vocab_size == spec["speech_token_size"]
    assert config.num_durations == spec["duration_classes"]
    assert config.merging_thresholds == spec["flex_framerate_options"]
    text = config.text_encoder_config
    assert text.hidden_size == spec["text_encoder_input_size"]
    assert text.intermediate_size == spec["text_encoder_linear_units"]
    assert text.num_hidden_layers == spec["text_encoder_num_blocks"]
    assert text.num_attention_heads == spec["text_encoder_attention_heads"]
    assert text.vocab_size == spec["text_token_size"]


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("prefix", ["flexicodec_model.", "dualcodec_model."])
def test_the_directory_loads_strictly(golden, source, tmp_path, suffix, prefix):
    convert_ar(source(suffix=suffix, prefix=prefix), tmp_path / "model", golden("ar").spec["config"])
    model, info = FlexiCodecARForConditionalGeneration.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = golden("ar").weights
    assert_close(model.lm_head.weight, weights[f"{PREFIX}llm_decoder.weight"], atol=0)
    assert (tmp_path / "model" / "generation_config.json").exists()
    # One row for each threshold, where the reference projects a one-hot.
    config, control = model.config, model.model.control_embedding.weight
    for column, threshold in enumerate(config.merging_thresholds):
        weight, bias = (weights[f"{PREFIX}framerate_embed_affine_layer.{leaf}"] for leaf in ("weight", "bias"))
        row = config.threshold_token_id(threshold) - config.speech_vocab_size
        assert_close(control[row], weight[:, column] + bias, atol=1e-6)


def test_all_released_tensors_have_a_place():
    """The names and shapes of the released file, without its data: the fixture has them all in small."""
    with torch.device("meta"):
        model = FlexiCodecARForConditionalGeneration(FlexiCodecARConfig())
    # 432,235,531 in the released model, less the speaker projection (197,632) and the threshold projection with the
    # two control rows (3,072 + 2,048), whose place the table of 7 control rows takes.
    assert sum(p.numel() for p in model.parameters()) == 432_235_531 - 197_632 - 3_072 - 2_048 + 7 * 1024


def test_types(source, tmp_path):
    assert convert_ar(source(), tmp_path / "one").dtype == torch.float32
    assert convert_ar(source(), tmp_path / "two", dtype=torch.float16).dtype == torch.float16
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == "float16"
    loaded = FlexiCodecARForConditionalGeneration.from_pretrained(tmp_path / "two", dtype="auto")
    assert loaded.dtype == torch.float16


def test_unknown_and_missing_tensors_are_named(golden, source, tmp_path, caplog):
    path = source({"transformer_lm.novel": torch.zeros(1), "other.x": torch.zeros(1)}, without=("llm_decoder.bias",))
    with pytest.raises(CheckpointError) as error:
        convert_ar(path, tmp_path / "model")
    for name in ("transformer_lm.novel", "other.x", "transformer_lm.llm_decoder.bias"):
        assert name in str(error.value)
    assert not (tmp_path / "model").exists()

    model = convert_ar(path, tmp_path / "model", allow_partial=True)
    assert "transformer_lm.novel" in caplog.text and "transformer_lm.llm_decoder.bias" in caplog.text
    assert (model.lm_head.bias == 0).all()
    assert_close(model.lm_head.weight, golden("ar").weights[f"{PREFIX}llm_decoder.weight"], atol=0)


def test_of_tensors_that_become_one_the_missing_is_named(golden, source, tmp_path, caplog):
    layer = "llm.encoders.0.self_attn"
    path = source(without=(f"{layer}.linear_k.weight",))
    with pytest.raises(CheckpointError, match=rf"Missing \(1\): {PREFIX}{layer}\.linear_k\.weight\. Pass"):
        convert_ar(path, tmp_path / "model")
    model = convert_ar(path, tmp_path / "model", allow_partial=True)
    assert f"Missing (1): {PREFIX}{layer}.linear_k.weight." in caplog.text
    attention = model.model.decoder.layers[0].self_attn
    expected = torch.cat([golden("ar").weights[f"{PREFIX}{layer}.linear_{part}.bias"] for part in "qkv"])
    assert_close(attention.qkv_proj.bias, expected, atol=0)
    assert 0 < attention.qkv_proj.weight.std() < 0.05  # freshly initialized


@pytest.mark.parametrize(
    ("ar_config", "message"),
    [
        ({"llm_num_blocks": 5}, "`llm_num_blocks: 5`; the tensors show 3"),
        (
            {"text_encoder_macaron_style": True},
            "`text_encoder_macaron_style: True`; only `text_encoder_macaron_style: False`",
        ),
        ({"llm_blocks": 3}, "unknown settings llm_blocks; known are"),
        ({"flex_framerate_options": [0.9]}, r"has 2 merging thresholds, `flex_framerate_options` is \[0.9\]"),
        (
            {"llm_positional_dropout_rate": 0.3},
            "`llm_positional_dropout_rate`; only the value of `llm_dropout_rate`, 0.1, is supported",
        ),
    ],
)
def test_a_config_that_contradicts_is_refused(source, tmp_path, ar_config, message):
    with pytest.raises(CheckpointError, match=message):
        convert_ar(source(), tmp_path / "model", ar_config)


def test_the_config_fills_what_tensors_do_not_tell(source, tmp_path):
    given = {"flex_framerate_options": [0.8, 1.0], "llm_dropout_rate": 0.2, "lsm_weight": 0.1, "focal_gamma": 3.0}
    config = convert_ar(source(), tmp_path / "model", given).config
    assert config.merging_thresholds == [0.8, 1.0]
    assert (config.hidden_dropout, config.label_smoothing, config.focal_gamma) == (0.2, 0.1, 3.0)


def test_wrong_shapes_and_files(source, tmp_path):
    path = source({f"{PREFIX}llm_decoder.bias": torch.zeros(7)})
    with pytest.raises(
        CheckpointError, match=r"llm_decoder.bias' \(7,\), which does not make a `lm_head.bias` of shape \(61,\)"
    ):
        convert_ar(path, tmp_path / "model")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has no tensor 'transformer_lm"):
        convert_ar(tmp_path / "other.safetensors", tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint file"):
        convert_ar(tmp_path / "nothing.safetensors", tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["text_embedding.weight", "duration_decoder.weight", "llm.encoders.0.self_attn.pos_bias_u"]
)
@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_a_tensor_with_other_axes_is_named(source, tmp_path, name, shape):
    with pytest.raises(CheckpointError, match=f"{PREFIX}{name}.* must have 2 axes"):
        convert_ar(source({f"{PREFIX}{name}": torch.zeros(shape)}), tmp_path / "model")
