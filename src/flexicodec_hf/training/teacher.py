"""What Whisper hears in the clips of a dataset, for a small semantic encoder to learn from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Value
from torch import Tensor
from transformers import WhisperFeatureExtractor

from ..data.files import require
from ..data.sources import decode_audio
from .batches import cached_map


SAMPLING_RATE = 16_000
# Of the states that are kept: as often as the codec's feature extractor has features.
SAMPLES_PER_STATE = 960
STATES_PER_WINDOW = 500
# Silence between clips that share a window of 30 s, in states.
GAP = 8


class WhisperTeacher:
    """
    The encoder of a Whisper model.

    Args:
        directory: The model in CTranslate2's format, as `ct2-transformers-converter` writes it.
    """

    def __init__(self, directory: str | Path):
        self._ctranslate2 = require("ctranslate2", "a teacher in its format")
        self._whisper = self._ctranslate2.models.Whisper(str(directory), device="auto", compute_type="auto")
        self._feature_extractor = WhisperFeatureExtractor(feature_size=self._whisper.n_mels)

    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """
        Args:
            waveforms: Clips `(num_samples,)` at 16 kHz, of less than 30 s.

        Returns:
            The hidden states `(num_states, size)` of each clip, one for every 60 ms, in float16.
        """
        states: list[np.ndarray] = []
        window: list[np.ndarray] = []
        for waveform in waveforms:
            length = -(-len(waveform) // SAMPLES_PER_STATE) + GAP
            if length > STATES_PER_WINDOW:
                raise ValueError(
                    f"The teacher hears at most {(STATES_PER_WINDOW - GAP) * SAMPLES_PER_STATE / SAMPLING_RATE:.1f} s "
                    f"at once, and a clip has {len(waveform) / SAMPLING_RATE:.1f} s: leave it out with "
                    "`--max_duration_s`."
                )
            padded = np.pad(waveform, (0, length * SAMPLES_PER_STATE - len(waveform)))
            if sum(map(len, [*window, padded])) > STATES_PER_WINDOW * SAMPLES_PER_STATE:
                states += self._hear(window)
                window = []
            window.append(padded)
        return states + self._hear(window)

    def _hear(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        """The states of clips that fit in a window, each with a gap at its end."""
        inputs = self._feature_extractor(np.concatenate(clips), sampling_rate=SAMPLING_RATE, return_tensors="np")
        features = self._ctranslate2.StorageView.from_array(np.ascontiguousarray(inputs.input_features))
        heard = np.array(self._whisper.encode(features, to_cpu=True), dtype=np.float32)[0]
        heard = heard.reshape(STATES_PER_WINDOW, -1, heard.shape[-1]).mean(axis=1)
        ends = np.cumsum([len(clip) // SAMPLES_PER_STATE for clip in clips])
        return [part[:-GAP].astype(np.float16) for part in np.split(heard, ends)[:-1]]


def with_teacher_states(dataset: Dataset, teacher: str, folder: str | Path) -> Dataset:
    """
    A dataset with what a teacher hears in its clips: `teacher_states`, bytes of `(length, size)` in
    float16, and `length`. They are computed once and kept in `folder`; an interrupted run goes on.
    """
    load = functools.cache(lambda: WhisperTeacher(teacher))

    def hear(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        states = load()([decode_audio(audio, SAMPLING_RATE) for audio in examples["audio"]])
        return {"teacher_states": [state.tobytes() for state in states], "length": [len(state) for state in states]}

    features = {"teacher_states": Value("binary"), "length": Value("int32")}
    return cached_map(dataset, hear, folder, str(teacher), features, batch_size=50)


class TeacherProjection(NamedTuple):
    """
    The directions in which a teacher's states vary most, which an encoder learns: `mean` of shape
    `(teacher_size,)`, and `basis` of shape `(teacher_size, size)`.
    """

    mean: Tensor
    basis: Tensor

    @classmethod
    def fit(cls, states: Tensor, size: int, whitening: float = 0.25) -> TeacherProjection:
        """
        Args:
            states: `(num_states, teacher_size)`.
            size: Of the encoder.
            whitening: With 1 all directions weigh alike, with 0 as they vary.
        """
        if size > states.shape[1]:
            raise ValueError(f"`hidden_size` must be at most the teacher's, {states.shape[1]}, got {size}.")
        mean, deviation = states.mean(dim=0), states.std(dim=0).clamp(min=1e-3)
        normalized = (states - mean) / deviation
        variances, axes = torch.linalg.eigh(normalized.T @ normalized / len(normalized))
        basis = axes[:, -size:] / variances[-size:].clamp(min=1e-6) ** (whitening / 2)
        return cls(mean, (basis / deviation[:, None]).contiguous())

    def targets(self, states: Tensor, length: int) -> Tensor:
        """`(length, size)` of the states of a clip that is played faster or slower, each with a mean square of 1."""
        states = F.interpolate(states.T[None], length, mode="linear")[0].T
        targets = (states - self.mean) @ self.basis
        return F.rms_norm(targets, targets.shape[-1:])
