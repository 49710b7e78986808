"""SQL sources on a real PostgreSQL."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import polars as pl
import pyarrow as pa
import pytest

from pipelines.data.infer import infer_schema
from pipelines.data.read import Counts, Reader
from pipelines.data.source import Source
from pipelines.errors import DataError, SpecError
from pipelines.predict import predict
from pipelines.prepare import prepare
from pipelines.schema import decoded
from pipelines.spec import DataSpec
from pipelines.train import run
from tests.local.test_pipeline import people, slots, spec_of
from tests.servers import Postgres, free_port, postgres
from tests.unit.test_formats import blocks_of


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        with adbc.connect(server.uri()) as connection, connection.cursor() as cursor:
            cursor.adbc_ingest("people", people().sample(fraction=1, shuffle=True, seed=3).to_arrow(), mode="create")
            connection.commit()
        yield server


def data_of(server: Postgres, user: str = "open", **settings: Any) -> DataSpec:
    options = {"query": "SELECT * FROM people", "partition_rows": 1500, **settings.pop("options", {})}
    return DataSpec(**{"source": server.uri(user), "key": ["id"], "options": options, **settings})


def test_a_query_gives_the_rows_schema_and_split_of_a_file(server: Postgres, tmp_path: Path) -> None:
    people().write_parquet(tmp_path / "a.parquet")
    expected, _, parquet = blocks_of(DataSpec(source=str(tmp_path), key=["id"]), None, "bought")

    found, counts, reader = blocks_of(data_of(server), None, "bought")

    assert len(found) == 4 and counts.rows == 6000 and reader.raw == parquet.raw
    assert pa.concat_tables([b.table for b in found]).equals(pa.concat_tables([decoded(b.table) for b in expected]))
    assert [c for b in found for c in b.split.tolist()] == [c for b in expected for c in b.split.tolist()]


def test_types_of_the_server_become_ours(server: Postgres) -> None:
    query = """SELECT 1::smallint AS i, 1.25::numeric(8, 2) AS n, 2.5::real AS r, 'a'::varchar(5) AS v, true AS b,
        DATE '2024-02-29' AS d, TIMESTAMPTZ '2024-01-01 12:00+02' AS t, NULL::numeric AS z"""
    blocks, _, _ = blocks_of(data_of(server, key=["i"], options={"query": query}), None, None)
    assert blocks[0].table.to_pylist() == [
        {
            "i": 1,
            "n": 1.25,
            "r": 2.5,
            "v": "a",
            "b": True,
            "d": datetime.datetime(2024, 2, 29),
            "t": datetime.datetime(2024, 1, 1, 10),
            "z": None,
        }
    ]


@pytest.mark.usefixtures("session")
def test_a_run_on_a_query_is_the_run_on_the_file(server: Postgres, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    people().write_parquet(tmp_path / "files" / "a.parquet")
    data = {"source": server.uri(), "options": {"query": "SELECT * FROM people"}}
    from_file = prepare(spec_of(tmp_path / "files", tmp_path / "a"))
    from_query = prepare(spec_of(tmp_path / "files", tmp_path / "b", data=data))

    assert from_query.rows == from_file.rows and from_query.schema == from_file.schema
    assert from_query.preprocessor.to_json() == from_file.preprocessor.to_json()
    assert prepare(spec_of(tmp_path / "files", tmp_path / "b", data=data)).reused

    spec = spec_of(tmp_path / "files", tmp_path / "b", data=data)
    finished = run(spec, free_slots=slots)
    answers = [
        predict(finished.artifact.path, source, str(tmp_path / name), data=spec.data if name == "query" else None, keep=["id"])
        for name, source in (("query", server.uri()), ("file", str(tmp_path / "files")))
    ]
    tables = [pl.read_parquet(f"{answer.path}/*.parquet") for answer in answers]
    assert tables[0].height == 6000 and tables[0].equals(tables[1])


def test_the_password_comes_from_the_environment(server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "s3cret")
    assert len(Source.open(data_of(server, "guarded")).units) == 4
    monkeypatch.setenv("PGPASSWORD", "wrong-one")
    with pytest.raises(DataError, match="cannot be read: .*password authentication failed.*PGPASSWORD") as caught:
        Source.open(data_of(server, "guarded"))
    assert "\n" not in str(caught.value) and "wrong-one" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_sentence_soon() -> None:
    started = time.monotonic()
    with pytest.raises(
        DataError, match="postgresql://me@127.0.0.1.*: cannot be read: .*Connection refused.*check the URI"
    ) as caught:
        Source.open(
            DataSpec(source=f"postgresql://me@127.0.0.1:{free_port()}/db", key=["id"], options={"query": "SELECT 1 AS id"})
        )
    assert "\n" not in str(caught.value) and time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT * FROM nobody", 'refuses it: .*relation "nobody" does not exist'),
        ("SELECT id, age FROM", "refuses it: .*syntax error"),
        ("DELETE FROM people", "refuses it: .*syntax error"),
    ],
)
def test_a_wrong_query_is_one_sentence(server: Postgres, query: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"data.options.query: .*{message}") as caught:
        Source.open(data_of(server, options={"query": query}))
    assert "\n" not in str(caught.value)


def test_a_query_that_fails_at_a_later_row_is_one_sentence(server: Postgres) -> None:
    query = "SELECT id, 1 / (id - 5999) AS q FROM people"
    with pytest.raises(DataError, match="division by zero") as caught:
        blocks_of(data_of(server, options={"query": query}), None, None)
    assert "\n" not in str(caught.value)


def test_a_server_that_ends_in_the_middle_is_one_sentence() -> None:
    with postgres() as server:
        query = "SELECT i AS id, repeat('x', 1000) AS s FROM generate_series(1, 300000) AS i"
        data = data_of(server, options={"query": query, "partition_rows": 1_000_000})
        source = Source.open(data)
        blocks = Reader.of(source, infer_schema(source, data), data, {"id", "s"}, None).blocks(source.units[0], Counts())
        next(blocks)
        server.end()
        with pytest.raises(DataError, match=r"127\.0\.0\.1.*: cannot be read: ") as caught:
            list(blocks)
        assert "\n" not in str(caught.value)
