"""How far fewer evaluations of a Voicebox are from the solution of its flow: distance of the mel (or latent)
to that of 64 steps, for each grid.

    python benchmarks/tts_flow.py REPOSITORY VOICE.wav SPEECH.wav [SPEECH.wav ...]

The tokens of the recordings are spoken in the voice, from the same noise each time. An evaluation
is one pass of the model, so a step with guidance takes two. The weights must be trained: the flow
of random ones is not that of speech.
"""

import argparse

import torch

from flexicodec_hf import FlexiCodecForTextToSpeech, FlexiCodecTTSProcessor, optimize_for_cpu


RUNS = [
    ("uniform", 15, (0.0, 1.0)),
    ("uniform", 7, (0.0, 1.0)),
    ("sway", 7, (0.0, 1.0)),
    ("epss", 7, (0.0, 1.0)),
    ("epss", 7, (0.0, 0.5)),
    ("epss", 7, (0.02, 1.0)),
    ("epss", 5, (0.0, 1.0)),
    ("sway", 4, (0.0, 1.0)),
]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository")
    parser.add_argument("voice")
    parser.add_argument("speech", nargs="+")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    arguments = parser.parse_args()
    model = optimize_for_cpu(FlexiCodecForTextToSpeech.from_pretrained(arguments.repository).eval())
    processor = FlexiCodecTTSProcessor.from_pretrained(arguments.repository)
    threshold = model.config.default_merging_threshold
    voice = model.encode_voice(**processor(audio=arguments.voice))
    prompt = model._voicebox_prompt([voice], threshold)
    evaluations = 0

    def count(*_: object) -> None:
        nonlocal evaluations
        evaluations += 1

    model.voicebox.norm.register_forward_hook(count)
    distances: dict[tuple, list[float]] = {run: [] for run in RUNS}
    passes = {}
    for path in arguments.speech:
        inputs = processor(audio=path)
        encoded = model.codec.encode(
            inputs["reference_input_values"].reshape(1, 1, -1),
            inputs["reference_input_features"],
            num_quantizers=1,
            merging_threshold=threshold,
        )
        frames = int(encoded.token_lengths.sum()) * model.voicebox.config.upsample_factor
        noise = model.voicebox.draw_noise([frames], torch.Generator().manual_seed(0))

        def sample(grid: str, steps: int, interval: tuple[float, float], encoded=encoded, noise=noise) -> torch.Tensor:
            return model.voicebox.sample(
                encoded.audio_codes[:, 0],
                encoded.token_lengths,
                **prompt,
                noise=noise,
                num_inference_steps=steps,
                time_grid=grid,
                guidance_interval=interval,
                guidance_scale=arguments.guidance_scale,
            ).mel

        exact = sample("sway", 64, (0.0, 1.0))
        for run in RUNS:
            evaluations = 0
            distances[run].append(float((sample(*run) - exact).norm() / exact.norm()))
            passes[run] = evaluations
    for (grid, steps, interval), values in distances.items():
        mean = sum(values) / len(values)
        number = passes[grid, steps, interval]
        print(f"{grid:8} {steps:3} steps, guidance {interval}: {number} evaluations, distance {mean:.4f}")


if __name__ == "__main__":
    main()
