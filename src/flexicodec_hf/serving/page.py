"""A web page to listen on: the codec, text to speech, and voice conversion."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import soundfile
from matplotlib.figure import Figure

from ..audio_flexicodec import AudioClip, audio_seconds, read_audio, resample
from ..data.runner import CodecRunner, RateSetting
from ..pipeline_flexicodec_tts import FlexiCodecTTSPipeline
from ..training.samples import draw_spectrogram
from .words import SAMPLING_RATE as ALIGNER_RATE
from .words import Aligner, Word


MAX_SECONDS = 60.0
MAX_TEXT_LENGTH = 1000
RECORDING = "the recording below"
INVENTED = "one that the model invents"

# On a narrow screen, the picture is moved sideways: its words stay readable.
STYLE = "<style>#tokens { overflow-x: auto } #tokens img { min-width: 44rem; max-width: none }</style>"

Sound = tuple[int, np.ndarray]


def build_page(
    runner: CodecRunner,
    speaker: FlexiCodecTTSPipeline | None,
    clips: list[Path] | None = None,
    aligner: Aligner | None = None,
) -> gr.Blocks:
    """
    The page, to `launch`.

    Args:
        runner: The codec.
        speaker: The pipeline of a model that speaks; `None` for a codec alone.
        clips: Recordings to try, each with a `.txt` file beside it that says its words.
        aligner: Finds the words of a text in a recording, to show them in the picture.

    Returns:
        The page.
    """
    clips = clips or []
    with gr.Blocks(title="FlexiCodec", analytics_enabled=False) as page:
        gr.Markdown(
            "# FlexiCodec\nSpeech as a few tokens a second. Similar neighboring sounds share a token, and you choose "
            "how many tokens there are."
        )
        with gr.Tab("Codec"):
            _codec_tab(runner, clips, aligner)
        if speaker is not None:
            with gr.Tab("Speak"):
                _speak_tab(speaker, clips)
            with gr.Tab("Convert a voice"):
                if speaker.model.voicebox is None:
                    gr.Markdown("This model has no Voicebox, which gives speech another voice.")
                else:
                    _convert_tab(speaker, clips)
    return page


def _codec_tab(runner: CodecRunner, clips: list[Path], aligner: Aligner | None) -> None:
    config = runner.config

    def reconstruct(path: str | None, text: str, rate: float, number: int) -> tuple[Sound, Sound, Figure, str]:
        clip = _read(path, config.sampling_rate)
        words = []
        if aligner is not None and text.strip():
            words = aligner(resample(clip.waveform, config.sampling_rate, ALIGNER_RATE), text)
        ((tokens,),) = _ok(runner.encode([clip], [RateSetting(target_frame_rate=rate)], int(number)))
        (parts,) = _ok(runner.decode([tokens]))
        waveform = np.concatenate(list(parts))
        lengths = tokens.token_lengths
        per_second = len(lengths) / clip.seconds
        said = (
            f"**{len(lengths)} tokens** for {clip.seconds:.1f} s: {per_second:.1f} a second, "
            f"{per_second * config.bits_per_token(int(number)):.0f} bits a second. The longest covers "
            f"{int(lengths.max()) / config.frame_rate:.2f} s."
        )
        if clip.changes:
            said += f" ({'; '.join(clip.changes)}.)"
        starts = (lengths.cumsum(0) - lengths) / config.frame_rate
        picture = _picture(clip.waveform, waveform, config.sampling_rate, starts.numpy(), words)
        return _sound(clip.waveform, config.sampling_rate), _sound(waveform, config.sampling_rate), picture, said

    with gr.Row():
        with gr.Column():
            source = gr.Audio(
                type="filepath",
                sources=["upload", "microphone"],
                label="A recording of speech",
                elem_id="codec-source",
            )
            text = gr.Textbox(
                label="What it says, to see the words in the picture",
                visible=aligner is not None,
                elem_id="codec-text",
            )
            if aligner is None:
                _clips_to_try([source], [[str(clip)] for clip in clips])
            else:
                _clips_to_try([source, text], _with_words(clips))
            lowest = config.frame_rate / config.max_frames_per_token
            rate = gr.Slider(
                max(lowest, 3.0), config.frame_rate, value=8.3, step=0.1, label="Tokens a second", elem_id="rate"
            )
            number = gr.Slider(
                1, config.num_quantizers, value=min(8, config.num_quantizers), step=1, label="Codebooks"
            )
            button = gr.Button("To tokens and back", variant="primary")
        with gr.Column():
            said = gr.Markdown(elem_id="codec-said")
            original = gr.Audio(label="Original", interactive=False)
            reconstruction = gr.Audio(label="From its tokens", interactive=False, elem_id="reconstruction")
    gr.HTML(STYLE, padding=False)
    picture = gr.Plot(show_label=False, elem_id="tokens")
    _on_click(button, reconstruct, [source, text, rate, number], [original, reconstruction, picture, said])


def _picture(
    original: np.ndarray, reconstruction: np.ndarray, sampling_rate: int, starts: np.ndarray, words: list[Word]
) -> Figure:
    """Spectrograms of both, with a line where each token begins, and each word where it is spoken."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, sharey=True)
    for axis, sound, title in ((above, original, "original"), (below, reconstruction, "from its tokens")):
        draw_spectrogram(axis, sound, sampling_rate)
        axis.set_title(title)
    top = sampling_rate / 2000
    below.vlines(starts, 0, top, colors="white", linewidth=0.5)
    below.set_xlabel("seconds")
    if words:
        above.vlines([word.start_s for word in words], 0, top, colors="white", linewidth=0.5, linestyles="dotted")
        labels = above.secondary_xaxis("top")
        labels.set_xticks([(word.start_s + word.end_s) / 2 for word in words], [word.text for word in words])
        labels.tick_params(length=0, rotation=45 if len(words) > 12 else 0)
    return figure


