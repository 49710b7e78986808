"""The prepared cache: each split as Parquet shards of numbers, in source order, ready for any trainer.

    STORE/cache/KEY/
        manifest.json                  written last: its presence means complete; names the shards' folder
        schema.json preprocessor.json task.json profile.json quality.json
        shards-XXXXXXXX/train/00000.parquet ...   at least one per read unit that has rows in the split; float64, NaN = missing:
                                                  f0, f1, ..., __weight__, __group__ (uint64: equal numbers are one
                                                  query, whose rows stand together) and __init_score__ where the Spec names
                                                  them, __target__
        shards-XXXXXXXX/sample.parquet            the transformed row sample of the train split

Shards are the one hand-over from Ray Data to every trainer: a worker opens the exact row range of its rank. Two runs that write
the same KEY at once write two shard folders; the manifest that is written last wins, and both are whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.features.transform import Feature
from pipelines.metrics import sizes_of
from pipelines.storage import Folder

TARGET: Final = "__target__"
WEIGHT: Final = "__weight__"
GROUP: Final = "__group__"
INIT_SCORE: Final = "__init_score__"
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
    """(rows,): how much each row counts; None: all the same. In the shards it is `task.weight`; a fit gets the train rows' times
    their class weights."""

    group: np.ndarray[Any, np.dtype[np.uint64]] | None = None
    """(rows,): ranking: a number for the query of each row; the rows of a query stand together."""
    init_score: np.ndarray[Any, np.dtype[np.float64]] | None = None
    """(rows,): the raw score that each row starts from; None: 0, or what the family starts from by itself."""


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
    grouped: bool = False
    """Rows belong to queries, which no two ranks may share."""

    @property
    def rows(self) -> dict[str, int]:
        return {split: sum(shard.rows for shard in shards) for split, shards in self.splits.items()}

    def ranges(self, split: str, rank: int, size: int) -> list[Range]:
        """The part of a split that a rank reads: consecutive rows, every row in exactly one rank, sizes differ by at most one.

        Where rows belong to queries a rank begins with the first whole one: sizes then differ by as much as a query has rows, and
        a rank may have none.
        """
        first, last = self._border(split, rank, size), self._border(split, rank + 1, size)
        ranges, position = [], 0
        for shard in self.splits[split]:
            start, stop = max(first - position, 0), min(last - position, shard.rows)
            if start < stop:
                ranges.append(Range(shard.file, start, stop))
            position += shard.rows
        return ranges

    def _border(self, split: str, rank: int, size: int) -> int:
        """The first row of a rank; looks at the queries around it and nothing else."""
        rows = self.rows[split]
        at = rank * rows // size
        if not self.grouped or at in (0, rows):
            return at
        before = None
        for groups in self._groups_from(split, at - 1):
            before = groups[0] if before is None else before
            others = np.flatnonzero(groups != before)
            if len(others):
                return at - 1 + int(others[0])
            at += len(groups)
        return rows

    def _groups_from(self, split: str, row: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint64]]]:
        """The queries of the rows from one on, a row group at a time."""
        position = 0
        for shard in self.splits[split]:
            if row < position + shard.rows:
                yield from self.column(Range(shard.file, max(row - position, 0), shard.rows), GROUP)
            position += shard.rows

    def column(self, range: Range, name: str) -> Iterator[np.ndarray[Any, Any]]:
        """Yield one column of the rows, a row group at a time."""
        with pq.ParquetFile(f"{self.folder.path}/{range.file}", filesystem=self.folder.filesystem) as file:
            for group, start, stop in _groups(file, range):
                yield file.read_row_group(group, [name], use_threads=False).column(0).slice(start, stop - start).to_numpy()

    def weighs(self, split: str, rank: int, size: int) -> bool:
        """Whether a row of a rank has a weight above 0; looks no further than it must."""
        return any(weights.any() for found in self.ranges(split, rank, size) for weights in self.column(found, WEIGHT))

    def largest_query(self, split: str) -> int:
        """The rows of the largest query; reads that one column."""
        largest, last, rows = 0, None, 0
        for groups in self._groups_from(split, 0):
            sizes = sizes_of(groups)
            rows = int(sizes[0]) + (rows if groups[0] == last else 0)
            largest = max(largest, rows, *sizes.tolist())
            last, rows = groups[-1], rows if len(sizes) == 1 else int(sizes[-1])
        return largest

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
    features = [i for i, name in enumerate(table.column_names) if not name.startswith("__")]
    matrix = np.empty((table.num_rows, len(features)), np.float64)
    for i in features:
        matrix[:, i] = table.column(i).to_numpy()
    weight = table[WEIGHT].to_numpy() if WEIGHT in table.column_names else None
    group = table[GROUP].to_numpy() if GROUP in table.column_names else None
    init_score = table[INIT_SCORE].to_numpy() if INIT_SCORE in table.column_names else None
    return Batch(matrix, table[TARGET].to_numpy(), weight, group, init_score)


def to_table(
    columns: list[np.ndarray[Any, np.dtype[np.float64]]], beside: Mapping[str, np.ndarray[Any, np.dtype[Any]]] | None = None
) -> pa.Table:
    """A shard's table: the features as f0, f1, ... (a feature's name may be anything), what is beside, and last the target."""
    return pa.table({**{f"f{i}": column for i, column in enumerate(columns[:-1])}, **(beside or {}), TARGET: columns[-1]})
