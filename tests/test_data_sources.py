"""Speech from any source, with the same columns."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict, IterableDataset, Value

from conftest import AUDIO
from flexicodec_hf.audio_flexicodec import AudioError, read_audio
from flexicodec_hf.data.files import DataError
from flexicodec_hf.data.sources import audio_duration, decode_audio, load_speech, standard_columns


CLIP = AUDIO / "librivox_austen_0880.flac"
TEXT = "he was not an ill disposed young man"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where `datasets` puts its copies: local folders of one name would share one."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def embedded(audio_column="audio", text_column="text") -> Dataset:
    """A dataset as the Hub has them, with the files inside."""
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path in (CLIP, AUDIO / "silence_2s.wav")]
    dataset = Dataset.from_dict({audio_column: audio, text_column: [TEXT, None], "speaker": [7, 8]})
    return dataset.cast_column(audio_column, Audio())


def tars(folder: Path, count: int = 2) -> Path:
    """WebDatasets, whose files change their places."""
    folder.mkdir()
    for i in range(count):
        with tarfile.open(folder / f"{i}.tar", "w") as tar:
            entries = [(".flac", CLIP.read_bytes()), (".json", json.dumps({"text": f"text {i}", "mos": 4.5}).encode())]
            for suffix, content in entries if i else reversed(entries):
                entry = tarfile.TarInfo(f"clip{i}{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return folder


# Folders, tables and files


def test_a_folder_with_metadata():
    dataset = load_speech(AUDIO)
    assert len(dataset) == len((AUDIO / "metadata.jsonl").read_text().splitlines())
    [row] = [row for row in dataset if row["id"] == CLIP.name]
    assert (row["text"], row["speaker"]) == (TEXT, "librivox-austen")
    assert row["audio"] == {"path": str(CLIP), "bytes": None}
    expected, rate = soundfile.read(CLIP, dtype="float32")
    np.testing.assert_array_equal(decode_audio(row["audio"], rate), expected)
    assert audio_duration(row["audio"]) == len(expected) / rate


def test_a_folder_of_files_with_texts_beside_them(tmp_path):
    (tmp_path / "b").mkdir()
    shutil.copy(AUDIO / "short_0p08s.wav", tmp_path / "b" / "2.WAV")
    shutil.copy(AUDIO / "silence_2s.wav", tmp_path / "1.wav")
    (tmp_path / ".hidden.wav").write_text("")
    assert [(row["id"], row.get("text")) for row in load_speech(tmp_path)] == [("1.wav", None), ("b/2.WAV", None)]
    (tmp_path / "b" / "2.txt").write_text("two\n")
    assert [(row["id"], row["text"]) for row in load_speech(tmp_path)] == [("1.wav", None), ("b/2.WAV", "two")]
    [row] = load_speech(tmp_path / "b" / "2.WAV")
    assert row == {"id": "2.WAV", "text": "two", "audio": {"path": str(tmp_path / "b" / "2.WAV"), "bytes": None}}
    [row] = load_speech(tmp_path / "1.wav")
    assert "text" not in row and row["id"] == "1.wav"
    (tmp_path / "metadata.csv").write_text("file_name,transcription\n1.wav,one\nb/2.WAV,\n")
    assert load_speech(tmp_path)["text"][:] == ["one", "two"]


def test_metadata_of_subfolders_are_joined(tmp_path):
    for name in ("a/0.wav", "a/1.wav", "b/2.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(AUDIO / "short_0p08s.wav", tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\na/0.wav,zero\n")
    (tmp_path / "b" / "metadata.jsonl").write_text('{"path": "./2.wav", "age": 30}\n')
    dataset = load_speech(tmp_path)
    assert [(row["id"], row["text"], row["age"]) for row in dataset] == [
        ("a/0.wav", "zero", None),
        ("b/2.wav", None, 30),
        ("a/1.wav", None, None),
    ]
    assert all(Path(row["audio"]["path"]).is_file() for row in dataset)
    (tmp_path / "a" / "metadata.jsonl").write_text('{"file_name": "1.wav", "age": "old"}\n')
    with pytest.raises(DataError, match="the rows of its tables do not fit together"):
        load_speech(tmp_path)


def test_a_table_of_other_columns(tmp_path):
    with (tmp_path / "all.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["clip", "sentence", "text", "reference_audio", "reference_text"])
        writer.writeheader()
        writer.writerow(
            {
                "clip": "silence_2s.wav",
                "sentence": "a, b",
                "text": "c",
                "reference_audio": str(CLIP),
                "reference_text": "d",
            }
        )
        writer.writerow({"clip": "silence_2s.wav", "sentence": "e"})
    shutil.copy(AUDIO / "silence_2s.wav", tmp_path)
    first, second = load_speech(tmp_path / "all.csv", audio_column="clip", text_column="sentence")
    assert (first["id"], first["text"], first["source_text"]) == ("silence_2s.wav", "a, b", "c")
    assert first["reference_text"] == "d" and len(decode_audio(first["reference_audio"], 16_000)) == 47_840
    assert len(decode_audio(first["audio"], 8_000)) == 16_000
    assert second["reference_audio"] is None and second["text"] == "e"


def test_voices_to_speak_with_are_no_clips_of_their_own(tmp_path):
    shutil.copy(CLIP, tmp_path / "voice.flac")
    (tmp_path / "metadata.jsonl").write_text('{"text": "hello", "reference_audio": "voice.flac"}\n')
    [row] = load_speech(tmp_path)
    assert row["text"] == "hello" and row["audio"] is None
    assert row["reference_audio"] == {"path": str(tmp_path / "voice.flac"), "bytes": None}


def test_a_tab_separated_table_has_quotes_that_quote_nothing(tmp_path):
    (tmp_path / "list.tsv").write_text('path\tsentence\tid\na.wav\tsaid "so\t007\n')
    [row] = load_speech(tmp_path / "list.tsv")
    assert row == {
        "audio": {"path": str(tmp_path / "a.wav"), "bytes": None},
        "text": 'said "so',
        "id": "007",
    }
    with pytest.raises(AudioError, match="no such file"):
        decode_audio(row["audio"], 16_000)


def test_texts_alone(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert list(load_speech(tmp_path / "texts.jsonl")) == [
        {"text": "one", "audio": None, "id": None},
        {"text": "two", "audio": None, "id": None},
    ]
    with pytest.raises(AudioError, match="the row has no audio"):
        decode_audio(None, 16_000)


# Splits


def test_splits_of_a_folder(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\n{CLIP},{split}\n")
    assert load_speech(tmp_path, split="validation")["text"][:] == ["validation"]
    assert load_speech(tmp_path, default_split="train")["text"][:] == ["train"]
    assert load_speech(tmp_path)["text"][:] == ["train", "validation"]
    with pytest.raises(DataError, match="has the splits train: pass one of them as `split`, not 'test'"):
        load_speech(tmp_path, split="test")


def test_parts_of_a_split():
    everything = load_speech(AUDIO)["id"][:]
    assert load_speech(AUDIO, split="train[1:3]")["id"][:] == everything[1:3]
    assert load_speech(AUDIO, split="train[:1]+train[-1:]")["id"][:] == [everything[0], everything[-1]]
    for split in ("test[:3]", "train[", "train[x:]"):
        with pytest.raises(DataError, match=r"or a part of one such as 'train\[:1000\]', not "):
            load_speech(AUDIO, split=split)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_split_of_a_dataset(tmp_path, streaming):
    for split in ("train", "test"):
        embedded().select([split == "test"]).to_parquet(tmp_path / "both" / f"{split}.parquet")
    embedded().to_parquet(tmp_path / "one" / "test.parquet")

    def texts(folder, **options):
        return [row["text"] for row in load_speech(tmp_path / folder, streaming=streaming, **options)]

    assert texts("both", split="test") == texts("both", default_split="test") == [None]
    assert texts("one") == texts("one", default_split="train") == [TEXT, None]
    for options in ({}, {"default_split": "validation"}):
        with pytest.raises(DataError, match=r"has the splits test, train: |has the splits train, test: "):
            texts("both", **options)
    if streaming:
        with pytest.raises(DataError, match="a part of a split cannot be streamed"):
            texts("one", split="test[:1]")
    else:
        assert texts("one", split="test[:1]") == [TEXT]


# Datasets


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_with_the_files_inside(tmp_path, streaming):
    embedded("speech", "sentence").to_parquet(tmp_path / "repo" / "train-00000-of-00001.parquet")
    for source in (tmp_path / "repo", tmp_path / "repo" / "*.parquet"):
        dataset = load_speech(source, streaming=streaming)
        assert isinstance(dataset, IterableDataset if streaming else Dataset)
        first, second = dataset
        assert (first["text"], first["speaker"], first["id"]) == (TEXT, 7, CLIP.name)
        assert first["audio"] == {"bytes": CLIP.read_bytes(), "path": CLIP.name}
        np.testing.assert_array_equal(decode_audio(first["audio"], 16_000), read_audio(CLIP, 16_000).waveform)
        assert second["text"] is None and audio_duration(second["audio"]) == 2


def test_files_on_disk_can_be_streamed_alone(tmp_path):
    embedded().to_parquet(tmp_path / "clips.parquet")
    assert isinstance(load_speech(tmp_path / "clips.parquet", streaming=None), IterableDataset)
    assert isinstance(load_speech(AUDIO, streaming=None), Dataset)
    assert isinstance(load_speech(AUDIO, streaming=True), IterableDataset)


def test_webdatasets(tmp_path):
    folder = tars(tmp_path / "tars")
    for source in (folder, folder / "*.tar"):
        dataset = load_speech(source, streaming=True)
        assert dataset.num_shards == 2
        assert [(row["id"], row["text"], row["json"]["mos"]) for row in dataset] == [
            ("clip0", "text 0", 4.5),
            ("clip1", "text 1", 4.5),
        ]
        [row] = dataset.shard(2, 1)
        assert len(decode_audio(row["audio"], 16_000)) == 47_840
        assert load_speech(source, streaming=True, text_column="json.text").features["text"] == Value("string")
    with pytest.raises(DataError, match="torchcodec"):
        load_speech(folder, streaming=False)


def test_saved_datasets(tmp_path):
    embedded().save_to_disk(tmp_path / "inside")
    assert [row["id"] for row in load_speech(tmp_path / "inside")] == [CLIP.name, "silence_2s.wav"]
    paths = Dataset.from_list([{"path": str(AUDIO / name), "text": "x"} for name in (CLIP.name, "silence_2s.wav")])
    DatasetDict({"test": paths, "train": paths.select([0])}).save_to_disk(tmp_path / "paths")
    dataset = load_speech(tmp_path / "paths", default_split="test")
    assert dataset["id"][:] == [CLIP.name, "silence_2s.wav"]
    assert len(decode_audio(dataset[1]["audio"], 16_000)) == 32_000


def test_the_columns_of_any_dataset_get_the_usual_names():
    stream = IterableDataset.from_generator(lambda: iter([{"wav": str(CLIP), "txt": "a", "__key__": 3}]))
    [row] = standard_columns(stream)
    assert row == {"audio": {"path": str(CLIP), "bytes": None}, "text": "a", "id": "3"}
    features = embedded("speech", "words").add_column("other", embedded("speech").data["speech"], feature=Audio())
    with pytest.raises(DataError, match=r"which column holds the audio\? Pass one of \['speech', 'other'\]"):
        standard_columns(features)
    assert standard_columns(features, "other", "words").column_names == ["speech", "text", "speaker", "audio", "id"]


# Errors


def test_sources_that_cannot_be_loaded(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, content in (
        ("empty.jsonl", ""),
        ("bad.jsonl", "{'a': 1}\n"),
        ("number.json", "3"),
        ("other.csv", "speaker,words\na,b\n"),
        ("one.csv", "file_name,text\na.wav,b\n"),
        ("nested.jsonl", '{"audio": {"array": [1, 2]}}\n'),
        ("empty.tar", ""),
        ("cut.tar", "\0" * 300),
        ("text.parquet", "PAR1 and more"),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "unnamed").mkdir()
    (tmp_path / "unnamed" / "a.wav").touch()
    (tmp_path / "unnamed" / "metadata.csv").write_text("name\na.wav\n")
    for name, options, message in (
        ("unnamed", {}, r"metadata.csv: there is no column of audio or text among \['name'\]"),
        ("empty", {}, "there are no audio files in this folder, no metadata, and no .parquet or .tar files"),
        ("empty.jsonl", {}, "there are no rows in it"),
        ("bad.jsonl", {}, "not a table of rows"),
        ("number.json", {}, "not a table of rows"),
        ("other.csv", {}, r"no column of audio or text among \['speaker', 'words'\]: pass `audio_column` or"),
        ("one.csv", {"text_column": "words"}, "there is no column 'words' among"),
        ("one.csv", {"audio_column": "wav"}, r"there is no column 'wav' among \['file_name', 'text'\]"),
        ("nested.jsonl", {}, "the column 'audio' does not hold paths"),
        ("gone.csv", {}, "there is no such file"),
        ("gone.wav", {}, "there is no such file"),
        ("nothing/here", {}, "cannot be loaded"),
        ("empty.tar", {"streaming": None}, "cannot be loaded: empty file"),
        ("cut.tar", {"streaming": None}, "cannot be loaded: truncated header"),
        ("text.parquet", {"streaming": None}, "cannot be loaded"),
    ):
        with pytest.raises(DataError, match=message):
            load_speech(tmp_path / name, **options)


def test_decodes_to_one_channel_at_the_rate_asked():
    waveform = decode_audio({"path": str(AUDIO / "stereo_44k.flac"), "bytes": None}, 16_000)
    info = soundfile.info(AUDIO / "stereo_44k.flac")
    assert waveform.ndim == 1 and abs(len(waveform) - info.duration * 16_000) < 2
    url = {"path": f"file://{CLIP}", "bytes": None}
    np.testing.assert_array_equal(decode_audio(url, 16_000), read_audio(CLIP, 16_000).waveform)
    assert audio_duration(url) == 2.99


@pytest.mark.parametrize(
    "samples, message",
    [
        (None, r"broken\.wav: not an audio file"),
        ([], "the audio is empty"),
        ([0.0, np.nan], "NaN or infinite samples"),
    ],
)
def test_broken_audio_is_refused(samples, message):
    file = io.BytesIO(b"nothing")
    if samples is not None:
        soundfile.write(file, np.array(samples), 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(AudioError, match=message):
        decode_audio({"path": "broken.wav", "bytes": file.getvalue()}, 16_000)
    with pytest.raises(AudioError, match=r"gone\.wav: there is no such file"):
        decode_audio({"path": "file:///gone.wav", "bytes": None}, 16_000)
