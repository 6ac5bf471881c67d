"""`reconstruct`, `encode` and `decode`: audio to tokens and back."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from .common import (
    add_chunk_argument,
    add_directory_argument,
    add_model_arguments,
    check_output,
    check_target_rates,
    choose_device,
    cosine,
    load_codec_config,
    loading,
    positive_int,
    report_error,
    usage_error,
)


if TYPE_CHECKING:
    import numpy as np

    from ..audio_flexicodec import AudioClip, AudioFile
    from ..configuration_flexicodec import FlexiCodecConfig
    from ..data.runner import CodecRunner
    from ..data.tokens import Tokens, TokenSource

    # What a batch gives for each item: the tokens, to be reported, and how to write its file; or what went wrong.
    Result = tuple[Tokens, Callable[[Path], None]] | Exception


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
        description="Encode audio files, each to a safetensors file with `audio_codes` (num_quantizers, "
        "num_tokens) and `token_lengths` (num_tokens,). Files that are done already are skipped, "
        "so that an interrupted run can go on.",
    )
    encode.add_argument("inputs", type=Path, nargs="+", metavar="IN", help="audio file, as for `reconstruct`")
    _add_arguments(encode, encodes=True, many=True)
    encode.set_defaults(run=run_encode, parser=encode)

    decode = commands.add_parser(
        "decode",
        help="files of tokens to audio files",
        description="Decode files of tokens that `encode` wrote, and all rows of those that `tokenize` wrote, each to "
        "a WAV file as long as the clip was. Files that are done already are skipped.",
    )
    decode.add_argument(
        "inputs", type=Path, nargs="+", metavar="FILE", help="file of tokens, .safetensors or .parquet"
    )
    _add_arguments(decode, encodes=False, many=True)
    decode.set_defaults(run=run_decode, parser=decode)


def _add_arguments(parser: argparse.ArgumentParser, encodes: bool, many: bool = False) -> None:
    add = parser.add_argument
    if many:
        add_directory_argument(parser)
        text = "files to process at once, of similar length: faster on a GPU, with the same results"
        add("--batch-size", type=positive_int, default=1, help=text)
    add("--overwrite", action="store_true", help="replace files that exist")
    text = "codebooks to use: 1 is the semantic one alone, 8 a good compromise (default: all)"
    add("--num-quantizers", type=positive_int, help=text)
    if encodes:
        add = parser.add_mutually_exclusive_group().add_argument
        text = "frames more alike than this cosine similarity share a token; 1 never merges (default: the model's)"
        add("--merging-threshold", type=cosine, help=text)
        text = "tokens per second to aim at: every clip gets the threshold that comes closest"
        add("--target-frame-rate", type=float, help=text)
    add_chunk_argument(parser)
    add_model_arguments(parser)


def run_reconstruct(args: argparse.Namespace) -> int:
    """`reconstruct IN OUT`; returns the exit status."""
    check_output(args)
    config = load_codec_config(args.model)
    settings = _settings(args, config)

    def reconstruct(runner: CodecRunner, clips: Sequence[AudioClip | AudioFile]) -> list[Result]:
        results: list[Result] = []
        for encoded in _encode(runner, clips, settings):
            results += [encoded] if isinstance(encoded, Exception) else _decode(runner, [encoded[0]])
        return results

    work = _Work(args)
    work.todo = [Job(args.input, args.output)]
    return work.run(_reader(args, config), reconstruct)


def run_encode(args: argparse.Namespace) -> int:
    """`encode IN... -o DIR`; returns the exit status."""
    from ..audio_flexicodec import audio_seconds
    from ..data.files import check_same_settings
    from ..data.tokens import TokenSource

    work = _Work(args)
    jobs = work.plan(args.inputs, ".safetensors")
    config = load_codec_config(args.model)
    settings = _settings(args, config)

    def check(target: Path) -> None:
        found = TokenSource(target, target.stem).read().settings
        check_same_settings(target, found, settings, "pass --overwrite or another --output-dir")

    work.skip_done(jobs, check)
    return work.run(_reader(args, config), partial(_encode, settings=settings), audio_seconds)


def run_decode(args: argparse.Namespace) -> int:
    """`decode FILE... -o DIR`; returns the exit status."""
    from ..data.files import DataError
    from ..data.tokens import token_sources

    work = _Work(args)
    sources: list[TokenSource] = []
    for path in args.inputs:
        try:
            sources += token_sources(path)
        except DataError as error:
            work.fail(error)
    load_codec_config(args.model)
    work.skip_done(work.plan(sources, ".wav"))

    def read(source: TokenSource) -> Tokens:
        tokens = source.read()
        return replace(tokens, audio_codes=tokens.audio_codes[: args.num_quantizers])

    return work.run(read, _decode, lambda source: source.read().seconds)


def _settings(args: argparse.Namespace, config: FlexiCodecConfig) -> dict[str, Any]:
    """What decides the codes of a clip, as the property `settings` of its tokens has it."""
    settings = {
        "model": args.model,
        "num_quantizers": min(args.num_quantizers or config.num_quantizers, config.num_quantizers),
    }
    if args.target_frame_rate is not None:
        check_target_rates(args, config, [args.target_frame_rate])
        return settings | {"target_frame_rate": args.target_frame_rate}
    threshold = config.merging_threshold if args.merging_threshold is None else args.merging_threshold
    return settings | {"merging_threshold": threshold}


def _reader(args: argparse.Namespace, config: FlexiCodecConfig) -> Callable[[Path], AudioClip | AudioFile]:
    """Reads a file; one that is to be processed in chunks block by block, when it is encoded."""
    from ..audio_flexicodec import audio_seconds, open_audio, read_audio
    from ..data.runner import chunk_length

    def read(path: Path) -> AudioClip | AudioFile:
        in_chunks = chunk_length(audio_seconds(path), args.chunk_length_s) is not None
        return (open_audio if in_chunks else read_audio)(path, config.sampling_rate)

    return read


def _encode(runner: CodecRunner, clips: Sequence[AudioClip | AudioFile], settings: Mapping[str, Any]) -> list[Result]:
    from .. import __version__
    from ..data.runner import RateSetting

    rate = RateSetting(settings.get("merging_threshold"), settings.get("target_frame_rate"))
    results: list[Result] = []
    for clip, encoded in zip(clips, runner.encode(clips, [rate], settings["num_quantizers"]), strict=True):
        if isinstance(encoded, Exception):
            results.append(encoded)
            continue
        metadata = {"model": settings["model"], "source": clip.path.name, "flexicodec_hf_version": __version__}
        tokens = replace(encoded[0], metadata=metadata)
        results.append((tokens, tokens.save))
    return results


def _decode(runner: CodecRunner, tokens: Sequence[Tokens]) -> list[Result]:
    from ..audio_flexicodec import AudioWriter

    def write(path: Path, waveform: Iterable[np.ndarray], sampling_rate: int) -> None:
        with AudioWriter(path) as writer:
            for part in waveform:
                writer.write(part, sampling_rate)

    return [
        waveform
        if isinstance(waveform, Exception)
        else (item, partial(write, waveform=waveform, sampling_rate=item.sampling_rate))
        for item, waveform in zip(tokens, runner.decode(tokens), strict=True)
    ]


class Job(NamedTuple):
    """What to read, and the file to make of it."""

    source: Path | TokenSource
    target: Path


class _Work:
    """Files that a command makes of others, in batches, and what became of each."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.todo: list[Job] = []
        self.done: list[tuple[float, int, int]] = []  # seconds, tokens and quantizers
        self.skipped = self.failed = 0

    def fail(self, error: object) -> None:
        self.failed += 1
        report_error(error)

    def plan(self, inputs: Iterable[Path | TokenSource], suffix: str) -> list[Job]:
        """A target in the output directory for each input."""
        jobs: dict[Path, Job] = {}
        for source in dict.fromkeys(inputs):
            target = self.args.output_dir / f"{source.stem}{suffix}"
            if target in jobs:
                both = f"{jobs[target].source} and {source} would both become {target}"
                usage_error(self.args, f"{both}: use two output directories")
            jobs[target] = Job(source, target)
        return list(jobs.values())

    def skip_done(self, jobs: Iterable[Job], check: Callable[[Path], None] = lambda target: None) -> None:
        """Leave out jobs whose files are there; it is an error if `check` raises one."""
        for job in jobs:
            if self.args.overwrite or not job.target.exists():
                self.todo.append(job)
                continue
            try:
                check(job.target)
            except ValueError as error:
                self.fail(error)
            else:
                self.skipped += 1
                tqdm.write(f"{job.source}: skipped, {job.target} exists (--overwrite replaces it)")

    def run(
        self,
        read: Callable[[Any], Any],
        process: Callable[[CodecRunner, Sequence[Any]], list[Result]],
        seconds_of: Callable[[Any], float] | None = None,
    ) -> int:
        """Do what is to do, report it, and print a summary; returns the exit status."""
        runner, took = None, 0.0
        if self.todo:
            from ..data.runner import CodecRunner

            args, jobs = self.args, self.todo
            jobs[0].target.parent.mkdir(parents=True, exist_ok=True)  # the directory of all targets
            device = choose_device(args)
            with loading(args.model):
                runner = CodecRunner.from_pretrained(args.model, device, args.dtype, args.chunk_length_s)
            if args.batch_size > 1 and seconds_of is not None:
                jobs = sorted(jobs, key=partial(_seconds, seconds_of=seconds_of))
            start = time.perf_counter()
            with tqdm(total=len(jobs), unit="file", disable=None if len(jobs) > 1 else True) as progress:
                for first in range(0, len(jobs), args.batch_size):
                    batch = jobs[first : first + args.batch_size]
                    self._run_batch(runner, batch, read, process)
                    progress.update(len(batch))
            took = time.perf_counter() - start
        tqdm.write(self._summary(runner, took))
        return 1 if self.failed else 0

    def _run_batch(self, runner: CodecRunner, jobs: list[Job], read: Any, process: Any) -> None:
        from ..data.files import atomic_file

        batch = []
        for job in jobs:
            try:
                batch.append((job, read(job.source)))
            except (ValueError, OSError) as error:
                self.fail(error)
        for (job, item), result in zip(batch, process(runner, [item for _, item in batch]), strict=True):
            try:
                if isinstance(result, Exception):
                    raise result
                tokens, write = result
                with atomic_file(job.target) as path:
                    write(path)
                self._report(runner, job, item, tokens)
            except (ValueError, OSError) as error:
                self.fail(f"{job.source}: {error}")

    def _report(self, runner: CodecRunner, job: Job, item: AudioClip | AudioFile | Tokens, tokens: Tokens) -> None:
        num_quantizers, num_tokens = tokens.audio_codes.shape
        self.done.append((tokens.seconds, num_tokens, num_quantizers))
        # What was done to the item that its user did not ask for.
        made_with = tokens.metadata.get("model", self.args.model)
        notes = getattr(
            item, "changes", [] if made_with == self.args.model else [f"encoded with the model {made_with}"]
        )
        if (chunk := runner.chunk_of(item)) is not None:
            notes = [*notes, f"in chunks of {chunk:g} s"]
        tqdm.write(
            f"{job.source}: {', '.join([f'{tokens.seconds:.2f} s', *notes])} -> {job.target} "
            f"({_count(num_tokens, 'token')}, {num_tokens / tokens.seconds:.2f} per second)"
        )

    def _summary(self, runner: CodecRunner | None, took: float) -> str:
        """One line."""
        parts = []
        if runner is not None and self.done:
            seconds, tokens, quantizers = zip(*self.done, strict=True)
            bits = sum(count * runner.config.bits_per_token(rows) for _, count, rows in self.done)
            counts = " or ".join(map(str, sorted(set(quantizers))))
            parts += [
                f"{_count(len(self.done), 'file')}, {sum(seconds):.2f} s of audio",
                f"{_count(sum(tokens), 'token')}, {sum(tokens) / sum(seconds):.2f} per second",
                f"{bits / sum(seconds):.0f} bits per second ({_count(counts, 'quantizer')})",
                f"real-time factor {took / sum(seconds):.3f} on {runner.codec.device}",
            ]
        parts += [f"{count} {name}" for name, count in (("skipped", self.skipped), ("failed", self.failed)) if count]
        return "; ".join(parts)


def _seconds(job: Job, seconds_of: Callable[[Any], float]) -> float:
    try:
        return seconds_of(job.source)
    except (ValueError, OSError):
        return 0.0  # reading it will say why


def _count(number: int | str, name: str) -> str:
    return f"{number} {name}" if str(number) == "1" else f"{number} {name}s"
