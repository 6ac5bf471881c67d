import pytest
import torch
import torch.nn.functional as F

from conftest import assert_close
from flexicodec_hf.linear_flexicodec import FlexiCodecLinear


# The first fills too few rows for the convolution, the others fill enough.
@pytest.mark.parametrize("shape", [(48,), (3, 5, 48), (512, 48), (4, 150, 48), (2, 3, 100, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_linear_layer(shape, bias, device):
    linear = FlexiCodecLinear(48, 80, bias=bias).to(device)
    inputs = torch.randn(shape, device=device, requires_grad=True)
    expected = F.linear(inputs, linear.weight, linear.bias)
    output = linear(inputs)
    assert_close(output, expected, 1e-5)
    assert output.is_contiguous()

    variables = [inputs, *linear.parameters()]
    weighting = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, variables, weighting)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, variables, weighting), strict=True):
        assert_close(gradient, wanted, 1e-3)


@pytest.mark.parametrize("shape", [(1024,), (1, 1, 1024)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_single_row_times_large_weights(shape, bias, device, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # 6 parts: 4 do not divide the 1026 outputs
    linear = FlexiCodecLinear(1024, 1026, bias=bias).to(device)
    inputs = torch.randn(shape, device=device, requires_grad=True)
    expected = F.linear(inputs, linear.weight, linear.bias)
    output = linear(inputs)
    assert output.shape == expected.shape
    assert_close(output, expected, 1e-5)

    variables = [inputs, *linear.parameters()]
    weighting = torch.randn_like(expected)
    gradients = torch.autograd.grad(output, variables, weighting)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, variables, weighting), strict=True):
        assert_close(gradient, wanted, 1e-3)
    with pytest.raises(RuntimeError):
        linear(torch.randn(1, 24, device=device))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_single_bfloat16_row_leaves_onednn_as_it_was(enabled, device, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    linear = FlexiCodecLinear(1024, 1024).to(device, torch.bfloat16)
    row = torch.randn(1, 1, 1024, device=device, dtype=torch.bfloat16)
    assert_close(linear(row).float(), F.linear(row, linear.weight, linear.bias).float(), 1e-2)
    assert torch.backends.mkldnn.enabled is enabled
    with pytest.raises(RuntimeError):
        linear(row[..., :24])
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
def test_weights_with_a_product_of_their_own(rows, dtype, device, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    linear = FlexiCodecLinear(1024, 1024).to(device, dtype)
    inputs = torch.randn(1, rows, 1024, device=device, dtype=dtype)
    expected = F.linear(inputs, linear.weight, linear.bias)
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(QuantizedWeight))
    assert_close(linear(inputs).as_subclass(torch.Tensor).float(), expected.float(), 1e-2)


def test_transposed_input(device):
    linear = FlexiCodecLinear(48, 80).to(device)
    inputs = torch.randn(2, 48, 300, device=device).transpose(1, 2)
    assert_close(linear(inputs), F.linear(inputs, linear.weight, linear.bias), 1e-5)


@pytest.mark.parametrize("rows", [4, 600])
def test_wrong_width(rows, device):
    with pytest.raises(RuntimeError):
        FlexiCodecLinear(48, 80).to(device)(torch.randn(rows, 24, device=device))


def test_compiles_with_dynamic_rows(device):
    linear = FlexiCodecLinear(48, 80).to(device)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (10, 400):
        inputs = torch.randn(2, rows, 48, device=device)
        assert_close(compiled(inputs), linear(inputs), 1e-5)
