"""The HTTP interface: OpenAI's for speech, and one for tokens."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import soundfile
import torch
from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..audio_flexicodec import AudioClip, AudioError, read_audio
from ..data.files import DataError
from ..data.runner import rate_settings
from ..data.tokens import Tokens, TokenSource
from ..text_flexicodec import language_token_id
from .encoding import MEDIA_TYPES, encoder
from .engine import ClosedError, Engine, Job, QueueFullError, Settings, Speech
from .voices import VoiceError, Voices


logger = logging.getLogger(__name__)

Format = Literal["mp3", "opus", "flac", "wav", "pcm"]
StreamFormat = Literal["audio", "sse"]
_MAX_CHANNELS = 8


@dataclass(frozen=True)
class Limits:
    """
    What a request may ask for.

    Args:
        body_bytes: Size of a body.
        text_length: Characters of a text.
        audio_s: Seconds of a recording, or of the speech of tokens.
        timeout_s: Seconds to wait for a body, for the next audio of the model, and for a client to take it.
    """

    body_bytes: int = 25_000_000
    text_length: int = 4096
    audio_s: float = 600.0
    timeout_s: float = 120.0


class VoiceId(BaseModel):
    """A voice as an object, as OpenAI's clients may send it."""

    model_config = ConfigDict(extra="forbid")
    id: str


class SpeechRequest(BaseModel):
    """The body of `/v1/audio/speech`: OpenAI's fields, and those of this model."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    input: str
    voice: str | VoiceId = "default"
    response_format: Format = "mp3"
    speed: float = 1.0
    stream_format: StreamFormat = "audio"
    instructions: str | None = None

    seed: int | None = Field(None, ge=0, lt=2**63)
    language: str | None = Field(None, max_length=8)
    merging_threshold: float | None = None
    temperature: float | None = Field(None, gt=0, le=10)
    top_k: int | None = Field(None, ge=1, le=100_000)
    num_inference_steps: int | None = Field(None, ge=1, le=100)
    guidance_scale: float | None = Field(None, ge=0, le=20)
    use_nar: bool | None = None

    def settings(self) -> Settings:
        """What the requests of a batch have in common, for `generate`."""
        names = ("merging_threshold", "temperature", "top_k", "num_inference_steps", "guidance_scale", "use_nar")
        return tuple((name, value) for name in names if (value := getattr(self, name)) is not None)


class TokensBody(BaseModel):
    """Tokens in JSON: what `/v1/audio/tokens` answers and `/v1/audio/tokens/decode` takes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    audio_codes: list[list[Annotated[int, Field(ge=0, lt=2**31)]]]
    token_lengths: list[Annotated[int, Field(ge=1, lt=2**31)]]
    num_samples: int = Field(gt=0)
    sampling_rate: int = Field(gt=0)
    frame_rate: float = Field(gt=0)
    merging_threshold: float | None = None
    target_frame_rate: float | None = None
    model: str | None = None


