"""The text front end of FlexiCodec-TTS: text -> phonemes -> ids, with the language token in front.

English is spoken from phonemes and every other language from its plain text. Whisper's BPE is poor at IPA, so a
substitution table first brings the phonemes closer to letters that it knows.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

from transformers.models.whisper.tokenization_whisper import LANGUAGES


PHONEME_SUBSTITUTIONS = {
    "ː": "~",
    "ʌ": "α",
    "ɑ": "α",
    "ɪ": "ι",
    "ʊ": "υ",
    "ɹ": "r",
    "ɐ": "a",
    "ʃ": "ρ",
    "ɛ": "ε",
    "ŋ": "ng",
    "ɡ": "g",
    "ɔ": "ο",
    "ʒ": "ψ",
    "ɾ": "τ",
    "ɚ": "ər",
    "ᵻ": "i",
    "ɜ": "ə",
}
"""IPA -> the letters that the released model was trained on; α ι υ ρ ε ο ψ τ are Greek."""

_SUBSTITUTE = str.maketrans(PHONEME_SUBSTITUTIONS)
# espeak-ng keeps its state in globals: one call at a time.
_ESPEAK_LOCK = threading.Lock()


def encode_text(
    tokenizer: Any, text: str, language: str = "en", reference_text: str | None = None, phonemes: bool = True
) -> list[int]:
    """Ids that the text-to-speech model reads: `[language token] + BPE(text)`, without start and end tokens.

    Special tokens spelt out in the text, such as `<|endoftext|>`, are read as plain characters.

    Args:
        tokenizer: The tokenizer of the repository: a fast tokenizer with Whisper's multilingual vocabulary.
        text: What to say.
        language: Whisper's code of the language of `text`, such as `"en"` or `"zh"`.
        reference_text: What the reference audio says; it goes in front of `text`.
        phonemes: Whether English is spoken from phonemes, as the released model expects. Needs the `[tts]` extra.

    Returns:
        The ids, a list of `int`.

    Raises:
        ValueError: Nothing in `text` can be spoken, or the tokenizer has no token for `language`.
        ImportError: Phonemes are asked for, and the `[tts]` extra is not installed.
    """
    prefix = language_token_id(tokenizer, language)
    prepared = prepare_text(text, language, reference_text, phonemes)
    return [prefix, *tokenizer(prepared, add_special_tokens=False, split_special_tokens=True)["input_ids"]]


def prepare_text(text: str, language: str = "en", reference_text: str | None = None, phonemes: bool = True) -> str:
    """The characters that are tokenized: `"<reference text>, <text>"`, in phonemes when the language is English.

    Arguments and errors as in `encode_text`.
    """
    spell = phonemize if phonemes and language == "en" else str
    spelled = spell(text)
    if not any(map(str.isalnum, spelled)):
        raise ValueError(f"`text` must hold something to speak (letters or digits), got {text!r}.")
    return spell(f"{reference_text}, {text}") if reference_text else spelled


def phonemize(text: str) -> str:
    """English text in the phonemes of the released model: espeak-ng's `en-us` IPA without stress, with punctuation
    kept and `PHONEME_SUBSTITUTIONS` applied.

    The espeak-ng that phonemizer finds is used (`PHONEMIZER_ESPEAK_LIBRARY`, or the system's), and the one inside
    espeakng-loader where none loads. Versions disagree now and then: in "10:45", 1.51 says `fo~rτi` with a Latin o,
    1.52 with a Greek one.

    Args:
        text: English text. `^` is read as an apostrophe.

    Returns:
        The phonemes; an empty string when nothing in `text` makes a sound.

    Raises:
        ImportError: The `[tts]` extra is not installed.
        RuntimeError: `PHONEMIZER_ESPEAK_LIBRARY` names a library that does not load.
    """
    # A C string would end at the first NUL.
    text = text.replace("^", "'").replace("\0", " ")
    with _ESPEAK_LOCK:
        lines = _espeak().phonemize([text])
    return "".join(lines).strip().translate(_SUBSTITUTE)


def language_token_id(tokenizer: Any, language: str) -> int:
    """Id of `<|language|>`; a `ValueError` lists the languages of the tokenizer when there is no such token."""
    ids = dict(zip(LANGUAGES, tokenizer.convert_tokens_to_ids([f"<|{code}|>" for code in LANGUAGES]), strict=True))
    known = {code: token for code, token in ids.items() if token not in (None, tokenizer.unk_token_id)}
    if language not in known:
        raise ValueError(
            f"`language` must be a language code of the tokenizer, got {language!r}. It has: "
            f"{', '.join(known) or 'none; use a multilingual Whisper tokenizer'}."
        )
    return known[language]


@functools.cache
def _espeak() -> Any:
    try:
        from phonemizer.backend import EspeakBackend
        from phonemizer.backend.espeak.wrapper import EspeakWrapper

        bundled = not _loads(EspeakWrapper)
        if bundled:
            import espeakng_loader
    except ImportError as error:
        raise ImportError(
            'English phonemes need phonemizer and espeak-ng: `pip install "flexicodec-hf[tts]"`. '
            "`phonemes=False` does without them, at a cost in pronunciation."
        ) from error
    if bundled:
        EspeakWrapper.set_library(espeakng_loader.get_library_path())
        EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    try:
        return EspeakBackend("en-us", preserve_punctuation=True, with_stress=False, language_switch="remove-flags")
    finally:
        # phonemizer's choice of library is global; the backend has loaded its own copy by now.
        if bundled:
            EspeakWrapper.set_library(None)
            EspeakWrapper.set_data_path(None)


def _loads(wrapper: Any) -> bool:
    try:
        wrapper()
    except RuntimeError:
        if "PHONEMIZER_ESPEAK_LIBRARY" in os.environ:
            raise
        return False
    return True
