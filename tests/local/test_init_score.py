"""Scores that rows start from, through the verbs on two workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest
from sklearn.metrics import mean_poisson_deviance

from pipelines.artifact import Artifact
from pipelines.evaluate import evaluate
from pipelines.explain import checked
from pipelines.metrics import sizes_of
from pipelines.predict import predict
from pipelines.prepare import prepare
from pipelines.spec import PipelineSpec
from pipelines.train import run

pytestmark = pytest.mark.usefixtures("session")


def claims(rows: int = 6000) -> pl.DataFrame:
    """How often something happens in a time that is known beforehand; the longest times come first."""
    rng = np.random.default_rng(0)
    a, b, years = rng.normal(size=rows), rng.normal(size=rows), np.linspace(5.0, 0.1, rows)
    number = rng.poisson(years * np.exp(0.5 * a + 0.3 * (b > 0)))
    return pl.DataFrame({"a": a, "b": b, "years": years, "number": number.astype(float)})


def test_two_workers_learn_and_answer_from_the_scores_as_one_does(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i, part in enumerate(claims().iter_slices(1000)):
        part.write_parquet(data / f"{i}.parquet")

    def spec_of(workers: int, start: str | None) -> PipelineSpec:
        content: dict[str, Any] = {
            "name": "claims",
            "data": {"source": str(data), "derive": {"log_years": "ln(years)"}},
            "task": {"target": "number", "type": "regression", "init_score": start},
            "features": {"drop": ["years"] if start else ["years", "log_years"]},
            "model": {"params": {"objective": "poisson", "rounds": 60, "num_leaves": 7, "early_stopping": None}},
            "train": {"workers": workers, "checkpoint_every": 20},
            "store": str(tmp_path / "store"),
        }
        return checked(PipelineSpec, content)

    two, one, without = (
        run(spec_of(workers, start), free_slots=lambda: 4.0) for workers, start in ((2, "log_years"), (1, "log_years"), (2, None))
    )

    frame = claims()
    deviances = {}
    for name, made in {"two": two, "one": one}.items():
        values = Artifact.load(made.path).predict(frame)["value"].to_numpy()
        found = evaluate(made, spec_of(2, "log_years"), source=str(data)).metrics["data"]["poisson_deviance"]
        assert found == pytest.approx(mean_poisson_deviance(frame["number"], values), rel=1e-9)
        deviances[name] = made.metrics["test"]["poisson_deviance"]
        told = [line for line in pl.read_ndjson(f"{made.path}/metrics.jsonl").iter_rows(named=True) if line["step"] == 60]
        logged = {line["metric"]: line["value"] for line in told}
        assert logged == pytest.approx(made.metrics["valid"], rel=1e-9), "the fit has measured what its answers are"
    assert deviances["two"] == pytest.approx(deviances["one"], rel=0.02)
    assert deviances["two"] < 0.9 * without.metrics["test"]["poisson_deviance"]
    tree = lgb.Booster(model_file=f"{two.path}/artifact/model/model.txt").dump_model()["tree_info"][0]["tree_structure"]
    assert tree["internal_count"] == two.record["rows"]["train"]

    predict(f"{two.path}/artifact", str(data), str(tmp_path / "out"))
    written = pl.concat([pl.read_parquet(file) for file in sorted((tmp_path / "out").glob("part-*.parquet"))])
    assert written["value"].to_list() == Artifact.load(two.path).predict(frame)["value"].to_list()


def test_scores_stay_with_their_rows_where_queries_are_brought_together(tmp_path: Path) -> None:
    file = tmp_path / "apart.parquet"
    rows = pl.DataFrame({"a": np.arange(3000.0), "q": np.arange(3000) % 100, "label": np.arange(3000) % 3})
    rows.with_columns(base=-2 * pl.col("a")).sample(fraction=1.0, shuffle=True, seed=1).write_parquet(file)
    task = {"target": "label", "type": "ranking", "group": "q", "init_score": "base"}
    spec = {"name": "found", "data": {"source": str(file)}, "task": task, "store": str(tmp_path / "store")}

    shards = prepare(checked(PipelineSpec, spec)).shards

    batches = [batch for found in shards.ranges("train", 0, 1) for batch in shards.read(found)]
    assert sum(len(batch.target) for batch in batches) > 2000
    for batch in batches:
        assert batch.init_score is not None and np.array_equal(batch.init_score, -2 * batch.matrix[:, 0])
        assert np.array_equal(batch.target, batch.matrix[:, 0] % 3)
    groups = np.concatenate([batch.group for batch in batches if batch.group is not None])
    assert len(sizes_of(groups)) == len(np.unique(groups)), "the rows of each query stand together"
