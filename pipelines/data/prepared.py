"""The prepared cache: each split as Parquet shards of numbers, in source order, ready for any trainer.

    STORE/cache/KEY/
        manifest.json                  written last: its presence means complete; names the shards' folder
        schema.json preprocessor.json task.json profile.json quality.json
        shards-XXXXXXXX/train/00000.parquet ...   at least one per read unit that has rows in the split; float64, NaN = missing
        shards-XXXXXXXX/sample.parquet            the transformed row sample of the train split

Shards are the one hand-over from Ray Data to every trainer: a worker opens the exact row range of its rank. Two runs that write
the same KEY at once write two shard folders; the manifest that is written last wins, and both are whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.features.transform import Feature
from pipelines.storage import Folder

TARGET: Final = "__target__"
BUCKET_SALT: Final = 0xB0C4E7
SAMPLE_GROUPS: Final = 16
"""Row groups of a rank that a sample of its targets is taken from, at most."""


class Shard(NamedTuple):
    """One Parquet file of a split."""

    file: str
    rows: int


class Batch(NamedTuple):
    """Some rows of a split, as numbers."""

    matrix: np.ndarray[Any, np.dtype[np.float64]]
    """(rows, features)."""
    target: np.ndarray[Any, np.dtype[np.float64]]
    """(rows,)."""
    weight: np.ndarray[Any, np.dtype[np.float64]] | None = None
    """(rows,): how much each row counts; None: all the same."""


class Range(NamedTuple):
    """Rows `start` to `stop` (exclusive) of one shard."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class Shards:
    """The shards of all splits; a plain value that goes to the workers."""

    folder: Folder
    features: list[Feature]
    splits: dict[str, list[Shard]]

    @property
    def rows(self) -> dict[str, int]:
        return {split: sum(shard.rows for shard in shards) for split, shards in self.splits.items()}

    def ranges(self, split: str, rank: int, size: int) -> list[Range]:
        """The part of a split that a rank reads: consecutive rows, every row in exactly one rank, sizes differ by at most one."""
        rows = self.rows[split]
        first, last = rank * rows // size, (rank + 1) * rows // size
        ranges, position = [], 0
        for shard in self.splits[split]:
            start, stop = max(first - position, 0), min(last - position, shard.rows)
            if start < stop:
                ranges.append(Range(shard.file, start, stop))
            position += shard.rows
        return ranges

    def read(self, range: Range) -> Iterator[Batch]:
        """Yield the rows in their order, at most a row group at a time."""
        with pq.ParquetFile(f"{self.folder.path}/{range.file}", filesystem=self.folder.filesystem) as file:
            for group, start, stop in _groups(file, range):
                yield to_batch(file.read_row_group(group, use_threads=False).slice(start, stop - start))

    def pieces(self, range: Range) -> list[Range]:
        """A range cut at the row groups: `read` yields one batch of each."""
        with pq.ParquetFile(f"{self.folder.path}/{range.file}", filesystem=self.folder.filesystem) as file:
            found, first = [], range.start
            for _, start, stop in _groups(file, range):
                found.append(Range(range.file, first, first + stop - start))
                first += stop - start
            return found

    def target_sample(self, split: str, rank: int, size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Targets of a rank's rows, sorted: of a few row groups all over its part of the split."""
        ranges = self.ranges(split, rank, size)
        found = [np.empty(0)]
        for at in spread(len(ranges), SAMPLE_GROUPS):
            with pq.ParquetFile(f"{self.folder.path}/{ranges[at].file}", filesystem=self.folder.filesystem) as file:
                groups = list(_groups(file, ranges[at]))
                for group, start, stop in (groups[i] for i in spread(len(groups), -(-SAMPLE_GROUPS // len(ranges)))):
                    column = file.read_row_group(group, [TARGET], use_threads=False).column(0)
                    found.append(column.slice(start, stop - start).to_numpy())
        return np.sort(np.concatenate(found))

    def target_range(self) -> tuple[float, float]:
        """The smallest and the largest target of all splits, from the shards' footers; (inf, -inf) where there is no row."""
        found = [(math.inf, -math.inf)]
        for shard in (shard for shards in self.splits.values() for shard in shards):
            footer = pq.read_metadata(f"{self.folder.path}/{shard.file}", filesystem=self.folder.filesystem)
            groups = (footer.row_group(group) for group in range_of(footer.num_row_groups))
            statistics = [group.column(footer.num_columns - 1).statistics for group in groups]
            found += [(each.min, each.max) for each in statistics if each is not None and each.has_min_max]
        return min(low for low, _ in found), max(high for _, high in found)

    def sample(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The matrix of the row sample: at most 200,000 rows of the train split."""
        return self.sample_batch().matrix

    def sample_batch(self) -> Batch:
        """The row sample with its targets."""
        return to_batch(pq.read_table(f"{self.folder.path}/sample.parquet", filesystem=self.folder.filesystem))


range_of = range  # `range` is a word of this module


def _groups(file: pq.ParquetFile, range: Range) -> Iterator[tuple[int, int, int]]:
    """The row groups that a range needs, each with the first and the last (exclusive) of its rows."""
    position = 0
    for group in range_of(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        start, stop = max(range.start - position, 0), min(range.stop - position, rows)
        if start < stop:
            yield group, start, stop
        position += rows


def spread(number: int, most: int) -> list[int]:
    """At most so many of the numbers below `number`, evenly."""
    return list(range_of(number)) if number <= most else [i * number // most for i in range_of(most)]


def to_batch(table: pa.Table) -> Batch:
    """A shard's table as numbers."""
    columns = [table.column(i).to_numpy() for i in range_of(table.num_columns)]
    matrix = np.empty((table.num_rows, table.num_columns - 1), np.float64)
    for i, column in enumerate(columns[:-1]):
        matrix[:, i] = column
    return Batch(matrix, columns[-1])


def to_table(columns: list[np.ndarray[Any, np.dtype[np.float64]]]) -> pa.Table:
    """A shard's table: the features as f0, f1, ... (a feature's name may be anything) and the target, which comes last."""
    return pa.table({**{f"f{i}": column for i, column in enumerate(columns[:-1])}, TARGET: columns[-1]})
