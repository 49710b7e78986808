"""In which order a rank sees its rows: every row once an epoch, shuffled, and the same wherever a fit goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.data.prepared import Batch, Range, Shard, Shards, to_table
from pipelines.features.transform import Feature
from pipelines.models.network_feed import Feed, Rows
from pipelines.storage import Folder
from pipelines.training.worker import Worker

SIZES = (137, 400, 63, 250)


class Weighted(Shards):
    """Shards whose rows weigh as much as their number."""

    def read(self, range: Range) -> Iterator[Batch]:
        for batch in super().read(range):
            yield batch._replace(weight=batch.matrix[:, 0])


def shards_of(folder: Path, kind: type[Shards] = Shards) -> Shards:
    """Rows that are their own number, in four files with small row groups."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    first = 0
    for i, size in enumerate(SIZES):
        numbers = np.arange(first, first + size, dtype=np.float64)
        pq.write_table(to_table([numbers, numbers * 10]), folder / "train" / f"{i}.parquet", row_group_size=50)
        first += size
    shards = [Shard(f"train/{i}.parquet", size) for i, size in enumerate(SIZES)]
    return kind(Folder.at(str(folder)), [Feature(name="x", kind="numeric")], {"train": shards, "valid": []})


def feed_of(shards: Shards, rank: int = 0, size: int = 1, *, steps: int = 9, seed: int = 1, pool: int = 120) -> Feed:
    worker = Worker(rank=rank, size=size, threads=1, checkpoint_every=10, shards=shards, start=None, rendezvous=None, attempt="a")
    return Feed(worker, seed=seed, steps=steps, pool_rows=pool)


def taken(feed: Feed, first: int, last: int) -> list[Rows]:
    with feed.batches(first, last) as batches:
        return list(batches)


def numbers(batches: list[Rows]) -> list[int]:
    return [int(number) for batch in batches for number in batch.matrix[:, 0]]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_all_ranks_together_see_every_row_once_an_epoch_in_equally_many_steps(tmp_path: Path, size: int) -> None:
    shards = shards_of(tmp_path)

    seen = [taken(feed_of(shards, rank, size), 0, 9) for rank in range(size)]

    assert sorted(number for batches in seen for number in numbers(batches)) == list(range(sum(SIZES)))
    assert {len(batches) for batches in seen} == {9}
    for step in range(9):
        rows = sum(len(batches[step].target) for batches in seen)
        assert rows == feed_of(shards, 0, size).rows_of_step(step)
        assert abs(rows - sum(SIZES) / 9) <= size


def test_each_epoch_and_seed_has_an_order_of_its_own(tmp_path: Path) -> None:
    shards = shards_of(tmp_path)

    first, second = (numbers(taken(feed_of(shards), 9 * epoch, 9 * epoch + 9)) for epoch in (0, 1))
    other = numbers(taken(feed_of(shards, seed=2), 0, 9))

    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second and first != other and first != sorted(first)
    # Rows of one pool come from row groups all over the files.
    assert np.ptp(first[:100]) > 200


@pytest.mark.parametrize("step", [1, 8, 9, 13])
def test_what_goes_on_at_a_step_sees_what_was_never_interrupted_sees(tmp_path: Path, step: int) -> None:
    shards = shards_of(tmp_path)

    whole, rest = taken(feed_of(shards), 0, 27), taken(feed_of(shards), step, 27)

    assert len(rest) == 27 - step
    for one, other in zip(whole[step:], rest, strict=True):
        assert np.array_equal(one.matrix, other.matrix) and np.array_equal(one.target, other.target)


def test_targets_and_weights_stay_with_their_rows(tmp_path: Path) -> None:
    for batch in taken(feed_of(shards_of(tmp_path, Weighted)), 0, 9):
        assert np.array_equal(batch.target, batch.matrix[:, 0] * 10)
        assert batch.weight is not None and np.array_equal(batch.weight, batch.matrix[:, 0])


def test_no_more_than_a_few_pools_are_read_ahead(tmp_path: Path) -> None:
    read: list[int] = []

    class Counting(Shards):
        def read(self, range: Range) -> Iterator[Batch]:
            read.append(range.stop - range.start)
            return super().read(range)

    feed = feed_of(shards_of(tmp_path, Counting), steps=85, pool=100)
    with feed.batches(0, 85) as batches:
        next(batches)  # ten rows: of the pool in use; one more may wait, one may be on its way
        assert sum(read) <= 3 * 100


def test_more_ranks_than_rows_of_a_step_are_no_problem(tmp_path: Path) -> None:
    shards = shards_of(tmp_path)

    batches = taken(feed_of(shards, 2, 4, steps=850), 0, 850)

    assert {len(batch.target) for batch in batches} == {0, 1} and len(numbers(batches)) == feed_of(shards, 2, 4).rows
    assert batches[0].matrix.shape[1] == 1


def test_an_error_of_the_reader_reaches_the_loop(tmp_path: Path) -> None:
    class Broken(Shards):
        def read(self, range: Range) -> Iterator[Batch]:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        taken(feed_of(shards_of(tmp_path, Broken)), 0, 9)
