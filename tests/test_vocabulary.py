import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import AUDIO, byte_tokenizer
from flexicodec_hf import FlexiCodecFeatureExtractor, FlexiCodecModel
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.speech_lm import FlexiCodecSpeechVocabulary, MalformedSpeechError


SETTINGS = {
    "separate": {"layout": "separate"},
    "joint": {"layout": "joint"},
    "parallel": {"layout": "parallel"},
    "separate-flattened": {"layout": "separate", "num_quantizers": 3, "acoustic_layout": "flattened"},
    "joint-flattened": {"layout": "joint", "num_quantizers": 4, "acoustic_layout": "flattened"},
    "parallel-flattened": {"layout": "parallel", "num_quantizers": 3, "acoustic_layout": "flattened"},
    "joint-delay": {"layout": "joint", "num_quantizers": 3},
    "parallel-delay": {"layout": "parallel", "num_quantizers": 4},
}
SIZES = {"codebook_size": 50, "acoustic_codebook_size": 20, "max_frames_per_token": 8}


def make(name: str, **sizes: int) -> FlexiCodecSpeechVocabulary:
    return FlexiCodecSpeechVocabulary(byte_tokenizer(), **SETTINGS[name], **SIZES | sizes)


def draw(vocabulary: FlexiCodecSpeechVocabulary, rng: random.Random, num_tokens: int, device: str = "cpu"):
    """Random codes and durations."""
    sizes = [vocabulary.codebook_size] + [vocabulary.acoustic_codebook_size] * (vocabulary.num_quantizers - 1)
    codes = [[rng.randrange(size) for _ in range(num_tokens)] for size in sizes]
    lengths = [rng.randint(1, vocabulary.max_frames_per_token) for _ in range(num_tokens)]
    codes = torch.tensor(codes, device=device, dtype=torch.long)
    return codes, torch.tensor(lengths, device=device, dtype=torch.long)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_round_trip_of_random_sequences(name, device):
    vocabulary = make(name)
    rng = random.Random(name)
    for num_tokens in (0, 1, 2, *(rng.randint(3, 40) for _ in range(10))):
        codes, lengths = draw(vocabulary, rng, num_tokens, device)
        for markers in (True, False):
            stream = vocabulary.encode(codes, lengths, markers=markers)
            assert stream["input_ids"].device.type == device
            assert_same(vocabulary.decode(**stream), (codes, lengths))
        prompt = vocabulary.encode_prompt(codes, lengths)
        assert (
            prompt["input_ids"].tolist()
            == vocabulary.encode(codes, lengths)["input_ids"][: len(prompt["input_ids"])].tolist()
        )
        assert (
            vocabulary.is_speech(prompt["input_ids"]).all()
            and vocabulary.is_code(prompt["input_ids"]).sum() == num_tokens
        )
        # Repair changes nothing that is whole, and puts the markers where they are missing.
        repaired = vocabulary.repair(**stream)
        assert_same(repaired.values(), vocabulary.encode(codes, lengths).values())


@pytest.mark.parametrize("name", SETTINGS)
def test_text_and_speech_come_apart(name):
    vocabulary = make(name)
    rng = random.Random(name)
    clips = [draw(vocabulary, rng, num_tokens) for num_tokens in (5, 1, 9)]
    parts = []
    for index, clip in enumerate(clips):
        parts += [f"Turn {index}: ", vocabulary.encode(*clip)]
    stream = vocabulary.join([*parts, "bye"])
    spans = vocabulary.speech_spans(stream["input_ids"])
    assert len(spans) == 3
    for span, clip in zip(spans, clips, strict=True):
        assert_same(vocabulary.decode(**{key: value[..., span] for key, value in stream.items()}), clip)

    assert vocabulary.speech_spans(vocabulary.join(["no speech"])["input_ids"]) == []
    # Speech that is not closed ends where the next begins, or with the stream.
    opened = vocabulary.join(
        [{key: value[..., :-1] for key, value in vocabulary.encode(*clip).items()} for clip in clips]
    )
    first, second, third = vocabulary.speech_spans(opened["input_ids"])
    assert (first.start, first.stop, second.stop, third.stop) == (
        0,
        second.start,
        third.start,
        len(opened["input_ids"]),
    )

    text = vocabulary.tokenizer.decode(stream["input_ids"], skip_special_tokens=True)
    assert text == "Turn 0: Turn 1: Turn 2: bye"
    # The names of the tokens are themselves text of the tokenizer.
    names = vocabulary.tokenizer.decode(stream["input_ids"])
    assert vocabulary.tokenizer(names)["input_ids"] == stream["input_ids"].tolist()


