"""
A table for each released model: names of tensors, what is done to the tensors, and settings.

The names go from ours to the reference's, because a conversion asks for each of our tensors where it
comes from. `WeightRenaming` and `WeightConverter` of transformers do not serve: between 5.17 and 5.24
the same pattern renames different tensors, missing inputs are left out without an error, and reports
have our names, where users need those of their file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..configuration_flexicodec import FlexiCodecConfig
from ..configuration_flexicodec_ar import FlexiCodecARConfig
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration
from ..modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from ..modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from .checkpoint import CheckpointError, SourceCheckpoint


Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
Settings = dict[str, Any]

TTS_CODEC_PREFIXES = ("flexicodec_model.", "dualcodec_model.")
"""Where the text-to-speech files keep the codec that their model was trained with."""

TTS_PREFIXES = ("transformer_lm.", "voicebox_model.", "repa_projection.")
"""Where they keep their model."""

_TTS_CODEC = r"(flexicodec|dualcodec)_model\..*"


@dataclass(frozen=True)
class Table:
    """
    How a released model becomes ours.

    Args:
        model_class: Our class.
        renames: Patterns and replacements for `re.sub`, which turn our name of a tensor into the
            reference's, or into several, separated by spaces. They may depend on the configuration.
        operations: Pattern of our names, and what makes our tensor of the reference's:
            `operation(name, config, *tensors)`. All that match are applied in this order.
        settings: The reference's names of settings, and our fields of the configuration, with a dot
            for fields of a configuration inside.
        infer: From the source and the settings given (which it may complete) to the settings that
            the tensors show, by the reference's names, and to fields of our configuration for which
            the reference has no name.
        fixed: Settings that choose another computation, with the one value that our model has.
        ignored: Further settings, which do not change the model; None ignores all that are unknown.
        unused: Pattern of tensors that are known and not needed.
    """

    model_class: type[PreTrainedModel]
    renames: Renames | Callable[[Any], Renames]
    settings: Mapping[str, str]
    infer: Callable[[SourceCheckpoint, Settings], tuple[Settings, Settings]]
    operations: Sequence[tuple[str, Callable[..., Tensor]]] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] | None = ()
    unused: str = r"(?!)"

    def source_names(self, name: str, config: Any) -> list[str]:
        """The reference's names of the tensors that our tensor `name` is made of."""
        for pattern, replacement in self.renames(config) if callable(self.renames) else self.renames:
            name = re.sub(pattern, replacement, name)
        return name.split()

    def read(self, source: SourceCheckpoint, name: str, config: Any) -> Tensor:
        """
        Our tensor `name`, from the reference's.

        Raises:
            CheckpointError: The source lacks it.
            RuntimeError: Its shape does not allow the operation.
        """
        tensors = [source[theirs] for theirs in self.source_names(name, config)]
        for pattern, operation in self.operations:
            if re.search(pattern, name):
                tensors = [operation(name, config, *tensors)]
        (tensor,) = tensors
        return tensor


def _count(source: SourceCheckpoint, pattern: str) -> int:
    """Number of layers: one more than the highest number in names that begin with `pattern`."""
    return 1 + max((int(match[1]) for name in source.tensors if (match := re.match(pattern, name))), default=-1)


def _shifted(prefix: str, offset: int, suffix: str) -> Callable[[re.Match[str]], str]:
    """A replacement with the number of a layer moved by `offset`."""
    return lambda match: f"{prefix}{int(match[1]) + offset}{suffix}"


# ------------------------------------------------------------------------------------------------------------- codec


