"""Reading audio files as one channel at the sampling rate of a model, and writing them."""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr


logger = logging.getLogger(__name__)

# Samples of each channel that are read at once. Their channels are averaged before the next are read.
_BLOCK = 1 << 20
# What libsndfile's log says of a file that ends early. An Ogg file has no length in its header, but a last page.
_MISSING = re.compile(r"^ *(?:data|SSND|BODY|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_NO_LAST_PAGE = "lacks an end-of-stream bit"
# The sizes that programs write that do not know how much will follow: nothing is missing then.
_UNKNOWN_SIZE = 0x7FFF0000
# Sampling rates of audio. With others, a short file would fill the memory when it is resampled.
_RATES = (1_000, 1_000_000)


class AudioError(ValueError):
    """An audio file cannot be read or written. The message names the file and the reason."""


class _Audio:
    path: Path
    num_samples: int
    sampling_rate: int
    file_sampling_rate: int
    num_channels: int

    @property
    def seconds(self) -> float:
        return self.num_samples / self.sampling_rate

    @property
    def changes(self) -> list[str]:
        """What was done to the audio, in words. Empty if it is as in the file."""
        changes = []
        if self.num_channels > 1:
            changes.append(f"{self.num_channels} channels averaged")
        if self.file_sampling_rate != self.sampling_rate:
            changes.append(f"resampled from {self.file_sampling_rate} to {self.sampling_rate} Hz")
        return changes


@dataclass(frozen=True)
class AudioClip(_Audio):
    """
    One channel of audio, and the format of its file.

    Args:
        path: The file.
        waveform: Samples of shape `(num_samples,)`, float32, in [-1, 1] unless the file has larger ones.
        sampling_rate: Sampling rate of `waveform`, in hertz.
        file_sampling_rate: Sampling rate of the file, in hertz.
        num_channels: Number of channels of the file.
    """

    path: Path
    waveform: np.ndarray
    sampling_rate: int
    file_sampling_rate: int
    num_channels: int

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        return len(self.waveform)

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.waveform


@dataclass(frozen=True)
class AudioFile(_Audio):
    """
    A long audio file, as [`open_audio`] found it. Each iteration reads it again, and gives what [`read_audio`]
    gives in blocks: float32 waveforms of shape `(num_samples,)`, of any lengths.

    Args:
        path: The file.
        num_samples: Samples of all blocks together.
        sampling_rate: Sampling rate of the blocks, in hertz.
        file_sampling_rate: Sampling rate of the file, in hertz.
        num_channels: Number of channels of the file.
    """

    path: Path
    num_samples: int
    sampling_rate: int
    file_sampling_rate: int
    num_channels: int

    def __iter__(self) -> Iterator[np.ndarray]:
        with _open(self.path, None) as audio:
            yield from _blocks(audio, self.path, self.sampling_rate)


def open_audio(path: str | Path, sampling_rate: int) -> AudioFile:
    """
    Check a long audio file from its beginning to its end and count its samples, without holding them.

    The arguments and errors are those of [`read_audio`].
    """
    path = Path(path)
    with _open(path, None) as audio:
        num_samples = sum(len(block) for block in _blocks(audio, path, sampling_rate, warn=True))
        _check_not_empty(path, audio, num_samples, sampling_rate)
        return AudioFile(path, num_samples, sampling_rate, audio.samplerate, audio.channels)


def read_audio(path: str | Path, sampling_rate: int, file: BinaryIO | None = None) -> AudioClip:
    """
    Read an audio file, average its channels, and resample it.

    Args:
        path: A file in a format that libsndfile reads: WAV, FLAC, Ogg, MP3, AIFF, ...
        sampling_rate: The rate to resample to, in hertz.
        file: The open file, if it is not on disk. `path` is then its name in errors.

    Returns:
        The clip.

    A file whose header shows that its end is missing is read as far as it goes, with a warning in the log.

    Raises:
        AudioError: The file does not exist, is not an audio file, is damaged, is empty, has fewer samples than
            its header says, or has NaN or infinite samples.
    """
    path = Path(path)
    with _open(path, file) as audio:
        waveform = np.concatenate(list(_blocks(audio, path, sampling_rate, warn=True)))
        _check_not_empty(path, audio, len(waveform), sampling_rate)
        return AudioClip(path, waveform, sampling_rate, audio.samplerate, audio.channels)


def audio_seconds(path: str | Path, file: BinaryIO | None = None) -> float:
    """
    The duration of an audio file in seconds, from its header.

    Args:
        path: A file in a format that libsndfile reads.
        file: The open file, if it is not on disk. `path` is then its name in errors.

    Raises:
        AudioError: The file does not exist, is not an audio file, or is damaged.
    """
    with _open(Path(path), file) as audio:
        return audio.frames / audio.samplerate


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """
    Resample one channel of audio.

    Args:
        waveform: Samples of shape `(num_samples,)`, float32.
        source_rate: Sampling rate of `waveform`, in hertz.
        target_rate: Sampling rate of the result, in hertz.

    Returns:
        Samples of shape `(num_resampled,)`, float32. The waveform itself if the rates are equal.

    Raises:
        AudioError: A rate is not a number from 1000 to 1000000.
    """
    _check_rates(source_rate=source_rate, target_rate=target_rate)
    if source_rate == target_rate or len(waveform) == 0:
        return waveform
    return soxr.resample(waveform, source_rate, target_rate)


def resample_with_images(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """
    Resample one channel with a short windowed sinc, as the reference resamples the recording of a voice.

    Unlike `resample`, it leaves images above the old band, on which the Voicebox was trained. It is
    the interpolation of https://ccrma.stanford.edu/~jos/resample/ with six zero crossings on each side
    and a Hann window, at 0.99 of the lower Nyquist frequency (flexicodec 0.1.2 uses torchaudio's).

    Args:
        waveform: Samples of shape `(num_samples,)`, float32.
        source_rate: Sampling rate of `waveform`, in hertz.
        target_rate: Sampling rate of the result, in hertz.

    Returns:
        Samples of shape `(num_resampled,)`, float32. The waveform itself if the rates are equal.
    """
    if source_rate == target_rate or len(waveform) == 0:
        return waveform
    zero_crossings, rolloff = 6, 0.99
    divisor = math.gcd(source_rate, target_rate)
    step, phases = source_rate // divisor, target_rate // divisor
    cutoff = min(step, phases) * rolloff
    reach = math.ceil(zero_crossings * step / cutoff)
    # Distances from each output sample of a period to the input samples around it, in zero crossings.
    distances = np.arange(-reach, reach + step) / step - np.arange(phases)[:, None] / phases
    distances = np.clip(distances * cutoff, -zero_crossings, zero_crossings)
    window = np.cos(distances * math.pi / zero_crossings / 2) ** 2
    kernels = (np.sinc(distances) * window * cutoff / step).astype(np.float32)
    padded = np.pad(waveform.astype(np.float32), (reach, reach + step))
    neighborhoods = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1])[::step]
    return (neighborhoods @ kernels.T).reshape(-1)[: math.ceil(len(waveform) * target_rate / source_rate)]


