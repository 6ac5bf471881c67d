"""Tokenization on many machines: steps of a `datatrove` pipeline, for its local, Ray, Slurm and HF Jobs executors.

    pipeline = [SpeechReader("recordings"), FlexiCodecTokenizer("tokens", "flexicodec", merging_thresholds=[0.91])]
    LocalPipelineExecutor(pipeline, tasks=8, workers=2, logging_dir="logs").run()

Each task reads a part of the documents and writes shards of a corpus as `flexicodec-hf tokenize` does, with the same
rows. The executor starts tasks that did not end again; a task goes on after its last shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Features, Value
from datatrove.data import Document, DocumentsPipeline, Media, MediaType
from datatrove.pipeline.base import PipelineStep

from .files import DataError
from .runner import CodecRunner, rate_settings
from .shards import close_corpus, find_shards, finished_blocks, library_versions, shard_path, write_shard
from .sources import load_speech, standard_columns
from .streams import as_stream, num_streams, read_stream
from .tokenization import Block, encoded_blocks, summary_of, table_of


class SpeechReader(PipelineStep):
    """
    Documents of any source of speech, each with its audio as `media`: a file's path, or its bytes. Without a
    transcript, the text is empty.

    Task `n` of `N` reads every `N`th stream: as many tasks work as there are files of a sharded dataset, or runs of
    `clips_per_stream` clips of another.

    Args:
        source: What `load_speech` takes: a folder, a list of files, tars, Parquet files, or a dataset on the Hub.
        clips_per_stream: Clips of a stream.
        options: Those of [`load_speech`], such as `split` and `text_column`.
    """

    type = "READER"
    name = "FlexiCodec speech"

    def __init__(self, source: str, clips_per_stream: int = 1000, **options: Any):
        super().__init__()
        self.source, self.clips_per_stream, self.options = source, clips_per_stream, options

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of a task."""
        yield from data or ()
        stream = as_stream(standard_columns(load_speech(self.source, **self.options)), self.clips_per_stream)
        for number in range(rank, num_streams(stream), world_size):
            position = 0
            for rows, _ in read_stream(stream, number, (), self.clips_per_stream):
                for row in rows.to_pylist():
                    audio, clip, text = row.pop("audio") or {}, row.pop("id"), row.pop("text", None)
                    clip = f"{number:05d}-{position}" if clip is None else clip
                    media = Media(
                        id=clip,
                        type=MediaType.AUDIO,
                        url=audio.get("path"),
                        path=audio.get("path"),
                        media_bytes=audio.get("bytes"),
                    )
                    position += 1
                    yield Document(text=text or "", id=clip, media=[media], metadata=row)


