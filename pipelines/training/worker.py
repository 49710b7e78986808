"""What a training loop sees of the cluster: its rows, its peers, where to start from and where to report.

A family's `fit` is written against this class alone, so it neither knows Ray Train nor where data comes from.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipelines.data.prepared import INIT_SCORE, Batch, Range, Shards
from pipelines.errors import DataError, UserError
from pipelines.features.transform import Feature
from pipelines.storage import Folder, to_json
from pipelines.tasks import Task
from pipelines.training.lost import kernel_oom_kills
from pipelines.training.network import lightgbm_network
from pipelines.training.shared import Shared

if TYPE_CHECKING:
    from pipelines.models.model import Model

STATE = "state.json"

Array = np.ndarray[Any, np.dtype[np.float64]]


class Stopped(Exception):  # noqa: N818 - it is no error
    """Nobody wants the rest of this fit: raised out of `Worker.log` and `Worker.report`, and a family lets it pass."""


class Reporter(Protocol):
    """Where the words and the models of a fit go."""

    def log(self, entry: dict[str, Any]) -> None:
        """Take a line of rank 0: step, total, metrics."""

    def keep(self, step: int, folder: Path | None, *, aside: bool) -> None:
        """Keep the files in `folder` as the checkpoint after `step`; None on all ranks but 0. `aside`: it may take its time."""

    def refuse(self, why: str) -> None:
        """End the fit with a sentence for the user."""


@dataclass(frozen=True)
class RayTrain:
    """The reporter of a worker group: lines go to the driver by way of the rendezvous, models to Ray Train's checkpoints."""

    rendezvous: Any

    def log(self, entry: dict[str, Any]) -> None:
        self.rendezvous.report.remote(entry)

    def keep(self, step: int, folder: Path | None, *, aside: bool) -> None:
        import ray.train

        mode = ray.train.CheckpointUploadMode.ASYNC if aside else ray.train.CheckpointUploadMode.SYNC
        checkpoint = None
        if folder is not None:
            if aside:  # Ray Train deletes it once it is in the store
                folder = folder.rename(tempfile.mkdtemp(prefix="heliostat-"))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_upload_mode=mode)

    def refuse(self, why: str) -> None:
        import ray

        ray.get(self.rendezvous.report.remote({"refused": why}))  # the driver hears nothing that comes after the fit's end


@dataclass(frozen=True)
class Start:
    """Where a fit goes on from: a checkpoint of this fit, or the model of an earlier run."""

    model: Model
    step: int
    """Rounds or steps of this fit that the model has seen: none where it is an earlier run's."""
    state: dict[str, Any]
    """What the family gave to `report` besides the model; empty where it is an earlier run's."""


