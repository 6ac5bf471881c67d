"""`evaluate`: measure the codec or text-to-speech on a dataset."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    CommandError,
    add_running_arguments,
    choose_device,
    cosine,
    load_codec_config,
    load_model_config,
    loading,
    not_negative,
    positive_int,
    report_error,
    usage_error,
)
from .speak import load_speaker


if TYPE_CHECKING:
    from ..evaluation.methods import Method
    from ..evaluation.run import Evaluator

_MEASURES = ("wer", "pesq", "stoi", "mcd", "speaker", "mos", "stability")
# What decides the results: all results in a directory have the same.
_DATA_SETTINGS = ("config_name", "split", "audio_column", "text_column")
_MEASURE_SETTINGS = ("asr", "language", "speaker_model")
_SETTINGS = ("task", "model", "data", *_DATA_SETTINGS, *_MEASURE_SETTINGS, "chunk_length_s", "seed", "dtype")


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the codec or text-to-speech on a dataset",
        description="Measure how well the codec reconstructs recordings, or how well text-to-speech speaks texts: "
        "error rates, quality, speed. `accelerate launch -m flexicodec_hf.cli evaluate ...` uses more processes.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model to measure, a Hub id or a directory")
    add("data", metavar="DATA", help="folder or file of audio, table (.jsonl, .csv), or dataset (Hub id or directory)")
    add("--task", default="codec", choices=("codec", "tts"), help="reconstruct the audio, or speak the texts")

    add = parser.add_argument_group("data").add_argument
    add("--config-name", metavar="NAME", help="configuration of a dataset on the Hub")
    add("--split", metavar="NAME", help="split of a dataset (default: test, or the only one)")
    add("--streaming", action="store_true", help="do not download the dataset first")
    add("--audio-column", metavar="NAME", help="default: audio, file_name, path, file or audio_filepath")
    add("--text-column", metavar="NAME", help="default: text, transcription, transcript, sentence, ...")
    add("--limit", type=positive_int, metavar="N", help="only the first N clips")

    add = parser.add_argument_group("settings of the codec, each of which is measured").add_argument
    for name, kind, metavar, help in (
        ("--merging-thresholds", cosine, "X", "default: the model's"),
        ("--target-frame-rates", float, "HZ", "tokens per second"),
        ("--fixed-frame-rates", float, "HZ", "for comparison, tokens of even length instead of merging by similarity"),
    ):
        add(name, type=kind, nargs="+", default=[], metavar=metavar, help=help)
    add("--num-quantizers", type=positive_int, nargs="+", default=[None], metavar="N", help="codebooks (default: all)")
    text = "process clips longer than twice this in chunks of this many seconds; 0 never does (default: 30)"
    add("--chunk-length-s", type=not_negative, default=30.0, metavar="S", help=text)

    add = parser.add_argument_group("measures").add_argument
    text = "default: pesq, stoi and mcd (of the codec), wer with --asr, speaker with --speaker-model"
    add("--measures", nargs="+", choices=_MEASURES, help=text)
    text = "recognizer for error rates: an `automatic-speech-recognition` model, or one in CTranslate2's format"
    add("--asr", metavar="ID_OR_DIR", help=text)
    add("--language", default="en", metavar="CODE", help="spoken language (default: en)")
    add("--speaker-model", metavar="ID_OR_DIR", help="speaker encoder: resemblyzer, or a model with an x-vector head")

    add = parser.add_argument_group("results").add_argument
    text = "directory for results.json and the results of each clip; an interrupted run continues where it stopped"
    add("-o", "--output-dir", type=Path, metavar="DIR", help=text)
    add("--plot", type=Path, metavar="FILE", help="plot of error rate and quality against token rate")
    add("--per-clip", action="store_true", help="print the results of every clip too")
    add("--seed", type=int, default=0, metavar="N", help="seed of text-to-speech (default: 0)")

    add_running_arguments(parser.add_argument_group("running"))
    parser.set_defaults(run=run_evaluate, parser=parser)


def run_evaluate(args: argparse.Namespace) -> int:
    """`evaluate MODEL DATA`; returns the exit status."""
    measures = _measures(args)
    device = choose_device(args)

    from ..data.files import require

    require("evaluate", "flexicodec-hf evaluate", "eval")
    from accelerate import PartialState
    from datasets import Dataset

    from ..data.sources import load_speech
    from ..evaluation.methods import Original
    from ..evaluation.run import evaluate

    state = PartialState(cpu=device == "cpu")
    if state.num_processes > 1:
        device = str(state.device)
    try:
        if args.plot is not None:
            require("matplotlib", "the plot", "eval")
        options: dict[str, Any] = {name: getattr(args, name) for name in _DATA_SETTINGS}
        unusable: list[str] = []

        def report_row(message: str) -> None:
            unusable.append(message.encode(errors="backslashreplace").decode())
            if state.is_main_process:
                report_error(unusable[-1])

        options |= {"streaming": args.streaming, "on_bad_row": report_row}
        dataset = load_speech(args.data, default_split="test", **options)
        if args.limit is not None:
            size = min(args.limit, len(dataset)) if isinstance(dataset, Dataset) else args.limit
            dataset = dataset.take(size)
        evaluator = _evaluator(args, measures, device)
        methods = (_codec_methods if args.task == "codec" else _speaking_methods)(args, device)
        if {"wer", "mos"} & set(measures):
            methods.insert(0, Original())
        settings = {name: getattr(args, name) for name in _SETTINGS}
        report = evaluate(dataset, methods, evaluator, args.output_dir, settings, on_error=report_error)
        report = replace(report, failed=[*unusable, *report.failed])
        if state.is_main_process:
            if args.per_clip:
                print(report.table(per_clip=True), end="\n\n")
            print(report.table())
            if report.failed:
                print(f"\n{len(report.failed)} failed")
            if args.output_dir is not None:
                report.save(args.output_dir / "results.json")
            if args.plot is not None:
                report.plot(args.plot)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return 1 if report.failed else 0


def _measures(args: argparse.Namespace) -> list[str]:
    if args.measures is None:
        measures = ["pesq", "stoi", "mcd"] if args.task == "codec" else []
        measures += ["wer"] if args.asr else []
        measures += ["speaker"] if args.speaker_model else []
        if not measures:
            usage_error(args, "nothing to measure: pass --asr, --speaker-model or --measures mos")
        return measures
    for measure, option, value in (("wer", "--asr", args.asr), ("speaker", "--speaker-model", args.speaker_model)):
        if measure in args.measures and value is None:
            usage_error(args, f"the measure {measure} needs {option}")
    return args.measures


def _evaluator(args: argparse.Namespace, measures: list[str], device: str) -> Evaluator:
    from ..evaluation.recognizers import load_normalizer, load_recognizer, load_speaker_encoder
    from ..evaluation.run import Evaluator

    recognizer = normalizer = speaker_encoder = None
    if "wer" in measures:
        normalizer = load_normalizer(args.language)
        recognizer = load_recognizer(args.asr, args.language, device)
    if "speaker" in measures:
        speaker_encoder = load_speaker_encoder(args.speaker_model, device)
    return Evaluator(measures, recognizer, normalizer, speaker_encoder, device)


def _codec_methods(args: argparse.Namespace, device: str) -> list[Method]:
    import torch

    from ..cpu_flexicodec import optimize_for_cpu
    from ..evaluation.methods import CodecReconstruction
    from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
    from ..modeling_flexicodec import FlexiCodecModel

    load_codec_config(args.model)  # its errors say what is wrong with another kind of model
    with loading(args.model):
        codec = FlexiCodecModel.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device).eval()
        feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(args.model)
    if device == "cpu":
        codec = optimize_for_cpu(codec)
    rates: list[dict[str, Any]] = [{"merging_threshold": value} for value in args.merging_thresholds]
    rates += [{"target_frame_rate": value} for value in args.target_frame_rates]
    rates += [{"fixed_frame_rate": value} for value in args.fixed_frame_rates]
    chunk_length_s = args.chunk_length_s or None
    return [
        CodecReconstruction(codec, feature_extractor, **rate, num_quantizers=number, chunk_length_s=chunk_length_s)
        for rate, number in itertools.product(rates or [{}], args.num_quantizers)
    ]


def _speaking_methods(args: argparse.Namespace, device: str) -> list[Method]:
    import torch
    from transformers import pipeline

    from ..evaluation.methods import TextToSpeech

    if str(load_model_config(args.model).get("model_type")).startswith("flexicodec"):
        synthesizer = load_speaker(args)
    else:
        synthesizer = pipeline("text-to-speech", model=args.model, device=device, dtype=getattr(torch, args.dtype))
    name = "text-to-speech"
    return [
        TextToSpeech(
            synthesizer, f"{name}, threshold {value:g}", args.seed, forward_params={"merging_threshold": value}
        )
        for value in args.merging_thresholds
    ] or [TextToSpeech(synthesizer, name, args.seed)]
