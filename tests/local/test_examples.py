"""LightGBM's own examples through all of heliostat, with the parameters of their train.conf, beside plain LightGBM.

One worker ends with what plain LightGBM says of the test rows. Several sample their rows apart from one another, so they are
compared without sampling; what is left is the order in which floats are added.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest
from sklearn.metrics import accuracy_score, log_loss, ndcg_score, roc_auc_score, root_mean_squared_error

from pipelines.artifact import Artifact
from pipelines.explain import checked
from pipelines.runs import Run
from pipelines.spec import PipelineSpec
from pipelines.train import run

pytestmark = pytest.mark.usefixtures("session")

DATA = Path(__file__).parents[1] / "data/lightgbm"
ROUNDS = 100
BINARY = {
    "learning_rate": 0.1, "num_leaves": 63, "min_data_in_leaf": 50, "min_sum_hessian_in_leaf": 5.0, "feature_fraction": 0.8,
    "bagging_freq": 5, "bagging_fraction": 0.8,
}  # fmt: skip
REGRESSION = {
    "learning_rate": 0.05, "num_leaves": 31, "min_data_in_leaf": 100, "min_sum_hessian_in_leaf": 5.0, "feature_fraction": 0.9,
    "bagging_freq": 5, "bagging_fraction": 0.8,
}  # fmt: skip
MULTICLASS = {"learning_rate": 0.05, "num_leaves": 31}
RANKING = {
    "learning_rate": 0.1, "num_leaves": 31, "min_data_in_leaf": 50, "min_sum_hessian_in_leaf": 5.0, "bagging_freq": 1,
    "bagging_fraction": 0.9,
}  # fmt: skip
DEFAULTS = {"lambda_l2": 0.0, "min_data_in_leaf": 20, "min_sum_hessian_in_leaf": 0.001}
"""LightGBM's own, where heliostat has others."""
SAMPLING = {"feature_fraction", "bagging_freq", "bagging_fraction"}

Scores = np.ndarray[Any, np.dtype[np.float64]]


def slots() -> float:
    return 4.0


def without_sampling(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name not in SAMPLING}


