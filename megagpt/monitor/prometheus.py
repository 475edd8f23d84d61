"""Serve the newest values of a run and the readings of a node's GPUs to Prometheus, with one endpoint per node."""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megagpt.monitor.writers import flat

log = logging.getLogger(__name__)

GPU_HELP = "Reading of one GPU of this node by NVML at the time of the scrape"

Readings = Callable[[], Mapping[str, Mapping[str, float | str]]]
"""Returns readings by name, for each GPU of the node by its number."""


class PrometheusWriter:
    """`megagpt_<kind>_<name>` for the last row of each kind, and `megagpt_gpu_<name>{gpu="0"}`, read at each scrape.

    Values whose names differ only in characters that Prometheus does not allow, as those of the sources a-b and a_b, share one
    metric; the label `value` tells them apart.
    """

    name = "Prometheus"

    def __init__(self, port: int, address: str, labels: Mapping[str, str], read_gpus: Readings) -> None:
        """Start serving. labels: set on every value. Raises OSError if the port is taken."""
        from prometheus_client import CollectorRegistry, start_http_server

        self._labels, self._read_gpus = dict(labels), read_gpus
        self._values: dict[str, float] = {}
        self._sharing: dict[str, set[str]] = {}  # by metric: names of all values of this start
        self._lock = threading.Lock()
        registry = CollectorRegistry()
        registry.register(self)  # pyright: ignore[reportArgumentType]
        self._server, self._thread = start_http_server(port, addr=address, registry=registry)
        self.port: int = self._server.server_port

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Keep the row's numbers until the next row of its kind."""
        numbers = {name: float(value) for name, value in flat(kind, values) if type(value) in (int, float, bool)}
        numbers |= {f"{kind}/step": float(step), f"{kind}/time_seconds": time.time()}
        with self._lock:
            self._values = {name: value for name, value in self._values.items() if name.split("/")[0] != kind} | numbers
            for name in numbers:
                self._sharing.setdefault(metric_name(name), set()).add(name)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)

    def collect(self) -> Iterator[Any]:
        """Called by prometheus_client for every scrape, in the server's thread."""
        from prometheus_client.core import GaugeMetricFamily

        with self._lock:
            values = dict(self._values)
            sharing = {metric: sorted(names) for metric, names in self._sharing.items()}
        for metric, names in sorted(sharing.items()):
            present = [name for name in names if name in values]
            told_apart = ["value"] if len(names) > 1 else []
            help_text = f"{', '.join(names)} of the last row of its kind"
            family = GaugeMetricFamily(metric, help_text, labels=[*told_apart, *self._labels])
            for name in present:
                family.add_metric([*([name] if told_apart else []), *self._labels.values()], values[name])
            if present:
                yield family
        readings = self._read_gpus()
        names = sorted({name for found in readings.values() for name, value in found.items() if not isinstance(value, str)})
        for name in names:
            family = GaugeMetricFamily(metric_name(f"gpu/{name}"), GPU_HELP, labels=["gpu", *self._labels])
            for gpu, found in readings.items():
                if name in found:
                    family.add_metric([gpu, *self._labels.values()], float(found[name]))
            yield family


def metric_name(name: str) -> str:
    """`train/tokens_per_second` as megagpt_train_tokens_per_second."""
    return "megagpt_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)


def open_prometheus(port: int, address: str, labels: Mapping[str, str], read_gpus: Readings) -> PrometheusWriter | None:
    """The endpoint; None, with a warning, if the port is taken: training continues without it."""
    try:
        writer = PrometheusWriter(port, address, labels, read_gpus)
    except OSError as error:
        log.warning("monitor.prometheus_port=%d: no endpoint on %s for this attempt: %s", port, address, error)
        return None
    log.info("Prometheus: http://%s:%d/metrics", address, writer.port)
    return writer
