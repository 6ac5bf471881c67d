import csv
import json
import math
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    VitsConfig,
    VitsModel,
    VitsTokenizer,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForXVector,
)

from conftest import AUDIO
from flexicodec_hf.audio_flexicodec import AudioError, read_audio
from flexicodec_hf.cli import main
from flexicodec_hf.data.files import DataError
from flexicodec_hf.data.sources import decode_audio, load_speech
from flexicodec_hf.evaluation.methods import (
    Clip,
    CodecReconstruction,
    Original,
    Speech,
    TextToSpeech,
    even_token_lengths,
)
from flexicodec_hf.evaluation.recognizers import (
    load_normalizer,
    load_recognizer,
    load_speaker_encoder,
)
from flexicodec_hf.evaluation.report import Report
from flexicodec_hf.evaluation.run import Evaluator, evaluate


SENTENCE = "he was not an ill disposed young man"
CLIPS = {
    "librivox_austen_0880.flac": SENTENCE,
    "silence_2s.wav": "",
    "short_0p08s.wav": "",
    "stereo_48k.wav": SENTENCE,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as file:
        for name, text in CLIPS.items():
            shutil.copy(AUDIO / name, folder)
            file.write(json.dumps({"file_name": name, "text": text}) + "\n")
    return folder


@pytest.fixture
def asr(tmp_path, monkeypatch) -> Path:
    """A directory that looks like CTranslate2's, and a fake faster-whisper with one sentence for any audio."""
    pytest.importorskip("jiwer")
    pytest.importorskip("whisper_normalizer")
    directory = tmp_path / "asr"
    directory.mkdir()
    (directory / "model.bin").touch()
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "faster_whisper.py").write_text(
        "from types import SimpleNamespace\n"
        "class WhisperModel:\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        self.loaded = args, kwargs\n"
        "    def transcribe(self, audio, **options):\n"
        "        assert audio.dtype == 'float32' and audio.ndim == 1\n"
        "        words = ['He was not an ill', 'disposed young man.'][: 1 if len(audio) < 40_000 else 2]\n"
        "        return [SimpleNamespace(text=f' {word}') for word in words], None\n"
    )
    monkeypatch.delitem(sys.modules, "faster_whisper", raising=False)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), *sys.path]))
    yield directory
    sys.modules.pop("faster_whisper", None)


@pytest.fixture
def codec(codec_dir, device):
    model = AutoModel.from_pretrained(codec_dir()).to(device).eval()
    return model, AutoFeatureExtractor.from_pretrained(codec_dir())


# Data


def load_rows(*args, **kwargs) -> list[dict]:
    return list(load_speech(*args, **kwargs))


def waveform_of(row: dict, column: str = "audio") -> np.ndarray:
    return decode_audio(row[column], 16_000)


def test_folder_with_metadata(folder):
    clips = load_rows(folder)
    assert [(clip["id"], clip["text"] or "") for clip in clips] == list(CLIPS.items())
    expected = read_audio(AUDIO / "stereo_48k.wav", 16_000).waveform
    np.testing.assert_array_equal(waveform_of(clips[3]), expected)


def test_folder_with_texts_beside_the_files(tmp_path):
    (tmp_path / "b").mkdir()
    shutil.copy(AUDIO / "short_0p08s.wav", tmp_path / "b" / "2.WAV")
    shutil.copy(AUDIO / "silence_2s.wav", tmp_path / "1.wav")
    (tmp_path / "b" / "2.txt").write_text("two\n")
    assert [(clip["id"], clip["text"]) for clip in load_rows(tmp_path)] == [("1.wav", None), ("b/2.WAV", "two")]
    assert [(clip["id"], clip["text"]) for clip in load_rows(tmp_path / "b" / "2.WAV")] == [("2.WAV", "two")]


