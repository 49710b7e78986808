"""What is best? The metrics of a search, their directions, and which trial wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from pipelines.errors import SpecError, did_you_mean
from pipelines.tasks import SCORES, Task
from tune.spec import TuneSpec

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

PREDICT: Final = "predict_ms"
BYTES: Final = "model_bytes"
COSTS: Final = (PREDICT, BYTES)
"""What a model costs, measured on it where it is asked for: milliseconds for 1000 rows on one thread, and bytes of its files."""


Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Objective:
    """The metrics by which trials are compared, the first of them the main one."""

    metrics: tuple[str, ...]
    tolerance: float

    @classmethod
    def of(cls, tune: TuneSpec, task: Task) -> Objective:
        """Raises `SpecError` for a metric that the task does not have."""
        named = tune.metric if tune.metric is not None else task.metric_names[0]
        metrics = (named,) if isinstance(named, str) else tuple(named)
        known = [*task.metric_names, *COSTS]
        for metric in metrics:
            if metric not in known:
                raise SpecError(f"tune.metric: '{metric}' is no metric of a {task.type} task{did_you_mean(metric, known)}")
        if metrics[0] in COSTS and len(metrics) == 1:
            raise SpecError(
                f"tune.metric: {metrics[0]} alone would find the smallest model, however bad; name a metric before it"
            )
        return cls(metrics, tune.tolerance)

    @property
    def directions(self) -> list[Direction]:
        return ["maximize" if self.higher(metric) else "minimize" for metric in self.metrics]

    @property
    def costs(self) -> list[str]:
        """The metrics that are measured on the finished model."""
        return [metric for metric in self.metrics if metric in COSTS]

    @staticmethod
    def higher(metric: str) -> bool:
        """Whether more of it is better."""
        return metric in SCORES

    def values(self, found: Mapping[str, float | None]) -> list[float] | None:
        """The values by which a trial is compared; None where the rows do not define one, or it is not finite."""
        values = [found.get(metric) for metric in self.metrics]
        known = [value for value in values if value is not None and math.isfinite(value)]
        return known if len(known) == len(values) else None

    def better(self, value: float, than: float) -> bool:
        """By the first metric."""
        return value > than if self.higher(self.metrics[0]) else value < than

    def front(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those that no other one beats in a metric without being beaten in another, the best by the first first."""
        found = [trial for trial in trials if not any(self._dominates(other, trial) for other in trials)]
        return sorted(found, key=lambda trial: (*self._losses(trial), trial.number))

    def winner(self, trials: Sequence[FrozenTrial]) -> tuple[FrozenTrial, str]:
        """The trial that the search stands for, and the rule that picked it."""
        front = self.front(trials)
        best, main = front[0], self.metrics[0]
        if len(self.metrics) == 1:
            return best, f"the best valid {main}"
        room = abs(best.values[0]) * self.tolerance
        near = [trial for trial in front if abs(trial.values[0] - best.values[0]) <= room]
        chosen = min(near, key=lambda trial: (*self._losses(trial)[1:], self._losses(trial)[0], trial.number))
        others = ", then ".join(self.metrics[1:])
        return (
            chosen,
            f"the best {others} of the {len(near)} of {len(front)} on the front within {self.tolerance:.3g} of the best {main}",
        )

    def ordered(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """The best by the first metric first."""
        return sorted(trials, key=lambda trial: (*self._losses(trial), trial.number))

    def _losses(self, trial: FrozenTrial) -> tuple[float, ...]:
        pairs = zip(self.metrics, trial.values, strict=True)
        return tuple(-value if self.higher(metric) else value for metric, value in pairs)

    def _dominates(self, one: FrozenTrial, other: FrozenTrial) -> bool:
        mine, theirs = self._losses(one), self._losses(other)
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))
