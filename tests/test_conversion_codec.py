"""Conversion of the codec: every layout of the released files, and every way in which a file can be wrong."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel

from conftest import assert_close
from flexicodec_hf import FlexiCodecConfig, FlexiCodecModel
from flexicodec_hf.conversion import CheckpointError, convert_codec
from flexicodec_hf.conversion.checkpoint import SourceCheckpoint
from flexicodec_hf.conversion.convert import infer_config
from flexicodec_hf.conversion.tables import CODEC
from flexicodec_hf.data.files import atomic_directory


RUN = "b1_thr_mid_nq5"


@pytest.fixture
def weights(golden) -> dict[str, torch.Tensor]:
    """The reference's tensors of the small codec, to change at will."""
    return dict(golden("codec_tiny").weights)


@pytest.fixture
def options(golden) -> dict:
    return dict(golden("codec_tiny").spec["config"])


@pytest.fixture
def convert(tmp_path, options):
    """`convert(tensors)` saves and converts them with the small codec's YAML, and returns the directory."""

    def run(tensors: dict | Path, yaml_options: dict | None = options, **kwargs) -> Path:
        source = tensors
        if isinstance(tensors, dict):
            source = tmp_path / "source.safetensors"
            save_file(tensors, source)
        config = None
        if yaml_options is not None:
            config = tmp_path / "source.yaml"
            config.write_text(yaml.safe_dump(yaml_options))
        convert_codec(source, tmp_path / "converted", config, **kwargs)
        return tmp_path / "converted"

    return run


def load_strictly(directory: Path, **kwargs) -> FlexiCodecModel:
    """The model, loaded without any missing, unexpected, mismatched or otherwise remarkable tensor."""
    model, loading = AutoModel.from_pretrained(directory, output_loading_info=True, **kwargs)
    assert isinstance(model, FlexiCodecModel)
    assert not any(loading.values()), loading
    return model


def assert_golden(directory: Path, golden, device: str, name: str = "codec_tiny") -> None:
    """The reference's tokens and audio come out of a converted repository."""
    fixture, spec = golden(name), golden(name).spec["runs"][RUN]
    features = fixture["x_b2"][:1] if "x_b2" in fixture else golden("codec_tiny")["x_b2"][:1]
    model = load_strictly(directory).eval().to(device)
    with torch.no_grad():
        encoded = model.encode(
            fixture["in/audio_b1"][:, None].to(device),
            features.to(device),
            merging_threshold=spec["threshold"],
            num_quantizers=spec["num_quantizers"],
        )
        audio = model.decode(**encoded).audio_values
    assert torch.equal(encoded.audio_codes[:, :1].cpu(), fixture[f"{RUN}/semantic_codes"].long())
    assert torch.equal(encoded.audio_codes[:, 1:].cpu(), fixture[f"{RUN}/acoustic_codes"])
    assert torch.equal(encoded.token_lengths.cpu(), fixture[f"{RUN}/token_lengths"])
    assert_close(audio, fixture[f"{RUN}/audio"].view_as(audio), atol=1e-4)


def split_semantic(weights: dict) -> tuple[dict, dict]:
    """The codec without its semantic encoder, and the encoder named as in SenseVoice-small's `model.pt`."""
    inside = "semantic_model."
    codec = {name: tensor for name, tensor in weights.items() if not name.startswith(inside)}
    return codec, {name.removeprefix(inside): tensor for name, tensor in weights.items() if name.startswith(inside)}


def rename_weight_norm(weights: dict) -> dict:
    """From `weight_g` and `weight_v` to the names that `torch.nn.utils.parametrizations.weight_norm` gives."""
    return {
        name.replace(".weight_g", ".parametrizations.weight.original0").replace(
            ".weight_v", ".parametrizations.weight.original1"
        ): tensor
        for name, tensor in weights.items()
    }


def fuse_weight_norm(weights: dict) -> dict:
    """Plain weights, by PyTorch's own weight norm."""
    fused = {name: tensor for name, tensor in weights.items() if not name.endswith((".weight_g", ".weight_v"))}
    for name in weights:
        if name.endswith(".weight_v"):
            magnitude = weights[name.replace("weight_v", "weight_g")]
            fused[name.replace("weight_v", "weight")] = torch._weight_norm(weights[name], magnitude, 0)
    return fused


