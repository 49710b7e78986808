"""What stands beside the features and the target of a row: its weight, its query, and the raw score that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipelines.data.source import Unit
from pipelines.data.split import Hashes, identity_of_values
from pipelines.errors import DataError
from pipelines.schema import Column, numbers

Numbers = np.ndarray[Any, np.dtype[np.float64]]

LARGEST: Final = float(np.finfo(np.float32).max)
"""LightGBM keeps weights as float32."""


def check_numeric(field: str, column: Column) -> None:
    """Raise `DataError` for a column that cannot have what the field of the task says: weights, or scores."""
    if column.type not in ("int64", "float64"):
        raise DataError(
            f"task.{field}: '{column.name}' is a column of type {column.type}, expected numbers; derive one under data.derive"
        )


def check_beside(table: pa.Table, beside: Mapping[str, str], unit: Unit) -> None:
    """Raise `DataError` where something beside canonical rows is wrong; `beside` has the columns by field of the task."""
    if "weight" in beside:
        weights_of(table, beside["weight"], unit)
    if "group" in beside and table[beside["group"]].null_count:
        groups_of(table, beside["group"], unit)
    if "init_score" in beside:
        init_scores_of(table, beside["init_score"], unit)


def groups_of(table: pa.Table, name: str, unit: Unit) -> Hashes:
    """A number for the query of each of the rows; raises `DataError` where one has no query."""
    found = table[name]
    if found.null_count:
        raise DataError(
            f"task.group: '{name}' is missing in {found.null_count} of {len(found)} rows of {unit.file.path}, expected the query "
            "of each row; drop these rows with data.where"
        )
    return identity_of_values([found])


def weights_of(table: pa.Table, name: str, unit: Unit) -> Numbers:
    """The weights of canonical rows; raises `DataError` where one is missing, negative or infinite."""
    found = numbers(table[name])
    if len(found) and not (found.min() >= 0 and found.max() <= LARGEST):  # also where it is NaN
        for wrong, what in ((np.isnan(found), "missing"), (found < 0, "negative"), (found > LARGEST, "infinite or too large")):
            if wrong.any():
                raise DataError(
                    f"task.weight: '{name}' is {what} in {wrong.sum()} of {len(found)} rows of {unit.file.path}, expected "
                    "numbers of 0 and above; drop these rows with data.where, or derive a column of weights under data.derive"
                )
    return found


def init_scores_of(table: pa.Table, name: str, unit: Unit) -> Numbers:
    """The raw scores that canonical rows start from; raises `DataError` where one is missing or infinite."""
    found = numbers(table[name])
    for wrong, what in ((np.isnan(found), "missing"), (np.isinf(found), "infinite")):
        if wrong.any():
            raise DataError(
                f"task.init_score: '{name}' is {what} in {wrong.sum()} of {len(found)} rows of {unit.file.path}, expected the "
                "raw score that each row starts from; drop these rows with data.where, or derive such a column under data.derive"
            )
    return found
