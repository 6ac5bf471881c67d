"""`tokenize`: a dataset of speech to a dataset of tokens."""

from __future__ import annotations

import argparse
from typing import Any

from .common import (
    DATASET_SETTINGS,
    add_chunk_argument,
    add_dataset_arguments,
    add_directory_argument,
    add_model_arguments,
    add_rates_arguments,
    check_target_rates,
    choose_device,
    load_codec_config,
    load_dataset_of,
    loading,
    positive_int,
    positive_seconds,
)


# Arguments of `tokenize_corpus` that are options of the same name.
_TOKENIZE_ARGUMENTS = (
    "merging_thresholds",
    "target_frame_rates",
    "num_quantizers",
    "batch_seconds",
    "clips_per_shard",
    "chunk_length_s",
    "num_workers",
)


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "tokenize",
        help="a dataset of speech to a dataset of tokens",
        description="Encode a dataset to Parquet files with a row for each clip and rate, which `datasets` loads. A "
        "run that was interrupted goes on where it stopped.",
    )
    text = (
        "folder of audio files (with or without metadata), .jsonl, .csv or .tsv file with a column of paths, .parquet "
        "or .tar files (a folder, a quoted pattern), or a dataset on the Hub"
    )
    parser.add_argument("dataset", help=text)
    add_directory_argument(parser)
    add_dataset_arguments(parser, default_split="train")
    tokens = parser.add_argument_group("tokens")
    add_rates_arguments(tokens)
    tokens.add_argument("--num-quantizers", type=positive_int, help="codebooks to keep (default: all)")
    work = parser.add_argument_group("work")
    add = work.add_argument
    add("--batch-seconds", type=positive_seconds, default=120.0, help="seconds of audio to encode at once")
    text = "clips in a Parquet file; an interruption costs one such file at most"
    add("--clips-per-shard", type=positive_int, default=1000, help=text)
    text = "threads that read audio (default: one for each processor, 8 at most)"
    add("--num-workers", type=positive_int, help=text)
    add_chunk_argument(work)
    add_model_arguments(parser)
    parser.set_defaults(run=run_tokenize, parser=parser)


def run_tokenize(args: argparse.Namespace) -> int:
    """`tokenize DATASET -o DIR`; returns the exit status."""
    from ..data.files import require

    require("datasets", "`tokenize`", "train")
    from ..data.runner import CodecRunner
    from ..data.tokenization import tokenize_corpus

    check_target_rates(args, load_codec_config(args.model), args.target_frame_rates)
    device = choose_device(args)
    with loading(args.model):
        runner = CodecRunner.from_pretrained(args.model, device, args.dtype)
    manifest = tokenize_corpus(
        load_dataset_of(args, args.dataset),
        args.output_dir,
        runner.codec,
        runner.feature_extractor,
        source={name: getattr(args, name) for name in ("dataset", *DATASET_SETTINGS)},
        split=(args.split or "train").split("[")[0],
        **{name: getattr(args, name) for name in _TOKENIZE_ARGUMENTS},
    )
    parts = [f"{args.output_dir}: {manifest['num_clips']} clips, {manifest['hours']:.4f} h of audio"]
    parts += [f"{count} tokens at {name}" for name, count in manifest["num_tokens"].items()]
    for count, what in (
        (manifest["num_resampled"], "clips resampled"),
        (manifest["num_downmixed"], "clips of several channels averaged"),
        (manifest["num_broken"], "broken clips skipped, listed in broken.jsonl"),
    ):
        parts += [f"{count} {what}"] if count else []
    print("; ".join(parts))
    return 0
