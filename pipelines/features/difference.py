"""The difference of two columns: of numbers, or the time from one instant to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipelines.errors import SpecError
from pipelines.features.dates import UNITS
from pipelines.features.stats import Numbers, Statistics
from pipelines.features.transform import Feature, Form, Transform, Values
from pipelines.spec import Frozen


class DifferenceParams(Frozen):
    """In what."""

    unit: Literal["seconds", "hours", "days"] | None = None
    """Of the time between two datetimes, which need it."""


@dataclass(frozen=True)
class Difference(Transform):
    """The first column less the second; missing where either is."""

    Params: ClassVar[type[Frozen]] = DifferenceParams
    takes: ClassVar[frozenset[Form]] = frozenset({"numeric", "boolean", "datetime"})
    joins: ClassVar[bool] = True

    unit: float
    """For datetimes in microseconds, else 1."""

    @classmethod
    def gives(cls, params: DifferenceParams, *forms: Form) -> Form:
        dates = [form == "datetime" for form in forms]
        if len(forms) != 2:
            raise SpecError(f"takes two columns, found {len(forms)}; make a group for each pair")
        if dates[0] != dates[1]:
            raise SpecError("takes two numbers or two datetimes, found one of each; set data.kinds of one of them")
        if params.unit is None and dates[0]:
            raise SpecError("needs the unit of the time between datetimes; write {difference: {unit: hours}}")
        if params.unit is not None and not dates[0]:
            raise SpecError("has a unit only for datetimes, found numbers; take 'unit' out")
        return "numeric"

    @classmethod
    def fit(cls, params: DifferenceParams, *statistics: Statistics) -> Difference:
        return cls(1.0 if params.unit is None else float(UNITS[params.unit]))

    def outputs(self, first: Feature, second: Feature, *, group: str) -> list[Feature]:
        return [Feature(name=group, kind="numeric")]

    def block(self, first: Numbers, second: Numbers) -> list[Values]:
        return [(first - second) / self.unit]

    def row(self, first: float, second: float) -> list[float]:
        return [(first - second) / self.unit]