def _codec_renames(config: FlexiCodecConfig) -> Renames:
    num_down, num_up = len(config.downsampling_ratios), len(config.upsampling_ratios)
    last_semantic = config.semantic_model_config.num_hidden_layers - 1
    transformers = r"((?:semantic|acoustic)_aggregator\.transformer|bottleneck_transformer)"
    return (
        # semantic encoder
        (r"^semantic_query_embedding\.", "semantic_model.embed."),
        (rf"^semantic_encoder\.layers\.{last_semantic}\.final_layernorm\.", "semantic_model.encoder.after_norm."),
        (r"^semantic_encoder\.layers\.0\.", "semantic_model.encoder.encoders0.0."),
        (r"^semantic_encoder\.layers\.(\d+)\.", _shifted("semantic_model.encoder.encoders.", -1, ".")),
        (r"^(semantic_model\..*)\.[qkv]_proj\.", r"\1.linear_q_k_v."),
        (r"^(semantic_model\..*)\.o_proj\.", r"\1.linear_out."),
        (r"^(semantic_model\..*)\.fsmn\.conv\.", r"\1.fsmn_block."),
        (r"^(semantic_model\..*)\.mlp\.fc(\d)\.", r"\1.feed_forward.w_\2."),
        # transformers
        (r"^bottleneck\.", "bottleneck_transformer."),
        (rf"^{transformers}\.layers\.", r"\1.transformer.layers."),
        (rf"^{transformers}\.output_proj\.", r"\1.output_projs.0."),
        (r"\.self_attn\.[qkv]_proj\.weight$", ".self_attn.in_proj_weight"),
        (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
        (r"\.self_attn_layer_scale$", ".layer_scale_1.scale"),
        (r"\.mlp_layer_scale$", ".layer_scale_2.scale"),
        (r"\.fc(\d)\.", r".linear\1."),
        (r"\.input_layernorm\.", ".norm1."),
        (r"\.post_attention_layernorm\.", ".norm2."),
        # acoustic encoder and decoder, whose parts the reference numbers
        (r"(res_unit\d)\.snake1\.", r"\1.0."),
        (r"(res_unit\d)\.conv1\.", r"\1.1."),
        (r"(res_unit\d)\.snake2\.", r"\1.2."),
        (r"(res_unit\d)\.conv2\.", r"\1.3."),
        (r"^acoustic_encoder\.block\.(\d+)\.", _shifted("dac.encoder.block.", 1, ".block.")),
        (r"^(dac\.encoder\..*)res_unit(\d)\.", lambda match: f"{match[1]}{int(match[2]) - 1}.block."),
        (r"^(dac\.encoder\..*)snake1\.", r"\g<1>3."),
        (r"^(dac\.encoder\..*)conv1\.", r"\g<1>4."),
        (r"^acoustic_encoder\.conv1\.", "dac.encoder.block.0."),
        (r"^acoustic_encoder\.snake1\.", f"dac.encoder.block.{num_down + 1}."),
        (r"^acoustic_encoder\.conv2\.", f"dac.encoder.block.{num_down + 2}."),
        (r"^acoustic_decoder\.block\.(\d+)\.", _shifted("dac.decoder.model.", 1, ".block.")),
        (r"^(dac\.decoder\..*)res_unit(\d)\.", lambda match: f"{match[1]}{int(match[2]) + 1}.block."),
        (r"^(dac\.decoder\..*)snake1\.", r"\g<1>0."),
        (r"^(dac\.decoder\..*)conv_t1\.", r"\g<1>1."),
        (r"^acoustic_decoder\.conv1\.", "dac.decoder.model.0."),
        (r"^acoustic_decoder\.snake1\.", f"dac.decoder.model.{num_up + 1}."),
        (r"^acoustic_decoder\.conv2\.", f"dac.decoder.model.{num_up + 2}."),
        # quantizers
        (r"^acoustic_quantizer\.", "dac.quantizer."),
        (r"^semantic_quantizer\.fsq\.", "semantic_vq.fsq."),
        (r"^semantic_quantizer\.in_proj\.", "convnext_encoder.0."),
        (r"^semantic_quantizer\.encoder\.(\d+)\.", _shifted("convnext_encoder.", 1, ".")),
        (r"^semantic_quantizer\.decoder\.", "convnext_decoder."),
        (r"^semantic_quantizer\.out_proj\.", f"convnext_decoder.{config.num_convnext_layers}."),
    )


def _chunk_qkv(name: str, config: FlexiCodecConfig, packed: Tensor) -> Tensor:
    index = "qkv".index(name.rpartition("_proj.")[0][-1])
    return packed.chunk(3)[index]


def _rotary_pairs_to_halves(name: str, config: FlexiCodecConfig, weight: Tensor) -> Tensor:
    """Rows of a query or key projection, from rotary pairs (0, 1), (2, 3), ... to Llama's halves."""
    # The reference rotates pairs: flexicodec 0.1.2, model_blocks/mimi/module/rope.py, line 47.
    in_bottleneck = name.startswith("bottleneck.")
    num_heads = config.num_bottleneck_attention_heads if in_bottleneck else config.num_aggregator_attention_heads
    return weight.view(num_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _infer_codec(source: SourceCheckpoint, given: Settings) -> tuple[Settings, Settings]:
    if given.get("max_tokens_per_group", 8) is None:
        raise CheckpointError("`config` says `max_tokens_per_group: None`; a limit, such as 8, is needed.")
    fsq = given.get("fsq_config") or {}
    if not isinstance(fsq, Mapping):
        raise CheckpointError(f"`config` says `fsq_config: {fsq}`; it must hold settings, such as `levels`.")
    bounds = [given.get("similarity_threshold_lower"), given.get("similarity_threshold_upper")]

    num_down = _count(source, r"dac\.encoder\.block\.(\d+)\.block\.4\.")
    num_up = _count(source, r"dac\.decoder\.model\.(\d+)\.block\.1\.")
    num_acoustic = _count(source, r"dac\.quantizer\.quantizers\.(\d+)\.codebook\.")
    codebook = source.shape("dac.quantizer.quantizers.0.codebook.weight", 2) if num_acoustic else (4096, 8)
    fsmn = source.shape("semantic_model.encoder.encoders0.0.self_attn.fsmn_block.weight", 3)
    query_embedding = source.shape("semantic_model.embed.weight", 2)
    num_levels = source.shape("semantic_vq.fsq.project_in.weight", 2)[0]
    shown = {
        "encoder_dim": source.shape("dac.encoder.block.0.weight", 3)[0],
        "encoder_rates": [
            source.shape(f"dac.encoder.block.{i}.block.4.weight", 3)[2] // 2 for i in range(1, num_down)
        ],
        "decoder_dim": source.shape("dac.decoder.model.0.weight", 3)[0],
        "decoder_rates": [source.shape(f"dac.decoder.model.{i}.block.1.weight", 3)[2] // 2 for i in range(1, num_up)],
        "latent_dim": source.shape("dac.decoder.model.0.weight", 3)[1],
        "n_codebooks": num_acoustic,
        "codebook_size": codebook[0],
        "codebook_dim": codebook[1],
        "convnext_dim": source["convnext_encoder.0.weight"].shape[0],
        "convnext_layers": _count(source, r"convnext_decoder\.(\d+)\.dwconv\."),
        "ssl_dim": fsmn[0],
    }
    for prefix, stack in (
        ("transformer", "bottleneck_transformer.transformer.layers"),
        ("agg_transformer", "semantic_aggregator.transformer.transformer.layers"),
    ):
        if num_layers := _count(source, rf"{re.escape(stack)}\.(\d+)\."):  # a codec of a fixed rate has none
            shown[f"{prefix}_num_layers"] = num_layers
            shown[f"{prefix}_dim"] = source.shape(f"{stack}.0.norm1.weight", 1)[0]
            shown[f"{prefix}_dim_feedforward"] = source.shape(f"{stack}.0.linear1.weight", 2)[0]
    fields = {
        "num_quantizers": num_acoustic + 1,
        "convnext_intermediate_size": source.shape("convnext_encoder.1.pwconv1.weight", 2)[0],
        "semantic_quantization_levels": fsq.get("levels", [8] * num_levels),
        "num_semantic_queries": query_embedding[0],
        "semantic_model_config": {
            "model_type": "fun_asr_nano_encoder",
            "hidden_size": fsmn[0],
            "intermediate_size": source.shape("semantic_model.encoder.encoders0.0.feed_forward.w_1.weight", 2)[0],
            "num_hidden_layers": 1 + _count(source, r"semantic_model\.encoder\.encoders\.(\d+)\."),
            "num_mel_bins": query_embedding[1] // 7,
            "fsmn_kernel_size": fsmn[2],
        },
    }
    if None not in bounds:  # a YAML may say 1 where 1.0 is meant
        fields["merging_threshold_range"] = [bound * 1.0 if isinstance(bound, int) else bound for bound in bounds]
    return shown, fields


CODEC = Table(
    model_class=FlexiCodecModel,
    renames=_codec_renames,
    operations=(
        (r"\.[qkv]_proj\.", _chunk_qkv),
        (r"^(?!semantic_encoder\.).*\.[qk]_proj\.", _rotary_pairs_to_halves),
        (r"query_embedding$", lambda name, config, embedding: embedding.flatten()),
        # A convolution with kernel size 1 is a linear layer.
        (r"(in_proj|out_proj)\.weight$", lambda name, config, weight: weight.flatten(1)),
    ),
    settings={
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
        "transformer_num_heads": "num_bottleneck_attention_heads",
        "agg_transformer_num_layers": "num_aggregator_layers",
        "agg_transformer_dim": "aggregator_hidden_size",
        "agg_transformer_dim_feedforward": "aggregator_intermediate_size",
        "agg_transformer_num_heads": "num_aggregator_attention_heads",
        "sample_rate": "sampling_rate",
        "semantic_downsample_factor": "semantic_downsampling_factor",
        "similarity_threshold": "merging_threshold",
        "max_tokens_per_group": "max_frames_per_token",
        "quantizer_dropout": "quantizer_dropout",
        "bypass_quantize_rate": "quantizer_bypass_rate",
        "lambda_distill_loss": "distillation_loss_weight",
    },
    infer=_infer_codec,
    fixed={
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
        # further ones of the training code (flexicodec_training_share, taste_v2/configuration_flexicodec.py)
        "agg_add_query_embedding": True,
        "insert_query_before_downsample": False,
        "no_acoustic_aggregator": False,
        "override_dac_encoder": None,
        "override_vocos_decoder": None,
        "use_bsq_for_semantic_vq": False,
        "use_concat_downsampling": False,
        "use_conv_downsampling": False,
        "use_fixed_rate_aggregator": False,
        "use_flow_matching_decoder": False,
        "use_fsq_for_semantic_vq": True,
        "use_mimo_codec_encoder": False,
        "use_second_decoder_transformer": False,
    },
    ignored=None,  # there are settings of the training too
    # Blocks and heads of the recognizer that the semantic encoder was, statistics of other semantic encoders, and a
    # projection that the training code has for a loss.
    unused=r"semantic_(mean|std)|semantic_model\.(encoder\.tp_(encoders|norm)|ctc)\..*|repa_mlp\..*",
)


# ------------------------------------------------------------------------------------------------ autoregressive model


def _control_embedding(name: str, config: FlexiCodecARConfig, control: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One row for each control id; the reference projects a one-hot vector of the threshold."""
    # flexicodec 0.1.2, ar_tts/modeling_artts.py, line 325
    table = control.new_zeros(config.text_token_offset - config.speech_vocab_size, control.shape[1])
    table[config.start_token_id - config.speech_vocab_size] = control[0]
    table[config.task_token_id - config.speech_vocab_size] = control[1]
    first = config.no_threshold_token_id + 1 - config.speech_vocab_size
    table[first:] = (weight.double().T + bias.double()).to(control.dtype)
    return table


def _infer_ar(source: SourceCheckpoint, given: Settings) -> tuple[Settings, Settings]:
    def shape(name: str) -> tuple[int, ...]:
        return source.shape(f"transformer_lm.{name}", 2)

    shown = {
        "text_token_size": shape("text_embedding.weight")[0],
        "text_encoder_input_size": shape("text_embedding.weight")[1],
        "speech_token_size": shape("speech_embedding.weight")[0],
        "llm_input_size": shape("speech_embedding.weight")[1],
        "duration_classes": shape("duration_decoder.weight")[0],
    }
    for stack in ("text_encoder", "llm"):
        shown |= {
            f"{stack}_output_size": shown[f"{stack}_input_size"],
            f"{stack}_linear_units": shape(f"{stack}.encoders.0.feed_forward.w_1.weight")[0],
            f"{stack}_attention_heads": shape(f"{stack}.encoders.0.self_attn.pos_bias_u")[0],
            f"{stack}_num_blocks": _count(source, rf"transformer_lm\.{stack}\.encoders\.(\d+)\."),
        }
        rate = given.get(f"{stack}_dropout_rate", 0.1)
        if given.pop(f"{stack}_positional_dropout_rate", rate) != rate:
            raise CheckpointError(
                f"`config` says `{stack}_positional_dropout_rate`; only the value of `{stack}_dropout_rate`, "
                f"{rate}, is supported."
            )
    columns = shape("framerate_embed_affine_layer.weight")[1]
    thresholds = given.setdefault("flex_framerate_options", list(FlexiCodecARConfig.merging_thresholds))
    if not isinstance(thresholds, (list, tuple)) or len(thresholds) != columns:
        raise CheckpointError(
            f"{source.path} has {columns} merging thresholds, `flex_framerate_options` is {thresholds}: list them in "
            "`config`."
        )
    return shown, {}


AR = Table(
    model_class=FlexiCodecARForConditionalGeneration,
    renames=(
        (r"^model\.text_encoder\.embed_tokens\.", "text_embedding."),
        (r"^model\.text_encoder\.transformer\.norm\.", "text_encoder.after_norm."),
        (r"^model\.text_encoder\.transformer\.layers\.", "text_encoder.encoders."),
        (r"^(text_encoder\..*)\.self_attn_norm\.", r"\1.norm_mha."),
        (r"^(text_encoder\..*)\.mlp_norm\.", r"\1.norm_ff."),
        (r"^model\.text_projection\.", "text_encoder_affine_layer."),
        (r"^model\.(speech|duration)_embedding\.", r"\1_embedding."),
        (r"^model\.decoder\.norm\.", "llm.after_norm."),
        (r"^model\.decoder\.layers\.", "llm.encoders."),
        (r"^(llm\..*)\.self_attn_norm\.", r"\1.norm1."),
        (r"^(llm\..*)\.mlp_norm\.", r"\1.norm2."),
        (r"^lm_head\.", "llm_decoder."),
        (r"^duration_head\.", "duration_decoder."),
        (r"\.self_attn\.o_proj\.", ".self_attn.linear_out."),
        (r"\.self_attn\.relative_k_proj\.", ".self_attn.linear_pos."),
        (r"\.self_attn\.content_bias$", ".self_attn.pos_bias_u"),
        (r"\.self_attn\.position_bias$", ".self_attn.pos_bias_v"),
        (r"\.fc(\d)\.", r".feed_forward.w_\1."),
        (r"^(.*)\.qkv_proj\.(\w+)$", r"\1.linear_q.\2 \1.linear_k.\2 \1.linear_v.\2"),
        (
            r"^model\.control_embedding\.weight$",
            "llm_embedding.weight framerate_embed_affine_layer.weight framerate_embed_affine_layer.bias",
        ),
        (r"(\S+)", r"transformer_lm.\1"),
    ),
    operations=(
        (r"\.qkv_proj\.", lambda name, config, *tensors: torch.cat(tensors)),
        (r"\.self_attn\.(content|position)_bias$", lambda name, config, bias: bias[:, None]),
        (r"\.control_embedding\.", _control_embedding),
    ),
    settings={
        "text_token_size": "text_encoder_config.vocab_size",
        "text_encoder_input_size": "text_encoder_config.hidden_size",
        "text_encoder_linear_units": "text_encoder_config.intermediate_size",
        "text_encoder_num_blocks": "text_encoder_config.num_hidden_layers",
        "text_encoder_attention_heads": "text_encoder_config.num_attention_heads",
        "text_encoder_dropout_rate": "text_encoder_config.hidden_dropout",
        "text_encoder_attention_dropout_rate": "text_encoder_config.attention_dropout",
        "speech_token_size": "speech_vocab_size",
        "duration_classes": "num_durations",
        "flex_framerate_options": "merging_thresholds",
        "llm_input_size": "hidden_size",
        "llm_linear_units": "intermediate_size",
        "llm_num_blocks": "num_hidden_layers",
        "llm_attention_heads": "num_attention_heads",
        "llm_dropout_rate": "hidden_dropout",
        "llm_attention_dropout_rate": "attention_dropout",
        "lsm_weight": "label_smoothing",
        "focal_alpha": "focal_alpha",
        "focal_gamma": "focal_gamma",
    },
    infer=_infer_ar,
    fixed={
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
    },
    # Of the speaker slot, and of a loss other than the focal one.
    ignored=("spk_embed_dim", "duration_lsm_weight"),
    # No released model was trained with a speaker vector: the reference's training refuses one
    # (flexicodec 0.1.2, ar_tts/modeling_artts.py, line 333).
    unused=rf"transformer_lm\.spk_embed_affine_layer\..*|{_TTS_CODEC}",
)


# ------------------------------------------------------------------------------------------------ Voicebox and vocoder


def _infer_voicebox(source: SourceCheckpoint, given: Settings) -> tuple[Settings, Settings]:
    estimator = "voicebox_model.diff_estimator"
    codebook_size, hidden_size = source.shape("voicebox_model.cond_emb.weight", 2)
    has_projection = "repa_projection.0.weight" in source.tensors
    shown: dict[str, Any] = {
        "cond_codebook_size": codebook_size,
        "mel_dim": source.shape(f"{estimator}.mel_out_mlp.2.weight", 2)[0],
        "hidden_size": hidden_size,
        "num_layers": _count(source, rf"{re.escape(estimator)}\.layers\.(\d+)\."),
        "use_repa_loss": has_projection,
    }
    fields = {"intermediate_size": source.shape(f"{estimator}.layers.0.mlp.gate_proj.weight", 2)[0]}
    if has_projection:
        shown["repa_projection_dim"] = source.shape("repa_projection.2.weight", 2)[0]
        fields["repa_hidden_size"] = source.shape("repa_projection.0.weight", 2)[0]
    else:
        given.pop("repa_layer_idx", None)
        shown["repa_layer_idx"] = None
    if "num_heads" not in given:
        # The size of a head in the released model; shapes do not show it.
        given["num_heads"], rest = divmod(hidden_size, 64)
        if rest:
            raise CheckpointError(
                f"{source.path} does not show the number of attention heads, and its width {hidden_size} is not a "
                "multiple of 64: say `num_heads` in `config`."
            )
    return shown, fields


VOICEBOX = Table(
    model_class=FlexiCodecVoiceboxModel,
    renames=(
        (r"^(\w+_mlp|time_embedding\.mlp|repa_projection)\.up_proj\.", r"\1.0."),
        (r"^(\w+_mlp|time_embedding\.mlp|repa_projection)\.down_proj\.", r"\1.2."),
        (r"^time_embedding\.mlp\.", "diff_step_mlp."),
        (r"^condition_mlp\.", "cond_mlp."),
        (r"^output_mlp\.", "mel_out_mlp."),
        (r"^code_embedding\.", "voicebox_model.cond_emb."),
        (r"^(?!voicebox_model|repa_projection)", "voicebox_model.diff_estimator."),
    ),
    settings={
        "mel_dim": "num_mel_bins",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "cfg_scale": "unconditional_probability",
        "cond_codebook_size": "codebook_size",
        "cond_scale_factor": "upsample_factor",
        "sigma": "sigma_min",
        "repa_layer_idx": "repa_layer_index",
        "repa_loss_weight": "repa_loss_weight",
        "repa_projection_dim": "semantic_hidden_size",
    },
    infer=_infer_voicebox,
    fixed={
        "use_cond_code": True,
        "time_scheduler": "cos",
        "repa_loss_type": "cosine",
        "mel_mean": -4.92,
        "mel_var": 8.14,
        "add_framerate_embedding": False,
        "concat_speaker_embedding": False,
        "use_decoder_latent": False,
        "use_decoder_latent_before_agg": False,
    },
    # The width of continuous conditions, which a model of codes does not have; a quarter of the projection's width.
    ignored=("cond_dim", "ssl_feature_dim"),
    unused=_TTS_CODEC,
)


def _infer_vocoder(source: SourceCheckpoint, given: Settings) -> tuple[Settings, Settings]:
    hidden_size, num_mel_bins, kernel_size = source.shape("backbone.embed.weight", 3)
    n_fft = source.shape("head.out.weight", 2)[0] - 2
    given.setdefault("hop_size", n_fft // 4)
    shown = {
        "input_channels": num_mel_bins,
        "dim": hidden_size,
        "intermediate_dim": source.shape("backbone.convnext.0.pwconv1.weight", 2)[0],
        "num_layers": _count(source, r"backbone\.convnext\.(\d+)\."),
        "n_fft": n_fft,
    }
    return shown, {"kernel_size": kernel_size}


VOCODER = Table(
    model_class=FlexiCodecVocoderModel,
    renames=(
        (r"^head\.linear\.", "head.out."),
        (r"^layers\.", "convnext."),
        (r"(^|\.)input_norm\.", r"\1norm."),
        (r"^output_norm\.", "final_layer_norm."),
        (r"\.depthwise_conv\.", ".dwconv."),
        (r"\.up_proj\.", ".pwconv1."),
        (r"\.down_proj\.", ".pwconv2."),
        (r"\.layer_scale$", ".gamma"),
        (r"^(?!head\.)", "backbone."),
    ),
    settings={
        "input_channels": "num_mel_bins",
        "dim": "hidden_size",
        "intermediate_dim": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "n_fft": "n_fft",
        "hop_size": "hop_length",
    },
    infer=_infer_vocoder,
    fixed={"padding": "same", "adanorm_num_embeddings": None},
    unused=r"head\.istft\.window",  # a periodic Hann window, which our model computes
)
