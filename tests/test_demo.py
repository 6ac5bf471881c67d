import base64
import io
import re
import runpy

import numpy as np
import soundfile

from conftest import AUDIO, TESTS


def test_demo_reconstructs_speaks_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(TESTS.parent / "examples" / "demo.py"))["main"]
    main([str(AUDIO / "librivox_austen_0880.flac"), "--text", "Good morning."])

    output = capsys.readouterr().out
    assert "librivox_austen_0880.flac: 2.99 s" in output
    header, *lines = output[output.index("tokens/s") :].splitlines()
    rows = [line.split() for line in lines if line.strip() and line.strip()[0].isdigit()]
    assert header.split()[:5] == ["tokens/s", "codebooks", "bits/s", "STOI", "PESQ"]
    assert [row[1] for row in rows] == ["1", "8"] * 3
    # 37 frames, each a token: semantic codes of 11 bits, acoustic ones of 8, lengths of 3.
    assert rows[0][:3] == [f"{37 / 2.99:.2f}", "1", f"{37 / 2.99 * 14:.0f}"]
    assert rows[1][2] == f"{37 / 2.99 * 70:.0f}"
    for row, rate in zip(rows[::2], (12.5, 8.3, 6.25), strict=True):
        assert abs(float(row[0]) - rate) < 0.3
    assert all(0 < float(row[3]) < 1 and 1 < float(row[4]) < 4.5 for row in rows)
    assert "'Good morning.', spoken: " in output

    sounds = {path.name: soundfile.info(path) for path in (tmp_path / "demo").glob("*.wav")}
    assert len(sounds) == 8 and {"original.wav", "8.3_tokens_1_codebooks.wav", "spoken.wav"} <= sounds.keys()
    spoken = sounds.pop("spoken.wav")
    assert spoken.samplerate == 16_000 and 0.3 < spoken.duration < 5
    for info in sounds.values():
        assert info.samplerate == 16_000 and abs(info.duration - 2.99) < 0.1
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 50_000

    # The page needs no other file, and holds what was made.
    page = (tmp_path / "demo" / "index.html").read_text()
    assert str(tmp_path / "demo" / "index.html") in output
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    heard = [base64.b64decode(flac) for flac in re.findall(r"data:audio/flac;base64,([^\"]+)", page)]
    assert len(heard) == page.count("data:image/png;base64,") == 1 + 6 + 1
    (last, rate), (expected, _) = soundfile.read(io.BytesIO(heard[-1])), soundfile.read(tmp_path / "demo/spoken.wav")
    assert rate == 16_000 and abs(last - expected).max() < 1e-3
    assert re.findall("<td>([^<]*)", page)[:3] == rows[0][:3] and page.count("<tr>") == 7
    assert "Good morning." in page


def test_demo_escapes_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = runpy.run_path(str(TESTS.parent / "examples" / "demo.py"))
    sound = demo["Sound"]("<b>", np.zeros(16_000, dtype=np.float32), 16_000)
    assert "<b>" not in demo["figure_of"](sound) and "&lt;b&gt;" in demo["figure_of"](sound)
