"""
Losses of the codec and the vocoder: spectral distance, and the least-squares game with
discriminators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank


class MultiScaleMelLoss(nn.Module):
    """
    L1 distance of log10 mel spectra, summed over resolutions (arXiv:2306.06546, section 3.4).

    Args:
        sampling_rate: Sampling rate of the waveforms, in hertz.
        num_mels: Mel bands of each resolution.
        window_lengths: Hann window of each, in samples; it moves on by a quarter.
    """

    def __init__(
        self,
        sampling_rate: int,
        num_mels: Sequence[int] = (5, 10, 20, 40, 80, 160, 320),
        window_lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
    ):
        super().__init__()
        self.num_scales = len(window_lengths)
        for i, (mels, length) in enumerate(zip(num_mels, window_lengths, strict=True)):
            filters = _mel_filters(length, mels, sampling_rate)
            self.register_buffer(f"filters_{i}", filters, persistent=False)
            self.register_buffer(f"window_{i}", torch.hann_window(length), persistent=False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            prediction, target: Waveforms `(batch_size, 1, num_samples)`, in float32.

        Returns:
            The loss, a scalar: the mean over items, frames and bands, the sum over resolutions.
        """
        waveforms = torch.cat([prediction, target])[:, 0]
        loss = prediction.new_zeros(())
        for i in range(self.num_scales):
            filters, window = getattr(self, f"filters_{i}"), getattr(self, f"window_{i}")
            mels = (magnitudes(waveforms, window) @ filters).clamp(min=1e-5).log10()
            loss = loss + F.l1_loss(*mels.chunk(2))
        return loss


def magnitudes(waveforms: Tensor, window: Tensor) -> Tensor:
    """
    Magnitude spectra `(batch_size, num_frames, window_length / 2 + 1)` of waveforms `(batch_size,
    num_samples)`.
    """
    length = window.shape[0]
    spectrum = torch.stft(waveforms, length, length // 4, window=window, return_complex=True)
    # The gradient of a magnitude is not defined at 0.
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-12).sqrt().transpose(1, 2)


def discriminator_loss(scores: Sequence[Tensor]) -> Tensor:
    """
    What the discriminators minimise: their scores should be 1 for recorded and 0 for made audio
    (arXiv:1611.04076).

    Args:
        scores: Of each discriminator; the first half of the batch is recorded, the second made.
    """
    pairs = [score.chunk(2) for score in scores]
    return torch.stack([(1 - real).square().mean() + fake.square().mean() for real, fake in pairs]).sum()


def adversarial_loss(scores: Sequence[Tensor]) -> Tensor:
    """What the generator minimises: the scores of made audio, the second half, should be 1."""
    return torch.stack([(1 - score.chunk(2)[1]).square().mean() for score in scores]).sum()


def feature_matching_loss(features: Sequence[Sequence[Tensor]]) -> Tensor:
    """
    L1 distance of what the layers of the discriminators see in made audio, the second half of the
    batch, and in recorded audio, summed over all of them (arXiv:1910.06711).
    """
    pairs = [layer.chunk(2) for layers in features for layer in layers]
    return torch.stack([F.l1_loss(fake, real.detach()) for real, fake in pairs]).sum()


def _mel_filters(window_length: int, num_mels: int, sampling_rate: int) -> Tensor:
    """
    `(window_length / 2 + 1, num_mels)`: triangles of equal area. Narrow ones may hold no bin, and
    then count nothing.
    """
    filters = mel_filter_bank(
        num_frequency_bins=window_length // 2 + 1,
        num_mel_filters=num_mels,
        min_frequency=0.0,
        max_frequency=sampling_rate / 2,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()
