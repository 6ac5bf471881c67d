"""What a listener notices of speech that comes in chunks, without a package that would take memory of its own."""

import statistics
import time
from collections.abc import Iterable


def measure(chunks: Iterable[float]) -> tuple[float, float, float]:
    """
    Time to first audio, real-time factor, and the longest gap of a sentence.

    Args:
        chunks: Seconds of each chunk, as it comes.
    """
    start = time.perf_counter()
    first = played = gap = spoken = 0.0
    for length in chunks:
        now = time.perf_counter() - start
        first = first or now
        gap = max(gap, now - played) if played else 0.0
        played = max(now, played) + length
        spoken += length
    return first, (time.perf_counter() - start) / spoken, gap


def summary(rows: list[tuple[float, float, float]]) -> str:
    """What was measured, over sentences: 50 % / 90 % / most."""
    line = ""
    names = ("first audio, s", "real-time factor", "longest gap, s")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        cuts = statistics.quantiles([*values, *values[:1] * (len(values) == 1)], n=10, method="inclusive")
        line += f" | {name} " + " / ".join(f"{value:.2f}" for value in (cuts[4], cuts[8], max(values)))
    return line