def _speak_tab(speaker: FlexiCodecTTSPipeline, clips: list[Path]) -> None:
    streams = shutil.which("ffmpeg") is not None  # Gradio makes the parts of a stream with it

    def speak(
        text: str, voice: str, reference: str | None, words: str, seed: float
    ) -> Iterator[tuple[bytes | None, Sound | None, str]]:
        if len(text) > MAX_TEXT_LENGTH:
            raise ValueError(f"The text has {len(text)} characters, and may have {MAX_TEXT_LENGTH} here.")
        options = _voice_options(speaker, voice, reference, words)
        parts: list[np.ndarray] = []
        said, rate = "", 0
        for chunk in speaker.stream(text, seed=int(seed), **options):
            rate = chunk["sampling_rate"]
            parts.append(chunk["audio"])
            seconds = sum(map(len, parts)) / rate
            said = said or f"First audio after **{chunk['elapsed_s']:.2f} s**."
            yield _wav(chunk["audio"], rate) if streams else None, None, f"{said} {seconds:.1f} s so far."
        if not sum(map(len, parts)):
            raise ValueError("The model said nothing: try another seed, or a longer text.")
        said += f" {seconds:.1f} s of speech in {chunk['elapsed_s']:.1f} s."
        yield None, _sound(np.concatenate(parts), rate), said

    with gr.Row():
        with gr.Column():
            text = gr.Textbox(
                "I hope you will be very happy in your new house.", label="What to say", lines=3, elem_id="text"
            )
            voice, reference, words = _voice_inputs(speaker, clips)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            button = gr.Button("Speak", variant="primary")
        with gr.Column():
            said = gr.Markdown(elem_id="speak-said")
            player = gr.Audio(
                label="While it is spoken", streaming=True, autoplay=True, interactive=False, visible=streams
            )
            whole = gr.Audio(label="All of it", interactive=False, autoplay=not streams, elem_id="speech")
    _on_click(button, speak, [text, voice, reference, words, seed], [player, whole, said])


