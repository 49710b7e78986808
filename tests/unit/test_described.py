"""The statistics of a unit: those of each split's rows, however the blocks are cut and their texts are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import described
from pipelines.data.described import Described
from pipelines.features.stats import NumberStatistics, StringStatistics
from pipelines.schema import ENCODED_TEXTS, Column

COLUMNS = [
    Column(name="x", type="float64", kind="numeric"),
    Column(name="c", type="string", kind="categorical"),
    Column(name="n", type="int64", kind="categorical"),
]
ROWS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.none() | st.floats(-1e6, 1e6),
        st.none() | st.sampled_from(["a", "b", "", "é", "ab"]),
        st.none() | st.integers(-2, 2),
    ),
    max_size=60,
)
Row = tuple[int, float | None, str | None, int | None]


def texts(values: list[str | None], how: str) -> pa.ChunkedArray:
    plain = pa.chunked_array([pa.array(values, pa.large_string())])
    if how == "plain":
        return plain
    words = pa.array(["unseen", "ab", "é", "", "b", "a"], pa.string())
    places = pa.array([None if value is None else words.to_pylist().index(value) for value in values], pa.int32())
    half = len(values) // 2
    if how == "one dictionary":
        return pa.chunked_array([pa.DictionaryArray.from_arrays(places, words)], ENCODED_TEXTS)
    parts = [plain.chunk(0)[:half], plain.chunk(0)[half:]]
    return pa.chunked_array([part.cast(pa.string()).dictionary_encode() for part in parts], ENCODED_TEXTS)


def blocks(rows: list[Row], cut: int, how: str) -> Iterator[tuple[pa.Table, np.ndarray[Any, np.dtype[np.int8]]]]:
    for part in (rows[:cut], rows[cut:]):
        splits, x, c, n = zip(*part, strict=True) if part else ((), (), (), ())
        table = pa.table({"x": pa.array(x, pa.float64()), "c": texts(list(c), how), "n": pa.array(n, pa.int64())})
        yield table, np.array(splits, np.int8)


@pytest.mark.parametrize("sorted_rows", [1, 1 << 20])
@pytest.mark.parametrize("how", ["plain", "one dictionary", "two dictionaries"])
@settings(max_examples=40, deadline=None)
@given(rows=ROWS, cut=st.integers(0, 60))
def test_each_split_is_described_by_its_own_rows(sorted_rows: int, how: str, rows: list[Row], cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(described, "SORTED_ROWS", sorted_rows)
        together = Described(COLUMNS, 3)
        for table, splits in blocks(rows, cut, how):
            together.add(table, splits)
        found = together.statistics()

    for split in range(3):
        own = [row for row in rows if row[0] == split]
        x = [
            NumberStatistics.of(np.array([row[1] for row in part if row[0] == split], np.float64))
            for part in (rows[:cut], rows[cut:])
        ]
        assert found[split]["x"] == x[0].merge(x[1])
        for place, name in ((2, "c"), (3, "n")):
            values = [None if row[place] is None else str(row[place]) for row in own]
            expected = StringStatistics.of(pa.array(values, pa.large_string()))
            assert found[split][name] == expected
