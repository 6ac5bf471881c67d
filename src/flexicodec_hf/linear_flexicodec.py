"""A linear layer whose float32 products are fast on AMD processors too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# With fewer rows the convolution is no faster, and mostly slower.
_MIN_ROWS = 128


class FlexiCodecLinear(nn.Linear):
    """[`~torch.nn.Linear`] that takes many float32 rows on a CPU as a pointwise convolution.

    PyTorch gives float32 products to MKL and, with two threads or more, convolutions to oneDNN, which takes half the
    time on AMD processors.
    """

    def forward(self, input: Tensor) -> Tensor:
        num_rows = input.shape[:-1].numel()
        is_plain = input.device.type != "cpu" or input.dtype != torch.float32 or num_rows < _MIN_ROWS
        # Inductor cannot lay out the image when its length is dynamic.
        if is_plain or torch.compiler.is_compiling():
            return super().forward(input)
        # An image of one row. Its channels-last layout is that of the rows, before and after: nothing is copied.
        image = input.reshape(1, 1, num_rows, -1).permute(0, 3, 1, 2)
        output = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


__all__ = ["FlexiCodecLinear"]
