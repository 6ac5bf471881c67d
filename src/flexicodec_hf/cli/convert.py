"""`convert`: the released files to a repository that `from_pretrained` loads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import DTYPES, RELEASED_REPO, CommandError, usage_error


# Where the parts go, below the output directory. The codec that a text-to-speech file carries is an older one, with
# other weights than the codec's own file.
AR_DIR, VOICEBOX_DIR, VOCODER_DIR, TTS_CODEC_DIR = (
    Path("tts") / name for name in ("ar", "voicebox", "vocoder", "codec")
)

NEEDED = {
    "codec_config": "codec",
    "semantic_repo": "repo",
    "ar_config": "ar",
    "nar_config": "nar",
    "vocoder_config": "vocoder",
}


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "convert",
        help="released files to a directory for from_pretrained",
        description="Convert the released files, one part or several, to a directory that `from_pretrained` loads, and "
        "that can go to the Hub.",
    )
    codec = parser.add_argument_group("codec, to the directory itself")
    source = codec.add_mutually_exclusive_group()
    source.add_argument("--codec", type=Path, metavar="FILE", help="the codec, .safetensors or .pt")
    source.add_argument(
        "--repo",
        metavar="ID_OR_DIR",
        help=f"download the released codec from this Hub repository ({RELEASED_REPO}), or find it in a directory",
    )
    codec.add_argument("--codec-config", type=Path, metavar="YAML", help="the codec's configuration, with --codec")
    codec.add_argument(
        "--semantic",
        type=Path,
        metavar="FILE",
        help="SenseVoice-small's model.pt, for files of a codec without it (--codec, --ar, --nar)",
    )
    codec.add_argument(
        "--semantic-repo",
        metavar="ID_OR_DIR",
        help="where --repo finds SenseVoice-small if the codec lacks it (default: FunAudioLLM/SenseVoiceSmall)",
    )
    tts = parser.add_argument_group(
        "text-to-speech",
        f"to {AR_DIR}, {VOICEBOX_DIR} and {VOCODER_DIR}; the codec in --ar or --nar to {TTS_CODEC_DIR}",
    )
    for option, name in (("ar", "autoregressive"), ("nar", "Voicebox"), ("vocoder", "vocoder")):
        tts.add_argument(f"--{option}", type=Path, metavar="FILE", help=f"the {name} model, .safetensors or .pt")
        tts.add_argument(
            f"--{option}-config", type=Path, metavar="JSON", help=f"the reference's keyword arguments, with --{option}"
        )
    tts.add_argument(
        "--tts-codec-config",
        type=Path,
        metavar="YAML",
        help="the configuration of the codec in --ar or --nar, where it differs from the released one in more than sizes",
    )
    tts.add_argument(
        "--tokenizer",
        metavar="ID_OR_PATH",
        help=f"make the text tokenizer from this Whisper repository, directory or tokenizer.json, in {AR_DIR}",
    )
    parser.add_argument("-o", "--output-dir", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type to store the weights in (default: %(default)s)"
    )
    parser.add_argument("--allow-partial", action="store_true", help="convert in spite of unknown or missing tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace models that are in the directory")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    for option, needed in NEEDED.items():
        if getattr(args, option) is not None and getattr(args, needed) is None:
            usage_error(args, f"argument --{option.replace('_', '-')}: goes with --{needed}")
    if args.semantic is not None and args.codec is None and args.ar is None and args.nar is None:
        usage_error(args, "argument --semantic: goes with --codec, --ar or --nar")
    parts = [
        part for part in ("codec", "repo", "ar", "nar", "vocoder", "tokenizer") if getattr(args, part) is not None
    ]
    if not parts:
        usage_error(args, "nothing to convert: pass --codec, --repo, --ar, --nar, --vocoder or --tokenizer")
    from ..conversion.checkpoint import CheckpointError

    try:
        if args.codec is not None or args.repo is not None:
            _convert_codec(args)
        if args.ar is not None:
            _convert_ar(args)
        if args.nar is not None:
            _convert_voicebox(args)
        if args.vocoder is not None:
            _convert_vocoder(args)
        if args.ar is not None or args.nar is not None:
            _convert_tts_codec(args)
        if args.tokenizer is not None:
            _convert_tokenizer(args)
    except CheckpointError as error:
        raise CommandError(error) from error
    return 0


def _convert_codec(args: argparse.Namespace) -> None:
    from ..conversion.codec import convert_codec
    from ..conversion.download import SEMANTIC_REPO, fetch_codec

    directory = _target(args, Path())
    codec, codec_config, semantic = args.codec, args.codec_config, args.semantic
    if args.repo is not None:
        codec, codec_config, semantic = fetch_codec(args.repo, args.semantic_repo or SEMANTIC_REPO)
    config = convert_codec(codec, directory, codec_config=codec_config, semantic=semantic, **_options(args))
    _report(args, directory, f"codec of {config.frame_rate:g} frames per second, {config.num_quantizers} quantizers")


def _convert_ar(args: argparse.Namespace) -> None:
    from ..conversion.ar import convert_ar

    directory = _target(args, AR_DIR)
    convert_ar(args.ar, directory, ar_config=_read_json(args.ar_config), **_options(args))
    _report(args, directory, "autoregressive model", loader="AutoModelForCausalLM")


def _convert_voicebox(args: argparse.Namespace) -> None:
    from ..conversion.nar import convert_voicebox

    directory = _target(args, VOICEBOX_DIR)
    convert_voicebox(args.nar, directory, nar_config=_read_json(args.nar_config), **_options(args))
    _report(args, directory, "Voicebox model")


def _convert_vocoder(args: argparse.Namespace) -> None:
    from ..conversion.nar import convert_vocoder

    directory = _target(args, VOCODER_DIR)
    convert_vocoder(args.vocoder, directory, vocoder_config=_read_json(args.vocoder_config), **_options(args))
    _report(args, directory, "vocoder")


def _convert_tts_codec(args: argparse.Namespace) -> None:
    """The codec that the text-to-speech models were trained with; both of their files carry it."""
    from ..conversion.checkpoint import TTS_CODEC_PREFIXES, SourceCheckpoint
    from ..conversion.codec import convert_codec

    for source in (args.ar, args.nar):
        if source is not None and any(name.startswith(TTS_CODEC_PREFIXES) for name in SourceCheckpoint(source)):
            directory = _target(args, TTS_CODEC_DIR)
            convert_codec(
                source, directory, codec_config=args.tts_codec_config, semantic=args.semantic, **_options(args)
            )
            _report(args, directory, f"codec in {source.name}")
            return


def _convert_tokenizer(args: argparse.Namespace) -> None:
    from ..conversion.tokenizer import build_tokenizer

    directory = args.output_dir / AR_DIR
    try:
        tokenizer = build_tokenizer(args.tokenizer)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    tokenizer.save_pretrained(directory)
    print(f"{directory}: tokenizer of {len(tokenizer)} entries.")


def _target(args: argparse.Namespace, part: Path) -> Path:
    """The directory of a part, which must not hold a model yet."""
    directory: Path = args.output_dir / part
    weights = directory / "model.safetensors"
    if weights.exists() and not args.overwrite:
        raise CommandError(f"{weights} exists: pass --overwrite to replace it.")
    return directory


def _options(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {"dtype": getattr(torch, args.dtype), "allow_partial": args.allow_partial}


def _read_json(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CommandError(f"{path} is no JSON: {error}.") from error


def _report(args: argparse.Namespace, directory: Path, what: str, loader: str = "AutoModel") -> None:
    size = (directory / "model.safetensors").stat().st_size / 1e6
    call = f"{loader}.from_pretrained({str(directory)!r})"
    print(f"{directory}: {what}, {args.dtype}, {size:.1f} MB; load it with {call}.")
