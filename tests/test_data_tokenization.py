import hashlib
import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, load_dataset
from transformers import AutoFeatureExtractor, AutoModel

import flexicodec_hf
from conftest import AUDIO, assert_close
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.cli import main
from flexicodec_hf.data import tokenization
from flexicodec_hf.data.files import DataError
from flexicodec_hf.data.sources import load_speech, read_rows, standard_columns
from flexicodec_hf.data.tokenization import as_streams, prefetch, read_blocks, tokenize_corpus


RATES = {"merging_thresholds": [1.0, 0.91], "target_frame_rates": [6.25]}


@pytest.fixture
def codec(codec_dir, device):
    return AutoModel.from_pretrained(codec_dir()).to(device).eval()


@pytest.fixture(scope="session")
def feature_extractor(codec_dir):
    return AutoFeatureExtractor.from_pretrained(codec_dir())


@pytest.fixture
def tokenize(codec, feature_extractor):
    """`tokenize(dataset, directory, ...)` with the small codec."""

    def tokenize(dataset, directory, **options):
        dataset = load_speech(dataset) if isinstance(dataset, (str, Path)) else dataset
        return tokenize_corpus(dataset, directory, codec, feature_extractor, **options)

    return tokenize


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder of eleven short clips of several lengths, rates and formats, in two subfolders."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for i in range(11):
        rate = 16_000 if i % 3 else 22_050
        speaker = folder / f"speaker{i % 2}"
        speaker.mkdir(exist_ok=True)
        wave = (
            0.1
            * random.standard_normal(int(rate * (0.1 + 0.09 * i)))
            * np.linspace(0, 1, int(rate * (0.1 + 0.09 * i)))
        )
        soundfile.write(speaker / f"clip{i}.{'wav' if i % 2 else 'flac'}", wave, rate)
    return folder


