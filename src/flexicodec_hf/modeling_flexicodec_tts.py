"""Text to speech with FlexiCodec (arXiv 2510.00981): text -> tokens with durations -> mel spectrogram -> waveform."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_flexicodec import FlexiCodecConfig
from .configuration_flexicodec_tts import FlexiCodecTTSConfig
from .modeling_flexicodec import FlexiCodecModel
from .modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration
from .modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from .modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from .voice_flexicodec import FlexiCodecVoice


@dataclass
class FlexiCodecTTSOutput(ModelOutput):
    """
    Speech of [`FlexiCodecForTextToSpeech`].

    Args:
        audio (`torch.FloatTensor` of shape `(batch_size, num_samples)`):
            Waveforms in float32, 0 behind the end of each. An item of no samples is one for which the model said nothing.
        audio_mask (`torch.BoolTensor` of shape `(batch_size, num_samples)`):
            `True` for samples, `False` for padding.
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
            The tokens that were spoken; one row, the semantic code, unless more came in.
        token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Codec frames (80 ms) of each token; 0 at padding.
        audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`):
            `True` for tokens, `False` for padding.
        sampling_rate (`int`):
            Of `audio`, in hertz: the vocoder's (24 kHz), or the codec's (16 kHz) with `use_nar=False`.
    """

    audio: Tensor | None = None
    audio_mask: Tensor | None = None
    audio_codes: Tensor | None = None
    token_lengths: Tensor | None = None
    audio_codes_mask: Tensor | None = None
    sampling_rate: int | None = None


class FlexiCodecTTSPreTrainedModel(PreTrainedModel):
    config: FlexiCodecTTSConfig
    config_class = FlexiCodecTTSConfig
    main_input_name = "input_ids"
    input_modalities = ("text", "audio")
    output_modalities = ("audio",)


class FlexiCodecForTextToSpeech(FlexiCodecTTSPreTrainedModel, GenerationMixin):
    r"""
    FlexiCodec's text-to-speech system: the codec, the autoregressive model, and, where the repository has them, the
    Voicebox model and the vocoder.

    Attributes:
        voices (`dict[str, FlexiCodecVoice]`):
            Voices to speak with by name, saved and loaded with the model. The first is the default one; without any, a
            call that brings no voice gets one that the model invents.
    """

    voices: dict[str, FlexiCodecVoice]

    def __init__(
        self,
        config: FlexiCodecTTSConfig,
        codec: FlexiCodecModel | None = None,
        ar: FlexiCodecARForConditionalGeneration | None = None,
        voicebox: FlexiCodecVoiceboxModel | None = None,
        vocoder: FlexiCodecVocoderModel | None = None,
    ):
        raise NotImplementedError

    @classmethod
    def from_parts_pretrained(
        cls,
        codec: FlexiCodecModel | str | PathLike[str],
        ar: FlexiCodecARForConditionalGeneration | str | PathLike[str],
        voicebox: FlexiCodecVoiceboxModel | str | PathLike[str] | None = None,
        vocoder: FlexiCodecVocoderModel | str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> FlexiCodecForTextToSpeech:
        """
        Put the system together from its parts.

        Args:
            codec, ar, voicebox, vocoder: Models, or what their `from_pretrained` takes; the last two both or neither.
            kwargs: For `from_pretrained` of the parts that are not models yet.
        """
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *model_args: Any, **kwargs: Any
    ) -> FlexiCodecForTextToSpeech:
        """
        As everywhere in transformers, with two additions: the `voices/` of the repository come along, and `dtype` may be
        a dictionary from parts (`"codec"`, `"ar"`, `"voicebox"`, `"vocoder"`, and `""` for the rest) to types.

        With one dtype for all, the codec still stays in float32: its tokens, and so the voice, depend on small differences.
        """
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """As everywhere in transformers; writes `voices/` too."""
        raise NotImplementedError

    def encode_voice(
        self,
        reference_input_values: Tensor,
        reference_input_features: Tensor,
        reference_padding_mask: Tensor | None = None,
        reference_input_features_mask: Tensor | None = None,
        reference_mel: Tensor | None = None,
        reference_mel_mask: Tensor | None = None,
        reference_text_ids: Tensor | None = None,
        reference_text_mask: Tensor | None = None,
        merging_thresholds: list[float] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> FlexiCodecVoice:
        """
        Encode a recording once, to speak with its voice again and again:
        `model.encode_voice(**processor(audio=..., reference_text=...))`.

        Args:
            reference_input_values (`torch.Tensor` of shape `(1, num_samples)` or `(1, 1, num_samples)`):
                The recording at the codec's rate, and its features, as [`FlexiCodecTTSProcessor`] gives them.
            reference_input_features (`torch.Tensor` of shape `(1, num_features, 560)`): Likewise.
            reference_padding_mask (`torch.Tensor` of shape `(1, num_samples)`, *optional*): Likewise.
            reference_input_features_mask (`torch.Tensor` of shape `(1, num_features)`, *optional*): Likewise.
            reference_mel (`torch.Tensor` of shape `(1, num_frames, num_mel_bins)`, *optional*):
                Its mel spectrogram; required if the model has a Voicebox.
            reference_mel_mask (`torch.Tensor` of shape `(1, num_frames)`, *optional*): 1 for frames, 0 for padding.
            reference_text_ids (`torch.LongTensor` of shape `(1, num_ids)`, *optional*):
                Ids of what the recording says.
            reference_text_mask (`torch.Tensor` of shape `(1, num_ids)`, *optional*): 1 for ids, 0 for padding.
            merging_thresholds (`list[float]`, *optional*):
                Thresholds at which the voice can be used. By default those that the autoregressive model was trained
                with, the codec's own, and 1.0 (no merging).
            metadata (`dict[str, str]`, *optional*): Goes into the voice.

        Returns:
            [`FlexiCodecVoice`], on the CPU.

        Raises:
            ValueError: More than one recording, or one that the processor would refuse.
        """
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        continuation_ids: Tensor | None = None,
        continuation_mask: Tensor | None = None,
        voice: str | FlexiCodecVoice | list[str | FlexiCodecVoice] | None = None,
        reference_input_values: Tensor | None = None,
        reference_padding_mask: Tensor | None = None,
        reference_input_features: Tensor | None = None,
        reference_input_features_mask: Tensor | None = None,
        reference_mel: Tensor | None = None,
        reference_mel_mask: Tensor | None = None,
        reference_text_ids: Tensor | None = None,
        reference_text_mask: Tensor | None = None,
        merging_threshold: float | None = None,
        use_nar: bool | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        generation_config: GenerationConfig | None = None,
        return_dict_in_generate: bool | None = None,
        **kwargs: Any,
    ) -> FlexiCodecTTSOutput | Tensor:
        """
        Speak: `model.generate(**processor("Hello there."), voice="anna")`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_ids)`):
                Ids of the texts, language token first, as [`FlexiCodecTTSProcessor`] gives them.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_ids)`, *optional*): 1 for ids, 0 for padding.
            continuation_ids (`torch.LongTensor` of shape `(batch_size, num_continuation_ids)`, *optional*):
                The same texts in the form that follows a reference text (their first token differs), language token
                first; used for the items whose voice has a text. `input_ids` by default.
            continuation_mask (`torch.Tensor` of shape `(batch_size, num_continuation_ids)`, *optional*):
                1 for ids, 0 for padding.
            voice (`str`, [`FlexiCodecVoice`], or a list of them, *optional*):
                Who speaks: a name in `model.voices`, or a voice; one for all items or one for each. The first of
                `model.voices` by default.
            reference_input_values, reference_padding_mask, reference_input_features, reference_input_features_mask, reference_mel, reference_mel_mask, reference_text_ids, reference_text_mask:
                Instead of `voice`, recordings to take the voice from, as for [`~FlexiCodecForTextToSpeech.encode_voice`]:
                one for all items or one for each.
            merging_threshold (`float`, *optional*, defaults to 0.91):
                The codec's merging threshold, one of those that the autoregressive model was trained with: the lower,
                the fewer tokens a second.
            use_nar (`bool`, *optional*):
                Whether Voicebox and vocoder turn the tokens into speech, in the reference's voice at 24 kHz, or the
                codec alone does, faster and less alike, at 16 kHz. By default they do where the model has them.
            num_inference_steps (`int`, *optional*, defaults to 15): Steps of the flow.
            guidance_scale (`float`, *optional*, defaults to 2.0): Classifier-free guidance of the flow.
            guidance_rescale (`float`, *optional*, defaults to 0.75): See [`FlexiCodecVoiceboxModel.sample`].
            seed (`int` or `list[int]`, *optional*):
                Makes the call repeatable. With one seed every item is spoken as it would be alone with that seed; with
                a list each item has its own. Without `seed` and `generator`, torch's global generator is the source.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Instead of `seed`: one for all items, drawn from in turn, or one for each.
            generation_config (`GenerationConfig`, *optional*): Instead of `model.generation_config`.
            return_dict_in_generate (`bool`, *optional*): Whether to return [`FlexiCodecTTSOutput`].
            kwargs:
                For the autoregressive model: `do_sample, temperature, top_k, max_new_tokens, duration_temperature,
                duration_top_k, min_token_text_ratio, max_token_text_ratio, num_return_sequences, logits_processor,
                stopping_criteria, streamer`, ...; see [`FlexiCodecARForConditionalGeneration.generate`].

        Returns:
            [`FlexiCodecTTSOutput`] with `return_dict_in_generate=True`, else its `audio`.

        Raises:
            ValueError: No text, a voice or threshold that is not known, or tensors that do not fit each other.
        """
        raise NotImplementedError

    @torch.no_grad()
    def decode_speech(
        self,
        audio_codes: Tensor,
        token_lengths: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        voice: str | FlexiCodecVoice | list[str | FlexiCodecVoice] | None = None,
        merging_threshold: float | None = None,
        use_nar: bool | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        chunk_length_s: float | None = None,
    ) -> FlexiCodecTTSOutput:
        """
        Tokens to speech, whichever model made the tokens: the second half of `generate`.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
                Tokens of this model's codec. Voicebox reads the semantic row, the first; the codec reads all.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Codec frames of each token; one each by default.
            audio_codes_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for tokens, 0 for the padding behind them.
            voice, use_nar, num_inference_steps, guidance_scale, guidance_rescale, seed, generator:
                As for [`~FlexiCodecForTextToSpeech.generate`].
            merging_threshold (`float`, *optional*, defaults to 0.91):
                The threshold that the tokens were made with: the voice's own tokens are taken at the same.
            chunk_length_s (`float`, *optional*):
                Decode long speech in chunks of so many seconds, in memory bounded by the chunk (and the waveform).

        Returns:
            [`FlexiCodecTTSOutput`]
        """
        raise NotImplementedError

    @torch.no_grad()
    def convert_voice(
        self,
        input_values: Tensor,
        input_features: Tensor,
        padding_mask: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        voice: str | FlexiCodecVoice | list[str | FlexiCodecVoice] | None = None,
        merging_threshold: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        chunk_length_s: float | None = 20.0,
    ) -> FlexiCodecTTSOutput:
        """
        The words of one recording in the voice of another:
        `model.convert_voice(**processor.feature_extractor(source, sampling_rate=16_000, return_tensors="pt"), voice=voice)`.

        Args:
            input_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`):
                The recordings to convert and their features, as the codec's feature extractor gives them.
            input_features (`torch.Tensor` of shape `(batch_size, num_features, 560)`): Likewise.
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*): Likewise.
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_features)`, *optional*): Likewise.
            merging_threshold (`float`, *optional*, defaults to 0.91):
                The codec's merging threshold for source and voice: the lower, the less of the source's way of speaking
                is left.
            voice, num_inference_steps, guidance_scale, guidance_rescale, seed, generator:
                As for [`~FlexiCodecForTextToSpeech.generate`].
            chunk_length_s (`float`, *optional*, defaults to 20.0):
                Convert in chunks of so many seconds, in memory bounded by the chunk (and the waveforms); `None` converts
                everything at once.

        Returns:
            [`FlexiCodecTTSOutput`]

        Raises:
            ValueError: The model has no Voicebox.
        """
        raise NotImplementedError


class FlexiCodecRepositoryForTextToSpeech(FlexiCodecForTextToSpeech):
    """What `AutoModelForTextToWaveform` finds for a repository of the codec: loads the text-to-speech system from `tts/`."""

    config_class = FlexiCodecConfig


def save_repository(
    directory: str | PathLike[str],
    codec: FlexiCodecModel,
    model: FlexiCodecForTextToSpeech,
    processor: Any,
    **kwargs: Any,
) -> None:
    """
    Write one repository for codec and text-to-speech:

    ```
    config.json, model.safetensors, preprocessor_config.json    the codec (AutoModel)
    processor_config.json, tokenizer files, chat_template.jinja the processor (AutoProcessor, AutoTokenizer)
    tts/                                                         the whole system (AutoModelForTextToWaveform)
    voices/                                                      its voices
    *.py                                                         the code, for `trust_remote_code=True`
    ```

    Args:
        directory: Where to write; existing files are replaced.
        codec: The codec of the repository's root; it may have other weights than the codec inside `model`.
        model: The text-to-speech system, with its `voices`.
        processor ([`FlexiCodecTTSProcessor`]): Of the system.
        kwargs: For `save_pretrained` of both models, such as `max_shard_size`.
    """
    raise NotImplementedError


__all__ = [
    "FlexiCodecForTextToSpeech",
    "FlexiCodecRepositoryForTextToSpeech",
    "FlexiCodecTTSOutput",
    "FlexiCodecTTSPreTrainedModel",
    "save_repository",
]
