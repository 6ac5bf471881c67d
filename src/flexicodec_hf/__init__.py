"""FlexiCodec for transformers: importing this package registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    AutoModelForCausalLM,
)

from .configuration_flexicodec import FlexiCodecConfig
from .configuration_flexicodec_ar import FlexiCodecARConfig
from .configuration_flexicodec_vocoder import FlexiCodecVocoderConfig
from .configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig
from .feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from .feature_extraction_flexicodec_mel import FlexiCodecMelFeatureExtractor
from .modeling_flexicodec import FlexiCodecModel, FlexiCodecPreTrainedModel
from .modeling_flexicodec_ar import (
    FlexiCodecARForConditionalGeneration,
    FlexiCodecARModel,
    FlexiCodecARPreTrainedModel,
)
from .modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from .modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel, FlexiCodecVoiceboxPreTrainedModel
from .scheduling_flexicodec import FlexiCodecMidpointScheduler
from .speech_lm import FlexiCodecSpeechVocabulary, SpeechChatCollator, SpeechTextCollator


__version__ = "0.1.0"

for _config, _model in (
    (FlexiCodecConfig, FlexiCodecModel),
    (FlexiCodecARConfig, FlexiCodecARModel),
    (FlexiCodecVoiceboxConfig, FlexiCodecVoiceboxModel),
    (FlexiCodecVocoderConfig, FlexiCodecVocoderModel),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
AutoModelForAudioTokenization.register(FlexiCodecConfig, FlexiCodecModel)
AutoModelForCausalLM.register(FlexiCodecARConfig, FlexiCodecARForConditionalGeneration)
AutoFeatureExtractor.register(FlexiCodecConfig, FlexiCodecFeatureExtractor)
AutoFeatureExtractor.register(FlexiCodecVoiceboxConfig, FlexiCodecMelFeatureExtractor)

# Saved repositories carry their code, for `trust_remote_code=True` where this package is not installed.
for _class in (
    FlexiCodecConfig,
    FlexiCodecARConfig,
    FlexiCodecVoiceboxConfig,
    FlexiCodecVocoderConfig,
    FlexiCodecFeatureExtractor,
    FlexiCodecMelFeatureExtractor,
):
    _class.register_for_auto_class()
for _class in (FlexiCodecModel, FlexiCodecARModel, FlexiCodecVoiceboxModel, FlexiCodecVocoderModel):
    _class.register_for_auto_class("AutoModel")
FlexiCodecARForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "FlexiCodecARConfig",
    "FlexiCodecARForConditionalGeneration",
    "FlexiCodecARModel",
    "FlexiCodecARPreTrainedModel",
    "FlexiCodecConfig",
    "FlexiCodecFeatureExtractor",
    "FlexiCodecMelFeatureExtractor",
    "FlexiCodecMidpointScheduler",
    "FlexiCodecModel",
    "FlexiCodecPreTrainedModel",
    "FlexiCodecSpeechVocabulary",
    "FlexiCodecVocoderConfig",
    "FlexiCodecVocoderModel",
    "FlexiCodecVoiceboxConfig",
    "FlexiCodecVoiceboxModel",
    "FlexiCodecVoiceboxPreTrainedModel",
    "SpeechChatCollator",
    "SpeechTextCollator",
]
