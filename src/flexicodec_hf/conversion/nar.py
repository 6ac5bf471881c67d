"""Conversion of the released second stage of the TTS: the Voicebox model (`nartts.safetensors`) and its vocoder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration_flexicodec_vocoder import FlexiCodecVocoderConfig
from ..configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig
from ..modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from ..modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from .checkpoint import TTS_CODEC_PREFIXES, CheckpointError, SourceCheckpoint, written_whole


logger = logging.get_logger(__name__)

# The released models' head size; the number of heads cannot be told from the shapes.
_HEAD_DIM = 64


def convert_voicebox(
    source: str | Path,
    output_dir: str | Path,
    nar_config: str | Path | Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
) -> None:
    """Convert a released Voicebox file to a directory that [`FlexiCodecVoiceboxModel`] loads.

    Args:
        source: `.safetensors` or `.pt` file with tensors under `voicebox_model.` and, for training,
            `repa_projection.`. The codec in it is left to the codec's converter.
        output_dir: Directory to write.
        nar_config: The model's settings under the names of the original training code (`num_heads`, `sigma`,
            `repa_layer_idx`, ...), as a mapping or a JSON file, flat or below `voicebox_config`. Without them what
            the shapes do not tell is as in the released model.
        dtype: Type to store.
        allow_partial: Warn about missing and unknown tensors instead of refusing; missing ones stay random.

    Raises:
        CheckpointError: Missing or unknown tensors, settings that contradict the tensors or that are not supported.
        FileNotFoundError: There is no such file.
    """
    model = read_voicebox(source, nar_config, dtype, allow_partial)
    with written_whole(output_dir) as folder:
        model.save_pretrained(folder)


def convert_vocoder(
    source: str | Path,
    output_dir: str | Path,
    vocoder_config: str | Path | Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
) -> None:
    """Convert a released Vocos file to a directory that [`FlexiCodecVocoderModel`] loads.

    Args:
        source: `.safetensors` or `.pt` file with tensors under `backbone.` and `head.`.
        output_dir: Directory to write.
        vocoder_config: The model's settings under the names of the original training code (`dim`, `hop_size`, ...), as
            a mapping or a JSON file. Without them the hop is a quarter of the FFT size.
        dtype: Type to store.
        allow_partial: Warn about missing and unknown tensors instead of refusing; missing ones stay random.

    Raises:
        CheckpointError: Missing or unknown tensors, settings that contradict the tensors or that are not supported.
        FileNotFoundError: There is no such file.
    """
    model = read_vocoder(source, vocoder_config, dtype, allow_partial)
    with written_whole(output_dir) as folder:
        model.save_pretrained(folder)


def read_voicebox(
    source: str | Path,
    nar_config: str | Path | Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
) -> FlexiCodecVoiceboxModel:
    """The model of [`convert_voicebox`], in memory."""
    checkpoint = SourceCheckpoint(source)
    checkpoint.skip(*(name for name in checkpoint if name.startswith(TTS_CODEC_PREFIXES)))
    config = _voicebox_config(checkpoint, _settings(nar_config))
    model = FlexiCodecVoiceboxModel._from_config(config, dtype=dtype)
    return _fill(model, checkpoint, _voicebox_name, allow_partial)


def read_vocoder(
    source: str | Path,
    vocoder_config: str | Path | Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
) -> FlexiCodecVocoderModel:
    """The model of [`convert_vocoder`], in memory."""
    checkpoint = SourceCheckpoint(source)
    config = _vocoder_config(checkpoint, _settings(vocoder_config))
    # A periodic Hann window, which the model makes itself.
    checkpoint.skip("head.istft.window")
    model = FlexiCodecVocoderModel._from_config(config, dtype=dtype)
    return _fill(model, checkpoint, _vocoder_name, allow_partial)


def _voicebox_config(checkpoint: SourceCheckpoint, settings: dict[str, Any]) -> FlexiCodecVoiceboxConfig:
    estimator = "voicebox_model.diff_estimator."
    codebook_size, hidden_size = checkpoint.shape("voicebox_model.cond_emb.weight")
    num_layers = _count(checkpoint, rf"{re.escape(estimator)}layers\.(\d+)\.")
    inferred = {
        "codebook_size": codebook_size,
        "num_mel_bins": checkpoint.shape(f"{estimator}mel_out_mlp.2.weight")[0],
        "hidden_size": hidden_size,
        "intermediate_size": checkpoint.shape(f"{estimator}layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": num_layers,
    }
    if "repa_projection.0.weight" in checkpoint:
        inferred["repa_hidden_size"] = checkpoint.shape("repa_projection.0.weight")[0]
        inferred["semantic_hidden_size"] = checkpoint.shape("repa_projection.2.weight")[0]
    if "voicebox_config" in settings:
        # The original code never reads the outer setting of this name, the inner one counts.
        settings.pop("repa_layer_idx", None)
        settings.update(settings.pop("voicebox_config"))
    for name, only in {
        "use_cond_code": True,
        "time_scheduler": "cos",
        "repa_loss_type": "cosine",
        "mel_mean": -4.92,
        "mel_var": 8.14,
        "add_framerate_embedding": False,
        "concat_speaker_embedding": False,
        "use_decoder_latent": False,
        "use_decoder_latent_before_agg": False,
    }.items():
        _expect(name, settings.pop(name, only), only)
    settings.pop("cond_dim", None)  # the width of continuous conditions, which a model of codes does not have
    settings.pop("ssl_feature_dim", None)  # a quarter of `repa_hidden_size`
    uses_repa = settings.pop("use_repa_loss", "repa_hidden_size" in inferred)
    _expect("use_repa_loss", uses_repa, "repa_hidden_size" in inferred)
    values = _translate(
        settings,
        inferred,
        {
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
    )
    if not uses_repa:
        values["repa_layer_index"] = None
    if "num_attention_heads" not in values:
        if hidden_size % _HEAD_DIM != 0:
            raise CheckpointError(
                f"The number of attention heads cannot be told from {checkpoint.path}, whose width {hidden_size} is "
                f"not a multiple of {_HEAD_DIM}: say `num_heads` in the configuration."
            )
        values["num_attention_heads"] = hidden_size // _HEAD_DIM
    return FlexiCodecVoiceboxConfig(**values)


def _vocoder_config(checkpoint: SourceCheckpoint, settings: dict[str, Any]) -> FlexiCodecVocoderConfig:
    hidden_size, num_mel_bins, kernel_size = checkpoint.shape("backbone.embed.weight")
    n_fft = checkpoint.shape("head.out.weight")[0] - 2
    inferred = {
        "num_mel_bins": num_mel_bins,
        "hidden_size": hidden_size,
        "intermediate_size": checkpoint.shape("backbone.convnext.0.pwconv1.weight")[0],
        "num_hidden_layers": _count(checkpoint, r"backbone\.convnext\.(\d+)\."),
        "kernel_size": kernel_size,
        "n_fft": n_fft,
    }
    for name, only in {"padding": "same", "adanorm_num_embeddings": None}.items():
        _expect(name, settings.pop(name, only), only)
    values = _translate(
        settings,
        inferred,
        {
            "input_channels": "num_mel_bins",
            "dim": "hidden_size",
            "intermediate_dim": "intermediate_size",
            "num_layers": "num_hidden_layers",
            "n_fft": "n_fft",
            "hop_size": "hop_length",
        },
    )
    return FlexiCodecVocoderConfig(**{"hop_length": n_fft // 4, **values})


def _voicebox_name(name: str) -> str:
    """Our name of a tensor to the released one."""
    if re.match(r"(\w+_mlp|time_embedding\.mlp|repa_projection)\.", name):
        name = name.replace("up_proj", "0").replace("down_proj", "2")
    if name.startswith("repa_projection."):
        return name
    if name.startswith("code_embedding."):
        return name.replace("code_embedding", "voicebox_model.cond_emb")
    for ours, theirs in {
        "time_embedding.mlp": "diff_step_mlp",
        "condition_mlp": "cond_mlp",
        "output_mlp": "mel_out_mlp",
    }.items():
        name = name.replace(ours, theirs)
    return f"voicebox_model.diff_estimator.{name}"


def _vocoder_name(name: str) -> str:
    """Our name of a tensor to the released one."""
    if name.startswith("head."):
        return name.replace("linear", "out")
    for ours, theirs in {
        "layers.": "convnext.",
        "input_norm": "norm",
        "output_norm": "final_layer_norm",
        "depthwise_conv": "dwconv",
        "up_proj": "pwconv1",
        "down_proj": "pwconv2",
        "layer_scale": "gamma",
    }.items():
        name = name.replace(ours, theirs)
    return f"backbone.{name}"


def _fill(
    model: PreTrainedModel, checkpoint: SourceCheckpoint, source_name: Callable[[str], str], allow_partial: bool
) -> Any:
    missing = []
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            source = source_name(name)
            if source not in checkpoint:
                missing.append(checkpoint.prefix + source)
                continue
            if checkpoint.shape(source) != tuple(tensor.shape):
                raise CheckpointError(
                    f"'{source}' in {checkpoint.path} has shape {checkpoint.shape(source)}, expected "
                    f"{tuple(tensor.shape)} by the other tensors."
                )
            tensor.copy_(checkpoint.read(source))
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing tensors", missing), ("unknown tensors", checkpoint.unused()))
        if names
    ]
    if problems:
        report = f"{checkpoint.path} has {'; '.join(problems)}."
        if not allow_partial:
            raise CheckpointError(f"{report} Pass `allow_partial=True` to convert what fits.")
        logger.warning(report)
    return model.eval()


def _settings(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    try:
        settings = json.loads(Path(config).read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{config} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{config} must hold a JSON object, but holds a {type(settings).__name__}.")
    return settings


def _translate(settings: dict[str, Any], inferred: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Settings under our names, over what the tensors say, which they must not contradict."""
    if unknown := sorted(set(settings) - set(names)):
        raise CheckpointError(f"Unknown settings {', '.join(unknown)}; known are {', '.join(sorted(names))}.")
    values = dict(inferred)
    for theirs, value in settings.items():
        ours = names[theirs]
        if ours in inferred and inferred[ours] != value:
            raise CheckpointError(f"The configuration says {theirs} = {value}, but the tensors say {inferred[ours]}.")
        values[ours] = value
    return values


def _expect(name: str, value: Any, only: Any) -> None:
    if value != only:
        raise CheckpointError(f"`{name}` = {value!r} is not supported: the checkpoint must be of {name} = {only!r}.")


def _count(checkpoint: SourceCheckpoint, pattern: str) -> int:
    """How many layers there are, by the highest index in the names."""
    indices = [int(match[1]) for name in checkpoint if (match := re.match(pattern, name))]
    if not indices:
        raise CheckpointError(f"{checkpoint.path} has no tensors like '{pattern}': is it the right file?")
    return max(indices) + 1


__all__ = ["convert_vocoder", "convert_voicebox", "read_vocoder", "read_voicebox"]