def test_streams_have_the_documented_ids():
    codes, lengths = [[17, 5], [3, 4], [6, 7]], [3, 1]
    names = {}
    for name in SETTINGS:
        vocabulary = make(name, codebook_size=20)
        stream = vocabulary.encode(codes * 2, lengths)
        names[name] = "".join(vocabulary.tokenizer.convert_ids_to_tokens(stream["input_ids"].tolist()))
        if name == "parallel-delay":
            assert stream["token_lengths"].tolist() == [0, 3, 1, 0, 0, 0, 0]
            assert stream["acoustic_codes"].tolist() == [
                [20, 20, 3, 4, 20, 20, 20],
                [20, 20, 20, 6, 7, 20, 20],
                [20, 20, 20, 20, 17, 5, 20],
            ]
    assert names["separate"] == "<|speech|><|s_17|><|d_3|><|s_5|><|d_1|><|/speech|>"
    assert names["joint"] == "<|speech|><|s_17_3|><|s_5_1|><|/speech|>"
    assert names["parallel"] == "<|speech|><|s_17|><|s_5|><|/speech|>"
    assert names["parallel-delay"] == "<|speech|><|s_17|><|s_5|>" + 3 * "<|speech_fill|>" + "<|/speech|>"
    first, second = "<|s_17|><|d_3|><|a1_3|><|a2_6|>", "<|s_5|><|d_1|><|a1_4|><|a2_7|>"
    assert names["separate-flattened"] == f"<|speech|>{first}{second}<|/speech|>"


def test_renders_what_a_person_reads():
    codes, lengths = [[17, 5], [3, 4], [6, 7]], [3, 1]
    for name in ("separate", "joint", "parallel"):
        vocabulary = make(name)
        stream = vocabulary.join(["Say: ", vocabulary.encode(codes, lengths), " so"])
        assert vocabulary.render(**stream) == "Say: <|speech|> 17×3 5×1 <|/speech|> so"
    vocabulary = make("separate-flattened")
    stream = vocabulary.encode(codes, lengths)
    assert vocabulary.render(**stream) == "<|speech|> 17×3/3/6 5×1/4/7 <|/speech|>"
    assert vocabulary.render(stream["input_ids"][1:4]) == " 17×3/3"  # malformed, and still readable
    vocabulary = make("joint-delay")
    assert vocabulary.render(**vocabulary.encode(codes, lengths)) == (
        "<|speech|> 17×3/-/- 5×1/3/- ·/4/6 ·/-/7 <|/speech|>"
    )


