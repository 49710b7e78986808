"""Contributions sum to the raw score, whatever becomes of the columns on the way; importance is told by column."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import attribution
from pipelines.artifact import Artifact, write_manifest
from pipelines.attribution import Attribution
from pipelines.errors import ArtifactError
from pipelines.features.preprocessor import Preprocessor, Root
from pipelines.models.boosting import LightGBM
from pipelines.models.model import Matrix
from pipelines.schema import Column, Schema
from pipelines.spec import FeaturesSpec
from pipelines.storage import Folder
from pipelines.tasks import Task
from tests.unit.passing import fit, table_of

COLUMNS = [
    Column(name="age", type="float64", kind="numeric"),
    Column(name="rooms", type="int64", kind="numeric"),
    Column(name="garden", type="bool", kind="boolean"),
    Column(name="city", type="string", kind="categorical"),
    Column(name="street", type="string", kind="categorical"),
    Column(name="month", type="int64", kind="categorical"),
    Column(name="note", type="string", kind="text"),
    Column(name="built", type="timestamp", kind="datetime"),
    Column(name="sold", type="timestamp", kind="datetime"),
    Column(name="same", type="float64", kind="numeric"),
]
FEATURES = FeaturesSpec.model_validate(
    {
        "drop": ["street"],
        "numeric": [{"impute": {"indicator": True}}],
        "boolean": [],
        "categorical": ["index"],
        "text": [["length"], [{"ngrams": {"words": [1, 1], "buckets": 8}}]],
        "datetime": [[{"parts": {"which": ["month", "weekday"]}}, "scale"], [{"cyclic": {"which": ["hour"]}}], ["since"]],
        "columns": {"month": ["onehot"], "city": [["index"], ["target_mean"]]},
        "groups": {
            "place": {"columns": ["city", "street"], "steps": [{"cross": {"buckets": 16}}]},
            "kept": {"columns": ["sold", "built"], "steps": [{"difference": {"unit": "days"}}, "scale"]},
            "size": {
                "columns": ["age", "rooms"],
                "steps": [{"impute": {"indicator": True}}, "scale", {"pca": {"components": 2}}],
            },
            "age": {"columns": ["rooms", "age"], "steps": ["impute", "difference"]},
        },
    }
)
TASKS = {
    "binary": Task(type="binary", target="y", target_type="bool", classes=[False, True]),
    "multiclass": Task(type="multiclass", target="y", target_type="int64", classes=[3, 5, 8]),
    "regression": Task(type="regression", target="y", target_type="float64"),
}
NAMES = [
    *("age", "rooms", "garden", "city", "month", "note", "built", "sold", "same"),
    *("place", "kept", "size", "age (age, rooms)"),
]


def houses(rows: int = 600, seed: int = 5) -> pa.Table:
    rng = np.random.default_rng(seed)

    def some(values: list[Any]) -> list[Any]:
        return [None if hole < 0.1 else value for value, hole in zip(values, rng.random(rows), strict=True)]

    built = rng.integers(0, 10**15, rows)
    values: dict[str, list[Any]] = {
        "age": some(rng.normal(30, 9, rows).tolist()),
        "rooms": some(rng.integers(1, 9, rows).tolist()),
        "garden": some((rng.random(rows) < 0.4).tolist()),
        "city": some(rng.choice(["Ulm", "Bern", "Łódź"], rows).tolist()),
        "street": some(rng.choice(["Rue A", "B-Weg"], rows).tolist()),
        "month": some(rng.integers(1, 13, rows).tolist()),
        "note": some(rng.choice(["old roof", "new roof and door", "by the lake"], rows).tolist()),
        "built": some(built.tolist()),
        "sold": some((built + rng.integers(0, 10**14, rows)).tolist()),
        "same": [1.0] * rows,
    }
    score = np.nan_to_num([float(x) if x is not None else np.nan for x in values["age"]]) + 9 * np.array(
        [(c == "Bern") + (s == "B-Weg") for c, s in zip(values["city"], values["street"], strict=True)]
    )
    return table_of(COLUMNS, pa.array(score), **values)


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    return fit(houses(), COLUMNS, FEATURES)


def trained(preprocessor: Preprocessor, kind: str) -> Artifact:
    table = houses()
    score = table["target"].to_numpy()
    target = {"binary": score > 30, "multiclass": np.digitize(score, [25, 40]), "regression": 1e6 * score}[kind]
    settings = {
        "objective": kind, "verbosity": -1, "num_threads": 1, "num_leaves": 7,
        **({"num_class": 3} if kind == "multiclass" else {}),
    }  # fmt: skip
    categorical = [i for i, feature in enumerate(preprocessor.features) if feature.kind == "categorical"]
    data = lgb.Dataset(preprocessor.matrix(table), target.astype(float), categorical_feature=categorical)
    model = LightGBM.of_text(lgb.train(settings, data, 25).model_to_string())
    return Artifact("houses", "20260101-000000-abcd", Schema(columns=COLUMNS), preprocessor, TASKS[kind], model, {})


@pytest.fixture(scope="module", params=list(TASKS))
def artifact(request: pytest.FixtureRequest, preprocessor: Preprocessor) -> Artifact:
    return trained(preprocessor, request.param)


@pytest.fixture(scope="module")
def binary(preprocessor: Preprocessor) -> Artifact:
    return trained(preprocessor, "binary")


def summed(answers: list[dict[str, Any]]) -> Matrix:
    """(rows, outputs): base plus contributions, as a reader of the answers adds them up."""
    rows = []
    for answer in answers:
        base, found = answer["base"], answer["contributions"]
        by_class = base.keys() if isinstance(base, dict) else []
        rows.append([base[name] + sum(found[name].values()) for name in by_class] or [base + sum(found.values())])
    return np.array(rows)


# Which columns a feature comes from


def test_a_feature_is_of_its_column_or_of_its_group(preprocessor: Preprocessor) -> None:
    found = dict(zip((feature.name for feature in preprocessor.features), preprocessor.roots, strict=True))

    assert {found[name] for name in found if name.startswith("sold__")} == {Root("sold", ("sold",))}
    assert len([name for name in found if name.startswith("sold__")]) == 5
    assert {root for name, root in found.items() if name.startswith("note")} == {Root("note", ("note",))}
    assert {root for name, root in found.items() if name.startswith("month")} == {Root("month", ("month",))}
    assert found["city"] == found["city__target_mean"] == Root("city", ("city",))
    assert found["place"] == Root("place", ("city", "street"))
    assert found["kept"] == Root("kept", ("sold", "built"))
    assert found["size__0"] == found["size__1"] == Root("size", ("age", "rooms"))
    assert found["age"] == Root("age", ("age",)) and found["age__difference"] == Root("age", ("rooms", "age"))
    # What a group's imputation says of one column is of that column.
    assert found["age__missing__impute"] == found["age__missing"] == Root("age", ("age",))


def test_a_stored_preprocessor_knows_it_too(preprocessor: Preprocessor) -> None:
    content = json.loads(json.dumps(preprocessor.to_json()))

    assert Preprocessor.from_json(content).roots == preprocessor.roots
    for step in content["steps"]:
        step.pop("group", None)
    nameless = {root.name for root in Preprocessor.from_json(content).roots if len(root.columns) > 1}
    assert nameless == {"city+street", "sold+built", "age+rooms", "rooms+age"}, "an artifact that has no names of groups"


def test_names_are_each_there_once(binary: Artifact) -> None:
    assert sorted(root.name for root in binary.attribution.roots) == sorted(
        [*(name for name in NAMES if name not in ("age", "age (age, rooms)")), "age (age)", "age (rooms, age)"]
    )


# Contributions


def test_base_and_contributions_sum_to_the_raw_score(artifact: Artifact) -> None:
    table = houses(seed=6)

    answers = artifact.predict(table.drop(["target"]), explain=True)

    raw = artifact.scores(table).reshape(len(table), -1)
    assert raw.shape[1] == artifact.task.outputs and raw.std() > 0.1
    np.testing.assert_allclose(summed(answers.to_pylist()), raw, rtol=1e-9, atol=1e-9)
    assert answers.drop(["base", "contributions"]).equals(artifact.predict(table)), "the answers themselves stay as they are"


@pytest.mark.parametrize("boosting", ["gbdt", "dart", "rf"])
def test_however_the_trees_were_boosted_contributions_sum_to_what_they_say(preprocessor: Preprocessor, boosting: str) -> None:
    table = houses()
    matrix = preprocessor.matrix(table)
    settings = {
        "objective": "binary",
        "boosting": boosting,
        "verbosity": -1,
        "num_leaves": 7,
        "bagging_fraction": 0.7,
        "bagging_freq": 1,
    }
    booster = lgb.train(settings, lgb.Dataset(matrix, table["target"].to_numpy() > 30), 20)
    model = LightGBM.of_text(booster.model_to_string())

    found = model.contributions(matrix).sum(axis=2)[:, 0]

    np.testing.assert_allclose(found, model.predict(matrix), rtol=1e-9, atol=1e-9)


def test_a_columns_contribution_is_the_sum_over_its_features(artifact: Artifact) -> None:
    table = houses(50)
    booster, names = artifact.model.booster, [feature.name for feature in artifact.preprocessor.features]
    by_feature = booster.predict(artifact.matrix(table), pred_contrib=True).reshape(50, artifact.task.outputs, len(names) + 1)
    of_sold = [i for i, name in enumerate(names) if name.startswith("sold__")]

    [found] = artifact.attribution.contributions(artifact.explaining, artifact.matrix(table))

    np.testing.assert_allclose(found.values[..., found.names.index("sold")], by_feature[..., of_sold].sum(axis=2), rtol=1e-12)
    np.testing.assert_allclose(found.values[..., found.names.index("place")], by_feature[..., names.index("place")], rtol=0)
    assert np.abs(found.values[..., found.names.index("place")]).max() > 0


def test_a_column_that_no_tree_uses_contributes_nothing(artifact: Artifact) -> None:
    for answer in artifact.predict(houses(20).to_pylist(), explain=True):
        by_class = answer["contributions"].values() if artifact.task.type == "multiclass" else [answer["contributions"]]
        assert {contributions["same"] for contributions in by_class} == {0.0}


def test_rows_alone_a_few_and_many_have_the_same_contributions(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    table = houses(100, seed=7).drop(["target"])
    rows = [
        {**row, **{name: row[name] and row[name].isoformat() for name in ("built", "sold")}}
        for row in table.to_pylist()
    ]  # fmt: skip

    block = artifact.predict(table, explain=True).to_pylist()

    assert artifact.predict_rows(rows, explain=True) == block
    assert [artifact.predict_rows([row], explain=True)[0] for row in rows] == block
    halves = [artifact.predict(table.slice(0, 37), explain=True), artifact.predict(table.slice(37), explain=True)]
    assert pa.concat_tables(halves).to_pylist() == block
    monkeypatch.setattr(attribution, "BYTES", 5000)
    assert len(list(artifact.explained(table))) > 5
    assert artifact.predict(table, explain=True).to_pylist() == block
    assert artifact.predict(pl.from_arrow(table), explain=True).to_dicts() == block


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "age": st.none() | st.floats(-1e6, 1e6),
            "rooms": st.none() | st.integers(-(2**40), 2**40),
            "garden": st.none() | st.booleans(),
            "city": st.none() | st.sampled_from(["Ulm", "Bern", "elsewhere"]) | st.text(max_size=3),
            "street": st.none() | st.sampled_from(["Rue A", ""]),
            "month": st.none() | st.integers(-1, 14),
            "note": st.none() | st.sampled_from(["roof", "new new new", ""]) | st.text(max_size=8),
            "built": st.none() | st.datetimes().map(lambda when: when.isoformat()),
            "sold": st.none() | st.datetimes().map(lambda when: when.isoformat()),
            "same": st.none() | st.floats(allow_nan=False),
        }
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_whatever_the_rows_hold_contributions_sum_to_the_raw_score(artifact: Artifact, rows: list[dict[str, Any]]) -> None:
    answers = artifact.predict_rows(rows, explain=True)

    raw = artifact.scores(artifact._contract.to_table(artifact.check_rows(rows))).reshape(len(rows), -1)
    np.testing.assert_allclose(summed(answers), raw, rtol=1e-9, atol=1e-9)
    assert [artifact.predict_rows([row], explain=True)[0] for row in rows] == answers
    assert [{key: answer[key] for key in answer if key not in ("base", "contributions")} for answer in answers] == (
        artifact.predict_rows(rows)
    )


def test_http_answers_the_same_contributions(artifact: Artifact) -> None:
    import asyncio

    import httpx

    from serve.routes import build_app

    rows = [{"age": 31.5, "city": "Bern", "street": "Rue A", "sold": "2021-03-04T05:06:07"}, {"rooms": 3}]
    app = build_app(replace(artifact, profile={"examples": rows, "columns": {}}), "houses")

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.post("/v2/models/houses/predict?explain=true", json={"rows": rows})

    answers = asyncio.run(asked()).json()["predictions"]

    assert answers == artifact.predict_rows(rows, explain=True)


def test_no_row_has_no_contributions(artifact: Artifact) -> None:
    assert artifact.predict_rows([], explain=True) == []
    empty = artifact.predict(houses(3).slice(0, 0), explain=True)
    assert empty.schema == artifact.predict(houses(3), explain=True).schema and empty.num_rows == 0


def test_a_derived_column_is_one_of_its_own(preprocessor: Preprocessor) -> None:
    columns = [Column(name="a", type="float64", kind="numeric"), Column(name="per_a", type="float64", kind="numeric")]
    values = np.linspace(1, 9, 200)
    table = table_of(columns, pa.array(values > 5), a=values, per_a=1 / values)
    made = fit(table, columns, FeaturesSpec.model_validate({"numeric": []}))
    booster = lgb.train({"objective": "binary", "verbosity": -1}, lgb.Dataset(made.matrix(table), values > 5), 5)
    schema = Schema(columns=columns[:1], derive={"per_a": "1 / a"})
    artifact = Artifact("derived", "id", schema, made, TASKS["binary"], LightGBM.of_text(booster.model_to_string()), {})

    answers = artifact.predict([{"a": 2.0}, {"a": None}], explain=True)

    assert list(answers[0]["contributions"]) == ["a", "per_a"]
    raw = artifact.scores(pa.table({"a": pa.array([2.0, None])})).reshape(2, 1)
    np.testing.assert_allclose(summed(answers), raw, rtol=1e-9)


# The contract of a family


class Fake:
    """A family of one output whose contributions are the features themselves; it keeps how many rows it was asked for."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.asked = seconds, list[int]()

    def explain_s(self) -> float:
        return self.seconds

    def importance(self) -> dict[str, Matrix]:
        return {"gain": np.array([1.0, 0.0, 2.0])}

    def contributions(self, matrix: Matrix) -> Matrix:
        self.asked.append(len(matrix))
        return np.concatenate([matrix, np.ones((len(matrix), 1))], axis=1)[:, None, :]


