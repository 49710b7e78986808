"""The statistics of the columns of a unit, block by block, for each split by itself.

A block is not cut into its splits: numbers are put in the order of the splits, texts are counted under split and text at once.
Texts are sorted once in `SORTED_ROWS` rows, not in every block: within a row group they all stand in one dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.data.split import Splits, grouped
from pipelines.features.stats import NumberStatistics, Statistics, StringStatistics
from pipelines.features.transform import TEXT, coded
from pipelines.schema import Column, encoded_parts, numbers

SORTED_ROWS: Final = 1 << 20

Times = npt.NDArray[np.int64]


class Described:
    """Adds up what is known of some columns in `size` splits."""

    def __init__(self, columns: Sequence[Column], size: int) -> None:
        self._size = size
        self._texts = {column.name: TextCounts(size) for column in columns if column.kind in TEXT}
        self._numbers = {column.name: [NumberStatistics()] * size for column in columns if column.kind not in TEXT}

    def add(self, table: pa.Table, splits: Splits) -> None:
        """Append a block; `splits` has the number of each row's split."""
        order, ends = grouped(splits, self._size)
        for name, states in self._numbers.items():
            values = numbers(table[name])[order]
            for split in range(self._size):
                if ends[split] < ends[split + 1]:
                    states[split] = states[split].merge(NumberStatistics.of(values[ends[split] : ends[split + 1]]))
        for name, counts in self._texts.items():
            counts.add(table[name], splits)

    def statistics(self) -> list[dict[str, Statistics]]:
        """What is known so far, by split and column."""
        texts = {name: counts.statistics() for name, counts in self._texts.items()}
        return [{name: states[split] for name, states in (self._numbers | texts).items()} for split in range(self._size)]


class TextCounts:
    """Counts the texts of one column in `size` splits."""

    def __init__(self, size: int) -> None:
        self._done = [StringStatistics()] * size
        self._parts: list[tuple[pa.Array, Times]] = []
        """Different texts, and how often each stands in each split, as (splits, texts)."""
        self._missing, self._rows = np.zeros(size, np.int64), 0

    def add(self, values: pa.ChunkedArray, splits: Splits) -> None:
        """Append a block."""
        size, start = len(self._missing), 0
        for part in encoded_parts(values):
            texts, chosen = coded(part)
            width = len(texts) + 1
            places = splits[start : start + len(part)].astype(np.int64) * width + chosen
            times = np.bincount(places, minlength=size * width).reshape(size, width)
            self._missing += times[:, -1]
            if self._parts and _is_same(self._parts[-1][0], texts):
                self._parts[-1][1][:] += times[:, :-1]
            else:
                self._parts.append((texts, times[:, :-1]))
            start += len(part)
        self._rows += start
        if self._rows >= SORTED_ROWS:
            self._sort()

    def statistics(self) -> list[StringStatistics]:
        """What is known so far, by split."""
        self._sort()
        return self._done

    def _sort(self) -> None:
        if not self._rows:
            return
        for split, missing in enumerate(self._missing.tolist()):
            state = StringStatistics.counted([(texts, times[split]) for texts, times in self._parts], missing)
            self._done[split] = self._done[split].merge(state) if self._done[split].count else state
        self._parts, self._rows = [], 0
        self._missing[:] = 0


def _is_same(first: pa.Array, second: pa.Array) -> bool:
    """Whether two arrays are the same piece of memory."""

    def place(array: pa.Array) -> list[Any]:
        return [len(array), array.offset, *(buffer and buffer.address for buffer in array.buffers())]

    return place(first) == place(second)
