"""Speaker encoders: vectors that are alike where voices are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

from ..audio_flexicodec import resample
from .common import SAMPLING_RATE, EvaluationError, require


SpeakerEncoder = Callable[[np.ndarray], np.ndarray]


def load_speaker_encoder(model: str, device: str = "cpu") -> SpeakerEncoder:
    """
    A function from a waveform (`(num_samples,)` at 16 kHz) to a vector of its speaker (`(size,)`).

    Args:
        model: `"resemblyzer"` for the package of that name (GE2E, arXiv:1710.10467; it carries its weights), or a model for
            `AutoModelForAudioXVector`, a Hub id (such as `microsoft/wavlm-base-plus-sv`) or a directory.
        device: Where to run.

    Raises:
        EvaluationError: The package is missing, or there is no such model.
    """
    if model == "resemblyzer":
        # webrtcvad, which it needs, imports pkg_resources, which setuptools 81 dropped.
        package = require("resemblyzer", "speaker similarity", "pip install resemblyzer 'setuptools<81'")
        encoder = package.VoiceEncoder(device, verbose=False)
        return lambda waveform: encoder.embed_utterance(package.preprocess_wav(waveform, source_sr=SAMPLING_RATE))
    try:
        extractor = AutoFeatureExtractor.from_pretrained(model)
        network = AutoModelForAudioXVector.from_pretrained(model).to(device).eval()
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"cannot load the speaker encoder {model}: {str(error).splitlines()[0]} Pass `resemblyzer` or a model with an "
            "x-vector head, such as `microsoft/wavlm-base-plus-sv`."
        ) from error

    @torch.inference_mode()
    def encode(waveform: np.ndarray) -> np.ndarray:
        waveform = resample(waveform, SAMPLING_RATE, extractor.sampling_rate)
        inputs = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt").to(device)
        return network(**inputs).embeddings[0].cpu().numpy()

    return encode
