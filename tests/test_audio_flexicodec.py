import numpy as np
import pytest
import soundfile

from conftest import AUDIO
from flexicodec_hf.audio_flexicodec import (
    AudioError,
    AudioWriter,
    audio_seconds,
    check_audio_format,
    find_pause,
    read_audio,
    read_stretches,
    resample,
    resample_with_images,
    write_audio,
)


RATE = 16_000


def test_mono_is_read_as_it_is():
    path = AUDIO / "librivox_austen_0880.flac"
    clip = read_audio(path, RATE)
    expected, _ = soundfile.read(path, dtype="float32")
    assert clip.waveform.dtype == np.float32
    np.testing.assert_array_equal(clip.waveform, expected)
    assert clip.changes == []
    assert clip.seconds == audio_seconds(path) == len(expected) / RATE


def test_channels_are_averaged_and_the_rate_changed():
    # The channels hold one clip at 48 kHz, the right one at half level: the mean is three quarters of the original.
    clip = read_audio(AUDIO / "stereo_48k.wav", RATE)
    original = read_audio(AUDIO / "librivox_austen_0880.flac", RATE).waveform
    assert clip.changes == ["2 channels averaged", "resampled from 48000 to 16000 Hz"]
    assert clip.num_samples == len(original)
    error = clip.waveform - 0.75 * original
    assert np.square(error).mean() < 0.01 * np.square(original).mean()


def test_channels_are_averaged_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("flexicodec_hf.audio_flexicodec._BLOCK", 1000)
    samples = np.linspace(-0.5, 0.5, 3 * 2500, dtype=np.float32).reshape(2500, 3)
    soundfile.write(tmp_path / "three.wav", samples, RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "three.wav", RATE).waveform, samples.mean(axis=1), atol=1e-7)


def test_resampling_keeps_a_tone():
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
    resampled = resample(tone, 44_100, RATE)
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert resampled.shape == (RATE,) and resampled.dtype == np.float32
    np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=1e-3)


@pytest.mark.parametrize("suffix, atol", [(".wav", 2e-5), (".flac", 2e-5), (".ogg", 0.1)])
def test_write_and_read_again(tmp_path, suffix, atol):
    waveform = read_audio(AUDIO / "librivox_austen_0880.flac", RATE).waveform
    path = tmp_path / f"again{suffix}"
    write_audio(path, waveform, RATE)
    np.testing.assert_allclose(read_audio(path, RATE).waveform, waveform, atol=atol)


def test_loud_audio_is_clipped_and_does_not_wrap(tmp_path):
    write_audio(tmp_path / "loud.wav", np.array([1.5, -1.5]), RATE)
    np.testing.assert_allclose(read_audio(tmp_path / "loud.wav", RATE).waveform, [1, -1], atol=1e-4)


def damaged_flac(path):
    content = (AUDIO / "librivox_austen_0880.flac").read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("missing.wav", lambda path: None, "there is no such file"),
        ("folder.wav", lambda path: path.mkdir(), "this is a directory; pass its files"),
        ("text.wav", lambda path: path.write_text("not audio"), "not an audio file, or a damaged one: Format not"),
        ("nothing.wav", lambda path: path.write_bytes(b""), "not an audio file, or a damaged one"),
        ("half.flac", damaged_flac, "not an audio file, or a damaged one: .*lost sync"),
        ("header.raw", lambda path: path.write_bytes(b"00"), "does not say its sampling rate; convert it to WAV"),
        (
            "empty.wav",
            lambda path: soundfile.write(path, np.zeros(0), RATE),
            r"the audio is empty \(0 samples at 16000",
        ),
        (
            "nan.wav",
            lambda path: soundfile.write(path, np.array([0, np.nan, 1]), RATE, subtype="FLOAT"),
            "the audio has NaN or infinite samples",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, make, message):
    path = tmp_path / name
    make(path)
    with pytest.raises(AudioError, match=f"{name}: .*{message}"):
        read_audio(path, RATE)


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_too_few_samples_to_resample(tmp_path, num_samples):
    path = tmp_path / "tiny.wav"
    soundfile.write(path, np.full(num_samples, 0.5), 96_000)
    if num_samples == 5:
        assert read_audio(path, RATE).num_samples == 1
    else:
        with pytest.raises(
            AudioError, match=rf"empty \({num_samples} samples at 96000 Hz\): at least one sample at 16000"
        ):
            read_audio(path, RATE)


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.raw"])
def test_unknown_formats_are_refused(tmp_path, name):
    with pytest.raises(AudioError, match=r"unknown audio format '.*': use \.wav"):
        check_audio_format(tmp_path / name)
    with pytest.raises(AudioError, match="unknown audio format"):
        write_audio(tmp_path / name, np.zeros(10), RATE)


def test_broken_audio_is_not_written(tmp_path):
    with pytest.raises(AudioError, match="not written, the audio has NaN"):
        write_audio(tmp_path / "a.wav", np.array([0, np.nan]), RATE)
    with pytest.raises(AudioError, match="cannot be written"):
        write_audio(tmp_path / "missing" / "a.wav", np.zeros(10), RATE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["librivox_long.flac", "stereo_44k.flac", "short_0p02s.wav"])
def test_stretches_lose_nothing(name):
    whole = read_audio(AUDIO / name, 16_000).waveform
    parts = list(read_stretches(AUDIO / name, 16_000, max_length_s=7.0, cut_s=2.0))
    assert max(map(len, parts)) <= 7 * 16_000 and (len(parts) > 1) == (len(whole) > 7 * 16_000)
    assert min(map(len, parts[:-1]), default=5 * 16_000) >= 5 * 16_000
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


