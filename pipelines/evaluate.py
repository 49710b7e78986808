"""evaluate: the metrics of a run on its own valid and test rows, or on other data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.artifact import Artifact
from pipelines.data.beside import groups_of, init_scores_of, weights_of
from pipelines.data.read import Block, in_order, stream
from pipelines.data.source import Source, Unit
from pipelines.data.split import SPLITS
from pipelines.errors import RequirementError, SpecError, did_you_mean
from pipelines.metrics import Metrics, State, sizes_of
from pipelines.progress import SILENT, Progress
from pipelines.runs import Run
from pipelines.scoring import loaded, reader_for
from pipelines.spec import PipelineSpec, SplitSpec
from pipelines.tasks import Task

States = dict[str, tuple[int, dict[str, np.ndarray[Any, Any]]]]


@dataclass(frozen=True)
class Evaluation:
    """Metrics and rows by split; `data` stands for a source of its own."""

    metrics: dict[str, dict[str, float | None]]
    rows: dict[str, int]
    seconds: float


def evaluate(run: Run, spec: PipelineSpec, *, source: str | list[str] | None = None, progress: Progress = SILENT) -> Evaluation:
    """Score the valid and test rows of the run's own source, or all rows of another one, in one streaming pass.

    The metrics are merged from sums per read unit, in source order. Rows count as `task.weight` says, also of other data, which
    has to have that column; class weights are no part of it. Of a ranking the scores come to this process, 24 bytes a row, for
    a query may be divided over units. Nothing is written.
    """
    started = time.monotonic()
    artifact = Artifact.load(run.artifact, model=False)
    data = spec.data if source is None else spec.data.model_copy(update={"source": source, "split": SplitSpec()})
    files = Source.open(data)
    reader = reader_for(artifact, files, data, task=artifact.task)
    each = Score(str(run.artifact), artifact.version, artifact.task, whole=source is not None)
    total: dict[str, Metrics] = {}
    rows: dict[str, int] = {}
    ranked: dict[str, list[State]] = {}
    with progress.stage("evaluate", total=files.rows) as stage:
        for states in in_order(stream(files, reader, each), stage):
            for split, (count, state) in states.items():
                rows[split] = rows.get(split, 0) + count
                if artifact.task.group is not None:
                    ranked.setdefault(split, []).append(state)
                    continue
                before = [total[split].state()] if split in total else []
                total[split] = Metrics.merge(artifact.task, [*before, state])
    for split, states in ranked.items():
        total[split] = _by_query(artifact.task, states)
    metrics = {split: found.result() for split, found in sorted(total.items())}
    return Evaluation(metrics, rows, time.monotonic() - started)


@dataclass(frozen=True)
class Score:
    """The metric states of one unit, by split."""

    artifact: str
    version: str
    task: Task
    whole: bool
    """Score every row, as `data`; else the valid and the test rows."""

    def __call__(self, unit: Unit, blocks: Iterator[Block]) -> States:
        artifact = loaded(self.artifact, self.version)
        metrics: dict[str, Metrics] = {}
        ranked: dict[str, list[State]] = {}
        rows: dict[str, int] = {}
        for block in blocks:
            for split, part in self._parts(block):
                if self.task.init_score is not None:
                    init_scores_of(part.table, self.task.init_score, unit)  # a wrong one is told with its file
                scores = artifact.scores(part.table)
                weight = weights_of(part.table, self.task.weight, unit) if self.task.weight else None
                target = self.task.encode(part.table[self.task.target])
                rows[split] = rows.get(split, 0) + part.table.num_rows
                if self.task.group is None:
                    metrics.setdefault(split, Metrics(self.task)).add(target, scores, weight)
                else:
                    found = {"group": groups_of(part.table, self.task.group, unit), "target": target, "raw": scores}
                    ranked.setdefault(split, []).append(found | ({} if weight is None else {"weight": weight}))
        states = {split: _joined(found) for split, found in ranked.items()}
        return {split: (count, states[split] if split in states else metrics[split].state()) for split, count in rows.items()}

    def _parts(self, block: Block) -> Iterator[tuple[str, Block]]:
        if self.whole:
            yield "data", block
            return
        for code in (1, 2):
            mask = block.split == code
            if mask.any():
                yield SPLITS[code], block.take(mask)


def _joined(states: Sequence[State]) -> State:
    return {name: np.concatenate([state[name] for state in states]) for name in states[0]}


def _by_query(task: Task, states: Sequence[State]) -> Metrics:
    """The metrics of rows whose queries may be divided over units: 24 bytes a row, 32 with weights, come to this process."""
    whole = _joined(states)
    order = np.argsort(whole["group"], kind="stable")
    weight = whole["weight"][order] if "weight" in whole else None
    metrics = Metrics(task)
    metrics.add(whole["target"][order], whole["raw"][order], weight, sizes_of(whole["group"][order]))
    return metrics


def check_requirements(spec: PipelineSpec, task: Task) -> None:
    """Raise `SpecError` for a required metric that the task does not have."""
    for name in spec.evaluate.require:
        if name not in task.metric_names:
            raise SpecError(
                f"evaluate.require: '{name}' is no metric of a {task.type} task{did_you_mean(name, task.metric_names)}"
            )


def require(spec: PipelineSpec, task: Task, metrics: dict[str, dict[str, float | None]]) -> None:
    """Raise `RequirementError` when a metric on the test split (else valid) misses what the Spec requires."""
    split = "test" if "test" in metrics else "valid"
    for name, bound in spec.evaluate.require.items():
        value = metrics.get(split, {}).get(name)
        higher = task.higher_is_better(name)
        if value is None or (value < bound if higher else value > bound):
            found = "undefined" if value is None else f"{value:.6g}"
            raise RequirementError(
                f"{split} {name} is {found}; evaluate.require wants at {'least' if higher else 'most'} {bound:g}"
            )
