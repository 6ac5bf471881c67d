import copy
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
)
from whisper_files import write_vocabulary_and_merges


# What other versions of espeak-ng than the fixture's 1.51 say differently: (phonemes there, phonemes of the fixture).
CHANGES = {(1, 51): None, (1, 52): ("tεn:fο~rτi", "tεn:fo~rτi")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(write_vocabulary_and_merges(tmp_path_factory.mktemp("whisper")))


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
        if as_in_fixture(phonemize(text)) == phonemize(text):
            assert encode_text(tokenizer, text) == sentence["ids_g2p_en"]


def test_other_languages_are_plain_text(tokenizer, golden):
    for sentence in golden("text").spec["no_g2p_other_languages"]:
        assert encode_text(tokenizer, sentence["text"], sentence["language"]) == sentence["ids"]


def test_reference_text_goes_in_front():
    assert prepare_text("Hello", "de", reference_text="Guten Tag") == "Guten Tag, Hello"
    assert prepare_text("Hello", reference_text="Good day.") == phonemize("Good day., Hello")
    assert prepare_text("Hello", reference_text="") == phonemize("Hello")


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
    with pytest.raises(ImportError, match=r'pip install "flexicodec-hf\[tts\]"'):
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
    assert set(get_imports(text_flexicodec.__file__)).isdisjoint({"phonemizer", "espeakng_loader"})
