"""In which order does a rank see its rows? A pure function of (seed, epoch, rank, size), streamed from the shards.

Each epoch the rank's row groups come in a new order; as many as fit a pool are read and shuffled together, so no more than
three pools are in memory: one in use, one that waits, one that is being read, by a thread of its own. Every epoch has the same
number of steps on every rank: step s takes the rows from `rows * s // steps` to `rows * (s + 1) // steps` of the order. No row is
dropped, ranks with fewer rows have smaller batches, and to go on at a step nothing but its number is needed.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from pipelines.models.network import POOL_BYTES, POOL_ROWS, to_float32

if TYPE_CHECKING:
    from pipelines.data.prepared import Range, Shards
    from pipelines.training.worker import Worker

Rows32 = np.ndarray[Any, np.dtype[np.float32]]
SALT: Final = 0x7AB


class Rows(NamedTuple):
    """Some rows, float32: (rows, features), (rows,), (rows,)."""

    matrix: Rows32
    target: Rows32
    weight: Rows32 | None


class Feed:
    """The train rows of one rank, epoch after epoch."""

    def __init__(
        self, worker: Worker, *, seed: int, steps: int, center: float = 0.0, scale: float = 1.0, pool_rows: int | None = None
    ) -> None:
        self._shards: Shards = worker.shards
        self._key = (SALT, seed, worker.rank, worker.size)
        self._center, self._scale = center, scale
        self._pieces = [piece for found in worker.ranges("train") for piece in worker.shards.pieces(found)]
        self._most = pool_rows or max(1, min(POOL_ROWS, POOL_BYTES // (4 * (len(worker.columns) + 1))))
        self.steps = steps
        self.rows = worker.rows("train")
        total, size = worker.total_rows("train"), worker.size
        self._rows_of = [(rank + 1) * total // size - rank * total // size for rank in range(size)]
        self.waited_s = 0.0
        """How long `batches` has waited for rows to be read."""

    def rows_of_step(self, step: int) -> int:
        """The rows that all ranks together have in a step."""
        at = step % self.steps
        return sum(rows * (at + 1) // self.steps - rows * at // self.steps for rows in self._rows_of)

    @contextlib.contextmanager
    def batches(self, first: int, last: int) -> Iterator[Iterator[Rows]]:
        """Yield the batches of the steps from `first` to `last` (exclusive), counted over all epochs; read ahead by a thread."""
        ahead: queue.Queue[Rows | BaseException | None] = queue.Queue(maxsize=1)
        ended = threading.Event()

        def put(item: Rows | BaseException | None) -> bool:
            while not ended.is_set():
                with contextlib.suppress(queue.Full):
                    ahead.put(item, timeout=0.1)
                    return True
            return False

        def read() -> None:
            try:
                for pool in self._pools(first, last):
                    if not put(pool):
                        return
                put(None)
            except BaseException as error:  # noqa: BLE001 - raised where the rows are wanted
                put(error)

        thread = threading.Thread(target=read, name="heliostat-feed", daemon=True)
        thread.start()
        try:
            yield self._cut(ahead, first, last)
        finally:
            ended.set()
            thread.join()

    def _cut(self, ahead: queue.Queue[Rows | BaseException | None], first: int, last: int) -> Iterator[Rows]:
        waiting: list[Rows] = []
        for step in range(first, last):
            at = step % self.steps
            wanted = self.rows * (at + 1) // self.steps - self.rows * at // self.steps
            while sum(len(rows.target) for rows in waiting) < wanted:
                started = time.monotonic()
                found = ahead.get()
                self.waited_s += time.monotonic() - started
                if isinstance(found, BaseException):
                    raise found
                assert found is not None, "the pools of an epoch have all of its rows"
                waiting.append(found)
            batch, waiting = _take(waiting, wanted, self._nothing)
            yield batch

    @property
    def _nothing(self) -> Rows:
        return Rows(np.empty((0, len(self._shards.features)), np.float32), np.empty(0, np.float32), None)

    def _pools(self, first: int, last: int) -> Iterator[Rows]:
        """The rows of the steps in their order, a pool at a time; what lies before the first step is not read."""
        for epoch in range(first // self.steps, -(-last // self.steps)):
            skipped = self.rows * (first % self.steps) // self.steps if epoch == first // self.steps else 0
            position = 0
            for number, pieces in enumerate(self._order(epoch)):
                rows = sum(piece.stop - piece.start for piece in pieces)
                if position + rows > skipped:
                    yield _sliced(self._read(pieces, epoch, number), max(0, skipped - position))
                position += rows

    def _order(self, epoch: int) -> Iterator[list[Range]]:
        """The pieces of an epoch, by pools."""
        shuffled = np.random.default_rng([*self._key, epoch]).permutation(len(self._pieces))
        pool: list[Range] = []
        rows = 0
        for at in shuffled:
            piece = self._pieces[at]
            if pool and rows + piece.stop - piece.start > self._most:
                yield pool
                pool, rows = [], 0
            pool.append(piece)
            rows += piece.stop - piece.start
        if pool:
            yield pool

    def _read(self, pieces: list[Range], epoch: int, number: int) -> Rows:
        rows = sum(piece.stop - piece.start for piece in pieces)
        place = np.random.default_rng([*self._key, epoch, number]).permutation(rows)  # where each row goes
        matrix = np.empty((rows, len(self._shards.features)), np.float32)
        target = np.empty(rows, np.float32)
        weight: Rows32 | None = None
        position = 0
        for piece in pieces:
            for batch in self._shards.read(piece):
                to = place[position : position + len(batch.target)]
                matrix[to] = to_float32(batch.matrix)
                target[to] = (batch.target - self._center) / self._scale
                if batch.weight is not None:
                    weight = np.empty(rows, np.float32) if weight is None else weight
                    weight[to] = batch.weight
                position += len(batch.target)
        return Rows(matrix, target, weight)


def _take(waiting: list[Rows], wanted: int, nothing: Rows) -> tuple[Rows, list[Rows]]:
    """The first rows of those that wait, and the others."""
    taken: list[Rows] = []
    while wanted:
        rows = waiting[0]
        taken.append(Rows(*(None if part is None else part[:wanted] for part in rows)))  # type: ignore[arg-type]
        if len(rows.target) > wanted:
            waiting = [_sliced(rows, wanted), *waiting[1:]]
        else:
            waiting = waiting[1:]
        wanted -= len(taken[-1].target)
    if len(taken) < 2:
        return (taken[0] if taken else nothing), waiting
    weights = [rows.weight for rows in taken if rows.weight is not None]
    return (
        Rows(
            np.concatenate([rows.matrix for rows in taken]),
            np.concatenate([rows.target for rows in taken]),
            np.concatenate(weights) if weights else None,
        ),
        waiting,
    )


def _sliced(rows: Rows, start: int) -> Rows:
    return Rows(*(None if part is None else part[start:] for part in rows)) if start else rows  # type: ignore[arg-type]
