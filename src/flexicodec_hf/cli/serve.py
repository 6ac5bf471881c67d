"""`serve`: speech and tokens over HTTP."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    add_model_arguments,
    choose_device,
    load_model_config,
    loading,
    positive_int,
    positive_seconds,
    user_errors,
)
from .speak import load_speaker


if TYPE_CHECKING:
    from ..data.runner import CodecRunner
    from ..pipeline_flexicodec_tts import FlexiCodecTTSPipeline


def add_commands(commands: Any) -> None:
    """Add the command to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "serve",
        help="speech and tokens over HTTP, as OpenAI's clients expect them",
        description="Serve a model over HTTP: OpenAI's interface for speech, voices, and audio to tokens and back. "
        "With an API key (--api-key, or the environment variable FLEXICODEC_API_KEY), nothing is answered without "
        "it. Needs the extra [serve].",
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen at; the default is heard by this machine alone")
    add("--port", type=int, default=8000, help="port to listen at")
    add("--api-key", metavar="KEY", help="what clients must send (default: $FLEXICODEC_API_KEY, if set)")
    add("--model-name", metavar="NAME", help="what clients call the model (default: as --model)")
    text = "where added voices are kept; made if missing (default: they are forgotten when the server ends)"
    add("--voices-dir", type=Path, metavar="DIR", help=text)

    add = parser.add_argument_group("load").add_argument
    text = "requests to work on at once; with 1, the first audio of a text comes soonest"
    add("--batch-size", type=positive_int, default=8, help=text)
    text = "requests that wait and run at most; more are answered with 429"
    add("--max-requests", type=positive_int, default=64, help=text)
    text = "characters to speak at once; fewer give the first audio sooner"
    add("--max-piece-length", type=positive_int, default=200, help=text)
    text = "seconds to wait for a client, and for the model"
    add("--timeout", type=positive_seconds, default=120.0, help=text)
    text = "seconds that requests have to end when the server is stopped"
    add("--shutdown-timeout", type=positive_int, default=30, help=text)

    add = parser.add_argument_group("limits of a request").add_argument
    add("--max-text-length", type=positive_int, default=4096, help="characters")
    add("--max-audio", type=positive_seconds, default=600.0, help="seconds of audio")
    add("--max-body", type=positive_int, default=25, help="megabytes of a body")
    add_model_arguments(parser)
    parser.set_defaults(run=run_serve, parser=parser)


def run_serve(args: argparse.Namespace) -> int:
    """`serve`; returns the exit status when the server is stopped."""
    from ..data.files import require

    uvicorn = require("uvicorn", "`serve`", "serve")
    for module in ("fastapi", "prometheus_client", "python_multipart"):
        require(module, "`serve`", "serve")
    app = build_app(args)
    key = "with an API key" if _api_key(args) else "without an API key"
    print(f"Serving {_model_name(args)} at http://{args.host}:{args.port}, {key}. Press Ctrl-C to stop.", flush=True)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=args.shutdown_timeout,
        # Connections that only wait take no memory of the model, but not without end.
        limit_concurrency=4 * args.max_requests + 64,
    )
    server = uvicorn.Server(config)
    server.run()
    return 0 if server.started else 1


def build_app(args: argparse.Namespace) -> Any:
    """The application with the model that the arguments name."""
    from ..serving.app import Limits, create_app
    from ..serving.engine import Engine
    from ..serving.metrics import Metrics
    from ..serving.voices import Voices

    runner, speaker = load_codec_and_speaker(args)
    with user_errors(ValueError):
        voices = Voices({} if speaker is None else dict(speaker.model.voices), args.voices_dir)
    engine = Engine(runner, speaker, Metrics(), args.batch_size, args.max_requests, args.max_piece_length)
    limits = Limits(args.max_body * 1_000_000, args.max_text_length, args.max_audio, args.timeout)
    return create_app(engine, voices, _model_name(args), limits, _api_key(args))


def load_codec_and_speaker(args: argparse.Namespace) -> tuple[CodecRunner, FlexiCodecTTSPipeline | None]:
    """The codec that the arguments name, and the text-to-speech pipeline, if the repository has one."""
    from ..data.runner import CodecRunner

    speaker = load_speaker(args) if _can_speak(args.model) else None
    if speaker is not None and speaker.model.config.model_type == load_model_config(args.model)["model_type"]:
        return CodecRunner(speaker.model.codec, speaker.processor.feature_extractor), speaker
    with loading(args.model):
        return CodecRunner.from_pretrained(args.model, choose_device(args), args.dtype), speaker


def _can_speak(model: str) -> bool:
    """Whether a repository has a text-to-speech system, and not the codec alone."""
    from ..repository_flexicodec_tts import find_tts

    load_model_config(model)  # a clear error if there is no model
    try:
        find_tts(model)
    except OSError:
        return False
    return True


def _model_name(args: argparse.Namespace) -> str:
    """The name of a directory does not tell clients where it is."""
    directory = Path(args.model)
    return args.model_name or (Path(os.path.abspath(directory)).name if directory.is_dir() else args.model)


def _api_key(args: argparse.Namespace) -> str | None:
    return args.api_key or os.environ.get("FLEXICODEC_API_KEY") or None
