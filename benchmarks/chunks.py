"""
Attention to chunks against attention to the whole: how many codes agree, and what STOI says of the
result (docs/codec.md).
"""

import argparse

import soundfile
import torch
from pystoi import stoi

from flexicodec_hf import FlexiCodecFeatureExtractor, FlexiCodecModel, optimize_for_cpu
from flexicodec_hf.modeling_flexicodec import frame_to_token


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="checkpoints/flexicodec-tiny")
    parser.add_argument("--audio", default="tests/audio/librivox_long.flac")
    parser.add_argument("--chunk_length_s", type=float, default=10.0)
    parser.add_argument("--contexts", type=float, nargs="+", default=[5.0, 10.0])
    args = parser.parse_args()

    codec = optimize_for_cpu(FlexiCodecModel.from_pretrained(args.model).eval())
    feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(args.model)
    audio, rate = soundfile.read(args.audio, dtype="float32")
    inputs = feature_extractor(audio, sampling_rate=rate, return_tensors="pt")

    def codes_of_frames(encoded):
        lengths = encoded.token_lengths
        return encoded.audio_codes[0, :, frame_to_token(lengths, int(lengths.sum()))[0]]

    def score(encoded, **chunking):
        decoded = codec.decode(**encoded, **chunking).audio_values[0, 0].numpy()
        length = min(len(audio), len(decoded))
        return stoi(audio[:length], decoded[:length], rate)

    whole = codec.encode(**inputs)
    expected = codes_of_frames(whole)
    print(f"whole: STOI {score(whole):.4f}")
    # From here on, the recording is too long for attention to all of it.
    codec.config.semantic_model_config.max_position_embeddings = inputs["input_features"].shape[1]
    chunk_frames = round(args.chunk_length_s * codec.config.frame_rate / 3) * 3
    position = torch.arange(expected.shape[1])
    last_seam = (expected.shape[1] - 1) // chunk_frames * chunk_frames
    to_seam = torch.minimum(position % chunk_frames, chunk_frames - position % chunk_frames)
    inner = (position >= chunk_frames // 2) & (position < last_seam + chunk_frames // 2)
    near = (to_seam <= codec.config.frame_rate) & inner
    print("| context | same semantic code | same code, all codebooks | near | elsewhere | STOI, whole | in chunks |")
    for context in args.contexts:
        chunking = {"chunk_length_s": args.chunk_length_s, "chunk_context_s": context}
        encoded = codec.encode(**inputs, **chunking)
        same = (codes_of_frames(encoded) == expected).float()
        parts = [part.mean().item() for part in (same[0], same, same[0, near], same[0, ~near])]
        cells = [f"{context:g} s", *(f"{part:.0%}" for part in parts)]
        print("|", " | ".join([*cells, f"{score(encoded):.3f}", f"{score(encoded, **chunking):.3f}"]), "|")


if __name__ == "__main__":
    main()
