"""`flexicodec-hf speak` and `convert-voice`."""

import io
import os
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline

from conftest import AUDIO
from flexicodec_hf import FlexiCodecTTSPipeline
from flexicodec_hf.audio_flexicodec import AudioError, read_audio, read_stretches
from flexicodec_hf.cli import main, speak


TEXT = "Hello there, you."
LONG = "The first of the sentences is here. A second one follows it at once, and is longer. Is this the last?"


@pytest.fixture
def run(tts_repository, device, capsys):
    """`run("speak", ...)` with the tiny repository gives the exit status, standard output and standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        words = [args[0], "--num-inference-steps", "1", *map(str, args[1:]), "--seed", "0", "--device", device]
        words += [] if "--model" in words else ["--model", str(tts_repository)]
        status = main(words)
        output, errors = capsys.readouterr()
        return status, output, "\n".join(line for line in errors.splitlines() if line.startswith("flexicodec-hf"))

    return run


@pytest.fixture(scope="module")
def tts(tts_repository):
    return pipeline("text-to-speech", model=str(tts_repository), pipeline_class=FlexiCodecTTSPipeline, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A recording of two seconds, with what it says beside it."""
    path = tmp_path_factory.mktemp("clip") / "me.wav"
    waveform, rate = soundfile.read(AUDIO / "librivox_austen_0890.flac", dtype="float32")
    soundfile.write(path, waveform[: 2 * rate], rate)
    path.with_suffix(".txt").write_text("What it says.\n")
    return path


def assert_says(path, speech: np.ndarray) -> None:
    """16 bits of it."""
    written, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(written, speech.clip(-1, 1), atol=2e-3 if torch.cuda.is_available() else 1 / 32_768)


def test_speak_writes_a_text_as_it_is_spoken(run, tts, device, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(LONG)
    monkeypatch.setattr("sys.stdin", io.StringIO(LONG))
    expected = tts(LONG, seed=0, max_piece_length=48, generate_kwargs={"num_inference_steps": 1})
    for source in ([LONG], ["--text-file", tmp_path / "text.txt"], ["--text-file", "-"]):
        out = tmp_path / "out.flac"
        status, output, errors = run("speak", *source, "-o", out, "--max-piece-length", 48, "--overwrite")
        assert (status, errors) == (0, "")
        assert_says(out, expected["audio"])
        seconds = len(expected["audio"]) / 24_000
        assert f"{out}: {seconds:.2f} s of speech at 24000 Hz; first audio after " in output
        assert "real-time factor" in output and f"on {device}" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.flac", "text.txt"]


def test_speak_with_a_voice(run, tts, clip, tmp_path):
    settings = {"seed": 0, "generate_kwargs": {"num_inference_steps": 1}}
    expected = tts(TEXT, reference_audio=str(clip), reference_text="What it says.", **settings)["audio"]
    assert run("speak", TEXT, "-o", tmp_path / "a.wav", "--reference-audio", clip)[0] == 0
    assert_says(tmp_path / "a.wav", expected)
    tts.encode_voice(str(clip), "What it says.").save(tmp_path / "me.safetensors")
    assert run("speak", TEXT, "-o", tmp_path / "b.wav", "--voice", tmp_path / "me.safetensors")[0] == 0
    assert_says(tmp_path / "b.wav", expected)
    other = ("--reference-text", "Something else.")
    assert run("speak", TEXT, "-o", tmp_path / "c.wav", "--reference-audio", clip, *other)[0] == 0
    said, _ = soundfile.read(tmp_path / "c.wav")
    assert said.shape != expected.shape or not np.allclose(said, expected, atol=1e-3)


def test_speak_streams_to_a_player(run, tts, tmp_path, monkeypatch):
    generate_kwargs = {"num_inference_steps": 1}
    expected = np.concatenate([chunk["audio"] for chunk in tts.stream(LONG, seed=0, generate_kwargs=generate_kwargs)])
    assert run("speak", LONG, "--stream", "-o", tmp_path / "a.wav")[0] == 0
    assert_says(tmp_path / "a.wav", expected)

    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO()))
    status, _, errors = run("speak", LONG, "--stream", "-o", "-")
    sound = sys.stdout.buffer.getvalue()
    assert (status, errors) == (0, "")
    assert sound[:4] == b"RIFF" and sound[8:16] == b"WAVEfmt " and sound[36:40] == b"data"
    # Some readers want the length of a file, and find it in the header.
    whole = sound[:40] + (len(sound) - 44).to_bytes(4, "little") + sound[44:]
    samples, rate = soundfile.read(io.BytesIO(whole), dtype="float32")
    assert rate == 24_000
    np.testing.assert_allclose(samples, expected.clip(-1, 1), atol=2e-3 if torch.cuda.is_available() else 1 / 16_384)


def test_speak_ends_when_the_player_is_closed(run, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        assert run("speak", LONG, "--stream", "-o", "-")[::2] == (0, "")


def test_speak_options_reach_the_model(run, tts, tmp_path):
    options = ("--temperature", 0.5, "--top-k", 3, "--top-p", 0.9, "--guidance-scale", 1, "--merging-threshold", 0.86)
    assert run("speak", TEXT, "-o", tmp_path / "a.wav", "--language", "zh", "--no-nar", *options)[0] == 0
    generate_kwargs = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "guidance_scale": 1.0, "use_nar": False}
    speech = tts(TEXT, seed=0, language="zh", merging_threshold=0.86, generate_kwargs=generate_kwargs)
    assert speech["sampling_rate"] == soundfile.info(tmp_path / "a.wav").samplerate == 16_000
    assert_says(tmp_path / "a.wav", speech["audio"])
    assert run("speak", TEXT, "-o", tmp_path / "b.wav", "--preset", "fast", "--num-inference-steps", 5)[0] == 0


