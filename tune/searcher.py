"""Ray Tune's view of a search: it asks for trials and hands over what they say; Optuna and the child Runs remember.

Runs in the thread of Ray Tune's controller. Data that a trial needs is prepared elsewhere, by the thread that owns the search:
meanwhile the other trials go on, and this one waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import TrialState
from ray.tune.search import Searcher

from pipelines.errors import UserError
from pipelines.progress import Stage
from pipelines.training.lost import Lost, explain
from pipelines.training.trainer import look
from tune.spec import TuneSpec
from tune.stopping import Known, Rule, Unkept
from tune.study import own
from tune.trial import JOB, REPORT, TrialJob
from tune.trials import Going, Trials


@dataclass
class Budget:
    """When no new trial is started any more."""

    tune: TuneSpec
    spent_s: float
    """Before this process began."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.spent_s + time.monotonic() - self.started

    def spent(self, trials: Trials) -> str | None:
        """Why it is used up; None: it is not."""
        if trials.begun >= self.tune.trials:
            return f"{self.tune.trials} trials"
        if self.tune.time_budget_s is not None and self.seconds >= self.tune.time_budget_s:
            return f"{self.tune.time_budget_s:g} s"
        if self.tune.patience is not None and trials.without_gain() >= self.tune.patience:
            return f"{self.tune.patience} trials without a better one"
        return None


class Asking(Unkept, Searcher):
    """Gives Ray Tune one trial after another."""

    def __init__(
        self,
        trials: Trials,
        budget: Budget,
        rule: Rule | None,
        at_once: int,
        prepared: Callable[[Going], TrialJob | UserError | None],
        stage: Stage,
        ended: Callable[[], None],
    ) -> None:
        super().__init__()
        self._trials, self._budget, self._rule, self._at_once = trials, budget, rule, at_once
        self._prepared, self._stage, self._note = prepared, stage, ended
        self._waiting: list[Going] = []
        self._going: dict[str, Going] = {}
        self._stopped: set[str] = set()
        self.over: str | None = None
        """Why no trial is started any more."""
        self._deaths: dict[str, str] = {}

    def suggest(self, trial_id: str) -> Any:
        """A trial's job; None while all wait for their data; FINISHED."""
        while self.over is None or self._waiting:
            for going in list(self._waiting):
                job = self._prepared(going)
                if job is None:
                    continue
                self._waiting.remove(going)
                if isinstance(job, UserError):
                    self._trials.fail(going, str(job))
                    self._ended()
                    continue
                self._going[trial_id] = going
                self._show()
                return {JOB: job}
            self.over = self.over or self._budget.spent(self._trials)
            if self.over is not None or len(self._waiting) >= self._at_once:
                break
            fresh = self._trials.next()
            if fresh is None:
                self._ended()
            else:
                self._waiting.append(fresh)
        return None if self._waiting else Searcher.FINISHED

    def unwanted(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Hear a result of a trial that goes on; answer whether it is to be stopped."""
        going = self._going[trial_id]
        report = result[REPORT][0]
        points = self._trials.hear(going, report)
        if self._rule is None or not points:
            return False
        total = max(entry["total"] for entry in report["curve"])
        if self._rule.stops(Known(trial_id), points, total):
            self._stopped.add(trial_id)
            return True
        return False

    def lost(self, trial_id: str, text: str) -> None:
        """Hear what Ray says of the death of a trial's process, just before it completes with an error."""
        self._deaths[trial_id] = text

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: `unwanted` has heard it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        going = self._going.pop(trial_id, None)
        if going is None:
            return
        report = result[REPORT][0] if result and REPORT in result else {}
        if trial_id in self._stopped:
            self._trials.stop(going)
        elif error:
            self._trials.fail(going, self._why(going, self._deaths.pop(trial_id, "")))
        elif not report.get("done"):
            return  # the search was interrupted: a later one goes on with it
        elif "error" in report:
            if "traceback" in report:
                going.run.folder.write_bytes("error.txt", report["traceback"].encode())
            self._trials.hear(going, report)
            self._trials.fail(going, report["error"])
        else:
            points = self._trials.hear(going, report)
            if self._rule is not None and points:
                self._rule.stops(
                    Known(trial_id), points, max(entry["total"] for entry in report["curve"])
                )  # others are compared with it
            self._trials.complete(going, report["final"])
        self._ended()

    def _why(self, going: Going, text: str) -> str:
        """Why a process is gone, in one line."""
        pid, node = going.facts.get("pid"), going.facts.get("node")
        lost = Lost(f"the process of the trial (pid {pid})" if pid else "the process of the trial", "died", text, pid, node)
        return " ".join(explain(lost, look(lost), going.facts.get("oom_kills", 0)).split())

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's journal is all that a search remembers."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing, likewise."""

    def _ended(self) -> None:
        self._stage.advance(1)
        self._note()
        self._show()
        failed = self._trials.errors
        if len(failed) >= max(3, self._at_once + 1) and not own(self._trials.study, TrialState.COMPLETE, TrialState.PRUNED):
            self.over = self.over or f"the first {len(failed)} trials have all failed"

    def _show(self) -> None:
        """The best trials so far and who works, below the bar."""
        head, rows = self._trials.table()
        cells = [head, *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        counts = self._trials.counts()
        left = self._budget.tune.time_budget_s
        told = [f"{len(self._going)} of {self._at_once} at work", *(f"{n} {name}" for name, n in counts.items() if n)]
        told += [f"{max(0.0, left - self._budget.seconds):.0f} s of the budget left"] if left is not None else []
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        self._stage.show([", ".join(told), *(table if rows else [])])
