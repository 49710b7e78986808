"""Cross-fitted means of the target: equal to pandas by hand, blind to a row's own target, bounded in memory."""

from __future__ import annotations

import json
import math
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError
from pipelines.features import target_sums
from pipelines.features.cross import distinct
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.stats import Numbers
from pipelines.features.target_mean import TargetMean
from pipelines.features.target_sums import TargetSums
from pipelines.schema import Column
from pipelines.spec import FeaturesSpec
from tests.unit.passing import fit, table_of

NAN = math.nan
CITY = [Column(name="city", type="string", kind="categorical")]
PLAIN = FeaturesSpec(categorical=[{"target_mean": {"smoothing": 3.0, "folds": 4}}])


def people(rows: int = 800, seed: int = 5) -> tuple[list[str | None], Numbers, Numbers]:
    """Cities, a number to predict, and places."""
    generator = np.random.default_rng(seed)
    cities = generator.choice(["Ulm", "Bern", "Graz", "Łódź", None], rows, p=[0.5, 0.3, 0.1, 0.04, 0.06]).tolist()
    amount = generator.normal(5, 2, rows) + np.array([len(city or "") for city in cities])
    return cities, amount, generator.random(rows)


def by_hand(
    cities: list[str | None], target: Numbers, places: Numbers, smoothing: float = 3.0, folds: int = 4
) -> tuple[Numbers, Numbers]:
    """The encoding of train rows, and that of other rows with the same cities."""
    frame = pd.DataFrame({"city": [city or "missing" for city in cities], "y": target, "fold": np.floor(places * folds)})

    def encoded(seen: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
        prior, grouped = seen["y"].mean(), seen.groupby("city")["y"]
        means = (grouped.sum() + smoothing * prior) / (grouped.count() + smoothing)
        return rows["city"].map(means).fillna(prior)

    train = pd.concat([encoded(frame[frame.fold != fold], rows) for fold, rows in frame.groupby("fold")]).sort_index()
    return train.to_numpy(), encoded(frame, frame).to_numpy()


def cities_table(cities: list[str | None], target: Any) -> pa.Table:
    return table_of(CITY, target if isinstance(target, pa.Array) else pa.array(target), city=cities)


@pytest.mark.parametrize("blocks", [1, 2, 37])
def test_regression_equals_pandas_fold_by_fold(blocks: int) -> None:
    cities, amount, places = people()
    table = cities_table(cities, amount)

    preprocessor = fit(table, CITY, PLAIN, places=places, blocks=blocks)

    train, others = by_hand(cities, amount, places)
    np.testing.assert_allclose(preprocessor.transform(table, places)[0], train, rtol=1e-12)
    np.testing.assert_allclose(preprocessor.transform(table)[0], others, rtol=1e-12)
    assert not np.allclose(train, others, rtol=1e-4)


def test_rows_of_other_splits_in_a_block_get_the_mean_of_all_train_rows() -> None:
    cities, amount, places = people()
    preprocessor = fit(cities_table(cities, amount), CITY, PLAIN, places=places)
    mixed = np.where(np.arange(800) % 3 == 0, NAN, places)

    [found] = preprocessor.transform(cities_table(cities, amount), mixed)

    train, others = by_hand(cities, amount, places)
    np.testing.assert_allclose(found, np.where(np.isnan(mixed), others, train), rtol=1e-12)


@pytest.mark.parametrize("values", [[False, True], [0, 1], [0.0, 1.0], ["no", "yes"]])
def test_binary_is_the_share_of_the_positive_class(values: list[Any]) -> None:
    cities, amount, places = people()
    positive = amount > 8
    table = cities_table(cities, pa.array([values[i] for i in positive.astype(int)]).cast(canonical(values[0])))

    preprocessor = fit(table, CITY, PLAIN, places=places)

    train, others = by_hand(cities, positive.astype(float), places)
    assert [feature.name for feature in preprocessor.features] == ["city"]
    np.testing.assert_allclose(preprocessor.transform(table, places)[0], train, rtol=1e-12)
    np.testing.assert_allclose(preprocessor.transform(table)[0], others, rtol=1e-12)


def canonical(value: Any) -> pa.DataType:
    return pa.large_string() if isinstance(value, str) else pa.scalar(value).type


def test_multiclass_is_the_share_of_each_class() -> None:
    cities, amount, places = people()
    kinds = np.array(["low", "mid", "top"])[np.digitize(amount, [7, 10])]
    table = cities_table(cities, pa.array(kinds.tolist(), pa.large_string()))

    preprocessor = fit(table, CITY, PLAIN, places=places)

    assert [feature.name for feature in preprocessor.features] == ["city__low", "city__mid", "city__top"]
    for kind, column in zip(("low", "mid", "top"), preprocessor.transform(table, places), strict=True):
        np.testing.assert_allclose(column, by_hand(cities, (kinds == kind).astype(float), places)[0], rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 9)), min_size=4, max_size=30),
    row=st.integers(0, 29),
    other=st.sampled_from([-1e9, 0.1, 1e15]),
    smoothing=st.sampled_from([0.0, 0.5, 20.0]),
    blocks=st.integers(1, 4),
)
def test_a_rows_own_target_plays_no_part_in_what_it_becomes(
    rows: list[tuple[str | None, int]], row: int, other: float, smoothing: float, blocks: int
) -> None:
    row %= len(rows)
    cities = [city for city, _ in rows]
    target = np.array([number + 0.25 for _, number in rows])
    places = np.random.default_rng(len(rows)).random(len(rows))
    features = FeaturesSpec(categorical=[{"target_mean": {"smoothing": smoothing, "folds": 3}}])
    target[:2] = -1.5, 2.5  # at least two different targets, whatever the row has
    changed = target.copy()
    changed[row] = other

    before, after = (
        fit(cities_table(cities, y), CITY, features, places=places, blocks=blocks).transform(cities_table(cities, y), places)[0]
        for y in (target, changed)
    )

    assert before[row] == after[row], "not by a bit"


