"""`evaluate`: measure the codec or text-to-speech on a dataset."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    CommandError,
    add_running_arguments,
    choose_device,
    cosine,
    load_codec_config,
    load_model_config,
    not_negative,
    positive_int,
    report_error,
    usage_error,
)
from .speak import load_speaker


if TYPE_CHECKING:
    from ..evaluation import Evaluator, Method

# What decides the results: all results in a directory have the same.
_SETTINGS = ("task", "model", "data", "config_name", "split", "audio_column", "text_column", "asr", "language")
_SETTINGS += ("normalizer", "speaker_model", "chunk_length_s", "seed", "dtype")


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the codec or text-to-speech on a dataset",
        description="Measure how well the codec reconstructs recordings, or how well text-to-speech speaks their texts: "
        "error rates, quality, token rates, speed. Use `accelerate launch -m flexicodec_hf.cli evaluate ...` for several "
        "processes.",
    )
    parser.add_argument("model", metavar="MODEL", help="model to measure, a Hub id or a directory")
    parser.add_argument(
        "data",
        metavar="DATA",
        help="folder of audio with metadata.jsonl, metadata.csv or a .txt beside each file; a .jsonl or .csv; an audio "
        "file; or a dataset of `datasets`, a Hub id or local",
    )
    parser.add_argument(
        "--task", default="codec", choices=("codec", "tts"), help="reconstruct the audio, or speak the texts"
    )

    group = parser.add_argument_group("data")
    group.add_argument("--config-name", metavar="NAME", help="configuration of a dataset on the Hub")
    group.add_argument("--split", metavar="NAME", help="split of a dataset (default: test, or the only one)")
    group.add_argument("--streaming", action="store_true", help="do not download the dataset first")
    group.add_argument("--audio-column", metavar="NAME", help="default: audio, file_name, path, file, ...")
    group.add_argument("--text-column", metavar="NAME", help="default: text, transcription, transcript, sentence, ...")
    group.add_argument("--limit", type=positive_int, metavar="N", help="only the first N clips")

    group = parser.add_argument_group("settings of the codec, each of which is measured")
    group.add_argument(
        "--merging-thresholds", type=cosine, nargs="+", default=[], metavar="X", help="default: the model's"
    )
    group.add_argument(
        "--target-frame-rates", type=float, nargs="+", default=[], metavar="HZ", help="tokens per second"
    )
    group.add_argument(
        "--fixed-frame-rates",
        type=float,
        nargs="+",
        default=[],
        metavar="HZ",
        help="for comparison, tokens of even length at this rate, instead of merging by similarity",
    )
    group.add_argument(
        "--num-quantizers", type=positive_int, nargs="+", default=[None], metavar="N", help="codebooks (default: all)"
    )
    group.add_argument(
        "--chunk-length-s",
        type=not_negative,
        default=30.0,
        metavar="S",
        help="process clips longer than twice this in chunks of this many seconds; 0 never does (default: 30)",
    )

    group = parser.add_argument_group("measures")
    group.add_argument(
        "--measures",
        nargs="+",
        choices=("wer", "pesq", "stoi", "mcd", "mel", "speaker", "dnsmos"),
        help="default: pesq, stoi, mcd and mel (of the codec), wer with --asr, speaker with --speaker-model",
    )
    group.add_argument(
        "--asr",
        metavar="ID_OR_DIR",
        help="speech recognizer for word and character error rates: a model of the `automatic-speech-recognition` "
        "pipeline, or a directory in CTranslate2's format (faster-whisper)",
    )
    group.add_argument("--language", default="en", metavar="CODE", help="spoken language (default: en)")
    group.add_argument(
        "--normalizer",
        metavar="FILE_OR_ID",
        help="source of Whisper's table of English spellings: a normalizer.json, or a model that has one (default: the "
        "recognizer, then the package whisper-normalizer)",
    )
    group.add_argument(
        "--speaker-model", metavar="ID_OR_DIR", help="speaker encoder: resemblyzer, or a model with an x-vector head"
    )

    group = parser.add_argument_group("results")
    group.add_argument(
        "-o",
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="directory for results.json and for the result of each clip; an interrupted run continues where it stopped",
    )
    group.add_argument("--plot", type=Path, metavar="FILE", help="plot of error rate and quality against token rate")
    group.add_argument("--per-clip", action="store_true", help="print the results of every clip too")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of text-to-speech (default: 0)")

    add_running_arguments(parser.add_argument_group("running"))
    parser.set_defaults(run=run_evaluate, parser=parser)


def run_evaluate(args: argparse.Namespace) -> int:
    """`evaluate MODEL DATA`; returns the exit status."""
    measures = _measures(args)
    device = choose_device(args)

    from accelerate import PartialState
    from datasets import Dataset

    from ..data.files import require
    from ..data.sources import load_speech
    from ..evaluation import Original, evaluate

    state = PartialState(cpu=device == "cpu")
    if state.num_processes > 1:
        device = str(state.device)
    try:
        if args.plot is not None:
            require("matplotlib", "the plot", "eval")
        dataset = load_speech(
            args.data,
            config_name=args.config_name,
            split=args.split,
            default_split="test",
            streaming=args.streaming,
            audio_column=args.audio_column,
            text_column=args.text_column,
        )
        if args.limit is not None:
            size = min(args.limit, len(dataset)) if isinstance(dataset, Dataset) else args.limit
            dataset = dataset.take(size)
        evaluator = _evaluator(args, measures, device)
        methods = (_codec_methods if args.task == "codec" else _speaking_methods)(args, device)
        if {"wer", "dnsmos"} & set(measures):
            methods.insert(0, Original())
        settings = {name: getattr(args, name) for name in _SETTINGS}
        report = evaluate(dataset, methods, evaluator, args.output_dir, settings, on_error=report_error)
        if state.is_main_process:
            if args.per_clip:
                print(report.table_of_clips(), end="\n\n")
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
        measures = ["pesq", "stoi", "mcd", "mel"] if args.task == "codec" else []
        measures += ["wer"] if args.asr else []
        measures += ["speaker"] if args.speaker_model else []
        if not measures:
            usage_error(args, "nothing to measure: pass --asr, --speaker-model or --measures dnsmos")
        return measures
    for measure, option, value in (("wer", "--asr", args.asr), ("speaker", "--speaker-model", args.speaker_model)):
        if measure in args.measures and value is None:
            usage_error(args, f"the measure {measure} needs {option}")
    return args.measures


def _evaluator(args: argparse.Namespace, measures: list[str], device: str) -> Evaluator:
    from ..evaluation import Evaluator, load_normalizer, load_recognizer, load_speaker_encoder

    recognizer = normalizer = speaker_encoder = None
    if "wer" in measures:
        normalizer = load_normalizer(args.language, (args.normalizer or args.asr,))
        recognizer = load_recognizer(args.asr, args.language, device)
    if "speaker" in measures:
        speaker_encoder = load_speaker_encoder(args.speaker_model, device)
    return Evaluator(measures, recognizer, normalizer, speaker_encoder)


def _codec_methods(args: argparse.Namespace, device: str) -> list[Method]:
    import torch

    from ..cpu_flexicodec import optimize_for_cpu
    from ..evaluation import CodecReconstruction
    from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
    from ..modeling_flexicodec import FlexiCodecModel

    load_codec_config(args.model)  # its errors say what is wrong with another kind of model
    codec = FlexiCodecModel.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device).eval()
    if codec.device.type == "cpu":
        codec = optimize_for_cpu(codec)
    feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(args.model)
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

    from ..evaluation import TextToSpeech

    if str(load_model_config(args.model).get("model_type")).startswith("flexicodec"):
        synthesizer = load_speaker(args)
    else:
        synthesizer = pipeline("text-to-speech", model=args.model, device=device, dtype=getattr(torch, args.dtype))
    if not args.merging_thresholds:
        return [TextToSpeech(synthesizer, seed=args.seed)]
    return [
        TextToSpeech(
            synthesizer, f"text-to-speech, threshold {value:g}", args.seed, forward_params={"merging_threshold": value}
        )
        for value in args.merging_thresholds
    ]
