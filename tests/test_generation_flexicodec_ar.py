import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from conftest import assert_close
from flexicodec_hf.compatibility_flexicodec import CACHE
from flexicodec_hf.conversion import convert_ar
from flexicodec_hf.generation_flexicodec_ar import PromptVocabularyLogitsProcessor, RowSampler
from test_modeling_flexicodec_ar import fixture_model, mask_of, tiny_model  # noqa: F401


def prompts(model, device="cpu", batch_size=2, merging_threshold=0.86):
    generator = torch.Generator().manual_seed(3)

    def draw(high, size, low=0):
        return torch.randint(low, high, (batch_size, size), generator=generator).to(device)

    sizes = torch.arange(batch_size)
    masks = mask_of(7 - 2 * sizes, 7).to(device), mask_of(3 - sizes, 3).to(device)
    return model.build_inputs(draw(40, 7), masks[0], draw(50, 3), draw(9, 3, 1), masks[1], merging_threshold)


def generate(model, inputs, **kwargs):
    """Greedy, never ending by itself unless asked."""
    arguments = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "return_dict_in_generate": True}
    return model.generate(**inputs, **(arguments | kwargs))


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
@pytest.mark.parametrize("run", ["inferA_maxlen", "inferB_eos", "inferA_noprompt", "inferA_noframerate", "inferA_spk"])
def test_greedy_parity(golden, fixture_model, device, run, cache_implementation):  # noqa: F811
    fixture = golden("ar")
    model = fixture_model.to(device)
    prompt = {}
    if run != "inferA_noprompt":
        name = f"in/{run.split('_')[0]}/prompt"
        prompt = {"codes": fixture[f"{name}_speech_token"], "token_lengths": fixture[f"{name}_token_lengths"]}
    text = fixture[f"in/{run.split('_')[0]}/text"]
    threshold = {"inferA_maxlen": 0.91, "inferB_eos": 0.91, "inferA_noprompt": 0.86}.get(run)
    inputs = model.build_inputs(text, **prompt, merging_threshold=threshold)
    if run == "inferA_noframerate":
        # The reference leaves the slot out; our prompts always have it, but the model does not insist.
        inputs = {key: torch.cat([tensor[:, :1], tensor[:, 2:]], dim=1) for key, tensor in inputs.items()}
    control = model.model.control_embedding.weight
    kept = control.detach().clone()
    if run == "inferA_spk":
        # A speaker vector stands in the same slot.
        speaker = torch.nn.functional.normalize(fixture["in/spk"], dim=1)
        weight, bias = (
            fixture.weights[f"transformer_lm.spk_embed_affine_layer.{leaf}"] for leaf in ("weight", "bias")
        )
        row = model.config.no_threshold_token_id - model.config.speech_vocab_size
        with torch.no_grad():
            control[row] = torch.nn.functional.linear(speaker, weight, bias)[0].to(device)
    output = model.generate(
        **{key: tensor.to(device) for key, tensor in inputs.items()},
        do_sample=False,
        cache_implementation=cache_implementation,
        max_token_text_ratio=fixture.spec["runs"][run]["max_len"] / text.shape[1],
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        control.copy_(kept)

    new, lengths = output.sequences[0, inputs["input_ids"].shape[1] :], output.token_lengths[0]
    spoken = new < model.config.speech_vocab_size
    assert new[spoken].tolist() == fixture[f"{run}/speech_tokens"][0].tolist()
    durations = fixture[f"{run}/duration_classes"][0].tolist()
    ours = lengths[inputs["input_ids"].shape[1] :][spoken].tolist()
    # The reference has no duration for a token at the limit.
    assert len(ours) == spoken.sum()
    assert ours[: len(durations)] == durations
    assert_close(torch.cat(output.logits), fixture[f"{run}/step_logits"])
    expected = fixture[f"{run}/step_duration_logits"]
    assert_close(torch.cat(output.duration_logits)[: len(expected)], expected)


def test_end_to_end_parity(golden, tmp_path, device):
    fixture = golden("tts")
    weights = {k.removeprefix("artts/"): v for k, v in fixture.weights.items() if k.startswith("artts/")}
    save_file(weights, tmp_path / "artts.safetensors")
    model = convert_ar(tmp_path / "artts.safetensors", tmp_path / "model", fixture.spec["ar_config"]).to(device)
    inputs = model.build_inputs(
        fixture["in/text_ids"][None],
        codes=fixture["ar/prompt_speech_token"].long(),
        token_lengths=fixture["ar/prompt_token_lengths"],
        merging_threshold=fixture.spec["ar_framerate"],
    )
    output = model.generate(
        **{key: tensor.to(device) for key, tensor in inputs.items()},
        do_sample=False,
        max_token_text_ratio=fixture.spec["max_token_text_ratio"],
        return_dict_in_generate=True,
    )
    start = inputs["input_ids"].shape[1]
    spoken = output.sequences[:, start:] < model.config.speech_vocab_size
    assert output.sequences[:, start:][spoken].tolist() == fixture["ar/speech_tokens"][0].tolist()
    durations = fixture["ar/duration_classes"][0].tolist()
    assert output.token_lengths[:, start:][spoken].tolist()[: len(durations)] == durations


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_caches_agree(device, attention):
    model = tiny_model(device)
    model.set_attn_implementation(attention)
    inputs = prompts(model, device)
    expected = generate(model, inputs, use_cache=False, output_logits=True)
    for arguments in ({}, {"cache_implementation": "static"}):
        output = generate(model, inputs, output_logits=True, **arguments)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.token_lengths, expected.token_lengths)
        assert_close(torch.stack(output.logits), torch.stack(expected.logits).cpu(), atol=1e-4)
        assert_close(torch.stack(output.duration_logits), torch.stack(expected.duration_logits).cpu(), atol=1e-4)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_rows_equal_single_runs(device, cache_implementation):
    model = tiny_model(device)
    inputs = prompts(model, device, batch_size=3)
    arguments = {"cache_implementation": cache_implementation, "max_new_tokens": 20, "min_new_tokens": 0}
    together = generate(model, inputs, **arguments)
    start = inputs["input_ids"].shape[1]
    for row in range(3):
        own = inputs["attention_mask"][row].bool()
        alone = generate(model, {key: tensor[row : row + 1, own] for key, tensor in inputs.items()}, **arguments)
        size = alone.sequences.shape[1] - int(own.sum())
        for name in ("sequences", "token_lengths"):
            assert torch.equal(getattr(together, name)[row, start : start + size], getattr(alone, name)[0, -size:])
        assert (together.sequences[row, start + size :] == model.config.padding_token_id).all()


