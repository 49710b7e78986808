"""Where do results and progress go? Results to stdout, as text or as one JSON object; all else to stderr."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

from app.progress import Shown

if TYPE_CHECKING:
    from pipelines.cache import Entry
    from pipelines.evaluate import Evaluation
    from pipelines.plan import Plan
    from pipelines.predict import Predictions
    from pipelines.prepare import Prepared
    from pipelines.runs import Run
    from tune.plan import SearchPlan

FINDINGS = 10
"""How many are printed."""
COLUMNS = 10
"""Of the importance, likewise."""
ORDER = ("tune", "prepare", "train", "valid", "test", "evaluate")


@dataclass(frozen=True)
class Output:
    """The two streams of one command."""

    results: IO[str]
    as_json: bool
    progress: Shown

    def result(self, content: Mapping[str, Any], lines: Iterable[str]) -> None:
        """Print the result: `content` for programs, `lines` for people."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, default=str) if self.as_json else "\n".join(lines)
        print(text, file=self.results, flush=True)


@contextlib.contextmanager
def output(as_json: bool) -> Iterator[Output]:
    """Open both streams; with JSON nothing else reaches stdout, not even what a library in C++ prints."""
    from rich.console import Console

    progress = Shown(Console(stderr=True))
    if not as_json:
        yield Output(sys.stdout, False, progress)
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(kept, "w", encoding="utf-8", closefd=False) as results, contextlib.redirect_stdout(sys.stderr):
            yield Output(results, True, progress)
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_run(run: Run, out: Output, *, importance: Mapping[str, Any] | None = None) -> None:
    """Print a complete run; the JSON is its record, with the importance of its columns where it is given."""
    record = run.record
    task, workers, seconds = record.get("task") or {}, record.get("workers") or [], record.get("seconds") or {}
    lines = [
        _line("run", f"{run.name}/{run.id}"),
        _line("task", f"{task.get('type')}: {task.get('target')}"),
        _line("rows", _rows(record)),
        _line("seconds", ", ".join(f"{stage} {seconds[stage]:.1f}" for stage in ordered(seconds))),
        _line("workers", ", ".join(f"{worker['rank']}: {worker['rows']:,} rows" for worker in workers)),
        *metric_lines(run.metrics, task.get("metric")),
        *([_line("resumed", f"from step {', '.join(map(str, record['resumed']))}")] if record.get("resumed") else []),
        *tune_lines(record.get("tune") or {}),
        *([_line("parent", record["parent"])] if record.get("parent") else []),
        _line("path", run.path),
        *importance_lines(importance or {}),
        *finding_lines(record.get("findings") or []),
    ]
    more = {} if importance is None else {"importance": importance}
    out.result({**record, "run": run.id, "path": run.path} | more, lines)


def print_prepared(prepared: Prepared, out: Output) -> None:
    """Print what `prepare` left."""
    content = {
        "path": prepared.path,
        "rows": prepared.rows,
        "dropped": prepared.dropped,
        "reused": prepared.reused,
        "findings": prepared.findings,
    }
    lines = [_line("rows", _rows(content)), _line("path", prepared.path), *finding_lines(prepared.findings)]
    out.result({**content, "seconds": {"prepare": prepared.seconds}}, lines)


def print_evaluation(run: Run, found: Evaluation, out: Output) -> None:
    """Print metrics by split."""
    content = {"run": run.id, "path": run.path, "task": run.record.get("task"), "metrics": found.metrics, "rows": found.rows}
    lines = [
        _line("run", f"{run.name}/{run.id}"),
        _line("rows", _rows(content)),
        *metric_lines(found.metrics, (run.record.get("task") or {}).get("metric")),
    ]
    out.result({**content, "seconds": {"evaluate": found.seconds}}, lines)


def print_predictions(run: Run, found: Predictions, out: Output) -> None:
    """Print where the answers are."""
    content = {"run": run.id, "path": found.path, "rows": found.rows, "seconds": {"predict": found.seconds}}
    out.result(content, [_line("rows", f"{found.rows:,}"), _line("path", found.path)])


