"""Kernels that make the models faster on a CPU, for those who ask for them: [`optimize_for_cpu`].

The model files are plain PyTorch. The classes here replace some of their modules, with the same
parameters under the same names and the same values up to rounding; with `dtype="int8"`, also with
weights of 8 bits.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chunking_flexicodec import Chunk, windows
from .modeling_flexicodec import (
    FlexiCodecDecoderBlock,
    FlexiCodecEncoderBlock,
    FlexiCodecResidualUnitsMixin,
    FlexiCodecSnake1d,
)
from .modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration, FlexiCodecARLayer
from .modeling_flexicodec_voicebox import FlexiCodecVoiceboxLayer


ModelT = TypeVar("ModelT", bound=nn.Module)

# With fewer rows a pointwise convolution is no faster than a product, and mostly slower.
_MIN_ROWS = 128
# Smaller weights stay in the cache from one step to the next, where PyTorch's products are fast.
_MIN_ROW_WEIGHTS = 2**20
# What decides on durations, and products that run once a call.
_NOT_INT8 = ("duration_head", "relative_k_proj", "to_weight")
# Values of a tile that a processor's cache holds while three residual units run over it.
_TILE_SIZE = 2**20


def optimize_for_cpu(model: ModelT, dtype: str | None = None) -> ModelT:
    """Replace modules of a model, in place, by ones that are faster on a CPU.

    Works on every model of this package, alone or as a part of another, and on any module that
    holds the same layers:

    - [`~torch.nn.Linear`]: many float32 rows, or a single bfloat16 row;
    - depthwise [`~torch.nn.Conv1d`] over time, applied to a transposed `(batch_size, length, channels)`;
    - the blocks of the codec's acoustic encoder and decoder, and their Snake activations, without gradients.

    Parameters, their names, hooks and the files that `save_pretrained` writes stay the same;
    outputs are equal up to rounding. Elsewhere than on a CPU, under `torch.compile`, and where a
    library has put in layers or weights of its own (quantized, sharded), the modules compute as
    before. A hook on a residual unit of the codec, or on a layer in it, runs once for each tile of
    a long sequence. Calling the function again changes nothing.

    With `dtype="int8"`, the linear layers of the transformers in the autoregressive model and in the
    Voicebox, and the head that scores tokens, get weights of 8 bits with a scale for each output,
    and their inputs 8 bits with a scale for each row. They take half the memory of bfloat16, and
    less time. Outputs change: by about 1 % at each layer. The codec, durations and vocoder stay as
    they are. The model can then neither be trained nor saved.

    Args:
        model: A model or any other module, of any dtype.
        dtype (`str`, *optional*): `"int8"`, or by default the types that the weights have.

    Returns:
        The same model.

    Raises:
        ValueError: `dtype` is unknown, the model has no layers for it, or the processor has no
            VNNI.

    Example:

    ```python
    >>> from flexicodec_hf import FlexiCodecModel, optimize_for_cpu

    >>> codec = optimize_for_cpu(FlexiCodecModel.from_pretrained("jiaqili3/flexicodec"))
    ```
    """
    if dtype not in (None, "int8"):
        raise ValueError(f"`dtype` must be 'int8' or None, got {dtype!r}: for other types use `model.to(...)`.")
    if dtype == "int8":
        _to_int8(model)
    for module in model.modules():
        # Exact types: subclasses, such as those of quantization libraries, have a `forward` of
        # their own.
        fast = _FAST_CLASSES.get(type(module))
        if fast is not None and (fast is not _DepthwiseConv1d or _is_depthwise(module)):
            # The object stays, and with it its parameters, hooks, mode and everyone who holds it.
            module.__class__ = fast
    return model


def _to_int8(model: nn.Module) -> None:
    # Without VNNI, oneDNN's sums of 8-bit products overflow.
    if not torch.cpu._is_vnni_supported():
        raise ValueError("int8 needs a processor with VNNI (AVX-512 or AVX): load the model in bfloat16 instead.")
    found = False
    for module in list(model.modules()):
        if isinstance(module, (FlexiCodecARLayer, FlexiCodecVoiceboxLayer)):
            parents = list(module.modules())
        elif isinstance(module, FlexiCodecARForConditionalGeneration):
            parents = [module]
        else:
            continue
        found = True
        module.requires_grad_(False)
        for parent in parents:
            for name, child in list(parent.named_children()):
                if type(child) in (nn.Linear, _Linear) and name not in _NOT_INT8:
                    setattr(parent, name, _Int8Linear(child))
    if not found:
        raise ValueError(
            f"int8 is for the autoregressive model and the Voicebox, and {type(model).__name__} holds neither: the "
            "codec's tokens depend on small differences."
        )


class _Int8Linear(nn.Module):
    """Linear layer with weights of 8 bits, a scale for each output, and inputs of 8 bits, a scale for each row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        # No buffers: `model.to(torch.bfloat16)` must leave them.
        self.weight_scales = scales
        self.zero_points = torch.zeros_like(scales, dtype=torch.int32)
        quantized = (weight / scales[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1]).float()
        scales = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
        # PyTorch's product takes one scale for all rows, so theirs are left for afterwards.
        quantized = (rows / scales).round_().add_(128).to(torch.uint8)
        output = torch.ops.onednn.qlinear_pointwise(
            quantized,
            1.0,
            128,
            self.packed,
            self.weight_scales,
            self.zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        output *= scales
        if self.bias is not None:
            output += self.bias
        return output.to(input.dtype).view(*input.shape[:-1], -1)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise ValueError("A model with int8 weights cannot be saved: save it before `optimize_for_cpu`.")


class _Linear(nn.Linear):
    """Linear layer that chooses the kernel that is fast for the shape of its input.

    - Many float32 rows are taken as a pointwise convolution: PyTorch gives products to MKL and, with
      two threads or more, convolutions to oneDNN, which takes half the time on AMD processors.
    - A single bfloat16 row, as in a step of generation, takes as long as the weights are read. oneDNN
      reads them at half the speed of PyTorch's own kernel.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _is_plain_cpu(input, self.weight):
            return super().forward(input)
        num_rows = input.shape[:-1].numel()
        if input.dtype == torch.float32 and num_rows >= _MIN_ROWS:
            # An image of one row. Its channels-last layout is that of the rows, before and after:
            # nothing is copied.
            image = input.reshape(1, 1, num_rows, -1).permute(0, 3, 1, 2)
            output = F.conv2d(image, self.weight[:, :, None, None], self.bias)
            return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)
        if input.dtype == torch.bfloat16 and num_rows == 1 and self.weight.numel() >= _MIN_ROW_WEIGHTS:
            with _onednn_off():
                return super().forward(input)
        return super().forward(input)


class _DepthwiseConv1d(nn.Conv1d):
    """Depthwise convolution that is fast for transposed views of `(batch_size, length, channels)`.

    Such a view is computed as a convolution of images of one row, which knows channels-last
    tensors. The convolution of sequences copies its input and output, half of its time.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _is_plain_cpu(input, self.weight) or input.ndim != 3 or not input.transpose(1, 2).is_contiguous():
            return super().forward(input)
        image, weight = input.unsqueeze(2), self.weight.unsqueeze(2)
        padding = (0, int(self.padding[0]))
        return F.conv2d(image, weight, self.bias, padding=padding, groups=self.groups).squeeze(2)


class _Snake1d(FlexiCodecSnake1d):
    """Snake activation with one temporary tensor instead of four, where autograd needs none of them."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        is_plain = _is_plain_cpu(hidden_states, self.alpha) and hidden_states.dtype != torch.float16
        if torch.is_grad_enabled() or not is_plain:
            return super().forward(hidden_states)
        waves = (hidden_states * self.alpha).sin_().square_()
        return torch.addcmul(hidden_states, (self.alpha + 1e-9).reciprocal(), waves, out=waves)


class _TiledResidualUnits(FlexiCodecResidualUnitsMixin):
    """The three residual units of a block, tile by tile.

    Where the sequences are longest, they are bound by memory, not arithmetic. A tile stays in the
    cache, with as much context as the units reach: the same numbers in a third of the time.
    """

    def residual_units(self, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() or not _is_plain_cpu(hidden_states, self.snake1.alpha):
            return super().residual_units(hidden_states, lengths)
        units: list[Any] = [self.res_unit1, self.res_unit2, self.res_unit3]
        reach = sum(unit.conv1.padding[0] for unit in units)
        size = max(_TILE_SIZE // hidden_states[..., 0].numel(), reach)
        output = torch.empty_like(hidden_states)
        for core, window in windows(hidden_states.shape[-1], Chunk(size, reach)):
            tile_lengths = None if lengths is None else lengths - window.start
            tile = super().residual_units(hidden_states[..., window], tile_lengths)
            output[..., core] = tile[..., core.start - window.start : core.stop - window.start]
        return output


class _EncoderBlock(_TiledResidualUnits, FlexiCodecEncoderBlock):
    pass


class _DecoderBlock(_TiledResidualUnits, FlexiCodecDecoderBlock):
    pass


_FAST_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv1d: _DepthwiseConv1d,
    FlexiCodecSnake1d: _Snake1d,
    FlexiCodecEncoderBlock: _EncoderBlock,
    FlexiCodecDecoderBlock: _DecoderBlock,
}


def _is_depthwise(conv: nn.Module) -> bool:
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.stride == conv.dilation == (1,)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def _is_plain_cpu(input: Tensor, parameter: Tensor) -> bool:
    """Whether the kernels here may be used."""
    # Quantized and sharded weights bring their own product. Inductor has kernels of its own, and
    # cannot lay out the image of a row when its length is dynamic.
    return input.device.type == "cpu" and type(parameter) is nn.Parameter and not torch.compiler.is_compiling()


_onednn_lock = threading.Lock()
_onednn_users = 0
_onednn_before = True


@contextmanager
def _onednn_off() -> Iterator[None]:
    """Turn oneDNN off for the products inside.

    PyTorch has one switch for the process, and no product of one bfloat16 row that avoids oneDNN
    without it. The first thread to come remembers the setting, and the last to leave restores it.
    """
    # TODO: drop once PyTorch's `linear` does not take oneDNN for a single bfloat16 row on a CPU.
    global _onednn_users, _onednn_before
    with _onednn_lock:
        if _onednn_users == 0:
            _onednn_before = _set_onednn(False)
        _onednn_users += 1
    try:
        yield
    finally:
        with _onednn_lock:
            _onednn_users -= 1
            if _onednn_users == 0:
                _set_onednn(_onednn_before)


def _set_onednn(enabled: bool) -> bool:
    return torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)[0]


__all__ = ["optimize_for_cpu"]
