"""What is inferred and found on the way from a table to a model, on one shared Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from app.spec import load_spec
from pipelines.artifact import Artifact
from pipelines.notation import read_yaml
from pipelines.predict import predict
from pipelines.prepare import prepare
from pipelines.runs import Run
from pipelines.train import train

pytestmark = pytest.mark.usefixtures("session")

ROOT = Path(__file__).parents[2]


def slots() -> float:
    return 4.0


def test_a_leak_that_was_not_dropped_is_named(tmp_path: Path) -> None:
    drop = "[arr_delay, dep_time, arr_time, air_time]"  # dep_delay is forgotten
    sets = [f"store={tmp_path}", f"data.source={ROOT / 'examples/flights/data'}", f"features.drop={drop}"]
    prepared = prepare(load_spec([str(ROOT / "examples/flights/flights.yaml")], sets))
    worst = prepared.findings[0]
    assert (worst["kind"], worst["severity"], worst["columns"]) == ("leak", "high", ["dep_delay"])
    assert [found["columns"] for found in prepared.findings if found["kind"] in ("leak", "strong column")] == [["dep_delay"]]
    [dropped] = [found for found in prepared.findings if found["kind"] == "dropped rows"]
    assert dropped["figures"]["rows"] == 9_430


def visits(rows: int = 4000) -> pl.DataFrame:
    """A table as people have them: all texts, an identifier, a column that is always the same, a category of many values."""
    rng = np.random.default_rng(0)
    age, paid = rng.normal(40, 10, rows).round(2), rng.random(rows) < 0.4
    day = np.datetime64("2024-01-01") + rng.integers(0, 300, rows)
    shop = rng.zipf(1.3, rows) % 2000
    late = age / 20 + paid + (shop == 1) + rng.normal(size=rows) > 2.5
    return pl.DataFrame(
        {
            "visit_id": rng.permutation(rows) + 10_000,
            "age": ["" if i % 50 == 0 else str(a) for i, a in enumerate(age.tolist())],
            "paid": np.where(paid, "Yes", "No"),
            "day": [f"{d.day}.{d.month}.{d.year}" for d in day.tolist()],
            "shop": [f"S{s}" for s in shop.tolist()],
            "country": ["CH"] * rows,
            "late": np.where(late, "yes", "no"),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("visits")
    visits().write_parquet(path / "visits.parquet")
    (path / "visits.yaml").write_text(
        f"data: {{source: {path}/visits.parquet}}\ntask: {{target: late}}\nstore: {path}/runs\n"
        "model: {params: {rounds: 20, num_leaves: 15, early_stopping: null}}\ntrain: {workers: 1, cpus_per_worker: 1.0}\n"
    )
    return path


@pytest.fixture(scope="module")
def made(folder: Path, session: Any) -> Run:
    return train(load_spec([str(folder / "visits.yaml")]), free_slots=slots)


def test_the_resolved_spec_says_what_was_inferred_and_why(made: Run) -> None:
    text = (Path(made.path) / "spec.yaml").read_text()
    spec = read_yaml(text, "spec.yaml")
    kinds = {"age": "numeric", "paid": "boolean", "day": "datetime", "shop": "categorical"}
    assert spec["data"]["kinds"] == kinds
    assert spec["features"]["drop"] == ["country", "visit_id"]
    for line in (
        "    age: numeric  # inferred: texts that are numbers\n",
        "    paid: boolean  # inferred: texts that are yes or no\n",
        "    day: datetime  # inferred: texts that are dates (D.M.Y)\n",
        f"  drop: [country, visit_id]  # inferred: country: one value in all {made.record['rows']['train']:,} rows; "
        "visit_id: an identifier by its name, different in each of 4,000 rows\n",
        "    shop: [{index: {min_count: 5}}]  # inferred: ",
    ):
        assert line in text
    assert {"identifier", "constant"} <= {found["kind"] for found in made.record["findings"]}
    report = json.loads((Path(made.path) / "artifact/quality.json").read_text())
    assert report["findings"] == made.record["findings"]


def test_the_resolved_spec_gives_the_same_model(made: Run) -> None:
    again = train(load_spec([f"{made.path}/spec.yaml"]), free_slots=slots)
    one, two = (json.loads((Path(run.path) / "artifact/manifest.json").read_text())["files"] for run in (made, again))
    for name in ("model/model.txt", "preprocessor.json", "schema.json", "task.json"):
        assert one[name] == two[name], name


def test_texts_are_answered_as_in_training_in_rows_frames_and_files(made: Run, folder: Path) -> None:
    artifact = Artifact.load(made.path)
    frame = visits()[:200].drop("late")
    expected = artifact.predict(frame)
    assert artifact.predict_rows(frame[:20].to_dicts()) == expected[:20].to_dicts()
    assert artifact.predict_rows(artifact.examples) == artifact.predict_rows(json.loads(json.dumps(artifact.examples)))
    frame.write_csv(folder / "new.csv")
    predict(made.path, str(folder / "new.csv"), str(folder / "answers"))
    assert pl.read_parquet(folder / "answers/*.parquet").equals(expected)
    assert set(expected["label"]) == {"yes", "no"}  # the target's own texts
