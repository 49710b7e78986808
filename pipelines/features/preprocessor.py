"""All fitted steps of all columns: from raw columns to the matrix a model sees, for a block or for one row.

It is a straight-line program over slots. The first slots are the raw columns; each step reads some slots and appends its outputs
as new ones; each feature is one slot in the end. Chains, chains side by side and steps over several columns are all this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple, Self

import numpy as np
import pyarrow as pa

from pipelines.features.chains import plan, transform_class
from pipelines.features.fitting import FittedStep, Fitting, Origin, Wanted
from pipelines.features.passes import Key, needs
from pipelines.features.stats import Numbers, Statistics
from pipelines.features.transform import TEXT, Feature, Rows, State, Value, Values
from pipelines.schema import Column, category_text, encoded, numbers, texts
from pipelines.spec import Chain, GroupSpec
from pipelines.tasks import Task

WHERE: Final = "preprocessor.json: step"
STRIPE: Final = 4096
"""Rows of a matrix that are filled at a time, so that they stay in the processor's cache."""


class Root(NamedTuple):
    """What a feature comes from: a raw or derived column, or a group."""

    name: str
    columns: tuple[str, ...]
    """All of them where it is a group."""


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
    wanted: dict[Key, Wanted] = field(default_factory=dict)
    """What has to be gathered before the rest can be fitted; empty when it is whole."""

    plan = staticmethod(plan)

    @classmethod
    def unfitted(cls, columns: Sequence[Column], chains: Mapping[str, Chain], groups: Mapping[str, GroupSpec]) -> Self:
        """Return the program without a step: it gathers what the first pass can gather."""
        first = [need for need in needs(chains, groups) if need.number == 1]
        read = {name for need in first for name in need.columns}
        inputs = [column for column in columns if column.name in read]
        slots = {column.name: slot for slot, column in enumerate(inputs)}
        return cls(inputs, [], [], [], {need.key: Wanted(need.step, [slots[name] for name in need.columns]) for need in first})

    @classmethod
    def fit(
        cls,
        columns: Sequence[Column],
        chains: Mapping[str, Chain],
        statistics: Mapping[str, Statistics],
        *,
        groups: Mapping[str, GroupSpec] | None = None,
        states: Mapping[Key, State] | None = None,
        task: Task | None = None,
        places: Numbers | None = None,
    ) -> Self:
        """Fit the planned chains and groups to the statistics of the train split, which carry the row sample.

        `states` are what was gathered; where one that is needed is not there yet, it is `wanted`, and what depends on it is
        left out. `task` and the `places` of the sample's rows (see `Rows`) are for steps that use the target.
        """
        groups = groups or {}
        inputs = _inputs(columns, chains, groups)
        fitting = Fitting(
            [(Feature(name=column.name, kind=column.kind), statistics[column.name]) for column in inputs],
            states or {},
            task,
            places,
        )
        slots = {column.name: slot for slot, column in enumerate(inputs)}
        ends = [end for name, slot in slots.items() if name in chains for end in fitting.column(slot, name, chains[name])]
        ends += [end for name, group in groups.items() for end in fitting.group(slots, name, group)]
        made = [(fitting.slots[slot][0], fitting.origins[slot], step) for slot, step in ends]
        return cls(inputs, fitting.steps, _named(made), [slot for slot, _ in ends], fitting.wanted)

    def gather(self, table: pa.Table, rows: Rows) -> dict[Key, State]:
        """Return what is wanted of a block of train rows."""
        if not self.wanted:
            return {}
        slots = self.run(table, rows.places)
        return {
            key: wanted.step.transform.gather(wanted.step.params, *[slots[slot] for slot in wanted.slots], rows=rows)
            for key, wanted in self.wanted.items()
        }

    @cached_property
    def roots(self) -> list[Root]:
        """What each feature comes from; the order is that of the features."""
        slots = [(Feature(name=column.name, kind=column.kind), Root(column.name, (column.name,))) for column in self.inputs]
        for step in self.steps:
            features, roots = zip(*[slots[read] for read in step.reads], strict=True)
            if step.transform.joins:
                columns = tuple(dict.fromkeys(name for root in roots for name in root.columns))
                root, named = Root(step.group or "+".join(columns), columns), {"group": ""}
            else:
                [root], named = roots, {}
            slots += [(feature, root) for feature in step.transform.outputs(*features, **named)]
        return [slots[slot][1] for slot in self.slots]

    @property
    def cross_fitted(self) -> bool:
        """Whether train rows need their `places` to be transformed."""
        return any(step.transform.cross_fitted for step in self.steps)

    def transform(self, table: pa.Table, places: Numbers | None = None) -> list[Numbers]:
        """Return one float64 array per feature; `table` is canonical and may have more columns. The arrays may be read-only.

        `places` are there when some of the rows are train rows (see `Rows`).
        """
        slots = self.run(table, places)
        return [slots[slot] for slot in self.slots]

    def run(self, table: pa.Table, places: Numbers | None = None) -> list[Any]:
        """Return all slots of the program, `Values` each."""
        slots: list[Values] = [_block_of(column, table.column(column.name)) for column in self.inputs]
        with np.errstate(all="ignore"):
            for step in self.steps:
                more = {"places": places} if step.transform.cross_fitted else {}
                slots += step.transform.block(*[slots[read] for read in step.reads], **more)
        return slots

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
        assert not self.wanted, f"not fitted: {[*self.wanted]}"
        return {
            # How a file writes a value is of no account here: the same table as text and typed gives the same bits.
            "inputs": [column.model_dump(exclude={"text"}) for column in self.inputs],
            "steps": [
                {"step": step.name, "reads": step.reads, "state": step.transform.state()}
                | ({"group": step.group} if step.group is not None else {})
                for step in self.steps
            ],
            "features": [feature.model_dump() for feature in self.features],
            "slots": self.slots,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(
            [Column.model_validate(column) for column in content["inputs"]],
            [
                FittedStep(
                    step["step"], step["reads"], transform_class(step["step"], WHERE).from_state(step["state"]), step.get("group")
                )
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


def _inputs(columns: Sequence[Column], chains: Mapping[str, Chain], groups: Mapping[str, GroupSpec]) -> list[Column]:
    """The columns that chains or groups read."""
    wanted = {*chains, *(name for group in groups.values() for name in group.columns)}
    return [column for column in columns if column.name in wanted]


def _named(made: list[tuple[Feature, Origin, str]]) -> list[Feature]:
    """The features as a model sees them; a name that is taken gets the step's name behind it, and a number if need be."""
    features: dict[str, Feature] = {}
    for feature, origin, step in made:
        name, number = feature.name, 1
        while name in features:
            name = f"{feature.name}__{step}{number if number > 1 else ''}"
            number += 1
        kind: Any = "numeric" if feature.cardinality is None else "categorical"
        columns, order = origin
        features[name] = Feature(name=name, kind=kind, cardinality=feature.cardinality, columns=list(columns), order=order)
    return list(features.values())


def _block_of(column: Column, values: pa.ChunkedArray) -> Values:
    if column.kind not in TEXT:
        return numbers(values)
    return encoded(values) if column.kind == "categorical" else texts(values)


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
