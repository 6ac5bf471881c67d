import json

import pytest
from transformers import AutoTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from flexicodec_hf.conversion.tokenizer import build_tokenizer
from whisper_files import read_merges, read_vocabulary, write_tokenizer_json


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(write_tokenizer_json(tmp_path_factory.mktemp("whisper")))


def test_ids_match_the_reference(tokenizer, golden):
    for sentence in golden("text").spec["sentences"]:
        assert tokenizer(sentence["g2p"])["input_ids"] == sentence["ids_g2p_en"]
        assert tokenizer(sentence["text"])["input_ids"] == sentence["ids_nog2p_en"]


def test_table_of_special_tokens(tokenizer, golden):
    spec = golden("text").spec
    assert len(tokenizer) == spec["n_vocab"]
    assert tokenizer.convert_tokens_to_ids("<|startoftranscript|>") == spec["sot"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == spec["eot"]
    for language, index in spec["language_tokens"].items():
        assert tokenizer.convert_tokens_to_ids(f"<|{language}|>") == index
    vocabulary = tokenizer.get_vocab()
    assert [code for code in LANGUAGES if f"<|{code}|>" in vocabulary] == list(LANGUAGES)[: spec["num_languages"]]
    assert tokenizer.convert_ids_to_tokens([50358, 50363, 50364, 51864]) == [
        "<|translate|>",
        "<|notimestamps|>",
        "<|0.00|>",
        "<|30.00|>",
    ]


@pytest.mark.parametrize("newer_merges", [False, True], ids=["string merges", "pair merges"])
def test_every_kind_of_source_gives_the_same_tokenizer(tokenizer, tmp_path, newer_merges):
    # large-v3 has a 100th language, which moves `<|translate|>` and all after it.
    merges = [merge.split(" ") for merge in read_merges()] if newer_merges else read_merges()
    path = write_tokenizer_json(tmp_path, languages=tuple(LANGUAGES), merges=merges)
    for source in (path, tmp_path, str(tmp_path)):
        other = build_tokenizer(source)
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other("two words, 你好").input_ids == tokenizer("two words, 你好").input_ids


def test_published_files_lose_a_merge_that_is_put_back(tokenizer):
    """ " t" is id 256, the first token after the bytes; without the merge it falls apart into 220 and 83."""
    assert tokenizer(" t", add_special_tokens=False).input_ids == [256]


def test_saved_tokenizer_loads_through_auto_tokenizer(tokenizer, golden, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for sentence in golden("text").spec["sentences"]:
        assert loaded(sentence["g2p"])["input_ids"] == sentence["ids_g2p_en"]
    batch = loaded(["A", "A longer one"], padding=True)
    assert batch.input_ids[0] == [50257, 50257, 50259, 32]
    assert batch.attention_mask[0] == [0, 0, 1, 1]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert loaded.decode(batch.input_ids[1], skip_special_tokens=True) == "A longer one"


def test_special_tokens_in_a_text_stay_text(tokenizer):
    text = "<|endoftext|><|fr|><|0.00|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert max(ids) < 50257
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|fr|>", add_special_tokens=False, split_special_tokens=False).input_ids == [50265]


def other_vocabulary():
    """Two tokens of the probe changed places."""
    vocabulary = read_vocabulary()
    vocabulary["Ġwords"], vocabulary["Ġtu"] = vocabulary["Ġtu"], vocabulary["Ġwords"]
    return vocabulary


def english_vocabulary():
    """As large as GPT-2's: the end of text comes one id earlier."""
    return {token: index for token, index in read_vocabulary().items() if index < 50256} | {"<|endoftext|>": 50256}


@pytest.mark.parametrize(
    "model",
    [
        {"vocab": english_vocabulary()},
        {"vocab": other_vocabulary()},
        {"vocab": {token: index for token, index in read_vocabulary().items() if index < 40000}},
        {"merges": read_merges()[:20000]},
        {"merges": [*read_merges(), "not inside"]},
    ],
    ids=["English-only", "other ids", "half a vocabulary", "half the merges", "unknown merge"],
)
def test_other_vocabularies_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"does not hold the multilingual vocabulary of Whisper.*English-only"):
        build_tokenizer(write_tokenizer_json(tmp_path, **model))


def test_other_files_are_refused(tmp_path):
    path = write_tokenizer_json(tmp_path, type="Unigram")
    with pytest.raises(ValueError, match=r"must be a tokenizer\.json that holds a BPE: it holds 'Unigram'"):
        build_tokenizer(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a tokenizer\.json that holds a BPE"):
        build_tokenizer(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"holds a BPE: Expecting property name"):
        build_tokenizer(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(OSError, match=r"does not appear to have a file named tokenizer\.json"):
        build_tokenizer(tmp_path)
    with pytest.raises(OSError, match="missing-directory"):
        build_tokenizer(tmp_path / "missing-directory")
