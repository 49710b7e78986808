"""plan: what a run would read and need, found without Ray and without reading the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from pipelines.errors import ClusterError, DataError, SpecError
from pipelines.plan import Cluster, Machine, plan, reach
from pipelines.spec import PipelineSpec

ROWS = 3000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(7)
    for i in range(3):
        frame = pl.DataFrame(
            {
                "age": rng.normal(40, 10, ROWS // 3),
                "city": rng.choice(["Ulm", "Bern"], ROWS // 3),
                "notes": rng.normal(size=ROWS // 3),
                "when": np.datetime64("2020-01-01", "us") + rng.integers(0, 10**12, ROWS // 3),
                "bought": rng.random(ROWS // 3) > 0.5,
            }
        )
        frame.write_parquet(folder / f"{i}.parquet")
    return folder


def spec_of(source: Path, store: Path, **sections: Any) -> PipelineSpec:
    data = {"source": str(source), **sections.pop("data", {})}
    content = {"name": "people", "data": data, "task": {"target": "bought"}, "store": str(store), **sections}
    return PipelineSpec.model_validate(content)


def cluster(memory: int = 8 << 30, slots: float = 4, machines: int = 1) -> Cluster:
    return Cluster(
        slots * machines,
        0.0,
        lambda store, sources: [Machine(f"m{i}", slots, memory, reach(store, sources)) for i in range(machines)],
    )


def test_a_plan_tells_rows_columns_and_what_is_read(source: Path, tmp_path: Path) -> None:
    found = plan(spec_of(source, tmp_path / "runs", features={"drop": ["notes"]}), cluster())

    chunks = [pq.ParquetFile(file).metadata.row_group(0).column(i) for file in sorted(source.iterdir()) for i in range(5)]
    assert (found.rows, found.exact, found.files) == (ROWS, True, 3)
    assert {name: column["kind"] for name, column in found.columns.items()} == {
        "age": "numeric", "city": "categorical", "when": "datetime", "bought": "boolean",
    }  # fmt: skip
    assert found.stages[0].reads == sum(c.total_compressed_size for c in chunks if c.path_in_schema != "notes")
    assert found.features == 1 + 1 + 7
    assert found.cache.startswith("miss: nothing is prepared for 'people'")
    assert [stage.name for stage in found.stages] == ["statistics", "transform", "train"]
    assert found.team is not None and found.team.workers == 3
    assert found.problems == []
    found.refuse()
    assert not (tmp_path / "runs").exists(), "a plan writes nothing"


def test_passes_are_told_with_their_reasons(source: Path, tmp_path: Path) -> None:
    group = {"both": {"columns": ["age", "notes"], "steps": ["impute", "log1p", {"pca": {"components": 1}}]}}
    by_time = {"split": {"by": "time", "column": "when"}}

    assert plan(spec_of(source, tmp_path), cluster()).passes == ["statistics of all columns", "transform and write"]
    assert plan(spec_of(source, tmp_path, data=by_time), cluster()).passes[0] == (
        "'when' alone, to find where to cut the time split"
    )
    assert plan(spec_of(source, tmp_path, features={"groups": group}), cluster()).passes[1] == (
        "statistics again: step 'pca' of group 'both' needs statistics of what 'log1p' makes"
    )


def test_more_workers_than_slots_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="train.workers: 9 workers with 1 slots each are more than the 8 slots there are"):
        plan(spec_of(source, tmp_path, train={"workers": 9, "cpus_per_worker": 1}), cluster(slots=4, machines=2)).refuse()


def test_more_workers_than_rows_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="train.workers: 5000 workers cannot share 2400 train rows"):
        plan(spec_of(source, tmp_path, train={"workers": 5000}), cluster()).refuse()


def test_a_fit_that_cannot_fit_in_memory_is_refused_with_the_remedy(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ClusterError, match=r"train: 3 workers need about \d+ MiB each, and 100 MiB are free on 1 machine; .*max_bin"
    ):
        plan(spec_of(source, tmp_path), cluster(memory=100 << 20)).refuse()


def test_a_node_that_cannot_reach_the_store_is_named(source: Path, tmp_path: Path) -> None:
    unreachable = Machine("far", 4, 8 << 30, {"/mnt/x": "no such mount"})

    found = plan(spec_of(source, tmp_path), Cluster(4, 0.0, lambda store, sources: [unreachable]))

    assert found.problems == [
        "/mnt/x: far cannot reach it (no such mount); use a shared mount or a URI (s3://...) that every node can open"
    ]


def test_wrong_specs_are_refused_as_the_run_would(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no column 'boght'; did you mean 'bought'"):
        plan(spec_of(source, tmp_path, task={"target": "boght"}), cluster())
    with pytest.raises(SpecError, match="num_leafs is unknown"):
        plan(spec_of(source, tmp_path, model={"params": {"num_leafs": 3}}), cluster())
    with pytest.raises(DataError, match="does not exist"):
        plan(spec_of(source / "not there", tmp_path), cluster())


def test_the_memory_of_a_fit_grows_with_its_rows(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = plan(spec_of(source, tmp_path), cluster()).stages[-1].memory
    monkeypatch.setattr("pipelines.data.source.Source.rows", property(lambda self: 100_000_000))
    large = plan(spec_of(source, tmp_path, train={"workers": 3}), cluster(memory=1 << 40)).stages[-1].memory

    rows = 80_000_000 / 3
    assert large - small == pytest.approx(rows * (9 + 12 + 28), rel=0.15)


def test_what_a_machine_cannot_reach_is_told_and_a_store_need_not_exist_yet(tmp_path: Path) -> None:
    wrong = reach(str(tmp_path / "not yet"), [str(tmp_path / "*/x-*.parquet"), str(tmp_path / "gone"), "nosuch://bucket/x"])

    assert wrong == {
        str(tmp_path / "gone"): "it does not exist there",
        "nosuch://bucket/x": wrong["nosuch://bucket/x"],
    }
    assert "'nosuch://bucket/x' cannot be opened" in wrong["nosuch://bucket/x"]
