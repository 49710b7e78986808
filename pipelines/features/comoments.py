"""How do several columns vary together? Exactly, from one pass, with missing values, and through imputing and scaling.

For each pair of columns the moments are about the rows in which both have a value (Chan, Golub and LeVeque, for every pair at
once). To fill a column afterwards one has to know what the others are where it is missing: those means are kept too, so
imputing and scaling act on this state by algebra and give what the filled and scaled rows would have given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from pipelines.features.stats import Numbers

Square = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CoMoments:
    """Of p columns; each array is (p, p)."""

    rows: int
    counts: Square
    """Rows in which both columns have a finite value."""
    means: Square
    """[i, j]: of column i in these rows."""
    apart: Square
    """[i, j]: the mean of column i in the rows in which it has a finite value and column j has none."""
    products: Square
    """Sums of products of distances from the two means; the diagonal is each column's sum of squares."""
    infinite: npt.NDArray[np.int64]
    """(p,): infinite values of each column."""

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")  # as in stats: a fit that needs what overflows refuses
    def of(cls, columns: Sequence[Numbers]) -> Self:
        """Describe a block; NaN is missing."""
        rows, size = len(columns[0]), len(columns)
        finite = [np.isfinite(column) for column in columns]
        infinite = np.array([np.isinf(column).sum() for column in columns], np.int64)
        # Distances from each column's own mean, 0 where it has no value: then sums over pairs of columns lose no digits.
        # Sums of products by numpy, not BLAS: its bits would depend on the threads.
        centers = np.array([_mean(column, mask) for column, mask in zip(columns, finite, strict=True)])
        away = [np.where(mask, column - at, 0.0) for column, mask, at in zip(columns, finite, centers, strict=True)]
        counts, sums, products = (np.zeros((size, size)) for _ in range(3))
        totals = np.array([float(distances.sum()) for distances in away])
        present = [int(mask.sum()) for mask in finite]
        for i in range(size):
            for j in range(i, size):
                products[i, j] = products[j, i] = float((away[i] * away[j]).sum())
                both = finite[i] & finite[j] if present[i] < rows and present[j] < rows else None
                counts[i, j] = counts[j, i] = min(present[i], present[j]) if both is None else int(both.sum())
                sums[i, j] = totals[i] if present[j] == rows else float((away[i] * finite[j]).sum())
                sums[j, i] = totals[j] if present[i] == rows else float((away[j] * finite[i]).sum())
        own = np.diag(counts)[:, None]
        return cls(
            rows,
            counts,
            np.where(counts > 0, centers[:, None] + _ratio(sums, counts), 0.0),
            np.where(own > counts, centers[:, None] + _ratio(totals[:, None] - sums, own - counts), 0.0),
            products - _ratio(sums * sums.T, counts),
            infinite,
        )

    @np.errstate(over="ignore", invalid="ignore")
    def merge(self, other: CoMoments) -> CoMoments:
        """Append the state of the rows behind these."""
        counts = self.counts + other.counts
        delta = other.means - self.means
        return CoMoments(
            self.rows + other.rows,
            counts,
            self.means + delta * _ratio(other.counts, counts),
            _joined(self.apart, self._counts_apart, other.apart, other._counts_apart),
            self.products + other.products + delta * delta.T * _ratio(self.counts * other.counts, counts),
            self.infinite + other.infinite,
        )

    @np.errstate(over="ignore", invalid="ignore")
    def filled(self, at: int, value: float) -> CoMoments:
        """The same rows with `value` for what is missing in a column, exactly."""
        own = np.diag(self.counts)
        added = own - self.counts[at]  # rows in which the others have a value and this column has none
        added[at] = self.rows - own[at]
        others = self.apart[:, at].copy()  # the means of the others there
        others[at] = value
        both = self.counts[at] + added
        counts, means, apart, products = (array.copy() for array in (self.counts, self.means, self.apart, self.products))
        counts[at] = counts[:, at] = both
        means[at] = _joined(self.means[at], self.counts[at], np.full(len(own), value), added)
        means[:, at] = np.where(np.arange(len(own)) == at, means[at], _joined(self.means[:, at], self.counts[at], others, added))
        away = (value - self.means[at]) * (others - self.means[:, at]) * _ratio(self.counts[at] * added, both)
        products[at] = products[:, at] = self.products[at] + away
        neither = self.rows - own[at] - own + self.counts[at]
        apart[at] = _joined(self.apart[at], own[at] - self.counts[at], np.full(len(own), value), neither)
        apart[:, at] = 0.0
        return replace(self, counts=counts, means=means, apart=apart, products=products)

    @np.errstate(over="ignore", invalid="ignore")
    def scaled(self, at: int, center: float, scale: float) -> CoMoments:
        """The same rows with (value - center) / scale in a column."""
        means, apart, products = self.means.copy(), self.apart.copy(), self.products.copy()
        means[at] = (means[at] - center) / scale
        apart[at] = np.where(self._counts_apart[at] > 0, (apart[at] - center) / scale, 0.0)
        products[at] /= scale
        products[:, at] /= scale
        return replace(self, means=means, apart=apart, products=products)

    @property
    def missing(self) -> npt.NDArray[np.int64]:
        """(p,): missing values of each column."""
        return self.rows - np.diag(self.counts).astype(np.int64) - self.infinite

    @property
    def _counts_apart(self) -> Square:
        return np.asarray(np.diag(self.counts)[:, None] - self.counts, np.float64)


def _mean(values: Numbers, mask: npt.NDArray[np.bool_]) -> float:
    present = values if mask.all() else values[mask]
    return float(present.sum() / len(present)) if len(present) else 0.0


def _ratio(above: Square, below: Square) -> Square:
    """The ratio, 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _joined(first: Square, first_rows: Square, second: Square, second_rows: Square) -> Square:
    """The means of rows together with the rows behind them."""
    first = np.where(first_rows > 0, first, second)
    return np.asarray(first + (second - first) * _ratio(second_rows, first_rows + second_rows), np.float64)
