"""The released codec files as a repository of `FlexiCodecModel` and `FlexiCodecFeatureExtractor`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from tqdm import tqdm

from ..configuration_flexicodec import FlexiCodecConfig
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from .checkpoint import TTS_CODEC_PREFIXES, CheckpointError, SourceCheckpoint, written_whole


CODEC_PREFIXES = (*TTS_CODEC_PREFIXES, "")
"""Where a released file keeps the codec: under a prefix in the TTS files, at the root in the codec's own."""

# The codec's YAML names a size; the tensors show it too, unless it is in the second table.
YAML_NAMES = {
    "encoder_dim": "encoder_hidden_size",
    "encoder_rates": "downsampling_ratios",
    "decoder_dim": "decoder_hidden_size",
    "decoder_rates": "upsampling_ratios",
    "latent_dim": "hidden_size",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
    "convnext_dim": "convnext_hidden_size",
    "convnext_layers": "num_convnext_layers",
    "transformer_num_layers": "num_bottleneck_layers",
    "transformer_dim": "bottleneck_hidden_size",
    "transformer_dim_feedforward": "bottleneck_intermediate_size",
    "agg_transformer_num_layers": "num_aggregator_layers",
    "agg_transformer_dim": "aggregator_hidden_size",
    "agg_transformer_dim_feedforward": "aggregator_intermediate_size",
}
YAML_ONLY_NAMES = {
    "sample_rate": "sampling_rate",
    "semantic_downsample_factor": "semantic_downsampling_factor",
    "similarity_threshold": "merging_threshold",
    "max_tokens_per_group": "max_frames_per_token",
    "quantizer_dropout": "quantizer_dropout",
    "transformer_num_heads": "num_bottleneck_attention_heads",
    "agg_transformer_num_heads": "num_aggregator_attention_heads",
    "lambda_distill_loss": "distillation_loss_weight",
}
# Variants that no released file uses, and that our model does not have.
REQUIRED_OPTIONS: dict[str, Any] = {
    "is_causal": False,
    "transformer_causal": False,
    "agg_transformer_causal": False,
    "use_similarity_alignment": True,
    "use_bottleneck_transformer": True,
    "use_query_token_aggregator": True,
    "agg_use_mean_pooling_init": True,
    "decode_semantic_for_codec": True,
    "sensevoice_prepend_inputs": True,
    "semantic_model_type": "sensevoice",
    "sensevoice_semantic_layer_idx": None,
}
# Known tensors that the codec never uses: blocks and heads of the recogniser that the encoder was, and statistics of
# other semantic encoders.
UNUSED = re.compile(r"semantic_(mean|std)|(semantic_model\.)?(encoder\.tp_(encoders|norm)|ctc)\..*")


