import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file

from conftest import assert_close
from flexicodec_hf.configuration_flexicodec_vocoder import FlexiCodecVocoderConfig
from flexicodec_hf.conversion import convert_vocoder
from flexicodec_hf.modeling_flexicodec_vocoder import FlexiCodecVocoderModel
from model_testers import FlexiCodecVocoderModelTester


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """The fixture's model on the CPU: 16 mel bins, FFT 64, hop 16."""
    fixture = golden("vocos")
    path = tmp_path_factory.mktemp("vocoder") / "vocos.safetensors"
    save_file(fixture.weights, path)
    return convert_vocoder(path, config=fixture.spec["config"])


@pytest.fixture
def model(converted, device):
    return copy.deepcopy(converted).to(device)


@pytest.fixture
def mel(golden, device):
    return golden("vocos")["in/mel"].transpose(1, 2).to(device)


def random_mel(frames: int, device: str, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, frames, 16, generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def test_stages_match_the_reference(model, mel, golden, device):
    fixture = golden("vocos")
    outputs = {}
    for name, module in {
        "embed": model.embed,
        "norm": model.input_norm,
        "convnext0": model.layers[0],
        "convnext1": model.layers[1],
        "convnext2": model.layers[2],
        "backbone": model.output_norm,
        "head_out": model.head.linear,
    }.items():
        module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    audio = model(mel).audio_values
    for name, actual in outputs.items():
        expected = fixture[name]
        assert_close(actual.transpose(1, 2) if name.startswith("convnext") else actual, expected)
    assert_close(audio, fixture["audio"])
    assert audio.shape == (2, 1, 11 * 16)


@torch.no_grad()
def test_a_single_frame_matches_the_reference(model, mel, golden):
    assert_close(model(mel[:1, :1]).audio_values, golden("vocos")["audio_T1"])


@torch.no_grad()
def test_released_sizes_of_the_transform_match_the_reference(golden, tmp_path, device):
    fixture = golden("tts")
    path = tmp_path / "vocos.safetensors"
    save_file({k.removeprefix("vocos/"): v for k, v in fixture.weights.items() if k.startswith("vocos/")}, path)
    model = convert_vocoder(path, config=fixture.spec["vocos_config"]).to(device)
    audio = model(fixture["nar/predicted_mel"].to(device)).audio_values
    assert_close(audio[0, 0], fixture["nar/audio_24k"])


@torch.no_grad()
def test_items_of_a_batch_equal_single_runs(model, device):
    mel = random_mel(23, device, batch_size=3)
    lengths = [23, 9, 1]
    mask = torch.arange(23, device=device) < torch.tensor(lengths, device=device)[:, None]
    together = model(mel, mask)
    assert together.padding_mask.sum(dim=1).tolist() == [16 * length for length in lengths]
    assert (together.audio_values[:, 0][~together.padding_mask] == 0).all()
    for index, length in enumerate(lengths):
        alone = model(mel[index : index + 1, :length])
        assert alone.padding_mask.all() and alone.padding_mask.shape == (1, 16 * length)
        assert_close(together.audio_values[index, :, : 16 * length], alone.audio_values[0].cpu(), atol=2e-5)
    garbage = torch.where(mask[..., None], mel, torch.full_like(mel, 1e3))
    assert torch.equal(model(garbage, mask).audio_values, together.audio_values)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_have_no_seams(model, device, masked):
    mel = random_mel(150, device)
    # The first item ends before the batch does.
    mask = torch.arange(150, device=device) < torch.tensor([[141], [37]], device=device) if masked else None
    whole = model(mel, mask).audio_values.cpu()
    seconds_per_frame = 16 / model.config.sampling_rate
    for frames in (1, 40, 64, 150, 1000):
        chunked = model(mel, mask, chunk_length_s=frames * seconds_per_frame * 1.001)
        assert_close(chunked.audio_values, whole, atol=2e-5)


@torch.no_grad()
def test_context_is_the_receptive_field(model, device):
    # Changing a frame reaches exactly as far as the configuration says.
    mel = random_mel(61, device, batch_size=1)
    other = mel.clone()
    other[:, 30] += 1
    changed = (model(mel).audio_values - model(other).audio_values)[0, 0].abs() > 0
    frames = changed.unflatten(0, (61, 16)).any(dim=1).nonzero()[:, 0]
    context = model.config.context_frames
    assert context == 14
    assert (frames.min(), frames.max()) == (30 - context, 30 + context)


def test_gradients_are_finite_and_reach_everything(model, mel):
    with torch.no_grad():
        model.head.linear.bias[:33] += 100  # magnitudes that overflow before the limit
    mel.requires_grad_()
    model(mel).audio_values.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert mel.grad.isfinite().all() and mel.grad.any()
    with torch.no_grad():
        model.head.linear.bias[:33] -= 100
    model.zero_grad()
    model(mel).audio_values.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_gradient_checkpointing_changes_nothing(converted, mel, device):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(converted).to(device).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.layers)
        model(mel).audio_values.square().mean().backward()
        gradients.append([parameter.grad.cpu() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain, atol=1e-6)


@torch.no_grad()
def test_save_load_and_tuples(model, mel, tmp_path, device):
    model.save_pretrained(tmp_path)
    loaded, info = FlexiCodecVocoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model(mel).audio_values
    assert_close(loaded.to(device)(mel).audio_values, expected.cpu(), atol=1e-5)
    assert torch.equal(model(mel, return_dict=False)[0], expected)


@torch.no_grad()
def test_bfloat16_keeps_the_head_and_stays_close_to_float32(model, mel, tmp_path, device):
    model.save_pretrained(tmp_path)
    half = FlexiCodecVocoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16).to(device)
    assert half.layers[0].up_proj.weight.dtype == torch.bfloat16
    assert half.head.linear.weight.dtype == torch.float32
    expected, actual = model(mel).audio_values, half(mel).audio_values
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() / expected.norm() < 0.03


