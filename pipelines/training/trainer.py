"""The driver's side of a fit: how many workers, their start, what they report, and the model they leave."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelines.data.prepared import Shards
from pipelines.errors import DataError
from pipelines.progress import Progress, Stage
from pipelines.registry import MODELS, load
from pipelines.spec import ModelSpec, TrainSpec
from pipelines.storage import Folder
from pipelines.tasks import Task
from pipelines.training.worker import STATE, Job, last_checkpoint, train_loop

POLL_S = 0.25
END_S = 30.0


@dataclass(frozen=True)
class Team:
    """How a fit is spread out; fixed once, before it starts, and recorded."""

    workers: int
    cpus: float
    """Slots that each worker reserves."""
    threads: int
    gpu: bool

    @classmethod
    def plan(cls, spec: TrainSpec, free_slots: float, gpus: float, rows: int) -> Team:
        """Turn `auto` into numbers.

        Workers: the free slots less one, which Ray Data needs while others read. A lone worker may use the threads of the slot
        left over. `gpus` are those that the family could use. Raises `DataError` when there are more workers than rows.
        """
        workers = spec.workers if spec.workers != "auto" else max(1, min(int(free_slots) - 1, rows))
        if workers > rows:
            raise DataError(f"train.workers: {workers} workers cannot share {rows} train rows; lower train.workers")
        cpus = spec.cpus_per_worker if spec.cpus_per_worker != "auto" else min(1.0, int(100 * free_slots / workers) / 100)
        threads = max(1, int(spec.cpus_per_worker if spec.cpus_per_worker != "auto" else free_slots / workers))
        gpu = gpus >= workers if spec.gpu == "auto" else spec.gpu
        return cls(workers, cpus, threads, gpu)


@dataclass
class Fit:
    """What a fit left: the model's files, and what the ranks said."""

    model: Folder
    state: dict[str, Any]
    workers: list[dict[str, Any]] = field(default_factory=list)
    """Every worker that ever started: rank, pid, host, threads, rows, from_step."""


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
) -> Fit:
    """Train on the cluster; write checkpoints below `folder` and a line per report to `metrics.jsonl`.

    Goes on from the last checkpoint that is below `folder`, else from the model in `parent`, else from nothing; where that
    checkpoint is the end of a fit, nothing is left to do. A lost worker starts the group again from there, at most
    `train.max_failures` times; a lost train controller starts a new one, as often.
    """
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipelines.training.rendezvous import Rendezvous

    if (ended := _ended(folder)) is not None:
        return ended
    family = load(MODELS, model.type, "model.type")
    here = ray.get_runtime_context().get_node_id()  # no other node's end may take it away
    rendezvous = Rendezvous.options(label_selector={"ray.io/node-id": here}).remote()  # type: ignore[attr-defined]
    job = Job(model.type, model.params, task, shards, team.threads, train.checkpoint_every, folder, rendezvous, parent)
    workers: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        hear = Hearing(stack, progress, metrics, workers, heard=steps_in(metrics))
        stack.callback(lambda: ray.kill(rendezvous))
        lost = 0
        while True:
            done = _in_background(_trainer(family.trainer, job, train, team).fit)
            try:
                _listen_until(done, rendezvous, hear)
                break
            except TrainingFailedError as error:
                raise _explained(error) from error
            except ray.exceptions.RayActorError:
                lost += 1
                if lost > train.max_failures:
                    raise
                ray.get(rendezvous.free_slots.remote())
                progress.note("the train controller was lost; a new one goes on from the last checkpoint")
            finally:
                if not done.done():  # Ctrl-C
                    with contextlib.suppress(
                        ray.exceptions.RayError
                    ):  # the actor is gone with its node; what interrupted us is told
                        ray.get(rendezvous.stop.remote(), timeout=END_S)
                    concurrent.futures.wait([done], timeout=END_S)
    left = _ended(folder)
    assert left is not None, "a fit ends with a report that carries its model"
    return Fit(left.model, left.state, workers)


