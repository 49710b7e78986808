"""What `model.params` of LightGBM takes, and what is said of the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from lightgbm.basic import _ConfigAliases

from pipelines.errors import DataError, SpecError
from pipelines.explain import checked
from pipelines.features.transform import Feature
from pipelines.models.boosting_names import ANSWERS, CALLED
from pipelines.models.boosting_params import OURS, SEEDS, LightGBMParams
from pipelines.tasks import Loss, Task

BINARY = Task(type="binary", target="y", target_type="bool", classes=[False, True])
VALUE = Task(type="regression", target="y", target_type="float64")
FEATURES = [
    Feature(name="distance", kind="numeric", columns=["distance"], order="rising"),
    Feature(name="distance__missing", kind="numeric", columns=["distance"], order="constant"),
    Feature(name="age", kind="numeric", columns=["age"], order="rising"),
    Feature(name="city", kind="categorical", cardinality=4, columns=["city"]),
    Feature(name="seen__hour", kind="numeric", columns=["seen"]),
    Feature(name="seen__since", kind="numeric", columns=["seen"], order="rising"),
    Feature(name="route", kind="categorical", cardinality=16, columns=["city", "age"]),
]


@dataclass
class Known:
    """What of the shards matters here."""

    low: float = 0.0
    features: list[Feature] = field(default_factory=lambda: FEATURES[:4])

    target: np.ndarray = field(default_factory=lambda: np.random.default_rng(0).normal(size=4000))

    def target_sample(self, split: str, rank: int, size: int) -> np.ndarray:
        return np.sort(np.array_split(self.target, size)[rank])

    def target_range(self) -> tuple[float, float]:
        return self.low, 10.0


def params(**given: Any) -> LightGBMParams:
    return checked(LightGBMParams, given, ("model", "params"))


def refusal(**given: Any) -> str:
    with pytest.raises(SpecError) as refused:
        params(**given)
    message = str(refused.value)
    assert message.startswith("model.params") and "\n" not in message
    return message


def test_every_name_of_lightgbm_is_a_parameter_or_is_answered() -> None:
    for name, aliases in _ConfigAliases._get_all_param_aliases().items():
        for alias in {name, *aliases}:
            if alias in LightGBMParams.model_fields:
                continue
            message = refusal(**{alias: 1})
            if name in LightGBMParams.model_fields or name in ("num_iterations", "early_stopping_round", "metric_freq"):
                assert f"{alias} is called {CALLED[alias]} here" in message
                assert CALLED[alias] == name or CALLED[alias] in OURS
            else:
                assert message == f"model.params: {alias} {ANSWERS[alias]}; take it out"


def test_every_answer_is_about_a_name_of_lightgbm() -> None:
    known = {alias for name, aliases in _ConfigAliases._get_all_param_aliases().items() for alias in (name, *aliases)}

    assert {*CALLED, *ANSWERS} <= known
    assert not {*CALLED, *ANSWERS} & LightGBMParams.model_fields.keys()
    assert set(LightGBMParams.model_fields) - known == {"rounds", "segment", "eval_every", "max_category", "refit"}


def test_a_typo_gets_the_nearest_name() -> None:
    assert "did you mean 'num_leaves'?" in refusal(num_leafs=31)
    assert "did you mean 'poisson'?" in refusal(objective="poison")
    assert refusal(objective="regression_l1") == "model.params: objective regression_l1 is called l1 here"
    assert "expected a number > 0 and <= 1" in refusal(learning_rate=3)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"boosting": "rf"}, "set bagging_freq: 1 and bagging_fraction: 0.632, or feature_fraction below 1"),
        ({"boosting": "dart", "early_stopping": 10}, "set early_stopping: null"),
        ({"data_sample_strategy": "goss", "bagging_freq": 1, "bagging_fraction": 0.5}, "excludes bagging"),
        ({"data_sample_strategy": "goss", "top_rate": 0.8, "other_rate": 0.3}, "top_rate + other_rate is 1.1"),
        ({"bagging_fraction": 0.5}, "set bagging_freq: 1"),
        (
            {"drop_rate": 0.2},
            "drop_rate goes with boosting: dart, but boosting is gbdt; set boosting: dart, or take drop_rate out",
        ),
        ({"top_rate": 0.2}, "top_rate goes with data_sample_strategy: goss"),
        ({"alpha": 0.5}, "alpha goes with objective: quantile or huber, but objective is l2"),
        ({"objective": "quantile", "alpha": 1.5}, "alpha is 1.5, expected a quantile between 0 and 1"),
        ({"objective": "poisson", "reg_sqrt": True}, "reg_sqrt goes with objective: l2"),
        ({"num_grad_quant_bins": 4}, "goes with use_quantized_grad: true, but use_quantized_grad is false"),
        ({"is_unbalance": True, "scale_pos_weight": 3.0}, "exclude each other"),
        ({"objective": "quantile", "monotone_constraints": {"age": 1}}, "cannot hold with objective: quantile"),
        ({"device_type": "gpu", "max_bin": 511}, "at most 255 bins"),
        ({"monotone_constraints": {"age": 2}}, "model.params.monotone_constraints.age 2 is wrong: expected -1, 0 or 1"),
    ],
)
def test_what_lightgbm_would_abort_on_or_ignore_is_one_line(given: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**given)


def test_dart_has_no_early_stopping_unless_told_and_a_resolved_spec_stays_valid() -> None:
    found = params(boosting="dart", rounds=50)

    assert found.early_stopping is None and params().early_stopping == 50
    for given in (found, params(), params(objective="huber", alpha=2.0), params(boosting="rf", feature_fraction=0.5)):
        assert params(**given.model_dump()) == given


@pytest.mark.parametrize(
    ("given", "loss", "main"),
    [
        ({}, None, "rmse"),
        ({"objective": "l1"}, Loss(name="mae"), "mae"),
        ({"objective": "huber"}, Loss(name="huber", parameter=0.9), "huber"),
        ({"objective": "fair", "fair_c": 2.0}, Loss(name="fair", parameter=2.0), "fair"),
        ({"objective": "quantile", "alpha": 0.25}, Loss(name="pinball", parameter=0.25), "pinball"),
        ({"objective": "poisson"}, Loss(name="poisson_deviance"), "poisson_deviance"),
        ({"objective": "tweedie"}, Loss(name="tweedie_deviance", parameter=1.5), "tweedie_deviance"),
    ],
)
def test_the_metric_of_early_stopping_is_what_the_objective_minimises(
    given: dict[str, Any], loss: Loss | None, main: str
) -> None:
    task = params(**given).check(VALUE, Known(), 1)  # type: ignore[arg-type]

    assert task.loss == loss
    assert task.metric_names[0] == task.loss_metric == main
    assert sorted(task.metric_names) == sorted({main, "rmse", "mae", "r2"})
    assert not task.higher_is_better(main)


def test_an_objective_that_the_data_does_not_allow_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"'poisson' needs targets of 0 and above, but 'y' goes down to -3; choose another objective"
    ):
        params(objective="poisson").check(VALUE, Known(low=-3.0), 1)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="'gamma' needs targets above 0, but 'y' goes down to 0"):
        params(objective="gamma").check(VALUE, Known(low=0.0), 1)  # type: ignore[arg-type]
    params(objective="tweedie").check(VALUE, Known(low=0.0), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["l1", "quantile", "mape"])
def test_rows_sorted_by_the_target_are_refused_where_leaves_are_means_over_workers(objective: str) -> None:
    mixed, ordered = Known(), Known(target=np.sort(Known().target))
    params(objective=objective).check(VALUE, mixed, 4)  # type: ignore[arg-type]
    params(objective=objective).check(VALUE, ordered, 1)  # type: ignore[arg-type]
    params(objective="huber").check(VALUE, ordered, 4)  # type: ignore[arg-type]

    with pytest.raises(DataError, match=f"'{objective}' needs workers with like rows.* 100% of the rows.*prepare.bucket_by"):
        params(objective=objective).check(VALUE, ordered, 2)  # type: ignore[arg-type]


def test_parameters_of_another_task_are_refused() -> None:
    with pytest.raises(SpecError, match="'poisson' goes with a regression task, but this is a binary: target 'y'; set task.type"):
        params(objective="poisson").check(BINARY, Known(), 1)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="is_unbalance goes with a binary task"):
        params(is_unbalance=True).check(VALUE, Known(), 1)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="'pinball' is no metric of a regression task"):
        params(metric="pinball").check(VALUE, Known(), 1)  # type: ignore[arg-type]
    assert params(metric="pinball", objective="quantile").check(VALUE, Known(), 1).loss_metric == "pinball"  # type: ignore[arg-type]


def test_constraints_follow_the_column_into_its_features() -> None:
    found = params(monotone_constraints={"distance": 1, "age": -1, "city": 0}).settings(VALUE, FEATURES[:6])

    assert found["monotone_constraints"] == [1, 0, -1, 0, 0, 0]


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ("city", "it becomes city, route, not plain numbers in its order"),
        ("seen", "it becomes seen__hour, not plain numbers"),
        ("age", "it becomes route, not plain numbers"),
        ("distanc", "no feature is made of a column 'distanc'; did you mean 'distance'?"),
    ],
)
def test_a_constraint_on_what_is_no_plain_number_is_refused(column: str, sentence: str) -> None:
    with pytest.raises(SpecError, match="model.params.monotone_constraints") as refused:
        params(monotone_constraints={column: 1}).check(VALUE, Known(features=FEATURES), 1)  # type: ignore[arg-type]
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_groups_of_columns_that_may_interact() -> None:
    found = params(interaction_constraints=[["distance"], ["city", "age"]]).settings(VALUE, FEATURES)
    assert found["interaction_constraints"] == [[0, 1], [2, 3, 6], [4, 5]]

    with pytest.raises(SpecError, match="crashes with them on several workers, and there are 2; set train.workers: 1"):
        params(interaction_constraints=[["distance"]]).check(VALUE, Known(), 2)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="feature 'route' is made of city and age, which no group has together"):
        params(interaction_constraints=[["city"], ["age"]]).settings(VALUE, FEATURES)


def test_lists_by_column() -> None:
    found = params(feature_contri={"distance": 0.5}, max_bin_by_feature={"age": 15}, max_bin=63).settings(VALUE, FEATURES[:4])

    assert found["feature_contri"] == [0.5, 0.5, 1.0, 1.0]
    assert found["max_bin_by_feature"] == [63, 63, 15, 63]


def test_each_segment_has_seeds_of_its_own() -> None:
    sampled = params(bagging_freq=1, bagging_fraction=0.5, bagging_seed=3, extra_trees=True, extra_seed=3, seed=1)
    seeds = [
        [sampled.settings(VALUE, [], segment)[name] for name in SEEDS if name != "feature_fraction_seed"] for segment in (0, 1)
    ]
    assert seeds[0] == [1, 3, 3] and not set(seeds[0]) & set(seeds[1])
    assert "feature_fraction_seed" not in sampled.settings(VALUE, [], 1)


def test_what_cannot_be_cut_is_one_segment() -> None:
    for given in ({"boosting": "dart"}, {"boosting": "rf", "feature_fraction": 0.5}, {"data_sample_strategy": "goss"}):
        whole = params(rounds=300, **given)
        assert whole.resolved(20) == whole and whole.rounds_of_segment(20) == 300
    assert params(data_sample_strategy="goss", segment=20).resolved(50).rounds_of_segment(50) == 20
    assert "segment goes with boosting: gbdt, but boosting is dart" in refusal(boosting="dart", segment=10)