def convert_codec(
    source: str | Path,
    output_dir: str | Path,
    codec_config: str | Path | None = None,
    semantic: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
) -> FlexiCodecConfig:
    """
    Convert a released codec, alone or inside a TTS file, to a directory that `AutoModel.from_pretrained` and
    `AutoFeatureExtractor.from_pretrained` load.

    Tensors are read, converted and cast one by one: the peak of memory is one copy of the converted model. The files are
    put in their place when all are written: an interrupted conversion leaves no weights there.

    Args:
        source: `.safetensors` or `.pt` file with the codec at its root, or under `flexicodec_model.` or `dualcodec_model.`.
        output_dir: Directory to write; made when missing.
        codec_config: The codec's YAML, with or without the top-level `model:`. Sizes come from the tensors; what the YAML
            says of them is checked. What tensors do not show (attention heads, quantization levels, thresholds) is as in
            the released codec where the YAML does not say.
        semantic: SenseVoice-small's `model.pt`, for codec files without the semantic encoder.
        dtype: Type to store the weights in.
        allow_partial: Convert in spite of unknown tensors (left out) and missing ones (freshly initialised on loading).
            Those that show the sizes of the model must be there, but for the transformers: a codec of a fixed rate has
            none, and becomes the start for training one of a dynamic rate. Their sizes are then the YAML's or the
            released ones.

    Returns:
        The configuration that was written.

    Raises:
        FileNotFoundError: A source file is missing.
        CheckpointError: A file is corrupt, holds another variant of the codec, contradicts the YAML, or has unknown or
            missing tensors.
    """
    codec, semantic_source = _open_sources(Path(source), semantic)
    config = infer_config(codec, semantic_source, _read_yaml(codec_config), allow_partial)

    with torch.device("meta"):
        model = FlexiCodecModel(config).to(dtype)
    targets = model.state_dict()
    modules = _module_names(config)
    tensors: dict[str, Tensor] = {}
    missing: list[str] = []
    for name, target in tqdm(targets.items(), desc="Converting the codec", unit="tensor", leave=False):
        checkpoint = (
            semantic_source if name.startswith("semantic_encoder.") or "query_embedding.weight" in name else codec
        )
        source_name = _source_name(name, modules)
        if source_name not in checkpoint:
            missing.append(checkpoint.prefix + source_name)
            continue
        try:
            tensor = _to_target(name, checkpoint.read(source_name), config)
            fits = tensor.shape == target.shape
        except RuntimeError:  # a projection that does not divide into heads
            fits = False
        if not fits:
            raise CheckpointError(
                f"'{checkpoint.prefix}{source_name}' of {checkpoint.path} has the shape {checkpoint.shape(source_name)}, "
                f"which does not make a `{name}` of shape {tuple(target.shape)}."
            )
        tensors[name] = tensor.to(dtype).contiguous()

    unknown = _unknown(codec, semantic_source)
    if (missing or unknown) and not allow_partial:
        raise CheckpointError(_account(codec.path, missing, unknown))

    with written_whole(output_dir) as folder:
        model.save_pretrained(folder, state_dict=tensors)
        released_feature_extractor().save_pretrained(folder)
    return config


def released_feature_extractor() -> FlexiCodecFeatureExtractor:
    """The feature extractor of the released codec, with SenseVoice's mean and variance normalisation."""
    cmvn = json.loads(Path(__file__).with_name("cmvn.json").read_text())
    extractor = FlexiCodecFeatureExtractor()
    # Kaldi's `am.mvn` repeats the 80 numbers for each of the stacked frames.
    repeats = extractor.num_stacked_frames
    return FlexiCodecFeatureExtractor(cmvn_shift=cmvn["shift"] * repeats, cmvn_scale=cmvn["scale"] * repeats)


