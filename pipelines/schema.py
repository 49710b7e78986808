"""What columns there are, and in which one form their values travel.

Whatever a file calls its types, a column is one of five here; every block that leaves the reader, every frame given to an
Artifact and every row of a request is brought into this form by the functions below, so that all that follows sees one thing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import numpy as np
import pyarrow as pa

from pipelines.errors import DataError, did_you_mean
from pipelines.parsing import TextForm, parse
from pipelines.spec import Frozen, Kind

Type = Literal["int64", "float64", "bool", "string", "timestamp"]

ARROW: dict[Type, pa.DataType] = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "string": pa.large_string(),
    "timestamp": pa.timestamp("us"),  # UTC
}

ENCODED_TEXTS: Final = pa.dictionary(pa.int32(), pa.string())
"""How a reader may hand on a column of texts: each different one once and no null among them (`encoded`)."""

KIND_OF_TYPE: dict[Type, Kind] = {
    "int64": "numeric",
    "float64": "numeric",
    "bool": "boolean",
    "string": "categorical",
    "timestamp": "datetime",
}


class Column(Frozen):
    """One column of the data."""

    name: str
    type: Type
    kind: Kind
    nullable: bool = True
    """Whether a value may be missing; a column that was never null when training is required in a request."""
    text: TextForm | None = None
    """How the values are written where the data has them as texts; a column of another type is then parsed."""


class Schema(Frozen):
    """The columns of the data, in order, and the SQL expressions of those that are derived from them."""

    columns: list[Column]
    derive: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(column.name == name for column in self.columns)

    def require(self, name: str, where: str) -> Column:
        """Return the column, or raise `DataError` that says where the unknown name stands."""
        if name not in self:
            raise DataError(f"{where}: there is no column '{name}'{did_you_mean(name, self.names)}")
        return self[name]

    def select(self, names: Iterable[str]) -> Schema:
        """The named columns, in the order of this Schema."""
        wanted = set(names)
        return Schema(columns=[column for column in self.columns if column.name in wanted], derive=self.derive)


def canonical_type(arrow: pa.DataType) -> Type | None:
    """Return the type that stands for an Arrow type, or None for one that has no place in a table (lists, structs, binary)."""
    if pa.types.is_dictionary(arrow):
        return canonical_type(arrow.value_type)
    if pa.types.is_boolean(arrow):
        return "bool"
    if pa.types.is_integer(arrow):
        return "int64"
    if pa.types.is_floating(arrow) or pa.types.is_decimal(arrow):
        return "float64"
    if pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow) or pa.types.is_null(arrow):
        return "string"
    if pa.types.is_timestamp(arrow) or pa.types.is_date(arrow):
        return "timestamp"
    return None


def cast(values: pa.ChunkedArray, to: Type, *, lenient: bool = False, text: TextForm | None = None) -> pa.ChunkedArray:
    """Bring values into the canonical form of a type, losing nothing; texts are parsed where `text` says how they are written.

    Raises `pyarrow.ArrowInvalid` where a value does not fit; with `lenient` such a value becomes null.
    """
    target = ARROW[to]
    if values.type == target:
        return values
    if pa.types.is_dictionary(values.type):
        values = pa.chunked_array([chunk.dictionary_decode() for chunk in values.chunks], values.type.value_type)
    if text is not None and canonical_type(values.type) == "string":
        return parse(values, text, target, lenient=lenient)
    if pa.types.is_timestamp(values.type) and to == "timestamp":
        # A zone says how to print an instant; the instant itself is UTC. Sub-microsecond digits are cut off.
        return values.cast(pa.timestamp("us", values.type.tz), safe=False).cast(target)
    if pa.types.is_floating(values.type) and to == "int64" and not lenient:
        return values.cast(target)  # Arrow refuses fractions
    if values.type == target or not lenient:
        return _strict(values, target)
    return _lenient(values, target)


def _strict(values: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_null(values.type) or _widens(values.type, target):
        return values.cast(target)
    raise pa.ArrowInvalid(f"{values.type} is not {target}")


def _widens(found: pa.DataType, target: pa.DataType) -> bool:
    """Whether each value of one type has one and the same meaning in the other; text is never guessed into numbers here."""
    if pa.types.is_integer(found) or pa.types.is_decimal(found):
        return bool(pa.types.is_integer(target) or pa.types.is_floating(target))
    if pa.types.is_floating(found):
        return bool(pa.types.is_floating(target))
    if pa.types.is_date(found):
        return bool(pa.types.is_timestamp(target))
    return bool(
        (pa.types.is_string(found) or pa.types.is_string_view(found) or pa.types.is_large_string(found))
        and pa.types.is_large_string(target)
    )


def _lenient(values: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    import polars as pl

    dtype = {pa.int64(): pl.Int64, pa.float64(): pl.Float64, pa.bool_(): pl.Boolean, pa.large_string(): pl.String}
    series = pl.Series(values.cast(pa.large_string()) if pa.types.is_string_view(values.type) else values)
    if pa.types.is_timestamp(target):
        parsed = (
            series.str.to_datetime(strict=False, time_unit="us")
            if series.dtype == pl.String
            else series.is_null().replace_strict([True, False], [None, None], return_dtype=pl.Datetime("us"))
        )
    elif target == pa.bool_() and series.dtype == pl.String:
        parsed = series.str.to_lowercase().replace_strict(["true", "false"], [True, False], default=None, return_dtype=pl.Boolean)
    else:
        parsed = series.cast(dtype[target], strict=False)
    return pa.chunked_array([parsed.to_arrow().cast(target)])


def category_text(value: object) -> str:
    """The text of a value of a categorical column that is no string in the data: `7`, `true`, `0.5`, `2013-01-31T15:00:00`.

    Blocks map their distinct values through it and rows their one value, so both give the same text.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))  # an int column that became float by a null keeps its categories
    return repr(value) if isinstance(value, float) else str(value)


