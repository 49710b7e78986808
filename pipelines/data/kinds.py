"""What does each column mean? Kinds from the fixed sample, each with its reason, and which columns are no features.

`infer` says what the files have; this file reads more out of it: texts that are numbers or dates, integers that are flags or
codes, row numbers and identifiers. `data.kinds` wins over all of it. The target, the keys and what `where` and `derive` name keep
the type that the files give them: their values are labels, identities and parts of the user's own SQL.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.infer import Heads, heads_of, infer_schema
from pipelines.data.source import Source
from pipelines.expressions import Derivation, Predicate
from pipelines.parsing import TO_ISO, TextForm, is_blank, parse
from pipelines.schema import ARROW, Column, Schema, Type, cast
from pipelines.spec import DataSpec, Kind

MIN_ROWS: Final = 100
"""Below this, values that all differ say nothing: any small table has such columns."""
NEARLY_UNIQUE: Final = 0.99
"""Different values per row from which texts are identifiers: a category that hardly ever comes again teaches nothing."""
MANY: Final = 256
"""Categories from which the rare ones share a code: a tree would learn single rows by heart."""
CODE_NAMES: Final = frozenset({"id", "code", "zip", "zipcode", "postcode", "postal", "plz", "sku", "type", "category"})
"""Words in the name of a column of integers that are names, not quantities; values alone cannot tell counts from codes."""
ID_NAMES: Final = frozenset({"id", "uuid", "guid", "key", "index", "idx", "rowid", "instant"})
LEADING_ZERO: Final = r"^-?0[0-9]"
LONG: Final = r"^[0-9]{16,}$"
"""More digits than a float64 keeps apart."""
MOSTLY: Final = 0.9
"""Share of texts in one form from which the user hears how to read the others as missing."""
TYPES_OF_KIND: Final[dict[Kind | None, tuple[Type, ...]]] = {
    None: ("int64", "float64", "bool", "timestamp"),
    "numeric": ("int64", "float64"),
    "boolean": ("bool", "int64"),
    "datetime": ("timestamp",),
}
Times = npt.NDArray[np.int64]
DATES: Final[tuple[TextForm, ...]] = ("iso", *TO_ISO)


@dataclass(frozen=True)
class Inference:
    """The columns of the files with what was read out of the sample."""

    schema: Schema
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a column has its kind."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Columns that are no features unless the Spec names them, and why."""
    many: dict[str, str] = field(default_factory=dict)
    """Categorical columns with many categories, and how many."""


def infer_kinds(source: Source, data: DataSpec, target: str, beside: Sequence[str] = ()) -> Inference:
    """Read the first rows of three files and return what they say; raises as `infer_schema` does.

    `beside` are columns that are no features: as the target they stay what the files have.
    """
    heads = heads_of(source)
    found = Inference(infer_schema(source, data, heads))
    Derivation(expressions=data.derive).extend(found.schema)  # a mistake in it is told before we ask which columns it names
    fixed = _fixed(data)
    labels = {target, *beside}
    columns = [_infer(column, heads, data, labels, fixed, found) for column in found.schema.columns]
    for column in columns:
        found.reasons.setdefault(column.name, _TYPES[column.type] if column.kind != "text" else "long texts with spaces")
    return Inference(Schema(columns=columns), found.reasons, found.left_out, found.many)


def _infer(column: Column, heads: Heads, data: DataSpec, labels: set[str], fixed: set[str], found: Inference) -> Column:
    name, given = column.name, data.kinds.get(column.name)
    if name in labels or column.type not in ("string", "int64"):
        return column
    parts = [cast(head[name], column.type, lenient=True).drop_null() for _, head in heads if name in head.column_names]
    parts = [part for part in parts if len(part)]
    if not parts:
        return column
    sample = _Sample(name, parts)
    if column.type == "string" and not (given is None and name in fixed):
        column = _of_texts(column, sample, given, data.on_error == "null", found)
        if column.text:
            parsed = [parse(part, column.text, ARROW[column.type], lenient=True).drop_null() for part in parts]
            sample = _Sample(name, [part for part in parsed if len(part)])
    if column.type == "int64" and given is None:
        column = _of_integers(column, sample, found)
    if given is None and column.kind in ("categorical", "numeric"):
        unique = sample.is_identifier(column.type)
        if unique:
            found.left_out[name] = unique
        elif column.kind == "categorical" and sample.distinct > MANY:
            found.many[name] = f"{sample.distinct:,} categories in {sample.rows:,} rows"
    return column