def rows_of(directory: Path) -> list[dict]:
    """Rows of a corpus of tokens, each clip and setting once, in order."""
    rows = [row for path in sorted((directory / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    keys = [
        (row["id"], row["target_frame_rate"], row["target_frame_rate"] or row["merging_threshold"]) for row in rows
    ]
    assert len(set(keys)) == len(keys)
    return [row for _, row in sorted(zip(map(str, keys), rows, strict=True), key=lambda item: item[0])]


# The codec in two steps


@pytest.mark.parametrize("chunk", [None, 2.0])
def test_one_pass_of_the_encoders_serves_several_thresholds(codec, feature_extractor, device, chunk):
    waves = [read_audio(AUDIO / name, 16_000).waveform for name in ("librivox_austen_0880.flac", "silence_2s.wav")]
    inputs = feature_extractor(waves, sampling_rate=16_000, return_tensors="pt", device=device)
    with torch.inference_mode():
        frames = codec.encode_frames(**inputs, chunk_length_s=chunk)
        assert frames.semantic_frames.shape[:2] == frames.acoustic_frames.shape[:2] == (2, frames.num_frames.max())
        lengths = []
        for options in ({"merging_threshold": 1.0}, {"merging_threshold": [0.9, 0.2]}, {"target_frame_rate": 6.25}):
            expected = codec.encode(**inputs, **options, num_quantizers=3, chunk_length_s=chunk)
            actual = codec.quantize_frames(frames, **options, num_quantizers=3, chunk_length_s=chunk)
            assert torch.equal(actual.audio_codes, expected.audio_codes)
            assert torch.equal(actual.token_lengths, expected.token_lengths)
            assert_close(actual.latents, expected.latents.cpu(), atol=1e-6)
            assert actual.token_lengths.sum(dim=1).tolist() == frames.num_frames.tolist()
            lengths.append(actual.token_lengths.shape[1])
    assert lengths[0] > max(lengths[1:])


# Rows


def test_rows_are_what_the_codec_gives_for_each_clip(tokenize, codec, feature_extractor, device, tmp_path):
    manifest = tokenize(AUDIO, tmp_path, **RATES, num_quantizers=3, batch_seconds=8, clips_per_shard=6)
    rows = load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    names = {path.name for path in AUDIO.iterdir() if path.suffix in (".wav", ".flac")}
    assert set(rows["id"]) == names and len(rows) == 3 * len(names) == 3 * manifest["num_clips"]
    assert [row["id"] for row in rows] == [name for name in dict.fromkeys(rows["id"]) for _ in range(3)]
    told = {row["file_name"]: row for row in read_rows(AUDIO / "metadata.jsonl")}
    for row in rows:
        clip = read_audio(AUDIO / row["id"], 16_000)
        assert (row["num_samples"], row["sampling_rate"], row["frame_rate"]) == (clip.num_samples, 16_000, 12.5)
        assert (row["file_sampling_rate"], row["file_channels"]) == (clip.file_sampling_rate, clip.num_channels)
        assert row["duration"] == clip.seconds
        # What the dataset says is kept, under other names where these are taken.
        assert row["text"] == told[row["id"]]["text"] and row["speaker"] == told[row["id"]]["speaker"]
        assert row["source_sampling_rate"] == told[row["id"]]["sampling_rate"]
        if clip.seconds > 3:
            continue
        inputs = feature_extractor(clip.waveform, sampling_rate=16_000, return_tensors="pt", device=device)
        asked = row["target_frame_rate"]
        rate = {"target_frame_rate": asked} if asked else {"merging_threshold": row["merging_threshold"]}
        alone = codec.encode(**inputs, **rate, num_quantizers=3)
        assert row["audio_codes"] == alone.audio_codes[0].tolist()
        assert row["token_lengths"] == alone.token_lengths[0].tolist()
        assert row["merging_threshold"] == pytest.approx(alone.merging_threshold.item())
    assert {row["merging_threshold"] for row in rows if row["target_frame_rate"] is None} == {1.0, 0.91}


def test_the_manifest_says_what_was_made_and_how(tokenize, codec, codec_dir, clips, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copytree(clips, tmp_path / "in", dirs_exist_ok=True)
    (tmp_path / "in" / "broken.wav").write_text("no audio")
    manifest = tokenize(tmp_path / "in", tmp_path / "out", **RATES, clips_per_shard=4, source={"dataset": "mine"})
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["model"] == str(codec_dir()) and manifest["settings"]["source"]["dataset"] == "mine"
    assert manifest["settings"]["num_quantizers"] == 5 and manifest["settings"]["dtype"] == "float32"
    assert manifest["flexicodec_hf_version"] == flexicodec_hf.__version__
    assert (manifest["num_clips"], manifest["num_broken"], manifest["num_resampled"]) == (11, 1, 4)
    rows = rows_of(tmp_path / "out")
    assert manifest["hours"] == pytest.approx(sum(row["duration"] for row in rows) / 3 / 3600)
    assert sum(manifest["num_tokens"].values()) == sum(len(row["token_lengths"]) for row in rows)
    assert list(manifest["num_tokens"]) == [
        "merging_threshold=1.0",
        "merging_threshold=0.91",
        "target_frame_rate=6.25",
    ]
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out" / "data").iterdir())
    assert [shard["file"] for shard in manifest["shards"]] == files and len(files) == 3
    for shard in manifest["shards"]:
        content = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (shard["sha256"], shard["num_bytes"])
    assert sum(shard["num_clips"] for shard in manifest["shards"]) == 11


def test_the_default_is_the_threshold_of_the_model(tokenize, clips, tmp_path):
    tokenize(clips, tmp_path)
    assert {row["merging_threshold"] for row in rows_of(tmp_path)} == {0.91}


def test_long_clips_are_encoded_in_chunks(tokenize, codec, feature_extractor, device, tmp_path, monkeypatch):
    shutil.copy(AUDIO / "librivox_austen_0880.flac", tmp_path)
    clip = read_audio(AUDIO / "librivox_austen_0880.flac", 16_000)
    inputs = feature_extractor(clip.waveform, sampling_rate=16_000, return_tensors="pt", device=device)
    rates = {"merging_thresholds": [0.91], "target_frame_rates": [6.25]}
    for name, longest in (("held", 600), ("in blocks", 2)):
        monkeypatch.setattr(tokenization, "_MAX_HELD_S", longest)
        tokenize(tmp_path / "librivox_austen_0880.flac", tmp_path / name, **rates, chunk_length_s=1.2)
        for row in rows_of(tmp_path / name):
            expected = codec.encode(**inputs, target_frame_rate=row["target_frame_rate"], chunk_length_s=1.2)
            assert row["audio_codes"] == expected.audio_codes[0].tolist()


# Runs that die


@pytest.mark.parametrize("source", ["folder", "stream"])
def test_a_killed_run_goes_on_without_loss_or_doubles(tokenize, clips, tmp_path, monkeypatch, source):
    dataset = clips if source == "folder" else tar_files(clips, tmp_path / "tars", 2)
    tokenize(dataset, tmp_path / "whole", clips_per_shard=2)
    expected = rows_of(tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    rng = random.Random(0)
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if self.name.startswith(".incomplete-train") and rng.random() < 0.6:
            self.write_bytes(self.read_bytes()[: rng.randrange(1000)])
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    deaths = 0
    for _ in range(40):
        try:
            manifest = tokenize(dataset, tmp_path / "cut", clips_per_shard=2)
            break
        except KeyboardInterrupt:
            deaths += 1
            assert not (tmp_path / "cut" / "manifest.json").exists()
            if (tmp_path / "cut" / "data").exists():
                rows_of(tmp_path / "cut")  # what is there is whole
    assert deaths >= 3 and manifest["num_clips"] == 11
    assert rows_of(tmp_path / "cut") == expected
    assert not list((tmp_path / "cut" / "data").glob(".*"))
    if source == "folder":  # a finished run has nothing to do, and a deleted shard is made again
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "data").iterdir()}
        monkeypatch.undo()
        lost = min(times)
        lost.unlink()
        assert tokenize(dataset, tmp_path / "cut", clips_per_shard=2) is not None
        assert rows_of(tmp_path / "cut") == expected
        assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {lost}


def test_tokens_made_otherwise_are_not_mixed(tokenize, clips, tmp_path):
    tokenize(clips, tmp_path / "out", merging_thresholds=[1.0], clips_per_shard=6)
    before = rows_of(tmp_path / "out")
    with pytest.raises(
        DataError,
        match=r"made with other settings \(rates \['merging_threshold=1.0'\], not \['merging_threshold=0.9'\]\)",
    ):
        tokenize(clips, tmp_path / "out", merging_thresholds=[0.9], clips_per_shard=6)
    shutil.copytree(clips, tmp_path / "more")
    shutil.copy(AUDIO / "short_0p08s.wav", tmp_path / "more")
    with pytest.raises(DataError, match=r"source .*'num_clips': 11.*, not .*'num_clips': 12"):
        tokenize(tmp_path / "more", tmp_path / "out", merging_thresholds=[1.0], clips_per_shard=6)
    assert rows_of(tmp_path / "out") == before
    pq.write_table(pa.table({"a": [1]}), tmp_path / "out" / "data" / "train-00009-00000.parquet")
    with pytest.raises(DataError, match=r"train-00009-00000.parquet: not a shard of tokens: .* Move it away."):
        tokenize(clips, tmp_path / "out", merging_thresholds=[1.0], clips_per_shard=6)


# Broken clips


def test_broken_clips_are_listed_and_skipped(tokenize, clips, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    shutil.copytree(clips, folder)
    (folder / "a.wav").write_text("no audio")
    (folder / "b.m4a").write_bytes(b"\0" * 100)
    soundfile.write(folder / "c.wav", np.full(4000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(folder / "d.wav", np.full(4000, 20_000.0), 16_000, subtype="FLOAT")
    soundfile.write(folder / "e.wav", np.zeros(0), 16_000)
    (folder / "f.flac").write_bytes((clips / "speaker0" / "clip10.flac").read_bytes()[:6000])
    (folder / "metadata.csv").write_text('file_name,text\nspeaker1/clip1.wav,"one, two"\ngone.wav,three\n,four\n')
    manifest = tokenize(folder, tmp_path / "out", clips_per_shard=5)
    assert (manifest["num_clips"], manifest["num_broken"]) == (11, 8)
    listed = {row["id"]: row for row in map(json.loads, (tmp_path / "out" / "broken.jsonl").read_text().splitlines())}
    reasons = {
        "a.wav": "not an audio file",
        "b.m4a": "not an audio file",
        "c.wav": "NaN or infinite",
        "d.wav": "must hold floats in [-1, 1]",
        "e.wav": "the audio is empty",
        "f.flac": "damaged",
        "gone.wav": "there is no such file",
        "00000-00000-2": "the row has no audio",
    }
    assert listed.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in listed[name]["reason"], name
        assert f"skipped {name}: " in capsys_err(capsys, name)
    assert listed["a.wav"]["path"] == str(folder / "a.wav")
    texts = {row["id"]: row["text"] for row in rows_of(tmp_path / "out")}
    assert texts.pop("speaker1/clip1.wav") == "one, two" and set(texts.values()) == {None} and len(texts) == 10


def capsys_err(capsys, name, seen={}):  # noqa: B006
    seen["text"] = seen.get("text", "") + capsys.readouterr().err
    return seen["text"]


def test_a_shard_of_broken_clips_is_empty(tokenize, tmp_path):
    (tmp_path / "a.wav").write_text("no audio")
    shutil.copy(AUDIO / "short_0p08s.wav", tmp_path / "b.wav")
    assert tokenize(tmp_path, tmp_path / "out", clips_per_shard=1)["num_broken"] == 1
    assert load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))["id"][:] == ["b.wav"]


def test_a_batch_that_fails_is_tried_in_halves(tokenize, codec, clips, tmp_path, monkeypatch):
    tokenize(clips, tmp_path / "expected")
    encode_frames = type(codec).encode_frames

    def small_memory(self, input_values, **kwargs):
        if input_values.shape[0] > 2 or input_values.shape[-1] > 15_000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_frames(self, input_values, **kwargs)

    monkeypatch.setattr(type(codec), "encode_frames", small_memory)
    tokenize(clips, tmp_path / "out")
    listed = [json.loads(line) for line in (tmp_path / "out" / "broken.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} == {"speaker0/clip10.flac"} and "out of memory" in listed[0]["reason"]
    expected = [row for row in rows_of(tmp_path / "expected") if row["id"] != "speaker0/clip10.flac"]
    assert rows_of(tmp_path / "out") == expected


def test_errors_of_the_source_end_the_run(tokenize, clips, tmp_path):
    def rows():
        for path in sorted(clips.rglob("*.wav")):
            yield {"audio": str(path)}
        raise RuntimeError("the network is gone")

    from datasets import Features, IterableDataset, Value

    stream = IterableDataset.from_generator(rows, features=Features({"audio": Value("string")}))
    with pytest.raises(RuntimeError, match="the network is gone"):
        tokenize(stream, tmp_path, clips_per_shard=2)
    assert not (tmp_path / "manifest.json").exists()


# Sources


def tar_files(clips: Path, folder: Path, count: int):
    """The clips as WebDataset tars, and the stream of them."""
    folder.mkdir(exist_ok=True)
    paths = sorted(clips.rglob("clip*"))
    for i in range(count):
        with tarfile.open(folder / f"{i}.tar", "w") as tar:
            for path in paths[i::count]:
                told = json.dumps({"text": path.stem, "mos": 4.5}).encode()
                for suffix, content in ((".flac", as_flac(path)), (".json", told)):
                    entry = tarfile.TarInfo(path.stem + suffix)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return load_speech(folder, streaming=None)


def as_flac(path: Path) -> bytes:
    wave, rate = soundfile.read(path)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="FLAC")
    return file.getvalue()


def embedded(clips: Path) -> Dataset:
    """The clips in a table, with a column of ids and one of numbers."""
    paths = sorted(clips.rglob("clip*"))
    audio = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    table = pa.table({"id": [path.stem for path in paths], "audio": audio, "sentence": ["x"] * len(paths)})
    return Dataset(table.append_column("speaker", pa.array([len(path.stem) for path in paths]))).cast_column(
        "audio", Audio()
    )


def test_every_source_gives_the_same_tokens(tokenize, clips, tmp_path, monkeypatch):
    tokenize(clips, tmp_path / "folder")
    expected = {Path(row["id"]).stem: row["audio_codes"] for row in rows_of(tmp_path / "folder")}
    dataset = embedded(clips)
    dataset.to_parquet(tmp_path / "clips.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    paths = [path.relative_to(clips).as_posix() for path in sorted(clips.rglob("clip*"))]
    with (clips.parent / "clips.jsonl").open("w") as file:
        file.writelines(json.dumps({"audio_filepath": f"{clips.name}/{path}", "text": "hi"}) + "\n" for path in paths)
    (clips / "list.tsv").write_text("path\tsentence\n" + "".join(f'{path}\tsaid "so\n' for path in paths))
    found = {
        "tars": tar_files(clips, tmp_path / "tars", 3),
        "one tar": load_speech(tmp_path / "tars" / "*.tar", streaming=True),
        "parquet": load_speech(tmp_path / "clips.parquet", streaming=None),
        "saved": load_speech(tmp_path / "saved"),
        "dataset": dataset,
        "stream": dataset.to_iterable_dataset(num_shards=2),
        "jsonl": load_speech(clips.parent / "clips.jsonl"),
        "tsv": load_speech(clips / "list.tsv"),
    }
    (clips / "list.tsv").unlink()
    for name, source in found.items():
        manifest = tokenize(source, tmp_path / "out" / name)
        rows = rows_of(tmp_path / "out" / name)
        assert {Path(row["id"]).stem: row["audio_codes"] for row in rows} == expected, name
        assert manifest["num_broken"] == 0
        texts = {row["text"] for row in rows}
        if "tar" in name:
            assert texts == expected.keys() and {row["json"]["mos"] for row in rows} == {4.5}
        else:
            assert texts == {{"jsonl": "hi", "tsv": 'said "so'}.get(name, "x")}, name
        if name in ("parquet", "saved", "dataset", "stream"):
            assert {row["speaker"] for row in rows} == {5, 6}
        assert all("audio" not in row for row in rows)


def test_a_dataset_without_audio_is_refused(tokenize, tmp_path):
    for rows in ({"audio": []}, {"text": ["one", "two"]}):
        with pytest.raises(DataError, match="there is no audio in the dataset"):
            tokenize(Dataset.from_dict(rows), tmp_path)


def test_blocks_of_a_stream(clips, monkeypatch):
    [stream] = as_streams(standard_columns(embedded(clips)), 100)
    blocks = list(read_blocks(stream, 4))
    assert [(number, last, len(rows)) for number, last, rows in blocks] == [(0, False, 4), (1, False, 4), (2, True, 3)]
    assert [name for _, _, rows in blocks for name in rows["id"].to_pylist()] == embedded(clips)["id"][:]
    # Large files make small blocks.
    monkeypatch.setattr(tokenization, "_MAX_BLOCK_BYTES", 40_000)
    blocks = list(read_blocks(stream, 100))
    assert sum(len(rows) for _, _, rows in blocks) == 11 and 2 < len(blocks) < 11
    # Many shards of a few rows are read as fewer streams.
    monkeypatch.setattr(tokenization, "_MAX_STREAMS", 2)
    streams = as_streams(standard_columns(embedded(clips)).to_iterable_dataset(num_shards=11), 100)
    assert [sum(len(rows) for _, _, rows in read_blocks(stream, 4)) for stream in streams] == [6, 5]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clips_per_shard": 0}, "`clips_per_shard` must be positive, got 0"),
        ({"batch_seconds": -1.0}, "`batch_seconds` must be positive, got -1.0"),
        ({"num_quantizers": 0}, "`num_quantizers` must be positive, got 0"),
        (
            {"merging_thresholds": [1, 2]},
            r"`merging_thresholds` must be different numbers between -1 and 1, got \[1, 2\]",
        ),
        ({"target_frame_rates": [5, 5.0]}, "`target_frame_rates` must be different numbers between 1.5625 and 12.5"),
    ],
)
def test_wrong_arguments(tokenize, clips, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize(clips, tmp_path / "out", **options)


def test_reading_ahead_keeps_order_and_passes_errors_on():
    made = []

    def items():
        for i in range(6):
            made.append(i)
            yield i
        raise ValueError("at the end")

    ahead = prefetch(items(), 2)
    assert next(ahead) == 0
    with pytest.raises(ValueError, match="at the end"):
        assert list(ahead) == made


# From the shell


def test_command_and_back_to_audio(codec_dir, device, clips, tmp_path, capsys):
    options = ["--model", str(codec_dir()), "--device", device]
    args = [
        "tokenize",
        str(clips / "speaker1"),
        "-o",
        str(tmp_path / "tokens"),
        "--merging-thresholds",
        "1",
        "0.8",
        *options,
    ]
    assert main([*args, "--target-frame-rates", "6.25", "--num-quantizers", "4"]) == 0
    output = capsys.readouterr()
    assert "5 clips, 0.0008 h of audio; " in output.out and "; 2 clips resampled" in output.out
    assert "5/5 [" in output.err and "0.0008 h of audio, " in output.err

    [shard] = (tmp_path / "tokens" / "data").iterdir()
    assert main(["decode", str(shard), "-o", str(tmp_path / "audio"), *options]) == 0
    output = capsys.readouterr().out
    assert len(list((tmp_path / "audio").iterdir())) == 15 and "encoded with" not in output
    for option, end in ((("--merging-threshold", "0.8"), "0.8"), (("--target-frame-rate", "6.25"), "6.25hz")):
        direct = tmp_path / f"{end}.wav"
        clip = clips / "speaker1" / "clip9.wav"
        assert main(["reconstruct", str(clip), str(direct), "--num-quantizers", "4", *option, *options]) == 0
        expected, _ = soundfile.read(direct)
        actual, _ = soundfile.read(tmp_path / "audio" / f"clip9.wav-{end}.wav")
        np.testing.assert_allclose(actual, expected, atol=1e-3)

    assert main(["tokenize", str(clips / "speaker1"), "-o", str(tmp_path / "tokens"), *options]) == 1
    assert "was made with other settings (num_quantizers 4, not 5; " in capsys.readouterr().err


def test_decode_takes_rows_that_were_saved_again(codec_dir, device, clips, tmp_path, capsys, tokenize):
    tokenize(clips, tmp_path)
    rows = (
        load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
        .select([3])
        .map(lambda row: {"id": "../../outside"})
    )
    rows.to_parquet(tmp_path / "one.parquet")
    options = ["--model", str(codec_dir()), "--device", device, "-o", str(tmp_path / "audio"), "--overwrite"]
    assert main(["decode", str(tmp_path / "one.parquet"), *options]) == 0
    assert "encoded with" not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "audio").iterdir()] == ["_.._outside-0.91.wav"]

    rows.map(lambda row: {"token_lengths": [9] * len(row["token_lengths"])}).to_parquet(tmp_path / "bad.parquet")
    rows.remove_columns("num_samples").to_parquet(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    for name, message in (
        ("bad", "bad.parquet, row 0: the tokens cover "),
        ("none", "none.parquet: not a file of tokens from `tokenize`: it has no column 'num_samples'"),
        ("text", "text.parquet: not a file of tokens from `tokenize`: "),
        ("gone", "gone.parquet: there is no such file"),
    ):
        assert main(["decode", str(tmp_path / f"{name}.parquet"), *options]) == 1
        assert message in capsys.readouterr().err, name


@pytest.mark.parametrize(
    "args, message",
    [
        (["--merging-thresholds", "2"], "--merging-thresholds: must be between -1 and 1, got 2"),
        (["--target-frame-rates", "13"], "--target-frame-rates: must be between 1.5625 and 12.5 tokens per second"),
        (["--batch-seconds", "0"], "--batch-seconds: must be more than 0 seconds"),
    ],
)
def test_usage_errors(codec_dir, tmp_path, capsys, args, message):
    with pytest.raises(SystemExit):
        main(["tokenize", "in", "-o", str(tmp_path), "--model", str(codec_dir()), *args])
    assert message in capsys.readouterr().err