@settings(max_examples=60, deadline=None)
@given(
    seen=st.lists(st.tuples(st.none() | st.text(max_size=2), st.integers(0, 30)), min_size=2, max_size=12),
    rows=st.lists(st.none() | st.text(max_size=2), max_size=8),
    steps=st.sampled_from(
        [["target_mean"], [{"impute": {"value": "?"}}, "target_mean"], ["index", "target_mean"], ["hash", "target_mean", "scale"]]
    ),
)
def test_blocks_rows_and_stored_json_give_the_same_bits(seen: list[Any], rows: list[str | None], steps: list[Any]) -> None:
    target = pa.array([-0.5, *(number * 0.3 for _, number in seen[1:])])
    preprocessor = fit(cities_table([city for city, _ in seen], target), CITY, FeaturesSpec(categorical=steps), blocks=2)
    table = cities_table(rows, pa.array([1.0] * len(rows)))

    matrix = preprocessor.matrix(table)

    assert bits(matrix) == [bits(preprocessor.transform_row({"city": city})) for city in rows]
    text = json.dumps(preprocessor.to_json(), sort_keys=True, allow_nan=False)
    again = Preprocessor.from_json(json.loads(text))
    assert json.dumps(again.to_json(), sort_keys=True) == text
    assert bits(again.matrix(table)) == bits(matrix)


def bits(values: Any) -> Any:
    return np.asarray(values, np.float64).view(np.uint64).tolist()


def test_a_missing_city_is_a_category_and_an_unknown_one_gets_the_prior() -> None:
    cities: list[str | None] = ["a", "a", None, None, "b"]
    preprocessor = fit(
        cities_table(cities, [1.0, 3.0, 5.0, 7.0, 9.0]), CITY, FeaturesSpec(categorical=[{"target_mean": {"smoothing": 0.0}}])
    )

    found = [preprocessor.transform_row({"city": city})[0] for city in ("a", None, "b", "new")]

    assert found == [2.0, 6.0, 9.0, 5.0]


def test_steps_behind_it_are_fitted_to_what_train_rows_become() -> None:
    cities, amount, places = people()
    table = cities_table(cities, amount)

    found = fit(table, CITY, FeaturesSpec(categorical=[{"target_mean": {"folds": 4, "smoothing": 3.0}}, "scale"]), places=places)

    train, _ = by_hand(cities, amount, places)
    np.testing.assert_allclose(found.transform(table, places)[0], (train - train.mean()) / train.std(), rtol=1e-9, atol=1e-12)


def test_behind_another_step_a_second_pass_gives_the_exact_means() -> None:
    cities, amount, places = people()
    table = cities_table(cities, amount)

    found = fit(table, CITY, FeaturesSpec(categorical=["index", *PLAIN.categorical]), places=places)  # type: ignore[list-item,misc]

    train, others = by_hand(cities, amount, places)
    np.testing.assert_allclose(found.transform(table, places)[0], train, rtol=1e-12)
    np.testing.assert_allclose(found.transform(table)[0], others, rtol=1e-12)