def _ended(folder: Folder) -> Fit | None:
    """What a fit left that came to its end; None: it did not."""
    name = last_checkpoint(folder)
    if name is None:
        return None
    left = folder / name
    state = json.loads(left.read_bytes(STATE))
    return Fit(left, state) if "final" in state else None


def _trainer(kind: str, job: Job, train: TrainSpec, team: Team) -> Any:
    """A trainer of Ray Train, with a folder of its own below the checkpoints.

    In the folder of an earlier one Ray Train would read that one's list of checkpoints, which a kill may have left half written;
    `last_checkpoint` looks at the files of all.
    """
    import ray.train

    resources = {"CPU": team.cpus, **({"GPU": 1} if team.gpu else {})}
    return _lean(TRAINERS[kind]())(
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(num_workers=team.workers, use_gpu=team.gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=job.checkpoints.path,
            storage_filesystem=job.checkpoints.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[_announcing(job.rendezvous)],
        ),
    )


def _lightgbm() -> Any:
    from ray.train.lightgbm import LightGBMTrainer

    return LightGBMTrainer


TRAINERS: dict[str, Callable[[], Any]] = {"lightgbm": _lightgbm}


def _lean(trainer: Any) -> Any:
    """The trainer without its placement group cleaner on a Ray that has no API server, as a private one.

    The cleaner asks that server whether the controller still lives; without it, the end of each fit waits 12 s for the cleaner.
    On a private Ray nothing outlives the command that could need the cleaning.
    """
    from ray._private.worker import get_dashboard_url

    if get_dashboard_url():
        return trainer

    class Lean(trainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    return Lean


def _announcing(rendezvous: Any) -> Any:
    """A callback that makes the fit's controller known to the rendezvous, and the slots that it holds.

    Through it an interrupted driver ends the fit, and one whose controller died frees the slots, which else stay taken.
    """
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

    class Announcing(ControllerCallback, WorkerGroupCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            ray.get(rendezvous.lead.remote(ray.get_runtime_context().current_actor))

        def after_worker_group_start(self, worker_group: Any) -> None:
            ray.get(rendezvous.hold.remote(worker_group.get_worker_group_state().placement_group_handle.placement_group))

    return Announcing()


def _in_background(work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
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


def _listen_until(done: concurrent.futures.Future[Any], rendezvous: Any, hear: Callable[[dict[str, Any]], None]) -> Any:
    """Pass on what the ranks report until the fit has ended; return its result or raise its error."""
    import ray

    ended = False
    while not ended:
        ended = bool(concurrent.futures.wait([done], timeout=POLL_S).done)
        with contextlib.suppress(ray.exceptions.RayError):  # the actor may have gone with its node; the fit tells
            # The calls of an asynchronous actor need not arrive in order.
            for entry in sorted(ray.get(rendezvous.drain.remote()), key=lambda entry: entry.get("step", -1)):
                hear(entry)
    return done.result()


@dataclass
class Hearing:
    """Keep what the ranks report: metrics in the run's file, workers in the record, the step on the progress display."""

    stack: contextlib.ExitStack
    progress: Progress
    metrics: Folder
    workers: list[dict[str, Any]]
    heard: set[int] = field(default_factory=set)
    """The steps of which the metrics are in the file: what goes on from a checkpoint comes by the same steps again."""
    stage: Stage | None = None
    step: int = 0

    def __call__(self, entry: dict[str, Any]) -> None:
        if "worker" in entry:
            self.workers.append(entry["worker"])
            return
        step, total, found = entry["step"], entry["total"], entry["metrics"]
        lines = [
            {"step": step, "split": split, "metric": name, "value": value}
            for split, values in found.items()
            for name, value in values.items()
        ]
        if lines and step not in self.heard:
            self.heard.add(step)
            self.metrics.append_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if self.stage is None:
            self.stage = self.stack.enter_context(self.progress.stage("train", total, unit="rounds"))
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


def _explained(error: BaseException) -> BaseException:
    from pipelines.data.read import user_error_in

    return user_error_in(error) or error
