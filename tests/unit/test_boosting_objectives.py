"""Each objective and way of boosting against plain LightGBM with the same parameters and rows, on one rank without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.data.prepared import Shard, Shards, to_table
from pipelines.features.transform import Feature
from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_params import LightGBMParams
from pipelines.storage import Folder
from pipelines.tasks import Task
from pipelines.training.worker import Start
from tests.unit.test_boosting import Recording

VALUE = Task(type="regression", target="y", target_type="float64")
BINARY = Task(type="binary", target="y", target_type="float64", classes=[0.0, 1.0])
THREE = Task(type="multiclass", target="y", target_type="float64", classes=[0.0, 1.0, 2.0])
FEATURES = [
    Feature(name="x", kind="numeric", columns=["x"], order="rising"),
    Feature(name="c", kind="categorical", cardinality=5, columns=["c"]),
    Feature(name="z", kind="numeric", columns=["z"], order="rising"),
]
PLAIN = {
    "verbosity": -1, "deterministic": True, "force_row_wise": True, "num_threads": 1, "feature_pre_filter": False, "seed": 7,
    "num_leaves": 15, "learning_rate": 0.1, "min_sum_hessian_in_leaf": 1.0, "lambda_l2": 1.0,
}  # fmt: skip


def table(task: Task, rows: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    matrix = np.column_stack([rng.normal(size=rows), rng.integers(0, 5, rows).astype(float), rng.normal(size=rows)])
    matrix[rng.random(rows) < 0.1, 0] = np.nan
    mean = np.exp(0.5 * np.nan_to_num(matrix[:, 0]) + 0.5 * (matrix[:, 1] == 3) + 0.3 * matrix[:, 2])
    count = rng.poisson(mean).astype(float)
    return matrix, count if task.type == "regression" else np.minimum(count, task.outputs - 1 or 1)


def trained(folder: Path, task: Task, start: Start | None = None, every: int = 10, **given: Any) -> Recording:
    for name in ("train", "valid"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        matrix, y = table(task, seed=("train", "valid").index(name))
        pq.write_table(to_table([*matrix.T, y]), folder / name / "a.parquet", row_group_size=500)
        if name == "train":
            pq.write_table(to_table([*matrix.T, y]), folder / "sample.parquet")
    splits = {"train": [Shard("train/a.parquet", 3000)], "valid": [Shard("valid/a.parquet", 3000)], "test": []}
    shards = Shards(Folder.at(str(folder)), FEATURES, splits)
    params = LightGBMParams(**{"num_leaves": 15, "rounds": 20, "early_stopping": None, **given})
    run = Recording(rank=0, size=1, threads=1, checkpoint_every=every, shards=shards, start=start, rendezvous=None, attempt="a")
    LightGBM.fit(params, LightGBM.check(params, task, shards, 1), run)
    return run


def plain(task: Task, rounds: int = 20, **given: Any) -> lgb.Booster:
    matrix, y = table(task)
    settings = {**PLAIN, **given}
    return lgb.train(settings, lgb.Dataset(matrix, y, categorical_feature=[1], params=settings), rounds)


OBJECTIVES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"objective": "regression"}),
    ({"reg_sqrt": True}, {"objective": "regression", "reg_sqrt": True}),
    ({"objective": "l1"}, {"objective": "regression_l1"}),
    ({"objective": "huber", "alpha": 1.5}, {"objective": "huber", "alpha": 1.5}),
    ({"objective": "fair", "fair_c": 2.0}, {"objective": "fair", "fair_c": 2.0}),
    ({"objective": "quantile", "alpha": 0.8}, {"objective": "quantile", "alpha": 0.8}),
    ({"objective": "mape"}, {"objective": "mape"}),
    ({"objective": "poisson", "poisson_max_delta_step": 0.5}, {"objective": "poisson", "poisson_max_delta_step": 0.5}),
    ({"objective": "tweedie", "tweedie_variance_power": 1.2}, {"objective": "tweedie", "tweedie_variance_power": 1.2}),
]
SAMPLED: dict[str, Any] = {"bagging_freq": 1, "bagging_fraction": 0.5}
BOOSTINGS: list[dict[str, Any]] = [
    {"boosting": "rf", **SAMPLED},
    {"boosting": "rf", "feature_fraction": 0.7, "extra_trees": True, "extra_seed": 3},
    {"boosting": "dart", "drop_rate": 0.3, "skip_drop": 0.2, "max_drop": 5, "drop_seed": 1},
    {"data_sample_strategy": "goss", "top_rate": 0.3, "other_rate": 0.2},
    {"use_quantized_grad": True, "num_grad_quant_bins": 8, "quant_train_renew_leaf": True},
    {"max_depth": 4, "max_delta_step": 0.3, "path_smooth": 1.0, "min_gain_to_split": 0.1, "lambda_l1": 0.1, "cat_l2": 1.0},
    {"min_data_per_group": 10, "max_cat_to_onehot": 1, "zero_as_missing": True, "boost_from_average": False, **SAMPLED},
]


@pytest.mark.parametrize(("ours", "theirs"), OBJECTIVES, ids=lambda given: given.get("objective", ""))
def test_an_objective_predicts_as_plain_lightgbm_on_the_targets_scale(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    run = trained(tmp_path, VALUE, **ours)
    reference = plain(VALUE, **theirs)
    valid, y = table(VALUE, seed=1)
    model = run.kept[-1][1]

    assert np.array_equal(model.predict(valid), reference.predict(valid))
    assert np.array_equal(model.raw(valid), reference.predict(valid, raw_score=True))
    logged = run.logged[-1][1]["valid"]
    assert logged["rmse"] == pytest.approx(np.sqrt(np.mean((reference.predict(valid) - y) ** 2)), rel=1e-6)


@pytest.mark.parametrize("task", [VALUE, BINARY, THREE], ids=lambda task: task.type)
@pytest.mark.parametrize("given", BOOSTINGS, ids=lambda given: "-".join(map(str, given)))
def test_a_way_of_boosting_predicts_as_plain_lightgbm(tmp_path: Path, task: Task, given: dict[str, Any]) -> None:
    run = trained(tmp_path, task, every=20, **given)  # one segment: the next would draw other samples
    objective = {"objective": "regression" if task.type == "regression" else task.type}
    reference = plain(task, **objective, **given, **({"num_class": 3} if task is THREE else {}))
    valid, _ = table(task, seed=1)
    model = run.kept[-1][1]

    raw = model.predict(valid)
    answers = raw if task is VALUE else task.probabilities(raw)
    assert np.allclose(answers, reference.predict(valid), rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", BOOSTINGS[:3], ids=lambda given: given["boosting"])
@pytest.mark.parametrize("task", [VALUE, BINARY, THREE], ids=lambda task: task.type)
def test_the_logged_metric_is_that_of_the_model_so_far(tmp_path: Path, task: Task, given: dict[str, Any]) -> None:
    run = trained(tmp_path, task, **given)
    valid, y = table(task, seed=1)
    raw = run.kept[-1][1].predict(valid)

    logged = run.logged[-1][1]["valid"]
    if task is VALUE:
        assert logged["mae"] == pytest.approx(np.abs(raw - y).mean(), rel=1e-9)
    else:
        probabilities = task.probabilities(raw)
        truth = (
            np.where(y == 1, probabilities, 1 - probabilities) if task is BINARY else probabilities[range(len(y)), y.astype(int)]
        )
        assert logged["logloss"] == pytest.approx(-np.log(truth).mean(), rel=1e-9)


def test_a_forest_is_the_mean_of_its_best_number_of_trees(tmp_path: Path) -> None:
    run = trained(tmp_path, VALUE, boosting="rf", rounds=60, early_stopping=15, eval_every=1, num_leaves=7, **SAMPLED)
    _, model, state = run.kept[-1]
    valid, y = table(VALUE, seed=1)
    reference = plain(VALUE, rounds=60, objective="regression", boosting="rf", num_leaves=7, **SAMPLED)
    losses = {
        rounds: float(np.sqrt(np.mean((reference.predict(valid, num_iteration=rounds) - y) ** 2)))
        for rounds in range(1, run.kept[-1][0] + 1)
    }

    assert state["final"] == model.rounds == min(losses, key=lambda rounds: losses[rounds])
    assert np.allclose(model.predict(valid), reference.predict(valid, num_iteration=state["final"]), rtol=0, atol=1e-9)


RESUMED: list[dict[str, Any]] = [
    *[ours for ours, _ in OBJECTIVES],
    *BOOSTINGS[4:],
    {"data_sample_strategy": "goss", "top_rate": 0.3, "segment": 10, "learning_rate": 0.5},
    {"objective": "poisson", "monotone_constraints": {"x": 1}, "bagging_seed": 3, **SAMPLED},
]


@pytest.mark.parametrize("given", RESUMED, ids=lambda given: "-".join(map(str, given.values())))
def test_a_resumed_fit_has_the_bits_of_one_never_disturbed(tmp_path: Path, given: dict[str, Any]) -> None:
    whole = trained(tmp_path, VALUE, rounds=25, **given)
    assert [step for step, _, _ in whole.kept] == [10, 20, 25]
    step, model, state = whole.kept[0]
    model.save(tmp_path)
    resumed = trained(tmp_path, VALUE, Start(LightGBM.load(tmp_path), step, state), rounds=25, **given)

    assert text_of(resumed.kept[-1][1]) == text_of(whole.kept[-1][1])
    assert resumed.logged == [entry for entry in whole.logged if entry[0] > step]


def text_of(model: LightGBM) -> str:
    return model.booster.model_to_string(num_iteration=-1)


@pytest.mark.parametrize("given", BOOSTINGS[:4], ids=lambda given: "-".join(map(str, given)))
def test_what_cannot_be_cut_is_reported_once(tmp_path: Path, given: dict[str, Any]) -> None:
    [(step, model, state)] = trained(tmp_path, VALUE, **given).kept

    assert step == state["final"] == model.rounds == 20


def test_dart_keeps_all_rounds_with_their_last_scales(tmp_path: Path) -> None:
    run = trained(tmp_path, VALUE, boosting="dart", drop_rate=0.5, skip_drop=0.0, rounds=30)
    reference = plain(VALUE, rounds=30, objective="regression", boosting="dart", drop_rate=0.5, skip_drop=0.0)
    valid, _ = table(VALUE, seed=1)

    step, model, state = run.kept[-1]
    assert step == state["final"] == model.rounds == 30
    assert np.array_equal(model.predict(valid), reference.predict(valid))


@pytest.mark.parametrize("direction", [1, -1])
def test_a_constrained_column_never_turns_the_prediction_round(tmp_path: Path, direction: int) -> None:
    run = trained(tmp_path, VALUE, objective="poisson", monotone_constraints={"x": direction}, monotone_penalty=0.5)
    reference = plain(VALUE, objective="poisson", monotone_constraints=[direction, 0, 0], monotone_penalty=0.5)
    rows, _ = table(VALUE, rows=50, seed=1)
    model = run.kept[-1][1]

    line = np.linspace(-3, 3, 101)
    for row in rows:
        along = np.tile(row, (len(line), 1))
        along[:, 0] = line
        assert (np.diff(model.predict(along)) * direction >= 0).all()
    assert np.array_equal(model.predict(rows), reference.predict(rows))
    assert (np.ptp(model.predict(along)) > 0.1) == (direction == 1)  # the target does rise with x


def test_columns_of_different_groups_never_meet_in_a_tree(tmp_path: Path) -> None:
    run = trained(tmp_path, VALUE, interaction_constraints=[["x", "c"]])
    trees = run.kept[-1][1].booster.trees_to_dataframe()
    used = trees.dropna(subset=["split_feature"]).groupby("tree_index")["split_feature"].apply(set)
    numbers = {"Column_0": "x", "Column_1": "c", "Column_2": "z"}

    found = {frozenset(numbers[name] for name in names) for names in used}
    assert frozenset(["z"]) in found
    assert all("z" not in names or len(names) == 1 for names in found)


def test_gain_factors_and_bins_by_column(tmp_path: Path) -> None:
    run = trained(tmp_path, VALUE, feature_contri={"c": 0.0}, max_bin_by_feature={"x": 5})
    model = run.kept[-1][1].booster

    assert model.feature_importance()[1] == 0
    thresholds = model.trees_to_dataframe().query("split_feature == 'Column_0'")["threshold"].unique()
    assert 1 < len(thresholds) <= 5


def test_quantiles_are_covered(tmp_path: Path) -> None:
    valid, y = table(VALUE, seed=1)

    shares = [
        float((y <= trained(tmp_path, VALUE, objective="quantile", alpha=alpha, rounds=60).kept[-1][1].predict(valid)).mean())
        for alpha in (0.5, 0.9)
    ]

    assert 0.4 < shares[0] < 0.75 < 0.85 < shares[1] < 0.97


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_a_build_without_the_device_is_one_line(device: Any) -> None:
    problem = LightGBM.unavailable(LightGBMParams(device_type=device))

    settings = {"device_type": device, "verbosity": -1, "min_data_in_leaf": 1}
    try:
        lgb.train(settings, lgb.Dataset(np.arange(100.0)[:, None], np.arange(100.0)), 1)
    except lgb.basic.LightGBMError:
        assert problem is not None and problem.startswith(f"model.params.device_type: {device} cannot be used here")
        assert problem.endswith("set it to cpu") and "\n" not in problem
    else:
        assert problem is None
    assert LightGBM.unavailable(LightGBMParams()) is None
