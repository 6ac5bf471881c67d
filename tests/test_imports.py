"""What is imported when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flexicodec_hf


HEAVY = ("torch", "transformers", "numpy", "datasets", "huggingface_hub", "fastapi", "gradio")


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["speak", "--help"], ["serve", "--help"]])
def test_help_needs_no_heavy_package(arguments, tmp_path):
    script = tmp_path / "flexicodec-hf"  # as pip installs it
    script.write_text(
        "import sys\nfrom flexicodec_hf.cli import main\ntry:\n    main()\nfinally:\n"
        f"    print('heavy:', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    assert run(script, *arguments).endswith("heavy: []\n")


def test_a_command_registers_the_classes(tmp_path):
    script = tmp_path / "flexicodec-hf"
    script.write_text(
        "from flexicodec_hf.cli import main\n"
        f"main(['encode', 'missing.wav', '--output-dir', 'tokens', '--model', {str(tmp_path)!r}])\n"
        "from transformers import CONFIG_MAPPING\n"
        "print('flexicodec_tts' in CONFIG_MAPPING)\n"
    )
    assert run(script).endswith("True\n")


def test_importing_the_package_registers_the_classes():
    script = (
        "import flexicodec_hf\n"
        "from transformers import AutoConfig, AutoModel\n"
        "config = AutoConfig.for_model('flexicodec')\n"
        "print(type(config) is flexicodec_hf.FlexiCodecConfig, type(config) in AutoModel._model_mapping)\n"
    )
    assert run("-c", script) == "True True\n"


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(flexicodec_hf.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {node.module: {alias.name for alias in node.names} for node in block.body}
    assert seen == {module: set(names) for module, names in flexicodec_hf._MODULES.items()}


def test_every_public_name_is_there():
    for name in flexicodec_hf.__all__:
        assert getattr(flexicodec_hf, name).__name__ == name
        assert name in dir(flexicodec_hf)
    with pytest.raises(AttributeError, match="no attribute 'FlexiCodecModell'"):
        flexicodec_hf.FlexiCodecModell  # noqa: B018