@dataclass
class Worker:
    """One of `size` processes that train together."""

    rank: int
    size: int
    threads: int
    checkpoint_every: int
    """Rounds or steps between reports that carry a model."""
    shards: Shards
    start: Start | None
    """None at the beginning."""
    rendezvous: Any
    attempt: str
    connect: Callable[[Worker], dict[str, Any]] | None = None
    """How the family's library is told where the ranks are; None for one that needs no network of its own."""
    class_weights: list[float] | None = None
    """What the weight of each class's train rows is multiplied by."""
    gpu: bool = False
    """Whether it has a GPU of its own."""
    strategy: str = "ddp"
    """ddp | fsdp: whether each rank has the whole model or a part of it; of families that can."""
    compile: bool = False
    reporter: Reporter | None = None
    """None: what is reported goes nowhere."""
    shared: Shared | None = None
    """What this fit may share with the next ones of its process; None: nothing, it is the only one."""
    networks: int = 0
    """How many networks were made so far."""
    logged: list[dict[str, Any]] = field(default_factory=list)
    """What rank 0 has told the driver since the fit began. Checkpoints keep it: a driver that dies has not heard all."""

    @property
    def columns(self) -> list[Feature]:
        """The columns of the matrix: name, kind, cardinality."""
        return self.shards.features

    @property
    def network(self) -> dict[str, Any]:
        """Make a new network of the ranks and return it in the words of the family's library; empty for a single rank.

        Each rank asks for it at the same point, as late as it can: its ports are free now, and other processes want ports too.
        """
        self.networks += 1
        return self.connect(self) if self.connect is not None and self.size > 1 else {}

    def ranges(self, split: str) -> list[Range]:
        """The row ranges of this rank; together the ranks have every row once."""
        return self.shards.ranges(split, self.rank, self.size)

    def batches(self, split: str) -> Iterator[Batch]:
        """Yield this rank's rows in their order, a row group at a time; see `read` for what they weigh."""
        for found in self.ranges(split):
            yield from self.read(split, found)

    def read(self, split: str, range: Range) -> Iterator[Batch]:
        """Yield the rows of a range in their order, a row group at a time.

        Train rows weigh what a fit takes them for: their own weight times their class's. Other rows have their own, that of the
        metrics.
        """
        factors = np.array(self.class_weights) if self.class_weights is not None and split == "train" else None
        for batch in self.shards.read(range):
            if factors is None:
                yield batch
                continue
            by_class = factors[batch.target.astype(np.int64)]
            yield batch._replace(weight=by_class if batch.weight is None else batch.weight * by_class)

    def init_scores(self, split: str) -> Iterator[Array]:
        """Yield the raw scores that this rank's rows start from, where the task has such, a row group at a time."""
        for found in self.ranges(split):
            yield from self.shards.column(found, INIT_SCORE)

    def rows(self, split: str) -> int:
        """How many rows this rank has."""
        return sum(found.stop - found.start for found in self.ranges(split))

    def total_rows(self, split: str) -> int:
        """How many rows all ranks have together."""
        return self.shards.rows[split]

    def gather(self, key: str, state: Any) -> list[Any]:
        """Return what every rank hands in under this key, in rank order; each rank calls it and gets the same."""
        if self.size == 1:
            return [state]
        import ray

        result: list[Any] = ray.get(self.rendezvous.gather.remote(self.attempt, key, self.rank, self.size, state))
        return result

    def log(self, step: int, metrics: dict[str, dict[str, float | None]], *, total: int) -> None:
        """Tell the driver how it goes: `metrics` by split. Cheap and not a barrier; only rank 0 is heard."""
        if self.rank == 0:
            self.logged.append({"step": step, "total": total, "metrics": metrics})
            if self.reporter is not None:
                self.reporter.log(self.logged[-1])

    def refuse(self, why: str) -> None:
        """End the fit with a sentence for the user; every rank calls it and then returns. Checkpoints stay as they are."""
        if self.reporter is None:
            raise DataError(why)
        if self.rank == 0:
            self.reporter.refuse(why)

    def tell_again(self) -> None:
        """Tell what was told before the checkpoint that this fit goes on from: whoever listens now may not have heard it."""
        if self.rank == 0 and self.start is not None:
            self.logged += self.start.state.get("logged", [])
            if self.reporter is not None:
                for entry in self.logged:
                    self.reporter.log(entry)

    def report(self, step: int, model: Model | None, state: dict[str, Any], *, aside: bool = False) -> None:
        """Keep the model after `step` and a JSON state, to go on from. A barrier: every rank calls it, rank 0 with the model.

        The last report of a fit has the key `final` in its state, and the model as it is to be used. `aside`: the files go to the
        store while the fit goes on; until they are there the checkpoint before is the last one.
        """
        if self.reporter is None:
            return
        if model is None:
            self.reporter.keep(step, None, aside=aside)
            return
        with tempfile.TemporaryDirectory(prefix="heliostat-", ignore_cleanup_errors=True) as path:  # it may be taken away
            folder = Path(path)
            model.save(folder)
            files = {file.name: file.stat().st_size for file in folder.iterdir()}
            (folder / STATE).write_text(to_json({**state, "step": step, "files": files, "logged": self.logged}))
            self.reporter.keep(step, folder, aside=aside)


@dataclass(frozen=True)
class Job:
    """All that a worker process is sent."""

    family: str
    params: dict[str, Any]
    task: Task
    shards: Shards
    threads: int
    checkpoint_every: int
    checkpoints: Folder
    """Where Ray Train puts what is reported, a folder each."""
    rendezvous: Any
    parent: Folder | None = None
    """The model to go on from where there is no checkpoint."""
    gpu: bool = False
    strategy: str = "ddp"
    compile: bool = False


