"""`convert`: the released files to a repository that `from_pretrained` loads."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import DTYPES, RELEASED_REPO, CommandError, text_beside, usage_error


if TYPE_CHECKING:
    from ..conversion.download import ReleasedFiles
    from ..conversion.repository import VoiceSource

# Options that go with one of others only.
NEEDED = {
    "codec_config": ("codec", "repo"),
    "no_tts": ("repo",),
    "ar_config": ("ar", "repo"),
    "nar_config": ("nar", "repo"),
    "vocoder_config": ("vocoder", "repo"),
    "tts_codec": ("ar", "nar", "repo"),
    "tts_codec_config": ("ar", "nar", "repo"),
    "semantic": ("codec", "ar", "nar", "repo"),
    "private": ("push_to_hub",),
    "create_pr": ("push_to_hub",),
    "into_cache": ("repo",),
}
# Options that may go with --into-cache.
INTO_CACHE = {"into_cache", "repo", "no_tts"}


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "convert",
        help="released files to a directory for from_pretrained",
        description="Convert the released files to a repository that `from_pretrained` loads, and that can go to the "
        "Hub: the codec at its root, and the text-to-speech system. An interrupted conversion continues where it "
        "stopped.",
    )
    add, switch = parser.add_argument, {"action": "store_true", "default": None}
    text = f"take all files from this Hub repository ({RELEASED_REPO}) or directory, but those given one by one"
    add("--repo", metavar="ID_OR_DIR", help=text)
    add("--no-tts", help="with --repo: the codec alone", **switch)
    add = parser.add_argument_group("codec, to the directory itself").add_argument
    add("--codec", type=Path, metavar="FILE", help="the codec, .safetensors or .pt")
    text = "the codec's configuration, a YAML or the config.json of the authors' training code"
    add("--codec-config", type=Path, metavar="YAML", help=text)
    text = "SenseVoice-small's model.pt, for files of a codec without it (--codec, --ar, --nar)"
    add("--semantic", type=Path, metavar="FILE", help=text)

    add = parser.add_argument_group(
        "text-to-speech",
        "With the codec, --ar, --nar, --vocoder and --tokenizer, or with --repo: the whole system, to tts. With some "
        "of them, models of their own, to tts/ar, tts/voicebox and tts/vocoder; the codec in --ar or --nar to "
        "tts/codec.",
    ).add_argument
    for option, name in (("ar", "autoregressive"), ("nar", "Voicebox"), ("vocoder", "vocoder")):
        add(f"--{option}", type=Path, metavar="FILE", help=f"the {name} model, .safetensors or .pt")
        add(f"--{option}-config", type=Path, metavar="JSON", help="the reference's keyword arguments for it")
    add("--tts-codec", type=Path, metavar="FILE", help="the codec of --ar and --nar, where neither file carries it")
    text = "its configuration, where it differs from the released one in more than sizes"
    add("--tts-codec-config", type=Path, metavar="YAML", help=text)
    text = "Whisper repository, directory or tokenizer.json of the text tokenizer (--repo: openai/whisper-tiny)"
    add("--tokenizer", metavar="ID_OR_PATH", help=text)
    text = (
        "a voice of the whole system: a recording of 3 to 15 seconds and what it says (default: the text in the .txt "
        "file beside it). May be repeated; the first one, or the one named default, speaks when a call names none"
    )
    add("--voice", action="append", default=[], metavar="NAME=FILE[:TEXT]", help=text)

    add = parser.add_argument
    add("-o", "--output-dir", type=Path, metavar="DIR", help="directory to write")
    text = (
        "instead of --output-dir: put the files of --repo, a Hub id, to its downloads in the cache of the Hub, where "
        "every program that loads this id finds them"
    )
    add("--into-cache", help=text, **switch)
    add("--dtype", choices=DTYPES, default="float32", help="type to store the weights in")
    add("--allow-partial", action="store_true", help="convert in spite of unknown or missing tensors")
    add("--overwrite", action="store_true", help="replace models that are in the directory")
    add = parser.add_argument_group("upload").add_argument
    add("--push-to-hub", metavar="ID", help="upload the directory to this Hub repository, made if missing")
    add("--create-pr", help="as a pull request that adds files to an existing repository", **switch)
    add("--private", help="make the repository a private one", **switch)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and upload if asked to; returns the exit status."""
    _check_arguments(args)
    import torch

    from ..conversion.cache import install_release
    from ..conversion.checkpoint import CheckpointError
    from ..conversion.download import ReleasedFiles
    from ..conversion.repository import convert_release, push, write_card

    try:
        if args.into_cache:
            print(f"{install_release(args.repo, not args.no_tts)}: `from_pretrained` finds it by {args.repo!r}.")
            return 0
        files = ReleasedFiles(**{field.name: getattr(args, field.name) for field in fields(ReleasedFiles)})
        voices = [_voice(args, voice) for voice in args.voice]
        if args.repo is not None:
            _fetch(args, files)
        if voices and not files.is_whole:
            usage_error(args, "argument --voice: goes with the whole text-to-speech system, such as from --repo")
        dtype = getattr(torch, args.dtype)
        convert_release(files, args.output_dir, voices, dtype, args.allow_partial, args.overwrite)
        if files.codec is not None:
            write_card(args.output_dir, "tts" if files.is_whole else "codec", args.overwrite)
        if files.nar is not None and not files.is_whole:
            write_card(args.output_dir / "tts" / "voicebox", "voicebox", args.overwrite)
        if args.push_to_hub is not None:
            if not any(args.output_dir.rglob("*.safetensors")):
                raise CommandError(f"{args.output_dir} holds no model to push: convert one first.")
            print(f"Pushed: {push(args.output_dir, args.push_to_hub, bool(args.private), bool(args.create_pr))}")
    except CheckpointError as error:
        raise CommandError(_with_options(str(error))) from error
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    for option, needed in NEEDED.items():
        if getattr(args, option) is not None and all(getattr(args, other) is None for other in needed):
            names = " or ".join(map(_option, needed))
            usage_error(args, f"argument {_option(option)}: goes with {names}")
    parts = ("codec", "repo", "ar", "nar", "vocoder", "tokenizer", "push_to_hub")
    if all(getattr(args, part) is None for part in parts):
        usage_error(args, "nothing to convert: pass --codec, --repo, --ar, --nar, --vocoder or --tokenizer")
    if args.into_cache:
        given = {name for name, value in vars(args).items() if value != args.parser.get_default(name)}
        if surplus := sorted(given - INTO_CACHE - {"parser"}):
            usage_error(args, f"argument --into-cache: does not go with {_option(surplus[0])}")
    elif args.output_dir is None:
        usage_error(args, "argument --output-dir: is needed")
    if args.push_to_hub is not None:
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(args.push_to_hub)
        except ValueError as error:
            usage_error(args, f"argument --push-to-hub: {error}")


