"""Steps over several columns: their contract, the co-moments behind pca, the passes they need, and what is refused."""

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
from sklearn import decomposition
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import StandardScaler

from pipelines.errors import DataError, SpecError
from pipelines.features.comoments import CoMoments
from pipelines.features.cross import Cross
from pipelines.features.passes import passes
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.stats import Numbers
from pipelines.registry import TRANSFORMS, load
from pipelines.schema import Column
from pipelines.spec import FeaturesSpec
from tests.unit.passing import TARGET, fit, table_of

NAN, INF = math.nan, math.inf
COLUMNS = [
    Column(name="temp", type="float64", kind="numeric"),
    Column(name="dewp", type="float64", kind="numeric"),
    Column(name="humid", type="int64", kind="numeric"),
    Column(name="late", type="bool", kind="boolean"),
    Column(name="origin", type="string", kind="categorical"),
    Column(name="dest", type="string", kind="categorical"),
    Column(name="gate", type="float64", kind="categorical"),
    Column(name="left", type="timestamp", kind="datetime"),
    Column(name="came", type="timestamp", kind="datetime"),
]
GROUPS: dict[str, Any] = {
    "route": {"columns": ["origin", "dest"], "steps": [{"cross": {"buckets": 64}}]},
    "mix": {"columns": ["origin", "gate", "late", "humid"], "steps": [{"cross": {"buckets": 1000}}, "scale"]},
    "coded": {"columns": ["origin", "dest"], "steps": ["index", {"cross": {"buckets": 9}}]},
    "spread": {"columns": ["temp", "dewp"], "steps": ["impute", "difference", "scale"]},
    "flown": {"columns": ["came", "left"], "steps": [{"difference": {"unit": "hours"}}]},
    "weather": {"columns": ["temp", "dewp", "humid"], "steps": ["impute", "scale", {"pca": {"components": 2}}]},
    "white": {
        "columns": ["temp", "humid", "late"],
        "steps": [{"impute": {"indicator": True}}, {"pca": {"components": 0.9, "whiten": True}}, "scale"],
    },
    "times": {"columns": ["left", "came"], "steps": ["impute", "since", {"pca": {"components": 1}}]},
}
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int64": st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1),
    "float64": st.floats(-1e9, 1e9) | st.sampled_from([-0.0, 0.0, 3.0]),
    "bool": st.booleans(),
    "string": st.sampled_from(["", "a", "é", "🛫"]) | st.text(max_size=3),
    "timestamp": st.integers(-(2**62), 2**62),
}
ROW = st.fixed_dictionaries({column.name: st.none() | VALUES[column.type] for column in COLUMNS})


def bits(values: Any) -> Any:
    values = np.asarray(values, np.float64)
    return np.where(np.isnan(values), NAN, values).view(np.uint64).tolist()


def of_rows(rows: list[dict[str, Any]]) -> pa.Table:
    target = pa.array([float(i) for i in range(len(rows))])
    return table_of(COLUMNS, target, **{column.name: [row[column.name] for row in rows] for column in COLUMNS})


def test_every_step_over_several_columns_is_in_the_contract() -> None:
    steps = {next(iter(step)) if isinstance(step, dict) else step for group in GROUPS.values() for step in group["steps"]}

    assert {name for name in TRANSFORMS if load(TRANSFORMS, name, "test").joins} <= steps


