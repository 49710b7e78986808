"""What a model answers to an Arrow IPC stream: what it answers to rows, and a 4xx to what is none, or claims too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.arrow import MEDIA
from serve.routes import ModelApp, build_app
from serve.spec import LimitsSpec
from tests.unit.test_requests import PREDICT, post, trained

ROWS = [{"rooms": 1 + i % 8, "age": None if i % 5 == 0 else i / 2, "city": ["Ulm", "Bern", "Rome"][i % 3]} for i in range(100)]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> ModelApp:
    artifact = trained(tmp_path_factory.mktemp("houses"), derive=True)
    return build_app(artifact, "houses", limits=LimitsSpec(rows=1000, body_mb=0.5))


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=30)
    return sink.getvalue().to_pybytes()


def send(app: ModelApp, body: bytes, query: str = "") -> httpx.Response:
    return post(app, body, PREDICT + query, **{"content-type": MEDIA})


@pytest.mark.parametrize(
    "table",
    [
        pa.Table.from_pylist(ROWS),
        pa.Table.from_pylist([{**row, "more": [1]} for row in ROWS]).select(["more", "city", "age", "rooms"]),
        pa.Table.from_pylist(ROWS).set_column(2, "city", pa.array([row["city"] for row in ROWS]).dictionary_encode()),
        pl.DataFrame(ROWS).to_arrow(compat_level=pl.CompatLevel.newest()),
        pa.Table.from_pylist(ROWS).set_column(0, "rooms", pa.array([row["rooms"] for row in ROWS], pa.int8())),
    ],
    ids=["plain", "another order and column", "dictionary", "views", "narrow"],
)
def test_a_stream_is_answered_as_its_rows_are(app: ModelApp, table: pa.Table) -> None:
    response = send(app, stream(table))

    assert (response.status_code, response.headers["content-type"]) == (200, MEDIA)
    answers = pa.ipc.open_stream(response.content).read_all()
    assert answers.to_pylist() == app.artifact.predict_rows(ROWS)
    assert answers.schema.metadata == {b"model": b"houses", b"version": b"houses-1"}
    assert response.headers["x-model-version"] == "houses-1"


def test_no_rows_have_no_answers(app: ModelApp) -> None:
    answers = pa.ipc.open_stream(send(app, stream(pa.Table.from_pylist(ROWS)[:0])).content).read_all()

    assert (answers.num_rows, answers.column_names) == (0, ["label", "probability"])


def with_column(name: str, values: pa.Array) -> pa.Table:
    table = pa.Table.from_pylist(ROWS)
    return table.set_column(table.column_names.index(name), name, values)


@pytest.mark.parametrize(
    ("table", "status", "facts"),
    [
        (with_column("rooms", pa.array([1] * 70 + [None] * 30)), 422, {"row": 70, "column": "rooms", "expected": "integer"}),
        (with_column("rooms", pa.array(["4"] * 100)), 422, {"column": "rooms", "found": "string", "expected": "integer"}),
        (with_column("rooms", pa.array([[4]] * 100)), 422, {"column": "rooms", "found": "list<item: int64>"}),
        (pa.Table.from_pylist(ROWS).drop(["city"]), 422, {"column": "city", "expected": "string"}),
        (pa.concat_tables([pa.Table.from_pylist(ROWS)] * 11), 413, {"expected": "at most 1000 rows"}),
        (pa.Table.from_pylist(ROWS).append_column("city", pa.array(["Ulm"] * 100)), 422, {"column": "city"}),
        (
            with_column("city", pa.DictionaryArray.from_arrays(pa.array([0] * 100), pa.array(["x" * 100_000]))),
            413,
            {"expected": "at most 524288 bytes"},
        ),
    ],
    ids=["a null", "text", "lists", "a missing column", "too many rows", "two columns", "a dictionary that unfolds"],
)
def test_what_breaks_the_contract_is_named(app: ModelApp, table: pa.Table, status: int, facts: dict[str, Any]) -> None:
    response = send(app, stream(table))

    assert response.status_code == status
    error = response.json()["error"]
    assert error.items() >= facts.items()
    assert error["message"]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compressed_stream_is_refused_before_it_unfolds(app: ModelApp, codec: str) -> None:
    body = stream(pa.table({"rooms": pa.array([4] * 1000)}), compression=codec)

    assert send(app, body).status_code == 415


def test_contributions_are_for_json(app: ModelApp) -> None:
    assert send(app, stream(pa.Table.from_pylist(ROWS)), "?explain=true").status_code == 422


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_make_the_server_fail(app: ModelApp, data: st.DataObject) -> None:
    """Random bytes, and a right stream with some bytes changed or cut off."""
    body = bytearray(stream(pa.Table.from_pylist(ROWS[:3])))
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=4)):
        body[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))

    assert send(app, bytes(body[:cut]) or b"x").status_code in (200, 413, 415, 422)


def test_a_truncated_file_is_no_stream(app: ModelApp, tmp_path: Path) -> None:
    for body in (b"", b"PAR1", b"ARROW1\x00\x00", b"{}", b"\xff" * 1000):
        response = send(app, body)
        assert response.status_code == 422
        assert "no Arrow IPC stream" in response.json()["error"]["message"]