FAKED = Attribution([Root("a", ("a",)), Root("b", ("b",))], [0, 1, 0], 1, None)


def test_contributions_are_asked_for_as_many_rows_as_32_mib_hold() -> None:
    model, matrix = Fake(), np.zeros((2_500_000, 3))

    parts = list(FAKED.contributions(model, matrix))

    assert sum(model.asked) == sum(len(part.values) for part in parts) == 2_500_000
    assert max(model.asked) == (32 << 20) // (8 * 4)


@pytest.mark.parametrize(
    ("seconds", "sample", "rows"), [(0.0, 5000, 1000), (0.01, 5000, 60), (0.1, 5000, 0), (0.1, 4, 4), (0.0, 0, 0)]
)
def test_a_slow_family_tells_the_mean_contribution_of_fewer_rows(seconds: float, sample: int, rows: int) -> None:
    values = np.arange(sample)

    found = FAKED.importance(Fake(seconds), np.stack([-values, values, 0 * values], axis=1).astype(float))

    assert found["rows"] == rows
    assert [column["name"] for column in found["columns"]] == ["a", "b"] and found["columns"][0]["gain"] == 3.0
    if rows:
        expected = np.abs(values[np.arange(rows) * sample // rows]).mean()
        assert [column["contribution"] for column in found["columns"]] == [expected, expected]
    else:
        assert all("contribution" not in column for column in found["columns"])


def test_a_family_without_contributions_is_told_in_one_line(binary: Artifact) -> None:
    class Plain:
        def predict(self, matrix: Matrix) -> Matrix:
            return np.zeros(len(matrix))

    plain = replace(binary, model=Plain())

    assert "probability" in plain.predict(houses(2).to_pylist())[0]
    for ask in (houses(2), houses(2).to_pylist()):
        with pytest.raises(ArtifactError, match=r"^houses \(2026.*Plain models have no contributions; leave explain out$"):
            plain.predict(ask, explain=True)


# Importance


def test_importance_by_column_is_the_sum_over_its_features(artifact: Artifact) -> None:
    table = houses()
    names = [feature.name for feature in artifact.preprocessor.features]
    gain = dict(zip(names, artifact.model.booster.feature_importance("gain"), strict=True))
    split = dict(zip(names, artifact.model.booster.feature_importance("split"), strict=True))

    found = artifact.attribution.importance(artifact.explaining, artifact.matrix(table))

    by_name = {column["name"]: column for column in found["columns"]}
    of_sold = [name for name in names if name.startswith("sold__")]
    assert by_name["sold"]["gain"] == pytest.approx(sum(gain[name] for name in of_sold), rel=1e-12)
    assert by_name["sold"]["split"] == sum(split[name] for name in of_sold)
    assert by_name["place"] == {
        "name": "place", "columns": ["city", "street"], "gain": gain["place"], "split": split["place"],
        "contribution": by_name["place"]["contribution"],
    }  # fmt: skip
    assert sum(column["gain"] for column in found["columns"]) == pytest.approx(sum(gain.values()), rel=1e-12)
    assert sum(column["split"] for column in found["columns"]) == sum(split.values())
    gains = [column["gain"] for column in found["columns"]]
    assert gains == sorted(gains, reverse=True)
    assert {by_name["same"][measure] for measure in ("gain", "split", "contribution")} == {0.0}
    parts = artifact.attribution.contributions(artifact.explaining, artifact.matrix(table))
    mean = np.abs(np.concatenate([part.values for part in parts])).sum(axis=1).mean(axis=0)
    place = [root.name for root in artifact.attribution.roots].index("place")
    assert found["rows"] == 600 and by_name["place"]["contribution"] == pytest.approx(mean[place], rel=1e-9)


@pytest.fixture
def store(tmp_path: Path) -> Callable[[Artifact, bool], Path]:
    def write(artifact: Artifact, importance: bool) -> Path:
        folder = Folder.at(str(tmp_path))
        folder.write_json("schema.json", artifact.schema.model_dump())
        folder.write_json("preprocessor.json", artifact.preprocessor.to_json())
        folder.write_json("task.json", artifact.task.model_dump())
        folder.write_json("profile.json", {"examples": []})
        if importance:
            found = artifact.attribution.importance(artifact.explaining, artifact.matrix(houses()))
            folder.write_json("importance.json", found)
        (tmp_path / "model").mkdir()
        artifact.model.save(tmp_path / "model")
        write_manifest(folder, name="houses", run="20260101-000000-abcd", model="lightgbm")
        return tmp_path

    return write


def test_a_stored_artifact_explains_with_the_same_bits(artifact: Artifact, store: Callable[[Artifact, bool], Path]) -> None:
    path = store(artifact, True)

    loaded = Artifact.load(str(path))

    table = houses(80, seed=8)
    assert loaded.predict(table, explain=True).equals(artifact.predict(table, explain=True))
    assert loaded.importance == artifact.attribution.importance(artifact.explaining, artifact.matrix(houses()))
    assert "importance.json" in json.loads((path / "manifest.json").read_text())["files"]
    content = (path / "importance.json").read_text()
    (path / "importance.json").write_text(content.replace("place", "Place"))
    with pytest.raises(ArtifactError, match="is damaged: importance.json is not what was written"):
        Artifact.load(str(path))


def test_an_artifact_without_importance_loads(binary: Artifact, store: Callable[[Artifact, bool], Path]) -> None:
    loaded = Artifact.load(str(store(binary, False)))

    assert loaded.importance is None
    assert loaded.predict(houses(3), explain=True).num_rows == 3
