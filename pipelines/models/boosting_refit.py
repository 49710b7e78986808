"""How the leaves of an earlier run's trees are fitted to new data, the splits staying as they are, on any number of workers.

LightGBM's own `Booster.refit`, which knows one process only: tree by tree, each leaf moves from its old value towards the Newton
step of the rows that fall into it now, given the scores of the trees before it (`GBDT::RefitTree`). The ranks sum gradients and
hessians of each leaf. A rank keeps the scores of its rows and, of `TREES` rounds at a time, which leaf each row falls into:
rows x outputs x (8 + 2 x `TREES`) bytes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import lightgbm as lgb
import numpy as np

from pipelines.metrics import Metrics
from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_params import LightGBMParams
from pipelines.models.model import Matrix
from pipelines.tasks import Task, log_softmax, sigmoid

if TYPE_CHECKING:
    from pipelines.training.worker import Worker

TREES: Final = 32
"""Rounds for which the rows are read once."""
EPSILON: Final = 1e-15
"""What LightGBM adds to a leaf's hessians."""

Leaves = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


def refit(params: LightGBMParams, task: Task, worker: Worker) -> None:
    """Fit the leaves on every rank; rank 0 reports the model."""
    assert worker.start is not None
    assert isinstance(worker.start.model, LightGBM)
    booster, rounds = worker.start.model.booster, worker.start.model.rounds
    text = booster.model_to_string(num_iteration=-1)
    shrinkages = [float(found) for found in re.findall(r"^shrinkage=(.*)$", text, flags=re.M)]
    sizes = [int(found) for found in re.findall(r"^num_leaves=(.*)$", text, flags=re.M)]
    narrow = np.min_scalar_type(max(sizes))
    targets, weights, scores = _labels(params, task, worker)
    for first in range(0, rounds, TREES):
        number = min(TREES, rounds - first)
        leaves = _leaves(booster, worker, first, number, narrow, task.outputs)
        for at in range(number):
            gradients, hessians = _derivatives(task, targets, weights, scores)
            trees = range((first + at) * task.outputs, (first + at + 1) * task.outputs)
            own = [
                [np.bincount(leaves[:, at, output], values[:, output], sizes[tree]) for values in (gradients, hessians)]
                for output, tree in enumerate(trees)
            ]
            parts = worker.gather(f"refit-{first + at}", own)
            for output, tree in enumerate(trees):
                sums = sum((np.array(part[output]) for part in parts), start=np.zeros((2, sizes[tree])))  # in rank order
                values = _refitted(params, booster, tree, shrinkages[tree], sums)
                scores[:, output] += values[leaves[:, at, output]]
        worker.log(first + number, {}, total=rounds)
    model = LightGBM.of_text(booster.model_to_string(num_iteration=-1))
    worker.log(rounds, _valid(task, worker, model), total=rounds)
    worker.report(rounds, model if worker.rank == 0 else None, {"final": rounds})


def _labels(params: LightGBMParams, task: Task, worker: Worker) -> tuple[Matrix, Matrix, Matrix]:
    """What the objective sees of this rank's rows: labels, weights, and the scores (rows, outputs) that they start from."""
    targets, weights, scores = [np.empty(0)], [np.empty(0)], [np.empty((0, task.outputs))]
    for batch in worker.batches("train"):
        weight = np.ones(len(batch.target)) if batch.weight is None else batch.weight
        targets.append(np.sign(batch.target) * np.sqrt(np.abs(batch.target)) if params.reg_sqrt else batch.target)
        weights.append(
            np.where(batch.target == 1, weight * params.scale_pos_weight, weight) if params.scale_pos_weight != 1 else weight
        )
        scores.append(np.zeros((len(weight), task.outputs)) if batch.init_score is None else batch.init_score[:, None])
    return np.concatenate(targets), np.concatenate(weights), np.concatenate(scores)


def _leaves(booster: lgb.Booster, worker: Worker, first: int, number: int, narrow: np.dtype[Any], outputs: int) -> Leaves:
    """Which leaf each row falls into: (rows, rounds, outputs)."""
    found: list[Leaves] = [np.empty((0, number, outputs), narrow)]
    threads: dict[str, Any] = {"num_threads": worker.threads}
    for batch in worker.batches("train"):
        leaves = booster.predict(batch.matrix, pred_leaf=True, start_iteration=first, num_iteration=number, **threads)
        found.append(np.asarray(leaves).astype(narrow).reshape(len(batch.target), number, outputs))
    return np.concatenate(found)


def _derivatives(task: Task, targets: Matrix, weights: Matrix, scores: Matrix) -> tuple[Matrix, Matrix]:
    """First and second derivatives of the loss, as LightGBM has them: (rows, outputs) each."""
    if task.type == "regression":
        gradients, hessians = scores - targets[:, None], np.ones_like(scores)
    elif task.type == "binary":
        probability = sigmoid(scores)
        gradients, hessians = probability - targets[:, None], probability * (1 - probability)
    else:
        probability = np.exp(log_softmax(scores)) if len(scores) else scores
        gradients = probability - (targets[:, None] == np.arange(task.outputs))
        hessians = task.outputs / (task.outputs - 1) * probability * (1 - probability)
    return gradients * weights[:, None], hessians * weights[:, None]


def _refitted(params: LightGBMParams, booster: lgb.Booster, tree: int, shrinkage: float, sums: Matrix) -> Matrix:
    """Set the leaves of a tree and return their new values; one without a row goes the same share of the way to 0.

    `sums` are the gradients and hessians of each leaf: (2, leaves).
    """
    gradient, hessian = sums
    step = -np.sign(gradient) * np.maximum(0.0, np.abs(gradient) - params.lambda_l1) / (hessian + EPSILON + params.lambda_l2)
    if params.max_delta_step > 0:
        step = np.clip(step, -params.max_delta_step, params.max_delta_step)
    old = np.array([booster.get_leaf_output(tree, leaf) for leaf in range(len(step))])
    stays = 0.9 if params.refit_decay_rate is None else params.refit_decay_rate
    values: Matrix = stays * old + (1 - stays) * step * shrinkage
    for leaf, value in enumerate(values):
        booster.set_leaf_output(tree, leaf, value)
    return values


def _valid(task: Task, worker: Worker, model: LightGBM) -> dict[str, dict[str, float | None]]:
    """The metrics on the valid rows of all ranks."""
    if not worker.total_rows("valid"):
        return {}
    metrics = Metrics(task)
    for batch in worker.batches("valid"):
        own = batch.init_score
        raw = model.predict(batch.matrix) if own is None else model.predict_from(batch.matrix, own)
        metrics.add(batch.target, raw, batch.weight)
    return {"valid": Metrics.merge(task, worker.gather("valid", metrics.state())).result()}
