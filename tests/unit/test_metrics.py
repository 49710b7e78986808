"""Are the metrics those of scikit-learn, whatever the scores and however the rows were divided?"""

from __future__ import annotations

import math
import pickle
import time
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit, huber, softmax
from sklearn import metrics as reference

from pipelines.metrics import BINS, TOP, Metrics, ScoreHistogram
from pipelines.tasks import Loss, Task

Array = np.ndarray[Any, np.dtype[Any]]

BINARY = Task(type="binary", target="y", target_type="int64", classes=[0, 1])
THREE = Task(type="multiclass", target="y", target_type="string", classes=["a", "b", "c"])
VALUE = Task(type="regression", target="y", target_type="float64")


def measure(task: Task, target: Array, raw: Array, *, units: int = 1, blocks: int = 1) -> dict[str, float | None]:
    """The metrics of rows that were divided into units, and these into blocks."""
    states = []
    for unit in np.array_split(np.arange(len(target)), units):
        metrics = Metrics(task)
        for block in np.array_split(unit, blocks):
            metrics.add(target[block], raw[block])
        states.append(metrics.state())
    return Metrics.merge(task, states).result()


def binary_reference(target: Array, raw: Array) -> dict[str, float]:
    # Scikit-learn refuses infinite scores; all it looks at is their order. From 1 - p it cannot have the digits of a large loss.
    order = np.unique(raw, return_inverse=True)[1]
    loss = np.logaddexp(0, np.where(target == 1, -raw, raw))
    return {
        "auc": reference.roc_auc_score(target, order),
        "logloss": np.minimum(loss, -np.log(np.finfo(float).eps)).mean(),
        "accuracy": reference.accuracy_score(target, BINARY.codes(raw)),
        "average_precision": reference.average_precision_score(target, order),
        "brier": reference.brier_score_loss(target, expit(raw)),
    }


DIVISIONS = st.tuples(st.integers(1, 5), st.integers(1, 3))


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 1), st.one_of(st.floats(allow_nan=False), st.floats(-3, 3).map(lambda x: round(x, 1)))),
        min_size=2,
        max_size=60,
    ).filter(lambda rows: len({target for target, _ in rows}) == 2),
    division=DIVISIONS,
)
def test_binary_metrics_of_few_rows_are_exact(rows: list[tuple[int, float]], division: tuple[int, int]) -> None:
    target, raw = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])

    found = measure(BINARY, target, raw, units=division[0], blocks=division[1])

    assert found == pytest.approx(binary_reference(target, raw), rel=1e-9, abs=1e-12)


SHAPES = {
    "bell": lambda r, y: r.normal(size=len(y)) + y,
    "constant": lambda r, y: np.full(len(y), 0.3),
    "ties": lambda r, y: np.round(r.normal(size=len(y)) + y, 2),
    "half tied": lambda r, y: np.where(r.random(len(y)) < 0.5, 0.1, r.normal(size=len(y)) + y),
    "perfect": lambda r, y: r.random(len(y)) * 1e-9 + (y - 0.5) * 1e-8,
    "inverted": lambda r, y: -r.random(len(y)) - 5 * y,
    "narrow": lambda r, y: -9.2 + 1e-7 * (r.normal(size=len(y)) + y),
    "narrow and wide": lambda r, y: (r.normal(size=len(y)) + y) * np.where(r.random(len(y)) < 0.5, 1e-4, 10),
    "heavy tails": lambda r, y: r.standard_cauchy(len(y)) ** 3 + y,
    "every magnitude": lambda r, y: np.copysign(10 ** (r.normal(size=len(y)) * 50 + y), r.random(len(y)) - 0.3),
    "infinite": lambda r, y: np.where(
        r.random(len(y)) < 0.2, np.where(r.random(len(y)) < 0.3 + y / 3, np.inf, -np.inf), r.normal(size=len(y))
    ),
    "noise": lambda r, y: r.random(len(y)),
}


