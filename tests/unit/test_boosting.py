"""LightGBM on one rank, without Ray: streamed rows give the trees of plain LightGBM, and a resumed fit ends whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss

from pipelines.data.prepared import Shard, Shards, to_table
from pipelines.errors import SpecError
from pipelines.features.transform import Feature
from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_fit import join
from pipelines.models.boosting_params import LightGBMParams as Params
from pipelines.storage import Folder
from pipelines.tasks import Task
from pipelines.training.worker import Start, Worker

BINARY = Task(type="binary", target="y", target_type="bool", classes=[False, True])


@dataclass
class Recording(Worker):
    """A single rank that keeps what it reports."""

    kept: list[tuple[int, Any, dict[str, Any]]] = field(default_factory=list)
    logged: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def report(self, step: int, model: Any, state: dict[str, Any]) -> None:
        self.kept.append((step, model, state))

    def log(self, step: int, metrics: dict[str, Any], *, total: int) -> None:
        self.logged.append((step, metrics))


def table(rows: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = [rng.normal(size=rows), rng.integers(0, 5, rows).astype(float), rng.normal(size=rows)]
    columns[0][rng.random(rows) < 0.1] = np.nan
    y = (np.nan_to_num(columns[0]) + (columns[1] == 3) + 0.3 * rng.normal(size=rows) > 0.5).astype(float)
    return columns, y


def saved(folder: Path, model: LightGBM) -> bytes:
    folder.mkdir()
    model.save(folder)
    return (folder / "model.txt").read_bytes()


def worker(folder: Path, start: Start | None = None, rows: int = 4000, task: Task = BINARY) -> Recording:
    (folder / "train").mkdir(parents=True, exist_ok=True)
    (folder / "valid").mkdir(exist_ok=True)
    columns, y = table(rows)
    y = y + (columns[2] > 0) if task.type == "multiclass" else y
    cut = rows // 3
    for name, part in (("a", slice(0, cut)), ("b", slice(cut, rows))):
        pq.write_table(to_table([*(c[part] for c in columns), y[part]]), folder / "train" / f"{name}.parquet", row_group_size=500)
    valid, valid_y = table(1000, seed=1)
    valid_y = valid_y + (valid[2] > 0) if task.type == "multiclass" else valid_y
    pq.write_table(to_table([*valid, valid_y]), folder / "valid" / "a.parquet")
    pq.write_table(to_table([*columns, y]), folder / "sample.parquet")
    features = [
        Feature(name="x", kind="numeric"),
        Feature(name="c", kind="categorical", cardinality=5),
        Feature(name="z", kind="numeric"),
    ]
    splits = {
        "train": [Shard("train/a.parquet", cut), Shard("train/b.parquet", rows - cut)],
        "valid": [Shard("valid/a.parquet", 1000)],
        "test": [],
    }
    shards = Shards(Folder.at(str(folder)), features, splits)
    return Recording(rank=0, size=1, threads=1, checkpoint_every=10, shards=shards, start=start, rendezvous=None, attempt="a")


def test_streamed_rows_give_the_model_of_plain_lightgbm(tmp_path: Path) -> None:
    run = worker(tmp_path)
    params = Params(rounds=30, early_stopping=None, num_leaves=15)
    LightGBM.fit(params, BINARY, run)
    columns, y = table(4000)
    matrix = np.column_stack(columns)
    settings = {
        "objective": "binary", "num_leaves": 15, "learning_rate": 0.1, "min_sum_hessian_in_leaf": 1.0, "lambda_l2": 1.0,
        "verbosity": -1, "deterministic": True, "force_row_wise": True, "num_threads": 1, "feature_pre_filter": False,
    }  # fmt: skip
    plain = lgb.train(settings, lgb.Dataset(matrix, y, categorical_feature=[1]), 30)
    step, model, state = run.kept[-1]
    assert (step, state["final"]) == (30, 30)
    assert np.array_equal(model.predict(matrix), plain.predict(matrix, raw_score=True))


def test_every_row_is_in_the_first_tree(tmp_path: Path) -> None:
    run = worker(tmp_path)
    LightGBM.fit(Params(rounds=1, early_stopping=None), BINARY, run)
    tree = run.kept[-1][1].booster.dump_model()["tree_info"][0]["tree_structure"]
    assert tree["internal_count"] == 4000


def test_early_stopping_keeps_the_best_rounds(tmp_path: Path) -> None:
    run = worker(tmp_path)
    LightGBM.fit(Params(rounds=500, early_stopping=20, learning_rate=0.5, eval_every=5), BINARY, run)
    step, model, state = run.kept[-1]
    losses = {step: metrics["valid"]["logloss"] for step, metrics in run.logged}
    assert state["final"] == min(losses, key=lambda s: losses[s]) == model.rounds
    assert state["final"] + 20 == step < 500


def test_the_logged_metric_is_the_models(tmp_path: Path) -> None:
    run = worker(tmp_path)
    LightGBM.fit(Params(rounds=20, early_stopping=None), BINARY, run)
    valid, y = table(1000, seed=1)
    p = 1 / (1 + np.exp(-run.kept[-1][1].predict(np.column_stack(valid))))
    loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    assert run.logged[-1][1]["valid"]["logloss"] == pytest.approx(loss, abs=1e-12)


THREE = Task(type="multiclass", target="y", target_type="int64", classes=[0, 1, 2])
NUMBER = Task(type="regression", target="y", target_type="float64")
SAMPLING = {"bagging_fraction": 0.5, "bagging_freq": 1, "feature_fraction": 0.6}


@pytest.mark.parametrize(
    ("task", "params"),
    [
        (BINARY, {}),
        (BINARY, {**SAMPLING, "feature_fraction_bynode": 0.7, "extra_trees": True}),
        (BINARY, {"bagging_fraction": 0.7, "bagging_freq": 3, "segment": 5, "eval_every": 4}),
        (BINARY, {**SAMPLING, "early_stopping": 20, "learning_rate": 0.4}),
        (THREE, SAMPLING),
        (NUMBER, SAMPLING),
    ],
    ids=["plain", "sampling", "short segments", "early stopping", "multiclass", "regression"],
)
def test_a_fit_that_goes_on_from_any_checkpoint_ends_with_the_bits_of_one_never_killed(
    tmp_path: Path, task: Task, params: dict[str, Any]
) -> None:
    settings = Params.model_validate({"rounds": 45, "early_stopping": None, "num_leaves": 15, **params})
    whole = worker(tmp_path, rows=2000, task=task)
    LightGBM.fit(settings, task, whole)
    assert [step for step, _, _ in whole.kept[:2]] == [10, 20] and "final" in whole.kept[-1][2]
    final = saved(tmp_path / "whole", whole.kept[-1][1])

    for step, model, state in whole.kept:
        saved(tmp_path / str(step), model)
        resumed = worker(tmp_path, Start(LightGBM.load(tmp_path / str(step)), step, state), 2000, task)
        LightGBM.fit(settings, task, resumed)
        assert saved(tmp_path / f"{step}-resumed", resumed.kept[-1][1]) == final
        assert resumed.kept[-1][0] == whole.kept[-1][0] and resumed.kept[-1][2] == whole.kept[-1][2]
        assert resumed.logged == [entry for entry in whole.logged if entry[0] > step]


def test_an_earlier_model_is_continued_and_its_continuation_can_be_resumed(tmp_path: Path) -> None:
    parent = worker(tmp_path)
    LightGBM.fit(Params(rounds=20, early_stopping=None, num_leaves=7), BINARY, parent)
    [first] = [model for _, model, state in parent.kept if "final" in state]
    settings = Params.model_validate({"rounds": 100, "early_stopping": 15, "num_leaves": 15, "learning_rate": 0.3, **SAMPLING})

    whole = worker(tmp_path, Start(first, 0, {}))
    LightGBM.fit(settings, BINARY, whole)

    step, model, state = whole.kept[-1]
    assert state["final"] + 15 == step < 100 and model.rounds == 20 + state["final"]
    trees = [tree["tree_structure"] for tree in model.booster.dump_model()["tree_info"]]
    assert trees[:20] == [tree["tree_structure"] for tree in first.booster.dump_model()["tree_info"]]
    columns, y = table(1000, seed=1)
    loss, before = (log_loss(y, 1 / (1 + np.exp(-each.predict(np.column_stack(columns))))) for each in (model, first))
    assert loss < before and state["best"] == pytest.approx(loss, abs=1e-9)

    step, model, state = whole.kept[0]
    resumed = worker(tmp_path, Start(model, step, state))
    LightGBM.fit(settings, BINARY, resumed)
    assert saved(tmp_path / "resumed", resumed.kept[-1][1]) == saved(tmp_path / "whole", whole.kept[-1][1])


def test_every_segment_draws_its_own_samples(tmp_path: Path) -> None:
    def trees(segment: int) -> list[Any]:
        run = worker(tmp_path)
        LightGBM.fit(Params.model_validate({"rounds": 20, "early_stopping": None, "segment": segment, **SAMPLING}), BINARY, run)
        return [tree["tree_structure"] for tree in run.kept[-1][1].booster.dump_model()["tree_info"]]

    ten, five = trees(10), trees(5)
    assert ten[:5] == five[:5] and ten[5:10] != five[5:10]
    counts = [tree["internal_count"] for tree in five]
    assert len(set(counts)) > 10, "each tree has a sample of its own"


def test_segments_are_as_long_as_checkpoints_are_apart_or_shorter() -> None:
    assert [Params().resolved(every).segment for every in (10, 50, 400)] == [10, 50, 50]
    assert Params(segment=30).resolved(100).segment == 30
    with pytest.raises(SpecError, match=r"model.params.segment: 30 rounds are more than train.checkpoint_every \(20\)"):
        Params(segment=30).resolved(20)


def test_joined_models_add_up(tmp_path: Path) -> None:
    columns, y = table(1000)
    matrix = np.column_stack(columns)
    first = lgb.train({"verbosity": -1, "objective": "regression"}, lgb.Dataset(matrix, y), 3)
    second = lgb.train({"verbosity": -1, "objective": "regression"}, lgb.Dataset(matrix, y), 5)
    joined = lgb.Booster(model_str=join(first.model_to_string(), second.model_to_string()))
    assert joined.num_trees() == 8
    assert np.allclose(joined.predict(matrix), first.predict(matrix) + second.predict(matrix))
    assert joined.feature_importance().sum() == first.feature_importance().sum() + second.feature_importance().sum()


def test_saved_equals_loaded(tmp_path: Path) -> None:
    run = worker(tmp_path)
    LightGBM.fit(Params(rounds=10), BINARY, run)
    model = run.kept[-1][1]
    model.save(tmp_path)
    matrix = np.column_stack(table(100, seed=3)[0])
    assert np.array_equal(LightGBM.load(tmp_path).predict(matrix), model.predict(matrix))
    again = tmp_path / "again"
    again.mkdir()
    LightGBM.load(tmp_path).save(again)
    assert (again / "model.txt").read_bytes() == (tmp_path / "model.txt").read_bytes()
    assert "local_listen_port" not in (tmp_path / "model.txt").read_text()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_share_the_rows_exactly(tmp_path: Path, size: int) -> None:
    shards = worker(tmp_path).shards
    whole = [batch.matrix for found in shards.ranges("train", 0, 1) for batch in shards.read(found)]
    parts = [batch.matrix for rank in range(size) for found in shards.ranges("train", rank, size) for batch in shards.read(found)]
    assert np.array_equal(np.concatenate(parts), np.concatenate(whole), equal_nan=True)
    sizes = [sum(found.stop - found.start for found in shards.ranges("train", rank, size)) for rank in range(size)]
    assert max(sizes) - min(sizes) <= 1