def infer_config(
    codec: SourceCheckpoint,
    semantic: SourceCheckpoint,
    options: Mapping[str, Any] | None = None,
    allow_partial: bool = False,
) -> FlexiCodecConfig:
    """The configuration that the shapes of the tensors imply, completed by and checked against the YAML's `options`."""
    options = dict(options or {})
    for name, required in REQUIRED_OPTIONS.items():
        if name in options and options[name] != required:
            raise CheckpointError(
                f"The codec's YAML asks for `{name}: {options[name]}`; only `{name}: {required}`, as in the released files, "
                "is supported."
            )
    if options.get("max_tokens_per_group", 8) is None:
        raise CheckpointError(
            "The codec's YAML has no `max_tokens_per_group`; a limit, as in the released files, is needed."
        )
    fixed_rate = not any(re.match(r"(semantic_aggregator|bottleneck_transformer)\.", name) for name in codec)
    if "semantic_aggregator.query_embedding" not in codec and not (fixed_rate and allow_partial):
        raise CheckpointError(
            f"{codec.path} has no query token aggregator ('{codec.prefix}semantic_aggregator.query_embedding'): it is not "
            "a FlexiCodec with a dynamic frame rate. Pass `--allow-partial` to make it the start for training one."
        )

    def count(pattern: str, checkpoint: SourceCheckpoint = codec) -> int:
        return len({match.group(1) for name in checkpoint if (match := re.match(pattern, name))})

    def width(name: str) -> int:
        """Width of a transformer, from its first norm."""
        return codec.shape(f"{name}.transformer.layers.0.norm1.weight")[0]

    down = [
        codec.shape(f"dac.encoder.block.{i + 1}.block.4.weight")[2] // 2
        for i in range(count(r"dac\.encoder\.block\.(\d+)\.block\.4\."))
    ]
    up = [
        codec.shape(f"dac.decoder.model.{i + 1}.block.1.weight")[2] // 2
        for i in range(count(r"dac\.decoder\.model\.(\d+)\.block\.1\."))
    ]
    num_acoustic = count(r"dac\.quantizer\.quantizers\.(\d+)\.codebook\.")
    codebook = codec.shape("dac.quantizer.quantizers.0.codebook.weight") if num_acoustic else (4096, 8)
    num_levels = codec.shape("semantic_vq.fsq.project_in.weight")[0]
    levels = (options.get("fsq_config") or {}).get("levels", [8] * num_levels)
    bottleneck, aggregator = "bottleneck_transformer", "semantic_aggregator.transformer"
    sizes: dict[str, Any] = {
        "hidden_size": codec.shape("dac.decoder.model.0.weight")[1],
        "encoder_hidden_size": codec.shape("dac.encoder.block.0.weight")[0],
        "downsampling_ratios": down,
        "decoder_hidden_size": codec.shape("dac.decoder.model.0.weight")[0],
        "upsampling_ratios": up,
        "convnext_hidden_size": codec.shape("convnext_encoder.0.weight")[0],
        "convnext_intermediate_size": codec.shape("convnext_encoder.1.pwconv1.weight")[0],
        "num_convnext_layers": count(r"convnext_encoder\.(\d+)\.dwconv"),
        "semantic_quantization_levels": levels,
        "num_quantizers": num_acoustic + 1,
        "codebook_size": codebook[0],
        "codebook_dim": codebook[1],
    }
    if not fixed_rate:
        sizes |= {
            "aggregator_hidden_size": width(aggregator),
            "aggregator_intermediate_size": codec.shape(f"{aggregator}.transformer.layers.0.linear1.weight")[0],
            "num_aggregator_layers": count(r"semantic_aggregator\.transformer\.transformer\.layers\.(\d+)\."),
            "bottleneck_hidden_size": width(bottleneck),
            "bottleneck_intermediate_size": codec.shape(f"{bottleneck}.transformer.layers.0.linear1.weight")[0],
            "num_bottleneck_layers": count(r"bottleneck_transformer\.transformer\.layers\.(\d+)\."),
        }
    else:
        sizes |= {
            ours: options[theirs] for theirs, ours in YAML_NAMES.items() if ours not in sizes and theirs in options
        }
    rest: dict[str, Any] = {}
    for theirs, ours in YAML_ONLY_NAMES.items():
        if (value := options.get(theirs)) is not None:
            rest[ours] = _as_float(value) if isinstance(getattr(FlexiCodecConfig, ours), float) else value
    bounds = [options.get("similarity_threshold_lower"), options.get("similarity_threshold_upper")]
    if None not in bounds:
        rest["merging_threshold_range"] = [_as_float(bound) for bound in bounds]
    query_embedding = semantic.shape("embed.weight")
    fsmn = semantic.shape("encoder.encoders0.0.self_attn.fsmn_block.weight")
    semantic_config = {
        "model_type": "fun_asr_nano_encoder",
        "hidden_size": fsmn[0],
        "intermediate_size": semantic.shape("encoder.encoders0.0.feed_forward.w_1.weight")[0],
        "num_hidden_layers": 1 + count(r"encoder\.encoders\.(\d+)\.", semantic),
        "num_mel_bins": query_embedding[1] // 7,
        "fsmn_kernel_size": fsmn[2],
    }
    shown = {theirs: sizes[ours] for theirs, ours in YAML_NAMES.items() if ours in sizes}
    shown |= {"n_codebooks": num_acoustic, "ssl_dim": fsmn[0]}
    for name, found in shown.items():
        if options.get(name) not in (None, found):
            raise CheckpointError(f"The codec's YAML says `{name}: {options[name]}`; the tensors show {found}.")
    try:
        return FlexiCodecConfig(
            semantic_model_config=semantic_config, num_semantic_queries=query_embedding[0], **sizes, **rest
        )
    except StrictDataclassError as error:
        raise CheckpointError(f"The codec's YAML and the tensors of {codec.path} do not agree: {error}") from error