# --------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", ["codec_tiny", "codec_proj"])
def test_codec_at_the_root(golden, convert, device, name):
    assert_golden(convert(dict(golden(name).weights), golden(name).spec["config"]), golden, device, name)


@pytest.mark.parametrize("prefix", ["flexicodec_model.", "dualcodec_model."])
def test_codec_under_a_prefix(weights, golden, convert, device, prefix):
    tensors = {prefix + name: tensor for name, tensor in weights.items()}
    tensors |= {"transformer_lm.llm.weight": torch.zeros(2, 2), "repa_projection.0.bias": torch.zeros(2)}
    assert_golden(convert(tensors), golden, device)
    tensors[f"{prefix}stray.weight"] = torch.zeros(1)
    tensors["stray"] = torch.zeros(1)  # at the root of the file, where nothing of the codec is
    with pytest.raises(CheckpointError, match=rf"Unknown \(2\): {prefix}stray\.weight, stray\. "):
        convert(tensors)


@pytest.mark.parametrize("kind", ["artts", "nartts"])
def test_codec_inside_tts_files(golden, convert, device, kind):
    fixture = golden("tts")
    tensors = {
        name: tensor for name, tensor in fixture.weights.items() if name.startswith((f"{kind}/", "artts/flexi"))
    }
    directory = convert(
        {name.partition("/")[2]: tensor for name, tensor in tensors.items()}, fixture.spec["codec_config"]
    )
    assert {name.split(".")[0] for name in load_file(directory / "model.safetensors")}.isdisjoint(
        {"transformer_lm", "voicebox_model", "repa_projection"}
    )
    model = load_strictly(directory).eval().to(device)
    assert model.config.semantic_quantization_levels == [4, 4, 4]
    inputs = AutoFeatureExtractor.from_pretrained(directory)(
        fixture["in/ref_wave"][0].numpy(), sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        encoded = model.encode(**{name: tensor.to(device) for name, tensor in inputs.items()}, num_quantizers=1)
    assert torch.equal(encoded.audio_codes[:, 0].cpu(), fixture["ar/prompt_speech_token"].long())
    assert torch.equal(encoded.token_lengths.cpu(), fixture["ar/prompt_token_lengths"].long())


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files(weights, golden, convert, device, tmp_path, wrapper, zipped):
    tensors = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}
    content = tensors if wrapper is None else {wrapper: tensors, "epoch": 3}
    torch.save(content, tmp_path / "source.pt", _use_new_zipfile_serialization=zipped)
    assert_golden(convert(tmp_path / "source.pt"), golden, device)


@pytest.mark.parametrize("change", [rename_weight_norm, fuse_weight_norm])
def test_weight_norm_namings(weights, golden, convert, device, change):
    tensors = change(weights)
    assert tensors.keys() != weights.keys()
    assert_golden(convert(tensors), golden, device)


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_semantic_encoder_in_its_own_file(weights, golden, convert, device, tmp_path, wrapper):
    codec, semantic = split_semantic(weights)
    assert {name.split(".")[0] for name in semantic} == {"encoder", "embed", "ctc"}
    assert any(name.startswith("encoder.tp_encoders.") for name in semantic)
    torch.save(semantic if wrapper is None else {wrapper: semantic}, tmp_path / "model.pt")
    directory = convert(codec, semantic=tmp_path / "model.pt")
    assert_golden(directory, golden, device)
    names = load_file(directory / "model.safetensors")
    assert not [name for name in names if "ctc" in name or "tp_" in name]
    assert load_strictly(directory).config.semantic_model_config.num_timestamp_prediction_layers == 0


def test_semantic_file_fills_only_what_a_codec_lacks(weights, convert, tmp_path):
    codec, semantic = split_semantic(weights)
    save_file({name: tensor + 1 for name, tensor in semantic.items()}, tmp_path / "semantic.safetensors")
    own = load_file(convert(weights) / "model.safetensors")
    kept = load_file(convert(weights, semantic=tmp_path / "semantic.safetensors") / "model.safetensors")
    assert all(torch.equal(own[name], kept[name]) for name in own)
    filled = load_file(convert(codec, semantic=tmp_path / "semantic.safetensors") / "model.safetensors")
    changed = {name for name in own if not torch.equal(own[name], filled[name])}
    assert changed == {name for name in own if name.startswith("semantic_encoder.") or "query_embedding.w" in name}