def test_real_tokens_make_the_round_trip(codec_dir, device):
    codec = FlexiCodecModel.from_pretrained(codec_dir()).to(device)
    feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(codec_dir())
    audio = read_audio(AUDIO / "librivox_austen_0880.flac", 16_000).waveform
    inputs = feature_extractor(audio, sampling_rate=16_000, return_tensors="pt").to(device)
    encoded = codec.encode(**inputs, target_frame_rate=6.25)
    for layout, acoustic_layout in (("separate", "flattened"), ("joint", "delay"), ("parallel", "delay")):
        vocabulary = FlexiCodecSpeechVocabulary.for_codec(
            byte_tokenizer(), codec.config, layout, num_quantizers=3, acoustic_layout=acoustic_layout
        )
        stream = vocabulary.encode(encoded.audio_codes[0], encoded.token_lengths[0])
        codes, lengths = vocabulary.decode(**stream)
        assert_same((codes, lengths), (encoded.audio_codes[0, :3], encoded.token_lengths[0]))
    expected = codec.decode(encoded.audio_codes[:, :3], encoded.token_lengths).audio_values
    torch.testing.assert_close(codec.decode(codes[None], lengths[None]).audio_values, expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_fault_is_found_where_it_is(name):
    """One id of a good stream is changed to that of another kind: the fault is there, and repair gets around it."""
    vocabulary = make(name)
    rng = random.Random(name)
    text_id = vocabulary.tokenizer("x")["input_ids"][0]
    for _ in range(30):
        codes, lengths = draw(vocabulary, rng, rng.randint(1, 12))
        stream = vocabulary.encode(codes, lengths)
        position = rng.randrange(1, len(stream["input_ids"]))
        ids = stream["input_ids"].clone()
        ids[position] = text_id
        with pytest.raises(MalformedSpeechError, match=f"at position {position}: expected .*, got 'x'") as error:
            vocabulary.decode(**stream | {"input_ids": ids})
        assert error.value.position == position
        repaired, repaired_lengths = vocabulary.decode(**vocabulary.repair(**stream | {"input_ids": ids}))
        lost = codes.shape[1] - repaired.shape[1]
        assert lost in (0, 1) and len(repaired_lengths) == repaired.shape[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_repair_keeps_every_whole_token_of_what_was_cut_off(name):
    vocabulary = make(name)
    rng = random.Random(name)
    codes, lengths = draw(vocabulary, rng, 6)
    stream = vocabulary.encode(codes, lengths)
    total = len(stream["input_ids"])
    size = (total - 2) // 6 if not vocabulary.is_delayed else 1
    for kept in range(1, total):
        cut = {key: value[..., :kept] for key, value in stream.items()}
        with pytest.raises(MalformedSpeechError, match="got the end"):
            vocabulary.decode(**cut)
        delay = vocabulary.num_quantizers - 1 if vocabulary.is_delayed else 0
        whole = min(max((kept - 1 - delay) // size, 0), 6)
        assert_same(vocabulary.decode(**vocabulary.repair(**cut)), (codes[:, :whole], lengths[:whole]))


def test_malformed_streams_are_refused():
    vocabulary = make("separate")
    start, end = (vocabulary.tokenizer.convert_tokens_to_ids(token) for token in ("<|speech|>", "<|/speech|>"))
    code, duration = vocabulary.encode([[7]], [2], markers=False)["input_ids"].tolist()
    text = vocabulary.tokenizer("x")["input_ids"][0]
    for ids, position, message in (
        ([start, code, code, duration, end], 2, "expected a duration, got '<|s_7|>'"),
        ([start, duration, end], 1, "expected a code, got '<|d_2|>'"),
        ([start, code, end], 2, "expected a duration, got '<|/speech|>'"),
        ([start, code, duration], 3, "expected <|/speech|>, got the end"),
        ([code, duration, end], 2, "expected nothing more, got '<|/speech|>'"),
        ([start, code, duration, end, text], 4, "expected nothing more, got 'x'"),
        ([code], 1, "expected a duration, got the end"),
        ([start, code, duration, start], 3, "expected a code, got '<|speech|>'"),
        ([start, code, 100_000, end], 2, "expected a duration, got the id 100000"),
    ):
        with pytest.raises(MalformedSpeechError) as error:
            vocabulary.decode(torch.tensor(ids))
        assert error.value.position == position
        assert str(error.value) == f"Malformed speech at position {position}: {message}."
    # All that is whole, up to the end of speech.
    ids = torch.tensor([start, code, code, duration, text, duration, code, duration, end, code, duration])
    assert vocabulary.decode(vocabulary.repair(ids)["input_ids"])[0].tolist() == [[7, 7]]

    vocabulary = make("parallel-delay")
    stream = vocabulary.encode(torch.ones(4, 3, dtype=torch.long), [1, 2, 8])
    for position, wrong in ((1, 0), (2, 9), (0, 1)):
        lengths = stream["token_lengths"].clone()
        lengths[position] = wrong
        with pytest.raises(
            MalformedSpeechError, match=rf"position {position}: expected `token_lengths` .*, got {wrong}\."
        ):
            vocabulary.decode(**stream | {"token_lengths": lengths})
    for row, position, wrong in ((0, 2, 20), (2, 6, 20), (2, 3, 5), (1, 4, -1)):
        codes = stream["acoustic_codes"].clone()
        codes[row, position] = wrong
        with pytest.raises(
            MalformedSpeechError, match=f"position {position}: expected `acoustic_codes` to be 0 to 19"
        ):
            vocabulary.decode(**stream | {"acoustic_codes": codes})


def test_saves_and_loads_with_the_tokenizer(tmp_path):
    vocabulary = make("parallel-delay")
    vocabulary.save_pretrained(tmp_path / "one")
    loaded = FlexiCodecSpeechVocabulary.from_pretrained(tmp_path / "one")
    codes, lengths = draw(vocabulary, random.Random(0), 7)
    stream = vocabulary.encode(codes, lengths)
    assert_same(loaded.encode(codes, lengths).values(), stream.values())
    # Whoever saves the tokenizer, `Trainer` say, saves the vocabulary.
    AutoTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = FlexiCodecSpeechVocabulary.from_pretrained(tmp_path / "two")
    assert again.layout == "parallel" and again.num_quantizers == 4
    assert_same(again.decode(**stream), (codes, lengths))
    assert len(again.tokenizer) == len(vocabulary.tokenizer)

    byte_tokenizer().save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="has no speech vocabulary"):
        FlexiCodecSpeechVocabulary.from_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="already has another speech vocabulary"):
        FlexiCodecSpeechVocabulary(again.tokenizer, layout="separate")


def test_pushes_with_the_tokenizer(monkeypatch):
    vocabulary = make("separate")
    pushed = []
    monkeypatch.setattr(
        type(vocabulary.tokenizer), "push_to_hub", lambda self, repo_id, **kwargs: pushed.append(repo_id)
    )
    vocabulary.push_to_hub("me/speech")
    assert pushed == ["me/speech"]


def test_embeddings_grow_and_never_shrink(device):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = make("separate")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=260, **sizes)).to(device)
    before = model.get_input_embeddings().weight.detach().clone()
    vocabulary.resize_embeddings(model, pad_to_multiple_of=64)
    assert len(vocabulary.tokenizer) == 260 + 60
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 320
    assert torch.equal(model.get_input_embeddings().weight[:260], before)
    padded = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes))
    vocabulary.resize_embeddings(padded)
    assert padded.config.vocab_size == 1000


