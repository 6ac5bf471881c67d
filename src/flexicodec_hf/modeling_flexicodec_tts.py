"""
Text to speech with FlexiCodec (https://huggingface.co/papers/2510.00981): one model of the parts
and their voices.
"""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from .compatibility_flexicodec import OffloadedDeviceMixin
from .configuration_flexicodec_tts import FlexiCodecTTSConfig
from .generation_flexicodec_tts import TTS_DEFAULTS, FlexiCodecTTSGenerationMixin, valid_parts
from .modeling_flexicodec import FlexiCodecModel
from .modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration
from .modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from .modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from .release_flexicodec import HUB_OPTIONS, broken_repositories, find_converted
from .repository_flexicodec_tts import find_tts, load_shared_codec, load_voices, save_voices
from .voice_flexicodec import FlexiCodecVoice


_PARTS: dict[str, type[PreTrainedModel]] = {
    "codec": FlexiCodecModel,
    "ar": FlexiCodecARForConditionalGeneration,
    "voicebox": FlexiCodecVoiceboxModel,
    "vocoder": FlexiCodecVocoderModel,
}


class FlexiCodecTTSPreTrainedModel(OffloadedDeviceMixin, PreTrainedModel):
    config: FlexiCodecTTSConfig
    config_class = FlexiCodecTTSConfig
    main_input_name = "input_ids"
    input_modalities = ("text", "audio")
    output_modalities = ("audio",)
    # Each part stays whole on one device: only what passes from part to part is moved.
    _no_split_modules = [
        "FlexiCodecModel",
        "FlexiCodecARForConditionalGeneration",
        "FlexiCodecVoiceboxModel",
        "FlexiCodecVocoderModel",
    ]
    # Tokens, and with them words and voice, depend on small differences. The codec is the first
    # part, and pipelines cast their inputs to the type of the first part.
    _keep_in_fp32_modules_strict = ["codec"]
    _supports_sdpa = True


