"""Reconstruct recorded speech at several token rates, speak a sentence, and show the results.

python examples/demo.py                              # the small checkpoint of this repository
python examples/demo.py --model DIR my_speech.flac   # another model and your own recording
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoFeatureExtractor, AutoModel, pipeline

from flexicodec_hf import FlexiCodecFeatureExtractor, FlexiCodecModel
from flexicodec_hf.audio_flexicodec import read_audio, write_audio
from flexicodec_hf.evaluation.metrics import pesq, stoi
from flexicodec_hf.training.samples import draw_spectrogram


ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "flexicodec-tiny"
CLIP = ROOT / "tests" / "audio" / "librivox_austen_0870.flac"
TEXT = "I hope you will be very happy in your new house."
RATES = (12.5, 8.3, 6.25)  # tokens per second

COLUMNS = ("tokens/s", "codebooks", "bits/s", "STOI", "PESQ", "encode RTF", "decode RTF")


@torch.inference_mode()
def reconstruct(
    model: FlexiCodecModel, feature_extractor: FlexiCodecFeatureExtractor, waveform: np.ndarray, folder: Path
) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Print a row for each rate, write the audio, and return it with the start times of its tokens in seconds."""
    config = model.config
    seconds = len(waveform) / config.sampling_rate
    inputs = feature_extractor(waveform, sampling_rate=config.sampling_rate, return_tensors="pt")
    model.decode(**model.encode(**inputs))  # the first call is slow
    print("  ".join(COLUMNS))
    made = {}
    for rate in RATES:
        start = time.perf_counter()
        encoded = model.encode(**inputs, target_frame_rate=rate)
        encode_seconds = time.perf_counter() - start
        for num_codebooks in (1, config.num_quantizers):
            start = time.perf_counter()
            decoded = model.decode(encoded.audio_codes[:, :num_codebooks], encoded.token_lengths)
            decode_seconds = time.perf_counter() - start
            # The last frame may be cut short on both sides.
            output = decoded.audio_values[0, 0, : len(waveform)].numpy()
            original = waveform[: len(output)]
            write_audio(folder / f"{rate}_tokens_{num_codebooks}_codebooks.wav", output, config.sampling_rate)
            tokens_per_second = encoded.audio_codes.shape[-1] / seconds
            bits_per_second = tokens_per_second * config.bits_per_token(num_codebooks)
            cells = [f"{tokens_per_second:.2f}", str(num_codebooks), f"{bits_per_second:.0f}"]
            cells += [f"{stoi(original, output):.3f}", f"{pesq(original, output, 'nb'):.2f}"]
            cells += [f"{encode_seconds / seconds:.4f}", f"{decode_seconds / seconds:.4f}"]
            print("  ".join(cell.rjust(len(column)) for cell, column in zip(cells, COLUMNS, strict=True)))
        starts = (encoded.token_lengths[0].cumsum(0) - encoded.token_lengths[0]) / config.frame_rate
        made[rate] = output, starts.numpy()
    return made


def draw(
    path: Path, waveform: np.ndarray, made: dict[float, tuple[np.ndarray, np.ndarray]], sampling_rate: int
) -> None:
    """Draw the waveform, its spectrogram, and the spectrogram of each reconstruction with a line at each token."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    first, second, *others = figure.subplots(2 + len(made), sharex=True)
    first.plot(np.arange(len(waveform)) / sampling_rate, waveform, linewidth=0.4)
    first.set(title="recording", xlim=(0, len(waveform) / sampling_rate))
    draw_spectrogram(second, waveform, sampling_rate)
    for axis, (rate, (output, starts)) in zip(others, made.items(), strict=True):
        draw_spectrogram(axis, output, sampling_rate)
        axis.vlines(starts, 0, sampling_rate / 2000, colors="white", linewidth=0.7)
        axis.set_title(f"reconstructed from {len(starts)} tokens, {rate:g} a second")
    others[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Reconstruct recorded speech at several rates, and speak a sentence.")
    parser.add_argument("clip", type=Path, nargs="?", default=CLIP, help="audio file (default: %(default)s)")
    parser.add_argument("--model", metavar="ID_OR_DIR", default=CHECKPOINT, help="(default: %(default)s)")
    parser.add_argument("--text", default=TEXT, help="what to speak (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    feature_extractor = AutoFeatureExtractor.from_pretrained(args.model)
    codec = AutoModel.from_pretrained(args.model).eval()
    clip = read_audio(args.clip, codec.config.sampling_rate)
    print(f"\n{args.clip.name}: {', '.join([f'{clip.seconds:.2f} s', *clip.changes])}\n")
    write_audio(args.output_dir / "original.wav", clip.waveform, clip.sampling_rate)
    made = reconstruct(codec, feature_extractor, clip.waveform, args.output_dir)
    draw(args.output_dir / "demo.png", clip.waveform, made, clip.sampling_rate)

    tts = pipeline("text-to-speech", model=str(args.model))
    start = time.perf_counter()
    speech = tts(args.text, generate_kwargs={"seed": 0})
    spoken_seconds = speech["audio"].shape[-1] / speech["sampling_rate"]
    real_time_factor = (time.perf_counter() - start) / spoken_seconds
    write_audio(args.output_dir / "spoken.wav", speech["audio"].reshape(-1), speech["sampling_rate"])
    print(f"\n{args.text!r}: {spoken_seconds:.2f} s of speech, RTF {real_time_factor:.2f}")
    print(
        f"\nRTF: seconds of computing per second of audio. In {args.output_dir}/: the recording, its reconstructions\n"
        "from the semantic codebook and from all codebooks, the picture demo.png, and spoken.wav."
    )


if __name__ == "__main__":
    main()
