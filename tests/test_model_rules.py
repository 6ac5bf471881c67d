"""The rules that transformers' own CI checks in model files, by `transformers-mlinter`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("mlinter")
PACKAGE = Path(__file__).parents[1] / "src" / "flexicodec_hf"

# Rules that a package outside transformers cannot meet.
EXCEPTIONS = {
    "TRF028": "The header names the Hugging Face team and Apache 2.0; this package is under MIT.",
    "TRF057": "`@auto_docstring` knows the models inside transformers. Tried on ours, it drops their introductions "
    "and `Raises`, and reports documented arguments as missing.",
}


def test_model_files_follow_the_rules_of_transformers(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", "--output-json", report, PACKAGE]
    subprocess.run(command, capture_output=True, check=False)
    findings = json.loads(report.read_text())["findings"]
    assert not [finding for finding in findings if finding["rule"] not in EXCEPTIONS]
    assert {finding["rule"] for finding in findings} == set(EXCEPTIONS), "an exception is not needed any more"
