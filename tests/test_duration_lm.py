import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, GPT2Config, LlamaConfig, Qwen2Config, T5Config

from flexicodec_hf.speech_lm import FlexiCodecSpeechVocabulary, SpeechTextCollator, duration_lm_class
from test_collators import make, make_rows


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(vocabulary: FlexiCodecSpeechVocabulary, device: str, config_class: type = LlamaConfig):
    torch.manual_seed(0)
    config = config_class(vocab_size=len(vocabulary.tokenizer), **SIZES)
    return duration_lm_class(config, vocabulary)(config).to(device).eval()


@pytest.fixture(params=[LlamaConfig, Qwen2Config])
def model_and_vocabulary(request, device):
    vocabulary = make()
    return build(vocabulary, device, request.param), vocabulary


def test_loss_is_that_of_both_heads(model_and_vocabulary, device):
    model, vocabulary = model_and_vocabulary
    batch = SpeechTextCollator(vocabulary)(make_rows(vocabulary))
    batch = {name: value.to(device) for name, value in batch.items()}
    output = model(**batch)
    tokens = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    is_code = batch["duration_labels"] > 0
    durations = F.cross_entropy(
        output.duration_logits[is_code], batch["duration_labels"][is_code] - 1, reduction="sum"
    )
    num_labels = (batch["labels"] != -100).sum()
    torch.testing.assert_close(output.loss, (tokens + durations) / num_labels)
    torch.testing.assert_close(model(**batch, num_items_in_batch=num_labels * 2).loss, output.loss / 2)
    output.loss.backward()
    assert model.duration_embedding.weight.grad.abs().sum() > 0
    assert model.duration_head.weight.grad.abs().sum() > 0


def test_a_duration_is_seen_after_its_token(model_and_vocabulary, device):
    """The duration of a token changes what follows its token, and nothing at it or before: there it is predicted."""
    model, vocabulary = model_and_vocabulary
    stream = vocabulary.encode([[1, 2, 3, 4]], [1, 2, 3, 4])
    batch = {name: value[None].to(device) for name, value in stream.items()}
    before = model(**batch)
    batch["token_lengths"][0, 2] = 8
    after = model(**batch)
    for name in ("logits", "duration_logits"):
        torch.testing.assert_close(after[name][:, :3], before[name][:, :3])
        assert not torch.allclose(after[name][:, 3:], before[name][:, 3:], atol=1e-3)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generates_durations_beside_tokens(model_and_vocabulary, device, use_cache):
    """Greedy generation is what one forward over its result says; so the durations went where training puts them."""
    model, vocabulary = model_and_vocabulary
    prompts = [
        vocabulary.join(["hello", vocabulary.encode([[1, 2, 3]], [1, 2, 8], markers=False)]),
        vocabulary.encode([[5]], [4], markers=False),
    ]
    prompt = {name: value.to(device) for name, value in vocabulary.pad(prompts, padding_side="left").items()}
    # Codes alone, so that there are durations to speak of.
    codes = torch.arange(vocabulary.first_code_id, vocabulary.first_code_id + vocabulary.codebook_size)
    others = [[i] for i in range(len(vocabulary.tokenizer)) if i not in set(codes.tolist())]
    output = model.generate(
        **prompt, max_new_tokens=10, return_dict_in_generate=True, use_cache=use_cache, bad_words_ids=others,
        do_sample=False,
    )  # fmt: skip
    length = prompt["input_ids"].shape[1]
    mask = F.pad(prompt["attention_mask"], (0, 10), value=1)
    teacher = model(input_ids=output.sequences, token_lengths=output.token_lengths, attention_mask=mask)
    logits = teacher.logits[:, length - 1 : -1].masked_fill(
        ~model.is_code(torch.arange(teacher.logits.shape[-1], device=device)), -1e9
    )
    assert torch.equal(logits.argmax(-1), output.sequences[:, length:])
    durations = teacher.duration_logits.argmax(dim=-1) + 1
    assert torch.equal(output.token_lengths[:, length:-1], durations[:, length:-1])
    assert torch.equal(output.token_lengths[:, :length], prompt["token_lengths"])
    assert (output.token_lengths[:, -1] == 0).all()  # drawn, but never read

    whole = vocabulary.repair(output.sequences[1].cpu(), output.token_lengths[1].cpu())
    codes, lengths = vocabulary.decode(**whole)
    assert codes.shape == (1, 10) and lengths[0] == 4


