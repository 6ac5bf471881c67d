import runpy

import soundfile

from conftest import AUDIO, TESTS


def test_demo_reconstructs_at_every_setting(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(TESTS.parent / "examples" / "demo.py"))["main"]
    main([str(AUDIO / "librivox_austen_0880.flac")])

    output = capsys.readouterr().out
    assert "librivox_austen_0880.flac: 2.99 s" in output
    assert "RANDOM weights: what it makes is noise" in output
    rows = {
        tuple(line.split()[:2]): line.split()[2:]
        for line in output.splitlines()
        if line.startswith(("merging_threshold", "target_frame_rate"))
    }
    assert len(rows) == 5
    # Nothing is merged: 37 frames; semantic codes of 15 bits, acoustic ones of 12, lengths of 3.
    tokens, rate, semantic_bits, all_bits, *_ = rows["merging_threshold", "1.0"]
    assert (tokens, rate) == ("37", f"{37 / 2.99:.2f}")
    assert (semantic_bits, all_bits) == (f"{37 / 2.99 * 18:.0f}", f"{37 / 2.99 * 102:.0f}")
    assert abs(float(rows["target_frame_rate", "6.25"][1]) - 6.25) < 0.2

    sounds = sorted(path.name for path in (tmp_path / "demo").glob("*.wav"))
    assert len(sounds) == 11 and "target_frame_rate_6.25_8.wav" in sounds
    for name in sounds:
        info = soundfile.info(tmp_path / "demo" / name)
        assert info.samplerate == 16_000 and abs(info.duration - 2.99) < 0.2
