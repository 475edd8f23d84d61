"""Prometheus metrics of the server."""

from collections.abc import Iterable
from typing import Any

from megagpt.serve.worker import Worker

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Requests by path and status, their time to the first byte, and the worker's counts."""

    def __init__(self, worker: Worker) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = CollectorRegistry()
        self._requests = Counter(
            "megagpt_requests", "Requests, by path and status.", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "megagpt_response_seconds",
            "Time until the answer begins: for a stream its headers, otherwise the complete answer.",
            ["path"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._registry.register(_WorkerCollector(worker))  # type: ignore[arg-type]

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count an answer that began after `seconds`."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """The metrics in Prometheus' text format, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _WorkerCollector:
    """Reads the worker's counts at each scrape."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterable[Any]:
        """Called by prometheus_client for every scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        worker = self._worker
        yield GaugeMetricFamily("megagpt_running_requests", "Texts that are being generated.", worker.num_running)
        yield GaugeMetricFamily("megagpt_waiting_requests", "Requests that wait for a slot.", worker.num_waiting)
        yield GaugeMetricFamily("megagpt_slots", "Texts that can be generated at the same time.", worker.num_slots)
        yield CounterMetricFamily("megagpt_prompt_tokens", "Tokens of prompts.", worker.num_prompt)
        yield CounterMetricFamily("megagpt_generated_tokens", "Tokens that were generated.", worker.num_generated)
