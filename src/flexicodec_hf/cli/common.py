"""What the commands share: the parser, errors, arguments, the choice of device and model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm


if TYPE_CHECKING:
    from ..configuration_flexicodec import FlexiCodecConfig

PROGRAM = "flexicodec-hf"
RELEASED_REPO = "jiaqili3/flexicodec"
DTYPES = ("float32", "float16", "bfloat16")


class CommandError(ValueError):
    """Something that the user can mend: printed in one line, without a traceback."""


class Parser(argparse.ArgumentParser):
    """A parser, and those of its commands, whose help shows defaults, and names values by their types."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_HelpFormatter, **options)


class _HelpFormatter(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        has_default = action.default not in (None, False, [], [None], argparse.SUPPRESS) and "(default" not in text
        return f"{text} (default: %(default)s)" if has_default else text

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", positive_int: "N", float: "X", cosine: "X", not_negative: "S", positive_seconds: "S"}.get(
            action.type, "TEXT"
        )


def report_error(message: object) -> None:
    """Print an error in one line, beside a progress bar if there is one."""
    tqdm.write(f"{PROGRAM}: error: {' '.join(str(message).split())}", file=sys.stderr)


def usage_error(args: argparse.Namespace, message: str) -> NoReturn:
    """End as argparse does on a wrong argument."""
    parser: argparse.ArgumentParser = args.parser
    parser.error(message)


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """
    Turn what a user can correct into [`CommandError`]: errors of files, the `ValueError` classes of
    this package, and `kinds`.
    """
    try:
        yield
    except Exception as error:
        ours = isinstance(error, ValueError) and type(error).__module__.split(".")[0] == __name__.split(".")[0]
        if ours or isinstance(error, (OSError, *kinds)):
            raise CommandError(error) from error
        raise  # a fault of the program


# Types of arguments


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 0, got {text}")
    return value


def positive_seconds(text: str) -> float:
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0 seconds")
    return value


def cosine(text: str) -> float:
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between -1 and 1, got {text}")
    return value


# Arguments of several commands


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    text = "Hub id or directory, converted or with the authors' files, which are converted once, into the Hub's cache"
    group.add_argument("--model", default=RELEASED_REPO, metavar="ID_OR_DIR", help=text)
    add_running_arguments(group)


def add_running_arguments(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    text = "where to run (default: cuda or mps if there is one, else cpu)"
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help=text)
    add("--dtype", default="float32", choices=DTYPES, help="type to run in; the other two may change some codes")


def add_output_argument(parser: argparse.ArgumentParser, more: str = "") -> None:
    text = f"audio file to write: .wav, .flac, .ogg or .mp3{more}"
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def add_directory_argument(parser: argparse.ArgumentParser) -> None:
    text = "directory to write to; made if missing"
    parser.add_argument("-o", "--output-dir", type=Path, required=True, metavar="DIR", help=text)


def add_chunk_argument(group: argparse._ActionsContainer) -> None:
    text = (
        "process clips longer than twice this in chunks of so many seconds, to bound the memory; 0 never does. Chunks "
        "change no codes of clips up to ten minutes; longer ones cannot be encoded without"
    )
    group.add_argument("--chunk-length-s", type=not_negative, default=30.0, help=text)


def add_rates_arguments(group: argparse._ActionsContainer) -> None:
    """The rates of a command that encodes at several."""
    add = group.add_argument
    text = "encode at each of these thresholds; the encoders run once for all (default: the model's)"
    add("--merging-thresholds", type=cosine, nargs="+", default=[], help=text)
    add("--target-frame-rates", type=float, nargs="+", default=[], help="and at each of these tokens per second")


def add_dataset_arguments(parser: argparse.ArgumentParser, default_split: str) -> None:
    """The arguments of `load_dataset_of`."""
    add = parser.add_argument_group("dataset").add_argument
    add("--config-name", metavar="NAME", help="configuration of a dataset on the Hub")
    add("--split", help=f"which part of the dataset (default: {default_split}, or the only one)")
    add("--revision", help="branch, tag or commit of a dataset on the Hub")
    add("--streaming", action="store_true", help="read a dataset on the Hub without downloading it first")
    for name, default in (
        ("audio", "the one of this type, or of paths"),
        ("text", "text, transcription, transcript, sentence, normalized_text, txt or json.text"),
        ("id", "id or __key__, else the name of the file"),
    ):
        add(f"--{name}-column", metavar="NAME", help=f"column to take as {name} (default: {default})")
    parser.set_defaults(default_split=default_split)


