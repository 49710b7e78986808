"""Do weights mean what they mean in scikit-learn and LightGBM, and is a wrong one refused?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn import metrics as reference
from sklearn.utils.class_weight import compute_class_weight

from pipelines.data.beside import check_numeric, weights_of
from pipelines.data.prepared import WEIGHT, Shard, Shards, to_table
from pipelines.errors import DataError, SpecError
from pipelines.explain import checked
from pipelines.features.transform import Feature
from pipelines.metrics import BINS, Metrics
from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_params import LightGBMParams as Params
from pipelines.schema import Column
from pipelines.spec import TaskSpec
from pipelines.storage import Folder
from pipelines.tasks import Loss, Task
from tests.unit.test_boosting import Recording

Array = np.ndarray[Any, np.dtype[Any]]

BINARY = Task(type="binary", target="y", target_type="int64", classes=[0, 1])
THREE = Task(type="multiclass", target="y", target_type="string", classes=["a", "b", "c"])
VALUE = Task(type="regression", target="y", target_type="float64", loss=Loss(name="mae"))


def measure(task: Task, target: Array, raw: Array, weight: Array, parts: int) -> dict[str, float | None]:
    states = []
    for rows in np.array_split(np.arange(len(target)), parts):
        metrics = Metrics(task)
        metrics.add(target[rows], raw[rows], weight[rows])
        states.append(metrics.state())
    return Metrics.merge(task, states).result()


def weights(rng: np.random.Generator, rows: int) -> Array:
    """Some of them 0, some large."""
    return np.where(rng.random(rows) < 0.2, 0.0, rng.lognormal(0, 2, rows))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(20, 300), parts=st.integers(1, 5), ties=st.booleans())
def test_weighted_metrics_are_those_of_scikit_learn(seed: int, rows: int, parts: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = weights(rng, rows)
    weight[:6] = 1.5
    target = (rng.random(rows) < 0.4).astype(float)
    target[:2] = [0, 1]
    raw = np.round(rng.normal(size=rows) + target, 1 if ties else 12)
    p, w = expit(raw), {"sample_weight": weight}
    assert measure(BINARY, target, raw, weight, parts) == pytest.approx(
        {
            "auc": reference.roc_auc_score(target, raw, **w),
            "logloss": reference.log_loss(target, p, **w),
            "accuracy": reference.accuracy_score(target, p >= 0.5, **w),
            "average_precision": reference.average_precision_score(target, raw, **w),
            "brier": reference.brier_score_loss(target, p, **w),
        },
        rel=1e-9,
    )

    classes = rng.integers(0, 3, rows)
    classes[:3] = [0, 1, 2]
    logits = rng.normal(size=(rows, 3))
    assert measure(THREE, classes.astype(float), logits, weight, parts) == pytest.approx(
        {
            "accuracy": reference.accuracy_score(classes, logits.argmax(1), **w),
            "logloss": reference.log_loss(classes, softmax(logits, axis=1), **w),
            "macro_f1": reference.f1_score(classes, logits.argmax(1), average="macro", **w),
        },
        rel=1e-9,
    )

    values, found = 1e6 + rng.normal(size=rows), 1e6 + rng.normal(size=rows)
    assert measure(VALUE, values, found, weight, parts) == pytest.approx(
        {
            "mae": reference.mean_absolute_error(values, found, **w),
            "rmse": reference.root_mean_squared_error(values, found, **w),
            "r2": reference.r2_score(values, found, **w),
        },
        rel=1e-6,
    )


def test_weighted_auc_of_many_rows_is_within_1e4() -> None:
    rng = np.random.default_rng(0)
    rows = 5 * BINS
    target = (rng.random(rows) < 0.3).astype(float)
    raw, weight = rng.normal(size=rows) + target, weights(rng, rows) * 1e-6

    found = measure(BINARY, target, raw, weight, 4)

    assert found["auc"] == pytest.approx(reference.roc_auc_score(target, raw, sample_weight=weight), abs=1e-4)
    assert found["average_precision"] == pytest.approx(
        reference.average_precision_score(target, raw, sample_weight=weight), abs=1e-3
    )


def test_rows_that_weigh_the_same_give_the_metrics_of_rows_without_weights() -> None:
    rng = np.random.default_rng(1)
    target, raw = (rng.random(200) < 0.4).astype(float), rng.normal(size=200)
    plain = Metrics(BINARY)
    plain.add(target, raw)

    assert measure(BINARY, target, raw, np.full(200, 3.0), 3) == pytest.approx(plain.result(), rel=1e-12)
    assert set(measure(BINARY, target, raw, np.zeros(200), 2).values()) == {None}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0, None, 2.0, None], "'w' is missing in 2 of 4 rows of data/a.parquet, expected numbers of 0 and above"),
        ([1.0, float("nan"), 2.0, 0.0], "'w' is missing in 1 of 4 rows"),
        ([1.0, -0.5, 2.0, 0.0], "'w' is negative in 1 of 4 rows"),
        ([1.0, float("inf"), 2.0, 0.0], "'w' is infinite or too large in 1 of 4 rows"),
        ([1.0, 1e39, 2.0, 0.0], "'w' is infinite or too large in 1 of 4 rows"),
    ],
)
def test_a_wrong_weight_is_refused_with_what_to_do(values: list[float | None], sentence: str) -> None:
    class Here:
        class file:  # noqa: N801
            path = "data/a.parquet"

    with pytest.raises(DataError) as refused:
        weights_of(pa.table({"w": pa.array(values, pa.float64())}), "w", Here)  # type: ignore[arg-type]

    assert sentence in str(refused.value) and "data.where" in str(refused.value) and "\n" not in str(refused.value)


def test_a_column_of_texts_has_no_weights() -> None:
    with pytest.raises(DataError, match="task.weight: 'w' is a column of type string, expected numbers"):
        check_numeric("weight", Column(name="w", type="string", kind="categorical"))


COUNTS = {"a": 60, "b": 30, "c": 10}


def fitted(**spec: Any) -> Task:
    column = Column(name="y", type="string", kind="categorical")
    wanted = checked(TaskSpec, {"target": "y", **spec})
    task = Task.fit(wanted, column, dict(COUNTS), 100)
    return task.weighing(wanted, task.counts_of(dict(COUNTS)))


def test_class_weights_are_those_of_scikit_learn() -> None:
    target = np.repeat(list(COUNTS), list(COUNTS.values()))
    classes = np.array(list(COUNTS))

    assert fitted(class_weight="balanced").class_weights == pytest.approx(
        compute_class_weight("balanced", classes=classes, y=target)
    )
    given = {"c": 5, "a": 0.5}
    assert fitted(class_weight=given).class_weights == [0.5, 1.0, 5.0]
    assert fitted().class_weights is None


def test_wrong_class_weights_are_one_line() -> None:
    with pytest.raises(SpecError, match=r"task.class_weight: 'd' is no class of target 'y'.*known: a, b, c"):
        fitted(class_weight={"d": 2})
    with pytest.raises(SpecError, match="class_weight: 0 is no weight of a class; expected numbers above 0"):
        fitted(class_weight={"a": 0})
    wanted = TaskSpec(target="y", class_weight="balanced")
    with pytest.raises(SpecError, match="task.class_weight goes with classes, but this is a regression"):
        Task.fit(wanted, Column(name="y", type="float64", kind="numeric"), None, 100).weighing(wanted, None)
    with pytest.raises(SpecError, match="weight: 'y' is the target"):
        checked(TaskSpec, {"target": "y", "weight": "y"})


def table(rows: int, seed: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, 3))
    y = (matrix[:, 0] + (matrix[:, 1] > 0) + rng.normal(size=rows) > 1).astype(float)
    return matrix, y, rng.lognormal(0, 1, rows)


def worker(folder: Path, task: Task, *, weight: Array | None = None) -> Recording:
    splits: dict[str, list[Shard]] = {"test": []}
    for seed, (split, rows) in enumerate({"train": 3000, "valid": 1000}.items()):
        matrix, y, w = table(rows, seed)
        if split == "train" and weight is not None:
            w = weight
        (folder / split).mkdir(parents=True)
        beside = {WEIGHT: w} if task.weight else {}
        pq.write_table(to_table([*matrix.T, y], beside), folder / split / "a.parquet", row_group_size=700)
        splits[split] = [Shard(f"{split}/a.parquet", rows)]
        if split == "train":
            pq.write_table(to_table([*matrix.T, y], beside), folder / "sample.parquet")
    shards = Shards(Folder.at(str(folder)), [Feature(name=name, kind="numeric") for name in "abc"], splits)
    return Recording(
        rank=0, size=1, threads=1, checkpoint_every=10, shards=shards, start=None, rendezvous=None, attempt="a",
        class_weights=task.class_weights,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "class_weights"), [("w", None), (None, [1.0, 3.0]), ("w", [0.5, 2.0])], ids=["rows", "classes", "both"]
)
def test_a_fit_with_weights_is_that_of_plain_lightgbm(
    tmp_path: Path, weight: str | None, class_weights: list[float] | None
) -> None:
    task = BINARY.model_copy(update={"weight": weight, "class_weights": class_weights})
    run = worker(tmp_path, task)
    LightGBM.fit(Params(rounds=20, early_stopping=None, num_leaves=15), task, run)

    matrix, y, own = table(3000, 0)
    total = (own if weight else np.ones(3000)) * (np.array(class_weights)[y.astype(int)] if class_weights else 1.0)
    settings_ = {
        "objective": "binary", "num_leaves": 15, "learning_rate": 0.1, "min_sum_hessian_in_leaf": 1.0, "lambda_l2": 1.0,
        "verbosity": -1, "deterministic": True, "force_row_wise": True, "num_threads": 1, "feature_pre_filter": False,
    }  # fmt: skip
    plain = lgb.train(settings_, lgb.Dataset(matrix, y, weight=total), 20)
    model = run.kept[-1][1]
    assert np.array_equal(model.predict(matrix), plain.predict(matrix, raw_score=True))

    valid, valid_y, valid_w = table(1000, 1)
    by_rows = valid_w if weight else None  # class weights are no part of a metric
    expected = reference.log_loss(valid_y, expit(model.predict(valid)), sample_weight=by_rows)
    assert run.logged[-1][1]["valid"]["logloss"] == pytest.approx(expected, rel=1e-6)


def test_a_worker_whose_rows_weigh_nothing_is_refused_before_training(tmp_path: Path) -> None:
    task = BINARY.model_copy(update={"weight": "w"})
    none, late = (
        worker(tmp_path / name, task, weight=weight).shards
        for name, weight in (("none", np.zeros(3000)), ("late", np.repeat([0.0, 1.0], [1500, 1500])))
    )

    assert Params().check(task, late, 1) == task
    with pytest.raises(DataError, match="task.weight: 'w' is 0 in all train rows; drop rows that weigh nothing"):
        Params().check(task, none, 2)
    with pytest.raises(DataError, match="task.weight: 'w' is 0 in all rows of worker 0; drop rows that weigh nothing"):
        Params().check(task, late, 2)


@pytest.mark.parametrize(
    ("type_", "classes", "given"),
    [
        ("bool", [False, True], {"true": 2, "false": 3}),
        ("int64", [0, 1], {"1": 2, "0": 3}),
        ("int64", [0, 1], {1: 2, 0: 3}),
        ("string", ["no", "yes"], {"yes": 2, "no": 3}),
    ],
)
def test_classes_are_named_as_yaml_reads_them(type_: Any, classes: list[Any], given: dict[Any, float]) -> None:
    task = Task(type="binary", target="y", target_type=type_, classes=classes)

    assert task.weighing(checked(TaskSpec, {"target": "y", "class_weight": given}), [1, 1]).class_weights == [3.0, 2.0]
