"""What an Artifact remembers of its training data: a profile per column and split, and example rows for docs and self-checks.

A column's profile is that of the train split; what is known of valid and test stands under `splits`. Counts, moments and extremes
are of all rows. Quantiles, histograms and, of numbers, the number of distinct values come from the row sample of the split: all
its rows up to 200,000 (train), else a share of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from pipelines.features.stats import Numbers, NumberStatistics, Statistics, StringStatistics
from pipelines.schema import Schema
from pipelines.tasks import Task

if TYPE_CHECKING:
    from pipelines.data.summary import Summary

EXAMPLES: Final = 5
BINS: Final = 20
"""Of a histogram: equally full in the train split, so that each says as much about drift as any other."""


def profile_of(inputs: Schema, summary: Summary, task: Task) -> dict[str, Any]:
    """Return plain JSON: rows by split, statistics by column, the target's distinct values, example rows of the train split."""
    targets = None if summary.targets is None else [[value, count] for value, count in summary.targets.most_common(100)]
    held = {split: found.columns for split, found in summary.held.items()}
    return {
        "rows": summary.rows,
        "columns": {
            name: profile_column(statistics, {split: found[name] for split, found in held.items()})
            for name, statistics in summary.columns.items()
        },
        "target": {"name": task.target, "values": targets},
        "examples": _examples(inputs, summary),
    }


def profile_column(train: Statistics, held: Mapping[str, Statistics]) -> dict[str, Any]:
    """Return the train split's profile and, under `splits`, those of the others; histograms share the train split's edges.

    Of numbers `histogram` has the inner `edges`, ascending, and by split the `counts` of sampled finite values: up to the first
    edge (inclusive), between two, beyond the last.
    """
    described = _described(train) | {"splits": {split: _described(found) for split, found in held.items()}}
    if isinstance(train, NumberStatistics):
        edges = edges_of(train)
        splits = {"train": train, **held}
        counts = {split: counts_between(edges, found).tolist() for split, found in splits.items()}  # type: ignore[arg-type]
        described["histogram"] = {"edges": edges.tolist(), "counts": counts}
    return described


def edges_of(statistics: NumberStatistics) -> Numbers:
    """The inner edges of at most BINS bins: quantiles, or half-way between values where there are that few."""
    values, distinct = statistics.ordered, _distinct(statistics.ordered)
    if len(distinct) <= BINS:
        return np.array([low + (high - low) / 2 for low, high in pairwise(distinct.tolist())], np.float64)
    return _distinct(values[(len(values) - 1) * np.arange(1, BINS) // BINS])


def counts_between(edges: Numbers, statistics: NumberStatistics) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many finite values of the sample fall up to the first edge, between two, and beyond the last."""
    below = np.searchsorted(statistics.ordered, edges, side="right")
    return np.diff(below, prepend=0, append=len(statistics.ordered))


def distinct_of(statistics: NumberStatistics) -> tuple[int, float]:
    """How many distinct finite values there are, and by what factor at most that may be wrong (1: exact).

    Beyond the sample by the guaranteed-error estimator (Charikar et al. 2000): of a sample of n of N values, those seen once
    stand for sqrt(N / n) each; the same is the bound of its error.
    """
    values = statistics.ordered
    starts = np.flatnonzero(_starts(values))
    once = int((np.diff(starts, append=len(values)) == 1).sum())
    factor = math.sqrt(max(1.0, statistics.finite / max(1, len(values))))
    return round(factor * once) + len(starts) - once, factor


def _starts(ordered: Numbers) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where another value begins."""
    return np.asarray(ordered != np.append(np.nan, ordered[:-1])[: len(ordered)])


def _distinct(ordered: Numbers) -> Numbers:
    return np.asarray(ordered[_starts(ordered)])


def _described(statistics: Statistics) -> dict[str, Any]:
    if isinstance(statistics, StringStatistics):
        return statistics.profile()
    distinct, factor = distinct_of(statistics)
    return statistics.profile() | {"distinct": distinct, "distinct_factor": factor}


def _examples(inputs: Schema, summary: Summary) -> list[dict[str, Any]]:
    if summary.sample is None:
        return []
    chosen = np.argsort(summary.hashes, kind="stable")[: 20 * EXAMPLES]
    rows = summary.sample.select(inputs.names).take(pa.array(chosen)).to_pylist()
    plain = [{name: to_plain(value) for name, value in row.items()} for row in rows]
    # An infinity, which JSON has not, would be a null where a request may have none.
    required = [column.name for column in inputs.columns if not column.nullable]
    return [row for row in plain if all(row[name] is not None for name in required)][:EXAMPLES]


def to_plain(value: Any) -> Any:
    """A value as JSON has it: timestamps as ISO 8601 text, NaN and infinities as null."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
