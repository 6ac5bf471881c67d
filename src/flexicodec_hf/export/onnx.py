"""A model as ONNX files, with all that `runner.py` needs to run them without PyTorch."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tqdm import tqdm

from .. import audio_flexicodec, numbers_flexicodec, text_flexicodec
from ..data.files import atomic_directory, require
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor, _mel_filters
from ..generation_flexicodec_tts import TTS_DEFAULTS
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_tts import FlexiCodecForTextToSpeech
from ..processing_flexicodec_tts import FlexiCodecTTSProcessor
from ..repository_flexicodec_tts import save_voices
from . import runner
from .graphs import Graph, codec_graphs, tts_graphs


# Settings of `generate` that the runner has, with their values where the model leaves them open.
_GENERATION = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "duration_temperature": 1.0,
    "duration_top_k": 1,
    "min_new_tokens": 0,
    "max_new_tokens": None,
    "min_token_text_ratio": None,
    "max_token_text_ratio": None,
    "merging_threshold": None,
    "num_inference_steps": None,
    "guidance_scale": None,
    "guidance_rescale": None,
}
# Those that say nothing about how to speak.
_UNUSED = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "return_dict_in_generate"}


def export_onnx(
    output_dir: str | Path,
    codec: FlexiCodecModel,
    feature_extractor: FlexiCodecFeatureExtractor,
    tts: FlexiCodecForTextToSpeech | None = None,
    processor: FlexiCodecTTSProcessor | None = None,
) -> None:
    """
    Write a codec, and a text-to-speech system, as ONNX files that run on NumPy and ONNX Runtime.

        DIR/*.onnx, DIR/tts/*.onnx                     the graphs, see `graphs.py`
        DIR/settings.json, features.safetensors        numbers, filters and normalization
        DIR/tokenizer.json, DIR/voices/                for text to speech
        DIR/flexicodec_onnx/                           the code that runs them, see `runner.py`

    Args:
        output_dir: Directory to write to, complete or not at all.
        codec, tts: In float32, on the CPU. Their attention is set to `"eager"`.
        feature_extractor, processor: Of the codec, and of the system.

    Raises:
        ValueError: The feature extractor adds noise, or the system speaks with settings that the runner lacks.
        DataError: `onnx`, `onnxscript` or `onnxruntime` is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, "`export`", "export")
    if feature_extractor.dither:
        raise ValueError(f"`feature_extractor` adds noise (`dither`={feature_extractor.dither}), the runner does not.")
    settings = _codec_settings(codec, feature_extractor)
    if tts is not None:
        assert processor is not None
        settings["tts"] = _tts_settings(tts, processor)
    with atomic_directory(output_dir) as directory:
        _write_graphs(directory, codec_graphs(codec))
        save_file(_feature_tensors(feature_extractor), directory / "features.safetensors")
        if tts is not None and processor is not None:
            (directory / "tts").mkdir()
            _write_graphs(directory / "tts", tts_graphs(tts))
            save_voices(tts.voices, directory)
            processor.tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        _write_runner(directory / "flexicodec_onnx")


def _write_graphs(directory: Path, graphs: Iterable[Graph]) -> None:
    for graph in tqdm(graphs, desc=f"exporting to {directory.name}", unit="graph"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about its own internals
            program = torch.onnx.export(
                graph.program(),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                custom_translation_table={torch.ops.aten.searchsorted.Tensor: _searchsorted},
                verbose=False,
            )
        assert program is not None
        program.save(directory / f"{graph.name}.onnx", external_data=True)


def _searchsorted(ends: Any, values: Any, **options: Any) -> Any:
    """How many `ends` `(batch_size, n)` are not above each of `values` `(batch_size, m)`: not an operation of ONNX."""
    from onnxscript import opset18

    op: Any = opset18

    reached = op.LessOrEqual(op.Unsqueeze(ends, [1]), op.Unsqueeze(values, [2]))
    return op.ReduceSum(op.Cast(reached, to=7), [2], keepdims=0)  # 7 is int64


def _codec_settings(codec: FlexiCodecModel, extractor: FlexiCodecFeatureExtractor) -> dict[str, Any]:
    config = codec.config
    names = (
        "sampling_rate",
        "hop_length",
        "frame_rate",
        "semantic_downsampling_factor",
        "merging_threshold",
        "max_frames_per_token",
        "num_quantizers",
        "semantic_codebook_size",
        "codebook_size",
    )
    features = ("frame_shift", "num_stacked_frames", "stack_stride")
    return {
        "model": config.name_or_path,
        **{name: getattr(config, name) for name in names},
        "max_features": config.semantic_model_config.max_position_embeddings - 1 - len(config.semantic_query_ids),
        "features": {name: getattr(extractor, name) for name in features},
    }


def _feature_tensors(extractor: FlexiCodecFeatureExtractor) -> dict[str, np.ndarray]:
    length, size = extractor.frame_length, extractor.num_stacked_frames * extractor.num_mel_bins
    filters = _mel_filters(
        1 << (length - 1).bit_length(), extractor.num_mel_bins, extractor.sampling_rate, torch.device("cpu")
    )
    shift, scale = extractor.cmvn_shift or [0.0] * size, extractor.cmvn_scale or [1.0] * size
    return {
        "window": torch.hamming_window(length, periodic=False).numpy(),
        "filters": filters.numpy(),
        "cmvn_shift": np.array(shift, dtype=np.float32),
        "cmvn_scale": np.array(scale, dtype=np.float32),
    }


def _tts_settings(tts: FlexiCodecForTextToSpeech, processor: FlexiCodecTTSProcessor) -> dict[str, Any]:
    ar, voicebox = tts.config.ar_config, tts.config.voicebox_config
    given, _ = tts._prepare_settings(None)
    set_values = {
        name: value
        for name, value in given.to_diff_dict().items()
        if value is not None and (tuple(value) if isinstance(value, list) else value) != TTS_DEFAULTS.get(name)
    }
    if unknown := sorted(set_values.keys() - _GENERATION.keys() - _UNUSED):
        raise ValueError(
            f"The generation config of the model sets {', '.join(unknown)}, which the exported runner does not have: "
            f"reset them. It has {', '.join(_GENERATION)}."
        )
    generation = {
        name: default if getattr(given, name, None) is None else getattr(given, name)
        for name, default in _GENERATION.items()
    }
    names = ("start_token_id", "end_token_id", "task_token_id", "no_threshold_token_id", "text_token_offset")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    settings: dict[str, Any] = {
        "sampling_rate": tts.config.sampling_rate,
        "language": processor.language,
        "voices": list(tts.voices),
        "generation": generation,
        "ar": {
            **{name: getattr(ar, name) for name in (*names, *sizes)},
            "threshold_token_ids": {str(one): ar.threshold_token_id(one) for one in ar.merging_thresholds},
        },
    }
    if voicebox is not None:
        fields = ("upsample_factor", "num_mel_bins", "latent_mean", "latent_std")
        settings["voicebox"] = {name: getattr(voicebox, name) for name in fields}
    return settings


def _write_runner(package: Path) -> None:
    """The runner and the modules that it imports, as a package: siblings there, and one level apart here."""
    package.mkdir()
    for module, name in (
        (runner, "__init__"),
        (audio_flexicodec, "audio_flexicodec"),
        (text_flexicodec, "text_flexicodec"),
        (numbers_flexicodec, "numbers_flexicodec"),
    ):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        (package / f"{name}.py").write_text(source.replace("\nfrom ..", "\nfrom ."), encoding="utf-8")
    (package / "__main__.py").write_text("from . import main\n\n\nraise SystemExit(main())\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).parents[0] / "requirements.txt", package.parent / "requirements.txt")
