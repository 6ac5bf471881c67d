"""
Speech from the text-to-speech system (https://huggingface.co/papers/2510.00981): from texts, tokens
or recordings.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, GenerationMixin
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, logging

from .chunking_flexicodec import Chunk, run_in_windows
from .compatibility_flexicodec import is_number
from .modeling_flexicodec import _INTEGERS, _check_tokens, frame_to_token
from .streaming_flexicodec_tts import ConsumerGone, FlexiCodecAudioStreamer, SpeechStream, ends_streamer
from .voice_flexicodec import FlexiCodecVoice


logger = logging.get_logger(__name__)

# Used where neither the call nor a generation config sets a value. Those of the flow are the
# reference's (flexicodec 0.1.2, nar_tts/inference_voicebox.py, lines 32-34).
TTS_DEFAULTS = {
    "max_new_tokens": 2048,  # four minutes at 8.3 tokens per second; stock pipelines would stop after 256 tokens
    "num_inference_steps": 15,
    "guidance_scale": 2.0,
    "guidance_rescale": 0.75,
    "guidance_interval": (0.0, 1.0),
    "time_grid": "uniform",
}
# Settings of the flow by name: `preset`.
FLOW_PRESETS: dict[str, dict[str, Any]] = {"fast": {"num_inference_steps": 7, "time_grid": "epss"}}

# Settings whose wrong values transformers does not refuse.
_RANGES: dict[str, tuple[Any, float, float]] = {
    "max_new_tokens": (numbers.Integral, 1, 2**31),
    "min_new_tokens": (numbers.Integral, 0, 2**31),
    "num_return_sequences": (numbers.Integral, 1, 2**31),
    "temperature": (numbers.Real, 1e-9, 1e9),
    "top_p": (numbers.Real, 1e-9, 1),
    "duration_temperature": (numbers.Real, 1e-9, 1e9),
    "min_token_text_ratio": (numbers.Real, 0, 1e9),
    "max_token_text_ratio": (numbers.Real, 0, 1e9),
    "num_inference_steps": (numbers.Integral, 1, 2**31),
    "guidance_scale": (numbers.Real, -1e9, 1e9),
    "guidance_rescale": (numbers.Real, 0, 1),
}

# Context on each side of a chunk of long speech, and the cross-fade from one chunk to the next, in
# seconds.
_CHUNK_CONTEXT_S = 2.0
_CHUNK_FADE_S = 0.16


class FlexiCodecFlowKwargs(TypedDict, total=False):
    """
    How speech is made from tokens: keyword arguments of `generate`, `decode_speech` and
    `convert_voice`.

    Args:
        num_inference_steps (`int`, *optional*, defaults to 15):
            Steps of the flow, from noise to speech. Fewer are faster.
        guidance_scale (`float`, *optional*, defaults to 2.0):
            Weight of classifier-free guidance: how closely the speech follows tokens and voice. 0
            turns it off.
        guidance_rescale (`float`, *optional*, defaults to 0.75):
            How far the guided velocity keeps the standard deviation of the conditional one, from 0
            to 1.
        guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Times of the flow with guidance, from 0 (noise) to 1 (speech).
        time_grid (`str`, *optional*, defaults to `"uniform"`):
            Where the steps of the flow lie: `"uniform"`, `"sway"` or `"epss"`, see
            [`~FlexiCodecVoiceboxModel.sample`].
        preset (`str`, *optional*):
            `"fast"` for 7 steps of the grid `"epss"`. Settings beside it win.
        seed (`int` or `list[int]`, *optional*):
            Makes the call repeatable. With one seed, every item is spoken as it would be alone with
            that seed; with a list, each item has its own. Without `seed` and `generator`, torch's
            global generator is used.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            Instead of `seed`: one generator for all items, which draw from it in turn, or one for
            each item.
    """

    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    guidance_interval: tuple[float, float] | None
    time_grid: str | None
    preset: str | None
    seed: int | list[int] | None
    generator: torch.Generator | list[torch.Generator] | None


@dataclass
class FlexiCodecTTSOutput(ModelOutput):
    """
    Speech of [`FlexiCodecForTextToSpeech`].

    Args:
        audio (`torch.FloatTensor` of shape `(batch_size, 1, num_samples)`):
            Waveforms in float32, 0 at padding. An item without samples means that the model
            generated no speech. The field is called `audio`, not `audio_values`, because
            transformers' text-to-speech pipeline reads that key.
        padding_mask (`torch.BoolTensor` of shape `(batch_size, num_samples)`):
            `True` for samples, `False` for padding.
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
            The spoken tokens. `generate` gives one codebook, the semantic codes.
        token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Codec frames (80 ms each) that each token covers; 0 at padding.
        audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`):
            `True` for tokens, `False` for padding.
        sampling_rate (`torch.LongTensor` of shape `(batch_size,)`):
            Sampling rate of `audio` in hertz, the same for all items: the vocoder's (24 kHz as
            released), or the codec's (16 kHz) in a model without a vocoder and with
            `use_nar=False`.
    """

    audio: Tensor | None = None
    padding_mask: Tensor | None = None
    audio_codes: Tensor | None = None
    token_lengths: Tensor | None = None
    audio_codes_mask: Tensor | None = None
    sampling_rate: Tensor | None = None


class FlexiCodecTTSGenerationMixin(GenerationMixin):
    """`generate`, `decode_speech` and `convert_voice` of [`FlexiCodecForTextToSpeech`]."""

    # ******** FlexiCodec specific ********
    # Overrides `GenerationMixin.generate`: the autoregressive model has the stock loop; here its
    # tokens become speech.
    @ends_streamer
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
        generation_config: GenerationConfig | None = None,
        return_dict_in_generate: bool | None = None,
        **kwargs: Any,
    ) -> FlexiCodecTTSOutput | Tensor:
        """
        Speak texts: `model.generate(**processor("Hello there."), voice="anna")`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_ids)`):
                Ids of the texts, language token first, as [`FlexiCodecTTSProcessor`] returns them.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_ids)`, *optional*):
                1 for ids, 0 for padding.
            continuation_ids (`torch.LongTensor` of shape `(batch_size, num_continuation_ids)`, *optional*):
                The same texts in the form that follows a reference text (with a space in front),
                language token first. Used for items whose voice has a text. Defaults to
                `input_ids`.
            continuation_mask (`torch.Tensor` of shape `(batch_size, num_continuation_ids)`, *optional*):
                1 for ids, 0 for padding.
            voice (`str`, [`FlexiCodecVoice`], or a list of them, *optional*):
                Who speaks: a name in `model.voices`, a voice, or the path of a voice file; one for
                all items or one for each. Defaults to the first of `model.voices`.
            reference_input_values (`torch.Tensor` of shape `(num_recordings, num_samples)`, *optional*):
                Instead of `voice`: recordings to take the voices from, one for all items or one for
                each. This and the other `reference_*` tensors are what the processor returns; see
                [`~FlexiCodecForTextToSpeech.encode_voice`] for their shapes.
            merging_threshold (`float`, *optional*, defaults to `config.default_merging_threshold`, 0.91 as released):
                Merging threshold of the codec, one of those that the autoregressive model was
                trained with. Lower values give fewer tokens per second.
            use_nar (`bool`, *optional*):
                Whether the Voicebox turns the tokens into speech, in the voice of the reference (24
                kHz with a vocoder). With `False` the codec does: faster and less similar, at 16
                kHz. Defaults to `True` if there is a Voicebox.
            generation_config (`GenerationConfig`, *optional*):
                Used instead of `model.generation_config`, which fills in what it leaves unset.
            return_dict_in_generate (`bool`, *optional*): Whether to return [`FlexiCodecTTSOutput`].
            kwargs:
                The settings of [`FlexiCodecFlowKwargs`], such as `seed` and `num_inference_steps`,
                and those of the autoregressive model: `do_sample, temperature, top_k,
                max_new_tokens, duration_temperature, duration_top_k, min_token_text_ratio,
                max_token_text_ratio, num_return_sequences, logits_processor, stopping_criteria,
                streamer`, ...; see [`FlexiCodecARForConditionalGeneration.generate`]. A `streamer`
                that is a [`FlexiCodecAudioStreamer`] gets the speech of one text, other streamers
                get tokens.

        Returns:
            [`FlexiCodecTTSOutput`] with `return_dict_in_generate=True`, else its `audio`.

        Raises:
            ValueError: There is no text, a voice or threshold is unknown, tensors do not fit each
                other, or there are several texts to stream.
        """
        # 1. Check inputs
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
        references = {name: tensor for name, tensor in references.items() if tensor is not None}
        _check_tensors(
            **references,
            input_ids=input_ids,
            attention_mask=attention_mask,
            continuation_ids=continuation_ids,
            continuation_mask=continuation_mask,
        )
        if input_ids is None or input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError("There is nothing to say: `input_ids` hold no text. Make them with `processor(text)`.")
        batch_size = len(input_ids)

        # 2. Settings: those of the call, then of the generation configs
        sources = kwargs.pop("seed", None), kwargs.pop("generator", None)
        settings, kwargs = self._prepare_settings(
            generation_config,
            merging_threshold=merging_threshold,
            return_dict_in_generate=return_dict_in_generate,
            **kwargs,
        )
        # A model that was trained without thresholds is not conditioned on one.
        ar_config = self.config.ar_config
        condition = settings.merging_threshold if ar_config.merging_thresholds else None
        ar_config.threshold_token_id(condition)  # raises if the model does not know it

        # 3. Voices, one for each item
        voices = self._choose_voices(voice, references, settings.merging_threshold, batch_size)

        # 4. Generators of random numbers, one for the tokens and one for the noise of each item
        num_return_sequences = settings.num_return_sequences or 1
        token_generators, noise_generators = _row_generators(batch_size, *sources, num_return_sequences)

        # 5. Prompt of the autoregressive model
        text_ids, text_mask = _join_texts(input_ids, attention_mask, continuation_ids, continuation_mask, voices)
        prompt = {} if voices is None else _stack_tokens(voices, settings.merging_threshold)
        inputs = self.ar.build_inputs(text_ids, text_mask, **prompt, merging_threshold=condition)

        # 6. Tokens and their lengths
        ar_settings = copy.deepcopy(settings)
        ar_settings.update(return_dict_in_generate=True)
        ar_settings.guidance_scale = None  # the stock loop would guide the language model with it
        inputs = {name: tensor.to(self.ar.device) for name, tensor in inputs.items()}
        arguments = {"generation_config": ar_settings, "generator": token_generators, **kwargs}
        if isinstance(kwargs.get("streamer"), FlexiCodecAudioStreamer):
            if batch_size * num_return_sequences > 1:
                raise ValueError(
                    f"A FlexiCodecAudioStreamer takes the speech of one text, got {batch_size} texts, each "
                    f"{num_return_sequences} times: call `generate` for each, in threads of their own."
                )
            voice = None if voices is None else voices[0]
            arguments["streamer"] = stream = SpeechStream(
                self, kwargs["streamer"], voice, noise_generators[0], settings, self._uses_nar(use_nar)
            )
            with suppress(ConsumerGone):
                self.ar.generate(**inputs, **arguments)
                stream.finish()
            speech = self._streamed(stream)
            return speech if settings.return_dict_in_generate else speech["audio"]
        output = self.ar.generate(**inputs, **arguments)
        start = inputs["input_ids"].shape[1]
        codes, token_lengths = output.sequences[:, start:], output.token_lengths[:, start:]
        mask = codes < ar_config.speech_vocab_size
        width = int(mask.sum(dim=1).max())
        codes, token_lengths, mask = (codes * mask)[:, :width], token_lengths[:, :width], mask[:, :width]

        # 7. Speech
        if voices is not None:
            voices = [one for one in voices for _ in range(num_return_sequences)]
        speech = self._speak(codes[:, None], token_lengths, mask, voices, noise_generators, settings, use_nar)
        return speech if settings.return_dict_in_generate else speech["audio"]

    # ******** end of FlexiCodec specific ********

    @torch.no_grad()
    def decode_speech(
        self,
        audio_codes: Tensor,
        token_lengths: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        voice: str | FlexiCodecVoice | list[str | FlexiCodecVoice] | None = None,
        merging_threshold: float | None = None,
        use_nar: bool | None = None,
        chunk_length_s: float | None = None,
        **flow_kwargs: Unpack[FlexiCodecFlowKwargs],
    ) -> FlexiCodecTTSOutput:
        """
        Turn tokens of any model into speech: the second half of `generate`.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_tokens)`):
                Tokens of this model's codec. The Voicebox reads the first codebook, the semantic
                codes; the codec reads all.
            token_lengths (`torch.LongTensor` of shape `(batch_size, num_tokens)`, *optional*):
                Codec frames that each token covers; one each by default.
            audio_codes_mask (`torch.Tensor` of shape `(batch_size, num_tokens)`, *optional*):
                1 for tokens, 0 for padding on the right. By default the tokens up to the last one
                with a length.
            voice (`str`, [`FlexiCodecVoice`], or a list of them, *optional*):
                Who speaks: a name in `model.voices`, a voice, or the path of a voice file; one for
                all items or one for each. Defaults to the first of `model.voices`.
            merging_threshold (`float`, *optional*, defaults to `config.default_merging_threshold`, 0.91 as released):
                The threshold that the tokens were made with: the voice's own tokens are taken at
                the same one.
            use_nar (`bool`, *optional*):
                Whether the Voicebox turns the tokens into speech, or the codec alone. Defaults to
                `True` if there is a Voicebox.
            chunk_length_s (`float`, *optional*):
                Decodes long speech in chunks of this many seconds. Memory then depends on the
                chunk, except for the waveform.
            flow_kwargs: See [`FlexiCodecFlowKwargs`].

        Returns:
            [`FlexiCodecTTSOutput`]

        Raises:
            ValueError: Tensors do not fit each other, or a voice is unknown.
        """
        # 1. Check inputs
        _check_tensors(audio_codes=audio_codes, token_lengths=token_lengths, audio_codes_mask=audio_codes_mask)
        if audio_codes is None:
            raise ValueError("`decode_speech` needs `audio_codes`.")
        if audio_codes.dtype not in _INTEGERS:
            raise ValueError(f"`audio_codes` must be integers, got {audio_codes.dtype}.")
        if audio_codes.ndim != 3:
            raise ValueError(
                "`audio_codes` must have the shape (batch_size, num_quantizers, num_tokens), got "
                f"{tuple(audio_codes.shape)}. Semantic codes alone are `codes[:, None]`."
            )
        codec = self.config.codec_config
        # Text models have classes of more frames than a token of the codec, and of none.
        most_frames = max(self.config.ar_config.num_durations - 1, codec.max_frames_per_token)
        token_lengths, mask, _ = _check_tokens(
            codec, audio_codes, token_lengths, audio_codes_mask, most_frames_per_token=most_frames
        )
        if unknown := flow_kwargs.keys() - FlexiCodecFlowKwargs.__annotations__.keys():
            settings = list(FlexiCodecFlowKwargs.__annotations__)
            raise TypeError(f"Unexpected arguments {sorted(unknown)}: the settings are {settings}.")

        # 2. Settings, voices and generators of random numbers, as in `generate`
        sources = flow_kwargs.pop("seed", None), flow_kwargs.pop("generator", None)
        settings, _ = self._prepare_settings(None, merging_threshold=merging_threshold, **flow_kwargs)
        voices = self._choose_voices(voice, {}, settings.merging_threshold, len(audio_codes))
        _, noise_generators = _row_generators(len(audio_codes), *sources)

        # 3. Speech
        return self._speak(
            audio_codes,
            token_lengths,
            mask,
            voices,
            noise_generators,
            settings,
            use_nar,
            chunk_length_s,
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
        chunk_length_s: float | None = 20.0,
        **flow_kwargs: Unpack[FlexiCodecFlowKwargs],
    ) -> FlexiCodecTTSOutput:
        """
        Speak the words of recordings in another voice: `model.convert_voice(**inputs, voice="anna")`,
        with the inputs of the codec.

        Args:
            input_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`):
                The recordings to convert at the codec's sampling rate (16 kHz), as the codec's
                feature extractor returns them.
            input_features (`torch.Tensor` of shape `(batch_size, num_features, 560)`):
                Their features for the semantic encoder.
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for samples, 0 for padding.
            input_features_mask (`torch.Tensor` of shape `(batch_size, num_features)`, *optional*):
                1 for features, 0 for padding.
            voice (`str`, [`FlexiCodecVoice`], or a list of them, *optional*):
                Who speaks: a name in `model.voices`, a voice, or the path of a voice file; one for
                all items or one for each. Defaults to the first of `model.voices`.
            merging_threshold (`float`, *optional*, defaults to `config.default_merging_threshold`, 0.91 as released):
                Merging threshold of the codec for the recordings and the voice. Lower values keep
                less of the timing of the recordings.
            chunk_length_s (`float`, *optional*, defaults to 20.0):
                Converts in chunks of this many seconds. Memory then depends on the chunk, except
                for the waveforms. `None` converts everything at once.
            flow_kwargs: See [`FlexiCodecFlowKwargs`].

        Returns:
            [`FlexiCodecTTSOutput`]

        Raises:
            ValueError: The model has no Voicebox.
        """
        # 1. Check inputs
        _check_tensors(
            input_values=input_values,
            input_features=input_features,
            padding_mask=padding_mask,
            input_features_mask=input_features_mask,
        )
        if self.voicebox is None:
            raise ValueError("This model has no Voicebox, which gives speech the voice: load a model that has one.")
        settings, _ = self._prepare_settings(None, merging_threshold=merging_threshold)

        # 2. Tokens of the recordings
        device, dtype = self.codec.device, self.codec.dtype
        encoded = self.codec.encode(
            input_values.to(device),
            input_features.to(device, dtype),
            padding_mask=None if padding_mask is None else padding_mask.to(device),
            input_features_mask=None if input_features_mask is None else input_features_mask.to(device),
            num_quantizers=1,
            merging_threshold=settings.merging_threshold,
            chunk_length_s=chunk_length_s,
        )

        # 3. Speech
        return self.decode_speech(
            encoded.audio_codes,
            encoded.token_lengths,
            encoded.audio_codes_mask,
            voice=voice,
            merging_threshold=settings.merging_threshold,
            use_nar=True,
            chunk_length_s=chunk_length_s,
            **flow_kwargs,
        )

    def _prepare_settings(
        self, generation_config: GenerationConfig | None, preset: str | None = None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """The settings of a call, and its arguments that are no settings. `None` means the default."""
        if not isinstance(generation_config, GenerationConfig | None):
            raise TypeError(f"`generation_config` must be a GenerationConfig, got {type(generation_config).__name__}.")
        _check_settings(kwargs)
        if preset is not None and preset not in FLOW_PRESETS:
            raise ValueError(f"`preset`={preset!r} is not known: there is {list(FLOW_PRESETS)}.")
        threshold = kwargs.get("merging_threshold")
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float, type(None))):
            raise TypeError(f"`merging_threshold` must be a number, got {threshold!r} ({type(threshold).__name__}).")
        settings = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        defaults = TTS_DEFAULTS | {"merging_threshold": self.config.default_merging_threshold}
        for source in (self.generation_config.to_dict(), defaults):
            for name, value in source.items():
                if getattr(settings, name, None) is None:
                    setattr(settings, name, value)
        settings.update(**FLOW_PRESETS.get(preset or "", {}))
        unused = settings.update(**{name: value for name, value in kwargs.items() if value is not None})
        return settings, unused

    def _speak(
        self,
        codes: Tensor,
        token_lengths: Tensor,
        mask: Tensor,
        voices: list[FlexiCodecVoice] | None,
        generators: list[torch.Generator],
        settings: GenerationConfig,
        use_nar: bool | None,
        chunk_length_s: float | None = None,
    ) -> FlexiCodecTTSOutput:
        """
        Speech of tokens `(batch_size, num_quantizers, num_tokens)`; an item without frames gets no
        samples.
        """
        use_nar = self._uses_nar(use_nar)
        token_lengths = token_lengths * mask
        is_spoken = token_lengths.sum(dim=1) > 0
        rows = is_spoken.nonzero()[:, 0]
        audio, padding_mask = torch.zeros(0, 1, 0), torch.zeros(0, 0, dtype=torch.bool)
        if len(rows):
            spoken = codes[rows], token_lengths[rows], mask[rows]
            if use_nar:
                voices = None if voices is None else [voices[row] for row in rows.tolist()]
                generators = [generators[row] for row in rows.tolist()]
                decoded = self._decode_with_voicebox(*spoken[:2], voices, generators, settings, chunk_length_s)
            else:
                # Not `decode`, which refuses tokens of 0 and 9 frames. The duration head of the released
                # model has classes for them.
                tokens = (tensor.to(self.codec.device) for tensor in spoken)
                decoded = self.codec._decode_tokens(*tokens, chunk_length_s=chunk_length_s)
            audio, padding_mask = decoded.audio_values.float(), decoded.padding_mask
        if len(rows) < len(codes):
            logger.warning(f"No speech was generated for {len(codes) - len(rows)} of {len(codes)} items.")
            audio, padding_mask = (
                tensor.new_zeros(len(codes), *tensor.shape[1:]).index_copy(0, rows.to(tensor.device), tensor)
                for tensor in (audio, padding_mask)
            )
        sampling_rate = (self.config if use_nar else self.codec.config).sampling_rate
        return FlexiCodecTTSOutput(
            audio=audio,
            padding_mask=padding_mask,
            audio_codes=codes,
            token_lengths=token_lengths,
            audio_codes_mask=mask,
            sampling_rate=torch.full((len(codes),), sampling_rate),
        )

    def _uses_nar(self, use_nar: bool | None) -> bool:
        if use_nar and self.voicebox is None:
            raise ValueError("This model has no Voicebox: pass `use_nar=False`, and the codec decodes the tokens.")
        return self.voicebox is not None if use_nar is None else use_nar

    def _streamed(self, stream: SpeechStream) -> FlexiCodecTTSOutput:
        """What a streamer was given; it ends early when nobody listens any more."""
        audio = torch.cat([torch.zeros(0), *map(torch.from_numpy, stream.chunks)])[None]
        if stream.streamer.closed and not stream.chunks:
            logger.warning("The streamer was closed before anything was spoken: each call needs a new one.")
        elif not stream.codes:
            logger.warning("No speech was generated.")
        codes, token_lengths = stream.tokens()
        return FlexiCodecTTSOutput(
            audio=audio[None],
            padding_mask=torch.ones_like(audio, dtype=torch.bool),
            audio_codes=codes[:, None],
            token_lengths=token_lengths,
            audio_codes_mask=torch.ones_like(codes, dtype=torch.bool),
            sampling_rate=torch.tensor([stream.streamer.sampling_rate]),
        )

    def _decode_with_voicebox(
        self,
        codes: Tensor,
        token_lengths: Tensor,
        voices: list[FlexiCodecVoice] | None,
        generators: list[torch.Generator],
        settings: GenerationConfig,
        chunk_length_s: float | None,
    ) -> ModelOutput:
        mel, mel_mask = self._sample_mel(codes[:, 0], token_lengths, voices, generators, settings, chunk_length_s)
        return self._mel_to_audio(mel, mel_mask, chunk_length_s)

    def _mel_to_audio(self, mel: Tensor, mel_mask: Tensor, chunk_length_s: float | None = None) -> ModelOutput:
        """
        `audio_values` and `padding_mask`, from the vocoder or, if the Voicebox predicts latents,
        from the codec.
        """
        # CODEPATH: released models predict mel spectrograms; those of examples/train_voicebox.py
        # may predict latents.
        if self.voicebox.config.predicts_latent:
            return self.codec.decode(
                latents=mel.transpose(1, 2).to(self.codec.device, self.codec.dtype),
                audio_codes_mask=mel_mask.to(self.codec.device),
                chunk_length_s=chunk_length_s,
            )
        device = self.vocoder.device
        return self.vocoder(mel.to(device), mel_mask.to(device), chunk_length_s=chunk_length_s)

    def _sample_mel(
        self,
        codes: Tensor,
        token_lengths: Tensor,
        voices: list[FlexiCodecVoice] | None,
        generators: list[torch.Generator],
        settings: GenerationConfig,
        chunk_length_s: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Mel spectrograms (or latents) `(batch_size, num_frames, num_mel_bins)` of semantic codes,
        and their mask.

        The noise is drawn for the whole, so that overlapping windows start from the same.
        """
        device, factor = self.voicebox.device, self.voicebox.config.upsample_factor
        codes, token_lengths = codes.to(device), token_lengths.to(device)
        prompt = {} if voices is None else self._voicebox_prompt(voices, settings.merging_threshold)
        lengths = token_lengths.sum(dim=1)
        num_frames = int(lengths.max())
        frame_codes = codes.gather(1, frame_to_token(token_lengths, num_frames))
        has_frame = torch.arange(num_frames, device=device) < lengths[:, None]
        noise = self.voicebox.draw_noise((lengths * factor).tolist(), generators).to(device)

        def sample(rows: Tensor, window: slice) -> Tensor:
            return self.voicebox.sample(
                frame_codes[rows, window],
                has_frame[rows, window].long(),
                **{name: tensor[rows] for name, tensor in prompt.items()},
                **self._flow_settings(settings),
                noise=noise[rows, window.start * factor : window.stop * factor],
            ).mel

        chunk, fade_length = self._chunk(chunk_length_s)
        mel = run_in_windows(sample, lengths, chunk, hop_length=factor, fade_length=fade_length)
        return mel, has_frame.repeat_interleave(factor, dim=1)

    def _chunk(self, chunk_length_s: float | None) -> tuple[Chunk | None, int]:
        """
        Size and context of the Voicebox's chunks, and the length of their cross-fades, in codec
        frames.
        """
        if chunk_length_s is None:
            return None, 0
        if not is_number(chunk_length_s) or chunk_length_s > 1e9:
            raise ValueError(f"`chunk_length_s` must be a finite number of seconds, got {chunk_length_s!r}.")
        rate = self.config.codec_config.frame_rate
        chunk, fade_length = (
            Chunk(round(chunk_length_s * rate), round(_CHUNK_CONTEXT_S * rate)),
            round(_CHUNK_FADE_S * rate),
        )
        if chunk.size <= fade_length:
            raise ValueError(f"`chunk_length_s` must be more than {_CHUNK_FADE_S} seconds, got {chunk_length_s}.")
        return chunk, fade_length

    @staticmethod
    def _flow_settings(settings: GenerationConfig) -> dict[str, Any]:
        """What `sample` of the Voicebox takes."""
        names = ("num_inference_steps", "guidance_scale", "guidance_rescale", "guidance_interval", "time_grid")
        return {name: getattr(settings, name) for name in names}

    def _voicebox_prompt(self, voices: list[FlexiCodecVoice], merging_threshold: float) -> dict[str, Tensor]:
        num_bins = self.voicebox.config.num_mel_bins
        mels = [voice.mel for voice in voices if voice.mel is not None and voice.mel.shape[1] == num_bins]
        if len(mels) < len(voices):
            raise ValueError(
                f"The voice has no `mel` of {num_bins} channels, as the Voicebox makes them: encode it with this "
                "model, or pass `use_nar=False`."
            )
        tokens = _stack_tokens(voices, merging_threshold)
        prompt = {
            "prompt_codes": tokens["codes"],
            "prompt_token_lengths": tokens["token_lengths"],
            "prompt_mel": pad_sequence(mels, batch_first=True),
            "prompt_mel_mask": pad_sequence([torch.ones(len(mel)) for mel in mels], batch_first=True),
        }
        return {name: tensor.to(self.voicebox.device) for name, tensor in prompt.items()}


def _check_tensors(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not torch.is_tensor(tensor):
            raise TypeError(
                f"`{name}` must be a tensor, got a {type(tensor).__name__}: prepare the inputs with the processor (or "
                'the feature extractor with `return_tensors="pt"`), or wrap it in `torch.tensor`.'
            )


def _row_generators(
    batch_size: int,
    seed: int | list[int] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    num_return_sequences: int = 1,
) -> tuple[list[torch.Generator], list[torch.Generator]]:
    """
    For each row, a generator for its tokens and one for its noise.

    Each is seeded on its own, so an item sounds the same in any batch, and tokens that are decoded
    later sound as if they had been decoded at once.
    """
    if seed is not None and generator is not None:
        raise ValueError("Pass either `seed` or `generator`, not both.")
    sources: list[torch.Generator | None]
    if seed is not None:
        seeds: list[Any] = list(seed) if isinstance(seed, (list, tuple)) else [seed] * batch_size
        if not all(isinstance(one, (int, np.integer)) and -(2**63) <= one < 2**63 for one in seeds):
            raise ValueError(f"`seed` must be a whole number of 64 bits, or a list of them, got {seed!r}.")
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
    tokens, noises = (
        [torch.Generator().manual_seed(number) for number in numbers] for numbers in zip(*draws, strict=True)
    )
    return tokens, noises


def _check_settings(settings: Mapping[str, Any]) -> None:
    for name, (kind, low, high) in _RANGES.items():
        value = settings.get(name)
        if value is not None and not (isinstance(value, kind) and low <= value <= high):
            what = "a whole number" if kind is numbers.Integral else "a number"
            raise ValueError(f"`{name}` must be {what} from {low:g} to {high:g}, got {value!r}.")


def valid_parts(tensor: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Each item without its padding, on the CPU."""
    rows = tensor.cpu()
    return list(rows) if mask is None else [row[valid] for row, valid in zip(rows, mask.cpu().bool(), strict=True)]


def _join_texts(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    continuation_ids: Tensor | None,
    continuation_mask: Tensor | None,
    voices: list[FlexiCodecVoice] | None,
) -> tuple[Tensor, Tensor]:
    """
    Ids that the model reads, `[language] [text of the voice] [text to speak]`, and their mask, on
    the CPU.
    """
    for name, ids, mask in (
        ("input_ids", input_ids, attention_mask),
        ("continuation_ids", continuation_ids, continuation_mask),
    ):
        if ids is None:
            continue
        if ids.ndim != 2 or len(ids) == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"`{name}` must be integers (batch_size, length), got {ids.dtype} {tuple(ids.shape)}.")
        if len(ids) != len(input_ids):
            raise ValueError(
                f"`{name}` holds {len(ids)} texts and `input_ids` {len(input_ids)}: they are two forms of the same "
                "texts."
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"The mask of `{name}` must have its shape {tuple(ids.shape)}, got {tuple(mask.shape)}.")
    alone = continued = valid_parts(input_ids, attention_mask)
    if continuation_ids is not None:
        continued = valid_parts(continuation_ids, continuation_mask)
    rows = []
    for item, (ids, continuation) in enumerate(zip(alone, continued, strict=True)):
        if len(ids) == 0:
            raise ValueError(f"There is nothing to say: item {item} of `input_ids` holds no text.")
        if voices is not None and (reference := voices[item].text_ids) is not None:
            ids = torch.cat([continuation[:1], reference.to(continuation.dtype), continuation[1:]])
        rows.append(ids)
    mask = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask


def _stack_tokens(voices: list[FlexiCodecVoice], merging_threshold: float) -> dict[str, Tensor]:
    """
    Semantic codes of the voices, their lengths and mask, each `(batch_size, num_tokens)`, on the
    CPU.
    """
    codes, lengths = zip(*(voice.tokens_at(merging_threshold) for voice in voices), strict=True)
    token_lengths = pad_sequence(list(lengths), batch_first=True)
    return {
        "codes": pad_sequence(list(codes), batch_first=True),
        "token_lengths": token_lengths,
        "codes_mask": token_lengths > 0,
    }


__all__ = ["FlexiCodecFlowKwargs", "FlexiCodecTTSGenerationMixin", "FlexiCodecTTSOutput"]
