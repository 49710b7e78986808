"""Weights through the verbs: derived, in shards, in trees and in metrics, and needed by no prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score, root_mean_squared_error

from pipelines.artifact import Artifact
from pipelines.data.prepared import WEIGHT
from pipelines.errors import DataError, SpecError
from pipelines.evaluate import evaluate
from pipelines.explain import checked
from pipelines.predict import predict
from pipelines.prepare import prepare
from pipelines.runs import Run
from pipelines.spec import PipelineSpec
from pipelines.train import run, train

pytestmark = pytest.mark.usefixtures("session")


def slots() -> float:
    return 4.0


def orders(rows: int = 4000) -> pl.DataFrame:
    """Rows that are worth more the later they are, and a rule that holds for late rows only."""
    rng = np.random.default_rng(0)
    a, b, age = rng.normal(size=rows), rng.normal(size=rows), np.linspace(100, 0, rows)
    signal = np.where(age > 50, -a, a) + 0.5 * b
    return pl.DataFrame(
        {
            "a": a,
            "b": b,
            "age": age,
            "kind": rng.choice(["x", "y", "z"], rows),
            "bought": signal + rng.normal(size=rows) > 1.0,
            "spent": signal + rng.normal(size=rows),
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orders")
    for i, part in enumerate(orders().iter_slices(1000)):
        part.write_parquet(folder / f"{i}.parquet")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def spec_of(data: Path, store: Path, *, workers: int = 2, target: str = "bought", **task: Any) -> PipelineSpec:
    content: dict[str, Any] = {
        "name": "orders",
        "data": {"source": str(data), "derive": {"w": "exp(-age / 20)"}},
        "task": {"target": target, "weight": "w", **task},
        "features": {"drop": ["age", "spent" if target == "bought" else "bought"]},
        "model": {"params": {"rounds": 30, "num_leaves": 7, "early_stopping": None, "min_sum_hessian_in_leaf": 0.001}},
        "train": {"workers": workers},
        "store": str(store),
    }
    return checked(PipelineSpec, content)


@pytest.fixture(scope="module")
def made(data: Path, store: Path, session: Any) -> Run:
    return run(spec_of(data, store, class_weight="balanced"), free_slots=slots)


def test_metrics_are_weighted_by_rows_and_not_by_classes(made: Run, data: Path, store: Path) -> None:
    frame = pl.read_parquet(data)
    weight = np.exp(-frame["age"].to_numpy() / 20)
    p = Artifact.load(made.path).predict(frame.drop("age"))["probability"].to_numpy()  # a prediction needs no weight

    found = evaluate(made, spec_of(data, store), source=str(data)).metrics["data"]

    assert found["logloss"] == pytest.approx(log_loss(frame["bought"], p, sample_weight=weight), rel=1e-9)
    assert found["logloss"] != pytest.approx(log_loss(frame["bought"], p), rel=1e-3)
    assert evaluate(made, spec_of(data, store)).metrics == made.metrics


def test_shards_hold_the_weights_and_features_do_not(made: Run, data: Path, store: Path) -> None:
    spec = spec_of(data, store)
    prepared = prepare(spec)
    assert prepared.reused, "class weights are no part of what is prepared"
    assert [feature.name for feature in prepared.shards.features] == ["a", "b", "kind"]
    tables = [pq.read_table(f"{prepared.shards.folder.path}/{shard.file}") for shard in prepared.shards.splits["train"]]
    assert all(table.column_names == ["f0", "f1", "f2", WEIGHT, "__target__"] for table in tables)
    frame = pl.read_parquet(data)
    of_a = dict(zip(frame["a"], np.exp(-frame["age"].to_numpy() / 20), strict=True))
    for table in tables:
        assert table[WEIGHT].to_pylist() == pytest.approx([of_a[a] for a in table["f0"].to_pylist()], rel=1e-12)

    other = spec.model_copy(update={"task": spec.task.model_copy(update={"weight": "age"})})
    plain = spec.model_copy(update={"task": spec.task.model_copy(update={"weight": None})})
    keys = {prepare(each).path for each in (spec, other, plain)}
    assert len(keys) == 3, "other weights are other prepared data"


def test_weights_change_what_is_learned_on_any_number_of_workers(made: Run, data: Path, store: Path) -> None:
    plain = train(spec_of(data, store, weight=None), free_slots=slots)
    alone = run(spec_of(data, store, workers=1, class_weight="balanced"), free_slots=slots)

    late = pl.read_parquet(data).filter(pl.col("age") < 20)
    right = {
        name: roc_auc_score(late["bought"], Artifact.load(each.path).predict(late)["probability"])
        for name, each in {"weighted": made, "plain": plain}.items()
    }
    assert right["weighted"] > right["plain"] + 0.02
    assert alone.metrics["test"]["auc"] == pytest.approx(made.metrics["test"]["auc"], abs=0.01)
    tree = lgb.Booster(model_file=f"{made.path}/artifact/model/model.txt").dump_model()["tree_info"][0]["tree_structure"]
    assert tree["internal_count"] == made.record["rows"]["train"]


def test_a_regression_weighs_its_rows_too(data: Path, store: Path) -> None:
    spec = spec_of(data, store, target="spent")
    done = run(spec, free_slots=slots)
    frame = pl.read_parquet(data)
    values = Artifact.load(done.path).predict(frame)["value"].to_numpy()

    found = evaluate(done, spec, source=str(data)).metrics["data"]["rmse"]

    weight = np.exp(-frame["age"].to_numpy() / 20)
    assert found == pytest.approx(root_mean_squared_error(frame["spent"], values, sample_weight=weight), rel=1e-9)


def test_a_prediction_needs_no_weight_and_an_evaluation_does(made: Run, data: Path, store: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.parquet"
    pl.read_parquet(data).drop("age").write_parquet(bare)

    assert predict(f"{made.path}/artifact", str(bare), str(tmp_path / "out")).rows == 4000
    spec = spec_of(data, store)
    weighed = spec.model_copy(update={"data": spec.data.model_copy(update={"derive": {}})})
    with pytest.raises(DataError, match="task.weight: .*bare.parquet has no column 'w'.*add it, with 1 in rows") as refused:
        evaluate(made, weighed, source=str(bare))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"weight": "a"}, "task.weight: 'a' is negative in "),
        ({"weight": "kind"}, "task.weight: 'kind' is a column of type string, expected numbers"),
        ({"weight": "wieght"}, "task.weight: there is no column 'wieght'"),
        ({"class_weight": {"maybe": 2}}, "task.class_weight: 'maybe' is no class of target 'bought'"),
    ],
)
def test_what_is_no_weight_is_one_line(data: Path, store: Path, task: dict[str, Any], sentence: str) -> None:
    with pytest.raises((DataError, SpecError)) as refused:
        prepare(spec_of(data, store, **task))

    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_worker_whose_rows_weigh_nothing_is_refused_not_wrong(data: Path, store: Path) -> None:
    spec = spec_of(data, store)
    late = spec.model_copy(
        update={"data": spec.data.model_copy(update={"derive": {"w": "CASE WHEN age < 40 THEN 1.0 ELSE 0.0 END"}})}
    )

    with pytest.raises(DataError, match="task.weight: 'w' is 0 in all rows of worker 0"):
        train(late, free_slots=slots)
