"""
Configuration of the whole text-to-speech system: the codec, the two models on its tokens, and a
vocoder.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .compatibility_flexicodec import CheckedConfigMixin
from .configuration_flexicodec import FlexiCodecConfig
from .configuration_flexicodec_ar import FlexiCodecARConfig
from .configuration_flexicodec_vocoder import FlexiCodecVocoderConfig
from .configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig


@strict
class FlexiCodecTTSConfig(CheckedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`FlexiCodecForTextToSpeech`].

    Args:
        codec_config (`dict` or [`FlexiCodecConfig`], *optional*):
            The codec whose tokens are spoken. The released sizes by default.
        ar_config (`dict` or [`FlexiCodecARConfig`], *optional*):
            The autoregressive model, from text to tokens. The released sizes by default.
        voicebox_config (`dict` or [`FlexiCodecVoiceboxConfig`], *optional*):
            The flow-matching model, from tokens to mel spectrogram or to the codec's decoder
            latents; `{}` for the released sizes. Without it there is no second stage: the codec
            alone turns tokens into speech.
        vocoder_config (`dict` or [`FlexiCodecVocoderConfig`], *optional*):
            The vocoder, from mel spectrogram to waveform. Required with a Voicebox that makes mel
            spectrograms, and only with it.
        voices (`list[str]`, *optional*, defaults to `()`):
            Names of the voices that are saved with the model. The first one speaks when a call
            names none.
        shares_codec (`bool`, *optional*, defaults to `False`):
            Whether the files in `tts/` leave out the weights of the codec, because the repository
            has the same codec at its root. Set by [`save_repository`]; always `False` for a loaded
            model.

    Example:

    ```python
    >>> from flexicodec_hf import FlexiCodecForTextToSpeech, FlexiCodecTTSConfig

    >>> config = FlexiCodecTTSConfig(voicebox_config={}, vocoder_config={})
    >>> config.sampling_rate
    24000
    >>> FlexiCodecTTSConfig().sampling_rate  # the codec's
    16000
    ```
    """

    model_type = "flexicodec_tts"
    sub_configs = {
        "codec_config": FlexiCodecConfig,
        "ar_config": FlexiCodecARConfig,
        "voicebox_config": FlexiCodecVoiceboxConfig,
        "vocoder_config": FlexiCodecVocoderConfig,
    }

    codec_config: Any = None
    ar_config: Any = None
    voicebox_config: Any = None
    vocoder_config: Any = None
    voices: list[str] | tuple[str, ...] = ()
    shares_codec: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if value is None and name in ("codec_config", "ar_config"):
                value = {}
            if isinstance(value, dict):
                setattr(self, name, config_class(**value))
            elif not isinstance(value, config_class | None):
                raise ValueError(f"`{name}` must be a dictionary, got {value!r}.")
        if self.voices is None:
            raise ValueError("`voices` must be a list of names, got None.")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check that the parts fit each other; called by `@strict`."""
        vocabulary = self.codec_config.semantic_codebook_size
        sizes = {"`ar_config.speech_vocab_size`": self.ar_config.speech_vocab_size}
        if self.voicebox_config is not None:
            sizes["`voicebox_config.codebook_size`"] = self.voicebox_config.codebook_size
        for name, size in sizes.items():
            if size != vocabulary:
                raise ValueError(f"{name} is {size}, but the codec has {vocabulary} semantic codes.")
        self._validate_second_stage()

    def _validate_second_stage(self) -> None:
        voicebox, vocoder = self.voicebox_config, self.vocoder_config
        if voicebox is None:
            if vocoder is not None:
                raise ValueError("`voicebox_config` is missing: without one there is nothing for a vocoder to read.")
        elif voicebox.predicts_latent:
            if vocoder is not None:
                raise ValueError(
                    "`vocoder_config` must be left out: the Voicebox predicts latents, which the codec itself decodes."
                )
            made, read = (voicebox.num_mel_bins, voicebox.upsample_factor), (self.codec_config.hidden_size, 1)
            if made != read:
                raise ValueError(
                    f"The Voicebox predicts latents with `num_mel_bins` and `upsample_factor` {made}, but the codec "
                    f"decodes {read}: its `hidden_size`, and one frame for each of its own."
                )
        elif vocoder is None:
            raise ValueError("`vocoder_config` is missing: the Voicebox makes mel spectrograms, which need a vocoder.")
        elif voicebox.num_mel_bins != vocoder.num_mel_bins:
            raise ValueError(
                f"The Voicebox makes mel spectrograms of {voicebox.num_mel_bins} bins, the vocoder reads "
                f"{vocoder.num_mel_bins}: `num_mel_bins` must agree."
            )
        elif (mel_rate := self.codec_config.frame_rate * voicebox.upsample_factor) != vocoder.frame_rate:
            raise ValueError(
                f"The Voicebox makes {mel_rate:g} mel frames a second, the vocoder reads {vocoder.frame_rate:g}: "
                "`upsample_factor` and the vocoder's `hop_length` must agree."
            )

    @property
    def default_merging_threshold(self) -> float:
        """
        The highest threshold that the autoregressive model was trained with, or the codec's if it
        had none.
        """
        return max(self.ar_config.merging_thresholds, default=self.codec_config.merging_threshold)

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the speech in hertz: the vocoder's, or the codec's without a vocoder."""
        return (self.codec_config if self.vocoder_config is None else self.vocoder_config).sampling_rate


__all__ = ["FlexiCodecTTSConfig"]