def test_tokens_and_durations_are_those_of_one_forward(device):
    """What generation gives step by step, one pass over its result gives too: each token has its own duration."""
    model = tiny_model(device)
    inputs = prompts(model, device)
    output = generate(model, inputs)
    start = inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 12), value=1)
    with torch.no_grad():
        whole = model(output.sequences, output.token_lengths, mask)
    whole.logits[..., model.config.end_token_id] = -torch.inf
    assert torch.equal(whole.logits[:, start - 1 : -1].argmax(-1), output.sequences[:, start:])
    assert torch.equal(whole.duration_logits[:, start:].argmax(-1), output.token_lengths[:, start:])


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.new_full((input_ids.shape[0],), input_ids.shape[1] >= self.length, dtype=torch.bool)


def test_a_static_cache_ends_with_the_limit_of_the_text(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    start = inputs["input_ids"].shape[1]
    for settings, limit in (
        ({"max_new_tokens": 2048, "max_token_text_ratio": 2.0}, 14),
        ({"max_new_tokens": None, "max_length": 700, "max_token_text_ratio": 50.0}, 350),
    ):
        arguments = {"min_new_tokens": 1, "cache_implementation": "static"} | settings
        output = generate(model, inputs, **arguments)
        assert output.sequences.shape[1] <= start + limit
        places = output[CACHE].layers[0].keys.shape[2]
        assert places % 256 == 0 and start + limit <= places < start + limit + 256
        model._previous_max_cache_length = -1  # transformers keeps the longest of a model
        stock = generate(model, inputs, **arguments | {"cache_implementation": "dynamic"})
        assert torch.equal(output.sequences, stock.sequences)


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_the_last_token_has_its_duration_however_generation_stops(device, arguments):
    model = tiny_model(device)
    inputs = prompts(model, device)
    start = inputs["input_ids"].shape[1]
    full = generate(model, inputs)
    for stop in (
        {"max_new_tokens": 5, "min_new_tokens": 5},
        {"stopping_criteria": StoppingCriteriaList([StopAfter(start + 5)])},
    ):
        output = generate(model, inputs, output_scores=True, output_logits=True, **stop, **arguments)
        assert torch.equal(output.sequences, full.sequences[:, : start + 5])
        assert torch.equal(output.token_lengths, full.token_lengths[:, : start + 5])
        assert len(output.scores) == len(output.duration_scores) == len(output.duration_logits) == 5
        assert output.duration_scores[0].shape == (2, model.config.num_durations)


def test_end_of_speech_at_once(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    with torch.no_grad():
        model.lm_head.bias[model.config.end_token_id] = 1e3
    output = generate(model, inputs, min_new_tokens=0)
    assert output.sequences[:, inputs["input_ids"].shape[1] :].tolist() == [[model.config.end_token_id]] * 2
    assert torch.equal(output.token_lengths[:, :-1], inputs["token_lengths"])
    assert (output.token_lengths[:, -1] == 0).all()
    # The minimum holds all the same, without sampling again and again.
    output = generate(model, inputs, min_new_tokens=0, min_token_text_ratio=1.0)
    spoken = output.sequences[:, inputs["input_ids"].shape[1] :] < model.config.end_token_id
    assert spoken.sum(dim=1).tolist() == [7, 5]


def test_limits_are_each_rows_own(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    with torch.no_grad():
        model.lm_head.bias[model.config.end_token_id] = -1e3
    output = generate(model, inputs, max_new_tokens=None, min_new_tokens=None, max_token_text_ratio=2.5)
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert (new < model.config.end_token_id).sum(dim=1).tolist() == [17, 12]
    # The stricter limit wins.
    output = generate(model, inputs, max_new_tokens=14, min_new_tokens=None, max_token_text_ratio=2.5)
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert (new < model.config.end_token_id).sum(dim=1).tolist() == [14, 12]
    with pytest.raises(ValueError, match="`min_token_text_ratio` is 3, above `max_token_text_ratio`, which is 2"):
        generate(model, inputs, min_token_text_ratio=3, max_token_text_ratio=2)


def test_sampling_follows_the_seed_and_the_duration_settings(device):
    model = tiny_model(device)
    inputs = prompts(model, device)

    def sample(seed=0, **arguments):
        torch.manual_seed(seed)
        return generate(model, inputs, do_sample=True, top_k=0, output_scores=True, **arguments)

    first, again, other = sample(), sample(), sample(1)
    assert torch.equal(first.sequences, again.sequences) and torch.equal(first.token_lengths, again.token_lengths)
    assert not torch.equal(first.sequences, other.sequences)
    # By default the likeliest duration, which draws no random number of its own.
    start = inputs["input_ids"].shape[1]
    assert torch.equal(torch.stack(first.duration_scores, 1).argmax(-1), first.token_lengths[:, start:])
    drawn = sample(duration_top_k=3, duration_temperature=2.0)
    scores = torch.stack(drawn.duration_scores, 1)
    assert (scores.isfinite().sum(dim=-1) == 3).all()
    assert not torch.equal(scores.argmax(-1), drawn.token_lengths[:, start:])
    assert scores.gather(-1, drawn.token_lengths[:, start:, None]).isfinite().all()
    cold = sample(duration_top_k=0, duration_temperature=1e-4)
    assert torch.equal(torch.stack(cold.duration_scores, 1).argmax(-1), cold.token_lengths[:, start:])


@pytest.mark.parametrize("duration_top_k", [0, 1, 3])
def test_greedy_durations_are_the_most_likely_for_every_top_k(device, duration_top_k):
    model = tiny_model(device)
    inputs = prompts(model, device)
    expected = generate(model, inputs)
    for seed in range(6):
        torch.manual_seed(seed)
        output = generate(model, inputs, duration_top_k=duration_top_k, duration_temperature=5.0)
        assert torch.equal(output.token_lengths, expected.token_lengths)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_a_weight_changed_in_place_counts_at_the_next_call(device, cache_implementation):
    """Adapters are merged in this way; PyTorch's version counter does not see it."""
    model = tiny_model(device)
    inputs = prompts(model, device)

    def logits():
        output = generate(model, inputs, output_logits=True, cache_implementation=cache_implementation)
        return torch.stack(output.logits)

    before = logits()
    weight = model.model.decoder.layers[0].self_attn.relative_k_proj.weight
    weight.data += 0.5
    after = logits()
    assert not torch.allclose(before, after, atol=1e-3)
    weight.data -= 0.5
    assert_close(logits(), before.cpu(), atol=1e-4)


def test_generation_goes_beyond_the_keys_of_the_prompt(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    output = generate(model, inputs, max_new_tokens=300, min_new_tokens=300, max_token_text_ratio=100)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 300), value=1)
    with torch.no_grad():
        whole = model(output.sequences, output.token_lengths, mask)
    whole.logits[..., model.config.end_token_id] = -torch.inf
    assert torch.equal(whole.logits[:, -2].argmax(-1), output.sequences[:, -1])


def test_with_generators_a_row_is_the_same_in_any_batch(device):
    model = tiny_model(device)
    inputs = prompts(model, device, batch_size=3)
    arguments = {"do_sample": True, "top_k": 25, "duration_top_k": 3, "min_new_tokens": 0, "max_new_tokens": 20}

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = generate(model, inputs, **arguments, generator=seeded(1, 2, 3))
    start = inputs["input_ids"].shape[1]
    for row in range(3):
        torch.manual_seed(row)  # the global generator has no say
        own = inputs["attention_mask"][row].bool()
        prompt = {key: tensor[row : row + 1, own] for key, tensor in inputs.items()}
        alone = generate(model, prompt, **arguments, generator=seeded(row + 1))
        size = alone.sequences.shape[1] - int(own.sum())
        for name in ("sequences", "token_lengths"):
            assert torch.equal(getattr(together, name)[row, start : start + size], getattr(alone, name)[0, -size:])
    one = generate(model, inputs, **arguments, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(one.sequences, together.sequences)
    with pytest.raises(ValueError, match="holds 2 generators for 3 rows"):
        generate(model, inputs, **arguments, generator=seeded(1, 2))


def test_rows_are_drawn_from_their_distribution(device):
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.6, 0.15, 0.0], device=device)
    sampler = RowSampler(torch.Generator().manual_seed(0))
    drawn = sampler.draw(probabilities.log().expand(4000, -1))
    assert_close(torch.bincount(drawn, minlength=6) / 4000, probabilities.cpu(), atol=0.03)
    assert set(drawn.tolist()) == {1, 3, 4}


def test_generation_config_of_another_origin(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    foreign = GenerationConfig(do_sample=False, max_new_tokens=12, min_new_tokens=12)
    output = model.generate(**inputs, generation_config=foreign, return_dict_in_generate=True)
    assert torch.equal(output.token_lengths, generate(model, inputs).token_lengths)
    assert torch.equal(model.generate(**inputs, generation_config=foreign, duration_top_k=1), output.sequences)


@pytest.mark.parametrize(
    "processor",
    [
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 1e-3},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3], [7, 8]]},
        {"sequence_bias": [[[5], -10.0]]},
        {"suppress_tokens": [1, 2]},
        {"renormalize_logits": True},
        {"forced_eos_token_id": 50},
    ],
)
def test_stock_processors(device, processor):
    model = tiny_model(device)
    inputs = prompts(model, device)
    output = generate(model, inputs, do_sample=True, output_scores=True, **processor)
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert (new <= model.config.end_token_id).all()
    assert all(scores.shape == (2, model.config.vocab_size) for scores in output.scores)


