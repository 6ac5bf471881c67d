"""Corpora of speech as corpora of tokens: many clips, several processes, runs that can be interrupted."""

from .shards import CorpusError
from .sources import load_corpus
from .tokenization import tokenize_corpus


__all__ = ["CorpusError", "load_corpus", "tokenize_corpus"]
