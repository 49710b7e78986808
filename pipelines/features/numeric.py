"""Transforms of numbers: fill what is missing, bring to one scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from pipelines.errors import DataError, SpecError
from pipelines.features.comoments import CoMoments
from pipelines.features.stats import Numbers, NumberStatistics, Statistics, StringStatistics
from pipelines.features.target_sums import TargetSums
from pipelines.features.transform import TEXT, Feature, Form, Order, State, Transform, Values
from pipelines.spec import Frozen


class ImputeParams(Frozen):
    """What to put where a value is missing."""

    strategy: Literal["mean", "median", "most_frequent", "constant"] | None = None
    """Of the train split; default: constant where there is a value, else mean. Median and most frequent number are those of the
    row sample; the most frequent text is exact. Of equally frequent ones the smallest."""
    value: bool | float | str | None = None
    """The constant; a text for a column of texts."""
    indicator: bool = False
    """Whether to add a feature NAME__missing, 1 where the value was missing."""

    @model_validator(mode="after")
    def _consistent(self) -> ImputeParams:
        if self.strategy == "constant" and self.value is None:
            raise ValueError("strategy: constant needs 'value'")
        if self.strategy in ("mean", "median", "most_frequent") and self.value is not None:
            raise ValueError(f"'value' goes with strategy: constant, not with {self.strategy}")
        if isinstance(self.value, float) and not math.isfinite(self.value):
            raise ValueError(f"'value' is {self.value}; expected a finite number")
        return self


@dataclass(frozen=True)
class Impute(Transform):
    """Fill missing values of numbers or texts; infinities stay. A column without any value is filled with 0 or the empty text."""

    Params: ClassVar[type[Frozen]] = ImputeParams
    takes: ClassVar[frozenset[Form]] = frozenset({"numeric", "boolean", "datetime", *TEXT})
    carries: ClassVar[frozenset[type[State]]] = frozenset({CoMoments, TargetSums})
    orders: ClassVar[tuple[Order, ...]] = ("rising", "constant")

    fill: float | str
    indicator: bool

    @classmethod
    def gives(cls, params: ImputeParams, form: Form) -> Form:
        if form in TEXT and params.strategy != "most_frequent" and not isinstance(params.value, str):
            raise SpecError("fills texts with a text; write {impute: {value: unknown}} or {impute: {strategy: most_frequent}}")
        if form not in TEXT and isinstance(params.value, str):
            raise SpecError(f"fills numbers with a number, found '{params.value}'; write {{impute: {{value: 0}}}}")
        return form

    @classmethod
    def fit(cls, params: ImputeParams, statistics: Statistics) -> Impute:
        if isinstance(params.value, str):
            return cls(params.value, params.indicator)
        if isinstance(statistics, StringStatistics):
            return cls(statistics.most_frequent(), params.indicator)
        if params.value is not None:
            return cls(float(params.value), params.indicator)
        if not statistics.finite:
            return cls(0.0, params.indicator)
        if params.strategy == "median":
            fill = statistics.quantile(0.5)
        elif params.strategy == "most_frequent":
            fill = statistics.most_frequent()
        else:
            fill = statistics.mean
        return cls(finite(fill), params.indicator)

    def outputs(self, feature: Feature) -> list[Feature]:
        added = [Feature(name=f"{feature.name}__missing", kind="boolean")]
        return [feature, *added] if self.indicator else [feature]

    def block(self, values: Values) -> list[Values]:
        if isinstance(values, np.ndarray):
            missing = np.isnan(values)
            filled = values.copy()
            filled[missing] = self.fill
        else:
            missing = values.is_null().to_numpy(zero_copy_only=False)
            filled = _filled(values, str(self.fill)) if missing.any() else values
        return [filled, missing.astype(np.float64)] if self.indicator else [filled]

    def row(self, value: float | str | None) -> list[Any]:
        missing = value is None or value != value
        filled = self.fill if missing else value
        return [filled, 1.0 if missing else 0.0] if self.indicator else [filled]

    def push(self, statistics: NumberStatistics | StringStatistics) -> list[Statistics]:
        filled = statistics.filled(self.fill)  # type: ignore[arg-type]
        missing = np.array([0.0, 1.0])
        indicator = NumberStatistics.of(missing, np.array([statistics.count - statistics.missing, statistics.missing]))
        return [filled, indicator] if self.indicator else [filled]

    def carry(self, state: CoMoments | TargetSums, at: int) -> State:
        return state.filled(at, self.fill)  # type: ignore[arg-type]


def _filled(values: pa.Array, text: str) -> pa.Array:
    """The texts of a block with one for what is missing."""
    if not pa.types.is_dictionary(values.type):
        return pc.fill_null(values, text)
    texts = values.dictionary
    place = pc.index(texts, pa.scalar(text, texts.type)).as_py()
    if place < 0:
        place, texts = len(texts), pa.concat_arrays([texts, pa.array([text], texts.type)])
    return pa.DictionaryArray.from_arrays(values.indices.fill_null(place), texts)


class ScaleParams(Frozen):
    """How to bring numbers to one scale."""

    method: Literal["standard", "minmax", "maxabs", "robust"] = "standard"
    """standard: mean 0, variance 1; minmax: from 0 to 1 in the train split; maxabs: the largest magnitude becomes 1 and 0 stays
    0; robust: the median becomes 0 and the distance between the quartiles 1, both from the row sample."""


@dataclass(frozen=True)
class Scale(Transform):
    """(value - center) / scale. Missing stays missing, an infinity infinite; a constant column becomes 0, by maxabs 1 or -1.

    Center and scale are exact but for `robust`: its quartiles stand at shares of the column that are off by about
    1 / sqrt(rows in the sample).
    """

    Params: ClassVar[type[Frozen]] = ScaleParams
    takes: ClassVar[frozenset[Form]] = frozenset({"numeric", "code"})
    carries: ClassVar[frozenset[type[State]]] = frozenset({CoMoments})
    orders: ClassVar[tuple[Order, ...]] = ("rising",)

    center: float
    scale: float

    @classmethod
    def gives(cls, params: ScaleParams, form: Form) -> Form:
        return "numeric"

    @classmethod
    def fit(cls, params: ScaleParams, statistics: NumberStatistics) -> Scale:
        if not statistics.finite:
            return cls(0.0, 1.0)
        low, high = statistics.minimum, statistics.maximum
        if params.method == "maxabs":
            return cls(0.0, max(-low, high) or 1.0)
        if low == high:  # the variance of equal values is rounding, not always 0
            return cls(low, 1.0)
        if params.method == "standard":
            center, scale = statistics.mean, statistics.std
        elif params.method == "minmax":
            center, scale = low, high - low
        else:
            center, scale = statistics.quantile(0.5), statistics.quantile(0.75) - statistics.quantile(0.25)
        return cls(finite(center), finite(scale) or 1.0)

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=feature.name, kind="numeric")]

    def block(self, values: Numbers) -> list[Values]:
        scaled = values - self.center
        scaled /= self.scale
        return [scaled]

    def row(self, value: float) -> list[float]:
        return [(value - self.center) / self.scale]

    def push(self, statistics: NumberStatistics) -> list[Statistics]:
        return [statistics.scaled(self.center, self.scale)]

    def carry(self, state: CoMoments, at: int) -> State:
        return state.scaled(at, self.center, self.scale)


def finite(value: float) -> float:
    """Return what a fit computed, or raise `DataError` when it overflowed."""
    if not math.isfinite(value):
        raise DataError("the values are too large to take their mean or spread; correct the column or drop it")
    return value