class FlexiCodecForTextToSpeech(FlexiCodecTTSPreTrainedModel, FlexiCodecTTSGenerationMixin):
    r"""
    FlexiCodec's text-to-speech system: the codec, the autoregressive model and, optionally, a
    second stage. This is a Voicebox model of mel spectrograms with its vocoder, or a Voicebox model
    of the latents that the codec's decoder reads.

    Args:
        config ([`FlexiCodecTTSConfig`]): Configuration of all parts.
        codec, ar, voicebox, vocoder (`PreTrainedModel`, *optional*):
            The parts, used as they are. A part that is left out is made from its configuration.

    Attributes:
        voices (`dict[str, FlexiCodecVoice]`):
            Voices by name, saved and loaded with the model. The first is the default. Without any
            voice, the model invents one for each call that names none.
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
                # One object for both, so that a change of one holds for the other.
                setattr(config, f"{name}_config", part.config)
            elif part_config is not None:
                part = _PARTS[name]._from_config(part_config)
            setattr(self, name, part)
        self.voices = {}
        # CODEPATH: repositories in which the codec plays both roles, such as
        # checkpoints/flexicodec-tiny.
        if config.shares_codec:
            self._keys_to_ignore_on_load_missing = {r"^codec\."}
        self.generation_config = copy.deepcopy(self.ar.generation_config)
        defaults = TTS_DEFAULTS | {"merging_threshold": config.default_merging_threshold}
        self.generation_config.update(**defaults, allow_custom_entries=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Those of the autoregressive model, for its speech tokens."""
        return self.ar.get_input_embeddings()

    # ******** FlexiCodec specific ********

    def init_weights(self) -> None:
        """
        Does nothing: each part was initialized when it was made, and parts from the caller must
        stay as they are.
        """

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
            codec, ar, voicebox, vocoder (`PreTrainedModel`, `str` or `PathLike`):
                Models, or what their `from_pretrained` takes. A Voicebox of mel spectrograms needs
                a vocoder.
            kwargs: For `from_pretrained` of the parts that are not models yet.

        Returns:
            [`FlexiCodecForTextToSpeech`], without voices.

        Raises:
            ValueError: A part is missing, or the parts do not fit each other.
        """
        given = {"codec": codec, "ar": ar, "voicebox": voicebox, "vocoder": vocoder}
        parts = {
            name: _PARTS[name].from_pretrained(part, **kwargs) if isinstance(part, (str, PathLike)) else part
            for name, part in given.items()
            if part is not None
        }
        for part in parts.values():
            part.config._name_or_path = ""  # the path of the part does not lead to this model
        # Copies, since the new configuration clears what its parts know of their models.
        configs = {f"{name}_config": copy.deepcopy(part.config) for name, part in parts.items()}
        return cls(cls.config_class(**configs), **parts)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], *model_args: Any, **kwargs: Any
    ) -> FlexiCodecForTextToSpeech:
        """
        Load a system as any model of transformers, with three additions: in a repository with the
        codec at its root, the system in `tts/` is loaded; the voices in `voices/` are loaded with
        it; and `dtype` may differ between the parts.

        Args:
            pretrained_model_name_or_path (`str` or `PathLike`): Hub id or directory.
            dtype (`torch.dtype`, `str`, or a dictionary of these, *optional*):
                Type of the weights. With one for all, the codec still stays in float32, because its
                tokens, and with them the voice, depend on small differences. A dictionary has a
                type for each of `"codec"`, `"ar"`, `"voicebox"` and `"vocoder"`, and under `""` the
                type of the others (float32 by default).
            kwargs: See [`~PreTrainedModel.from_pretrained`]. A `device_map` may put each part on a
                device of its own, or on the disk.

        Raises:
            OSError: The repository holds the codec alone.
            ValueError: `dtype` names an unknown part, or `device_map` tears a part.
        """
        if isinstance(places := kwargs.get("device_map"), dict):
            for name in _PARTS:
                inside = {str(place) for key, place in places.items() if key.split(".")[0] == name}
                if len(inside) > 1:
                    raise ValueError(
                        f"`device_map` puts parts of `{name}` on {sorted(inside)}: each of {list(_PARTS)} must be on "
                        "one device. Name it as a whole."
                    )
        dtypes = kwargs.get("dtype")
        if isinstance(dtypes, dict):
            if unknown := dtypes.keys() - {"", *_PARTS}:
                raise ValueError(
                    f"`dtype` has no part {sorted(unknown)}: there are {list(_PARTS)}, and '' for the rest."
                )
            kwargs["dtype"] = torch.float32
        source, kwargs = find_converted(pretrained_model_name_or_path, kwargs, text_to_speech=True)
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        subfolder = kwargs.pop("subfolder", "")
        if source is not None:
            kwargs["subfolder"] = subfolder = find_tts(source, subfolder, **options)
        with broken_repositories(source):
            loaded = super().from_pretrained(source, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if source is not None:
            # CODEPATH: repositories in which the codec plays both roles, such as
            # checkpoints/flexicodec-tiny.
            if model.config.shares_codec:
                load_shared_codec(model, source, subfolder, **options)
            model.voices = load_voices(model.config.voices, source, subfolder, **options)
        if isinstance(dtypes, dict):
            model._cast_parts(dtypes)
        return loaded

    def save_pretrained(
        self, save_directory: str | PathLike[str], voices_directory: str | PathLike[str] | None = None, **kwargs: Any
    ) -> None:
        """
        Save the system as any model of transformers, and its voices.

        Args:
            save_directory (`str` or `PathLike`): Directory of the model.
            voices_directory (`str` or `PathLike`, *optional*):
                Directory in which `voices/` is written; `save_directory` by default.
            kwargs: See [`~PreTrainedModel.save_pretrained`].

        Raises:
            ValueError: The name of a voice cannot be the name of a file.
        """
        if self._auto_class is not None:
            # TODO: drop once `register_for_auto_class` takes more than one Auto class.
            auto_map = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = auto_map | {"AutoModel": f"modeling_flexicodec_tts.{type(self).__name__}"}
        self.config.voices = list(self.voices)
        if kwargs.get("is_main_process", True):
            save_voices(self.voices, Path(voices_directory or save_directory))
        super().save_pretrained(save_directory, **kwargs)

    # ******** end of FlexiCodec specific ********

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
                The recording at the codec's sampling rate (16 kHz).
            reference_input_features (`torch.Tensor` of shape `(1, num_features, 560)`):
                Its features for the semantic encoder.
            reference_padding_mask (`torch.Tensor` of shape `(1, num_samples)`, *optional*):
                1 for samples, 0 for padding.
            reference_input_features_mask (`torch.Tensor` of shape `(1, num_features)`, *optional*):
                1 for features, 0 for padding.
            reference_mel (`torch.Tensor` of shape `(1, num_frames, num_mel_bins)`, *optional*):
                Its mel spectrogram. Required if the model has a Voicebox of mel spectrograms;
                unused with a Voicebox of latents.
            reference_mel_mask (`torch.Tensor` of shape `(1, num_frames)`, *optional*):
                1 for frames, 0 for padding.
            reference_text_ids (`torch.LongTensor` of shape `(1, num_ids)`, *optional*):
                Ids of what the recording says.
            reference_text_mask (`torch.Tensor` of shape `(1, num_ids)`, *optional*):
                1 for ids, 0 for padding.
            merging_thresholds (`list[float]`, *optional*):
                Thresholds at which the voice can be used. By default those that the autoregressive
                model was trained with, the codec's own, and 1.0 (no merging).
            metadata (`dict[str, str]`, *optional*):
                Stored with the voice, such as `{"text": "What I say."}`.

        Returns:
            [`FlexiCodecVoice`], on the CPU.

        Raises:
            ValueError: There is more than one recording, or `reference_mel` is missing.
        """
        if len(reference_input_values) != 1:
            raise ValueError(f"A voice is one recording, got {len(reference_input_values)}: encode each by itself.")
        if merging_thresholds is None:
            thresholds = [*self.config.ar_config.merging_thresholds, self.config.codec_config.merging_threshold, 1.0]
            merging_thresholds = sorted(set(thresholds))
        (voice,) = self._encode_voices(
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
        voice.metadata = dict(metadata or {})
        return voice

    def _choose_voices(
        self,
        voice: str | FlexiCodecVoice | list[str | FlexiCodecVoice] | None,
        references: dict[str, Tensor],
        merging_threshold: float,
        batch_size: int,
    ) -> list[FlexiCodecVoice] | None:
        """
        The voice of each item, from `voice`, a recording, or the model's first; `None` in a model
        without any.
        """
        if references:
            if voice is not None:
                raise ValueError("Pass either `voice` or a reference recording, not both.")
            if not {"reference_input_values", "reference_input_features"} <= references.keys():
                raise ValueError(
                    f"{list(references)} came without the recording (`reference_input_values` and "
                    "`reference_input_features`): pass all that `processor(text, audio=...)` returns."
                )
            voices = self._encode_voices([merging_threshold], **references)
        elif voice is None and not self.voices:
            return None
        else:
            names = (
                voice if isinstance(voice, (list, tuple)) else [next(iter(self.voices)) if voice is None else voice]
            )
            voices = [self._find_voice(name) for name in names]
        if len(voices) not in (1, batch_size):
            raise ValueError(
                f"There are {batch_size} items to speak and {len(voices)} {'recordings' if references else 'voices'}: "
                "pass one for all or one for each."
            )
        return voices * batch_size if len(voices) == 1 else voices

    def _find_voice(self, voice: str | FlexiCodecVoice) -> FlexiCodecVoice:
        if isinstance(voice, str) and voice in self.voices:
            voice = self.voices[voice]
        elif isinstance(voice, (str, PathLike)) and str(voice).endswith(".safetensors"):
            voice = FlexiCodecVoice.load(voice)
        if isinstance(voice, FlexiCodecVoice):
            codec = self.config.codec_config
            voice.check(codec.semantic_codebook_size, codec.max_frames_per_token)
            return voice
        raise ValueError(
            f"`voice`={voice!r} is not known. This model has {list(self.voices) or 'no voices'}; the path of a voice "
            "file (.safetensors) or what `model.encode_voice` returns will do too."
        )

    @torch.no_grad()
    def _encode_voices(self, merging_thresholds: list[float], **references: Tensor | None) -> list[FlexiCodecVoice]:
        """
        The voice of each recording. `references` are those of `encode_voice`, for several
        recordings.
        """
        inputs = {name.removeprefix("reference_"): tensor for name, tensor in references.items() if tensor is not None}
        values, device = inputs["input_values"], self.codec.device
        codec_inputs = {
            "input_values": values.reshape(len(values), 1, values.shape[-1]).to(device),
            "input_features": inputs["input_features"].to(device, self.codec.dtype),
        }
        codec_inputs |= {
            name: inputs[name].to(device) for name in ("padding_mask", "input_features_mask") if name in inputs
        }
        voices = [FlexiCodecVoice(tokens={}) for _ in values]
        for threshold in merging_thresholds:
            encoded = self.codec.encode(**codec_inputs, num_quantizers=1, merging_threshold=threshold)
            codes = valid_parts(encoded.audio_codes[:, 0], encoded.audio_codes_mask)
            lengths = valid_parts(encoded.token_lengths, encoded.audio_codes_mask)
            for item, voice in enumerate(voices):
                voice.tokens[float(threshold)] = codes[item], lengths[item]
        mel, mel_mask = inputs.get("mel"), inputs.get("mel_mask")
        # CODEPATH: released models predict mel spectrograms; those of examples/train_voicebox.py
        # may predict latents.
        if self.voicebox is not None and self.voicebox.config.predicts_latent:
            encoded = self.codec.encode(**codec_inputs, merging_threshold=1.0)
            mel, mel_mask = encoded.latents.transpose(1, 2).float(), encoded.audio_codes_mask
        elif self.voicebox is not None and mel is None:
            raise ValueError(
                "`reference_mel` is missing: the Voicebox imitates it. Pass all that the processor returns."
            )
        for name, tensor, mask in (
            ("mel", mel, mel_mask),
            ("text_ids", inputs.get("text_ids"), inputs.get("text_mask")),
        ):
            if tensor is not None:
                for voice, part in zip(voices, valid_parts(tensor, mask), strict=True):
                    setattr(voice, name, part)
        return voices

    def _cast_parts(self, dtypes: dict[str, torch.dtype | str]) -> None:
        for name in _PARTS:
            dtype, part = dtypes.get(name, dtypes.get("", torch.float32)), getattr(self, name)
            if isinstance(dtype, str):
                dtype = getattr(torch, dtype)
            # Parameters only: buffers, such as rotary frequencies, are made in the type that they
            # need.
            for parameter_name, parameter in part.named_parameters() if part is not None else ():
                if not any(kept in parameter_name for kept in part._keep_in_fp32_modules_strict):
                    parameter.data = parameter.data.to(dtype)


__all__ = ["FlexiCodecForTextToSpeech", "FlexiCodecTTSPreTrainedModel"]
