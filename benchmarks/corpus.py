"""Throughput of `tokenize_corpus` beside a plain loop over files, with the same random weights in
the same run.

    python benchmarks/corpus.py [--clips 128] [--merging-thresholds 1.0 0.91 0.86] [--threads 2]

The plain loop encodes one file at a time, once for each threshold. The codec is half as deep as the
released one in every part (`--full`: as deep). Times exclude the loading of the model; rows that
differ from those of the loop are counted. CPU seconds are the sum over threads: compare these, with
`--threads 1`, on a machine that is not quiet.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch

from flexicodec_hf import FlexiCodecConfig, FlexiCodecFeatureExtractor, FlexiCodecModel, optimize_for_cpu
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.conversion.convert import released_feature_extractor
from flexicodec_hf.data.sources import load_speech
from flexicodec_hf.data.tokenization import tokenize_corpus


def make_clips(folder: Path, count: int) -> float:
    """Noise in syllables, 1 to 8 seconds a file; returns the seconds of all."""
    random = np.random.default_rng(0)
    seconds = random.uniform(1, 8, count)
    for i, length in enumerate(seconds):
        time = np.arange(int(length * 16_000)) / 16_000
        wave = 0.1 * random.standard_normal(len(time)) * np.abs(np.sin(np.pi * 4 * time))
        soundfile.write(folder / f"{i:05d}.flac", wave, 16_000)
    return float(seconds.sum())


def make_codec(folder: Path, full: bool) -> None:
    torch.manual_seed(0)
    # Tokenizing needs no decoder: a small one saves memory.
    sizes: dict[str, Any] = {"decoder_hidden_size": 96, "num_bottleneck_layers": 1}
    if not full:
        sizes |= {
            "semantic_model_config": {"num_hidden_layers": 25},
            "num_aggregator_layers": 3,
            "num_convnext_layers": 2,
            "num_quantizers": 13,
        }
    FlexiCodecModel(FlexiCodecConfig(**sizes)).save_pretrained(folder)
    released_feature_extractor().save_pretrained(folder)


def load(folder: Path, dtype: str) -> tuple[FlexiCodecModel, FlexiCodecFeatureExtractor]:
    codec = FlexiCodecModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return optimize_for_cpu(codec), FlexiCodecFeatureExtractor.from_pretrained(folder)


@torch.inference_mode()
def plain_loop(
    clips: Path, codec: FlexiCodecModel, feature_extractor: FlexiCodecFeatureExtractor, thresholds: list[float]
) -> dict[tuple[str, float], list[list[int]]]:
    tokens = {}
    for threshold in thresholds:
        for path in sorted(clips.glob("*.flac")):
            audio = read_audio(path, 16_000).waveform
            inputs = feature_extractor(audio, sampling_rate=16_000, return_tensors="pt")
            encoded = codec.encode(**inputs, merging_threshold=threshold)
            tokens[path.name, threshold] = encoded.audio_codes[0].tolist()
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--merging-thresholds", type=float, nargs="+", default=[1.0, 0.91, 0.86])
    parser.add_argument("--batch-seconds", type=float, default=60.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "clips").mkdir()
        seconds = make_clips(folder / "clips", arguments.clips)
        make_codec(folder / "codec", arguments.full)
        print(
            f"torch {torch.__version__}, {arguments.threads} threads, {arguments.dtype}, {arguments.clips} clips, "
            f"{seconds / 60:.1f} minutes, thresholds {arguments.merging_thresholds}",
            flush=True,
        )
        codec, feature_extractor = load(folder / "codec", "float32")
        loop_codec = (codec, feature_extractor)
        plain_loop(folder / "clips", *loop_codec, thresholds=[])
        codec.encode(**feature_extractor(np.zeros(16_000, np.float32), sampling_rate=16_000, return_tensors="pt"))
        start, cpu_start = time.perf_counter(), time.process_time()
        expected = plain_loop(folder / "clips", *loop_codec, thresholds=arguments.merging_thresholds)
        base, cpu_base = time.perf_counter() - start, time.process_time() - cpu_start
        print(f"{'plain loop':14}{base:8.1f} s {cpu_base:8.1f} CPU s", flush=True)

        codec, feature_extractor = load(folder / "codec", arguments.dtype)
        start, cpu_start = time.perf_counter(), time.process_time()
        tokenize_corpus(
            load_speech(folder / "clips"),
            folder / "tokens",
            codec,
            feature_extractor,
            merging_thresholds=arguments.merging_thresholds,
            batch_seconds=arguments.batch_seconds,
        )
        took, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        table = pq.read_table(folder / "tokens" / "data").to_pylist()
        rows = {(row["id"], row["merging_threshold"]): row["audio_codes"] for row in table}
        differ = sum(rows[key] != codes for key, codes in expected.items())
        print(
            f"{'tokenize':14}{took:8.1f} s {cpu:8.1f} CPU s   {base / took:.2f} times the loop "
            f"({cpu_base / cpu:.2f} by CPU), {seconds / took:.1f} x real time; {differ} of {len(rows)} rows differ",
            flush=True,
        )


if __name__ == "__main__":
    main()
