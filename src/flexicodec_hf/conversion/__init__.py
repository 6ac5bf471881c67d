"""Conversion of the released FlexiCodec files into repositories that `from_pretrained` loads."""

from .checkpoint import CheckpointError
from .convert import convert_ar, convert_codec, convert_vocoder, convert_voicebox
from .repository import VoiceSource, assemble
from .tokenizer import build_tokenizer


__all__ = [
    "CheckpointError",
    "VoiceSource",
    "assemble",
    "build_tokenizer",
    "convert_ar",
    "convert_codec",
    "convert_vocoder",
    "convert_voicebox",
]
