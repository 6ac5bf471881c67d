"""Reconstruct recorded speech at several rates of tokens, and print what each costs.

python examples/demo.py                              # a small model with random weights
python examples/demo.py --model DIR my_speech.flac   # a converted model and your own recording
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoFeatureExtractor, AutoModel

from flexicodec_hf import FlexiCodecConfig, FlexiCodecModel
from flexicodec_hf.audio import read_audio, write_audio
from flexicodec_hf.conversion.codec import released_feature_extractor


CLIP = Path(__file__).parent.parent / "tests" / "audio" / "librivox_austen_0870.flac"
SETTINGS = (
    ("merging_threshold", 1.0),
    ("merging_threshold", 0.91),
    ("target_frame_rate", 8.3),
    ("target_frame_rate", 6.25),
    ("target_frame_rate", 4.5),
)
ROWS = (1, 8)  # the semantic row alone, and with seven acoustic rows


def make_small_model(directory: Path) -> None:
    """Save a codec of the released shape in small, with random weights."""
    torch.manual_seed(0)
    config = FlexiCodecConfig(
        semantic_model_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
        hidden_size=64,
        encoder_hidden_size=4,
        decoder_hidden_size=128,
        aggregator_hidden_size=64,
        aggregator_intermediate_size=128,
        num_aggregator_layers=2,
        convnext_hidden_size=64,
        convnext_intermediate_size=128,
        num_convnext_layers=2,
        bottleneck_hidden_size=64,
        bottleneck_intermediate_size=128,
        num_bottleneck_layers=4,
        initializer_range=0.1,
    )
    FlexiCodecModel(config).save_pretrained(directory)
    released_feature_extractor().save_pretrained(directory)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Reconstruct recorded speech at several rates of tokens.")
    parser.add_argument("clip", type=Path, nargs="?", default=CLIP, help="audio file (default: %(default)s)")
    parser.add_argument("--model", metavar="ID_OR_DIR", help="converted model (default: a small random one)")
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="for the sound (default: %(default)s)")
    args = parser.parse_args(argv)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        make_small_model(args.output_dir / "model")
    model_id = args.model or args.output_dir / "model"
    feature_extractor = AutoFeatureExtractor.from_pretrained(model_id)
    model = AutoModel.from_pretrained(model_id).eval()
    config = model.config

    clip = read_audio(args.clip, config.sampling_rate)
    inputs = feature_extractor(clip.waveform, sampling_rate=clip.sampling_rate, return_tensors="pt")
    write_audio(args.output_dir / "original.wav", clip.waveform, clip.sampling_rate)
    print(f"\n{args.clip.name}: {', '.join([f'{clip.seconds:.2f} s', *clip.changes])}\n")

    columns = ["tokens", "tokens/s", "bits/s, 1 row", "bits/s, 8 rows", "RTF of encode", "RTF of decode"]
    print("  ".join([f"{'setting':22}", *columns]))
    model.decode(**model.encode(**inputs))  # the first call is slow
    for name, value in SETTINGS:
        start = time.perf_counter()
        encoded = model.encode(**inputs, num_quantizers=max(ROWS), **{name: value})
        encode_seconds = time.perf_counter() - start
        for rows in ROWS:
            start = time.perf_counter()
            decoded = model.decode(encoded.audio_codes[:, :rows], encoded.token_lengths)
            decode_seconds = time.perf_counter() - start
            path = args.output_dir / f"{name}_{value}_{rows}.wav"
            write_audio(path, decoded.audio_values[0, 0, : clip.num_samples].numpy(), clip.sampling_rate)
        num_tokens = encoded.audio_codes.shape[-1]
        rate = num_tokens / clip.seconds
        cells = [f"{num_tokens}", f"{rate:.2f}"]
        cells += [f"{rate * config.bits_per_token(rows):.0f}" for rows in ROWS]
        cells += [f"{seconds / clip.seconds:.3f}" for seconds in (encode_seconds, decode_seconds)]
        cells = [cell.rjust(len(column)) for cell, column in zip(cells, columns, strict=True)]
        print("  ".join([f"{name} {value}".ljust(22), *cells]))

    print(
        "\nRTF: seconds of computing per second of audio (decode: with 8 rows).\n"
        f"The sound is in {args.output_dir}/: original.wav, and each setting with 1 and with 8 rows of codes."
    )
    if args.model is None:
        print(
            "This model is a small one with RANDOM weights: what it makes is noise, and the threshold says nothing. The rates "
            "and bits are those of a trained codec; the speed is not.\nPass `--model` a converted one: "
            "`flexicodec-hf convert --repo jiaqili3/flexicodec --output-dir DIR`."
        )


if __name__ == "__main__":
    main()
