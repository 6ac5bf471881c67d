"""`flexicodec-hf app`, in a browser."""

import argparse
import re
import runpy
import shutil

import numpy as np
import pytest
import soundfile
from huggingface_hub import SpaceCard

from conftest import AUDIO, TESTS
from flexicodec_hf.cli import app, main


SPACE = TESTS.parent / "examples" / "space"
WAIT_MS = 60_000


def test_the_space_starts_the_app(monkeypatch):
    called = []
    monkeypatch.setenv("MODEL", "somebody/flexicodec")
    monkeypatch.setattr("flexicodec_hf.cli.main", called.append)
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    parser = argparse.ArgumentParser()
    app.add_commands(parser.add_subparsers())
    args = parser.parse_args(called[0])
    assert args.whisper is None
    monkeypatch.setenv("WHISPER", "somebody/whisper")
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert parser.parse_args(called[1]).whisper == "somebody/whisper"
    assert args.model == "somebody/flexicodec" and args.host == "0.0.0.0" and args.port == 7860
    clips = list(args.clips.glob("*.flac"))
    assert clips and all(clip.with_suffix(".txt").read_text().strip() for clip in clips)


def test_the_space_has_its_header():
    data = SpaceCard.load(SPACE / "README.md").data
    assert data.sdk == "gradio" and (SPACE / data.app_file).is_file() and data.license == "mit"
    assert re.fullmatch(r"6\.\d+\.\d+", data.sdk_version) and len(data.short_description) <= 60


def test_clips_without_their_words_are_refused(tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs the extra [app]")
    shutil.copy(AUDIO / "silence_2s.wav", tmp_path)
    assert main(["app", "--clips", str(tmp_path)]) == 1
    assert "what it says is needed" in capsys.readouterr().err


def build(*arguments):
    parser = argparse.ArgumentParser()
    app.add_commands(parser.add_subparsers())
    return app.build(parser.parse_args(["app", "--device=cpu", *arguments]))


@pytest.mark.parametrize("has_whisper", [False, True])
def test_words_are_asked_for_if_something_finds_them(has_whisper, codec_dir, monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra [app]")
    monkeypatch.setattr("flexicodec_hf.serving.words.load_aligner", lambda model: {"a/whisper": align}[model])
    page = build(f"--model={codec_dir()}", *["--whisper=a/whisper"] * has_whisper)
    (field,) = (block for block in page.blocks.values() if block.elem_id == "codec-text")
    assert field.visible == has_whisper


def test_the_picture_has_the_words_where_they_are_spoken():
    pytest.importorskip("gradio", reason="needs the extra [app]")
    from flexicodec_hf.serving.page import _picture

    waveform = np.zeros(32_000, dtype=np.float32)
    words = align(waveform, "Good morning")
    above, below = _picture(waveform, waveform, 16_000, np.array([0.0, 0.5]), words).axes
    (labels,) = above.child_axes
    assert [label.get_text() for label in labels.get_xticklabels()] == ["Good", "morning"]
    assert labels.get_xticks().tolist() == [0.5, 1.5] and not below.child_axes
    above, _ = _picture(waveform, waveform, 16_000, np.array([0.0, 0.5]), []).axes
    assert not above.child_axes


def align(waveform, text):
    """Words of even length."""
    from flexicodec_hf.serving.words import Word

    if text == "Nothing of this.":
        raise ValueError("Words that are not there.")
    seconds, words = len(waveform) / 16_000, text.split()
    return [Word(word, i * seconds / len(words), (i + 1) * seconds / len(words)) for i, word in enumerate(words)]


@pytest.fixture(scope="module")
def url(tts_repository):
    pytest.importorskip("gradio", reason="needs the extra [app]")
    clips = SPACE / "clips"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("flexicodec_hf.serving.words.load_aligner", lambda model: align)
        page = build(f"--model={tts_repository}", f"--clips={clips}", "--whisper=a/whisper")
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, allowed_paths=[str(clips)], server_name="127.0.0.1")
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no browser: `apt-get install chromium`")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1200, 900), (390, 844)], ids=["wide", "phone"])
def page(request, browser, url):
    page = browser.new_page(viewport=dict(zip(("width", "height"), request.param, strict=True)))
    page.set_default_timeout(WAIT_MS)
    faults = []
    page.on("pageerror", lambda fault: faults.append(fault))
    page.goto(url)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= request.param[0]  # nothing sticks out
    assert not faults
    page.close()


def heard(page, name) -> tuple[float, int]:
    """Seconds and rate of what a player holds."""
    with page.expect_download() as download:
        page.locator(f"#{name} a[download]").click()
    info = soundfile.info(download.value.path())
    return info.duration, info.samplerate


def upload(page, name, path):
    page.locator(f"#{name} input[type=file]").set_input_files(path)
    page.locator(f"#{name} a[download]").wait_for(state="attached")


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def test_a_recording_goes_to_tokens_and_back(page):
    upload(page, "codec-source", AUDIO / "stereo_44k.flac")
    page.locator("#codec-text textarea").fill("Nothing of this.")
    press(page, "To tokens and back")
    page.get_by_text("Words that are not there.").wait_for()
    page.locator("#codec-text textarea").fill("I did not know what she said.")
    press(page, "To tokens and back")
    said = page.locator("#codec-said").get_by_text("a second")
    said.wait_for()
    assert re.search(r"\d+ tokens for 5\.3 s: 8\.\d a second", said.inner_text())
    assert "2 channels averaged; resampled from 44100 to 16000 Hz" in said.inner_text()
    assert heard(page, "reconstruction") == (pytest.approx(5.3, abs=0.01), 16_000)
    page.locator("#tokens img").wait_for()


def test_errors_are_words(page):
    press(page, "To tokens and back")
    page.get_by_text("There is no recording yet: record one, or choose a file.").wait_for()
    tab(page, "Speak")
    page.locator("#text textarea").fill("...")
    press(page, "Speak")
    page.get_by_text("must hold something to speak").wait_for()


def test_a_text_is_spoken(page):
    tab(page, "Speak")
    page.locator("#text textarea").fill("Hello there.")
    press(page, "Speak")
    said = page.locator("#speak-said").get_by_text("of speech in")
    said.wait_for()
    assert re.search(r"First audio after \d+\.\d\d s\. \d+\.\d s of speech in \d+\.\d s\.", said.inner_text())
    seconds, rate = heard(page, "speech")
    assert rate == 24_000 and seconds > 0.1


def test_a_voice_is_converted(page):
    tab(page, "Convert a voice")
    upload(page, "convert-source", AUDIO / "librivox_austen_0880.flac")
    press(page, "Convert")
    page.locator("#converted a[download]").wait_for()
    seconds, rate = heard(page, "converted")
    assert rate == 24_000 and seconds == pytest.approx(2.99, abs=0.2)
