"""What a prediction may be asked with: rows and frames checked against the Schema and brought to canonical values.

Rows (HTTP, lists of dicts) are checked strictly and one by one, so that an error names row and column. Frames are cast column by
column; a null is a missing value there, as it is in batch prediction.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from functools import cached_property
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipelines.errors import InputError
from pipelines.parsing import TextForm, parse
from pipelines.schema import ARROW, Schema, Type, cast
from pipelines.storage import one_line

MISSING: Final = object()
EPOCH: Final = datetime(1970, 1, 1)
WORDS: Final[dict[Type, str]] = {
    "int64": "integer",
    "float64": "number",
    "bool": "boolean",
    "string": "string",
    "timestamp": "ISO 8601 timestamp such as 2013-01-31T15:00:00",
}


class Contract:
    """The checks of one Schema, made once."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._columns = [
            (column.name, _check(column.type, column.text), column.type, column.nullable) for column in schema.columns
        ]

    @cached_property
    def _names(self) -> set[str]:
        return set(self.schema.names)

    def check_rows(self, rows: list[Any]) -> list[dict[str, Any]]:
        """Return each row with exactly the Schema's columns: int, float, bool, str, timestamps as microseconds, or None.

        A missing optional column is None; other columns are ignored. Raises `InputError` with row, column, found, expected.
        """
        return [self._row(i, row) for i, row in enumerate(rows)]

    def _row(self, i: int, row: Any) -> dict[str, Any]:
        if not isinstance(row, Mapping):
            found = type(row).__name__
            raise InputError.at(
                f"row {i} is a {found}; expected an object with the columns as keys", row=i, found=found, expected="object"
            )
        result: dict[str, Any] = {}
        for name, check, expected, nullable in self._columns:
            value = row.get(name, MISSING)
            if value is None or value is MISSING:
                if not nullable:
                    raise _missing(i, name, expected, value)
                result[name] = None
                continue
            try:
                result[name] = check(value)
            except (ValueError, OverflowError, TypeError) as error:
                raise _wrong(i, name, expected, value) from error
        return result

    def ignored(self, rows: list[Any]) -> int:
        """How many values of the rows are of no column of the Schema."""
        names = self._names
        return sum(len(row.keys() - names) for row in rows if isinstance(row, Mapping))

    def to_table(self, rows: list[dict[str, Any]]) -> pa.Table:
        """Checked rows as one block."""
        arrays = {}
        for column in self.schema.columns:
            values = [row[column.name] for row in rows]
            as_integers = pa.int64() if column.type == "timestamp" else ARROW[column.type]
            arrays[column.name] = pa.array(values, as_integers).cast(ARROW[column.type])
        return pa.table(arrays)

    def frame_to_table(self, frame: Any) -> pa.Table:
        """The Schema's columns of a pandas, Polars or Arrow frame, as one canonical table."""
        found = _columns_of(frame)
        arrays = {}
        for column in self.schema.columns:
            if column.name not in found:
                if not column.nullable:
                    raise InputError.at(
                        f"column '{column.name}' is missing; expected {WORDS[column.type]}",
                        column=column.name,
                        expected=WORDS[column.type],
                    )
                arrays[column.name] = pa.chunked_array([pa.nulls(len(frame), ARROW[column.type])])
                continue
            values = _arrow(frame, column.name)
            try:
                arrays[column.name] = cast(values, column.type, text=column.text)
            except pa.ArrowInvalid as error:
                raise InputError.at(
                    f"column '{column.name}' is {values.type} ({one_line(error)}); expected {WORDS[column.type]}",
                    column=column.name,
                    found=str(values.type),
                    expected=WORDS[column.type],
                ) from error
        return pa.table(arrays)


def table_to_frame(table: pa.Table, *, like: Any) -> Any:
    """The answers in the kind of frame that was asked with; a pandas index is kept."""
    kind = type(like).__module__.partition(".")[0]
    if kind == "pandas":
        return table.to_pandas().set_index(like.index)
    if kind == "polars":
        import polars as pl

        return pl.from_arrow(table)
    return table


def _columns_of(frame: Any) -> set[str]:
    kind = type(frame).__module__.partition(".")[0]
    if kind in ("pandas", "polars"):
        return set(frame.columns)
    if isinstance(frame, pa.Table | pa.RecordBatch):
        return set(frame.schema.names)
    raise InputError(f"{type(frame).__name__} is no table; expected a pandas, Polars or Arrow frame, or a list of dicts")


def _arrow(frame: Any, name: str) -> pa.ChunkedArray:
    values = frame[name]
    if type(frame).__module__.startswith("pandas"):
        try:
            values = pa.array(values, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError.at(f"column '{name}' mixes types: {one_line(error)}; write it as one type", column=name) from error
    elif type(frame).__module__.startswith("polars"):
        values = values.to_arrow()
    return values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])


def _missing(row: int, name: str, type: Type, value: object) -> InputError:
    what = "is missing" if value is MISSING else "is null"
    message = f"row {row}: column '{name}' {what}; expected {WORDS[type]}, for it was never missing in the training data"
    return InputError.at(message, row=row, column=name, found=None, expected=WORDS[type])


def _wrong(row: int, name: str, type: Type, value: object) -> InputError:
    shown = value if isinstance(value, bool | str) or (isinstance(value, int | float) and abs(value) < 1e300) else _written(value)
    if isinstance(shown, str) and len(shown) > 80:
        shown = shown[:77] + "..."
    return InputError.at(
        f"row {row}: column '{name}' is {shown!r}; expected {WORDS[type]}",
        row=row,
        column=name,
        found=shown,
        expected=WORDS[type],
    )


def _written(value: object) -> str:
    """As text; of lists and objects the beginning alone, for they may be as large as a body and nested deeper than `str` goes."""
    return reprlib.repr(value) if isinstance(value, list | Mapping) else str(value)


def _check(type: Type, text: TextForm | None) -> Callable[[Any], Any]:
    """The check of a column; where training parsed texts, a row may have them too, and is parsed by the same function."""
    native = CHECKS[type]
    if text is None:
        return native

    def check(value: Any) -> Any:
        if isinstance(value, str):
            try:
                parsed = parse(pa.chunked_array([[_string(value)]]), text, ARROW[type])
            except pa.ArrowInvalid:
                return native(value)  # an instant may also be in ISO 8601
            return (parsed.cast(pa.int64()) if type == "timestamp" else parsed)[0].as_py()
        return native(value)

    return check


def _integer(value: object) -> int:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int and -(2**63) <= value < 2**63:
        return int(value)
    raise ValueError


def _number(value: Any) -> float | None:
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is int:
        return float(value)
    if type(value) is not float:
        raise ValueError
    return None if math.isnan(value) else value


def _boolean(value: Any) -> bool:
    if isinstance(value, np.bool_):
        return bool(value)
    if type(value) is not bool:
        raise ValueError
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    value.encode()  # half a surrogate pair, which JSON can hold, is no text; its UnicodeEncodeError is a ValueError
    return str(value)


def _timestamp(value: Any) -> int:
    """Microseconds since 1970 in UTC; a time without a zone is UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if not isinstance(value, datetime):
        raise ValueError
    if value.tzinfo is not None:
        value = value.astimezone(UTC).replace(tzinfo=None)
    since = value - EPOCH
    return int((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds)


CHECKS: Final[dict[Type, Callable[[Any], Any]]] = {
    "int64": _integer,
    "float64": _number,
    "bool": _boolean,
    "string": _string,
    "timestamp": _timestamp,
}
