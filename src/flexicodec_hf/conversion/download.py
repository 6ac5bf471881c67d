"""The released files, from the Hub or from a directory that holds them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

from .checkpoint import CheckpointError, SourceCheckpoint
from .codec import CODEC_PREFIXES


RELEASED_REPO = "jiaqili3/flexicodec"
CODEC_FILE = "12hz_v1_half.safetensors"
CODEC_CONFIG_FILE = "12hz_v1_half_config.yaml"
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


def fetch_codec(
    repo: str | Path = RELEASED_REPO, semantic_repo: str | Path = SEMANTIC_REPO
) -> tuple[Path, Path, Path | None]:
    """
    The files that `convert_codec` takes: the codec, its YAML, and SenseVoice's weights where the codec lacks them.

    Args:
        repo: Hub id or directory of the codec.
        semantic_repo: Hub id or directory of SenseVoice-small.

    Raises:
        CheckpointError: A file cannot be had, or the codec's is damaged.
    """
    codec, config = fetch(repo, CODEC_FILE), fetch(repo, CODEC_CONFIG_FILE)
    prefixes = tuple(f"{prefix}semantic_model." for prefix in CODEC_PREFIXES)
    has_semantic = any(name.startswith(prefixes) for name in SourceCheckpoint(codec))
    return codec, config, None if has_semantic else fetch(semantic_repo, SEMANTIC_FILE)
