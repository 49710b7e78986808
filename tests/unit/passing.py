"""Fitting a Preprocessor to a table as `prepare` does, pass by pass and block by block, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.features.passes import Key, of_pass, passes
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.stats import Numbers, NumberStatistics, Statistics, StringStatistics
from pipelines.features.transform import TEXT, Rows, State
from pipelines.schema import Column, numbers, texts
from pipelines.spec import FeaturesSpec, TaskSpec
from pipelines.tasks import Task

TARGET = "target"


def table_of(columns: Sequence[Column], target: pa.Array, **values: Any) -> pa.Table:
    """A canonical table; NaN in a list of numbers stays NaN."""
    from pipelines.schema import ARROW

    return pa.table({column.name: pa.array(values[column.name], ARROW[column.type]) for column in columns} | {TARGET: target})


def statistics_of(table: pa.Table, column: Column) -> Statistics:
    if column.kind in TEXT:
        values = texts(table[column.name])
        return replace(StringStatistics.of(values), sample=values)
    sample = numbers(table[column.name])
    return replace(NumberStatistics.of(sample), sample=sample)


def task_of(table: pa.Table) -> Task:
    values = table[TARGET]
    counts = {entry["values"]: entry["counts"] for entry in values.value_counts().to_pylist()}
    type = {"double": "float64", "large_string": "string"}.get(str(values.type), str(values.type))
    column = Column(name=TARGET, type=type, kind="categorical" if type == "string" else "numeric")  # type: ignore[arg-type]
    return Task.fit(TaskSpec(target=TARGET), column, counts if len(counts) <= 1000 else None, len(table))


def fit(
    table: pa.Table,
    columns: Sequence[Column],
    features: FeaturesSpec,
    *,
    places: Numbers | None = None,
    blocks: int = 3,
) -> Preprocessor:
    """Fit to train rows that come in blocks."""
    chains = Preprocessor.plan(columns, features, {}, {TARGET})
    places = np.linspace(0.0, 1.0, len(table), endpoint=False) if places is None else places
    statistics = {column.name: statistics_of(table, column) for column in columns}
    states: dict[Key, State] = {}
    found = Preprocessor.unfitted(columns, chains, features.groups)
    for number in range(1, len(passes(chains, features.groups)) + 2):
        if number > 1:
            some, grouped = of_pass(number, chains, features.groups)
            found = Preprocessor.fit(columns, some, statistics, groups=grouped, states=states, task=task_of(table), places=places)
            assert found.wanted, "this pass has something to gather"
        for rows in np.array_split(np.arange(len(table)), blocks):
            block = table.take(pa.array(rows))
            for key, state in found.gather(block, Rows(places[rows], block[TARGET])).items():
                states[key] = states[key].merge(state) if key in states else state
    found = Preprocessor.fit(
        columns, chains, statistics, groups=features.groups, states=states, task=task_of(table), places=places
    )
    assert not found.wanted, "as many passes as announced are enough"
    return found