def test_semantic_encoder_is_nowhere(weights, convert):
    codec, _ = split_semantic(weights)
    with pytest.raises(CheckpointError, match=r"does not hold the semantic encoder.*model.pt.*`semantic`"):
        convert(codec)


# ---------------------------------------------------------------------------------------------------- configuration


def training_config(options: dict) -> dict:
    """What `FlexiCodecConfig` of the authors' training code writes for a codec (some of its 90 fields)."""
    return options | {
        "model_type": "flexicodec",
        "architectures": ["FlexiCodec"],
        "transformers_version": "4.51.3",
        "agg_add_query_embedding": True,
        "add_semantic_spec_loss": False,
        "bypass_quantize_rate": 0.25,
        "flex_framerate": False,
        "flow_matching_mel_dim": 128,
        "use_bsq_for_semantic_vq": False,
        "use_flow_matching_decoder": False,
        "use_fsq_for_semantic_vq": True,
        "mimo_config": None,
    }


def test_checkpoint_of_the_training_code(weights, golden, options, device, tmp_path):
    source = tmp_path / "trained"
    source.mkdir()
    save_file(weights | {"repa_mlp.0.weight": torch.zeros(2, 2)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(training_config(options)))
    for loader in (AutoModel, FlexiCodecModel, FlexiCodecConfig):
        with pytest.raises(ValueError, match=r"authors' training code.*flexicodec-hf convert --codec"):
            loader.from_pretrained(source)
    convert_codec(source / "model.safetensors", tmp_path / "converted", source / "config.json")
    assert_golden(tmp_path / "converted", golden, device)
    assert FlexiCodecConfig.from_pretrained(tmp_path / "converted").quantizer_bypass_rate == 0.25


def test_yaml_of_the_training_code(weights, golden, convert, options, device):
    settings = {"config": training_config(options), "model": {"_target_": "FlexiCodec", "config": "${..config}"}}
    directory = convert(weights, settings)
    assert_golden(directory, golden, device)
    assert FlexiCodecConfig.from_pretrained(directory).quantizer_bypass_rate == 0.25


@pytest.mark.parametrize("variant", [{"use_flow_matching_decoder": True}, {"override_dac_encoder": "mimi"}], ids=str)
def test_variants_of_the_training_code_are_refused(weights, convert, options, variant):
    (name,) = variant
    with pytest.raises(CheckpointError, match=f"`config` says `{name}: .*; only `{name}: (False|None)`"):
        convert(weights, training_config(options) | variant)


def test_yaml_with_and_without_model(weights, golden, convert, options, device):
    assert_golden(convert(weights, {"model": options}), golden, device)


def test_without_yaml_sizes_come_from_the_tensors(weights, convert, codec_dir):
    found, expected = (load_strictly(path).config.to_dict() for path in (convert(weights, None), codec_dir()))
    # Tensors show no attention heads.
    heads = {"num_aggregator_attention_heads": 8, "num_bottleneck_attention_heads": 8}
    assert found == expected | heads | {"_name_or_path": found["_name_or_path"]}


def test_yaml_completes_what_tensors_do_not_show(weights, convert, options):
    options |= {
        "similarity_threshold": 1,
        "similarity_threshold_lower": 0,
        "similarity_threshold_upper": 1,
        "max_tokens_per_group": 5,
        "quantizer_dropout": True,
        "lambda_distill_loss": 3,
        "fsq_config": {"levels": [8, 8, 8, 5, 5]},
        "latent_dim": None,
    }
    config = load_strictly(convert(weights, options)).config
    assert (config.merging_threshold, config.merging_threshold_range) == (1.0, [0.0, 1.0])
    assert (config.max_frames_per_token, config.quantizer_dropout) == (5, 1.0)
    assert (config.distillation_loss_weight, config.semantic_quantization_levels) == (3.0, [8, 8, 8, 5, 5])
    assert (config.num_aggregator_attention_heads, config.num_bottleneck_attention_heads) == (4, 4)


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        ("encoder_dim", 8, "4"),
        ("encoder_rates", [4, 4, 5, 8], r"\[4, 4, 5, 8, 2\]"),
        ("decoder_dim", 1536, "64"),
        ("latent_dim", 512, "32"),
        ("n_codebooks", 24, "4"),
        ("codebook_size", 4096, "64"),
        ("convnext_layers", 4, "2"),
        ("transformer_num_layers", 32, "3"),
        ("agg_transformer_dim_feedforward", 2048, "64"),
        ("ssl_dim", 512, "32"),
    ],
)
def test_yaml_contradicts_the_tensors(weights, convert, options, option, value, found):
    options[option] = value
    with pytest.raises(CheckpointError, match=rf"`{option}: .*`; the tensors show {found} "):
        convert(weights, options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("is_causal", True),
        ("agg_transformer_causal", True),
        ("use_similarity_alignment", False),
        ("agg_use_mean_pooling_init", False),
        ("semantic_model_type", "w2v-bert"),
        ("sensevoice_semantic_layer_idx", [0, 5]),
    ],
)
def test_unsupported_variants(weights, convert, options, option, value):
    options[option] = value
    with pytest.raises(CheckpointError, match=rf"says `{option}: .*only `{option}: .*is supported"):
        convert(weights, options)


