"""Text to speech at full size with random weights: the real-time factor of a sentence of 5 s that is made at
once; and of sentences that are heard while they are made, time to first audio, real-time factor, and gaps, as
percentiles.

    python benchmarks/tts.py [--modes codec voicebox fast] [--dtype int8] [--sentences 5]

A listener starts to play at the first chunk; a gap is the longest time for which there is nothing
to play. Random weights neither end nor know durations: sentences have 8.3 tokens a second, of one
or two frames each. The voice is 3 s long, and its text has 40 ids.
"""

import argparse
import threading
import time
from collections.abc import Iterator

import torch
from listening import measure, summary

from flexicodec_hf import (
    FlexiCodecAudioStreamer,
    FlexiCodecForTextToSpeech,
    FlexiCodecTTSConfig,
    FlexiCodecVoice,
    optimize_for_cpu,
)


THRESHOLD = 0.91
MODES = {
    "codec": {"use_nar": False},
    "voicebox": {},
    "fast": {"preset": "fast"},
    # What a distilled Voicebox takes.
    "distilled": {"num_inference_steps": 4, "guidance_scale": 0.0},
}


def build(dtype: torch.dtype) -> FlexiCodecForTextToSpeech:
    torch.manual_seed(0)
    config = FlexiCodecTTSConfig(voicebox_config={}, vocoder_config={})
    model = FlexiCodecForTextToSpeech(config).eval()
    with torch.no_grad():
        model.ar.duration_head.bias[1:3] += 100
    for part in (model.ar, model.voicebox, model.vocoder):
        part.to(dtype)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 3, (25,), generator=generator)
    model.voices["voice"] = FlexiCodecVoice(
        {THRESHOLD: (torch.randint(0, 32768, (25,), generator=generator), lengths)},
        torch.randn(4 * int(lengths.sum()), 128, generator=generator),
        torch.randint(0, 50000, (40,), generator=generator),
    )
    return model


def sentence(seconds: float) -> dict[str, object]:
    """Arguments of `generate` for about so many seconds of speech."""
    tokens = round(seconds * 8.3)
    return {
        "input_ids": torch.randint(0, 50000, (1, round(seconds * 15)), generator=torch.Generator().manual_seed(1)),
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "merging_threshold": THRESHOLD,
        "seed": 0,
    }


def whole(model: FlexiCodecForTextToSpeech, seconds: float, **options) -> float:
    """Real-time factor of a sentence that is made at once."""
    start = time.perf_counter()
    output = model.generate(**sentence(seconds), return_dict_in_generate=True, **options)
    return (time.perf_counter() - start) * int(output.sampling_rate[0]) / output.audio.shape[-1]


def chunks(model: FlexiCodecForTextToSpeech, seconds: float, **options) -> Iterator[float]:
    """Speak a sentence: the seconds of each chunk, as it comes."""
    streamer = FlexiCodecAudioStreamer()
    thread = threading.Thread(
        target=model.generate, kwargs={"streamer": streamer, **sentence(seconds), **options}, daemon=True
    )
    thread.start()
    for chunk in streamer:
        yield len(chunk) / streamer.sampling_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int8"], default="bfloat16")
    parser.add_argument("--sentences", type=int, default=5, help="their lengths are spread from 2 to 10 seconds")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    is_int8 = arguments.dtype == "int8"
    model = build(torch.bfloat16 if is_int8 else getattr(torch, arguments.dtype))
    optimize_for_cpu(model, dtype="int8" if is_int8 else None)
    for mode in arguments.modes:
        whole(model, 2, **MODES[mode])  # warms up
    for mode in arguments.modes:
        factor = min(whole(model, 5, **MODES[mode]) for _ in range(2))
        print(f"{mode:10} | at once, 5 s: real-time factor {factor:.2f}", flush=True)
    lengths = torch.linspace(2, 10, arguments.sentences).tolist()
    results: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in arguments.modes}
    for length in lengths:  # modes take turns
        for mode in arguments.modes:
            results[mode].append(measure(chunks(model, length, **MODES[mode])))
    print(f"{arguments.sentences} sentences, {arguments.dtype}: 50 % / 90 % / most")
    for mode, rows in results.items():
        print(f"{mode:10}{summary(rows)}", flush=True)


if __name__ == "__main__":
    main()