def print_list(runs: list[Run], out: Output) -> None:
    """Print a line per run."""
    content = {"runs": [{**run.record, "run": run.id, "path": run.path} for run in runs]}
    lines = table(["NAME", "RUN", "TRAIN ROWS", "SECONDS", "METRIC"], [_row(run) for run in runs])
    out.result(content, lines if runs else ["no run is complete yet: heliostat run SPEC makes one"])


def print_plan(plan: Plan, out: Output, searched: SearchPlan | None = None) -> None:
    """Print what a run would do, and a search where the Spec has one."""
    kinds = Counter(column["kind"] for column in plan.columns.values())
    known = "" if plan.exact else "about "
    stages = [
        [stage.name, size(stage.reads), stage.slots, f"{size(stage.memory)}", size(stage.driver) if stage.driver else "-"]
        for stage in plan.stages
    ]
    lines = [
        _line("rows", f"{known}{plan.rows:,} in {plan.files:,} file{'s' if plan.files > 1 else ''}, {size(plan.bytes)}"),
        _line("columns", f"{len(plan.columns)} are read: {', '.join(f'{number} {kind}' for kind, number in kinds.items())}"),
        _line("features", f"about {plan.features}"),
        *(_line("passes" if i == 0 else "", f"{i + 1}. {reason}") for i, reason in enumerate(plan.passes)),
        _line("cache", plan.cache),
        _line("disk", f"prepared shards of at most {size(plan.disk)}"),
        *(
            _line("stages" if i == 0 else "", line)
            for i, line in enumerate(table(["", "READS", "SLOTS", "MEMORY EACH", "AND IN THE COMMAND"], stages))
        ),
        *(
            _line("machines" if i == 0 else "", f"{machine.name}: {machine.slots:g} slots, {size(machine.memory)} free")
            for i, machine in enumerate(plan.machines)
        ),
        *(plan_lines(searched) if searched else []),
    ]
    out.result(asdict(plan) | ({"tune": asdict(searched)} if searched else {}), lines)


def plan_lines(searched: SearchPlan) -> list[str]:
    """What a search would do."""
    points = f", of {searched.points:,} points of the grid" if searched.points is not None else ""
    times = "once for all trials" if searched.prepared == 1 else "once per setting of data and features"
    prepared = searched.prepared or searched.trials
    most = f", {min(prepared, searched.trials)} times at most" if prepared > 1 else ""
    return [
        _line("tune", f"{searched.trials:,} trials at most{points}; {searched.knobs} knobs"),
        _line("", f"searcher {searched.searcher}, scheduler {searched.scheduler}; data is prepared {times}{most}"),
        *([_line("", f"{searched.layout.described}")] if searched.layout else []),
        *([_line("", f"{size(searched.copies)} in all, a copy of the binned rows each")] if searched.layout else []),
    ]


def print_cache(found: list[Entry], out: Output) -> None:
    """Print a line per folder of the cache, the oldest first."""
    found = sorted(found, key=lambda entry: entry.changed)
    content = [
        {"key": entry.key, "path": str(entry.folder), "holds": entry.holds, "bytes": entry.bytes, "rows": entry.rows}
        | ({"name": entry.manifest["name"], "made": entry.manifest["made"]} if entry.manifest else {})
        for entry in found
    ]
    rows = [
        [
            entry.key,
            entry.manifest["name"] if entry.manifest else "-",
            entry.holds,
            f"{sum(entry.rows.values()):,}" if entry.rows else "-",
            size(entry.bytes),
            when(entry.changed),
        ]
        for entry in found
    ]
    head = ["KEY", "NAME", "HOLDS", "ROWS", "SIZE", "WRITTEN"]
    out.result({"entries": content}, table(head, rows) if rows else ["the cache is empty"])


def print_pruned(gone: list[tuple[str, str, int]], out: Output) -> None:
    """Print what was deleted."""
    total = sum(bytes for _, _, bytes in gone)
    content = {"deleted": [{"path": path, "reason": reason, "bytes": bytes} for path, reason, bytes in gone], "bytes": total}
    lines = [f"deleted {path} ({size(bytes)}): {reason}" for path, reason, bytes in gone]
    out.result(content, [*lines, f"{size(total)} freed" if gone else "nothing to delete"])


