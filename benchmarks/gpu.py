"""Tests and benchmarks on a GPU within a time limit, without a network: `make gpu`.

    python benchmarks/gpu.py [--minutes 9] [--output gpu] [--device cuda] [--small]

Each job writes `NAME.log` to the output directory. `report.md` there has the machine, what each job came to, and the
tables for docs/speed.md. It is written anew after each job, so that it is whole whenever the time ends. A job may
take half of the time that is left. It is stopped then, and the report says so.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers


HERE = Path(__file__).parent
TESTS = ["test_modeling_flexicodec_vocoder", "test_modeling_flexicodec", "test_generation_flexicodec_ar"]
TESTS += ["test_loop_flexicodec_ar", "test_modeling_flexicodec_voicebox", "test_modeling_flexicodec_tts"]
TESTS += ["test_modeling_flexicodec_ar"]


def jobs(device: str, small: bool) -> dict[str, list[str]]:
    """The commands, what matters most first."""
    streams, tokens, batches = (["1"], "4", ["1"]) if small else (["1", "8", "64"], "300", ["1", "8", "32"])
    types = ["float32", "bfloat16"]
    ar = ["ar.py", "--device", device, "--dtype", *types, "--tokens", tokens]
    tests = [str(HERE.parent / "tests" / f"{name}.py") for name in TESTS[: 1 if small else None]]
    short = ["--seconds", "1"], ["--steps", "1", "--target", "0.5", "--prompt", "0.5"]
    commands = {
        "tests": ["-m", "pytest", "-q", "-n", "0", "-k", device, *tests],
        "codec": ["codec.py", "--device", device, "--no-memory", "--batch-sizes", *batches, "--rounds", "1"]
        + short[0] * small,
        "ar": [*ar, "--streams", *streams, "--repeats", "1"],
        "ar_loop": [*ar, "--streams", *streams, "--repeats", "1", "--loop"],
        "ar_compiled": [*ar, "--streams", "1", "--repeats", "1", "--compile"],
        "voicebox_and_vocoder": ["nar.py", "--device", device, "--repeats", "1"] + short[1] * small,
    }
    return {
        name: [str(HERE / one) if one.endswith(".py") else one for one in words] for name, words in commands.items()
    }


def run(command: list[str], log: Path, seconds: float) -> str:
    """Run Python in a group of processes of its own; what became of it, in words."""
    # Nothing is downloaded: models have random weights.
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | offline,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=max(seconds, 0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"stopped by the time limit after {time.monotonic() - start:.0f} s"
    result = "passed" if status == 0 else f"failed with status {status}"
    return f"{result} in {time.monotonic() - start:.0f} s"


def report(directory: Path, device: str, results: dict[str, str]) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"# {name}",
        "",
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, transformers {transformers.__version__}, full size, "
        "random weights, whole calls.",
        "",
        "| job | result |",
        "| --- | --- |",
        *(f"| {job} | {result} |" for job, result in results.items()),
    ]
    for job in results:
        log = directory / f"{job}.log"
        if log.exists():
            # The tests' log ends with the failures; of the benchmarks all counts.
            text = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
            lines += ["", f"## {job}", "", "```", *text, "```"]
    temporary = directory / ".report.md"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(directory / "report.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="limit for everything (default: %(default)g)")
    parser.add_argument("--output", type=Path, default=Path("gpu"), metavar="DIR")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu tries the command itself")
    parser.add_argument("--small", action="store_true", help="few tests and short runs, to try the command")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; `--device cpu --small` tries the command without one")
    end = time.monotonic() + 60 * arguments.minutes
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, str] = {}
    commands = jobs(arguments.device, arguments.small)
    for name, command in commands.items():
        # Half of what is left, so that a slow job leaves time for the others; the last one has all.
        left = (end - time.monotonic()) / (1 if len(results) + 1 == len(commands) else 2)
        log = arguments.output / f"{name}.log"
        log.unlink(missing_ok=True)
        results[name] = run(command, log, left) if left > 0 else "left out: no time"
        print(f"{name}: {results[name]}", flush=True)
        report(arguments.output, arguments.device, results)
    print(f"{arguments.output / 'report.md'}")
    return int(any(result.startswith("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
