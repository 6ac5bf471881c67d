"""FlexiCodec for transformers: importing this package registers its classes with the Auto classes."""

__version__ = "0.1.0"
