"""`convert`: the released files to a repository that `from_pretrained` loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import DTYPES, RELEASED_REPO, CommandError, usage_error


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "convert",
        help="released files to a directory for from_pretrained",
        description="Convert the released files to a directory that `from_pretrained` loads, and that can go to the Hub.",
    )
    codec = parser.add_argument_group("codec")
    source = codec.add_mutually_exclusive_group(required=True)
    source.add_argument("--codec", type=Path, metavar="FILE", help="the codec, .safetensors or .pt")
    source.add_argument(
        "--repo",
        metavar="ID_OR_DIR",
        help=f"download the released codec from this Hub repository ({RELEASED_REPO}), or find it in a directory",
    )
    codec.add_argument("--codec-config", type=Path, metavar="YAML", help="the codec's configuration, with --codec")
    codec.add_argument(
        "--semantic", type=Path, metavar="FILE", help="SenseVoice-small's model.pt, with --codec files that lack it"
    )
    codec.add_argument(
        "--semantic-repo",
        metavar="ID_OR_DIR",
        help="where --repo finds SenseVoice-small if the codec lacks it (default: FunAudioLLM/SenseVoiceSmall)",
    )
    parser.add_argument("-o", "--output-dir", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type to store the weights in (default: %(default)s)"
    )
    parser.add_argument("--allow-partial", action="store_true", help="convert in spite of unknown or missing tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in the directory")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    for option, needed in (("codec_config", "codec"), ("semantic", "codec"), ("semantic_repo", "repo")):
        if getattr(args, option) is not None and getattr(args, needed) is None:
            usage_error(args, f"argument --{option.replace('_', '-')}: goes with --{needed}")
    from ..conversion.checkpoint import CheckpointError

    try:
        _convert_codec(args)
    except CheckpointError as error:
        raise CommandError(error) from error
    print(f"{args.output_dir}: load it with AutoModel.from_pretrained({str(args.output_dir)!r}).")
    return 0


def _convert_codec(args: argparse.Namespace) -> None:
    import torch

    from ..conversion.codec import convert_codec
    from ..conversion.download import SEMANTIC_REPO, fetch_codec

    weights = args.output_dir / "model.safetensors"
    if weights.exists() and not args.overwrite:
        raise CommandError(f"{weights} exists: pass --overwrite to replace it.")
    codec, codec_config, semantic = args.codec, args.codec_config, args.semantic
    if args.repo is not None:
        codec, codec_config, semantic = fetch_codec(args.repo, args.semantic_repo or SEMANTIC_REPO)
    config = convert_codec(
        codec,
        args.output_dir,
        codec_config=codec_config,
        semantic=semantic,
        dtype=getattr(torch, args.dtype),
        allow_partial=args.allow_partial,
    )
    print(
        f"{weights}: codec of {config.frame_rate:g} frames per second with {config.num_quantizers} quantizers, "
        f"{args.dtype}, {weights.stat().st_size / 1e6:.1f} MB."
    )
