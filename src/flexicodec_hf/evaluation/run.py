"""The run over a data set: what each system makes of each clip, measured, in one process or many."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ..audio_flexicodec import AudioError
from . import metrics
from .asr import Normalizer, Recognizer
from .common import SAMPLING_RATE, EvaluationError, require
from .data import Clip
from .report import Report, Row
from .speaker import SpeakerEncoder
from .systems import Speech, System


# What each measure needs installed, and what it says about a clip.
MEASURES = ("wer", "pesq", "stoi", "mcd", "mel", "speaker", "dnsmos")
_PACKAGES = {"wer": "jiwer", "pesq": "pesq", "stoi": "pystoi"}
_PARTS = "parts"
_SETTINGS = "settings.json"


class Judge:
    """
    Measures speech.

    Args:
        measures: Of [`MEASURES`]: `wer` (with CER), `pesq` (both bands), `stoi`, `mcd`, `mel`, `speaker`, `dnsmos`.
        recognizer, normalizer: For `wer`: see [`load_recognizer`] and [`load_normalizer`].
        speaker_encoder: For `speaker`: see [`load_speaker_encoder`].

    Raises:
        EvaluationError: A measure is unknown, or what it needs is missing.
    """

    def __init__(
        self,
        measures: Sequence[str],
        recognizer: Recognizer | None = None,
        normalizer: Normalizer | None = None,
        speaker_encoder: SpeakerEncoder | None = None,
    ):
        for measure in measures:
            if measure not in MEASURES:
                raise EvaluationError(f"unknown measure {measure!r}: there are {', '.join(MEASURES)}.")
            if measure in _PACKAGES:
                require(_PACKAGES[measure], f"the measure {measure}")
        if "dnsmos" in measures:
            require("speechmos.dnsmos", "the measure dnsmos", "pip install speechmos")
        if "wer" in measures and (recognizer is None or normalizer is None):
            raise EvaluationError("the measure wer needs a `recognizer` and a `normalizer`.")
        if "speaker" in measures and speaker_encoder is None:
            raise EvaluationError("the measure speaker needs a `speaker_encoder`.")
        self.measures = tuple(measures)
        self._recognizer, self._normalizer, self._speaker_encoder = recognizer, normalizer, speaker_encoder

    def __call__(
        self,
        speech: Speech,
        text: str | None = None,
        reference: np.ndarray | None = None,
        voice: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """
        Measure one clip.

        Args:
            speech: What is measured.
            text: What it should say.
            reference: The recording it should sound like, for the measures that compare.
            voice: A recording of the voice it should have.

        Returns:
            The values by name. What cannot be measured (no text, no reference, too short, silent) is missing or `None`.
        """
        values: dict[str, Any] = {}
        if "wer" in self.measures and text:
            values |= self._errors(speech.waveform, text)
        if reference is not None and speech.aligned:
            values |= self._distances(reference, speech.waveform)
        if "speaker" in self.measures and voice is not None:
            values["speaker_similarity"] = self._speaker_similarity(voice, speech.waveform)
        if "dnsmos" in self.measures:
            values |= metrics.dnsmos(speech.waveform)
        return values

    def _errors(self, waveform: np.ndarray, text: str) -> dict[str, Any]:
        assert self._recognizer is not None and self._normalizer is not None
        expected = self._normalizer(text)
        if not expected:
            return {}
        heard = self._recognizer(waveform)
        words = metrics.word_errors(expected, self._normalizer(heard))
        characters = metrics.character_errors(expected, self._normalizer(heard))
        return {
            "heard": heard,
            "word_errors": words.errors,
            "words": words.length,
            "character_errors": characters.errors,
            "characters": characters.length,
        }

    def _distances(self, reference: np.ndarray, waveform: np.ndarray) -> dict[str, Any]:
        length = min(len(reference), len(waveform))
        reference, waveform = reference[:length], waveform[:length]
        values: dict[str, Any] = {}
        if "pesq" in self.measures:
            values["pesq_nb"] = metrics.pesq(reference, waveform, "nb")
            values["pesq_wb"] = metrics.pesq(reference, waveform, "wb")
        if "stoi" in self.measures:
            values["stoi"] = metrics.stoi(reference, waveform)
        if "mcd" in self.measures:
            values["mcd"] = metrics.mel_cepstral_distortion(reference, waveform)
        if "mel" in self.measures:
            values["mel_distance"] = metrics.log_mel_distance(reference, waveform)
        return values

    def _speaker_similarity(self, voice: np.ndarray, waveform: np.ndarray) -> float | None:
        assert self._speaker_encoder is not None
        if not (voice.any() and waveform.any()):
            return None
        return metrics.cosine_similarity(self._speaker_encoder(voice), self._speaker_encoder(waveform))


def evaluate(
    clips: Iterable[Clip],
    systems: Sequence[System],
    judge: Judge,
    output_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on_error: Callable[[str], None] = tqdm.write,
) -> Report:
    """
    Run systems over clips and measure what they give.

    In several processes (`accelerate launch`), each takes its part of the clips, and all return the report of all.

    Args:
        clips: See [`load_clips`].
        systems: Such as [`Original`], [`CodecReconstruction`], [`TextToSpeech`]; their labels tell them apart.
        judge: What measures.
        output_dir: Each result is appended here at once, so that a run that was interrupted goes on where it stopped: what
            is there is not done again.
        settings: What else decides the results (the model, the data, the recogniser, ...). Kept in `output_dir`.
        on_error: Called with a message for each clip that cannot be read, or that a system refuses; the others go on. Such
            a clip counts for no system, so that all are compared on the same clips.

    Returns:
        The [`Report`].

    Raises:
        EvaluationError: `output_dir` holds results of other settings; two systems have one label; nothing could be
            measured.
    """
    labels = [system.label for system in systems]
    if len(set(labels)) < len(labels):
        raise EvaluationError(f"every system needs a label of its own, got {', '.join(labels)}.")
    state = PartialState()
    settings = {"measures": sorted(judge.measures), **(settings or {})}
    store = None if output_dir is None else _Store(Path(output_dir), settings, state)

    rows: list[tuple[int, int, Row]] = []
    failed: list[str] = []
    mine = itertools.islice(enumerate(clips), state.process_index, None, state.num_processes)
    total = -(-len(clips) // state.num_processes) if isinstance(clips, Sequence) else None
    for index, clip in tqdm(mine, total=total, unit="clip", disable=None if state.is_main_process else True):
        done = {} if store is None else store.done(clip)
        try:
            if len(done.keys() & set(labels)) < len(labels):
                done |= _measure(clip, [system for system in systems if system.label not in done], judge, store)
        except ValueError as error:
            failed.append(str(error) if isinstance(error, AudioError) else f"{clip.name}: {error}")
            on_error(failed[-1])
            continue
        rows += [(index, number, done[label]) for number, label in enumerate(labels) if done.get(label)]

    rows, failed = gather_object(rows), gather_object(failed)
    rows.sort(key=lambda item: item[:2])
    report = Report(
        [row for *_, row in rows], {system.label: dict(system.settings) for system in systems}, dict(settings), failed
    )
    if not report.rows:
        reason = (
            f"the first of {len(failed)} failures is: {failed[0]}" if failed else "none has what the systems need."
        )
        raise EvaluationError(f"there is nothing to measure: {reason}")
    return report


def _measure(clip: Clip, systems: Sequence[System], judge: Judge, store: _Store | None) -> dict[str, Row]:
    waveform = clip.waveform()
    voice = clip.reference_waveform()
    rows = {}
    for system in systems:
        speech = system(clip, waveform)
        if speech is None:
            continue
        row: Row = {"clip": clip.name, "system": system.label, "text": clip.text}
        # Codecs drop the end of a recording; their rates are still those of all of it.
        timed = waveform if speech.aligned and waveform is not None else speech.waveform
        row["seconds"] = len(timed) / SAMPLING_RATE
        for name in ("processing_seconds", "num_tokens", "bits"):
            row[name] = getattr(speech, name)
        row |= judge(speech, clip.text, waveform, waveform if voice is None else voice)
        rows[system.label] = row
        if store is not None:
            store.append(row)
    return rows


class _Store:
    """The results on disk: `settings.json`, and in `parts` a file of rows from each process."""

    def __init__(self, directory: Path, settings: Mapping[str, Any], state: PartialState):
        parts = directory / _PARTS
        # As JSON gives them back.
        settings = json.loads(json.dumps(settings))
        if state.is_local_main_process:
            parts.mkdir(parents=True, exist_ok=True)
            path = directory / _SETTINGS
            if not path.exists():
                path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        state.wait_for_everyone()
        there = json.loads((directory / _SETTINGS).read_text(encoding="utf-8"))
        different = [name for name in {**there, **settings} if there.get(name) != settings.get(name)]
        if different:
            changes = "; ".join(f"{name} {there.get(name)!r}, not {settings.get(name)!r}" for name in different)
            raise EvaluationError(f"{directory} holds results of other settings ({changes}): use another directory.")

        self._rows: dict[tuple[str, str | None], dict[str, Row]] = {}
        for part in sorted(parts.glob("*.jsonl")):
            for line in part.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # else the process was ended while it wrote
                    row = json.loads(line)
                    self._rows.setdefault((row["clip"], row["text"]), {})[row["system"]] = row
        state.wait_for_everyone()
        self._path = parts / f"{state.process_index:03d}.jsonl"
        if self._path.exists():
            whole = self._path.read_bytes()
            self._path.write_bytes(whole[: whole.rfind(b"\n") + 1])

    def done(self, clip: Clip) -> dict[str, Row]:
        """The rows of a clip by system. A clip whose text has changed has none."""
        return dict(self._rows.get((clip.name, clip.text), {}))

    def append(self, row: Row) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
