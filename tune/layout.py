"""How do trials share the cluster? How many at once, with how many processes and threads each, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pipelines.errors import ClusterError
from pipelines.plan import PROCESS
from pipelines.spec import TrainSpec
from tune.spec import TuneSpec

SHARE: Final = 0.8
"""Of a machine's memory that trials may take."""


@dataclass(frozen=True)
class Room:
    """What a machine has for trials."""

    slots: float
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Layout:
    """How the trials of one search run; fixed before the first starts."""

    at_once: int
    """Trials that run at the same time; each holds a copy of the binned rows."""
    workers: int
    """Processes of each."""
    cpus: float
    """Slots that each process reserves."""
    threads: int
    """Of each process."""
    gpu: bool
    memory: int
    """Bytes of each process at its peak."""
    why: str

    @classmethod
    def plan(cls, tune: TuneSpec, train: TrainSpec, rooms: Sequence[Room], *, free: float, gpus: float, size: int) -> Layout:
        """Divide the free slots and the memory of the machines among trials; `size`: bytes of a fit in one process.

        A trial runs in one process, which is the most work for the slots: only what no machine has the memory for is trained by
        several. Where trials differ in their prepared data, Ray Data needs room beside them, or both would wait for ever.
        Raises `ClusterError` where not even all machines together have the memory.
        """
        slots = max(1, int(free))
        whole = size + PROCESS
        fitting = sum(min(int(room.slots), int(room.memory * SHARE // whole)) for room in rooms)
        gpu = gpus >= 1 and train.gpu is not False
        if tune.workers == 1 or (tune.workers == "auto" and fitting >= 1):
            return cls._single(tune, slots, max(1, fitting), whole, gpu=gpu, gpus=gpus, machines=len(rooms))
        if tune.workers == "auto":
            workers = _workers(rooms, size)
            why = f"a trial needs {whole >> 20:,} MiB, which no machine has: its rows are shared by {workers} processes"
        else:
            workers, why = tune.workers, f"tune.workers is {tune.workers}"
        most = int(slots - 1 if tune.reaches_data and slots > workers else slots) // workers
        at_once = max(1, min(most, tune.trials))
        if workers > slots:
            raise ClusterError(
                f"tune.workers: {workers} processes of a trial are more than the {slots} free slots; lower tune.workers"
            )
        return cls(at_once, workers, 1.0, 1, gpu, size // workers + PROCESS, why)

    @classmethod
    def _single(cls, tune: TuneSpec, slots: int, fitting: int, whole: int, *, gpu: bool, gpus: float, machines: int) -> Layout:
        beside = tune.reaches_data and machines > 1  # a slot for Ray Data
        at_once = max(1, min(slots - beside, fitting, tune.trials, int(gpus) if gpu else slots))
        threads = max(1, (slots - beside) // at_once)
        why = "a trial fits into one process, and so each slot does a trial's work without waiting for another"
        if at_once == fitting < slots - beside:
            why = f"memory allows {fitting} trials at once"
        cpus = float(threads)
        if tune.reaches_data and not beside:
            # On one machine the trials share what Ray Data's slot leaves: preparing is short, and all cores work meanwhile too.
            cpus = int(100 * min(threads, (slots - 1) / at_once)) / 100
        return cls(at_once, 1, cpus, threads, gpu, whole, why)

    @property
    def described(self) -> str:
        """In one line."""
        each = "one process" if self.workers == 1 else f"{self.workers} processes"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.at_once} at once, {each} with {threads} each: {self.why}"


def _workers(rooms: Sequence[Room], size: int) -> int:
    """The least number of processes that the machines have the memory for."""
    for workers in range(2, max(2, int(sum(room.slots for room in rooms))) + 1):
        each = size // workers + PROCESS
        if sum(min(int(room.slots), int(room.memory * SHARE // each)) for room in rooms) >= workers:
            return workers
    raise ClusterError(
        f"tune: a trial needs {size >> 20:,} MiB, more than {len(rooms)} machine{'s' if len(rooms) > 1 else ''} with "
        f"{sum(room.memory for room in rooms) >> 20:,} MiB can share; train on fewer rows (data.where), or join a larger Ray"
    )
