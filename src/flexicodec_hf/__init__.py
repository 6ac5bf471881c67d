"""FlexiCodec for transformers: importing this package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

from .configuration_flexicodec import FlexiCodecConfig
from .feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from .modeling_flexicodec import FlexiCodecModel, FlexiCodecPreTrainedModel


__version__ = "0.1.0"

AutoConfig.register("flexicodec", FlexiCodecConfig)
AutoModel.register(FlexiCodecConfig, FlexiCodecModel)
AutoModelForAudioTokenization.register(FlexiCodecConfig, FlexiCodecModel)
AutoFeatureExtractor.register(FlexiCodecConfig, FlexiCodecFeatureExtractor)

# Saved repositories carry their code, for `trust_remote_code=True` where this package is not installed.
FlexiCodecConfig.register_for_auto_class()
FlexiCodecModel.register_for_auto_class("AutoModel")
FlexiCodecFeatureExtractor.register_for_auto_class()

__all__ = [
    "FlexiCodecConfig",
    "FlexiCodecFeatureExtractor",
    "FlexiCodecModel",
    "FlexiCodecPreTrainedModel",
]
