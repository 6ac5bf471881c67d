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

__all__ = [
    "FlexiCodecConfig",
    "FlexiCodecFeatureExtractor",
    "FlexiCodecModel",
    "FlexiCodecPreTrainedModel",
]
