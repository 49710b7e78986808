"""What a trained model answers over HTTP to every kind of row: the right thing, or a 422 that names row and column."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.artifact import Artifact, keep_answers, write_manifest
from pipelines.expressions import Derivation
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.stats import NumberStatistics, StringStatistics
from pipelines.models.boosting import LightGBM
from pipelines.schema import ARROW, Column, Schema, numbers
from pipelines.spec import FeaturesSpec
from pipelines.storage import Folder
from pipelines.tasks import Task
from serve.routes import ModelApp, build_app

PREDICT, INFER = "/v2/models/houses/predict", "/v2/models/houses/infer"
ROW: dict[str, Any] = {"rooms": 4, "age": 31.5, "garden": True, "city": "Ulm", "sold": "2024-02-29T12:00:00", "price": "1200"}
COLUMNS = [
    Column(name="rooms", type="int64", kind="numeric", nullable=False),
    Column(name="age", type="float64", kind="numeric"),
    Column(name="garden", type="bool", kind="boolean"),
    Column(name="city", type="string", kind="categorical", nullable=False),
    Column(name="sold", type="timestamp", kind="datetime"),
    Column(name="price", type="float64", kind="numeric", text="number"),
]


@pytest.fixture(scope="module", params=["rows", "derived"])
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelApp:
    """A model that answers few rows one by one, and one with a derived column, which answers all of them as a block."""
    return build_app(trained(tmp_path_factory.mktemp("houses"), derive=request.param == "derived"), "houses")


def trained(path: Path, *, derive: bool) -> Artifact:
    rng = np.random.default_rng(0)
    schema = Schema(columns=COLUMNS, derive={"per_room": "age / rooms"} if derive else {})
    derived = Derivation(expressions=schema.derive)
    columns = derived.extend(schema).columns
    table = derived.apply(
        pa.table(
            {
                "rooms": rng.integers(1, 9, 300),
                "age": rng.normal(30, 9, 300),
                "garden": rng.random(300) > 0.5,
                "city": pa.array(rng.choice(["Ulm", "Bern"], 300).tolist(), pa.large_string()),
                "sold": pa.array(rng.integers(0, 10**15, 300)).cast(ARROW["timestamp"]),
                "price": rng.normal(1000, 100, 300),
            }
        )
    )
    statistics: Any = {
        column.name: StringStatistics.of(table["city"].combine_chunks())
        if column.name == "city"
        else NumberStatistics.of(numbers(table[column.name]))
        for column in columns
    }
    chains = Preprocessor.plan(
        columns,
        FeaturesSpec.model_validate({"categorical": ["index"], "datetime": ["parts"]}),
        {"numeric": [], "boolean": []},
        set(),
    )
    preprocessor = Preprocessor.fit(columns, chains, statistics)
    target = (table["rooms"].to_numpy() > 4).astype(float)
    settings = {"objective": "binary", "verbosity": -1, "num_threads": 1}
    booster = lgb.train(settings, lgb.Dataset(preprocessor.matrix(table), target), 5)
    folder = Folder.at(str(path))
    folder.write_json("schema.json", schema.model_dump())
    folder.write_json("preprocessor.json", preprocessor.to_json())
    folder.write_json("task.json", Task(type="binary", target="y", target_type="bool", classes=[False, True]).model_dump())
    profile = {name: statistics[name].profile() for name in statistics}
    folder.write_json("profile.json", {"rows": {}, "columns": profile, "target": {}, "examples": [ROW]})
    (path / "model").mkdir()
    LightGBM(booster).save(path / "model")
    keep_answers(folder, name="houses", run="houses-1", model="lightgbm")
    write_manifest(folder, name="houses", run="houses-1", model="lightgbm")
    return Artifact.load(str(path))


def post(app: ModelApp, body: bytes, path: str = PREDICT, **headers: str) -> httpx.Response:
    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://heliostat") as client:
            return await client.post(path, content=body, headers=headers)

    return asyncio.run(request())


def of_row(row: str) -> bytes:
    return f'{{"rows": [{json.dumps(ROW)}, {row}]}}'.encode()


REST = '"rooms": 4, "city": "Ulm"'


@pytest.mark.parametrize(
    ("row", "column", "found"),
    [
        (f'{{{REST}, "age": NaN}}', "age", "NaN"),
        (f'{{{REST}, "age": -Infinity}}', "age", "-Infinity"),
        (f'{{{REST}, "age": 1e999}}', "age", "1e999"),
        ('{"rooms": NaN, "city": "Ulm"}', "rooms", "NaN"),
        ('{"rooms": 100000000000000000000, "city": "Ulm"}', "rooms", 1e20),
        ('{"rooms": 18446744073709551615, "city": "Ulm"}', "rooms", 2**64 - 1),
        ('{"rooms": "4", "city": "Ulm"}', "rooms", "4"),
        ('{"rooms": null, "city": "Ulm"}', "rooms", None),
        (f'{{{REST}, "age": "31"}}', "age", "31"),
        *((f'{{{REST}, "age": {"[" * depth}{"]" * depth}}}', "age", "[[[[[[[...]]]]]]]") for depth in (500, 1000)),
        (f'{{{REST}, "sold": "29.2.2024"}}', "sold", "29.2.2024"),
        (f'{{{REST}, "sold": "2023-02-29"}}', "sold", "2023-02-29"),
        (f'{{{REST}, "sold": "0001-01-01T00:00:00+23:59"}}', "sold", "0001-01-01T00:00:00+23:59"),
        (f'{{{REST}, "sold": 1709164800}}', "sold", 1709164800),
        ('{"rooms": 4, "city": "\\ud800"}', None, None),
        (f'{{{REST}, "price": "cheap"}}', "price", "cheap"),
    ],
)
def test_a_wrong_value_is_a_422_that_names_it(app: ModelApp, row: str, column: str | None, found: object) -> None:
    response = post(app, of_row(row))

    assert response.status_code == 422
    error = response.json()["error"]
    assert error.get("column") == column
    assert (error.get("row"), error.get("found")) == ((1, found) if column else (None, None))


@pytest.mark.parametrize(
    ("row", "as_row"),
    [
        (f'{{{REST}, "age": null}}', {}),
        (f'{{"rooms": 7, {REST}, "rooms": 4}}', {}),
        (f'{{{REST}, "age": 100000000000000000000}}', {"age": 1e20}),
        ('{"rooms": 4.0, "city": "Ulm"}', {}),
        (f'{{{REST}, "price": "1200.5"}}', {"price": 1200.5}),
        (f'{{{REST}, "more": {"[" * 500}{"]" * 500}}}', {}),
        *[
            (f'{{{REST}, "sold": "{text}"}}', {"sold": "2024-02-29T12:00:00"})
            for text in (
                "2024-02-29 12:00",
                "2024-02-29T12:00:00Z",
                "2024-02-29T14:00:00+02:00",
                "20240229T120000",
                "2024-W09-4T12:00",
            )
        ],
        (f'{{{REST}, "sold": "2024-02-29"}}', {"sold": "2024-02-29T00:00:00"}),
    ],
    ids=[
        "null",
        "equal keys",
        "a huge number",
        "a whole float",
        "a column of texts",
        "nested",
        "a space",
        "Z",
        "an offset",
        "basic",
        "week",
        "a day",
    ],
)
def test_what_a_row_may_be_written_as(app: ModelApp, row: str, as_row: dict[str, Any]) -> None:
    found, expected = post(app, of_row(row)), post(app, of_row(json.dumps({"rooms": 4, "city": "Ulm"} | as_row)))

    assert found.status_code == 200
    assert found.json() == expected.json()


def test_a_wrong_number_in_a_tensor_is_named_too(app: ModelApp) -> None:
    body = b'{"inputs": [{"name": "age", "datatype": "FP64", "shape": [2], "data": [1, NaN]}]}'

    error = post(app, body, INFER).json()["error"]

    assert (error["row"], error["column"], error["found"]) == (1, "age", "NaN")


@pytest.mark.parametrize("body", [b'{"rows": "\xff"}', b'\xef\xbb\xbf{"rows": []}', b"[" * 100_000, b'{"rows": NaN}', b"NaN"])
def test_a_body_that_is_no_json_says_where(app: ModelApp, body: bytes) -> None:
    response = post(app, body)

    assert response.status_code == 422
    assert "line 1, column" in response.json()["error"]["message"]


def test_ten_thousand_rows_are_answered_as_each_alone(app: ModelApp) -> None:
    rows = [{"rooms": 1 + i % 8, "age": i / 100, "city": ["Ulm", "Bern", "Rome"][i % 3]} for i in range(10_000)]

    answers = post(app, json.dumps({"rows": rows}).encode()).json()["predictions"]

    assert len(answers) == 10_000
    for i in (0, 4_999, 9_999):
        assert answers[i] == post(app, json.dumps({"rows": [rows[i]]}).encode()).json()["predictions"][0]


def test_other_columns_are_counted(app: ModelApp) -> None:
    assert app.artifact.ignored([ROW, {**ROW, "more": 1, "and": None}, {"rooms": 1}, "no row", {"Rooms": 1}]) == 3


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "rooms": st.integers(-(2**63), 2**63 - 1),
    "age": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30),
    "garden": st.none() | st.booleans(),
    "city": st.text(st.characters(codec="utf-8")),
    "sold": st.none() | st.datetimes().map(lambda when: when.isoformat()) | st.dates().map(lambda day: day.isoformat()),
    "price": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.decimals(-(10**9), 10**9, places=2).map(str),
}
RIGHT = st.fixed_dictionaries(
    {name: VALUES[name] for name in ("rooms", "city")},
    optional={name: VALUES[name] for name in ("age", "garden", "sold", "price")} | {"more": st.none() | st.text(max_size=3)},
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
ANY = st.dictionaries(st.sampled_from([*ROW, "more"]), st.one_of(JUNK, *VALUES.values())) | JUNK


@settings(max_examples=100, deadline=None)
@given(st.lists(RIGHT, max_size=40))
def test_every_row_of_the_contract_is_answered(app: ModelApp, rows: list[dict[str, Any]]) -> None:
    response = post(app, json.dumps({"rows": rows}).encode())

    assert response.status_code == 200, response.text
    assert all(0 <= answer["probability"] <= 1 for answer in response.json()["predictions"])
    assert len(response.json()["predictions"]) == len(rows)


@settings(max_examples=200, deadline=None)
@given(st.lists(RIGHT | ANY, max_size=4))
def test_no_row_makes_the_server_fail(app: ModelApp, rows: list[Any]) -> None:
    response = post(app, json.dumps({"rows": rows}).encode("utf-8", "surrogatepass"))

    assert response.status_code in (200, 422)
    if response.status_code == 422 and "row" in response.json()["error"]:
        assert 0 <= response.json()["error"]["row"] < len(rows)