def test_repetition_penalty_sees_the_prompt(device):
    """Text ids lie beyond the scores' width; speech ids in the prompt must count all the same."""
    inner = RepetitionPenaltyLogitsProcessor(2.0)
    processor = PromptVocabularyLogitsProcessor(inner, input_vocab_size=9)
    scores = processor(torch.tensor([[8, 1]], device=device), torch.tensor([[1.0, 1.0, 1.0]], device=device))
    assert scores.tolist() == [[1.0, 0.5, 1.0]]


def test_own_processors_are_kept(device):
    model = tiny_model(device)
    inputs = prompts(model, device)

    def only_seven(input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7], device=scores.device), 0.0)

    output = generate(model, inputs, logits_processor=LogitsProcessorList([only_seven]))
    assert (output.sequences[:, -12:] == 7).all()


def test_num_return_sequences(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    torch.manual_seed(0)
    output = generate(
        model, inputs, do_sample=True, num_return_sequences=3, max_new_tokens=None, max_token_text_ratio=2.0
    )
    assert output.sequences.shape[0] == output.token_lengths.shape[0] == 6
    prompt = inputs["input_ids"].repeat_interleave(3, dim=0)
    assert torch.equal(output.sequences[:, : prompt.shape[1]], prompt)
    spoken = output.sequences[:, prompt.shape[1] :] < model.config.end_token_id
    assert (spoken.sum(dim=1) <= torch.tensor([14, 14, 14, 10, 10, 10], device=device)).all()


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended = True


def test_streamer_gets_the_prompt_and_each_token(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    streamer = Recorder()
    output = generate(model, inputs, streamer=streamer)
    assert streamer.ended and len(streamer.values) == 13
    assert torch.equal(streamer.values[0], inputs["input_ids"].cpu())
    assert torch.equal(torch.stack(streamer.values[1:], 1).cpu(), output.sequences[:, -12:].cpu())


def test_generation_continues_from_a_cache(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    whole = generate(model, inputs, max_new_tokens=12)
    first = generate(model, inputs, max_new_tokens=5, min_new_tokens=5, **{CACHE: DynamicCache()})
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    rest = generate(
        model,
        {"input_ids": first.sequences, "token_lengths": first.token_lengths, "attention_mask": mask},
        **{CACHE: first[CACHE]},
        max_new_tokens=7,
        min_new_tokens=7,
    )
    assert torch.equal(rest.sequences, whole.sequences)
    assert torch.equal(rest.token_lengths, whole.token_lengths)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_static_step_compiles_to_one_graph(device, batch_size):
    torch.compiler.reset()
    model = tiny_model(device)
    inputs = prompts(model, device, batch_size)
    expected = generate(model, inputs)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    output = generate(model, inputs, cache_implementation="static", compile_config=config)
    assert len(graphs) == 1
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.token_lengths, expected.token_lengths)


def test_a_step_compiled_by_hand_needs_no_relative_keys(device):
    """One graph serves all steps."""
    torch.compiler.reset()
    model = tiny_model(device)
    inputs = prompts(model, device, batch_size=1)
    length = inputs["input_ids"].shape[1]
    cache = StaticCache(model.config, max_cache_len=length + 4)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    codes = torch.tensor([[5, 9, 2]], device=device)
    with torch.no_grad():
        model(**inputs, cache=cache, use_cache=True)
        logits = [
            step(
                codes[:, [i]], torch.full_like(codes[:, :2], i + 1), cache=cache, use_cache=True,
                encode_text=False,
            ).logits
            for i in range(3)
        ]  # fmt: skip
        ids = torch.cat([inputs["input_ids"], codes], dim=1)
        lengths = torch.cat([inputs["token_lengths"][:, :-1], torch.tensor([[1, 2, 3, 0]], device=device)], dim=1)
        whole = model(ids, lengths).logits
    assert len(graphs) == 1
    assert_close(torch.cat(logits, dim=1), whole[:, -3:].cpu(), atol=1e-4)


def test_what_is_not_supported_is_refused(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    with pytest.raises(ValueError, match=r"only supports .*but got generation mode '.*(BEAM_SEARCH|beam_search)'"):
        generate(model, inputs, num_beams=2)
    with pytest.raises(
        ValueError, match=r"only supports .*but got generation mode '.*(ASSISTED_GENERATION|assisted_generation)'"
    ):
        generate(model, inputs, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="holds speech tokens but `token_lengths` is missing"):
        model.generate(inputs["input_ids"])
    with pytest.raises(ValueError, match="duration_topk"):
        generate(model, inputs, duration_topk=3)
    with pytest.raises(ValueError, match="`inputs` is missing"):
        model.generate()