@settings(max_examples=60, deadline=None)
@given(seen=st.lists(ROW, min_size=2, max_size=8), rows=st.lists(ROW, max_size=8))
def test_blocks_rows_and_stored_json_give_the_same_bits(seen: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    features = FeaturesSpec.model_validate({"groups": GROUPS, "drop": ["gate"], "categorical": ["index"]})
    preprocessor = fit(of_rows(seen), COLUMNS, features, blocks=1)
    table = of_rows(rows)

    matrix = preprocessor.matrix(table)

    assert bits(matrix) == [bits(preprocessor.transform_row(row)) for row in rows]
    halves = [preprocessor.matrix(table.slice(0, 3)), preprocessor.matrix(table.slice(3))]
    assert bits(np.concatenate(halves)) == bits(matrix), "where a block is cut plays no part"
    text = json.dumps(preprocessor.to_json(), sort_keys=True, allow_nan=False)
    again = Preprocessor.from_json(json.loads(text))
    assert json.dumps(again.to_json(), sort_keys=True) == text
    assert bits(again.matrix(table)) == bits(matrix)
    for feature, column in zip(preprocessor.features, matrix.T, strict=True):
        codes = column[~np.isnan(column)]
        assert feature.cardinality is None or np.all((codes >= 0) & (codes < feature.cardinality))


def weather(rows: int = 3000, missing: float = 0.15) -> dict[str, Numbers]:
    generator = np.random.default_rng(4)
    temp = generator.normal(60, 18, rows)
    dewp = temp - generator.gamma(2.0, 8.0, rows)
    humid = np.round(80 - 0.5 * (temp - dewp) + generator.normal(0, 6, rows))
    table = {"temp": temp, "dewp": dewp, "humid": humid}
    return {name: np.where(generator.random(rows) < missing, NAN, values) for name, values in table.items()}


def weather_table(values: dict[str, Numbers]) -> tuple[pa.Table, list[Column]]:
    columns = [Column(name=name, type="float64", kind="numeric") for name in values]
    target = pa.array(np.arange(len(values["temp"]), dtype=np.float64))
    return table_of(columns, target, **values), columns


def test_features_are_named_after_the_group_and_columns_keep_their_own() -> None:
    table = of_rows([dict.fromkeys(column.name for column in COLUMNS) | {"temp": float(i), "origin": "a"} for i in range(3)])
    features = FeaturesSpec.model_validate(
        {
            "drop": ["dewp", "humid", "dest"],
            "numeric": [],
            "categorical": ["index"],
            "groups": {name: GROUPS[name] for name in ("route", "weather", "white", "spread")},
        }
    )

    names = [feature.name for feature in fit(table, COLUMNS, features).features]

    assert names[:3] == ["temp", "origin", "gate"]
    assert names[3:] == [
        *("route", "weather__0", "weather__1", "white__0", "temp__missing", "humid__missing", "late__missing", "spread"),
    ]


# Co-moments


def parts_of(columns: list[Numbers], blocks: int) -> CoMoments:
    cuts = [np.array_split(column, blocks) for column in columns]
    return reduce(CoMoments.merge, [CoMoments.of(part) for part in zip(*cuts, strict=True)])


@pytest.mark.parametrize("blocks", [1, 2, 9, 400])
def test_co_moments_of_blocks_equal_those_of_pandas(blocks: int) -> None:
    values = pd.DataFrame(weather())

    found = parts_of([values[name].to_numpy() for name in values], blocks)

    np.testing.assert_allclose(found.products / (found.counts - 1), values.cov().to_numpy(), rtol=1e-10)
    np.testing.assert_allclose(np.diag(found.means), values.mean(), rtol=1e-12)
    assert np.array_equal(found.counts, values.notna().T.astype(int) @ values.notna().astype(int))
    assert found.missing.tolist() == values.isna().sum().tolist() and not found.infinite.any()


SMALL = st.none() | st.integers(-5, 5).map(float) | st.just(1e6)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(SMALL, SMALL, SMALL), min_size=1, max_size=20),
    blocks=st.integers(1, 5),
    fills=st.permutations([0, 1, 2]),
)
def test_filling_and_scaling_co_moments_equals_filling_and_scaling_the_rows(
    rows: list[tuple[float | None, ...]], blocks: int, fills: list[int]
) -> None:
    columns = [np.array([NAN if value is None else value for value in column]) for column in zip(*rows, strict=True)]
    found = parts_of(columns, min(blocks, len(rows)))
    by_hand = list(columns)

    for at in fills[:2]:
        found = found.filled(at, 2.5)
        by_hand[at] = np.where(np.isnan(by_hand[at]), 2.5, by_hand[at])
    found = found.scaled(fills[0], 1.0, 4.0).scaled(fills[2], -3.0, 0.5)
    by_hand[fills[0]] = (by_hand[fills[0]] - 1.0) / 4.0
    by_hand[fills[2]] = (by_hand[fills[2]] + 3.0) / 0.5
    found = found.filled(fills[2], 0.25)
    by_hand[fills[2]] = np.where(np.isnan(by_hand[fills[2]]), 0.25, by_hand[fills[2]])

    expected = CoMoments.of(by_hand)
    assert np.array_equal(found.counts, expected.counts) and not found.missing.any()
    np.testing.assert_allclose(found.means, expected.means, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.products, expected.products, rtol=1e-9, atol=1e-3)


