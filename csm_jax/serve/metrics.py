"""Metrics for Prometheus."""

from collections.abc import Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from csm_jax.inference.engine import Engine
from csm_jax.inference.ticket import Timing
from csm_jax.serve.store.database import Database

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
_FACTORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 4, 8)


class Metrics:
    """All metrics of one server."""

    def __init__(self):
        registry = self._registry = CollectorRegistry()

        def make(
            kind: type[Metric], name: str, help: str, labels: Sequence[str] = (), **more: Any
        ) -> Metric:
            return kind(f"csm_{name}", help, labels, registry=registry, **more)

        self.requests = make(
            Counter, "http_requests", "answered, by path and status", ("path", "status")
        )
        self.errors = make(Counter, "speech_errors", "speech that failed, by reason", ("reason",))
        self.audio_seconds = make(Counter, "audio_seconds", "seconds of speech made")
        self.first_audio = make(
            Histogram,
            "time_to_first_audio_seconds",
            "from the request to the first chunk of streams",
            buckets=_SECONDS,
        )
        self.real_time_factor = make(
            Histogram, "real_time_factor", "seconds of work a second of speech", buckets=_FACTORS
        )
        self.stages = make(
            Histogram,
            "stage_seconds",
            "seconds of each stage of a request",
            ("stage",),
            buckets=_SECONDS,
        )
        self._queue = make(Gauge, "queue_length", "requests that wait for a slot of the batch")
        self._running = make(Gauge, "batch_occupancy", "slots of the batch in use")
        self._slots = make(Gauge, "batch_size", "slots of the batch")
        self._storage_full = make(
            Gauge, "storage_full", "1 while the disk has no room for what is to be stored"
        )
        self.storage_failures = make(
            Counter, "storage_failures", "transactions of the database that failed"
        )

    def watch_database(self, database: Database) -> None:
        """Reads the metrics of storage from a database from now on."""
        self._storage_full.set_function(lambda: int(database.is_full))
        database.on_failure = self.storage_failures.inc

    def watch_engine(self, engine: Engine) -> None:
        """Reads the gauges of the engine from now on."""
        self._queue.set_function(lambda: engine.num_waiting)
        self._running.set_function(lambda: engine.num_running)
        self._slots.set(engine.max_batch)

    def record_speech(self, timing: Timing, elapsed: float, audio_seconds: float) -> None:
        """Records the stages and the speech of a request that has ended."""
        self.audio_seconds.inc(audio_seconds)
        if audio_seconds:
            self.real_time_factor.observe((elapsed - timing.queue) / audio_seconds)
        for stage, seconds in vars(timing).items():
            self.stages.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
