"""
Speech language models on FlexiCodec's tokens: the vocabulary, collators for `Trainer`, and a head
for durations.
"""

from .collators import SpeechChatCollator, SpeechTextCollator
from .modeling import DurationLMMixin, duration_lm_class
from .tokens import MalformedSpeechError
from .vocabulary import FlexiCodecSpeechVocabulary


__all__ = [
    "DurationLMMixin",
    "FlexiCodecSpeechVocabulary",
    "MalformedSpeechError",
    "SpeechChatCollator",
    "SpeechTextCollator",
    "duration_lm_class",
]
