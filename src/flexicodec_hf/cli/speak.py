"""`speak` and `convert-voice`: text to speech, and speech in another voice."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .common import (
    CommandError,
    add_model_arguments,
    add_output_argument,
    check_output,
    choose_device,
    load_model_config,
    loading,
    positive_int,
    text_beside,
    usage_error,
    user_errors,
)


if TYPE_CHECKING:
    from ..audio_flexicodec import AudioWriter
    from ..pipeline_flexicodec_tts import FlexiCodecTTSPipeline

# A longer source is converted stretch by stretch, each cut in a pause near its end.
STRETCH_S = 300.0


def add_commands(commands: Any) -> None:
    """Add the commands to what `add_subparsers` returned."""
    speak = commands.add_parser(
        "speak",
        help="text to speech",
        description="Speak a text of any length. Long texts are spoken and written piece by piece.",
    )
    source = speak.add_mutually_exclusive_group(required=True)
    source.add_argument("text", nargs="?", metavar="TEXT", help="what to say")
    source.add_argument("--text-file", type=Path, metavar="FILE", help="a file with what to say; - is standard input")
    add_output_argument(speak, "; - is standard output, as WAV for a player: `... --stream -o - | aplay`")
    voice = speak.add_argument_group("voice (default: the model's first)")
    add = voice.add_mutually_exclusive_group().add_argument
    text = "one of the model's voices, or a file that FlexiCodecVoice.save wrote"
    add("--voice", metavar="NAME_OR_FILE", help=text)
    text = "a recording of the voice, 3 to 15 seconds long"
    add("--reference-audio", type=Path, metavar="FILE", help=text)
    text = "what the recording says, word for word (default: what is in the .txt file beside it)"
    voice.add_argument("--reference-text", help=text)

    add = speak.add_argument
    add("--language", metavar="CODE", help="of the text, such as en or zh (default: the model's, en)")
    _add_speech_arguments(speak)
    add("--temperature", type=float, help="of the tokens; lower is steadier (default: the model's)")
    add("--top-k", type=positive_int, help="tokens to draw from (default: the model's)")
    add("--top-p", type=float, help="draw from the likeliest tokens of this total probability")
    text = (
        "characters to speak at once, an East Asian one counting for three; fewer give the first audio sooner "
        "(default: 200)"
    )
    add("--max-piece-length", type=int, help=text)
    text = "write the audio while the tokens of a sentence are drawn: the first after a few of them"
    add("--stream", action="store_true", help=text)
    text = "let the codec alone make the sound: faster, at 16 kHz, and less like the voice"
    add("--no-nar", action="store_true", help=text)
    add_model_arguments(speak)
    speak.set_defaults(run=run_speak, parser=speak)

    convert = commands.add_parser(
        "convert-voice",
        help="a recording in another voice",
        description="The words of one recording in the voice of another. Long recordings are read and written in "
        "pieces.",
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="audio file with the words")
    text = "audio file with the voice, 3 to 15 seconds long; or a voice's file or name"
    convert.add_argument("reference", metavar="REFERENCE", help=text)
    add_output_argument(convert)
    _add_speech_arguments(convert)
    add_model_arguments(convert)
    convert.set_defaults(run=run_convert_voice, parser=convert)


def _add_speech_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "one that the model was trained with; the lower, the fewer tokens a second (default: the model's)"
    add("--merging-threshold", type=float, help=text)
    add("--seed", type=int, help="makes the result repeatable")
    add("--preset", choices=["fast"], help="7 steps that are placed well, instead of 15 of one length")
    text = "steps from noise to sound; fewer are faster (default: 15)"
    add("--num-inference-steps", type=positive_int, help=text)
    add("--guidance-scale", type=float, help="how closely to follow tokens and voice (default: 2)")


def run_speak(args: argparse.Namespace) -> int:
    """`speak TEXT -o OUT`; returns the exit status."""
    if str(args.output) != "-":
        check_output(args)
    if args.reference_text is not None and args.reference_audio is None:
        usage_error(args, "argument --reference-text: goes with --reference-audio")
    text = args.text if args.text_file is None else _read_text(args.text_file)
    options = _given(args, "language", "merging_threshold", "seed", "max_piece_length")
    options["generate_kwargs"] = _given(
        args, "preset", "num_inference_steps", "guidance_scale", "temperature", "top_k", "top_p"
    ) | ({"use_nar": False} if args.no_nar else {})
    if args.reference_audio is not None:
        options["reference_audio"] = str(args.reference_audio)
        options["reference_text"] = args.reference_text or text_beside(args.reference_audio)

    speaker = load_speaker(args)
    with user_errors(ValueError, ImportError):
        if args.voice is not None:
            options["voice"] = _saved_voice(args.voice)
        first_audio_s = None
        try:
            with (
                audio_output(args.output) as output,
                closing(speaker.stream(text, whole_pieces=not args.stream, **options)) as chunks,
            ):
                for chunk in chunks:
                    output.write(chunk["audio"], chunk["sampling_rate"])
                    first_audio_s = first_audio_s or chunk["elapsed_s"]
        except BrokenPipeError:  # the player was closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    _report(args, speaker, output, f"first audio after {first_audio_s:.2f} s", chunk["elapsed_s"])
    return 0


def run_convert_voice(args: argparse.Namespace) -> int:
    """`convert-voice SOURCE REFERENCE -o OUT`; returns the exit status."""
    import numpy as np

    from ..audio_flexicodec import audio_seconds, read_stretches

    check_output(args)
    options = _given(args, "merging_threshold", "seed", "preset", "num_inference_steps", "guidance_scale")
    with user_errors(ValueError, ImportError):
        seconds = audio_seconds(args.source)
        speaker = load_speaker(args)
        model, extractor = speaker.model, speaker.processor.feature_extractor
        if Path(args.reference).is_file() and Path(args.reference).suffix != ".safetensors":
            inputs = speaker.processor(audio=args.reference)
            options["voice"] = model.encode_voice(**speaker.ensure_tensor_on_device(**inputs))
        else:
            options["voice"] = _saved_voice(args.reference)
        start = time.perf_counter()
        with (
            audio_output(args.output) as output,
            tqdm(total=round(seconds), unit="s", disable=None if seconds > STRETCH_S else True) as progress,
        ):
            rate = extractor.sampling_rate
            for stretch in read_stretches(args.source, rate, max_length_s=STRETCH_S):
                inputs = extractor(stretch, sampling_rate=rate, return_tensors="pt")
                converted = model.convert_voice(**speaker.ensure_tensor_on_device(**inputs), **options)
                waveform, output_rate = converted.audio[0, 0].cpu().numpy(), int(converted.sampling_rate)
                # Padded to the length of the source: the codec drops up to two frames at the end of
                # a stretch.
                length = round(len(stretch) / rate * output_rate)
                output.write(np.pad(waveform[:length], (0, max(0, length - len(waveform)))), output_rate)
                progress.update(round(len(stretch) / rate))
    _report(args, speaker, output, f"the words of {args.source}", time.perf_counter() - start)
    return 0


def load_speaker(args: argparse.Namespace) -> FlexiCodecTTSPipeline:
    """
    The pipeline of the model that the arguments name, on their device and in their type; fast on a
    CPU.
    """
    import torch

    from ..modeling_flexicodec_tts import FlexiCodecForTextToSpeech
    from ..pipeline_flexicodec_tts import FlexiCodecTTSPipeline
    from ..processing_flexicodec_tts import FlexiCodecTTSProcessor

    load_model_config(args.model)  # a clear error if there is no model
    with loading(args.model):
        model = FlexiCodecForTextToSpeech.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
        processor = FlexiCodecTTSProcessor.from_pretrained(args.model)
    return FlexiCodecTTSPipeline(model, processor=processor, tokenizer=processor.tokenizer, device=choose_device(args))


@contextmanager
def audio_output(path: Path) -> Iterator[AudioWriter]:
    """A writer of a file that becomes `path` when it is complete, or of standard output."""
    from ..audio_flexicodec import AudioWriter, WaveStream
    from ..data.files import atomic_file

    with nullcontext(path) if str(path) == "-" else atomic_file(path) as temporary:
        with (WaveStream if str(path) == "-" else AudioWriter)(temporary) as writer:
            yield writer
        if not writer.num_samples:
            raise CommandError("the model generated no speech: try another --seed, or a longer text.")


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _saved_voice(voice: str) -> Any:
    """A voice's file, or the name of one of the model's."""
    from ..voice_flexicodec import FlexiCodecVoice

    return FlexiCodecVoice.load(voice) if Path(voice).suffix == ".safetensors" else voice


def _read_text(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not a text in UTF-8: {error}.") from error


def _report(
    args: argparse.Namespace, speaker: FlexiCodecTTSPipeline, output: AudioWriter, what: str, elapsed_s: float
) -> None:
    name, file = ("standard output", sys.stderr) if str(args.output) == "-" else (args.output, sys.stdout)
    tqdm.write(
        f"{name}: {output.seconds:.2f} s of speech at {output.sampling_rate} Hz; {what}; real-time factor "
        f"{elapsed_s / output.seconds:.3f} on {speaker.device.type}",
        file=file,
    )