def check_audio_format(path: str | Path) -> None:
    """Raise [`AudioError`] if the suffix of a file does not name a format that can be written."""
    path = Path(path)
    # A file without a header could not be read again.
    if path.suffix[1:].upper() not in soundfile.available_formats().keys() - {"RAW"}:
        raise AudioError(f"{path}: unknown audio format '{path.suffix}': use .wav, .flac, .ogg or .mp3.")


def write_audio(path: str | Path, waveform: np.ndarray, sampling_rate: int) -> None:
    """
    Write one channel of audio, in the format named by the suffix of the file (16 bits for WAV and FLAC).

    Args:
        path: The file. An existing one is replaced.
        waveform: Samples of shape `(num_samples,)`, floats. Values outside of [-1, 1] are clipped.
        sampling_rate: Sampling rate of `waveform`, in hertz.

    Raises:
        AudioError: The suffix does not name a format, samples are NaN or infinite, or the file cannot be
            written.
    """
    path = Path(path)
    check_audio_format(path)
    _check_rates(sampling_rate=sampling_rate)
    if not np.isfinite(waveform).all():
        raise AudioError(f"{path}: not written, the audio has NaN or infinite samples.")
    try:
        soundfile.write(path, waveform, sampling_rate)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: cannot be written: {error.error_string}") from error


@contextmanager
def _open(path: Path, file: BinaryIO | None) -> Iterator[soundfile.SoundFile]:
    if file is None and not os.path.exists(path):  # of an impossible name, `Path.exists` raises
        raise AudioError(f"{path}: there is no such file.")
    if file is None and path.is_dir():
        raise AudioError(f"{path}: this is a directory; pass its files.")
    if path.suffix.lower() == ".raw":
        raise AudioError(f"{path}: a file without a header does not say its sampling rate; convert it to WAV.")
    try:
        with soundfile.SoundFile(path if file is None else file) as audio:
            if not _RATES[0] <= audio.samplerate <= _RATES[1]:
                raise AudioError(
                    f"{path}: its header says {audio.samplerate} Hz, which no audio has: between {_RATES[0]} and "
                    f"{_RATES[1]} Hz are expected. The file is damaged."
                )
            yield audio
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: not an audio file, or a damaged one: {error.error_string}") from error


def _check_not_empty(path: Path, audio: soundfile.SoundFile, num_samples: int, sampling_rate: float) -> None:
    if num_samples == 0:
        raise AudioError(
            f"{path}: the audio is empty ({audio.frames} samples at {audio.samplerate} Hz): at least one sample at "
            f"{sampling_rate} Hz is needed."
        )


