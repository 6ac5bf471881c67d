"""Reconstruct recorded speech at several token rates, speak a sentence, and show both on a page.

python examples/demo.py                              # the small checkpoint of this repository
python examples/demo.py --model DIR my_speech.flac   # another model and your own recording
"""

import argparse
import base64
import html
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure
from transformers import AutoFeatureExtractor, AutoModel, pipeline

from flexicodec_hf import FlexiCodecFeatureExtractor, FlexiCodecModel, FlexiCodecTTSPipeline
from flexicodec_hf.audio_flexicodec import read_audio, write_audio
from flexicodec_hf.evaluation.metrics import pesq, stoi
from flexicodec_hf.training.samples import draw_spectrogram


ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "flexicodec-tiny"
CLIP = ROOT / "tests" / "audio" / "librivox_austen_0870.flac"
TEXT = "I hope you will be very happy in your new house."
RATES = (12.5, 8.3, 6.25)  # tokens per second
REPEATS = 3  # timings are the best of so many

COLUMNS = ("tokens/s", "codebooks", "bits/s", "STOI", "PESQ", "encode RTF", "decode RTF")


@dataclass
class Sound:
    """Something to hear on the page: a waveform, and the start times of its tokens in seconds."""

    title: str
    waveform: np.ndarray
    sampling_rate: int
    starts: np.ndarray | None = None


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the fewest seconds it took."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


@torch.inference_mode()
def reconstruct(
    model: FlexiCodecModel, feature_extractor: FlexiCodecFeatureExtractor, waveform: np.ndarray, folder: Path
) -> tuple[list[list[str]], list[Sound]]:
    """Print a row for each rate and number of codebooks, write the audio, and return both."""
    config = model.config
    seconds = len(waveform) / config.sampling_rate
    inputs = feature_extractor(waveform, sampling_rate=config.sampling_rate, return_tensors="pt")
    print("  ".join(COLUMNS))
    rows, sounds = [], []
    for rate in RATES:
        encoded, encode_seconds = timed(lambda rate=rate: model.encode(**inputs, target_frame_rate=rate))
        codes, lengths = encoded.audio_codes, encoded.token_lengths
        starts = ((lengths[0].cumsum(0) - lengths[0]) / config.frame_rate).numpy()
        for number in (1, config.num_quantizers):
            decoded, decode_seconds = timed(
                lambda codes=codes[:, :number], lengths=lengths: model.decode(codes, lengths)
            )
            # The last frame may be cut short on both sides.
            output = decoded.audio_values[0, 0, : len(waveform)].numpy()
            original = waveform[: len(output)]
            write_audio(folder / f"{rate}_tokens_{number}_codebooks.wav", output, config.sampling_rate)
            tokens_per_second = len(starts) / seconds
            cells = [
                f"{tokens_per_second:.2f}",
                str(number),
                f"{tokens_per_second * config.bits_per_token(number):.0f}",
            ]
            cells += [f"{stoi(original, output):.3f}", f"{pesq(original, output, 'nb'):.2f}"]
            cells += [f"{encode_seconds / seconds:.4f}", f"{decode_seconds / seconds:.4f}"]
            print("  ".join(cell.rjust(len(column)) for cell, column in zip(cells, COLUMNS, strict=True)))
            rows.append(cells)
            books = "the semantic codebook alone" if number == 1 else f"{number} codebooks"
            title = f"{rate:g} tokens a second, {books}: {cells[2]} bits a second"
            sounds.append(Sound(title, output, config.sampling_rate, starts))
    return rows, sounds


def speak(args: argparse.Namespace) -> list[Sound]:
    """The sentence; and in the voice of the recording, if its words are known and the model clones voices."""
    tts = pipeline("text-to-speech", model=str(args.model), pipeline_class=FlexiCodecTTSPipeline)
    voices: dict[str, dict[str, str]] = {"spoken": {}}
    if args.clip_text is not None and tts.model.voicebox is not None:
        voices["cloned"] = {"reference_audio": str(args.clip), "reference_text": args.clip_text}
    sounds = []
    for name, voice in voices.items():
        speech, took = timed(lambda voice=voice: tts(args.text, seed=0, **voice))
        waveform, rate = speech["audio"].reshape(-1), speech["sampling_rate"]
        write_audio(args.output_dir / f"{name}.wav", waveform, rate)
        seconds = len(waveform) / rate
        print(f"\n{args.text!r}, {name}: {seconds:.2f} s of speech, RTF {took / seconds:.2f}")
        sounds.append(Sound({"spoken": "Spoken", "cloned": "In the voice of the recording"}[name], waveform, rate))
    return sounds


def draw(path: Path, sounds: Sequence[Sound]) -> None:
    """One picture of several sounds, with a thin line at the start of each token."""
    figure = Figure(figsize=(11, 2.1 * len(sounds)), layout="constrained")
    for axis, sound in zip(figure.subplots(len(sounds), sharex=True), sounds, strict=True):
        draw_spectrogram(axis, sound.waveform, sound.sampling_rate)
        if sound.starts is not None:
            axis.vlines(sound.starts, 0, sound.sampling_rate / 2000, colors="white", linewidth=0.4)
        axis.set_title(sound.title)
    axis.set_xlabel("seconds")
    figure.savefig(path, dpi=110)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>FlexiCodec: what you hear</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
  figure {{ margin: 1.5rem 0; }}
  figcaption {{ font-weight: 600; }}
  .picture {{ position: relative; cursor: pointer; }}
  .picture img {{ display: block; width: 100%; height: 8rem; border-radius: 6px; }}
  .picture i {{ position: absolute; top: 0; bottom: 0; left: 0; width: 2px; background: #ff4d4d; }}
  audio {{ width: 100%; margin-top: .4rem; }}
  .wide {{ overflow-x: auto; }}
  table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }}
