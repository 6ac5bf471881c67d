"""
Speech while its tokens are drawn: the streamer that hands out audio, and what makes the audio of a
stream of tokens.
"""

from __future__ import annotations

import asyncio
import functools
import math
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from .chunking_flexicodec import Crossfader
from .generation_flexicodec_ar import DurationStreamer
from .voice_flexicodec import FlexiCodecVoice


# Cross-fade from one chunk to the next, less than a codec frame, and speech before a chunk that the
# models see, in seconds.
_FADE_S = 0.04
_CONTEXT_S = 3.0
# `torch.randn` fills blocks of 16 values: noise that is drawn in multiples of it has the same
# beginning at every length.
_NOISE_BLOCK = 16


class FlexiCodecAudioStreamer(BaseStreamer):
    """
    Hands out the speech of one text while it is generated: `generate(..., streamer=streamer)` runs
    in one thread, and another iterates over the streamer, with `for` or `async for`.

    A chunk is made when its tokens are drawn and a few more, which give it context; it also sees
    what was spoken before. Leaving the loop early ends the generation; an error in `generate` is
    raised in the loop. Tokens are those of a call without a streamer. A streamer serves one call.

    Args:
        first_chunk_s (`float`, *optional*, defaults to 0.3):
            Seconds of the first chunk. Shorter is heard sooner, and sounds less like the whole.
        chunk_growth (`float`, *optional*, defaults to 1.5):
            How many times as long as the one before a chunk is. Longer chunks cost less time.
        max_chunk_s (`float`, *optional*, defaults to 4.0):
            Seconds of a chunk at most.
        lookahead_s (`float`, *optional*, defaults to 0.16):
            Seconds of speech after a chunk that must be known before it is made.
        prompt_s (`float`, *optional*, defaults to 3.0):
            Seconds of speech that the Voicebox continues, and pays for in each chunk: what was
            spoken last, and the end of the voice, which keeps half of them.
        max_waiting (`int`, *optional*):
            Chunks that may wait for the consumer before the generation does. By default it never
            waits.
        timeout (`float`, *optional*):
            Seconds to wait for a chunk. By default without end.

    Attributes:
        sampling_rate (`int`): In hertz, known when the first chunk is.

    Yields:
        `np.ndarray` of shape `(num_samples,)`, float32: the next part of the waveform, to be played
        directly after the one before.

    Example:

    ```python
    >>> from threading import Thread

    >>> streamer = FlexiCodecAudioStreamer()
    >>> Thread(target=model.generate, kwargs={**processor("Hello there."), "streamer": streamer}).start()
    >>> for chunk in streamer:
    ...     play(chunk, streamer.sampling_rate)
    ```
    """

    sampling_rate = 0

    def __init__(
        self,
        first_chunk_s: float = 0.3,
        chunk_growth: float = 1.5,
        max_chunk_s: float = 4.0,
        lookahead_s: float = 0.16,
        prompt_s: float = 3.0,
        max_waiting: int | None = None,
        timeout: float | None = None,
    ):
        for name, value, low in (
            ("first_chunk_s", first_chunk_s, 0.08),
            ("chunk_growth", chunk_growth, 1.0),
            ("max_chunk_s", max_chunk_s, first_chunk_s),
            ("lookahead_s", lookahead_s, 0.0),
            ("prompt_s", prompt_s, 0.16),
            ("max_waiting", max_waiting, 1),
            ("timeout", timeout, 0.0),
        ):
            if value is not None and not (isinstance(value, (int, float)) and value >= low):
                raise ValueError(f"`{name}` must be at least {low}, got {value!r}.")
        self.first_chunk_s = first_chunk_s
        self.chunk_growth = chunk_growth
        self.max_chunk_s = max_chunk_s
        self.lookahead_s = lookahead_s
        self.prompt_s = prompt_s
        self.max_waiting = max_waiting
        self.timeout = timeout
        self.closed = False
        self._chunks: deque[Any] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, value: Any) -> None:
        """Called by `generate` with the next chunk."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or len(self._chunks) < (self.max_waiting or math.inf))
            if not self.closed:
                self._chunks.append(value)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Called by `generate` when it has returned, or failed."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """End the generation at its next step, and drop what waits."""
        with self._changed:
            self.closed = True
            self._chunks.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        try:
            while (chunk := self._take()) is not None:
                yield chunk
        finally:
            self.close()

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            while (chunk := await asyncio.to_thread(self._take)) is not None:
                yield chunk
        finally:
            self.close()

    def _take(self) -> Any:
        """The next chunk, or `None` at the end."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._chunks or self._ended or self.closed, self.timeout):
                raise TimeoutError(
                    f"No audio came within {self.timeout} s: raise `timeout`, or see why it takes long."
                )
            if self._chunks:
                self._changed.notify_all()
                return self._chunks.popleft()
            if self._error is not None and not self.closed:
                raise self._error
            return None