def _blocks(audio: soundfile.SoundFile, path: Path, sampling_rate: float, warn: bool = False) -> Iterator[np.ndarray]:
    """All samples of an open file, its channels averaged and resampled, checked, in blocks of any lengths."""
    _check_rates(sampling_rate=sampling_rate)
    log = audio.extra_info
    missing = max(
        (int(said) - int(found) for said, found in _MISSING.findall(log) if int(said) < _UNKNOWN_SIZE), default=0
    )
    if warn and (missing > 0 or _NO_LAST_PAGE in log):
        what = f"{missing} bytes that its header announces are missing" if missing > 0 else "its last page is missing"
        logger.warning("%s: the file was cut short (%s); what is there is read.", path, what)
    # In blocks and in one call, the resampler gives the same samples.
    resampler = None
    if audio.samplerate != sampling_rate:
        resampler = soxr.ResampleStream(audio.samplerate, sampling_rate, 1, dtype="float32")
    num_frames = 0
    while True:
        # Not `SoundFile.blocks`: it trusts the header, and goes on with old memory where the file ends early.
        block = audio.read(_BLOCK, dtype="float32", always_2d=True)
        num_frames += len(block)
        waveform = block.mean(axis=1)
        if not np.isfinite(waveform).all():
            raise AudioError(f"{path}: the audio has NaN or infinite samples.")
        yield waveform if resampler is None else resampler.resample_chunk(waveform, last=len(block) == 0)
        if len(block) == 0:
            break
    if num_frames < audio.frames:
        raise AudioError(
            f"{path}: the file was cut short or is damaged: its header says {audio.frames} samples, but there are "
            f"{num_frames}. Get it again, or convert what is there to WAV."
        )


def _check_rates(**rates: Any) -> None:
    for name, rate in rates.items():
        if not isinstance(rate, (int, float, np.number)) or not _RATES[0] <= rate <= _RATES[1]:
            raise AudioError(f"`{name}` must be a number of hertz from {_RATES[0]} to {_RATES[1]}, got {rate!r}.")


class AudioWriter:
    """
    An audio file of one channel that is written part by part, in the format that its suffix names.

    Args:
        path: The file. It is made by the first `write`; one that exists is replaced.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.num_samples = 0
        self.sampling_rate = 0
        self._file: soundfile.SoundFile | None = None

    def __enter__(self) -> AudioWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def seconds(self) -> float:
        """Seconds of audio that were written."""
        return self.num_samples / self.sampling_rate if self.num_samples else 0.0

    def write(self, waveform: np.ndarray, sampling_rate: int) -> None:
        """
        Append a waveform.

        Args:
            waveform: `(num_samples,)`, floats in [-1, 1]; values beyond are clipped.
            sampling_rate: In hertz, the same for all parts.

        Raises:
            AudioError: The samples are NaN or infinite.
        """
        if not np.isfinite(waveform).all():
            raise AudioError("The audio has NaN or infinite samples, and is not written: compute it in float32.")
        try:
            if self._file is None:
                self.sampling_rate = sampling_rate
                self._file = soundfile.SoundFile(self.path, "w", sampling_rate, 1)
            self._file.write(waveform)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{self.path}: cannot be written: {error.error_string}") from error
        self.num_samples += len(waveform)


class WaveStream(AudioWriter):
    """Standard output as a WAV file of 16 bits and unknown length, which players read as it comes."""

    def write(self, waveform: np.ndarray, sampling_rate: int) -> None:
        output, unknown = sys.stdout.buffer, 0xFFFFFFFF
        if not self.sampling_rate:
            self.sampling_rate = sampling_rate
            form = struct.pack("<HHIIHH", 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
            output.write(struct.pack("<4sI8sI16s4sI", b"RIFF", unknown, b"WAVEfmt ", 16, form, b"data", unknown))
        output.write((waveform.clip(-1, 1) * 32_767).astype("<i2").tobytes())
        output.flush()
        self.num_samples += len(waveform)


def read_stretches(
    path: str | Path, sampling_rate: int, max_length_s: float = 300.0, cut_s: float = 30.0
) -> Iterator[np.ndarray]:
    """
    Read an audio file of any length in stretches that end in pauses, in memory bounded by one stretch.

    Args:
        path: Anything libsndfile reads. Its channels are averaged.
        sampling_rate: The rate to resample to, in hertz.
        max_length_s: Seconds of a stretch at most.
        cut_s: A stretch ends where its last `cut_s` seconds are quietest.

    Yields:
        Waveforms `(num_samples,)`, float32. Together they are the whole recording.

    Raises:
        AudioError: As [`read_audio`], but an empty file gives one empty stretch.
    """
    max_length = int(max_length_s * sampling_rate)
    with _open(Path(path), None) as file:
        held = np.zeros(0, dtype=np.float32)
        for block in _blocks(file, Path(path), sampling_rate, warn=True):
            held = np.concatenate([held, block])
            while len(held) > max_length:
                cut = find_pause(held[:max_length], sampling_rate, cut_s)
                yield held[:cut]
                held = held[cut:]
        yield held


def find_pause(waveform: np.ndarray, sampling_rate: int, cut_s: float = 30.0) -> int:
    """The index of the sample in the middle of the 80 ms of least energy in the last `cut_s` seconds of a waveform."""
    frame = sampling_rate * 8 // 100
    num_frames = min(int(cut_s * sampling_rate), len(waveform)) // frame
    frames = waveform[len(waveform) - num_frames * frame :].reshape(num_frames, frame)
    return len(waveform) - (num_frames - int(np.square(frames).sum(axis=1).argmin())) * frame + frame // 2
