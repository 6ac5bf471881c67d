"""Work for the model, from many clients: a bounded queue, batches, and results as they come."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ..audio_flexicodec import AudioClip
from ..chunking_flexicodec import Crossfader
from ..data.runner import CodecRunner, RateSetting
from ..data.tokens import Tokens
from ..pipeline_flexicodec_tts import CROSSFADE_S, FlexiCodecTTSPipeline, SpeechChunk
from ..text_flexicodec import split_text
from ..voice_flexicodec import FlexiCodecVoice
from .metrics import Metrics


logger = logging.getLogger(__name__)

# A job whose client reads more slowly than audio is made waits with so many parts unread.
MAX_UNREAD = 4
# Tokens of more than twice as much audio are decoded in chunks, which are sent as they are made.
DECODED_CHUNK_S = 10.0

# Of requests for speech: keyword arguments of `generate`.
Settings = tuple[tuple[str, Any], ...]


class QueueFullError(Exception):
    """There is no room for another job. `retry_after_s` is when there may be."""

    def __init__(self, retry_after_s: int):
        super().__init__(f"The server has as many requests as it takes: try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """The job was canceled, or the server ends."""


@dataclass(frozen=True)
class Speech:
    """A text to speak."""

    text: str
    voice: FlexiCodecVoice | None
    language: str
    seed: int


class SpokenText:
    """How far a text is spoken in pieces. What comes out is what the pipeline gives for the text alone."""

    def __init__(self, speech: Speech, max_piece_length: int):
        self.speech = speech
        self.voice = speech.voice
        self.pieces = split_text(speech.text, max_piece_length, speech.language) or [speech.text]
        self.position = 0
        self.crossfader: Crossfader | None = None

    @property
    def text(self) -> str:
        return self.pieces[self.position]

    @property
    def is_done(self) -> bool:
        return self.position == len(self.pieces)


@dataclass(eq=False)
class Job:
    """
    One request. `kind` and `settings` decide which others it can share a batch with.

    `engine` and `loop` are set by [`Engine.submit`], in the loop that reads the results.
    """

    kind: str
    work: Any
    settings: Hashable = None
    engine: Engine = field(init=False)
    loop: asyncio.AbstractEventLoop = field(init=False)
    results: asyncio.Queue[Any] = field(init=False)
    canceled: bool = field(default=False, init=False)
    ended: bool = field(default=False, init=False)
    unread: int = field(default=0, init=False)

    async def next(self, timeout_s: float | None = None) -> Any:
        """
        The next result, or `None` after the last.

        Raises:
            asyncio.TimeoutError: None came in time.
            ClosedError: The job was canceled.
            Exception: What went wrong.
        """
        result = await asyncio.wait_for(self.results.get(), timeout_s)
        self.unread -= 1
        self.engine.wake()
        if isinstance(result, Exception):
            raise result
        return result

    def cancel(self) -> None:
        """Give the job up; who waits for it gets [`ClosedError`]."""
        if not self.canceled:
            self.canceled = True
            self.put(ClosedError("The request was canceled."))
            self.engine.wake()

    def put(self, result: Any) -> None:
        """Hand a result over, from the thread of the model. Audio comes in parts, with `None` after the last."""
        self.ended = self.kind in ("voice", "encode") or result is None or isinstance(result, Exception)
        self.unread += 1
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)


class Engine:
    """
    The one thread that runs the model.

    Jobs of one kind and with the same settings share a batch, in which a text takes part with its
    next piece; then it goes to the end of the queue, so that a long text does not hold up the others.
    A batch never changes an item: each text sounds as the pipeline speaks it alone with its seed.
    The tokens of long audio are decoded alone, a chunk each time it is their turn.

    Args:
        runner: The codec.
        speaker: The pipeline of a model that speaks; `None` for a codec alone.
        metrics: Where to count.
        batch_size: Jobs of a batch. With 1, a text is spoken by [`FlexiCodecTTSPipeline.stream`], whose
            first audio comes sooner.
        max_jobs: Jobs that wait and run at most.
        max_piece_length: Characters that are spoken at once.
    """

    def __init__(
        self,
        runner: CodecRunner,
        speaker: FlexiCodecTTSPipeline | None,
        metrics: Metrics,
        batch_size: int = 8,
        max_jobs: int = 64,
        max_piece_length: int = 200,
    ):
        self.runner = runner
        self.decoder = CodecRunner(runner.codec, runner.feature_extractor, DECODED_CHUNK_S, show_progress=False)
        self.speaker = speaker
        self.metrics = metrics
        self.batch_size = batch_size
        self.max_jobs = max_jobs
        self.max_piece_length = max_piece_length
        self._steps: dict[str, Callable[[list[Job]], None]] = {
            "speak": self._speak if batch_size > 1 else self._stream,
            "voice": self._encode_voices,
            "encode": self._encode,
            "decode": self._decode,
            "decode_long": self._decode_long,
        }
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._seconds_per_job = 1.0  # a moving average
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """
        Queue a job. Call it in the event loop that reads the results.

        Raises:
            QueueFullError: There are `max_jobs` already.
            ClosedError: The server ends.
        """
        if job.kind == "speak":
            job.work = SpokenText(job.work, self.max_piece_length)
        if job.kind == "decode" and self.decoder.chunk_of(job.work) is not None:
            job.kind, job.work = "decode_long", self._decoded_parts(job.work)
        job.engine, job.loop, job.results = self, asyncio.get_running_loop(), asyncio.Queue()
        with self._changed:
            if self._closed:
                raise ClosedError("The server is shutting down.")
            jobs = self._count()
            if jobs >= self.max_jobs:
                raise QueueFullError(max(1, math.ceil(jobs * self._seconds_per_job)))
            self._waiting.append(job)
            self.metrics.jobs.set(jobs + 1)
            self._changed.notify()
        return job

    def wake(self) -> None:
        """Look again for work: a client has read, or left."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End after the batch that runs; those who wait get [`ClosedError`]."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for job in self._waiting:
            job.cancel()

    def _count(self) -> int:
        jobs = sum(not (job.ended or job.canceled) for job in (*self._waiting, *self._running))
        self.metrics.jobs.set(jobs)
        return jobs

    def _next_batch(self) -> list[Job]:
        """The first job that can go on, and others like it."""
        self._waiting = deque(job for job in self._waiting if not job.canceled)
        ready = [job for job in self._waiting if job.unread < MAX_UNREAD]
        alike = [job for job in ready if self._group(job) == self._group(ready[0])]
        return alike[: self.batch_size]

    def _group(self, job: Job) -> Hashable:
        if job.kind == "decode_long":
            return job
        has_voice = job.kind == "speak" and job.work.voice is not None
        return job.kind, job.settings, has_voice

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not (batch := self._next_batch()):
                    self._count()
                    self._changed.wait()
                if self._closed:
                    return
                self._running = batch
                self._waiting = deque(job for job in self._waiting if job not in batch)
            start = time.monotonic()
            self.metrics.batch_size.observe(len(batch))
            self._step(batch)
            seconds = (time.monotonic() - start) / len(batch)
            with self._changed:
                self._seconds_per_job += 0.1 * (seconds - self._seconds_per_job)
                self._waiting.extend(job for job in batch if not job.ended)
                self._running = []
                self._count()

    def _step(self, batch: list[Job]) -> None:
        """Run a batch; if it fails, each job by itself, so that only the one at fault fails."""
        try:
            self._steps[batch[0].kind](batch)
        except Exception as error:
            if len(batch) > 1:
                for job in batch:
                    self._step([job])
                return
            if not isinstance(error, (ValueError, TypeError)):
                logger.exception("A request failed.")
            batch[0].put(error)

    def _speak(self, jobs: list[Job]) -> None:
        """Speak the next piece of each text."""
        speaker, texts = self._speaker(), [job.work for job in jobs]
        inputs = speaker.processor([text.text for text in texts], language=[text.speech.language for text in texts])
        voices = None if texts[0].voice is None else [text.voice for text in texts]
        output = speaker.model.generate(
            **speaker.ensure_tensor_on_device(**inputs),
            voice=voices,
            seed=[text.speech.seed for text in texts],
            return_dict_in_generate=True,
            **dict(cast("Settings", jobs[0].settings)),
        )
        rate = int(output.sampling_rate[0])
        for job, text, waveform in zip(jobs, texts, speaker.processor.batch_decode(output), strict=True):
            piece = text.text
            text.position += 1
            if text.crossfader is None:
                text.crossfader = Crossfader(round(CROSSFADE_S * rate))
            if text.voice is None and not text.is_done:
                text.voice = self._invented_voice(waveform, piece, rate, text.speech.language)
            audio = text.crossfader.add(waveform, text.is_done)
            job.put(SpeechChunk(audio=audio, sampling_rate=rate, text=piece, elapsed_s=0.0))
            if text.is_done:
                job.put(None)

    def _invented_voice(self, waveform: np.ndarray, text: str, rate: int, language: str) -> FlexiCodecVoice | None:
        """The voice of the first piece, for the rest of its text, as the pipeline takes it."""
        try:
            return self._speaker().encode_voice(waveform, text, rate, language)
        except ValueError as error:
            logger.warning("There is no voice, and the first piece of a text cannot serve as one: %s", error)
            return None

    def _stream(self, jobs: list[Job]) -> None:
        (job,) = jobs
        text, settings = job.work, dict(cast("Settings", job.settings))
        threshold = settings.pop("merging_threshold", None)
        options = {"voice": text.voice, "merging_threshold": threshold}
        chunks = self._speaker().stream(
            text.speech.text,
            seed=text.speech.seed,
            language=text.speech.language,
            max_piece_length=self.max_piece_length,
            generate_kwargs=settings,
            **{name: value for name, value in options.items() if value is not None},
        )
        for chunk in chunks:
            if job.canceled or self._closed:
                chunks.close()  # type: ignore[attr-defined]
                break
            job.put(chunk)
        job.put(None)

    def _encode_voices(self, jobs: list[Job]) -> None:
        for job in jobs:
            clip, text, language = job.work
            voice = self._speaker().encode_voice(clip.waveform, text, clip.sampling_rate, language)
            job.put(voice)

    def _encode(self, jobs: list[Job]) -> None:
        clips: list[AudioClip] = [job.work for job in jobs]
        rate, num_quantizers = cast("tuple[RateSetting, int]", jobs[0].settings)
        for job, encoded in zip(jobs, self.runner.encode(clips, [rate], num_quantizers), strict=True):
            job.put(encoded if isinstance(encoded, Exception) else encoded[0])

    def _decode(self, jobs: list[Job]) -> None:
        for job, decoded in zip(jobs, self.decoder.decode([job.work for job in jobs]), strict=True):
            if isinstance(decoded, Exception):
                job.put(decoded)
                continue
            for part in decoded:
                job.put(self._decoded(part))
            job.put(None)

    def _decode_long(self, jobs: list[Job]) -> None:
        (job,) = jobs
        job.put(next(job.work, None))

    def _decoded_parts(self, tokens: Tokens) -> Iterator[SpeechChunk]:
        (decoded,) = self.decoder.decode([tokens])
        if isinstance(decoded, Exception):
            raise decoded
        yield from map(self._decoded, decoded)

    def _decoded(self, audio: np.ndarray) -> SpeechChunk:
        return SpeechChunk(audio=audio, sampling_rate=self.runner.config.sampling_rate, text="", elapsed_s=0.0)

    def _speaker(self) -> FlexiCodecTTSPipeline:
        if self.speaker is None:
            raise ValueError("This model is a codec alone, and does not speak: serve a text-to-speech model.")
        return self.speaker
