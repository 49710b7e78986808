"""A row's split is a pure function of its identity and the seed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.split import assign, grouped, identity_of_rows, identity_of_values, in_folds, in_sample, salted
from pipelines.spec import SplitSpec

NO_OWN: frozenset[str] = frozenset()


def test_the_hash_of_a_row_never_changes() -> None:
    # Pinned: with other values every stored split would mean other rows.
    assert identity_of_rows(42, 0, 3).tolist() == [5006236285904387910, 12234890524640051791, 10433078466291914965]
    assert identity_of_values([pa.chunked_array([["a", None]])]).tolist() == [4331099054663464410, 14525476943683229412]
    assert identity_of_values([pa.chunked_array([[1, 2]]), pa.chunked_array([["x", "y"]])]).tolist() == [
        12092307977031217459,
        8892220035464889131,
    ]


def test_the_split_of_a_row_never_changes() -> None:
    codes = assign(SplitSpec(), identity_of_rows(42, 0, 40), None, NO_OWN, None)
    assert "".join("tve"[code] for code in codes) == "tttttetttttttttetvttttttettttttttttvtttt"


def test_the_fold_of_a_row_never_changes() -> None:
    folds = np.floor(in_folds(identity_of_rows(42, 0, 40), None) * 5).astype(int)
    assert "".join(map(str, folds)) == "1341320040112242043422434002112020232031"


def test_folds_are_of_one_size_and_have_nothing_to_do_with_split_and_sample() -> None:
    identity = identity_of_rows(1, 0, 200_000)
    folds = np.floor(in_folds(identity, None) * 5).astype(int)
    for rows in (slice(None), assign(SplitSpec(), identity, None, NO_OWN, None) == 0, in_sample(identity, 0.3)):
        np.testing.assert_allclose(np.bincount(folds[rows]) / len(folds[rows]), 0.2, atol=0.005)


def test_rows_of_a_group_are_in_one_fold_and_rows_without_one_are_by_themselves() -> None:
    tails = [None if i % 10 == 0 else f"N{i % 7}" for i in range(5000)]
    places = in_folds(identity_of_rows(3, 0, 5000), pa.chunked_array([pa.array(tails, pa.large_string())]))
    assert {len(set(places[np.array([tail == f"N{i}" for tail in tails])])) for i in range(7)} == {1}
    assert len(set(places[::10])) == 500


@given(first=st.integers(0, 10**6), cut=st.integers(1, 99))
def test_reading_in_pieces_gives_the_same_rows(first: int, cut: int) -> None:
    whole = identity_of_rows(7, first, 100)
    pieces = [identity_of_rows(7, first, cut), identity_of_rows(7, first + cut, 100 - cut)]
    assert np.array_equal(whole, np.concatenate(pieces))


def test_fractions_are_met() -> None:
    codes = assign(SplitSpec(test=0.2, valid=0.1), identity_of_rows(1, 0, 200_000), None, NO_OWN, None)
    shares = np.bincount(codes) / len(codes)
    assert np.allclose(shares, [0.7, 0.1, 0.2], atol=0.004)


def test_another_seed_gives_other_rows() -> None:
    rows = identity_of_rows(1, 0, 1000)
    assert not np.array_equal(
        assign(SplitSpec(seed=1), rows, None, NO_OWN, None), assign(SplitSpec(seed=2), rows, None, NO_OWN, None)
    )


def test_sample_and_split_are_independent() -> None:
    rows = identity_of_rows(1, 0, 100_000)
    test = assign(SplitSpec(test=0.5, valid=0.0), rows, None, NO_OWN, None) == 2
    sampled = salted(rows, 99) < np.uint64(2**63)
    assert abs((test & sampled).mean() - 0.25) < 0.01


def test_a_group_is_never_split() -> None:
    groups = pa.chunked_array([[f"tail{i % 97}" for i in range(5000)]])
    codes = assign(SplitSpec(by="group", column="g", test=0.3, valid=0.2), identity_of_rows(1, 0, 5000), groups, NO_OWN, None)
    by_group = {group: set(codes[i::97].tolist()) for i, group in enumerate(range(97))}
    assert all(len(found) == 1 for found in by_group.values())
    assert set(codes.tolist()) == {0, 1, 2}


def test_rows_without_a_group_are_split_one_by_one() -> None:
    groups = pa.chunked_array([pa.nulls(5000, pa.large_string())])
    codes = assign(SplitSpec(by="group", column="g", test=0.3, valid=0.2), identity_of_rows(1, 0, 5000), groups, NO_OWN, None)
    assert set(codes.tolist()) == {0, 1, 2}


def test_a_time_split_puts_the_latest_rows_last() -> None:
    times = pa.chunked_array([np.array(["2013-01-01", "2013-06-01", "2013-07-01", "2013-12-01", "NaT"], "datetime64[us]")])
    spec = SplitSpec(by="time", column="t", cuts=["2013-06-01T00:00:00", "2013-12-01T00:00:00"])
    assert assign(spec, identity_of_rows(1, 0, 5), times, NO_OWN, None).tolist() == [0, 1, 1, 2, 0]


def test_files_given_to_a_split_stay_in_it() -> None:
    rows = identity_of_rows(1, 0, 1000)
    assert set(assign(SplitSpec(), rows, None, frozenset({"train", "test"}), "test").tolist()) == {2}
    # train has its own files, test too: only valid is taken from the train rows
    assert set(assign(SplitSpec(), rows, None, frozenset({"train", "test"}), "train").tolist()) == {0, 1}


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 5), max_size=80))
def test_rows_of_one_number_come_together_in_their_order(numbers: list[int]) -> None:
    order, ends = grouped(np.array(numbers, np.int16), 6)

    places = np.arange(len(numbers))[order]
    for number in range(6):
        assert places[ends[number] : ends[number + 1]].tolist() == [i for i, one in enumerate(numbers) if one == number]