def frames(name: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    train, test = (pl.read_parquet(DATA / f"{name}_{split}.parquet") for split in ("train", "test"))
    return train, test


def features(frame: pl.DataFrame) -> list[str]:
    return [column for column in frame.columns if column.startswith("f")]


def heliostat(name: str, store: Path, params: dict[str, Any], workers: int, *, rounds: int = ROUNDS, **task: Any) -> Run:
    content: dict[str, Any] = {
        "name": name,
        "data": {
            "source": {split: str(DATA / f"{name}_{split}.parquet") for split in ("train", "test")},
            "split": {"valid": 0.0},
            "kinds": dict.fromkeys(features(frames(name)[0]), "numeric"),
            "derive": {"w": "1 + abs(f0)"} if "weight" in task else {},
        },
        "task": {"target": "label", **task},
        "model": {"params": {**DEFAULTS, **params, "rounds": rounds, "segment": rounds, "early_stopping": None}},
        "train": {"workers": workers, "checkpoint_every": ROUNDS},
        "store": str(store),
    }
    return run(checked(PipelineSpec, content), free_slots=slots)


def lightgbm(name: str, params: dict[str, Any], *, weighted: bool = False, rounds: int = ROUNDS) -> Scores:
    """What plain LightGBM answers to the test rows."""
    train, test = frames(name)
    group = train["qid"].rle().struct.field("len").to_numpy() if "qid" in train.columns else None
    weight = 1 + train["f0"].abs().to_numpy() if weighted else None
    # Bits: heliostat bundles no features and builds histograms by rows.
    settings = {
        "seed": 7,
        "verbosity": -1,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "enable_bundle": False,
    }
    settings |= {"feature_pre_filter": False, **DEFAULTS, **params}
    rows = lgb.Dataset(train.select(features(train)).to_numpy(), train["label"].to_numpy(), group=group, weight=weight)
    return np.asarray(lgb.train(settings, rows, rounds).predict(test.select(features(test)).to_numpy()))


def rows_at_the_root(done: Run) -> int:
    booster = lgb.Booster(model_file=f"{done.path}/artifact/model/model.txt")
    return int(booster.dump_model(num_iteration=1)["tree_info"][0]["tree_structure"]["internal_count"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def test_binary(store: Path) -> None:
    y, p = frames("binary")[1]["label"], lightgbm("binary", {"objective": "binary", **BINARY})

    done = heliostat("binary", store, BINARY, 1)

    found = done.metrics["test"]
    assert found["auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-9) and 0.80 < found["auc"] < 0.85
    assert found["logloss"] == pytest.approx(log_loss(y, p), abs=1e-9)
    assert done.record["rows"] == {"train": 7000, "valid": 0, "test": 500}


def test_binary_with_weights_on_two_workers(store: Path) -> None:
    test, params = frames("binary")[1], without_sampling(BINARY)
    y, weight = test["label"], 1 + test["f0"].abs()
    p = lightgbm("binary", {"objective": "binary", **params}, weighted=True)

    done = heliostat("binary", store, params, 2, weight="w")

    assert done.metrics["test"]["auc"] == pytest.approx(roc_auc_score(y, p, sample_weight=weight), abs=0.01)
    assert done.metrics["test"]["logloss"] == pytest.approx(log_loss(y, p, sample_weight=weight), abs=0.01)
    assert rows_at_the_root(done) == 7000


def test_regression(store: Path) -> None:
    y, values = frames("binary")[1]["label"], lightgbm("binary", {"objective": "regression", **REGRESSION})

    done = heliostat("binary", store, REGRESSION, 1, type="regression")

    assert done.metrics["test"]["rmse"] == pytest.approx(root_mean_squared_error(y, values), abs=1e-9)
    assert done.metrics["test"]["rmse"] < 0.46  # of the mean 0.5


def test_multiclass(store: Path) -> None:
    y, p = frames("multiclass")[1]["label"], lightgbm("multiclass", {"objective": "multiclass", "num_class": 5, **MULTICLASS})

    done = heliostat("multiclass", store, MULTICLASS, 1)

    assert done.metrics["test"]["logloss"] == pytest.approx(log_loss(y, p), abs=1e-9)
    assert done.metrics["test"]["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(axis=1)), abs=1e-9)
    assert rows_at_the_root(done) == 7000


def ndcg(test: pl.DataFrame, scores: Scores, top: int) -> float:
    queries = [rows for _, rows in test.with_columns(score=scores).group_by("qid", maintain_order=True)]
    found = [
        ndcg_score([2.0 ** rows["label"].to_numpy() - 1], [rows["score"].to_numpy()], k=top) if rows["label"].max() else 1.0
        for rows in queries
    ]
    return float(np.mean(found))


def test_lambdarank(store: Path) -> None:
    test, scores = frames("lambdarank")[1], lightgbm("lambdarank", {"objective": "lambdarank", **RANKING})

    done = heliostat("lambdarank", store, RANKING, 1, type="ranking", group="qid")

    found = done.metrics["test"]
    assert found == pytest.approx({f"ndcg@{top}": ndcg(test, scores, top) for top in (10, 5, 3, 1)}, abs=1e-9)
    assert found["ndcg@10"] > 0.7
    answers = Artifact.load(done.path).predict(test.drop("qid", "label"))["value"].to_numpy()
    assert found["ndcg@10"] == pytest.approx(ndcg(test, answers, 10), abs=1e-9)
    assert done.record["rows"] == {"train": 3005, "valid": 0, "test": 768}


def test_lambdarank_on_two_workers_learns_from_whole_queries(store: Path) -> None:
    # On several workers LightGBM estimates the rows of a leaf from its hessians, which differ greatly in a ranking.
    test, params = frames("lambdarank")[1], {**without_sampling(RANKING), "min_data_in_leaf": 1}
    scores = lightgbm("lambdarank", {"objective": "lambdarank", **params}, rounds=10)

    done = heliostat("lambdarank", store, params, 2, rounds=10, type="ranking", group="qid")

    # A gradient depends on all rows of its query: one that was divided would show in the first trees already.
    answers = Artifact.load(done.path).predict(test.drop("qid", "label"))["value"].to_numpy()
    assert np.abs(answers - scores).max() < 1e-6
    assert done.metrics["test"]["ndcg@10"] == pytest.approx(ndcg(test, scores, 10), abs=0.02)
    assert sum(worker["rows"] for worker in done.record["workers"]) == rows_at_the_root(done) == 3005
