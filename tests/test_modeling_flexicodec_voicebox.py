import copy

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file

from conftest import assert_close
from flexicodec_hf.configuration_flexicodec_voicebox import FlexiCodecVoiceboxConfig
from flexicodec_hf.conversion import convert_voicebox
from flexicodec_hf.modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel


TINY = {
    "codebook_size": 50,
    "num_mel_bins": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "repa_layer_index": 1,
    "repa_hidden_size": 24,
    "semantic_hidden_size": 12,
}


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """The fixture's model on the CPU."""
    fixture = golden("voicebox")
    path = tmp_path_factory.mktemp("voicebox") / "nartts.safetensors"
    save_file(fixture.weights, path)
    return convert_voicebox(path, config=fixture.spec["config"])


@pytest.fixture
def model(converted, device):
    return copy.deepcopy(converted).to(device)


@pytest.fixture
def prompt(golden, device):
    """Codes of a clip, two tokens of prompt and five of target, with the prompt's mel."""
    fixture = golden("voicebox")
    codes = fixture["in/rd/codes"].to(device)
    return {
        "audio_codes": codes[:, 2:],
        "prompt_codes": codes[:, :2],
        "prompt_mel": fixture["in/rd/prompt"].to(device),
        "noise": fixture["in/rd/z"].to(device),
        "num_inference_steps": 5,
    }


def ragged_batch(device: str) -> dict[str, torch.Tensor]:
    """Three items with targets of 28, 12 and 24 frames; prompts of 16, 8 and no frames."""
    generator = torch.Generator().manual_seed(0)
    return {
        "audio_codes": torch.randint(50, (3, 4), generator=generator).to(device),
        "token_lengths": torch.tensor([[1, 2, 3, 1], [2, 1, 0, 0], [1, 1, 4, 0]], device=device),
        "prompt_codes": torch.randint(50, (3, 3), generator=generator).to(device),
        "prompt_token_lengths": torch.tensor([[1, 2, 1], [2, 0, 0], [0, 0, 0]], device=device),
        "prompt_mel": torch.randn(3, 17, 16, generator=generator).to(device),
        "prompt_mel_mask": torch.arange(17, device=device) < torch.tensor([[17], [8], [0]], device=device),
    }


