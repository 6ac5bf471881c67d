"""Long audio in bounded memory: windows with context over the time axis, and cross-fades where they meet."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Chunk(NamedTuple):
    """How long audio is cut: frames of a chunk, and frames of context on each side of it."""

    size: int
    context: int


def windows(length: int, chunk: Chunk) -> Iterator[tuple[slice, slice]]:
    """The chunks of a sequence, and for each the window that gives it context, as slices of frames."""
    for start in range(0, length, chunk.size):
        stop = min(start + chunk.size, length)
        yield slice(start, stop), slice(max(start - chunk.context, 0), min(stop + chunk.context, length))


def run_in_windows(
    run: Callable[[Any, slice], Tensor],
    lengths: Tensor,
    chunk: Chunk | None,
    hop_length: int = 1,
    fade_length: int = 0,
    whole_length: int = 0,
) -> Tensor:
    """Compute an output in windows of the time axis and join the chunks.

    Args:
        run: Called as `run(rows, window)` with the indices of the items that have not ended, of shape
            `(num_rows,)` (without chunks, a slice of all), and a slice of frames. Returns
            `(num_rows, num_outputs, ...)`, `hop_length` outputs for each frame of the window (the last frame of
            an item may give fewer).
        lengths (`torch.LongTensor` of shape `(batch_size,)`): Frames of each item, on the CPU or the device.
        chunk: Size and context of the chunks in frames; `None` computes everything in one window.
        hop_length: Outputs for each frame.
        fade_length: Frames over which one chunk fades into the next.
        whole_length: Items of at most so many frames are computed in one window.

    Returns:
        `(batch_size, num_outputs, ...)`, 0 past the last chunk of an item.
    """
    num_frames = int(lengths.max())
    if chunk is None or num_frames <= whole_length:
        return run(slice(None), slice(0, num_frames))
    output, num_outputs = torch.empty(0), 0
    for core, window, has_frames in _windows_of_items(lengths, chunk, whole_length):
        rows = has_frames.nonzero()[:, 0]
        values = run(rows, window)
        # Some frames more than the chunk, for the next one to fade from.
        stop = min(core.stop + fade_length, window.stop)
        values = values[:, (core.start - window.start) * hop_length : (stop - window.start) * hop_length]
        if num_outputs == 0:
            output = values.new_zeros(len(lengths), num_frames * hop_length, *values.shape[2:])
        start = core.start * hop_length
        stop = start + values.shape[1]
        num_outputs = max(num_outputs, stop)
        rows = rows.to(output.device)
        if fade_length and start:
            ramp = fade_in(min(fade_length * hop_length, values.shape[1])).to(values)
            faded = slice(0, len(ramp))
            ramp = ramp.view(-1, *[1] * (values.ndim - 2))
            values[:, faded] = torch.lerp(output[rows, start : start + faded.stop], values[:, faded], ramp)
        output[rows, start:stop] = values
    return output[:, :num_outputs]


def _windows_of_items(lengths: Tensor, chunk: Chunk, whole_length: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """One window for all short items, then those of the others; and which items each is for."""
    is_whole = (lengths > 0) & (lengths <= whole_length)
    if bool(is_whole.any()):
        whole = slice(0, int(lengths[is_whole].max()))
        yield whole, whole, is_whole
    for core, window in windows(int(lengths.max()), chunk):
        yield core, window, ~is_whole & (lengths > core.start)


def fade_in(length: int) -> Tensor:
    """Weights `(length,)` between 0 and 1 of what fades in; what fades out has the rest, so no joint is louder."""
    return torch.linspace(0, torch.pi / 2, length + 2)[1:-1].sin().square()


class Crossfader:
    """Joins waveforms as they come: the end of each fades out while the start of the next fades in.

    Args:
        fade_length: Samples of a joint.
    """

    def __init__(self, fade_length: int):
        self.fade_length = fade_length
        self._held = np.zeros(0, dtype=np.float32)

    def add(self, waveform: np.ndarray, is_last: bool, continues: bool = False) -> np.ndarray:
        """Take the next waveform `(num_samples,)` and return what can be played: all but the end that will fade.

        One that continues the waveform before is joined as it is.
        """
        overlap = 0 if continues else min(len(self._held), len(waveform))
        before, ending = np.split(self._held, [len(self._held) - overlap])
        ramp = fade_in(overlap).numpy()
        joint = ending * (1 - ramp) + waveform[:overlap] * ramp
        joined = np.concatenate([before, joint, waveform[overlap:]])
        end = len(joined) if is_last else max(0, len(joined) - self.fade_length)
        self._held = joined[end:]
        return joined[:end]


__all__ = ["Chunk", "Crossfader", "fade_in", "run_in_windows", "windows"]
