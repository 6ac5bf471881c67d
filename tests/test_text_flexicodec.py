import copy
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import WhisperTokenizer
from transformers.dynamic_module_utils import get_imports

from flexicodec_hf import text_flexicodec
from flexicodec_hf.conversion.tokenizer import build_tokenizer
from flexicodec_hf.text_flexicodec import (
    PHONEME_SUBSTITUTIONS,
    encode_text,
    language_token_id,
    phonemize,
    prepare_text,
    split_text,
)
from whisper_files import write_tokenizer_json


# What other versions of espeak-ng than the fixture's 1.51 say differently: (phonemes there, phonemes of the fixture).
CHANGES = {(1, 51): None, (1, 52): ("tεn:fο~rτi", "tεn:fo~rτi")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(write_tokenizer_json(tmp_path_factory.mktemp("whisper")))


@pytest.fixture
def fresh_espeak(monkeypatch):
    """espeak-ng is loaded anew in the test, and after it."""
    text_flexicodec._espeak.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    text_flexicodec._espeak.cache_clear()


def as_in_fixture(phonemes: str) -> str:
    version = text_flexicodec._espeak()._espeak.version[:2]
    if version not in CHANGES:
        pytest.skip(f"the fixture is known for espeak-ng {sorted(CHANGES)}, here is {version}")
    return phonemes.replace(*CHANGES[version]) if CHANGES[version] else phonemes


def test_phonemes_match_the_reference(golden):
    for sentence in golden("text").spec["sentences"]:
        assert as_in_fixture(phonemize(sentence["text"])) == sentence["g2p"]


def test_substitutions_match_the_reference(golden):
    table = golden("text").spec["shorten_sequence"]
    assert table["input"].translate(str.maketrans(PHONEME_SUBSTITUTIONS)) == table["output"]


def test_english_ids_match_the_reference(tokenizer, golden):
    for sentence in golden("text").spec["sentences"]:
        text = sentence["text"]
        assert encode_text(tokenizer, text, phonemes=False) == sentence["ids_nog2p_en"]
        phonemes = phonemize(text)
        if as_in_fixture(phonemes) == phonemes:
            ids = tokenizer(phonemes, add_special_tokens=False)["input_ids"]
            assert [language_token_id(tokenizer, "en"), *ids] == sentence["ids_g2p_en"]
        if not any(map(str.isdigit, text)):
            assert encode_text(tokenizer, text) == sentence["ids_g2p_en"]


def test_other_languages_are_plain_text(tokenizer, golden):
    for sentence in golden("text").spec["no_g2p_other_languages"]:
        assert encode_text(tokenizer, sentence["text"], sentence["language"]) == sentence["ids"]


def test_reference_text_goes_in_front():
    assert prepare_text("Hello", "de", reference_text="Guten Tag") == "Guten Tag, Hello"
    assert prepare_text("Hello", reference_text="Good day.") == phonemize("Good day., Hello")
    assert prepare_text("Hello", reference_text="") == phonemize("Hello")


def test_numbers_are_spoken_as_words():
    assert prepare_text("It costs $9.99.") == phonemize("It costs nine dollars and ninety nine cents.")
    assert prepare_text("5 km", reference_text="$3.50") == phonemize("three dollars and fifty cents, five kilometers")
    assert prepare_text("$5", phonemes=False) == "$5"
    assert prepare_text("$5", "de") == "$5"


def test_no_piece_ends_inside_a_number():
    assert split_text("It costs $9.99. Then we left the shop.", 24) == ["It costs $9.99.", "Then we left the shop."]
    assert split_text("圆周率是３．１４，大约是这样。", 45) == ["圆周率是３．１４，大约是这样。"]
    for length in range(12, 40):
        pieces = split_text("1" * 30 + "." + "2" * 30, length)
        assert not any(piece.startswith(".") or piece.endswith(".") for piece in pieces)


@pytest.mark.parametrize("text", [5, None, ["Hello"], b"Hello"])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(TypeError, match="`text` must be a string, got"):
        prepare_text(text)
    with pytest.raises(TypeError, match="`text` must be a string, got"):
        split_text(text)
    if text is not None:
        with pytest.raises(TypeError, match="`reference_text` must be a string, got"):
            prepare_text("Hello", reference_text=text)


def test_text_is_spoken_to_its_end():
    """A NUL would end the string inside espeak-ng."""
    assert phonemize("one\0two") == phonemize("one two")


def test_symbols_that_have_names_are_spoken():
    assert phonemize("%") == "pərsεnt"
    assert phonemize("...") == "..."
    assert phonemize("") == ""


def test_special_tokens_in_a_text_stay_text(tokenizer):
    assert max(encode_text(tokenizer, "<|endoftext|>", phonemes=False)[1:]) < 50257
    loose = copy.deepcopy(tokenizer)
    loose.split_special_tokens = False
    assert encode_text(loose, "<|fr|>", phonemes=False) == encode_text(tokenizer, "<|fr|>", phonemes=False)


@pytest.mark.parametrize("text", ["", "  \n", "...", "!?", "♪"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_to_say_is_refused(tokenizer, text, language):
    with pytest.raises(ValueError, match="`text` must hold something to speak"):
        encode_text(tokenizer, text, language, reference_text="Something was said")


def test_unknown_languages_are_refused(tokenizer):
    for language in ("english", "EN", "yue", "endoftext", ""):
        with pytest.raises(ValueError, match=f"`language` must be .*got '{language}'.*: en, zh, de, .*, jw, su"):
            language_token_id(tokenizer, language)
    with pytest.raises(ValueError, match="use a multilingual Whisper tokenizer"):
        language_token_id(WhisperTokenizer(), "en")


def test_phonemes_without_the_extra_say_what_to_install(tokenizer, golden, fresh_espeak):
    fresh_espeak.setitem(sys.modules, "phonemizer.backend", None)
    with pytest.raises(ImportError, match="pip install phonemizer espeakng-loader"):
        encode_text(tokenizer, "Hello")
    sentence = golden("text").spec["sentences"][0]
    assert encode_text(tokenizer, sentence["text"], phonemes=False) == sentence["ids_nog2p_en"]


def test_the_bundled_espeak_is_needed_only_where_no_other_is_found(fresh_espeak):
    loader = pytest.importorskip("espeakng_loader")
    fresh_espeak.setenv("PHONEMIZER_ESPEAK_LIBRARY", loader.get_library_path())
    fresh_espeak.setenv("PHONEMIZER_ESPEAK_DATA_PATH", loader.get_data_path())
    fresh_espeak.setitem(sys.modules, "espeakng_loader", None)
    assert phonemize("Hello") == "həloυ"


def test_a_wrong_espeak_path_is_not_passed_over(fresh_espeak):
    fresh_espeak.setenv("PHONEMIZER_ESPEAK_LIBRARY", "/nowhere/libespeak-ng.so")
    with pytest.raises(RuntimeError, match="PHONEMIZER_ESPEAK_LIBRARY=/nowhere"):
        phonemize("Hello")


def test_a_broken_system_library_gives_way_to_the_bundled_one(fresh_espeak):
    wrapper = pytest.importorskip("phonemizer.backend.espeak.wrapper").EspeakWrapper
    fresh_espeak.delenv("PHONEMIZER_ESPEAK_LIBRARY", raising=False)
    fresh_espeak.setattr(wrapper, "_ESPEAK_LIBRARY", "/nowhere/libespeak-ng.so")
    assert phonemize("Hello") == "həloυ"


def test_phonemizer_keeps_its_own_settings(fresh_espeak):
    wrapper = pytest.importorskip("phonemizer.backend.espeak.wrapper").EspeakWrapper
    settings = wrapper._ESPEAK_LIBRARY, wrapper._ESPEAK_DATA_PATH
    assert phonemize("Hello") == "həloυ"
    assert settings == (wrapper._ESPEAK_LIBRARY, wrapper._ESPEAK_DATA_PATH)


def test_threads_share_one_espeak(golden):
    texts = [sentence["text"] for sentence in golden("text").spec["sentences"]] * 20
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(phonemize, texts)) == [phonemize(text) for text in texts]


def test_remote_code_does_not_require_the_extra():
    assert set(get_imports(text_flexicodec.__file__)).isdisjoint({"phonemizer", "espeakng_loader", "num2words"})


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    ("language", "sentences"),
    [
        ("en", ["Dr. Smith paid $3.50 to Mr. J. R. Jones, on Jan. 5, at 10 a.m. sharp.", "It was dear, he said."]),
        (
            "en",
            ['He asked: "Why should I do that?" and left the room in a rage.', "“Go away now!” she cried… and wept."],
        ),
        ("en", ["It was in the summer of the year 1815.", "He came back with no. 5 of the old series."]),
        (
            "en",
            ["I told you that the answer was no.", "Version 2.0.1 is at www.example.com (for now).", "Is it good?!"],
        ),
        ("de", ["Am 3. Mai kam Hr. Meyer, z. B. mit dem Zug.", "Das war im Jahr 1815.", "Er blieb bis zum Herbst."]),
        ("fr", ["M. Dupont et Mme. Durand sont arrivés hier soir.", "« Pourquoi si tard ? »", "Personne ne le sait."]),
        ("es", ["¿Dónde vive ahora el Sr. García Márquez?", "¡Vive en la avenida principal, núm. 7 del barrio!"]),
        ("ru", ["Он живёт на ул. Ленина, в доме с садом.", "Это было в 1815 г. осенью, кажется."]),
        ("hi", ["यह पहला लंबा वाक्य है और बस।", "यह दूसरा लंबा वाक्य है और बस।"]),
        ("ar", ["كيف حالك اليوم يا صديقي العزيز؟", "أنا بخير والحمد لله رب العالمين."]),
    ],
)
def test_sentences_are_found(language, sentences):
    # A piece may be as long as the longest sentence, and no sentence is under a quarter of that.
    assert split_text(" ".join(sentences), max(map(len, sentences)), language) == sentences


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_east_asian_sentences_need_no_spaces(language):
    sentences = ["今天天气很好，我们去公园。", "“你看见他了吗？”", "他说：没有！", "那就算了吧。"]
    assert split_text("".join(sentences), 39, language) == sentences
    # 500 characters without a mark: three count as nine.
    pieces = split_text("字" * 500, 30, language)
    assert "".join(pieces) == "字" * 500 and {len(piece) for piece in pieces} <= set(range(5, 11))


def test_line_breaks_are_spaces_and_empty_lines_end_sentences():
    text = (
        "A heading without a mark\n\nA paragraph that is\nwrapped at a few\r\ncharacters, as files are.\n \t\n"
        "The end of the text"
    )
    assert split_text(text, 80) == [
        "A heading without a mark",
        "A paragraph that is wrapped at a few characters, as files are.",
        "The end of the text",
    ]


def test_long_sentences_are_cut_at_clauses_then_at_words():
    assert split_text("When the long day was over, they went home; nobody had seen them, and nobody asked.", 50) == [
        "When the long day was over, they went home;",
        "nobody had seen them, and nobody asked.",
    ]
    # A comma near an end is no place for a cut.
    assert split_text("Oh, the very long day without any pause was over at last", 40) == [
        "Oh, the very long day without",
        "any pause was over at last",
    ]
    assert split_text("a" * 100, 60) == ["a" * 50, "a" * 50]


def test_short_sentences_go_with_their_neighbors():
    assert split_text("Yes. No. I think that this is the better answer. Oh.", 60) == [
        "Yes. No. I think that this is the better answer. Oh."
    ]
    long = "I think that this is by far the better one of the two answers."
    assert split_text(f"Yes. {long} {long}", 70) == [f"Yes. {long}", long]
    assert split_text(f"{long} Oh.", 64) == [long, "Oh."]


def test_what_cannot_be_spoken_goes_with_what_can():
    assert split_text("* * *\n\nHello there, you\n\n---\n\nand you\n\n***", 24) == [
        "* * * Hello there, you ---",
        "and you ***",
    ]
    assert split_text("?!") == ["?!"]
    assert split_text(" \n\n\t ") == split_text("") == []


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_lost_and_no_piece_is_too_long(seed):
    draw = random.Random(seed)
    alphabet = [
        "a",
        "B",
        "é",
        "字",
        "。",
        ". ",
        "! ",
        "? ",
        ", ",
        "; ",
        " ",
        " ",
        "\n",
        "\n\n",
        "7",
        "“",
        "”",
        "…",
        "Dr. ",
    ]
    text = "".join(draw.choices(alphabet, k=400)) + "a"
    max_length = draw.randint(12, 80)
    pieces = split_text(text, max_length)
    assert squeezed("".join(pieces)) == squeezed(text)
    for piece in pieces:
        assert piece == piece.strip() and any(map(str.isalnum, piece))
        # Marks alone may lengthen a piece, which random text has many of.
        assert sum(3 if character == "字" else 1 for character in piece if character.isalnum()) <= max_length
    assert split_text(text, max_length) == pieces


def test_a_long_text_is_split_fast():
    sentence = "The quick brown fox jumps over the lazy dog, and then it runs away. "
    pieces = split_text(sentence * 5_000)  # a third of a million characters in one paragraph
    assert len(pieces) == 5_000 and set(pieces) == {sentence.strip()}


def test_a_piece_has_room_for_a_word():
    with pytest.raises(ValueError, match="`max_length` must be at least 12 characters, got 3"):
        split_text("text", 3)
