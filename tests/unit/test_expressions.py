"""SQL expressions: the same when training and when serving, and wrong ones refused before any work."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipelines.errors import SpecError
from pipelines.expressions import Derivation, Predicate
from pipelines.schema import Column, Schema

SCHEMA = Schema(
    columns=[
        Column(name="arr_delay", type="float64", kind="numeric"),
        Column(name="carrier", type="string", kind="categorical"),
        Column(name="when", type="timestamp", kind="datetime"),
    ]
)
TABLE = pa.table(
    {
        "arr_delay": [20.0, 3.0, None],
        "carrier": pa.array(["UA", None, "AA"], pa.large_string()),
        "when": pa.array([0, 1, None]).cast(pa.timestamp("us")),
    }
)


def test_derived_columns_have_types_and_may_use_each_other() -> None:
    derivation = Derivation(expressions={"late": "arr_delay > 15", "very": "late AND arr_delay > 18", "twice": "arr_delay * 2"})
    schema = derivation.extend(SCHEMA)
    assert [(column.name, column.type, column.kind) for column in schema.columns[3:]] == [
        ("late", "bool", "boolean"),
        ("very", "bool", "boolean"),
        ("twice", "float64", "numeric"),
    ]
    table = derivation.apply(TABLE)
    assert table["late"].to_pylist() == [True, False, None]
    assert table["very"].to_pylist() == [True, False, None]
    assert table["twice"].to_pylist() == [40.0, 6.0, None]


def test_only_what_is_needed_is_computed_and_read() -> None:
    derivation = Derivation(expressions={"late": "arr_delay > 15", "very": "late AND arr_delay > 18", "long": "length(carrier)"})
    assert derivation.needs({"very"}) == {"arr_delay"}
    assert derivation.needs({"carrier"}) == {"carrier"}
    assert list(derivation.select({"very"}).expressions) == ["late", "very"]


def test_where_counts_null_as_not_true() -> None:
    assert Predicate(sql="arr_delay > 5").mask(TABLE).to_pylist() == [True, False, False]
    assert Predicate(sql="arr_delay IS NULL OR carrier = 'UA'").mask(TABLE).to_pylist() == [True, False, True]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (
            "arr_dely > 15",
            r"data.derive.x: 'arr_dely > 15' uses the column 'arr_dely', which does not exist; did you mean 'arr_delay'\?",
        ),
        ("arr_delay >", "data.derive.x: 'arr_delay >' is not an SQL expression"),
        ("arr_delay + carrier", "data.derive.x: 'arr_delay \\+ carrier' cannot be evaluated"),
        ("avg(arr_delay)", "looks at more than one row"),
    ],
)
def test_a_wrong_expression_is_refused(sql: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Derivation(expressions={"x": sql}).extend(SCHEMA)


def test_a_predicate_must_be_a_boolean() -> None:
    with pytest.raises(SpecError, match="expected a boolean"):
        Predicate(sql="arr_delay + 1").verify(SCHEMA)
    with pytest.raises(SpecError, match="'foo', which does not exist"):
        Predicate(sql="foo > 1").verify(SCHEMA)
