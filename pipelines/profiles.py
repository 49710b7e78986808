"""What an Artifact remembers of its training data: a profile per column, and example rows for docs and self-checks."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from pipelines.schema import Schema
from pipelines.tasks import Task

if TYPE_CHECKING:
    from pipelines.data.summary import Summary

EXAMPLES: Final = 5


def profile_of(inputs: Schema, summary: Summary, task: Task) -> dict[str, Any]:
    """Return plain JSON: rows by split, statistics by column, the target's distinct values, example rows of the train split."""
    targets = None if summary.targets is None else [[value, count] for value, count in summary.targets.most_common(100)]
    return {
        "rows": summary.rows,
        "columns": {name: statistics.profile() for name, statistics in summary.columns.items()},
        "target": {"name": task.target, "values": targets},
        "examples": _examples(inputs, summary),
    }


def _examples(inputs: Schema, summary: Summary) -> list[dict[str, Any]]:
    if summary.sample is None:
        return []
    chosen = np.argsort(summary.hashes, kind="stable")[:EXAMPLES]
    rows = summary.sample.select(inputs.names).take(pa.array(chosen)).to_pylist()
    return [{name: to_plain(value) for name, value in row.items()} for row in rows]


def to_plain(value: Any) -> Any:
    """A value as JSON has it: timestamps as ISO 8601 text, NaN and infinities as null."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
