"""The driver's side of a fit: how many workers, their start, what they report, and the model they leave."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelines.data.prepared import Shards
from pipelines.errors import ClusterError, DataError
from pipelines.progress import Progress, Stage
from pipelines.registry import MODELS, load
from pipelines.spec import ModelSpec, TrainSpec, WorkersSpec
from pipelines.storage import Folder
from pipelines.tasks import Task
from pipelines.training.lost import Lost, Trace, sentences, trace
from pipelines.training.worker import STATE, Job, last_checkpoint, train_loop

ROUNDS = 50
"""Between checkpoints of a family that says nothing else."""
POLL_S = 0.25
END_S = 30.0
LOOK_S = 15.0
MEET_S = 60.0
GROW_S = 60.0
"""How often Ray Train looks whether a team that may grow can; a resize costs the rounds since the last checkpoint."""
CONTROLLER_S = 120.0
"""For how long Ray Train's controller may be silent while workers train; it may have checkpoints to delete."""
START_S = 300.0
"""How long a worker group may take from its start to its first line; a start that waits for slots is begun anew every minute."""


@dataclass(frozen=True)
class Team:
    """How a fit is spread out; fixed once, before it starts, and recorded."""

    workers: int
    """At the most."""
    cpus: float
    """Slots that each worker reserves."""
    threads: int
    gpu: bool
    least: int | None = None
    """Workers with which it goes on while there are no slots for more; None: all of them."""

    @classmethod
    def plan(cls, spec: TrainSpec, free_slots: float, gpus: float, rows: int) -> Team:
        """Turn `auto` into numbers.

        Workers: the free slots less one, which Ray Data needs while others read. A lone worker may use the threads of the slot
        left over. Where their number is a range, they take whole slots: Ray Train counts how many fit without a remainder.
        `gpus` are those that the family could use. Raises `DataError` when there are more workers than rows.
        """
        if isinstance(spec.workers, WorkersSpec):
            workers, least = spec.workers.max, spec.workers.min
        else:
            workers, least = spec.workers if spec.workers != "auto" else max(1, min(int(free_slots) - 1, rows)), None
        if (least or workers) > rows:
            raise DataError(f"train.workers: {least or workers} workers cannot share {rows} train rows; lower train.workers")
        workers = min(workers, rows)
        fitting = 1.0 if least else min(1.0, int(100 * free_slots / workers) / 100)
        cpus = spec.cpus_per_worker if spec.cpus_per_worker != "auto" else fitting
        threads = max(1, int(spec.cpus_per_worker if spec.cpus_per_worker != "auto" else free_slots / workers))
        gpu = gpus >= (least or workers) if spec.gpu == "auto" else spec.gpu
        return cls(workers, cpus, threads, gpu, least)

    @property
    def sizes(self) -> list[int]:
        """The smallest and the largest number of workers."""
        return [self.least or self.workers, self.workers]


@dataclass
class Fit:
    """What a fit left: the model's files, and what the ranks said."""

    model: Folder
    state: dict[str, Any]
    workers: list[dict[str, Any]] = field(default_factory=list)
    """Every worker that ever started: rank, size, pid, host, threads, rows, from_step."""
    failures: list[str] = field(default_factory=list)
    """Why workers were lost on the way, a sentence each."""


def fit(
    model: ModelSpec,
    train: TrainSpec,
    team: Team,
    task: Task,
    shards: Shards,
    *,
    folder: Folder,
    metrics: Folder,
    progress: Progress,
    parent: Folder | None = None,
    listen: Callable[[dict[str, Any]], None] | None = None,
) -> Fit:
    """Train on the cluster; write checkpoints below `folder` and a line per report to `metrics.jsonl`.

    Goes on from the last checkpoint that is below `folder`, else from the model in `parent`, else from nothing; where that
    checkpoint is the end of a fit, nothing is left to do. A lost worker starts the group again from there, and a lost train
    controller is replaced, together at most `train.max_failures` times; then `ClusterError` says why it was lost. `listen` gets
    what rank 0 logs, and ends the fit by what it raises.
    """
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipelines.training.rendezvous import Rendezvous
    from pipelines.training.watch import Watch

    if (ended := _ended(folder)) is not None:
        return ended
    family = load(MODELS, model.type, "model.type")
    # With the driver, as Ray Train's controller: with another node it would be lost, and the fit with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    rendezvous = Rendezvous.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    job = Job(
        model.type,
        model.params,
        task,
        shards,
        team.threads,
        checkpoint_every(train, family),
        folder,
        rendezvous,
        parent,
        gpu=team.gpu,
        strategy=train.strategy,
        compile=train.compile,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: ray.kill(rendezvous))
        unit = "steps" if family.trainer == "torch" else "rounds"
        hear = Hearing(stack, progress, metrics, train.max_failures, unit=unit, heard=steps_in(metrics), listen=listen)
        while True:
            left = train.max_failures - hear.losses
            watch: Any = Watch(rendezvous, train.worker_timeout_s, left)
            done = in_background(_trainer(family.trainer, job, team, left, watch).fit)
            try:
                _listen_until(done, rendezvous, hear)
                break
            except TrainingFailedError as error:
                raise _explained(error, hear) from error
            except ray.exceptions.RayActorError as error:
                hear({"lost": [Lost("the train controller", "died", str(error))]})
                if hear.losses > train.max_failures:
                    raise hear.given_up() from error
                hear.free_slots()
            finally:
                if not done.done():  # Ctrl-C
                    with contextlib.suppress(ray.exceptions.RayError):  # it is gone with its node; what interrupted us is told
                        ray.get(rendezvous.stop.remote(), timeout=END_S)
                    if hear.controller is not None:  # where the rendezvous cannot do it any more
                        ray.kill(hear.controller)
                    concurrent.futures.wait([done], timeout=END_S)
                    hear.free_slots()
    if hear.refused is not None:
        raise DataError(hear.refused)
    found = _ended(folder)
    assert found is not None, "a fit ends with a report that carries its model"
    return Fit(found.model, found.state, hear.workers, hear.failures)


