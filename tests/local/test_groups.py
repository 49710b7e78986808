"""Groups, cross-fitted means and the second pass through Ray, against pandas and scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import StandardScaler

from pipelines.artifact import Artifact
from pipelines.data.split import assign, identity_of_values, in_folds
from pipelines.explain import checked
from pipelines.prepare import Prepared, prepare
from pipelines.progress import Silent
from pipelines.spec import PipelineSpec, SplitSpec
from pipelines.train import train

pytestmark = pytest.mark.usefixtures("session")

GROUPS = {
    "weather": {"columns": ["temp", "dewp", "humid"], "steps": ["impute", "scale", {"pca": {"components": 2}}]},
    "route": {"columns": ["origin", "dest"], "steps": [{"cross": {"buckets": 512}}]},
    "by_route": {
        "columns": ["origin", "dest"],
        "steps": [{"cross": {"buckets": 512}}, {"target_mean": {"smoothing": 5.0, "folds": 3}}],
    },
}


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def flights(rows: int = 5000, seed: int = 1) -> pl.DataFrame:
    generator = np.random.default_rng(seed)
    temp = generator.normal(60, 18, rows)
    dewp = temp - generator.gamma(2.0, 8.0, rows)
    humid = 80 - 0.5 * (temp - dewp) + generator.normal(0, 6, rows)
    origin, dest = generator.choice(["EWR", "JFK", "LGA"], rows), generator.choice(["IAH", "ATL", "ORD", "BQN", "PSE"], rows)
    late = generator.random(rows) < 0.2 + 0.2 * (origin == "EWR") + 0.2 * (dest == "ORD")
    gone = generator.random((rows, 5)) < 0.1
    table = {"temp": temp, "dewp": dewp, "humid": humid, "origin": origin, "dest": dest}
    missing = {
        name: pl.Series(values.tolist()).set(pl.Series(gone[:, i]), None) for i, (name, values) in enumerate(table.items())
    }
    tail = pl.Series([f"N{i}" if i % 20 else None for i in generator.integers(0, 300, rows)])
    return pl.DataFrame({"id": np.arange(rows), **missing, "tail": tail, "late": late})


def spec_of(data: Path, store: Path) -> PipelineSpec:
    content: dict[str, Any] = {
        "name": "groups",
        "data": {"source": str(data), "key": ["id"], "split": {"test": 0.2, "valid": 0.2}},
        "task": {"target": "late"},
        "features": {
            "drop": ["temp", "dewp", "humid", "tail"],
            "columns": {"origin": ["index"], "dest": [{"target_mean": {"smoothing": 10.0}}]},
            "groups": GROUPS,
        },
        "model": {"params": {"rounds": 10, "num_leaves": 7}},
        "train": {"workers": 2},
        "store": str(store),
    }
    return checked(PipelineSpec, content)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("groups"), flights(), files=4)


def written(folder: Path, table: pl.DataFrame, files: int) -> Path:
    for i, rows in enumerate(np.array_split(np.arange(len(table)), files)):
        table[rows].write_parquet(folder / f"{i:02d}.parquet", row_group_size=700)
    return folder


def matrices(prepared: Prepared) -> dict[str, pd.DataFrame]:
    """The prepared splits, as the shards have them."""
    names = [feature.name for feature in prepared.shards.features]
    found = {}
    for split in ("train", "valid", "test"):
        blocks = [block for range in prepared.shards.ranges(split, 0, 1) for block in prepared.shards.read(range)]
        found[split] = pd.DataFrame(np.concatenate([block.matrix for block in blocks]), columns=names)
        found[split]["late"] = np.concatenate([block.target for block in blocks])
    return found


def encoded(keys: pd.Series, late: pd.Series, rows: pd.Series, smoothing: float) -> pd.Series:
    """Smoothed means by pandas; `rows` are the keys to encode."""
    grouped = late.groupby(keys)
    means = (grouped.sum() + smoothing * late.mean()) / (grouped.count() + smoothing)
    return rows.map(means).fillna(late.mean())


def test_prepared_features_equal_pandas_and_scikit_learn(data: Path, tmp_path: Path) -> None:
    progress = Noting()
    prepared = prepare(spec_of(data, tmp_path), progress=progress)

    found, table = matrices(prepared), flights().to_pandas()
    identity = identity_of_values([pa.chunked_array([pa.array(table["id"])])])
    table["split"] = assign(SplitSpec(test=0.2, valid=0.2), identity, None, frozenset(), None)
    table["place"] = in_folds(identity, None)
    table["dest"] = table["dest"].fillna("missing")
    parts = [table[table["split"] == split].reset_index(drop=True) for split in range(3)]
    seen = parts[0]

    assert [note for note in progress.notes if not note.startswith("cache miss")] == [
        "second pass: step 'target_mean' of group 'by_route' needs statistics of what 'cross' makes"
    ]
    assert [f.name for f in prepared.shards.features] == ["origin", "dest", "weather__0", "weather__1", "route", "by_route"]
    weather = ["temp", "dewp", "humid"]
    imputer, scaler, pca = SimpleImputer().fit(seen[weather]), StandardScaler(), PCA(2)
    pca.fit(scaler.fit_transform(imputer.transform(seen[weather])))
    for split, rows in zip(("train", "valid", "test"), parts, strict=True):
        matrix = found[split]
        assert matrix["late"].astype(bool).tolist() == rows["late"].tolist(), "in source order"
        expected = pca.transform(scaler.transform(imputer.transform(rows[weather])))
        np.testing.assert_allclose(matrix[["weather__0", "weather__1"]], expected, rtol=1e-9, atol=1e-9)
        assert matrix["route"].groupby([rows["origin"].fillna("missing"), rows["dest"]]).nunique().max() == 1
        if split != "train":
            np.testing.assert_allclose(matrix["dest"], encoded(seen["dest"], seen["late"], rows["dest"], 10.0), rtol=1e-12)
            means = encoded(found["train"]["route"], seen["late"], matrix["route"], 5.0)
            np.testing.assert_allclose(matrix["by_route"], means, rtol=1e-12)
    for feature, keys, smoothing, folds in (("dest", seen["dest"], 10.0, 5), ("by_route", found["train"]["route"], 5.0, 3)):
        fold = np.floor(seen["place"] * folds)
        for number in range(folds):
            inside, outside = fold == number, fold != number
            expected = encoded(keys[outside], seen["late"][outside], keys[inside], smoothing)
            np.testing.assert_allclose(found["train"][feature][inside], expected, rtol=1e-12)
    sample = pd.DataFrame(prepared.shards.sample(), columns=[feature.name for feature in prepared.shards.features])
    pd.testing.assert_frame_equal(sample, found["train"].drop(columns="late"), check_exact=True)


def test_a_train_row_sees_no_target_of_its_group_where_groups_are_never_split(data: Path, tmp_path: Path) -> None:
    split = {"by": "group", "column": "tail", "test": 0.2, "valid": 0.2}
    features = {"drop": ["temp", "dewp", "humid", "origin", "tail"], "categorical": [{"target_mean": {"smoothing": 2.0}}]}
    content = spec_of(data, tmp_path).model_dump()
    spec = checked(PipelineSpec, content | {"data": content["data"] | {"split": split}, "features": features})

    found = matrices(prepare(spec))["train"]

    table = flights().to_pandas()
    identity = identity_of_values([pa.chunked_array([pa.array(table["id"])])])
    tails = pa.chunked_array([pa.array(table["tail"], pa.large_string(), from_pandas=True)])
    table["fold"] = np.floor(in_folds(identity, tails) * 5)
    table["dest"] = table["dest"].fillna("missing")
    seen = table[assign(SplitSpec.model_validate(split), identity, tails, frozenset(), None) == 0].reset_index(drop=True)
    assert seen.dropna(subset="tail").groupby("tail")["fold"].nunique().max() == 1
    for fold in range(5):
        inside, outside = seen["fold"] == fold, seen["fold"] != fold
        expected = encoded(seen["dest"][outside], seen["late"][outside], seen["dest"][inside], 2.0)
        np.testing.assert_allclose(found["dest"][inside], expected, rtol=1e-12)


def test_the_artifact_makes_of_a_frame_what_the_shards_of_the_valid_split_have(data: Path, tmp_path: Path) -> None:
    done = train(spec_of(data, tmp_path), free_slots=lambda: 4.0)

    artifact, prepared = Artifact.load(done.path), prepare(spec_of(data, tmp_path))
    table = flights()
    identity = identity_of_values([pa.chunked_array([pa.array(table["id"].to_numpy())])])
    split = assign(SplitSpec(test=0.2, valid=0.2), identity, None, frozenset(), None)
    rows = table.filter(pl.Series(split == 1))

    assert prepared.reused
    other = checked(PipelineSpec, spec_of(data, tmp_path).model_dump() | {"features": {"groups": {"route": GROUPS["route"]}}})
    assert not prepare(other).reused, "groups are part of what prepared data are made from"
    matrix = matrices(prepared)["valid"].drop(columns="late").to_numpy()
    raw = artifact.model.predict(matrix)
    answers = artifact.predict(rows)
    assert answers["probability"].to_list() == artifact.task.decode(raw)["probability"].to_pylist()
    one_by_one = artifact.predict(rows.drop("id", "tail", "late")[:20].to_dicts())
    assert [answer["probability"] for answer in one_by_one] == answers["probability"].to_list()[:20]


def test_how_the_rows_lie_in_files_changes_only_rounding_and_another_run_nothing(data: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    whole = written(tmp_path / "one", flights(), files=1)

    many, again, one = (
        matrices(prepare(spec_of(at, tmp_path / store))) for at, store in ((data, "a"), (data, "b"), (whole, "c"))
    )

    for split in many:
        pd.testing.assert_frame_equal(many[split], again[split], check_exact=True)
        pd.testing.assert_frame_equal(many[split], one[split], rtol=1e-9, atol=1e-9)
        for name in ("dest", "by_route", "route"):  # counts are exact, whatever the order
            pd.testing.assert_series_equal(many[split][name], one[split][name], check_exact=True)