def test_co_moments_survive_a_large_offset() -> None:
    first, second = np.arange(10_000.0) * 1e6, np.tile([0.0, 1e6], 5000)

    found = parts_of([1e12 + first, 1e12 + second], 13)

    np.testing.assert_allclose(found.products / 9999, np.cov(first, second), rtol=1e-9, atol=1e-9 * first.std() * second.std())


# pca


def test_pca_behind_impute_and_scale_equals_scikit_learn_after_one_pass() -> None:
    values = weather()
    table, columns = weather_table(values)
    steps = ["impute", "scale", {"pca": {"components": 3}}]
    features = FeaturesSpec.model_validate({"drop": list(values), "groups": {"w": {"columns": list(values), "steps": steps}}})

    found = fit(table, columns, features, blocks=7).matrix(table)

    assert passes({}, features.groups) == []
    filled = StandardScaler().fit_transform(SimpleImputer().fit_transform(np.stack([*values.values()], axis=1)))
    np.testing.assert_allclose(found, decomposition.PCA(3).fit_transform(filled), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("components", [1, 2, 0.5, 0.9, 0.99])
def test_number_of_components_and_whitening_equal_scikit_learn(components: float) -> None:
    values = weather(missing=0.0)
    table, columns = weather_table(values)
    steps = [{"pca": {"components": components, "whiten": True}}]
    features = FeaturesSpec.model_validate({"drop": list(values), "groups": {"w": {"columns": list(values), "steps": steps}}})

    found = fit(table, columns, features).matrix(table)

    expected = decomposition.PCA(components, whiten=True, svd_solver="full").fit_transform(np.stack([*values.values()], axis=1))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_column_that_says_nothing_new_is_not_blown_up_by_whitening() -> None:
    values = weather(missing=0.0)
    values["again"], values["same"] = values["temp"] * 2.0, np.full(3000, 0.1)
    table, columns = weather_table(values)
    steps = [{"pca": {"components": 5, "whiten": True}}]
    features = FeaturesSpec.model_validate({"drop": list(values), "groups": {"w": {"columns": list(values), "steps": steps}}})

    found = fit(table, columns, features).matrix(table)

    assert np.all(np.abs(found[:, 3:]) < 1e-6)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 8, 13])
def test_the_sign_does_not_hang_on_rounding_where_loadings_are_as_large(blocks: int) -> None:
    values = {name: column for name, column in weather().items() if name != "humid"}
    table, columns = weather_table(values)
    steps = ["impute", "scale", {"pca": {"components": 2}}]
    features = FeaturesSpec.model_validate({"drop": list(values), "groups": {"w": {"columns": list(values), "steps": steps}}})

    loadings = fit(table, columns, features, blocks=blocks).to_json()["steps"][-1]["state"]["loadings"]

    np.testing.assert_allclose(loadings, np.array([[1, 1], [1, -1]]) * 0.5**0.5, rtol=1e-9)


def test_blocks_change_no_bit_when_they_are_merged_in_order() -> None:
    columns = [*weather().values()]

    first, again = parts_of(columns, 17), parts_of(columns, 17)

    assert all(bits(getattr(first, name)) == bits(getattr(again, name)) for name in ("counts", "means", "apart", "products"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, NAN, 2.0, 3.0], "'dewp' has 1 missing values in the train rows; put 'impute' before it"),
        ([1.0, INF, 2.0, 3.0], "'dewp' has 1 infinite values in the train rows; drop such rows with data.where"),
        ([1e300, -1e300, 1e300, 0.0], "the values are too large to take their covariance; put 'scale' before it"),
    ],
)
def test_pca_refuses_what_has_no_covariance(values: list[float], message: str) -> None:
    columns = COLUMNS[:2]
    table = table_of(columns, pa.array([0.0, 1.0, 2.0, 3.0]), temp=[1.0, 2.0, 3.0, 4.0], dewp=values)
    group = {"columns": ["temp", "dewp"], "steps": [{"pca": {"components": 1}}]}

    with pytest.raises(DataError) as error:
        fit(table, columns, FeaturesSpec.model_validate({"groups": {"w": group}}), blocks=2)

    assert str(error.value).startswith(f"features: step 'pca' of group 'w': {message}")


# A second pass