def test_unusable_yaml(weights, convert, options, tmp_path):
    for value in ("high", [0.9]):
        with pytest.raises(CheckpointError, match=r"(?s)do not agree: .*'merging_threshold'"):
            convert(weights, options | {"similarity_threshold": value})
    with pytest.raises(CheckpointError, match=r"(?s)do not agree: .*attention heads an even size"):
        convert(weights, options | {"transformer_num_heads": 5})
    with pytest.raises(CheckpointError, match=r"project_in.weight' .*does not make"):
        convert(weights, options | {"fsq_config": {"levels": [8, 8]}})
    source, config = tmp_path / "source.safetensors", tmp_path / "bad.yaml"
    for content, message in (
        (b"a: [1", "is not a YAML file"),
        (b"\xff\xfe\x00\x01\x02", "is not a YAML file"),
        (b"- 1\n- 2", "must hold a mapping of names of settings to values"),
        (b"", "must hold a mapping of names of settings to values"),
        (b"model: 3", "must hold a mapping of names of settings to values"),
        (b"!!python/object/apply:os.mkdir [owned]", "is not a YAML file"),
    ):
        config.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            convert_codec(source, tmp_path / "converted", config)
    with pytest.raises(FileNotFoundError, match=r"missing.yaml"):
        convert_codec(source, tmp_path / "converted", tmp_path / "missing.yaml")
    assert not (tmp_path / "converted").exists() and not Path("owned").exists()


def test_released_sizes_give_the_default_configuration():
    """Names and shapes of the released file, from the default model on no device."""
    config, shapes = FlexiCodecConfig(), {}
    with torch.device("meta"):
        model = FlexiCodecModel(config)
    for name, tensor in model.state_dict().items():
        (source_name,) = CODEC.source_names(name, config)
        packed = 3 if any(f".{part}_proj." in name for part in "qkv") else 1
        shapes[source_name] = (packed * tensor.shape[0], *tensor.shape[1:])
    # The released names of some tensors, spelt out.
    assert shapes["bottleneck_transformer.transformer.layers.31.self_attn.in_proj_weight"] == (1536, 512)
    assert shapes["semantic_model.encoder.encoders.48.self_attn.linear_q_k_v.weight"] == (1536, 512)
    assert shapes["dac.encoder.block.5.block.4.weight"] == (1024, 512, 4)
    assert shapes["dac.quantizer.quantizers.23.codebook.weight"] == (4096, 8)

    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert infer_config(SourceCheckpoint("released", tensors), CODEC).to_dict() == config.to_dict()


# ------------------------------------------------------------------------------------------- missing, unknown, wrong


