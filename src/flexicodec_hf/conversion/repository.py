"""One repository of codec and text-to-speech: converted, assembled, described, and uploaded."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from ..data.files import atomic_directory, only_run
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_tts import FlexiCodecForTextToSpeech
from ..processing_flexicodec_tts import FlexiCodecTTSProcessor
from ..repository_flexicodec_tts import TTS_DIR, check_voice_name, save_repository
from . import convert
from .checkpoint import CheckpointError
from .download import ReleasedFiles
from .tokenizer import build_tokenizer


DEFAULT_VOICE = "default"

# Of the pipeline, for remote code; the files of models and processor are written with them.
PIPELINE_FILES = ("pipeline_flexicodec_tts.py", "cpu_flexicodec.py")


@dataclass(frozen=True)
class VoiceSource:
    """
    A recording to make a voice of.

    Args:
        name: Name of the voice: letters, digits, spaces, '.', '-' and '_'.
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


def fingerprint(source: Any) -> Any:
    """What tells a file from another one or from itself when changed; any other value is its text."""
    path = Path(str(source))
    if source is None or not path.is_file():
        return str(source)
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def convert_release(
    files: ReleasedFiles,
    output_dir: Path,
    voices: Sequence[VoiceSource] = (),
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
    overwrite: bool = False,
    report: Callable[[str], Any] = print,
) -> None:
    """
    Convert released files to one repository: the codec at its root, the text-to-speech system in
    `tts/`. If files of the system are missing, the others become models of their own in `tts/ar`,
    `tts/voicebox`, `tts/vocoder` and `tts/codec`.

    Models stay in `.conversion` until all are there: an interrupted conversion of the same files with
    the same options goes on, and leaves nothing elsewhere.

    Args:
        files: The files.
        output_dir: Directory of the repository.
        voices: Voices of the whole system. The first one, or the one named `default`, speaks when a
            call names none.
        dtype: Type of the weights.
        allow_partial: Convert in spite of unknown or missing tensors.
        overwrite: Whether to replace models that are there.
        report: Called with a line about each model.

    Raises:
        FileNotFoundError: A file is missing.
        CheckpointError: A file cannot be converted, a model is there already, or a voice cannot be
            made of its recording.
        DataError: Another conversion to the directory runs.
        OSError: The tokenizer's files could not be found.
    """
    options = {"dtype": dtype, "allow_partial": allow_partial}
    codec_options = options | {"semantic": files.semantic}
    parts: list[tuple[Any, ...]] = [
        ("codec", ".", convert.convert_codec, files.codec, "codec_config", codec_options),
        ("autoregressive model", "tts/ar", convert.convert_ar, files.ar, "ar_config", options),
        ("Voicebox model", "tts/voicebox", convert.convert_voicebox, files.nar, "nar_config", options),
        ("vocoder", "tts/vocoder", convert.convert_vocoder, files.vocoder, "vocoder_config", options),
        ("TTS codec", "tts/codec", convert.convert_codec, files.find_tts_codec(), "tts_codec_config", codec_options),
    ]
    parts = [part for part in parts if part[3] is not None]
    results = {place: title for title, place, *_ in parts}
    if files.is_whole:
        if "tts/codec" not in results:
            raise CheckpointError(
                f"Neither {files.ar} nor {files.nar} carries the codec of the text-to-speech models: pass `tts_codec`."
            )
        results = {".": "codec", TTS_DIR: f"load it with pipeline('text-to-speech', model={str(output_dir)!r})"}
    elif files.tokenizer is not None:
        results.setdefault("tts/ar", "text tokenizer")
    for place in results:
        if (weights := output_dir / place / "model.safetensors").exists() and not overwrite:
            raise CheckpointError(f"{weights} exists: pass `overwrite` to replace it.")
    if not results:
        return

    key = str([fingerprint(value) for value in (*astuple(files), *options.values())])
    work = output_dir / ".conversion"
    done = work / hashlib.sha256(key.encode()).hexdigest()[:16]
    with only_run(work):
        try:
            tokenizer = None if files.tokenizer is None else build_tokenizer(files.tokenizer)  # the quickest to fail
            for title, place, function, source, config_name, part_options in parts:
                if (done / place / "model.safetensors").exists():
                    report(f"{title}: converted before the interruption.")
                    continue
                try:
                    function(source, done / place, getattr(files, config_name), **part_options)
                except CheckpointError as error:
                    raise CheckpointError(str(error).replace("`config`", f"`{config_name}`")) from error
            if files.is_whole:
                folders = {part.name: part for part in (done / TTS_DIR).glob("[!.]*")}
                assemble(output_dir, done, folders, tokenizer, voices, dtype)
            else:
                if tokenizer is not None:
                    tokenizer.save_pretrained(done / "tts" / "ar")
                with atomic_directory(output_dir) as folder:
                    shutil.copytree(done, folder, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
            shutil.rmtree(work, ignore_errors=True)
        finally:
            if not any(work.rglob("model.safetensors")):
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):  # it holds something
                    output_dir.rmdir()
    for place, title in results.items():
        report(f"{output_dir / place}: {title}.")


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
        output_dir: Directory of the repository.
        codec: Directory of the codec at its root, with its feature extractor.
        parts: Directories of the models of the text-to-speech system: `codec` (which may be the
            same), `ar` and, if there is a second stage, `voicebox` and its `vocoder`.
        tokenizer: Text tokenizer: what `build_tokenizer` made, or the one used in training.
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
            reason = str(error).replace("`audio`", "the recording")
            raise CheckpointError(f"{voice.audio} makes no voice: {reason}") from error
    root = model.codec if Path(codec) == Path(parts["codec"]) else FlexiCodecModel.from_pretrained(codec).to(dtype)
    with atomic_directory(output_dir) as folder:
        # One file of weights, whatever its size: where it is, the system is complete.
        save_repository(folder, root, model.to(dtype), processor, storage_dtype=storage_dtype, max_shard_size="1TB")
        package = Path(__file__).parents[1]
        for name in PIPELINE_FILES:
            shutil.copyfile(package / name, folder / name)
    for file in (output_dir / "voices").glob("*.safetensors"):
        if file.stem not in model.voices:
            file.unlink()


