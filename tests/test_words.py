"""The words of a text in a recording, with a stand-in for CTranslate2."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import byte_tokenizer
from flexicodec_hf.data.files import DataError
from flexicodec_hf.serving.words import Word, load_aligner


class Whisper:
    """Hears 0.1 s of speech for each token, after half a second of silence."""

    n_mels = 80
    is_multilingual = True

    def __init__(self, directory, compute_type):
        pass

    def encode(self, features):
        assert features.shape == (1, 80, 3000)
        return features

    def detect_language(self, heard):
        return [[("<|en|>", 0.9), ("<|de|>", 0.1)]]

    def align(self, heard, start, text_tokens, num_frames):
        (tokens,) = text_tokens
        self.asked = start, num_frames
        Whisper.last = self
        moments = [(0, 25)] + [(token, 25 + 5 * token + moment) for token in range(len(tokens)) for moment in range(5)]
        return [SimpleNamespace(alignments=[*moments, (len(tokens), 25 + 5 * len(tokens))])]


@pytest.fixture
def align(tmp_path, monkeypatch):
    module = SimpleNamespace(
        models=SimpleNamespace(Whisper=Whisper), StorageView=SimpleNamespace(from_array=lambda array: array)
    )
    monkeypatch.setitem(sys.modules, "ctranslate2", module)
    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.add_special_tokens(["<|startoftranscript|>", "<|transcribe|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return load_aligner(str(tmp_path))


def test_words_get_the_moments_of_their_tokens(align):
    words = align(np.zeros(32_000, dtype=np.float32), "Good  morning,\nunbelievableness!")
    assert [word.text for word in words] == ["Good", "morning,", "unbelievableness!"]
    assert words[0] == Word("Good", 0.5, 1.0)  # with the space before it, five bytes
    for word, following in itertools.pairwise(words):
        assert word.start_s < word.end_s == following.start_s
    start, num_frames = Whisper.last.asked
    assert start == [260, 257, 261]  # <|startoftranscript|><|en|><|transcribe|>
    assert num_frames == 200


def test_scripts_without_spaces_have_a_word_for_each_character(align):
    assert [word.text for word in align(np.zeros(16_000), "你好 ok ですか")] == ["你", "好", "ok", "で", "す", "か"]


def test_what_is_too_long_is_refused_in_words(align):
    with pytest.raises(ValueError, match=r"up to 30 s of speech, got 31 s and 2 words"):
        align(np.zeros(31 * 16_000), "Good morning")
    with pytest.raises(ValueError, match="take a shorter recording, or leave its words out"):
        align(np.zeros(16_000), "word " * 500)


def test_what_cannot_be_loaded_is_said(tmp_path, monkeypatch, align):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"no Whisper in CTranslate2's format with a tokenizer\.json"):
        load_aligner(str(tmp_path))
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(DataError, match="pip install ctranslate2"):
        load_aligner(str(tmp_path))