def test_missing_and_unknown_tensors(weights, golden, convert):
    missing = [
        "bottleneck_transformer.transformer.layers.1.self_attn.in_proj_weight",
        "semantic_vq.fsq.project_out.bias",
    ]
    semantic = "semantic_model.encoder.encoders.0.norm1.weight"
    for name in (*missing, semantic):
        del weights[name]
    # Half a weight norm is a missing weight and an unknown half.
    del weights["convnext_decoder.2.weight_g"]
    weights |= {"semantic_model.stray": torch.zeros(1), "another.stray": torch.zeros(1)}
    listed = sorted([*missing, semantic, "convnext_decoder.2.weight"])
    with pytest.raises(CheckpointError) as raised:
        convert(weights)
    message = str(raised.value)
    assert f"Missing (4): {', '.join(listed)}." in message
    assert "Unknown (3): another.stray, convnext_decoder.2.weight_v, semantic_model.stray." in message
    assert "Pass `allow_partial=True`" in message

    directory = convert(weights, allow_partial=True)
    model, loading = AutoModel.from_pretrained(directory, output_loading_info=True)
    assert loading["missing_keys"] == {
        *(f"bottleneck.layers.1.self_attn.{part}_proj.weight" for part in "qkv"),
        "semantic_quantizer.fsq.project_out.bias",
        "semantic_quantizer.out_proj.weight",
        "semantic_encoder.layers.1.input_layernorm.weight",
    }
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    # What is missing is initialized, the rest is the reference's.
    assert model.semantic_encoder.layers[1].input_layernorm.weight.eq(1).all()
    assert model.semantic_quantizer.out_proj.weight.std() > 0
    expected = golden("codec_tiny").weights["semantic_vq.fsq.project_out.weight"]
    assert torch.equal(model.semantic_quantizer.fsq.project_out.weight, expected)


def test_tensors_that_show_sizes_cannot_be_missing(weights, convert):
    name = "convnext_encoder.1.pwconv1.weight"
    del weights[name]
    with pytest.raises(CheckpointError, match=f"has no tensor '{name}'"):
        convert(weights, allow_partial=True)


@pytest.mark.parametrize("name", ["dac.decoder.model.0.bias", "semantic_aggregator.query_embedding"])
def test_files_of_something_else(weights, convert, name):
    del weights[name]
    with pytest.raises(CheckpointError, match=f"holds no codec|it is not a FlexiCodec.*|{name}"):
        convert(weights, allow_partial=True)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bottleneck_transformer.transformer.layers.1.self_attn.in_proj_weight", (90, 32)),
        ("bottleneck_transformer.transformer.layers.1.self_attn.in_proj_weight", (32, 96)),
        ("semantic_model.encoder.encoders.0.self_attn.linear_q_k_v.bias", (95,)),
        ("acoustic_aggregator.query_embedding", (1, 1, 16)),
        ("dac.encoder.block.1.block.3.alpha", (1, 5, 1)),
    ],
)
def test_wrong_shapes(weights, convert, name, shape):
    weights[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=rf"has '{name}' \({shape[0]}, ?.*, which does not make"):
        convert(weights)


# ---------------------------------------------------------------------------------------------------- damaged files