class FlexiCodecTokenizer(PipelineStep):
    """
    Encode the audio of documents, and write the tokens to Parquet: a corpus as `flexicodec-hf tokenize` writes it.

    The documents go on, without those whose audio cannot be read, and with `token_count` (tokens at the first rate) in
    their metadata. When the last task ends, the corpus gets its manifest.

    Args:
        output_dir: Directory to write to, on a file system that all machines see.
        model: Converted codec, a Hub id or a directory.
        merging_thresholds, target_frame_rates, num_quantizers, batch_seconds, clips_per_shard, chunk_length_s, \
num_workers, split: See [`tokenize_corpus`].
        metadata_columns: Metadata to keep as columns, with their types: `{"speaker": "string"}`.
        device: Where to encode; by default CUDA if the task has a GPU, else the CPU.
        dtype: Type to run in.

    Raises:
        DataError: A document has not exactly one recording, or `output_dir` holds tokens made with other settings or
            another number of tasks.
    """

    type = "TOKENIZER"
    name = "FlexiCodec"

    def __init__(
        self,
        output_dir: str,
        model: str,
        *,
        merging_thresholds: Sequence[float] = (),
        target_frame_rates: Sequence[float] = (),
        num_quantizers: int | None = None,
        batch_seconds: float = 120.0,
        clips_per_shard: int = 1000,
        chunk_length_s: float = 30.0,
        num_workers: int | None = None,
        split: str = "train",
        metadata_columns: Mapping[str, str] | None = None,
        device: str | None = None,
        dtype: str = "float32",
    ):
        super().__init__()
        self.output_dir, self.model, self.split = Path(output_dir), model, split
        self.merging_thresholds, self.target_frame_rates = merging_thresholds, target_frame_rates
        self.num_quantizers, self.batch_seconds, self.num_workers = num_quantizers, batch_seconds, num_workers
        self.clips_per_shard, self.chunk_length_s = clips_per_shard, chunk_length_s
        self.metadata_columns = dict(metadata_columns or {})
        self.device, self.dtype = device, dtype

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Encode the documents of a task, and yield those whose audio could be read."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        runner = CodecRunner.from_pretrained(self.model, device, self.dtype, self.chunk_length_s)
        rates = rate_settings(runner.config, self.merging_thresholds, self.target_frame_rates)
        num_quantizers = min(self.num_quantizers or runner.config.num_quantizers, runner.config.num_quantizers)
        settings = {
            "model": self.model,
            "dtype": self.dtype,
            "num_quantizers": num_quantizers,
            "rates": [str(rate) for rate in rates],
            "chunk_length_s": self.chunk_length_s,
            "clips_per_shard": self.clips_per_shard,
            "source": {"num_tasks": world_size},
        }
        (self.output_dir / "data").mkdir(parents=True, exist_ok=True)
        done = find_shards(self.output_dir, settings)
        versions = library_versions()
        documents: dict[int, list[Document]] = {}

        def blocks() -> Iterator[Block]:
            for number, batch, last in _batches(data, self.clips_per_shard):
                if (rank, number) not in done:
                    documents[number] = batch
                    yield Block(rank, number, self._rows(batch), last, len(batch))

        for block in encoded_blocks(blocks(), runner, rates, num_quantizers, self.batch_seconds, self.num_workers):
            summary = summary_of(block, rates, runner.config.sampling_rate)
            path = shard_path(self.output_dir, self.split, rank, block.number)
            write_shard(path, table_of(block), settings, summary, versions)
            self.stat_update("clips", value=len(block.encoded), unit="shard")
            self.stat_update("broken", value=len(block.broken), unit="shard")
            for row, document in enumerate(documents.pop(block.number)):
                if row in block.encoded:
                    tokens = block.encoded[row].tokens[0]
                    document.metadata["token_count"] = len(tokens.token_lengths)
                    self.stat_update("seconds", value=tokens.seconds)
                    self.update_doc_stats(document)
                    yield document
        shards = find_shards(self.output_dir, settings)
        if all(finished_blocks(shards, task) for task in range(world_size)):
            close_corpus(self.output_dir, self.split, shards, versions)

    def _rows(self, documents: Sequence[Document]) -> pa.Table:
        """The rows of a block, as a dataset of speech has them."""
        rows = []
        for document in documents:
            recordings = [media for media in document.media if media.type == MediaType.AUDIO]
            if len(recordings) != 1:
                raise DataError(f"document {document.id} has {len(recordings)} recordings in its media, not one.")
            audio = {"bytes": recordings[0].media_bytes, "path": recordings[0].path or recordings[0].url}
            kept = {name: document.metadata.get(name) for name in self.metadata_columns}
            rows.append({"id": document.id, "audio": audio, "text": document.text or None} | kept)
        features = Features(
            {
                "id": Value("string"),
                "audio": {"bytes": Value("binary"), "path": Value("string")},
                "text": Value("string"),
                **{name: Value(kind) for name, kind in self.metadata_columns.items()},
            }
        )
        return pa.Table.from_pylist(rows, schema=features.arrow_schema)


def _batches(documents: DocumentsPipeline, size: int) -> Iterator[tuple[int, list[Document], bool]]:
    """Numbered lists of `size` documents, and whether each is the last; one empty list if there are no documents."""
    number = 0
    batch: list[Document] = []
    for document in documents or ():
        if len(batch) == size:
            yield number, batch, False
            number, batch = number + 1, []
        batch.append(document)
    yield number, batch, True
