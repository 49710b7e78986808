"""What is known about one column of the train split after one pass, so that every transform can be fitted from it?

A state describes some rows; `merge` appends the state of the rows behind them. Sums of floats depend on their order, so whoever
merges does it in source order: then the result has the same bits whatever the number of workers. A state travels between
processes as it is (a few floats, or two arrays); the row sample is put in at the end with `dataclasses.replace`.

Missing values (NaN, null) and infinities are counted and take no part in mean, variance, minimum and maximum: one infinity
would make each of them useless. Transforms treat an infinity as a value like any other, so it is not imputed.
"""

from __future__ import annotations

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
BYTES: Final = 33_554_432
"""How long they may be together, in UTF-8."""
TOP: Final = 20
QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def _no_numbers() -> Numbers:
    return np.empty(0, np.float64)


def _no_texts() -> pa.Array:
    return pa.array([], pa.large_string())


def _no_times() -> pa.Array:
    return pa.array([], pa.int64())


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
        is_finite = np.isfinite(values)
        all_finite = bool(is_finite.all())
        finite = values if all_finite else values[is_finite]
        weights = times if all_finite or times is None else times[is_finite]
        count = len(values) if times is None else int(times.sum())
        num_finite = count if all_finite else int(_total(is_finite, times))
        missing = 0 if all_finite else int(_total(np.isnan(values), times))
        if num_finite == 0:
            return cls(count, missing, count - missing)
        with np.errstate(over="ignore", invalid="ignore"):  # squares overflow beyond 1e154; a fit that needs them refuses
            mean = float(_total(finite, weights) / num_finite)
            squares = finite - mean
            squares *= squares
            m2 = float(_total(squares, weights))
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
    """A column of texts: how often each stands there, exactly while there are at most `LIMIT` of them with at most `BYTES`.

    Beyond, the most frequent stay, so a column of identifiers or of long texts costs no more than that. A merge is then one pass
    over two sorted arrays, some 50 ms.
    """

    count: int = 0
    """Rows, missing ones too."""
    missing: int = 0
    texts: pa.Array = field(default_factory=_no_texts, repr=False)
    """Different ones in ascending order, large_string."""
    times: pa.Array = field(default_factory=_no_times, repr=False)
    """How often each stands there, int64."""
    dropped_max: int = 0
    """0 when `texts` is complete; else no text, whether in `texts` or not, was seen more often than counted plus this."""
    sample: pa.Array = field(default_factory=_no_texts, repr=False, compare=False)
    """The column in the global row sample, large_string."""

    @classmethod
    def of(cls, values: pa.Array) -> Self:
        """Describe a block of large_string; null is missing."""
        encoded = values.dictionary_encode()
        times = np.bincount(encoded.indices.drop_null().to_numpy(), minlength=len(encoded.dictionary))
        return cls.counted([(encoded.dictionary, times)], values.null_count)

    @classmethod
    def counted(cls, parts: Sequence[tuple[pa.Array, npt.NDArray[np.int64]]], missing: int) -> Self:
        """Describe rows from their texts and how often each stands there, in parts, and the rows without one."""
        encoded = pa.chunked_array([texts.cast(pa.large_string()) for texts, _ in parts], pa.large_string())
        encoded = encoded.dictionary_encode().combine_chunks()
        times = np.zeros(len(encoded.dictionary), np.int64)
        np.add.at(times, encoded.indices.to_numpy(), np.concatenate([times for _, times in parts]))
        present = pa.array(times > 0)
        texts, counts = encoded.dictionary.filter(present), pa.array(times).filter(present)
        order = pc.sort_indices(texts)
        return cls(int(times.sum()) + missing, missing, *_bounded(texts.take(order), counts.take(order), 0))

    @cached_property
    def counts(self) -> dict[str, int]:
        """Each text with how often it stands there."""
        return dict(zip(self.texts.to_pylist(), self.times.to_pylist(), strict=True))

    @property
    def is_constant(self) -> bool:
        """Whether all rows are alike: no value at all, or one and the same in every row."""
        return self.missing == self.count or (not self.missing and len(self.counts) == 1 and not self.dropped_max)

    def merge(self, other: StringStatistics) -> StringStatistics:
        """Append the state of the rows behind these; the sample is left out."""
        texts, times = _summed(pa.concat_arrays([self.texts, other.texts]), pa.concat_arrays([self.times, other.times]))
        kept = _bounded(texts, times, self.dropped_max + other.dropped_max)
        return StringStatistics(self.count + other.count, self.missing + other.missing, *kept)

    def filled(self, value: str) -> StringStatistics:
        """The same rows with `value` for what is missing."""
        if not self.missing:
            return self
        filled = StringStatistics(self.missing, 0, pa.array([value], pa.large_string()), pa.array([self.missing]))
        present = replace(self, count=self.count - self.missing, missing=0)
        return replace(present.merge(filled), sample=self.sample.fill_null(value))

    def most_frequent(self) -> str:
        """Of the texts, the first of equally frequent ones; the empty text where there is none."""
        return next((text for text, _ in self.ranked(1)), "")

    def ranked(self, most: int | None = None) -> list[tuple[str, int]]:
        """Texts with their counts, the most frequent first, equally frequent ones by text; at most so many."""
        order = _rank(self.times)[:most]
        return list(zip(self.texts.take(order).to_pylist(), self.times.take(order).to_pylist(), strict=True))

    def profile(self) -> dict[str, Any]:
        """Plain JSON for people; `distinct` is a lower bound when `dropped_max` is not 0."""
        return {
            "count": self.count,
            "missing": self.missing,
            "distinct": len(self.texts),
            "dropped_max": self.dropped_max,
            "top": [list(pair) for pair in self.ranked(TOP)],
        }


Statistics = NumberStatistics | StringStatistics


def _total(values: npt.NDArray[Any], times: npt.NDArray[np.int64] | None) -> Any:
    """The sum of the values, each as often as `times` says."""
    return (values if times is None else values * times).sum()


def _summed(texts: pa.Array, times: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Bring texts into order and make one of equal ones."""
    order = pc.sort_indices(texts)  # quick here: it is two runs that are sorted already
    texts = texts.take(order)
    is_first = np.ones(len(texts), np.bool_)
    is_first[1:] = pc.not_equal(texts[1:], texts[:-1]).to_numpy(zero_copy_only=False)
    first = np.flatnonzero(is_first)
    return texts.take(pa.array(first)), pa.array(np.add.reduceat(times.take(order).to_numpy(), first))


def _bounded(texts: pa.Array, times: pa.Array, dropped_max: int) -> tuple[pa.Array, pa.Array, int]:
    """Keep the most frequent (ties by text) within `LIMIT` and `BYTES`; add to the bound on how much a count may be too low."""
    if len(texts) <= LIMIT and texts.nbytes <= BYTES:
        return texts, times, dropped_max
    order = _rank(times)
    ends = np.cumsum(pc.binary_length(texts).to_numpy()[order])
    num_kept = min(LIMIT, int(np.searchsorted(ends, BYTES, side="right")))
    if num_kept == len(texts):
        return texts, times, dropped_max
    kept, dropped = pa.array(np.sort(order[:num_kept])), times[int(order[num_kept])].as_py()
    return texts.take(kept), times.take(kept), dropped_max + dropped


def _rank(times: pa.Array) -> npt.NDArray[np.int64]:
    """The places of texts in ascending order by descending count; equal counts keep the order of the texts."""
    return np.argsort(-times.to_numpy(), kind="stable")


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
