"""The released files, from the Hub or from a directory that holds them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

from .checkpoint import TTS_CODEC_PREFIXES, CheckpointError, SourceCheckpoint
from .codec import CODEC_PREFIXES


RELEASED_REPO = "jiaqili3/flexicodec"
CODEC_FILE = "12hz_v1_half.safetensors"
CODEC_CONFIG_FILE = "12hz_v1_half_config.yaml"
AR_FILE = "artts.safetensors"
NAR_FILE = "nartts.safetensors"
TTS_CODEC_FILE = "nartts_flexicodec_only.safetensors"
VOCODER_REPO = "amphion/dualcodec-tts"
VOCODER_FILE = "vocos_emilia.safetensors"
SEMANTIC_REPO = "FunAudioLLM/SenseVoiceSmall"
SEMANTIC_FILE = "model.pt"


def fetch(repo: str | Path, filename: str) -> Path:
    """
    A file of a Hub repository, downloaded to the cache unless it is there, or of a local directory.

    Raises:
        CheckpointError: The repository or directory has no such file, or the Hub cannot be reached.
    """
    if Path(repo).is_dir():
        path = Path(repo) / filename
        if not path.is_file():
            raise CheckpointError(f"There is no file {filename} in the directory {repo}.")
        return path
    try:
        return Path(hf_hub_download(str(repo), filename))
    except (OSError, ValueError) as error:  # the Hub's own errors are one or the other
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{filename} cannot be had from {repo}, which is neither a directory here nor a repository that can be "
            f"reached on the Hub: {reason}"
        ) from error


def has_codec(source: Path) -> bool:
    """Whether a text-to-speech file carries the codec that its model was trained with."""
    return any(name.startswith(TTS_CODEC_PREFIXES) for name in SourceCheckpoint(source))


def has_semantic_encoder(codec: Path) -> bool:
    """Whether a file with a codec, at its root or beside a text-to-speech model, has its semantic encoder too."""
    prefixes = tuple(f"{prefix}semantic_model." for prefix in CODEC_PREFIXES)
    return any(name.startswith(prefixes) for name in SourceCheckpoint(codec))