def checkpoint_every(train: TrainSpec, family: Any) -> int:
    """Rounds or steps between checkpoints: what the Spec says, else the family."""
    return train.checkpoint_every or int(getattr(family, "checkpoint_every", ROUNDS))


def _ended(folder: Folder) -> Fit | None:
    """What a fit left that came to its end; None: it did not."""
    name = last_checkpoint(folder)
    if name is None:
        return None
    left = folder / name
    state = json.loads(left.read_bytes(STATE))
    return Fit(left, state) if "final" in state else None


def _trainer(kind: str, job: Job, team: Team, max_failures: int, watch: Any) -> Any:
    """A trainer of Ray Train, with a folder of its own below the checkpoints.

    In the folder of an earlier one Ray Train would read that one's list of checkpoints, which a kill may have left half written;
    `last_checkpoint` looks at the files of all.
    """
    import ray.train

    resources = {"CPU": team.cpus, **({"GPU": 1} if team.gpu else {})}
    least, most = team.sizes
    scaling: Any = ray.train.ScalingConfig  # mypy sees that of Ray Train's first version
    return _leanest(TRAINERS[kind]())(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=scaling(
            num_workers=most if least == most else (least, most),
            use_gpu=team.gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=GROW_S,
        ),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=job.checkpoints.path,
            storage_filesystem=job.checkpoints.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[watch],
        ),
    )


def _lightgbm() -> Any:
    # Not `LightGBMTrainer`: it would import LightGBM in the controller and open ports for a network that is ours (network.py).
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return DataParallelTrainer


def _torch() -> Any:
    from ray.train.torch import TorchTrainer

    return TorchTrainer  # by itself it takes nccl where workers have GPUs, else gloo


TRAINERS: dict[str, Callable[[], Any]] = {"lightgbm": _lightgbm, "torch": _torch}


def _leanest(trainer: Any) -> Any:
    from ray._private.worker import get_dashboard_url

    from pipelines.training.lean import lean

    return trainer if get_dashboard_url() else lean(trainer)  # a private Ray has no API server