def test_durations_are_drawn_on_request(device):
    vocabulary = make()
    model = build(vocabulary, device)
    prompt = {
        name: value[None].to(device) for name, value in vocabulary.encode([[1, 2]], [1, 2], markers=False).items()
    }
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    others = [[i] for i in range(vocabulary.first_code_id)]
    settings = {"max_new_tokens": 20, "do_sample": True, "return_dict_in_generate": True, "bad_words_ids": others}
    torch.manual_seed(0)
    likeliest = model.generate(**prompt, **settings)
    torch.manual_seed(0)
    coldest = model.generate(**prompt, **settings, duration_top_k=0, duration_temperature=1e-3)
    assert likeliest.sequences.shape == coldest.sequences.shape
    drawn = {
        tuple(
            model.generate(**prompt, **settings, duration_top_k=0, duration_temperature=5.0).token_lengths[0].tolist()
        )
        for _ in range(3)
    }
    assert len(drawn) == 3
    assert isinstance(model.generate(**prompt, max_new_tokens=2), torch.Tensor)
    with pytest.raises(ValueError, match="`token_lengths` is missing"):
        model.generate(prompt["input_ids"])


@pytest.mark.parametrize("duration_top_k", [0, 1, 3])
def test_greedy_durations_are_the_most_likely_for_every_top_k(device, duration_top_k):
    vocabulary = make()
    model = build(vocabulary, device)
    prompt = vocabulary.pad([vocabulary.encode([[1, 2]], [1, 2], markers=False)], padding_side="left")
    prompt = {name: value.to(device) for name, value in prompt.items()}
    others = [[i] for i in range(vocabulary.first_code_id)]
    settings = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "bad_words_ids": others}
    expected = model.generate(**prompt, **settings)
    assert (expected.token_lengths[:, :-1] > 0).all()
    for seed in range(6):
        torch.manual_seed(seed)
        output = model.generate(**prompt, **settings, duration_top_k=duration_top_k, duration_temperature=5.0)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.token_lengths, expected.token_lengths)


def test_with_generators_a_row_is_the_same_in_any_batch(device):
    vocabulary = make()
    model = build(vocabulary, device)
    clips = [vocabulary.encode([codes], [1] * len(codes), markers=False) for codes in ([1, 2], [3])]
    settings = {"max_new_tokens": 8, "do_sample": True, "duration_top_k": 0, "return_dict_in_generate": True}

    def generate(streams, *seeds):
        prompt = {name: value.to(device) for name, value in vocabulary.pad(streams, padding_side="left").items()}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        output = model.generate(**prompt, **settings, generator=generators)
        return output.sequences[:, -8:], output.token_lengths[:, -8:]

    together = generate(clips, 1, 2)
    for row in range(2):
        for both, alone in zip(together, generate(clips[row : row + 1], row + 1), strict=True):
            assert torch.equal(both[row], alone[0])


def test_saves_and_loads(model_and_vocabulary, device, tmp_path):
    model, vocabulary = model_and_vocabulary
    model.save_pretrained(tmp_path)
    loaded = duration_lm_class(AutoConfig.from_pretrained(tmp_path)).from_pretrained(tmp_path).to(device)
    assert type(loaded) is type(model)
    batch = {name: value[None].to(device) for name, value in vocabulary.encode([[1, 2]], [3, 4]).items()}
    torch.testing.assert_close(loaded(**batch).duration_logits, model(**batch).duration_logits)


def test_wrong_configurations_are_refused():
    vocabulary = make()
    with pytest.raises(ValueError, match="`layout` must be 'parallel', got 'joint'"):
        duration_lm_class(LlamaConfig(), make("joint"))
    with pytest.raises(ValueError, match="must belong to a causal language model, got a T5Config"):
        duration_lm_class(T5Config(), vocabulary)
    with pytest.raises(ValueError, match="lacks `flexicodec_speech`"):
        duration_lm_class(LlamaConfig())(LlamaConfig(vocab_size=10, **SIZES))


def test_any_family_of_causal_language_models(device):
    vocabulary = make()
    config = GPT2Config(vocab_size=len(vocabulary.tokenizer), n_embd=16, n_layer=1, n_head=2)
    model = duration_lm_class(config, vocabulary)(config).to(device)
    batch = SpeechTextCollator(vocabulary)(make_rows(vocabulary))
    assert model(**{name: value.to(device) for name, value in batch.items()}).loss.isfinite()
