"""Discriminators that tell recorded from made waveforms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def _conv(in_size: int, out_size: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Module:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return weight_norm(nn.Conv2d(in_size, out_size, kernel, stride, padding))


class PeriodDiscriminator(nn.Module):
    """Looks at samples that lie `period` apart (HiFi-GAN, arXiv:2010.05646)."""

    def __init__(self, period: int, base_size: int):
        super().__init__()
        self.period = period
        sizes = [1, base_size, base_size * 4, base_size * 16, base_size * 32]
        self.convs = nn.ModuleList(
            _conv(sizes[i], sizes[i + 1], kernel=(5, 1), stride=(3, 1)) for i in range(len(sizes) - 1)
        )
        self.convs.append(_conv(sizes[-1], sizes[-1], kernel=(5, 1)))
        self.score = _conv(sizes[-1], 1, kernel=(3, 1))

    def forward(self, waveforms: Tensor) -> list[Tensor]:
        missing = -waveforms.shape[-1] % self.period
        hidden_states = F.pad(waveforms, (0, missing), mode="reflect").unflatten(-1, (-1, self.period))
        features = []
        for conv in self.convs:
            hidden_states = F.leaky_relu(conv(hidden_states), 0.1)
            features.append(hidden_states)
        return [*features, self.score(hidden_states)]


class MultiBandSTFTDiscriminator(nn.Module):
    """
    Looks at the complex spectrogram of one resolution, in bands that have layers of their own (DAC,
    arXiv:2306.06546).
    """

    window: Tensor

    def __init__(self, window_length: int, hidden_size: int, bands: Sequence[float] = (0, 0.1, 0.25, 0.5, 0.75, 1)):
        super().__init__()
        num_bins = window_length // 2 + 1
        edges = [int(num_bins * share) for share in bands]
        self.bands = list(pairwise(edges))
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                [
                    _conv(2, hidden_size, kernel=(3, 9)),
                    *(_conv(hidden_size, hidden_size, kernel=(3, 9), stride=(1, 2)) for _ in range(3)),
                    _conv(hidden_size, hidden_size, kernel=(3, 3)),
                ]
            )
            for _ in self.bands
        )
        self.score = _conv(hidden_size, 1, kernel=(3, 3))
        self.register_buffer("window", torch.hann_window(window_length), persistent=False)

    def forward(self, waveforms: Tensor) -> list[Tensor]:
        length = self.window.shape[0]
        with torch.autocast(waveforms.device.type, enabled=False):  # half precision has no Fourier transform
            spectrum = torch.stft(
                waveforms[:, 0].float(), length, length // 4, window=self.window, return_complex=True
            )
            spectrum = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (batch_size, 2, num_frames, num_bins)
        features, bands = [], []
        for (start, stop), stack in zip(self.bands, self.stacks, strict=True):
            hidden_states = spectrum[..., start:stop]
            for conv in stack.children():
                hidden_states = F.leaky_relu(conv(hidden_states), 0.1)
                features.append(hidden_states)
            bands.append(hidden_states)
        return [*features, self.score(torch.cat(bands, dim=-1))]


class Discriminators(nn.Module):
    """
    Multi-period and multi-band, multi-resolution STFT discriminators side by side.

    Args:
        periods: Of the multi-period discriminators, in samples.
        window_lengths: Of the STFT discriminators, in samples.
        size: Channels of their first layers; the published size is 32.
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        window_lengths: Sequence[int] = (2048, 1024, 512),
        size: int = 32,
    ):
        super().__init__()
        self.discriminators = nn.ModuleList(
            [
                *(PeriodDiscriminator(period, size) for period in periods),
                *(MultiBandSTFTDiscriminator(length, size) for length in window_lengths),
            ]
        )

    def forward(self, waveforms: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """
        Args:
            waveforms: `(batch_size, 1, num_samples)`.

        Returns:
            The scores of each discriminator, and what each of its layers saw; the first axis of all
            is the batch.
        """
        outputs = [discriminator(waveforms) for discriminator in self.discriminators]
        return [output[-1] for output in outputs], [output[:-1] for output in outputs]
