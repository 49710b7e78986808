"""Read units as a Ray Data `Datasource`.

The function that a stage applies runs inside the read task, so reading and applying are one operator by construction and only
the small results travel. Measured: left to itself Ray Data cuts each task's output into 25 blocks and nothing fuses.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import ray
from ray import ObjectRef
from ray.data import Datasource
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
def prompt() -> Iterator[None]:
    """Let Ray Data look more often at what it has: which slots there are, and which tasks have ended.

    It asks for slots once a second, and the first answers of an execution are "none yet": for one to two seconds one task runs at
    a time. It looks at its tasks ten times a second, which left a slot without work for 0.1 to 0.2 s after each of them.
    """
    from ray.data._internal.execution import streaming_executor_state as state
    from ray.data._internal.execution.resource_manager import ResourceManager

    before = ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S, state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S
    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = LIMITS_S  # type: ignore[assignment]
    state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = LOOK_S
    try:
        yield
    finally:
        ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S, state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = before


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
