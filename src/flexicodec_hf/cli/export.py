"""`export`: a model as files that run without PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import RELEASED_REPO, CommandError, load_model_config, loading, user_errors


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "export",
        help="a model to ONNX files that run without PyTorch",
        description="Write the codec, and the text-to-speech system if the model has one, as ONNX files, with the "
        "code that runs them on NumPy and ONNX Runtime: `cd DIR && python -m flexicodec_onnx --help`.",
    )
    add = parser.add_argument
    add("output_dir", type=Path, metavar="DIR", help="directory to write; it must not exist")
    add("--format", default="onnx", choices=("onnx",), help="of the files; the only one so far")
    text = "converted model, a Hub id or a directory"
    add("--model", default=RELEASED_REPO, metavar="ID_OR_DIR", help=text)
    parser.set_defaults(run=run_export, parser=parser)


def run_export(args: argparse.Namespace) -> int:
    """`export DIR`; returns the exit status."""
    from ..export.onnx import export_onnx
    from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
    from ..modeling_flexicodec import FlexiCodecModel
    from ..modeling_flexicodec_tts import FlexiCodecForTextToSpeech
    from ..processing_flexicodec_tts import FlexiCodecTTSProcessor
    from ..repository_flexicodec_tts import find_tts

    if args.output_dir.exists():
        raise CommandError(f"{args.output_dir} exists: choose another directory, or delete it.")
    load_model_config(args.model)  # a clear error if there is no model
    try:
        find_tts(args.model)
    except OSError:
        has_tts = False  # the codec alone
    else:
        has_tts = True
    with loading(args.model):
        codec = FlexiCodecModel.from_pretrained(args.model).eval()
        extractor = FlexiCodecFeatureExtractor.from_pretrained(args.model)
        tts = FlexiCodecForTextToSpeech.from_pretrained(args.model).eval() if has_tts else None
        processor = FlexiCodecTTSProcessor.from_pretrained(args.model) if has_tts else None
    with user_errors():
        export_onnx(args.output_dir, codec, extractor, tts, processor)
    what = "codec and text to speech" if has_tts else "codec"
    print(f"{args.output_dir}: {what}. Run them there: python -m flexicodec_onnx --help")
    return 0
