"""
The text front end of FlexiCodec-TTS: long text -> pieces, and each piece -> numbers in words ->
phonemes -> ids, after a language token.

English is spoken from phonemes, every other language from its plain text. Whisper's BPE splits IPA
into many tokens, so a substitution table first replaces phonemes by letters that it knows. A long
text is split into pieces of a sentence or a few. Where it is unclear whether a full stop ends a
sentence, it does not: a piece that is longer than necessary is spoken well, half a sentence is not.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import unicodedata
from collections.abc import Iterator
from typing import Any

from .numbers_flexicodec import spell_numbers


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
"""
IPA -> the letters that the released model was trained on; α ι υ ρ ε ο ψ τ are Greek (flexicodec
0.1.2, ar_tts/utils/g2p_phonemizer.py, lines 12-28).
"""

_SUBSTITUTE = str.maketrans(PHONEME_SUBSTITUTIONS)
# espeak-ng keeps its state in globals: one call at a time.
_ESPEAK_LOCK = threading.Lock()

Span = tuple[int, int]
"""Start and end of a part of the text."""

MAX_PIECE_LENGTH = 200
"""About 13 seconds of speech."""

# After these, a full stop belongs to the word, in any language that has them. Single letters and
# words with a full stop inside ("J.", "z. B.", "e.g.", "U.S.") need no entry.
_ABBREVIATIONS = """
    mr mrs ms dr prof st mt rev hon gen col capt lt sgt maj cmdr gov sen rep pres supt messrs mmes jr sr esq ed eds vs
    viz cf approx dept univ inc ltd corp co ave blvd rd hwy tel ext
    bzw usw ca evtl ggf inkl zzgl vgl hr hrn fr frl jh jhd mio mrd tsd sog geb gest verh dipl ing
    mme mlle mm sra srta dña dra ud uds vd vds avda dott sig sigg sigra ecc prov gent bijv enz dhr mevr mw drs mej env
    tél éd г гг ул д кв т им проф акад руб коп тыс млн млрд др пр
"""
# After these, only where a number follows: "no. 5", "Jan. 3".
_NUMBERED = """
    no nos nr num núm vol vols fig figs eq eqs ch chap cap sec pp pag pág págs blz abs abb bd str art arts av min max
    jan feb mar apr jun jul aug sept sep oct okt nov dec dez см стр рис табл