def test_a_stored_preprocessor_keeps_nothing_of_the_folds() -> None:
    cities, amount, places = people()
    stored = fit(cities_table(cities, amount), CITY, PLAIN, places=places).to_json()

    assert set(stored["steps"][0]["state"]) == {"texts", "means", "prior", "classes"}
    with pytest.raises(AssertionError, match="rows that were not trained on"):
        Preprocessor.from_json(stored).transform(cities_table(cities, amount), places)


# What the pass keeps


def sums_of(cities: list[str | None], target: Any, places: Numbers, blocks: int) -> TargetSums:
    parts = []
    for rows in np.array_split(np.arange(len(cities)), blocks):
        block = pa.array([cities[row] for row in rows], pa.large_string())
        labels = pa.chunked_array([pa.array([target[row] for row in rows])])
        parts.append(TargetSums.of(*distinct(block), np.floor(places[rows] * 4), 4, labels))
    return reduce(TargetSums.merge, parts)


def test_sums_of_blocks_equal_those_of_the_whole() -> None:
    cities, amount, places = people()
    target = np.floor(amount).tolist()

    whole, merged = sums_of(cities, target, places, 1), sums_of(cities, target, places, 23)

    assert merged.labels is not None and set(merged.labels) == set(target)
    order = [merged.texts.to_pylist().index(text) for text in whole.texts.to_pylist()]
    labels = [0, 1, *(2 + merged.labels.index(label) for label in whole.labels or [])]
    assert np.array_equal(merged.cells[order][:, :, labels], whole.cells)  # sums of integers: exact
    assert np.array_equal(merged.totals[:, labels], whole.totals)


def test_many_different_targets_are_only_summed() -> None:
    cities, amount, places = people()

    found = sums_of(cities, amount.tolist(), places, 40)  # fewer than LABELS in each block

    assert found.labels is None and found.cells.shape == (5, 4, 2)
    assert found.totals[:, 1].sum() == pytest.approx(amount.sum(), rel=1e-12)


def test_a_target_too_large_for_a_mean_is_refused() -> None:
    table = cities_table(["a"] * 6, [1e308, 1.5e308, -1e308, 1e308, 1.7e308, 1.7e308])

    with pytest.raises(DataError, match="the target 'target' is too large to take its mean; scale it under data.derive"):
        fit(table, CITY, PLAIN, blocks=2)


def test_a_target_of_many_classes_is_refused() -> None:
    cities, _, places = people()
    classes = pa.array([f"c{i % 150}" for i in range(800)], pa.large_string())

    with pytest.raises(DataError) as error:
        fit(cities_table(cities, classes), CITY, PLAIN, places=places)

    assert str(error.value) == (
        "features: step 'target_mean' on column 'city': it makes a feature for each class, and the target 'target' has more "
        "than 100; use 'index' or 'hash'"
    )


@pytest.mark.parametrize("blocks", [1, 8])
def test_memory_is_bounded_and_forgotten_categories_get_the_prior(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    monkeypatch.setattr(target_sums, "CELLS", 4 * 4 * 3)  # three categories of 4 folds and 4 columns
    cities: list[str | None] = [*("a" * 50), *("b" * 40), *("c" * 30), *(f"x{i}" for i in range(200))]
    order = np.random.default_rng(0).permutation(320)
    cities, target = [cities[i] for i in order], (order % 2 == 0)
    places = np.random.default_rng(1).random(320)

    found = fit(cities_table(cities, target.tolist()), CITY, PLAIN, places=places, blocks=blocks)

    [step] = found.steps
    assert isinstance(step.transform, TargetMean)
    assert sorted(filter(None, step.transform.texts)) == ["a", "b", "c"]
    assert found.transform_row({"city": "x7"}) == [0.5] == step.transform.prior, "the prior is that of all rows"


def test_a_column_of_identifiers_takes_no_more_memory_the_longer_it_is() -> None:
    found = None
    for part in range(3):
        texts = pa.array([f"{part}-{i}" for i in range(300_000)], pa.large_string())
        target = pa.chunked_array([pa.array(np.arange(300_000) % 2)])
        state = TargetSums.of(*distinct(texts), np.zeros(300_000), 5, target)
        found = state if found is None else found.merge(state)

    assert found is not None and found.cells.size <= target_sums.CELLS
    assert found.totals.sum(axis=0).tolist() == [900_000.0, 450_000.0, 450_000.0, 450_000.0]