def test_convert_voice(run, tts, clip, device, tmp_path):
    source = AUDIO / "librivox_austen_0880.flac"
    status, output, _ = run("convert-voice", source, clip, "-o", tmp_path / "a.wav", "--merging-threshold", 0.86)
    assert status == 0 and f"the words of {source}" in output
    voice = tts.model.encode_voice(**tts.processor(audio=str(clip)))
    waveform = read_audio(source, 16_000).waveform
    inputs = tts.processor.feature_extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    settings = {"merging_threshold": 0.86, "seed": 0, "num_inference_steps": 1}
    converted = tts.model.convert_voice(**inputs, voice=voice, **settings).audio[0, 0]
    written, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert rate == 24_000 and len(written) == round(len(waveform) * 1.5)
    length = min(len(written), len(converted))
    assert len(written) - length < 3 * 1920  # the frames that the codec drops are silent
    np.testing.assert_allclose(written[:length], converted[:length].clip(-1, 1), atol=1e-3)

    voice.save(tmp_path / "voice.safetensors")
    for reference in (tmp_path / "voice.safetensors", "ben"):
        assert run("convert-voice", source, reference, "-o", tmp_path / "b.wav", "--overwrite")[0] == 0
        assert soundfile.info(tmp_path / "b.wav").frames == len(written)


def test_long_recordings_are_converted_in_stretches(run, tmp_path, monkeypatch):
    monkeypatch.setattr(speak, "STRETCH_S", 1.5)
    source = AUDIO / "librivox_austen_0880.flac"
    lengths = [len(stretch) for stretch in read_stretches(source, 16_000, max_length_s=1.5)]
    assert len(lengths) > 1
    assert run("convert-voice", source, "ben", "-o", tmp_path / "a.wav")[0] == 0
    assert abs(soundfile.info(tmp_path / "a.wav").frames - 1.5 * sum(lengths)) <= len(lengths)


def test_nothing_said_is_an_error(run, tmp_path, monkeypatch):
    nothing = {"audio": np.zeros(0, dtype=np.float32), "sampling_rate": 24_000, "text": TEXT, "elapsed_s": 0.1}
    monkeypatch.setattr(FlexiCodecTTSPipeline, "stream", lambda *args, **kwargs: (one for one in [nothing]))
    status, _, errors = run("speak", TEXT, "-o", tmp_path / "a.wav")
    assert status == 1 and "the model generated no speech: try another --seed" in errors
    assert not list(tmp_path.iterdir())


def test_broken_audio_is_not_written(tmp_path):
    with pytest.raises(AudioError, match="NaN"), speak.audio_output(tmp_path / "a.wav") as output:
        output.write(np.zeros(10, dtype=np.float32), 16_000)
        output.write(np.full(10, np.nan, dtype=np.float32), 16_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speak", ""], "something to speak"),
        (["speak", TEXT, "--voice", "nobody"], "anna"),
        (["speak", TEXT, "--voice", "missing.safetensors"], "there is no such voice file"),
        (["speak", TEXT, "--reference-audio", "alone.wav"], "what it says is needed, word for word"),
        (["speak", TEXT, "--reference-audio", "missing.wav", "--reference-text", "Yes."], "there is no such file"),
        (["speak", "--text-file", "missing.txt"], "missing.txt"),
        (["speak", "--text-file", "latin.txt"], "latin.txt: not a text in UTF-8"),
        (["speak", TEXT, "--model", "codec"], "holds the codec alone"),
        (["speak", TEXT, "--model", "empty"], "is converted by itself"),
        (["convert-voice", "missing.wav", "ben"], "missing.wav: there is no such file"),
        (["convert-voice", "short.wav", "short.wav"], "too short"),
    ],
)
def test_errors_say_what_to_do(run, codec_dir, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    soundfile.write("alone.wav", np.zeros(16_000), 16_000)
    soundfile.write("short.wav", np.full(1_600, 0.1), 16_000)
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    if "codec" in arguments:
        shutil.copytree(codec_dir(), "codec")
    status, _, errors = run(*arguments, "-o", "out.wav")
    assert status == 1
    assert errors.startswith("flexicodec-hf: error: ") and message in errors and "\n" not in errors
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speak", "-o", "out.wav"], "TEXT"),
        (["speak", TEXT, "--text-file", "x", "-o", "out.wav"], "--text-file"),
        (["speak", TEXT, "--reference-text", "Yes.", "-o", "out.wav"], "goes with --reference-audio"),
        (["speak", TEXT, "--voice", "a", "--reference-audio", "b.wav", "-o", "out.wav"], "not allowed with"),
        (["speak", TEXT, "-o", "out.txt"], "unknown audio format '.txt'"),
        (["convert-voice", "a.wav", "b.wav", "-o", "out"], "unknown audio format ''"),
    ],
)
def test_usage_errors(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_there_is_kept(run, tmp_path):
    out = tmp_path / "out.wav"
    out.write_text("mine")
    for arguments in (["speak", TEXT], ["convert-voice", AUDIO / "short_0p08s.wav", "ben"]):
        status, _, errors = run(*arguments, "-o", out)
        assert status == 1 and "exists: pass --overwrite" in errors
    status, _, errors = run("speak", TEXT, "-o", tmp_path / "missing" / "out.wav")
    assert status == 1 and "there is no directory" in errors
    assert out.read_text() == "mine"
