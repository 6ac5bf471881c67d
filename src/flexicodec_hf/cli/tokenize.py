"""`tokenize`: a dataset of speech to a dataset of tokens."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .common import (
    add_chunk_argument,
    add_model_arguments,
    check_target_rates,
    choose_device,
    cosine,
    load_codec_config,
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
        "run that was interrupted goes on where it stopped. With `accelerate launch --no-python`, several "
        "processes share the work.",
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
    source.add_argument("--config-name", metavar="NAME", help="configuration of a dataset on the Hub")
    source.add_argument("--split", help="which part of the dataset (default: train, or the only one)")
    source.add_argument("--revision", help="branch, tag or commit of a dataset on the Hub")
    source.add_argument(
        "--streaming",
        action="store_true",
        default=None,
        help="read a dataset on the Hub as it comes, without downloading it first",
    )
    for name, default in (
        ("audio", "the one of this type, or of paths"),
        ("text", "text, transcription, transcript, sentence, normalized_text, txt or json.text"),
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
    rates.add_argument("--num-quantizers", type=positive_int, metavar="N", help="codebooks to keep (default: all)")
    work = parser.add_argument_group("work")
    work.add_argument(
        "--batch-seconds",
        type=positive_seconds,
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
    add_chunk_argument(work)
    add_model_arguments(parser)
    parser.set_defaults(run=run_tokenize, parser=parser)


def run_tokenize(args: argparse.Namespace) -> int:
    """`tokenize DATASET -o DIR`; returns the exit status."""
    from ..data.files import require

    require("datasets", "`tokenize`", "train")
    from ..data.runner import CodecRunner
    from ..data.sources import load_speech
    from ..data.tokenization import tokenize_corpus

    check_target_rates(args, load_codec_config(args.model), args.target_frame_rates)
    device = choose_device(args)
    if device == "cuda":
        import torch

        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    with loading(args.model):
        runner = CodecRunner.from_pretrained(args.model, device, args.dtype)
    columns = {name: getattr(args, name) for name in ("audio_column", "text_column", "id_column")}
    dataset = load_speech(
        args.dataset,
        config_name=args.config_name,
        split=args.split,
        default_split="train",
        revision=args.revision,
        streaming=args.streaming,
        **columns,
    )
    manifest = tokenize_corpus(
        dataset,
        args.output_dir,
        runner.codec,
        runner.feature_extractor,
        source={name: getattr(args, name) for name in ("dataset", "config_name", "split", "revision")} | columns,
        split=(args.split or "train").split("[")[0],
        **{name: getattr(args, name) for name in _TOKENIZE_ARGUMENTS},
    )
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
