"""All fitted steps of all columns: from raw columns to the matrix a model sees, for a block or for one row.

It is a straight-line program over slots. The first slots are the raw columns; each step reads some slots and appends its outputs
as new ones; each feature is one slot in the end. Chains, chains side by side and steps over several columns are all this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa

from pipelines.errors import DataError
from pipelines.features.chains import PlannedStep, parsed, plan, transform_class
from pipelines.features.stats import Numbers, Statistics
from pipelines.features.transform import TEXT, Feature, Transform, Value, Values
from pipelines.schema import Column, category_text, numbers, texts
from pipelines.spec import Chain

WHERE: Final = "preprocessor.json: step"
STRIPE: Final = 4096
"""Rows of a matrix that are filled at a time, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class FittedStep:
    """One step of the program."""

    name: str
    """As in the Spec."""
    reads: list[int]
    transform: Transform


@dataclass(frozen=True)
class Preprocessor:
    """Fitted transforms, applied to columns or to one row with equal bits."""

    inputs: list[Column]
    """The raw columns that it reads."""
    steps: list[FittedStep]
    features: list[Feature]
    """What it makes: numeric, or categorical codes."""
    slots: list[int]
    """Where the program leaves each feature."""

    plan = staticmethod(plan)

    @classmethod
    def fit(cls, columns: Sequence[Column], chains: Mapping[str, Chain], statistics: Mapping[str, Statistics]) -> Self:
        """Fit the planned chains to the statistics of the train split, which carry the row sample."""
        inputs = [column for column in columns if column.name in chains]
        fitting = _Fitting([(Feature(name=column.name, kind=column.kind), statistics[column.name]) for column in inputs])
        ends: list[tuple[int, str]] = []
        for slot, column in enumerate(inputs):
            for branch in parsed(chains[column.name], ("features", "columns", column.name)):
                ends += fitting.run(branch, slot, column.name)
        made = [(fitting.slots[slot][0], step) for slot, step in ends]
        return cls(inputs, fitting.steps, _named(made), [slot for slot, _ in ends])

    def transform(self, table: pa.Table) -> list[Numbers]:
        """Return one float64 array per feature; `table` is canonical and may have more columns. The arrays may be read-only."""
        slots: list[Values] = [_block_of(column, table.column(column.name)) for column in self.inputs]
        with np.errstate(all="ignore"):
            for step in self.steps:
                slots += step.transform.block(*[slots[read] for read in step.reads])
        return [slots[slot] for slot in self.slots]

    def matrix(self, table: pa.Table) -> Numbers:
        """Return the features as (rows, features), C order."""
        columns = self.transform(table)
        matrix = np.empty((table.num_rows, len(columns)), np.float64)
        for start in range(0, table.num_rows, STRIPE):
            for i, column in enumerate(columns):
                matrix[start : start + STRIPE, i] = column[start : start + STRIPE]
        return matrix

    def transform_row(self, row: Mapping[str, Any]) -> list[float]:
        """Return the features of one row of canonical Python values, timestamps as int microseconds; absent is missing."""
        values: list[Any] = [read(row.get(name)) for name, read in self._readers]
        for apply, reads in self._program:
            values += apply(*[values[read] for read in reads])
        return [values[slot] for slot in self.slots]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, from which `from_json` makes the same bits."""
        return {
            # How a file writes a value is of no account here: the same table as text and typed gives the same bits.
            "inputs": [column.model_dump(exclude={"text"}) for column in self.inputs],
            "steps": [{"step": step.name, "reads": step.reads, "state": step.transform.state()} for step in self.steps],
            "features": [feature.model_dump() for feature in self.features],
            "slots": self.slots,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(
            [Column.model_validate(column) for column in content["inputs"]],
            [
                FittedStep(step["step"], step["reads"], transform_class(step["step"], WHERE).from_state(step["state"]))
                for step in content["steps"]
            ],
            [Feature.model_validate(feature) for feature in content["features"]],
            content["slots"],
        )

    @cached_property
    def _readers(self) -> list[tuple[str, Callable[[Any], Value]]]:
        return [(column.name, _reader(column)) for column in self.inputs]

    @cached_property
    def _program(self) -> list[tuple[Callable[..., list[Any]], list[int]]]:
        return [(step.transform.row, step.reads) for step in self.steps]


@dataclass
class _Fitting:
    """The program while it is fitted: what is known of each slot so far, and the steps."""

    slots: list[tuple[Feature, Statistics | None]]
    """The statistics are left out where no step follows."""
    steps: list[FittedStep] = field(default_factory=list)

    def run(self, branch: list[PlannedStep], slot: int, column: str) -> list[tuple[int, str]]:
        """Fit a branch behind a slot; return the slots of its outputs, each with the name of the step that made it."""
        live = [(slot, "raw")]
        for planned in branch:
            is_last = planned is branch[-1]
            following: list[tuple[int, str]] = []
            for at, maker in live:
                if self.slots[at][0].form in planned.transform.takes:
                    following += [(made, planned.name) for made in self._apply(planned, at, column, is_last)]
                else:
                    following.append((at, maker))
            live = following
        return live

    def _apply(self, planned: PlannedStep, slot: int, column: str, is_last: bool) -> Iterable[int]:
        feature, statistics = self.slots[slot]
        try:
            transform = planned.transform.fit(planned.params, statistics)
        except DataError as error:
            raise DataError(f"features: step '{planned.name}' on column '{column}': {error}") from None
        first = len(self.slots)
        self.steps.append(FittedStep(planned.name, [slot], transform))
        outputs = transform.outputs(feature)
        self.slots += zip(outputs, [None] * len(outputs) if is_last else transform.push(statistics), strict=True)
        return range(first, len(self.slots))


def _named(made: list[tuple[Feature, str]]) -> list[Feature]:
    """The features as a model sees them; a name that is taken gets the step's name behind it, and a number if need be."""
    features: dict[str, Feature] = {}
    for feature, step in made:
        name, number = feature.name, 1
        while name in features:
            name = f"{feature.name}__{step}{number if number > 1 else ''}"
            number += 1
        kind: Any = "numeric" if feature.cardinality is None else "categorical"
        features[name] = Feature(name=name, kind=kind, cardinality=feature.cardinality)
    return list(features.values())


def _block_of(column: Column, values: pa.ChunkedArray) -> Values:
    return texts(values) if column.kind in TEXT else numbers(values)


def _reader(column: Column) -> Callable[[Any], Value]:
    """The function that brings a canonical value into the form that `_block_of` gives its column."""
    if column.kind not in TEXT:
        return _number
    if column.type == "string":
        return _text
    return _text_of_float if column.type == "float64" else _text_of


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _text(value: str | None) -> str | None:
    return value


def _text_of(value: object) -> str | None:
    return None if value is None else category_text(value)


def _text_of_float(value: float | None) -> str | None:
    return None if value is None or value != value else category_text(float(value))