def train_loop(config: dict[str, Job]) -> None:
    """What Ray Train runs in each worker process."""
    import socket
    import uuid

    import ray.train.collective

    from pipelines.registry import MODELS, load

    job = config["job"]
    family = load(MODELS, job.family, "model.type")
    if family.trainer == "lightgbm":
        _import_lightgbm()
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    # The attempt is one start of the worker group: a group that died may have left sums half done.
    own = (uuid.uuid4().hex, last_checkpoint(job.checkpoints)) if rank == 0 else None
    attempt, checkpoint = ray.train.collective.broadcast_from_rank_zero(own)
    worker = Worker(
        rank=rank,
        size=size,
        threads=min(job.threads, max(1, cores() // context.get_local_world_size())),
        checkpoint_every=job.checkpoint_every,
        shards=job.shards,
        connect=NETWORKS[family.trainer],
        start=start_of(family, job.checkpoints / checkpoint) if checkpoint else parent_of(family, job.parent),
        rendezvous=job.rendezvous,
        attempt=attempt,
        class_weights=job.task.class_weights,
        gpu=job.gpu,
        strategy=job.strategy,
        compile=job.compile,
        reporter=RayTrain(job.rendezvous),
    )
    worker.tell_again()
    job.rendezvous.report.remote(
        {
            "worker": {
                "rank": rank,
                "size": size,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "node": ray.util.get_node_ip_address(),
                "threads": worker.threads,
                "rows": worker.rows("train"),
                "from_step": worker.start.step if worker.start else 0,
            },
            "oom_kills": kernel_oom_kills(),
        }
    )
    try:
        family.fit(family.Params.model_validate(job.params), job.task, worker)
    except UserError as error:
        ray.get(job.rendezvous.report.remote({"raised": error}))
        raise


def _import_lightgbm() -> None:
    """Import LightGBM without scikit-learn, whose interface nobody uses here: 0.9 instead of 2.0 s of CPU in each worker."""
    if "sklearn" not in sys.modules:
        sys.modules["sklearn"] = None  # type: ignore[assignment] # importlib's word for: cannot be imported
        try:
            importlib.import_module("lightgbm")
        finally:
            del sys.modules["sklearn"]


def cores() -> int:
    """The cores that this process may use; a Ray may promise more slots.

    Measured: the flights example with two workers of two OpenMP threads on two cores was not done in 300 s instead of 6 s, for
    threads wait for one another in loops.
    """
    from ray._private.utils import get_num_cpus  # knows the limits of a container

    return max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1 << 16, int(get_num_cpus())))


NETWORKS: dict[str, Callable[[Worker], dict[str, Any]] | None] = {
    "lightgbm": lightgbm_network,
    "torch": None,  # Ray Train has connected the ranks before the loop begins
}


def last_checkpoint(folder: Folder) -> str | None:
    """Return the name of the complete checkpoint with the most steps, if there is one.

    Ray Train knows a checkpoint only once its controller has asked the workers for it; after a kill the files know better.
    """
    sizes = {name: info.size for name, info in folder.infos()}
    states = {name: _state(folder / name) for name in (file.rpartition("/")[0] for file in sizes if file.endswith(f"/{STATE}"))}
    found = [
        (state["step"], "final" in state, name)
        for name, state in states.items()
        if state and all(sizes.get(f"{name}/{file}") == size for file, size in state["files"].items())
    ]
    return max(found)[2] if found else None


def _state(checkpoint: Folder) -> dict[str, Any]:
    """The state in a checkpoint; empty when a kill left it half written."""
    try:
        state: dict[str, Any] = json.loads(checkpoint.read_bytes(STATE))
    except ValueError:
        return {}
    return state


def parent_of(family: Any, model: Folder | None) -> Start | None:
    """The model of an earlier run, to go on from."""
    if model is None:
        return None
    with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
        model.fetch(Path(path))
        return Start(family.load(Path(path)), 0, {})


def start_of(family: Any, checkpoint: Folder) -> Start:
    """What a checkpoint holds."""
    with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
        checkpoint.fetch(Path(path))
        state = json.loads((Path(path) / STATE).read_text())
        return Start(family.load(Path(path)), state["step"], state)
