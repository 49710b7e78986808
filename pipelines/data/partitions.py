"""Hive-partitioned folders: `year=2013/month=1/part-0.parquet` has the columns year and month in its folders' names."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import replace
from typing import Final

import pyarrow as pa
from polars.exceptions import PolarsError

from pipelines.data.files import File
from pipelines.data.pushdown import decided_by
from pipelines.errors import DataError
from pipelines.expressions import Predicate
from pipelines.schema import ARROW, Type, cast
from pipelines.spec import DataSpec

NULL: Final = "__HIVE_DEFAULT_PARTITION__"
INTEGER: Final = re.compile(r"-?\d{1,18}")


def with_partition(file: File) -> File:
    """The file with the values that the folders below the source's root give to its rows."""
    pairs = [folder.partition("=") for folder in file.name.split("/")[:-1] if "=" in folder.strip("=")]
    values = {urllib.parse.unquote(key): urllib.parse.unquote(value) for key, _, value in pairs}
    return replace(file, partition={key: None if value in (NULL, "") else value for key, value in values.items()})


def partition_types(files: list[File]) -> dict[str, Type]:
    """The partition keys in the order of the folders: int64 where all values are integers, else string."""
    found: dict[str, list[str]] = {}
    for file in files:
        for key, value in file.partition.items():
            found.setdefault(key, []).extend([] if value is None else [value])
    return {key: "int64" if values and all(map(INTEGER.fullmatch, values)) else "string" for key, values in found.items()}


def constant(file: File, key: str, type: Type, rows: int, *, lenient: bool) -> pa.ChunkedArray:
    """The column that a folder's name gives to all rows of a file, in a canonical type."""
    text = file.partition[key]
    value = cast(pa.chunked_array([pa.array([text], pa.large_string())]), type, lenient=type != "string")[0]
    if text is not None and not value.is_valid and not lenient:
        raise DataError(f"{file.path}: the folder {key}={text} is no {type}; rename it, or set data.on_error: null")
    return pa.chunked_array([pa.repeat(value, rows)], ARROW[type])


def prune(files: list[File], types: dict[str, Type], data: DataSpec) -> list[File]:
    """The files whose folders do not rule them out by `data.where`; the others are not opened."""
    parts = decided_by(data.where, set(types) - set(data.derive))
    kept = [file for file in files if _may_match(file, types, parts)]
    if not kept:
        raise DataError(f"data.where: '{data.where}' leaves out each of the {len(files)} files by its folder; loosen it")
    return kept


def _may_match(file: File, types: dict[str, Type], parts: list[Predicate]) -> bool:
    parts = [part for part in parts if part.columns <= set(file.partition)]
    row = pa.table({key: constant(file, key, types[key], 1, lenient=True) for key in file.partition})
    try:
        return all(part.mask(row)[0].as_py() for part in parts)
    except PolarsError:
        return True  # the predicate is wrong, which its check on the whole Schema says better
