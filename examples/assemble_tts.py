"""
Put trained models together into one repository, which `AutoModel` and `pipeline("text-to-speech")`
load.

python examples/assemble_tts.py --codec codec --ar ar --output_dir mine --voice "me=me.wav:What I say."
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from flexicodec_hf.conversion.repository import VoiceSource, assemble


def voice(argument: str) -> VoiceSource:
    name, _, source = argument.partition("=")
    file, separator, text = source.partition(":")
    if not separator:
        raise argparse.ArgumentTypeError(f"{argument!r} is not NAME=FILE:TEXT.")
    return VoiceSource(name, Path(file), text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put trained models together into one repository.")
    parser.add_argument("--codec", type=Path, required=True, help="directory of train_codec.py's model")
    parser.add_argument("--ar", type=Path, required=True, help="directory of train_ar.py")
    parser.add_argument("--voicebox", type=Path, help="directory of train_voicebox.py, for a second stage")
    parser.add_argument(
        "--vocoder", type=Path, help="directory of train_vocoder.py's model, for a Voicebox of mel spectrograms"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--voice",
        type=voice,
        action="append",
        default=[],
        metavar="NAME=FILE:TEXT",
        help="a recording of a voice and what it says; the first voice is the default",
    )
    parser.add_argument(
        "--storage_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="type of the weights in the files; they load as float32 (default: %(default)s)",
    )
    args = parser.parse_args(argv)

    parts = {name: getattr(args, name) for name in ("codec", "ar", "voicebox", "vocoder")}
    parts = {name: folder for name, folder in parts.items() if folder is not None}
    tokenizer = AutoTokenizer.from_pretrained(args.ar)
    storage_dtype = getattr(torch, args.storage_dtype)
    assemble(args.output_dir, args.codec, parts, tokenizer, args.voice, storage_dtype=storage_dtype)


if __name__ == "__main__":
    main()
