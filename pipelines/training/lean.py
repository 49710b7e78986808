"""Ray Train on a private Ray, without what only a cluster needs: seconds at the start and at the end of each fit.

On a private Ray every process has the environment of the driver already, and nothing outlives the command.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class LeanGroup(WorkerGroup):
    """Its workers have no runtime environment: with one, Ray starts Python twice for each and asks an agent first (2 s)."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return {}


class LeanController(TrainController):
    """Starts lean groups."""

    worker_group_cls = LeanGroup


def lean(trainer: Any) -> Any:
    """The trainer for a private Ray.

    Without its placement group cleaner too, which asks the API server, that a private Ray has not, whether the controller still
    lives: the end of each fit would wait 12 s for the cleaner.
    """

    class Lean(trainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            remote: Any = ray.remote(LeanController)
            controller = remote.options(num_cpus=0, scheduling_strategy=here).remote(**arguments)
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())

    return Lean
