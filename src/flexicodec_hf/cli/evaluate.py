"""`evaluate`: measure the codec or text-to-speech on a dataset."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    DATASET_SETTINGS,
    CommandError,
    add_chunk_argument,
    add_dataset_arguments,
    add_rates_arguments,
    add_running_arguments,
    choose_device,
    load_codec_config,
    load_dataset_of,
    load_model_config,
    loading,
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
_SETTINGS = (
    *("task", "model", "data", *DATASET_SETTINGS),
    *("asr", "language", "speaker_model", "chunk_length_s", "seed", "dtype"),
)


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
    add("--limit", type=positive_int, help="only the first N clips")
    add_dataset_arguments(parser, default_split="test")

    codec = parser.add_argument_group("settings of the codec, each of which is measured")
    add_rates_arguments(codec)
    add = codec.add_argument
    text = "for comparison, tokens of even length instead of merging by similarity"
    add("--fixed-frame-rates", type=float, nargs="+", default=[], help=text)
    add("--num-quantizers", type=positive_int, nargs="+", default=[None], help="codebooks (default: all)")
    add_chunk_argument(codec)

    add = parser.add_argument_group("measures").add_argument
    text = "default: pesq, stoi and mcd (of the codec), wer with --asr, speaker with --speaker-model"
    add("--measures", nargs="+", choices=_MEASURES, help=text)
    text = "recognizer for error rates: an `automatic-speech-recognition` model, or one in CTranslate2's format"
    add("--asr", metavar="ID_OR_DIR", help=text)
    add("--language", default="en", metavar="CODE", help="spoken language")
    add("--speaker-model", metavar="ID_OR_DIR", help="speaker encoder: resemblyzer, or a model with an x-vector head")

    add = parser.add_argument_group("results").add_argument
    text = "directory for results.json and the results of each clip; an interrupted run continues where it stopped"
    add("-o", "--output-dir", type=Path, metavar="DIR", help=text)
    add("--plot", type=Path, metavar="FILE", help="plot of error rate and quality against token rate")
    add("--per-clip", action="store_true", help="print the results of every clip too")
    add("--seed", type=int, default=0, help="seed of text-to-speech")
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

    from ..evaluation.methods import Original
    from ..evaluation.run import evaluate

    state = PartialState(cpu=device == "cpu")
    if state.num_processes > 1:
        device = str(state.device)
    try:
        if args.plot is not None:
            require("matplotlib", "the plot", "eval")
        unusable: list[str] = []

        def report_row(message: str) -> None:
            unusable.append(message.encode(errors="backslashreplace").decode())
            if state.is_main_process:
                report_error(unusable[-1])

        dataset = load_dataset_of(args, args.data, on_bad_row=report_row)
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
    from ..data.runner import CodecRunner
    from ..evaluation.methods import CodecReconstruction

    load_codec_config(args.model)  # its errors say what is wrong with another kind of model
    with loading(args.model):
        runner = CodecRunner.from_pretrained(args.model, device, args.dtype)
    rates: list[dict[str, Any]] = [{"merging_threshold": value} for value in args.merging_thresholds]
    rates += [{"target_frame_rate": value} for value in args.target_frame_rates]
    rates += [{"fixed_frame_rate": value} for value in args.fixed_frame_rates]
    chunk_length_s = args.chunk_length_s or None
    return [
        CodecReconstruction(
            runner.codec, runner.feature_extractor, **rate, num_quantizers=number, chunk_length_s=chunk_length_s
        )
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
