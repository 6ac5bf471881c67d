"""The released files, from the Hub or from a directory that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from .checkpoint import CheckpointError, read_tensors
from .tables import TTS_CODEC_PREFIXES
from .tokenizer import DEFAULT_SOURCE as TOKENIZER_REPO


CODEC_FILE = "12hz_v1_half.safetensors"
CODEC_CONFIG_FILE = "12hz_v1_half_config.yaml"
AR_FILE = "artts.safetensors"
NAR_FILE = "nartts.safetensors"
TTS_CODEC_FILE = "nartts_flexicodec_only.safetensors"
VOCODER_REPO = "amphion/dualcodec-tts"
VOCODER_FILE = "vocos_emilia.safetensors"
SEMANTIC_REPO = "FunAudioLLM/SenseVoiceSmall"
SEMANTIC_FILE = "model.pt"


@dataclass
class ReleasedFiles:
    """
    The files to convert, with the configurations that go with them, by the reference's names.

    Args:
        codec: The codec of its own.
        semantic: SenseVoice-small, for codec files without the semantic encoder.
        ar: The autoregressive model.
        nar: The Voicebox model.
        vocoder: The vocoder.
        tts_codec: The codec of `ar` and `nar`, where neither file carries it. It is an older one,
            with other weights than `codec`.
        tokenizer: A Whisper repository, directory or `tokenizer.json`.
    """

    codec: Path | None = None
    codec_config: Path | None = None
    semantic: Path | None = None
    ar: Path | None = None
    ar_config: Path | None = None
    nar: Path | None = None
    nar_config: Path | None = None
    vocoder: Path | None = None
    vocoder_config: Path | None = None
    tts_codec: Path | None = None
    tts_codec_config: Path | None = None
    tokenizer: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether they make the whole system, codec and text-to-speech."""
        return None not in (self.codec, self.ar, self.nar, self.vocoder, self.tokenizer)

    def find_tts_codec(self) -> Path | None:
        """The file with the codec that the text-to-speech models were trained with."""
        candidates = (file for file in (self.ar, self.nar) if file is not None and _holds(file, TTS_CODEC_PREFIXES))
        return self.tts_codec or next(candidates, None)

    def fetch(
        self, repo: str | PathLike[str], text_to_speech: bool = True, revision: str | None = None, **options: Any
    ) -> None:
        """
        Fill in the files that are not given.

        Args:
            repo: Hub repository or directory with the released files. What it lacks by nature (the
                vocoder, SenseVoice-small, Whisper's tokenizer) comes from repositories of their own,
                unless a directory has it.
            text_to_speech: Whether to get more than the codec.
            revision: Branch, tag or commit of `repo`.
            options: For all downloads, see `hf_hub_download`.

        Raises:
            CheckpointError: A file could not be found.
        """

        def fetch_own(filename: str) -> Path:
            return fetch(repo, filename, revision, **options)

        def fetch_other(other: str, filename: str) -> Path:
            here = Path(repo) / filename
            return here if here.is_file() else fetch(other, filename, **options)

        if self.codec is None:
            self.codec = fetch_own(CODEC_FILE)
            self.codec_config = self.codec_config or fetch_own(CODEC_CONFIG_FILE)
        codecs = [self.codec]
        if text_to_speech:
            self.ar = self.ar or fetch_own(AR_FILE)
            self.nar = self.nar or fetch_own(NAR_FILE)
            self.tts_codec = self.find_tts_codec() or fetch_own(TTS_CODEC_FILE)
            self.vocoder = self.vocoder or fetch_other(VOCODER_REPO, VOCODER_FILE)
            self.tokenizer = self.tokenizer or str(fetch_other(TOKENIZER_REPO, "tokenizer.json"))
            codecs.append(self.tts_codec)
        prefixes = tuple(f"{prefix}semantic_model." for prefix in (*TTS_CODEC_PREFIXES, ""))
        if self.semantic is None and not all(_holds(codec, prefixes) for codec in codecs):
            self.semantic = fetch_other(SEMANTIC_REPO, SEMANTIC_FILE)


def fetch(repo: str | PathLike[str], filename: str, revision: str | None = None, **options: Any) -> Path:
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
        return Path(hf_hub_download(str(repo), filename, revision=revision, **options))
    except (OSError, ValueError) as error:  # the Hub's own errors are one or the other
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{filename} could not be had from {repo}, which is neither a directory here nor a repository that can be "
            f"reached on the Hub or is in its cache: {reason}"
        ) from error


def _holds(file: Path, prefixes: tuple[str, ...]) -> bool:
    """Whether a file has tensors whose names start with one of the prefixes."""
    return any(name.startswith(prefixes) for name in read_tensors(file))
