"""Exports models to run elsewhere: `torch.export` programs, and ONNX files with a runner without PyTorch."""

from .graphs import Graph, codec_graphs, tts_graphs


__all__ = ["Graph", "codec_graphs", "tts_graphs"]