def test_a_million_tokens_make_the_round_trip(device):
    vocabulary = FlexiCodecSpeechVocabulary(byte_tokenizer(), layout="separate")
    assert len(vocabulary.tokenizer) == 260 + 2 + 32_768 + 8
    codes = torch.randint(0, 32_768, (1, 1_000_000), device=device)
    lengths = torch.randint(1, 9, (1_000_000,), device=device)
    decoded = vocabulary.decode(**vocabulary.encode(codes, lengths))
    assert_same(decoded, (codes, lengths))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layout": "both"}, "`layout` must be one of separate, joint, parallel, got 'both'"),
        ({"acoustic_layout": "none"}, "`acoustic_layout` must be one of flattened, delay, got 'none'"),
        ({"codebook_size": 0}, "`codebook_size` must be at least 1, got 0"),
        ({"layout": "separate", "num_quantizers": 2}, "needs one position for each token"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlexiCodecSpeechVocabulary(byte_tokenizer(), **arguments)


def test_tokenizers_that_do_not_fit_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|s_3|>"])
    with pytest.raises(ValueError, match=r"already has a token '<\|s_3\|>'"):
        FlexiCodecSpeechVocabulary(tokenizer, codebook_size=10)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="must be a fast one, got Slow"):
        FlexiCodecSpeechVocabulary(Slow())


def test_inputs_out_of_range_are_refused():
    vocabulary = make("parallel-delay")
    codes, lengths = draw(vocabulary, random.Random(0), 3)
    stream = vocabulary.encode(codes, lengths)
    wrong = codes.clone()
    wrong[2, 1] = 20
    for call, message in (
        (
            lambda: vocabulary.encode(codes[0], lengths),
            r"`audio_codes` must have the shape \(num_quantizers, num_tokens\)",
        ),
        (lambda: vocabulary.encode(codes[:3], lengths), "with at least 4 codebooks"),
        (
            lambda: vocabulary.encode(codes, lengths[:2]),
            r"`token_lengths` must have the shape \(num_tokens,\) = \(3,\)",
        ),
        (lambda: vocabulary.encode(codes + 100, lengths), "codebook 0 of `audio_codes` must be between 0 and 49"),
        (
            lambda: vocabulary.encode(wrong, lengths),
            r"an acoustic codebook .* between 0 and 19, got \[.*20.*\] at token 1",
        ),
        (lambda: vocabulary.encode(codes, lengths * 0), "`token_lengths` must be between 1 and 8, got 0 at token 0"),
        (lambda: vocabulary.encode(codes.float(), lengths), "`audio_codes` must be integers, got torch.float32"),
        (lambda: vocabulary.decode(stream["input_ids"]), "`token_lengths` is missing"),
        (lambda: vocabulary.decode(stream["input_ids"][None]), "pass one stream at a time"),
        (
            lambda: vocabulary.decode(**stream | {"token_lengths": lengths}),
            r"`token_lengths` must have the shape \(8,\)",
        ),
        (lambda: vocabulary.join(["a <|s_3|> b"]), "A text holds the name of a speech token"),
        (lambda: vocabulary.pad([stream], padding_side="top"), "`padding_side` must be 'left' or 'right'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    vocabulary.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        vocabulary.pad([stream])
