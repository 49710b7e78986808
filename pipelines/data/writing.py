"""Writing the prepared cache: the rows of a unit, transformed, each split to Parquet shards of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.beside import groups_of, init_scores_of, weights_of
from pipelines.data.prepared import GROUP, INIT_SCORE, TARGET, WEIGHT, Shard, to_table
from pipelines.data.read import Block
from pipelines.data.source import Unit
from pipelines.data.split import SPLITS, Hashes, grouped, identity_of_values, salted
from pipelines.features.preprocessor import Preprocessor
from pipelines.metrics import starts_of
from pipelines.spec import PrepareSpec
from pipelines.storage import Folder
from pipelines.tasks import Task

BUCKET_SALT: Final = 0xB0C4E7
LOOKED_AT: Final = 16_384
"""Rows of the sample that tell how a column is best kept."""
FEW: Final = 0.5
"""A column with fewer different values than this share of its rows is kept as a dictionary of them."""
WORTH: Final = 0.8
"""A column whose bytes LZ4 brings below this share is compressed."""


@dataclass(frozen=True)
class Encodings:
    """How Parquet keeps each column: LZ4 on numbers that it cannot make shorter took more time than all else in writing them."""

    dictionary: list[str]
    compression: dict[str, str]

    @classmethod
    def of(cls, sample: pa.Table) -> Encodings:
        """Choose by rows such as those that will be written."""
        dictionary, compression = [], {}
        every = max(1, sample.num_rows // LOOKED_AT)
        for name in sample.column_names:
            values = np.ascontiguousarray(sample[name].to_numpy()[::every])
            compression[name] = "none"
            if len(np.unique(values)) <= FEW * len(values):
                dictionary.append(name)
            elif len(pa.compress(values, codec="lz4_raw", asbytes=True)) < WORTH * values.nbytes:
                compression[name] = "lz4"
        return cls(dictionary, compression)


def beside_of(table: pa.Table, task: Task, unit: Unit) -> dict[str, np.ndarray[Any, Any]]:
    """What stands beside the features of canonical rows, by its column in the shards."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    if task.weight is not None:
        found[WEIGHT] = weights_of(table, task.weight, unit)
    if task.group is not None:
        found[GROUP] = groups_of(table, task.group, unit)
    if task.init_score is not None:
        found[INIT_SCORE] = init_scores_of(table, task.init_score, unit)
    return found


class Placed(NamedTuple):
    """The shards that a unit yielded of a bucket."""

    bucket: int
    shards: list[Shard]
    queries: Hashes | None
    """Ranking: the query of each run of rows that have the same, in their order."""


@dataclass(frozen=True)
class WriteShards:
    """Transform the rows of a unit and write them, each split and bucket to shards of its own."""

    folder: Folder
    preprocessor: Preprocessor
    task: Task
    layout: PrepareSpec
    encodings: Encodings
    fitted: bool
    """Whether the preprocessor was fitted to these train rows."""

    def __call__(self, unit: Unit, blocks: Iterator[Block]) -> dict[str, list[Placed]]:
        writers: dict[tuple[int, int], ShardWriter] = {}
        queries: dict[tuple[int, int], list[Hashes]] = {}
        try:
            for block in blocks:
                folds = block.places if self.fitted and self.preprocessor.cross_fitted else None
                columns = [*self.preprocessor.transform(block.table, folds), self.task.encode(block.table[self.task.target])]
                beside = beside_of(block.table, self.task, unit)
                places = block.split.astype(np.int16) * self._buckets + self._bucket(block)
                order, ends = grouped(places, len(SPLITS) * self._buckets)
                for place, (start, end) in enumerate(pairwise(ends)):
                    if start < end:
                        split, bucket = divmod(place, self._buckets)
                        chosen = order if isinstance(order, slice) else order[start:end]
                        rows = to_table(
                            [column[chosen] for column in columns], {name: found[chosen] for name, found in beside.items()}
                        )
                        if (split, bucket) not in writers:
                            writers[split, bucket] = self._writer(unit, split, bucket, rows.schema)
                        writers[split, bucket].add(rows)
                        if GROUP in beside:
                            groups = beside[GROUP][chosen]
                            queries.setdefault((split, bucket), []).append(groups[starts_of(groups)])
        finally:
            for writer in writers.values():
                writer.close()
        found: dict[str, list[Placed]] = {}
        for (split, bucket), writer in sorted(writers.items()):
            runs = np.concatenate(queries[split, bucket]) if (split, bucket) in queries else None
            found.setdefault(SPLITS[split], []).append(Placed(bucket, writer.shards, runs))
        return found

    @property
    def _buckets(self) -> int:
        return self.layout.buckets if self.layout.bucket_by else 1

    def _bucket(self, block: Block) -> np.ndarray[Any, np.dtype[np.int16]]:
        if not self.layout.bucket_by:
            return np.zeros(len(block.split), np.int16)
        hashes = salted(identity_of_values([block.table[name] for name in self.layout.bucket_by]), BUCKET_SALT)
        return (hashes % np.uint64(self._buckets)).astype(np.int16)

    def _writer(self, unit: Unit, split: int, bucket: int, schema: pa.Schema) -> ShardWriter:
        stem = f"{SPLITS[split]}/{unit.index:05d}" + (f"-b{bucket:04d}" if self.layout.bucket_by else "")
        return ShardWriter(self.folder, stem, schema, self.layout, self.encodings)


class ShardWriter:
    """Writes rows as Parquet files of bounded size in row groups of one size; holds at most a row group and a block."""

    def __init__(self, folder: Folder, stem: str, schema: pa.Schema, layout: PrepareSpec, encodings: Encodings) -> None:
        self._folder, self._stem, self._schema, self._layout, self._encodings = folder, stem, schema, layout, encodings
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
            compression=self._encodings.compression,
            use_dictionary=self._encodings.dictionary,
            write_statistics=[TARGET],
        )
