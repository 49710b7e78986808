"""SQL expressions over columns (`data.where`, `data.derive`), evaluated by Polars when training and when serving."""

from __future__ import annotations

from functools import cached_property

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from polars.exceptions import PolarsError

from pipelines.errors import SpecError, did_you_mean
from pipelines.schema import ARROW, KIND_OF_TYPE, Column, Schema, canonical_type, cast
from pipelines.spec import Frozen


class Derivation(Frozen):
    """New columns, each from the columns before it. Stored as the SQL text; evaluation is element by element."""

    expressions: dict[str, str]

    @cached_property
    def _compiled(self) -> dict[str, pl.Expr]:
        return {name: pl.sql_expr(sql).alias(name) for name, sql in self.expressions.items()}

    def needs(self, wanted: set[str]) -> set[str]:
        """The columns of the data that the wanted columns come from; those that are not derived stand for themselves."""
        needed = set(wanted)
        for name in reversed(list(self.expressions)):
            if name in needed:
                needed.remove(name)
                needed.update(self._compiled[name].meta.root_names())
        return needed

    def select(self, wanted: set[str]) -> Derivation:
        """Only the expressions that the wanted columns need."""
        needed = set(wanted)
        kept = []
        for name in reversed(list(self.expressions)):
            if name in needed:
                kept.append(name)
                needed.update(self._compiled[name].meta.root_names())
        return Derivation(expressions={name: self.expressions[name] for name in self.expressions if name in kept})

    def apply(self, table: pa.Table) -> pa.Table:
        """Return the table with the derived columns behind its own, in canonical types."""
        if not self.expressions:
            return table
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        for expression in self._compiled.values():
            frame = frame.with_columns(expression)
        for name in self.expressions:
            values = frame[name].to_arrow()
            kind = canonical_type(values.type)
            assert kind is not None, f"derive.{name} gave {values.type}, which extend() lets no expression do"
            table = _put(table, name, cast(pa.chunked_array([values]), kind))
        return table

    def extend(self, schema: Schema) -> Schema:
        """Return the Schema with the derived columns; raises `SpecError` for an expression that cannot be evaluated on it."""
        for name, sql in self.expressions.items():
            where = f"data.derive.{name}"
            check(sql, schema, where)
            value = _evaluated(sql, schema, where)
            kind = canonical_type(value.type)
            if kind is None:
                raise SpecError(f"{where}: '{sql}' gives {value.type}; expected a number, boolean, text or timestamp")
            column = Column(name=name, type=kind, kind=KIND_OF_TYPE[kind])
            schema = Schema(columns=[c for c in schema.columns if c.name != name] + [column], derive=self.expressions)
        return schema


class Predicate(Frozen):
    """Which rows count. Stored as the SQL text."""

    sql: str

    @cached_property
    def _compiled(self) -> pl.Expr:
        return pl.sql_expr(self.sql).alias("where")

    @property
    def columns(self) -> set[str]:
        return set(self._compiled.meta.root_names())

    def mask(self, table: pa.Table) -> pa.ChunkedArray:
        """True where the predicate is true; null counts as not true."""
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        return pc.fill_null(frame.select(self._compiled.fill_null(False)).to_arrow().column(0), False)

    def verify(self, schema: Schema) -> None:
        """Raise `SpecError` unless the predicate can be evaluated on the Schema and gives a boolean."""
        check(self.sql, schema, "data.where")
        found = _evaluated(self.sql, schema, "data.where").type
        if not pa.types.is_boolean(found):
            raise SpecError(f"data.where: '{self.sql}' gives {found}; expected a boolean, such as \"distance > 100\"")


def check(sql: str, schema: Schema, where: str) -> None:
    """Raise `SpecError` when the text is no SQL expression or names a column that is not there."""
    try:
        names = pl.sql_expr(sql).meta.root_names()
    except PolarsError as error:
        raise SpecError(f"{where}: '{sql}' is not an SQL expression: {_first_line(error)}") from error
    for name in names:
        if name not in schema:
            raise SpecError(f"{where}: '{sql}' uses the column '{name}', which does not exist{did_you_mean(name, schema.names)}")


def _nulls(schema: Schema) -> pl.DataFrame:
    """Three rows of nothing: enough to see types, and whether an expression keeps rows apart."""
    frame = pl.from_arrow(pa.table({column.name: pa.nulls(3, ARROW[column.type]) for column in schema.columns}))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _evaluated(sql: str, schema: Schema, where: str) -> pa.Array:
    expression = pl.sql_expr(sql)
    try:
        values = _nulls(schema).select(expression.alias("it"))["it"]
    except PolarsError as error:
        raise SpecError(f"{where}: '{sql}' cannot be evaluated: {_first_line(error)}") from error
    if (expression.meta.root_names() and len(values) != 3) or ".over(" in str(expression):
        raise SpecError(f"{where}: '{sql}' looks at more than one row; expected an expression of one row's columns")
    return values.to_arrow()


def _put(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    """Append a column, or replace the one of that name."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
