"""examples/quickstart.ipynb runs from top to bottom."""

import os
from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat", reason="needs the extra [dev]")
nbclient = pytest.importorskip("nbclient", reason="needs the extra [dev]")
pytest.importorskip("ipykernel", reason="needs the extra [dev]")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def notebook():
    return nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)


def test_the_notebook_runs(notebook, monkeypatch):
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")  # it is kept without
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")]))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert sum("audio" in str(output.get("data", {}).get("text/html", "")) for output in outputs) == 5
    assert "image/png" in shown
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "44 tokens, 6.25 a second, 8 codebooks" in printed and printed.count("s of audio") >= 2


@pytest.mark.parametrize("folder", [EXAMPLES, EXAMPLES.parent])
def test_the_notebook_finds_the_files_of_the_clone(notebook, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith("from pathlib import Path"))
    exec(cell.source, names)
    assert (Path(names["MODEL"]) / "config.json").is_file() and (names["root"] / "tests" / "audio").is_dir()
