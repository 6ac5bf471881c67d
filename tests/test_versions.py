import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

import flexicodec_hf


PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_the_checked_range_is_the_one_that_pip_installs():
    assert f'"transformers{flexicodec_hf._TRANSFORMERS}",' in PYPROJECT.read_text()


@pytest.mark.parametrize("version", ["5.16.1", "5.25.0", "6.0.0"])
def test_another_transformers_is_refused_in_one_line(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    for name in [name for name in sys.modules if name.split(".")[0] == "flexicodec_hf"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ImportError, match=rf"works with transformers>=.*,<.*, but {version} is installed: run"
    ) as error:
        importlib.import_module("flexicodec_hf")
    assert "\n" not in str(error.value)
