"""`app`: a web page to listen on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import CommandError, add_model_arguments, text_beside
from .serve import load_codec_and_speaker


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "app",
        help="a web page to listen on",
        description="A web page: recordings to tokens and back, text to speech, and voice conversion. Needs the extra "
        "[app].",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; the default is heard by this machine alone")
    add("--port", type=int, default=7860, help="port to listen at")
    text = "recordings to try on the page, each with a .txt file beside it that says its words"
    add("--clips", type=Path, metavar="DIR", help=text)
    text = (
        "a Whisper in CTranslate2's format, such as Systran/faster-whisper-base, to show the words of a recording in "
    )
    add("--whisper", metavar="ID_OR_DIR", help=text + "its picture (needs the package ctranslate2)")
    add_model_arguments(parser)
    parser.set_defaults(run=run_app, parser=parser)


def run_app(args: argparse.Namespace) -> int:
    """`app`; returns the exit status when the page is stopped."""
    from ..data.files import require

    for module in ("gradio", "matplotlib"):
        require(module, "`app`", "app")
    build(args).launch(
        server_name=args.host,
        server_port=args.port,
        allowed_paths=[] if args.clips is None else [str(args.clips.absolute())],
        max_file_size="25mb",
    )
    return 0


def build(args: argparse.Namespace) -> Any:
    """The page with the model that the arguments name."""
    from ..serving.page import build_page

    clips = []
    if args.clips is not None:
        clips = sorted(path.absolute() for path in args.clips.iterdir() if path.suffix in (".flac", ".wav", ".mp3"))
        if not clips:
            raise CommandError(f"{args.clips} holds no .flac, .wav or .mp3 files.")
        for clip in clips:
            text_beside(clip)
    aligner = None
    if args.whisper is not None:
        from ..serving.words import load_aligner

        aligner = load_aligner(args.whisper)
    return build_page(*load_codec_and_speaker(args), clips, aligner)
