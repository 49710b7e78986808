"""The leaves of a model fitted to new rows: those of LightGBM's own refit, on any number of ranks."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest

from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_params import LightGBMParams as Params
from pipelines.tasks import Task
from pipelines.training.worker import Start
from tests.unit.test_boosting import BINARY, Recording, table, worker

MULTICLASS = Task(type="multiclass", target="y", target_type="int64", classes=[0, 1, 2])
REGRESSION = Task(type="regression", target="y", target_type="float64")
TASKS = {"binary": BINARY, "multiclass": MULTICLASS, "regression": REGRESSION}
ROUNDS = 40
"""More than are fitted with one look at the rows."""


def start(task: Task) -> Start:
    """A model of other rows than those it is fitted to."""
    columns, y = table(3000, seed=5)
    y = y + (columns[2] > 0) if task.type == "multiclass" else y
    settings = {"objective": task.type, "num_leaves": 15, "verbosity": -1, "num_class": task.outputs, "num_threads": 1}
    return Start(LightGBM(lgb.train(settings, lgb.Dataset(np.column_stack(columns), y, categorical_feature=[1]), ROUNDS)), 0, {})


def rows(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """What `worker` trains on."""
    columns, y = table(4000)
    return np.column_stack(columns), y + (columns[2] > 0) if task.type == "multiclass" else y


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("params", [{}, {"refit_decay_rate": 0.0, "lambda_l1": 2.0, "lambda_l2": 5.0}, {"max_delta_step": 0.3}])
def test_the_leaves_are_those_of_lightgbms_own_refit(tmp_path: Path, name: str, params: dict[str, Any]) -> None:
    task = TASKS[name]
    run = worker(tmp_path, start(task), task=task)

    LightGBM.fit(Params(refit=True, **params), task, run)

    matrix, y = rows(task)
    own: Any = start(task).model
    wanted = {"lambda_l1": 0.0, "lambda_l2": 1.0, "max_delta_step": 0.0, **params}
    decay = wanted.pop("refit_decay_rate", 0.9)
    plain = lgb.Booster(model_str=own.booster.model_to_string())
    plain.params |= {"objective": task.type, "num_class": task.outputs, "verbosity": -1, "num_threads": 1, **wanted}
    expected = plain.refit(matrix, y, decay_rate=decay).predict(matrix, raw_score=True)
    [(step, model, state)] = run.kept
    assert (step, state["final"]) == (ROUNDS, ROUNDS)
    assert np.allclose(model.raw(matrix), expected, rtol=0, atol=1e-5)  # LightGBM's gradients are float32
    assert np.abs(model.raw(matrix) - own.raw(matrix)).max() > 0.01


@dataclass
class Meeting:
    """Where ranks in threads of one process meet."""

    size: int
    states: dict[str, dict[int, Any]] = field(default_factory=lambda: defaultdict(dict))
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)

    def gather(self, rank: int, key: str, state: Any) -> list[Any]:
        self.states[key][rank] = state
        self.barrier.wait(30)
        return [self.states[key][rank] for rank in range(self.size)]


@pytest.mark.parametrize("name", TASKS)
def test_two_ranks_fit_the_leaves_of_one(tmp_path: Path, name: str) -> None:
    task, meeting = TASKS[name], Meeting(2)
    alone = worker(tmp_path, start(task), task=task)
    ranks = [replace(alone, rank=rank, size=2, start=start(task), kept=[], logged=[]) for rank in range(2)]
    LightGBM.fit(Params(refit=True), task, alone)

    def fit(run: Recording) -> None:
        run.gather = lambda key, state: meeting.gather(run.rank, key, state)  # type: ignore[method-assign]
        LightGBM.fit(Params(refit=True), task, run)

    threads = [threading.Thread(target=fit, args=(run,)) for run in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    matrix, _ = rows(task)
    [[(_, both, _)], [(_, second, _)]] = [run.kept for run in ranks]
    [(_, one, _)] = alone.kept
    assert second is None and np.allclose(both.raw(matrix), one.raw(matrix), rtol=0, atol=1e-12)
    assert ranks[0].logged[-1][1]["valid"] == pytest.approx(alone.logged[-1][1]["valid"], abs=1e-9)


def test_a_class_can_weigh_more(tmp_path: Path) -> None:
    run = worker(tmp_path, start(BINARY))
    LightGBM.fit(Params(refit=True, scale_pos_weight=20.0, refit_decay_rate=0.0), BINARY, run)
    matrix, _ = rows(BINARY)
    assert run.kept[0][1].raw(matrix).mean() > start(BINARY).model.raw(matrix).mean() + 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"refit": True, "objective": "l1"}, "refit goes with the objectives l2, binary, multiclass, but objective is l1"),
        ({"refit": True, "is_unbalance": True}, "refit does not know is_unbalance"),
        ({"refit": True, "path_smooth": 1.0}, "refit fits each leaf by itself, without path_smooth"),
        ({"refit_decay_rate": 0.5}, "refit_decay_rate goes with refit: true"),
    ],
)
def test_what_refit_does_not_go_with(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Params(**params)