def test_a_stretch_ends_in_a_pause():
    draw = np.random.default_rng(0)
    waveform = draw.normal(size=10 * 16_000).astype(np.float32)
    waveform[6 * 16_000 : 7 * 16_000] = 0
    assert 6 * 16_000 < find_pause(waveform, 16_000) < 7 * 16_000
    # If all of it is equally quiet, a stretch is not empty.
    assert 0 < find_pause(np.zeros(16_000, dtype=np.float32), 16_000) <= 16_000


def test_audio_is_written_in_parts(tmp_path):
    waveform = read_audio(AUDIO / "librivox_austen_0880.flac", 16_000).waveform
    with AudioWriter(tmp_path / "parts.flac") as writer:
        assert writer.seconds == 0
        for part in np.array_split(waveform, 3):
            writer.write(part, 16_000)
    assert writer.seconds == len(waveform) / 16_000
    np.testing.assert_allclose(read_audio(writer.path, 16_000).waveform, waveform, atol=1 / 32_768)


# Files that end early


def cut(path, share=0.7, **options):
    """A file of noise without its end."""
    noise = np.random.default_rng(0).uniform(-0.2, 0.2, 10 * RATE).astype(np.float32)
    soundfile.write(path, noise, RATE, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return noise


def test_a_cut_mp3_is_refused_with_both_numbers(tmp_path, monkeypatch):
    path = tmp_path / "cut.mp3"
    cut(path)
    with pytest.raises(AudioError, match=r"cut\.mp3: .*cut short.* says 160000 samples, but there are 11\d{4}\."):
        read_audio(path, RATE)
    # The same in a stream, and with blocks that end before the file does.
    monkeypatch.setattr("flexicodec_hf.audio_flexicodec._BLOCK", 1 << 12)
    with pytest.raises(AudioError, match="says 160000 samples, but there are 11"):
        list(read_stretches(path, RATE, max_length_s=2, cut_s=1))


# libsndfile reports a cut Ogg file only where whole pages are missing.
@pytest.mark.parametrize(
    ("name", "share"),
    [(name, share) for name in ("wav", "aiff", "au", "w64", "rf64") for share in (0.7, 0.999)] + [("ogg", 0.7)],
)
def test_a_cut_file_is_read_with_a_warning(tmp_path, caplog, name, share):
    path = tmp_path / f"cut.{name}"
    noise = cut(path, share, format=name.upper())
    clip = read_audio(path, RATE)
    assert 0.5 * len(noise) < clip.num_samples < len(noise)
    if name != "ogg":
        np.testing.assert_allclose(clip.waveform, noise[: clip.num_samples], atol=1e-4)
    assert sum(map(len, read_stretches(path, RATE))) == clip.num_samples
    assert len(caplog.messages) == 2 and all(f"{path}: the file was cut short (" in line for line in caplog.messages)


@pytest.mark.parametrize("name", ["mp3", "wav", "aiff", "au", "w64", "rf64", "ogg", "flac"])
def test_a_whole_file_is_read_without_a_warning(tmp_path, caplog, name):
    noise = cut(tmp_path / f"whole.{name}", share=1.0, format=name.upper())
    assert read_audio(tmp_path / f"whole.{name}", RATE).num_samples == len(noise)
    assert caplog.messages == []


def test_a_length_that_the_writer_did_not_know_is_no_end_that_is_missing(tmp_path, caplog):
    noise = cut(tmp_path / "pipe.wav", share=1.0)
    content = bytearray((tmp_path / "pipe.wav").read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "pipe.wav").write_bytes(content)
    assert read_audio(tmp_path / "pipe.wav", RATE).num_samples == len(noise)
    assert caplog.messages == []


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, 0, 1, 10**9])
def test_rates_that_are_no_rates_are_refused(rate):
    with pytest.raises(AudioError, match=f"`target_rate` must be a number of hertz from 1000 to 1000000, got {rate}"):
        resample(np.zeros(100, dtype=np.float32), RATE, rate)
    with pytest.raises(AudioError, match="`source_rate` must be a number of hertz"):
        resample(np.zeros(100, dtype=np.float32), rate, RATE)
    with pytest.raises(AudioError, match="`sampling_rate` must be a number of hertz"):
        read_audio(AUDIO / "silence_2s.wav", rate)


@pytest.mark.parametrize("rate", [1, 2**31 - 1])
def test_a_header_with_a_rate_that_no_audio_has_is_refused(tmp_path, rate):
    cut(tmp_path / "rate.wav", share=1.0)
    content = bytearray((tmp_path / "rate.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "rate.wav").write_bytes(content)
    with pytest.raises(AudioError, match=f"rate.wav: its header says {rate} Hz, which no audio has"):
        read_audio(tmp_path / "rate.wav", RATE)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_reading_in_blocks_gives_what_resampling_the_whole_gives(tmp_path, monkeypatch, rate):
    monkeypatch.setattr("flexicodec_hf.audio_flexicodec._BLOCK", 3000)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 50_000).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", noise, rate, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "noise.wav", RATE).waveform, resample(noise, rate, RATE))


def test_a_stream_with_broken_samples_is_refused(tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan, 1]), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="the audio has NaN or infinite samples"):
        list(read_stretches(tmp_path / "nan.wav", RATE))


def test_voices_are_resampled_as_the_reference_does(golden):
    fixture = golden("mel")
    for source, expected, rates in (
        ("in/wave16k", "resample_16k_24k", (16_000, 24_000)),
        ("in/wave24k", "resample_24k_16k", (24_000, 16_000)),
    ):
        for waveform, resampled in zip(fixture[source].numpy(), fixture[expected].numpy(), strict=True):
            result = resample_with_images(waveform, *rates)
            assert result.dtype == np.float32
            np.testing.assert_allclose(result, resampled, rtol=0, atol=1e-6)
