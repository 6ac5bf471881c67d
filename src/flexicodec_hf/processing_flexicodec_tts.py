"""
Processor of FlexiCodec's text-to-speech: from texts and recordings to inputs of the model, from
speech to files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.audio_utils import load_audio
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .audio_flexicodec import AudioError, read_audio, resample, resample_with_images, write_audio
from .feature_extraction_flexicodec_mel import FlexiCodecMelFeatureExtractor
from .release_flexicodec import FlexiCodecReleaseMixin
from .text_flexicodec import language_token_id, prepare_text


AUDIO_TOKEN = "<|audio|>"

CHAT_TEMPLATE = """\
{#- "<what the recording says><|audio|><what to say>"; without a recording, what to say alone. -#}
{%- set chat = namespace(recordings=0, said='', say='') -%}
{%- for message in messages -%}
    {%- set say = loop.last -%}
    {%- if message['content'] is string -%}
        {%- set items = [{'type': 'text', 'text': message['content']}] -%}
    {%- else -%}
        {%- set items = message['content'] -%}
    {%- endif -%}
    {%- for item in items -%}
        {%- if item['type'] == 'audio' -%}
            {%- set chat.recordings = chat.recordings + 1 -%}
        {%- elif item['type'] == 'text' and say -%}
            {%- set chat.say = chat.say + item['text'] -%}
        {%- elif item['type'] == 'text' -%}
            {%- set chat.said = chat.said + item['text'] -%}
        {%- else -%}
            {{- raise_exception("Content must be of type 'text' or 'audio', got '" + item['type'] + "'.") -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- if chat.recordings > 1 -%}
    {{- raise_exception('A conversation can have one recording, of the voice that speaks; this one has more.') -}}
{%- elif chat.said and not chat.recordings -%}
    {{- raise_exception('Only the last message is spoken: text before it must be what a recording (audio) says.') -}}
{%- endif -%}
{%- if chat.recordings -%}{{- chat.said + '<|audio|>' -}}{%- endif -%}
{{- chat.say -}}
"""

# Shorter recordings tell too little of a voice, and quieter ones hold none.
_MIN_REFERENCE_S = 0.5
_MIN_REFERENCE_PEAK = 1e-3


class FlexiCodecTTSProcessor(FlexiCodecReleaseMixin, ProcessorMixin):
    r"""
    Turns texts and reference recordings into the inputs of [`FlexiCodecForTextToSpeech`].

    Recordings are resampled (with soxr) to the codec's 16 kHz, and from there to the 24 kHz of the
    mel spectrogram as the reference does, because the Voicebox was trained on that: above 8 kHz there
    are only faint images of what is below.

    Args:
        feature_extractor ([`FlexiCodecFeatureExtractor`]): Feature extractor of the codec.
        tokenizer (`PreTrainedTokenizerFast`): A tokenizer with Whisper's multilingual vocabulary.
        chat_template (`str`, *optional*):
            Jinja template for `apply_chat_template`; a default one if left out.
        mel_config (`dict`, *optional*):
            Arguments of [`FlexiCodecMelFeatureExtractor`], for a model with a vocoder; `{}` for the
            released model. Without it there are no mel spectrograms.
        language (`str`, *optional*, defaults to `"en"`): Default language of texts.

    Example:

    ```python
    >>> processor = AutoProcessor.from_pretrained("jiaqili3/flexicodec")
    >>> inputs = processor("Hello there.", audio="me.wav", reference_text="what I said")
    >>> output = model.generate(**inputs, return_dict_in_generate=True)
    >>> processor.save_audio(output, "hello.wav")
    ```
    """

    _loads_speech = True

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        mel_config: dict[str, Any] | None = None,
        language: str = "en",
    ):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        if not isinstance(mel_config, dict | None):
            raise ValueError(f"`mel_config` must be a dictionary or None, got {mel_config!r}.")
        if not isinstance(language, str):
            raise ValueError(f"`language` must be a language code such as 'en', got {language!r}.")
        self.mel_config = mel_config
        self.mel_extractor = None if mel_config is None else FlexiCodecMelFeatureExtractor(**mel_config)
        self.language = language

    # ******** FlexiCodec specific ********
    # transformers reads the feature extractor's settings from here without a look at their type.
    @classmethod
    def get_processor_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        values, options = super().get_processor_dict(*args, **kwargs)
        settings = values.get("feature_extractor")
        if not isinstance(settings, Mapping | None):
            raise ValueError(f"`feature_extractor` of processor_config.json must be a dictionary, got {settings!r}.")
        return values, options

    # *************************************

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "continuation_ids",
            "continuation_mask",
            *(f"reference_{name}" for name in self.feature_extractor.model_input_names),
            "reference_mel",
            "reference_mel_mask",
            "reference_text_ids",
            "reference_text_mask",
        ]

    @property
    def sampling_rate(self) -> int:
        """
        Sampling rate of the speech in hertz: the mel spectrogram's, or the codec's without mel
        spectrograms.
        """
        return (self.mel_extractor or self.feature_extractor).sampling_rate

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio: Any = None,
        reference_text: str | list[str] | None = None,
        sampling_rate: int | None = None,
        language: str | list[str] | None = None,
        phonemes: bool = True,
        padding: bool | str = True,
        return_tensors: str = "pt",
        text_kwargs: dict[str, Any] | None = None,
        audio_kwargs: dict[str, Any] | None = None,
        common_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prepare texts to speak, recordings of voices, or both.

        Args:
            text (`str` or `list[str]`, *optional*): What to say. English becomes phonemes.
            audio (`str`, `Path`, `np.ndarray`, `torch.Tensor`, `dict`, or a list of them, *optional*):
                Recordings of voices, one for all texts or one for each: a file, a URL, a waveform
                of shape `(num_samples,)`, or a dictionary with `"array"` and `"sampling_rate"`.
                They are resampled if necessary, and the channels of files are averaged.
            reference_text (`str` or `list[str]`, *optional*):
                What the recordings say, word for word. Needs `audio`.
            sampling_rate (`int`, *optional*):
                Sampling rate of waveforms in `audio` in hertz; required for these.
            language (`str` or `list[str]`, *optional*):
                Whisper's code of the language (`"en"`, `"zh"`, ...), one for all texts or one for
                each.
            phonemes (`bool`, *optional*, defaults to `True`):
                Whether English is spoken from phonemes.
            padding (`bool` or `str`, *optional*, defaults to `True`):
                `True` or `"longest"`: batches are padded on the right to their longest item.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"pt"` for PyTorch tensors, `"np"` for NumPy arrays.
            text_kwargs, audio_kwargs, common_kwargs (`dict`, *optional*):
                Any of the arguments above from `sampling_rate` on, as other processors take them.

        Returns:
            [`BatchFeature`], the arguments of [`FlexiCodecForTextToSpeech.generate`]:

            - for texts, `input_ids` and `attention_mask`, and `continuation_ids` and
              `continuation_mask` (the form that follows a reference text), all
              `(batch_size, num_ids)`;
            - for recordings, `reference_input_values` and `reference_padding_mask`
              `(batch_size, num_samples)`, `reference_input_features`
              `(batch_size, num_features, 560)` and `reference_input_features_mask`
              `(batch_size, num_features)`, `reference_mel` `(batch_size, num_frames, num_mel_bins)`
              and `reference_mel_mask` `(batch_size, num_frames)`;
            - for reference texts, `reference_text_ids` and `reference_text_mask`, both
              `(batch_size, num_ids)`.

        Raises:
            ValueError: A text has nothing to speak, a language is unknown, a recording is too short
                or silent or has no sampling rate, or the lengths of lists do not fit each other.
            AudioError: A file or URL cannot be read.
        """
        if nested := (common_kwargs or {}) | (text_kwargs or {}) | (audio_kwargs or {}):
            options = {
                "sampling_rate": sampling_rate,
                "language": language,
                "phonemes": phonemes,
                "padding": padding,
                "return_tensors": return_tensors,
            }
            return self(text, audio, reference_text, **(options | nested | kwargs))
        # Chat templates pass arguments of other processors, always empty here.
        if unknown := sorted(name for name, value in kwargs.items() if value is not None):
            raise TypeError(f"{type(self).__name__} got unexpected arguments: {', '.join(unknown)}.")
        if return_tensors not in ("pt", "np"):
            raise ValueError(
                f"`return_tensors` must be 'pt' (PyTorch tensors) or 'np' (NumPy arrays), got {return_tensors!r}."
            )
        if padding not in (True, "longest"):
            raise ValueError(
                f"{type(self).__name__} pads batches to their longest item: `padding` must be True or 'longest', got "
                f"{padding!r}."
            )
        if text is None and audio is None:
            raise ValueError("There is nothing to process: pass `text`, `audio`, or both.")
        for name, value in (("text", text), ("reference_text", reference_text), ("language", language)):
            for one in _as_list(value):
                if not isinstance(one, str):
                    raise TypeError(f"`{name}` must be a string or a list of them, got {one!r} in it.")
        for name, value in (("text", text), ("audio", audio)):
            if isinstance(value, (list, tuple)) and not value:
                raise ValueError(f"`{name}` is an empty list: pass at least one, or leave it out.")

        texts = _as_list(text)
        clips = [audio] if isinstance(audio, np.ndarray) or torch.is_tensor(audio) else _as_list(audio)
        texts, said = self._split_chat_texts(texts, _as_list(reference_text), has_audio=bool(clips))
        if said and not clips:
            raise ValueError("`reference_text` goes with `audio`, the recording that it is the text of.")
        if said and len(said) != len(clips):
            raise ValueError(f"`reference_text` holds {len(said)} texts for {len(clips)} recordings.")
        if texts and clips and len(clips) not in (1, len(texts)):
            raise ValueError(
                f"`audio` holds {len(clips)} recordings for {len(texts)} texts: pass one, or one for each."
            )
        languages = _as_list(language) or [self.language]
        count = len(texts) or len(clips)
        if len(languages) not in (1, count):
            raise ValueError(
                f"`language` holds {len(languages)} languages for {count} texts: pass one, or one for each."
            )
        languages = languages * count if len(languages) == 1 else languages

        data: dict[str, torch.Tensor] = {}
        if texts:
            prefixes = [language_token_id(self.tokenizer, code) for code in languages]
            spoken = [prepare_text(one, code, phonemes=phonemes) for one, code in zip(texts, languages, strict=True)]
            for name, form in (("input", "{}"), ("continuation", " {}")):
                ids = [[prefix, *self._encode(form.format(one))] for prefix, one in zip(prefixes, spoken, strict=True)]
                mask = "attention_mask" if name == "input" else "continuation_mask"
                data[f"{name}_ids"], data[mask] = _pad(ids)
        if clips:
            data |= self._process_recordings(clips, sampling_rate)
        if said:
            # A recording for several texts is in the language of the first.
            pairs = zip(said, languages, strict=False)
            # "<reference>, <text>", as in training (flexicodec 0.1.2, ar_tts/modeling_artts.py,
            # line 1112).
            ids = [self._encode(f"{_prepare_reference(one, code, phonemes)},") for one, code in pairs]
            data["reference_text_ids"], data["reference_text_mask"] = _pad(ids)
        return BatchFeature(data if return_tensors == "pt" else {name: value.numpy() for name, value in data.items()})

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Turn chat messages into inputs, or, with `tokenize=False`, into one string. The text of the
        last message is spoken. An audio item (`path`, `url`, or `audio` with a waveform, at 16 kHz
        unless the item has a `sampling_rate`) is the recording of the voice, and text in an earlier
        message is what it says:

        ```python
        [
            {
                "role": "voice",
                "content": [{"type": "audio", "path": "me.wav"}, {"type": "text", "text": "what I said"}],
            },
            {"role": "user", "content": [{"type": "text", "text": "Hello there."}]},
        ]
        ```

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                The messages of a chat, or of several.
            chat_template (`str`, *optional*): Jinja template; the processor's by default.
            processor_kwargs (`dict`, *optional*): Arguments of `__call__`, such as `language`.
            kwargs: See [`~ProcessorMixin.apply_chat_template`].

        Raises:
            ValueError: An audio item has no recording, or a text holds `<|audio|>`.
        """
        rate = self.feature_extractor.sampling_rate
        processor_kwargs = dict(processor_kwargs or {})
        is_batch = len(conversation) > 0 and not isinstance(conversation[0], Mapping)
        chats = copy.deepcopy(list(conversation) if is_batch else [conversation])
        for message in (message for chat in chats for message in chat):
            content = message.get("content") or ""
            items: list[dict[str, Any]] = [{"text": content}] if isinstance(content, str) else content
            for item in items:
                kind = item.get("type", "text")
                if kind not in ("text", "audio") or (kind == "text" and not isinstance(item.get("text"), str)):
                    raise ValueError(f"Content must be of type 'text' or 'audio', got {kind!r} in {item!r}.")
                if AUDIO_TOKEN in (item.get("text") or ""):
                    raise ValueError(f"A message holds {AUDIO_TOKEN}, which means a recording: take it out.")
                if item.get("type") == "audio":
                    # Files are read here, so that the samples do not depend on the audio libraries
                    # that are installed.
                    source = next((item.pop(key) for key in ("audio", "path", "url") if key in item), None)
                    if source is None:
                        raise ValueError("An audio item needs `path`, `url` or `audio`.")
                    given = item.pop("sampling_rate", processor_kwargs.get("sampling_rate", rate))
                    item["audio"] = self._read(source, given)
        processor_kwargs["sampling_rate"] = rate
        return super().apply_chat_template(
            chats if is_batch else chats[0], chat_template, processor_kwargs=processor_kwargs, **kwargs
        )

    def batch_decode(self, audio: Any, **kwargs: Any) -> list[Any]:
        """
        The waveforms of a batch, or the text of ids.

        Args:
            audio ([`FlexiCodecTTSOutput`], or `torch.Tensor` of shape `(batch_size, 1, num_samples)`):
                What the model returned. Arrays, lists of waveforms, and a single waveform
                `(num_samples,)` work too. Integers are ids of the tokenizer, such as `input_ids`.
            kwargs: For ids, the arguments of the tokenizer's `batch_decode`.

        Returns:
            `list[np.ndarray]`, each of shape `(num_samples,)`, in float32. Padding is removed if
            `audio` has a `padding_mask`. For ids, `list[str]`.
        """
        if not isinstance(audio, Mapping) and _are_ids(audio):
            return self.tokenizer.batch_decode(audio, **kwargs)
        mask = None
        if isinstance(audio, Mapping):
            audio, mask = audio["audio"], audio.get("padding_mask")
        if (torch.is_tensor(audio) or isinstance(audio, np.ndarray)) and audio.ndim == 1:
            audio = [audio]
        waveforms = [torch.as_tensor(one).detach().float().cpu().reshape(-1) for one in audio]
        if mask is not None:
            waveforms = [one[valid.cpu()] for one, valid in zip(waveforms, mask, strict=True)]
        return [one.numpy() for one in waveforms]

    def save_audio(
        self, audio: Any, saving_path: str | Path | list[str | Path], sampling_rate: int | None = None
    ) -> None:
        """
        Write speech to audio files in the format that their suffixes name.

        Args:
            audio ([`FlexiCodecTTSOutput`], or `torch.Tensor` of shape `(batch_size, 1, num_samples)`):
                What the model returned. Arrays, lists of waveforms, and a single waveform
                `(num_samples,)` work too.
            saving_path (`str`, `Path`, or a list of them): A path for each waveform.
            sampling_rate (`int`, *optional*):
                Sampling rate in hertz. Defaults to the one in `audio`, or to the one of the
                processor.

        Raises:
            ValueError: There are more or fewer paths than waveforms.
            AudioError: A file cannot be written.
        """
        if sampling_rate is None and isinstance(audio, Mapping):
            sampling_rate = int(audio["sampling_rate"][0])
        waveforms, paths = self.batch_decode(audio), _as_list(saving_path)
        if len(waveforms) != len(paths):
            raise ValueError(f"`saving_path` holds {len(paths)} paths for {len(waveforms)} waveforms.")
        for waveform, path in zip(waveforms, paths, strict=True):
            write_audio(path, waveform, sampling_rate or self.sampling_rate)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _split_chat_texts(self, texts: list[str], said: list[str], has_audio: bool) -> tuple[list[str], list[str]]:
        """Texts to speak and texts of the recordings; rendered chats hold both in one string."""
        if not any(AUDIO_TOKEN in text for text in texts):
            return texts, said
        if not has_audio:
            raise ValueError(
                f"`text` holds {AUDIO_TOKEN}, which means a recording: pass it as `audio`, or take it out."
            )
        parts = [text.split(AUDIO_TOKEN) for text in texts]
        if any(len(part) != 2 for part in parts):
            raise ValueError(
                "Either all conversations of a batch need a recording, or none: pass the others by themselves."
            )
        chat_said = [part[0] for part in parts]
        if any(chat_said) and not all(chat_said):
            raise ValueError("Either all recordings of a batch need a text, or none: pass the others by themselves.")
        if any(chat_said) and said:
            raise ValueError(f"What the recording says is given twice: before {AUDIO_TOKEN} and as `reference_text`.")
        return [part[1] for part in parts], chat_said if any(chat_said) else said

    def _process_recordings(self, clips: list[Any], sampling_rate: int | None) -> dict[str, torch.Tensor]:
        waveforms = [self._read(clip, sampling_rate) for clip in clips]
        rate = self.feature_extractor.sampling_rate
        inputs = self.feature_extractor(waveforms, sampling_rate=rate, return_tensors="pt")
        for item, waveform in enumerate(waveforms):
            name = "`audio`" if len(clips) == 1 else f"`audio[{item}]`"
            if len(waveform) < _MIN_REFERENCE_S * rate:
                raise ValueError(
                    f"{name} lasts {len(waveform) / rate:.2f} s, too short for a voice: at least {_MIN_REFERENCE_S} s "
                    "are needed, and 3 to 15 s are best."
                )
            if np.abs(waveform).max() < _MIN_REFERENCE_PEAK:
                raise ValueError(f"{name} is silent (its peak is below {_MIN_REFERENCE_PEAK}): pass one with speech.")
        # Two dimensions, so that pipelines can pad the recordings like texts.
        inputs["input_values"] = inputs["input_values"][:, 0]
        if self.mel_extractor is not None:
            mel_rate = self.mel_extractor.sampling_rate
            inputs |= self.mel_extractor(
                [resample_with_images(waveform, rate, mel_rate) for waveform in waveforms],
                sampling_rate=mel_rate,
                return_tensors="pt",
            )
        return {f"reference_{name}": tensor for name, tensor in inputs.items()}

    def _read(self, clip: Any, sampling_rate: int | None) -> np.ndarray:
        """A recording as `(num_samples,)` at the codec's rate."""
        rate = self.feature_extractor.sampling_rate
        if isinstance(clip, str) and clip.startswith(("http://", "https://")):
            try:
                return load_audio(clip, sampling_rate=rate)
            except ImportError:  # it says which package is missing
                raise
            except Exception as error:  # whatever downloads or reads it raises
                raise AudioError(f"{clip}: cannot be downloaded, or is no audio file: {error}") from error
        if isinstance(clip, (str, Path)):
            return read_audio(clip, rate).waveform
        if isinstance(clip, Mapping):
            if not {"array", "sampling_rate"} <= clip.keys():
                raise ValueError(
                    f"A dictionary in `audio` needs `array` and `sampling_rate`, got {sorted(map(str, clip))}."
                )
            clip, sampling_rate = clip["array"], clip["sampling_rate"]
        if sampling_rate is None:
            raise ValueError("`sampling_rate` is missing: say at which rate the waveforms in `audio` are.")
        waveform = np.asarray(clip.detach().float().cpu() if torch.is_tensor(clip) else clip)
        if waveform.ndim == 2 and len(waveform) == 1:
            waveform = waveform[0]
        if waveform.ndim != 1 or waveform.dtype.kind != "f" or len(waveform) == 0:
            raise ValueError(
                "A waveform in `audio` must be floats in [-1, 1] of shape (num_samples,), got "
                f"{waveform.dtype} of shape {waveform.shape}."
            )
        return resample(waveform.astype(np.float32), sampling_rate, rate)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _are_ids(values: Any) -> bool:
    """Whether an array, or the numbers in nested lists, are integers."""
    if torch.is_tensor(values):
        return not values.is_floating_point()
    if isinstance(values, (list, tuple)):
        return len(values) > 0 and _are_ids(values[0])
    return np.asarray(values).dtype.kind in "iu"


def _pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask, padded on the right."""
    ids = [torch.tensor(row) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return pad_sequence(ids, batch_first=True), mask


def _prepare_reference(text: str, language: str, phonemes: bool) -> str:
    try:
        return prepare_text(text, language, phonemes=phonemes)
    except ValueError as error:
        raise ValueError(f"`reference_text` must be what `audio` says, got {text!r}.") from error


__all__ = ["FlexiCodecTTSProcessor"]
