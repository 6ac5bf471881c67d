"""A linear layer that is fast on CPUs with many rows, and with a single one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# With fewer rows the convolution is no faster, and mostly slower.
_MIN_ROWS = 128
# Smaller weights stay in the cache from one step to the next: no thread waits for memory.
_MIN_ROW_WEIGHTS = 2**20


class FlexiCodecLinear(nn.Linear):
    """
    [`~torch.nn.Linear`] that on a CPU chooses the kernel that is fast for the shape of its input. The values are those of
    the plain layer, up to rounding.

    - Many float32 rows are taken as a pointwise convolution: PyTorch gives products to MKL and, with two threads or more,
      convolutions to oneDNN, which takes half the time on AMD processors.
    - A single row, as in a step of generation, takes as long as its weights are read. MKL reads float32 weights in one
      thread; as a batch of parts of the weights all threads do. oneDNN reads bfloat16 weights at half the speed of
      PyTorch's own kernel.
    """

    def forward(self, input: Tensor) -> Tensor:
        num_rows = input.shape[:-1].numel()
        # Quantized and sharded weights bring their own product. Inductor has kernels of its own, and cannot lay out the
        # image when its length is dynamic.
        if input.device.type != "cpu" or type(self.weight) is not nn.Parameter or torch.compiler.is_compiling():
            return super().forward(input)
        is_float32 = input.dtype == torch.float32
        if is_float32 and num_rows >= _MIN_ROWS:
            # An image of one row. Its channels-last layout is that of the rows, before and after: nothing is copied.
            image = input.reshape(1, 1, num_rows, -1).permute(0, 3, 1, 2)
            output = F.conv2d(image, self.weight[:, :, None, None], self.bias)
            return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)
        if num_rows == 1 and self.weight.numel() >= _MIN_ROW_WEIGHTS:
            if is_float32 and torch.get_num_threads() > 1:
                return self._in_parts(input)
            if input.dtype == torch.bfloat16 and torch.backends.mkldnn.enabled:
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
                try:
                    return super().forward(input)
                finally:
                    # Not what it was before: a thread beside this one may have turned it off for its own product.
                    torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
        return super().forward(input)

    def _in_parts(self, row: Tensor) -> Tensor:
        # Equal parts, a few more than threads where their number must divide, say, 32,769 outputs.
        threads = torch.get_num_threads()
        parts = next((n for n in range(threads, 4 * threads) if self.out_features % n == 0), 1)
        # Transposed, not reshaped: with other strides of the column, bmm takes six times as long.
        column = row.reshape(1, -1).t().expand(parts, -1, -1)
        output = torch.bmm(self.weight.view(parts, -1, self.in_features), column).view(*row.shape[:-1], -1)
        return output if self.bias is None else output + self.bias


__all__ = ["FlexiCodecLinear"]
