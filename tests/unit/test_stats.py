"""Statistics of one pass: equal to pandas, and the same bits however the rows were cut, as long as they are folded in order."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from functools import reduce
from random import Random

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features import stats
from pipelines.features.stats import Numbers, NumberStatistics, StringStatistics

NAN, INF = math.nan, math.inf
LETTERS = st.lists(st.none() | st.sampled_from("abcdef"), max_size=60)


def strings(values: list[str | None]) -> pa.Array:
    return pa.array(values, pa.large_string())


def column(rows: int = 5000, seed: int = 3) -> Numbers:
    generator = np.random.default_rng(seed)
    values = generator.lognormal(3.0, 2.0, rows)
    values[generator.random(rows) < 0.1] = NAN
    return values


def fold(values: Numbers, blocks: int) -> NumberStatistics:
    return reduce(NumberStatistics.merge, [NumberStatistics.of(part) for part in np.array_split(values, blocks)])


@pytest.mark.parametrize("blocks", [1, 2, 7, 300])
def test_numbers_equal_pandas(blocks: int) -> None:
    values = column()

    found, expected = fold(values, blocks), pd.Series(values)

    assert (found.count, found.missing, found.infinite) == (5000, expected.isna().sum(), 0)
    assert (found.minimum, found.maximum) == (expected.min(), expected.max())
    assert found.mean == pytest.approx(expected.mean(), rel=1e-12)
    assert found.variance == pytest.approx(expected.var(ddof=0), rel=1e-12)
    assert found.std == pytest.approx(expected.std(ddof=0), rel=1e-12)


def test_variance_survives_a_large_offset() -> None:
    values = 1.7e15 + np.arange(10_000.0) * 1e6  # each second of some hours of 2023, in microseconds

    assert fold(values, 13).variance == pytest.approx((10_000**2 - 1) / 12 * 1e12, rel=1e-9)


def test_infinities_are_counted_and_left_out_of_the_moments() -> None:
    found = NumberStatistics.of(np.array([INF, 1.0, NAN, 3.0, -INF, INF]))

    assert (found.count, found.missing, found.infinite, found.finite) == (6, 1, 3, 2)
    assert (found.mean, found.variance, found.minimum, found.maximum) == (2.0, 1.0, 1.0, 3.0)


@pytest.mark.parametrize("values", [[], [NAN, NAN], [INF, NAN]])
def test_a_block_without_a_value_changes_only_the_counts(values: list[float]) -> None:
    block, some = NumberStatistics.of(np.array(values)), NumberStatistics.of(np.array([1.0, 4.0]))

    for merged in (block.merge(some), some.merge(block)):
        assert merged.count == 2 + len(values)
        assert (merged.mean, merged.m2, merged.minimum, merged.maximum) == (2.5, 4.5, 1.0, 4.0)
    assert block.variance == 0.0


def test_the_same_fold_gives_the_same_bits_and_travels_unchanged() -> None:
    first, again = fold(column(), 17), fold(column(), 17)

    assert first == again
    assert pickle.loads(pickle.dumps(first)) == first


def test_repeated_values_equal_written_out_ones() -> None:
    found = NumberStatistics.of(np.array([2.0, NAN, INF, 5.0]), np.array([3, 2, 1, 4]))
    expected = NumberStatistics.of(np.array([2.0] * 3 + [NAN] * 2 + [INF] + [5.0] * 4))

    assert replace(found, mean=0.0, m2=0.0) == replace(expected, mean=0.0, m2=0.0)
    assert (found.mean, found.m2) == (pytest.approx(expected.mean), pytest.approx(expected.m2))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99, 1.0])
def test_quantiles_of_the_sample_equal_pandas(share: float) -> None:
    values = column()

    found = replace(NumberStatistics.of(values), sample=values).quantile(share)

    assert found == pytest.approx(pd.Series(values).quantile(share), rel=1e-12)


def test_quantile_without_a_value_in_the_sample_is_the_mean() -> None:
    assert replace(NumberStatistics.of(np.array([3.0, 5.0])), sample=np.array([NAN, INF])).quantile(0.5) == 4.0


def test_huge_values_overflow_without_a_warning() -> None:
    assert NumberStatistics.of(np.array([1e308, -1e308, 1e308])).m2 == INF


@settings(max_examples=60, deadline=None)
@given(st.lists(LETTERS, min_size=1, max_size=6))
def test_strings_equal_pandas(blocks: list[list[str | None]]) -> None:
    found = reduce(StringStatistics.merge, [StringStatistics.of(strings(block)) for block in blocks])
    rows = pd.Series([text for block in blocks for text in block], dtype=object)

    assert found.counts == rows.value_counts().to_dict()
    assert (found.count, found.missing, found.dropped_max) == (len(rows), rows.isna().sum(), 0)


def test_strings_rank_by_frequency_then_text() -> None:
    found = StringStatistics.of(strings(["ba", "ü", "ab", "ba", None, "ab", "", "ü", "ü"]))

    assert found.ranked() == [("ü", 3), ("ab", 2), ("ba", 2), ("", 1)]


@pytest.mark.parametrize(("rows", "dropped_max"), [("dccbbbaae", 1), ("ddccbbbaa", 2)])
def test_beyond_the_limit_the_most_frequent_stay(monkeypatch: pytest.MonkeyPatch, rows: str, dropped_max: int) -> None:
    monkeypatch.setattr(stats, "LIMIT", 3)

    found = StringStatistics.of(strings(list(rows)))

    assert found.counts == {"b": 3, "a": 2, "c": 2}
    assert found.dropped_max == dropped_max


@settings(max_examples=60, deadline=None)
@given(st.lists(LETTERS, min_size=1, max_size=6))
def test_counts_beyond_the_limit_keep_their_bound(blocks: list[list[str | None]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "LIMIT", 3)
        found = reduce(StringStatistics.merge, [StringStatistics.of(strings(block)) for block in blocks])
    rows = pd.Series([text for block in blocks for text in block], dtype=object)

    assert len(found.counts) <= 3
    for text, times in rows.value_counts().items():
        counted = found.counts.get(str(text), 0)
        assert counted <= times <= counted + found.dropped_max
    assert (found.count, found.missing) == (len(rows), rows.isna().sum())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.none() | st.text(max_size=3), max_size=20), min_size=1, max_size=6), st.randoms())
def test_complete_counts_are_the_same_in_any_order(blocks: list[list[str | None]], random: Random) -> None:
    states = [StringStatistics.of(strings(block)) for block in blocks]
    shuffled = random.sample(states, len(states))

    assert reduce(StringStatistics.merge, states) == reduce(StringStatistics.merge, shuffled)


def test_long_texts_are_kept_up_to_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "BYTES", 25)

    found = StringStatistics.of(strings(["é" * 10] * 3 + ["long text"] * 2 + ["abc"] * 2 + ["rest"]))

    assert (found.counts, found.dropped_max) == ({"é" * 10: 3, "abc": 2}, 2)


def test_a_column_of_identifiers_costs_no_more_than_the_limit() -> None:
    total = StringStatistics()
    for block in range(4):
        total = total.merge(
            StringStatistics.of(strings([f"user-{row:08d}" for row in range(block * 100_000, (block + 1) * 100_000)]))
        )

    assert (total.count, len(total.texts), total.dropped_max) == (400_000, stats.LIMIT, 2)
    assert total.ranked(2) == [("user-00000000", 1), ("user-00000001", 1)]
    assert len(pickle.dumps(total, 5)) < 8_000_000


def test_profiles_are_plain_json() -> None:
    values = np.array([1.0, NAN, INF, 3.0])
    numbers = replace(NumberStatistics.of(values), sample=values).profile()
    texts = StringStatistics.of(strings(["x", None, "y", "x"])).profile()

    assert (numbers["count"], numbers["missing"], numbers["infinite"]) == (4, 1, 1)
    assert (numbers["min"], numbers["max"], numbers["mean"], numbers["std"]) == (1.0, 3.0, 2.0, 1.0)
    assert numbers["quantiles"]["0.5"] == 2.0
    assert texts == {"count": 4, "missing": 1, "distinct": 2, "dropped_max": 0, "top": [["x", 2], ["y", 1]]}
    json.dumps(
        [numbers, texts, NumberStatistics().profile(), NumberStatistics.of(np.array([1e308, -1e308])).profile()], allow_nan=False
    )
