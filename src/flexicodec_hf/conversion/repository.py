"""One repository of codec and text-to-speech: converted, assembled, described, and uploaded."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import safe_open

from ..data.files import atomic_directory
from ..feature_extraction_flexicodec import FlexiCodecFeatureExtractor
from ..modeling_flexicodec import FlexiCodecModel
from ..modeling_flexicodec_tts import FlexiCodecForTextToSpeech
from ..processing_flexicodec_tts import FlexiCodecTTSProcessor
from ..repository_flexicodec_tts import TTS_DIR, check_voice_name, save_repository
from . import convert
from .checkpoint import CheckpointError
from .download import ReleasedFiles
from .progress import Progress
from .tokenizer import build_tokenizer


DEFAULT_VOICE = "default"

# Of the pipeline, for remote code; the files of models and processor are written with them.
PIPELINE_FILES = ("pipeline_flexicodec_tts.py", "cpu_flexicodec.py")

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
    codec = ("codec", output_dir, convert.convert_codec, files.codec, files.codec_config, codec_options)
    parts = (
        ("autoregressive model", tts / "ar", convert.convert_ar, files.ar, files.ar_config, options),
        ("Voicebox model", tts / "voicebox", convert.convert_voicebox, files.nar, files.nar_config, options),
        ("vocoder", tts / "vocoder", convert.convert_vocoder, files.vocoder, files.vocoder_config, options),
        ("TTS codec", tts / "codec", convert.convert_codec, tts_codec, files.tts_codec_config, codec_options),
    )

    def run(
        name: str, directory: Path, function: Any, source: Path | None, config: Path | None, options: dict
    ) -> None:
        if source is None:
            return
        sources = [source, config, *options.values()]
        if not progress.convert(name, directory, sources, lambda folder: function(source, folder, config, **options)):
            report(f"{directory}: {name}, done before.")
        elif files.is_whole and directory != output_dir:
            report(f"{directory}: {name}.")
        else:
            loader = "AutoModelForCausalLM" if directory == tts / "ar" else "AutoModel"
            kind = str(dtype).removeprefix("torch.")
            report(f"{directory}: {name}, {kind}; load it with {loader}.from_pretrained({str(directory)!r}).")

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
    progress.convert("text-to-speech system", output_dir, sources, build, weights=TTS_DIR)
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
            raise CheckpointError(f"{voice.audio} makes no voice: {error}") from error
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


def write_card(directory: Path, card: str, repo_id: str | None = None, overwrite: bool = False) -> None:
    """
    Write the model card, `README.md`.

    Args:
        directory: Directory of the repository.
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
    """What a repository holds of a model."""

    name: str
    num_parameters: int
    dtypes: str
    num_bytes: int


def list_parts(directory: Path) -> list[Part]:
    """
    The models in a repository, from the headers of its weights; those of the whole text-to-speech
    system one by one.
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
        directory: Directory of the repository.
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
    except Exception as error:  # errors of the HTTP library and of the Hub have no class in common
        raise CheckpointError(
            f"The upload to {repo_id} failed: {error} Run the command again: nothing will be converted twice."
        ) from error
    return commit.pr_url if create_pr else commit.commit_url
