"""Files and directories that are complete or absent, and settings of earlier runs."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexicodec_hf.data.files import DataError, atomic_directory, atomic_file, check_settings, only_run, require


def test_a_file_is_complete_or_absent(tmp_path):
    path = tmp_path / "a.json"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.suffix == ".json" and temporary.name.startswith(".")
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_directory_is_complete_or_absent(tmp_path):
    path = tmp_path / "deep" / "model"
    with pytest.raises(KeyboardInterrupt), atomic_directory(path) as folder:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic_directory(path) as folder:
        (folder / "tts").mkdir()
        (folder / "tts" / "config.json").write_text("new")
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["model"]
    assert (path / "tts" / "config.json").read_text() == "new"


def test_a_directory_that_exists_keeps_its_other_files_and_loses_old_weights(tmp_path):
    for name in ("README.md", "config.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("old")
    with atomic_directory(tmp_path) as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text(f"new, of {(tmp_path / 'config.json').read_text()}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "README.md": "old",
        "config.json": "new, of old",
        "model.safetensors": "new, of old",
    }
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "README.md"):
        pass


@pytest.mark.parametrize(
    "moment, expected",
    [
        ("writing", {"config.json": "old", "model.safetensors": "old"}),
        ("moving", {"config.json": "new"}),
        ("never", {"config.json": "new", "model.safetensors": "new"}),
    ],
)
def test_a_killed_process_leaves_no_weights_of_another_model(tmp_path, monkeypatch, moment, expected):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("old")

    def replace(file: Path, target: Path) -> None:
        if moment == "moving" and file.suffix == ".safetensors":
            os._exit(9)
        os.replace(file, target)

    monkeypatch.setattr(Path, "replace", replace)
    if (child := os.fork()) == 0:
        with atomic_directory(tmp_path) as folder:
            for name in ("model.safetensors", "config.json"):
                (folder / name).write_text("new")
            if moment == "writing":
                os._exit(9)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if moment == "never" else 9)
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == expected


def test_settings_of_an_earlier_run_have_to_be_the_same(tmp_path):
    path = tmp_path / "settings.json"
    check_settings(path, {"rates": (1.0, 0.9), "model": "a"})
    assert json.loads(path.read_text()) == {"rates": [1.0, 0.9], "model": "a"}
    check_settings(path, {"model": "a", "rates": (1.0, 0.9)})
    with pytest.raises(DataError, match=r"made with other settings \(model 'a', not None; dtype None, not 'x'\): use"):
        check_settings(path, {"rates": (1.0, 0.9), "dtype": "x"})


def test_a_missing_package_is_named():
    assert require("json", "x", "eval") is json
    with pytest.raises(
        DataError, match=r"the plot needs the package `not_there` .*: pip install 'flexicodec-hf\[eval\]'"
    ):
        require("not_there", "the plot", "eval")


def test_weights_of_the_same_configuration_are_there_at_every_moment(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("old")
    found = []

    def replace(file: Path, target: Path) -> None:
        found.append((tmp_path / "model.safetensors").read_text())
        os.replace(file, target)

    monkeypatch.setattr(Path, "replace", replace)
    with atomic_directory(tmp_path) as folder:
        (folder / "config.json").write_text("old")
        (folder / "model.safetensors").write_text("new")
    assert found == ["old", "old"] and (tmp_path / "model.safetensors").read_text() == "new"


def test_damaged_settings_are_named(tmp_path):
    for content in ("", '{"rate', "3", "[1]"):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(DataError, match=r"settings.json: expected the settings of an earlier run .* damaged"):
            check_settings(tmp_path / "settings.json", {"rate": 1})


def test_a_second_run_is_kept_out_until_the_first_ends_or_is_killed(tmp_path):
    folder, (read, write) = tmp_path / "out", os.pipe()
    if (child := os.fork()) == 0:
        with only_run(folder):
            os.mkdir(folder / ".incomplete-model")
            os.write(write, b"x")
            signal.pause()
    try:
        os.read(read, 1)
        with (
            pytest.raises(DataError, match="out: another run works in this directory: wait for its end"),
            only_run(folder),
        ):
            pass
        assert (folder / ".incomplete-model").is_dir()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with only_run(folder):
        assert not (folder / ".incomplete-model").exists()


def test_what_a_killed_process_left_goes_away_and_what_a_live_one_writes_stays(tmp_path):
    script = (
        "import os, sys; from flexicodec_hf.data.files import atomic_file, atomic_directory\n"
        "with atomic_file(sys.argv[1] + '/clip.wav') as path, atomic_directory(sys.argv[1] + '/model') as folder:\n"
        "    path.write_text('half'); (folder / 'config.json').write_text('{'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    dead = list(tmp_path.iterdir())
    assert len(dead) == 2 and all(path.name.startswith(".incomplete-") for path in dead)
    alive = dead[0].with_name(re.sub(r"\d+(?=$|\.wav)", str(os.getppid()), dead[0].name))
    elsewhere = tmp_path / ".incomplete-clip.elsewhere.1.wav"
    for path in (alive, elsewhere):
        path.write_text("half")
    with atomic_file(tmp_path / "other.wav") as path:
        path.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, elsewhere.name, "other.wav"}
