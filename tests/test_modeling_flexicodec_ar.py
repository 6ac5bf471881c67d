import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from conftest import assert_close, byte_tokenizer
from flexicodec_hf.configuration_flexicodec_ar import FlexiCodecARConfig
from flexicodec_hf.conversion import convert_ar
from flexicodec_hf.modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration


def tiny_config(**changes):
    text_encoder = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes = {"speech_vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4}
    # Large weights, so that predictions depend on the input.
    defaults = {"text_encoder_config": text_encoder | heads, "initializer_range": 0.3}
    return FlexiCodecARConfig(**(defaults | sizes | heads | changes))


def tiny_model(device="cpu", **changes):
    torch.manual_seed(0)
    return FlexiCodecARForConditionalGeneration(tiny_config(**changes)).eval().to(device)


@pytest.fixture(scope="module")
def fixture_model(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ar")
    save_file(golden("ar").weights, folder / "artts.safetensors")
    convert_ar(folder / "artts.safetensors", folder / "model", golden("ar").spec["config"])
    return FlexiCodecARForConditionalGeneration.from_pretrained(folder / "model").eval()


def mask_of(lengths, size):
    return (torch.arange(size) < lengths[:, None]).long()


def fixture_inputs(model, fixture, merging_threshold):
    text, speech = fixture["in/text_token"], fixture["in/speech_token"]
    return model.build_inputs(
        text,
        mask_of(fixture["in/text_token_len"], text.shape[1]),
        speech,
        fixture["in/duration"],
        mask_of(fixture["in/speech_token_len"], speech.shape[1]),
        merging_threshold=merging_threshold,
        return_labels=True,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("merging_threshold", [0.86, 0.91, None])
def test_teacher_forced_parity(golden, fixture_model, device, attention, merging_threshold):
    fixture = golden("ar")
    run = f"fwd_{merging_threshold}" if merging_threshold else "fwd_noframerate"
    model = fixture_model.to(device)
    model.set_attn_implementation(attention)
    inputs = fixture_inputs(model, fixture, merging_threshold)
    with torch.no_grad():
        output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})

    assert_close(output.token_loss, fixture[f"{run}/token_loss"])
    assert_close(output.duration_loss, fixture[f"{run}/duration_loss"])
    assert_close(output.loss, fixture[f"{run}/total_loss"])
    duration_logits = []
    for row in range(2):
        # Ours is padded on the left and reads the end of speech too; the reference's is padded on the right.
        length = 3 + fixture["in/text_token_len"][row] + fixture["in/speech_token_len"][row]
        assert_close(output.logits[row, -length - 1 : -1], fixture[f"{run}/logits"][row, :length])
        duration_logits.append(output.duration_logits[row, -fixture["in/speech_token_len"][row] - 1 : -1])
    assert_close(torch.cat(duration_logits), fixture[f"{run}/duration_logits"])
    model.set_attn_implementation("sdpa")


def test_stages_parity(golden, fixture_model, device):
    """Where the numbers come from: each block of both stacks, on the reference's own inputs."""
    fixture = golden("ar")
    seen = {}

    def keep(name):
        return lambda _module, _args, output: seen.__setitem__(name, output)

    model = fixture_model.to(device).model
    named = {"text_layer": model.text_encoder.transformer.layers[0], "text": model.text_encoder}
    named |= {f"layer{i}": layer for i, layer in enumerate(model.decoder.layers)} | {"norm": model.decoder.norm}
    hooks = [module.register_forward_hook(keep(name)) for name, module in named.items()]
    with torch.no_grad():
        inputs = fixture_inputs(fixture_model, fixture, 0.86)
        model(**{k: v.to(device) for k, v in inputs.items() if "labels" not in k})
    for hook in hooks:
        hook.remove()
    text_lengths, speech_lengths = fixture["in/text_token_len"], fixture["in/speech_token_len"]
    for row in range(2):
        text = slice(0, text_lengths[row])
        assert_close(seen["text_layer"][row, text], fixture["fwd_0.86/text_encoder_layer0"][row, text])
        assert_close(seen["text"][row, text], fixture["fwd_0.86/text_encoder_out"][row, text])
        length = 3 + text_lengths[row] + speech_lengths[row]
        for name, expected in [*((f"layer{i}", f"llm_layer{i}") for i in range(3)), ("norm", "lm_output")]:
            assert_close(seen[name][row, -length - 1 : -1], fixture[f"fwd_0.86/{expected}"][row, :length])


def test_rows_do_not_depend_on_their_batch(device):
    model = tiny_model(device)
    text = torch.randint(0, 40, (3, 9), device=device)
    codes, lengths = torch.randint(0, 50, (3, 7), device=device), torch.randint(1, 9, (3, 7), device=device)
    text_sizes, code_sizes = torch.tensor([9, 4, 6]), torch.tensor([2, 7, 0])
    text_mask, codes_mask = mask_of(text_sizes, 9).to(device), mask_of(code_sizes, 7).to(device)
    batch = model.build_inputs(text, text_mask, codes, lengths, codes_mask, merging_threshold=0.86)
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(3):
            alone = model.build_inputs(
                text[row : row + 1, : text_sizes[row]],
                None,
                codes[row : row + 1, : code_sizes[row]],
                lengths[row : row + 1, : code_sizes[row]],
                merging_threshold=0.86,
            )
            single = model(**alone).logits[0]
            assert_close(together[row, -single.shape[0] :], single.cpu(), atol=1e-5)


def test_right_padding_is_as_good_as_left_in_training(device):
    model = tiny_model(device)
    inputs = model.build_inputs(torch.randint(0, 40, (1, 5), device=device), merging_threshold=0.91)
    padded = {name: nn.functional.pad(tensor, (0, 3)) for name, tensor in inputs.items()}
    padded["input_ids"][:, -3:] = model.config.padding_token_id
    with torch.no_grad():
        assert_close(model(**padded).logits[:, :-3], model(**inputs).logits.cpu(), atol=1e-5)


def test_layout_of_the_stream(device):
    model = tiny_model(device)
    config = model.config
    text_and_codes = (
        [[3, 4, 9], [5, 9, 9]],
        [[1, 1, 0], [1, 0, 0]],
        [[7, 8], [6, -1]],
        [[2, 5], [4, -1]],
        [[1, 1], [1, 0]],
    )
    inputs = model.build_inputs(
        *(torch.tensor(values, device=device) for values in text_and_codes),
        merging_threshold=0.91,
        return_labels=True,
    )
    text, pad = config.text_token_offset, config.padding_token_id
    head = [config.start_token_id, config.threshold_token_id(0.91)]
    task, end = config.task_token_id, config.end_token_id
    assert inputs["input_ids"].tolist() == [
        [pad, *head, text + 3, text + 4, task, 7, 8, end],
        [pad, pad, pad, *head, text + 5, task, 6, end],
    ]
    assert inputs["attention_mask"].tolist() == [[0] + [1] * 8, [0] * 3 + [1] * 6]
    assert inputs["token_lengths"].tolist() == [[0] * 6 + [2, 5, 0], [0] * 7 + [4, 0]]
    assert inputs["labels"].tolist() == [[-100] * 6 + [7, 8, end], [-100] * 7 + [6, end]]
    assert inputs["duration_labels"].tolist() == [[-100] * 6 + [2, 5, -100], [-100] * 7 + [4, -100]]


@pytest.mark.parametrize("thresholds", [[0.91, 0.86], torch.tensor([0.91, 0.86])])
def test_each_item_can_have_its_threshold(thresholds, device):
    model = tiny_model().to(device)
    text, mask = torch.tensor([[3, 4], [5, 9]], device=device), torch.tensor([[1, 1], [1, 0]], device=device)
    together = model.build_inputs(text, mask, merging_threshold=thresholds)["input_ids"]
    for item, threshold in enumerate([0.91, 0.86]):
        alone = model.build_inputs(text, mask, merging_threshold=threshold)["input_ids"]
        assert torch.equal(together[item], alone[item])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_ids": torch.tensor([[40]])}, "`text_ids` must lie between 0 and 39, got 40"),
        ({"codes": torch.tensor([[50]])}, "`codes` must lie between 0 and 49, got 50"),
        ({"token_lengths": torch.tensor([[11]])}, "`token_lengths` must lie between 0 and 10, got 11"),
        ({"token_lengths": None}, "`codes` and `token_lengths` belong together"),
        ({"token_lengths": torch.tensor([[10]]), "return_labels": True}, "must lie between 0 and 9, got 10"),
        ({"token_lengths": torch.tensor([[1, 2]])}, "must have one shape"),
        ({"codes": None, "token_lengths": None, "return_labels": True}, "`return_labels=True` needs both"),
        ({"merging_threshold": 0.9}, r"`merging_threshold` is 0.9, but the model was trained with \[0.86, 0.91\]"),
        ({"merging_threshold": [0.86, 0.91]}, "`merging_threshold` holds 2 values for 1 texts"),
    ],
)
def test_inputs_are_checked(changes, message, device):
    arguments = {"text_ids": torch.tensor([[1]]), "codes": torch.tensor([[1]]), "token_lengths": torch.tensor([[1]])}
    arguments |= changes
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        tiny_model(device).build_inputs(**there)