</style>
<h1>What you hear</h1>
<p>{introduction}</p>
<p>Each picture is a spectrogram: time from left to right, pitch from bottom to top. A thin white line is where a
token begins. Long tokens cover sounds that hardly change. Click into a picture to listen from there.</p>
<h2>The recording, and what its tokens keep</h2>
{reconstructions}
<h2>{sentence}</h2>
{spoken}
<h2>Figures</h2>
<div class="wide"><table><tr>{columns}</tr>
{rows}</table></div>
<p>STOI (0 to 1) and PESQ (1 to 4.5) measure how close a reconstruction is to the recording. RTF is seconds of
computing for each second of audio, the best of {repeats} runs on this machine.</p>
<script>
  for (const figure of document.querySelectorAll("figure")) {{
    const audio = figure.querySelector("audio"), line = figure.querySelector("i");
    const picture = figure.querySelector(".picture");
    const move = () => {{
      line.style.left = 100 * audio.currentTime / (audio.duration || 1) + "%";
      if (!audio.paused) requestAnimationFrame(move);
    }};
    audio.addEventListener("play", () => {{
      for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause();
      move();
    }});
    audio.addEventListener("seeked", move);
    picture.addEventListener("click", event => {{
      const box = picture.getBoundingClientRect();
      audio.currentTime = audio.duration * (event.clientX - box.left) / box.width;
      audio.play();
    }});
  }}
</script>
</html>
"""


def figure_of(sound: Sound) -> str:
    """A sound as HTML: its spectrogram and its player, with everything in it."""
    figure = Figure(figsize=(10, 1.6))
    axis = figure.add_axes((0, 0, 1, 1))
    draw_spectrogram(axis, sound.waveform, sound.sampling_rate)
    if sound.starts is not None:
        axis.vlines(sound.starts[1:], 0, sound.sampling_rate / 2000, colors="white", linewidth=0.5, alpha=0.8)
    axis.set_axis_off()
    picture, audio = io.BytesIO(), io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    soundfile.write(audio, sound.waveform.clip(-1, 1), sound.sampling_rate, format="FLAC")
    image, flac = (base64.b64encode(file.getvalue()).decode() for file in (picture, audio))
    title = html.escape(sound.title)
    return (
        f'<figure><figcaption>{title}</figcaption><div class="picture"><img alt="Spectrogram: {title}" '
        f'src="data:image/png;base64,{image}"><i></i></div>'
        f'<audio controls preload="metadata" src="data:audio/flac;base64,{flac}"></audio></figure>'
    )


def write_page(
    path: Path, args: argparse.Namespace, rows: list[list[str]], reconstructions: list[Sound], spoken: list[Sound]
) -> None:
    """One file that needs no other: sounds, pictures and table."""
    introduction = (
        f"{args.clip.name}, {len(reconstructions[0].waveform) / reconstructions[0].sampling_rate:.2f} s, through the "
        f"model {Path(args.model).name}."
    )
    if Path(args.model) == CHECKPOINT:
        introduction += (
            " This is the small model of the repository, trained for some hours on synthetic speech. It shows how "
            "everything works, not how good FlexiCodec sounds."
        )
    path.write_text(
        PAGE.format(
            introduction=html.escape(introduction),
            reconstructions="\n".join(map(figure_of, reconstructions)),
            sentence=html.escape(f"\N{LEFT DOUBLE QUOTATION MARK}{args.text}\N{RIGHT DOUBLE QUOTATION MARK}"),
            spoken="\n".join(map(figure_of, spoken)),
            columns="".join(f"<th>{column}" for column in COLUMNS),
            rows="".join("<tr>" + "".join(f"<td>{cell}" for cell in row) + "</tr>\n" for row in rows),
            repeats=REPEATS,
        ),
        encoding="utf-8",
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Reconstruct recorded speech at several rates, and speak a sentence.")
    parser.add_argument("clip", type=Path, nargs="?", default=CLIP, help="audio file (default: %(default)s)")
    parser.add_argument("--clip_text", metavar="TEXT", help="what the clip says, to speak in its voice too")
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
    recording = Sound("The recording", clip.waveform, clip.sampling_rate)
    rows, sounds = reconstruct(codec, feature_extractor, clip.waveform, args.output_dir)
    draw(args.output_dir / "demo.png", [recording, *sounds[1::2]])
    spoken = speak(args)
    write_page(args.output_dir / "index.html", args, rows, [recording, *sounds], spoken)
    folder = args.output_dir
    print(
        f"\nRTF: seconds of computing per second of audio, the best of {REPEATS}. In {folder}/: the recording, its\n"
        "reconstructions from the semantic codebook and from all codebooks, the speech, the picture demo.png.\n"
        f"To hear and see all of it, open {(folder / 'index.html').absolute()}"
    )


if __name__ == "__main__":
    main()
