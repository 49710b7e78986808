"""Bringing the rows of a query together, where they lie apart in the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.prepared import GROUP, Shard
from pipelines.data.writing import Encodings, Placed, ShardWriter
from pipelines.metrics import starts_of
from pipelines.spec import PrepareSpec
from pipelines.storage import Folder

BUCKET_BYTES: Final = 64 << 20
"""Of the rows that are sorted at a time; about three times as much is held."""
MAX_BUCKETS: Final = 1024


def together(placed: Sequence[Placed]) -> bool:
    """Whether the rows of every query stand together in these shards, one after the other."""
    runs = np.concatenate([np.empty(0, np.uint64), *(each.queries for each in placed if each.queries is not None)])
    queries = runs[starts_of(runs)]  # a query may go on in the next shard
    return len(np.unique(queries)) == len(queries)


def by_query(layout: PrepareSpec, group: str, rows: int, columns: int) -> PrepareSpec:
    """The layout in which the rows of a query are in one bucket, and a bucket can be sorted in memory."""
    if layout.bucket_by:
        return layout
    buckets = min(MAX_BUCKETS, max(layout.buckets, -(-rows * columns * 8 // BUCKET_BYTES)))
    return layout.model_copy(update={"bucket_by": [group], "buckets": buckets})


def sorted_by_query(
    folder: Folder, split: str, placed: Sequence[Placed], layout: PrepareSpec, encodings: Encodings
) -> list[Shard]:
    """Sort each bucket of a split by query, rows of one in source order, into new shards; a task of the cluster for each."""
    import ray

    buckets: dict[int, list[str]] = {}
    for each in placed:
        buckets.setdefault(each.bucket, []).extend(shard.file for shard in each.shards)
    task: Any = ray.remote(num_cpus=1)(sort_bucket)
    found: list[list[Shard]] = ray.get(
        [
            task.remote(folder, f"{split}/queries-{bucket:04d}", files, layout, encodings)
            for bucket, files in sorted(buckets.items())
        ]
    )
    remove(folder, placed)
    return [shard for shards in found for shard in shards]


def sort_bucket(folder: Folder, stem: str, files: Sequence[str], layout: PrepareSpec, encodings: Encodings) -> list[Shard]:
    """Write the rows of these shards, sorted by query, to new ones."""
    table = pa.concat_tables([pq.read_table(f"{folder.path}/{file}", filesystem=folder.filesystem) for file in files])
    order = np.argsort(table[GROUP].to_numpy(), kind="stable")
    writer = ShardWriter(folder, stem, table.schema, layout, encodings)
    for start in range(0, len(order), layout.row_group_rows):
        writer.add(table.take(pa.array(order[start : start + layout.row_group_rows])))
    writer.close()
    return writer.shards


def remove(folder: Folder, placed: Sequence[Placed]) -> None:
    """Delete shards that others have replaced."""
    for each in placed:
        for shard in each.shards:
            folder.filesystem.delete_file(f"{folder.path}/{shard.file}")