def _option(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"


def _with_options(message: str) -> str:
    """An error of a function with the options in place of the function's arguments."""
    from ..conversion.download import ReleasedFiles

    names = [field.name for field in fields(ReleasedFiles)] + ["allow_partial", "overwrite"]
    return re.sub(rf"`({'|'.join(names)})(?:=True)?`", lambda match: _option(match[1]), message)


def _fetch(args: argparse.Namespace, files: ReleasedFiles) -> None:
    from ..conversion.checkpoint import CheckpointError

    try:
        files.fetch(args.repo, not args.no_tts)
    except CheckpointError as error:
        codec_alone_works = not args.no_tts and files.codec is not None and not files.is_whole
        hint = " Pass --no-tts to convert the codec alone." if codec_alone_works else ""
        raise CommandError(f"{error}{hint}") from error


def _voice(args: argparse.Namespace, voice: str) -> VoiceSource:
    """`NAME=FILE[:TEXT]`; a file's own name may have colons in it."""
    from ..conversion.repository import VoiceSource

    name, _, rest = voice.partition("=")
    colons = [index for index, character in enumerate(rest) if character == ":"]
    end = next((end for end in (len(rest), *reversed(colons)) if Path(rest[:end]).is_file()), None)
    if not name or end is None:
        usage_error(
            args, f"argument --voice: must be NAME=FILE or NAME=FILE:TEXT, with a file that is there; got {voice!r}"
        )
    audio = Path(rest[:end])
    try:
        return VoiceSource(name, audio, rest[end + 1 :].strip() or text_beside(audio))
    except CommandError:
        raise
    except ValueError as error:
        usage_error(args, f"argument --voice: {error}")
