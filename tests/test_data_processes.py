"""Real processes, started by `accelerate launch`, killed by SIGKILL: minutes, mostly of imports."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile


pytestmark = pytest.mark.slow


def rows_of(directory: Path) -> dict[tuple[str, float], list[list[int]]]:
    rows = [row for path in (directory / "data").glob("[!.]*.parquet") for row in pq.read_table(path).to_pylist()]
    codes = {(row["id"], row["merging_threshold"]): row["audio_codes"] for row in rows}
    assert len(codes) == len(rows), "a row is there twice"
    return codes


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Three thousand short files, ten of which are broken."""
    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(0)
    for i in range(3000):
        wave = 0.1 * generator.standard_normal(int(generator.uniform(0.05, 0.5) * 16_000))
        soundfile.write(folder / f"{i:04d}.wav", wave, 16_000)
    for i in range(0, 3000, 300):
        (folder / f"{i:04d}.wav").write_text("no audio")
    return folder


def start(clips: Path, output: Path, model: Path, num_processes: int) -> subprocess.Popen:
    program = output.parent / "program.py"
    program.write_text(
        "import sys\nfrom flexicodec_hf.cli import main\n\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_processes)]
    command = [*launcher, str(program), "tokenize", str(clips), "--output-dir", str(output), "--model", str(model)]
    command += ["--device", "cpu", "--merging-thresholds", "1.0", "0.9", "--clips-per-shard", "100"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(random.randrange(20_000, 60_000))}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)


def test_processes_and_sudden_deaths_change_nothing(clips, codec_dir, tmp_path):
    assert start(clips, tmp_path / "one", codec_dir(), 1).wait() == 0
    expected = rows_of(tmp_path / "one")
    assert len(expected) == 2 * 2990
    assert start(clips, tmp_path / "two", codec_dir(), 2).wait() == 0
    assert rows_of(tmp_path / "two") == expected

    rng = random.Random(0)
    for deaths in range(30):
        process = start(clips, tmp_path / "killed", codec_dir(), 1 + deaths % 2)
        shards = len(list((tmp_path / "killed" / "data").glob("[!.]*.parquet")))
        goal = shards + rng.randint(2, 9)
        while process.poll() is None and len(list((tmp_path / "killed" / "data").glob("[!.]*.parquet"))) < goal:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        there = rows_of(tmp_path / "killed")
        assert there.items() <= expected.items()
    assert process.returncode == 0 and deaths >= 3
    assert rows_of(tmp_path / "killed") == expected
    assert (tmp_path / "killed" / "manifest.json").exists()
    broken = (tmp_path / "killed" / "broken.jsonl").read_text().splitlines()
    assert len(broken) == 10
