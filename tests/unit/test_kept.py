"""Statistics on disk come back to the last bit, and hold nothing that could run."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.kept import FILE, load, save
from pipelines.features.stats import NumberStatistics, StringStatistics
from pipelines.storage import Folder

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.booleans() | st.text() | st.integers(), inner),
    max_leaves=10,
)


@given(value=PLAIN)
def test_plain_values_come_back_with_their_types(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = Folder.at(str(tmp_path_factory.mktemp("kept")))

    save(folder, value)

    assert load(folder) == value and repr(load(folder)) == repr(value)


def test_statistics_come_back_to_the_last_bit(tmp_path: Path) -> None:
    numbers = NumberStatistics.of(np.array([0.1, math.nan, -0.0, math.inf]))
    texts = StringStatistics.of(pa.array(["b", None, "a", "b"], pa.large_string()))
    table = pa.table({"x": [1, None], "when": pa.array([None, 5], pa.timestamp("us"))})
    value = (
        {"n": numbers, "t": texts},
        Counter({True: 3, False: 1}),
        np.array([[1, 2], [3, 4]], np.uint64),
        table,
        {("a", 0): 1.5},
    )
    folder = Folder.at(str(tmp_path))

    save(folder, value)
    columns, counts, matrix, rows, keyed = load(folder)

    assert columns["n"] == numbers and columns["t"].ranked() == texts.ranked()
    assert isinstance(counts, Counter) and counts == Counter({True: 3, False: 1})
    assert matrix.dtype == np.uint64 and matrix.tolist() == [[1, 2], [3, 4]]
    assert rows.equals(table) and keyed == {("a", 0): 1.5}


def test_a_class_that_is_no_statistic_is_not_made(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / FILE, "w") as archive:
        archive.writestr("tree.json", '{"Popen": {"args": "true"}}')

    with pytest.raises(KeyError):
        load(Folder.at(str(tmp_path)))
    with pytest.raises(AssertionError, match="has no place in statistics"):
        save(Folder.at(str(tmp_path)), object())
