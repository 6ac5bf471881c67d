import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel

import flexicodec_hf
from conftest import AUDIO, assert_close
from flexicodec_hf.audio_flexicodec import AudioError
from flexicodec_hf.cli import main
from flexicodec_hf.cli.common import CommandError, user_errors
from flexicodec_hf.conversion import convert_codec
from flexicodec_hf.data.files import DataError


CLIPS = [
    "librivox_austen_0880.flac",
    "stereo_44k.flac",
    "stereo_48k.wav",
    "short_0p02s.wav",
    "short_0p08s.wav",
    "silence_2s.wav",
]


@pytest.fixture(scope="session")
def released(golden, tmp_path_factory) -> Path:
    """A directory with a small codec in the released files' names and form."""
    directory = tmp_path_factory.mktemp("released")
    fixture = golden("codec_tiny")
    save_file(fixture.weights, directory / "12hz_v1_half.safetensors")
    (directory / "12hz_v1_half_config.yaml").write_text(yaml.safe_dump({"model": fixture.spec["config"]}))
    return directory


@pytest.fixture(scope="session")
def model(released, tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    convert_codec(released / "12hz_v1_half.safetensors", directory, released / "12hz_v1_half_config.yaml")
    return str(directory)


@pytest.fixture
def run(model, device, capsys):
    """`run("encode", ...)` with the small model gives the exit status, standard output and standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([*map(str, args), "--model", model, "--device", device])
        output, errors = capsys.readouterr()
        return status, output, "\n".join(line for line in errors.splitlines() if line.startswith("flexicodec-hf"))

    return run


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# Audio to tokens and back


@pytest.mark.parametrize("name", CLIPS)
def test_reconstruct_writes_as_much_as_it_read(run, device, tmp_path, name):
    status, output, errors = run("reconstruct", AUDIO / name, tmp_path / "out.wav")
    assert (status, errors) == (0, "")
    info = soundfile.info(tmp_path / "out.wav")
    source = soundfile.info(AUDIO / name)
    assert (info.samplerate, info.channels) == (16_000, 1)
    assert info.frames == round(source.frames * 16_000 / source.samplerate)
    assert f"{source.duration:.2f} s" in output
    assert ("2 channels averaged" in output) == (source.channels == 2)
    assert (f"resampled from {source.samplerate} to 16000 Hz" in output) == (source.samplerate != 16_000)
    assert f"1 file, {source.duration:.2f} s of audio; " in output
    assert "bits per second (5 quantizers); real-time factor " in output
    assert f"on {device}" in output
    assert [path.name for path in tmp_path.iterdir()] == ["out.wav"]


def test_encode_writes_what_the_model_gives(run, device, model, tmp_path):
    status, output, _ = run("encode", AUDIO / CLIPS[0], "-o", tmp_path / "new" / "tokens")
    assert status == 0
    path = tmp_path / "new" / "tokens" / "librivox_austen_0880.safetensors"
    waveform, _ = soundfile.read(AUDIO / CLIPS[0], dtype="float32")
    extractor = AutoFeatureExtractor.from_pretrained(model)
    codec = AutoModel.from_pretrained(model).to(device)
    encoded = codec.encode(**extractor(waveform, sampling_rate=16_000, return_tensors="pt", device=device))

    tokens = load_file(path)
    assert torch.equal(tokens["audio_codes"].long(), encoded.audio_codes[0].cpu())
    assert torch.equal(tokens["token_lengths"].long(), encoded.token_lengths[0].cpu())
    assert tokens["audio_codes"].dtype == tokens["token_lengths"].dtype == torch.int32
    assert metadata(path) == {
        "model": model,
        "source": "librivox_austen_0880.flac",
        "num_quantizers": "5",
        "merging_threshold": "0.91",
        "sampling_rate": "16000",
        "num_samples": str(len(waveform)),
        "frame_rate": "12.5",
        "flexicodec_hf_version": flexicodec_hf.__version__,
    }
    num_tokens = tokens["token_lengths"].numel()
    seconds = len(waveform) / 16_000
    # FSQ of 8^5 codes, four codebooks of 64, lengths up to 8.
    bits = num_tokens * (15 + 4 * 6 + 3) / seconds
    assert codec.config.bits_per_token(5) == 42
    assert f"{num_tokens} tokens, {num_tokens / seconds:.2f} per second; {bits:.0f} bits per second" in output


@pytest.mark.parametrize(
    "rate", [("--merging-threshold", 0.8), ("--target-frame-rate", 6.25)], ids=["threshold", "rate"]
)
def test_decoded_tokens_equal_the_reconstruction(run, tmp_path, rate):
    name = "librivox_austen_0880"
    options = ("--num-quantizers", 3, *rate)
    assert run("reconstruct", AUDIO / f"{name}.flac", tmp_path / "direct.wav", *options)[0] == 0
    assert run("encode", AUDIO / f"{name}.flac", "-o", tmp_path, *options)[0] == 0
    assert run("decode", tmp_path / f"{name}.safetensors", "-o", tmp_path)[0] == 0
    direct, _ = soundfile.read(tmp_path / "direct.wav")
    decoded, _ = soundfile.read(tmp_path / f"{name}.wav")
    np.testing.assert_array_equal(decoded, direct)

    tokens = load_file(tmp_path / f"{name}.safetensors")
    there = metadata(tmp_path / f"{name}.safetensors")
    assert tokens["audio_codes"].shape[0] == 3
    if rate[0] == "--target-frame-rate":
        assert there["target_frame_rate"] == "6.25" and float(there["merging_threshold"]) != 0.91
        assert abs(len(tokens["token_lengths"]) / (len(direct) / 16_000) - 6.25) < 0.2
    else:
        assert there["merging_threshold"] == "0.8" and "target_frame_rate" not in there


def test_decode_uses_fewer_rows(run, model, device, tmp_path):
    run("encode", AUDIO / CLIPS[0], "-o", tmp_path)
    status, output, _ = run(
        "decode", tmp_path / "librivox_austen_0880.safetensors", "-o", tmp_path, "--num-quantizers", 1
    )
    assert status == 0 and "(1 quantizer)" in output
    tokens = load_file(tmp_path / "librivox_austen_0880.safetensors")
    expected = AutoModel.from_pretrained(model).decode(tokens["audio_codes"][None, :1], tokens["token_lengths"][None])
    waveform, _ = soundfile.read(tmp_path / "librivox_austen_0880.wav", dtype="float32")
    expected = expected.audio_values[0, 0].detach()
    length = min(len(waveform), len(expected))
    assert_close(torch.from_numpy(waveform[:length]), expected[:length], atol=1e-3 if device != "cpu" else 1e-4)


def test_results_do_not_depend_on_the_batch(run, tmp_path):
    clips = [AUDIO / name for name in CLIPS if name != "stereo_44k.flac"]
    assert run("encode", *clips, "-o", tmp_path / "one")[0] == 0
    status, output, _ = run("encode", *clips, "-o", tmp_path / "four", "--batch-size", 4)
    assert status == 0 and "5 files, " in output
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 5
    for name in names:
        one, four = (load_file(tmp_path / batch / name) for batch in ("one", "four"))
        assert torch.equal(one["audio_codes"], four["audio_codes"]), name
        assert torch.equal(one["token_lengths"], four["token_lengths"]), name
        assert metadata(tmp_path / "one" / name) == metadata(tmp_path / "four" / name)

    # Rows of different numbers go in one run as well.
    run("encode", AUDIO / CLIPS[0], "-o", tmp_path / "one", "--num-quantizers", 2, "--overwrite")
    files = [tmp_path / "one" / name for name in names]
    assert run("decode", *files, "-o", tmp_path / "a")[0] == 0
    status, output, _ = run("decode", *files, "-o", tmp_path / "b", "--batch-size", 5)
    assert status == 0 and "(2 or 5 quantizers)" in output
    for path in sorted((tmp_path / "a").iterdir()):
        alone, _ = soundfile.read(path)
        batched, _ = soundfile.read(tmp_path / "b" / path.name)
        np.testing.assert_allclose(batched, alone, atol=1e-4)


def test_long_clips_are_processed_in_chunks(run, tmp_path):
    long, short = AUDIO / CLIPS[0], AUDIO / "silence_2s.wav"
    options = ("--chunk-length-s", 1.2, "--batch-size", 2)
    status, output, errors = run("encode", long, short, "-o", tmp_path, *options)
    assert (status, errors) == (0, "")
    lines = {line.split(":")[0]: line for line in output.splitlines()}
    assert "2.99 s, in chunks of 1.2 s ->" in lines[str(long)]
    assert "chunks" not in lines[str(short)]

    tokens = tmp_path / "librivox_austen_0880.safetensors"
    status, output, _ = run("decode", tokens, "-o", tmp_path, *options)
    assert status == 0 and "in chunks of 1.2 s" in output
    assert soundfile.info(tokens.with_suffix(".wav")).frames == soundfile.info(long).frames


@pytest.mark.parametrize("api, seconds", [({}, 61), ({"chunk_length_s": 9.0}, 20)], ids=["default", "chunks"])
def test_a_file_gives_the_tokens_and_audio_of_the_api(run, model, device, tmp_path, api, seconds):
    """By default, too, where the command makes chunks and the API does not."""
    samples, rate = soundfile.read(AUDIO / "librivox_long.flac", dtype="float32")
    samples = np.resize(samples, seconds * rate)
    audio, tokens = tmp_path / "long.wav", tmp_path / "tokens" / "long.safetensors"
    soundfile.write(audio, samples, rate, subtype="FLOAT")
    flags = [str(word) for name, value in api.items() for word in ("--chunk-length-s", value)]
    status, output, _ = run("encode", audio, "-o", tokens.parent, *flags)
    assert status == 0 and f"in chunks of {api.get('chunk_length_s', 30):g} s" in output
    assert run("decode", tokens, "-o", tokens.parent, *flags)[0] == 0
    codec, extractor = AutoModel.from_pretrained(model).to(device), AutoFeatureExtractor.from_pretrained(model)
    with torch.no_grad():
        inputs = extractor(samples, sampling_rate=rate, return_tensors="pt", device=device)
        encoded = codec.encode(**inputs, **api)
        decoded = codec.decode(encoded.audio_codes, encoded.token_lengths, **api).audio_values[0, 0].cpu()
    written = load_file(tokens)
    assert torch.equal(written["audio_codes"].long(), encoded.audio_codes[0].cpu())
    assert torch.equal(written["token_lengths"].long(), encoded.token_lengths[0].cpu())
    waveform, _ = soundfile.read(tokens.with_suffix(".wav"), dtype="float32")
    length = min(len(waveform), len(decoded))
    np.testing.assert_allclose(waveform[:length], decoded[:length].clamp(-1, 1), atol=1e-3)
    if api:
        assert run("reconstruct", audio, tmp_path / "again.wav", *flags)[0] == 0
        assert (tmp_path / "again.wav").read_bytes() == tokens.with_suffix(".wav").read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_file(model, tmp_path):
    samples, rate = soundfile.read(AUDIO / "librivox_long.flac", dtype="int16")
    peaks = {}
    for minutes in (3, 30):
        audio = tmp_path / f"{minutes}.flac"
        soundfile.write(audio, np.resize(samples, minutes * 60 * rate), rate)
        for command, source in (("encode", audio), ("decode", tmp_path / f"{minutes}.safetensors")):
            arguments = [command, str(source), "-o", str(tmp_path), "--model", model, "--device", "cpu"]
            code = (
                f"from flexicodec_hf.cli import main\nassert main({arguments!r}) == 0\n"
                # Not `ru_maxrss`, which begins with what the parent process had.
                "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
                "print(int(status['VmHWM'].split()[0]) / 1024)"
            )
            result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            peaks[command, minutes] = float(result.stdout.splitlines()[-1])
    for command in ("encode", "decode"):  # in MiB; the audio alone has 115 more, its features 67
        assert peaks[command, 30] < peaks[command, 3] + 60


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_runs(run, tmp_path, dtype):
    status, _, errors = run("reconstruct", AUDIO / "short_0p08s.wav", tmp_path / "a.flac", "--dtype", dtype)
    assert (status, errors) == (0, "")
    assert soundfile.info(tmp_path / "a.flac").frames == 1280


# Files that are there, broken or missing


def test_encode_goes_on_where_it_stopped(run, tmp_path):
    clips = [AUDIO / CLIPS[0], AUDIO / "silence_2s.wav"]
    run("encode", clips[0], "-o", tmp_path)
    before = (tmp_path / "librivox_austen_0880.safetensors").stat().st_mtime_ns
    status, output, _ = run("encode", *clips, "-o", tmp_path)
    assert status == 0
    assert "librivox_austen_0880.flac: skipped, " in output and output.rstrip().endswith("; 1 skipped")
    assert (tmp_path / "librivox_austen_0880.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "silence_2s.safetensors").exists()

    status, output, _ = run("encode", *clips, "-o", tmp_path)
    assert status == 0 and output.splitlines()[-1] == "2 skipped"
    status, output, _ = run("encode", *clips, "-o", tmp_path, "--overwrite")
    assert status == 0 and "skipped" not in output
    assert (tmp_path / "librivox_austen_0880.safetensors").stat().st_mtime_ns > before


def test_an_interrupted_run_leaves_no_half_file(run, tmp_path, monkeypatch):
    def interrupt(self, path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr("flexicodec_hf.data.tokens.Tokens.save", interrupt)
    status, _, errors = run("encode", AUDIO / CLIPS[0], "-o", tmp_path)
    assert status == 130 and errors == "flexicodec-hf: error: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_files_made_with_other_settings_are_not_taken_for_these(run, tmp_path):
    run("encode", AUDIO / "silence_2s.wav", "-o", tmp_path, "--target-frame-rate", 6.25, "--num-quantizers", 2)
    status, _, errors = run("encode", AUDIO / "silence_2s.wav", "-o", tmp_path)
    assert status == 1
    assert "was made with other settings (num_quantizers 2, not 5; target_frame_rate 6.25, not None; " in errors
    assert errors.endswith(": pass --overwrite or another --output-dir.")

    run("encode", AUDIO / "silence_2s.wav", "-o", tmp_path, "--merging-threshold", 0.8, "--overwrite")
    status, _, errors = run("encode", AUDIO / "silence_2s.wav", "-o", tmp_path)
    assert status == 1 and "other settings (merging_threshold 0.8, not 0.91)" in errors
    assert run("encode", AUDIO / "silence_2s.wav", "-o", tmp_path, "--merging-threshold", 0.8)[0] == 0


def test_decode_and_reconstruct_do_not_overwrite(run, tmp_path):
    run("encode", AUDIO / "short_0p08s.wav", "-o", tmp_path)
    (tmp_path / "short_0p08s.wav").write_text("mine")
    status, output, _ = run("decode", tmp_path / "short_0p08s.safetensors", "-o", tmp_path)
    assert status == 0 and "skipped" in output
    status, _, errors = run("reconstruct", AUDIO / "short_0p08s.wav", tmp_path / "short_0p08s.wav")
    assert status == 1 and "exists: pass --overwrite to replace it" in errors
    assert (tmp_path / "short_0p08s.wav").read_text() == "mine"
    assert run("reconstruct", AUDIO / "short_0p08s.wav", tmp_path / "short_0p08s.wav", "--overwrite")[0] == 0
    assert soundfile.info(tmp_path / "short_0p08s.wav").frames == 1280


@pytest.mark.parametrize("batch_size", [1, 3])
def test_broken_files_are_reported_and_the_rest_go_on(run, tmp_path, batch_size):
    (tmp_path / "broken.wav").write_text("this is no audio")
    # Finite, but no audio in [-1, 1]: the feature extractor refuses it, in the middle of a batch.
    soundfile.write(tmp_path / "unscaled.wav", np.full(32_000, 20_000.0), 16_000, subtype="FLOAT")
    clips = [AUDIO / CLIPS[0], tmp_path / "broken.wav", tmp_path / "missing.wav", tmp_path / "unscaled.wav"]
    status, output, errors = run(
        "encode", *clips, AUDIO / "silence_2s.wav", "-o", tmp_path / "out", "--batch-size", batch_size
    )
    assert status == 1
    assert len(errors.splitlines()) == 3
    assert f"flexicodec-hf: error: {tmp_path / 'broken.wav'}: not an audio file" in errors
    assert f"flexicodec-hf: error: {tmp_path / 'missing.wav'}: there is no such file" in errors
    assert f"flexicodec-hf: error: {tmp_path / 'unscaled.wav'}: `audio` must hold floats in [-1, 1]" in errors
    assert "2 files, " in output and output.rstrip().endswith("; 3 failed")
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["librivox_austen_0880", "silence_2s"]


def test_out_of_memory_is_reported(run, device, tmp_path, monkeypatch):
    encode_frames = flexicodec_hf.FlexiCodecModel.encode_frames

    def small_memory(self, input_values, **kwargs):
        if input_values.numel() > 20_000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_frames(self, input_values, **kwargs)

    monkeypatch.setattr(flexicodec_hf.FlexiCodecModel, "encode_frames", small_memory)
    clips = [AUDIO / "short_0p08s.wav", AUDIO / "silence_2s.wav"]
    status, output, errors = run("encode", *clips, "-o", tmp_path, "--batch-size", 2)
    assert status == 1 and "1 file, 0.08 s" in output
    [error] = errors.splitlines()
    assert f"silence_2s.wav: out of memory on {device}" in error
    assert error.endswith(": pass a smaller `chunk_length_s`.")
    assert [path.stem for path in tmp_path.iterdir()] == ["short_0p08s"]


def tokens_file(path: Path, codes=((0, 1), (2, 3)), lengths=(1, 1), dtype=torch.int32, **changes: str | None) -> Path:
    numbers = {"num_samples": "2560", "sampling_rate": "16000", "frame_rate": "12.5"} | changes
    save_file(
        {"audio_codes": torch.tensor(codes, dtype=dtype), "token_lengths": torch.tensor(lengths, dtype=dtype)},
        path,
        metadata={name: value for name, value in numbers.items() if value is not None},
    )
    return path


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.write_text("no safetensors"), "not tokens from `encode` or `tokenize`: "),
        (lambda path: save_file({"weight": torch.zeros(2)}, path), "missing or malformed entry ('num_samples')"),
        (lambda path: tokens_file(path, num_samples="many"), "missing or malformed entry (invalid literal"),
        (
            lambda path: tokens_file(path, num_samples="2560000"),
            "cover 2 frames, which does not fit its 2560000 samples",
        ),
        (lambda path: tokens_file(path, sampling_rate="0"), "the file is damaged"),
        (lambda path: tokens_file(path, lengths=(2, 0)), "the file is damaged"),
        (
            lambda path: tokens_file(path, lengths=(1, 1, 1)),
            "`token_lengths` (3,) torch.int32 are not int32 of shapes",
        ),
        (lambda path: tokens_file(path, dtype=torch.float32), "`audio_codes` (2, 2) torch.float32"),
        (
            lambda path: tokens_file(path, codes=((0, 1), (2, 64))),
            "`audio_codes` must be between 0 and 63 in an acoustic",
        ),
        (lambda path: tokens_file(path, num_samples="1280", frame_rate="25.0"), "25.0 frames per second; "),
        (lambda path: tokens_file(path, codes=((), ()), lengths=(), num_samples="1"), "there are no tokens"),
        (
            lambda path: tokens_file(path, codes=((0,), (2,)), lengths=(10**8,), num_samples=str(10**8 * 1280)),
            "a token covers 100000000 frames",
        ),
        (lambda path: tokens_file(path, lengths=(1, 2**31 - 1), num_samples=str(2**31 * 1280)), "covers 2147483647"),
        (lambda path: tokens_file(path, num_samples="9" * 400), "the file is damaged"),
    ],
)
def test_broken_tokens_are_reported_and_the_rest_go_on(run, tmp_path, make, message):
    make(tmp_path / "broken.safetensors")
    good = tokens_file(tmp_path / "good.safetensors", model="elsewhere")
    for batch_size in (1, 2):
        out = tmp_path / str(batch_size)
        status, output, errors = run(
            "decode", tmp_path / "broken.safetensors", good, "-o", out, "--batch-size", batch_size
        )
        assert status == 1
        assert len(errors.splitlines()) == 1 and f"{tmp_path / 'broken.safetensors'}: " in errors and message in errors
        assert "0.16 s, encoded with the model elsewhere -> " in output
        assert [path.name for path in out.iterdir()] == ["good.wav"]


# Wrong arguments


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "arguments are required: COMMAND"),
        (["reconstruct", "in.wav"], "arguments are required: OUT"),
        (["reconstruct", "in.wav", "out.xyz"], "unknown audio format '.xyz': use .wav"),
        (["encode", "in.wav"], "arguments are required: -o/--output-dir"),
        (
            ["encode", "a/in.wav", "b/in.flac", "-o", "out"],
            "a/in.wav and b/in.flac would both become out/in.safetensors",
        ),
        (["encode", "in.wav", "-o", "out", "--num-quantizers", "0"], "--num-quantizers: must be at least 1, got 0"),
        (["encode", "in.wav", "-o", "out", "--merging-threshold", "2"], "must be between -1 and 1, got 2"),
        (
            ["encode", "in.wav", "-o", "out", "--chunk-length-s", "-1"],
            "must be a number of seconds, at least 0, got -1",
        ),
        (
            ["encode", "in.wav", "-o", "out", "--merging-threshold", "0.9", "--target-frame-rate", "6"],
            "argument --target-frame-rate: not allowed with argument --merging-threshold",
        ),
        (["convert", "-o", "out"], "nothing to convert: pass --codec, --repo, --ar, --nar, --vocoder or --tokenizer"),
        (["convert", "--vocoder", "x", "--semantic", "y", "-o", "out"], "argument --semantic: goes with --codec"),
        (["convert", "--codec", "x"], "argument --output-dir: is needed"),
        (["convert", "--codec", "x", "--private", "-o", "out"], "argument --private: goes with --push-to-hub"),
        (
            ["convert", "--codec", "x", "--push-to-hub", "a/b/c", "-o", "out"],
            "--push-to-hub: Repo id must be in the form",
        ),
    ],
)
def test_usage_errors(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rate", ["1", "13", "nan"])
def test_a_rate_that_no_threshold_gives_is_a_usage_error(model, capsys, tmp_path, rate):
    with pytest.raises(SystemExit) as exit:
        main(["encode", "in.wav", "-o", str(tmp_path), "--target-frame-rate", rate, "--model", model])
    assert exit.value.code == 2
    assert f"--target-frame-rate: must be between 1.5625 and 12.5 tokens per second, got {float(rate)}" in (
        capsys.readouterr().err
    )


def test_a_device_that_is_not_there_is_a_usage_error(model, capsys, tmp_path):
    device = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(SystemExit) as exit:
        main(["encode", str(AUDIO / CLIPS[0]), "-o", str(tmp_path), "--device", device, "--model", model])
    assert exit.value.code == 2
    assert f"argument --device: there is no {device} device here" in capsys.readouterr().err


def test_models_that_cannot_be_loaded(capsys, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "dac"}')
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("other", f"{tmp_path / 'other'} is no FlexiCodec: its model type is 'dac'"),
        ("empty", "there is no config.json in it. Download or convert it again"),
    ):
        status = main(["encode", "in.wav", "-o", str(tmp_path / "out"), "--model", str(tmp_path / name)])
        error = capsys.readouterr().err
        assert status == 1 and len(error.splitlines()) == 1 and message in error


def test_output_directories(run, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, errors = run("encode", AUDIO / CLIPS[0], "-o", tmp_path / "file")
    assert status == 1 and errors == f"flexicodec-hf: error: [Errno 17] File exists: '{tmp_path / 'file'}'"
    status, _, errors = run("reconstruct", AUDIO / CLIPS[0], tmp_path / "missing" / "out.wav")
    assert status == 1 and f"there is no directory {tmp_path / 'missing'}" in errors


def test_a_recording_that_is_not_there_cannot_be_reconstructed(run, tmp_path):
    status, _, errors = run("reconstruct", tmp_path / "gone.wav", tmp_path / "out.wav")
    assert status == 1 and errors == f"flexicodec-hf: error: {tmp_path / 'gone.wav'}: there is no such file."
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_package_are_for_users_and_faults_are_not_hidden():
    for error in (DataError("no rows"), AudioError("no samples"), OSError("no space")):
        with pytest.raises(CommandError, match=str(error)), user_errors():
            raise error
    with pytest.raises(ValueError, match="a fault") as caught, user_errors():
        raise ValueError("a fault")
    assert caught.type is ValueError


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"flexicodec-hf {flexicodec_hf.__version__}\n"


# Conversion


def without_semantic(released: Path, directory: Path, suffix: str = ".safetensors") -> Path:
    """The codec without its semantic encoder, which goes to another directory as `model.pt`."""
    weights = load_file(released / "12hz_v1_half.safetensors")
    inside = {name for name in weights if name.startswith("semantic_model.")}
    (directory / "codec").mkdir()
    (directory / "sensevoice").mkdir()
    shutil.copy(released / "12hz_v1_half_config.yaml", directory / "codec")
    codec = {name: tensor for name, tensor in weights.items() if name not in inside}
    path = directory / "codec" / f"12hz_v1_half{suffix}"
    if suffix == ".pt":
        torch.save({"model": codec}, path)
    else:
        save_file(codec, path)
    semantic = {name.removeprefix("semantic_model."): weights[name] for name in inside}
    torch.save({"state_dict": semantic}, directory / "sensevoice" / "model.pt")
    return directory


def test_convert_a_repository_and_reconstruct(released, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["convert", "--repo", str(released), "--no-tts", "-o", str(out)]) == 0
    output = capsys.readouterr().out
    assert f"{out}: codec." in output
    _, loading = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    clip, result = str(AUDIO / "short_0p08s.wav"), str(tmp_path / "out.wav")
    assert main(["reconstruct", clip, result, "--model", str(out), "--device", "cpu"]) == 0

    assert main(["convert", "--repo", str(released), "--no-tts", "-o", str(out)]) == 1
    assert "model.safetensors exists: pass --overwrite" in capsys.readouterr().err
    assert (
        main(["convert", "--repo", str(released), "--no-tts", "-o", str(out), "--overwrite", "--dtype", "bfloat16"])
        == 0
    )
    assert AutoModel.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_convert_files(released, model, tmp_path, suffix):
    sources = without_semantic(released, tmp_path, suffix)
    args = ["--codec", str(sources / "codec" / f"12hz_v1_half{suffix}")]
    args += ["--codec-config", str(released / "12hz_v1_half_config.yaml")]
    args += ["--semantic", str(sources / "sensevoice" / "model.pt"), "-o", str(tmp_path / "model")]
    assert main(["convert", *args]) == 0
    converted, expected = (load_file(Path(path) / "model.safetensors") for path in (tmp_path / "model", model))
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


def test_convert_downloads_what_is_needed(released, tmp_path, monkeypatch):
    sources = without_semantic(released, tmp_path)
    folders = {"jiaqili3/flexicodec": sources / "codec", "FunAudioLLM/SenseVoiceSmall": sources / "sensevoice"}
    asked = []

    def download(repo: str, filename: str, revision: None) -> str:
        asked.append((repo, filename))
        return str(folders[repo] / filename)

    monkeypatch.setattr("flexicodec_hf.conversion.download.hf_hub_download", download)
    assert main(["convert", "--repo", "jiaqili3/flexicodec", "--no-tts", "-o", str(tmp_path / "a")]) == 0
    codec_files = [("jiaqili3/flexicodec", f"12hz_v1_half{end}") for end in (".safetensors", "_config.yaml")]
    assert asked == [*codec_files, ("FunAudioLLM/SenseVoiceSmall", "model.pt")]

    asked.clear()
    folders["jiaqili3/flexicodec"] = released
    assert main(["convert", "--repo", "jiaqili3/flexicodec", "--no-tts", "-o", str(tmp_path / "b")]) == 0
    assert asked == codec_files

    asked.clear()
    shutil.copy(sources / "sensevoice" / "model.pt", sources / "codec")
    assert main(["convert", "--repo", str(sources / "codec"), "--no-tts", "-o", str(tmp_path / "c")]) == 0
    assert asked == []


def test_convert_errors(released, tmp_path, capsys, monkeypatch):
    def offline(repo: str, filename: str, revision: None) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("flexicodec_hf.conversion.download.hf_hub_download", offline)
    (tmp_path / "empty").mkdir()
    weights = load_file(released / "12hz_v1_half.safetensors") | {"stray": torch.zeros(1)}
    save_file(weights, tmp_path / "stray.safetensors")
    (tmp_path / "half.pt").write_bytes(b"half")
    for args, message in (
        (
            ["--repo", "someone/something"],
            "something, which is neither a directory here nor a repository that can be reached",
        ),
        (["--repo", str(tmp_path / "empty")], "no file 12hz_v1_half.safetensors in the directory"),
        (["--codec", str(tmp_path / "missing.pt")], "There is no checkpoint file"),
        (["--codec", str(tmp_path / "half.pt")], "cannot be read as a PyTorch file"),
        (["--codec", str(tmp_path / "stray.safetensors")], "Unknown (1): stray. Pass --allow-partial"),
    ):
        assert main(["convert", *args, "-o", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("flexicodec-hf: error: ") and message in error
    assert not (tmp_path / "out").exists()
    stray = ["convert", "--codec", str(tmp_path / "stray.safetensors"), "-o", str(tmp_path / "out")]
    assert main([*stray, "--allow-partial"]) == 0


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"null", b"[]", None], ids=["empty", "null", "list", "cut"])
def test_a_broken_repository_is_one_line_that_names_the_file(model, tmp_path, capsys, file, content):
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    whole = (broken / file).read_bytes()
    (broken / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    command = ["encode", str(AUDIO / CLIPS[0]), "-o", str(tmp_path / "out"), "--model", str(broken), "--device", "cpu"]
    assert main(command) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("flexicodec-hf"))
    assert f"{broken / file}" in line and "Download or convert it again" in line
