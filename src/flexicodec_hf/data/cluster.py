"""Tokenization on many machines: steps of a `datatrove` pipeline, for its local, Ray, Slurm and HF Jobs executors.

    pipeline = [SpeechReader("recordings"), FlexiCodecTokenizer("tokens", "flexicodec", merging_thresholds=[0.91])]
    LocalPipelineExecutor(pipeline, tasks=8, workers=2, logging_dir="logs").run()

Each task reads a part of the documents and writes shards of a corpus as `flexicodec-hf tokenize` does, with the same
rows. The executor starts tasks that did not end again; a task goes on after its last shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from datasets import Features, Value
from datatrove.data import Document, DocumentsPipeline, Media, MediaType
from datatrove.pipeline.base import PipelineStep

from .files import DataError
from .runner import CodecRunner
from .sources import UNDECODED, load_speech, standard_columns
from .tokenization import Block, Tokenization, as_streams


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
        streams = as_streams(standard_columns(load_speech(self.source, **self.options)), self.clips_per_stream)
        for number in range(rank, len(streams), world_size):
            for position, table in enumerate(streams[number].iter(batch_size=1)):
                (row,) = table.to_pylist()
                audio, clip, text = row.pop("audio") or {}, row.pop("id"), row.pop("text", None)
                clip = f"{number:05d}-{position}" if clip is None else clip
                path = audio.get("path")
                media = Media(clip, MediaType.AUDIO, url=path, path=path, media_bytes=audio.get("bytes"))
                yield Document(text=text or "", id=clip, media=[media], metadata=row)


class FlexiCodecTokenizer(PipelineStep):
    """
    Encode the audio of documents, and write the tokens to Parquet: a corpus as `flexicodec-hf tokenize` writes it.

    The documents go on, without those whose audio cannot be read, and with `token_count` (tokens at the first rate) in
    their metadata. When the last task ends, the corpus gets its manifest.

    Args:
        output_dir: Directory to write to, on a file system that all machines see.
        model: Converted codec, a Hub id or a directory.
        clips_per_shard, chunk_length_s: See [`tokenize_corpus`].
        metadata_columns: Metadata to keep as columns, with their types: `{"speaker": "string"}`.
        device: Where to encode; by default one of the GPUs that the task sees, in turns, or the CPU if there is none.
        dtype: Type to run in.
        options: Those of [`Tokenization`], such as `merging_thresholds` and `batch_seconds`.

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
        clips_per_shard: int = 1000,
        chunk_length_s: float = 30.0,
        metadata_columns: Mapping[str, str] | None = None,
        device: str | None = None,
        dtype: str = "float32",
        **options: Any,
    ):
        super().__init__()
        self.output_dir, self.model, self.device, self.dtype = output_dir, model, device, dtype
        self.clips_per_shard, self.chunk_length_s, self.options = clips_per_shard, chunk_length_s, options
        self.metadata_columns = dict(metadata_columns or {})

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Encode the documents of a task, and yield those whose audio could be read."""
        num_gpus = torch.cuda.device_count()
        device = self.device or (f"cuda:{rank % num_gpus}" if num_gpus else "cpu")
        runner = CodecRunner.from_pretrained(self.model, device, self.dtype, self.chunk_length_s)
        source = {"num_tasks": world_size, "clips_per_shard": self.clips_per_shard}
        work = Tokenization(self.output_dir, runner, source, **self.options)
        documents: dict[int, list[Document]] = {}

        def blocks() -> Iterator[Block]:
            for number, last, batch in _batches(data, self.clips_per_shard):
                if (rank, number) not in work.corpus.summaries:
                    documents[number] = batch
                    yield Block.from_rows(rank, number, last, self._rows(batch))

        for block in work.run(blocks()):
            for clip, document in zip(block.clips, documents.pop(block.number), strict=True):
                self.stat_update("clips" if clip.tokens else "broken")
                if clip.tokens:
                    document.metadata["token_count"] = len(clip.tokens[0].token_lengths)
                    self.stat_update("seconds", value=clip.tokens[0].seconds)
                    self.update_doc_stats(document)
                    yield document
        work.corpus.close(world_size)

    def _rows(self, documents: Sequence[Document]) -> pa.Table:
        """The rows of a block, as a dataset of speech has them."""
        types = Features(
            {"id": Value("string"), "audio": UNDECODED, "text": Value("string")}
            | {name: Value(kind) for name, kind in self.metadata_columns.items()}
        )
        rows = []
        for document in documents:
            recordings = [media for media in document.media if media.type == MediaType.AUDIO]
            if len(recordings) != 1:
                raise DataError(f"document {document.id} has {len(recordings)} recordings in its media, not one.")
            audio = {"bytes": recordings[0].media_bytes, "path": recordings[0].path or recordings[0].url}
            kept = {name: document.metadata.get(name) for name in self.metadata_columns}
            rows.append({"id": document.id, "audio": audio, "text": document.text or None} | kept)
        return pa.Table.from_pylist(rows, schema=types.arrow_schema)


def _batches(documents: DocumentsPipeline, size: int) -> Iterator[tuple[int, bool, list[Document]]]:
    """Numbered lists of `size` documents, and whether each is the last; one empty list if there are no documents."""
    number = 0
    batch: list[Document] = []
    for document in documents or ():
        if len(batch) == size:
            yield number, False, batch
            number, batch = number + 1, []
        batch.append(document)
    yield number, True, batch
