"""The loop on the device gives what `generate` gives; here on a CPU, where its step is not recorded."""

import copy

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.generation.streamers import BaseStreamer

from conftest import assert_close
from counting import OnDevice, Waits
from flexicodec_hf import FlexiCodecForTextToSpeech, FlexiCodecTTSProcessor
from flexicodec_hf.generation_flexicodec_ar import DurationStreamer
from test_generation_flexicodec_ar import prompts
from test_modeling_flexicodec_ar import tiny_model


SAMPLED = {"do_sample": True, "top_k": 25, "duration_top_k": 3, "max_new_tokens": 21}
GREEDY = {"do_sample": False, "max_new_tokens": 21}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def row_of(inputs, row):
    """One prompt of a batch, without its padding."""
    own = inputs["attention_mask"][row].bool()
    return {name: tensor[row : row + 1, own] for name, tensor in inputs.items()}


def new_tokens(model, inputs, **kwargs):
    """Codes and durations of a single prompt by the stock loop."""
    output = model.generate(**inputs, return_dict_in_generate=True, **kwargs)
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    lengths = output.token_lengths[0, inputs["input_ids"].shape[1] :]
    spoken = new < model.config.speech_vocab_size
    return new[spoken].tolist(), lengths[spoken].tolist()


@pytest.mark.parametrize(
    ("settings", "generator"),
    [
        (GREEDY, lambda: None),
        (GREEDY | {"min_new_tokens": 21}, lambda: None),
        (SAMPLED, lambda: seeded(1, 2, 3)),
        (SAMPLED, lambda: torch.Generator().manual_seed(5)),
        (SAMPLED | {"duration_top_k": 1, "min_token_text_ratio": 1.0}, lambda: seeded(1, 2, 3)),
        (
            SAMPLED | {"temperature": 0.7, "top_p": 0.8, "min_p": 0.01, "renormalize_logits": True},
            lambda: seeded(1, 2, 3),
        ),
        (SAMPLED | {"max_new_tokens": None, "max_token_text_ratio": 2.5}, lambda: seeded(1, 2, 3)),
        (SAMPLED | {"max_new_tokens": None, "max_length": 30, "top_k": None}, lambda: seeded(1, 2, 3)),
        (SAMPLED | {"max_new_tokens": 1}, lambda: seeded(1, 2, 3)),
    ],
    ids=["greedy", "to the limit", "rows", "shared", "minimum", "warpers", "text", "max_length", "one token"],
)
def test_the_loop_gives_the_tokens_and_durations_of_generate(device, settings, generator):
    model = tiny_model(device)
    inputs = prompts(model, device, batch_size=3)
    expected = model.generate(**inputs, generator=generator(), return_dict_in_generate=True, **settings)
    output = model.generate(
        **inputs, generator=generator(), return_dict_in_generate=True, static_loop=True, **settings
    )
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.token_lengths, expected.token_lengths)
    plain = model.generate(**inputs, generator=generator(), static_loop=True, **settings)
    assert torch.equal(plain, expected.sequences)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_several_answers_and_long_ones_are_those_of_generate(device, attention):
    model = tiny_model(device)
    model.set_attn_implementation(attention)
    inputs = prompts(model, device)
    settings = SAMPLED | {"num_return_sequences": 2, "max_new_tokens": 300, "min_new_tokens": 290}
    settings["max_token_text_ratio"] = 100
    expected, output = (
        model.generate(**inputs, generator=seeded(1, 2, 3, 4), return_dict_in_generate=True, **settings, **loop)
        for loop in ({}, {"static_loop": True})
    )
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.token_lengths, expected.token_lengths)


