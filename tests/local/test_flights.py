"""The shipped example on real data: as good as it says, whatever the number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from app.spec import load_spec
from pipelines.artifact import Artifact
from pipelines.data.source import Source
from pipelines.data.split import SPLITS, assign, identity_of_rows
from pipelines.runs import Run
from pipelines.train import run

pytestmark = pytest.mark.usefixtures("session")

ROOT = Path(__file__).parents[2]


def slots() -> float:
    return 4.0


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory: pytest.TempPathFactory, session: Any) -> dict[int, Run]:
    """The example's run with one and with two workers, on the same prepared data."""
    store = tmp_path_factory.mktemp("store")
    sets = [f"store={store}", f"data.source={ROOT / 'examples/flights/data'}"]
    found = {}
    for workers in (2, 1):
        spec = load_spec([str(ROOT / "examples/flights/flights.yaml")], [*sets, f"train.workers={workers}"])
        found[workers] = run(spec, free_slots=slots)
    return found


def test_the_example_is_as_good_as_promised(by_workers: dict[int, Run]) -> None:
    done = by_workers[2]
    assert done.metrics["test"]["auc"] > 0.79
    assert sum(done.record["rows"].values()) + done.record["dropped"]["target is null"] == 336_776


def test_one_and_two_workers_agree(by_workers: dict[int, Run]) -> None:
    assert by_workers[1].metrics["test"]["auc"] == pytest.approx(by_workers[2].metrics["test"]["auc"], abs=0.002)
    assert len(by_workers[1].record["workers"]) == 1
    assert len({worker["pid"] for worker in by_workers[2].record["workers"]}) == 2


def test_the_statistics_read_each_needed_column_chunk_once(by_workers: dict[int, Run]) -> None:
    # 30 columns less the four that are dropped and from which nothing is derived; one row group in each of the twelve files.
    assert by_workers[2].record["read"]["chunks"] == 26 * 12
    assert by_workers[2].record["read"]["rows"] == 336_776
    assert by_workers[1].record["prepared"]["reused"]


def test_the_auc_is_that_of_the_test_rows_by_scikit_learn(by_workers: dict[int, Run]) -> None:
    spec = load_spec([str(ROOT / "examples/flights/flights.yaml")], [f"data.source={ROOT / 'examples/flights/data'}"])
    parts = []
    for file in Source.open(spec.data).files:
        frame = pl.read_parquet(file.path)
        split = assign(spec.data.split, identity_of_rows(file.name_hash, 0, frame.height), None, frozenset(), None)
        parts.append(frame.filter(pl.Series(split == SPLITS.index("test")) & pl.col("arr_delay").is_not_null()))
    test = pl.concat(parts)
    answers = Artifact.load(by_workers[2].path).predict(test)
    auc = roc_auc_score((test["arr_delay"] > 15).to_numpy(), answers["probability"].to_numpy())
    assert by_workers[2].metrics["test"]["auc"] == pytest.approx(auc, abs=1e-4)
    assert by_workers[2].record["rows"]["test"] == test.height