def write_card(directory: Path, card: str, overwrite: bool = False) -> None:
    """
    Write the model card, `README.md`, unless there is one. [`push`] puts the id of the repository in
    the place of `"flexicodec"`.

    Args:
        directory: Directory of the repository.
        card: `codec`, `tts` or `voicebox`.
        overwrite: Whether to replace one that is there.
    """
    if overwrite or not (directory / "README.md").exists():
        package = Path(__file__).parents[1]
        # Installed as part of the package; in a checkout, at its root.
        paths = [folder / "model_cards" / f"{card}.md" for folder in (package, package.parents[1])]
        shutil.copyfile(next(path for path in paths if path.is_file()), directory / "README.md")


def push(directory: Path, repo_id: str, private: bool = False, create_pr: bool = False) -> str:
    """
    Upload a repository to the Hub. The examples in its card get the id that it goes to.

    Args:
        directory: Directory of the repository.
        repo_id: Where to; made when missing.
        private: Whether a repository that is made is private.
        create_pr: Whether to open a pull request to an existing repository instead. It adds files:
            a card that is there stays, and ours becomes the text of the pull request.

    Returns:
        The URL of the commit or of the pull request.

    Raises:
        CheckpointError: The upload failed.
    """
    api, description = HfApi(), None
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    card = files.pop("README.md", None)
    try:
        if not create_pr:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        additions = [CommitOperationAdd(name, path) for name, path in files.items() if not re.search(r"(^|/)\.", name)]
        if card is not None:
            text = card.read_text(encoding="utf-8").replace('"flexicodec"', f'"{repo_id}"')
            if create_pr and api.file_exists(repo_id, "README.md"):
                description = f"A section to add to the model card:\n\n{ModelCard(text).text}"
            else:
                additions.append(CommitOperationAdd("README.md", text.encode()))
        commit = api.create_commit(
            repo_id,
            additions,
            commit_message="Upload FlexiCodec, converted with flexicodec-hf",
            commit_description=description,
            create_pr=create_pr,
        )
    except Exception as error:  # errors of the HTTP library and of the Hub have no class in common
        raise CheckpointError(
            f"The upload to {repo_id} failed: {error} To try again without a conversion: `flexicodec-hf convert "
            f"--output-dir {directory} --push-to-hub {repo_id}`."
        ) from error
    return commit.pr_url or commit.commit_url
