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
