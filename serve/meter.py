"""What a replica has done, counted: requests, their time, rows, errors by kind; and a line for each request.

Counting is plain Python, for a metric of Ray costs 10 to 15 us a call; the replica hands the sums on once a second.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS: Final = (1, 2, 5, 10, 32, 100, 320, 1000, 3200, 10_000)
KINDS: Final = {
    401: "token",
    404: "path",
    405: "path",
    408: "slow client",
    413: "too large",
    415: "compressed",
    422: "input",
    429: "overload",
    500: "internal",
    504: "timeout",
}
COUNTERS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "heliostat_requests": ("Answered requests.", ("model", "version", "operation", "status")),
    "heliostat_errors": ("Requests with an error for an answer, by what was wrong.", ("model", "version", "kind")),
    "heliostat_rows": ("Predicted rows.", ("model", "version")),
    "heliostat_ignored_values": ("Values of columns that the model does not read.", ("model", "version")),
    # A histogram of Ray takes one value at a time. These are the series of one: `le` has the upper edges, cumulative.
    "heliostat_latency_seconds_bucket": ("Requests that took at most so long, body and answer.", ("model", "version", "le")),
    "heliostat_latency_seconds_sum": ("Seconds that requests took.", ("model", "version")),
    "heliostat_batch_rows_bucket": ("Predicted requests of at most so many rows.", ("model", "version", "le")),
}
"""Help and labels of each counter; Ray puts `ray_` before the name and `_total` behind it."""


class Asked:
    """What is learnt of one request while it is answered."""

    __slots__ = ("ignored", "rows", "started", "token")

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.rows: int | None = None
        self.ignored = 0
        self.token: str | None = None


@dataclass(frozen=True)
class Increment:
    """By how much a counter grew since it was last asked."""

    name: str
    labels: dict[str, str]
    value: float


class Meter:
    """The counts of one version of one model since they were last drained."""

    def __init__(self, model: str, version: str) -> None:
        self._labels = {"model": model, "version": version}
        self._clear()

    def _clear(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds, self._sum = [0] * (len(SECONDS) + 1), 0.0
        self._batches, self._rows = [0] * (len(ROWS) + 1), 0
        self._ignored = 0

    def count(self, operation: str, status: int, asked: Asked) -> float:
        """Count a request that has just been answered; return the seconds it took."""
        seconds = time.perf_counter() - asked.started
        self._requests[operation, status] += 1
        self._seconds[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds
        if asked.rows and status == 200:
            self._batches[bisect_left(ROWS, asked.rows)] += 1
            self._rows += asked.rows
            self._ignored += asked.ignored
        return seconds

    def drain(self) -> Iterator[Increment]:
        """Yield what grew, and begin anew."""
        requests, ignored, rows, total = self._requests, self._ignored, self._rows, self._sum
        seconds, batches = self._seconds, self._batches
        self._clear()
        for (operation, status), number in requests.items():
            yield self._grown("heliostat_requests", number, operation=operation, status=str(status))
            if status >= 400:
                yield self._grown("heliostat_errors", number, kind=KINDS.get(status, "other"))
        if not requests:
            return
        yield from self._histogram("heliostat_latency_seconds_bucket", SECONDS, seconds)
        yield self._grown("heliostat_latency_seconds_sum", total)
        if rows:
            yield from self._histogram("heliostat_batch_rows_bucket", ROWS, batches)
            yield self._grown("heliostat_rows", rows)
        if ignored:
            yield self._grown("heliostat_ignored_values", ignored)

    def _histogram(self, name: str, edges: tuple[float, ...], counts: list[int]) -> Iterator[Increment]:
        below = 0
        for edge, count in zip((*map(str, map(float, edges)), "+Inf"), counts, strict=True):
            below += count
            if below:
                yield self._grown(name, below, le=edge)

    def _grown(self, name: str, value: float, **labels: str) -> Increment:
        return Increment(name, self._labels | labels, value)


class AccessLog:
    """A JSON line for each request, in a file that starts anew when it is full; what is younger than a flush may be lost."""

    def __init__(self, path: Path, *, most_bytes: int = 100 << 20, kept: int = 4) -> None:
        self.path = path
        self._most, self._kept = most_bytes, kept
        self._lines: list[bytes] = []

    def write(self, **facts: object) -> None:
        self._lines.append(orjson.dumps({"time": time.time(), **facts}, default=str))

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if not lines:
            return
        if self.path.exists() and self.path.stat().st_size > self._most:
            for number in range(self._kept - 1, 0, -1):
                if (older := self._numbered(number)).exists():
                    os.replace(older, self._numbered(number + 1))
            os.replace(self.path, self._numbered(1))
        with self.path.open("ab") as file:
            file.write(b"\n".join(lines) + b"\n")

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