def test_pca_behind_a_step_without_algebra_takes_a_second_pass_and_is_exact() -> None:
    values = weather(missing=0.0)
    columns = [Column(name=name, type="int64", kind="categorical") for name in values]
    table = table_of(columns, pa.array(np.arange(3000.0)), **{name: found.astype(np.int64) for name, found in values.items()})
    steps = ["index", "scale", {"pca": {"components": 3}}]
    features = FeaturesSpec.model_validate({"drop": list(values), "groups": {"w": {"columns": list(values), "steps": steps}}})

    found = fit(table, columns, features, blocks=5).matrix(table)

    assert passes({}, features.groups) == [["step 'pca' of group 'w' needs statistics of what 'index' makes"]]
    alone = FeaturesSpec.model_validate({"categorical": ["index", "scale"]})
    expected = decomposition.PCA(3).fit_transform(fit(table, columns, alone).matrix(table))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_passes_follow_from_the_chains_alone() -> None:
    by = {"columns": ["origin", "dest"], "steps": ["hash", "target_mean", "scale", {"pca": {"components": 2}}]}
    crossed = {"columns": ["origin", "dest"], "steps": ["cross", "target_mean"]}
    features = FeaturesSpec.model_validate({"groups": {"by": by, "route": crossed}})

    assert passes({"origin": [["index"], [{"impute": {"value": "?"}}, "target_mean"]]}, {}) == []
    assert passes({"origin": ["hash", "target_mean"]}, features.groups) == [
        [
            "step 'target_mean' of column 'origin' needs statistics of what 'hash' makes",
            "step 'target_mean' of group 'by' needs statistics of what 'hash' makes",
            "step 'target_mean' of group 'route' needs statistics of what 'cross' makes",
        ],
        ["step 'pca' of group 'by' needs statistics of what 'target_mean' makes"],
    ]


def test_nothing_is_gathered_where_no_step_needs_it() -> None:
    chains = Preprocessor.plan(COLUMNS, FeaturesSpec(categorical=["index"], numeric=["impute"]), {}, set())

    unfitted = Preprocessor.unfitted(COLUMNS, chains, {})

    assert not unfitted.wanted and not unfitted.inputs


# Crosses and differences


def test_values_of_crosses_are_pinned() -> None:
    cross = Cross(1024)

    rows: list[tuple[Any, ...]] = [("EWR", "IAH"), (None, ""), (1.0, NAN, "🛫")]
    assert [cross.row(*values) for values in rows] == [[264.0], [747.0], [536.0]]


def test_a_cross_keeps_apart_what_only_reads_alike() -> None:
    alike = [("ab", "c"), ("a", "bc"), ("abc", ""), ("abc", None), (None, "abc"), ("", "abc"), (None, None), ("", "")]

    codes = {Cross(100_000).code(*texts) for texts in alike}

    assert len(codes) == len(alike)


def test_a_cross_hashes_each_combination_of_a_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[str | None, ...]] = []
    code = Cross.code
    monkeypatch.setattr(Cross, "code", lambda self, *texts: hashed.append(texts) or code(self, *texts))
    origins = pa.array(["EWR", "JFK", None] * 1000, pa.large_string())

    Cross(64).block(origins, np.array([1.0, 2.0, NAN] * 1000), origins)

    assert sorted(map(str, hashed)) == sorted(map(str, [("EWR", "1", "EWR"), ("JFK", "2", "JFK"), (None, None, None)]))


