"""Importing this module registers the classes of the package with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    AutoModelForCausalLM,
    AutoModelForTextToWaveform,
    AutoProcessor,
)

from .configuration_flexicodec import FlexiCodecConfig
from .configuration_flexicodec_ar import FlexiCodecARConfig
from .configuration_flexicodec_tts import FlexiCodecTTSConfig
from .configuration_flexicodec_vocoder import FlexiCodecVocoderConfig
from .configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig
from .feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from .feature_extraction_flexicodec_mel import FlexiCodecMelFeatureExtractor
from .modeling_flexicodec import FlexiCodecModel
from .modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration, FlexiCodecARModel
from .modeling_flexicodec_tts import FlexiCodecForTextToSpeech
from .modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from .modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel
from .processing_flexicodec_tts import FlexiCodecTTSProcessor
from .repository_flexicodec_tts import FlexiCodecRepositoryForTextToSpeech


for _config, _model in (
    (FlexiCodecConfig, FlexiCodecModel),
    (FlexiCodecARConfig, FlexiCodecARModel),
    (FlexiCodecVoiceboxConfig, FlexiCodecVoiceboxModel),
    (FlexiCodecVocoderConfig, FlexiCodecVocoderModel),
    (FlexiCodecTTSConfig, FlexiCodecForTextToSpeech),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
AutoModelForAudioTokenization.register(FlexiCodecConfig, FlexiCodecModel)
AutoModelForCausalLM.register(FlexiCodecARConfig, FlexiCodecARForConditionalGeneration)
AutoModelForTextToWaveform.register(FlexiCodecTTSConfig, FlexiCodecForTextToSpeech)
# In a repository with the codec at its root, the text-to-speech system is in `tts/`.
AutoModelForTextToWaveform.register(FlexiCodecConfig, FlexiCodecRepositoryForTextToSpeech)
AutoFeatureExtractor.register(FlexiCodecConfig, FlexiCodecFeatureExtractor)
AutoFeatureExtractor.register(FlexiCodecVoiceboxConfig, FlexiCodecMelFeatureExtractor)
AutoProcessor.register(FlexiCodecTTSConfig, FlexiCodecTTSProcessor)

# Saved repositories carry their code, for `trust_remote_code=True` without this package.
for _class in (
    FlexiCodecConfig,
    FlexiCodecARConfig,
    FlexiCodecVoiceboxConfig,
    FlexiCodecVocoderConfig,
    FlexiCodecTTSConfig,
    FlexiCodecFeatureExtractor,
    FlexiCodecMelFeatureExtractor,
    FlexiCodecTTSProcessor,
):
    _class.register_for_auto_class()
for _class in (FlexiCodecModel, FlexiCodecARModel, FlexiCodecVoiceboxModel, FlexiCodecVocoderModel):
    _class.register_for_auto_class("AutoModel")
FlexiCodecARForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
FlexiCodecForTextToSpeech.register_for_auto_class("AutoModelForTextToWaveform")
