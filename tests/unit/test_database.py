"""SQL sources on SQLite: the same rows as a file, in ranges; and each wrong setting as one sentence."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from pipelines.data.infer import infer_schema
from pipelines.data.source import Source
from pipelines.errors import DataError, SpecError, UserError
from pipelines.schema import decoded
from pipelines.spec import DataSpec
from tests.unit.test_formats import blocks_of

QUERY = "SELECT * FROM people; "


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    numbers = np.arange(5000)
    return pl.DataFrame(
        {
            "id": numbers * 3 - 500,
            "x": [None if i % 7 == 0 else i / 4 for i in numbers.tolist()],
            "s": [None if i % 5 == 0 else f"ü'{i % 3}\"" for i in numbers.tolist()],
        }
    )


@pytest.fixture(scope="module")
def path(table: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("db") / "with space.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE people (id INTEGER PRIMARY KEY, x REAL, s TEXT)")
    connection.executemany("INSERT INTO people VALUES (?, ?, ?)", table.sample(fraction=1, shuffle=True, seed=1).rows())
    connection.commit()
    connection.close()
    return path


def spec(path: Path, /, **settings: Any) -> DataSpec:
    options = {"query": QUERY, **settings.pop("options", {})}
    return DataSpec(**{"source": f"sqlite://{path}", "key": ["id"], "options": options, **settings})


@pytest.mark.parametrize("rows", [250_000, 700, 1])
def test_a_query_gives_the_rows_schema_and_split_of_a_file(path: Path, table: pl.DataFrame, tmp_path: Path, rows: int) -> None:
    table.write_parquet(tmp_path / "a.parquet")
    expected, _, parquet = blocks_of(DataSpec(source=str(tmp_path), key=["id"]), None, None)

    found, counts, reader = blocks_of(spec(path, options={"partition_rows": rows}), None, None)

    assert reader.raw == parquet.raw and counts.rows == 5000
    assert pa.concat_tables([b.table for b in found]).equals(pa.concat_tables([decoded(b.table) for b in expected]))
    for what in ("identity", "split"):
        together = [np.concatenate([getattr(block, what) for block in blocks]) for blocks in (found, expected)]
        assert np.array_equal(*together)


def test_ranges_follow_from_the_rows_alone_and_hold_each_row_once(path: Path) -> None:
    units = Source.open(spec(path, options={"partition_rows": 1000})).units
    assert [unit.piece.where for unit in units] == [
        'WHERE "id" < 2499 OR "id" IS NULL',
        'WHERE "id" >= 2499 AND "id" < 5499',
        'WHERE "id" >= 5499 AND "id" < 8498',
        'WHERE "id" >= 8498 AND "id" < 11498',
        'WHERE "id" >= 11498',
    ]


def test_rows_whose_partition_column_is_null_are_read_too(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("CREATE TABLE t (id TEXT, p INTEGER)")
    connection.executemany("INSERT INTO t VALUES (?, ?)", [(f"k{i:03d}", None if i % 10 == 0 else i) for i in range(100)])
    connection.commit()
    connection.close()
    data = spec(tmp_path / "a.db", options={"query": "SELECT * FROM t -- all", "partition": "p", "partition_rows": 10})
    blocks, _, _ = blocks_of(data, None, None)
    assert len(blocks) == 10
    assert sorted(value for block in blocks for value in block.table["id"].to_pylist()) == [f"k{i:03d}" for i in range(100)]


def test_a_key_of_text_is_read_in_one_range(path: Path) -> None:
    units = Source.open(spec(path, key=["s", "id"], options={"partition_rows": 10})).units
    assert [unit.piece.where for unit in units] == [""]


def test_only_needed_columns_are_asked_for(path: Path) -> None:
    _, one, _ = blocks_of(spec(path), {"id"}, None)
    _, everything, _ = blocks_of(spec(path), None, None)
    assert one.rows == everything.rows and one.bytes < 0.6 * everything.bytes and one.chunks == 1


def test_new_rows_change_the_fingerprint(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("CREATE TABLE people (id INTEGER)")
    connection.execute("INSERT INTO people VALUES (1), (2)")
    connection.commit()
    before = Source.open(spec(tmp_path / "a.db")).fingerprint()
    assert Source.open(spec(tmp_path / "a.db")).fingerprint() == before
    connection.execute("INSERT INTO people VALUES (7)")
    connection.commit()
    connection.close()
    assert Source.open(spec(tmp_path / "a.db")).fingerprint() != before


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"options": {"query": "SELECT nope FROM people"}},
            SpecError,
            "data.options.query: .* refuses it: .*no such column: nope",
        ),
        ({"options": {"query": "SELECT FROM people"}}, SpecError, "data.options.query: .* refuses it: .*syntax error"),
        ({"options": {"query": ""}}, SpecError, "data.options.query: found ''; expected a str, not empty"),
        ({"options": {"qerry": "x"}}, SpecError, "'qerry' is no option of sql; did you mean 'query'"),
        ({"options": {"partition": "s"}}, SpecError, "data.options.partition: 's' is no integer column"),
        ({"options": {"partition": "t"}}, SpecError, "data.options.partition: the query gives no column 't'"),
        ({"key": []}, SpecError, "data.key: is missing; rows of a database have no number"),
        ({"key": ["idd"]}, SpecError, "data.key: the query gives no column 'idd'; did you mean 'id'"),
        ({"format": "csv"}, SpecError, "data.format: sql goes with postgresql:// and sqlite:// alone, found csv"),
        ({"source": "sqlite:///none.db"}, DataError, "the file /none.db does not exist"),
        ({"options": {"query": "SELECT * FROM people WHERE id > 10000000"}}, DataError, "gives no row"),
    ],
)
def test_wrong_settings_are_one_sentence(path: Path, settings: dict[str, Any], kind: type[UserError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        blocks_of(spec(path, **settings), None, None)
    assert "\n" not in str(caught.value)


def test_a_query_is_missing_or_a_file_is_no_database(tmp_path: Path, path: Path) -> None:
    with pytest.raises(SpecError, match="data.options.query: is missing; a database needs one"):
        Source.open(DataSpec(source=f"sqlite://{path}", key=["id"]))
    (tmp_path / "a.db").write_text("no database at all, but long enough to have a header of a hundred bytes" * 10)
    with pytest.raises(UserError, match="a.db.*: file is not a database") as caught:
        Source.open(spec(tmp_path / "a.db"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["postgresql://me:hunter2@host/db", "postgresql://me@host/db?password=hunter2"])
def test_a_password_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(SpecError, match="data.source: the postgresql:// URI holds a password.*PGPASSWORD") as caught:
        Source.open(DataSpec(source=uri, key=["id"], options={"query": "SELECT 1"}))
    assert "hunter2" not in str(caught.value)


def test_the_schema_comes_from_the_query(path: Path) -> None:
    data = spec(path, options={"query": "SELECT id, x > 3 AS big, 'a' AS \"odd name\" FROM people"})
    schema = infer_schema(Source.open(data), data)
    assert {c.name: c.type for c in schema.columns} == {"id": "int64", "big": "int64", "odd name": "string"}
