"""Conversion of the released FlexiCodec files into repositories that `from_pretrained` loads."""
