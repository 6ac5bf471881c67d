"""
The text-to-speech pipeline of FlexiCodec: voices, long texts, and audio while it is generated.

The stock pipeline speaks a text in one go. This one speaks it in pieces of about a sentence, in one
voice, and joins them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypedDict

import numpy as np
import torch
from transformers.pipelines.base import ChunkPipeline
from transformers.pipelines.text_to_audio import AudioOutput, TextToAudioPipeline
from transformers.utils import logging
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .chunking_flexicodec import Crossfader
from .compatibility_flexicodec import is_number
from .cpu_flexicodec import optimize_for_cpu
from .modeling_flexicodec_tts import FlexiCodecForTextToSpeech
from .processing_flexicodec_tts import FlexiCodecTTSProcessor
from .release_flexicodec import HUB_OPTIONS
from .streaming_flexicodec_tts import FlexiCodecAudioStreamer
from .text_flexicodec import MAX_PIECE_LENGTH, split_text
from .voice_flexicodec import FlexiCodecVoice


logger = logging.get_logger(__name__)

CROSSFADE_S = 0.05


class SpeechChunk(TypedDict):
    """
    What [`FlexiCodecTTSPipeline.stream`] yields.

    Args:
        audio (`np.ndarray` of shape `(num_samples,)`, float32):
            The next part of the waveform, to be played directly after the one before.
        sampling_rate (`int`):
            In hertz.
        text (`str`):
            The piece of the text that begins with this chunk; empty within a piece, and for chats.
        elapsed_s (`float`):
            Seconds since `stream` began. For the first chunk, this is the time to first audio.
    """

    audio: np.ndarray
    sampling_rate: int
    text: str
    elapsed_s: float


@dataclass(frozen=True)
class _VoicedText:
    """A text with a voice of its own."""

    text: str
    voice: FlexiCodecVoice


class _PieceStreamer(FlexiCodecAudioStreamer):
    """The chunks of all pieces of a text, with a cross-fade from piece to piece."""

    crossfade_s = CROSSFADE_S
    _crossfader: Crossfader | None = None
    _text = ""
    _is_first = True

    def begin(self, text: str) -> None:
        """Chunks of another piece follow."""
        self._text, self._is_first = text, True

    def put(self, value: np.ndarray, is_last: bool = False) -> None:
        if self._crossfader is None:
            self._crossfader = Crossfader(round(self.crossfade_s * self.sampling_rate))
        chunk = self._crossfader.add(value, is_last, continues=not self._is_first)
        self._is_first = False
        if len(chunk):
            super().put((chunk, self.sampling_rate, self._text))
            self._text = ""

    def end(self, error: BaseException | None = None) -> None:
        """Of one piece; `run` ends the stream."""

    def run(self, speak: Callable[[], None]) -> None:
        """Call what speaks all pieces, and tell the consumer of its end, or of its error."""
        error = None
        try:
            speak()
            if self._crossfader is not None:
                self.put(np.zeros(0, dtype=np.float32), is_last=True)
        except BaseException as raised:
            error = raised
        super().end(error)


class FlexiCodecTTSPipeline(TextToAudioPipeline, ChunkPipeline):
    """
    [`~transformers.TextToAudioPipeline`] with voices from recordings, texts of any length, and
    streaming.

    A text is split into pieces of about a sentence. They are spoken one by one (or `batch_size` at
    a time, with the same result) and joined with short cross-fades. All have the same voice: the
    requested one, or the first of the repository, or, in a repository without voices, the one that
    the model invents for the first piece.

    On a CPU, the model is changed in place for speed, see [`optimize_for_cpu`].

    Args:
        reference_audio, reference_text, reference_sampling_rate, voice, ... (*optional*):
            Any argument of a call, as the default for all calls. A recording is encoded once.
        args, kwargs:
            See [`~transformers.Pipeline`].

    Example:

    ```python
    >>> from transformers import pipeline
    >>> from flexicodec_hf import FlexiCodecTTSPipeline

    >>> tts = pipeline("text-to-speech", model="flexicodec", pipeline_class=FlexiCodecTTSPipeline)
    >>> speech = tts("Hello there.", reference_audio="me.wav", reference_text="What I say in it.")
    >>> speech["audio"], speech["sampling_rate"]
    ```
    """

    def __init__(
        self,
        *args: Any,
        reference_audio: Any = None,
        reference_text: str | None = None,
        reference_sampling_rate: int | None = None,
        voice: str | FlexiCodecVoice | None = None,
        **kwargs: Any,
    ):
        # TODO: drop once transformers 5.17 is not supported. To find the sampling rate, it copies the settings
        # of generation into the configuration, which then cannot be saved.
        model = kwargs["model"] if "model" in kwargs else args[0]
        kwargs.setdefault("sampling_rate", model.config.sampling_rate)
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError(
                "The pipeline has no processor, and would speak letters instead of phonemes: pass `processor=`, or "
                "load a repository with a processor_config.json."
            )
        if self.device.type == "cpu":
            optimize_for_cpu(self.model)
        voice = self._requested_voice(
            voice, reference_audio, reference_text, reference_sampling_rate, self._preprocess_params.get("language")
        )
        self._preprocess_params |= _given(voice=voice)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> FlexiCodecTTSPipeline:
        """
        Load model and processor from a converted repository, or from the authors' own files, which
        are converted first, once.

        Args:
            pretrained_model_name_or_path (`str` or `PathLike`): Hub id or directory.
            device (`int`, `str` or `torch.device`, *optional*): See [`~transformers.Pipeline`].
            dtype (`torch.dtype`, `str` or `dict`, *optional*): See [`FlexiCodecForTextToSpeech.from_pretrained`].
            kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, and
                arguments of the pipeline.

        Raises:
            OSError: The repository holds the codec alone, or cannot be found.
            ValueError: Released files are missing, or cannot be converted.
        """
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        model = FlexiCodecForTextToSpeech.from_pretrained(
            pretrained_model_name_or_path, **options, **_given(dtype=dtype)
        )
        processor = FlexiCodecTTSProcessor.from_pretrained(pretrained_model_name_or_path, **options)
        parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
        return cls(model=model.eval(), processor=processor, **parts, device=device, **kwargs)

    def __call__(
        self, text_inputs: Any, num_workers: int | None = None, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        """
        Speak one text or several.

        Args:
            text_inputs (`str`, `list[str]`, a chat, or a list of chats):
                Texts of any length, or chats as for the stock pipeline, which are spoken in one
                piece. A generator or a dataset of them gives an iterator.
            reference_audio (`str`, `Path`, `np.ndarray` of shape `(num_samples,)`, *optional*):
                A recording of the voice to speak with, 3 to 15 seconds long: a file, a URL, or a
                waveform. Needs `reference_text`.
            reference_text (`str`, *optional*):
                What `reference_audio` says, word for word.
            reference_sampling_rate (`int`, *optional*):
                Sampling rate of a waveform, in hertz.
            voice (`str` or [`FlexiCodecVoice`], *optional*):
                Instead of a recording, a voice of the repository (`tts.model.voices`) or one that
                was encoded before.
            language (`str`, *optional*):
                Whisper's code of the language of the texts, such as `"en"` or `"zh"`. Defaults to
                the processor's.
            merging_threshold (`float`, *optional*):
                One that the model was trained with. Lower values give fewer tokens per second, and
                faster speech generation.
            seed (`int`, *optional*):
                Makes the call repeatable. Every piece is spoken with this seed, whatever comes
                before it.
            max_piece_length (`int`, *optional*, defaults to 200):
                Characters that are spoken at once. An East Asian character counts as three.
            crossfade_s (`float`, *optional*, defaults to 0.05):
                Length of the cross-fades in seconds, from 0 to 1.
            generate_kwargs (`dict`, *optional*):
                For `generate`: `temperature`, `top_k`, `use_nar`, `num_inference_steps`,
                `guidance_scale`, ...
            batch_size (`int`, *optional*, defaults to 1):
                Pieces to speak at once, of one text or several. Several texts without a voice are
                spoken piece by piece.
            num_workers (`int`, *optional*):
                See [`~transformers.Pipeline`].

        Returns:
            For each text a dictionary with `audio`, a float32 array of shape `(num_samples,)`, and
            `sampling_rate`.

        Raises:
            ValueError: A text has nothing to speak, a recording comes without its text (or the
                other way round), is too short or silent, or a voice, language or threshold is
                unknown.
        """
        if isinstance(text_inputs, (list, tuple)) and not text_inputs:
            raise ValueError("`text_inputs` is empty: pass a text, or a list with at least one.")
        # Datasets of PyTorch have `__getitem__` alone.
        is_several = hasattr(text_inputs, "__iter__") or hasattr(text_inputs, "__getitem__")
        if not is_several or isinstance(text_inputs, (bytes, bytearray, Mapping, set)):
            raise TypeError(
                f"`text_inputs` must be a text, a chat, or several of them, got {text_inputs!r} "
                f"({type(text_inputs).__name__})."
            )
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value is not None and (not is_number(value, whole=True) or value < least):
                raise ValueError(f"`{name}` must be a whole number, at least {least}, got {value!r}.")
        kwargs = self._resolve_voice(kwargs)
        if not self._has_voice(kwargs):
            if isinstance(text_inputs, (str, Chat)):
                text_inputs = self._invent_voice(text_inputs, kwargs)
            else:
                texts = (self._invent_voice(text, kwargs) for text in text_inputs)
                text_inputs = list(texts) if isinstance(text_inputs, list) else texts
                batch_size = 1  # texts of one piece have no invented voice, and cannot share a batch with others
        return super().__call__(text_inputs, num_workers=num_workers, batch_size=batch_size, **kwargs)

    def stream(
        self, text: Any, whole_pieces: bool = False, streamer_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Generator[SpeechChunk, None, None]:
        """
        Speak one text and yield its audio while it is generated.

        The first chunk comes after a few tokens. Each is made with what was spoken before it, and
        with a little of what follows, so the audio differs slightly from that of a call with the
        same seed; the tokens are the same. Leaving the loop ends the generation.

        Args:
            text (`str` or a chat):
                What to say.
            whole_pieces (`bool`, *optional*, defaults to `False`):
                Yields each piece of the text when all of it was generated, and generates the next
                one when it is asked for. Joined, the chunks are then what a call with the same
                seed returns.
            streamer_kwargs (`dict`, *optional*):
                Lengths of the chunks, see [`FlexiCodecAudioStreamer`]: `first_chunk_s`,
                `chunk_growth`, `max_chunk_s`, `lookahead_s`, `prompt_s`; and `max_waiting`, 8 by default.
            kwargs:
                The arguments of a call, without `batch_size`. In a model without voices, the first
                piece has the voice that the model invents, and the others imitate it.

        Yields:
            [`SpeechChunk`]

        Raises:
            ValueError: Several texts, and for the reasons that a call has.
        """
        start = time.perf_counter()
        if isinstance(text, (list, tuple)):
            if not (text and is_valid_message(text[0])):
                raise ValueError(
                    f"`stream` speaks one text or chat, got a {type(text).__name__}: stream each by itself."
                )
            text = Chat(text)
        kwargs = self._resolve_voice(kwargs)
        if whole_pieces:
            chunks = self._stream_pieces(text, kwargs)
        else:
            chunks = self._stream_chunks(text, kwargs, _PieceStreamer(**{"max_waiting": 8, **(streamer_kwargs or {})}))
        for audio, sampling_rate, said in chunks:
            yield SpeechChunk(
                audio=audio, sampling_rate=sampling_rate, text=said, elapsed_s=time.perf_counter() - start
            )

    def _stream_pieces(self, text: Any, kwargs: dict[str, Any]) -> Iterator[tuple[np.ndarray, int, str]]:
        if not self._has_voice(kwargs):
            text = self._invent_voice(text, kwargs)
        preprocess_params, forward_params, postprocess_params = self._parameters(kwargs)
        crossfade_s = postprocess_params.get("crossfade_s", CROSSFADE_S)
        crossfader = None
        for item in self.preprocess(text, **preprocess_params):
            piece = self.forward(item, **forward_params)
            if crossfader is None:
                crossfader = Crossfader(round(crossfade_s * piece["sampling_rate"]))
            audio = crossfader.add(piece["audio"].numpy(), piece["is_last"])
            yield audio, piece["sampling_rate"], piece["text"]

    def _stream_chunks(
        self, text: Any, kwargs: dict[str, Any], streamer: _PieceStreamer
    ) -> Iterator[tuple[np.ndarray, int, str]]:
        preprocess_params, forward_params, postprocess_params = self._parameters(kwargs)
        streamer.crossfade_s = postprocess_params.get("crossfade_s", CROSSFADE_S)
        generate_kwargs = {**forward_params.pop("generate_kwargs", {}), "streamer": streamer}
        invents_voice = not self._has_voice(kwargs)

        def speak() -> None:
            voice = None
            for item in self.preprocess(text, **preprocess_params):
                streamer.begin(item["text"])
                piece = self.forward(
                    {**item, **_given(voice=voice)}, generate_kwargs=generate_kwargs, **forward_params
                )
                if streamer.closed:
                    return
                if invents_voice and voice is None and not item["is_last"]:
                    voice = self._voice_of(piece, preprocess_params.get("language"))

        thread = threading.Thread(target=streamer.run, args=(speak,), daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            streamer.close()
            thread.join()

    def encode_voice(
        self,
        reference_audio: Any,
        reference_text: str,
        sampling_rate: int | None = None,
        language: str | None = None,
    ) -> FlexiCodecVoice:
        """
        Encode a recording, to speak with its voice again and again:
        `tts("Hello.", voice=tts.encode_voice("me.wav", "What I say."))`.

        Args:
            reference_audio (`str`, `Path` or `np.ndarray` of shape `(num_samples,)`):
                The recording, 3 to 15 seconds long.
            reference_text (`str`):
                What it says, word for word.
            sampling_rate (`int`, *optional*):
                Sampling rate of a waveform, in hertz.
            language (`str`, *optional*):
                Language of the recording.

        Returns:
            [`FlexiCodecVoice`]; its `save` writes a file.

        Raises:
            ValueError: The recording is too short or silent, or its text has nothing to speak.
        """
        inputs = self.processor(
            audio=reference_audio, reference_text=reference_text, sampling_rate=sampling_rate, language=language
        )
        with torch.no_grad():
            return self.model.encode_voice(**self.ensure_tensor_on_device(**inputs), metadata={"text": reference_text})

    def _requested_voice(
        self,
        voice: str | FlexiCodecVoice | None,
        reference_audio: Any,
        reference_text: str | None,
        sampling_rate: int | None,
        language: str | None,
    ) -> str | FlexiCodecVoice | None:
        if reference_audio is None and reference_text is None:
            return voice
        if reference_audio is None or reference_text is None:
            given = "reference_text" if reference_audio is None else "reference_audio"
            raise ValueError(
                f"Got `{given}` alone: `reference_audio` goes with `reference_text`, which is what it says, word for "
                "word."
            )
        if voice is not None:
            raise ValueError("Pass `voice` or `reference_audio`, not both: each says who speaks.")
        return self.encode_voice(reference_audio, reference_text, sampling_rate, language)

    def _resolve_voice(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call with a voice in place of a recording."""
        rest = dict(kwargs)
        voice = self._requested_voice(
            rest.pop("voice", None),
            rest.pop("reference_audio", None),
            rest.pop("reference_text", None),
            rest.pop("reference_sampling_rate", None),
            kwargs.get("language"),
        )
        return rest | _given(voice=voice)

    def _has_voice(self, kwargs: dict[str, Any]) -> bool:
        return bool(self.model.voices) or "voice" in kwargs or "voice" in self._preprocess_params

    def _invent_voice(self, text: Any, kwargs: dict[str, Any]) -> Any:
        """Add the voice that the model invents for the first piece to a text of several pieces."""
        if not isinstance(text, str):
            return text
        preprocess_params, forward_params, _ = self._parameters(kwargs)
        pieces = self._split(text, **preprocess_params)
        if len(pieces) == 1:
            return text
        spoken = self.forward(next(self.preprocess(pieces[0], **preprocess_params)), **forward_params)
        voice = self._voice_of(spoken, preprocess_params.get("language"))
        return text if voice is None else _VoicedText(text, voice)

    def _voice_of(self, piece: dict[str, Any], language: str | None) -> FlexiCodecVoice | None:
        try:
            return self.encode_voice(piece["audio"].numpy(), piece["text"], piece["sampling_rate"], language)
        except ValueError as error:
            logger.warning(
                f"There is no voice, and the first piece of the text cannot serve as one: {error} Voices may change "
                "from piece to piece: pass `voice` or `reference_audio`."
            )
            return None

    def _split(
        self, text: str, language: str | None = None, max_piece_length: int = MAX_PIECE_LENGTH, **_: Any
    ) -> list[str]:
        # An empty text is for the processor to refuse.
        return split_text(text, max_piece_length, language or self.processor.language) or [text]

    def _parameters(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The parameters of the pipeline and of a call, for `preprocess`, `forward` and `postprocess`."""
        preprocess_params, forward_params, postprocess_params = self._sanitize_parameters(**kwargs)
        return (
            {**self._preprocess_params, **preprocess_params},
            {**self._forward_params, **forward_params},
            {**self._postprocess_params, **postprocess_params},
        )

    # ******** FlexiCodec specific ********
    # `Pipeline` saves the parts of a processor, but not the processor.
    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """
        Save model, voices and processor, for `pipeline(...)` to load again.

        Args:
            save_directory (`str` or `PathLike`): Directory to write to.
            kwargs: See [`~transformers.Pipeline.save_pretrained`].
        """
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    # The four steps of `Pipeline`: a text gives several items, each is spoken, and they are joined.

    def _sanitize_parameters(
        self,
        voice: str | FlexiCodecVoice | None = None,
        language: str | None = None,
        merging_threshold: float | None = None,
        seed: int | None = None,
        max_piece_length: int | None = None,
        crossfade_s: float | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name, value in (("crossfade_s", crossfade_s), ("merging_threshold", merging_threshold)):
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")
        if crossfade_s is not None and not 0 <= crossfade_s <= 1:
            raise ValueError(f"`crossfade_s` must be between 0 and 1 second, got {crossfade_s}.")
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        preprocess_params |= _given(language=language, voice=voice, max_piece_length=max_piece_length)
        # Without the empty dictionaries of the stock pipeline, which would replace what
        # `pipeline(...)` was given.
        forward_params = {name: value for name, value in forward_params.items() if value}
        forward_params |= _given(generate_kwargs=generate_kwargs, merging_threshold=merging_threshold, seed=seed)
        return preprocess_params, forward_params, postprocess_params | _given(crossfade_s=crossfade_s)

    def preprocess(
        self,
        text: Any,
        voice: str | FlexiCodecVoice | None = None,
        language: str | None = None,
        max_piece_length: int = MAX_PIECE_LENGTH,
        **kwargs: Any,
    ) -> Iterator[dict[str, Any]]:
        if isinstance(text, _VoicedText):
            text, voice = text.text, text.voice
        pieces: list[Any]
        if isinstance(text, Chat):
            pieces = [text]
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **_given(language=language)}
        else:
            pieces = self._split(text, language, max_piece_length)
            kwargs |= _given(language=language)
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
        waveforms = [audio[0, mask] for audio, mask in zip(output.audio, output.padding_mask, strict=True)]
        rates = output.sampling_rate.tolist()
        if len(waveforms) != (1 if isinstance(is_last, bool) else len(is_last)):
            raise ValueError("`num_return_sequences` must be 1: this pipeline joins pieces to one waveform.")
        if isinstance(is_last, bool):
            return {"audio": waveforms[0], "sampling_rate": rates[0], "text": text, "is_last": is_last}
        return {"audio": waveforms, "sampling_rate": rates, "text": text, "is_last": is_last}

    def postprocess(self, pieces: list[dict[str, Any]], crossfade_s: float = CROSSFADE_S) -> AudioOutput:
        sampling_rate, last = pieces[0]["sampling_rate"], len(pieces) - 1
        crossfader = Crossfader(round(crossfade_s * sampling_rate))
        # In a batch, transformers gives each waveform a batch dimension.
        audio = [
            crossfader.add(piece["audio"].reshape(-1).numpy(), index == last) for index, piece in enumerate(pieces)
        ]
        return AudioOutput(audio=np.concatenate(audio), sampling_rate=sampling_rate)

    # ******** end of FlexiCodec specific ********


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


__all__ = ["FlexiCodecTTSPipeline", "SpeechChunk"]