def test_table_of_other_columns(folder):
    with (folder / "all.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["clip", "sentence", "reference_audio", "reference_text"])
        writer.writeheader()
        writer.writerow(
            {"clip": "silence_2s.wav", "sentence": "a, b", "reference_audio": "short_0p08s.wav", "reference_text": "c"}
        )
    (clip,) = load_rows(folder / "all.csv", audio_column="clip")
    assert (clip["id"], clip["text"], clip["reference_text"]) == ("silence_2s.wav", "a, b", "c")
    assert len(waveform_of(clip)) == 32_000 and len(waveform_of(clip, "reference_audio")) == 1_280


class Echo:
    """Gives each clip's text back as a label, and no sound at all."""

    label, settings = "echo", {}

    def __init__(self):
        self.clips: list[Clip] = []

    def __call__(self, clip):
        self.clips.append(clip)
        return Speech(np.zeros(160, dtype=np.float32))


def test_texts_alone(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    echo = Echo()
    evaluate(load_speech(tmp_path / "texts.jsonl"), [echo], Evaluator([]))
    assert [(clip.name, clip.text, clip.waveform) for clip in echo.clips] == [
        ("000000", "one", None),
        ("000001", "two", None),
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_of_the_hub(tmp_path, streaming):
    """A repository as the Hub makes them of audio: parquet with the bytes of the files. Read without torchcodec."""
    datasets = pytest.importorskip("datasets")
    items = [
        {"audio": {"bytes": (AUDIO / name).read_bytes(), "path": name}, "transcription": text}
        for name, text in CLIPS.items()
    ]
    features = {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    table = datasets.Dataset.from_list(
        items, features=datasets.Features({**features, "transcription": datasets.Value("string")})
    )
    (tmp_path / "repo").mkdir()
    table.cast_column("audio", datasets.Audio(decode=False)).to_parquet(tmp_path / "repo" / "train-00000.parquet")

    clips = load_rows(tmp_path / "repo", streaming=streaming)
    assert [(clip["id"], clip["text"] or "") for clip in clips] == list(CLIPS.items())
    for clip in clips:
        np.testing.assert_array_equal(waveform_of(clip), read_audio(AUDIO / clip["id"], 16_000).waveform)
    with pytest.raises(DataError, match="has the splits train: pass one"):
        load_speech(tmp_path / "repo", split="test", streaming=streaming)


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    items = [{"path": str(AUDIO / name), "text": text} for name, text in CLIPS.items()]
    datasets.Dataset.from_list(items).save_to_disk(tmp_path / "saved")
    clips = load_rows(tmp_path / "saved")
    assert [Path(clip["id"]).name for clip in clips] == list(CLIPS)
    assert len(waveform_of(clips[1])) == 32_000
    with pytest.raises(DataError, match="has the splits train: pass one of them as `split`, not 'test'"):
        load_speech(tmp_path / "saved", split="test")


def test_errors_of_data(tmp_path):
    pytest.importorskip("datasets")
    for name, content in (
        ("empty.jsonl", ""),
        ("bad.jsonl", "{'a': 1}\n"),
        ("other.csv", "speaker,words\na,b\n"),
        ("one.csv", "file_name,text\na.wav,b\n"),
    ):
        (tmp_path / name).write_text(content)
    for name, options, message in (
        ("empty.jsonl", {}, "no rows"),
        ("bad.jsonl", {}, "bad.jsonl: not a table of rows"),
        ("other.csv", {}, "no column of audio or text among .*speaker.*words.*pass `audio_column`"),
        ("one.csv", {"text_column": "words"}, "there is no column 'words' among .*'text'"),
        ("nothing/here", {}, "nothing/here: cannot be loaded"),
    ):
        with pytest.raises(DataError, match=message):
            load_speech(tmp_path / name, **options)
    (clip,) = load_rows(tmp_path / "one.csv")
    with pytest.raises(AudioError, match="no such file"):
        waveform_of(clip)


# Recognizers, normalizers, speakers


def test_normalizers_are_whispers(monkeypatch):
    pytest.importorskip("whisper_normalizer")
    assert load_normalizer("en")("Mr. Smith's colour: twenty-one!") == "mister smith is color 21"
    assert load_normalizer("fr")("Où est-il ?").split() == ["où", "est", "il"]
    monkeypatch.setitem(sys.modules, "whisper_normalizer", None)
    assert load_normalizer("fr")("Où est-il ?").split() == ["où", "est", "il"]
    with pytest.raises(DataError, match=r"English normalizer needs .*`whisper_normalizer`.*flexicodec-hf\[eval\]"):
        load_normalizer("en")


def test_a_fake_faster_whisper_gets_options_that_repeat_its_words(asr, monkeypatch):
    import faster_whisper

    calls = []

    class Recorder(faster_whisper.WhisperModel):
        def __init__(self, *args, **kwargs):
            calls.append((args, kwargs))

        def transcribe(self, audio, **options):
            calls.append(options)
            return super().transcribe(audio)

    monkeypatch.setattr(faster_whisper, "WhisperModel", Recorder)
    recognize = load_recognizer(str(asr), language="it")
    assert recognize(np.zeros(50_000, dtype=np.float32)) == "He was not an ill disposed young man."
    recognize(np.zeros(29 * 16_000, dtype=np.float32))
    assert calls[0][0] == (str(asr),) and calls[0][1]["device"] == "cpu" and calls[0][1]["compute_type"] == "int8"
    assert calls[1]["language"] == "it" and calls[1]["temperature"] == 0 and not calls[1]["condition_on_previous_text"]
    assert [options["without_timestamps"] for options in calls[1:]] == [True, False]


def test_faster_whisper_may_be_missing(asr, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(DataError, match=r"`faster_whisper`.*pip install faster-whisper"):
        load_recognizer(str(asr))


def test_a_fake_whisper_gets_the_language_and_asks_for_timestamps_when_long(monkeypatch):
    calls = []

    class Whisper:
        model = SimpleNamespace(
            config=SimpleNamespace(model_type="whisper"), generation_config=SimpleNamespace(is_multilingual=True)
        )
        feature_extractor = SimpleNamespace(sampling_rate=16_000)

        def __call__(self, inputs, **options):
            calls.append((len(inputs["raw"]), options))
            return {"text": " Oui. "}

    monkeypatch.setattr("flexicodec_hf.evaluation.recognizers.pipeline", lambda *args, **kwargs: Whisper())
    recognize = load_recognizer("openai/whisper-tiny", language="fr")
    assert recognize(np.zeros(16_000, dtype=np.float32)) == "Oui."
    recognize(np.zeros(31 * 16_000, dtype=np.float32))
    options = {"generate_kwargs": {"language": "fr", "task": "transcribe"}}
    assert calls == [(16_000, options), (31 * 16_000, {**options, "return_timestamps": True})]


def small_wav2vec2(head: type, tmp_path: Path) -> Path:
    tmp_path.mkdir(exist_ok=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (10, 8), "num_conv_pos_embeddings": 8}
    sizes |= {
        "num_conv_pos_embedding_groups": 2,
        "num_feat_extract_layers": 2,
        "vocab_size": 6,
        "xvector_output_dim": 12,
    }
    sizes |= {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1)}
    torch.manual_seed(0)
    head(Wav2Vec2Config(**sizes)).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4, "c": 5}))
    Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path)
    return tmp_path


