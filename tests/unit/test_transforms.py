"""The contract of a transform, over everything that is registered; then each transform against literals, pandas and scikit-learn."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import (
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)

from pipelines.errors import DataError
from pipelines.features.categorical import Frequency, Hash, Index, OneHot
from pipelines.features.dates import Cyclic, Parts, Since
from pipelines.features.distribution import Bin, Clip, Log1p, Quantile
from pipelines.features.numeric import Impute, Scale
from pipelines.features.stats import Numbers, NumberStatistics, Statistics, StringStatistics
from pipelines.features.transform import TEXT, Feature, Form, Transform, Values
from pipelines.features.zones import offsets
from pipelines.registry import TRANSFORMS, load

NAN, INF = math.nan, math.inf


class Case(NamedTuple):
    """A transform with parameters on a column of one form."""

    step: str
    params: dict[str, Any]
    form: Form

    @property
    def transform(self) -> type[Transform]:
        found: type[Transform] = load(TRANSFORMS, self.step, "test")
        return found

    @property
    def feature(self) -> Feature:
        if self.form == "code":
            return Feature(name="x", kind="categorical", cardinality=7)
        return Feature(name="x", kind=self.form)

    def fit(self, rows: list[Any]) -> Transform:
        return self.transform.fit(self.transform.Params.model_validate(self.params), statistics_of(self.form, rows))


CASES = [
    Case("impute", {}, "numeric"),
    Case("impute", {"strategy": "median", "indicator": True}, "numeric"),
    Case("impute", {"value": -1}, "boolean"),
    Case("impute", {"indicator": True}, "datetime"),
    Case("impute", {"value": "µ?", "indicator": True}, "categorical"),
    Case("impute", {"value": ""}, "text"),
    Case("impute", {"strategy": "most_frequent"}, "numeric"),
    Case("impute", {"strategy": "most_frequent", "indicator": True}, "boolean"),
    Case("impute", {"strategy": "most_frequent"}, "categorical"),
    Case("scale", {}, "numeric"),
    Case("scale", {"method": "minmax"}, "numeric"),
    Case("scale", {"method": "maxabs"}, "numeric"),
    Case("scale", {"method": "robust"}, "numeric"),
    Case("scale", {}, "code"),
    Case("clip", {}, "numeric"),
    Case("clip", {"quantiles": [None, 0.5]}, "numeric"),
    Case("clip", {"bounds": [-1, 40]}, "numeric"),
    Case("clip", {"bounds": [0.0, None]}, "numeric"),
    Case("log1p", {}, "numeric"),
    Case("log1p", {"signed": True}, "numeric"),
    Case("quantile", {}, "numeric"),
    Case("quantile", {"output": "normal", "landmarks": 5}, "numeric"),
    Case("bin", {}, "numeric"),
    Case("bin", {"bins": 3, "method": "uniform"}, "numeric"),
    Case("index", {}, "categorical"),
    Case("index", {"min_count": 2}, "text"),
    Case("index", {"max_categories": 2, "min_count": 2}, "categorical"),
    Case("frequency", {}, "categorical"),
    Case("frequency", {}, "text"),
    Case("hash", {}, "categorical"),
    Case("hash", {"buckets": 2}, "text"),
    Case("onehot", {}, "categorical"),
    Case("onehot", {"max_categories": 2}, "text"),
    Case("length", {}, "text"),
    Case("length", {"which": ["words"]}, "categorical"),
    Case("ngrams", {"buckets": 16}, "text"),
    Case("ngrams", {"characters": [1, 4], "buckets": 5, "weight": "binary"}, "text"),
    Case("ngrams", {"words": [2, 3], "characters": [3, 3], "buckets": 5, "weight": "count", "lowercase": False}, "categorical"),
    Case("parts", {}, "datetime"),
    Case("parts", {"which": ["second", "minute", "quarter", "year"]}, "datetime"),
    Case("parts", {"which": ["day", "hour", "minute"], "zone": "America/New_York"}, "datetime"),
    Case("cyclic", {}, "datetime"),
    Case("cyclic", {"which": ["dayofyear"], "zone": "Australia/Lord_Howe"}, "datetime"),
    Case("since", {}, "datetime"),
    Case("since", {"unit": "seconds", "reference": "first"}, "datetime"),
    Case("since", {"reference": "last"}, "datetime"),
    Case("since", {"unit": "days", "reference": "2013-01-01T05:30:00.25+02:00"}, "datetime"),
]

FLOATS = st.floats(allow_subnormal=True, width=64) | st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.7e308, -1.7e308, 5e-324])
INSTANTS = st.just(NAN) | st.integers(-(2**63), 2**63 - 1).map(float) | st.integers(0, 2_000_000_000_000_000).map(float) | FLOATS
TEXTS = st.none() | st.sampled_from(["", "a", "b", "é", "e\u0301", "日本", "🛫", "NaN"]) | st.text(max_size=4)
NUMBERS = {
    "numeric": FLOATS,
    "boolean": st.sampled_from([0.0, 1.0, NAN]),
    "datetime": INSTANTS,
    "code": st.sampled_from([0.0, 6.0, NAN]),
}
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.step}-{case.form}-{CASES.index(case)}")


def rows_of(form: Form) -> st.SearchStrategy[list[Any]]:
    values: st.SearchStrategy[Any] = TEXTS if form in TEXT else NUMBERS[form]
    return st.lists(values, max_size=12)


def block_of(form: Form, rows: list[Any]) -> Values:
    return pa.array(rows, pa.large_string()) if form in TEXT else np.array(rows, np.float64)


def encoded_block(rows: list[str | None]) -> pa.DictionaryArray:
    """As Parquet keeps texts: in an order of its own, with some that no row has."""
    texts = sorted({"none has it", *(text for text in rows if text is not None)}, reverse=True)
    return pa.DictionaryArray.from_arrays(
        pa.array([None if text is None else texts.index(text) for text in rows], pa.int32()), pa.array(texts, pa.string())
    )


def statistics_of(form: Form, rows: list[Any]) -> Statistics:
    values = block_of(form, rows)
    if isinstance(values, np.ndarray):
        return replace(NumberStatistics.of(values), sample=values)
    return replace(StringStatistics.of(values), sample=values)


def fitted(case: Case, rows: list[Any]) -> Transform:
    try:
        return case.fit(rows)
    except DataError:  # too large for a mean; test_values_too_large_are_refused
        assume(False)
        raise


def bits(column: Values) -> list[Any]:
    """What must be equal: texts, or the bits of numbers, where one NaN is as good as another."""
    if not isinstance(column, np.ndarray):
        return list(column.to_pylist())
    assert column.dtype == np.float64
    return np.where(np.isnan(column), np.nan, column).view(np.uint64).tolist()


def block_bits(transform: Transform, form: Form, rows: list[Any]) -> list[list[Any]]:
    with np.errstate(all="ignore"):
        return [bits(column) for column in transform.block(block_of(form, rows))]


def row_bits(transform: Transform, rows: list[Any], outputs: int) -> list[list[Any]]:
    answers = [transform.row(value) for value in rows]
    assert all(len(answer) == outputs for answer in answers)
    columns = [[answer[i] for answer in answers] for i in range(outputs)]
    return [
        bits(pa.array(c, pa.large_string()) if any(isinstance(v, str) for v in c) else np.array(c, np.float64)) for c in columns
    ]


def test_every_registered_transform_has_a_case() -> None:
    of_one_column = {name for name in TRANSFORMS if not load(TRANSFORMS, name, "test").joins}
    assert {case.step for case in CASES} == of_one_column - {"target_mean"}  # the others: test_groups, test_target_mean


@cases
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_contract(case: Case, data: st.DataObject) -> None:
    transform = fitted(case, data.draw(rows_of(case.form)))
    rows = data.draw(rows_of(case.form))
    columns = block_bits(transform, case.form, rows)

    assert_outputs_are_as_announced(case, transform, rows)
    assert columns == row_bits(transform, rows, len(columns)), "the row path gives the bits of the block path"
    if case.form in TEXT:
        assert columns == [bits(column) for column in transform.block(encoded_block(rows))], "texts may come as a dictionary"
    pieces = [block_bits(transform, case.form, part) for part in (rows[:3], rows[3:])]
    assert columns == [a + b for a, b in zip(*pieces, strict=True)], "where a block is cut plays no part"
    text = json.dumps(transform.state(), sort_keys=True, allow_nan=False)
    again = type(transform).from_state(json.loads(text))
    assert json.dumps(again.state(), sort_keys=True) == text, "the state is JSON"
    assert columns == block_bits(again, case.form, rows), "and is all there is to know"


def assert_outputs_are_as_announced(case: Case, transform: Transform, rows: list[Any]) -> None:
    assert case.form in transform.takes
    features = transform.outputs(case.feature)
    if features:  # one-hot of a column without any text has none
        assert features[0].form == transform.gives(transform.Params.model_validate(case.params), case.form)
    with np.errstate(all="ignore"):
        columns = transform.block(block_of(case.form, rows))
    for feature, column in zip(features, columns, strict=True):
        assert len(column) == len(rows)
        assert isinstance(column, np.ndarray) == (feature.form not in TEXT)
        if feature.cardinality is not None:
            codes = column[~np.isnan(column)]
            assert np.all((codes >= 0) & (codes < feature.cardinality) & (codes == np.floor(codes)))


@cases
def test_pushed_statistics_are_those_of_the_outputs(case: Case) -> None:
    generator = np.random.default_rng(5)
    rows: list[Any] = [None if i % 7 == 0 else "abcdefg"[int(i**0.5) % 7] for i in range(500)]
    if case.form not in TEXT:
        scale = {"boolean": 2, "code": 7, "numeric": 100, "datetime": 2**50}[case.form]
        rows = [NAN if value % 7 == 0 else float(value) for value in generator.integers(0, scale, 500)]
    transform = case.fit(rows)

    pushed = transform.push(statistics_of(case.form, rows))

    for found, column, feature in zip(
        pushed, transform.block(block_of(case.form, rows)), transform.outputs(case.feature), strict=True
    ):
        expected = statistics_of(feature.form, column.to_pylist() if isinstance(column, pa.Array) else column.tolist())
        if isinstance(found, StringStatistics):
            assert (found, found.sample.to_pylist()) == (expected, expected.sample.to_pylist())
            continue
        assert isinstance(expected, NumberStatistics)
        assert (found.count, found.missing, found.infinite) == (expected.count, expected.missing, expected.infinite)
        assert (found.minimum, found.maximum) == (expected.minimum, expected.maximum)
        assert found.mean == pytest.approx(expected.mean, rel=1e-9, abs=1e-12)
        assert found.variance == pytest.approx(expected.variance, rel=1e-9, abs=1e-12)
        assert len(found.sample) in (0, len(rows))


def numbers(*values: float) -> Numbers:
    return np.array(values, np.float64)


def texts(*values: str | None) -> pa.Array:
    return pa.array(values, pa.large_string())


def fit(transform: type[Transform], rows: list[Any], **params: Any) -> Any:
    form: Form = "text" if any(isinstance(value, str) for value in rows) else "numeric"
    return transform.fit(transform.Params.model_validate(params), statistics_of(form, rows))


def spread(rows: int = 400) -> list[float]:
    generator = np.random.default_rng(11)
    return [NAN if generator.random() < 0.2 else float(generator.normal(50, 20)) for _ in range(rows)]


@pytest.mark.parametrize("strategy", ["mean", "median", "most_frequent"])
def test_impute_equals_scikit_learn(strategy: str) -> None:
    rows = [round(value, -1) if value == value else value for value in spread()]

    [found] = fit(Impute, rows, strategy=strategy).block(numbers(*rows))

    expected = SimpleImputer(strategy=strategy).fit_transform(np.array(rows)[:, None])[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_impute_leaves_infinities_and_marks_what_was_missing() -> None:
    impute = fit(Impute, [1.0, NAN, INF, 3.0], indicator=True)

    filled, missing = impute.block(numbers(NAN, -INF, 7.0))

    assert filled.tolist() == [2.0, -INF, 7.0]
    assert missing.tolist() == [1.0, 0.0, 0.0]


def test_impute_fills_a_column_without_any_value_with_zero() -> None:
    assert fit(Impute, [NAN, NAN]).row(NAN) == [0.0]


def test_impute_takes_the_smallest_of_equally_frequent_values() -> None:
    assert fit(Impute, [3.0, 1.0, NAN, 3.0, 1.0, INF, INF, INF], strategy="most_frequent").row(NAN) == [1.0]
    assert fit(Impute, ["b", "a", None, "a", "b", "c"], strategy="most_frequent").row(None) == ["a"]
    assert Impute.fit(Impute.Params(strategy="most_frequent"), StringStatistics()).row(None) == [""]


def test_impute_of_texts_keeps_the_empty_text() -> None:
    assert fit(Impute, ["a"], value="?").block(texts("", None, "b"))[0].to_pylist() == ["", "?", "b"]


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        ("standard", StandardScaler()),
        ("minmax", MinMaxScaler()),
        ("maxabs", MaxAbsScaler()),
        ("robust", RobustScaler()),
    ],
)
def test_scale_equals_scikit_learn(method: str, reference: Any) -> None:
    rows = spread()

    [found] = fit(Scale, rows, method=method).block(numbers(*rows))

    np.testing.assert_allclose(found, reference.fit_transform(np.array(rows)[:, None])[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["standard", "minmax", "robust"])
def test_scale_makes_a_constant_column_zero(method: str) -> None:
    assert fit(Scale, [0.1] * 3 + [NAN], method=method).row(0.1) == [0.0]  # their mean rounds to 0.10000000000000002


@pytest.mark.parametrize(
    ("transform", "params"),
    [(Impute, {}), (Scale, {}), (Scale, {"method": "minmax"}), (Scale, {"method": "robust"}), (Quantile, {}), (Bin, {})],
)
def test_values_too_large_are_refused(transform: type[Transform], params: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="too large"):
        fit(transform, [1.7e308, 1.7e308, -1.7e308, -1.7e308], **params)


def test_robust_scale_of_a_column_that_is_mostly_one_value_only_moves_it() -> None:
    assert fit(Scale, [5.0] * 9 + [50.0], method="robust").row(50.0) == [45.0]


@pytest.mark.parametrize("quantiles", [[0.01, 0.99], [0.2, None], [None, 0.5]])
def test_clip_equals_pandas(quantiles: list[float | None]) -> None:
    rows = spread()

    [found] = fit(Clip, rows, quantiles=quantiles).block(numbers(*rows))

    column = pd.Series(rows)
    low, high = (None if q is None else column.quantile(q) for q in quantiles)
    np.testing.assert_allclose(found, column.clip(low, high), rtol=1e-12)


def test_clip_between_bounds_takes_infinities_in() -> None:
    clip = fit(Clip, [1.0], bounds=[0, 10])

    assert clip.block(numbers(-INF, -0.5, 3.0, 10.5, INF))[0].tolist() == [0.0, 0.0, 3.0, 10.0, 10.0]
    assert fit(Clip, [1.0], bounds=[None, 2]).row(-INF) == [-INF]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"quantiles": [0.1, 0.9], "bounds": [0, 1]}, "exclude each other"),
        ({"bounds": [None, None]}, r"found \[null, null\], expected two numbers"),
        ({"bounds": [2, 1]}, "the lower one first"),
        ({"bounds": [0, INF]}, "expected two numbers"),
        ({"quantiles": [-0.1, None]}, "expected two numbers from 0 to 1"),
    ],
)
def test_clip_explains_what_is_wrong(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clip.Params.model_validate(params)


def test_log1p_equals_numpy_to_the_last_bit() -> None:
    rows = [abs(value) for value in spread()]

    found = [fit(Log1p, rows).row(value)[0] for value in rows]

    assert bits(np.array(found)) == bits(np.log1p(rows))


def test_log1p_refuses_values_without_a_logarithm_and_misses_later_ones() -> None:
    for rows in ([3.0, -1.0], [3.0, -INF]):
        with pytest.raises(DataError, match=r"the smallest value is -(1|inf), and .* write \{log1p: \{signed: true\}\}, put"):
            fit(Log1p, rows)

    assert [math.isnan(fit(Log1p, [3.0, -0.5]).row(value)[0]) for value in (-1.0, -7.0, -INF, -0.5, INF)] == [
        *[True, True, True],
        *[False, False],
    ]


def test_signed_log1p_is_odd() -> None:
    log1p = fit(Log1p, [-5.0, 3.0], signed=True)

    assert log1p.row(-5.0)[0] == -np.log1p(5.0) == -log1p.row(5.0)[0]


@pytest.mark.parametrize("output", ["uniform", "normal"])
@pytest.mark.parametrize("digits", [15, -1])
def test_quantile_equals_scikit_learn(output: str, digits: int) -> None:
    rows = [round(value, digits) if value == value else value for value in spread(3000)]
    reference = QuantileTransformer(n_quantiles=1000, output_distribution=output, subsample=None).fit(np.array(rows)[:, None])
    values = np.array([*rows, *np.linspace(-100, 300, 1001), -1e9, 1e9])

    [found] = fit(Quantile, rows, output=output).block(values)

    np.testing.assert_allclose(found, reference.transform(values[:, None])[:, 0], atol=1e-8)


def test_quantile_of_a_sample_is_near_that_of_the_column() -> None:
    generator = np.random.default_rng(3)
    column = generator.gamma(2.0, 30.0, 200_000)
    sample = generator.choice(column, 20_000, replace=False)
    quantile = Quantile.fit(Quantile.Params(), replace(NumberStatistics.of(column), sample=sample))

    [found] = quantile.block(column)

    assert np.abs(found - (np.argsort(np.argsort(column)) + 0.5) / len(column)).max() < 2 / math.sqrt(len(sample))


@pytest.mark.parametrize(("method", "bins"), [("quantile", 10), ("uniform", 10), ("quantile", 40)])
def test_bin_equals_scikit_learn(method: str, bins: int) -> None:
    rows = [round(value) for value in spread() if value == value]
    reference = KBinsDiscretizer(bins, encode="ordinal", strategy=method, quantile_method="linear", subsample=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # equal quantiles make fewer bins
        reference.fit(np.array(rows, np.float64)[:, None])
    values = np.linspace(-100.03, 300, 1001)  # not on an edge, where rounding decides

    transform = fit(Bin, rows, method=method, bins=bins)

    assert transform.block(values)[0].tolist() == reference.transform(values[:, None])[:, 0].tolist()
    assert transform.outputs(Feature(name="x", kind="numeric"))[0].cardinality == reference.n_bins_[0]


def test_bins_leave_missing_out_and_reach_to_infinity() -> None:
    transform = fit(Bin, [0.0, 1.0, 2.0, 4.0], bins=2, method="uniform")

    assert bits(transform.block(numbers(-INF, 1.9, 2.0, INF, NAN))[0]) == bits(numbers(0, 0, 1, 1, NAN))
    assert fit(Bin, [7.0, 7.0]).block(numbers(1.0, 9.0))[0].tolist() == [0.0, 0.0]


def test_what_follows_a_clip_knows_the_exact_extremes() -> None:
    column = np.arange(1000.0)
    statistics = replace(NumberStatistics.of(column), sample=column[::10])

    [pushed] = Clip(100.0, None).push(statistics)

    assert (pushed.count, pushed.minimum, pushed.maximum) == (1000, 100.0, 999.0)
    assert pushed.mean == pytest.approx(column.clip(100.0).mean(), rel=0.02)


def test_index_codes_by_frequency_then_text_and_unknown_is_last() -> None:
    index = fit(Index, ["b", "c", "a", "c", None, "b", "z"])

    [codes] = index.block(texts("b", "c", "a", "z", "new", "", None))

    assert codes[:6].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    assert math.isnan(codes[6])
    assert index.cardinality == 5


def test_index_has_one_code_for_rare_and_unseen_categories_and_none_for_missing() -> None:
    index = fit(Index, [*"aaabbbccd", None], max_categories=3, min_count=2)

    [codes] = index.block(texts("a", "b", "c", "d", "unseen", None))

    assert bits(codes) == bits(numbers(0, 1, 2, 3, 3, NAN))
    assert (index.cardinality, fit(Index, [*"aaabbbccd", None], max_categories=1).cardinality) == (4, 2)


def test_frequency_equals_pandas() -> None:
    rows = [*"aaabbc", "", None, None]

    [shares] = fit(Frequency, rows).block(texts(*rows, "unseen"))

    expected = pd.Series(rows, dtype=object).map(pd.Series(rows, dtype=object).value_counts() / len(rows))
    assert bits(shares) == bits(np.array([*expected, 0.0]))


def test_index_treats_rare_categories_as_unknown() -> None:
    index = fit(Index, ["b", "a", "b"], min_count=2)

    assert (index.row("b"), index.row("a"), index.cardinality) == ([0.0], [1.0], 2)


def test_hash_values_are_pinned() -> None:
    assert [Hash(1024).code(text) for text in ("", "UA", "🛫")] == [740.0, 475.0, 881.0]


def test_onehot_is_zero_for_unknown_and_missing() -> None:
    onehot = fit(OneHot, ["b", "b", "é", "a", "a", "a", None], max_categories=2)

    assert [feature.name for feature in onehot.outputs(Feature(name="x", kind="text"))] == ["x__a", "x__b"]
    assert [column.tolist() for column in onehot.block(texts("b", "é", None, "a"))] == [[0, 0, 0, 1], [1, 0, 0, 0]]


def test_parts_equal_pandas() -> None:
    instants = pd.date_range("1583-01-01", "2262-01-01", periods=20_011, unit="us").to_series()
    instants = pd.concat([instants, pd.date_range("2000-02-27", periods=1500, freq="D", unit="us").to_series()])
    which = ["year", "quarter", "month", "day", "weekday", "dayofyear", "hour", "minute", "second"]

    found = fit(Parts, [], which=which).block(instants.astype("int64").to_numpy().astype(np.float64))

    for part, column in zip(which, found, strict=True):
        expected = getattr(instants.dt, {"weekday": "day_of_week", "dayofyear": "day_of_year"}.get(part, part))
        np.testing.assert_array_equal(column, expected.to_numpy(), err_msg=part)


def test_parts_of_days_close_together_equal_those_far_apart() -> None:
    dense = np.arange(-800, 800) * 43_200_000_000.0

    together = fit(Parts, []).block(dense)

    assert [column.tolist() for column in together] == [
        list(c) for c in zip(*(fit(Parts, []).row(v) for v in dense), strict=True)
    ]


def test_parts_of_no_date_are_missing() -> None:
    assert all(math.isnan(part) for value in (NAN, INF, 2.0**62) for part in fit(Parts, []).row(value))


@pytest.mark.parametrize("zone", ["America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "Africa/Casablanca", "Etc/GMT-14"])
def test_parts_in_a_zone_equal_pandas_across_every_change_of_the_clock(zone: str) -> None:
    instants = pd.date_range("1900-01-02", "2099-12-30", periods=20_011, unit="us", tz="UTC").to_series()
    changes = [pd.Timestamp(change, unit="us", tz="UTC") for change in offsets(zone)[0]]
    around = [change + pd.Timedelta(seconds=s) for change in changes for s in (-3601, -1, 0, 1, 3599, 3600)]
    instants = pd.concat([instants, pd.Series(pd.to_datetime(around, utc=True).as_unit("us"))])
    which = ["year", "month", "day", "weekday", "dayofyear", "hour", "minute", "second"]

    parts = fit(Parts, [], which=which, zone=zone)
    found = parts.block(instants.astype("int64").to_numpy().astype(np.float64))

    local = instants.dt.tz_convert(zone)
    for part, column in zip(which, found, strict=True):
        expected = getattr(local.dt, {"weekday": "day_of_week", "dayofyear": "day_of_year"}.get(part, part))
        np.testing.assert_array_equal(column, expected.to_numpy(), err_msg=part)


def test_the_hour_that_a_clock_shows_twice_is_the_same_hour_of_two_instants() -> None:
    parts = fit(Parts, [], which=["hour", "minute"], zone="Europe/Berlin")
    before, after = (pd.Timestamp(text).value / 1000 for text in ("2024-10-27T00:30Z", "2024-10-27T01:30Z"))

    assert parts.row(before) == parts.row(after) == [2.0, 30.0]


@pytest.mark.parametrize("zone", ["Europe/Berln", "America", "../etc/passwd", ""])
def test_an_unknown_zone_is_said_to_be(zone: str) -> None:
    with pytest.raises(ValueError, match="is unknown"):
        Parts.Params.model_validate({"zone": zone})


def test_cyclic_equals_numpy_of_the_parts_of_pandas() -> None:
    instants = pd.date_range("2019-12-30", "2025-01-02", periods=20_011, unit="us").to_series()

    found = fit(Cyclic, []).block(instants.astype("int64").to_numpy().astype(np.float64))

    when = instants.dt
    places = [when.hour / 24, when.day_of_week / 7, (when.month - 1) / 12, (when.day_of_year - 1) / 365.25]
    expected = [wave(2 * np.pi * place) for place in places for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(found, np.array(expected), atol=1e-12)


def test_cyclic_puts_midnight_beside_the_hour_before() -> None:
    cyclic = fit(Cyclic, [], which=["hour"])
    names = [feature.name for feature in cyclic.outputs(Feature(name="time", kind="datetime"))]
    points = [np.array(cyclic.row(hour * 3_600_000_000.0)) for hour in range(24)]

    assert names == ["time__hour_sin", "time__hour_cos"]
    steps = [float(np.linalg.norm(points[hour] - points[hour - 1])) for hour in range(24)]
    assert steps == pytest.approx([steps[0]] * 24)
    assert all(math.isnan(place) for place in cyclic.row(NAN))


def test_since_the_first_or_last_instant_of_the_train_split() -> None:
    rows = [7_200_000_000.0, NAN, 3_600_000_000.0]

    assert fit(Since, rows, reference="first").row(rows[0]) == [1.0]
    assert fit(Since, rows, reference="last").row(0.0) == [-2.0]
    assert fit(Since, [NAN], reference="last").row(rows[0]) == [2.0]


def test_since_counts_from_its_reference() -> None:
    since = fit(Since, [], unit="hours", reference="2013-01-01T02:00:00+01:00")

    assert since.row(pd.Timestamp("2013-01-01T02:30").value / 1000) == [1.5]
    assert fit(Since, [], unit="days").row(86_400_000_000.0) == [1.0]
