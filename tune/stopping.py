"""Which trials are stopped early? Ray Tune's schedulers, fed with all that a trial has reported.

Ray Tune looks at a trial when it has time for it, and a quick one has reported several times by then. Each report counts here, so
a rung of ASHA has the values at its own round. What was stopped is remembered by `searcher.py`: Ray Tune tells of such trials
as if they had come to their end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Literal

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

FACTOR: Final = 3
"""Of the trials at a rung one in so many goes on."""


@dataclass(frozen=True)
class Known:
    """What a scheduler needs to know of a trial."""

    trial_id: str


class Rule:
    """ASHA or the median rule over the steps of the fits: boosting rounds, epochs."""

    def __init__(self, name: Literal["asha", "median"], *, higher: bool, grace: int | None) -> None:
        self._name, self._mode, self._grace = name, "max" if higher else "min", grace
        self._scheduler: Any = None
        self._order: dict[str, int] = {}
        """When a trial was first heard of."""

    def stops(self, trial: Known, points: Iterable[tuple[int, float]], total: int) -> bool:
        """Whether a trial is to be stopped after these reports (step, best value so far) of at most `total` steps."""
        scheduler = self._of(total)
        if trial.trial_id not in self._order:
            scheduler.on_trial_add(None, trial)
            self._order[trial.trial_id] = len(self._order)
        for step, value in points:
            result = {"step": step, "value": value}
            stop = scheduler.on_trial_result(_NOBODY, trial, result) == TrialScheduler.STOP
            # ASHA would stop the second trial of all for being worse than the first.
            if stop and (self._name == "median" or self._order[trial.trial_id] >= FACTOR):
                return True
        return False

    def remember(self, number: int, points: list[tuple[int, float]], total: int) -> None:
        """Take in a trial that ended before this process began."""
        if points:
            self.stops(Known(f"before-{number}"), points, total)

    def _of(self, total: int) -> Any:
        """Made with the first report: only then is it known how long fits are."""
        if self._scheduler is None:
            grace = max(1, min(self._grace or -(-total // FACTOR**2), total))
            shared: dict[str, Any] = {"time_attr": "step", "metric": "value", "mode": self._mode, "grace_period": grace}
            if self._name == "asha":
                self._scheduler = ASHAScheduler(
                    **shared, max_t=max(total, grace), reduction_factor=FACTOR, stop_last_trials=False
                )
            else:
                self._scheduler = _Median(**shared)
        return self._scheduler


class _Median(MedianStoppingRule):
    def _on_insufficient_samples(self, *_: Any) -> str:
        return str(TrialScheduler.CONTINUE)  # a trial cannot be paused: its fit goes on by itself


_NOBODY: Final = SimpleNamespace(get_live_trials=list)


class Unkept:
    """What Ray Tune would keep as a pickle, for a resume that we do not leave to it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Unkept, ()


class Deciding(Unkept, FIFOScheduler):
    """What Ray Tune asks after each result."""

    def __init__(self, listener: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._listener = listener

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._listener.lost(trial.trial_id, str(trial.get_error() or ""))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(TrialScheduler.STOP if self._listener.unwanted(trial.trial_id, result) else TrialScheduler.CONTINUE)
