"""
The text-to-speech pipeline of FlexiCodec: voices, long texts, audio as it is spoken.

The stock pipeline speaks a text in one go. This one speaks it in pieces of a sentence or so, all in one voice, and joins
them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np
import torch
from transformers.pipelines.base import ChunkPipeline
from transformers.pipelines.text_to_audio import AudioOutput, TextToAudioPipeline
from transformers.utils import logging
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .splitting_flexicodec import MAX_PIECE_LENGTH, split_text


logger = logging.get_logger(__name__)

CROSSFADE_S = 0.05


class SpeechChunk(TypedDict):
    """
    What [`FlexiCodecTTSPipeline.stream`] yields.

    audio (`np.ndarray` of shape `(num_samples,)`, float32):
        The next stretch of the waveform, to be played right behind the one before.
    sampling_rate (`int`):
        In hertz.
    text (`str`):
        What is said in it, up to the cross-fade with the next; an empty string for chat messages.
    elapsed_s (`float`):
        Seconds since `stream` began. That of the first chunk is the time to first audio.
    """

    audio: np.ndarray
    sampling_rate: int
    text: str
    elapsed_s: float


class FlexiCodecTTSPipeline(TextToAudioPipeline, ChunkPipeline):
    """
    [`~transformers.TextToAudioPipeline`] with voices from recordings, texts of any length, and streaming.

    A text is split into pieces of a sentence or so, which are spoken one by one (or `batch_size` at a time, with the same
    result) and joined with short cross-fades. All have one voice: the one asked for, or the first of the repository's, or,
    in a repository without voices, the one that the model invents for the first piece.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from flexicodec_hf import FlexiCodecTTSPipeline

    >>> tts = pipeline("text-to-speech", model="flexicodec", pipeline_class=FlexiCodecTTSPipeline)
    >>> speech = tts("Hello there.", reference_audio="me.wav", reference_text="What I say in it.")
    >>> speech["audio"], speech["sampling_rate"]
    ```
    """

    def __call__(self, text_inputs: Any, **kwargs: Any) -> Any:
        """
        Speak one text or several.

        Args:
            text_inputs (`str`, `list[str]`, a chat, or a list of chats):
                Texts of any length, or chats as for the stock pipeline, which are spoken in one piece. A generator or a
                dataset of them gives an iterator.
            reference_audio (`str`, `Path`, `np.ndarray` of shape `(num_samples,)`, *optional*):
                A recording whose voice to speak with, 3 to 15 seconds long: a file, a URL, or a waveform. Goes with
                `reference_text`. Given to `pipeline(...)`, it is encoded once and for all.
            reference_text (`str`, *optional*):
                What `reference_audio` says, word for word.
            reference_sampling_rate (`int`, *optional*):
                Of a waveform, in hertz.
            voice (`str` or [`FlexiCodecVoice`], *optional*):
                Instead of a recording, a voice of the repository (`tts.model.voices`) or one that was encoded before.
            language (`str`, *optional*, defaults to that of the processor):
                Whisper's code of the texts' language, such as `"en"` or `"zh"`.
            merging_threshold (`float`, *optional*):
                One that the model was trained with: the lower, the fewer tokens a second, and the faster.
            seed (`int`, *optional*):
                Makes the call repeatable: every piece is spoken with this seed, whatever comes before it.
            max_piece_length (`int`, *optional*, defaults to 200):
                How many characters are spoken at once; an East Asian one counts for three.
            crossfade_s (`float`, *optional*, defaults to 0.05):
                Length of the joints in seconds.
            generate_kwargs (`dict`, *optional*):
                For `generate`: `temperature`, `top_k`, `use_nar`, `num_inference_steps`, `guidance_scale`, ...
            batch_size (`int`, *optional*, defaults to 1):
                Pieces to speak at once, of one text or several.

        Returns:
            For each text a dictionary with `audio`, `(num_samples,)` in float32, and `sampling_rate`.

        Raises:
            ValueError: A text without anything to speak, a recording without its text (or the other way round), or one that
                is too short or silent, an unknown voice, language or threshold.
        """
        return super().__call__(text_inputs, **kwargs)

    def stream(self, text: Any, **kwargs: Any) -> Iterator[SpeechChunk]:
        """
        Speak one text and yield the audio piece by piece, as soon as each is there.

        The first piece decides how long the wait for the first chunk is (its `elapsed_s`): a smaller `max_piece_length`
        makes it shorter. Joined, the chunks are what a call with the same seed returns.

        Args:
            text (`str` or a chat):
                What to say.
            kwargs:
                As for a call, without `batch_size`.

        Yields:
            [`SpeechChunk`]
        """
        start = time.perf_counter()
        if isinstance(text, (list, tuple)):
            if not (text and is_valid_message(text[0])):
                raise ValueError(
                    f"`stream` speaks one text or chat, got a {type(text).__name__}: stream each by itself."
                )
            text = Chat(text)
        preprocess_params, forward_params, postprocess_params = self._sanitize_parameters(**kwargs)
        preprocess_params = {**self._preprocess_params, **preprocess_params}
        forward_params = {**self._forward_params, **forward_params}
        joints = _Joints({**self._postprocess_params, **postprocess_params}.get("crossfade_s", CROSSFADE_S))
        for item in self.preprocess(text, **preprocess_params):
            piece = self.forward(item, **forward_params)
            audio = joints.add(piece)
            yield SpeechChunk(
                audio=audio,
                sampling_rate=piece["sampling_rate"],
                text=piece["text"],
                elapsed_s=time.perf_counter() - start,
            )

    def encode_voice(
        self,
        reference_audio: Any,
        reference_text: str,
        sampling_rate: int | None = None,
        language: str | None = None,
    ) -> Any:
        """
        A recording to a voice to speak with again and again: `tts("Hello.", voice=tts.encode_voice("me.wav", "..."))`.

        Args:
            reference_audio (`str`, `Path` or `np.ndarray` of shape `(num_samples,)`):
                The recording, 3 to 15 seconds long.
            reference_text (`str`):
                What it says, word for word.
            sampling_rate (`int`, *optional*):
                Of a waveform, in hertz.
            language (`str`, *optional*):
                Of the recording.

        Returns:
            [`FlexiCodecVoice`]; its `save` writes a file.

        Raises:
            ValueError: The recording is too short, or silent, or there is nothing to speak in its text.
        """
        inputs = self.processor(
            audio=reference_audio, reference_text=reference_text, sampling_rate=sampling_rate, language=language
        )
        with torch.no_grad():
            return self.model.encode_voice(**self.ensure_tensor_on_device(**inputs), metadata={"text": reference_text})

    def _sanitize_parameters(
        self,
        reference_audio: Any = None,
        reference_text: str | None = None,
        reference_sampling_rate: int | None = None,
        voice: Any = None,
        language: str | None = None,
        merging_threshold: float | None = None,
        seed: int | None = None,
        max_piece_length: int | None = None,
        crossfade_s: float | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if reference_audio is not None or reference_text is not None:
            if reference_audio is None or reference_text is None:
                given = "reference_text" if reference_audio is None else "reference_audio"
                raise ValueError(
                    f"Got `{given}` alone: `reference_audio` goes with `reference_text`, which is what it says, word for word."
                )
            if voice is not None:
                raise ValueError("Pass `voice` or `reference_audio`, not both: each says who speaks.")
            voice = self.encode_voice(reference_audio, reference_text, reference_sampling_rate, language)
        if crossfade_s is not None and not 0 <= crossfade_s <= 1:
            raise ValueError(f"`crossfade_s` must be between 0 and 1 second, got {crossfade_s}.")
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        preprocess_params |= _given(language=language, voice=voice, max_piece_length=max_piece_length)
        # Not the empty dictionaries of the stock pipeline: they would replace what `pipeline(...)` was given.
        forward_params = {name: value for name, value in forward_params.items() if value}
        forward_params |= _given(generate_kwargs=generate_kwargs, merging_threshold=merging_threshold, seed=seed)
        if forward_params:
            preprocess_params["invent_with"] = forward_params
        return preprocess_params, forward_params, postprocess_params | _given(crossfade_s=crossfade_s)

    def preprocess(
        self,
        text: Any,
        voice: Any = None,
        language: str | None = None,
        max_piece_length: int = MAX_PIECE_LENGTH,
        invent_with: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        if isinstance(text, Chat):
            pieces = [text]
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **_given(language=language)}
        else:
            kwargs |= _given(language=language)
            # An empty text is for the processor to refuse.
            pieces = split_text(text, max_piece_length, language or self.processor.language) or [text]
            if len(pieces) > 1 and voice is None and not self.model.voices:
                voice = self._invent_voice(pieces[0], {**self._forward_params, **(invent_with or {})}, kwargs)
        progress = logging.tqdm(pieces, desc="Speaking", unit="piece", disable=True if len(pieces) == 1 else None)
        for index, piece in enumerate(progress):
            inputs = super().preprocess(piece, **kwargs)
            # A chat may bring its own recording.
            speaker = {} if "reference_input_values" in inputs else _given(voice=voice)
            yield {
                **inputs,
                **speaker,
                "text": "" if isinstance(piece, Chat) else piece,
                "is_last": index == len(pieces) - 1,
            }

    def _invent_voice(self, text: str, forward_params: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        """The voice that the model gives to the first piece of a text, for all of them."""
        item = {**super().preprocess(text, **kwargs), "text": text, "is_last": True}
        spoken = self.forward(item, **forward_params)
        try:
            return self.encode_voice(spoken["audio"].numpy(), text, spoken["sampling_rate"], kwargs.get("language"))
        except ValueError as error:
            logger.warning(
                f"There is no voice, and the first piece of the text cannot serve as one: {error} Voices may change from "
                "piece to piece: pass `voice` or `reference_audio`."
            )
            return None

    def _forward(
        self,
        model_inputs: dict[str, Any],
        forward_params: dict[str, Any] | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        inputs = dict(model_inputs)
        text, is_last = inputs.pop("text"), inputs.pop("is_last")
        output = super()._forward(
            inputs, forward_params={**(forward_params or {}), **settings}, generate_kwargs=generate_kwargs or {}
        )
        waveforms = [audio[mask] for audio, mask in zip(output.audio, output.audio_mask, strict=True)]
        if len(waveforms) != (1 if isinstance(is_last, bool) else len(is_last)):
            raise ValueError("`num_return_sequences` must be 1: this pipeline joins pieces to one waveform.")
        if isinstance(is_last, bool):
            return {"audio": waveforms[0], "sampling_rate": output.sampling_rate, "text": text, "is_last": is_last}
        rates = [output.sampling_rate] * len(waveforms)
        return {"audio": waveforms, "sampling_rate": rates, "text": text, "is_last": is_last}

    def postprocess(self, pieces: list[dict[str, Any]], crossfade_s: float = CROSSFADE_S) -> AudioOutput:
        joints = _Joints(crossfade_s)
        audio = [joints.add({**piece, "is_last": index == len(pieces) - 1}) for index, piece in enumerate(pieces)]
        return AudioOutput(audio=np.concatenate(audio), sampling_rate=pieces[0]["sampling_rate"])


class _Joints:
    """Joins waveforms: the end of each fades out while the start of the next fades in."""

    def __init__(self, crossfade_s: float):
        self.crossfade_s = crossfade_s
        self._held = np.zeros(0, dtype=np.float32)

    def add(self, piece: dict[str, Any]) -> np.ndarray:
        """What can be played: all that was added but, before the last piece, the end that will be faded."""
        waveform = piece["audio"].float().reshape(-1).numpy()
        overlap = min(len(self._held), len(waveform))
        before, held = np.split(self._held, [len(self._held) - overlap])
        # The gains sum to 1: the joint is never louder than both sides.
        fade_in = np.sin(np.linspace(0, np.pi / 2, overlap + 2, dtype=np.float32)[1:-1]) ** 2
        joint = held * (1 - fade_in) + waveform[:overlap] * fade_in
        joined = np.concatenate([before, joint, waveform[overlap:]])
        end = len(joined)
        if not piece["is_last"]:
            end = max(0, end - round(self.crossfade_s * piece["sampling_rate"]))
        self._held = joined[end:]
        return joined[:end]


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


__all__ = ["FlexiCodecTTSPipeline", "SpeechChunk"]
