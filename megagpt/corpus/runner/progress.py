"""Progress of long work: a bar with rate and ETA on a terminal, a plain line every ten seconds elsewhere."""

import logging
import sys
import time
from collections import Counter
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10

log = logging.getLogger(__name__)


class _Bar(tqdm):
    """Without tqdm's own thread, beside which workers could not be forked; `miniters=1` does without it."""

    monitor_interval = 0


class Progress:
    """Counts bytes of input towards `total_bytes`, with running counts of what `add` receives (kept, rejected, documents)."""

    def __init__(self, label: str, total_bytes: int, *, skipped: int = 0) -> None:
        self._label, self._total, self._done, self._counts = label, total_bytes, 0, Counter[str]()
        self._started = self._printed = time.monotonic()
        self._bar = _Bar(total=total_bytes, unit="B", unit_scale=True, desc=label, miniters=1) if sys.stderr.isatty() else None
        if skipped:
            log.info("%s: %d were done earlier", label, skipped)

    def add(self, num_bytes: int, **counts: int) -> None:
        """A piece of work is done. Only what is counted is shown."""
        self._done += num_bytes
        for name, count in counts.items():
            self._counts[name] += count
        if self._bar is not None:
            self._bar.update(num_bytes)
            self._bar.set_postfix(self._counts)
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            log.info("%s", self._line())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._done:
            log.info("%s", self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        share = 100 * self._done / self._total if self._total else 100.0
        counts = "".join(f", {value:,} {key}" for key, value in self._counts.items())
        return f"{self._label}: {share:.0f} %, {rate / 1e6:.1f} MB/s, {left:.0f} s left{counts}"