@torch.no_grad()
def test_forward_compiles_to_one_graph(model, mel, device):
    mask = torch.arange(11, device=device) < torch.tensor([[11], [7]], device=device)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(mel, mask).audio_values, model(mel, mask).audio_values.cpu())


@torch.no_grad()
@pytest.mark.slow
def test_released_size_in_chunks(device):
    torch.manual_seed(0)
    model = FlexiCodecVocoderModel(FlexiCodecVocoderConfig()).to(device).eval()
    mel = torch.randn(1, 400, 128, device=device)
    whole = model(mel).audio_values.cpu()
    assert whole.shape == (1, 1, 400 * 480)
    assert_close(model(mel, chunk_length_s=2.0).audio_values, whole, atol=1e-4 * float(whole.abs().max()))


def test_fresh_layer_scales(device):
    config = FlexiCodecVocoderConfig(num_mel_bins=4, hidden_size=8, intermediate_size=8, num_hidden_layers=5)
    model = FlexiCodecVocoderModel(config).to(device)
    for layer in model.layers:
        assert_close(layer.layer_scale, torch.full((8,), 0.2))
    assert model(torch.zeros(1, 3, 4, device=device)).audio_values.shape == (1, 1, 3 * 480)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mel": torch.zeros(1, 5, 15)}, r"`mel` has shape \(1, 5, 15\), expected \(batch_size, num_frames, 16\)"),
        ({"mel": torch.zeros(5, 16)}, r"`mel` has shape \(5, 16\)"),
        ({"mel": torch.zeros(1, 0, 16)}, "at least one frame"),
        ({"mel": torch.zeros(1, 5, 16), "mel_mask": torch.ones(1, 4)}, r"`mel_mask` has shape \(1, 4\), expected"),
        ({"mel": torch.zeros(1, 5, 16), "chunk_length_s": 1e-6}, "`chunk_length_s` is 1e-06, but a chunk needs"),
    ],
)
def test_forward_names_what_is_wrong(model, device, arguments, message):
    arguments = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 6}, "`kernel_size` must be odd"),
        ({"n_fft": 64, "hop_length": 15}, "`n_fft`"),
        ({"n_fft": 64, "hop_length": 128}, "`n_fft`"),
    ],
)
def test_configuration_names_what_is_wrong(change, message):
    with pytest.raises(StrictDataclassError, match=message):
        FlexiCodecVocoderConfig(**change)


def test_configuration_derives_rates():
    config = FlexiCodecVocoderConfig()
    assert config.frame_rate == 50
    assert config.context_frames == 95 and math.isclose(config.context_frames / config.frame_rate, 1.9)


def test_phases_are_exact_under_autocast(device):
    tester = FlexiCodecVocoderModelTester()
    model = tester.create_model().to(device)
    inputs = {name: tensor.to(device) for name, tensor in tester.prepare_config_and_inputs()[1].items()}
    types = []
    model.head.linear.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    model.layers[0].up_proj.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        assert model(**inputs).audio_values.dtype == torch.float32
    assert types == [torch.bfloat16, torch.float32]