def in_background(work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """Run it in a thread that does not outlive the process.

    In the main thread Ray Train would take Ctrl-C for itself and end the process with 0.
    """
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed on
            future.set_exception(error)

    threading.Thread(target=run, name="heliostat-fit", daemon=True).start()
    return future


def _listen_until(done: concurrent.futures.Future[Any], rendezvous: Any, hear: Hearing) -> Any:
    """Pass on what the ranks report until the fit has ended; return its result or raise its error."""
    import ray

    ended = False
    while not ended:
        ended = bool(concurrent.futures.wait([done], timeout=POLL_S).done)
        try:
            # The calls of an asynchronous actor need not arrive in order.
            for entry in sorted(ray.get(rendezvous.drain.remote(), timeout=MEET_S), key=lambda entry: entry.get("step", -1)):
                hear(entry)
        except ray.exceptions.RayError as error:
            if not ended:
                silent = isinstance(error, ray.exceptions.GetTimeoutError)
                what = f"has not answered for {MEET_S:.0f} s" if silent else "has died"
                raise ClusterError(f"train: the process in which the workers meet {what}; run the command again") from error
        if not ended:
            hear.check()
    return done.result()


@dataclass
class Hearing:
    """Keep what the ranks report: metrics in the run's file, workers and losses in the record, the step on the display."""

    stack: contextlib.ExitStack
    progress: Progress
    metrics: Folder
    max_failures: int
    unit: str = "rounds"
    """What a step is called."""
    refused: str | None = None
    """Why the workers have ended the fit, where they have."""
    workers: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    losses: int = 0
    """How often the group was lost; one loss may have several reasons."""
    controller: Any = None
    """Ray Train's."""
    slots: Any = None
    """The placement group of the workers."""
    heard: set[int] = field(default_factory=set)
    """The steps of which the metrics are in the file: what goes on from a checkpoint comes by the same steps again."""
    size: int | None = None
    """Workers of the group that was started last."""
    listen: Callable[[dict[str, Any]], None] | None = None
    stage: Stage | None = None
    step: int = 0
    _oom_kills: int = 0
    _starting: float | None = None
    _running: float | None = None

    def __call__(self, entry: dict[str, Any]) -> None:
        if "worker" in entry:
            self.workers.append(entry["worker"])
            self._oom_kills = max(self._oom_kills, entry["oom_kills"])
        elif "controller" in entry:
            self.controller = entry["controller"]
        elif "slots" in entry:
            self.slots = entry["slots"]
        elif "group" in entry:
            now, starting = time.monotonic(), entry["group"] == "starting"
            if starting:
                self._resized(entry["size"])
            self._starting, self._running = (now, None) if starting else (None, now)
        elif "refused" in entry:
            self.refused = entry["refused"]
        elif "raised" in entry:  # would be raised at each new start again, and the other ranks may wait for that one for ever
            raise entry["raised"]
        elif "lost" in entry:
            self._lost(entry["lost"])
        else:
            self._report(entry["step"], entry["total"], entry["metrics"])
            if self.listen is not None:
                self.listen(entry)

    def _resized(self, size: int) -> None:
        if self.size not in (None, size):
            self.progress.note(f"train: goes on with {size} worker{'s' if size > 1 else ''}, it had {self.size}")
        self.size = size

    def check(self) -> None:
        """Raise `ClusterError` when the workers do not get ready, or Ray Train's controller has fallen silent."""
        if self._starting is not None and time.monotonic() - self._starting > START_S:
            raise ClusterError(
                f"train: the workers were not ready {START_S:.0f} s after their start; one may be stopped, or its node cut off"
            )
        if self._running is not None and time.monotonic() - self._running > CONTROLLER_S:
            raise ClusterError(f"train: Ray Train's controller has not answered for {CONTROLLER_S:.0f} s; run the command again")

    def free_slots(self) -> None:
        """Give back the slots of a controller that was killed: Ray keeps a placement group until the job has ended too."""
        import ray

        if self.slots is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.util.remove_placement_group(self.slots)
            self.slots = None

    def given_up(self) -> ClusterError:
        """What the command ends with where workers were lost once too often."""
        often = f"the workers were lost {self.losses} times" if self.losses > 1 else "the workers were lost"
        return ClusterError(f"train: {self.failures[-1]}; {often}, and train.max_failures is {self.max_failures}")

    def _lost(self, lost: list[Lost]) -> None:
        told = sentences(lost, look, self._oom_kills)
        self.failures += told
        self.losses += 1
        again = (
            f"; the workers start again from the last checkpoint (failure {self.losses} of at most {self.max_failures})"
            if self.losses <= self.max_failures
            else ""
        )
        self.progress.note(f"train: {'; '.join(told)}{again}")

    def _report(self, step: int, total: int, found: dict[str, dict[str, float | None]]) -> None:
        lines = [
            {"step": step, "split": split, "metric": name, "value": value}
            for split, values in found.items()
            for name, value in values.items()
        ]
        if lines and step not in self.heard:
            self.heard.add(step)
            self.metrics.append_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if self.stage is None:
            self.stage = self.stack.enter_context(self.progress.stage("train", total, unit=self.unit))
        shown = {f"{split} {name}": value for split, values in found.items() for name, value in list(values.items())[:2]}
        self.stage.advance(step - self.step, **shown)  # negative after a restart from a checkpoint
        self.step = step


def steps_in(metrics: Folder) -> set[int]:
    """The steps that are in `metrics.jsonl`; what a kill left of its last line is cut off."""
    if not metrics.exists("metrics.jsonl"):
        return set()
    text = metrics.read_bytes("metrics.jsonl").decode()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        metrics.write_bytes("metrics.jsonl", whole.encode())
    return {json.loads(line)["step"] for line in whole.splitlines()}


def look(lost: Lost) -> Trace | None:
    """Look on a lost worker's node at what its process left; None where the node does not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if lost.node is None or lost.pid is None or lost.node not in alive:
        return None
    there = NodeAffinitySchedulingStrategy(lost.node, soft=False)
    look: Any = ray.remote(trace).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        found: Trace = ray.get(look.remote(lost.pid, kill=lost.how == "silent"), timeout=LOOK_S)
    except ray.exceptions.RayError:  # its node is gone or cut off
        return None
    return found


def _explained(error: BaseException, hear: Hearing) -> BaseException:
    """What the command ends with: the user's error, or why workers were lost; our own exceptions stay what they are."""
    from ray.train.v2._internal.exceptions import (
        WorkerGroupStartupFailedError,
        WorkerHealthCheckFailedError,
        WorkerHealthCheckTimeoutError,
    )

    from pipelines.data.read import user_error_in

    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    causes = [*failures.values(), getattr(error, "controller_failure", None), error]
    found = next((told for cause in causes if (told := user_error_in(cause)) is not None), None)
    if found is not None:
        return found
    deaths = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError, WorkerGroupStartupFailedError)
    network = r"Binding port|Socket \w+ error"  # LightGBM's own errors that are no fault of ours
    if hear.failures and any(isinstance(cause, deaths) or re.search(network, str(cause)) for cause in causes):
        return hear.given_up()
    return error
