"""The run over a dataset: each method speaks each clip, and its output is measured, in one process or in many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from ..audio_flexicodec import AudioError
from ..data.files import DataError, atomic_file, check_settings, only_run
from ..data.sources import decode_audio
from .methods import Clip, Method, Original, Speech
from .metrics import SpeechMetric, Tokenizer, token_changes
from .recognizers import SAMPLING_RATE, Normalizer, Recognizer, SpeakerEncoder
from .report import Report, Row


# Of single clips.
MEASURES = ("wer", "pesq", "stoi", "mcd", "speaker", "mos", "stability")


class Evaluator:
    """
    Measures speech with [`SpeechMetric`].

    Args:
        measures: Names from [`MEASURES`].
        recognizer: For `wer`, see [`load_recognizer`].
        normalizer: For `wer`, see [`load_normalizer`].
        speaker_encoder: For `speaker`, see [`load_speaker_encoder`].
        device: Where the predictor of `mos` runs.

    Raises:
        ValueError: A measure is unknown, or an argument that it needs is missing.
        DataError: A package that a measure needs is missing.
    """

    def __init__(
        self,
        measures: Sequence[str],
        recognizer: Recognizer | None = None,
        normalizer: Normalizer | None = None,
        speaker_encoder: SpeakerEncoder | None = None,
        device: str = "cpu",
    ):
        if unknown := set(measures) - set(MEASURES):
            raise ValueError(f"unknown measure {min(unknown)!r}: choose from {', '.join(MEASURES)}.")
        if "wer" in measures and (recognizer is None or normalizer is None):
            raise ValueError("the measure wer needs a `recognizer` and a `normalizer`.")
        self.measures = tuple(measures)
        self._recognizer, self._normalizer = recognizer, normalizer
        self._measure = {
            name: SpeechMetric(name, speaker_encoder if name == "speaker" else None, device).measure
            for name in measures
            if name != "stability"  # the model is the method
        }

    def __call__(self, speech: Speech, clip: Clip, tokenize: Tokenizer | None = None) -> dict[str, Any]:
        """
        Measure what a method made of a clip.

        Error rates need the clip's text, comparisons need its recording and aligned speech, and the similarity of
        speakers needs a recording of the voice.

        Args:
            speech: What the method made.
            clip: The clip.
            tokenize: For `stability`, what makes the method's tokens of a waveform.

        Returns:
            Values by name. What cannot be measured (no text, no recording, too short, silent) is missing or `None`.
        """
        values: dict[str, Any] = {}
        audio, recording = speech.waveform, clip.waveform
        voice = recording if clip.reference_waveform is None else clip.reference_waveform
        for name, measure in self._measure.items():
            if name == "wer":
                assert self._recognizer is not None and self._normalizer is not None
                if expected := self._normalizer(clip.text or ""):
                    recognized = self._recognizer(audio) if len(audio) else ""
                    values |= {"recognized": recognized, **measure(self._normalizer(recognized), expected)}
            elif name == "speaker":
                values |= {} if voice is None else measure(audio, voice)
            elif name == "mos":
                values |= measure(audio) if len(audio) else {}
            elif recording is not None and speech.aligned:
                length = min(len(recording), len(audio))
                values |= measure(audio[:length], recording[:length])
        if "stability" in self.measures and recording is not None and tokenize is not None:
            values |= token_changes(recording, tokenize)
        return values


def evaluate(
    dataset: Iterable[Mapping[str, Any]],
    methods: Sequence[Method],
    evaluator: Evaluator,
    output_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on_error: Callable[[str], None] = tqdm.write,
) -> Report:
    """
    Run methods over a dataset and measure their outputs.

    In several processes (`accelerate launch`), each takes its part of the clips, and all return the report on all.

    Args:
        dataset: Rows as `data.sources.load_speech` returns them: `id`, `text` and undecoded `audio`, and for
            text-to-speech also `reference_audio` and `reference_text`.
        methods: Such as [`Original`], [`CodecReconstruction`] and [`TextToSpeech`], each with its own label.
        evaluator: What to measure.
        output_dir: Each result is appended to a file here at once, so that an interrupted run continues where it
            stopped. Results that are there are not measured again.
        settings: What else decides the results (the model, the data, the recognizer, ...). Kept in `output_dir`.
        on_error: Called with a message for each clip that cannot be read, lacks what the methods need, or that a
            method rejects; the others go on. Such a clip counts for no method, so that all are compared on the
            same clips.

    Raises:
        ValueError: Two methods have the same label.
        DataError: `output_dir` has results of other settings, another run works in it, or nothing could be measured.
    """
    labels = [method.label for method in methods]
    if len(set(labels)) < len(labels):
        raise ValueError(f"each method needs a label of its own, got {', '.join(labels)}.")
    state = PartialState()
    settings = {"measures": sorted(evaluator.measures), **(settings or {})}
    with nullcontext() if output_dir is None else only_run(output_dir, state.is_main_process):
        results = _Results(None if output_dir is None else Path(output_dir), settings, state.process_index)
        # What a clip must have: for recordings alone, a recording.
        needed = [method.label for method in methods if not isinstance(method, Original)] or labels
        rows: list[tuple[int, int, Row]] = []
        failed: list[str] = []
        names: set[str] = set()

        def fail(message: str) -> None:
            failed.append(message.encode(errors="backslashreplace").decode())
            on_error(failed[-1])

        items = _rows(dataset, fail if state.is_main_process else lambda message: None)
        for index, item in enumerate(tqdm(items, unit="clip", disable=None if state.is_main_process else True)):
            name, text = str(item.get("id") or f"{index:06d}"), item.get("text") or None
            if name in names:  # ids may be file names, without their folders
                name = f"{name} ({index:06d})"
            names.add(name)
            if index % state.num_processes != state.process_index:
                continue
            try:
                f"{name}{text}".encode()  # results are files in UTF-8
                done = results.of(name, text)
                missing = [method for method in methods if method.label not in done]
                if missing:
                    audio, reference = (_waveform(item, column) for column in ("audio", "reference_audio"))
                    clip = Clip(name, text, audio, reference, item.get("reference_text"))
                    for row in filter(None, (_measure(clip, method, evaluator) for method in missing)):
                        results.append(row)
                if not all(label in done for label in needed):
                    raise ValueError(f"it has no {'audio' if text else 'text'} for the methods to work on.")
            except (ValueError, OSError) as error:
                fail(str(error) if isinstance(error, AudioError) else f"{name}: {error}")
                continue
            rows += [(index, number, done[label]) for number, label in enumerate(labels) if label in done]

    rows, failed = gather_object(rows), gather_object(failed)
    rows.sort(key=lambda item: item[:2])
    if not rows:
        reason = (
            f"the first of {len(failed)} failures is: {failed[0]}" if failed else "no clip has what the methods need."
        )
        raise DataError(f"there is nothing to measure: {reason}")
    return Report(
        [row for *_, row in rows], {method.label: dict(method.settings) for method in methods}, settings, failed
    )


def _rows(dataset: Iterable[Mapping[str, Any]], fail: Callable[[str], None]) -> Iterator[Mapping[str, Any]]:
    """The rows of a dataset, until it ends or cannot be read any further."""
    try:
        yield from dataset
    except Exception as error:  # libraries of files raise whatever comes
        fail(f"the data cannot be read any further: {type(error).__name__}: {error}")


def _waveform(item: Mapping[str, Any], column: str) -> np.ndarray | None:
    return None if item.get(column) is None else decode_audio(item[column], SAMPLING_RATE)


def _measure(clip: Clip, method: Method, evaluator: Evaluator) -> Row | None:
    speech = method(clip)
    if speech is None:
        return None
    # Codecs drop the end of a recording, but their rates are relative to all of it.
    timed = clip.waveform if speech.aligned and clip.waveform is not None else speech.waveform
    return {
        "clip": clip.name,
        "method": method.label,
        "text": clip.text,
        "seconds": len(timed) / SAMPLING_RATE,
        "processing_seconds": speech.processing_seconds,
        "num_tokens": speech.num_tokens,
        "bits": speech.bits,
        **evaluator(speech, clip, getattr(method, "tokenize", None)),
    }


class _Results:
    """Rows by clip and method; on disk, `settings.json` and in `parts` a file of rows from each process."""

    def __init__(self, directory: Path | None, settings: Mapping[str, Any], process_index: int):
        self._rows: dict[tuple[str, str | None], dict[str, Row]] = {}
        self._path = None if directory is None else directory / "parts" / f"{process_index:03d}.jsonl"
        if directory is None or self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        check_settings(directory / "settings.json", settings)
        for part in sorted(self._path.parent.glob("[!.]*.jsonl")):
            lines = part.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n") and self._remember(line)]
            if part == self._path and len(whole) < len(lines):  # rows that an interrupted run began
                with atomic_file(part) as temporary:
                    temporary.write_bytes(b"".join(whole))

    def of(self, name: str, text: str | None) -> dict[str, Row]:
        """The rows of a clip by method, empty if its text has changed. Rows that are appended later show up in it."""
        return self._rows.setdefault((name, text), {})

    def append(self, row: Row) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self._remember(line)
        if self._path is not None:
            with self._path.open("ab", buffering=0) as file:  # one write for the row
                file.write(line)

    def _remember(self, line: bytes) -> bool:
        """Whether the line is a row."""
        try:
            row = json.loads(line)
            self.of(row["clip"], row["text"])[row["method"]] = row
            return True
        except (ValueError, TypeError, KeyError):
            return False
