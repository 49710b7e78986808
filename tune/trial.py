"""What runs in the process of a trial: one fit after another, each in a thread, heard by Ray Tune report by report.

The process is used again for the next trial (Ray Tune's `reuse_actors`), so libraries are imported and data is binned and loaded
once. The fit does not wait for anybody to hear it: Ray Tune fetches what has been reported meanwhile, and a trial that nobody
wants any more is told so at its next report.
"""

from __future__ import annotations

import os
import queue
import shutil
import statistics
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray.tune

from pipelines.data.prepared import Shards
from pipelines.errors import DataError, UserError
from pipelines.progress import SILENT
from pipelines.registry import MODELS, load
from pipelines.spec import ModelSpec, TrainSpec
from pipelines.storage import Folder, one_line
from pipelines.tasks import Task
from pipelines.training.lost import kernel_oom_kills
from pipelines.training.shared import Shared
from pipelines.training.trainer import Team, checkpoint_every, fit
from pipelines.training.worker import STATE, Stopped, Worker, cores, last_checkpoint, parent_of, start_of
from tune.objective import BYTES, PREDICT

JOB: Final = "job"
REPORT: Final = "report"
ROWS: Final = 1000
"""Of which the time of an answer is measured."""


@dataclass(frozen=True)
class TrialJob:
    """All that the process of a trial is sent."""

    model: ModelSpec
    """With the family's own parameters, resolved."""
    train: TrainSpec
    parts: list[tuple[Task, Shards]]
    """What is fitted: one, or one per fold."""
    folder: Folder
    """Of the child Run."""
    team: Team
    costs: list[str]
    """What is to be measured on the model."""
    shared: str
    """The name of each node's folder for what trials share."""
    parent: Folder | None
    """The model to go on from."""


class Trainee(ray.tune.Trainable):
    """Ray Tune's face of a trial."""

    def setup(self, config: dict[str, Any]) -> None:
        if (before := os.environ.get("TUNE_ORIG_WORKING_DIR")) is not None:
            os.chdir(before)  # Ray Tune has gone into a folder of its own
        self._shared = Shared(place(config[JOB].shared))
        self._fitting = Fitting(config[JOB], self._shared)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._fitting.stop()
        self._fitting = Fitting(new_config[JOB], self._shared)
        return True

    def step(self) -> dict[str, Any]:
        report = self._fitting.heard()
        return {"done": report["done"], REPORT: [report]}  # Ray Tune takes mappings apart

    def cleanup(self) -> None:
        self._fitting.stop()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a fit keeps its own checkpoints, as files in the child Run."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, likewise."""


