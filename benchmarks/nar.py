"""Time the second stage of the TTS, tokens to mel to waveform, at full size with random weights.

    python benchmarks/nar.py                    # beside the reference, one run, same weights
    python benchmarks/nar.py --no-reference     # ours alone

The reference package must be installed for the comparison
(`benchmarks/requirements-reference.txt`). Its weights go through the converters, so the outputs are
compared too. On a CPU, ours runs with `optimize_for_cpu`.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def compare(contestants: dict[str, Callable[[int], torch.Tensor]], audio_seconds: float, arguments: Any) -> None:
    """Run all in turn, several rounds, so that a busy machine harms none of them alone; report each
    one's best.

    The first is what the others are measured by. Each takes a number of flow steps, and warms up
    with one.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    results = {}
    for run in contestants.values():
        run(1)
    for _ in range(arguments.repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            result = run(arguments.steps)
            if result.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
            results[name] = result.float().cpu()
    first, expected = next(iter(results.items()))
    for name, result in results.items():
        seconds = min(times[name])
        line = f"{name:<24} {seconds:8.2f} s   real-time factor {seconds / audio_seconds:6.3f}"
        if name != first:
            distance = (result - expected).norm() / expected.norm()
            line += f"   {min(times[first]) / seconds:5.2f}x {first}, relative distance {distance:.1e}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=5.0, help="seconds to speak")
    parser.add_argument("--prompt", type=float, default=3.0, help="seconds of the voice prompt")
    parser.add_argument("--steps", type=int, default=15, help="steps of the flow")
    parser.add_argument("--repeats", type=int, default=2, help="rounds, of which each one's shortest run counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stages", nargs="+", default=["voicebox", "vocoder"], choices=["voicebox", "vocoder"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--no-reference", action="store_true")
    arguments = parser.parse_args()

    # Must come before transformers is imported, see `reference.py`.
    reference = None
    if not arguments.no_reference:
        import reference
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for stage in arguments.stages:
        {"voicebox": time_voicebox, "vocoder": time_vocoder}[stage](reference, arguments)


def load(
    model_class: Any, convert: Callable[..., None], weights: dict[str, torch.Tensor], arguments: Any
) -> list[Any]:
    """Our model in every requested dtype, with the reference's weights, or random ones without it."""
    from safetensors.torch import save_file

    from flexicodec_hf import optimize_for_cpu

    optimize = optimize_for_cpu if arguments.device == "cpu" else lambda model: model
    if not weights:
        model = model_class(model_class.config_class()).eval()
        return [
            optimize(copy.deepcopy(model).to(arguments.device, getattr(torch, dtype))) for dtype in arguments.dtypes
        ]

    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "source.safetensors"), Path(folder, "converted")
        save_file(weights, source)
        convert(source, output)
        source.unlink()
        return [
            optimize(model_class.from_pretrained(output, dtype=dtype).to(arguments.device).eval())
            for dtype in arguments.dtypes
        ]


def time_voicebox(reference: Any, arguments: argparse.Namespace) -> None:
    from flexicodec_hf import optimize_for_cpu
    from flexicodec_hf.conversion import convert_voicebox
    from flexicodec_hf.modeling_flexicodec_voicebox import FlexiCodecVoiceboxModel

    device = arguments.device
    num_tokens, num_prompt_tokens = round(12.5 * arguments.target), round(12.5 * arguments.prompt)
    codes = torch.randint(32768, (1, num_prompt_tokens + num_tokens), device=device)
    prompt_mel = torch.randn(1, 4 * num_prompt_tokens, 128, device=device)
    noise = torch.randn(1, 4 * num_tokens, 128, device=device)
    contestants: dict[str, Callable[[int], torch.Tensor]] = {}
    weights = {}
    if reference is not None:
        theirs = reference.build_voicebox(reference.VOICEBOX_FULL, seed=0).to(device)
        weights = {f"voicebox_model.{name}": tensor for name, tensor in theirs.state_dict().items()}

        def run_reference(steps: int) -> torch.Tensor:
            condition = theirs.cond_emb(codes).repeat_interleave(4, dim=1)
            return reference.reverse_diffusion(
                theirs, condition, prompt_mel, noise, n_timesteps=steps, cfg=2.0, rescale_cfg=0.75
            )

        contestants["voicebox reference"] = run_reference
    models = dict(
        zip(arguments.dtypes, load(FlexiCodecVoiceboxModel, convert_voicebox, weights, arguments), strict=True)
    )
    if device == "cpu" and "bfloat16" in models:
        models["int8"] = optimize_for_cpu(copy.deepcopy(models["bfloat16"]), dtype="int8")
    for dtype, model in models.items():

        def run(steps: int, model: Any = model) -> torch.Tensor:
            return model.sample(
                codes[:, num_prompt_tokens:],
                prompt_codes=codes[:, :num_prompt_tokens],
                prompt_mel=prompt_mel,
                noise=noise,
                num_inference_steps=steps,
            ).mel

        contestants[f"voicebox {dtype}"] = run
    compare(contestants, arguments.target, arguments)


@torch.no_grad()
def time_vocoder(reference: Any, arguments: argparse.Namespace) -> None:
    from flexicodec_hf.conversion import convert_vocoder
    from flexicodec_hf.modeling_flexicodec_vocoder import FlexiCodecVocoderModel

    mel = torch.randn(1, round(50 * arguments.target), 128, device=arguments.device)
    contestants: dict[str, Callable[[int], torch.Tensor]] = {}
    weights = {}
    if reference is not None:
        theirs = reference.build_vocos(reference.VOCOS_FULL, seed=0).to(arguments.device)
        weights = dict(theirs.state_dict())
        contestants["vocoder reference"] = lambda _: theirs(mel.transpose(1, 2)).flatten()
    models = load(FlexiCodecVocoderModel, convert_vocoder, weights, arguments)
    for model, dtype in zip(models, arguments.dtypes, strict=True):
        contestants[f"vocoder {dtype}"] = lambda _, model=model: model(mel).audio_values.flatten()
    compare(contestants, arguments.target, arguments)


if __name__ == "__main__":
    main()
