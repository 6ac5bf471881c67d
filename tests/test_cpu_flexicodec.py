"""`optimize_for_cpu`: the same numbers from other kernels, and nothing else changes."""

import copy
import multiprocessing
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import assert_close
from flexicodec_hf import FlexiCodecForTextToSpeech, FlexiCodecModel
from flexicodec_hf.cpu_flexicodec import _Int8Linear, optimize_for_cpu


@pytest.fixture(scope="module")
def codecs(codec_dir):
    """The small codec of the fixtures, plain and optimized."""
    plain = FlexiCodecModel.from_pretrained(codec_dir()).eval()
    return plain, optimize_for_cpu(copy.deepcopy(plain))


def inputs_of(golden) -> dict[str, torch.Tensor]:
    fixture = golden("codec_tiny")
    return {"input_values": fixture["in/audio_b2"][:, None], "input_features": fixture["x_b2"]} | {
        name: (torch.arange(length) < fixture[lengths][:, None]).long()
        for name, length, lengths in (
            ("padding_mask", fixture["in/audio_b2"].shape[1], "in/audio_lens_b2"),
            ("input_features_mask", fixture["x_b2"].shape[1], "x_lens_b2"),
        )
    }


def assert_same_gradients(output: torch.Tensor, expected: torch.Tensor, variables: list[torch.Tensor]) -> None:
    weighting = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, variables, weighting)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, variables, weighting), strict=True):
        assert_close(gradient, wanted, 1e-3)


# ------------------------------------------------------------------------------------------------- whole models


@torch.no_grad()
def test_an_optimized_codec_gives_the_same(codecs, golden):
    plain, fast = codecs
    inputs = inputs_of(golden)
    expected, output = (codec.encode(**inputs) for codec in codecs)
    assert torch.equal(output.audio_codes, expected.audio_codes)
    assert torch.equal(output.token_lengths, expected.token_lengths)
    assert_close(output.latents, expected.latents, atol=1e-4)
    assert_close(fast.decode(**expected).audio_values, plain.decode(**expected).audio_values, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tile_size", [1, 20_000])
def test_tiles_of_residual_units_have_no_seams(codecs, golden, monkeypatch, tile_size):
    """Tiles far shorter than the sequences, with items that end within them."""
    monkeypatch.setattr("flexicodec_hf.cpu_flexicodec._TILE_SIZE", tile_size)
    plain, fast = codecs
    expected, output = (codec.encode_frames(**inputs_of(golden)) for codec in codecs)
    assert_close(output.acoustic_frames, expected.acoustic_frames, atol=1e-4)
    encoded = plain.encode(**inputs_of(golden))
    assert_close(fast.decode(**encoded).audio_values, plain.decode(**encoded).audio_values, atol=1e-5)


def test_it_trains_as_before(codecs, golden):
    losses, gradients = [], []
    for codec in codecs:
        codec = copy.deepcopy(codec).train()
        output = codec(**inputs_of(golden), merging_threshold=0.9, num_quantizers=3)
        loss = output.audio_values.square().mean() + output.loss
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in codec.named_parameters() if p.grad is not None})
    assert_close(losses[1], losses[0].detach(), atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, atol=1e-5 + 1e-3 * gradient.abs().max().item())


def test_parameters_modules_and_files_stay(codec_dir, tmp_path):
    codec = FlexiCodecModel.from_pretrained(codec_dir())
    parameters, modules = dict(codec.named_parameters()), dict(codec.named_modules())
    codec.save_pretrained(tmp_path / "plain")
    assert optimize_for_cpu(codec) is codec
    classes = [type(module) for module in codec.modules()]
    assert classes != [type(module) for module in FlexiCodecModel(codec.config).modules()]
    assert optimize_for_cpu(codec) is codec
    assert [type(module) for module in codec.modules()] == classes
    assert all(codec.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert dict(codec.named_modules()) == modules
    codec.save_pretrained(tmp_path / "optimized")
    plain, optimized = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("plain", "optimized")
    )
    assert plain == optimized


@torch.no_grad()
def test_hooks_run_and_replaced_layers_take_effect(codecs, golden):
    fast = copy.deepcopy(codecs[1])
    inputs = inputs_of(golden)
    before = fast.encode_frames(**inputs).acoustic_frames
    called = []
    unit = fast.acoustic_encoder.block[0].res_unit1
    for module in (unit, unit.snake1, unit.conv2, fast.bottleneck.layers[0].fc1):
        module.register_forward_hook(lambda module, *_: called.append(module))
    fast.decode(**fast.encode(**inputs))
    assert set(called) == {unit, unit.snake1, unit.conv2, fast.bottleneck.layers[0].fc1}
    unit.conv2 = nn.Sequential(unit.conv2, nn.Tanh())
    assert not torch.equal(fast.encode_frames(**inputs).acoustic_frames, before)