@dataclass(frozen=True)
class _Sample:
    """The values of one column in the first rows of three files, without nulls; at least one."""

    name: str
    parts: list[pa.ChunkedArray]

    @property
    def rows(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def whole(self) -> pa.ChunkedArray:
        return pa.chunked_array([chunk for part in self.parts for chunk in part.chunks])

    @property
    def distinct(self) -> int:
        return int(pc.count_distinct(self.whole).as_py())

    @cached_property
    def texts(self) -> tuple[pa.Array, Times]:
        """The different texts that say something, and how often each stands there."""
        found = pc.value_counts(self.whole)
        found = found.filter(pc.invert(is_blank(found.field("values"))))
        return found.field("values"), found.field("counts").to_numpy()

    def written(self, form: TextForm, type: Type) -> float:
        """The share of the texts that have the form, of those that say something; 0 where none does."""
        texts, times = self.texts
        said = int(times.sum())
        if form != "boolean":  # most texts begin like no number and no date
            first = pc.match_substring_regex(pc.utf8_trim_whitespace(texts), r"^[-.0-9]").to_numpy(zero_copy_only=False)
            texts, times = texts.filter(pa.array(first)), times[first]
        if not said or not len(texts):
            return 0.0
        parsed = parse(pa.chunked_array([texts]), form, ARROW[type], lenient=True)
        return float(times[parsed.is_valid().to_numpy()].sum() / said)

    def is_named(self, words: frozenset[str]) -> bool:
        """Whether a word of the name is one of these; `storeId`, `store_id` and `STORE ID` have two."""
        spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", self.name)
        return not words.isdisjoint(re.split(r"[^a-z0-9]+", spaced.lower()))

    def is_identifier(self, type: Type) -> str | None:
        """Why the column is an identifier, if it is one."""
        if self.rows < MIN_ROWS:
            return None
        share = self.distinct / self.rows
        if type == "string":
            return f"{self.distinct:,} different texts in {self.rows:,} rows: an identifier" if share >= NEARLY_UNIQUE else None
        if type != "int64" or share < 1:
            return None
        if self.is_named(ID_NAMES):
            return f"an identifier by its name, different in each of {self.rows:,} rows"
        steps = [np.diff(part.to_numpy()) for part in self.parts]
        return "counts the rows" if all(len(step) and (step == 1).all() for step in steps) else None


def _of_texts(column: Column, sample: _Sample, given: Kind | None, lenient: bool, found: Inference) -> Column:
    """The column with the type that its texts are written as; where the Spec gives the kind, `lenient` lets some be no such."""
    if given in ("categorical", "text") or (given is None and column.kind == "text"):
        return column
    if given is None and (why := _is_code(sample)):
        found.reasons[column.name] = why
        return column
    for type in TYPES_OF_KIND[given]:
        forms = [form for form in _forms(type) if sample.written(form, type) == 1]
        if len(forms) > 1 and given is None:
            found.reasons[column.name] = f"dates, but {' and '.join(forms)} both fit; set data.kinds to take the first"
            return column
        if forms:
            found.reasons[column.name] = f"texts that are {_WORDS[type]}{f' ({forms[0]})' if type == 'timestamp' else ''}"
            return Column(name=column.name, type=type, kind=_KINDS[type], text=forms[0])
    share, form, type = max(
        ((sample.written(form, type), form, type) for type in ("float64", "bool", "timestamp") for form in _forms(type)),
        key=lambda fit: fit[0],
    )
    if share >= MOSTLY and given is None:
        remedy = f"data.kinds {_KINDS[type]} with on_error: null reads the others as missing"
        found.reasons[column.name] = f"texts; {share:.0%} of them are {_WORDS[type]}: {remedy}"
    if lenient and share and given == _KINDS[type]:
        return Column(name=column.name, type=type, kind=given, text=form)
    return column


def _is_code(sample: _Sample) -> str | None:
    """Why texts of digits stay texts."""
    texts, _ = sample.texts
    if sample.written("number", "float64") < 1:
        return None
    if pc.any(pc.match_substring_regex(texts, LEADING_ZERO)).as_py():
        return "digits with leading zeros: codes"
    if pc.any(pc.match_substring_regex(texts, LONG)).as_py():
        return "more digits than a number keeps apart: codes"
    return "codes by its name" if sample.is_named(CODE_NAMES) else None


def _of_integers(column: Column, sample: _Sample, found: Inference) -> Column:
    distinct = pc.unique(sample.whole)
    because = f"{found.reasons[column.name]}, " if column.name in found.reasons else ""
    if len(distinct) == 2 and set(distinct.to_pylist()) == {0, 1}:
        found.reasons[column.name] = f"{because}only 0 and 1"
        return column.model_copy(update={"kind": "boolean"})
    if sample.is_named(CODE_NAMES) and len(distinct) <= sample.rows / 2:
        found.reasons[column.name] = f"{because}integers that are codes by the name, {len(distinct):,} different"
        return column.model_copy(update={"kind": "categorical"})
    return column


def _forms(type: Type) -> tuple[TextForm, ...]:
    if type == "timestamp":
        return DATES
    return ("boolean",) if type == "bool" else ("number",)


def _fixed(data: DataSpec) -> set[str]:
    """The columns whose values the Spec itself speaks about, so that they stay what they are."""
    named = set(data.key) | Derivation(expressions=data.derive).needs(set(data.derive))
    return named | (Predicate(sql=data.where).columns if data.where else set())


_KINDS: Final[dict[Type, Kind]] = {"int64": "numeric", "float64": "numeric", "bool": "boolean", "timestamp": "datetime"}
_TYPES: Final[dict[Type, str]] = {
    "int64": "a column of integers",
    "float64": "a column of numbers",
    "bool": "a column of booleans",
    "string": "a column of texts",
    "timestamp": "a column of timestamps",
}
_WORDS: Final[dict[Type, str]] = {"int64": "integers", "float64": "numbers", "bool": "yes or no", "timestamp": "dates"}
