"""Sounds and spectrograms along the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from ..audio_flexicodec import write_audio
from .losses import magnitudes


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_samples(directory: Path, step: int, waveforms: dict[str, np.ndarray], sampling_rate: int) -> None:
    """
    Write waveforms and a picture of their spectrograms.

    Args:
        directory: Each step gets a folder in it, and TensorBoard a file.
        step: The step of the training.
        waveforms: Waveforms `(num_samples,)`, in [-1, 1], by name.
        sampling_rate: Their sampling rate, in hertz.
    """
    folder = directory / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    figure = plot_spectrograms(waveforms, sampling_rate)
    figure.savefig(folder / "spectrograms.png")
    with SummaryWriter(str(directory)) as writer:
        for name, waveform in waveforms.items():
            write_audio(folder / f"{name}.flac", waveform, sampling_rate)
            writer.add_audio(name, waveform[None], step, sampling_rate)
        writer.add_figure("spectrograms", figure, step)


def plot_spectrograms(waveforms: dict[str, np.ndarray], sampling_rate: int) -> Figure:
    """The spectrograms of waveforms `(num_samples,)`, one above the other, in decibels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(waveforms)), layout="constrained")
    axes = figure.subplots(len(waveforms), squeeze=False)[:, 0]
    for axis, (name, waveform) in zip(axes, waveforms.items(), strict=True):
        draw_spectrogram(axis, waveform, sampling_rate)
        axis.set_title(name)
    axes[-1].set_xlabel("seconds")
    return figure


def draw_spectrogram(axis: Axes, waveform: np.ndarray, sampling_rate: int) -> None:
    """The spectrogram of a waveform `(num_samples,)`, in decibels, over seconds and kilohertz."""
    window = torch.hann_window(min(1024, len(waveform) // 2 * 2))
    spectrum = magnitudes(torch.from_numpy(np.ascontiguousarray(waveform))[None].float(), window)[0]
    extent = (0, len(waveform) / sampling_rate, 0, sampling_rate / 2000)
    decibels = 20 * spectrum.clamp(min=1e-4).log10().T.numpy()
    axis.imshow(decibels, origin="lower", aspect="auto", extent=extent, vmin=-60, vmax=40)
    axis.set_ylabel("kHz")
