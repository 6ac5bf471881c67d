"""When the words of a text are spoken in a recording, by the attention of Whisper."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor

from ..data.files import DataError, require


SAMPLING_RATE = 16_000
# Whisper sees so much at once, and knows so many positions of tokens.
MAX_SECONDS = 30
_MAX_TOKENS = 440
_TOKENS_PER_SECOND = 50
# A word of a script without spaces is a character.
_WORD = re.compile(r" ?(?:[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+)")


class Word(NamedTuple):
    """A word, and where it is, in seconds."""

    text: str
    start_s: float
    end_s: float


Aligner = Callable[[np.ndarray, str], list[Word]]


def load_aligner(model: str) -> Aligner:
    """
    Load a Whisper (arXiv:2212.04356) as a function from a waveform (`(num_samples,)` at 16 kHz, up to 30 s) and what
    it says to the times of its words. The decoder gets the text, and its attention tells what it hears for each token.

    Args:
        model: A model in CTranslate2's format with its `tokenizer.json`, a Hub id or a directory.

    Raises:
        DataError: The package `ctranslate2` is missing, or the model cannot be loaded.
    """
    ctranslate2 = require("ctranslate2", "words in the picture")
    try:
        directory = Path(model if Path(model).is_dir() else snapshot_download(model))
        whisper = ctranslate2.models.Whisper(str(directory), compute_type="auto")
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more exact
        reason = str(error).splitlines()[0]
        raise DataError(f"{model} is no Whisper in CTranslate2's format with a tokenizer.json: {reason}") from error
    extractor = WhisperFeatureExtractor(feature_size=whisper.n_mels)

    def align(waveform: np.ndarray, text: str) -> list[Word]:
        words = _WORD.findall(" " + " ".join(text.split()))
        tokens = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
        if len(waveform) > MAX_SECONDS * SAMPLING_RATE or sum(map(len, tokens)) > _MAX_TOKENS:
            raise ValueError(
                f"Words can be shown for up to {MAX_SECONDS} s of speech, got {len(waveform) / SAMPLING_RATE:.0f} s "
                f"and {len(words)} words: take a shorter recording, or leave its words out."
            )
        inputs = extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="np")
        heard = whisper.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(inputs.input_features)))
        start = ["<|startoftranscript|>"]
        if whisper.is_multilingual:
            start += [whisper.detect_language(heard)[0][0][0], "<|transcribe|>"]
        (found,) = whisper.align(
            heard,
            [tokenizer.token_to_id(token) for token in start],
            [[token for word in tokens for token in word]],
            len(waveform) // extractor.hop_length,
        )
        # The first of the moments that belong to a token. After the last token comes the end of the text.
        moments = dict(reversed(found.alignments))
        edges = np.cumsum([0, *map(len, tokens)])
        times = [moments[edge] / _TOKENS_PER_SECOND for edge in edges]
        return [Word(word.strip(), *span) for word, *span in zip(words, times, times[1:], strict=False)]

    return align


__all__ = ["MAX_SECONDS", "SAMPLING_RATE", "Aligner", "Word", "load_aligner"]
