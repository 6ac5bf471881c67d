"""Conversion of the released autoregressive text-to-speech weights (`artts.safetensors`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration_flexicodec_ar import FlexiCodecARConfig, FlexiCodecARTextEncoderConfig
from ..modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration
from .checkpoint import TTS_CODEC_PREFIXES, CheckpointError, SourceCheckpoint, written_whole


logger = logging.getLogger(__name__)

PREFIX = "transformer_lm."
RELEASED_THRESHOLDS = (0.86, 0.91)

_MODULES = {
    "text_embedding": "model.text_encoder.embed_tokens",
    "text_encoder.after_norm": "model.text_encoder.transformer.norm",
    "text_encoder_affine_layer": "model.text_projection",
    "speech_embedding": "model.speech_embedding",
    "duration_embedding": "model.duration_embedding",
    "llm.after_norm": "model.decoder.norm",
    "llm_decoder": "lm_head",
    "duration_decoder": "duration_head",
}
_LAYER_MODULES = {
    "self_attn.linear_out": "self_attn.o_proj",
    "self_attn.linear_pos": "self_attn.relative_k_proj",
    "feed_forward.w_1": "fc1",
    "feed_forward.w_2": "fc2",
}
_STACKS = {
    "text_encoder.encoders": (
        "model.text_encoder.transformer.layers",
        {"norm_mha": "self_attn_norm", "norm_ff": "mlp_norm"},
    ),
    "llm.encoders": ("model.decoder.layers", {"norm1": "self_attn_norm", "norm2": "mlp_norm"}),
}
# The slot of a speaker vector, which no released model was trained with: its training refuses one.
_DROPPED = ("spk_embed_affine_layer.weight", "spk_embed_affine_layer.bias")

# The reference's keyword arguments that choose another computation, with the only values that ours has.
_FIXED_ARGUMENTS = {
    "use_duration_conditioning": True,
    "use_dialog_span": False,
    "flex_framerate": True,
    "duration_loss_type": "focal",
    "duration_class_weights": None,
    "length_normalized_loss": True,
    "text_encoder_normalize_before": True,
    "text_encoder_input_layer": "identity",
    "text_encoder_pos_enc_layer_type": "rel_pos_espnet",
    "text_encoder_selfattention_layer_type": "rel_selfattn",
    "text_encoder_use_cnn_module": False,
    "text_encoder_macaron_style": False,
    "text_encoder_use_dynamic_chunk": False,
    "text_encoder_use_dynamic_left_chunk": False,
    "text_encoder_static_chunk_size": 1,
    "llm_input_layer": "identity",
    "llm_pos_enc_layer_type": "rel_pos_espnet",
    "llm_selfattention_layer_type": "rel_selfattn",
    "llm_static_chunk_size": 1,
}
# Those that have no part in this model: of the dropped speaker slot, and of a loss other than the focal one.
_IGNORED_ARGUMENTS = ("spk_embed_dim", "duration_lsm_weight")


def convert_ar(
    source: str | Path,
    output_dir: str | Path,
    ar_config: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    allow_partial: bool = False,
) -> FlexiCodecARForConditionalGeneration:
    """
    Convert the `transformer_lm.` tensors of an `artts.safetensors`-style file to a directory for `from_pretrained`.

    Sizes are read off the tensors. The codec in the same file (`flexicodec_model.` or `dualcodec_model.`) is left to
    its own converter, and the untrained speaker projection is dropped.

    Args:
        source: The released file (`.safetensors`, or `.pt` read with `weights_only=True`).
        output_dir: Where to save the model.
        ar_config: The reference's own keyword arguments (`llm_num_blocks`, `flex_framerate_options`, ...). Sizes are
            checked against the tensors; the rest fills what tensors do not tell, with the released values as default.
        dtype: Type to save in; that of the file by default.
        allow_partial: Convert though tensors are unknown (they are left out) or missing (they are initialised
            afresh), with a warning that names them.

    Returns:
        The converted model.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: Tensors are unknown, missing or of another shape, or `ar_config` contradicts them.
    """
    whole = SourceCheckpoint(source)
    tensors = SourceCheckpoint(source, PREFIX)
    if not len(tensors):
        raise CheckpointError(f"{source} holds no tensor named '{PREFIX}...': it is not an AR text-to-speech model.")
    config = _infer_config(tensors, ar_config or {})
    state, missing = _read_state(tensors, config)
    unknown = tensors.unused() + [name for name in whole if not name.startswith((PREFIX, *TTS_CODEC_PREFIXES))]
    problems = [f"missing tensors: {', '.join(missing)}"] if missing else []
    problems += [f"unknown tensors: {', '.join(unknown)}"] if unknown else []
    if problems and not allow_partial:
        raise CheckpointError(f"{source}: {'; '.join(problems)}. Pass allow_partial=True to convert the rest.")
    for problem in problems:
        logger.warning("%s: %s", source, problem)

    dtype = dtype or state["model.speech_embedding.weight"].dtype
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    with torch.device("cpu" if missing else "meta"):
        model = FlexiCodecARForConditionalGeneration(config).to(dtype)
    _check_shapes(source, model, state)
    model.load_state_dict(state, strict=not missing, assign=True)
    model.config.dtype = dtype
    with written_whole(output_dir) as folder:
        model.eval().save_pretrained(folder)
    return model


def _read_state(tensors: SourceCheckpoint, config: FlexiCodecARConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Our state dict, and the full names of the source's tensors that it lacks."""
    state: dict[str, Tensor] = {}
    missing: list[str] = []

    def read(name: str) -> Tensor | None:
        if name in tensors:
            return tensors.read(name)
        missing.append(PREFIX + name)
        return None

    def move(source: str, target: str, *, bias: bool = True) -> None:
        for leaf in ("weight", "bias") if bias else ("weight",):
            if (tensor := read(f"{source}.{leaf}")) is not None:
                state[f"{target}.{leaf}"] = tensor

    for source, target in _MODULES.items():
        move(source, target, bias=not source.endswith("embedding"))
    for stack, (target_stack, norms) in _STACKS.items():
        layers = config if stack.startswith("llm") else config.text_encoder_config
        for index in range(layers.num_hidden_layers):
            layer, target_layer = f"{stack}.{index}", f"{target_stack}.{index}"
            for source, target in (_LAYER_MODULES | norms).items():
                move(f"{layer}.{source}", f"{target_layer}.{target}", bias=source != "self_attn.linear_pos")
            for leaf in ("weight", "bias"):
                found = [read(f"{layer}.self_attn.linear_{part}.{leaf}") for part in "qkv"]
                parts = [tensor for tensor in found if tensor is not None]
                if len(parts) == 3:
                    state[f"{target_layer}.self_attn.qkv_proj.{leaf}"] = torch.cat(parts)
            for source, target in (("pos_bias_u", "content_bias"), ("pos_bias_v", "position_bias")):
                if (tensor := read(f"{layer}.self_attn.{source}")) is not None:
                    state[f"{target_layer}.self_attn.{target}"] = tensor[:, None]

    control = read("llm_embedding.weight")
    weight, bias = (read(f"framerate_embed_affine_layer.{leaf}") for leaf in ("weight", "bias"))
    if control is not None and weight is not None and bias is not None:
        state["model.control_embedding.weight"] = _control_embedding(config, control, weight, bias)
    tensors.skip(*_DROPPED)
    return state, missing


