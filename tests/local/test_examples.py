"""LightGBM's own examples through all of heliostat: metrics as good as those of plain LightGBM with the same parameters and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score, root_mean_squared_error

from pipelines.artifact import Artifact
from pipelines.explain import checked
from pipelines.runs import Run
from pipelines.spec import PipelineSpec
from pipelines.train import run

pytestmark = pytest.mark.usefixtures("session")

DATA = Path(__file__).parents[1] / "data/lightgbm"
SEEDS = (1, 2, 3, 4)

# The parameters are those of the examples' train.conf.
COMMON = {"learning_rate": 0.1, "num_leaves": 31, "min_data_in_leaf": 50, "min_sum_hessian_in_leaf": 5.0}
BINARY = COMMON | {"num_leaves": 63, "feature_fraction": 0.8, "bagging_freq": 5, "bagging_fraction": 0.8}
VALUE = COMMON | {
    "learning_rate": 0.05, "feature_fraction": 0.9, "bagging_freq": 5, "bagging_fraction": 0.8, "min_data_in_leaf": 100,
}  # fmt: skip
RANKING = COMMON | {"bagging_freq": 1, "bagging_fraction": 0.9}
MULTICLASS = {"learning_rate": 0.05, "num_leaves": 31}
OURS = {"lambda_l2": 0.0, "min_data_in_leaf": 20, "min_sum_hessian_in_leaf": 0.001}
"""LightGBM's own values where heliostat's defaults are others."""
WEIGHT = "1 + abs(f0)"


def slots() -> float:
    return 4.0


def frames(name: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    train, test = (pl.read_parquet(DATA / f"{name}_{split}.parquet") for split in ("train", "test"))
    return train, test


def spec_of(name: str, store: Path, params: dict[str, Any], workers: int, **task: Any) -> PipelineSpec:
    source = {split: str(DATA / f"{name}_{split}.parquet") for split in ("train", "test")}
    features = [column for column in frames(name)[0].columns if column.startswith("f")]
    content: dict[str, Any] = {
        "name": name,
        "data": {
            "source": source,
            "split": {"valid": 0.0},
            "kinds": dict.fromkeys(features, "numeric"),
            "derive": {"w": WEIGHT} if "weight" in task else {},
        },
        "task": {"target": "label", **task},
        "model": {"params": {**OURS, **params, "rounds": 100, "early_stopping": None, "segment": None}},
        "train": {"workers": workers, "checkpoint_every": 100},
        "store": str(store),
    }
    return checked(PipelineSpec, content)


def plain(name: str, params: dict[str, Any], weight: bool = False) -> list[np.ndarray[Any, Any]]:
    """What LightGBM alone says of the test rows, with each of some seeds."""
    train, test = frames(name)
    columns = [column for column in train.columns if column.startswith("f")]
    group = train["qid"].rle().struct.field("len").to_numpy() if "qid" in train.columns else None
    matrix, weights = train.select(columns).to_numpy(), 1 + train["f0"].abs().to_numpy()
    found = []
    for seed in SEEDS:
        rows = lgb.Dataset(matrix, train["label"].to_numpy(), group=group, weight=weights if weight else None)
        settings = {**OURS, **params, "seed": seed, "verbosity": -1, "num_threads": 1}
        found.append(np.asarray(lgb.train(settings, rows, 100).predict(test.select(columns).to_numpy())))
    return found


def check(found: float | None, those: list[float]) -> None:
    """Within what another seed does to plain LightGBM."""
    spread = max(those) - min(those)
    assert found is not None and min(those) - spread <= found <= max(those) + spread, (found, those)


def of_all(done: Run) -> int:
    """The rows at the root of the first tree."""
    booster = lgb.Booster(model_file=f"{done.path}/artifact/model/model.txt")
    return int(booster.dump_model(num_iteration=1)["tree_info"][0]["tree_structure"]["internal_count"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_binary(store: Path, weighted: bool) -> None:
    _, test = frames("binary")
    y, weight = test["label"].to_numpy(), 1 + test["f0"].abs().to_numpy() if weighted else None
    those = plain("binary", {"objective": "binary", **BINARY}, weighted)

    done = run(spec_of("binary", store, BINARY, 2, **({"weight": "w"} if weighted else {})), free_slots=slots)

    check(done.metrics["test"]["auc"], [float(roc_auc_score(y, p, sample_weight=weight)) for p in those])
    check(done.metrics["test"]["logloss"], [float(log_loss(y, p, sample_weight=weight)) for p in those])
    assert done.record["rows"] == {"train": 7000, "valid": 0, "test": 500}


def test_multiclass(store: Path) -> None:
    _, test = frames("multiclass")
    those = plain(
        "multiclass", {"objective": "multiclass", "num_class": 5, "bagging_freq": 5, "bagging_fraction": 0.8, **MULTICLASS}
    )
    params = {"bagging_freq": 5, "bagging_fraction": 0.8, **MULTICLASS}

    done = run(spec_of("multiclass", store, params, 2), free_slots=slots)

    check(done.metrics["test"]["logloss"], [float(log_loss(test["label"], p)) for p in those])
    assert of_all(done) == 5600, "four rows of five"


def test_regression(store: Path) -> None:
    _, test = frames("binary")
    those = plain("binary", {"objective": "regression", **VALUE})

    done = run(spec_of("binary", store, VALUE, 2, type="regression"), free_slots=slots)

    check(done.metrics["test"]["rmse"], [float(root_mean_squared_error(test["label"], p)) for p in those])
    assert of_all(done) == 5600


def ndcg(test: pl.DataFrame, scores: np.ndarray[Any, Any], top: int) -> float:
    queries = [rows for (_,), rows in test.with_columns(score=scores).group_by("qid", maintain_order=True)]
    found = [
        ndcg_score([2.0 ** rows["label"].to_numpy() - 1], [rows["score"].to_numpy()], k=top) if rows["label"].max() else 1.0
        for rows in queries
    ]
    return float(np.mean(found))


def test_lambdarank(store: Path) -> None:
    train, test = frames("lambdarank")
    those = plain("lambdarank", {"objective": "lambdarank", **RANKING})

    both = [run(spec_of("lambdarank", store, RANKING, n, type="ranking", group="qid"), free_slots=slots) for n in (1, 2)]

    for done in both:
        for top in (1, 3, 5, 10):
            check(done.metrics["test"][f"ndcg@{top}"], [ndcg(test, scores, top) for scores in those])
        assert of_all(done) < len(train), "a tree is grown from nine rows of ten"
        assert done.record["rows"] == {"train": 3005, "valid": 0, "test": 768} and done.record["task"]["metric"] == "ndcg@10"
        answers = Artifact.load(done.path).predict(test.drop("qid", "label"))["value"].to_numpy()
        assert done.metrics["test"]["ndcg@10"] == pytest.approx(ndcg(test, answers, 10), rel=1e-9)
    one, two = (done.metrics["test"]["ndcg@10"] for done in both)
    assert one == pytest.approx(two, abs=0.03)
    assert sum(worker["rows"] for worker in both[1].record["workers"]) == 3005