def _as_float(value: Any) -> Any:
    """A YAML may say 1 where 1.0 is meant, or `true` for a share of all."""
    return float(value) if isinstance(value, int) else value


def _open_sources(path: Path, semantic: str | Path | None) -> tuple[SourceCheckpoint, SourceCheckpoint]:
    whole = SourceCheckpoint(path)
    for prefix in CODEC_PREFIXES:
        codec = whole.view(prefix)
        if "dac.decoder.model.0.bias" in codec:
            break
    else:
        raise CheckpointError(
            f"{path} holds no codec: there is no 'dac.decoder.model.0.bias' at its root or under "
            f"'{TTS_CODEC_PREFIXES[0]}' or '{TTS_CODEC_PREFIXES[1]}'."
        )
    inside = codec.view("semantic_model.")
    if semantic is not None:
        return codec, SourceCheckpoint(semantic)
    if len(inside) == 0:
        raise CheckpointError(
            f"{path} does not hold the semantic encoder. Pass the file `model.pt` of FunAudioLLM/SenseVoiceSmall with "
            "`--semantic`."
        )
    return codec, inside


def _read_yaml(path: str | Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a YAML file: {error}") from error
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not the YAML of a codec: a mapping of option names to values is expected.")
    return content


def _module_names(config: FlexiCodecConfig) -> dict[str, str]:
    """What each of our modules with parameters is called in the released files."""
    names = {
        "acoustic_encoder.conv1": "dac.encoder.block.0",
        "acoustic_decoder.conv1": "dac.decoder.model.0",
        "semantic_quantizer.in_proj": "convnext_encoder.0",
        "semantic_quantizer.out_proj": f"convnext_decoder.{config.num_convnext_layers}",
        "semantic_quantizer.fsq": "semantic_vq.fsq",
        "acoustic_quantizer": "dac.quantizer",
        "semantic_query_embedding": "embed",
    }
    for i in range(len(config.downsampling_ratios)):
        theirs = f"dac.encoder.block.{i + 1}.block"
        ours = f"acoustic_encoder.block.{i}"
        names |= {f"{ours}.res_unit{unit}": f"{theirs}.{unit - 1}.block" for unit in (1, 2, 3)}
        names |= {f"{ours}.snake1": f"{theirs}.3", f"{ours}.conv1": f"{theirs}.4"}
    last = len(config.downsampling_ratios)
    names |= {
        "acoustic_encoder.snake1": f"dac.encoder.block.{last + 1}",
        "acoustic_encoder.conv2": f"dac.encoder.block.{last + 2}",
    }
    for i in range(len(config.upsampling_ratios)):
        theirs = f"dac.decoder.model.{i + 1}.block"
        ours = f"acoustic_decoder.block.{i}"
        names |= {f"{ours}.res_unit{unit}": f"{theirs}.{unit + 1}.block" for unit in (1, 2, 3)}
        names |= {f"{ours}.snake1": f"{theirs}.0", f"{ours}.conv_t1": f"{theirs}.1"}
    last = len(config.upsampling_ratios)
    names |= {
        "acoustic_decoder.snake1": f"dac.decoder.model.{last + 1}",
        "acoustic_decoder.conv2": f"dac.decoder.model.{last + 2}",
    }
    for i in range(config.num_convnext_layers):
        names |= {
            f"semantic_quantizer.encoder.{i}": f"convnext_encoder.{i + 1}",
            f"semantic_quantizer.decoder.{i}": f"convnext_decoder.{i}",
        }
    for ours, theirs in (
        ("semantic_aggregator", "semantic_aggregator"),
        ("acoustic_aggregator", "acoustic_aggregator"),
        ("semantic_aggregator.transformer", "semantic_aggregator.transformer"),
        ("acoustic_aggregator.transformer", "acoustic_aggregator.transformer"),
        ("bottleneck", "bottleneck_transformer"),
    ):
        names |= {
            ours: theirs,
            f"{ours}.layers": f"{theirs}.transformer.layers",
            f"{ours}.output_proj": f"{theirs}.output_projs.0",
        }
    for i in range(config.semantic_model_config.num_hidden_layers):
        names[f"semantic_encoder.layers.{i}"] = "encoder.encoders0.0" if i == 0 else f"encoder.encoders.{i - 1}"
    names[f"semantic_encoder.layers.{i}.final_layernorm"] = "encoder.after_norm"
    return names


# Names inside the modules above.
INNER_NAMES = (
    (r"(res_unit\d)\.snake1\.", r"\1.0."),
    (r"(res_unit\d)\.conv1\.", r"\1.1."),
    (r"(res_unit\d)\.snake2\.", r"\1.2."),
    (r"(res_unit\d)\.conv2\.", r"\1.3."),
    (r"^(semantic_encoder\..*)\.self_attn\.[qkv]_proj\.", r"\1.self_attn.linear_q_k_v."),
    (r"^(semantic_encoder\..*)\.self_attn\.o_proj\.", r"\1.self_attn.linear_out."),
    (r"^(semantic_encoder\..*)\.self_attn\.fsmn\.conv\.", r"\1.self_attn.fsmn_block."),
    (r"^(semantic_encoder\..*)\.mlp\.fc(\d)\.", r"\1.feed_forward.w_\2."),
    (r"\.self_attn\.[qkv]_proj\.weight$", ".self_attn.in_proj_weight"),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"\.self_attn_layer_scale$", ".layer_scale_1.scale"),
    (r"\.mlp_layer_scale$", ".layer_scale_2.scale"),
    (r"\.fc(\d)\.", r".linear\1."),
    (r"\.input_layernorm\.", ".norm1."),
    (r"\.post_attention_layernorm\.", ".norm2."),
)