def _control_embedding(config: FlexiCodecARConfig, control: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One row for each control id. The reference projects a one-hot of the threshold: that is a row for each."""
    table = control.new_zeros(config.text_token_offset - config.speech_vocab_size, control.shape[1])
    table[config.start_token_id - config.speech_vocab_size] = control[0]
    table[config.task_token_id - config.speech_vocab_size] = control[1]
    first = config.no_threshold_token_id + 1 - config.speech_vocab_size
    table[first:] = (weight.double().T + bias.double()).to(control.dtype)
    return table


def _infer_config(tensors: SourceCheckpoint, given: dict[str, Any]) -> FlexiCodecARConfig:
    text_vocab_size, text_width = tensors.shape("text_embedding.weight")
    speech_vocab_size, width = tensors.shape("speech_embedding.weight")
    text_first, first = "text_encoder.encoders.0", "llm.encoders.0"
    sizes = {
        "text_token_size": text_vocab_size,
        "text_encoder_input_size": text_width,
        "text_encoder_output_size": text_width,
        "text_encoder_linear_units": tensors.shape(f"{text_first}.feed_forward.w_1.weight")[0],
        "text_encoder_attention_heads": tensors.shape(f"{text_first}.self_attn.pos_bias_u")[0],
        "text_encoder_num_blocks": _count_layers(tensors, "text_encoder.encoders"),
        "speech_token_size": speech_vocab_size,
        "llm_input_size": width,
        "llm_output_size": width,
        "llm_linear_units": tensors.shape(f"{first}.feed_forward.w_1.weight")[0],
        "llm_attention_heads": tensors.shape(f"{first}.self_attn.pos_bias_u")[0],
        "llm_num_blocks": _count_layers(tensors, "llm.encoders"),
        "duration_classes": tensors.shape("duration_decoder.weight")[0],
    }
    free: dict[str, Any] = {
        "flex_framerate_options": RELEASED_THRESHOLDS,
        "lsm_weight": 0.0,
        "focal_alpha": 1.0,
        "focal_gamma": 2.0,
    }
    for stack in ("text_encoder", "llm"):
        free |= {f"{stack}_dropout_rate": 0.1, f"{stack}_attention_dropout_rate": 0.0}
        free[f"{stack}_positional_dropout_rate"] = given.get(f"{stack}_dropout_rate", 0.1)

    known = {*sizes, *free, *_FIXED_ARGUMENTS, *_IGNORED_ARGUMENTS}
    if unknown := sorted(set(given) - known):
        raise CheckpointError(f"ar_config has unknown keys {unknown}; known are {sorted(known)}.")
    expected = sizes | _FIXED_ARGUMENTS
    for name, value in given.items():
        if name in expected and value != expected[name]:
            reason = "the tensors say" if name in sizes else "this model only has"
            raise CheckpointError(f"ar_config: {name}={value!r}, but {reason} {expected[name]!r}.")
    values = free | {name: value for name, value in given.items() if name in free}
    for stack in ("text_encoder", "llm"):
        if values[f"{stack}_positional_dropout_rate"] != values[f"{stack}_dropout_rate"]:
            raise CheckpointError(
                f"ar_config: {stack}_positional_dropout_rate={values[f'{stack}_positional_dropout_rate']} must equal "
                f"{stack}_dropout_rate={values[f'{stack}_dropout_rate']}."
            )
    thresholds = list(values["flex_framerate_options"])
    columns = tensors.shape("framerate_embed_affine_layer.weight")[1]
    if columns != len(thresholds):
        raise CheckpointError(
            f"The file has {columns} merging thresholds, flex_framerate_options is {thresholds}: name them in "
            "ar_config."
        )
    return FlexiCodecARConfig(
        text_encoder_config=FlexiCodecARTextEncoderConfig(
            vocab_size=sizes["text_token_size"],
            hidden_size=sizes["text_encoder_input_size"],
            intermediate_size=sizes["text_encoder_linear_units"],
            num_hidden_layers=sizes["text_encoder_num_blocks"],
            num_attention_heads=sizes["text_encoder_attention_heads"],
            hidden_dropout=values["text_encoder_dropout_rate"],
            attention_dropout=values["text_encoder_attention_dropout_rate"],
        ),
        speech_vocab_size=sizes["speech_token_size"],
        num_durations=sizes["duration_classes"],
        merging_thresholds=thresholds,
        hidden_size=sizes["llm_input_size"],
        intermediate_size=sizes["llm_linear_units"],
        num_hidden_layers=sizes["llm_num_blocks"],
        num_attention_heads=sizes["llm_attention_heads"],
        hidden_dropout=values["llm_dropout_rate"],
        attention_dropout=values["llm_attention_dropout_rate"],
        label_smoothing=values["lsm_weight"],
        focal_alpha=values["focal_alpha"],
        focal_gamma=values["focal_gamma"],
    )


def _count_layers(tensors: SourceCheckpoint, stack: str) -> int:
    indices = [int(name.split(".")[2]) for name in tensors if name.startswith(f"{stack}.")]
    return max(indices, default=-1) + 1


def _check_shapes(source: str | Path, model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    expected = model.state_dict()
    wrong = [
        f"{name} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{source}: tensors of unexpected shapes (our names): {'; '.join(wrong)}.")


__all__ = ["convert_ar"]
