"""Tokens per second of the autoregressive model, at full size with random weights.

The prompt is 100 text ids and 150 speech tokens. A step must read every weight of the language
model once, so
one stream cannot be faster than memory bandwidth over the bytes of those weights: the share of that
limit is printed. If the PyPI package `flexicodec` is installed (see README.md here), it runs on the
same weights. On a CPU, ours runs with `optimize_for_cpu`.

    python benchmarks/ar.py --dtype float32 bfloat16 --streams 1 8

`--loop` measures the loop on the device (`static_loop`) beside the stock one, and requests of different
lengths that join and leave it beside whole batches of them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch


try:
    import reference
except ModuleNotFoundError:
    reference = None

from safetensors.torch import save_file
from transformers import CompileConfig

from flexicodec_hf.configuration_flexicodec_ar import FlexiCodecARConfig
from flexicodec_hf.conversion import convert_ar
from flexicodec_hf.cpu_flexicodec import optimize_for_cpu
from flexicodec_hf.modeling_flexicodec_ar import FlexiCodecARForConditionalGeneration


TEXT_LENGTH, PROMPT_LENGTH, THRESHOLD = 100, 150, 0.86


def bandwidth(device: str) -> float:
    """Bytes a second that a device reads from its memory: the best of some sums over 256 MB."""
    values = torch.ones(64 * 2**20, device=device)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        values.sum().item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best


def bytes_per_step(model: FlexiCodecARForConditionalGeneration) -> int:
    """Bytes of the weights that a step reads: the decoder's, less the kept positions, and the two heads'."""
    modules = (model.model.decoder, model.lm_head, model.duration_head)
    weights = [item for module in modules for item in module.named_parameters()]
    layers = [layer for module in modules for layer in module.modules()]
    packed = sum(layer.in_features * layer.out_features for layer in layers if hasattr(layer, "packed"))  # int8
    return packed + sum(weight.nbytes for name, weight in weights if "relative_k_proj" not in name)


def prompt(streams: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "text_ids": torch.randint(0, 50000, (1, TEXT_LENGTH), generator=generator).expand(streams, -1),
        "codes": torch.randint(0, 32768, (1, PROMPT_LENGTH), generator=generator).expand(streams, -1),
        "token_lengths": torch.randint(1, 9, (1, PROMPT_LENGTH), generator=generator).expand(streams, -1),
    }


@torch.inference_mode()
def time_ours(
    model: FlexiCodecARForConditionalGeneration,
    streams: int,
    tokens: int,
    repeats: int,
    cache: str,
    compiled: bool,
) -> tuple[float, torch.Tensor]:
    """Seconds of the fastest whole call, and the tokens of the first stream."""
    inputs = model.build_inputs(**prompt(streams), merging_threshold=THRESHOLD)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    arguments = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    if compiled:
        torch.compiler.reset()
        how = {"mode": None, "options": {"freezing": True}} if model.device.type == "cpu" else {}
        arguments["compile_config"] = CompileConfig(fullgraph=True, dynamic=False, **how)
        model.generate(**inputs, **arguments, cache_implementation=cache)  # compiles
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        output = model.generate(**inputs, **arguments, cache_implementation=cache, return_dict_in_generate=True)
        first = output.sequences[0, -tokens:].cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds), first


@torch.inference_mode()
def time_loop(
    model: FlexiCodecARForConditionalGeneration, streams: int, tokens: int, repeats: int, cache: str
) -> dict[str, float]:
    """Tokens per second of each way, best of some rounds, in which they take turns."""
    inputs = model.build_inputs(**prompt(streams), merging_threshold=THRESHOLD)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    # Three times as many requests as streams, of half to one and a half times the tokens.
    lengths = [tokens // 2 + tokens * (7 * index % 11) // 10 for index in range(3 * streams)]
    arguments = {"do_sample": False, "max_token_text_ratio": 1000}

    def batch(length: int, **how: object) -> None:
        model.generate(**inputs, **arguments, min_new_tokens=length, max_new_tokens=length, **how)

    def batches() -> None:
        for start in range(0, len(lengths), streams):
            batch(max(lengths[start : start + streams]), cache_implementation=cache)

    loop = model.make_loop(streams, inputs["input_ids"].shape[1] + max(lengths), **arguments)

    def joining() -> None:
        waiting = list(lengths)
        while waiting or loop.num_running:
            while waiting and loop.num_free:
                length = waiting.pop(0)
                loop.add(**one, min_new_tokens=length, max_new_tokens=length)
            loop.advance()

    ways = {
        "stock loop": (lambda: batch(tokens, cache_implementation=cache), streams * tokens),
        "static loop": (lambda: batch(tokens, static_loop=True), streams * tokens),
        "mixed lengths, in batches": (batches, sum(lengths)),
        "mixed lengths, joining": (joining, sum(lengths)),
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(1 + repeats):  # the first round makes buffers, and records
        for name, (run, count) in ways.items():
            start = time.perf_counter()
            run()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            best[name] = max(best[name], count / (time.perf_counter() - start))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "int8"], default=["float32", "bfloat16"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=300, help="new tokens of each stream")
    parser.add_argument("--repeats", type=int, default=2, help="calls of ours, of which the fastest counts")
    parser.add_argument("--cache", choices=["dynamic", "static"], default="static")
    parser.add_argument("--compile", action="store_true", help="compile the step, with the weights laid out for it")
    parser.add_argument("--loop", action="store_true", help="the loop on the device, instead of the reference")
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of ours; the reference stays on the CPU"
    )
    arguments = parser.parse_args()
    arguments.dtype.sort(key=lambda name: name == "int8")
    torch.set_num_threads(arguments.threads)

    base, expected = None, None
    if reference is None or arguments.loop or arguments.small:
        print("without the reference: `flexicodec` is not installed, or this is not about it")
        size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = FlexiCodecARConfig(text_encoder_config=size, **size) if arguments.small else FlexiCodecARConfig()
        model = FlexiCodecARForConditionalGeneration(config).eval()
    else:
        theirs = reference.build_ar(reference.AR_FULL, seed=0)
        ids = prompt(1)
        start = time.perf_counter()
        result = reference.generate_ar(
            theirs, ids["text_ids"], arguments.tokens, THRESHOLD, ids["codes"], ids["token_lengths"]
        )
        base = arguments.tokens / (time.perf_counter() - start)
        expected = result["speech_tokens"][0]
        print(f"reference  float32   1 stream   {base:6.2f} tokens/s ({len(expected)} tokens)", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "artts.safetensors"
            save_file(
                {f"transformer_lm.{name}": tensor.contiguous() for name, tensor in theirs.state_dict().items()}, source
            )
            del theirs
            model = convert_ar(source, Path(folder) / "model")

    model = model.to(arguments.device)
    if arguments.device == "cpu":
        optimize_for_cpu(model)
    for dtype in arguments.dtype:
        if dtype == "int8":
            model = optimize_for_cpu(model.to(torch.bfloat16), dtype="int8")  # for good: it comes last
        else:
            model = model.to(getattr(torch, dtype))
        for streams in arguments.streams:
            if arguments.loop:
                rates = time_loop(model, streams, arguments.tokens, arguments.repeats, arguments.cache)
                shown = " | ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
                print(f"{dtype:9} {streams} stream(s), tokens/s: {shown}", flush=True)
                continue
            speed = bandwidth(arguments.device)
            seconds, tokens = time_ours(
                model, streams, arguments.tokens, arguments.repeats, arguments.cache, arguments.compile
            )
            total = streams * arguments.tokens / seconds
            limit = speed / bytes_per_step(model)
            line = f"ours       {dtype:9} {streams} stream(s) {total:6.2f} tokens/s"
            line += f" | memory {speed / 1e9:.1f} GB/s, limit {limit:.1f} steps/s, share {total / streams / limit:.0%}"
            if base is not None:
                line += f" | {total / base:.1f} x the reference"
            if expected is not None and dtype == "float32" and streams == 1:
                line += f" | same tokens: {torch.equal(tokens, expected)}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