def size(bytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if bytes < 1024:
            return f"{bytes:.3g} {unit}" if unit != "B" else f"{bytes:.0f} B"
        bytes /= 1024
    return f"{bytes:.4g} TiB"


def when(seconds: float) -> str:
    """A time since 1970 for people."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def metric_lines(metrics: Mapping[str, Mapping[str, float | None]], main: str | None = None) -> list[str]:
    """Metrics as a table, a column per split; the main metric stands first."""
    splits = ordered(metrics)
    names = sorted(dict.fromkeys(name for split in splits for name in metrics[split]), key=lambda name: name != main)
    if not names:
        return []
    rows = [[name, *(number(metrics[split].get(name)) for split in splits)] for name in names]
    return [_line(name, line) for name, line in zip(["metrics"] + [""] * len(rows), table(["", *splits], rows), strict=True)]


def tune_lines(found: Mapping[str, Any]) -> list[str]:
    """How a search went, and what it found."""
    if not found:
        return []
    counts = ", ".join(f"{count} {status}" for status, count in found["trials"].items() if count)
    values = ", ".join(f"{name} {value:.5g}" for name, value in found["values"].items())
    point = ", ".join(f"{path} {number(v) if isinstance(v, float) else v}" for path, v in found["point"].items())
    return [
        _line("trials", f"{counts} in {found['seconds']:.0f} s; ended by {found['over']}"),
        _line("winner", f"trial {found['winner']:04d}, valid {values}: {found['rule']}"),
        _line("", point),
    ]


def importance_lines(importance: Mapping[str, Any]) -> list[str]:
    """The columns that the model makes most of, as a table: shares of each measure, and the mean contribution to a raw score."""
    if not importance:
        return []
    columns, measures = importance["columns"], importance["measures"]
    totals = {name: sum(column[name] for column in columns) for name in measures}

    def cell(column: Mapping[str, Any], measure: str) -> str:
        if measure == "contribution":
            return f"{column[measure]:.4g}"
        return f"{column[measure] / totals[measure]:.1%}" if totals[measure] else "-"

    rows = [[column["name"], *(cell(column, measure) for measure in measures)] for column in columns[:COLUMNS]]
    more = [f"and {len(columns) - COLUMNS} more in importance.json"] if len(columns) > COLUMNS else []
    return ["", *table(["COLUMN", *(measure.upper() for measure in measures)], rows), *more]


def finding_lines(findings: list[dict[str, Any]]) -> list[str]:
    """The worst findings as a table; all of them are in quality.json."""
    rows = [[found["severity"], found["kind"], ", ".join(found["columns"]), found["message"]] for found in findings]
    more = [f"and {len(rows) - FINDINGS} more in quality.json"] if len(rows) > FINDINGS else []
    return ["", *table(["FINDING", "KIND", "COLUMN", ""], rows[:FINDINGS]), *more] if rows else []


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of columns that stand below each other."""
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def ordered(found: Mapping[str, Any]) -> list[str]:
    """The splits or stages of a record in their own order, whatever order JSON kept."""
    return sorted(found, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def number(value: float | None) -> str:
    """A metric as text; one that the data does not define is a dash."""
    return "-" if value is None else f"{value:.4f}"


def _row(run: Run) -> list[str]:
    record = run.record
    metric = (record.get("task") or {}).get("metric", "")
    best = next(
        (f"{split} {metric} {number(run.metrics[split].get(metric))}" for split in ("test", "valid") if split in run.metrics), "-"
    )
    seconds = sum((record.get("seconds") or {}).values())
    return [run.name, run.id, f"{(record.get('rows') or {}).get('train', 0):,}", f"{seconds:.1f}", best]


def _rows(record: Mapping[str, Any]) -> str:
    counts = record.get("rows") or {}
    rows = ", ".join(f"{split} {counts[split]:,}" for split in ordered(counts))
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in (record.get("dropped") or {}).items() if count)
    return f"{rows} (dropped: {dropped})" if dropped else rows


def _line(name: str, text: str) -> str:
    return f"{name:<10}{text}".rstrip()
