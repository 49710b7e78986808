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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.read import Block
from pipelines.data.source import Unit
from pipelines.data.split import SPLITS, identity_of_values, salted
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.transform import Feature
from pipelines.spec import PrepareSpec
from pipelines.storage import Folder
from pipelines.tasks import Task

TARGET: Final = "__target__"
BUCKET_SALT: Final = 0xB0C4E7


class Shard(NamedTuple):
    """One Parquet file of a split."""

    file: str
    rows: int


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

    def read(self, range: Range) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]]:
        """Yield (matrix (rows, features), target (rows,)) in row order, at most a row group at a time."""
        with pq.ParquetFile(f"{self.folder.path}/{range.file}", filesystem=self.folder.filesystem) as file:
            position = 0
            for group in range_of(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                start, stop = max(range.start - position, 0), min(range.stop - position, rows)
                if start < stop:
                    yield to_matrix(file.read_row_group(group, use_threads=False).slice(start, stop - start))
                position += rows

    def sample(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The matrix of the row sample: at most 200,000 rows of the train split."""
        table = pq.read_table(f"{self.folder.path}/sample.parquet", filesystem=self.folder.filesystem)
        return to_matrix(table)[0]


range_of = range  # `range` is a word of this module


def to_matrix(table: pa.Table) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """Split a shard's table into matrix and target."""
    columns = [table.column(i).to_numpy() for i in range_of(table.num_columns)]
    matrix = np.empty((table.num_rows, table.num_columns - 1), np.float64)
    for i, column in enumerate(columns[:-1]):
        matrix[:, i] = column
    return matrix, columns[-1]


def to_table(columns: list[np.ndarray[Any, np.dtype[np.float64]]], target: np.ndarray[Any, np.dtype[np.float64]]) -> pa.Table:
    """A shard's table: f0, f1, ... (a feature's name may be anything) and the target last."""
    return pa.table({**{f"f{i}": column for i, column in enumerate(columns)}, TARGET: target})


class Placed(NamedTuple):
    """A shard that a unit yielded, and which bucket its rows are of."""

    bucket: int
    shard: Shard


@dataclass(frozen=True)
class WriteShards:
    """Transform the rows of a unit and write them, each split and bucket to shards of its own."""

    folder: Folder
    preprocessor: Preprocessor
    task: Task
    layout: PrepareSpec

    def __call__(self, unit: Unit, blocks: Iterator[Block]) -> dict[str, list[Placed]]:
        writers: dict[tuple[int, int], ShardWriter] = {}
        try:
            for block in blocks:
                folds = block.places if self.preprocessor.cross_fitted else None
                rows = to_table(self.preprocessor.transform(block.table, folds), self.task.encode(block.table[self.task.target]))
                places = block.split.astype(np.int64) * self._buckets + self._bucket(block)
                for place in np.unique(places).tolist():
                    split, bucket = divmod(place, self._buckets)
                    mask = places == place
                    if (split, bucket) not in writers:
                        writers[split, bucket] = self._writer(unit, split, bucket, rows.schema)
                    writers[split, bucket].add(rows if mask.all() else rows.filter(pa.array(mask)))
        finally:
            for writer in writers.values():
                writer.close()
        found: dict[str, list[Placed]] = {}
        for (split, bucket), writer in sorted(writers.items()):
            found.setdefault(SPLITS[split], []).extend(Placed(bucket, shard) for shard in writer.shards)
        return found

    @property
    def _buckets(self) -> int:
        return self.layout.buckets if self.layout.bucket_by else 1

    def _bucket(self, block: Block) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not self.layout.bucket_by:
            return np.zeros(len(block.split), np.int64)
        hashes = salted(identity_of_values([block.table[name] for name in self.layout.bucket_by]), BUCKET_SALT)
        return (hashes % np.uint64(self._buckets)).astype(np.int64)

    def _writer(self, unit: Unit, split: int, bucket: int, schema: pa.Schema) -> ShardWriter:
        categorical = [f"f{i}" for i, feature in enumerate(self.preprocessor.features) if feature.kind == "categorical"]
        stem = f"{SPLITS[split]}/{unit.index:05d}" + (f"-b{bucket:04d}" if self.layout.bucket_by else "")
        return ShardWriter(self.folder, stem, schema, self.layout, [*categorical, TARGET])


class ShardWriter:
    """Writes rows as Parquet files of bounded size in row groups of one size; holds at most a row group and a block."""

    def __init__(self, folder: Folder, stem: str, schema: pa.Schema, layout: PrepareSpec, use_dictionary: list[str]) -> None:
        self._folder, self._stem, self._schema, self._layout, self._dictionary = folder, stem, schema, layout, use_dictionary
        self._waiting: list[pa.Table] = []
        self._file: pq.ParquetWriter | None = None
        self.shards: list[Shard] = []
        """What has been written; whole once the writer is closed."""

    def add(self, rows: pa.Table) -> None:
        self._waiting.append(rows)
        while sum(table.num_rows for table in self._waiting) >= self._group:
            self._write(self._group)

    def close(self) -> None:
        if self._waiting:
            self._write(sum(table.num_rows for table in self._waiting))
        if self._file is not None:
            self._file.close()

    @property
    def _group(self) -> int:
        """Rows of the next row group: a shard that is nearly full takes fewer."""
        full, limit = self._layout.row_group_rows, self._layout.shard_rows
        if limit is None:
            return full
        written = self.shards[-1].rows if self.shards else limit
        return min(full, limit - written if written < limit else limit)

    def _write(self, rows: int) -> None:
        waiting = pa.concat_tables(self._waiting)
        group, rest = waiting.slice(0, rows), waiting.slice(rows)
        self._waiting = [rest] if rest.num_rows else []
        if self._file is None or (self._layout.shard_rows is not None and self.shards[-1].rows >= self._layout.shard_rows):
            self._open()
        assert self._file is not None
        self._file.write_table(group, row_group_size=rows)
        self.shards[-1] = Shard(self.shards[-1].file, self.shards[-1].rows + rows)

    def _open(self) -> None:
        if self._file is not None:
            self._file.close()
        part = f"-{len(self.shards):03d}" if self._layout.shard_rows is not None else ""
        self.shards.append(Shard(f"{self._stem}{part}.parquet", 0))
        self._file = pq.ParquetWriter(
            f"{self._folder.path}/{self.shards[-1].file}",
            self._schema,
            filesystem=self._folder.filesystem,
            compression="lz4",
            use_dictionary=self._dictionary,
            write_statistics=False,
        )
