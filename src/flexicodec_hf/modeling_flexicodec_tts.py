"""Text to speech with FlexiCodec (arXiv 2510.00981): text -> tokens with durations -> mel or latents -> waveform."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, GenerationMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.hub import cached_file

from .configuration_flexicodec import FlexiCodecConfig
from .configuration_flexicodec_tts import FlexiCodecTTSConfig
from .modeling_flexicodec import FlexiCodecModel, frame_to_token
from .modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration
from .modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from .modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from .voice_flexicodec import FlexiCodecVoice


logger = logging.get_logger(__name__)

TTS_DIR, VOICES_DIR = "tts", "voices"

# The reference's defaults; `generate` reads them where a generation config does not say.
TTS_DEFAULTS = {"num_inference_steps": 15, "guidance_scale": 2.0, "guidance_rescale": 0.75}

# Runaway speech ends here, after four minutes at 8.3 tokens a second. Stock pipelines would end it at 256 tokens.
_MAX_NEW_TOKENS = 2048

# What a chunk of long speech sees on each side, and how long one chunk fades into the next, in seconds.
_CHUNK_CONTEXT_S = 2.0
_CHUNK_FADE_S = 0.16


_PARTS: dict[str, type[PreTrainedModel]] = {
    "codec": FlexiCodecModel,
    "ar": FlexiCodecARForConditionalGeneration,
    "voicebox": FlexiCodecVoiceboxModel,
    "vocoder": FlexiCodecVocoderModel,
}

# Arguments of `from_pretrained` that say where files are.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class SamplingRate(int):
    """A sampling rate in hertz that is also that of each item: pipelines take batches apart by `value[item]`."""

    def __getitem__(self, item: int) -> SamplingRate:
        return self


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
            Of `audio`, in hertz: the vocoder's (24 kHz), or the codec's (16 kHz) without one or with `use_nar=False`.
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
    # Every part on one device: only what goes from part to part is moved.
    _no_split_modules = [
        "FlexiCodecModel",
        "FlexiCodecARForConditionalGeneration",
        "FlexiCodecVoiceboxModel",
        "FlexiCodecVocoderModel",
    ]
    # Tokens, and so words and voice, hang on small differences. Pipelines cast their inputs to the first part's type.
    _keep_in_fp32_modules_strict = ["codec"]
    _supports_sdpa = True


class FlexiCodecForTextToSpeech(FlexiCodecTTSPreTrainedModel, GenerationMixin):
    r"""
    FlexiCodec's text-to-speech system: the codec, the autoregressive model, and, where the repository has it, a second
    stage: a Voicebox model with its vocoder, or one that predicts what the codec's own decoder reads.

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
        super().__init__(config)
        given = {"codec": codec, "ar": ar, "voicebox": voicebox, "vocoder": vocoder}
        for name, part in given.items():
            part_config = getattr(config, f"{name}_config")
            if part is not None:
                # One object for both, so that what is set on the one holds for the other.
                setattr(config, f"{name}_config", part.config)
                # `post_init` would draw anew what the caller has put in the place of a module.
                for module in part.modules():
                    module._is_hf_initialized = True
            elif part_config is not None:
                part = _PARTS[name]._from_config(part_config)
            setattr(self, name, part)
        self.voices = {}
        if config.shares_codec:
            self._keys_to_ignore_on_load_missing = {r"^codec\."}
        self.post_init()
        self.generation_config = copy.deepcopy(self.ar.generation_config)
        defaults = {
            "merging_threshold": config.default_merging_threshold,
            "max_new_tokens": _MAX_NEW_TOKENS,
            **TTS_DEFAULTS,
        }
        self.generation_config.update(**defaults, allow_custom_entries=True)

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
            codec, ar, voicebox, vocoder:
                Models, or what their `from_pretrained` takes. The vocoder goes with a Voicebox of mel spectrograms.
            kwargs: For `from_pretrained` of the parts that are not models yet.

        Raises:
            ValueError: Parts that are missing or do not fit each other.
        """
        given = {"codec": codec, "ar": ar, "voicebox": voicebox, "vocoder": vocoder}
        parts = {
            name: _PARTS[name].from_pretrained(part, **kwargs) if isinstance(part, (str, PathLike)) else part
            for name, part in given.items()
            if part is not None
        }
        for part in parts.values():
            part.config._name_or_path = ""  # no longer where this model is
        # A copy, as a configuration clears some of what its parts know of the models.
        configs = {f"{name}_config": copy.deepcopy(part.config) for name, part in parts.items()}
        return cls(cls.config_class(**configs), **parts)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *model_args: Any, **kwargs: Any
    ) -> FlexiCodecForTextToSpeech:
        """
        As everywhere in transformers, with three additions: of a repository with the codec at its root, the system in `tts/`
        is loaded; the `voices/` of the repository come along (and its codec, where that is shared); and `dtype` may be a
        dictionary from parts (`"codec"`, `"ar"`, `"voicebox"`, `"vocoder"`, and `""` for the rest) to types.

        With one dtype for all, the codec still stays in float32: its tokens, and so the voice, depend on small differences.
        """
        if pretrained_model_name_or_path is not None and kwargs.get("config") is None:
            options = {name: kwargs[name] for name in (*_HUB_OPTIONS, "subfolder") if name in kwargs}
            config, _ = FlexiCodecTTSConfig.get_config_dict(pretrained_model_name_or_path, **options)
            if config.get("model_type") == FlexiCodecConfig.model_type:
                return FlexiCodecRepositoryForTextToSpeech.from_pretrained(
                    pretrained_model_name_or_path, *model_args, **kwargs
                )
        dtypes = kwargs.get("dtype")
        if isinstance(dtypes, dict):
            if unknown := dtypes.keys() - {"", *_PARTS}:
                raise ValueError(
                    f"`dtype` has no part {sorted(unknown)}: there are {list(_PARTS)}, and '' for the rest."
                )
            kwargs["dtype"] = torch.float32
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.shares_codec:
            model._load_shared_codec(pretrained_model_name_or_path, **kwargs)
        if isinstance(dtypes, dict):
            model._cast_parts(dtypes)
        if pretrained_model_name_or_path is not None:
            model._load_voices(pretrained_model_name_or_path, **kwargs)
        return loaded

    def save_pretrained(
        self, save_directory: str | PathLike[str], voices_directory: str | PathLike[str] | None = None, **kwargs: Any
    ) -> None:
        """As everywhere in transformers; writes `voices/` too, to `voices_directory` if given."""
        if self._auto_class is not None:
            # One class, two Auto classes; `register_for_auto_class` knows of one.
            auto_map = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = auto_map | {"AutoModel": _class_reference(type(self))}
        self.config.voices = [_checked_name(name) for name in self.voices]
        if kwargs.get("is_main_process", True) and self.voices:
            folder = Path(voices_directory or save_directory) / VOICES_DIR
            folder.mkdir(parents=True, exist_ok=True)
            for name, voice in self.voices.items():
                voice.save(folder / f"{name}.safetensors")
        super().save_pretrained(save_directory, **kwargs)

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
                Its mel spectrogram; required if the model has a Voicebox of mel spectrograms, not read if it has one of
                latents.
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
            ValueError: More than one recording, or no mel spectrogram where the Voicebox makes these.
        """
        if len(reference_input_values) != 1:
            raise ValueError(f"A voice is one recording, got {len(reference_input_values)}: encode each by itself.")
        if merging_thresholds is None:
            thresholds = [*self.config.ar_config.merging_thresholds, self.config.codec_config.merging_threshold, 1.0]
            merging_thresholds = sorted(set(thresholds))
        voices = self._encode_voices(
            merging_thresholds,
            reference_input_values=reference_input_values,
            reference_input_features=reference_input_features,
            reference_padding_mask=reference_padding_mask,
            reference_input_features_mask=reference_input_features_mask,
            reference_mel=reference_mel,
            reference_mel_mask=reference_mel_mask,
            reference_text_ids=reference_text_ids,
            reference_text_mask=reference_text_mask,
        )
        voices[0].metadata = dict(metadata or {})
        return voices[0]

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
            merging_threshold (`float`, *optional*, defaults to `config.default_merging_threshold`, 0.91 as released):
                The codec's merging threshold, one of those that the autoregressive model was trained with: the lower,
                the fewer tokens a second.
            use_nar (`bool`, *optional*):
                Whether the Voicebox turns the tokens into speech, in the reference's voice (with a vocoder, at 24 kHz), or
                the codec alone does, faster and less alike, at 16 kHz. By default it does where the model has one.
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
        if input_ids is None or input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError("There is nothing to say: `input_ids` hold no text. Make them with `processor(text)`.")
        batch_size = len(input_ids)
        merging_threshold = self._setting("merging_threshold", merging_threshold, generation_config)
        # A model that was trained without thresholds is told none.
        told = merging_threshold if self.config.ar_config.merging_thresholds else None
        self.config.ar_config.threshold_token_id(told)  # raises if the model does not know it
        references = {
            "reference_input_values": reference_input_values,
            "reference_padding_mask": reference_padding_mask,
            "reference_input_features": reference_input_features,
            "reference_input_features_mask": reference_input_features_mask,
            "reference_mel": reference_mel,
            "reference_mel_mask": reference_mel_mask,
            "reference_text_ids": reference_text_ids,
            "reference_text_mask": reference_text_mask,
        }
        if reference_input_values is None or reference_input_features is None:
            given = [name for name, tensor in references.items() if tensor is not None]
            if given:
                raise ValueError(
                    f"{given} came without the recording (`reference_input_values` and `reference_input_features`): pass "
                    "all that `processor(text, audio=...)` returns."
                )
            voices = self._resolve_voices(voice, batch_size)
        elif voice is not None:
            raise ValueError("Pass either `voice` or a reference recording, not both.")
        else:
            voices = self._per_item(self._encode_voices([merging_threshold], **references), batch_size, "recordings")

        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        for name, value in self.generation_config.to_dict().items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
        kwargs = config.update(**kwargs)
        if return_dict_in_generate is None:
            return_dict_in_generate = config.return_dict_in_generate
        config.return_dict_in_generate = True
        # Stock generation takes this name for guidance of the language model.
        config.guidance_scale = None
        num_return_sequences = config.num_return_sequences or 1
        token_generators, mel_generators = _row_generators(batch_size, seed, generator, num_return_sequences)

        text_ids, text_mask = _join_texts(
            input_ids, attention_mask, continuation_ids, continuation_mask, voices, self.ar.device
        )
        prompt = {} if voices is None else _stack_tokens(voices, merging_threshold, self.ar.device)
        inputs = self.ar.build_inputs(
            text_ids,
            text_mask,
            prompt.get("codes"),
            prompt.get("token_lengths"),
            prompt.get("codes_mask"),
            told,
        )
        output = self.ar.generate(**inputs, generation_config=config, generator=token_generators, **kwargs)
        start = inputs["input_ids"].shape[1]
        codes, token_lengths = output.sequences[:, start:], output.token_lengths[:, start:]
        mask = codes < self.config.ar_config.speech_vocab_size
        width = int(mask.sum(dim=1).max())
        codes, token_lengths, mask = (codes * mask)[:, :width], token_lengths[:, :width], mask[:, :width]

        if voices is not None:
            voices = [one for one in voices for _ in range(num_return_sequences)]
        speech = self._speak(
            codes[:, None],
            token_lengths,
            mask,
            voices,
            merging_threshold,
            mel_generators,
            use_nar=use_nar,
            flow=self._flow_settings(num_inference_steps, guidance_scale, guidance_rescale, generation_config),
        )
        return speech if return_dict_in_generate else speech["audio"]

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
            merging_threshold (`float`, *optional*, defaults to `config.default_merging_threshold`, 0.91 as released):
                The threshold that the tokens were made with: the voice's own tokens are taken at the same.
            chunk_length_s (`float`, *optional*):
                Decode long speech in chunks of so many seconds, in memory bounded by the chunk (and the waveform).

        Returns:
            [`FlexiCodecTTSOutput`]

        Raises:
            ValueError: Tensors that do not fit each other, or a voice that is not known.
        """
        if audio_codes.ndim != 3:
            raise ValueError(
                "`audio_codes` must have the shape (batch_size, num_quantizers, num_tokens), got "
                f"{tuple(audio_codes.shape)}. Semantic codes alone are `codes[:, None]`."
            )
        if token_lengths is None:
            token_lengths = torch.ones_like(audio_codes[:, 0])
        if audio_codes_mask is None:
            audio_codes_mask = token_lengths.flip(1).cummax(dim=1).values.flip(1) > 0
        for name, tensor in (("token_lengths", token_lengths), ("audio_codes_mask", audio_codes_mask)):
            if tensor.shape != audio_codes[:, 0].shape:
                raise ValueError(
                    f"`{name}` must have the shape (batch_size, num_tokens) = {tuple(audio_codes[:, 0].shape)}, got "
                    f"{tuple(tensor.shape)}."
                )
        _, generators = _row_generators(len(audio_codes), seed, generator)
        return self._speak(
            audio_codes,
            token_lengths,
            audio_codes_mask.bool(),
            self._resolve_voices(voice, len(audio_codes)),
            self._setting("merging_threshold", merging_threshold),
            generators,
            use_nar=use_nar,
            flow=self._flow_settings(num_inference_steps, guidance_scale, guidance_rescale),
            chunk_length_s=chunk_length_s,
        )

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
            merging_threshold (`float`, *optional*, defaults to `config.default_merging_threshold`, 0.91 as released):
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
        if self.voicebox is None:
            raise ValueError("This model has no Voicebox, which gives speech the voice: load a model that has one.")
        merging_threshold = self._setting("merging_threshold", merging_threshold)
        encoded = self.codec.encode(
            input_values.to(self.codec.device),
            input_features.to(self.codec.device, self.codec.dtype),
            padding_mask=None if padding_mask is None else padding_mask.to(self.codec.device),
            input_features_mask=None if input_features_mask is None else input_features_mask.to(self.codec.device),
            num_quantizers=1,
            merging_threshold=merging_threshold,
            chunk_length_s=chunk_length_s,
        )
        return self.decode_speech(
            encoded.audio_codes,
            encoded.token_lengths,
            encoded.audio_codes_mask,
            voice=voice,
            merging_threshold=merging_threshold,
            use_nar=True,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            seed=seed,
            generator=generator,
            chunk_length_s=chunk_length_s,
        )

    def _setting(self, name: str, value: Any, generation_config: GenerationConfig | None = None) -> Any:
        """A setting: the call's, the first generation config's that has it, or the default."""
        for config in (generation_config, self.generation_config):
            value = getattr(config, name, None) if value is None else value
        defaults = TTS_DEFAULTS | {"merging_threshold": self.config.default_merging_threshold}
        return defaults[name] if value is None else value

    def _flow_settings(
        self,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        guidance_rescale: float | None,
        generation_config: GenerationConfig | None = None,
    ) -> dict[str, Any]:
        return {
            "num_inference_steps": self._setting("num_inference_steps", num_inference_steps, generation_config),
            "guidance_scale": self._setting("guidance_scale", guidance_scale, generation_config),
            "guidance_rescale": self._setting("guidance_rescale", guidance_rescale, generation_config),
        }

    def _resolve_voices(
        self, voice: str | FlexiCodecVoice | list[str | FlexiCodecVoice] | None, batch_size: int
    ) -> list[FlexiCodecVoice] | None:
        """A voice for each item, or `None` where there is none."""
        if voice is None:
            if not self.voices:
                return None
            voice = next(iter(self.voices))
        voices = [self._find_voice(one) for one in (voice if isinstance(voice, (list, tuple)) else [voice])]
        return self._per_item(voices, batch_size, "voices")

    def _find_voice(self, voice: str | FlexiCodecVoice) -> FlexiCodecVoice:
        if not isinstance(voice, str):
            return voice
        if voice in self.voices:
            return self.voices[voice]
        if voice.endswith(".safetensors"):
            return FlexiCodecVoice.load(voice)
        raise ValueError(
            f"`voice`={voice!r} is not known. This model has {list(self.voices) or 'no voices'}; a path of a voice file "
            "(.safetensors) or what `model.encode_voice` returns will do too."
        )

    @staticmethod
    def _per_item(voices: list[FlexiCodecVoice], batch_size: int, name: str) -> list[FlexiCodecVoice]:
        if len(voices) not in (1, batch_size):
            raise ValueError(
                f"There are {batch_size} items to speak and {len(voices)} {name}: pass one for all or one for each."
            )
        return voices * batch_size if len(voices) == 1 else voices

    @torch.no_grad()
    def _encode_voices(self, merging_thresholds: list[float], **references: Tensor | None) -> list[FlexiCodecVoice]:
        """The voice of each recording. Arguments as for `encode_voice`."""
        inputs = {name.removeprefix("reference_"): tensor for name, tensor in references.items() if tensor is not None}
        values, features = inputs["input_values"], inputs["input_features"]
        batch_size = len(values)
        codec_inputs = {
            "input_values": values.reshape(batch_size, 1, values.shape[-1]),
            "input_features": features.to(self.codec.dtype),
            "padding_mask": inputs.get("padding_mask"),
            "input_features_mask": inputs.get("input_features_mask"),
        }
        codec_inputs = {
            name: None if tensor is None else tensor.to(self.codec.device) for name, tensor in codec_inputs.items()
        }
        tokens: list[dict[float, tuple[Tensor, Tensor]]] = [{} for _ in range(batch_size)]
        for threshold in merging_thresholds:
            encoded = self.codec.encode(**codec_inputs, num_quantizers=1, merging_threshold=threshold)
            for item, mask in enumerate(encoded.audio_codes_mask):
                codes, lengths = encoded.audio_codes[item, 0, mask], encoded.token_lengths[item, mask]
                tokens[item][float(threshold)] = codes.cpu(), lengths.cpu()
        voices = [FlexiCodecVoice(tokens=one) for one in tokens]
        prompt = self._prompt_features(codec_inputs, inputs.get("mel"), inputs.get("mel_mask"))
        for name, tensor, mask in (("mel", *prompt), ("text_ids", inputs.get("text_ids"), inputs.get("text_mask"))):
            if tensor is not None:
                for voice, part in zip(voices, _valid_parts(tensor, mask), strict=True):
                    setattr(voice, name, part)
        return voices

    def _prompt_features(
        self, codec_inputs: dict[str, Tensor | None], mel: Tensor | None, mel_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the Voicebox imitates of a recording, `(batch_size, num_frames, num_mel_bins)`, and its mask."""
        if self.voicebox is not None and self.voicebox.config.predicts_latent:
            encoded = self.codec.encode(**codec_inputs, merging_threshold=1.0)
            return encoded.latents.transpose(1, 2).float(), encoded.audio_codes_mask
        if self.voicebox is not None and mel is None:
            raise ValueError(
                "`reference_mel` is missing: the Voicebox imitates it. Pass all that the processor returns."
            )
        return mel, mel_mask

    def _to_waveform(self, mel: Tensor, mask: Tensor, chunk_length_s: float | None) -> tuple[Tensor, Tensor]:
        """What the Voicebox made, to waveforms and their mask `(batch_size, num_samples)`."""
        if self.voicebox.config.predicts_latent:
            decoded = self.codec.decode(
                latents=mel.transpose(1, 2).to(self.codec.device, self.codec.dtype),
                audio_codes_mask=mask.to(self.codec.device),
                chunk_length_s=chunk_length_s,
            )
            return decoded.audio_values[:, 0].float(), decoded.padding_mask
        device = self.vocoder.device
        output = self.vocoder(mel.to(device), mask.to(device), chunk_length_s=chunk_length_s)
        return output.audio_values[:, 0], output.padding_mask

    def _speak(
        self,
        codes: Tensor,
        token_lengths: Tensor,
        mask: Tensor,
        voices: list[FlexiCodecVoice] | None,
        merging_threshold: float,
        generators: list[torch.Generator],
        use_nar: bool | None,
        flow: dict[str, Any],
        chunk_length_s: float | None = None,
    ) -> FlexiCodecTTSOutput:
        """Tokens to speech; an item without frames gives no samples."""
        if use_nar is None:
            use_nar = self.voicebox is not None
        if use_nar and self.voicebox is None:
            raise ValueError("This model has no Voicebox: pass `use_nar=False`, and the codec decodes the tokens.")
        token_lengths = token_lengths * mask
        spoken = token_lengths.sum(dim=1) > 0
        if not bool(spoken.all()):
            logger.warning(f"Nothing was spoken for {int((~spoken).sum())} of {len(spoken)} items.")
        rows = spoken.nonzero()[:, 0].tolist()
        audio = torch.zeros(0, 0)
        audio_mask = audio.bool()
        if rows and use_nar:
            audio, audio_mask = self._decode_with_voicebox(
                codes[rows, 0],
                token_lengths[rows],
                None if voices is None else [voices[row] for row in rows],
                merging_threshold,
                [generators[row] for row in rows],
                flow,
                chunk_length_s,
            )
        elif rows:
            decoded = self.codec.decode(
                *(tensor[rows].to(self.codec.device) for tensor in (codes, token_lengths, mask)),
                chunk_length_s=chunk_length_s,
            )
            audio, audio_mask = decoded.audio_values[:, 0].float(), decoded.padding_mask
        if len(rows) < len(spoken):
            audio, audio_mask = (
                tensor.new_zeros(len(spoken), tensor.shape[1]).index_copy(
                    0, spoken.nonzero()[:, 0].to(tensor.device), tensor
                )
                for tensor in (audio, audio_mask)
            )
        sampling_rate = (self.config if use_nar else self.codec.config).sampling_rate
        return FlexiCodecTTSOutput(
            audio=audio,
            audio_mask=audio_mask,
            audio_codes=codes,
            token_lengths=token_lengths,
            audio_codes_mask=mask,
            sampling_rate=SamplingRate(sampling_rate),
        )

    def _decode_with_voicebox(
        self,
        codes: Tensor,
        token_lengths: Tensor,
        voices: list[FlexiCodecVoice] | None,
        merging_threshold: float,
        generators: list[torch.Generator],
        flow: dict[str, Any],
        chunk_length_s: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Semantic codes `(batch_size, num_tokens)` to waveforms and their mask `(batch_size, num_samples)`."""
        device = self.voicebox.device
        codes, token_lengths = codes.to(device), token_lengths.to(device)
        if voices is not None:
            num_bins = self.voicebox.config.num_mel_bins
            mels = [voice.mel for voice in voices if voice.mel is not None and voice.mel.shape[1] == num_bins]
            if len(mels) < len(voices):
                raise ValueError(
                    f"The voice has no `mel` of {num_bins} channels, as the Voicebox makes them: encode it with this model, "
                    "or pass `use_nar=False`."
                )
            prompt = _stack_tokens(voices, merging_threshold, device)
            flow = flow | {
                "prompt_codes": prompt["codes"],
                "prompt_token_lengths": prompt["token_lengths"],
                "prompt_mel": pad_sequence(mels, batch_first=True).to(device),
                "prompt_mel_mask": pad_sequence([torch.ones(len(mel)) for mel in mels], batch_first=True).to(device),
            }
        if chunk_length_s is None:
            sampled = self.voicebox.sample(codes, token_lengths, generator=generators, **flow)
            mel, mel_mask = sampled.mel, sampled.mel_mask
        else:
            mel, mel_mask = self._sample_in_chunks(codes, token_lengths, generators, flow, chunk_length_s)
        return self._to_waveform(mel, mel_mask, chunk_length_s)

    def _sample_in_chunks(
        self,
        codes: Tensor,
        token_lengths: Tensor,
        generators: list[torch.Generator],
        flow: dict[str, Any],
        chunk_length_s: float,
    ) -> tuple[Tensor, Tensor]:
        """
        What the Voicebox's `sample` gives, a chunk at a time: each sees some of its neighbours, starts from their noise
        where they overlap, and fades into the next.
        """
        rate, factor = self.config.codec_config.frame_rate, self.config.voicebox_config.upsample_factor
        size = round(chunk_length_s * rate)
        context, fade = round(_CHUNK_CONTEXT_S * rate), round(_CHUNK_FADE_S * rate)
        if size <= fade:
            raise ValueError(f"`chunk_length_s` must be more than {_CHUNK_FADE_S} seconds, got {chunk_length_s}.")
        lengths = token_lengths.sum(dim=1)
        total = int(lengths.max())
        frames = torch.arange(total, device=codes.device)
        has_frame = frames < lengths[:, None]
        frame_codes = codes.gather(1, frame_to_token(token_lengths, total))
        noise = self.voicebox.draw_noise((lengths * factor).tolist(), generators)
        mel = torch.zeros(noise.shape, device=codes.device)
        for start in range(0, total, size):
            begin, end = max(start - context, 0), min(start + size + context, total)
            rows = (lengths > start).nonzero()[:, 0]
            window = self.voicebox.sample(
                frame_codes[rows, begin:end],
                has_frame[rows, begin:end].long(),
                noise=noise[rows.cpu(), begin * factor : end * factor],
                **{name: value[rows] if isinstance(value, Tensor) else value for name, value in flow.items()},
            ).mel
            # Some frames more than the chunk, for the next one to fade from.
            stop = min(start + size + fade, end)
            window = window[:, (start - begin) * factor : (stop - begin) * factor]
            if start > 0:
                # Without the ends: two frames of latents have weights between.
                ramp = torch.linspace(0, 1, min(fade * factor, window.shape[1]) + 2, device=window.device)[1:-1, None]
                before = mel[rows, start * factor : start * factor + len(ramp)]
                window[:, : len(ramp)] = torch.lerp(before, window[:, : len(ramp)], ramp)
            mel[rows, start * factor : stop * factor] = window
        return mel, has_frame.repeat_interleave(factor, dim=1)

    def _cast_parts(self, dtypes: dict[str, torch.dtype | str]) -> None:
        for name in _PARTS:
            dtype, part = dtypes.get(name, dtypes.get("", torch.float32)), getattr(self, name)
            if isinstance(dtype, str):
                dtype = getattr(torch, dtype)
            # Parameters alone: buffers, such as rotary frequencies, are made in the type that they need.
            for parameter_name, parameter in part.named_parameters() if part is not None else ():
                if not any(kept in parameter_name for kept in part._keep_in_fp32_modules_strict):
                    parameter.data = parameter.data.to(dtype)

    def _load_shared_codec(self, source: str | PathLike[str], subfolder: str = "", **kwargs: Any) -> None:
        """The weights of the codec at the root of the repository; saved again, the model holds them itself."""
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        root = (source, subfolder.rpartition("/")[0]) if subfolder else (Path(source).parent, "")
        codec = FlexiCodecModel.from_pretrained(root[0], subfolder=root[1], dtype=torch.float32, **options)
        self.codec.load_state_dict(codec.state_dict())
        self.config.shares_codec = False

    def _load_voices(self, source: str | PathLike[str], subfolder: str = "", **kwargs: Any) -> None:
        """The files of `config.voices`, beside the model or at the root of its repository."""
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        folders = [VOICES_DIR]
        if subfolder:
            folders.insert(0, f"{subfolder}/{VOICES_DIR}")
        if Path(source).is_dir():
            folders.append(f"../{VOICES_DIR}")
        for name in self.config.voices:
            found = (
                cached_file(
                    source,
                    f"{folder}/{_checked_name(name)}.safetensors",
                    _raise_exceptions_for_missing_entries=False,
                    **options,
                )
                for folder in folders
            )
            path = next((path for path in found if path is not None), None)
            if path is None:
                logger.warning(f"The voice {name!r} of {source} has no file in {VOICES_DIR}/: it is left out.")
            else:
                self.voices[name] = FlexiCodecVoice.load(path)


class FlexiCodecRepositoryForTextToSpeech(FlexiCodecForTextToSpeech):
    """What `AutoModelForTextToWaveform` finds for a repository of the codec: loads the text-to-speech system from `tts/`."""

    config_class = FlexiCodecConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *model_args: Any,
        config: FlexiCodecConfig | None = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> FlexiCodecForTextToSpeech:
        """
        As [`FlexiCodecForTextToSpeech.from_pretrained`] with `subfolder="tts"`; `config`, the codec's, is not used.

        Raises:
            OSError: The repository has no `tts/`.
        """
        folder = f"{subfolder}/{TTS_DIR}".lstrip("/")
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        if (
            cached_file(
                pretrained_model_name_or_path,
                f"{folder}/config.json",
                _raise_exceptions_for_missing_entries=False,
                **options,
            )
            is None
        ):
            raise OSError(
                f"{pretrained_model_name_or_path} cannot speak: it holds the codec alone, there is no {folder}/config.json. "
                "Use a repository with a text-to-speech system, or load this one with `AutoModel`."
            )
        model_class = FlexiCodecForTextToSpeech
        if cls._auto_class is not None:
            model_class.register_for_auto_class(cls._auto_class)
        return model_class.from_pretrained(pretrained_model_name_or_path, *model_args, subfolder=folder, **kwargs)


def save_repository(
    directory: str | PathLike[str],
    codec: FlexiCodecModel,
    model: FlexiCodecForTextToSpeech,
    processor: Any,
    storage_dtype: torch.dtype | None = None,
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
        codec: The codec of the repository's root. It may have other weights than the codec inside `model`; if it is that
            very codec, its weights are stored once.
        model: The text-to-speech system, with its `voices`.
        processor ([`FlexiCodecTTSProcessor`]): Of the system.
        storage_dtype: What the files hold the weights in, such as float16 for half the size; they load in the types that
            the models have now. These are stored too by default.
        kwargs: For `save_pretrained` of both models, such as `max_shard_size`.
    """
    root = Path(directory)
    carries_code = codec._auto_class is not None
    auto_map = getattr(codec.config, "auto_map", None)
    if carries_code:
        custom_object_save(model, root)
        reference = _class_reference(FlexiCodecRepositoryForTextToSpeech)
        codec.config.auto_map = (auto_map or {}) | {"AutoModelForTextToWaveform": reference}
    codec.save_pretrained(root, state_dict=_in_storage(codec.state_dict(), storage_dtype), **kwargs)
    codec.config.auto_map = auto_map
    processor.feature_extractor.save_pretrained(root)
    processor.save_pretrained(root)

    weights = model.state_dict()
    model.config.shares_codec = model.codec is codec
    if model.config.shares_codec:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("codec.")}
    weights = _in_storage(weights, storage_dtype)
    model.save_pretrained(root / TTS_DIR, voices_directory=root, state_dict=weights, **kwargs)
    model.config.shares_codec = False


