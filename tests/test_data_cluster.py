"""Tokenization as steps of a `datatrove` pipeline: the rows are those of `tokenize`, with each executor."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from transformers import AutoFeatureExtractor, AutoModel

from flexicodec_hf.cli import main
from flexicodec_hf.data.files import DataError
from flexicodec_hf.data.sources import load_speech
from flexicodec_hf.data.tokenization import tokenize_corpus


pytest.importorskip("datatrove")
from datatrove.data import Document, Media, MediaType
from datatrove.executor import LocalPipelineExecutor

from flexicodec_hf.data.cluster import FlexiCodecTokenizer, SpeechReader


RATES = {"merging_thresholds": [1.0, 0.91], "target_frame_rates": [6.25]}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Ten short clips, one of them broken."""
    folder, random = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for i in range(9):
        soundfile.write(folder / f"clip{i}.wav", 0.1 * random.standard_normal(2_000 * (i + 2)), 16_000)
        if i > 0:
            (folder / f"clip{i}.txt").write_text(f"text {i}")
    (folder / "clip9.wav").write_bytes(b"no audio")
    return folder


@pytest.fixture(scope="module")
def expected(clips, codec_dir, tmp_path_factory) -> list[dict]:
    """The rows of `tokenize`."""
    folder = tmp_path_factory.mktemp("tokens")
    codec, extractor = AutoModel.from_pretrained(codec_dir()).eval(), AutoFeatureExtractor.from_pretrained(codec_dir())
    tokenize_corpus(load_speech(str(clips)), folder, codec, extractor, **RATES)
    return rows_of(folder)


def rows_of(directory: Path) -> list[dict]:
    rows = [row for path in sorted((directory / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for row in rows:  # as found in batches of other lengths
        row["merging_threshold"] = round(row["merging_threshold"], 6)
    return sorted(rows, key=lambda row: (row["id"], row["target_frame_rate"] or 0, row["merging_threshold"]))


def execute(clips: Path, output: Path, model: Path, step=lambda data, rank, world_size: data) -> None:
    """Two tasks, with `step` between the reader and the tokenizer."""
    options = {"clips_per_shard": 2, "batch_seconds": 2, "num_workers": 1}
    pipeline = [
        SpeechReader(str(clips), clips_per_stream=3),
        step,
        FlexiCodecTokenizer(str(output), str(model), **RATES, **options),
    ]
    LocalPipelineExecutor(pipeline, tasks=2, workers=1, logging_dir=str(output / "logs")).run()


def die(data, rank: int, world_size: int, output: str):
    """Ends the process at a clip, as a machine may, once a shard is written."""
    for document in data:
        if document.id == "clip7.wav":
            while not list(Path(output, "data").glob("[!.]*.parquet")):
                time.sleep(0.1)
            os._exit(9)
        yield document


def test_a_killed_run_goes_on_and_gives_the_rows_of_tokenize(clips, codec_dir, expected, tmp_path):
    script = (
        "import sys; from functools import partial; from pathlib import Path; from test_data_cluster import *\n"
        "execute(*map(Path, sys.argv[1:]), partial(die, output=sys.argv[2]))"
    )
    arguments = [str(clips), str(tmp_path), str(codec_dir())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", script, *arguments]
    assert subprocess.run(command, env=environment, timeout=300, check=False).returncode == 9
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("[!.]*.parquet")}
    assert finished and not (tmp_path / "manifest.json").exists()
    execute(clips, tmp_path, codec_dir())
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert rows_of(tmp_path) == expected
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["num_clips"] == 9 and manifest["num_broken"] == 1
    # What `datatrove` calls completed is not run again.
    execute(clips, tmp_path, codec_dir(), lambda data, rank, world_size: pytest.fail("a task ran again"))


@pytest.mark.slow
def test_ray_gives_the_rows_of_tokenize(clips, codec_dir, expected, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from datatrove.executor import RayPipelineExecutor

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
    try:
        tokenizer = FlexiCodecTokenizer(str(tmp_path), str(codec_dir()), clips_per_shard=2, **RATES)
        RayPipelineExecutor(
            [SpeechReader(str(clips), clips_per_stream=3), tokenizer],
            tasks=2,
            workers=2,
            mem_per_cpu_gb=1,
            logging_dir=str(tmp_path / "logs"),
        ).run()
    finally:
        ray.shutdown()
    assert rows_of(tmp_path) == expected


def documents(clips: Path) -> list[Document]:
    contents = [(path.stem, path.read_bytes()) for path in sorted(clips.glob("clip[0-2].wav"))]
    return [
        Document(
            text="words", id=name, media=[Media(name, MediaType.AUDIO, None, media_bytes=audio)], metadata={"n": i}
        )
        for i, (name, audio) in enumerate(contents)
    ]


def test_documents_from_anywhere_are_encoded_and_go_on(clips, codec_dir, tmp_path):
    step = FlexiCodecTokenizer(str(tmp_path), str(codec_dir()), metadata_columns={"n": "int32"}, **RATES)
    passed = list(step.run(documents(clips)))
    rows = rows_of(tmp_path)
    assert [document.id for document in passed] == ["clip0", "clip1", "clip2"]
    assert [row["n"] for row in rows if row["merging_threshold"] == 1.0] == [0, 1, 2]
    counts = [len(row["token_lengths"]) for row in rows if row["merging_threshold"] == 1.0]
    assert [document.metadata["token_count"] for document in passed] == counts
    shard = tmp_path / "data" / "train-00000-00000.parquet"
    assert main(["decode", str(shard), "--output-dir", str(tmp_path / "wav"), "--model", str(codec_dir())]) == 0


def test_a_step_without_documents_leaves_a_complete_corpus(codec_dir, tmp_path):
    list(FlexiCodecTokenizer(str(tmp_path), str(codec_dir())).run(iter(())))
    assert json.loads((tmp_path / "manifest.json").read_text())["num_clips"] == 0


def test_another_number_of_tasks_is_refused(clips, codec_dir, tmp_path):
    step = FlexiCodecTokenizer(str(tmp_path), str(codec_dir()))
    list(step.run(documents(clips), rank=0, world_size=2))
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(DataError, match="num_tasks"):
        list(step.run(documents(clips), rank=0, world_size=3))


def test_documents_need_one_recording(clips, codec_dir, tmp_path):
    two = documents(clips)[:1]
    two[0].media *= 2
    with pytest.raises(DataError, match="clip0 has 2 recordings"):
        list(FlexiCodecTokenizer(str(tmp_path), str(codec_dir())).run(two))


def test_the_executor_tells_of_a_failed_task(clips, tmp_path):
    pipeline = [SpeechReader(str(clips)), FlexiCodecTokenizer(str(tmp_path), str(tmp_path / "no_model"))]
    with pytest.raises(OSError):
        LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=str(tmp_path / "logs")).run()
