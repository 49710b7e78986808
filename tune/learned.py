"""What has a search shown? How it went, which knobs matter, and where the good settings lie."""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.trial import TrialState

from tune.objective import Objective
from tune.spec import Space, axes
from tune.study import own, quiet
from tune.trials import STATUS


def learned(study: optuna.Study, objective: Objective, space: Space) -> dict[str, Any]:
    """Return history, importance and the axes for parallel coordinates; a value by knob is that of `history`.

    The importance of a knob is its share of what tells the better trials from the others (PED-ANOVA, Watanabe et al., 2023), by
    metric; it needs two complete trials, and knobs that a choice opens have none.
    """
    return {
        "metric": list(objective.metrics),
        "history": [
            {
                "trial": trial.number,
                "status": STATUS[trial.state],
                "values": dict(zip(objective.metrics, trial.values, strict=True)) if trial.state == TrialState.COMPLETE else None,
                "curve": sorted(trial.intermediate_values.items()),
                "point": json.loads(trial.user_attrs["point"]),
                "seconds": trial.user_attrs.get("seconds"),
                "started": trial.datetime_start.timestamp() if trial.datetime_start else None,
                "ended": trial.datetime_complete.timestamp() if trial.datetime_complete else None,
                **({"error": trial.user_attrs["error"]} if "error" in trial.user_attrs else {}),
            }
            for trial in own(study, *STATUS)
        ],
        "importance": {metric: _importance(study, i) for i, metric in enumerate(objective.metrics)},
        "axes": [
            {
                "path": path,
                "kind": "choice" if axis.choice is not None else "int" if axis.integers else "float",
                "values": axis.extremes,
                "log": axis.log,
                "opened_by": opening,
            }
            for path, axis, opening in axes(space)
        ],
    }


def _importance(study: optuna.Study, metric: int) -> dict[str, float]:
    if len(own(study, TrialState.COMPLETE)) < 2:
        return {}
    with quiet():
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(
            optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda trial: trial.values[metric])
        )
