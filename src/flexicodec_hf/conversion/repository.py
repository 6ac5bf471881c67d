"""One repository of codec and text-to-speech: put together from converted parts, described, and pushed to the Hub."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open

from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_tts import FlexiCodecForTextToSpeech
from ..processing_flexicodec_tts import FlexiCodecTTSProcessor
from ..repository_flexicodec_tts import check_voice_name, save_repository
from .checkpoint import CheckpointError, written_whole


DEFAULT_VOICE = "default"

# Of the pipeline, for remote code; the files of models and processor are written with them.
PIPELINE_FILES = ("pipeline_flexicodec_tts.py", "cpu_flexicodec.py")

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class VoiceSource:
    """
    A recording to make a voice of.

    Args:
        name: Of the voice: letters, digits, spaces, '.', '-' and '_'.
        audio: The file.
        text: What it says.

    Raises:
        ValueError: The name has other characters.
    """

    name: str
    audio: Path
    text: str

    def __post_init__(self) -> None:
        check_voice_name(self.name)


def assemble(
    output_dir: Path,
    codec: str | Path,
    parts: Mapping[str, str | Path],
    tokenizer: Any,
    voices: Sequence[VoiceSource] = (),
    dtype: torch.dtype = torch.float32,
    storage_dtype: torch.dtype | None = None,
) -> None:
    """
    Put converted or trained parts together to one repository.

    Args:
        output_dir: Of the repository.
        codec: Directory of the codec at its root, with its feature extractor.
        parts: Directories of the models of the text-to-speech system: `codec` (which may be the same), `ar` and, if there
            is a second stage, `voicebox` and its `vocoder`.
        tokenizer: Of the texts: what `build_tokenizer` made, or that of the training.
        voices: The first one, or the one named `default`, speaks when a call names none.
        dtype: Type of the weights, in which they load again.
        storage_dtype: Type that the files hold them in; the same by default.

    Raises:
        CheckpointError: A voice cannot be made of its recording.
    """
    model = FlexiCodecForTextToSpeech.from_parts_pretrained(**parts).float().eval()
    feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(codec)
    processor = FlexiCodecTTSProcessor(feature_extractor, tokenizer, mel_config={} if "vocoder" in parts else None)
    for voice in sorted(voices, key=lambda voice: voice.name != DEFAULT_VOICE):
        try:
            inputs = processor(audio=str(voice.audio), reference_text=voice.text)
            model.voices[voice.name] = model.encode_voice(**inputs, metadata={"text": voice.text})
        except (ValueError, ImportError) as error:
            raise CheckpointError(f"{voice.audio} makes no voice: {error}") from error
    root = model.codec if Path(codec) == Path(parts["codec"]) else FlexiCodecModel.from_pretrained(codec).to(dtype)
    with written_whole(output_dir) as folder:
        # One file of weights, whatever its size: where it is, the system is complete.
        save_repository(folder, root, model.to(dtype), processor, storage_dtype=storage_dtype, max_shard_size="1TB")
        package = Path(__file__).parents[1]
        for name in PIPELINE_FILES:
            shutil.copyfile(package / name, folder / name)
    for file in (output_dir / "voices").glob("*.safetensors"):
        if file.stem not in model.voices:
            file.unlink()


def write_card(directory: Path, card: str, repo_id: str | None = None, overwrite: bool = False) -> None:
    """
    Write the model card, `README.md`.

    Args:
        directory: Of the repository.
        card: `codec`, `tts` or `voicebox`.
        repo_id: The Hub id for the card's examples to load from.
        overwrite: Whether to replace one that is there.
    """
    if (directory / "README.md").exists() and not overwrite:
        return
    package = Path(__file__).parents[1]
    # Installed as part of the package; in a checkout, at its root.
    paths = [folder / "model_cards" / f"{card}.md" for folder in (package, package.parents[1])]
    text = next(path for path in paths if path.is_file()).read_text(encoding="utf-8")
    if repo_id is not None:
        text = text.replace('"flexicodec"', f'"{repo_id}"')
    (directory / "README.md").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Part:
    """What a repository holds of a model: its name, how many numbers, in which types, in how many bytes."""

    name: str
    num_parameters: int
    dtypes: str
    num_bytes: int


def list_parts(directory: Path) -> list[Part]:
    """
    The models in a repository, from the headers of its weights; those of the whole text-to-speech system one by one.
    """
    tensors: dict[str, list[tuple[int, str]]] = {}
    for file in sorted(directory.glob("model*.safetensors")) + sorted(directory.glob("tts/**/model*.safetensors")):
        folder = file.parent.relative_to(directory).as_posix()
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 (it is no mapping)
                view = weights.get_slice(key)
                name = {".": "codec", "tts": f"tts: {key.split('.')[0]}"}.get(folder, folder)
                tensors.setdefault(name, []).append((math.prod(view.get_shape()), view.get_dtype()))
    return [
        Part(
            name,
            sum(size for size, _ in sizes),
            ", ".join(sorted({_DTYPES.get(dtype, dtype) for _, dtype in sizes})),
            sum(size * int(re.sub(r"\D", "", dtype)) // 8 for size, dtype in sizes),
        )
        for name, sizes in tensors.items()
    ]


def push(directory: Path, repo_id: str, private: bool = False, create_pr: bool = False) -> str:
    """
    Upload a repository to the Hub.

    Args:
        directory: Of the repository.
        repo_id: Where to; made when missing.
        private: Whether a repository that is made is private.
        create_pr: Whether to open a pull request instead of committing to the main branch.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        CheckpointError: The upload failed.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message="Upload FlexiCodec, converted with flexicodec-hf",
            create_pr=create_pr,
            ignore_patterns=[".*", "**/.*"],
        )
    except Exception as error:  # those of the HTTP library have no class in common with the Hub's own
        raise CheckpointError(
            f"The upload to {repo_id} failed: {error} Run the command again: nothing will be converted twice."
        ) from error
    return commit.pr_url if create_pr else commit.commit_url