def texts(values: pa.ChunkedArray) -> pa.Array:
    """The values of a categorical column as `large_string`; anything but text goes through `category_text`."""
    if values.type == pa.large_string():
        return values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
    found = encoded(values)
    return found.dictionary.cast(pa.large_string()).take(found.indices)


def encoded(values: pa.ChunkedArray) -> pa.DictionaryArray:
    """The same with each different text once, as int32 indices of a string or large_string dictionary.

    Null is missing; the dictionary has no null, and may have texts that no value has.
    """
    parts = encoded_parts(values)
    return parts[0] if len(parts) == 1 else pa.chunked_array(parts, parts[0].type if parts else ENCODED_TEXTS).combine_chunks()


def encoded_parts(values: pa.ChunkedArray) -> list[pa.DictionaryArray]:
    """The same in parts, each with a dictionary of its own: to make one dictionary of several takes time."""
    if pa.types.is_dictionary(values.type):
        return [chunk if len(chunk.dictionary) <= len(chunk) else _encoded(chunk.dictionary_decode()) for chunk in values.chunks]
    if values.type == pa.large_string():
        return [_encoded(chunk) for chunk in values.chunks]
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.int64())
    found = _encoded(values.combine_chunks())
    distinct = [None if value is None or value != value else category_text(value) for value in found.dictionary.to_pylist()]
    again = _encoded(pa.array(distinct, pa.large_string()))  # 1 and 1.0 have one text, NaN has none
    return [pa.DictionaryArray.from_arrays(again.indices.take(found.indices), again.dictionary)]


def _encoded(values: pa.Array | pa.ChunkedArray) -> pa.DictionaryArray:
    found = values.dictionary_encode()
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def decoded(table: pa.Table) -> pa.Table:
    """The table with all texts written out."""
    for i, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(i, table.column_names[i], pa.chunked_array([texts(column)], pa.large_string()))
    return table


def numbers(values: pa.ChunkedArray) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A numeric, boolean or datetime column as float64: booleans 0 and 1, timestamps microseconds, NaN = missing."""
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.int64())
    elif pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    return np.asarray(values.to_numpy(zero_copy_only=False), np.float64)
