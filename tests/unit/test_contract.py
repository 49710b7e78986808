"""What a prediction may be asked with."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from pipelines.contract import Contract
from pipelines.errors import InputError
from pipelines.schema import Column, Schema

SCHEMA = Schema(
    columns=[
        Column(name="n", type="int64", kind="numeric", nullable=False),
        Column(name="x", type="float64", kind="numeric"),
        Column(name="b", type="bool", kind="boolean"),
        Column(name="s", type="string", kind="categorical"),
        Column(name="t", type="timestamp", kind="datetime"),
    ]
)
ROW = {"n": 3, "x": 1.5, "b": True, "s": "UA", "t": "2013-01-31T15:00:00"}
MICROSECONDS = 1359644400_000_000


def test_a_good_row_becomes_canonical_values() -> None:
    assert Contract(SCHEMA).check_rows([ROW]) == [{"n": 3, "x": 1.5, "b": True, "s": "UA", "t": MICROSECONDS}]


def test_what_is_optional_may_be_missing_and_more_is_ignored() -> None:
    assert Contract(SCHEMA).check_rows([{"n": 3, "s": None, "other": 1}]) == [
        {"n": 3, "x": None, "b": None, "s": None, "t": None}
    ]


@pytest.mark.parametrize(
    ("value", "microseconds"),
    [
        ("2013-01-31", 1359590400_000_000),
        ("2013-01-31T15:00:00Z", MICROSECONDS),
        ("2013-01-31T10:00:00-05:00", MICROSECONDS),
        ("2013-01-31 15:00:00.000001", MICROSECONDS + 1),
        (datetime.datetime(2013, 1, 31, 15), MICROSECONDS),
        (pd.Timestamp("2013-01-31T15:00:00"), MICROSECONDS),
        ("1969-12-31T23:59:59.999999", -1),
    ],
)
def test_timestamps_in_their_forms(value: object, microseconds: int) -> None:
    assert Contract(SCHEMA).check_rows([{"n": 1, "t": value}])[0]["t"] == microseconds


@pytest.mark.parametrize(
    ("change", "column", "found", "expected"),
    [
        ({"n": None}, "n", None, "integer"),
        ({"n": "3"}, "n", "3", "integer"),
        ({"n": 3.5}, "n", 3.5, "integer"),
        ({"n": True}, "n", True, "integer"),
        ({"n": 2**63}, "n", 2**63, "integer"),
        ({"x": "1.5"}, "x", "1.5", "number"),
        ({"x": False}, "x", False, "number"),
        ({"x": 10**400}, "x", str(10**400)[:77] + "...", "number"),
        ({"b": 1}, "b", 1, "boolean"),
        ({"s": 7}, "s", 7, "string"),
        ({"s": ["UA"]}, "s", "['UA']", "string"),
        ({"s": "\ud800"}, "s", "\ud800", "string"),
        ({"t": "yesterday"}, "t", "yesterday", "ISO 8601"),
        ({"t": 5}, "t", 5, "ISO 8601"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, object], column: str, found: object, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        Contract(SCHEMA).check_rows([ROW, {**ROW, **change}])
    assert (caught.value.row, caught.value.column, caught.value.found) == (1, column, found)
    assert expected in str(caught.value.expected) and "row 1" in str(caught.value)


def test_a_row_that_is_no_object_is_named() -> None:
    with pytest.raises(InputError, match="row 0 is a list; expected an object"):
        Contract(SCHEMA).check_rows([[1, 2]])


def test_a_missing_required_column_is_named() -> None:
    with pytest.raises(InputError, match="column 'n' is missing"):
        Contract(SCHEMA).check_rows([{"x": 1.0}])


def test_an_integral_float_is_an_integer_and_nan_is_missing() -> None:
    row = Contract(SCHEMA).check_rows([{"n": 3.0, "x": float("nan")}])[0]
    assert row["n"] == 3 and isinstance(row["n"], int) and row["x"] is None


EXPECTED = pa.table(
    {
        "n": pa.array([3, 4]),
        "x": pa.array([1.5, None]),
        "b": pa.array([True, None]),
        "s": pa.array(["UA", None], pa.large_string()),
        "t": pa.array([MICROSECONDS, None]).cast(pa.timestamp("us")),
    }
)


def test_frames_of_all_kinds_become_the_same_table() -> None:
    contract = Contract(SCHEMA)
    arrow = pa.table(EXPECTED.to_pydict())
    assert contract.frame_to_table(arrow).equals(EXPECTED)
    assert contract.frame_to_table(pl.from_arrow(arrow)).equals(EXPECTED)
    assert contract.frame_to_table(arrow.to_pandas()).equals(EXPECTED)
    assert contract.frame_to_table(arrow.to_pandas(types_mapper=pd.ArrowDtype)).equals(EXPECTED)
    assert contract.to_table(contract.check_rows(EXPECTED.to_pylist())).equals(EXPECTED)


def test_a_frame_with_a_wrong_column_is_refused() -> None:
    with pytest.raises(InputError, match="column 'n' is string.*expected integer"):
        Contract(SCHEMA).frame_to_table(pa.table({"n": ["a"]}))
    with pytest.raises(InputError, match="column 'n' is missing"):
        Contract(SCHEMA).frame_to_table(pd.DataFrame({"x": [1.0]}))
    with pytest.raises(InputError, match="is no table"):
        Contract(SCHEMA).frame_to_table(np.zeros(3))
