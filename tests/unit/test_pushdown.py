"""What `where` lets a reader leave unread: folders by their names, row groups by their footers; never a row that counts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.data.infer import infer_schema
from pipelines.data.pushdown import Condition, conditions, conjuncts
from pipelines.data.source import Source
from pipelines.errors import DataError, SpecError
from pipelines.expressions import Predicate
from pipelines.spec import DataSpec
from tests.unit.test_formats import blocks_of, write

NAMES = ["i", "f", "s", "u"]
LITERALS = ["-3", "0", "2", "4.5", "1e1", "9007199254740993", "'b'", "''", "'bb'"]
SIMPLE = [f"{name} {op} {value}" for name in NAMES for op in ("<", "<=", "=", ">", ">=", "<>") for value in LITERALS]
PARTS = [
    *SIMPLE,
    "i IS NOT NULL",
    "f IS NULL",
    "i IN (1, 2)",
    "i BETWEEN 1 AND 3",
    "(i > 2 OR f < 1)",
    "NOT i = 2",
    "s LIKE 'b%'",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row groups of 5 rows with NaN, nulls, groups of nulls alone, and integers that float64 cannot hold."""
    rng = np.random.default_rng(3)
    rows = 60
    integers = np.sort(rng.integers(-5, 12, rows)).tolist()
    frame = pl.DataFrame(
        {
            "i": [2**53 + 1 if k > 56 else None if 20 <= k < 26 or k % 9 == 0 else v for k, v in enumerate(integers)],
            "f": [float("nan") if k % 7 == 0 else None if k % 11 == 0 else v / 2 for k, v in enumerate(integers)],
            "s": [None if k % 8 == 0 else "abc"[k * 3 // rows] * (1 + k % 2) for k in range(rows)],
            "u": np.arange(rows, dtype=np.uint8),
        }
    )
    path = tmp_path_factory.mktemp("pushdown") / "a.parquet"
    frame.write_parquet(path, row_group_size=5, statistics=True)
    return path


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=3), joins=st.lists(st.sampled_from([" AND ", " and ", " OR "]), min_size=2, max_size=2))  # fmt: skip
def test_no_row_that_satisfies_the_predicate_is_left_unread(table: Path, parts: list[str], joins: list[str]) -> None:
    sql = "".join(itertools.chain(*itertools.zip_longest(parts, joins[: len(parts) - 1], fillvalue="")))
    data = DataSpec(source=str(table), where=sql)
    try:
        Predicate(sql=sql).verify(infer_schema(Source.open(DataSpec(source=str(table))), DataSpec(source=str(table))))
    except SpecError:
        return  # text compared with a number
    whole = pq.read_table(table).cast(pa.schema([("i", "int64"), ("f", "float64"), ("s", "large_string"), ("u", "int64")]))
    wanted = whole.filter(Predicate(sql=sql).mask(whole))

    blocks, counts, _ = blocks_of(data, None, "u")

    assert pl.from_arrow(pa.concat_tables([block.table for block in blocks])).equals(pl.from_arrow(wanted)) if blocks else wanted.num_rows == 0  # type: ignore[arg-type]  # fmt: skip
    assert counts.rows == 60 and counts.dropped.get("where", 0) == 60 - wanted.num_rows


@pytest.mark.parametrize(
    ("sql", "parts"),
    [
        ("a > 1 AND b = 'x and y' and (c OR d)", ["a > 1", "b = 'x and y'", "(c OR d)"]),
        ("a > 1 OR b = 2 AND c = 3", ["a > 1 OR b = 2 AND c = 3"]),
        ("a BETWEEN 1 AND 2", ["a BETWEEN 1 AND 2"]),
        ("NOT a AND b", ["NOT a AND b"]),
        ("a IS NOT NULL AND band = 1", ["a IS NOT NULL", "band = 1"]),
        ('"a and b" = 1', ['"a and b" = 1']),
    ],
)
def test_a_predicate_is_taken_apart_only_where_all_parts_must_hold(sql: str, parts: list[str]) -> None:
    assert conjuncts(sql) == parts


def test_conditions_are_the_parts_with_one_column_and_one_literal() -> None:
    assert conditions("\"a b\" >= -2 AND c = 'x' AND d < 1.5 AND e IS NOT NULL AND f + 1 > 2 AND g > h") == [
        Condition("a b", ">=", -2),
        Condition("c", "=", "x"),
        Condition("d", "<", 1.5),
        Condition("e", "valid", None),
    ]


def test_row_groups_that_cannot_match_are_not_read_and_identities_stay(tmp_path: Path) -> None:
    rows = 100_000
    pl.DataFrame({"n": np.arange(rows), "x": np.random.default_rng(0).random(rows)}).write_parquet(
        tmp_path / "a.parquet", row_group_size=1000
    )
    whole, everything, _ = blocks_of(DataSpec(source=str(tmp_path)), None, "x")
    found, counts, _ = blocks_of(DataSpec(source=str(tmp_path), where="n >= 50_500 AND n < 52_500".replace("_", "")), None, "x")

    assert counts.bytes < 0.04 * everything.bytes and counts.chunks == 2 * 3
    assert counts.rows == rows and counts.dropped == {"where": rows - 2000}
    identities = np.concatenate([block.identity for block in whole])[50_500:52_500]
    assert np.array_equal(np.concatenate([block.identity for block in found]), identities)


