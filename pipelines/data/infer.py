"""What columns a source has: types and kinds from a fixed sample, the first rows of its first, middle and last file.

After this the Schema is fixed: a later value that contradicts it is an error (`data.on_error`).
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipelines.data.files import File, explained
from pipelines.data.source import Source
from pipelines.errors import DataError, SpecError, did_you_mean
from pipelines.expressions import Derivation, Predicate
from pipelines.schema import KIND_OF_TYPE, Column, Schema, Type, canonical_type
from pipelines.spec import DataSpec, Kind

SAMPLE_ROWS = 4096
TEXT_MEAN_LENGTH = 24  # words, not codes: longer on average than this, with spaces, and nearly all different
KINDS_OF_TYPE: dict[Type, tuple[Kind, ...]] = {
    "int64": ("numeric", "categorical", "boolean"),
    "float64": ("numeric", "categorical"),
    "bool": ("boolean", "categorical", "numeric"),
    "string": ("categorical", "text"),
    "timestamp": ("datetime", "categorical"),
}


Heads = list[tuple[File, pa.Table]]


def heads_of(source: Source) -> Heads:
    """The fixed sample: the first rows of the first, the middle and the last file."""
    return [(file, _head(source, file)) for file in _probes(source.files)]


def infer_schema(source: Source, data: DataSpec, heads: Heads | None = None) -> Schema:
    """Return the columns as the files have them; raises `DataError` where files disagree in a way that no type can hold."""
    heads = heads_of(source) if heads is None else heads
    if not heads[0][1].column_names and not source.partitions:
        raise DataError(f"{heads[0][0].path}: has no columns; expected a header or a schema")
    names = list(dict.fromkeys(name for _, head in heads for name in head.column_names))
    columns = [column for name in names if (column := _column(name, heads, data)) is not None and name not in source.partitions]
    folders = [Column(name=name, type=type, kind=KIND_OF_TYPE[type]) for name, type in source.partitions.items()]
    raw = Schema(columns=[*columns, *folders])
    known = set(raw.names) | set(data.derive)
    for where, found in (("data.kinds", list(data.kinds)), ("data.key", data.key)):
        for name in found:
            if name not in known:
                raise SpecError(f"{where}: there is no column '{name}'{did_you_mean(name, known)}")
    if data.where:
        Predicate(sql=data.where).verify(Derivation(expressions=data.derive).extend(raw))
    return raw


def with_kinds(schema: Schema, data: DataSpec) -> Schema:
    """Return the Schema, derived columns included, with the kinds that `data.kinds` gives."""
    columns = [_with_kind(column, data.kinds.get(column.name)) for column in schema.columns]
    return Schema(columns=columns, derive=schema.derive)


def _with_kind(column: Column, kind: Kind | None) -> Column:
    if kind is None or kind == column.kind:
        return column
    allowed = KINDS_OF_TYPE[column.type]
    if kind not in allowed:
        raise SpecError(f"data.kinds.{column.name}: {kind} does not go with {column.type}; expected one of {', '.join(allowed)}")
    return column.model_copy(update={"kind": kind})


def _probes(files: list[File]) -> list[File]:
    return [files[i] for i in sorted({0, len(files) // 2, len(files) - 1})]


def _head(source: Source, file: File) -> pa.Table:
    with explained(file):
        return source.format.head(file, SAMPLE_ROWS)


def _column(name: str, heads: list[tuple[File, pa.Table]], data: DataSpec) -> Column | None:
    """The column, or None where no table can hold it (lists, structs, binary): such a column is not seen at all."""
    found: dict[Type, File] = {}
    for file, head in heads:
        if name in head.column_names and not pa.types.is_null(head.schema.field(name).type):
            type = canonical_type(head.schema.field(name).type)
            if type is None:
                return None
            found.setdefault(type, file)
    if not found:
        return Column(name=name, type="string", kind="categorical")  # null in every probe
    type = _common_type(name, found, data)
    values = [head[name] for _, head in heads if name in head.column_names]
    return Column(name=name, type=type, kind=_kind(type, values))


def _common_type(name: str, found: dict[Type, File], data: DataSpec) -> Type:
    types = set(found)
    if len(types) == 1:
        return next(iter(types))
    if types == {"int64", "float64"}:
        return "float64"
    if data.on_error == "null":
        return next(iter(found))  # the first file's type; what does not fit becomes null
    listed = ", ".join(f"{type} in {file.path}" for type, file in found.items())
    raise DataError(
        f"data.source: column '{name}' differs between files: {listed}; write the files alike, or set data.on_error: null"
    )


def _kind(type: Type, values: list[pa.ChunkedArray]) -> Kind:
    if type != "string":
        return KIND_OF_TYPE[type]
    texts = [value for column in values for value in column.drop_null().to_pylist() if isinstance(value, str)]
    if not texts:
        return "categorical"
    spaced = np.mean([" " in text for text in texts])
    different = len(set(texts)) / len(texts)
    return (
        "text"
        if np.mean([len(text) for text in texts]) > TEXT_MEAN_LENGTH and spaced > 0.5 and different > 0.5
        else "categorical"
    )