def _in_storage(weights: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in weights.items()
    }


def _checked_name(name: str) -> str:
    """The name of a voice, which is a file's name too."""
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise ValueError(f"The name of a voice must be letters, digits, spaces, '.', '-' and '_', got {name!r}.")
    return name


def _class_reference(model_class: type) -> str:
    """The class as `auto_map` names it."""
    return f"{model_class.__module__.split('.')[-1]}.{model_class.__name__}"


def _row_generators(
    batch_size: int,
    seed: int | list[int] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    num_return_sequences: int = 1,
) -> tuple[list[torch.Generator], list[torch.Generator]]:
    """
    For each row, a generator for its tokens and one for its mel spectrogram.

    How many numbers the one draws does not matter to the other, and no row matters to another: so an item sounds the same
    in any batch, and tokens that are decoded later as if they were decoded at once.
    """
    if seed is not None and generator is not None:
        raise ValueError("Pass either `seed` or `generator`, not both.")
    sources: list[torch.Generator | None]
    if seed is not None:
        seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed] * batch_size
        sources = [torch.Generator().manual_seed(int(one)) for one in seeds]
    else:
        sources = list(generator) if isinstance(generator, (list, tuple)) else [generator] * batch_size
    if len(sources) != batch_size:
        name = "seed" if generator is None else "generator"
        raise ValueError(f"`{name}` is a list of {len(sources)} for {batch_size} items: pass one for each.")
    draws = [
        torch.randint(2**63 - 1, (2,), generator=source, device="cpu" if source is None else source.device).tolist()
        for source in sources
        for _ in range(num_return_sequences)
    ]
    tokens, mels = (
        [torch.Generator().manual_seed(number) for number in numbers] for numbers in zip(*draws, strict=True)
    )
    return tokens, mels