def test_any_recognition_pipeline_serves(tmp_path, device):
    recognize = load_recognizer(str(small_wav2vec2(Wav2Vec2ForCTC, tmp_path)), device=device)
    waveform = read_audio(AUDIO / "librivox_austen_0880.flac", 16_000).waveform
    model, extractor = Wav2Vec2ForCTC.from_pretrained(tmp_path), Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    logits = model(**extractor(waveform, sampling_rate=16_000, return_tensors="pt")).logits
    expected = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path).decode(logits[0].argmax(dim=-1))
    assert expected and recognize(waveform) == expected.strip()
    with pytest.raises(DataError, match="cannot load the speech recognizer"):
        load_recognizer(str(tmp_path / "nothing"))


def test_any_x_vector_model_serves(tmp_path, device):
    encode = load_speaker_encoder(str(small_wav2vec2(Wav2Vec2ForXVector, tmp_path)), device)
    first, second = (
        encode(read_audio(AUDIO / f"librivox_austen_08{number}.flac", 16_000).waveform) for number in (80, 90)
    )
    assert first.shape == (12,) and not np.allclose(first, second)
    with pytest.raises(DataError, match="cannot load the speaker encoder"):
        load_speaker_encoder(str(tmp_path / "nothing"))


def test_resemblyzer_tells_speakers_apart():
    pytest.importorskip("resemblyzer")
    encode = load_speaker_encoder("resemblyzer")
    names = ("librivox_austen_0880", "librivox_austen_0890", "asterisk_it_agent-incorrect")
    reader, same, other = (encode(read_audio(AUDIO / f"{name}.flac", 16_000).waveform) for name in names)
    assert reader @ same > 0.8 > reader @ other


# Methods


def second_of_speech() -> np.ndarray:
    return read_audio(AUDIO / "librivox_austen_0880.flac", 16_000).waveform[16_000:32_000]


def test_reconstruction_is_that_of_the_codec(codec, device):
    model, extractor = codec
    waveform = second_of_speech()
    speech = CodecReconstruction(model, extractor, target_frame_rate=6.25, num_quantizers=3)(
        Clip("clip", waveform=waveform)
    )
    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt", device=device)
    encoded = model.encode(**inputs, target_frame_rate=6.25, num_quantizers=3)
    expected = model.decode(**encoded).audio_values[0, 0].detach().cpu().numpy()
    np.testing.assert_allclose(speech.waveform, expected[: len(waveform)], atol=1e-5)
    assert speech.num_tokens == encoded.audio_codes.shape[2]
    assert speech.bits == speech.num_tokens * (15 + 2 * 6 + 3)
    assert speech.aligned and speech.processing_seconds > 0


