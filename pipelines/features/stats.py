"""What is known about one column of the train split after one pass, so that every transform can be fitted from it?

A state describes some rows; `merge` appends the state of the rows behind them. Sums of floats depend on their order, so whoever
merges does it in source order: then the result has the same bits whatever the number of workers. A state travels between
processes as it is (a few floats, or one dict); the row sample is put in at the end with `dataclasses.replace`.

Missing values (NaN, null) and infinities are counted and take no part in mean, variance, minimum and maximum: one infinity
would make each of them useless. Transforms treat an infinity as a value like any other, so it is not imputed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Numbers = npt.NDArray[np.float64]

LIMIT: Final = 262_144
"""Distinct texts that are counted exactly."""
TOP: Final = 20
QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def _no_numbers() -> Numbers:
    return np.empty(0, np.float64)


def _no_texts() -> pa.Array:
    return pa.array([], pa.large_string())


@dataclass(frozen=True)
class NumberStatistics:
    """A column of numbers: counts, moments and extremes (which are the neutral infinities where there is no value)."""

    count: int = 0
    """Rows, missing ones too."""
    missing: int = 0
    infinite: int = 0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared distances from the mean."""
    minimum: float = math.inf
    maximum: float = -math.inf
    sample: Numbers = field(default_factory=_no_numbers, repr=False, compare=False)
    """The column in the global row sample, NaN = missing."""

    @classmethod
    def of(cls, values: Numbers, times: npt.NDArray[np.int64] | None = None) -> Self:
        """Describe a block (NaN is missing), or the rows in which each value stands as often as `times` says."""
        times = np.ones(len(values), np.int64) if times is None else times
        is_finite = np.isfinite(values)
        finite, weights = (values, times) if is_finite.all() else (values[is_finite], times[is_finite])
        count, missing, num_finite = int(times.sum()), int(times[np.isnan(values)].sum()), int(weights.sum())
        if num_finite == 0:
            return cls(count, missing, count - missing)
        with np.errstate(over="ignore", invalid="ignore"):  # squares overflow beyond 1e154; a fit that needs them refuses
            mean = float((finite * weights).sum() / num_finite)
            m2 = float((np.square(finite - mean) * weights).sum())
        low, high = float(finite.min()) + 0.0, float(finite.max()) + 0.0  # -0.0 + 0.0 is 0.0: which came first plays no part
        return cls(count, missing, count - missing - num_finite, mean, m2, low, high)

    @property
    def finite(self) -> int:
        """Values that mean, variance and extremes are about."""
        return self.count - self.missing - self.infinite

    @property
    def variance(self) -> float:
        """Of the values as a population (divided by n), as StandardScaler has it."""
        return self.m2 / self.finite if self.finite else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    @property
    def is_constant(self) -> bool:
        """Whether all rows are alike: no value at all, or one and the same finite value in every row."""
        return self.missing == self.count or (self.finite == self.count and self.minimum == self.maximum)

    def merge(self, other: NumberStatistics) -> NumberStatistics:
        """Append the state of the rows behind these (Chan, Golub and LeVeque); the sample is left out."""
        count, missing, infinite = self.count + other.count, self.missing + other.missing, self.infinite + other.infinite
        if not self.finite or not other.finite:
            return replace(self if self.finite else other, count=count, missing=missing, infinite=infinite, sample=_no_numbers())
        total = self.finite + other.finite
        delta = other.mean - self.mean
        return NumberStatistics(
            count,
            missing,
            infinite,
            self.mean + delta * (other.finite / total),
            self.m2 + other.m2 + delta * delta * (self.finite * other.finite / total),
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )

    def filled(self, value: float) -> NumberStatistics:
        """The same rows with `value` for what is missing, exactly."""
        present = replace(self, count=self.count - self.missing, missing=0)
        filled = NumberStatistics(self.missing, 0, 0, value, 0.0, value, value) if self.missing else NumberStatistics()
        return replace(present.merge(filled), sample=np.where(np.isnan(self.sample), value, self.sample))

    def scaled(self, center: float, scale: float) -> NumberStatistics:
        """The same rows as (value - center) / scale, for a positive scale."""
        with np.errstate(over="ignore", invalid="ignore"):
            sample = (self.sample - center) / scale
        return replace(
            self,
            mean=(self.mean - center) / scale,
            m2=self.m2 / scale / scale,
            minimum=(self.minimum - center) / scale,
            maximum=(self.maximum - center) / scale,
            sample=sample,
        )

    def mapped(self, sample: Numbers, minimum: float, maximum: float) -> NumberStatistics:
        """The same rows after a function that keeps their order and what is missing, whose values in the sample are given.

        Counts and extremes are exact, mean and variance those of the sample.
        """
        seen = NumberStatistics.of(sample)
        if not seen.finite:
            return replace(seen, sample=sample)
        return replace(self, mean=seen.mean, m2=seen.variance * self.finite, minimum=minimum, maximum=maximum, sample=sample)

    def most_frequent(self) -> float:
        """Of the finite values in the sample, the smallest of equally frequent ones; the mean where the sample has none."""
        values, times = np.unique(self.ordered, return_counts=True)
        return float(values[np.argmax(times)]) + 0.0 if len(values) else self.mean

    def quantile(self, share: float) -> float:
        """Of the finite values in the sample, interpolated as pandas does; the mean where the sample has none."""
        return self.quantiles((share,))[0]

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Several at once."""
        if not len(self.ordered):
            return [self.mean] * len(shares)
        with np.errstate(over="ignore", invalid="ignore"):
            return [float(value) for value in np.quantile(self.ordered, shares)]

    @cached_property
    def ordered(self) -> Numbers:
        """The finite values of the sample, ascending."""
        return np.sort(self.sample[np.isfinite(self.sample)])

    def profile(self) -> dict[str, Any]:
        """Plain JSON for people; null where there is no value."""
        quantiles = {f"{s:g}": _plain(value) for s, value in zip(QUANTILES, self.quantiles(QUANTILES), strict=True)}
        return {
            "count": self.count,
            "missing": self.missing,
            "infinite": self.infinite,
            "min": _plain(self.minimum),
            "max": _plain(self.maximum),
            "mean": _plain(self.mean) if self.finite else None,
            "std": _plain(self.std) if self.finite else None,
            "quantiles": quantiles if self.finite else {},
        }


@dataclass(frozen=True)
class StringStatistics:
    """A column of texts: how often each stands there, exactly while there are at most `LIMIT` different ones."""

    count: int = 0
    """Rows, missing ones too."""
    missing: int = 0
    counts: dict[str, int] = field(default_factory=dict, repr=False)
    dropped_max: int = 0
    """0 when `counts` is complete; else no text, whether in `counts` or not, was seen more often than counted plus this."""
    sample: pa.Array = field(default_factory=_no_texts, repr=False, compare=False)
    """The column in the global row sample, large_string."""

    @classmethod
    def of(cls, values: pa.Array) -> Self:
        """Describe a block of large_string; null is missing."""
        pairs = pc.value_counts(values)
        counts = dict(zip(pairs.field("values").to_pylist(), pairs.field("counts").to_pylist(), strict=True))
        return cls(len(values), counts.pop(None, 0), *_most_frequent(counts, 0))

    @property
    def is_constant(self) -> bool:
        """Whether all rows are alike: no value at all, or one and the same in every row."""
        return self.missing == self.count or (not self.missing and len(self.counts) == 1 and not self.dropped_max)

    def merge(self, other: StringStatistics) -> StringStatistics:
        """Append the state of the rows behind these; the sample is left out."""
        counts = dict(self.counts)
        for text, times in other.counts.items():
            counts[text] = counts.get(text, 0) + times
        kept, dropped_max = _most_frequent(counts, self.dropped_max + other.dropped_max)
        return StringStatistics(self.count + other.count, self.missing + other.missing, kept, dropped_max)

    def filled(self, value: str) -> StringStatistics:
        """The same rows with `value` for what is missing."""
        filled = StringStatistics(self.missing, 0, {value: self.missing} if self.missing else {})
        sample = self.sample.fill_null(value)
        return replace(replace(self, count=self.count - self.missing, missing=0).merge(filled), sample=sample)

    def most_frequent(self) -> str:
        """Of the texts, the first of equally frequent ones; the empty text where there is none."""
        return min(self.counts.items(), key=_rank, default=("", 0))[0]

    def ranked(self) -> list[tuple[str, int]]:
        """Texts with their counts, the most frequent first, equally frequent ones by text."""
        return sorted(self.counts.items(), key=_rank)

    def profile(self) -> dict[str, Any]:
        """Plain JSON for people; `distinct` is a lower bound when `dropped_max` is not 0."""
        return {
            "count": self.count,
            "missing": self.missing,
            "distinct": len(self.counts),
            "dropped_max": self.dropped_max,
            "top": [list(pair) for pair in heapq.nsmallest(TOP, self.counts.items(), key=_rank)],
        }


Statistics = NumberStatistics | StringStatistics


def _rank(pair: tuple[str, int]) -> tuple[int, str]:
    return -pair[1], pair[0]


def _most_frequent(counts: dict[str, int], dropped_max: int) -> tuple[dict[str, int], int]:
    """Keep the `LIMIT` most frequent (ties by text), with the bound on how much any count may now be too low."""
    if len(counts) <= LIMIT:
        return counts, dropped_max
    # Sorting only those at the edge: a column of identifiers comes here at every merge.
    times_down = -np.partition(-np.fromiter(counts.values(), np.int64, len(counts)), [LIMIT - 1, LIMIT])
    edge, dropped = int(times_down[LIMIT - 1]), int(times_down[LIMIT])
    kept = {text: times for text, times in counts.items() if times > edge}
    ties = sorted(text for text, times in counts.items() if times == edge)
    kept |= dict.fromkeys(ties[: LIMIT - len(kept)], edge)
    return kept, dropped_max + dropped


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