def test_speech_that_ends_at_once(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    with torch.no_grad():
        model.lm_head.bias[model.config.end_token_id] = 1e3
    output = model.generate(**inputs, **GREEDY, static_loop=True, return_dict_in_generate=True)
    assert output.sequences[:, inputs["input_ids"].shape[1] :].tolist() == [[model.config.end_token_id]] * 2
    assert torch.equal(output.token_lengths[:, :-1], inputs["token_lengths"])
    assert (output.token_lengths[:, -1] == 0).all()


def test_the_global_generator_draws_from_the_same_distribution(device):
    model = tiny_model(device)
    inputs = row_of(prompts(model, device), 0)
    settings = {"do_sample": True, "max_new_tokens": 1, "min_new_tokens": 1, "num_return_sequences": 4000, "top_k": 5}
    counts = []
    for arguments in ({}, {"static_loop": True}):
        torch.manual_seed(0)
        tokens = model.generate(**inputs, **settings, **arguments)[:, -1]
        counts.append(torch.bincount(tokens, minlength=model.config.vocab_size) / 4000)
    assert (counts[0] > 0).sum() == 5
    assert torch.allclose(*counts, atol=0.03)


def test_requests_join_and_leave_a_running_batch_with_the_results_of_a_lone_one(device):
    model = tiny_model(device)
    inputs = prompts(model, device, batch_size=3)
    requests = [row_of(inputs, seed % 3) for seed in range(10)]
    lengths = [5 + 7 * (seed % 4) for seed in range(10)]
    loop = model.make_loop(num_streams=3, max_length=64, block_size=4, **SAMPLED)
    waiting, running, answers = list(range(10)), {}, {}
    most_at_once = 0
    while waiting or loop.num_running:
        while waiting and loop.num_free:
            seed = waiting.pop(0)
            limits = {"min_new_tokens": lengths[seed], "max_new_tokens": lengths[seed] + 2}
            running[loop.add(**requests[seed], generator=seeded(seed), **limits)] = seed
        most_at_once = max(most_at_once, loop.num_running)
        for request in loop.advance():
            answers[running.pop(request)] = request.codes[0], request.token_lengths[0]
    assert most_at_once == loop.num_free == 3
    for seed, answer in answers.items():
        settings = SAMPLED | {"max_new_tokens": lengths[seed] + 2, "min_new_tokens": lengths[seed]}
        assert answer == new_tokens(model, requests[seed], generator=seeded(seed), **settings), seed
    assert len({len(codes) for codes, _ in answers.values()}) > 3


def test_a_request_that_is_taken_out_leaves_the_others_alone(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    loop = model.make_loop(num_streams=2, max_length=64, block_size=8, **GREEDY | {"min_new_tokens": 21})
    first, second = (loop.add(**row_of(inputs, row)) for row in (0, 1))
    assert loop.advance() == [] and len(first.codes[0]) == 9
    loop.remove(first)
    third = loop.add(**row_of(inputs, 0))
    done = []
    while loop.num_running:
        done += loop.advance()
    assert done == [second, third] and not first.is_done
    for request, row in ((second, 1), (third, 0)):
        expected = new_tokens(model, row_of(inputs, row), **GREEDY, min_new_tokens=21)
        assert (request.codes[0], request.token_lengths[0]) == expected


def test_the_host_waits_once_for_a_block_of_tokens(device):
    model = tiny_model(device)
    loop = model.make_loop(num_streams=2, max_length=64, block_size=8, **SAMPLED | {"min_new_tokens": 21})
    loop.add(**prompts(model, device), generator=seeded(1, 2))
    for holder in (loop, loop.cache):
        for name, value in vars(holder).items():
            if isinstance(value, torch.Tensor):
                setattr(holder, name, value.as_subclass(OnDevice))
    loop._draw = lambda: None
    with Waits() as waits:
        loop.advance()
    assert waits.places == ["tolist"]


def test_a_recorded_step_is_replayed_with_the_same_tokens(device):
    """As a CUDA graph does: nothing of Python runs again, and what the kernels read and write stays in its place."""
    model = tiny_model(device)
    inputs = prompts(model, device, batch_size=3)
    loop = model.make_loop(num_streams=3, max_length=64, block_size=8, **SAMPLED)
    nothing = torch.zeros(())
    graph = make_fx(lambda _: loop._step())(nothing)
    loop._run_step = lambda: graph(nothing)
    places = {name: value.data_ptr() for name, value in vars(loop).items() if isinstance(value, torch.Tensor)}
    for seeds in ((1, 2, 3), (4, 5, 6)):
        request = loop.add(**inputs, generator=seeded(*seeds))
        while not loop.advance():
            pass
        for row, seed in enumerate(seeds):
            expected = new_tokens(model, row_of(inputs, row), generator=seeded(seed), **SAMPLED)
            assert (request.codes[row], request.token_lengths[row]) == expected
    assert places == {name: value.data_ptr() for name, value in vars(loop).items() if isinstance(value, torch.Tensor)}


def test_a_loop_is_kept_for_the_next_call_and_sees_new_weights(device):
    model = tiny_model(device)
    inputs = prompts(model, device)

    def check(**settings):
        output = model.generate(**inputs, **GREEDY | settings, static_loop=True)
        assert torch.equal(output, model.generate(**inputs, **GREEDY | settings))
        return model._kept_loop

    loop = check()
    assert check() is loop
    model.model.decoder.layers[0].self_attn.relative_k_proj.weight.data += 0.5
    assert check() is loop
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0)  # elsewhere in memory
    moved = check()
    assert moved is not loop
    assert check(min_new_tokens=3) is not moved
    assert copy.deepcopy(model)._kept_loop is None
    with torch.inference_mode():
        check(min_new_tokens=3)
    check(min_new_tokens=3)


class Recorder(DurationStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(("ids", value.tolist()))

    def put_durations(self, value):
        self.calls.append(("durations", value.tolist()))

    def end(self):
        self.calls.append(("end", None))


@pytest.mark.parametrize("most", [21, 140], ids=["reaches its limit", "ends"])
def test_a_streamer_gets_what_it_gets_from_generate(device, most):
    model = tiny_model(device)
    inputs = row_of(prompts(model, device), 0)
    model.lm_head.bias.data[model.config.end_token_id] += 3
    settings = SAMPLED | {"min_new_tokens": 21, "max_new_tokens": most, "return_dict_in_generate": True}
    streamers = [Recorder(), Recorder()]
    model.generate(**inputs, **settings, generator=seeded(3), streamer=streamers[0])
    model.generate(**inputs, **settings, generator=seeded(3), streamer=streamers[1], static_loop=True)
    assert streamers[0].calls == streamers[1].calls
    kinds = [kind for kind, _ in streamers[0].calls]
    assert kinds.count("end") == 1 and (kinds.count("ids") == 22) == (most == 21)
    assert kinds.count("durations") == kinds.count("ids") - (1 if most == 21 else 2)


def test_the_whole_system_speaks_the_same_with_the_loop(tts_repository, device):
    model = FlexiCodecForTextToSpeech.from_pretrained(tts_repository, subfolder="tts").to(device)
    processor = FlexiCodecTTSProcessor.from_pretrained(tts_repository)
    inputs = processor(["Hello there.", "And so on, and so forth."])
    settings = {"seed": [1, 2], "duration_top_k": 3, "max_new_tokens": 20, "return_dict_in_generate": True}
    expected, output = (model.generate(**inputs, **settings, **loop) for loop in ({}, {"static_loop": True}))
    for name in ("audio_codes", "token_lengths"):
        assert torch.equal(output[name], expected[name])
    assert_close(output.audio, expected.audio.cpu())


class Stopper(BaseStreamer):
    def put(self, value):
        raise KeyboardInterrupt

    def end(self):
        pass


def test_a_call_that_was_interrupted_leaves_nothing_behind(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, **GREEDY, static_loop=True, streamer=Stopper())
    output = model.generate(**inputs, **GREEDY, static_loop=True)
    assert torch.equal(output, model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
        ({"num_beams": 2}, "beam_search"),
        ({"output_scores": True}, "output_scores"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"eos_token_id": 3}, "eos_token_id"),
        ({"stopping_criteria": [lambda ids, scores: False]}, "stopping_criteria"),
        ({"duration_topk": 3}, "duration_topk"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_loop_cannot_do_is_refused(device, settings, message):
    model = tiny_model(device)
    with pytest.raises(ValueError, match=f"static loop does not support .*{message}"):
        model.generate(**prompts(model, device), **GREEDY | settings, static_loop=True)


def test_a_loop_tells_what_does_not_fit(device):
    model = tiny_model(device)
    inputs = prompts(model, device)
    loop = model.make_loop(num_streams=1, max_length=64, do_sample=False)
    with pytest.raises(ValueError, match="2 rows need as many free streams, and there are 1"):
        loop.add(**inputs)
    loop = model.make_loop(num_streams=2, max_length=64, max_new_tokens=500, max_token_text_ratio=100)
    with pytest.raises(ValueError, match="take up to 513 places, and streams have 256"):
        loop.add(**inputs)
    assert loop.num_free == 2
    with pytest.raises(ValueError, match="unknown settings: topk"):
        model.make_loop(num_streams=1, max_length=64, topk=3)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="some are offloaded: load the model without `device_map`"):
        loop._record()
