"""Prepared shards: all rows once and in order, whatever their size, row groups and buckets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.prepared import Shard, Shards
from pipelines.data.writing import Encodings, ShardWriter
from pipelines.spec import PrepareSpec
from pipelines.storage import Folder


def write(folder: Path, sizes: list[int], layout: PrepareSpec) -> tuple[list[Shard], pa.Table]:
    rows = pa.table({"f0": np.arange(sum(sizes), dtype=float), "__target__": np.zeros(sum(sizes))})
    (folder / "train").mkdir(exist_ok=True)
    writer = ShardWriter(Folder.at(str(folder)), "train/00000", rows.schema, layout, Encodings([], {}))
    start = 0
    for size in sizes:
        writer.add(rows.slice(start, size))
        start += size
    writer.close()
    return writer.shards, rows


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    group=st.integers(1024, 3000),
    limit=st.none() | st.integers(1024, 5000),
)
def test_every_row_is_written_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group: int, limit: int | None
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    layout = PrepareSpec(row_group_rows=group, shard_rows=limit)
    shards, rows = write(folder, sizes, layout)

    files = [pq.ParquetFile(folder / shard.file) for shard in shards]
    groups = [file.metadata.row_group(i).num_rows for file in files for i in range(file.num_row_groups)]
    assert pa.concat_tables(file.read() for file in files).equals(rows)
    assert [file.metadata.num_rows for file in files] == [shard.rows for shard in shards]
    assert max(groups) <= group and (limit is None or max(shard.rows for shard in shards) <= limit)
    assert limit is not None or all(size == group for size in groups[:-1])


def test_ranks_read_every_row_once(tmp_path: Path) -> None:
    shards, rows = write(tmp_path, [3000, 100, 4000], PrepareSpec(row_group_rows=1024, shard_rows=2048))
    written = Shards(Folder.at(str(tmp_path)), [], {"train": shards})

    seen = [batch.matrix[:, 0] for rank in range(3) for part in written.ranges("train", rank, 3) for batch in written.read(part)]

    assert np.concatenate(seen).tolist() == rows["f0"].to_pylist()


def test_columns_are_kept_as_the_sample_shows_is_best(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    rows = 50_000
    table = pa.table(
        {
            "f0": generator.normal(size=rows),  # nothing makes it shorter
            "f1": generator.integers(0, 12, rows).astype(float),
            "f2": np.where(generator.random(rows) < 0.7, np.nan, generator.normal(size=rows)),
            "f3": np.round(generator.uniform(0, 5e6, rows)),  # whole numbers: half of their bytes are zero
            "__target__": generator.integers(0, 2, rows).astype(float),
        }
    )

    found = Encodings.of(table)

    assert found.dictionary == ["f1", "f2", "__target__"]
    assert found.compression == {"f0": "none", "f1": "none", "f2": "none", "f3": "lz4", "__target__": "none"}
    sizes = {}
    for name, encodings in {"chosen": found, "lz4": Encodings([], dict.fromkeys(table.column_names, "lz4"))}.items():
        writer = ShardWriter(Folder.at(str(tmp_path)), name, table.schema, PrepareSpec(), encodings)
        writer.add(table)
        writer.close()
        assert _bits(pq.read_table(tmp_path / f"{name}.parquet")) == _bits(table)
        sizes[name] = (tmp_path / f"{name}.parquet").stat().st_size
    assert sizes["chosen"] < sizes["lz4"]


def _bits(table: pa.Table) -> list[bytes]:
    return [column.to_numpy().tobytes() for column in table.columns]


def test_a_sample_without_a_row_chooses_too() -> None:
    empty = pa.table({"f0": np.empty(0)})

    assert Encodings.of(empty) == Encodings(["f0"], {"f0": "none"})


def targets(folder: Path, target: np.ndarray) -> Shards:
    (folder / "train").mkdir()
    rows = pa.table({"f0": np.zeros(len(target)), "__target__": target})
    layout = PrepareSpec(row_group_rows=1024, shard_rows=8192)
    writer = ShardWriter(Folder.at(str(folder)), "train/00000", rows.schema, layout, Encodings([], {}))
    writer.add(rows)
    writer.close()
    return Shards(Folder.at(str(folder)), [], {"train": writer.shards, "valid": [], "test": []})


def test_the_range_of_the_target_is_known_from_footers(tmp_path: Path) -> None:
    target = np.random.default_rng(0).normal(size=30_000)

    assert targets(tmp_path, target).target_range() == (target.min(), target.max())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sample_of_targets_is_of_the_ranks_own_rows_from_all_over_its_part(tmp_path: Path, size: int) -> None:
    shards = targets(tmp_path, np.arange(100_000.0))

    for rank in range(size):
        first, last = rank * 100_000 // size, (rank + 1) * 100_000 // size
        sample = shards.target_sample("train", rank, size)
        assert first <= sample[0] < first + 8192 and last - 3 * 8192 < sample[-1] < last
        assert len(np.unique(sample)) == len(sample) and 8192 < len(sample) <= 32 * 1024
        assert np.abs(np.quantile(sample, [0.25, 0.5, 0.75]) - np.linspace(first, last, 5)[1:4]).max() < 8192