class Fitting:
    """One fit under way."""

    def __init__(self, job: TrialJob, shared: Shared) -> None:
        self._job, self._shared = job, shared
        self._checkpoints = job.folder / "checkpoints"
        self._fold: list[dict[str, Any]] = []
        """The reports of the fold that is being fitted."""
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._unwanted = threading.Event()
        self._count = 0
        self._node, self._oom_kills = ray.get_runtime_context().get_node_id(), kernel_oom_kills()
        self._started, self._made, self._cpu = time.monotonic(), shared.made, time.process_time()
        self._thread = threading.Thread(target=self._run, name="heliostat-trial", daemon=True)
        self._thread.start()

    def heard(self) -> dict[str, Any]:
        """Wait for a report; return all there are since the last call.

        `curve`: step and metrics of each, the first one's number being `first`; `facts`: what it took so far. The last result has
        `done` and either `final`, what the fit left, or `error`.
        """
        found = [self._reports.get()]
        while not self._reports.empty():
            found.append(self._reports.get())
        curve = [entry for entry in found if "step" in entry]
        last = next((entry for entry in found if "step" not in entry), None)
        facts = {
            "seconds": time.monotonic() - self._started,
            "cpu_s": time.process_time() - self._cpu,
            "made": self._shared.made - self._made,
            "pid": os.getpid(),
            "node": self._node,
            "oom_kills": self._oom_kills,
        }
        result = {"first": self._count, "curve": curve, "done": last is not None, "facts": facts, **(last or {})}
        self._count += len(curve)
        return result

    def stop(self) -> None:
        """Let the fit end at its next report, and wait for that."""
        self._unwanted.set()
        self._thread.join()

    def log(self, entry: dict[str, Any]) -> None:
        if self._unwanted.is_set():
            raise Stopped
        if len(self._job.parts) > 1:
            self._fold.append(entry)
        else:
            self._reports.put(entry)

    def refuse(self, why: str) -> None:
        raise DataError(why)

    def keep(self, step: int, folder: Path | None, *, aside: bool) -> None:
        """Write a checkpoint whole, and then delete the one before."""
        if self._unwanted.is_set():
            raise Stopped
        assert folder is not None, "a trial in one process is its own rank 0"
        before = self._checkpoints.names()
        Folder.at(str(folder)).copy_to(self._checkpoints / f"{step:08d}-{uuid.uuid4().hex[:8]}")
        for name in before:
            (self._checkpoints / name).delete()

    def _run(self) -> None:
        try:
            told: dict[str, Any] = {"final": self._folds() if len(self._job.parts) > 1 else self._fit(*self._job.parts[0])}
        except Stopped:
            return
        except UserError as error:
            told = {"error": " ".join(str(error).split())}
        except MemoryError:
            told = {"error": "the process ran out of memory"}
        except Exception as error:  # noqa: BLE001 - a trial that fails is a fact for the search, which goes on
            told = {"error": f"{type(error).__name__}: {one_line(error)}", "traceback": traceback.format_exc()}
        self._reports.put(told)

    def _folds(self) -> dict[str, Any]:
        """Fit each fold; a report is the mean of the folds so far, and its step says how many."""
        top, left = self._checkpoints, []
        valid: dict[str, float | None] = {}
        for i, part in enumerate(self._job.parts):
            self._checkpoints, self._fold = top / f"fold-{i}", []
            found = self._fit(*part)
            at = next((entry for entry in self._fold if entry["step"] == found["step"]), None)
            left.append({**found, "valid": at["metrics"].get("valid", {}) if at else {}})
            valid = {name: _mean([one["valid"].get(name) for one in left]) for name in left[0]["valid"]}
            self._reports.put({"step": i + 1, "total": len(self._job.parts), "metrics": {"valid": valid}})
        costs = {cost: statistics.fmean(one["costs"][cost] for one in left) for cost in self._job.costs}
        return {"step": int(statistics.median(one["step"] for one in left)), "costs": costs, "valid": valid}

    def _fit(self, task: Task, shards: Shards) -> dict[str, Any]:
        if self._job.team.workers > 1:
            self._with_workers(task, shards)
        else:
            self._alone(task, shards)
        return self._left(shards)

    def _alone(self, task: Task, shards: Shards) -> None:
        job = self._job
        family = load(MODELS, job.model.type, "model.type")
        checkpoint = last_checkpoint(self._checkpoints)
        worker = Worker(
            rank=0,
            size=1,
            threads=max(1, min(job.team.threads, cores())),
            checkpoint_every=checkpoint_every(job.train, family),
            shards=shards,
            start=start_of(family, self._checkpoints / checkpoint) if checkpoint else parent_of(family, job.parent),
            rendezvous=None,
            attempt="",
            class_weights=task.class_weights,
            gpu=job.team.gpu,
            compile=job.train.compile,
            reporter=self,
            shared=self._shared,
        )
        worker.tell_again()
        family.fit(family.Params.model_validate(job.model.params), task, worker)

    def _with_workers(self, task: Task, shards: Shards) -> None:
        """In a worker group of Ray Train, of which this process is the driver."""
        job = self._job
        with tempfile.TemporaryDirectory(prefix="heliostat-") as aside:
            fit(
                job.model,
                job.train,
                job.team,
                task,
                shards,
                folder=self._checkpoints,
                metrics=Folder.at(aside),  # the search writes the child Run's own
                progress=SILENT,
                parent=job.parent,
                listen=self.log,
            )

    def _left(self, shards: Shards) -> dict[str, Any]:
        """The step whose model a fit has left, and what that model costs where it is asked."""
        name = last_checkpoint(self._checkpoints)
        assert name is not None, "a fit ends with a report that carries its model"
        with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
            folder = Path(path)
            (self._checkpoints / name).fetch(folder)
            state = Folder.at(path).read_json(STATE)
            (folder / STATE).unlink()
            measures: dict[str, Callable[[Path], float]] = {PREDICT: lambda path: self._predict_ms(path, shards), BYTES: _bytes}
            return {"step": state["final"], "costs": {cost: measures[cost](folder) for cost in self._job.costs}}

    def _predict_ms(self, folder: Path, shards: Shards) -> float:
        """Milliseconds that the model takes for a thousand rows, the median of several tries."""
        model = load(MODELS, self._job.model.type, "model.type").load(folder)
        matrix = next(_rows(shards))
        seconds = []
        for _ in range(7):
            begun = time.perf_counter()
            model.predict(matrix)
            seconds.append(time.perf_counter() - begun)
        return 1e3 * statistics.median(seconds)


def _mean(values: list[float | None]) -> float | None:
    """None where one of them is not defined."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _rows(shards: Shards) -> Iterator[np.ndarray[Any, np.dtype[np.float64]]]:
    """A thousand rows, of the valid split where it has any; fewer are taken again and again."""
    for split in ("valid", "train"):
        for found in shards.ranges(split, 0, 1):
            for batch in shards.read(found):
                yield np.resize(batch.matrix, (ROWS, batch.matrix.shape[1]))


def _bytes(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def place(name: str) -> Path:
    """A folder of this node. It lies in that of Ray's session: what a kill leaves there goes with the session."""
    from ray._private.worker import global_worker

    assert global_worker.node is not None, "this process is connected to a Ray"
    return Path(global_worker.node.get_session_dir_path()) / name


def forget(name: str) -> None:
    """Delete what the trials of this node have shared."""
    shutil.rmtree(place(name), ignore_errors=True)
