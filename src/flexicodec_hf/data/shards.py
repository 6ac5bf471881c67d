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
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from .files import DataError, atomic_file, check_same_settings
from .tokens import METADATA_KEY


class Corpus:
    """
    The shards of a corpus. A shard is a block of a stream: a stream is read in one go, and cut into blocks.

    Args:
        directory: Where they are; made if missing.
        settings: What decides their rows, with the `split` that they make.

    Attributes:
        summaries: By stream and block, what each shard says of itself: the `num_clips` that were read, `seconds` of
            audio and `tokens` for each rate, `resampled` and `downmixed` clips, whether it is the `last` of its
            stream, and the `broken` clips.

    Raises:
        DataError: A shard was made with other settings, or a file is no shard.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any]):
        self.directory, self.settings = Path(directory), settings
        self.summaries: dict[tuple[int, int], dict[str, Any]] = {}
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        self.find()

    def find(self) -> None:
        """Look for shards, of this process and of others."""
        for path in sorted((self.directory / "data").glob("[!.]*.parquet")):
            match = re.fullmatch(r".+-(\d{5})-(\d{5})\.parquet", path.name)
            try:
                metadata = json.loads((pq.read_metadata(path).metadata or {})[METADATA_KEY])
                place = int(match[1]), int(match[2])  # type: ignore[index]
                settings, self.summaries[place] = metadata["settings"], metadata["summary"]
            except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
                raise DataError(f"{path}: not a shard of tokens: {error!r}. Move it away.") from error
            check_same_settings(self.directory, settings, self.settings)

    def write(self, stream: int, block: int, table: pa.Table, summary: dict[str, Any]) -> None:
        """Write a shard, complete or not at all."""
        # A manifest is outdated: a shard was deleted to be made again.
        (self.directory / "manifest.json").unlink(missing_ok=True)
        metadata = json.dumps({"settings": self.settings, "summary": summary})
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA_KEY: metadata})
        with (
            atomic_file(self._path(stream, block)) as temporary,
            pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer,
        ):
            # `datasets` reads files without row groups, but not files with empty ones.
            if len(table):
                writer.write_table(table)
        self.summaries[stream, block] = summary

    def is_complete(self, stream: int) -> bool:
        """Whether all blocks of a stream are there."""
        block = 0
        while (stream, block) in self.summaries:
            if self.summaries[stream, block]["last"]:
                return True
            block += 1
        return False

    def close(self, num_streams: int) -> dict[str, Any] | None:
        """
        Write the manifest, the list of broken clips and the dataset card, once all shards are there.

        Returns:
            The manifest; `None` while shards are missing, which other processes write.
        """
        self.find()
        if not all(self.is_complete(stream) for stream in range(num_streams)):
            return None
        places = sorted(self.summaries)
        summaries = [self.summaries[place] for place in places]
        broken = [entry for summary in summaries for entry in summary["broken"]]
        with ThreadPoolExecutor() as pool:
            shards = list(pool.map(self._entry, places))
        manifest = {
            **_versions(),
            "settings": self.settings,
            "num_clips": sum(summary["num_clips"] for summary in summaries) - len(broken),
            "num_broken": len(broken),
            "num_resampled": sum(summary["resampled"] for summary in summaries),
            "num_downmixed": sum(summary["downmixed"] for summary in summaries),
            "hours": sum(summary["seconds"] for summary in summaries) / 3600,
            "num_tokens": {
                rate: sum(summary["tokens"][rate] for summary in summaries) for rate in self.settings["rates"]
            },
            "shards": shards,
        }
        for name, text in (
            ("broken.jsonl", "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in broken)),
            ("README.md", _card(manifest)),
            ("manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"),
        ):
            with atomic_file(self.directory / name) as path:
                path.write_text(text, encoding="utf-8")
        return manifest

    def _path(self, stream: int, block: int) -> Path:
        return self.directory / "data" / f"{self.settings['split']}-{stream:05d}-{block:05d}.parquet"

    def _entry(self, place: tuple[int, int]) -> dict[str, Any]:
        """A shard in the manifest."""
        path, summary = self._path(*place), self.summaries[place]
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return {
            "file": path.relative_to(self.directory).as_posix(),
            "sha256": digest.hexdigest(),
            "num_bytes": path.stat().st_size,
            "num_clips": summary["num_clips"] - len(summary["broken"]),
            "seconds": summary["seconds"],
        }


def _versions() -> dict[str, str]:
    from .. import __version__

    return {
        "flexicodec_hf_version": __version__,
        "transformers_version": transformers.__version__,
        "torch_version": torch.__version__,
        "datasets_version": datasets.__version__,
    }


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
  - split: {settings["split"]}
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