def test_config_checks_heads_and_survives_a_round_trip(tmp_path):
    with pytest.raises(StrictDataclassClassValidationError, match="multiple of `num_attention_heads`, which is 5"):
        tiny_config(num_attention_heads=5)
    config = tiny_config(merging_thresholds=(0.8, 0.9, 1.0))
    config.save_pretrained(tmp_path)
    assert FlexiCodecARConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_relative_keys_are_projected_once_in_a_call(device):
    model = tiny_model(device)
    calls = count_calls(model.model.decoder.layers[0].self_attn.relative_k_proj)
    inputs = model.build_inputs(torch.randint(0, 40, (1, 5), device=device))
    for arguments in ({}, {"cache_implementation": "static"}):
        calls.clear()
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **arguments)
        assert len(calls) == 1


def test_relative_keys_follow_the_weights(device):
    model = tiny_model(device)
    inputs = model.build_inputs(torch.randint(0, 40, (1, 5), device=device))
    with torch.no_grad():
        before = model(**inputs).logits
        model.model.decoder.layers[0].self_attn.relative_k_proj.weight.data += 1
        after = model(**inputs).logits
    assert not torch.allclose(before, after, atol=1e-3)
    assert_close(after, model(**inputs).logits.detach().cpu(), atol=1e-5)