def test_difference_of_datetimes_and_numbers_equals_pandas() -> None:
    left, came = pd.Timestamp("2013-01-01T10:00"), pd.Timestamp("2013-01-02T11:30")
    table = of_rows(
        [dict.fromkeys((c.name for c in COLUMNS), None) | {"temp": 3.0, "dewp": 1.0, "left": left.value // 1000, "came": came.value // 1000}]
        * 2
    )  # fmt: skip
    groups = {"flown": GROUPS["flown"], "days": {"columns": ["left", "came"], "steps": [{"difference": {"unit": "days"}}]},
              "dry": {"columns": ["temp", "dewp"], "steps": ["difference"]}}  # fmt: skip
    features = FeaturesSpec.model_validate({"groups": groups})

    row = fit(table, COLUMNS, features).matrix(table)[0]

    assert row.tolist() == [25.5, -25.5 / 24, 2.0]


# What is refused


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"groups": {"g": {"columns": ["origin", "dst"], "steps": ["cross"]}}},
            "features.groups.g.columns: there is no column 'dst'; did you mean 'dest'? (known: ",
        ),
        (
            {"groups": {"g": {"columns": ["origin", "target"], "steps": ["cross"]}}},
            "features.groups.g.columns: column 'target' is the target or a key and no feature; take it out",
        ),
        (
            {"groups": {"g": {"columns": ["origin", "origin"], "steps": ["cross"]}}},
            "features.groups.g.columns: column 'origin' stands there twice; take it out once",
        ),
        (
            {"groups": {"g": {"columns": ["origin", "dest"], "steps": ["index"]}}},
            "features.groups.g: none of its steps reads all columns of the group; add one, such as 'cross', 'difference' or 'pca'",
        ),
        (
            {"groups": {"g": {"columns": ["origin", "dest"], "steps": ["cross", "pca"]}}},
            "features.groups.g.steps.pca.components is missing: expected an integer >= 1 or a number > 0 and < 1",
        ),
        (
            {"groups": {"g": {"columns": ["origin", "dest"], "steps": ["cross", "difference"]}}},
            "features.groups.g: 'cross' and 'difference' each read all columns of the group, expected one such step; make more groups",
        ),
        (
            {"columns": {"temp": [{"pca": {"components": 1}}]}},
            "features.columns.temp: step 'pca' reads several columns, but this is the chain of one; "
            "put it under features.groups: {NAME: {columns: [...], steps: [...]}}",
        ),
        (
            {"groups": {"g": {"columns": ["temp", "origin"], "steps": ["impute", {"pca": {"components": 1}}]}}},
            "features.groups.g: step 'impute' on column 'origin' (categorical) fills texts with a text; "
            "write {impute: {value: unknown}}",
        ),
        (
            {"groups": {"g": {"columns": ["temp", "origin"], "steps": [{"pca": {"components": 1}}]}}},
            "features.groups.g: step 'pca' takes numbers, but column 'origin' is categorical; put 'frequency' before it or take 'pca' out",
        ),
        (
            {"groups": {"g": {"columns": ["left", "came"], "steps": ["cross"]}}},
            "features.groups.g: step 'cross' takes numbers or text, but column 'left' is datetime",
        ),
        (
            {"groups": {"g": {"columns": ["temp", "dewp"], "steps": [{"pca": {"components": 3}}]}}},
            "features.groups.g: step 'pca' makes at most as many components as there are columns, 2, found 3",
        ),
        (
            {"groups": {"g": {"columns": ["temp", "dewp", "humid"], "steps": ["difference"]}}},
            "features.groups.g: step 'difference' takes two columns, found 3; make a group for each pair",
        ),
        (
            {"groups": {"g": {"columns": ["temp", "left"], "steps": ["difference"]}}},
            "features.groups.g: step 'difference' takes two numbers or two datetimes, found one of each; set data.kinds of one of them",
        ),
        (
            {"groups": {"g": {"columns": ["came", "left"], "steps": ["difference"]}}},
            "features.groups.g: step 'difference' needs the unit of the time between datetimes; write {difference: {unit: hours}}",
        ),
        (
            {"groups": {"g": {"columns": ["temp", "dewp"], "steps": [{"difference": {"unit": "days"}}]}}},
            "features.groups.g: step 'difference' has a unit only for datetimes, found numbers; take 'unit' out",
        ),
        (
            {"groups": {"g": {"columns": ["temp", "dewp"], "steps": ["difference", "index"]}}},
            "features.groups.g: step 'index' takes text, but 'difference' before it gives numbers; take 'index' out",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(features: dict[str, Any], message: str) -> None:
    columns = [*COLUMNS, Column(name=TARGET, type="float64", kind="numeric")]

    with pytest.raises(SpecError) as error:
        Preprocessor.plan(columns, FeaturesSpec.model_validate(features), {}, {TARGET})

    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_dropped_column_has_no_features_of_its_own_but_a_group_reads_it() -> None:
    features = FeaturesSpec.model_validate({"drop": ["origin"], "categorical": ["index"], "groups": {"route": GROUPS["route"]}})

    assert "origin" not in Preprocessor.plan(COLUMNS, features, {}, set())
    rows = [dict.fromkeys(column.name for column in COLUMNS) | {"origin": text} for text in "abc"]
    found = fit(of_rows(rows), COLUMNS, features)
    assert [feature.name for feature in found.features] == ["dest", "gate", "route"]
    assert "origin" in [column.name for column in found.inputs]
