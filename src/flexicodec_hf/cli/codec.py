"""`reconstruct`, `encode` and `decode`: audio to tokens and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .common import (
    CommandError,
    add_model_arguments,
    check_output,
    choose_device,
    cosine,
    load_codec_config,
    not_negative,
    positive_int,
    report_error,
    usage_error,
    whole_file,
)


if TYPE_CHECKING:
    from ..configuration_flexicodec import FlexiCodecConfig
    from .runner import CodecRunner
    from .tokens import Tokens, TokensRow


def add_commands(commands: Any) -> None:
    """Add the commands to what `add_subparsers` returned."""
    reconstruct = commands.add_parser(
        "reconstruct",
        help="encode an audio file and decode it again",
        description="Encode an audio file and decode it again, to hear what the codec keeps.",
    )
    reconstruct.add_argument("input", type=Path, metavar="IN", help="audio file; any rate, any number of channels")
    reconstruct.add_argument("output", type=Path, metavar="OUT", help="audio file to write: .wav, .flac, .ogg or .mp3")
    _add_arguments(reconstruct, encodes=True)
    reconstruct.set_defaults(run=run_reconstruct, parser=reconstruct, batch_size=1)

    encode = commands.add_parser(
        "encode",
        help="audio files to files of tokens",
        description="Encode audio files, each to a safetensors file with `audio_codes` (num_quantizers, num_tokens) and "
        "`token_lengths` (num_tokens,). Files that are done already are skipped, so that an interrupted run can go on.",
    )
    encode.add_argument(
        "inputs", type=Path, nargs="+", metavar="IN", help="audio file; any rate, any number of channels"
    )
    _add_arguments(encode, encodes=True, many=True)
    encode.set_defaults(run=run_encode, parser=encode)

    decode = commands.add_parser(
        "decode",
        help="files of tokens to audio files",
        description="Decode files of tokens that `encode` wrote, and all rows of those that `tokenize` wrote, each to a "
        "WAV file as long as the clip was. Files that are done already are skipped.",
    )
    decode.add_argument(
        "inputs", type=Path, nargs="+", metavar="FILE", help="file of tokens, .safetensors or .parquet"
    )
    _add_arguments(decode, encodes=False, many=True)
    decode.set_defaults(run=run_decode, parser=decode)


def _add_arguments(parser: argparse.ArgumentParser, encodes: bool, many: bool = False) -> None:
    if many:
        parser.add_argument(
            "-o",
            "--output-dir",
            type=Path,
            required=True,
            metavar="DIR",
            help="directory to write to; made if missing",
        )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--num-quantizers",
        type=positive_int,
        metavar="N",
        help="rows of codes to use: 1 is the semantic row alone, 8 a good compromise (default: all)",
    )
    if encodes:
        rate = parser.add_mutually_exclusive_group()
        rate.add_argument(
            "--merging-threshold",
            type=cosine,
            metavar="X",
            help="frames more alike than this cosine similarity share a token; 1 never merges (default: the model's)",
        )
        rate.add_argument(
            "--target-frame-rate",
            type=float,
            metavar="HZ",
            help="tokens per second to aim at: every clip gets the threshold that comes closest",
        )
    if many:
        parser.add_argument(
            "--batch-size",
            type=positive_int,
            default=1,
            metavar="N",
            help="files to process at once, of similar length: faster on a GPU, with the same results (default: 1)",
        )
    parser.add_argument(
        "--chunk-length-s",
        type=not_negative,
        default=30.0,
        metavar="S",
        help="process clips longer than twice this in chunks of so many seconds, to bound the memory; 0 never does "
        "(default: 30)",
    )
    add_model_arguments(parser)


@dataclass(frozen=True)
class Job:
    """A file, or a row of one, to read and the file to make of it."""

    source: Path | TokensRow
    target: Path


# What a batch gives: the tokens of each item, to be reported, and how to write its file.
Result = tuple["Tokens", Callable[[Path], None]]


@dataclass
class Totals:
    """What the summary says."""

    done: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0
    tokens: int = 0
    bits: float = 0.0
    num_quantizers: set[int] = field(default_factory=set)

    def fail(self, error: object) -> None:
        self.failed += 1
        report_error(error)

    def skip(self, job: Job) -> None:
        self.skipped += 1
        tqdm.write(f"{job.source}: skipped, {job.target} exists (--overwrite replaces it)")

    def summary(self, runner: CodecRunner | None) -> str:
        """One line."""
        parts = []
        if runner is not None and self.done:
            rows = " or ".join(str(rows) for rows in sorted(self.num_quantizers))
            parts += [
                f"{_count(self.done, 'file')}, {self.seconds:.2f} s of audio",
                f"{_count(self.tokens, 'token')}, {self.tokens / self.seconds:.2f} per second",
                f"{self.bits / self.seconds:.0f} bits per second ({_count(rows, 'quantizer')})",
                f"real-time factor {runner.processing_seconds / self.seconds:.3f} on {runner.device}",
            ]
        parts += [f"{count} {name}" for name, count in (("skipped", self.skipped), ("failed", self.failed)) if count]
        return "; ".join(parts)


def run_reconstruct(args: argparse.Namespace) -> int:
    """`reconstruct IN OUT`; returns the exit status."""
    from ..audio_flexicodec import read_audio, write_audio

    check_output(args)
    config = _codec_config(args)

    def compute(runner: CodecRunner, clips: Sequence[Any]) -> list[Result]:
        tokens = _encode(runner, args, clips)
        waveforms = runner.decode(tokens)
        return [
            (item, partial(write_audio, waveform=waveform, sampling_rate=config.sampling_rate))
            for item, waveform in zip(tokens, waveforms, strict=True)
        ]

    jobs = [Job(args.input, args.output)]
    return _run(args, config, jobs, Totals(), partial(read_audio, sampling_rate=config.sampling_rate), compute)


def run_encode(args: argparse.Namespace) -> int:
    """`encode IN... -o DIR`; returns the exit status."""
    from ..audio_flexicodec import audio_seconds, read_audio
    from .runner import encode_settings
    from .tokens import read_settings

    jobs = _plan(args, args.inputs, ".safetensors")
    config = _codec_config(args)
    settings = encode_settings(config, args.model, args.num_quantizers, args.merging_threshold, args.target_frame_rate)
    totals = Totals()
    todo = []
    for job in jobs:
        if args.overwrite or not job.target.exists():
            todo.append(job)
            continue
        try:
            differences = _differences(read_settings(job.target), settings)
        except CommandError as error:
            totals.fail(error)
            continue
        if differences:
            totals.fail(
                f"{job.source}: {job.target} exists and was made with other settings ({', '.join(differences)}): pass "
                "--overwrite or another --output-dir."
            )
        else:
            totals.skip(job)

    def compute(runner: CodecRunner, clips: Sequence[Any]) -> list[Result]:
        return [(item, item.save) for item in _encode(runner, args, clips)]

    read = partial(read_audio, sampling_rate=config.sampling_rate)
    return _run(args, config, todo, totals, read, compute, seconds_of=audio_seconds)


def run_decode(args: argparse.Namespace) -> int:
    """`decode FILE... -o DIR`; returns the exit status."""
    from ..audio_flexicodec import write_audio
    from .tokens import parquet_rows, read_tokens

    totals = Totals()
    sources: list[Path | TokensRow] = []
    for path in args.inputs:
        try:
            sources += parquet_rows(path) if path.suffix == ".parquet" else [path]
        except CommandError as error:
            totals.fail(error)
    jobs = _plan(args, sources, ".wav")
    config = _codec_config(args)
    todo = []
    for job in jobs:
        if args.overwrite or not job.target.exists():
            todo.append(job)
        else:
            totals.skip(job)

    def read(source: Path | TokensRow) -> Tokens:
        tokens = read_tokens(source)
        return replace(tokens, audio_codes=tokens.audio_codes[: args.num_quantizers])

    def compute(runner: CodecRunner, tokens: Sequence[Any]) -> list[Result]:
        return [
            (item, partial(write_audio, waveform=waveform, sampling_rate=config.sampling_rate))
            for item, waveform in zip(tokens, runner.decode(tokens), strict=True)
        ]

    return _run(args, config, todo, totals, read, compute, seconds_of=lambda source: read_tokens(source).seconds)


def _differences(there: Mapping[str, str], asked: Mapping[str, str]) -> list[str]:
    """The settings of a file of tokens that are not those asked for."""
    names = ["model", "num_quantizers"]
    # With a target, the threshold is found for each clip.
    names.append("target_frame_rate" if "target_frame_rate" in {*there, *asked} else "merging_threshold")
    return [f"{name} {there.get(name, 'not given')}" for name in names if there.get(name) != asked.get(name)]


def _codec_config(args: argparse.Namespace) -> FlexiCodecConfig:
    config = load_codec_config(args.model)
    rate = getattr(args, "target_frame_rate", None)
    lowest = config.frame_rate / config.max_frames_per_token
    if rate is not None and not lowest <= rate <= config.frame_rate:
        usage_error(
            args,
            f"argument --target-frame-rate: must be between {lowest} and {config.frame_rate} tokens per second, got {rate}",
        )
    return config


def _plan(args: argparse.Namespace, inputs: Sequence[Path | TokensRow], suffix: str) -> list[Job]:
    """A target in the output directory for each input."""
    sources: dict[Path, Path | TokensRow] = {}
    for source in dict.fromkeys(inputs):
        target = args.output_dir / f"{source.stem}{suffix}"
        if target in sources:
            usage_error(args, f"{sources[target]} and {source} would both become {target}: use two output directories")
        sources[target] = source
    return [Job(source, target) for target, source in sources.items()]


def _encode(runner: CodecRunner, args: argparse.Namespace, clips: Sequence[Any]) -> list[Tokens]:
    return runner.encode(clips, args.num_quantizers, args.merging_threshold, args.target_frame_rate)


def _run(
    args: argparse.Namespace,
    config: FlexiCodecConfig,
    jobs: list[Job],
    totals: Totals,
    read: Callable[[Any], Any],
    compute: Callable[[CodecRunner, Sequence[Any]], list[Result]],
    seconds_of: Callable[[Any], float] | None = None,
) -> int:
    """Run the jobs in batches, report each and print the summary; returns the exit status.

    A file that cannot be read is reported and left out. A batch that fails is run again file by file, so that only the
    files at fault do.
    """
    runner = None
    if jobs:
        from .runner import CodecRunner

        jobs[0].target.parent.mkdir(parents=True, exist_ok=True)  # of all of them
        runner = CodecRunner(config, args.model, choose_device(args), args.dtype, args.chunk_length_s)
        if args.batch_size > 1 and seconds_of is not None:
            jobs = sorted(jobs, key=partial(_seconds, seconds_of=seconds_of))
        with tqdm(total=len(jobs), unit="file", disable=None if len(jobs) > 1 else True) as progress:
            for start in range(0, len(jobs), args.batch_size):
                batch = []
                for job in jobs[start : start + args.batch_size]:
                    try:
                        batch.append((job, read(job.source)))
                    except (ValueError, OSError) as error:
                        totals.fail(error)
                for group in _groups(batch, partial(_batch_key, runner)):
                    _run_batch(runner, group, totals, compute)
                progress.update(len(jobs[start : start + args.batch_size]))
    tqdm.write(totals.summary(runner))
    return 1 if totals.failed else 0


def _run_batch(
    runner: CodecRunner,
    batch: list[tuple[Job, Any]],
    totals: Totals,
    compute: Callable[[CodecRunner, Sequence[Any]], list[Result]],
) -> None:
    import torch

    try:
        results = compute(runner, [item for _, item in batch])
    except torch.OutOfMemoryError:
        failure = f"out of memory on {runner.device}: pass a smaller --chunk-length-s"
    except ValueError as error:
        failure = str(error)
    else:
        for (job, item), (tokens, write) in zip(batch, results, strict=True):
            try:
                with whole_file(job.target) as path:
                    write(path)
            except (ValueError, OSError) as error:
                totals.fail(f"{job.source}: {error}")
                continue
            num_quantizers, num_tokens = tokens.audio_codes.shape
            totals.done += 1
            totals.seconds += tokens.seconds
            totals.tokens += num_tokens
            totals.bits += num_tokens * runner.config.bits_per_token(num_quantizers)
            totals.num_quantizers.add(num_quantizers)
            tqdm.write(
                f"{job.source}: {', '.join([f'{tokens.seconds:.2f} s', *_notes(runner, item)])} -> {job.target} "
                f"({_count(num_tokens, 'token')}, {num_tokens / tokens.seconds:.2f} per second)"
            )
        return
    # Outside of the handlers: they keep the failed batch's memory.
    if len(batch) > 1:
        for one in batch:
            _run_batch(runner, [one], totals, compute)
    else:
        totals.fail(f"{batch[0][0].source}: {failure}")


def _notes(runner: CodecRunner, item: Any) -> list[str]:
    """What was done to an item that its user did not ask for."""
    from ..audio_flexicodec import AudioClip

    if isinstance(item, AudioClip):
        notes = item.changes
    else:
        model = item.settings.get("model")
        notes = [] if model in (None, runner.name) else [f"encoded with the model {model}"]
    chunk = runner.chunk_of(item)
    return notes if chunk is None else [*notes, f"in chunks of {chunk:g} s"]


def _seconds(job: Job, seconds_of: Callable[[Any], float]) -> float:
    try:
        return seconds_of(job.source)
    except (ValueError, OSError):
        return 0.0  # reading it will say why


def _batch_key(runner: CodecRunner, entry: tuple[Job, Any]) -> Hashable:
    """Items run together if this is the same: in chunks or not, and the rows of their codes."""
    _, item = entry
    return runner.chunk_of(item), len(getattr(item, "audio_codes", ()))


def _groups(
    batch: Iterable[tuple[Job, Any]], key: Callable[[tuple[Job, Any]], Hashable]
) -> list[list[tuple[Job, Any]]]:
    groups: dict[Hashable, list[tuple[Job, Any]]] = {}
    for entry in batch:
        groups.setdefault(key(entry), []).append(entry)
    return list(groups.values())


def _count(number: int | str, name: str) -> str:
    return f"{number} {name}" if str(number) == "1" else f"{number} {name}s"
