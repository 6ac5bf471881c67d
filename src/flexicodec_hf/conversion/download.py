"""The released files, from the Hub or from a directory that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download

from .checkpoint import CheckpointError, SourceCheckpoint
from .tables import TTS_CODEC_PREFIXES
from .tokenizer import DEFAULT_SOURCE


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
        if self.tts_codec is not None:
            return self.tts_codec
        return next(
            (file for file in (self.ar, self.nar) if file is not None and _holds(file, TTS_CODEC_PREFIXES)), None
        )

    def fetch(
        self,
        repo: str | Path,
        text_to_speech: bool = True,
        vocoder_repo: str | Path | None = None,
        semantic_repo: str | Path | None = None,
    ) -> None:
        """
        Fill in the files that are not given.

        Args:
            repo: Hub repository or directory with the released files.
            text_to_speech: Whether to get more than the codec.
            vocoder_repo: Where the vocoder is, if `repo` has none.
            semantic_repo: Where the semantic encoder is, if a codec lacks it.

        Raises:
            CheckpointError: A file could not be found.
        """
        if self.codec is None:
            self.codec = fetch(repo, CODEC_FILE)
            self.codec_config = self.codec_config or fetch(repo, CODEC_CONFIG_FILE)
        codecs = [self.codec]
        if text_to_speech:
            self.ar = self.ar or fetch(repo, AR_FILE)
            self.nar = self.nar or fetch(repo, NAR_FILE)
            self.tts_codec = self.find_tts_codec() or fetch(repo, TTS_CODEC_FILE)
            if self.vocoder is None:
                here = Path(repo) / VOCODER_FILE
                self.vocoder = here if here.is_file() else fetch(vocoder_repo or VOCODER_REPO, VOCODER_FILE)
            self.tokenizer = self.tokenizer or DEFAULT_SOURCE
            codecs.append(self.tts_codec)
        prefixes = tuple(f"{prefix}semantic_model." for prefix in (*TTS_CODEC_PREFIXES, ""))
        if self.semantic is None and not all(_holds(codec, prefixes) for codec in codecs):
            self.semantic = fetch(semantic_repo or SEMANTIC_REPO, SEMANTIC_FILE)


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
            f"{filename} could not be found in {repo}, which is neither a directory here nor a repository that can be "
            f"reached on the Hub: {reason}"
        ) from error


def _holds(file: Path, prefixes: tuple[str, ...]) -> bool:
    """Whether a file has tensors whose names start with one of the prefixes."""
    return any(name.startswith(prefixes) for name in SourceCheckpoint.open(file))