"""
# Where an ordinal number is written with a full stop: "am 3. Mai".
_ORDINAL_STOP = "bs cs da de et fi fo hr hu is lb lv nn no pl sk sl sr tr"

_ENDS = ".!?…。！？｡．؟۔।॥։።။"
# These end a sentence without a space after them.
_WIDE_ENDS = "。！？｡．"
_CLOSERS = "\"'”’»›)]}」』）】》〉〗〕"
# "3．14", "10：45"
_INSIDE_NUMBER = r"(?<=\d)[.,:．，：](?=\d)"
# French puts a space before the closing quotation mark.
_SENTENCE_END = re.compile(rf"(?!{_INSIDE_NUMBER})([{re.escape(_ENDS)}]+)(?:\s»|[{re.escape(_CLOSERS)}])*")
_PARAGRAPH_END = re.compile(r"\s*\n\s*\n\s*|[\f\v\u2028\u2029]+")
# How far the word after a full stop may be.
_LOOK_AHEAD = 40
# Places to breathe inside a sentence. A dash has spaces on both sides, or is long.
_CLAUSE_END = re.compile(
    rf"[,;:،؛][{re.escape(_CLOSERS)}]*(?=\s)|(?!{_INSIDE_NUMBER})[，、；：]|(?<=\s)[–—-]+(?=\s)|—"
)


def encode_text(
    tokenizer: Any, text: str, language: str = "en", reference_text: str | None = None, phonemes: bool = True
) -> list[int]:
    """
    Ids that the text-to-speech model reads: `[language token] + BPE(text)`, without start and end
    tokens.

    Special tokens that are written in the text, such as `<|endoftext|>`, are read as plain characters.

    Args:
        tokenizer: The tokenizer of the repository: a fast tokenizer with Whisper's multilingual
            vocabulary.
        text: What to say.
        language: Whisper's code of the language of `text`, such as `"en"` or `"zh"`.
        reference_text: What the reference audio says; it goes in front of `text`.
        phonemes: Whether English is spoken from phonemes, as the released model expects. Needs the
            `[tts]` extra.

    Returns:
        The ids, a list of `int`.

    Raises:
        ValueError: Nothing in `text` can be spoken, or the tokenizer has no token for `language`.
        ImportError: Phonemes are requested, and the `[tts]` extra is not installed.
    """
    prefix = language_token_id(tokenizer, language)
    prepared = prepare_text(text, language, reference_text, phonemes)
    return [prefix, *tokenizer(prepared, add_special_tokens=False, split_special_tokens=True)["input_ids"]]


def prepare_text(text: str, language: str = "en", reference_text: str | None = None, phonemes: bool = True) -> str:
    """
    The characters that are tokenized: `"<reference text>, <text>"`. English is written in phonemes,
    its numbers in words before.

    Args:
        text: What to say.
        language: Whisper's code of the language of `text`, such as `"en"` or `"zh"`.
        reference_text: What the reference audio says; it goes in front of `text`.
        phonemes: Whether English is spoken from phonemes, as the released model expects. Needs the
            `[tts]` extra.

    Raises:
        ValueError: Nothing in `text` can be spoken, or it holds half of a surrogate pair.
        ImportError: Phonemes are requested, and the `[tts]` extra is not installed.
    """
    for name, value in (("text", text), ("reference_text", reference_text or "")):
        if not isinstance(value, str):
            raise TypeError(f"`{name}` must be a string, got {value!r} ({type(value).__name__}).")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"`{name}` holds half of a surrogate pair, which is no character: {value!a}.")
    spell = _spell_english if phonemes and language == "en" else str
    spelled = spell(text)
    if not any(map(str.isalnum, spelled)):
        raise ValueError(f"`text` must hold something to speak (letters or digits), got {text!r}.")
    # As the reference joins them (flexicodec 0.1.2, ar_tts/modeling_artts.py, line 1112).
    return spell(f"{reference_text}, {text}") if reference_text else spelled


def _spell_english(text: str) -> str:
    return phonemize(spell_numbers(text))


def phonemize(text: str) -> str:
    """
    English text in the phonemes of the released model: espeak-ng's `en-us` IPA without stress, with
    punctuation and with `PHONEME_SUBSTITUTIONS`.

    Uses the espeak-ng that phonemizer finds (`PHONEMIZER_ESPEAK_LIBRARY`, or the system's), or the
    one inside espeakng-loader if none loads. Versions differ now and then: in "10:45", 1.51 gives
    `fo~rτi` with a Latin o, 1.52 with a Greek one.

    Args:
        text: English text. `^` is read as an apostrophe (flexicodec 0.1.2,
            ar_tts/utils/g2p_phonemizer.py, line 44). Versions of phonemizer read digits in
            different ways: write them in words first, as `prepare_text` does.

    Returns:
        The phonemes; an empty string when nothing in `text` makes a sound.

    Raises:
        ImportError: The `[tts]` extra is not installed.
        RuntimeError: `PHONEMIZER_ESPEAK_LIBRARY` names a library that does not load.
    """
    # A C string ends at the first NUL.
    text = text.replace("^", "'").replace("\0", " ")
    with _ESPEAK_LOCK:
        lines = _espeak().phonemize([text])
    return "".join(lines).strip().translate(_SUBSTITUTE)


def language_token_id(tokenizer: Any, language: str) -> int:
    """Id of the token `<|language|>`.

    Args:
        tokenizer: A tokenizer with Whisper's multilingual vocabulary.
        language: Whisper's code, such as `"en"` or `"zh"`.

    Raises:
        ValueError: The tokenizer has no such token. The message lists those that it has.
    """
    # Not above: the runner of exported models has the rest of this file, but neither transformers nor PyTorch.
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

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
            "English phonemes need phonemizer and espeak-ng: `pip install phonemizer espeakng-loader`. "
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


def split_text(text: str, max_length: int = MAX_PIECE_LENGTH, language: str = "en") -> list[str]:
    """
    Split a text into pieces to speak: sentences, the long ones cut at clauses, the short ones
    together with others.

    No character is lost but white space, of which a single space remains inside a piece. Every
    piece has a letter or a digit if the text has one.

    Args:
        text: Any text. An empty line ends a sentence, as a paragraph does; a single line break is a
            space.
        max_length: How long a piece may be, in characters; an East Asian one counts for three,
            since it takes that much longer to say. Only marks without a letter or digit of their
            own can make a piece longer.
        language: Whisper's code of the text's language. It decides what a full stop after a number
            means.

    Returns:
        The pieces, in order; an empty list for a text of white space.

    Raises:
        ValueError: `max_length` is less than 12.
    """
    if not isinstance(text, str):
        raise TypeError(f"`text` must be a string, got {text!r} ({type(text).__name__}).")
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise TypeError(f"`max_length` must be a whole number of characters, got {max_length!r}.")
    if max_length < 12:
        raise ValueError(f"`max_length` must be at least 12 characters, got {max_length}.")
    ends = [(match.start(), match.end()) for match in _PARAGRAPH_END.finditer(text)]
    spans: list[Span] = []
    for start, end in zip([0, *(end for _, end in ends)], [*(start for start, _ in ends), len(text)], strict=True):
        parts = [
            part
            for sentence in _sentences(text, (start, end), language)
            for part in _cut(text, _stripped(text, sentence), max_length)
        ]
        spans += _with_neighbours(text, parts, max_length)
    return [" ".join(text[start:end].split()) for start, end in _with_marks(text, spans)]


def _sentences(text: str, paragraph: Span, language: str) -> Iterator[Span]:
    start, end = paragraph
    for match in _SENTENCE_END.finditer(text, start, end):
        if _ends_sentence(text[start : match.start()], match[1], text[match.end() : end][:_LOOK_AHEAD], language):
            yield start, match.end()
            start = match.end()
    yield start, end


def _ends_sentence(before: str, marks: str, following: str, language: str) -> bool:
    if any(mark in _WIDE_ENDS for mark in marks) or not following:
        return True
    if not following[0].isspace():
        return False
    first = next((character for character in following if character.isalnum()), "")
    if first.islower():  # He asked "Why?" and left. Wait... what?
        return False
    if marks != ".":
        return True
    words = before.split()
    word = words[-1].lstrip("\"'“‘«([„¿¡").lower() if words else ""
    if word.isdigit():
        # "It was in 1815. He left." has two sentences even where ordinals have a full stop.
        return language not in _ORDINAL_STOP.split() or len(word) > 2
    if word in _NUMBERED.split():
        return not first.isdigit()
    has_stop = "." in word and any(map(str.isalpha, word))  # "e.g.", but not "$9.99."
    return not (word in _ABBREVIATIONS.split() or len(word) == 1 or has_stop)


def _length(text: str, span: Span) -> int:
    return sum(3 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text[slice(*span)])


def _stripped(text: str, span: Span) -> Span:
    start, end = span
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())


def _cut(text: str, sentence: Span, max_length: int) -> list[Span]:
    """
    Nothing, or halves, quarters ... until each fits: cut at a clause unless one is much shorter,
    else at a word.
    """
    start, end = sentence
    if start >= end:
        return []
    if _length(text, sentence) <= max_length:
        return [sentence]
    quarter = (end - start) // 4
    clauses = [match.end() for match in _CLAUSE_END.finditer(text, start, end)]
    places = (
        [place for place in clauses if start + quarter <= place <= end - quarter]
        or [place for place in range(start + 1, end) if text[place].isspace()]
        or [place for place in range(start + 1, end) if _can_cut(text, place)]
        or [end]
    )
    place = min(places, key=lambda place: abs(place - (start + end) / 2))
    if place == end:
        return [sentence]
    halves = ((start, place), (place, end))
    return [part for half in halves for part in _cut(text, _stripped(text, half), max_length)]


def _can_cut(text: str, place: int) -> bool:
    if unicodedata.combining(text[place]):
        return False
    return not any(re.compile(_INSIDE_NUMBER).match(text, mark) for mark in (place - 1, place))


def _with_neighbours(text: str, parts: list[Span], max_length: int) -> list[Span]:
    """
    A part shorter than a quarter of a piece goes with the next, or the last: a lone word is spoken
    badly.
    """
    spans: list[Span] = []
    for index, part in enumerate(parts):
        joined = (spans[-1][0], part[1]) if spans else part
        candidates = [*spans[-1:], part] if index == len(parts) - 1 else spans[-1:]
        is_short = any(_length(text, span) < max_length // 4 for span in candidates)
        if spans and is_short and _length(text, joined) <= max_length:
            spans[-1] = joined
        else:
            spans.append(part)
    return spans


def _with_marks(text: str, spans: list[Span]) -> list[Span]:
    """
    What cannot be spoken alone, such as a line of asterisks, goes with what is before it, or with
    the first piece.
    """
    result: list[Span] = []
    for span in spans:
        if result and not (_speakable(text, span) and _speakable(text, result[-1])):
            result[-1] = (result[-1][0], span[1])
        else:
            result.append(span)
    return result


def _speakable(text: str, span: Span) -> bool:
    return any(map(str.isalnum, text[slice(*span)]))


__all__ = [
    "MAX_PIECE_LENGTH",
    "PHONEME_SUBSTITUTIONS",
    "encode_text",
    "language_token_id",
    "phonemize",
    "prepare_text",
    "split_text",
]
