"""`tokenize`: a dataset of speech to a dataset of tokens."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .common import (
    CommandError,
    add_model_arguments,
    choose_device,
    cosine,
    load_codec_config,
    not_negative,
    positive_int,
    usage_error,
)


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "tokenize",
        help="a dataset of speech to a dataset of tokens",
        description="Encode a dataset to Parquet files with a row for each clip and rate, which `datasets` loads. A run "
        "that was interrupted goes on where it stopped. With `accelerate launch --no-python`, several processes share the "
        "work.",
    )
    parser.add_argument(
        "dataset",
        help="folder of audio files (with or without metadata), .jsonl, .csv or .tsv file with a column of paths, "
        ".parquet or .tar files (a folder, a quoted pattern), or a dataset on the Hub",
    )
    parser.add_argument(
        "-o", "--output-dir", type=Path, required=True, metavar="DIR", help="directory to write to; made if missing"
    )
    source = parser.add_argument_group("dataset")
    source.add_argument("--name", help="configuration of a dataset on the Hub")
    source.add_argument("--split", default="train", help="which part of the dataset (default: %(default)s)")
    source.add_argument("--revision", help="branch, tag or commit of a dataset on the Hub")
    source.add_argument(
        "--streaming", action="store_true", help="read a dataset on the Hub as it comes, without downloading it first"
    )
    for name, default in (
        ("audio", "the one of this type, or of paths"),
        ("text", "text, transcription, transcript, sentence, txt or json.text"),
        ("id", "id or __key__, else the name of the file"),
    ):
        source.add_argument(f"--{name}-column", metavar="NAME", help=f"column to take as {name} (default: {default})")
    rates = parser.add_argument_group("tokens")
    rates.add_argument(
        "--merging-thresholds",
        type=cosine,
        nargs="+",
        default=[],
        metavar="X",
        help="encode at each of these thresholds; the encoders run once for all (default: the model's)",
    )
    rates.add_argument(
        "--target-frame-rates",
        type=float,
        nargs="+",
        default=[],
        metavar="HZ",
        help="and at each of these tokens per second",
    )
    rates.add_argument("--num-quantizers", type=positive_int, metavar="N", help="rows of codes to keep (default: all)")
    work = parser.add_argument_group("work")
    work.add_argument(
        "--batch-seconds",
        type=_positive,
        default=120.0,
        metavar="S",
        help="seconds of audio to encode at once (default: %(default)g)",
    )
    work.add_argument(
        "--clips-per-shard",
        type=positive_int,
        default=1000,
        metavar="N",
        help="clips in a Parquet file, which an interrupted process loses at most (default: %(default)s)",
    )
    work.add_argument(
        "--num-workers",
        type=positive_int,
        metavar="N",
        help="threads that read audio (default: one for each processor, 8 at most)",
    )
    work.add_argument(
        "--chunk-length-s",
        type=not_negative,
        default=30.0,
        metavar="S",
        help="encode clips longer than twice this in chunks of so many seconds, to bound the memory; 0 never does "
        "(default: %(default)g)",
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run_tokenize, parser=parser)


def _positive(text: str) -> float:
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


def run_tokenize(args: argparse.Namespace) -> int:
    """`tokenize DATASET -o DIR`; returns the exit status."""
    try:
        from ..corpus import CorpusError, load_corpus, tokenize_corpus
    except ModuleNotFoundError as error:
        raise CommandError(f"`tokenize` needs {error.name}: pip install datasets.") from error
    import torch

    from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
    from ..modeling_flexicodec import FlexiCodecModel

    config = load_codec_config(args.model)
    lowest = config.frame_rate / config.max_frames_per_token
    for rate in args.target_frame_rates:
        if not lowest <= rate <= config.frame_rate:
            usage_error(
                args,
                f"argument --target-frame-rates: must be between {lowest} and {config.frame_rate} tokens per second, got {rate}",
            )
    device = choose_device(args)
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    codec = FlexiCodecModel.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(device).eval()
    try:
        manifest = tokenize_corpus(
            load_corpus(
                args.dataset,
                name=args.name,
                split=args.split,
                revision=args.revision,
                streaming=args.streaming,
                audio_column=args.audio_column,
            ),
            args.output_dir,
            codec,
            FlexiCodecFeatureExtractor.from_pretrained(args.model),
            merging_thresholds=args.merging_thresholds,
            target_frame_rates=args.target_frame_rates,
            num_quantizers=args.num_quantizers,
            audio_column=args.audio_column,
            text_column=args.text_column,
            id_column=args.id_column,
            source={"dataset": args.dataset, "name": args.name, "split": args.split, "revision": args.revision},
            split=args.split,
            batch_seconds=args.batch_seconds,
            clips_per_shard=args.clips_per_shard,
            chunk_length_s=args.chunk_length_s,
            num_workers=args.num_workers,
        )
    except CorpusError as error:
        raise CommandError(error) from error
    if manifest is not None:
        print(_summary(args.output_dir, manifest))
    return 0


def _summary(directory: Path, manifest: dict[str, Any]) -> str:
    parts = [f"{directory}: {manifest['num_clips']} clips, {manifest['hours']:.4f} h of audio"]
    parts += [f"{count} tokens at {name}" for name, count in manifest["num_tokens"].items()]
    for count, what in (
        (manifest["num_resampled"], "clips resampled"),
        (manifest["num_downmixed"], "clips of several channels averaged"),
        (manifest["num_broken"], "broken clips skipped, listed in broken.jsonl"),
    ):
        parts += [f"{count} {what}"] if count else []
    return "; ".join(parts)
