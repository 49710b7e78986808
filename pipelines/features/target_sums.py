"""What is the target like where a column has a category, and in each fold of the train rows? Sums from one pass.

Which classes the target has, and whether it has classes at all, is known only when the pass ends. So there is a sum of the
target's numbers and, while there are few different values, a count of each value.

Memory is bounded: beyond `CELLS` numbers the rarest categories are forgotten. One that is met again starts anew, so its mean is
that of fewer rows; a category that was forgotten in the end has the mean of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.features.stats import Numbers

LABELS: Final = 100
"""Different values of the target that are counted one by one."""
CELLS: Final = 1 << 21
"""About 100,000 categories of a binary target in 5 folds: 16 MB."""

ROWS, SUM, FIRST_LABEL = 0, 1, 2
Cells = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TargetSums:
    """Of one column."""

    texts: pa.Array
    """The categories, large_string; null is missing."""
    cells: Cells
    """(categories, folds, 2 + labels): rows, the sum of the target, rows with each label."""
    totals: Cells
    """(folds, 2 + labels): of all categories, also of those forgotten."""
    labels: list[Any] | None
    """The target's different values; None when there are more than LABELS."""

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")  # as in stats: a fit that needs what overflows refuses
    def of(
        cls, texts: list[str | None], chosen: npt.NDArray[np.int64], folds: Numbers, num_folds: int, target: pa.ChunkedArray
    ) -> TargetSums:
        """Describe a block: each row's category (an index into `texts`), fold and target (an array without nulls)."""
        labels, codes, numbers = _labels(target)
        width = FIRST_LABEL + len(labels or [])
        size, places = len(texts) * num_folds, chosen * num_folds + folds.astype(np.int64)
        cells: Cells = np.empty((size, width))
        cells[:, ROWS] = np.bincount(places, minlength=size)
        cells[:, SUM] = np.bincount(places, numbers, minlength=size)
        if labels:
            counts = np.bincount(places * len(labels) + codes, minlength=size * len(labels))
            cells[:, FIRST_LABEL:] = counts.reshape(size, len(labels))
        cells = cells.reshape(len(texts), num_folds, width)
        return _bounded(cls(pa.array(texts, pa.large_string()), cells, cells.sum(axis=0), labels))

    @np.errstate(over="ignore", invalid="ignore")
    def merge(self, other: TargetSums) -> TargetSums:
        """Append the state of the rows behind these."""
        labels = None if self.labels is None or other.labels is None else list(dict.fromkeys([*self.labels, *other.labels]))
        if labels is not None and len(labels) > LABELS:
            labels = None
        parts = (self, other)
        columns = [_columns(part, labels) for part in parts]
        encoded = pa.concat_arrays([part.texts for part in parts]).dictionary_encode(null_encoding="encode")
        places = encoded.indices.to_numpy(zero_copy_only=False)
        split, width = len(self.texts), FIRST_LABEL + len(labels or [])
        cells = np.zeros((len(encoded.dictionary), len(self.totals), width))
        totals = np.zeros((len(self.totals), width))
        for part, at, to in zip(parts, (places[:split], places[split:]), columns, strict=True):
            kept = slice(None) if labels is not None else slice(FIRST_LABEL)
            cells[np.ix_(at, np.arange(len(totals)), np.array(to))] += part.cells[:, :, kept]
            totals[:, to] += part.totals[:, kept]
        return _bounded(TargetSums(encoded.dictionary, cells, totals, labels))

    @np.errstate(over="ignore", invalid="ignore")
    def filled(self, at: int, value: str) -> TargetSums:
        """The same rows with `value` for what is missing; there is one column, so `at` is 0."""
        texts = [value if text is None else text for text in self.texts.to_pylist()]
        encoded = pa.array(texts, pa.large_string()).dictionary_encode()
        cells = np.zeros((len(encoded.dictionary), *self.cells.shape[1:]))
        np.add.at(cells, encoded.indices.to_numpy(zero_copy_only=False), self.cells)
        return TargetSums(encoded.dictionary, cells, self.totals, self.labels)


def _labels(target: pa.ChunkedArray) -> tuple[list[Any] | None, npt.NDArray[np.int64], Numbers]:
    """The different values, which of them each row has, and each row's number (0 where the target is a text)."""
    is_text = pa.types.is_large_string(target.type)
    numbers = np.zeros(len(target)) if is_text else np.asarray(target.cast(pa.float64(), safe=False).to_numpy(), np.float64) + 0.0
    values = pa.chunked_array([pa.array(numbers)]) if pa.types.is_floating(target.type) else target  # without -0.0
    if len(pc.unique(values)) > LABELS:
        return None, np.zeros(len(target), np.int64), numbers
    encoded = values.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), numbers


def _columns(part: TargetSums, labels: list[Any] | None) -> list[int]:
    """Where the columns of a part go."""
    place = {label: FIRST_LABEL + i for i, label in enumerate(labels or [])}
    return [ROWS, SUM, *(place[label] for label in (part.labels or []) if labels is not None)]


def _bounded(sums: TargetSums) -> TargetSums:
    """Keep the most frequent categories, ties by text, in their order."""
    most = max(1, CELLS // int(np.prod(sums.cells.shape[1:])))
    if len(sums.texts) <= most:
        return sums
    rows = sums.cells[:, :, ROWS].sum(axis=1)
    edge = -np.partition(-rows, most - 1)[most - 1]
    ties = np.flatnonzero(rows == edge)
    first = pc.array_sort_indices(sums.texts.take(pa.array(ties))).to_numpy()
    above = np.flatnonzero(rows > edge)
    kept = np.sort(np.concatenate([above, ties[first[: most - len(above)]]]))
    return TargetSums(sums.texts.take(pa.array(kept)), sums.cells[kept], sums.totals, sums.labels)
