"""What stands beside the features and the target of a row: its weight."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipelines.data.source import Unit
from pipelines.errors import DataError
from pipelines.schema import Column, numbers

Weights = np.ndarray[Any, np.dtype[np.float64]]

LARGEST: Final = float(np.finfo(np.float32).max)
"""LightGBM keeps weights as float32."""


def check_weight(column: Column) -> None:
    """Raise `DataError` for a column that cannot have weights."""
    if column.type not in ("int64", "float64"):
        raise DataError(
            f"task.weight: '{column.name}' is a column of type {column.type}, expected numbers; derive one under data.derive"
        )


def weights_of(table: pa.Table, name: str, unit: Unit) -> Weights:
    """The weights of canonical rows; raises `DataError` where one is missing, negative or infinite."""
    found = numbers(table[name])
    if len(found) and not (found.min() >= 0 and found.max() <= LARGEST):  # also where it is NaN
        for wrong, what in ((np.isnan(found), "missing"), (found < 0, "negative"), (found > LARGEST, "infinite or too large")):
            if wrong.any():
                raise DataError(
                    f"task.weight: '{name}' is {what} in {wrong.sum()} of {len(found)} rows of {unit.file.path}, expected "
                    "numbers of 0 and above; drop these rows with data.where, or derive a column that says what they weigh under data.derive"
                )
    return found