def item_of(batch: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """One item alone, without its padding."""
    item = {name: tensor[index : index + 1] for name, tensor in batch.items()}
    for prefix, codes in (("", "audio_codes"), ("prompt_", "prompt_codes")):
        num_tokens = int((item[f"{prefix}token_lengths"] > 0).sum())
        item[codes] = item[codes][:, :num_tokens]
        item[f"{prefix}token_lengths"] = item[f"{prefix}token_lengths"][:, :num_tokens]
    frames = int(item.pop("prompt_mel_mask").sum())
    item["prompt_mel"] = item["prompt_mel"][:, :frames]
    if frames == 0:
        for name in ("prompt_codes", "prompt_token_lengths", "prompt_mel"):
            del item[name]
    return item


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def tiny_model(device: str, **config) -> FlexiCodecVoiceboxModel:
    torch.manual_seed(0)
    return FlexiCodecVoiceboxModel(FlexiCodecVoiceboxConfig(**TINY | config)).to(device).eval()


def training_batch(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "audio_codes": torch.randint(50, (2, 8), generator=generator).to(device),
        "labels": torch.randn(2, 32, 16, generator=generator).to(device),
        "noise": torch.randn(2, 32, 16, generator=generator).to(device),
        "timesteps": torch.tensor([0.3, 0.8], device=device),
        "prompt_lengths": torch.tensor([6, 5], device=device),
        "semantic_features": torch.randn(2, 8, 12, generator=generator).to(device),
    }


# Parity with the reference


def condition_on(model: FlexiCodecVoiceboxModel, condition: torch.Tensor) -> torch.Tensor:
    """Make every embedding this condition, since the fixtures have no codes. Returns codes of as many frames."""
    model.code_embedding.register_forward_hook(lambda *_: condition)
    num_frames = -(-condition.shape[1] // model.config.upsample_factor)
    return torch.zeros(len(condition), num_frames, dtype=torch.long, device=condition.device)


def lengths_of(codes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Token lengths that cover the valid frames of each item."""
    frames = -(-mask.sum(dim=1, keepdim=True) // 4)
    return (torch.arange(codes.shape[1], device=codes.device) < frames.to(codes.device)).long()


@torch.no_grad()
def test_velocity_matches_the_reference(model, golden, device):
    fixture = golden("voicebox")
    x, t, condition, mask = (fixture[f"in/est/{name}"].to(device) for name in ("x", "t", "cond", "x_mask"))
    mask = mask.bool()
    hidden_states = {}
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, __, output, index=index: hidden_states.update({index: output}))
    assert_close(model.time_embedding(t), fixture["est/diff_step_mlp"])
    codes = condition_on(model, condition)
    velocity = model(codes, lengths_of(codes, mask), noisy_mel=x, timesteps=t, mel_mask=mask).velocity
    valid = mask.cpu()
    for index in range(3):
        assert_close(hidden_states[index][mask], fixture[f"est/layer{index}"][valid])
    assert_close(velocity[mask], fixture["est/out"][valid])
    assert_close(hidden_states[model.config.repa_layer_index][mask], fixture["est/repa_hidden"][valid])


@pytest.mark.parametrize("run", ["rd_prompt_cfg2", "rd_prompt_cfg0", "rd_noprompt_cfg2"])
def test_sampling_matches_the_reference(model, golden, device, prompt, run):
    if "noprompt" in run:
        prompt = {name: prompt[name] for name in ("audio_codes", "noise", "num_inference_steps")}
    velocities = golden("voicebox").spec["runs"][run]["n_estimator_calls"]
    calls = []
    model.output_mlp.register_forward_hook(lambda _, __, output: calls.append(len(output)))
    output = model.sample(**prompt, guidance_scale=float(run[-1]))
    assert sum(calls) == velocities
    assert output.mel_mask.all()
    assert_close(output.mel, golden("voicebox")[f"{run}/out"])


@torch.no_grad()
def test_first_guided_step_of_a_masked_batch_matches_the_reference(model, golden, device):
    # Later steps differ: the reference takes standard deviations over the batch with its padding.
    fixture = golden("voicebox")
    prompt, noise, condition = (fixture[f"in/rd2/{name}"].to(device) for name in ("prompt", "z", "cond"))
    prompt_mask, mask = fixture["in/rd2/prompt_mask"].bool(), fixture["in/rd2/x_mask"].bool()
    full_mask = torch.cat([prompt_mask, mask], dim=1)
    time = torch.full((2,), 0.1, device=device)
    unconditional = model(noisy_mel=noise, timesteps=time, mel_mask=mask.to(device)).velocity
    codes = condition_on(model, condition)
    conditional = model(
        codes, noisy_mel=torch.cat([prompt, noise], dim=1), timesteps=time, mel_mask=full_mask.to(device),
        token_lengths=lengths_of(codes, torch.ones_like(full_mask)),
    ).velocity  # fmt: skip
    assert_close(conditional.cpu()[full_mask], fixture["rd_b2_masked_cfg1.5/estimator_call0"][full_mask])
    assert_close(unconditional.cpu()[mask], fixture["rd_b2_masked_cfg1.5/estimator_call1"][mask])


@torch.no_grad()
def test_whole_tts_run_matches_the_reference(golden, tmp_path, device):
    fixture = golden("tts")
    path = tmp_path / "nartts.safetensors"
    save_file({k.removeprefix("nartts/"): v for k, v in fixture.weights.items() if k.startswith("nartts/")}, path)
    model = convert_voicebox(path, config=fixture.spec["voicebox_config"]).to(device)
    codes, lengths = fixture["ar/speech_tokens"].to(device), fixture["ar/duration_classes"].to(device)
    prompt = fixture["nar/prompt_codes_aggregated"][0].long().to(device)
    prompt_lengths, prompt_mel = fixture["nar/prompt_token_lengths"].to(device), fixture["nar/prompt_mel"].to(device)

    embedded = []
    hook = model.code_embedding.register_forward_hook(lambda _, inputs, output: embedded.append((inputs[0], output)))
    model(
        torch.cat([prompt, codes], dim=1),
        torch.cat([prompt_lengths, lengths], dim=1),
        noisy_mel=torch.zeros(1, 196, 128, device=device),
        timesteps=torch.zeros(1, device=device),
    )
    hook.remove()
    frames, condition = embedded[0]
    assert_close(condition, fixture["nar/cond_feature"])

    # The reference's prompt mel is a frame longer than its codes and takes the target's first frame.
    # With codes for each mel frame, ours does the same.
    model.config.upsample_factor = 1
    output = model.sample(
        frames[:, 65:],
        prompt_codes=frames[:, :65],
        prompt_mel=prompt_mel,
        noise=fixture["nar/z"].to(device),
        num_inference_steps=5,
    )
    assert_close(output.mel, fixture["nar/predicted_mel"])

    # With codes for each codec frame, ours cuts the mel to the codes, so the target is whole.
    model.config.upsample_factor = 4
    ours = model.sample(codes, lengths, prompt, prompt_lengths, prompt_mel, num_inference_steps=1)
    same = model.sample(codes, lengths, prompt, prompt_lengths, prompt_mel[:, :64], num_inference_steps=1)
    assert ours.mel.shape == same.mel.shape == (1, 132, 128)


@pytest.mark.parametrize("run", ["train_prompt", "train_dropcond"])
def test_training_loss_matches_the_reference(model, golden, device, run):
    fixture = golden("voicebox")
    lengths = (fixture["in/train/audio_lens"] / 24_000 * 50).long()
    mask = torch.arange(30) < lengths[:, None]
    output = model(
        fixture["in/train/codes"].to(device),
        labels=fixture["in/train/mel"].to(device),
        mel_mask=mask.to(device),
        timesteps=fixture[f"{run}/estimator_in_t"].to(device),
        noise=F.pad(fixture[f"{run}/draw_z"], (0, 0, 0, 2)).to(device),  # two mel frames have no code
        prompt_lengths=fixture[f"{run}/prompt_len"].long().to(device),
        semantic_features=fixture["in/train/target_repr"].transpose(1, 2).to(device),
    )
    valid = mask[:, :28]
    assert_close(output.velocity[:, :28].cpu()[valid], fixture[f"{run}/flow_pred"][valid])
    assert_close(output.flow_loss, fixture[f"{run}/diff_loss"])
    assert_close(output.repa_loss, fixture[f"{run}/repa_loss"])
    assert_close(output.loss, fixture[f"{run}/total_loss"])


# Batches


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
def test_items_of_a_batch_equal_single_runs(model, device, attention, guidance_scale):
    model.set_attn_implementation(attention)
    batch = ragged_batch(device)
    options = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    together = model.sample(**batch, generator=generators(1, 2, 3), **options)
    assert together.mel_mask.sum(dim=1).tolist() == [28, 12, 24]
    assert (together.mel[~together.mel_mask] == 0).all()
    for index in range(3):
        alone = model.sample(**item_of(batch, index), generator=generators(index + 1), **options)
        assert_close(together.mel[index][together.mel_mask[index]], alone.mel[0].cpu(), atol=2e-5)


def test_prompts_of_no_frames_are_no_prompts(model, device):
    batch = ragged_batch(device)
    batch["prompt_token_lengths"] = torch.zeros_like(batch["prompt_token_lengths"])
    batch["prompt_mel_mask"] = torch.zeros_like(batch["prompt_mel_mask"])
    blank = model.sample(**batch, generator=generators(1, 2, 3), num_inference_steps=2).mel
    batch = {name: tensor for name, tensor in batch.items() if not name.startswith("prompt_")}
    assert torch.equal(blank, model.sample(**batch, generator=generators(1, 2, 3), num_inference_steps=2).mel)


@torch.no_grad()
@pytest.mark.parametrize("prompted", [True, False])
def test_a_guided_step_is_made_of_two_velocities(model, device, prompted):
    """On a CPU, guidance runs in a pass of its own where there is a prompt, elsewhere in the same batch."""
    batch, scale, rescale = ragged_batch(device), 1.5, 0.6
    if not prompted:
        batch["prompt_token_lengths"] = torch.zeros_like(batch["prompt_token_lengths"])
        batch["prompt_mel_mask"] = torch.zeros_like(batch["prompt_mel_mask"])
    noise = model.draw_noise([28, 12, 24], generators(1, 2, 3)).to(device)
    output = model.sample(**batch, noise=noise, num_inference_steps=1, guidance_scale=scale, guidance_rescale=rescale)
    time = torch.tensor([0.5], device=device)
    for index in range(3):
        item = item_of(batch, index)
        frames = int(output.mel_mask[index].sum())
        own = noise[index : index + 1, :frames]
        codes, lengths, mel, num_prompt = item["audio_codes"], item["token_lengths"], own, 0
        if "prompt_codes" in item:
            num_prompt = int(item["prompt_token_lengths"].sum()) * 4
            codes = torch.cat([item["prompt_codes"], codes], dim=1)
            lengths = torch.cat([item["prompt_token_lengths"], lengths], dim=1)
            mel = torch.cat([item["prompt_mel"][:, :num_prompt], own], dim=1)
        conditional = model(codes, lengths, noisy_mel=mel, timesteps=time).velocity[:, num_prompt:]
        unconditional = model(noisy_mel=own, timesteps=time).velocity
        guided = conditional + scale * (conditional - unconditional)
        velocity = guided * (rescale * conditional.std() / guided.std() + 1 - rescale)
        assert_close(output.mel[index, :frames], (own + velocity)[0].cpu(), atol=2e-5)


def test_eager_and_sdpa_agree(model, device):
    outputs = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        outputs.append(model.sample(**ragged_batch(device), generator=generators(1, 2, 3), num_inference_steps=3).mel)
    assert_close(outputs[0], outputs[1].cpu(), atol=2e-5)


def test_velocity_and_losses_of_an_item_ignore_padding(device):
    model = tiny_model(device)
    batch = training_batch(device)
    lengths = torch.tensor([[1] * 8, [1] * 6 + [0] * 2], device=device)
    mask = torch.arange(32, device=device) < torch.tensor([[32], [25]], device=device)
    padded = model(**batch, token_lengths=lengths, mel_mask=mask)
    first = {name: tensor[:1] for name, tensor in batch.items()}
    second = {name: tensor[1:] for name, tensor in batch.items()}
    for name, count in {"audio_codes": 6, "labels": 24, "noise": 24, "semantic_features": 6}.items():
        second[name] = second[name][:, :count]
    alone = [model(**first), model(**second)]
    assert_close(padded.velocity[1, :24], alone[1].velocity[0].cpu(), atol=2e-5)
    frames, pools = torch.tensor([26.0, 19.0]), torch.tensor([8.0, 6.0])
    for name, weights in (("flow_loss", frames), ("repa_loss", pools)):
        expected = sum(weight * output[name].cpu() for weight, output in zip(weights, alone, strict=True))
        assert_close(padded[name], (expected / weights.sum()).detach(), atol=2e-5)


# Noise, time grid, callback


def test_noise_depends_on_the_generator_alone(device):
    model = tiny_model(device)
    codes = torch.arange(12, device=device).reshape(2, 6)

    torch.nn.init.zeros_(model.output_mlp.down_proj.weight)
    torch.nn.init.zeros_(model.output_mlp.down_proj.bias)

    def noise(codes, **options):
        # The velocity is 0, so the flow ends where it began.
        return model.sample(codes, num_inference_steps=1, guidance_scale=0.0, **options).mel.cpu()

    listed = noise(codes, generator=generators(5, 6))
    assert torch.equal(listed[1:], noise(codes[1:], generator=generators(6)))
    assert torch.equal(listed[:1], noise(codes[:1], generator=generators(5)[0]))
    assert not torch.equal(listed[0], listed[1])
    single = noise(codes, generator=generators(5)[0])
    assert torch.equal(single[0], listed[0]) and not torch.equal(single[0], single[1])
    shorter = torch.tensor([[1] * 2 + [0] * 4, [1] * 6], device=device)
    assert torch.equal(single[1], noise(codes, token_lengths=shorter, generator=generators(5)[0])[1])
    torch.manual_seed(3)
    first = noise(codes)
    torch.manual_seed(3)
    assert torch.equal(first, noise(codes)) and not torch.equal(first, noise(codes))
    assert abs(single.mean()) < 0.15 and abs(single.std() - 1) < 0.1


def test_steps_take_the_velocity_at_their_middle(model, prompt):
    times = []
    model.time_embedding.register_forward_pre_hook(lambda _, inputs: times.append(inputs[0]))
    model.output_mlp.register_forward_hook(lambda _, __, output: 2 * times[-1] * torch.ones_like(output))
    output = model.sample(**prompt | {"num_inference_steps": 4}, guidance_scale=0.0)
    assert_close(torch.cat(times), torch.tensor([0.125, 0.375, 0.625, 0.875]))
    # The integral of 2t, which midpoints hit exactly.
    assert_close(output.mel - prompt["noise"], torch.ones(1, 20, 16))


def test_grids_lie_where_their_papers_put_them(model, prompt):
    def times(grid, steps):
        seen = []
        options = prompt | {"num_inference_steps": steps, "time_grid": grid}
        model.sample(**options, callback_on_step_end=lambda _model, _step, time, _mel: seen.append(float(time)))
        ends = [0.0]
        for middle in seen:
            ends.append(2 * middle - ends[-1])
        return torch.tensor(ends)

    assert_close(times("uniform", 4), torch.tensor([0, 0.25, 0.5, 0.75, 1]), atol=1e-6)
    sway = 1 - torch.cos(torch.linspace(0, torch.pi / 2, 33))
    assert_close(times("sway", 32), sway, atol=1e-5)
    assert_close(times("epss", 7), sway[[0, 2, 4, 6, 8, 16, 24, 32]], atol=1e-5)
    for steps in (5, 6, 10, 12, 16):
        assert len(times("epss", steps)) == steps + 1


def test_all_grids_lead_to_the_same_mel(model, prompt):
    exact = model.sample(**prompt | {"num_inference_steps": 256, "guidance_scale": 1.0}).mel
    distances = [
        (model.sample(**prompt | {"num_inference_steps": 64, "guidance_scale": 1.0, "time_grid": grid}).mel - exact)
        for grid in ("uniform", "sway")
    ]
    assert all(distance.norm() < 0.01 * exact.norm() for distance in distances)


def test_guidance_in_an_interval_is_guidance_there_alone(model, prompt):
    evaluations = []
    hook = model.norm.register_forward_hook(lambda _module, args, _output: evaluations.append(len(args[0])))
    options = prompt | {"num_inference_steps": 4}

    def sample(**kwargs):
        evaluations.clear()
        return model.sample(**options, **kwargs).mel, sum(evaluations)

    whole, number = sample()
    assert number == 8
    assert torch.equal(sample(guidance_interval=(0, 1))[0], whole)
    none, number = sample(guidance_interval=(0.5, 0.5))
    assert number == 4
    assert torch.equal(none, sample(guidance_scale=0)[0])
    early, number = sample(guidance_interval=(0.0, 0.5))
    assert number == 6 and not torch.equal(early, whole) and not torch.equal(early, none)
    steps = []
    sample(guidance_interval=(0.0, 0.5), callback_on_step_end=lambda *args: steps.append(args[3]["mel"]))
    guided = []
    sample(callback_on_step_end=lambda *args: guided.append(args[3]["mel"]))
    assert torch.equal(steps[1], guided[1]) and not torch.equal(steps[2], guided[2])
    hook.remove()


def test_callback_sees_and_replaces_the_mel(model, prompt):
    seen = []

    def callback(owner, step, timestep, tensors):
        assert owner is model and tensors["mel"].shape == (1, 20, 16)
        seen.append((step, round(float(timestep), 4)))
        return {"mel": torch.zeros_like(tensors["mel"])} if step == 4 else None

    output = model.sample(**prompt, callback_on_step_end=callback)
    assert seen == [(0, 0.1), (1, 0.3), (2, 0.5), (3, 0.7), (4, 0.9)]
    assert (output.mel == 0).all()


# Training


def test_training_draws_what_is_not_given(device):
    model = tiny_model(device)
    batch = training_batch(device)
    torch.manual_seed(7)
    drawn = model(batch["audio_codes"], labels=batch["labels"])
    torch.manual_seed(7)
    assert drawn.loss == model(batch["audio_codes"], labels=batch["labels"]).loss
    assert drawn.loss != model(batch["audio_codes"], labels=batch["labels"]).loss
    assert drawn.repa_loss is None and drawn.loss == drawn.flow_loss


def test_prompt_lengths_are_drawn_as_documented(device):
    model = tiny_model(device)

    def draw(*frames):
        return model.draw_flow(torch.tensor(frames, device=device), generators(*range(len(frames))))

    drawn = draw(*[50] * 4000)
    lengths = drawn["prompt_lengths"].cpu()
    assert abs((lengths == 0).float().mean() - 0.2) < 0.03
    prompted = lengths[lengths > 0]
    assert prompted.min() == 5 and prompted.max() == 19  # up to 40 %
    # t = 1 - cos(u pi / 2) has the mean 1 - 2 / pi.
    assert abs(drawn["timesteps"].mean().cpu() - 0.363) < 0.02
    assert draw(1, 2, 3)["prompt_lengths"].tolist() == [0, 0, 0]


def test_items_without_prompt_are_unconditional(model, device):
    batch = training_batch(device) | {"prompt_lengths": torch.tensor([0, 5], device=device)}
    other = batch | {"audio_codes": (batch["audio_codes"] + 1) % 50}
    difference = (model(**batch).velocity - model(**other).velocity).abs().amax(dim=(1, 2))
    assert difference[0] == 0 and difference[1] > 1e-4


def test_training_reaches_every_parameter_and_learns(model, device):
    model.train()
    batch = training_batch(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        if not losses:
            assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_gradient_checkpointing_changes_nothing(device):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(device).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.layers)
        model(**training_batch(device)).loss.backward()
        gradients.append([parameter.grad.cpu() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain, atol=1e-6)


# Conventions


def test_save_and_load(model, prompt, tmp_path, device):
    model.save_pretrained(tmp_path)
    loaded, info = FlexiCodecVoiceboxModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(loaded.to(device).sample(**prompt).mel, model.sample(**prompt).mel.cpu(), atol=1e-5)


def test_bfloat16_stays_close_to_float32(model, prompt, tmp_path, device):
    model.save_pretrained(tmp_path)
    half = FlexiCodecVoiceboxModel.from_pretrained(tmp_path, dtype=torch.bfloat16).to(device)
    assert half.dtype == torch.bfloat16
    expected, actual = model.sample(**prompt).mel, half.sample(**prompt).mel
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() / expected.norm() < 0.03


def test_fresh_norms_do_nothing_and_buffers_survive_loading(tmp_path, device):
    model = tiny_model(device)
    embedding = torch.randn(2, 32, device=device)
    hidden_states = torch.randn(2, 5, 32, device=device)
    assert_close(model.norm(hidden_states, embedding), F.rms_norm(hidden_states, (32,), eps=1e-6).cpu())
    model.save_pretrained(tmp_path)
    loaded = FlexiCodecVoiceboxModel.from_pretrained(tmp_path)
    assert_close(loaded.rotary_emb.inv_freq, model.rotary_emb.inv_freq.cpu(), atol=0)


def test_hidden_states_attentions_and_tuples(device):
    model = tiny_model(device, attn_implementation="eager")
    model.set_attn_implementation("eager")
    mel, timesteps = torch.randn(2, 8, 16, device=device), torch.tensor([0.1, 0.9], device=device)
    inputs = {"noisy_mel": mel, "timesteps": timesteps}
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 8, 32)] * 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 8, 8)] * 3
    assert torch.equal(model(**inputs, return_dict=False)[0], output.velocity)


def test_forward_compiles_to_one_graph(model, device):
    codes = torch.arange(8, device=device).reshape(2, 4)
    lengths = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=device)
    inputs = {
        "noisy_mel": torch.randn(2, 16, 16, device=device),
        "timesteps": torch.tensor([0.2, 0.7], device=device),
        "mel_mask": torch.arange(16, device=device) < torch.tensor([[16], [12]], device=device),
    }
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(codes, lengths, **inputs).velocity, model(codes, lengths, **inputs).velocity.detach().cpu())


def test_without_projection(device):
    model = tiny_model(device, repa_layer_index=None)
    assert not any("repa" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="repa_layer_index=None"):
        model(**training_batch(device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_codes": torch.full((1, 5), 50)}, r"`audio_codes` must lie between 0 and 49, but range from 50 to 50"),
        ({"audio_codes": torch.full((1, 5), -1)}, r"`audio_codes` must lie between 0 and 49"),
        ({"audio_codes": torch.zeros(1, 1, 5).long()}, r"`audio_codes` has shape .* pass the semantic one"),
        ({"audio_codes": torch.zeros(1, 5)}, "`audio_codes` must hold integers"),
        ({"token_lengths": torch.ones(1, 4).long()}, r"`token_lengths` has shape \(1, 4\), expected \(1, 5\)"),
        ({"token_lengths": torch.tensor([[1, -1, 1, 1, 1]])}, "`token_lengths` must not be negative"),
        ({"token_lengths": torch.zeros(1, 5).long()}, "at least one frame"),
        ({"prompt_mel": None}, "`prompt_codes` came without `prompt_mel`"),
        ({"prompt_codes": None}, "`prompt_mel` came without `prompt_codes`"),
        ({"prompt_codes": torch.zeros(2, 2).long()}, r"`prompt_codes` has shape \(2, 2\), expected \(1, num_tokens\)"),
        ({"prompt_codes": torch.full((1, 2), 50)}, "`prompt_codes` must lie"),
        ({"prompt_token_lengths": torch.ones(1, 3).long()}, "`prompt_token_lengths` has shape"),
        (
            {"prompt_mel": torch.zeros(1, 8, 15)},
            r"`prompt_mel` has shape \(1, 8, 15\), expected \(1, num_frames, 16\)",
        ),
        (
            {"prompt_mel": torch.zeros(1, 21, 16)},
            "`prompt_codes` of item 0 cover 8 mel frames, but `prompt_mel` has 21",
        ),
        ({"prompt_mel_mask": torch.ones(1, 9)}, r"`prompt_mel_mask` has shape \(1, 9\), expected \(1, 8\)"),
        ({"noise": torch.zeros(1, 19, 16)}, r"`noise` has shape \(1, 19, 16\), expected \(1, 20, 16\)"),
        ({"noise": None, "generator": generators(1, 2)}, "`generator` holds 2 generators for 1 items"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` must be at least 1, and a whole number, got 2.5"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number, got nan"),
        ({"guidance_rescale": "x"}, "`guidance_rescale` must be a finite number, got 'x'"),
        ({"guidance_interval": 0.5}, "`guidance_interval` must be two times"),
        ({"guidance_interval": ("a", "b")}, "`guidance_interval` must be two times"),
        ({"time_grid": "cosine"}, "`time_grid` must be 'uniform', 'sway' or 'epss', got 'cosine'"),
        ({"time_grid": "epss", "num_inference_steps": 8}, r"has \[5, 6, 7, 10, 12, 16\] steps, got .*=8"),
        ({"guidance_interval": (0.5, 0.2)}, "`guidance_interval` must be two times"),
    ],
)
def test_sample_names_what_is_wrong(model, prompt, device, change, message):
    change = {name: value.to(device) if torch.is_tensor(value) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        model.sample(**prompt | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "either `noisy_mel`"),
        ({"noisy_mel": torch.zeros(2, 32, 16)}, "either `noisy_mel`"),
        ({"labels": None, "timesteps": None, "noisy_mel": torch.zeros(2, 32, 16)}, "`noisy_mel` needs `timesteps`"),
        ({"labels": None, "noisy_mel": torch.zeros(2, 32, 16)}, "`semantic_features` are for training"),
        ({"audio_codes": None}, "Training needs `audio_codes`"),
        ({"labels": torch.zeros(2, 32, 15)}, r"`labels` has shape \(2, 32, 15\)"),
        ({"mel_mask": torch.ones(2, 31)}, r"`mel_mask` has shape \(2, 31\)"),
        ({"audio_codes": torch.zeros(2, 4).long()}, "`audio_codes` of item 0 cover 16 mel frames, but the mel has 32"),
        ({"semantic_features": torch.zeros(2, 8, 11)}, "`semantic_features` have shape"),
        ({"semantic_features": torch.zeros(2, 12, 12)}, "`semantic_features` have 12 frames, but the mel has 8"),
    ],
)
def test_forward_names_what_is_wrong(device, change, message):
    change = {name: value.to(device) if torch.is_tensor(value) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        tiny_model(device)(**training_batch(device) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "`hidden_size`"),
        ({"repa_layer_index": 3}, "`repa_layer_index` is 3, but the model has 3 blocks"),
        ({"num_mel_bins": 0}, "num_mel_bins"),
    ],
)
def test_configuration_names_what_is_wrong(change, message):
    with pytest.raises(StrictDataclassError, match=message):
        FlexiCodecVoiceboxConfig(**TINY | change)