def test_blocks_are_the_same_with_and_without_skipped_row_groups(tmp_path: Path) -> None:
    frame = pl.DataFrame({"n": np.arange(300_000), "x": np.random.default_rng(0).random(300_000)})
    frame.write_parquet(tmp_path / "a.parquet", row_group_size=1000)
    where = "n > 131000 AND n < 200000"
    skipping, _, _ = blocks_of(DataSpec(source=str(tmp_path), where=where), None, "x")
    reading, _, _ = blocks_of(DataSpec(source=str(tmp_path), where=f"({where})"), None, "x")
    assert [b.table.num_rows for b in skipping] == [b.table.num_rows for b in reading if b.table.num_rows]


def partitioned(root: Path, suffix: str = "parquet") -> Path:
    for year, month in itertools.product((2012, 2013), (1, 2)):
        folder = root / f"year={year}" / f"carrier=a%2F{month}"
        folder.mkdir(parents=True)
        write(pl.DataFrame({"n": np.arange(10) + 100 * year + 10 * month, "y": [True, False] * 5}), folder / f"p.{suffix}")
    return root


@pytest.mark.parametrize("suffix", ["parquet", "csv.gz", "jsonl"])
def test_folder_names_become_columns(tmp_path: Path, suffix: str) -> None:
    partitioned(tmp_path, suffix)
    write(pl.DataFrame({"n": [1], "y": [True]}), (tmp_path / "year=2014" / "carrier=__HIVE_DEFAULT_PARTITION__").mkdir(parents=True) or tmp_path / f"year=2014/carrier=__HIVE_DEFAULT_PARTITION__/p.{suffix}")  # type: ignore[func-returns-value]  # fmt: skip
    blocks, counts, reader = blocks_of(DataSpec(source=str(tmp_path)))
    found = pl.from_arrow(pa.concat_tables([block.table for block in blocks]))
    assert isinstance(found, pl.DataFrame)
    assert [(c.name, c.type, c.kind) for c in reader.raw.columns][2:] == [
        ("year", "int64", "numeric"),
        ("carrier", "string", "categorical"),
    ]
    assert counts.rows == 41 and found["year"].to_list() == [2012] * 20 + [2013] * 20 + [2014]
    assert found["carrier"].to_list() == (["a/1"] * 10 + ["a/2"] * 10) * 2 + [None]


@pytest.mark.parametrize(
    ("where", "files"),
    [
        ("year = 2013", 2),
        ("year = 2013 AND n > 5", 2),
        ("year = 2012 OR carrier = 'a/1'", 3),
        ("year = 2012 OR n > 5", 4),
        ("year IN (2012, 2015) AND carrier LIKE '%1'", 1),
        ("n > 5", 4),
    ],
)
def test_folders_that_where_rules_out_are_not_even_opened(tmp_path: Path, where: str, files: int) -> None:
    partitioned(tmp_path)
    data = DataSpec(source=str(tmp_path), where=where)
    wanted = {f.path for f in Source.open(data).files}
    everything, _, _ = blocks_of(DataSpec(source=str(tmp_path)))
    table = pa.concat_tables([block.table for block in everything])
    for path in {f.path for f in Source.open(DataSpec(source=str(tmp_path))).files} - wanted:
        Path(path).write_bytes(b"no Parquet at all")

    source = Source.open(data)
    blocks, _, _ = blocks_of(data)

    assert (len(source.files), source.num_pruned) == (files, 4 - files)
    assert pa.concat_tables([b.table for b in blocks]).to_pylist() == table.filter(Predicate(sql=where).mask(table)).to_pylist()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"where": "year = 1999"}, "data.where: 'year = 1999' leaves out each of the 4 files by its folder"),
        ({"where": "year = = 1"}, "data.where: 'year = = 1' is not an SQL expression"),
        ({"where": "year = 'x'"}, "data.where: "),
        ({"where": "yaer = 2012"}, "did you mean 'year'"),
    ],
)
def test_wrong_predicates_on_folders_are_one_sentence(tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    partitioned(tmp_path)
    with pytest.raises((DataError, SpecError), match=message) as caught:
        blocks_of(DataSpec(source=str(tmp_path), **spec))
    assert "\n" not in str(caught.value)


def test_only_folder_columns_can_be_asked_for(tmp_path: Path) -> None:
    blocks, counts, _ = blocks_of(DataSpec(source=str(partitioned(tmp_path))), {"year"}, None)
    assert [block.table["year"].to_pylist() for block in blocks] == [[2012] * 10] * 2 + [[2013] * 10] * 2 and counts.rows == 40
