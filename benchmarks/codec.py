"""Speed and memory of the codec at full size, with random weights, and of the reference in the same
run.

    python benchmarks/codec.py [--seconds 10] [--rounds 3] [--threads 2] [--compile] [--device
    cpu|cuda]

The reference runs if it is installed (benchmarks/README.md); otherwise ours is timed alone, on a
CPU with `optimize_for_cpu`. Calls of the two take turns, and each is timed whole, feature
extraction included. Memory is the peak of the resident set of a separate process, so it counts the
weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path


try:
    import reference
except ModuleNotFoundError:
    reference = None
import torch
from safetensors.torch import save_file

from flexicodec_hf import FlexiCodecConfig, FlexiCodecFeatureExtractor, FlexiCodecModel, optimize_for_cpu
from flexicodec_hf.conversion.convert import convert_codec, released_feature_extractor


THRESHOLD = 0.91
NUM_QUANTIZERS = 8


def make_audio(seconds: float, batch_size: int) -> torch.Tensor:
    """Noise in syllables, `(batch_size, num_samples)`: speed does not depend on what is said."""
    generator = torch.Generator().manual_seed(0)
    audio = 0.1 * torch.randn(batch_size, int(seconds * 16_000), generator=generator)
    envelope = torch.sin(torch.arange(audio.shape[1]) / 16_000 * 4 * 3.14159).abs()
    return audio * envelope


def make_repository(folder: Path) -> tuple[Path, object | None]:
    """A full-size codec with random weights: the reference's, converted, or ours where that is not installed."""
    if reference is None:
        torch.manual_seed(0)
        FlexiCodecModel(FlexiCodecConfig()).save_pretrained(folder)
        released_feature_extractor().save_pretrained(folder)
        return folder, None
    theirs = reference.build_codec(reference.codec_config(), reference.SENSEVOICE_FULL, seed=0)
    save_file(
        {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, folder / "source.safetensors"
    )
    convert_codec(folder / "source.safetensors", folder)
    return folder, theirs


class Ours:
    def __init__(self, folder: Path, dtype: torch.dtype, device: str, compiled: bool = False):
        self.device = device
        self.extractor = FlexiCodecFeatureExtractor.from_pretrained(folder)
        self.model = FlexiCodecModel.from_pretrained(folder, dtype=dtype).eval().to(device)
        if device == "cpu":
            optimize_for_cpu(self.model)
        self.decoder = torch.compile(self.model.decode) if compiled else self.model.decode

    def encode(self, audio: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = self.extractor(list(audio), sampling_rate=16_000, return_tensors="pt", device=self.device)
        return self.model.encode(**inputs, num_quantizers=NUM_QUANTIZERS, merging_threshold=THRESHOLD)

    def decode(self, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
        num_frames = int(encoded["token_lengths"].sum(dim=1).max())
        return self.decoder(
            encoded["audio_codes"], encoded["token_lengths"], encoded["audio_codes_mask"], num_frames=num_frames
        ).audio_values


class Theirs:
    def __init__(self, model: torch.nn.Module, device: str):
        self.model = model.to(device)
        self.extractor = reference.build_fbank()

    def encode(self, audio: torch.Tensor) -> dict[str, torch.Tensor]:
        return reference.encode(
            self.model, audio, num_quantizers=NUM_QUANTIZERS, merging_threshold=THRESHOLD, extractor=self.extractor
        )

    def decode(self, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
        return reference.decode(self.model, encoded)


def interleave(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each call, in rounds that take turns: in each, one call to warm up and two that count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for repeat in range(3):
                start = time.perf_counter()
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                if repeat > 0:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(folder: Path, who: str, batch_size: int, arguments: argparse.Namespace) -> float:
    """Peak resident set in GiB of a process that loads a codec and encodes and decodes once."""
    command = [sys.executable, __file__, "--memory-of", who, "--folder", str(folder), "--batch-size", str(batch_size)]
    command += ["--seconds", str(arguments.seconds), "--threads", str(arguments.threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_memory(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.folder)
    if arguments.memory_of == "reference":
        from safetensors.torch import load_file

        model = reference.build_codec(reference.codec_config(), reference.SENSEVOICE_FULL)
        model.load_state_dict(load_file(folder / "source.safetensors"))
        codec: Ours | Theirs = Theirs(model.eval(), "cpu")
    else:
        codec = Ours(folder, getattr(torch, arguments.memory_of), "cpu")
    codec.decode(codec.encode(make_audio(arguments.seconds, arguments.batch_size)))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 2**20)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="also time decode under torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        return measure_memory(arguments)

    with tempfile.TemporaryDirectory() as temporary:
        folder, model = make_repository(Path(temporary))
        codecs: dict[str, Ours | Theirs] = {} if model is None else {"reference": Theirs(model, arguments.device)}
        codecs["float32"] = Ours(folder, torch.float32, arguments.device)
        codecs["bfloat16"] = Ours(folder, torch.bfloat16, arguments.device)
        if arguments.compile:
            codecs["float32 compiled"] = Ours(folder, torch.float32, arguments.device, compiled=True)
        print(
            f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads, "
            f"{arguments.seconds:g} s of audio"
        )
        print(
            f"{'':18}{'batch':>6}{'encode s':>10}{'x real':>8}{'ratio':>7}"
            f"{'decode s':>10}{'x real':>8}{'ratio':>7}{'GiB':>7}"
        )
        for batch_size in arguments.batch_sizes:
            audio = make_audio(arguments.seconds, batch_size).to(arguments.device)
            encoded = {name: codec.encode(audio) for name, codec in codecs.items()}
            encode = interleave(
                {name: partial(codec.encode, audio) for name, codec in codecs.items() if "compiled" not in name},
                arguments.rounds,
                arguments.device,
            )
            decode = interleave(
                {name: partial(codec.decode, encoded[name]) for name, codec in codecs.items()},
                arguments.rounds,
                arguments.device,
            )
            base_encode, base_decode = encode.get("reference"), decode.get("reference")
            for name in codecs:
                row = f"{name:18}{batch_size:6}"
                for seconds, base in ((encode.get(name), base_encode), (decode[name], base_decode)):
                    if seconds is None:
                        row += " " * 25
                        continue
                    ratio = f"{base / seconds:.2f}" if base else "-"
                    row += f"{seconds:10.3f}{batch_size * arguments.seconds / seconds:8.1f}{ratio:>7}"
                if arguments.device == "cpu" and not arguments.no_memory and "compiled" not in name:
                    row += f"{peak_memory(folder, name, batch_size, arguments):7.2f}"
                print(row, flush=True)
            if model is not None and batch_size == 1:
                same = {
                    name: (encoded[name]["audio_codes"].cpu() == encoded["float32"]["audio_codes"].cpu())
                    .float()
                    .mean()
                    for name in ("bfloat16",)
                    if encoded[name]["audio_codes"].shape == encoded["float32"]["audio_codes"].shape
                }
                print("share of codes as in float32:", {k: round(v.item(), 3) for k, v in same.items()})


if __name__ == "__main__":
    main()
