import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flexicodec_hf.conversion.codec import convert_codec


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

TESTS = Path(__file__).parent
AUDIO = TESTS / "audio"
FIXTURES = TESTS / "fixtures"


def devices() -> list[str]:
    """Every device at hand: tests that touch tensors run on each."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> str:
    return request.param


class Fixture:
    """Golden tensors of the reference `flexicodec==0.1.2` (see tests/fixtures/README.md).

    `fixture.spec` is the JSON, `fixture["run/name"]` a tensor under `io/`, `fixture.weights` the reference's weights.
    """

    def __init__(self, name: str):
        self.spec = json.loads((FIXTURES / f"{name}.json").read_text())
        tensors = {}
        for path in (FIXTURES / f"{name}.safetensors", FIXTURES / f"{name}.io.safetensors"):
            tensors |= load_file(path) if path.exists() else {}
        self.weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
        self._io = {k.removeprefix("io/"): v for k, v in tensors.items() if k.startswith("io/")}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._io[name].clone()

    def __contains__(self, name: str) -> bool:
        return name in self._io


@pytest.fixture(scope="session")
def golden():
    """`golden("fbank")` loads a golden fixture, once a session."""
    loaded: dict[str, Fixture] = {}

    def load(name: str) -> Fixture:
        if name not in loaded:
            loaded[name] = Fixture(name)
        return loaded[name]

    return load


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected, atol=atol, rtol=rtol, check_dtype=False)


@pytest.fixture(scope="session")
def codec_dir(golden, tmp_path_factory):
    """`codec_dir("codec_tiny")`: the reference's codec of a fixture, converted to a repository on disk."""
    converted: dict[str, Path] = {}

    def convert(name: str = "codec_tiny") -> Path:
        if name not in converted:
            folder = tmp_path_factory.mktemp(name)
            save_file(golden(name).weights, folder / "source.safetensors")
            (folder / "source.yaml").write_text(yaml.safe_dump({"model": golden(name).spec["config"]}))
            convert_codec(folder / "source.safetensors", folder / "codec", folder / "source.yaml")
            converted[name] = folder / "codec"
        return converted[name]

    return convert