def test_relative_keys_can_be_passed_and_be_longer(device):
    model = tiny_model(device)
    inputs = model.build_inputs(torch.randint(0, 40, (1, 5), device=device))
    with torch.no_grad():
        keys = model.model.decoder.relative_keys(40)
        assert keys.shape == (2, 4, 40, 8)
        assert_close(model(**inputs, relative_keys=keys).logits, model(**inputs).logits.cpu(), atol=1e-5)


def test_what_follows_changes_nothing_before_it(device):
    model = tiny_model(device)
    ids = torch.randint(0, 50, (1, 700), device=device)
    with torch.no_grad():
        short = model(ids[:, :20], torch.ones_like(ids[:, :20])).logits
        long = model(ids, torch.ones_like(ids)).logits
    assert_close(long[:, :20], short.cpu(), atol=1e-5)


def test_text_encoder_runs_only_over_text(device):
    model = tiny_model(device)
    calls = count_calls(model.model.text_encoder)
    model.generate(**model.build_inputs(torch.randint(0, 40, (2, 5), device=device)), max_new_tokens=5)
    assert len(calls) == 1


def test_token_loss_smooths_labels(device):
    config = {"label_smoothing": 0.2}
    model = tiny_model(device, **config)
    inputs = random_utterances(model, device)
    with torch.no_grad():
        output = model(**inputs)
    log_probs = output.logits[:, :-1].float().log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    smooth = -(0.8 * picked + 0.2 * log_probs.mean(-1))[labels != -100].mean()
    assert_close(output.token_loss, smooth.cpu(), atol=1e-5)
    assert_close(output.loss, (output.token_loss + output.duration_loss).cpu())