def _source_name(name: str, modules: Mapping[str, str]) -> str:
    inner = name
    for pattern, replacement in INNER_NAMES:
        inner = re.sub(pattern, replacement, inner)
    # The longest of our modules that contains the tensor.
    module = name
    while module not in modules:
        module = module.rpartition(".")[0]
    return modules[module] + inner.removeprefix(module)


def _to_target(name: str, tensor: Tensor, config: FlexiCodecConfig) -> Tensor:
    """The tensor in our layout."""
    if match := re.search(r"\.([qkv])_proj\.", name):
        tensor = tensor.chunk(3)["qkv".index(match.group(1))]
        if match.group(1) != "v" and not name.startswith("semantic_encoder."):
            bottleneck = name.startswith("bottleneck.")
            num_heads = config.num_bottleneck_attention_heads if bottleneck else config.num_aggregator_attention_heads
            tensor = _rotary_pairs_to_halves(tensor, num_heads)
    elif name.endswith("query_embedding"):
        tensor = tensor.flatten()
    elif re.search(r"(in_proj|out_proj)\.weight$", name) and tensor.ndim == 3:
        tensor = tensor.squeeze(-1)  # a convolution with kernel size 1
    return tensor


def _rotary_pairs_to_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a query or key projection from rotary pairs (0, 1), (2, 3).. to Llama's two halves."""
    return weight.view(num_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _unknown(codec: SourceCheckpoint, semantic: SourceCheckpoint) -> list[str]:
    """Full names of the tensors that conversion did not use and that are not known to be useless."""
    names = [name for name in codec.unused() if not name.removeprefix(codec.prefix).startswith("semantic_model.")]
    names = [name for name in names if not UNUSED.fullmatch(name.removeprefix(codec.prefix))]
    return names + [name for name in semantic.unused() if not UNUSED.fullmatch(name.removeprefix(semantic.prefix))]


def _account(path: Path, missing: list[str], unknown: list[str]) -> str:
    lines = [f"{path} does not hold exactly the tensors of a FlexiCodec."]
    for title, names in (("Missing", sorted(set(missing))), ("Unknown", unknown)):
        if names:
            lines.append(f"{title} ({len(names)}): {', '.join(names)}.")
    return " ".join([*lines, "Pass `--allow-partial` to convert in spite of that."])
