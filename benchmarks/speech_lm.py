"""What the token rate costs a language model: sequence length, attention, and speed of training, on
the same clips.

    python benchmarks/speech_lm.py [--clips DIR] [--codec DIR] [--window 20] [--rounds 3] \
        [--threads 1] [--device cpu|cuda]

FlexiCodec at 12.5, 8.3 and 6.25 tokens per second (one position each, durations beside them) stands
beside what other codecs give for the same seconds: 12.5 frames per second of 8 codes of 2,048, flattened, as Mimi has
them, and 50 codes of 65,536 per second, as X-Codec 2 has them. A small Llama with the vocabulary
that each needs is trained on windows of the same seconds of speech; its weights, and the codec's if
none is given, are random, which speed does not depend on. On a CPU the clock is the processor time
of the process, so that neighbors on the machine matter little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from flexicodec_hf import FlexiCodecConfig, FlexiCodecFeatureExtractor, FlexiCodecModel
from flexicodec_hf.audio_flexicodec import read_audio
from flexicodec_hf.conversion.convert import released_feature_extractor
from flexicodec_hf.speech_lm import duration_lm_class


CLIPS = Path(__file__).parent.parent / "tests" / "audio"
FLEXICODEC_RATES = (12.5, 8.3, 6.25)


@dataclass
class Setting:
    name: str
    vocab_size: int
    positions_per_second: float
    token_lengths: Tensor | None = None

    def batch(self, seconds: float, batch_size: int, device: str) -> dict[str, Tensor]:
        """Windows of so many seconds of speech."""
        length = round(self.positions_per_second * seconds)
        ids = torch.randint(self.vocab_size, (batch_size, length), device=device)
        batch = {"input_ids": ids, "labels": ids}
        if self.token_lengths is not None:
            repeats = -(-length // len(self.token_lengths))
            lengths = self.token_lengths.repeat(repeats)[:length].expand(batch_size, -1).to(device)
            batch |= {"token_lengths": lengths, "duration_labels": lengths}
        return batch


def make_small_codec(folder: Path) -> None:
    torch.manual_seed(0)
    narrow = dict.fromkeys(
        ("hidden_size", "aggregator_hidden_size", "convnext_hidden_size", "bottleneck_hidden_size"), 32
    )
    config = FlexiCodecConfig(
        semantic_model_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        encoder_hidden_size=2,
        decoder_hidden_size=32,
        num_aggregator_layers=1,
        num_convnext_layers=1,
        num_bottleneck_layers=1,
        initializer_range=0.1,
        **narrow,
    )
    FlexiCodecModel(config).save_pretrained(folder)
    released_feature_extractor().save_pretrained(folder)


@torch.inference_mode()
def make_settings(clips: list[Path], codec_dir: Path) -> tuple[list[Setting], float]:
    codec = FlexiCodecModel.from_pretrained(codec_dir).eval()
    feature_extractor = FlexiCodecFeatureExtractor.from_pretrained(codec_dir)
    lengths: dict[float, list[Tensor]] = {rate: [] for rate in FLEXICODEC_RATES}
    seconds = 0.0
    for path in clips:
        clip = read_audio(path, codec.config.sampling_rate)
        inputs = feature_extractor(clip.waveform, sampling_rate=clip.sampling_rate, return_tensors="pt")
        seconds += clip.seconds
        for rate in FLEXICODEC_RATES:
            encoded = codec.encode(**inputs, num_quantizers=1, target_frame_rate=rate)
            lengths[rate].append(encoded.token_lengths[0])
    settings = []
    for rate in FLEXICODEC_RATES:
        all_lengths = torch.cat(lengths[rate])
        settings.append(Setting(f"FlexiCodec, {rate:g} Hz", 32_768, len(all_lengths) / seconds, all_lengths))
    settings.append(Setting("12.5 Hz × 8 codes of 2,048, flattened", 8 * 2048, 12.5 * 8))
    settings.append(Setting("50 Hz, one code of 65,536", 65_536, 50))
    return settings, seconds


def make_model(setting: Setting, args: argparse.Namespace) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=setting.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        tie_word_embeddings=True,
    )
    if setting.token_lengths is None:
        return AutoModelForCausalLM.from_config(config)
    config.flexicodec_speech = {"first_code_id": 0, "codebook_size": 32_768, "max_frames_per_token": 8}
    return duration_lm_class(config)(config)


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], device: str
) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=Path, default=CLIPS, help="folder of recordings (default: %(default)s)")
    parser.add_argument("--codec", type=Path, help="a converted codec (default: a small random one)")
    parser.add_argument(
        "--window", type=float, default=20.0, help="seconds of speech in a sequence (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="sequences in a batch (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the language model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the language model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each, in turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    # The clips of one speaker each; long.flac and the stereo files repeat them.
    clips = sorted(path for path in args.clips.glob("*.flac") if "long" not in path.name and "stereo" not in path.name)
    with tempfile.TemporaryDirectory() as folder:
        if args.codec is None:
            make_small_codec(Path(folder))
        settings, seconds = make_settings(clips, args.codec or Path(folder))

    models = [make_model(setting, args).to(args.device).train() for setting in settings]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in models]
    batches = [setting.batch(args.window, args.batch_size, args.device) for setting in settings]
    times: list[list[float]] = [[] for _ in settings]
    for round_ in range(args.rounds + 1):
        for index, (model, optimizer, batch) in enumerate(zip(models, optimizers, batches, strict=True)):
            elapsed = train_step(model, optimizer, batch, args.device)
            if round_:  # the first is slow
                times[index].append(elapsed)

    print(
        f"{len(clips)} clips, {seconds:.1f} s; sequences of {args.window:g} s, batches of {args.batch_size}, Llama of "
        f"{args.layers} layers of {args.hidden_size}, {args.threads} threads, "
        f"torch {torch.__version__}, {args.device}\n"
    )
    print("| tokens | positions per second | sequence | attention | trained per second |")
    print("| --- | --- | --- | --- | --- |")
    base = None
    for setting, batch, elapsed in zip(settings, batches, times, strict=True):
        length = batch["input_ids"].shape[1]
        # Scores and weighted sums of causal attention: 2 products of half a square, 2 operations
        # each.
        attention = 2 * length**2 * args.hidden_size * args.layers
        speech = args.window * args.batch_size / statistics.median(elapsed)
        base = base or (attention, speech)
        print(
            f"| {setting.name} | {setting.positions_per_second:.2f} | {length} | {attention / 1e6:,.1f} MFLOP "
            f"({attention / base[0]:.2f} x) | {speech:.1f} s ({speech / base[1]:.2f} x) |"
        )


if __name__ == "__main__":
    main()
