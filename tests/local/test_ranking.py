"""Ranking through the verbs: whole queries from a source where their rows lie apart, and the same answers over HTTP's row path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifact import Artifact
from pipelines.data.prepared import GROUP
from pipelines.errors import DataError
from pipelines.evaluate import evaluate
from pipelines.explain import checked
from pipelines.metrics import sizes_of
from pipelines.predict import predict
from pipelines.prepare import Prepared, prepare
from pipelines.progress import Silent
from pipelines.spec import PipelineSpec
from pipelines.train import run

pytestmark = pytest.mark.usefixtures("session")


def slots() -> float:
    return 4.0


def searches(queries: int = 150) -> pl.DataFrame:
    """Rows of each query together, each with its number in the table."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 30, queries)
    rows = sizes.sum()
    a, b = rng.normal(size=rows), rng.normal(size=rows)
    label = np.clip(np.round(a - 0.5 * b + 0.5 * rng.normal(size=rows) + 1), 0, 4).astype(int)
    query = np.repeat([f"q{number}" for number in rng.permutation(queries)], sizes)
    return pl.DataFrame({"number": np.arange(rows), "query": query, "a": a, "b": b, "label": label})


def written(frame: pl.DataFrame, folder: Path) -> Path:
    """In three files."""
    folder.mkdir()
    for i, rows in enumerate(np.array_split(np.arange(len(frame)), 3)):
        frame[rows].write_parquet(folder / f"{i}.parquet")
    return folder


def spec_of(data: Path, store: Path, *, workers: int = 2, **sections: Any) -> PipelineSpec:
    content: dict[str, Any] = {
        "name": "searches",
        "data": {"source": str(data), "key": ["number"], "split": {"test": 0.2, "valid": 0.2}},
        "task": {"type": "ranking", "target": "label", "group": "query"},
        "model": {"params": {"rounds": 30, "num_leaves": 7, "early_stopping": 10, "min_data_in_leaf": 5}},
        "train": {"workers": workers},
        "store": str(store),
        **sections,
    }
    return checked(PipelineSpec, content)


def shards_of(prepared: Prepared, split: str) -> pa.Table:
    files = [f"{prepared.shards.folder.path}/{shard.file}" for shard in prepared.shards.splits[split]]
    return pa.concat_tables(pq.read_table(file) for file in files)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("shuffled", [False, True], ids=["together", "apart"])
def test_no_query_is_split_and_its_rows_stand_together(tmp_path: Path, shuffled: bool) -> None:
    frame = searches()
    if shuffled:
        frame = frame.sample(fraction=1.0, shuffle=True, seed=1)
    notes = Notes()

    prepared = prepare(spec_of(written(frame, tmp_path / "data"), tmp_path / "store"), progress=notes)

    assert any("lie apart in the source" in note for note in notes.notes) == shuffled
    a_of = dict(zip(frame["a"], frame["query"], strict=True))
    seen: dict[str, set[str]] = {}
    for split in ("train", "valid", "test"):
        table = shards_of(prepared, split)
        groups, features = table[GROUP].to_numpy(), table["f0"].to_pylist()
        assert [feature.name for feature in prepared.shards.features] == ["a", "b"]
        assert len(sizes_of(groups)) == len(np.unique(groups)), "each query stands in one place"
        seen[split] = {a_of[value] for value in features}
        order = {value: place for place, value in enumerate(frame["a"])}
        places = np.array([order[value] for value in features])
        same = groups[1:] == groups[:-1]
        assert (np.diff(places)[same] > 0).all(), "rows of a query are in source order"
    assert sum(map(len, seen.values())) == 150 and all(len(queries) > 10 for queries in seen.values())
    assert sum(prepared.rows.values()) == len(frame)


def test_a_ranking_is_learned_evaluated_and_answered_alike_everywhere(tmp_path: Path) -> None:
    frame = searches()
    together, apart = written(frame, tmp_path / "a"), written(frame.sample(fraction=1.0, shuffle=True, seed=1), tmp_path / "b")
    store = tmp_path / "store"
    spec = spec_of(together, store)
    done = run(spec, free_slots=slots)
    other = run(spec_of(apart, store), free_slots=slots)
    alone = run(spec_of(together, store, workers=1), free_slots=slots)

    assert list(done.metrics["test"]) == ["ndcg@10", "ndcg@5", "ndcg@3", "ndcg@1"] and done.record["task"]["metric"] == "ndcg@10"
    assert done.metrics["test"]["ndcg@10"] > 0.85  # at random 0.6
    for made in (other, alone):
        assert made.metrics["test"]["ndcg@10"] == pytest.approx(done.metrics["test"]["ndcg@10"], abs=0.03)
        assert made.record["rows"] == done.record["rows"]
    assert sum(worker["rows"] for worker in done.record["workers"]) == done.record["rows"]["train"]
    found = [evaluate(done, spec, source=str(source)).metrics["data"]["ndcg@10"] for source in (together, apart)]
    assert found[0] == pytest.approx(found[1], rel=1e-12), "rows of a query may lie apart"
    assert evaluate(done, spec).metrics == done.metrics

    artifact = Artifact.load(done.path)
    assert [column.name for column in artifact.inputs] == ["a", "b"]
    rows = frame.select("a", "b")[:5]
    values = artifact.predict(rows)["value"].to_list()
    assert artifact.predict_rows(rows.to_dicts()) == [{"value": value} for value in values]
    predict(f"{done.path}/artifact", str(together), str(tmp_path / "out"))
    assert pl.read_parquet(tmp_path / "out/*.parquet")["value"][:5].to_list() == values


def test_what_cannot_be_ranked_is_one_line(tmp_path: Path) -> None:
    frame = searches(30)
    without = frame.with_columns(query=pl.when(pl.col("number") == 7).then(None).otherwise(pl.col("query")))
    negative = frame.with_columns(label=pl.col("label") - 1)
    for name, wrong, sentence in (
        ("a", without, "task.group: 'query' is missing in 1 of "),
        ("b", negative, "task.target: 'label' is -1, but a ranking learns from labels that are integers of 0 and above"),
    ):
        with pytest.raises(DataError) as refused:
            prepare(spec_of(written(wrong, tmp_path / name), tmp_path / "store"))
        assert sentence in str(refused.value) and "\n" not in str(refused.value)