class ApiError(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def response(self) -> JSONResponse:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


def create_app(
    engine: Engine, voices: Voices, model_id: str, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """
    The application, for any ASGI server.

    Args:
        engine: Runs the model. The application closes it at its end.
        voices: Who can speak.
        model_id: What `/v1/models` calls the model.
        limits: Of requests.
        api_key: If given, nothing is answered without it.

    Returns:
        The application.
    """
    limits = limits or Limits()
    config = engine.runner.config
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)

    app = FastAPI(title="flexicodec-hf", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(_Guard, engine=engine, limits=limits, api_key=api_key)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(StarletteHTTPException)
    async def http_error(_: Request, error: StarletteHTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(RequestValidationError)
    async def wrong_request(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _wrong_field(first["loc"][1:], first["msg"]).response()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def described_model() -> dict[str, Any]:
        return {"id": model_id, "object": "model", "created": created, "owned_by": "flexicodec-hf"}

    def check_model(name: str | None) -> None:
        if name not in (None, model_id):
            raise ApiError(404, f"There is no model {name[:100]!r} here, only {model_id!r}.", "model_not_found")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described_model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name)
        return described_model()

    def described_voice(name: str) -> dict[str, Any]:
        made = voices.created.get(name, created)
        return {"id": name, "object": "audio.voice", "name": name, "created_at": made}

    @app.get("/v1/audio/voices")
    async def list_voices() -> dict[str, Any]:
        names = voices.names() if engine.speaker is not None else []
        return {"object": "list", "data": [described_voice(name) for name in names]}

    @app.post("/v1/audio/voices")
    async def add_voice(
        request: Request,
        name: Annotated[str, Form(max_length=200)],
        text: Annotated[str, Form(max_length=1000)],
        audio_sample: Annotated[UploadFile, File()],
        language: Annotated[str | None, Form(max_length=8)] = None,
    ) -> dict[str, Any]:
        """Add a voice from a recording of 3 to 15 seconds, and what it says, word for word."""
        check_language(language)
        with _client_errors():
            voices.check_new(name)
            clip = await read_clip(audio_sample, 30.0)
            voice = await only_result(request, Job("voice", (clip, text, language)))
            voices.add(name, voice)
        return described_voice(name)

    @app.delete("/v1/audio/voices/{name}")
    async def delete_voice(name: str) -> dict[str, Any]:
        with _client_errors():
            voices.delete(name)
        return {"id": name, "object": "audio.voice.deleted", "deleted": True}

    def check_language(language: str | None) -> None:
        if engine.speaker is None:
            raise ApiError(400, "This model is a codec alone, and does not speak.")
        if language is not None:
            with _client_errors():
                language_token_id(engine.speaker.tokenizer, language)

    @app.post("/v1/audio/speech")
    async def speech(request: Request, body: SpeechRequest) -> Response:
        """
        Text to audio, sent while it is spoken. FLAC is sent when it is complete, since its length is at its beginning;
        with `stream_format` sse it is sent at once, and says no length.
        """
        check_model(body.model)
        check_language(body.language)
        assert engine.speaker is not None
        if body.speed != 1.0:
            raise ApiError(400, f"`speed` must be 1, got {body.speed}: this model speaks at the pace of its voice.")
        if body.instructions:
            raise ApiError(400, "`instructions` are not followed by this model: leave them out, or choose a `voice`.")
        if not body.input.strip():
            raise ApiError(400, "`input` is empty: there is nothing to say.")
        if len(body.input) > limits.text_length:
            raise ApiError(
                400, f"`input` has {len(body.input)} characters, and may have {limits.text_length}: send it in parts."
            )
        with _client_errors():
            ar_config = engine.speaker.model.config.ar_config
            if body.merging_threshold is not None and ar_config.merging_thresholds:
                ar_config.threshold_token_id(body.merging_threshold)
            voice = voices.find(body.voice.id if isinstance(body.voice, VoiceId) else body.voice)
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        text = Speech(body.input, voice, body.language or engine.speaker.processor.language, seed)
        job = Job("speak", text, body.settings())
        return await audio(request, job, body.response_format, body.stream_format, {"X-Seed": str(seed)})

    async def audio(
        request: Request,
        job: Job,
        response_format: Format,
        stream_format: StreamFormat,
        headers: dict[str, str] | None = None,
    ) -> Response:
        """A file of what the model makes for a job, sent while it is made."""
        start, kind = time.monotonic(), job.kind
        watcher = asyncio.create_task(_cancel_when_client_leaves(request, submit(job), engine))
        try:
            chunk = await first_audio(job)
        except BaseException:
            job.cancel()
            watcher.cancel()
            raise
        engine.metrics.first_audio.labels(kind).observe(time.monotonic() - start)
        rate = chunk["sampling_rate"]
        sound = encoder(response_format, rate, is_file=stream_format == "audio")

        async def parts() -> AsyncIterator[bytes]:
            current, seconds = chunk, 0.0
            try:
                while current is not None:
                    waveform = current["audio"]
                    seconds += len(waveform) / rate
                    if data := await run_in_threadpool(sound.write, waveform):
                        yield data
                    current = await job.next(limits.timeout_s)
                if data := await run_in_threadpool(sound.close):
                    yield data
                engine.metrics.audio_seconds.labels(kind).inc(seconds)
                engine.metrics.real_time_factor.labels(kind).observe((time.monotonic() - start) / seconds)
            finally:
                job.cancel()
                watcher.cancel()

        headers = {**(headers or {}), "X-Sampling-Rate": str(rate)}
        if stream_format == "sse":
            return _Stream(_events(parts()), limits.timeout_s, headers=headers, media_type="text/event-stream")
        return _Stream(parts(), limits.timeout_s, headers=headers, media_type=MEDIA_TYPES[response_format])

    async def first_audio(job: Job) -> Any:
        """The first chunk that has samples."""
        with _client_errors():
            while (chunk := await wait(job)) is not None:
                if len(chunk["audio"]):
                    return chunk
        raise ApiError(500, "The model generated no speech: try another `seed`, or a longer text.")

    def submit(job: Job) -> Job:
        try:
            return engine.submit(job)
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after_s)}
            raise ApiError(429, str(error), "rate_limit_exceeded", headers) from error
        except ClosedError as error:
            raise ApiError(503, str(error)) from error

    async def wait(job: Job) -> Any:
        try:
            return await job.next(limits.timeout_s)
        except asyncio.TimeoutError as error:
            raise ApiError(504, f"The model did not come to this request within {limits.timeout_s:g} s.") from error
        except ClosedError as error:
            raise ApiError(503, str(error)) from error

    async def only_result(request: Request, job: Job) -> Any:
        watcher = asyncio.create_task(_cancel_when_client_leaves(request, submit(job), engine))
        try:
            return await wait(job)
        finally:
            job.cancel()
            watcher.cancel()

    async def read_clip(upload: UploadFile, max_seconds: float) -> AudioClip:
        return await run_in_threadpool(_decode_audio, await upload.read(), config.sampling_rate, max_seconds)

    @app.post("/v1/audio/tokens")
    async def encode(
        request: Request,
        file: Annotated[UploadFile, File()],
        model: Annotated[str | None, Form()] = None,
        merging_threshold: Annotated[float | None, Form(allow_inf_nan=False)] = None,
        target_frame_rate: Annotated[float | None, Form(allow_inf_nan=False)] = None,
        num_quantizers: Annotated[int | None, Form(ge=1)] = None,
        response_format: Annotated[Literal["json", "safetensors"], Form()] = "json",
    ) -> Response:
        """Audio to tokens, at a threshold or at a number of tokens per second."""
        check_model(model)
        if merging_threshold is not None and target_frame_rate is not None:
            raise ApiError(400, "Pass `merging_threshold` or `target_frame_rate`, not both: each says how to merge.")
        number = num_quantizers or config.num_quantizers
        if number > config.num_quantizers:
            raise ApiError(400, f"`num_quantizers` must be 1 to {config.num_quantizers}, got {number}.")
        with _client_errors():
            (rate,) = rate_settings(
                config,
                [] if merging_threshold is None else [merging_threshold],
                [] if target_frame_rate is None else [target_frame_rate],
            )
            clip = await read_clip(file, limits.audio_s)
            tokens: Tokens = await only_result(request, Job("encode", clip, (rate, number)))
        tokens.metadata["model"] = model_id  # type: ignore[index]
        if response_format == "safetensors":
            return Response(_as_safetensors(tokens), media_type="application/octet-stream")
        body = TokensBody(
            audio_codes=tokens.audio_codes.tolist(),
            token_lengths=tokens.token_lengths.tolist(),
            num_samples=tokens.num_samples,
            sampling_rate=tokens.sampling_rate,
            frame_rate=tokens.frame_rate,
            merging_threshold=tokens.merging_threshold,
            target_frame_rate=tokens.target_frame_rate,
            model=model_id,
        )
        return Response(body.model_dump_json(), media_type="application/json")

    @app.post("/v1/audio/tokens/decode")
    async def decode(
        request: Request, response_format: Format = "wav", stream_format: StreamFormat = "audio"
    ) -> Response:
        """Tokens to audio. The body is what `/v1/audio/tokens` answers, in JSON or safetensors."""
        data = await request.body()
        is_json = request.headers.get("content-type", "").split(";")[0].strip() == "application/json"
        with _client_errors():
            tokens = await run_in_threadpool(_tokens_of_json if is_json else _tokens_of_safetensors, data)
        if tokens.seconds > limits.audio_s:
            raise ApiError(400, f"The tokens hold {tokens.seconds:.0f} s of audio, and may hold {limits.audio_s:g}.")
        return await audio(request, Job("decode", tokens), response_format, stream_format)

    return app


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """OpenAI's server-sent events of audio."""

    def event(**values: Any) -> bytes:
        return f"data: {json.dumps(values)}\n\n".encode()

    try:
        async for part in parts:
            yield event(type="speech.audio.delta", audio=base64.b64encode(part).decode())
    except (ValueError, asyncio.TimeoutError) as error:
        yield event(type="error", error={"message": str(error), "type": "server_error"})
    else:
        yield event(type="speech.audio.done")


async def _cancel_when_client_leaves(request: Request, job: Job, engine: Engine) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    if not job.canceled:
        engine.metrics.canceled.inc()
        job.cancel()


def _wrong_field(place: Iterable[int | str], message: str) -> ApiError:
    return ApiError(400, f"{'.'.join(str(part) for part in place)[:200] or 'The body'}: {message}.")


@contextlib.contextmanager
def _client_errors() -> Iterator[None]:
    """Errors in what the client sent, as answers."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        raise _wrong_field(first["loc"], first["msg"]) from error
    except VoiceError as error:
        raise ApiError(error.status, str(error)) from error
    except (ValueError, ImportError) as error:
        raise ApiError(400 if isinstance(error, ValueError) else 500, str(error)) from error


def _decode_audio(data: bytes, sampling_rate: int, max_seconds: float) -> AudioClip:
    name = Path("the recording")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            # libsndfile reads no more than its header announces.
            if file.channels > _MAX_CHANNELS or not 0 < file.frames <= max_seconds * file.samplerate:
                raise AudioError(
                    f"The recording has {file.channels} channels of {file.frames / file.samplerate:.1f} s: 1 to "
                    f"{_MAX_CHANNELS} channels of up to {max_seconds:g} s are expected."
                )
    except soundfile.LibsndfileError as error:
        raise AudioError(f"The recording is no audio file, or a damaged one: {error.error_string}") from error
    return read_audio(name, sampling_rate, io.BytesIO(data))


def _tokens_of_json(data: bytes) -> Tokens:
    body = TokensBody.model_validate_json(data)
    if len({len(row) for row in body.audio_codes}) != 1:
        raise DataError("`audio_codes` must be lists of the same length, one for each codebook.")
    return Tokens(
        torch.tensor(body.audio_codes, dtype=torch.int32),
        torch.tensor(body.token_lengths, dtype=torch.int32),
        **body.model_dump(
            include={"num_samples", "sampling_rate", "frame_rate", "merging_threshold", "target_frame_rate"}
        ),
    )


def _tokens_of_safetensors(data: bytes) -> Tokens:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        try:
            return TokenSource(Path(file.name), "tokens").read()
        except DataError as error:
            raise DataError(str(error).replace(file.name, "the body")) from error


def _as_safetensors(tokens: Tokens) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.safetensors"
        tokens.save(path)
        return path.read_bytes()


class _Stream(StreamingResponse):
    """A response that gives up on a client that does not read it."""

    def __init__(self, content: AsyncIterator[bytes], timeout_s: float, **kwargs: Any):
        super().__init__(content, **kwargs)
        self._timeout_s = timeout_s

    async def stream_response(self, send: Callable[[Any], Awaitable[None]]) -> None:
        async def timed(message: Any) -> None:
            await asyncio.wait_for(send(message), self._timeout_s)

        try:
            await super().stream_response(timed)
        except (asyncio.TimeoutError, ClosedError, ValueError) as error:
            # An answer that has begun can only be broken off, which the client notices.
            logger.warning("An answer was broken off: %s", error or "the client did not read it")
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Guard:
    """Checks the key and the origin of a request before anything else, bounds its body, and counts answers."""

    def __init__(self, app: Any, engine: Engine, limits: Limits, api_key: str | None):
        self._app, self._engine, self._limits, self._api_key = app, engine, limits, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 0

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check(dict(scope["headers"]))
        except ApiError as error:
            await error.response()(scope, receive, counted)
        else:
            await self._app(scope, self._bounded(receive), counted)
        # Only names of routes: a client cannot fill the memory with paths.
        route = getattr(scope.get("route"), "path", "other")
        self._engine.metrics.requests.labels(scope["method"][:8], route, str(status)).inc()

    def _check(self, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"authorization", b"")
        if self._api_key is not None and not secrets.compare_digest(given, b"Bearer " + self._api_key.encode()):
            raise ApiError(
                401, "The API key is missing or wrong: send `Authorization: Bearer KEY`.", "invalid_api_key"
            )
        # A page of another site that a browser shows.
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != headers.get(b"host", b"").decode(
            "latin-1"
        ):
            raise ApiError(403, "Requests of web pages of other sites are refused.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body has more than {self._limits.body_bytes:,} bytes, which is the limit.")

    def _bounded(self, receive: Receive) -> Receive:
        received, is_complete = 0, False

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal received, is_complete
            try:
                message = await asyncio.wait_for(receive(), None if is_complete else self._limits.timeout_s)
            except asyncio.TimeoutError as error:
                raise HTTPException(408, "The body did not come in time.") from error
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > self._limits.body_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        return bounded