def test_tokens_of_a_fixed_rate_are_equally_long(codec, device):
    model, extractor = codec
    waveform = second_of_speech()
    fixed = CodecReconstruction(model, extractor, fixed_frame_rate=12.5 / 3, num_quantizers=1)
    speech = fixed(Clip("clip", waveform=waveform))
    assert fixed.label == "fixed rate 4.16667, 1 codebook"
    assert fixed.settings == {"fixed_frame_rate": 12.5 / 3, "num_quantizers": 1}

    # The same as a codec that merges all frames, up to the same number.
    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt", device=device)
    num_frames = int(model.encode(**inputs).token_lengths.sum())
    model.config.max_frames_per_token = 3
    encoded = model.encode(**inputs, merging_threshold=-1.0, num_quantizers=1)
    assert set(encoded.token_lengths[0, :-1].tolist()) == {3}
    assert speech.num_tokens == -(-num_frames // 3)
    assert speech.bits == 15 * speech.num_tokens  # none for the length
    expected = model.decode(**encoded).audio_values[0, 0].detach().cpu().numpy()
    np.testing.assert_allclose(speech.waveform, expected[: len(waveform)], atol=1e-5)


@pytest.mark.parametrize("rate", [12.5, 10.7, 8.3, 6.25, 4.5, 1.5625])
def test_tokens_of_a_fixed_rate_cover_all_frames(rate):
    for num_frames in range(1, 120):
        (lengths,) = even_token_lengths(num_frames, 12.5 / rate).tolist()
        assert sum(lengths) == num_frames and len(lengths) == math.ceil(num_frames * rate / 12.5)
        assert set(lengths[:-1]) <= {math.floor(12.5 / rate), math.ceil(12.5 / rate)} and lengths[-1] >= 1


def test_tokens_are_semantic_codes_with_their_lengths(codec, device):
    model, extractor = codec
    method = CodecReconstruction(model, extractor, target_frame_rate=6.25)
    inputs = extractor(second_of_speech(), sampling_rate=16_000, return_tensors="pt", device=device)
    encoded = model.encode(**inputs, target_frame_rate=6.25)
    expected = torch.stack([encoded.audio_codes[0, 0], encoded.token_lengths[0]], dim=1).tolist()
    assert [list(token) for token in method.tokenize(second_of_speech())] == expected


def test_one_frame_a_token_is_no_merging(codec):
    model, extractor = codec
    waveform = second_of_speech()
    fixed, whole = (
        CodecReconstruction(model, extractor, **rate)(Clip("clip", waveform=waveform))
        for rate in ({"fixed_frame_rate": 12.5}, {"merging_threshold": 1.0})
    )
    np.testing.assert_array_equal(fixed.waveform, whole.waveform)


def test_errors_of_methods(codec):
    with pytest.raises(ValueError, match="got merging_threshold, fixed_frame_rate"):
        CodecReconstruction(*codec, merging_threshold=0.9, fixed_frame_rate=6.25)
    with pytest.raises(ValueError, match=r"`fixed_frame_rate` must be between 1.5625 and 12.5 .*, got 1.5"):
        CodecReconstruction(*codec, fixed_frame_rate=1.5)
    with pytest.raises(ValueError, match="`num_quantizers` must be at least 1, got 0"):
        CodecReconstruction(*codec, num_quantizers=0)


# The run


def test_totals_are_those_of_the_corpus():
    rows = [
        {
            "clip": "a",
            "method": "s",
            "text": "",
            "seconds": 1.0,
            "processing_seconds": 0.5,
            "num_tokens": 10,
            "bits": 100,
        }
        | {"word_errors": 1, "words": 2, "character_errors": 1, "characters": 8, "stoi": 0.8},
        {
            "clip": "b",
            "method": "s",
            "text": "",
            "seconds": 3.0,
            "processing_seconds": 0.7,
            "num_tokens": 18,
            "bits": 180,
        }
        | {"word_errors": 1, "words": 18, "character_errors": 3, "characters": 72, "stoi": 0.9},
        {
            "clip": "c",
            "method": "s",
            "text": None,
            "seconds": 1.0,
            "processing_seconds": 0.3,
            "num_tokens": 12,
            "bits": 120,
        }
        | {"stoi": None},
    ]
    report = Report(rows, {"s": {}, "unused": {}})
    assert list(report.totals()) == ["s"]
    total = report.totals()["s"]
    assert (total["clips"], total["seconds"], total["words"], total["word_errors"]) == (3, 5.0, 20, 2)
    assert total["wer"] == 0.1 and total["cer"] == 0.05  # not the means 0.278 and 0.083
    assert total["stoi"] == pytest.approx(0.85) and total["stoi_count"] == 2
    assert total["stoi_std"] == pytest.approx(0.05)
    assert total["tokens_per_second"] == 8.0 and total["bits_per_second"] == 80.0
    assert total["tokens_per_second_std"] == pytest.approx(np.std([10, 6, 12]))
    assert total["real_time_factor"] == pytest.approx(0.3)
    header, _, line = report.table().splitlines()
    columns = dict(zip(header.split("|"), line.split("|"), strict=True))
    assert {key.strip(): value.strip() for key, value in columns.items() if key.strip()} == {
        "method": "s",
        "clips": "3",
        "WER %": "10.0",
        "CER %": "5.0",
        "STOI": "0.850",
        "tokens/s": "8.00",
        "spread": "2.49",
        "bits/s": "80",
        "RTF": "0.300",
    }
    assert len(report.table(per_clip=True).splitlines()) == 5


class Louder:
    """Makes recordings louder, and remembers the names of the clips."""

    label = "louder"
    settings = {"by": 2}

    def __init__(self):
        self.clips: list[str] = []

    def __call__(self, clip):
        self.clips.append(clip.name)
        if clip.waveform is None:
            return None
        return Speech(clip.waveform * 2, aligned=True, processing_seconds=1.0)


def test_an_interrupted_run_continues(folder, tmp_path):
    evaluator, clips = Evaluator(["mcd"]), load_rows(folder)
    expected = evaluate(clips, [Original(), Louder()], evaluator)
    output = tmp_path / "results"
    evaluate(clips[:2], [Original(), Louder()], evaluator, output)
    part = output / "parts" / "000.jsonl"
    part.write_text(part.read_text()[:-10])  # ended while it wrote the last row

    louder = Louder()
    report = evaluate(clips, [Original(), louder], evaluator, output)
    assert louder.clips == list(CLIPS)[1:]
    assert report.rows == expected.rows and report.totals() == expected.totals()
    assert evaluate(clips, [Original(), louder], evaluator, output).rows == expected.rows
    assert louder.clips == list(CLIPS)[1:]

    changed = [*clips[:3], clips[3] | {"text": "another text"}]
    evaluate(changed, [louder], evaluator, output)
    assert louder.clips == [*list(CLIPS)[1:], "stereo_48k.wav"]


def test_a_row_cut_inside_a_character_is_measured_again(folder, tmp_path):
    clips = [row | {"text": "été"} for row in load_rows(folder)[:2]]
    expected = evaluate(clips, [Original()], Evaluator([]), tmp_path / "results")
    part = tmp_path / "results" / "parts" / "000.jsonl"
    part.write_bytes(part.read_bytes()[: part.read_bytes().rfind("é".encode()) + 1])
    assert evaluate(clips, [Original()], Evaluator([]), tmp_path / "results").rows == expected.rows
    assert [json.loads(line) for line in part.read_text().splitlines()] == expected.rows


@pytest.mark.parametrize("damage", [b"\0" * 40 + b"\n", b"{}\n", b"[1]\n", b'{"clip": []}\n'])
def test_rows_that_are_damaged_are_measured_again(folder, tmp_path, damage):
    clips, louder = load_rows(folder), Louder()
    expected = evaluate(clips, [louder], Evaluator([]), tmp_path / "results")
    part = tmp_path / "results" / "parts" / "000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([lines[0], damage, *lines[2:]]))
    assert evaluate(clips, [louder], Evaluator([]), tmp_path / "results").rows == expected.rows
    assert louder.clips == [*CLIPS, list(CLIPS)[1]]
    assert sorted(part.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_a_killed_run_leaves_whole_rows_and_a_second_run_at_once_is_refused(folder, tmp_path):
    clips, output, (read, write) = load_rows(folder), tmp_path / "results", os.pipe()
    expected = evaluate(clips, [Louder()], Evaluator([])).rows

    class Waiting(Louder):
        def __call__(self, clip):
            if len(self.clips) == 2:
                os.write(write, b"x")
                signal.pause()
            return super().__call__(clip)

    if (child := os.fork()) == 0:
        evaluate(clips, [Waiting()], Evaluator([]), output, {"model": "a"})
    try:
        os.read(read, 1)
        with pytest.raises(DataError, match="results: another run works in this directory"):
            evaluate(clips, [Louder()], Evaluator([]), output, {"model": "a"})
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert json.loads((output / "settings.json").read_text()) == {"measures": [], "model": "a"}
    assert [json.loads(line) for line in (output / "parts" / "000.jsonl").open()] == expected[:2]
    louder = Louder()
    assert evaluate(clips, [louder], Evaluator([]), output, {"model": "a"}).rows == expected
    assert louder.clips == list(CLIPS)[2:]


def test_a_clip_without_what_the_methods_need_is_reported(folder):
    clips: list[dict] = [*load_rows(folder)[:1], {"id": "bare", "text": "hello", "audio": None}, {"id": "\ud800"}]
    report = evaluate(clips, [Original(), Louder()], Evaluator([]))
    assert [row["clip"] for row in report.rows] == [next(iter(CLIPS))] * 2
    assert report.failed[0] == "bare: it has no audio for the methods to work on."
    assert report.failed[1].startswith("\\ud800: 'utf-8' codec can't encode")


def test_data_that_break_off_are_reported(folder):
    def rows():
        yield load_rows(folder)[0]
        raise RuntimeError("the archive is cut")

    report = evaluate(rows(), [Original()], Evaluator([]))
    assert len(report.rows) == 1
    assert report.failed == ["the data cannot be read any further: RuntimeError: the archive is cut"]


def test_clips_of_one_name_are_measured_each(folder, tmp_path):
    clips = [row | {"id": "same.wav", "text": None} for row in load_rows(folder)[:2]]
    louder = Louder()
    report = evaluate(clips, [louder], Evaluator(["mcd"]), tmp_path / "results")
    assert louder.clips == [row["clip"] for row in report.rows] == ["same.wav", "same.wav (000001)"]
    assert report.rows[0]["seconds"] != report.rows[1]["seconds"]


def test_silence_of_text_to_speech_counts_as_errors_and_takes_no_time(asr):
    evaluator = Evaluator(["wer"], load_recognizer(str(asr)), load_normalizer("en"))
    silent = TextToSpeech(lambda text: {"audio": np.zeros((1, 0), dtype=np.float32), "sampling_rate": 24_000})
    report = evaluate([{"text": "he was not"}], [silent], evaluator)
    assert report.totals()["text-to-speech"]["wer"] == 1
    assert "RTF" not in report.table()


def test_results_of_other_settings_are_refused(folder, tmp_path):
    clips = load_rows(folder)[:1]
    evaluate(clips, [Original()], Evaluator(["mcd"]), tmp_path / "results", {"model": "a"})
    with pytest.raises(DataError, match=r"other settings \(model 'a', not 'b'\): use these settings"):
        evaluate(clips, [Original()], Evaluator(["mcd"]), tmp_path / "results", {"model": "b"})
    with pytest.raises(DataError, match=r"measures \['mcd'\], not \['mcd', 'stoi'\]"):
        evaluate(clips, [Original()], Evaluator(["stoi", "mcd"]), tmp_path / "results", {"model": "a"})


def test_a_clip_that_a_method_rejects_counts_for_none(folder, tmp_path):
    class Rejecting(Louder):
        def __call__(self, clip):
            if clip.name == "silence_2s.wav":
                raise ValueError("there is nothing to hear.")
            return super().__call__(clip)

    errors: list[str] = []
    for _ in range(2):  # nor when it continues
        report = evaluate(
            load_speech(folder),
            [Original(), Rejecting()],
            Evaluator(["mcd"]),
            tmp_path / "out",
            on_error=errors.append,
        )
        assert report.failed == ["silence_2s.wav: there is nothing to hear."] == errors[-1:]
        assert [total["clips"] for total in report.totals().values()] == [3, 3]


def test_errors_of_a_run(folder, monkeypatch):
    clips = load_rows(folder)
    with pytest.raises(ValueError, match="a label of its own"):
        evaluate(clips, [Original(), Original()], Evaluator(["mcd"]))
    with pytest.raises(DataError, match="nothing to measure: no clip has what"):
        evaluate([], [Original()], Evaluator(["mcd"]))
    (folder / "silence_2s.wav").unlink()
    with pytest.raises(DataError, match=r"first of 1 failures is: .*silence_2s.wav: there is no such file"):
        evaluate(clips[1:2], [Original()], Evaluator(["mcd"]))
    with pytest.raises(ValueError, match="unknown measure 'snr': choose from wer, pesq"):
        Evaluator(["snr"])
    with pytest.raises(ValueError, match="unknown measure 'ds_wed': choose from wer, pesq"):
        Evaluator(["mcd", "ds_wed"])  # of pairs of readings, not of clips
    with pytest.raises(ValueError, match="speaker needs a `model`: a speaker encoder"):
        Evaluator(["speaker"])
    monkeypatch.setitem(sys.modules, "pystoi", None)
    with pytest.raises(DataError, match=r"the measure stoi needs the package `pystoi`.*flexicodec-hf\[eval\]"):
        Evaluator(["stoi"])


def test_stability_is_measured_of_methods_with_tokens(folder, codec):
    pytest.importorskip("rapidfuzz")
    method = CodecReconstruction(*codec)
    report = evaluate(load_rows(folder)[:2], [Original(), method], Evaluator(["stability"]))
    original, stable = report.totals().values()
    assert "compared_tokens" not in original
    assert stable["compared_tokens"] == sum(row["num_tokens"] for row in report.rows[1::2])
    assert all(0 <= stable[f"changed_by_{way}"] <= 1 for way in ("noise", "gain", "resampling", "shift"))
    assert stable["changed_by_noise"] > 0 and "| noise %" in report.table()


def test_speakers_are_compared(folder):
    evaluator = Evaluator(["speaker"], speaker_encoder=lambda waveform: np.array([np.abs(waveform).max(), 1.0]))
    report = evaluate(load_rows(folder)[:2], [Original(), Louder()], evaluator)
    assert [row["speaker_similarity"] for row in report.rows][::2] == [
        pytest.approx(1.0),
        None,
    ]  # silence has no speaker
    assert report.rows[1]["speaker_similarity"] < 1


def test_texts_are_spoken(folder, asr):
    spoken = []

    def synthesizer(text, **voice):
        spoken.append((text, voice, torch.rand(()).item()))
        return {"audio": np.ones((1, 48_000 if "man" in text else 24_000), dtype=np.float32), "sampling_rate": 24_000}

    (folder / "texts.csv").write_text(
        f"text,reference_audio,reference_text\n{SENTENCE},,\nhe was not,short_0p08s.wav,he\n"
    )
    evaluator = Evaluator(
        ["wer", "speaker"],
        load_recognizer(str(asr)),
        load_normalizer("en"),
        lambda waveform: waveform[:9],
    )
    report = evaluate(load_speech(folder / "texts.csv"), [Original(), TextToSpeech(synthesizer)], evaluator)
    assert [text for text, *_ in spoken] == [SENTENCE, "he was not"]
    assert spoken[0][1] == {} and spoken[1][1]["reference_text"] == "he"
    assert spoken[1][1]["reference_audio"].shape == (1_280,)
    assert spoken[0][2] == spoken[1][2]  # the seed is set for each
    assert [row["seconds"] for row in report.rows] == [2.0, 1.0]
    # The fake recognizer gives five words for 2 s: three are missing in the first, two too many in the second.
    assert [(row["word_errors"], row["words"]) for row in report.rows] == [(3, 8), (2, 3)]
    assert "speaker_similarity" not in report.rows[0] and "speaker_similarity" in report.rows[1]
    assert "num_tokens" not in report.totals()["text-to-speech"]


def test_plot_shows_every_setting(tmp_path):
    pytest.importorskip("matplotlib")
    methods = {
        "original": {},
        "threshold 1, 8 codebooks": {"num_quantizers": 8},
        "threshold 0.9, 8 codebooks": {"num_quantizers": 8},
    }
    methods["fixed rate 6.25, 1 codebook"] = {"num_quantizers": 1, "fixed_frame_rate": 6.25}
    rows = [{"clip": "a", "method": "original", "seconds": 1.0, "word_errors": 1, "words": 10}] + [
        {"clip": "a", "method": label, "seconds": 1.0, "word_errors": 2, "words": 10, "pesq_nb": 3.0, "num_tokens": n}
        for n, label in enumerate(list(methods)[1:], start=5)
    ]
    Report(rows, methods).plot(tmp_path / "plot.svg")
    picture = (tmp_path / "plot.svg").read_text()
    for label in (
        "merged by similarity, 8 codebooks",
        "fixed, 1 codebook",
        "original",
        "narrow band",
        "word error rate",
    ):
        assert label in picture
    with pytest.raises(DataError, match="nothing to draw"):
        Report(rows[:1], methods).plot(tmp_path / "plot.svg")


# The command


@pytest.fixture
def run(codec_dir, device, folder, asr, capsys):
    def run(*args: object, task: str = "codec", model: object = None) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["evaluate", str(model or codec_dir()), *map(str, args), "--task", task, "--device", device])
        output, errors = capsys.readouterr()
        return status, output, "\n".join(line for line in errors.splitlines() if "error:" in line)

    return run


def test_the_command_measures_a_folder(run, folder, asr, tmp_path):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    pytest.importorskip("matplotlib")
    (folder / "broken.wav").write_text("no audio")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "broken.wav", "text": "a"}\n')
    arguments = (
        folder,
        "--asr",
        asr,
        "-o",
        tmp_path / "out",
        "--merging-thresholds",
        1.0,
        0.8,
        "--num-quantizers",
        5,
    )
    status, output, errors = run(*arguments, "--plot", tmp_path / "plot.png", "--per-clip")
    assert status == 1 and "broken.wav: not an audio file" in errors and "1 failed" in output
    assert (tmp_path / "plot.png").stat().st_size > 10_000

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    labels = ["original", "threshold 1, 5 codebooks", "threshold 0.8, 5 codebooks"]
    assert list(results["totals"]) == labels
    assert [row["clip"] for row in results["clips"]] == [name for name in CLIPS for _ in labels]
    original, merged = results["totals"]["original"], results["totals"]["threshold 0.8, 5 codebooks"]
    assert original["wer"] == 0 and original["words"] == 16 and original["clips"] == 4
    assert merged["bits_per_second"] == pytest.approx(merged["tokens_per_second"] * 42)
    assert merged["tokens_per_second"] < results["totals"]["threshold 1, 5 codebooks"]["tokens_per_second"]
    assert {"pesq_nb", "pesq_wb", "stoi", "mcd", "real_time_factor"} <= merged.keys()
    assert merged["mcd_count"] == 4 and merged["pesq_wb_count"] == 2  # neither silence nor 80 ms
    for label in labels:
        assert f"| {label} " in output
    assert output.count("| short_0p08s.wav ") == len(labels)

    status, again, errors = run(*arguments, "--limit", 4)
    assert (status, errors) == (0, "") and again.strip() in output