DATASET_SETTINGS = ("config_name", "split", "revision", "audio_column", "text_column", "id_column")


def load_dataset_of(args: argparse.Namespace, source: str, **options: Any) -> Any:
    """The dataset that the arguments name. Parquet and tar files on disk are streamed in any case."""
    from ..data.sources import load_speech

    options |= {name: getattr(args, name) for name in DATASET_SETTINGS}
    return load_speech(source, default_split=args.default_split, streaming=args.streaming or None, **options)


# What arguments name


def check_target_rates(args: argparse.Namespace, config: FlexiCodecConfig, rates: list[float]) -> None:
    """Whether the value of `--target-frame-rate(s)` is in the range of the model."""
    lowest = config.frame_rate / config.max_frames_per_token
    for rate in rates:
        if not lowest <= rate <= config.frame_rate:
            option = "--target-frame-rates" if hasattr(args, "target_frame_rates") else "--target-frame-rate"
            usage_error(
                args,
                f"argument {option}: must be between {lowest} and {config.frame_rate} tokens per second, got {rate}",
            )


def choose_device(args: argparse.Namespace) -> str:
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        return next(device for device, there in available.items() if there)
    if not available[args.device]:
        usage_error(args, f"argument --device: there is no {args.device} device here")
    return args.device


def check_output(args: argparse.Namespace) -> None:
    """Whether the audio file `args.output` can be written: its format, its directory, and that it is not there."""
    from ..audio_flexicodec import AudioError, check_audio_format

    try:
        check_audio_format(args.output)
    except AudioError as error:
        usage_error(args, str(error))
    if not args.output.parent.is_dir():
        raise CommandError(f"{args.output}: there is no directory {args.output.parent}.")
    if args.output.exists() and not args.overwrite:
        raise CommandError(f"{args.output} exists: pass --overwrite to replace it.")


def text_beside(audio: Path) -> str:
    """What a recording says, from the `.txt` file beside it."""
    path = audio.with_suffix(".txt")
    if not path.is_file():
        raise CommandError(
            f"{audio}: what it says is needed, word for word: give it as a text, or in {path}, which is not there."
        )
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Turn every error of loading a model into one line that names the broken file and what to do."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers raise whatever comes
        broken = _broken_file(Path(model))
        first_line = next(iter(str(error).splitlines()), "")
        ours = isinstance(error, (OSError, ValueError, ImportError))
        reason = broken or (first_line if ours else f"{type(error).__name__}: {first_line}")
        remedy = (
            "It is downloaded and converted at its first use, for which the Hub must be within reach."
            if model == RELEASED_REPO
            else f"Download or convert it again, or leave out --model: {RELEASED_REPO} is converted by itself."
        )
        raise CommandError(f"cannot load the model {model}: {reason} {remedy}") from error


def _broken_file(directory: Path) -> str | None:
    """The first file of a repository on disk that is no complete JSON object or safetensors file."""
    from safetensors import safe_open

    for path in (path for folder in (directory, directory / "tts") for path in sorted(folder.glob("*"))):
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(content, dict):
                    return f"{path} must hold a JSON object, got {type(content).__name__}."
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except Exception as error:  # SafetensorError is no ValueError
            return f"{path} is broken or cut ({error})."
    return None


def load_model_config(model: str) -> dict[str, Any]:
    """What the `config.json` of a converted model says."""
    from ..configuration_flexicodec import FlexiCodecConfig
    from ..conversion.cache import converted_release

    with loading(model):
        values, _ = FlexiCodecConfig.get_config_dict(converted_release(model, text_to_speech=False) or model)
        if not values:
            raise ValueError("there is no config.json in it.")
    return values


def load_codec_config(model: str) -> FlexiCodecConfig:
    """The configuration of a converted codec."""
    from ..configuration_flexicodec import FlexiCodecConfig

    values = load_model_config(model)
    if values.get("model_type") != FlexiCodecConfig.model_type:
        raise CommandError(f"{model} is no FlexiCodec: its model type is {values.get('model_type')!r}.")
    with loading(model):
        return FlexiCodecConfig.from_dict(values)