def ends_streamer(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a `generate` to tell its [`FlexiCodecAudioStreamer`] of its end, and of an error."""

    @functools.wraps(generate)
    def wrapper(*args: Any, streamer: BaseStreamer | None = None, **kwargs: Any) -> Any:
        if streamer is not None:
            kwargs["streamer"] = streamer
        if not isinstance(streamer, FlexiCodecAudioStreamer):
            return generate(*args, **kwargs)
        try:
            output = generate(*args, **kwargs)
        except BaseException as error:
            streamer.end(error)
            raise
        streamer.end()
        return output

    return wrapper


class ConsumerGone(Exception):
    """Nobody listens any more."""


class SpeechStream(DurationStreamer):
    """
    Takes tokens and their durations from the autoregressive model, and gives their audio to a
    [`FlexiCodecAudioStreamer`].

    Args:
        model: The text-to-speech system.
        streamer: Takes the chunks.
        voice: Who speaks, for the Voicebox.
        generator: Of the noise.
        settings: Of the call.
        use_nar: Whether the Voicebox makes the sound, or the codec.
    """

    def __init__(
        self,
        model: Any,
        streamer: FlexiCodecAudioStreamer,
        voice: FlexiCodecVoice | None,
        generator: torch.Generator,
        settings: GenerationConfig,
        use_nar: bool,
    ):
        self.model, self.streamer, self.voice = model, streamer, voice
        self.generator, self.settings, self.use_nar = generator, settings, use_nar
        self.codes: list[int] = []
        self.starts = [0]  # the first frame of each token, and the end; all in codec frames
        self.chunks: list[np.ndarray] = []
        self._mel: Tensor | None = None  # of what was spoken, (num_frames, num_mel_bins)
        self._spoken = 0  # tokens
        self._saw_prompt = False
        frame_rate = model.config.codec_config.frame_rate
        self._size, self._max_size = streamer.first_chunk_s * frame_rate, streamer.max_chunk_s * frame_rate
        # One frame to fade into the next chunk, and those that give it context.
        self._num_held = 1 + round(streamer.lookahead_s * frame_rate)
        self._num_context = round(_CONTEXT_S * frame_rate)
        self._num_prompt = round(streamer.prompt_s * frame_rate)
        streamer.sampling_rate = sampling_rate = (model if use_nar else model.codec).config.sampling_rate
        self._hop_length = round(sampling_rate / frame_rate)
        self._crossfader = Crossfader(round(_FADE_S * sampling_rate))

    def put(self, value: Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self._check_consumer()
        code = int(value)
        if code >= self.model.config.ar_config.speech_vocab_size:
            return
        self.codes.append(code)
        known = min(len(self.codes), len(self.starts) - 1)
        stop = self._token_at(self.starts[known] - self._num_held)
        if self.starts[stop] - self.starts[self._spoken] >= self._size:
            self._speak(stop, known, is_last=False)
            self._size = min(self._size * self.streamer.chunk_growth, self._max_size)

    def put_durations(self, value: Tensor) -> None:
        self.starts.append(self.starts[-1] + int(value))

    def end(self) -> None:
        """Nothing yet: the last token may still be read for its duration, see `finish`."""

    def finish(self) -> None:
        """Speak the rest."""
        self._check_consumer()
        self._speak(len(self.codes), len(self.codes), is_last=True)

    def tokens(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Codes and lengths `(1, num_tokens)` of the tokens from `start` to `stop`."""
        starts = torch.tensor(self.starts[: len(self.codes) + 1])
        return torch.tensor([self.codes[start:stop]], dtype=torch.long), starts.diff()[None, start:stop]

    def _check_consumer(self, *_: Any) -> None:
        if self.streamer.closed:
            raise ConsumerGone

    def _token_at(self, frame: int) -> int:
        """The token that begins at a frame, or the last one before it."""
        return max(bisect_right(self.starts, frame) - 1, 0)

    def _speak(self, stop: int, known: int, is_last: bool) -> None:
        """Speak the tokens up to `stop`, with those up to `known` as context."""
        begin, num_frames = self.starts[self._spoken], self.starts[stop] - self.starts[self._spoken]
        waveform = np.zeros(0, dtype=np.float32)
        if num_frames:
            if self.use_nar:
                first, decoded = self._run_voicebox(num_frames, known)
            else:
                first, decoded = self._run_codec(known)
            end = None if is_last else num_frames * self._hop_length + self._crossfader.fade_length
            waveform = decoded[(begin - first) * self._hop_length :][:end].float().cpu().numpy()
        self._spoken = stop
        chunk = self._crossfader.add(waveform, is_last)
        if len(chunk):
            self.chunks.append(chunk)
            self.streamer.put(chunk)

    def _run_codec(self, known: int) -> tuple[int, Tensor]:
        """What was not spoken, and some context before it: the first frame, and the waveform."""
        codec = self.model.codec
        first = self._token_at(self.starts[self._spoken] - self._num_context)
        codes, token_lengths = (tensor.to(codec.device) for tensor in self.tokens(first, known))
        mask = torch.ones_like(codes, dtype=torch.bool)
        return self.starts[first], codec._decode_tokens(codes[:, None], token_lengths, mask).audio_values[0, 0]

    def _run_voicebox(self, num_frames: int, known: int) -> tuple[int, Tensor]:
        """As `_run_codec`. The mel of the next `num_frames` is kept, the rest is only their context."""
        voicebox = self.model.voicebox
        factor, begin, end = voicebox.config.upsample_factor, self.starts[self._spoken], self.starts[known]
        codes, token_lengths = (tensor.to(voicebox.device) for tensor in self.tokens(self._spoken, known))
        num_drawn = math.ceil(end * factor / _NOISE_BLOCK) * _NOISE_BLOCK
        noise = voicebox.draw_noise([num_drawn], [self.generator.clone_state()])
        mel = voicebox.sample(
            codes,
            token_lengths,
            **self._prompt(),
            **self.model._flow_settings(self.settings),
            noise=noise[:, begin * factor : end * factor],
            callback_on_step_end=self._check_consumer,
        ).mel[0]
        spoken = mel[:0] if self._mel is None else self._mel
        self._mel = torch.cat([spoken, mel[: num_frames * factor]])
        first = max(begin - self._num_context, 0)
        window = torch.cat([spoken[first * factor :], mel])[None]
        mask = torch.ones(window.shape[:2], dtype=torch.bool, device=window.device)
        return first, self.model._mel_to_audio(window, mask).audio_values[0, 0]

    def _prompt(self) -> dict[str, Tensor]:
        """What the Voicebox continues: the end of the voice, and what was spoken last."""
        threshold, factor = self.settings.merging_threshold, self.model.voicebox.config.upsample_factor
        spoken = _frame_codes(*self.tokens(0, self._spoken))[-self._num_prompt :]
        mel = torch.zeros(0, self.model.voicebox.config.num_mel_bins)
        if self._mel is not None:
            mel = self._mel[-self._num_prompt * factor :].cpu()
        voice, voice_mel = spoken[:0], mel[:0]
        if self.voice is not None and self.voice.mel is not None:
            voice, voice_mel = _frame_codes(*self.voice.tokens_at(threshold)), self.voice.mel
        length = min(len(voice), len(voice_mel) // factor)
        if not len(spoken) and length <= self._num_prompt:
            return {} if self.voice is None else self.model._voicebox_prompt([self.voice], threshold)
        num_voice = min(length, max(self._num_prompt - len(spoken), self._num_prompt // 2))
        num_spoken = min(len(spoken), self._num_prompt - num_voice)
        codes = torch.cat([voice[length - num_voice : length], spoken[len(spoken) - num_spoken :]])
        mels = [voice_mel[(length - num_voice) * factor : length * factor], mel[len(mel) - num_spoken * factor :]]
        prompt = FlexiCodecVoice({threshold: (codes, torch.ones_like(codes))}, torch.cat(mels))
        return self.model._voicebox_prompt([prompt], threshold)


def _frame_codes(codes: Tensor, token_lengths: Tensor) -> Tensor:
    """The code of each codec frame."""
    return codes.flatten().repeat_interleave(token_lengths.flatten())


__all__ = ["FlexiCodecAudioStreamer"]