def _valid_parts(tensor: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Each item without its padding, on the CPU."""
    rows = tensor.cpu()
    return list(rows) if mask is None else [row[valid] for row, valid in zip(rows, mask.cpu().bool(), strict=True)]


def _join_texts(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    continuation_ids: Tensor | None,
    continuation_mask: Tensor | None,
    voices: list[FlexiCodecVoice] | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Ids of what the model reads, `[language] [what the voice said] [what to say]`, and their mask."""
    alone = continued = _valid_parts(input_ids, attention_mask)
    if continuation_ids is not None:
        if len(continuation_ids) != len(input_ids):
            raise ValueError(
                f"`continuation_ids` holds {len(continuation_ids)} texts and `input_ids` {len(input_ids)}: they are two "
                "forms of the same texts."
            )
        continued = _valid_parts(continuation_ids, continuation_mask)
    rows = []
    for item, (ids, continuation) in enumerate(zip(alone, continued, strict=True)):
        if len(ids) == 0:
            raise ValueError(f"There is nothing to say: item {item} of `input_ids` holds no text.")
        if voices is not None and (reference := voices[item].text_ids) is not None:
            ids = torch.cat([continuation[:1], reference.to(continuation.dtype), continuation[1:]])
        rows.append(ids)
    mask = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True).to(device), mask.to(device)


def _stack_tokens(voices: list[FlexiCodecVoice], merging_threshold: float, device: torch.device) -> dict[str, Tensor]:
    """Semantic codes of the voices, their lengths and mask, each `(batch_size, num_tokens)`."""
    codes, lengths = zip(*(voice.tokens_at(merging_threshold) for voice in voices), strict=True)
    token_lengths = pad_sequence(list(lengths), batch_first=True).to(device)
    return {
        "codes": pad_sequence(list(codes), batch_first=True).to(device),
        "token_lengths": token_lengths,
        "codes_mask": token_lengths > 0,
    }


__all__ = [
    "FlexiCodecForTextToSpeech",
    "FlexiCodecRepositoryForTextToSpeech",
    "FlexiCodecTTSOutput",
    "FlexiCodecTTSPreTrainedModel",
    "save_repository",
]
