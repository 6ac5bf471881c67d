"""Conversion of the released files to models that `from_pretrained` loads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from tqdm import tqdm
from transformers import FeatureExtractionMixin
from transformers.utils import logging

from ..data.files import atomic_directory
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration
from ..modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from ..modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from .checkpoint import CheckpointError, SourceCheckpoint, read_tensors
from .tables import AR, CODEC, TTS_CODEC_PREFIXES, TTS_PREFIXES, VOCODER, VOICEBOX, Table


logger = logging.get_logger(__name__)

Settings = str | Path | Mapping[str, Any] | None
"""A model's settings by the reference's names: a mapping, a `.json` file, or a YAML file."""


def convert_codec(
    source: str | Path,
    output_dir: str | Path | None = None,
    config: Settings = None,
    semantic: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
) -> FlexiCodecModel:
    """
    Convert a released codec, alone or inside a text-to-speech file, or one of the authors' training
    code.

    Args:
        source: `.safetensors` or `.pt` file with the codec at its root, or under
            `flexicodec_model.` or `dualcodec_model.`.
        output_dir: Where to save the model and its feature extractor, for `from_pretrained`; nothing
            is saved without it.
        config: The codec's YAML, or the `config.json` of the training code. What the tensors do not
            show (attention heads, quantization levels, thresholds) is as in the released codec
            unless it says otherwise.
        semantic: SenseVoice-small's `model.pt`, for files without the semantic encoder.
        dtype: Type of the weights.
        allow_partial: Warn about unknown and missing tensors instead of refusing the file. Unknown
            ones are left out. Missing ones are freshly initialized: here, and again by
            `from_pretrained`, since they are not saved. Tensors that show the sizes of the model
            must be there, but for the transformers of the dynamic frame rate: a codec of a fixed
            rate is a start for training one of a dynamic rate. Their sizes are then the released
            ones, or those of `config`.

    Returns:
        The model, in eval mode.

    Raises:
        FileNotFoundError: A file is missing.
        CheckpointError: A file is corrupt, is of another variant of the codec, contradicts
            `config`, or has unknown or missing tensors.
    """
    tensors = read_tensors(source)
    prefixes = (*TTS_CODEC_PREFIXES, "")
    prefix = next((prefix for prefix in prefixes if f"{prefix}dac.decoder.model.0.bias" in tensors), None)
    if prefix is None:
        raise CheckpointError(
            f"{source} holds no codec: there is no 'dac.decoder.model.0.bias' at its root or under "
            f"'{TTS_CODEC_PREFIXES[0]}' or '{TTS_CODEC_PREFIXES[1]}'."
        )
    codec = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if any(name.startswith("semantic_model.") for name in codec):
        if semantic is not None:
            logger.info(f"{source} holds its own semantic encoder: {semantic} is not used for it.")
    elif semantic is not None:
        codec |= {f"semantic_model.{name}": tensor for name, tensor in read_tensors(semantic).items()}
    else:
        raise CheckpointError(
            f"{source} does not hold the semantic encoder. Pass the file `model.pt` of FunAudioLLM/SenseVoiceSmall as "
            "`semantic`."
        )
    fixed_rate = not any(name.startswith(("semantic_aggregator.", "bottleneck_transformer.")) for name in codec)
    if "semantic_aggregator.query_embedding" not in codec and not (fixed_rate and allow_partial):
        raise CheckpointError(
            f"{source} has no query token aggregator ('{prefix}semantic_aggregator.query_embedding'): it is not "
            "a FlexiCodec with a dynamic frame rate. A codec of a fixed rate, without any of the transformers, can be "
            "converted as a start for training with `allow_partial=True`."
        )
    beside = [name for name in tensors if prefix and not name.startswith((*TTS_CODEC_PREFIXES, *TTS_PREFIXES))]
    settings = _read_settings(config, sections=("config", "model"))
    checkpoint, extractor = SourceCheckpoint(source, codec, prefix), released_feature_extractor()
    return convert(checkpoint, CODEC, settings, output_dir, dtype, allow_partial, extractor, beside)


def convert_ar(
    source: str | Path, output_dir: str | Path | None = None, config: Settings = None, **options: Any
) -> FlexiCodecARForConditionalGeneration:
    """
    Convert a released autoregressive model, as [`convert_codec`] does a codec: the tensors under
    `transformer_lm.`, without the untrained speaker projection. `config` has the reference's keyword
    arguments (`llm_dropout_rate`, `flex_framerate_options`, ...), where they are not the released
    ones. `options` are `dtype` and `allow_partial`.
    """
    return convert(SourceCheckpoint(source, read_tensors(source)), AR, _read_settings(config), output_dir, **options)


def convert_voicebox(
    source: str | Path, output_dir: str | Path | None = None, config: Settings = None, **options: Any
) -> FlexiCodecVoiceboxModel:
    """
    Convert a released Voicebox, as [`convert_codec`] does a codec: the tensors under
    `voicebox_model.` and, for training, `repa_projection.`. `config` has the reference's keyword
    arguments (`num_heads`, `sigma`, `repa_layer_idx`, ...), flat or below `voicebox_config`, where
    they are not the released ones. `options` are `dtype` and `allow_partial`.
    """
    settings = _read_settings(config)
    if "voicebox_config" in settings:
        # The reference stores the outer setting of this name and never reads it (flexicodec 0.1.2,
        # nar_tts/modeling_voicebox.py, line 112).
        settings.pop("repa_layer_idx", None)
        settings |= _check_mapping(settings.pop("voicebox_config"), f"`voicebox_config` of {config}")
    return convert(SourceCheckpoint(source, read_tensors(source)), VOICEBOX, settings, output_dir, **options)


def convert_vocoder(
    source: str | Path, output_dir: str | Path | None = None, config: Settings = None, **options: Any
) -> FlexiCodecVocoderModel:
    """
    Convert a released Vocos, as [`convert_codec`] does a codec: the tensors under `backbone.` and
    `head.`. `config` has the reference's keyword arguments (`dim`, `hop_size`, ...), where they are
    not the released ones; without them the hop is a quarter of the FFT size. `options` are `dtype` and
    `allow_partial`.
    """
    settings = _read_settings(config)
    return convert(SourceCheckpoint(source, read_tensors(source)), VOCODER, settings, output_dir, **options)


def convert(
    source: SourceCheckpoint,
    table: Table,
    settings: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
    feature_extractor: FeatureExtractionMixin | None = None,
    beside: Sequence[str] = (),
) -> Any:
    """
    Convert the tensors of `source` by their `table`, as [`convert_codec`] does, and save the
    `feature_extractor` beside the model. The tensors `beside` the source are unknown too.

    Tensors are read, converted and cast one by one: the peak of memory is one copy of the converted
    model. Files are put in their place when all are written: an interrupted conversion leaves no
    weights there.
    """
    config = infer_config(source, table, settings)
    with torch.device("meta"):
        targets = table.model_class(config).state_dict()
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, target in tqdm(targets.items(), f"Converting {table.model_class.__name__}", unit="tensor", leave=False):
        source_names = table.source_names(name, config)
        used.update(source_names)
        if not source.tensors.keys() >= set(source_names):
            continue
        try:
            tensor = table.read(source, name, config)
            fits = tensor.shape == target.shape
        except (RuntimeError, IndexError, ValueError):  # such as a projection that does not divide into heads
            fits = False
        if not fits:
            shapes = " and ".join(
                f"'{source.prefix}{theirs}' {tuple(source[theirs].shape)}" for theirs in source_names
            )
            raise CheckpointError(
                f"{source.path} has {shapes}, which does not make a `{name}` of shape {tuple(target.shape)}."
            )
        tensors[name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)

    missing = [source.prefix + name for name in sorted(used - source.tensors.keys())]
    unused = (name for name in sorted(source.tensors.keys() - used) if not re.fullmatch(table.unused, name))
    unknown = [*(source.prefix + name for name in unused), *beside]
    if missing or unknown:
        lines = [f"{source.path} does not hold exactly the tensors of a {table.model_class.__name__}."]
        lines += [f"Missing ({len(missing)}): {', '.join(missing)}."] if missing else []
        lines += [f"Unknown ({len(unknown)}): {', '.join(unknown)}."] if unknown else []
        if not allow_partial:
            raise CheckpointError(f"{' '.join(lines)} Pass `allow_partial=True` to convert in spite of that.")
        logger.warning(" ".join(lines))
    model = table.model_class.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)
    if output_dir is not None:
        with atomic_directory(output_dir) as folder:
            model.save_pretrained(folder, state_dict=tensors)
            if feature_extractor is not None:
                feature_extractor.save_pretrained(folder)
    return model


def infer_config(source: SourceCheckpoint, table: Table, settings: Mapping[str, Any] | None = None) -> Any:
    """The configuration that the tensors show, completed by the settings; None as a value says nothing."""
    given = dict(settings or {})
    for name, only in table.fixed.items():
        if given.get(name, only) != only:
            raise CheckpointError(
                f"`config` says `{name}: {given[name]}`; only `{name}: {only}`, as in the released files, is "
                "supported."
            )
    shown, fields = table.infer(source, given)
    known = {*table.settings, *table.fixed, *shown, *(table.ignored or ())}
    if table.ignored is not None and (unknown := sorted(given.keys() - known)):
        raise CheckpointError(
            f"`config` has unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}."
        )
    for name, value in given.items():
        if value is not None and name in shown and value != shown[name]:
            raise CheckpointError(f"`config` says `{name}: {value}`; the tensors show {shown[name]} ({source.path}).")
    values = {name: value for name, value in given.items() if value is not None} | shown
    config_class = table.model_class.config_class
    for name, field in table.settings.items():
        if name in values:
            value = values[name]
            outer, _, inner = field.rpartition(".")
            if isinstance(value, int) and isinstance(getattr(config_class, field, None), float):
                value = float(value)  # a YAML may say 1 where 1.0 is meant, or `true` for a share of all
            (fields.setdefault(outer, {}) if outer else fields)[inner] = value
    try:
        return config_class(**fields)
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"`config` and the tensors of {source.path} do not agree: {error}") from error


def released_feature_extractor() -> FlexiCodecFeatureExtractor:
    """The feature extractor of the released codec, with the mean and scale of SenseVoice."""
    cmvn = json.loads(Path(__file__).with_name("cmvn.json").read_text())
    extractor = FlexiCodecFeatureExtractor()
    # Kaldi's `am.mvn` repeats the 80 numbers for each of the stacked frames.
    repeats = extractor.num_stacked_frames
    return FlexiCodecFeatureExtractor(cmvn_shift=cmvn["shift"] * repeats, cmvn_scale=cmvn["scale"] * repeats)


def _read_settings(config: Settings, sections: Sequence[str] = ()) -> dict[str, Any]:
    """Settings as a mapping: those below the first of `sections` that there is."""
    content: Any = {} if config is None else config
    if isinstance(config, (str, Path)):
        kind, parse = ("JSON", json.loads) if Path(config).suffix == ".json" else ("YAML", yaml.safe_load)
        try:
            content = parse(Path(config).read_text(encoding="utf-8"))
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(f"{config} is not a {kind} file: {error}") from error
    section = next((name for name in sections if isinstance(content, Mapping) and name in content), None)
    return _check_mapping(content if section is None else content[section], str(config))


def _check_mapping(content: Any, what: str) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(
            f"{what} must hold a mapping of names of settings to values, but holds {type(content).__name__}."
        )
    return dict(content)
