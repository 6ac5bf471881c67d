"""`convert`: the released files to a repository that `from_pretrained` loads."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils import validate_repo_id

from .common import DTYPES, RELEASED_REPO, CommandError, text_beside, usage_error


if TYPE_CHECKING:
    from ..conversion.progress import Progress
    from ..conversion.repository import Part, VoiceSource

# Where the parts go, below the output directory; all of them become one model in `tts` if all are there. The codec of a
# text-to-speech file is an older one, with other weights than the codec's own file.
TTS_DIR = Path("tts")
PARTS = AR_DIR, VOICEBOX_DIR, VOCODER_DIR, TTS_CODEC_DIR = tuple(
    TTS_DIR / name for name in ("ar", "voicebox", "vocoder", "codec")
)
# What decides the result.
SOURCES = (
    *("codec", "codec_config", "semantic", "ar", "ar_config", "nar", "nar_config", "vocoder", "vocoder_config"),
    *("tts_codec", "tts_codec_config", "tokenizer"),
)

NEEDED = {
    "codec_config": ("codec", "repo"),
    "semantic_repo": ("repo",),
    "vocoder_repo": ("repo",),
    "no_tts": ("repo",),
    "ar_config": ("ar", "repo"),
    "nar_config": ("nar", "repo"),
    "vocoder_config": ("vocoder", "repo"),
    "tts_codec": ("ar", "nar", "repo"),
    "tts_codec_config": ("ar", "nar", "repo"),
    "semantic": ("codec", "ar", "nar", "repo"),
    "private": ("push_to_hub",),
    "create_pr": ("push_to_hub",),
}


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "convert",
        help="released files to a directory for from_pretrained",
        description="Convert the released files to a repository that `from_pretrained` loads, and that can go to the Hub: "
        "the codec at its root, and the text-to-speech system. An interrupted conversion goes on where it stopped.",
    )
    parser.add_argument(
        "--repo",
        metavar="ID_OR_DIR",
        help=f"take all files from this Hub repository ({RELEASED_REPO}) or directory, but those given one by one",
    )
    parser.add_argument("--no-tts", action="store_true", default=None, help="with --repo: the codec alone")
    codec = parser.add_argument_group("codec, to the directory itself")
    codec.add_argument("--codec", type=Path, metavar="FILE", help="the codec, .safetensors or .pt")
    codec.add_argument("--codec-config", type=Path, metavar="YAML", help="the codec's configuration")
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
        f"With the codec, --ar, --nar, --vocoder and --tokenizer, or with --repo: the whole system, to {TTS_DIR}. With "
        f"some of them, models of their own, to {AR_DIR}, {VOICEBOX_DIR} and {VOCODER_DIR}; the codec in --ar or --nar to "
        f"{TTS_CODEC_DIR}.",
    )
    for option, name in (("ar", "autoregressive"), ("nar", "Voicebox"), ("vocoder", "vocoder")):
        tts.add_argument(f"--{option}", type=Path, metavar="FILE", help=f"the {name} model, .safetensors or .pt")
        tts.add_argument(
            f"--{option}-config", type=Path, metavar="JSON", help="the reference's keyword arguments for it"
        )
    tts.add_argument(
        "--vocoder-repo",
        metavar="ID_OR_DIR",
        help="where --repo finds the vocoder if it has none (default: amphion/dualcodec-tts)",
    )
    tts.add_argument(
        "--tts-codec", type=Path, metavar="FILE", help="the codec of --ar and --nar, where neither file carries it"
    )
    tts.add_argument(
        "--tts-codec-config",
        type=Path,
        metavar="YAML",
        help="its configuration, where it differs from the released one in more than sizes",
    )
    tts.add_argument(
        "--tokenizer",
        metavar="ID_OR_PATH",
        help="make the text tokenizer from this Whisper repository, directory or tokenizer.json (default with --repo: "
        "openai/whisper-tiny)",
    )
    tts.add_argument(
        "--voice",
        action="append",
        default=[],
        metavar="NAME=FILE[:TEXT]",
        help="a voice of the whole system: a recording of 3 to 15 seconds and what it says (default: what is in the .txt "
        "file beside it). May be repeated; the first one, or the one named default, speaks when a call names none",
    )
    parser.add_argument("-o", "--output-dir", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type to store the weights in (default: %(default)s)"
    )
    parser.add_argument("--allow-partial", action="store_true", help="convert in spite of unknown or missing tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace models that are in the directory")
    hub = parser.add_argument_group("upload")
    hub.add_argument(
        "--push-to-hub", metavar="ID", help="upload the directory to this Hub repository, made if missing"
    )
    hub.add_argument("--create-pr", action="store_true", default=None, help="as a pull request")
    hub.add_argument("--private", action="store_true", default=None, help="make the repository a private one")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    for option, needed in NEEDED.items():
        if getattr(args, option) is not None and all(getattr(args, other) is None for other in needed):
            names = " or ".join(f"--{other.replace('_', '-')}" for other in needed)
            usage_error(args, f"argument --{option.replace('_', '-')}: goes with {names}")
    parts = ("codec", "repo", "ar", "nar", "vocoder", "tokenizer", "push_to_hub")
    if all(getattr(args, part) is None for part in parts):
        usage_error(args, "nothing to convert: pass --codec, --repo, --ar, --nar, --vocoder or --tokenizer")
    if args.push_to_hub is not None:
        try:
            validate_repo_id(args.push_to_hub)
        except ValueError as error:
            usage_error(args, f"argument --push-to-hub: {error}")
    from ..conversion.checkpoint import CheckpointError
    from ..conversion.progress import Progress
    from ..conversion.repository import list_parts, push, write_card

    try:
        voices = [_voice(args, voice) for voice in args.voice]
        if args.repo is not None:
            _fetch(args)
        args.whole = None not in (args.codec, args.ar, args.nar, args.vocoder, args.tokenizer)
        if voices and not args.whole:
            usage_error(args, "argument --voice: goes with the whole text-to-speech system, such as from --repo")
        progress = Progress(args.output_dir, args.overwrite)
        if args.whole:
            _convert_whole(args, progress, voices)
        else:
            _convert_codec(args, progress)
            _convert_tts_parts(args, progress)
            if args.tokenizer is not None:
                _tokenizer(args).save_pretrained(args.output_dir / AR_DIR)
        if args.codec is not None:
            write_card(args.output_dir, "tts" if args.whole else "codec", args.push_to_hub, args.overwrite)
        if args.nar is not None and not args.whole:
            write_card(args.output_dir / VOICEBOX_DIR, "voicebox", overwrite=args.overwrite)
        models = list_parts(args.output_dir)
        if models:
            _print_table(models)
        if args.push_to_hub is not None:
            if not models:
                raise CommandError(f"{args.output_dir} holds no model to push: convert one first.")
            print(f"Pushed: {push(args.output_dir, args.push_to_hub, bool(args.private), bool(args.create_pr))}")
        progress.finish()
    except CheckpointError as error:
        raise CommandError(error) from error
    return 0


def _fetch(args: argparse.Namespace) -> None:
    """Fill in what `--repo` has of what was not given."""
    from ..conversion import download
    from ..conversion.checkpoint import CheckpointError
    from ..conversion.tokenizer import DEFAULT_SOURCE

    if args.codec is None:
        args.codec = download.fetch(args.repo, download.CODEC_FILE)
        args.codec_config = args.codec_config or download.fetch(args.repo, download.CODEC_CONFIG_FILE)
    codecs = [args.codec]
    if not args.no_tts:
        try:
            args.ar = args.ar or download.fetch(args.repo, download.AR_FILE)
            args.nar = args.nar or download.fetch(args.repo, download.NAR_FILE)
            if args.tts_codec is None and not any(map(download.has_codec, (args.ar, args.nar))):
                args.tts_codec = download.fetch(args.repo, download.TTS_CODEC_FILE)
            if args.vocoder is None:
                here = Path(args.repo) / download.VOCODER_FILE
                repo = args.vocoder_repo or download.VOCODER_REPO
                args.vocoder = here if here.is_file() else download.fetch(repo, download.VOCODER_FILE)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Pass --no-tts to convert the codec alone.") from error
        args.tokenizer = args.tokenizer or DEFAULT_SOURCE
        codecs.append(_tts_codec(args))
    if args.semantic is None and not all(map(download.has_semantic_encoder, codecs)):
        args.semantic = download.fetch(args.semantic_repo or download.SEMANTIC_REPO, download.SEMANTIC_FILE)


def _tts_codec(args: argparse.Namespace) -> Path | None:
    """The file with the codec that the text-to-speech models were trained with; both of theirs carry it."""
    from ..conversion.download import has_codec

    if args.tts_codec is not None:
        return args.tts_codec
    return next((source for source in (args.ar, args.nar) if source is not None and has_codec(source)), None)


def _convert_codec(args: argparse.Namespace, progress: Progress) -> None:
    from ..conversion.codec import convert_codec

    def convert(directory: Path) -> None:
        convert_codec(args.codec, directory, args.codec_config, args.semantic, **_options(args))

    if args.codec is not None:
        _convert(args, progress, "codec", Path(), [args.codec, args.codec_config, args.semantic], convert)


def _convert_tts_parts(args: argparse.Namespace, progress: Progress) -> None:
    """The models of the text-to-speech system, each to a directory of its own."""
    from ..conversion.ar import convert_ar
    from ..conversion.codec import convert_codec
    from ..conversion.nar import convert_vocoder, convert_voicebox

    def converter(function: Callable[..., Any], source: Path, config: Any) -> Callable[[Path], Any]:
        return lambda directory: function(source, directory, config, **_options(args))

    for name, directory, function, source, config in (
        ("autoregressive model", AR_DIR, convert_ar, args.ar, args.ar_config),
        ("Voicebox model", VOICEBOX_DIR, convert_voicebox, args.nar, args.nar_config),
        ("vocoder", VOCODER_DIR, convert_vocoder, args.vocoder, args.vocoder_config),
    ):
        if source is not None:
            _convert(
                args, progress, name, directory, [source, config], converter(function, source, _read_json(config))
            )
    if (source := _tts_codec(args)) is not None:
        _convert(
            args,
            progress,
            "codec of the text-to-speech models",
            TTS_CODEC_DIR,
            [source, args.tts_codec_config, args.semantic],
            lambda directory: convert_codec(source, directory, args.tts_codec_config, args.semantic, **_options(args)),
        )


def _convert_whole(args: argparse.Namespace, progress: Progress, voices: list[VoiceSource]) -> None:
    """Codec and text-to-speech system as one repository."""
    from ..conversion.repository import assemble

    if _tts_codec(args) is None:
        usage_error(args, "neither --ar nor --nar carries the codec of the text-to-speech models: pass --tts-codec")
    sources = [getattr(args, name) for name in SOURCES] + [str(_options(args))]
    sources += [part for voice in voices for part in (voice.name, voice.audio, voice.text)]
    _convert_codec(args, progress)
    name, result = "text-to-speech system", args.output_dir / TTS_DIR / "model.safetensors"
    if not progress.is_done(name, result, sources):
        tokenizer = _tokenizer(args)  # the quickest thing that can fail
        _convert_tts_parts(args, progress)
        parts = {directory.name: args.output_dir / directory for directory in PARTS}
        with progress.making(name, result, sources):
            assemble(args.output_dir, args.output_dir, parts, tokenizer, voices, _options(args)["dtype"])
    for directory in PARTS:
        shutil.rmtree(args.output_dir / directory, ignore_errors=True)
    print(
        f"{args.output_dir}: text-to-speech; load it with pipeline('text-to-speech', model={str(args.output_dir)!r})."
    )


def _convert(
    args: argparse.Namespace,
    progress: Progress,
    name: str,
    part: Path,
    sources: list[Any],
    convert: Callable[[Path], Any],
) -> None:
    """One model, unless an interrupted conversion did it."""
    directory = args.output_dir / part
    sources = [*sources, str(_options(args))]
    result = directory / "model.safetensors"
    if progress.is_done(name, result, sources):
        print(f"{directory}: {name}, done before.")
        return
    with progress.making(name, result, sources):
        convert(directory)
    if args.whole and part != Path():
        print(f"{directory}: {name}.")
        return
    loader = "AutoModelForCausalLM" if part == AR_DIR else "AutoModel"
    print(f"{directory}: {name}, {args.dtype}; load it with {loader}.from_pretrained({str(directory)!r}).")


def _tokenizer(args: argparse.Namespace) -> Any:
    from ..conversion.tokenizer import build_tokenizer

    try:
        return build_tokenizer(args.tokenizer)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error


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


def _print_table(parts: list[Part]) -> None:
    rows = [(part.name, part.num_parameters, part.dtypes, part.num_bytes) for part in parts]
    rows.append(("total", sum(row[1] for row in rows), "", sum(row[3] for row in rows)))
    width = max(len(row[0]) for row in rows)
    print(f"{'part':{width}}  {'parameters':>13}  {'type':>8}  {'MB':>8}")
    for name, num_parameters, dtypes, num_bytes in rows:
        print(f"{name:{width}}  {num_parameters:13,}  {dtypes:>8}  {num_bytes / 1e6:8.1f}")
