"""Make a corpus of exactly transcribed speech: sentences of books, spoken by synthetic voices.

python examples/make_synthetic_speech.py --text emma.txt persuasion.txt --output-dir speech --hours 3

`--voices` takes voices of flite (`slt`), voices and variants of espeak-ng
(`espeak-ng:en-us+f2`) and voices of festival (`festival:voice_kal_diphone`).

The text is plain text files, or the `Rdata.rdb` of an R package of books (`r-cran-janeaustenr` in
Debian: Jane Austen's novels, in the public domain; reading it needs `pip install rdata`). The
folder that comes out has the splits train, validation and test, each with FLAC files and a
`metadata.jsonl` of file_name, text, speaker and seconds: `load_dataset("audiofolder",
data_dir="speech")` reads it. No sentence is in two splits (with `--cut` no part of one is; other
parts of the same sentence may be). An interrupted run goes on where it stopped, and a run with more
hours adds to what is there.
"""

import argparse
import json
import os
import random
import re
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import soundfile
from tqdm import tqdm


VOICES = ("kal16", "slt", "rms", "awb")
# What ends in a dot without ending a sentence, and how it is said.
ABBREVIATIONS = {"Mr.": "Mister", "Mrs.": "Missus", "Dr.": "Doctor", "St.": "Saint"}


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, or of all the books in the database of an R package."""
    if path.suffix != ".rdb":
        yield from path.read_text(encoding="utf-8").splitlines()
        return
    import rdata

    index = rdata.read_rds(path.with_suffix(".rdx"))
    database = path.read_bytes()
    for offset, length in index["variables"].values():
        block = zlib.decompress(database[offset + 4 : offset + length])  # the first four bytes are the unpacked size
        yield from rdata.conversion.convert(rdata.parser.parse_data(block))
        yield ""


def sentences(lines: Iterator[str], min_words: int, max_words: int, cut: bool = False) -> Iterator[str]:
    """
    The sentences of `min_words` to `max_words` plain words, as they are to be said; with `cut`,
    parts of longer ones.
    """
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
            continue
        text = " ".join(paragraph).replace("_", "").replace("--", ", ")
        paragraph = []
        for written, said in ABBREVIATIONS.items():
            text = text.replace(written, said)
        text = re.sub(r"\s+([,;])", r"\1", re.sub(r"[\"()\[\]“”]", " ", text))
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split())):
            if re.fullmatch(r"[A-Z][A-Za-z',;: -]*[.!?]", sentence):
                for part in cut_sentence(sentence, max_words) if cut else [sentence]:
                    if min_words <= len(part.split()) <= max_words:
                        yield part


def cut_sentence(sentence: str, max_words: int) -> list[str]:
    """
    A sentence of too many words as parts of `max_words` at most, between commas, semicolons and
    colons.
    """
    if len(sentence.split()) <= max_words:
        return [sentence]
    parts: list[str] = []
    for clause in re.split(r"(?<=[,;:])\s+", sentence):
        if parts and len(parts[-1].split()) + len(clause.split()) <= max_words:
            parts[-1] += f" {clause}"
        else:
            parts.append(clause)
    return [part[0].upper() + part[1:].rstrip(",;:.!?' ") + "." for part in parts]


def speech_command(text: str, voice: str, path: Path) -> list[str]:
    """
    The command that speaks `text` to the WAV file `path`.

    Args:
        text: What to say.
        voice: A voice of flite, or `PROGRAM:VOICE`.
        path: The WAV file. Festival's text is written beside it.

    Raises:
        ValueError: The program is none of flite, espeak-ng and festival.
    """
    program, _, name = voice.rpartition(":")
    if program in ("", "flite"):
        return ["flite", "-voice", name, "-t", text, "-o", str(path)]
    if program == "espeak-ng":
        return ["espeak-ng", "-v", name, "-w", str(path), text]
    if program == "festival":
        source = path.with_suffix(".txt")
        source.write_text(text)
        return ["text2wave", "-eval", f"({name})", str(source), "-o", str(path)]
    raise ValueError(f"`--voices` names {voice!r}: the program must be flite, espeak-ng or festival, not {program!r}.")


def speak(text: str, voice: str, path: Path) -> float:
    """Write `text`, spoken, and return its seconds."""
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            spoken = Path(folder) / "spoken.wav"
            subprocess.run(speech_command(text, voice, spoken), check=True)
            waveform, sampling_rate = soundfile.read(spoken, dtype="int16")
        temporary = path.with_name(f".{path.name}")
        soundfile.write(temporary, waveform, sampling_rate, format="FLAC")
        temporary.replace(path)
    return soundfile.info(path).duration


def make_split(
    folder: Path, texts: Iterator[str], seconds: float, voices: Sequence[str], executor: ThreadPoolExecutor
) -> None:
    """Speak `texts`, a voice after the other, until they last `seconds`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    spoken = 0.0
    with tqdm(desc=folder.name, total=round(seconds), unit="s") as progress:
        for start in count(0, 64):
            batch = []
            for number, text in zip(range(start, start + 64), texts, strict=False):
                voice = voices[number % len(voices)]
                name = f"{number:06d}_{voice.replace(':', '-')}.flac"
                batch.append({"file_name": name, "text": text, "speaker": voice})
            if not batch:
                break
            durations = executor.map(lambda row: speak(row["text"], row["speaker"], folder / row["file_name"]), batch)
            for row, duration in zip(batch, durations, strict=True):
                if spoken < seconds:
                    rows.append(row | {"seconds": round(duration, 3)})
                    spoken += duration
                    progress.update(duration)
                else:
                    (folder / row["file_name"]).unlink()
            if spoken >= seconds:
                break
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a corpus of exactly transcribed speech.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, or Rdata.rdb of an R package")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=3.0, help="of the split train (default: %(default)s)")
    parser.add_argument(
        "--held-out-minutes", type=float, default=10.0, help="of validation and of test (default: %(default)s)"
    )
    parser.add_argument(
        "--voices", nargs="+", default=VOICES, help="of flite, or PROGRAM:VOICE (default: %(default)s)"
    )
    parser.add_argument("--min-words", type=int, default=4)
    parser.add_argument("--max-words", type=int, default=24)
    parser.add_argument("--cut", action="store_true", help="cut longer sentences at their commas")
    parser.add_argument(
        "--skip", type=int, default=0, help="sentences of the split train to leave out, such as another corpus has"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the sentences")
    args = parser.parse_args(argv)

    texts = [
        text for path in args.text for text in sentences(read_lines(path), args.min_words, args.max_words, args.cut)
    ]
    texts = list(dict.fromkeys(texts))
    random.Random(args.seed).shuffle(texts)
    # Which split a sentence is in does not depend on how much is spoken.
    parts = {"train": texts[len(texts) // 5 + args.skip :], "validation": texts[: len(texts) // 10]}
    parts["test"] = texts[len(texts) // 10 : len(texts) // 5]
    seconds = {
        "train": args.hours * 3600,
        "validation": args.held_out_minutes * 60,
        "test": args.held_out_minutes * 60,
    }
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        for split, part in parts.items():
            make_split(args.output_dir / split, iter(part), seconds[split], args.voices, executor)


if __name__ == "__main__":
    main()