def test_layers_of_other_libraries_are_left_alone():
    class Quantized(nn.Linear):
        pass

    model = nn.Sequential(Quantized(4, 4), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, groups=4, stride=2), nn.Linear(4, 4))
    optimize_for_cpu(model)
    assert [type(module) for module in model[:3]] == [Quantized, nn.Conv1d, nn.Conv1d]
    assert type(model[3]) is not nn.Linear


# -------------------------------------------------------------------------------------------------- linear layers


def fast_linear(*sizes: int, bias: bool = True) -> nn.Linear:
    return optimize_for_cpu(nn.Linear(*sizes, bias=bias))


# The first fills too few rows for the convolution, the others fill enough.
@pytest.mark.parametrize("shape", [(48,), (3, 5, 48), (512, 48), (4, 150, 48), (2, 3, 100, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_linear_layer(shape, bias, device):
    linear = fast_linear(48, 80, bias=bias).to(device)
    inputs = torch.randn(shape, device=device, requires_grad=True)
    expected = F.linear(inputs, linear.weight, linear.bias)
    output = linear(inputs)
    assert_close(output, expected, 1e-5)
    assert output.is_contiguous()
    assert_same_gradients(output, expected, [inputs, *linear.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1024,), (1, 1, 1024)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_single_row_times_large_weights(shape, bias, dtype, mode, device, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    linear = fast_linear(1024, 1027, bias=bias).to(device, dtype)
    inputs = torch.randn(shape, device=device, dtype=dtype)
    with mode():
        expected = F.linear(inputs, linear.weight, linear.bias).cpu()
        output = linear(inputs)
        assert output.shape == expected.shape and output.requires_grad == expected.requires_grad
        assert_close(output.float(), expected.detach().float(), 1e-5 if dtype == torch.float32 else 1e-2)
        with pytest.raises(RuntimeError):
            linear(torch.randn(1, 24, device=device, dtype=dtype))
    if mode is torch.enable_grad and dtype == torch.float32:
        expected = F.linear(inputs, linear.weight, linear.bias)
        assert_same_gradients(output, expected, list(linear.parameters()))


def in_a_child(queue, linear, row):
    with torch.no_grad():
        queue.put(linear(row).tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the system has no fork")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    linear, row = fast_linear(1024, 1024), torch.randn(1024)
    with torch.no_grad():
        expected = linear(row)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=in_a_child, args=(queue, linear, row), daemon=True)
    process.start()
    assert_close(torch.tensor(queue.get(timeout=60)), expected, 1e-6)
    process.join(60)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_single_bfloat16_row_leaves_onednn_as_it_was(enabled, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    linear = fast_linear(1024, 1024).to(torch.bfloat16)
    row = torch.randn(1, 1, 1024, dtype=torch.bfloat16)
    linear(row)
    assert torch.backends.mkldnn.enabled is enabled
    with pytest.raises(RuntimeError):
        linear(row[..., :24])
    assert torch.backends.mkldnn.enabled is enabled


@pytest.mark.parametrize("enabled", [True, False])
def test_threads_leave_onednn_as_it_was(enabled, monkeypatch):
    """Two threads are inside at once: what the second finds is not what was set before."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    inside, outputs, barrier = [], {}, threading.Barrier(2, timeout=30)
    linear = nn.Linear.forward

    def wait(self, row):
        barrier.wait()
        inside.append(torch.backends.mkldnn.enabled)
        barrier.wait()
        return linear(self, row)

    monkeypatch.setattr(nn.Linear, "forward", wait)
    layer, row = fast_linear(1024, 1024).to(torch.bfloat16), torch.randn(1, 1024, dtype=torch.bfloat16)

    def run(name):
        with torch.no_grad():
            outputs[name] = layer(row)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == [False, False] and len(outputs) == 2
    assert torch.backends.mkldnn.enabled is enabled


class QuantizedWeight(torch.Tensor):
    """Knows one product, as the weights of quantization libraries do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.view):
            raise NotImplementedError(function.__name__)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_with_a_product_of_their_own(rows, dtype, device):
    linear = fast_linear(1024, 1024).to(device, dtype)
    inputs = torch.randn(1, rows, 1024, device=device, dtype=dtype)
    expected = F.linear(inputs, linear.weight, linear.bias)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(QuantizedWeight))
    assert_close(linear(inputs).as_subclass(torch.Tensor).float(), expected.float(), 1e-2)


def test_transposed_input(device):
    linear = fast_linear(48, 80).to(device)
    inputs = torch.randn(2, 48, 300, device=device).transpose(1, 2)
    assert_close(linear(inputs), F.linear(inputs, linear.weight, linear.bias), 1e-5)


@pytest.mark.parametrize("rows", [4, 600])
def test_wrong_width(rows, device):
    with pytest.raises(RuntimeError):
        fast_linear(48, 80).to(device)(torch.randn(rows, 24, device=device))


def test_compiles_with_dynamic_rows(device):
    linear = fast_linear(48, 80).to(device)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (10, 400):
        inputs = torch.randn(2, rows, 48, device=device)
        assert_close(compiled(inputs), linear(inputs), 1e-5)


# -------------------------------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_depthwise_convolution_of_a_transposed_view(batch_size, bias, dtype, device):
    conv = nn.Conv1d(16, 16, kernel_size=7, padding=3, groups=16, bias=bias).to(device, dtype)
    inputs = torch.randn(batch_size, 50, 16, device=device, dtype=dtype, requires_grad=True)
    expected = conv(inputs.transpose(1, 2))
    output = optimize_for_cpu(conv)(inputs.transpose(1, 2))
    assert_close(output.float(), expected.detach().cpu().float(), 1e-5 if dtype == torch.float32 else 2e-2)
    assert output.device.type != "cpu" or output.transpose(1, 2).is_contiguous()
    if dtype == torch.float32:
        assert_same_gradients(output, expected, [inputs, *conv.parameters()])


def test_a_depthwise_convolution_of_other_layouts(device):
    conv = nn.Conv1d(16, 16, kernel_size=7, padding=3, groups=16).to(device)
    for inputs in (torch.randn(2, 16, 50), torch.randn(16, 50), torch.randn(2, 20, 50)[:, 2:18]):
        expected = conv(inputs.to(device)).detach().cpu()
        assert_close(optimize_for_cpu(copy.deepcopy(conv))(inputs.to(device)), expected, 1e-5)


# -------------------------------------------------------------------------------------------------------- int8


@pytest.fixture(scope="module")
def speakers(tts_repository):
    """The tiny text-to-speech system, plain and in int8."""
    plain = FlexiCodecForTextToSpeech.from_pretrained(tts_repository, subfolder="tts").eval()
    return plain, optimize_for_cpu(copy.deepcopy(plain), dtype="int8")


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 50, 64)])
def test_int8_products_are_close_row_by_row(shape, dtype):
    linear = nn.Linear(64, 48).to(dtype)
    rows = torch.randn(shape).to(dtype)
    rows[..., :1] *= 10
    expected = linear(rows)
    output = _Int8Linear(linear)(rows)
    assert output.dtype == dtype and output.shape == expected.shape
    assert 1e-4 < relative(output.float(), expected.float()) < 0.03
    if rows.ndim == 3:  # a large row leaves the others their bits
        small = _Int8Linear(linear)(rows)[0, 1:]
        rows[0, 0] *= 1e4
        assert torch.equal(_Int8Linear(linear)(rows)[0, 1:], small)


@torch.no_grad()
def test_int8_speech_is_close_and_the_codec_untouched(speakers, golden):
    plain, fast = speakers
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (2, 9), generator=generator)
    codes = torch.randint(plain.config.ar_config.speech_vocab_size, (2, 30), generator=generator)
    inputs = plain.ar.build_inputs(ids, None, codes, torch.ones_like(codes), None, merging_threshold=0.91)
    expected, output = (model.ar(**inputs) for model in speakers)
    assert 0 < relative(output.logits, expected.logits) < 0.1
    assert (output.logits.argmax(-1) == expected.logits.argmax(-1)).float().mean() > 0.8

    noise = torch.randn(2, 30 * plain.voicebox.config.upsample_factor, plain.voicebox.config.num_mel_bins)
    mels = [model.voicebox.sample(codes, noise=noise, num_inference_steps=4).mel for model in speakers]
    assert 0 < relative(mels[1], mels[0]) < 0.1

    spoken = fast.generate(ids[:1], seed=0, max_new_tokens=5, return_dict_in_generate=True)
    assert spoken.audio.isfinite().all() and spoken.audio.any()

    for part in ("codec", "vocoder"):
        weights = getattr(fast, part).state_dict()
        for name, weight in getattr(plain, part).state_dict().items():
            assert torch.equal(weights[name], weight)
    assert not any(isinstance(module, _Int8Linear) for module in (*fast.codec.modules(), *fast.vocoder.modules()))
    assert type(fast.ar.duration_head).__base__ is nn.Linear and isinstance(fast.ar.lm_head, _Int8Linear)


def test_int8_weights_are_small_and_stay(speakers):
    _, fast = speakers
    layers = [module for module in fast.modules() if isinstance(module, _Int8Linear)]
    assert optimize_for_cpu(fast, dtype="int8") is fast
    assert [module for module in fast.modules() if isinstance(module, _Int8Linear)] == layers
    assert not any("weight" in dict(layer.named_parameters()) for layer in layers)
    assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def test_int8_models_are_refused_where_they_fail(speakers, codecs, tmp_path):
    with pytest.raises(ValueError, match="cannot be saved: save it before"):
        speakers[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FlexiCodecModel holds neither"):
        optimize_for_cpu(codecs[0], dtype="int8")
    with pytest.raises(ValueError, match="`dtype` must be 'int8' or None, got 'float16'"):
        optimize_for_cpu(codecs[0], dtype="float16")