GOOD_ROW = b'{"file_name": "short_0p08s.wav", "text": "he"}'
BAD_ROWS = {
    b"{": "line 2: Expecting property name",
    b"[" * 100_000: "line 2: ",
    b"5": "line 2: expected an object with columns, got '5'",
    b"null": "line 2: expected an object with columns, got 'None'",
    b'{"text": "no audio"}': "it has no audio for the methods to work on",
    b'{"file_name": null, "text": "x"}': "it has no audio for the methods to work on",
    b'{"file_name": ["a.wav"], "text": "x"}': "line 2: 'file_name' is \"['a.wav']\", of another type",
    b'{"file_name": "silence_2s.wav", "text": 5}': "line 2: 'text' is '5', of another type than in most rows",
    b'{"file_name": "silence_2s.wav", "text": NaN}': "line 2: 'text' is 'nan', of another type",
    b'{"file_name": "\\ud800.wav", "text": "x"}': "line 2: it has characters that are not UTF-8",
    b'{"file_name": "\xff.wav", "text": "x"}': "line 2: it has characters that are not UTF-8",
    b'{"file_name": "gone.wav", "text": "x"}': "gone.wav: there is no such file",
    b'{"file_name": "a\\u0000b.wav", "text": "x"}': "",
    json.dumps({"file_name": "a" * 5000, "text": "x"}).encode(): "",
    b'{"file_name": ".", "text": "x"}': "",
}