@settings(deadline=None, max_examples=40)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    rows=st.integers(BINS, 3 * BINS),
    rate=st.sampled_from([0.5, 0.9, 0.2, 0.01, 1e-4]),
    division=DIVISIONS,
    order=st.sampled_from(["random", "by target", "by score"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_auc_of_many_rows_is_within_1e4(
    shape: str, rows: int, rate: float, division: tuple[int, int], order: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    target = (random.random(rows) < rate).astype(float)
    target[:2] = [0, 1]
    raw = SHAPES[shape](random, target)
    if order != "random":
        sorted_rows = np.argsort(target if order == "by target" else raw, kind="stable")
        target, raw = target[sorted_rows], raw[sorted_rows]

    found = measure(BINARY, target, raw, units=division[0], blocks=division[1])

    expected = binary_reference(target, raw)
    assert found["auc"] == pytest.approx(expected["auc"], abs=1e-4)
    assert found["average_precision"] == pytest.approx(expected["average_precision"], abs=1e-3)
    assert {name: found[name] for name in ("logloss", "accuracy", "brier")} == pytest.approx(
        {name: expected[name] for name in ("logloss", "accuracy", "brier")}, rel=1e-9
    )


@settings(deadline=None, max_examples=40)
@given(shape=st.sampled_from(sorted(SHAPES)), rate=st.sampled_from([0.5, 0.8, 0.1]), seed=st.integers(0, 2**32 - 1))
def test_grouped_histogram_keeps_the_bound_of_its_docstring(shape: str, rate: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    target = random.random(5 * BINS) < rate
    whole = ScoreHistogram.of(target, SHAPES[shape](random, target))

    grouped = whole.grouped()

    # Each group, in shares of both classes; groups of one score are exact and may be of any size.
    first = np.searchsorted(np.cumsum(whole.negatives + whole.positives), np.cumsum(grouped.negatives + grouped.positives))
    several = np.diff(first, prepend=-1) > 1
    a, b = grouped.positives / whole.positives.sum(), grouped.negatives / whole.negatives.sum()
    assert len(grouped.scores) <= BINS + TOP + 1
    assert (a + b)[several].max(initial=0) <= 8 / BINS
    assert abs(grouped.auc - whole.auc) <= (a * b)[several].sum() / 2 + 1e-12 <= 2 / BINS
    assert np.isin(grouped.scores, whole.scores).all()
    assert (np.diff(grouped.scores) > 0).all()


def test_rare_positives_are_exact_among_many_rows() -> None:
    random = np.random.default_rng(1)
    target = np.zeros(300_000)
    target[random.choice(len(target), 30, replace=False)] = 1
    raw = random.normal(size=len(target)) + 2 * target

    metrics = Metrics(BINARY)
    metrics.add(target, raw)
    found = Metrics.merge(BINARY, [metrics.state()]).result()

    assert found == pytest.approx(binary_reference(target, raw), rel=1e-9)


def test_many_units_of_many_blocks_stay_close() -> None:
    random = np.random.default_rng(2)
    target = (random.random(400_000) < 0.2).astype(float)
    raw = random.normal(size=len(target)) + target

    found = measure(BINARY, target, raw, units=4, blocks=100)

    assert found["auc"] == pytest.approx(binary_reference(target, raw)["auc"], abs=2e-5)


def test_same_states_in_same_order_give_the_same_bits() -> None:
    random = np.random.default_rng(3)
    target = (random.random(100_000) < 0.2).astype(float)
    raw = random.normal(size=len(target)) + target

    assert measure(BINARY, target, raw, units=7, blocks=2) == measure(BINARY, target, raw, units=7, blocks=2)


@settings(deadline=None)
@given(
    target=hnp.arrays(np.int64, st.integers(1, 50), elements=st.integers(0, 2)),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 1.0, 200.0]),
    division=DIVISIONS,
)
def test_multiclass_metrics_are_those_of_scikit_learn(target: Array, seed: int, spread: float, division: tuple[int, int]) -> None:
    raw = np.random.default_rng(seed).normal(size=(len(target), 3)) * spread

    found = measure(THREE, target.astype(float), raw, units=division[0], blocks=division[1])

    label = raw.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "accuracy": reference.accuracy_score(target, label),
            "logloss": reference.log_loss(target, softmax(raw, axis=1), labels=[0, 1, 2]),
            "macro_f1": reference.f1_score(target, label, average="macro"),
        }
    assert found == pytest.approx(expected, rel=1e-9)


@settings(deadline=None)
@given(
    rows=st.integers(2, 500),
    mean=st.sampled_from([0.0, -3.0, 1e9, -1e12]),
    noise=st.sampled_from([0.0, 0.1, 3.0]),
    division=DIVISIONS,
    seed=st.integers(0, 2**32 - 1),
)
def test_regression_metrics_are_those_of_scikit_learn(
    rows: int, mean: float, noise: float, division: tuple[int, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    target = mean + random.normal(size=rows)
    raw = target + noise * random.normal(size=rows)

    found = measure(VALUE, target, raw, units=division[0], blocks=division[1])

    target, raw = target - target[0], raw - target[0]  # without error, and scikit-learn's mean needs the digits
    expected = {
        "rmse": reference.root_mean_squared_error(target, raw),
        "mae": reference.mean_absolute_error(target, raw),
        "r2": reference.r2_score(target, raw),
    }
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


SCIKIT: dict[str, Any] = {
    "mae": (None, reference.mean_absolute_error),
    "mape": (None, lambda y, v: np.mean(np.abs(v - y) / np.maximum(1, np.abs(y)))),
    "pinball": (0.3, lambda y, v: reference.mean_pinball_loss(y, v, alpha=0.3)),
    "poisson_deviance": (None, reference.mean_poisson_deviance),
    "gamma_deviance": (None, lambda y, v: reference.mean_gamma_deviance(y + 0.5, v)),
    "tweedie_deviance": (1.4, lambda y, v: reference.mean_tweedie_deviance(y, v, power=1.4)),
    "huber": (1.5, lambda y, v: np.mean(huber(1.5, v - y))),
    "fair": (2.0, lambda y, v: np.mean(4 * (np.abs(v - y) / 2 - np.log1p(np.abs(v - y) / 2)))),
}


@pytest.mark.parametrize("name", SCIKIT)
@pytest.mark.parametrize("units", [1, 3])
def test_the_loss_of_a_regression_is_its_main_metric(name: Any, units: int) -> None:
    random = np.random.default_rng(6)
    target, value = random.poisson(2.0, 1000).astype(float), random.gamma(2.0, 1.0, 1000)
    parameter, expected = SCIKIT[name]
    task = VALUE.model_copy(update={"loss": Loss(name=name, parameter=parameter)})

    found = measure(task, target + 0.5 if name == "gamma_deviance" else target, value, units=units, blocks=2)

    assert list(found) == task.metric_names and task.metric_names[0] == name
    assert found[name] == pytest.approx(expected(target, value), rel=1e-12)


def test_a_deviance_of_what_it_is_not_defined_for_is_none() -> None:
    task = VALUE.model_copy(update={"loss": Loss(name="poisson_deviance")})

    assert measure(task, np.array([1.0, -2.0]), np.array([1.0, 1.0]))["poisson_deviance"] is None
    assert measure(task, np.array([1.0, 2.0]), np.array([1.0, 0.0]))["poisson_deviance"] is None
    assert measure(task, np.array([0.0, 2.0]), np.array([1.0, 2.0]))["poisson_deviance"] == 1.0
    one = VALUE.model_copy(update={"loss": Loss(name="tweedie_deviance", parameter=1.0)})
    assert measure(one, np.array([0.0, 2.0]), np.array([1.0, 2.0]))["tweedie_deviance"] == 1.0


def test_r2_keeps_its_digits_beside_a_large_mean() -> None:
    random = np.random.default_rng(0)
    small = random.normal(size=200_000)
    error = random.normal(size=200_000) / 2
    target = 1e9 + small

    found = measure(VALUE, target, target + error, units=10, blocks=3)

    # Numbers near 1e9 are 1e-7 apart.
    assert found["r2"] == pytest.approx(1 - np.square(error).sum() / np.square(small - small.mean()).sum(), abs=1e-9)


def test_logloss_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    target, raw = random.integers(0, 2, 1000).astype(float), random.normal(size=1000) * 5

    assert measure(BINARY, target, raw)["logloss"] == pytest.approx(reference.log_loss(target, expit(raw)), rel=1e-9)


def test_a_sure_mistake_costs_what_it_costs_in_scikit_learn() -> None:
    target, raw = np.array([0.0, 1.0]), np.array([1e4, math.inf])

    assert measure(BINARY, target, raw)["logloss"] == pytest.approx(reference.log_loss(target, [1.0, 1.0], labels=[0, 1]))
    multiclass = measure(THREE, target, np.array([[-1e4, 0.0, 0.0], [0.0, 1.0, 0.0]]))["logloss"]
    assert multiclass == pytest.approx((-math.log(np.finfo(float).eps) - math.log(math.e / (math.e + 2))) / 2)


@pytest.mark.parametrize(
    ("task", "target", "raw", "undefined"),
    [
        (BINARY, [], [], {"auc", "logloss", "accuracy", "average_precision", "brier"}),
        (BINARY, [0, 0], [1, 2], {"auc", "average_precision"}),
        (BINARY, [1, 1], [1, 2], {"auc"}),
        (BINARY, [0, 1], [math.nan, 2], {"auc", "logloss", "accuracy", "average_precision", "brier"}),
        (THREE, [], np.empty((0, 3)), {"accuracy", "logloss", "macro_f1"}),
        (THREE, [0, 1], [[math.nan, 1, 2], [1, 2, 3]], {"accuracy", "logloss", "macro_f1"}),
        (VALUE, [], [], {"rmse", "mae", "r2"}),
        (VALUE, [5], [4], {"r2"}),
        (VALUE, [0.1] * 10, [0.2] * 10, {"r2"}),
        (VALUE, [1, 2], [math.nan, 2], {"rmse", "mae", "r2"}),
        (VALUE, [1, 2], [math.inf, 2], {"rmse", "mae", "r2"}),
    ],
)
def test_undefined_metrics_are_none(task: Task, target: list[float], raw: Any, undefined: set[str]) -> None:
    metrics = Metrics(task)

    metrics.add(np.array(target, float), np.array(raw, float))

    for result in (metrics.result(), Metrics.merge(task, [metrics.state()]).result()):
        assert list(result) == task.metric_names
        assert {name for name, value in result.items() if value is None} == undefined
        assert all(type(value) is float for value in result.values() if value is not None)


def test_no_states_are_no_rows() -> None:
    assert set(Metrics.merge(BINARY, []).result().values()) == {None}


def test_a_unit_without_rows_changes_nothing() -> None:
    random = np.random.default_rng(4)
    for task, shape in ((BINARY, 9), (THREE, (9, 3)), (VALUE, 9)):
        metrics = Metrics(task)
        metrics.add(np.arange(9) % 2.0, random.normal(size=shape))
        empty = Metrics(task).state()

        assert Metrics.merge(task, [empty, metrics.state(), empty]).result() == metrics.result()


def test_adding_goes_on_after_a_state_was_taken() -> None:
    target, raw = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.1, 0.9, 0.3, 0.2])
    metrics = Metrics(BINARY)

    metrics.add(target[:2], raw[:2])
    early = pickle.loads(pickle.dumps(metrics.state()))
    metrics.add(target[2:], raw[2:])

    assert metrics.result() == pytest.approx(binary_reference(target, raw))
    assert Metrics.merge(BINARY, [early]).result() == pytest.approx(binary_reference(target[:2], raw[:2]))


def test_states_are_small_and_adding_is_fast() -> None:
    random = np.random.default_rng(5)
    target = (random.random(1_000_000) < 0.3).astype(float)
    raw = random.normal(size=len(target)) + target
    seconds = []

    for _ in range(3):
        metrics = Metrics(BINARY)
        start = time.process_time()
        metrics.add(target, raw)
        seconds.append(time.process_time() - start)

    assert sum(array.nbytes for array in metrics.state().values()) < 300_000
    assert min(seconds) < 1.0  # 0.06 s on two free cores; a busy machine is not this test's question