def _convert_tab(speaker: FlexiCodecTTSPipeline, clips: list[Path]) -> None:
    extractor = speaker.processor.feature_extractor

    def convert(path: str | None, voice: str, reference: str | None, words: str, seed: float) -> Sound:
        clip = _read(path, extractor.sampling_rate)
        options = _voice_options(speaker, voice, reference, words)
        if "reference_audio" in options:
            recording = options.pop("reference_audio"), options.pop("reference_text")
            options["voice"] = speaker.encode_voice(*recording)
        inputs = extractor(clip.waveform, sampling_rate=clip.sampling_rate, return_tensors="pt")
        inputs = speaker.ensure_tensor_on_device(**inputs)
        converted = speaker.model.convert_voice(**inputs, seed=int(seed), **options)
        return _sound(converted.audio[0, 0].cpu().numpy(), int(converted.sampling_rate[0]))

    with gr.Row():
        with gr.Column():
            source = gr.Audio(
                type="filepath", sources=["upload", "microphone"], label="The words", elem_id="convert-source"
            )
            _clips_to_try([source], [[str(clip)] for clip in clips])
            voice, reference, words = _voice_inputs(speaker, clips)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            button = gr.Button("Convert", variant="primary")
        converted = gr.Audio(label="The same words in the other voice", interactive=False, elem_id="converted")
    _on_click(button, convert, [source, voice, reference, words, seed], [converted])


def _voice_inputs(speaker: FlexiCodecTTSPipeline, clips: list[Path]) -> tuple[gr.Dropdown, gr.Audio, gr.Textbox]:
    """Who speaks: a voice of the model, or a recording with its words."""
    voices = [*(speaker.model.voices or [INVENTED]), RECORDING]
    voice = gr.Dropdown(voices, value=voices[0], label="Voice")
    with gr.Accordion("A recording of the voice", open=False):
        gr.Markdown("3 to 15 seconds of one speaker, and the exact words. Ask the speaker first.")
        reference = gr.Audio(type="filepath", sources=["upload", "microphone"], label="Recording")
        words = gr.Textbox(label="Its words")
        _clips_to_try([reference, words], _with_words(clips))
    return voice, reference, words


def _with_words(clips: list[Path]) -> list[list[str]]:
    return [[str(clip), clip.with_suffix(".txt").read_text(encoding="utf-8").strip()] for clip in clips]


def _clips_to_try(inputs: list[Any], values: list[list[str]]) -> None:
    if values:
        gr.Examples(values, inputs, label="Recordings to try")


def _voice_options(speaker: FlexiCodecTTSPipeline, voice: str, reference: str | None, words: str) -> dict[str, Any]:
    if voice == RECORDING:
        if reference is None or not words.strip():
            raise ValueError("Give a recording of the voice, and its words.")
        _check_length(reference)
        return {"reference_audio": reference, "reference_text": words}
    # Not any name: it would be the path of a file.
    return {"voice": voice} if voice in speaker.model.voices else {}


def _on_click(button: gr.Button, function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Run a function, one at a time for the whole page. What the user can mend is shown in words."""

    def in_words(*values: Any) -> Iterator[Any]:
        try:
            made = function(*values)
            if isinstance(made, Iterator):
                yield from made
            else:
                yield made
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    button.click(in_words, inputs, outputs, concurrency_limit=1, concurrency_id="model")


def _check_length(path: str) -> None:
    if (seconds := audio_seconds(path)) > MAX_SECONDS:
        raise ValueError(f"The recording is {seconds:.0f} s long, and may be {MAX_SECONDS:.0f} s here.")


def _read(path: str | None, sampling_rate: int) -> AudioClip:
    if path is None:
        raise ValueError("There is no recording yet: record one, or choose a file.")
    _check_length(path)
    return read_audio(path, sampling_rate)


def _ok(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _sound(waveform: np.ndarray, sampling_rate: int) -> Sound:
    """16 bits, which Gradio leaves as loud as they are."""
    return sampling_rate, (waveform.clip(-1, 1) * 32767).round().astype(np.int16)


def _wav(waveform: np.ndarray, sampling_rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform.clip(-1, 1), sampling_rate, format="WAV")
    return file.getvalue()
