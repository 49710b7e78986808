"""The trials of a search: what each is asked, hears and leaves, in Optuna's study and as a child Run.

RUN/trials/0007/
    spec.yaml        the Spec with the trial's settings
    metrics.jsonl    one line per report
    run.json         status (complete, stopped, failed), values, seconds; written last
    checkpoints/     until then
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipelines.errors import SpecError
from pipelines.notation import to_yaml
from pipelines.runs import RECORD, Run
from pipelines.storage import Folder
from tune.objective import Objective
from tune.space import Point, ask
from tune.spec import SearchedSpec
from tune.study import Journal, own, point_of, quiet

STATUS = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}


@dataclass
class Going:
    """A trial that has begun."""

    trial: optuna.Trial
    point: Point
    spec: SearchedSpec
    run: Run
    started: float = field(default_factory=time.monotonic)
    curve: list[dict[str, Any]] = field(default_factory=list)
    """What it has reported: step, total, metrics."""
    lines: list[str] = field(default_factory=list)
    """Of its metrics, not yet written: a store that cannot append gets them all at the end."""
    best: float | None = None
    """By the first metric, so far."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Seconds, CPU seconds and how often data was binned, so far."""

    @property
    def number(self) -> int:
        return self.trial.number


class Trials:
    """Keeps the books of a search."""

    def __init__(self, spec: SearchedSpec, run: Run, study: optuna.Study, journal: Journal, objective: Objective) -> None:
        assert spec.tune is not None
        self._spec, self._run, self._study, self._journal, self._objective = spec, run, study, journal, objective
        self._space = spec.tune.space
        self._left = own(study, TrialState.RUNNING)
        """Trials that a search which was killed has left."""
        self.made = 0
        """How often data was binned."""
        self.cpu_s = 0.0
        self.errors: list[str] = []

    @property
    def study(self) -> optuna.Study:
        return self._study

    @property
    def begun(self) -> int:
        """How many were begun, those that have ended included."""
        return len(own(self._study, *STATUS, TrialState.RUNNING)) - len(self._left)

    def counts(self) -> dict[str, int]:
        """How many ended how."""
        return {name: len(own(self._study, state)) for state, name in STATUS.items()}

    def without_gain(self) -> int:
        """How many have ended since the best one did."""
        ended = own(self._study, *STATUS)
        complete = [trial for trial in ended if trial.state == TrialState.COMPLETE]
        if not complete:
            return 0
        best = self._objective.ordered(complete)[0].datetime_complete
        return sum(trial.datetime_complete > best for trial in ended if trial.datetime_complete and best)

    def next(self) -> Going | None:
        """Begin a trial, or go on with one that was left.

        None where there is nothing to do: its settings are no Spec, so it has failed; they were tried before; or it has ended.
        """
        with quiet():
            if self._left:
                frozen = self._left.pop(0)
                trial = optuna.trial.Trial(self._study, frozen._trial_id)
                # A kill may have come before its point was complete: what is missing is asked for now.
                point = point_of(frozen) if "point" in frozen.user_attrs else ask(self._space, trial)
            else:
                trial = self._study.ask()
                point = ask(self._space, trial)
            trial.set_user_attr("point", json.dumps(point))
        self._journal.flush()
        run = Run(self._run.folder / "trials" / f"{trial.number:04d}", {})
        if run.folder.exists(RECORD):
            self._tell(trial, Run.open(run.folder).record)
            return None
        try:
            spec = self._spec.replace({**point, "tune": None})
        except SpecError as error:
            self._end(Going(trial, point, self._spec, run), TrialState.FAIL, error=str(error))
            return None
        going = Going(trial, point, spec, run)
        if (twin := self._twin(trial)) is not None:
            self._repeat(going, twin)
            return None
        run.folder.write_bytes("spec.yaml", to_yaml(spec).encode())
        known = run.folder.read_bytes("metrics.jsonl").decode() if run.folder.exists("metrics.jsonl") else ""
        if known:  # it tells again what it had told before it was left
            run.folder.remove("metrics.jsonl")
        return going

    def hear(self, going: Going, report: dict[str, Any]) -> list[tuple[int, float]]:
        """Write down what a trial reports; return step and best value so far of each new report."""
        going.facts = report["facts"]
        new = report["curve"][max(0, len(going.curve) - report["first"]) :]
        lines, found = [], []
        for entry in new:
            going.curve.append(entry)
            for split, values in entry["metrics"].items():
                lines += [{"step": entry["step"], "split": split, "metric": name, "value": v} for name, v in values.items()]
            value = entry["metrics"].get("valid", {}).get(self._objective.metrics[0])
            if value is None:
                continue
            if going.best is None or self._objective.better(value, going.best):
                going.best = value
            found.append((entry["step"], going.best))
            if len(self._objective.metrics) == 1:
                with quiet():
                    going.trial.report(value, entry["step"])
        going.lines += [json.dumps(line) + "\n" for line in lines]
        if going.run.folder.is_local:
            self._write_lines(going)
        return found

    @staticmethod
    def _write_lines(going: Going) -> None:
        if going.lines:
            going.run.folder.append_text("metrics.jsonl", "".join(going.lines))
            going.lines.clear()

    def complete(self, going: Going, final: dict[str, Any]) -> None:
        """A trial came to its end: its values are those of the model that it has left."""
        at = next((entry for entry in going.curve if entry["step"] == final["step"]), going.curve[-1] if going.curve else None)
        valid = final.get("valid") or (at["metrics"].get("valid", {}) if at else {})
        values = self._objective.values({**valid, **final["costs"]})
        if values is None:
            names = ", ".join(self._objective.metrics)
            self._end(going, TrialState.FAIL, error=f"the model has no finite {names} on the valid split")
            return
        measured = dict(zip(self._objective.metrics, values, strict=True))
        self._end(going, TrialState.COMPLETE, values, step=final["step"], values=measured, metrics={"valid": valid})

    def stop(self, going: Going) -> None:
        """A trial was stopped because it looked bad; its curve is known."""
        last = going.curve[-1]
        self._end(going, TrialState.PRUNED, step=last["step"], metrics=last["metrics"])

    def fail(self, going: Going, why: str) -> None:
        self._end(going, TrialState.FAIL, error=why)

    def table(self, number: int = 5) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the best complete trials."""
        found = self._objective.ordered(own(self._study, TrialState.COMPLETE))[:number]
        paths = list(dict.fromkeys(path for trial in found for path in point_of(trial)))
        rows = [
            [
                f"{trial.number:04d}",
                *(f"{value:.5g}" for value in trial.values),
                *(_shown(point_of(trial).get(path, "-")) for path in paths),
            ]
            for trial in found
        ]
        return ["TRIAL", *self._objective.metrics, *(path.removeprefix("model.params.") for path in paths)], rows

    def _tell(self, trial: optuna.Trial, record: dict[str, Any]) -> None:
        """Tell of a trial that has ended, and left its record, before the process that knew it was killed."""
        state = next(state for state, status in STATUS.items() if status == record["status"])
        values = [record["values"][metric] for metric in self._objective.metrics] if state == TrialState.COMPLETE else None
        with quiet():
            self._study.tell(trial, values, state=state)
        self._journal.flush()

    def _twin(self, trial: optuna.Trial) -> FrozenTrial | None:
        """A trial of the same settings that has ended: this one would end as that one did."""
        ended = own(self._study, TrialState.COMPLETE, TrialState.PRUNED)
        return next((other for other in ended if other.params == trial.params), None)

    def _repeat(self, going: Going, twin: FrozenTrial) -> None:
        before = Run.open(self._run.folder / "trials" / f"{twin.number:04d}").record
        with quiet():
            for step, value in twin.intermediate_values.items():
                going.trial.report(value, step)
        same = {name: before[name] for name in ("step", "values", "metrics") if name in before}
        told = twin.values if twin.state == TrialState.COMPLETE else None
        going.facts = {"seconds": 0.0}
        self._end(going, twin.state, told, same_as=twin.number, **same)

    def _end(
        self,
        going: Going,
        state: TrialState,
        told: Sequence[float] | None = None,
        **record: Any,
    ) -> None:
        """Tell the searcher, and write the record."""
        self.made += going.facts.get("made", 0)
        self.cpu_s += going.facts.get("cpu_s", 0.0)
        if state == TrialState.FAIL:
            self.errors.append(record["error"])
            with quiet():
                going.trial.set_user_attr("error", record["error"])
        seconds = going.facts.get("seconds", time.monotonic() - going.started)
        self._write_lines(going)
        going.run.complete(
            name=self._run.name, status=STATUS[state], trial=going.number, point=going.point, seconds={"train": seconds}, **record
        )
        with quiet():  # the study last: what a kill leaves between the two is told by `_tell`
            going.trial.set_user_attr("seconds", seconds)
            self._study.tell(going.trial, told, state=state)
        self._journal.flush()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clean(run: Folder) -> None:
    """Delete the checkpoints of trials that have ended: one that was stopped may have written a last one."""
    for name in (run / "trials").names():
        folder = run / "trials" / name
        if folder.exists(RECORD):
            (folder / "checkpoints").delete()
