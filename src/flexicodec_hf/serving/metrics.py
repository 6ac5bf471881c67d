"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "flexicodec_requests", "Answered requests.", ("method", "route", "status"), registry=registry
        )
        self.jobs = Gauge("flexicodec_jobs", "Requests that wait for the model, or run on it.", registry=registry)
        self.batch_size = Histogram(
            "flexicodec_batch_size", "Requests of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.first_audio = Histogram(
            "flexicodec_first_audio_seconds",
            "From a request (to speak, or to decode tokens) to its first audio.",
            ("kind",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.real_time_factor = Histogram(
            "flexicodec_real_time_factor",
            "Seconds that a request took, for each second of its audio.",
            ("kind",),
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10),
            registry=registry,
        )
        self.audio_seconds = Counter(
            "flexicodec_audio_seconds", "Seconds of audio that were sent.", ("kind",), registry=registry
        )
        self.canceled = Counter("flexicodec_canceled", "Requests whose client left.", registry=registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
