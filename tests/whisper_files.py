"""Writes Whisper's tokenizer files as they are on the Hub (see tests/fixtures/whisper/README.md)."""

import gzip
import json
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode


MERGES = Path(__file__).parent / "fixtures" / "whisper" / "merges.txt.gz"


def read_merges() -> list[str]:
    """All 50,000 merges, as lines `"a b"`."""
    return gzip.decompress(MERGES.read_bytes()).decode().splitlines()[1:]


def read_vocabulary() -> dict[str, int]:
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in read_merges()), "", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def write_tokenizer_json(directory: Path, languages: tuple[str, ...] = (), **model: object) -> Path:
    """`tokenizer.json`, with `languages` among the added tokens; `model` replaces entries of the BPE."""
    added = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in languages), "<|translate|>"]
    content = {
        "version": "1.0",
        "added_tokens": [{"id": 50257 + i, "content": token, "special": True} for i, token in enumerate(added)],
        "model": {"type": "BPE", "vocab": read_vocabulary(), "merges": read_merges()[1:]} | model,
    }
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
