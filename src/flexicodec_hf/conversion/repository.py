"""One repository of codec and text-to-speech: converted, assembled, described, and uploaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from transformers.utils import logging

from ..data.files import atomic_directory
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_tts import FlexiCodecForTextToSpeech
from ..processing_flexicodec_tts import FlexiCodecTTSProcessor
from ..repository_flexicodec_tts import TTS_DIR, check_voice_name, save_repository
from . import convert
from .checkpoint import CheckpointError
from .download import ReleasedFiles
from .tokenizer import build_tokenizer


logger = logging.get_logger(__name__)

DEFAULT_VOICE = "default"
RECORD = ".conversion.json"
"""Beside the weights while a conversion is unfinished: the files and options of its making."""

# Of the pipeline, for remote code; the files of models and processor are written with them.
PIPELINE_FILES = ("pipeline_flexicodec_tts.py", "cpu_flexicodec.py")

# Where a converted repository has weights, and so records and what a killed process left.
_WEIGHT_FOLDERS = ("", "tts/", "tts/*/")


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


class Progress:
    """
    A conversion to a directory, which goes on where an interrupted one stopped. It is a context,
    which keeps other conversions out.

    Args:
        output_dir: Directory of the conversion.
        overwrite: Whether to replace models of other conversions, or of other files and options.
        wait: Whether to wait for the end of another conversion, instead of raising an error.
    """

    def __init__(self, output_dir: Path, overwrite: bool = False, wait: bool = False):
        self.output_dir = output_dir
        self.overwrite = overwrite
        self.wait = wait
        self._lock = FileLock(output_dir / ".lock")

    def __enter__(self) -> Progress:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            message = f"Another conversion still writes to {self.output_dir}"
            if not self.wait:
                raise CheckpointError(f"{message}: wait for its end, or choose another directory.") from error
            logger.warning(f"{message}: waiting for its end.")
            self._lock.acquire()
        for where in _WEIGHT_FOLDERS:
            for leftover in self.output_dir.glob(f"{where}.incomplete-*"):
                shutil.rmtree(leftover)
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        with suppress(OSError):
            if not self.wait:
                Path(self._lock.lock_file).unlink()
            self.output_dir.rmdir()  # it is empty if nothing could be converted

    def convert(
        self, directory: Path, sources: Sequence[Any], convert: Callable[[Path], Any], weights: str = ""
    ) -> bool:
        """
        Convert a part, unless it is done.

        Args:
            directory: Where its files go.
            sources: What decides the result: files, and other values.
            convert: Called with a folder to write the files to.
            weights: Folder of the weights inside the directory.

        Returns:
            Whether it was converted now.

        Raises:
            CheckpointError: There is a model already, of another conversion or of other sources,
                and `overwrite` is not set.
        """
        result, record = (directory / weights / file for file in ("model.safetensors", RECORD))
        made_of = json.dumps([fingerprint(source) for source in sources])
        if result.exists():
            if record.exists() and record.read_text() == made_of:
                return False
            if not self.overwrite:
                raise CheckpointError(f"{result} exists: pass `overwrite` to replace it.")
        # What a killed process leaves is then inside, where the next run looks.
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_directory(directory) as folder:
                convert(folder)
                (folder / weights / RECORD).write_text(made_of)
        except BaseException:
            with suppress(OSError):  # it holds something
                directory.rmdir()
            raise
        return True

    def finish(self) -> None:
        """Remove the records: a later conversion to the directory is another one."""
        for where in _WEIGHT_FOLDERS:
            for record in self.output_dir.glob(where + RECORD):
                record.unlink()


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
    progress: Progress,
    voices: Sequence[VoiceSource] = (),
    dtype: torch.dtype = torch.float32,
    allow_partial: bool = False,
    report: Callable[[str], Any] = print,
) -> None:
    """
    Convert released files to one repository: the codec at its root, the text-to-speech system in
    `tts/`.

    If files of the system are missing, the others become models of their own in `tts/ar`,
    `tts/voicebox`, `tts/vocoder` and `tts/codec`.

    Args:
        files: The files.
        output_dir: Directory of the repository.
        progress: What an interrupted conversion has done.
        voices: Voices of the whole system. The first one, or the one named `default`, speaks when a
            call names none.
        dtype: Type of the weights.
        allow_partial: Convert in spite of unknown or missing tensors.
        report: Called with a line about each model.

    Raises:
        FileNotFoundError: A file is missing.
        CheckpointError: A file cannot be converted, a model of another conversion is there, or a
            voice cannot be made of its recording.
        OSError: The tokenizer's files could not be found.
    """
    options = {"dtype": dtype, "allow_partial": allow_partial}
    codec_options = options | {"semantic": files.semantic}
    tts, tts_codec = output_dir / TTS_DIR, files.find_tts_codec()
    codec = ("codec", output_dir, convert.convert_codec, files.codec, "codec_config", codec_options)
    parts = (
        ("autoregressive model", tts / "ar", convert.convert_ar, files.ar, "ar_config", options),
        ("Voicebox model", tts / "voicebox", convert.convert_voicebox, files.nar, "nar_config", options),
        ("vocoder", tts / "vocoder", convert.convert_vocoder, files.vocoder, "vocoder_config", options),
        ("TTS codec", tts / "codec", convert.convert_codec, tts_codec, "tts_codec_config", codec_options),
    )

    def run(name: str, directory: Path, function: Any, source: Path | None, config_name: str, options: dict) -> None:
        if source is None:
            return
        config = getattr(files, config_name)
        sources = [source, config, *options.values()]
        try:
            new = progress.convert(directory, sources, lambda folder: function(source, folder, config, **options))
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("`config`", f"`{config_name}`")) from error
        report(f"{directory}: {name}{'' if new else ', done before'}.")

    if not files.is_whole:
        for part in (codec, *parts):
            run(*part)
        if files.tokenizer is not None:
            build_tokenizer(files.tokenizer).save_pretrained(tts / "ar")
        return
    if tts_codec is None:
        raise CheckpointError(
            f"Neither {files.ar} nor {files.nar} carries the codec of the text-to-speech models: pass `tts_codec`."
        )

    def build(folder: Path) -> None:
        tokenizer = build_tokenizer(str(files.tokenizer))  # the quickest thing that can fail
        for part in parts:
            run(*part)
        directories = {directory.name: directory for _, directory, *_ in parts}
        assemble(folder, output_dir, directories, tokenizer, voices, dtype)

    run(*codec)
    sources = [*astuple(files), *options.values(), *(value for voice in voices for value in astuple(voice))]
    progress.convert(output_dir, sources, build, weights=TTS_DIR)
    _keep_voices(output_dir, {voice.name for voice in voices})
    for _, directory, *_ in parts:
        shutil.rmtree(directory, ignore_errors=True)
    report(f"{output_dir}: text-to-speech; load it with pipeline('text-to-speech', model={str(output_dir)!r}).")


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
    _keep_voices(output_dir, model.voices)


def _keep_voices(directory: Path, names: Collection[str]) -> None:
    for file in (directory / "voices").glob("*.safetensors"):
        if file.stem not in names:
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
            f"The upload to {repo_id} failed: {error} Run the command again: nothing will be converted twice."
        ) from error
    return commit.pr_url or commit.commit_url