def random_utterances(model, device="cpu", batch_size=4):
    generator = torch.Generator().manual_seed(1)

    def draw(low, high, size):
        return torch.randint(low, high, (batch_size, size), generator=generator).to(device)

    return model.build_inputs(
        draw(0, 40, 6), None, draw(0, 50, 5), draw(1, 9, 5), merging_threshold=0.86, return_labels=True
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_takes_the_same_positions_as_a_lookup_of_distances(device, attention):
    """Whole sequences with gradients shift a matrix instead."""
    model = tiny_model(device)
    model.set_attn_implementation(attention)
    inputs = random_utterances(model, device)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert_close(model(**inputs).logits, expected.cpu())
    decoder = model.model.decoder
    positions = torch.arange(7, device=device)
    distances = (positions[:, None] - positions).clamp(min=0)
    mask = (positions[:, None] >= positions)[None, None]
    gradients = []
    for choice in (None, distances):
        decoder.zero_grad()
        embeds = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        decoder.run_layers(embeds, decoder.relative_keys(9), choice, mask).square().sum().backward()
        gradients.append(torch.cat([embeds.grad.flatten(), *(p.grad.flatten() for p in decoder.parameters())]).cpu())
    assert_close(gradients[0], gradients[1], atol=1e-3)
    assert gradients[0].norm() > 1


def test_gradient_checkpointing_gives_the_same_gradients(device):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(device, hidden_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**random_utterances(model, device)).loss.backward()
        gradients.append(model.model.speech_embedding.weight.grad.cpu())
        unused = [name for name, weight in model.named_parameters() if weight.grad is None]
        assert unused == []
    assert_close(gradients[1], gradients[0], atol=1e-5)


def test_trainer_learns_a_handful_of_clips(tmp_path):
    model = tiny_model(hidden_dropout=0.0, initializer_range=0.02)
    inputs = random_utterances(model)
    clips = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(4)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=120,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=40,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=clips)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 1.0
    assert losses[-1] < 0.05
    assert trainer.evaluate(clips)["eval_loss"] < 0.05
    # What was learned is what is spoken.
    prompts = {name: inputs[name][:, :9] for name in ("input_ids", "token_lengths", "attention_mask")}
    spoken = model.eval().generate(**prompts, do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    assert torch.equal(spoken.sequences, inputs["input_ids"])
    assert torch.equal(spoken.token_lengths, inputs["token_lengths"])


def test_a_tokenizer_beside_the_model_does_not_change_its_stream(tmp_path):
    """`Trainer` writes the special ids of a tokenizer into both configs: here they are ids of speech or text."""
    model = tiny_model(hidden_dropout=0.0)
    inputs = random_utterances(model)
    prompts = {name: inputs[name][:, :9] for name in ("input_ids", "token_lengths", "attention_mask")}
    settings = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True}
    expected = model.generate(**prompts, **settings)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id = 2, 3, 4
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, learning_rate=0.0, report_to="none", disable_tqdm=True, use_cpu=True
    )
    clips = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(4)]
    trainer = Trainer(model=model, args=arguments, train_dataset=clips, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (2, 2)

    model = FlexiCodecARForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.pad_token_id == 2 and model.config.padding_token_id == 53
    spoken = model.generate(**prompts, **settings)
    assert torch.equal(spoken.sequences, expected.sequences)
    assert torch.equal(spoken.token_lengths, expected.token_lengths)
    assert torch.equal(random_utterances(model)["input_ids"], inputs["input_ids"])


def test_the_special_ids_are_those_of_the_stream():
    config = tiny_config()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (51, 50, 53)
    layout = (config.start_token_id, config.end_token_id, config.padding_token_id)
    assert layout == (config.bos_token_id, config.eos_token_id, config.pad_token_id)


def test_labels_may_come_shifted(device):
    model = tiny_model(device)
    inputs = {name: tensor.to(device) for name, tensor in random_utterances(model).items()}
    expected = model(**inputs)
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(**inputs, shift_labels=shifted).loss, expected.loss)
    # As where `Trainer` splits sequences: the unshifted ones of a part say nothing of what follows it.
    assert torch.equal(model(**inputs, labels=labels, shift_labels=shifted).loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(device, dtype):
    model = tiny_model(device, initializer_range=0.1)
    inputs = random_utterances(model, device)
    with torch.no_grad():
        expected = model(**inputs)
        output = model.to(dtype)(**inputs)
    assert output.logits.dtype == dtype
    assert_close(output.logits.float(), expected.logits.cpu(), atol=0.1)
    assert_close(output.loss, expected.loss.cpu(), atol=0.05)


def test_save_and_load(tmp_path, device):
    model = tiny_model(device)
    model.generation_config.duration_top_k = 3
    model.save_pretrained(tmp_path)
    loaded, info = FlexiCodecARForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.generation_config.duration_top_k == 3
    inputs = random_utterances(model, device)
    with torch.no_grad():
        assert_close(loaded.eval().to(device)(**inputs).logits, model(**inputs).logits.cpu(), atol=0)


def test_every_parameter_is_initialized():
    model = tiny_model()
    with torch.device("meta"):
        blank = FlexiCodecARForConditionalGeneration(model.config)
    blank = blank.to_empty(device="cpu")
    for tensor in blank.state_dict().values():
        tensor.fill_(torch.nan)
    blank.init_weights()
    assert [name for name, tensor in blank.state_dict().items() if tensor.isnan().any()] == []


def test_hidden_states_and_attentions_are_those_of_the_language_model(device):
    model = tiny_model(device, num_hidden_layers=3)
    model.set_attn_implementation("eager")
    inputs = model.build_inputs(torch.randint(0, 40, (2, 5), device=device))
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    assert [state.shape for state in output.hidden_states] == [(2, length, 32)] * 4
    assert [weights.shape for weights in output.attentions] == [(2, 4, length, length)] * 3
    as_tuple = model(**inputs, return_dict=False)
    assert_close(as_tuple[0], output.logits.detach().cpu())
