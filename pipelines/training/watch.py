"""Who watches the workers of a fit? This callback, in the process of Ray Train's controller; the driver words what it sees.

The controller asks each worker every 0.2 s how it is. A thread of the worker's process answers, not its training loop: LightGBM
gives the interpreter's lock away while it works, so a worker that is merely busy answers, and one that is stopped, gone or cut
off does not. Ray waits 600 s for such an answer; `train.worker_timeout_s` replaces that.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, Final

import ray
from ray.train.v2._internal.constants import WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from pipelines.training.lost import Lost, is_symptom

LEFT_S: Final = 300.0
"""How long ranks may go on after another one has ended: the last model may still be under way to the store."""
BEAT_S: Final = 2.0
TELL_S: Final = 10.0
GRACE_S: Final = 3.0
"""How long to wait for the death behind a broken connection."""


class Watch(ControllerCallback, WorkerGroupCallback):
    """Report starts, losses, the slots and the controller itself to the rendezvous; kill the survivors of a loss at once."""

    def __init__(self, rendezvous: Any, timeout_s: float, max_failures: int) -> None:
        self._rendezvous = rendezvous
        self._timeout_s = timeout_s
        self._max_failures = max_failures
        self._left_s = LEFT_S
        self._failed_starts = 0
        self._workers: list[Any] = []
        self._left: float | None = None
        self._told = False
        self._beat = 0.0

    def after_controller_start(self, train_run_context: Any) -> None:
        """Make the controller known, through which an interrupted driver can end the fit."""
        os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(self._timeout_s)  # read for each worker group, in this process
        controller = ray.get_runtime_context().current_actor
        ray.get([self._rendezvous.lead.remote(controller), self._rendezvous.report.remote({"controller": controller})])

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._workers, self._left, self._told = [], None, False
        self._tell({"group": "starting", "size": worker_group_context.num_workers})

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Make the slots known, which stay taken when the controller dies."""
        self._tell({"slots": worker_group.get_worker_group_state().placement_group_handle.placement_group})

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._workers = worker_group.get_workers()
        self._tell({"group": "running"})

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if time.monotonic() - self._beat > BEAT_S:  # the driver watches the watcher
            self._beat = time.monotonic()
            self._tell({"group": "running"})
        statuses: dict[int, Any] = worker_group_status.worker_statuses
        errors: dict[int, BaseException] = dict(worker_group_status.errors)
        if errors and self._told:  # they are dead because they were killed here
            return
        if errors:
            if all(is_symptom(str(error)) for error in errors.values()):
                errors |= self._deaths([rank for rank in statuses if rank not in errors])
            # Survivors may spin in LightGBM, which takes a closed connection for a slow one.
            self._end([self._lost(rank, error) for rank, error in sorted(errors.items())])
        else:
            self._end_waiting({rank for rank, status in statuses.items() if not status.running}, set(statuses))

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Count failed starts, which Ray Train repeats for ever; a start that waits for slots may wait."""
        error = getattr(getattr(current_state, "training_failed_error", None), "controller_failure", None)
        if type(current_state).__name__ == "ReschedulingState" and isinstance(error, WorkerGroupStartupFailedError):
            self._failed_starts += 1
            text = str(error.__cause__ or error)
            died = "Worker exit type" in text or "its node has died" in text or "running low on memory" in text
            lost = (
                Lost("a worker that was starting", "died", text) if died else Lost("a worker", "failed", f"did not start: {text}")
            )
            self._tell_surely({"lost": [lost]})
            if self._failed_starts > self._max_failures:
                raise error

    def _end_waiting(self, ended: set[int], ranks: set[int]) -> None:
        """Kill ranks that go on long after another has ended: in LightGBM they would wait for it for ever."""
        if not ended or ended == ranks:
            self._left = None
            return
        self._left = self._left if self._left is not None else time.monotonic()
        if time.monotonic() - self._left > self._left_s and not self._told:
            why = f"waited {self._left_s:.0f} s for rank {min(ended)}, which has ended"
            self._end([self._about(rank, "failed", why) for rank in sorted(ranks - ended)])

    def _deaths(self, ranks: list[int]) -> dict[int, BaseException]:
        """Ask ranks that look alive once more: who broke the connection that others complain of?"""
        asked = {self._workers[rank].execute_async(os.getpid): rank for rank in ranks}
        found: dict[int, BaseException] = {}
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and not found:
            for ref in ray.wait(list(asked), num_returns=len(asked), timeout=0.2)[0] if asked else []:
                rank = asked.pop(ref)
                try:
                    ray.get(ref)
                    asked[self._workers[rank].execute_async(os.getpid)] = rank
                except ray.exceptions.RayError as error:
                    found[rank] = WorkerHealthCheckFailedError("", failure=error)
            time.sleep(0.1)
        return found

    def _lost(self, rank: int, error: BaseException) -> Lost:
        match error:
            case WorkerHealthCheckTimeoutError():
                return self._about(rank, "silent", f"{self._timeout_s:g}")
            case WorkerHealthCheckFailedError():
                return self._about(rank, "died", str(error.health_check_failure))
            case _:
                return self._about(rank, "failed", f"{type(error).__name__}: {error}")

    def _about(self, rank: int, how: str, text: str) -> Lost:
        at = self._workers[rank].metadata
        return Lost(f"rank {rank} (pid {at.pid} on {at.hostname})", how, text, pid=at.pid, node=at.node_id)

    def _end(self, lost: list[Lost]) -> None:
        self._tell_surely({"lost": lost})
        self._told = True
        for worker in self._workers:
            ray.kill(worker.actor)

    def _tell(self, entry: dict[str, Any]) -> None:
        self._rendezvous.report.remote(entry)

    def _tell_surely(self, entry: dict[str, Any]) -> None:
        """Before the fit can end: the driver hears nothing that comes later."""
        with contextlib.suppress(ray.exceptions.RayError):  # the driver is told by the rendezvous's own end then
            ray.get(self._rendezvous.report.remote(entry), timeout=TELL_S)