@pytest.mark.parametrize("row", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_the_command_reports_a_bad_row_and_goes_on(run, folder, tmp_path, row):
    table = folder / "table.jsonl"
    table.write_bytes(b"\n".join([GOOD_ROW, row, GOOD_ROW.replace(b"short_0p08s", b"stereo_48k"), b""]))
    status, output, errors = run(table, "--measures", "mcd", "-o", tmp_path / "out")
    assert status == 1 and "1 failed" in output
    (error,) = errors.splitlines()
    assert BAD_ROWS[row] in error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [clip["clip"] for clip in results["clips"]] == ["short_0p08s.wav", "stereo_48k.wav"]
    assert len(results["failed"]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("silence_2s.wav," + "a" * 200_000, "line 2: field larger than field limit"),
        ("silence_2s.wav,a,b", "line 2: 3 fields, but 2 columns"),
        ('silence_2s.wav,"a"b', "line 2: ',' expected after '\"'"),
        (",a", "it has no audio for the methods to work on"),
    ],
)
def test_the_command_reports_a_bad_line_of_csv_and_goes_on(run, folder, tmp_path, line, message):
    (folder / "table.csv").write_text(f"file_name,text\n{line}\nstereo_48k.wav,he\n")
    status, _, errors = run(folder / "table.csv", "--measures", "mcd", "-o", tmp_path / "out")
    assert status == 1 and message in errors and len(errors.splitlines()) == 1
    (clip,) = json.loads((tmp_path / "out" / "results.json").read_text())["clips"]
    assert clip["clip"] == "stereo_48k.wav"


