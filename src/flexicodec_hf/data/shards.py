"""A corpus of tokens on disk.

    DIR/data/SPLIT-STREAM-BLOCK.parquet    tokens; the settings and the broken clips in its metadata
    DIR/manifest.json                      settings, versions, checksums; written when all shards exist
    DIR/broken.jsonl                       clips that were skipped, and why
    DIR/README.md                          a dataset card, through which `datasets` finds the shards

Shards are complete or absent. So the shards alone say what is done, whenever a run ends, and
everything else follows from them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from .files import DataError, atomic_file, check_same_settings
from .tokens import METADATA_KEY


_SHARD_NAME = re.compile(r"(.+)-(\d{5})-(\d{5})\.parquet")


@dataclass(frozen=True)
class Shard:
    """
    A finished file of tokens.

    Args:
        path: The file.
        stream, block: Which part of the dataset it holds: streams are read by one process or by all in turns, and cut
            into blocks.
        settings: What decides its rows.
        summary: `num_clips` that were read, `seconds` of audio and `tokens` for each setting,
            `resampled` and `downmixed` clips, `last` of its stream or not, and the `broken` clips.
    """

    path: Path
    stream: int
    block: int
    settings: dict[str, Any]
    summary: dict[str, Any]


def shard_path(directory: Path, split: str, stream: int, block: int) -> Path:
    return directory / "data" / f"{split}-{stream:05d}-{block:05d}.parquet"


def write_shard(
    path: Path, table: pa.Table, settings: Mapping[str, Any], summary: Mapping[str, Any], versions: Mapping[str, str]
) -> None:
    """Write a shard, complete or not at all."""
    metadata = json.dumps({"settings": settings, "summary": summary, "versions": versions})
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: metadata})
    with (
        atomic_file(path) as temporary,
        pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer,
    ):
        # `datasets` reads files without row groups, but not files with empty ones.
        if len(table):
            writer.write_table(table)


def find_shards(directory: Path, settings: Mapping[str, Any]) -> dict[tuple[int, int], Shard]:
    """
    The finished shards by stream and block.

    Raises:
        DataError: One was made with other settings, or is no shard.
    """
    shards = {}
    for path in sorted((directory / "data").glob("[!.]*.parquet")):
        match = _SHARD_NAME.fullmatch(path.name)
        try:
            metadata = json.loads((pq.read_metadata(path).metadata or {})[METADATA_KEY])
            stream, block = int(match[2]), int(match[3])  # type: ignore[index]
            shard = Shard(path, stream, block, metadata["settings"], metadata["summary"])
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a shard of tokens: {error!r}. Move it away.") from error
        check_same_settings(directory, shard.settings, settings)
        shards[shard.stream, shard.block] = shard
    return shards


def finished_blocks(shards: Mapping[tuple[int, int], Shard], stream: int) -> int | None:
    """How many blocks a stream has, if all of them are finished."""
    block = 0
    while (stream, block) in shards:
        if shards[stream, block].summary["last"]:
            return block + 1
        block += 1
    return None


def close_corpus(
    directory: Path, split: str, shards: Mapping[tuple[int, int], Shard], versions: Mapping[str, str]
) -> dict[str, Any]:
    """Write the manifest, the list of broken files and the dataset card of a corpus all of whose shards are there."""
    ordered = [shards[key] for key in sorted(shards)]
    with ThreadPoolExecutor() as pool:
        checksums = list(pool.map(_sha256, (shard.path for shard in ordered)))
    broken = [entry for shard in ordered for entry in shard.summary["broken"]]
    manifest = {
        **versions,
        "settings": ordered[0].settings,
        "split": split,
        "num_clips": sum(shard.summary["num_clips"] for shard in ordered) - len(broken),
        "num_broken": len(broken),
        "num_resampled": sum(shard.summary["resampled"] for shard in ordered),
        "num_downmixed": sum(shard.summary["downmixed"] for shard in ordered),
        "hours": sum(shard.summary["seconds"] for shard in ordered) / 3600,
        "num_tokens": {
            name: sum(shard.summary["tokens"][name] for shard in ordered) for name in ordered[0].summary["tokens"]
        },
        "shards": [
            {
                "file": shard.path.relative_to(directory).as_posix(),
                "sha256": checksum,
                "num_bytes": shard.path.stat().st_size,
                "num_clips": shard.summary["num_clips"] - len(shard.summary["broken"]),
                "seconds": shard.summary["seconds"],
            }
            for shard, checksum in zip(ordered, checksums, strict=True)
        ],
    }
    for name, text in (
        ("broken.jsonl", "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in broken)),
        ("README.md", _card(manifest)),
        ("manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"),
    ):
        with atomic_file(directory / name) as path:
            path.write_text(text, encoding="utf-8")
    # What killed processes had begun to write; nobody writes now.
    for leftover in (directory / "data").glob(".*.parquet"):
        leftover.unlink(missing_ok=True)
    return manifest


def library_versions() -> dict[str, str]:
    from .. import __version__

    return {
        "flexicodec_hf_version": __version__,
        "transformers_version": transformers.__version__,
        "torch_version": torch.__version__,
        "datasets_version": datasets.__version__,
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _card(manifest: Mapping[str, Any]) -> str:
    settings = manifest["settings"]
    rates = "\n".join(
        f"| {name} | {count} | {count / (3600 * manifest['hours']) if count else 0:.2f} |"
        for name, count in manifest["num_tokens"].items()
    )
    return f"""---
tags:
- audio
- flexicodec
configs:
- config_name: default
  data_files:
  - split: {manifest["split"]}
    path: data/*.parquet
---

# Tokens of {settings["source"].get("dataset", "a dataset")}

{manifest["hours"]:.3f} hours of speech in {manifest["num_clips"]} clips, encoded with the
codec `{settings["model"]}` in {settings["num_quantizers"]} codebooks. There is one row for each clip and rate setting.
`flexicodec-hf decode` turns rows into audio.

| setting | tokens | per second |
| --- | --- | --- |
{rates}

`manifest.json` has the settings, versions and checksums, `broken.jsonl` the clips that could not be read.
"""
