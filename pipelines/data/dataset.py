"""Read units as a Ray Data `Datasource`.

The function that a stage applies runs inside the read task, so reading and applying are one operator by construction and only
the small results travel. Measured: left to itself Ray Data cuts each task's output into 25 blocks and nothing fuses.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pickle
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import ray
from ray import ObjectRef
from ray.data import Datasource
from ray.data._internal import stats
from ray.data._internal.block_batching.interfaces import BlockPrefetcher
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor, streaming_executor_state
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data._internal.execution.resource_manager import ResourceManager
from ray.data.block import BlockMetadata
from ray.data.datasource.datasource import ReadTask

from pipelines.data.source import Unit
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.read import Each, Reader


LIMITS_S: Final = 0.05
LOOK_S: Final = 0.02


class UnitDatasource(Datasource):
    """One read task per group of units; each unit yields one row: its index and the result of `each`.

    `shared` is (reader, each) in the object store.
    """

    def __init__(self, shared: ObjectRef[tuple[Reader, Each]], tasks: list[list[Unit]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared, self.tasks = shared, tasks

    def get_name(self) -> str:
        return "ReadUnits"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        """The tasks as planned; `parallelism` is their number."""
        return [
            ReadTask(
                functools.partial(read_units, self.shared, units),
                BlockMetadata(num_rows=len(units), size_bytes=65536 * len(units), input_files=None, exec_stats=None),
            )
            for units in self.tasks
        ]


@contextlib.contextmanager
def tuned() -> Iterator[None]:
    """Set for an execution what Ray Data has no setting for.

    It asks for slots once a second, and the first answers are "none yet": for one to two seconds one task runs at a time. It
    looks at its tasks ten times a second, which leaves a slot without work for 0.1 to 0.2 s after each of them. And its first
    execution waits for two actors, 1 to 2 s on two cores: where this process started Ray without a dashboard, one has nowhere to
    show what it collects, and the other has no machine and nobody else to share slots with. And each reading of results leaves
    a thread behind that waits for ever to fetch some ahead, which nobody asks of it.
    """
    # Its package has a function of the same name.
    batching = importlib.import_module("ray.data._internal.block_batching.iter_batches")
    replaced: list[tuple[Any, str, Any]] = [
        (ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", LIMITS_S),
        (streaming_executor_state, "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S", LOOK_S),
        (batching, "WaitBlockPrefetcher", NoPrefetcher),
    ]
    node: Any = ray._private.worker._global_node
    if node is not None and node.head and not node.webui_url:
        replaced += [
            (streaming_executor, "create_cluster_autoscaler", lambda *_, **__: OneMachine()),
            (stats, "get_or_create_stats_actor", Unread),
        ]
    before = [getattr(where, name) for where, name, _ in replaced]
    try:
        for where, name, value in replaced:
            setattr(where, name, value)
        yield
    finally:
        for (where, name, _), value in zip(replaced, before, strict=True):
            setattr(where, name, value)


class NoPrefetcher(BlockPrefetcher):
    """Fetches nothing ahead: results are small, and all are waited for."""

    def prefetch_blocks(self, blocks: list[Any]) -> None:
        pass


class OneMachine(ClusterAutoscaler):
    """All that a Ray of one machine has, which neither grows nor shrinks."""

    def try_trigger_scaling(self) -> None:
        pass

    def on_executor_shutdown(self) -> None:
        pass

    def get_total_resources(self) -> ExecutionResources:
        found: ExecutionResources = ExecutionResources.from_resource_dict(ray.cluster_resources())
        return found


class Unread:
    """In place of the actor that collects figures for the dashboard: takes all of them, and gives a data set its name."""

    def __getattr__(self, name: str) -> Any:
        answer = uuid.uuid4().hex if name == "gen_dataset_id" else None
        return SimpleNamespace(remote=lambda *_, **__: ray.put(answer))


def read_units(shared: ObjectRef[tuple[Reader, Each]], units: list[Unit]) -> Iterator[pa.Table]:
    from pipelines.data.read import Counts

    reader, each = ray.get(shared)
    for unit in units:
        counts = Counts()
        result: Any
        try:
            result = each(unit, reader.blocks(unit, counts))
        except UserError as error:  # travels as a result: Ray Data would log it as its own failure and add to its message
            result = error
        yield pa.table({"unit": [unit.index], "result": pa.array([pickle.dumps((result, counts))], pa.large_binary())})