def test_the_command_reports_names_and_texts_that_are_not_utf8(run, folder, tmp_path):
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    (folder / "metadata.csv").unlink(missing_ok=True)
    shutil.copy(folder / "stereo_48k.wav", os.fsencode(folder) + b"/\xff.wav")
    (folder / "stereo_48k.txt").write_bytes(b"\xff")
    status, _, errors = run(folder, "--measures", "mcd", "-o", tmp_path / "out")
    assert status == 1
    assert "\\udcff.wav': the name of the file is not UTF-8: rename it" in errors
    assert "stereo_48k.txt: a text in UTF-8 was expected" in errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["failed"]) == 2 and [clip["clip"] for clip in results["clips"]] == sorted(CLIPS)


def test_the_command_streams_part_of_a_dataset(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"audio": {"bytes": (AUDIO / "short_0p08s.wav").read_bytes(), "path": None}}] * 3
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "repo" / "test.parquet")
    status, output, _ = run(tmp_path / "repo", "--streaming", "--limit", 2, "--measures", "mcd", "--per-clip")
    assert status == 0 and "| 000001 | threshold 0.91, 5 codebooks |" in output and "000002" not in output


def test_the_command_measures_opinions_and_stability(run, folder, monkeypatch):
    network = SimpleNamespace(ConvTransformerSQAModel=lambda: torch.nn.AdaptiveAvgPool1d(1))
    monkeypatch.setitem(sys.modules, "distillmos", network)
    (folder / "table.csv").write_text("file_name\nshort_0p08s.wav\n")
    status, output, errors = run(folder / "table.csv", "--measures", "mos", "stability")
    assert (status, errors) == (0, "")
    header, _, original, codec = output.strip().splitlines()
    assert [word.strip() for word in header.split("|")[3:4]] == ["MOS"] and header.rstrip(" |").endswith("shift %")
    assert original.split("|")[-2].strip() == "" and codec.split("|")[-2].strip() != ""


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="a bug of transformers 5.17: pipelines of VITS fail"
)
def test_the_command_speaks(run, asr, tmp_path, device):
    """With a small model of another kind: any text-to-speech pipeline serves."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "flow_size": 16}
    sizes |= {
        "spectrogram_bins": 9,
        "upsample_initial_channel": 16,
        "upsample_rates": [8, 4],
        "upsample_kernel_sizes": [16, 8],
    }
    sizes |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]], "prior_encoder_num_flows": 1}
    sizes |= {"posterior_encoder_num_wavenet_layers": 1, "prior_encoder_num_wavenet_layers": 1, "vocab_size": 40}
    torch.manual_seed(0)
    VitsModel(VitsConfig(**sizes)).save_pretrained(tmp_path / "tts")
    letters = ["_", *" abcdefghijklmnopqrstuvwxyz'", "<unk>"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    VitsTokenizer(str(tmp_path / "vocab.json"), pad_token="_", phonemize=False).save_pretrained(tmp_path / "tts")
    (tmp_path / "texts.jsonl").write_text('{"text": "he was not"}\n')
    status, output, _ = run(tmp_path / "texts.jsonl", "--asr", asr, task="tts", model=tmp_path / "tts")
    assert status == 0
    # The fake recognizer gives five words.
    header, _, line = output.strip().splitlines()
    assert [word.strip() for word in line.split("|")[1:4]] == ["text-to-speech", "1", "66.7"]
    assert "RTF" in header and "PESQ" not in header


def test_the_command_speaks_with_voices(run, asr, tts_repository, tmp_path):
    shutil.copy(AUDIO / "librivox_austen_0880.flac", tmp_path / "voice.flac")
    lines = [
        {"text": "he was not"},
        {"text": "he was not", "reference_audio": "voice.flac", "reference_text": SENTENCE},
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speaker = small_wav2vec2(Wav2Vec2ForXVector, tmp_path / "speaker")
    options = ("--asr", asr, "--speaker-model", speaker, "--merging-thresholds", 0.91, 0.86, "-o", tmp_path / "out")
    status, _, errors = run(tmp_path / "texts.jsonl", *options, task="tts", model=tts_repository)
    assert (status, errors) == (0, ""), errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    labels = ["text-to-speech, threshold 0.91", "text-to-speech, threshold 0.86"]
    assert list(results["totals"]) == labels
    assert all(total["speaker_similarity_count"] == 1 and total["clips"] == 2 for total in results["totals"].values())


@pytest.mark.parametrize(
    ("options", "task", "message"),
    [
        (("--measures", "wer"), "codec", "the measure wer needs --asr"),
        (("--measures", "speaker"), "codec", "the measure speaker needs --speaker-model"),
        ((), "tts", "nothing to measure: pass --asr"),
    ],
)
def test_wrong_arguments(run, folder, capsys, options, task, message):
    with pytest.raises(SystemExit):
        run(folder, *options, task=task)
    assert message in capsys.readouterr().err


def test_models_that_are_none(run, folder, asr, tmp_path):
    status, _, errors = run(folder, "--measures", "mcd", model=tmp_path / "nothing")
    assert status == 1 and "cannot load the model" in errors
    status, _, errors = run(folder, "--asr", asr, task="tts", model=tmp_path / "nothing")
    assert status == 1 and "cannot load the model" in errors


def test_the_page_runs(codec_dir, folder, asr, tmp_path, monkeypatch):
    for package in ("pesq", "pystoi", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(codec_dir(), "flexicodec")
    asr.rename("whisper-base")
    folder.rename("recordings")
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text().replace("\\\n", "")
    commands = re.findall(r"^flexicodec-hf (evaluate .*)$", page, flags=re.MULTILINE)
    for command in commands:
        assert main([*command.split(), "--limit", "1"]) == 0
    assert len(commands) == 2 and Path("results.png").is_file() and Path("results/results.json").is_file()
    snippets = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    # The small codec has five codebooks.
    shutil.copy(AUDIO / "librivox_austen_0880.flac", "speech.flac")
    Path("page.py").write_text("\n".join(snippets).replace("8 codebooks", "5 codebooks"))
    runpy.run_path("page.py")


@pytest.mark.slow  # three more interpreters
def test_two_processes_give_the_totals_of_one(codec_dir, folder, asr, tmp_path):
    def arguments(output: Path) -> list[str]:
        options = ("--asr", asr, "--measures", "wer", "mcd", "--device", "cpu", "-o", output)
        return ["evaluate", *map(str, (codec_dir(), folder, *options))]

    assert main(arguments(tmp_path / "one")) == 0
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    # `--multi_gpu` is how accelerate is told of several processes; with `--device cpu` they meet by gloo.
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launcher += [
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--main_process_port={port}",
        "-m",
        "flexicodec_hf.cli",
    ]
    subprocess.run(
        [sys.executable, "-m", *launcher, *arguments(tmp_path / "two")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert [len(part.read_text().splitlines()) for part in (tmp_path / "two" / "parts").iterdir()] == [4, 4]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for results in (one, two):
        results["totals"]["threshold 0.91, 5 codebooks"].pop("real_time_factor")
    for label, total in one["totals"].items():
        assert two["totals"][label] == pytest.approx(total, rel=1e-5)  # other kernels where there are other threads
    assert [row["clip"] for row in one["clips"]] == [row["clip"] for row in two["clips"]]
