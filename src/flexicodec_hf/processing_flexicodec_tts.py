"""Processor of FlexiCodec's text-to-speech: text and reference recordings to what the model reads, speech to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin


class FlexiCodecTTSProcessor(ProcessorMixin):
    r"""
    Text and reference recordings to the inputs of [`FlexiCodecForTextToSpeech`].

    Args:
        feature_extractor ([`FlexiCodecFeatureExtractor`]): Of the codec.
        tokenizer (`PreTrainedTokenizerFast`): Whisper's multilingual vocabulary.
        chat_template (`str`, *optional*): Jinja template for `apply_chat_template`.
        mel_config (`dict`, *optional*):
            Arguments of the [`FlexiCodecMelFeatureExtractor`] for the flow-matching stage.
        language (`str`, *optional*, defaults to `"en"`): Language of texts that come without one.
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        mel_config: dict[str, Any] | None = None,
        language: str = "en",
    ):
        raise NotImplementedError

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio: Any = None,
        reference_text: str | list[str] | None = None,
        sampling_rate: int | list[int] | None = None,
        language: str | list[str] | None = None,
        phonemes: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            text (`str` or `list[str]`, *optional*): What to say; phonemes are made of English.
            audio (`str`, `Path`, `np.ndarray`, `torch.Tensor`, or a list of them, *optional*):
                Recordings of the voice, one for all texts or one for each: a file, a URL, or a waveform of shape
                `(num_samples,)`. Files are averaged over their channels and resampled; waveforms are resampled if
                `sampling_rate` says so.
            reference_text (`str` or `list[str]`, *optional*): What the recordings say, word for word.
            sampling_rate (`int` or `list[int]`, *optional*):
                Rate of the waveforms in `audio`, required for these.
            language (`str` or `list[str]`, *optional*): Whisper's code of the language, `"en"`, `"zh"`, ...
            phonemes (`bool`, *optional*, defaults to `True`): Whether English is spoken from phonemes.

        Returns:
            [`BatchFeature`] with, for texts, `input_ids`, `attention_mask`, `continuation_ids` and `continuation_mask`
            `(batch_size, length)`; for recordings `reference_input_values`, `reference_padding_mask` `(batch_size,
            num_samples)`, `reference_input_features`, `reference_input_features_mask`, `reference_mel`,
            `reference_mel_mask`; and for reference texts `reference_text_ids` and `reference_text_mask`. See
            [`FlexiCodecForTextToSpeech.generate`].

        Raises:
            ValueError: A text without anything to speak, an unknown language, a recording that is too short or silent,
                lists whose lengths do not fit.
        """
        raise NotImplementedError

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """
        Chat messages to inputs. The text of the last message is spoken; an audio item is the recording of the voice, and
        text beside it in an earlier message is what it says:

        ```python
        [
            {"role": "reference", "content": [{"type": "audio", "path": "me.wav"}, {"type": "text", "text": "what I said"}]},
            {"role": "user", "content": [{"type": "text", "text": "Hello there."}]},
        ]
        ```
        """
        raise NotImplementedError

    def batch_decode(self, output: Any, **kwargs: Any) -> list[Any]:
        """Waveforms of a [`FlexiCodecTTSOutput`] (or of a batch of waveforms), each `(num_samples,)` without its padding, as `np.ndarray`."""
        raise NotImplementedError

    def save_audio(
        self, audio: Any, saving_path: str | Path | list[str | Path], sampling_rate: int | None = None
    ) -> None:
        """Write the speech of a [`FlexiCodecTTSOutput`], or waveforms, to audio files, one path for each."""
        raise NotImplementedError


__all__ = ["FlexiCodecTTSProcessor"]