def test_damaged_safetensors(weights, tmp_path):
    path = tmp_path / "source.safetensors"
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint file .*source.safetensors"):
        convert_codec(path, tmp_path / "converted")
    save_file(weights, path)
    content = path.read_bytes()
    for damaged in (
        content[:-1],
        content[:1000],
        content[:4],
        b"",
        b"\xff" * 8 + content[8:],
        content[:8] + b"{" * 99,
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"source.safetensors is not a complete safetensors file"):
            convert_codec(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_damaged_pytorch_files(weights, tmp_path):
    path = tmp_path / "source.pt"
    torch.save(weights, path)
    content = path.read_bytes()
    for damaged in (content[:-1000], content[: len(content) // 2], b"", b"not a checkpoint", b"PK\x03\x04"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"source.pt cannot be read as a PyTorch file"):
            convert_codec(path, tmp_path / "converted")
    for value in ([1, 2], torch.zeros(2), {"model": {"name": "no tensor"}}, {0: torch.zeros(2)}):
        torch.save(value, path)
        with pytest.raises(CheckpointError, match="does not hold a mapping of names to tensors"):
            convert_codec(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_unexecuted(weights, tmp_path, zipped):
    path, traces = tmp_path / "source.pt", tmp_path / "traces"
    torch.save(weights | {"payload": Malicious(traces)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="Only files that hold plain tensors are accepted"):
        convert_codec(path, tmp_path / "converted")
    assert not traces.exists() and not (tmp_path / "converted").exists()
    torch.load(path, weights_only=False)  # the file is as bad as it should be
    assert traces.exists()


# ------------------------------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(weights, codec_dir, convert, device, dtype):
    directory = convert(weights, dtype=dtype)
    stored = load_file(directory / "model.safetensors")
    expected = load_file(codec_dir() / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].to(dtype)) for name, tensor in stored.items())
    assert json.loads((directory / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    model = load_strictly(directory).eval().to(device)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        audio = model.decode(torch.zeros(1, 5, 3, dtype=torch.long, device=device)).audio_values
    assert audio.isfinite().all()
    assert {p.dtype for p in load_strictly(directory, dtype=torch.float32).parameters()} == {torch.float32}


def test_half_precision_source(weights, convert):
    """A half-precision file is used as the reference uses it: cast to float32 first, weight norm fused then."""
    half = {name: tensor.half() for name, tensor in weights.items()}
    stored = load_file(convert(half) / "model.safetensors")
    expected = load_file(convert({name: tensor.float() for name, tensor in half.items()}) / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())


# ------------------------------------------------------------------------------------------------ what gets written


def test_feature_extractor(golden, codec_dir):
    shift, scale = golden("fbank")["cmvn"]
    content = json.loads((codec_dir() / "preprocessor_config.json").read_text())
    assert len(content["cmvn_shift"]) == len(content["cmvn_scale"]) == 560
    assert torch.equal(torch.tensor(content["cmvn_shift"]), shift)
    assert torch.equal(torch.tensor(content["cmvn_scale"]), scale)
    extractor = AutoFeatureExtractor.from_pretrained(codec_dir())
    assert type(extractor).__name__ == "FlexiCodecFeatureExtractor"
    assert (extractor.cmvn_shift, extractor.cmvn_scale) == (content["cmvn_shift"], content["cmvn_scale"])


def test_files_of_a_repository(weights, convert):
    directory = convert(weights)
    names = {path.name for path in directory.iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".py"}
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_of_the_repository_can_be_the_source(weights, convert, golden, device, tmp_path):
    source = tmp_path / "converted" / "model.safetensors"
    source.parent.mkdir()
    save_file(weights, source)
    save_file({"kept": torch.zeros(1)}, source.with_name("other.safetensors"))
    assert_golden(convert(source), golden, device)
    assert source.with_name("other.safetensors").exists()


def test_an_interrupted_conversion_leaves_nothing(weights, convert, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flexicodec_hf.feature_extraction_flexicodec.FlexiCodecFeatureExtractor.save_pretrained", fail)
        with pytest.raises(KeyboardInterrupt):
            convert(weights)
    assert not (tmp_path / "converted").exists()
    directory = convert(weights)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("flexicodec_hf.feature_extraction_flexicodec.FlexiCodecFeatureExtractor.save_pretrained", fail)
        with pytest.raises(KeyboardInterrupt):
            convert(weights, dtype=torch.bfloat16)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")
@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("writing", {"config.json": "old", "model.safetensors": "old"}),
        ("moving", {"config.json": "new"}),
        ("never", {"config.json": "new", "model.safetensors": "new"}),
    ],
)
def test_a_killed_conversion_leaves_no_weights_of_another_model(tmp_path, monkeypatch, moment, expected):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("old")

    def replace(file: Path, target: Path) -> None:
        if moment == "moving" and file.suffix == ".safetensors":
            os._exit(9)
        os.replace(file, target)

    monkeypatch.setattr(Path, "replace", replace)
    if (child := os.fork()) == 0:
        with atomic_directory(tmp_path) as folder:
            for name in ("model.safetensors", "config.json"):
                (folder / name).write_text("new")
            if moment == "writing":
                os._exit(9)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if moment == "never" else 9)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == expected


def test_output_directory_is_a_file(weights, convert, tmp_path):
    (tmp_path / "converted").write_text("a file")
    with pytest.raises(FileExistsError):
        convert(weights)
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "converted"):
        pass
