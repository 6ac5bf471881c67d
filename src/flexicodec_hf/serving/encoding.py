"""Audio formats, written while the audio comes."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import soundfile


class Encoder(Protocol):
    """Turns waveforms `(num_samples,)`, floats in [-1, 1], into the bytes of a file, part by part."""

    def write(self, waveform: np.ndarray) -> bytes: ...

    def close(self) -> bytes: ...


class _Pcm:
    """16-bit little-endian samples, after a header if there is one."""

    def __init__(self, header: bytes = b""):
        self._header = header

    def write(self, waveform: np.ndarray) -> bytes:
        header, self._header = self._header, b""
        return header + (waveform.clip(-1, 1) * 32767).round().astype("<i2").tobytes()

    def close(self) -> bytes:
        return self.write(np.zeros(0, dtype=np.float32))


class _Pipe(io.RawIOBase):
    """A file of which only the new bytes at its end are kept. What is rewritten was sent already."""

    def __init__(self) -> None:
        self._position = self._end = 0
        self._new = bytearray()

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._end}[whence]
        return self._position

    def write(self, data: Any) -> int:
        data = bytes(data)
        self._new += data[max(0, self._end - self._position) :]
        self._position += len(data)
        self._end = max(self._end, self._position)
        return len(data)

    def take(self) -> bytes:
        new, self._new = bytes(self._new), bytearray()
        return new


class _Sent:
    """A format that libsndfile writes from front to back."""

    settings: dict[str, Any]

    def __init__(self, sampling_rate: int):
        self._pipe = _Pipe()
        self._file = soundfile.SoundFile(self._pipe, "w", sampling_rate, 1, **self.settings)

    def write(self, waveform: np.ndarray) -> bytes:
        self._file.write(waveform.clip(-1, 1))
        return self._pipe.take()

    def close(self) -> bytes:
        self._file.close()
        return self._pipe.take()


class _Opus(_Sent):
    settings = {"format": "OGG", "subtype": "OPUS"}


class _Flac(_Sent):
    """FLAC of unknown length, which some programs refuse, libsndfile among them."""

    settings = {"format": "FLAC", "subtype": "PCM_16"}


class _Mp3(_Sent):
    """MP3 of a constant bit rate, from which players learn the length."""

    settings = {"format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": 0.5, "bitrate_mode": "CONSTANT"}

    def __init__(self, sampling_rate: int):
        super().__init__(sampling_rate)
        self._start: bytes | None = b""

    def write(self, waveform: np.ndarray) -> bytes:
        return self._without_first_frame(super().write(waveform))

    def close(self) -> bytes:
        return self._without_first_frame(super().close())

    def _without_first_frame(self, data: bytes) -> bytes:
        """Zeros after its header: room for the length, which is not known in time."""
        if self._start is None:
            return data
        self._start += data
        second = self._start.find(b"\xff", 4)
        if second < 0:
            return b""
        data, self._start = self._start[second:], None
        return data


class _WholeFlac:
    """FLAC with its length, which is at its beginning."""

    def __init__(self, sampling_rate: int):
        self._sampling_rate = sampling_rate
        self._parts: list[np.ndarray] = []

    def write(self, waveform: np.ndarray) -> bytes:
        self._parts.append(waveform)
        return b""

    def close(self) -> bytes:
        file = io.BytesIO()
        samples = np.concatenate([np.zeros(0, dtype=np.float32), *self._parts]).clip(-1, 1)
        soundfile.write(file, samples, self._sampling_rate, format="FLAC")
        return file.getvalue()


MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "flac": "audio/flac",
    "opus": "audio/ogg; codecs=opus",
}


def encoder(format: str, sampling_rate: int, is_file: bool = True) -> Encoder:
    """
    An encoder of one of `MEDIA_TYPES`. All is sent as it comes, but FLAC that is to be a file comes at the end.
    """
    if format == "pcm":
        return _Pcm()
    if format == "wav":
        unknown = 0xFFFFFFFF
        return _Pcm(
            struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", unknown, b"WAVE", b"fmt ", 16, 1, 1, sampling_rate,
                        2 * sampling_rate, 2, 16, b"data", unknown)
        )  # fmt: skip
    flac = _WholeFlac if is_file else _Flac
    encoders: dict[str, Callable[[int], Encoder]] = {"mp3": _Mp3, "opus": _Opus, "flac": flac}
    return encoders[format](sampling_rate)
