"""Objectives of a regression through the verbs: two workers, and the same answers from a file, a row and plain LightGBM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest

from pipelines.artifact import Artifact
from pipelines.errors import ClusterError, DataError, SpecError
from pipelines.evaluate import evaluate
from pipelines.explain import checked
from pipelines.predict import predict
from pipelines.runs import Run
from pipelines.spec import PipelineSpec
from pipelines.train import run, train

pytestmark = pytest.mark.usefixtures("session")


def slots() -> float:
    return 4.0


def claims(rows: int = 6000) -> pl.DataFrame:
    """Counts whose mean rises with the distance and falls with the age."""
    rng = np.random.default_rng(0)
    distance, age = rng.gamma(2.0, 1.0, rows), rng.uniform(18, 80, rows)
    city = rng.choice(["Ulm", "Bern", "Graz"], rows)
    mean = np.exp(0.5 * np.sqrt(distance) - 0.01 * (age - 50) + 0.4 * (city == "Bern"))
    return pl.DataFrame(
        {
            "id": np.arange(rows),
            "distance": distance,
            "age": age,
            "city": city,
            "since": np.datetime64("2024-01-01")
            + rng.integers(0, 10**7, rows).astype("timedelta64[s]").astype("timedelta64[us]"),
            "claims": rng.poisson(mean),
            "cost": mean * rng.lognormal(0, 0.5, rows) - 0.5,
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claims")
    claims().write_parquet(folder / "claims.parquet", row_group_size=1500)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def spec_of(data: Path, store: Path, target: str, /, workers: int = 2, **params: Any) -> PipelineSpec:
    content: dict[str, Any] = {
        "name": "claims",
        "data": {"source": str(data), "key": ["id"], "split": {"test": 0.2, "valid": 0.2}},
        "task": {"target": target, "type": "regression"},
        "features": {"drop": [{"claims": "cost", "cost": "claims"}[target]]},
        "model": {"params": {"rounds": 60, "num_leaves": 7, "early_stopping": 20, **params}},
        "train": {"workers": workers},
        "store": str(store),
    }
    return checked(PipelineSpec, content)


def reference(done: Run, frame: pl.DataFrame) -> np.ndarray:
    artifact = Artifact.load(done.path)
    booster = lgb.Booster(model_file=str(Path(done.path) / "artifact/model/model.txt"))
    return np.asarray(booster.predict(artifact.preprocessor.matrix(artifact._contract.frame_to_table(frame))))


def test_a_poisson_model_answers_counts_everywhere(data: Path, store: Path, tmp_path: Path) -> None:
    spec = spec_of(data, store, "claims", objective="poisson", monotone_constraints={"distance": 1, "age": -1})
    done = run(spec, free_slots=slots)
    frame = claims(300)
    expected = reference(done, frame)

    artifact = Artifact.load(done.path)
    assert artifact.predict(frame)["value"].to_list() == expected.tolist()
    rows = frame.drop("claims", "cost", "id").with_columns(pl.col("since").dt.to_string("iso:strict")).to_dicts()
    assert [artifact.predict_rows([row])[0]["value"] for row in rows[:20]] == expected[:20].tolist()
    predict(f"{done.path}/artifact", str(data), str(tmp_path / "out"))
    written = pl.read_parquet(tmp_path / "out/*.parquet")["value"].to_numpy()
    assert np.array_equal(written[:300], reference(done, pl.read_parquet(data)[:300]))

    assert done.record["task"]["metric"] == "poisson_deviance" and len(done.record["workers"]) == 2
    assert list(done.record["metrics"]["test"]) == ["poisson_deviance", "rmse", "mae", "r2"]
    assert evaluate(done, spec).metrics == done.record["metrics"]
    whole = pl.read_parquet(data)
    mean, y = reference(done, whole), whole["claims"].to_numpy()
    assert abs(mean.mean() / y.mean() - 1) < 0.05  # the response scale, not its logarithm
    deviance = 2 * (np.where(y > 0, y * np.log(np.maximum(y, 1) / mean), 0) - y + mean).mean()
    found = evaluate(done, spec, source=str(data)).metrics["data"]["poisson_deviance"]
    assert found == pytest.approx(deviance, rel=1e-9)

    line = frame[:1].select(pl.all().repeat_by(50).explode()).with_columns(distance=pl.Series(np.linspace(0, 9, 50)))
    assert (np.diff(artifact.predict(line)["value"].to_numpy()) >= 0).all()


def test_a_quantile_model_has_its_share_of_rows_below(data: Path, store: Path) -> None:
    done = run(spec_of(data, store, "cost", objective="quantile", alpha=0.9), free_slots=slots)
    alone = run(spec_of(data, store, "cost", workers=1, objective="quantile", alpha=0.9), free_slots=slots)
    whole = pl.read_parquet(data)

    for made in (done, alone):
        share = (whole["cost"] <= Artifact.load(made.path).predict(whole)["value"]).mean()
        assert isinstance(share, float) and 0.86 < share < 0.94
    test, test_alone = (made.record["metrics"]["test"] for made in (done, alone))
    assert list(test) == ["pinball", "rmse", "mae", "r2"]
    assert test["pinball"] == pytest.approx(test_alone["pinball"], rel=0.05)


def test_what_cannot_be_trained_is_one_line_before_training(data: Path, store: Path, tmp_path: Path) -> None:
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (DataError, "'poisson' needs targets of 0 and above, but 'cost' goes down to -", {"objective": "poisson"}),
        (SpecError, "monotone_constraints.city: it becomes city, not plain numbers", {"monotone_constraints": {"city": 1}}),
        (SpecError, "monotone_constraints.since: it becomes since__year, ", {"monotone_constraints": {"since": 1}}),
        (SpecError, "train.workers: 1", {"interaction_constraints": [["age"]]}),
        (ClusterError, "model.params.device_type: cuda cannot be used here", {"device_type": "cuda"}),
    ]
    for error, sentence, params in refused:
        with pytest.raises(error) as found:
            train(spec_of(data, store, "cost", **params), free_slots=slots)
        assert sentence in str(found.value) and "\n" not in str(found.value)


def test_rows_sorted_by_the_target_are_refused_where_workers_cannot_share_them(data: Path, store: Path, tmp_path: Path) -> None:
    ordered = tmp_path / "ordered"
    ordered.mkdir()
    pl.read_parquet(data).sort("cost").write_parquet(ordered / "claims.parquet", row_group_size=1500)
    spec = spec_of(ordered, store, "cost", objective="quantile", alpha=0.9)

    with pytest.raises(DataError, match=r"'quantile' needs workers with like rows.*prepare.bucket_by") as refused:
        train(spec, free_slots=slots)
    assert "\n" not in str(refused.value)

    mixed = spec.model_copy(update={"prepare": spec.prepare.model_copy(update={"bucket_by": ["id"]})})
    done = train(mixed, free_slots=slots)
    whole = pl.read_parquet(data)
    share = (whole["cost"] <= Artifact.load(done.path).predict(whole)["value"]).mean()
    assert isinstance(share, float) and 0.86 < share < 0.94
