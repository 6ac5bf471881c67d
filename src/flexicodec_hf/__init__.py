"""FlexiCodec for transformers: importing this package registers its classes with the Auto classes."""

# ruff: noqa: E402
import transformers
from packaging.specifiers import SpecifierSet


# The range of pyproject.toml, checked before the imports below, which may fail with other versions.
_TRANSFORMERS = ">=5.17,<5.25"
if not SpecifierSet(_TRANSFORMERS).contains(transformers.__version__, prereleases=True):
    raise ImportError(
        f"flexicodec_hf works with transformers{_TRANSFORMERS}, but {transformers.__version__} is installed: "
        f"run `pip install 'transformers{_TRANSFORMERS}'`."
    )

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
from .cpu_flexicodec import optimize_for_cpu
from .feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from .feature_extraction_flexicodec_mel import FlexiCodecMelFeatureExtractor
from .generation_flexicodec_tts import FlexiCodecFlowKwargs, FlexiCodecTTSOutput
from .modeling_flexicodec import FlexiCodecModel, FlexiCodecPreTrainedModel
from .modeling_flexicodec_ar import (
    FlexiCodecARForConditionalGeneration,
    FlexiCodecARModel,
    FlexiCodecARPreTrainedModel,
)
from .modeling_flexicodec_tts import FlexiCodecForTextToSpeech, FlexiCodecTTSPreTrainedModel
from .modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from .modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel, FlexiCodecVoiceboxPreTrainedModel
from .pipeline_flexicodec_tts import FlexiCodecTTSPipeline
from .processing_flexicodec_tts import FlexiCodecTTSProcessor
from .repository_flexicodec_tts import FlexiCodecRepositoryForTextToSpeech, save_repository
from .speech_lm import FlexiCodecSpeechVocabulary, SpeechChatCollator, SpeechTextCollator
from .streaming_flexicodec_tts import FlexiCodecAudioStreamer
from .voice_flexicodec import FlexiCodecVoice


__version__ = "0.1.0"

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

__all__ = [
    "FlexiCodecARConfig",
    "FlexiCodecARForConditionalGeneration",
    "FlexiCodecARModel",
    "FlexiCodecARPreTrainedModel",
    "FlexiCodecAudioStreamer",
    "FlexiCodecConfig",
    "FlexiCodecFeatureExtractor",
    "FlexiCodecFlowKwargs",
    "FlexiCodecForTextToSpeech",
    "FlexiCodecMelFeatureExtractor",
    "FlexiCodecModel",
    "FlexiCodecPreTrainedModel",
    "FlexiCodecRepositoryForTextToSpeech",
    "FlexiCodecSpeechVocabulary",
    "FlexiCodecTTSConfig",
    "FlexiCodecTTSOutput",
    "FlexiCodecTTSPipeline",
    "FlexiCodecTTSPreTrainedModel",
    "FlexiCodecTTSProcessor",
    "FlexiCodecVocoderConfig",
    "FlexiCodecVocoderModel",
    "FlexiCodecVoice",
    "FlexiCodecVoiceboxConfig",
    "FlexiCodecVoiceboxModel",
    "FlexiCodecVoiceboxPreTrainedModel",
    "SpeechChatCollator",
    "SpeechTextCollator",
    "optimize_for_cpu",
    "save_repository",
]
