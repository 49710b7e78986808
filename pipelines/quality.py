"""What is wrong with the data? Findings from what the one pass saw, worst first; none of them stops a run.

Counts are of all rows; what compares rows or bins values looks at the row sample (all rows up to 200,000 of the train split, and
the same share of the others), and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.read import Counts
from pipelines.data.split import Hashes, mix
from pipelines.data.summary import Summary
from pipelines.features.stats import TOP, Numbers, NumberStatistics, Statistics, StringStatistics
from pipelines.profiles import counts_between, edges_of
from pipelines.schema import Column, numbers, texts
from pipelines.spec import SplitSpec
from pipelines.tasks import Task

Severity = Literal["high", "medium", "low"]
SEVERITIES: Final[tuple[Severity, ...]] = ("high", "medium", "low")

LEAK_AUC, NEAR_AUC = 0.85, 0.78
"""One column alone: strong legitimate columns of real tables stay below 0.7 to 0.75, a delay at departure gives 0.90 for one at
arrival, the length of a sales call 0.81 for its success."""
LEAK_R2, NEAR_R2 = 0.75, 0.65
"""The same for a regression: the hour alone explains 0.50 of the demand for bicycles, the registered users 0.95 of all users."""
LEAK_ROWS: Final = 20_000
"""Sampled rows that tell an AUC to about 0.01."""
LEAK_BINS: Final = 64
MIN_ROWS: Final = 200
"""Sampled rows, and 20 of the rarer class, below which one column predicts well by chance."""
MIN_CLASS: Final = 20
SMOOTHING: Final = 10.0
"""Rows of the mean that each category has beside its own, so that rare ones do not stand out by chance."""

PSI_HIGH, PSI_LOW = 0.25, 0.1
"""The usual readings of the population stability index: above 0.25 another population, below 0.1 the same."""
PSI_SIGMAS: Final = 4.0
"""By chance alone the index is (1/n + 1/m) times chi-squared with a degree of freedom less than there are bins: that many of its
standard deviations above its mean is no chance, however few rows a split has."""
OUTLIER: Final = 10.0
"""Distances between the 1 % and the 99 % quantile that a value lies beyond them: an exponential tail has none in 10^20 rows."""
RARE_CLASS: Final = 0.01
"""Share of the rows: below it accuracy says nothing and most splits have few such rows."""
DROPPED: Final = 0.1
"""Share of rows without a target from which what is left may no longer be a fair sample."""
DUPLICATES: Final = 0.01


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

    kind: str
    severity: Severity
    columns: list[str]
    message: str
    figures: dict[str, Any] = field(default_factory=dict)
    """The numbers in the message, and which of them the order within a severity follows (`worth`)."""


def quality_of(
    features: Sequence[Column],
    summary: Summary,
    read: Counts,
    *,
    task: Task,
    split: SplitSpec,
    identifiers: Mapping[str, str],
    constants: Mapping[str, str],
) -> dict[str, Any]:
    """Return the report as plain JSON: `findings`, worst first, and the thresholds that they were measured against."""
    columns = {column.name: summary.columns[column.name] for column in features}
    found = [
        *leaks(columns, summary, task),
        *duplicate_columns(columns),
        *mixed_types(read, {*columns, task.target}),
        *infinities(columns),
        *outliers(features, columns),
        *drifts(features, summary, task, split),
        *duplicate_rows(list(columns), summary, task.target),
        *imbalance(summary, task),
        *dropped_rows(read),
        *(Finding("identifier", "low", [name], f"{why}; it is no feature") for name, why in identifiers.items()),
        *(Finding("constant", "low", [name], f"{why}; it is no feature") for name, why in constants.items()),
    ]
    found.sort(key=lambda finding: (SEVERITIES.index(finding.severity), -finding.figures.get("worth", 0.0)))
    sampled = 0 if summary.sample is None else summary.sample.num_rows
    return {
        "findings": [asdict(finding) for finding in found],
        "rows": summary.rows,
        "sampled": sampled,
        "thresholds": {
            "leak": {"auc": [LEAK_AUC, NEAR_AUC], "r2": [LEAK_R2, NEAR_R2]},
            "psi": [PSI_HIGH, PSI_LOW],
            "outlier": OUTLIER,
            "rare_class": RARE_CLASS,
            "dropped": DROPPED,
            "duplicates": DUPLICATES,
        },
    }


def leaks(columns: Mapping[str, Statistics], summary: Summary, task: Task) -> Iterator[Finding]:
    """Columns that alone predict the target too well, by the mean target per bin or category in the other half of the sample."""
    if summary.sample is None or summary.sample.num_rows < MIN_ROWS:
        return
    chosen = np.sort(np.argsort(summary.hashes, kind="stable")[:LEAK_ROWS])
    target = task.encode(summary.sample[task.target])[chosen]
    # Within the sample the lowest hashes were chosen; their low bits are as good as tossed coins.
    half = (summary.hashes[chosen] & np.uint64(1)).astype(bool)
    targets = _indicators(target, task)
    name, line, near = ("R2", LEAK_R2, NEAR_R2) if task.classes is None else ("AUC", LEAK_AUC, NEAR_AUC)
    for column, statistics in columns.items():
        codes = codes_of(statistics, chosen)
        scored = [(alone(codes, each, half, regression=task.classes is None), weight) for each, weight in targets]
        if not scored:
            return
        score = sum(value * weight for value, weight in scored) / sum(weight for _, weight in scored)
        if score >= near:
            is_leak = score >= line
            verdict = "a leak?" if is_leak else "near the line."
            message = f"alone predicts the target with {name} {score:.3f}: {verdict} Drop it if it is not known in time"
            yield Finding(
                "leak" if is_leak else "strong column",
                "high" if is_leak else "low",
                [column],
                message,
                {name.lower(): round(score, 6), "worth": score},
            )


def codes_of(statistics: Statistics, chosen: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The bin or category of each chosen row of the sample; missing values have one of their own."""
    if isinstance(statistics, StringStatistics):
        encoded = statistics.sample.take(pa.array(chosen)).dictionary_encode()
        codes: np.ndarray[Any, np.dtype[np.int64]] = (
            encoded.indices.fill_null(len(encoded.dictionary)).to_numpy().astype(np.int64)
        )
        return codes
    values = statistics.sample[chosen]
    bins = min(LEAK_BINS, max(2, len(values) // 50))
    present = np.sort(values[~np.isnan(values)])
    few = np.unique(present)
    edges = few if len(few) <= bins else np.unique(present[(len(present) - 1) * np.arange(1, bins) // bins])
    return np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values, side="left")).astype(np.int64)


def alone(
    codes: np.ndarray[Any, np.dtype[np.int64]], target: Numbers, half: np.ndarray[Any, np.dtype[np.bool_]], *, regression: bool
) -> float:
    """AUC, or R2, of the mean target per code, each half of the rows scored by the means of the other."""
    scores, bins = np.empty(len(target)), int(codes.max()) + 1
    for fitted in (half, ~half):
        rows = np.bincount(codes[fitted], minlength=bins)
        sums = np.bincount(codes[fitted], target[fitted], minlength=bins)
        mean = target[fitted].mean() if fitted.any() else 0.0
        scores[~fitted] = ((sums + SMOOTHING * mean) / (rows + SMOOTHING))[codes[~fitted]]
    if regression:
        around = np.square(target - target.mean()).sum()
        return float(1 - np.square(target - scores).sum() / around) if around else 0.0
    return float(np.mean([_auc(scores[side], target[side]) for side in (half, ~half)]))


def duplicate_columns(columns: Mapping[str, Statistics]) -> Iterator[Finding]:
    """Columns equal in every row of the sample and, over all train rows, in counts, moments and extremes or in all categories."""
    first: dict[Any, str] = {}
    for name, statistics in columns.items():
        if isinstance(statistics, NumberStatistics):
            low, high = statistics.minimum, statistics.maximum
            about: Any = (statistics.count, statistics.missing, statistics.mean, statistics.m2, low, high)
            content = _number_hashes(statistics.sample).tobytes()
        else:
            about = (statistics.count, statistics.missing, len(statistics.texts), statistics.dropped_max)
            content = _text_hashes(statistics.sample).tobytes()
        other = first.setdefault((about, content), name)
        if other != name and not statistics.is_constant and columns[other] == statistics:
            yield Finding(
                "duplicate column", "medium", [other, name], f"equals '{other}' in every row; drop one under features.drop"
            )


def mixed_types(read: Counts, columns: set[str]) -> Iterator[Finding]:
    """Columns whose type differs between the files that were read, and values that were made missing because they do not fit."""
    for name, types in sorted(read.types.items()):
        if len(types) > 1 and name in columns:
            harmless = set(types) == {"int64", "float64"}
            listed = ", ".join(f"{type} in {path}" for type, path in sorted(types.items()))
            yield Finding("mixed types", "low" if harmless else "medium", [name], f"differs between files: {listed}")
    for name, values in sorted(read.nulled.items()):
        if name in columns:
            message = f"{values:,} values contradict the type and count as missing (data.on_error: null)"
            yield Finding("contradicting values", "medium", [name], message, {"values": values, "worth": values})


def infinities(columns: Mapping[str, Statistics]) -> Iterator[Finding]:
    """Columns with infinite values, which no mean, scale or imputation takes care of."""
    for name, statistics in columns.items():
        if isinstance(statistics, NumberStatistics) and statistics.infinite:
            message = f"{statistics.infinite:,} infinite values; make them missing under data.derive or in the source"
            yield Finding("infinities", "medium", [name], message, {"values": statistics.infinite, "worth": statistics.infinite})


def outliers(features: Sequence[Column], columns: Mapping[str, Statistics]) -> Iterator[Finding]:
    """Numeric columns with an extreme that lies very far out of where 98 % of the values are."""
    for name in (column.name for column in features if column.kind == "numeric"):
        statistics = columns[name]
        assert isinstance(statistics, NumberStatistics)
        low, high = statistics.quantiles((0.01, 0.99))
        if not statistics.finite or not high > low:
            continue
        beyond = max(statistics.maximum - high, low - statistics.minimum) / (high - low)
        if beyond > OUTLIER:
            value = statistics.maximum if statistics.maximum - high > low - statistics.minimum else statistics.minimum
            message = f"reaches {value:.6g}, but 98 % of its values lie between {low:.6g} and {high:.6g}; check the units"
            yield Finding("outliers", "low", [name], message, {"value": value, "worth": beyond})


def drifts(features: Sequence[Column], summary: Summary, task: Task, split: SplitSpec) -> Iterator[Finding]:
    """Columns, and the target, that are distributed otherwise in valid or test than in train (population stability index)."""
    found: dict[str, dict[str, float]] = {}
    # What the rows were split by differs on purpose, and so does every date where that was a time.
    compared = [c.name for c in features if c.name != split.column and not (split.by == "time" and c.kind == "datetime")]
    for other, held in summary.held.items():
        counted = {name: _counted(summary.columns[name], held.columns[name]) for name in compared}
        if summary.sample is not None:
            counted[task.target] = _counted(*(_of_target(task, table) for table in (summary.sample, held.sample[0])))
        for name, counts in counted.items():
            index, chance = psi(*counts)
            if index >= max(PSI_LOW, chance):
                found.setdefault(name, {})[other] = round(index, 6)
    for name, indices in found.items():
        worst = max(indices.values())
        listed = ", ".join(f"{other} (PSI {index:.2f})" for other, index in sorted(indices.items(), key=lambda pair: -pair[1]))
        severity: Severity = "medium" if worst >= PSI_HIGH else "low"
        yield Finding("drift", severity, [name], f"differs from train in {listed}", {"psi": indices, "worth": worst})


def psi(train: Numbers, other: Numbers) -> tuple[float, float]:
    """The population stability index of two lists of counts, and up to where it may be chance."""
    if not train.sum() or not other.sum():
        return 0.0, 0.0
    used = (train + other) > 0
    one, two = ((counts[used] + 0.5) / (counts[used].sum() + 0.5 * used.sum()) for counts in (train, other))
    freedom = used.sum() - 1
    chance = (freedom + PSI_SIGMAS * math.sqrt(2 * freedom)) * (1 / train.sum() + 1 / other.sum())
    return float(((two - one) * np.log(two / one)).sum()), float(chance)


def duplicate_rows(names: list[str], summary: Summary, target: str) -> Iterator[Finding]:
    """Rows of the sample that equal another one in all features and the target, within train and between the splits."""
    if summary.sample is None:
        return
    columns = [*names, *([target] if target not in names else [])]
    train = row_hashes(summary.sample.select(columns))
    ordered = np.sort(train)
    again = int((ordered[1:] == ordered[:-1]).sum())
    whole = "" if len(train) == summary.rows["train"] else f" of {len(train):,} sampled"
    if again:
        share = again / len(train)
        message = f"{again:,}{whole} train rows equal an earlier one in every column ({share:.1%})"
        severity: Severity = "medium" if share >= DUPLICATES else "low"
        yield Finding("duplicate rows", severity, [], message, {"rows": again, "share": share, "worth": share})
    for other, held in summary.held.items():
        hashes = row_hashes(held.sample[0].select(columns))
        known = int(np.isin(hashes, train).sum())
        if len(hashes) and known / len(hashes) >= DUPLICATES:
            share = known / len(hashes)
            message = f"{known:,} of {len(hashes):,} sampled {other} rows also stand in train ({share:.1%}): its metrics flatter"
            yield Finding(
                "duplicate rows", "medium", [], message, {"split": other, "rows": known, "share": share, "worth": share}
            )


def imbalance(summary: Summary, task: Task) -> Iterator[Finding]:
    """A class that is rare in the train split."""
    counts = {value: n for value, n in (summary.targets or {}).items() if value is not None and value == value}
    if task.classes is None or not counts:
        return
    value, rows = min(counts.items(), key=lambda pair: (pair[1], str(pair[0])))
    share = rows / sum(counts.values())
    if share < RARE_CLASS:
        message = f"class {value!r} has {rows:,} train rows ({share:.2%}); look at average_precision rather than accuracy"
        yield Finding("imbalance", "medium", [task.target], message, {"rows": rows, "share": share, "worth": 1 - share})


def dropped_rows(read: Counts) -> Iterator[Finding]:
    """Rows that take no part, by reason."""
    for reason, rows in sorted(read.dropped.items()):
        share = rows / max(1, read.rows)
        severity: Severity = "medium" if share >= DROPPED and reason != "where" else "low"
        message = f"{rows:,} of {read.rows:,} rows were left out: {reason} ({share:.1%})"
        yield Finding("dropped rows", severity, [], message, {"rows": rows, "share": share, "reason": reason, "worth": share})


def row_hashes(table: pa.Table) -> Hashes:
    """A hash of each row's values; null and NaN are a value like any other."""
    total = np.zeros(table.num_rows, np.uint64)
    for column in table.columns:
        is_text = pa.types.is_large_string(column.type)
        hashes = _text_hashes(texts(column)) if is_text else _number_hashes(numbers(column))
        total = mix(total * np.uint64(0x9E3779B97F4A7C15) ^ hashes)
    return total


def _number_hashes(values: Numbers) -> Hashes:
    canonical = np.where(np.isnan(values), np.nan, values + 0.0)  # one NaN, and no -0.0
    return mix(canonical.view(np.uint64))


def _text_hashes(values: pa.Array) -> Hashes:
    encoded = values.dictionary_encode()
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False).astype(object)
    hashes = np.append(pd.util.hash_array(distinct, categorize=False), np.uint64(0)).astype(np.uint64)
    return mix(hashes[encoded.indices.fill_null(len(distinct)).to_numpy()])


def _indicators(target: Numbers, task: Task) -> list[tuple[Numbers, float]]:
    """The targets that a column is tried on, each with its weight: the values, or each class against the rest."""
    if task.classes is None:
        return [(target, 1.0)]
    codes = [1] if task.type == "binary" else range(len(task.classes or []))
    found = [(target == code).astype(np.float64) for code in codes]
    known = [each for each in found if min(each.sum(), len(each) - each.sum()) >= MIN_CLASS]
    return [(each, float(each.sum())) for each in sorted(known, key=lambda each: -each.sum())[:10]]


def _auc(scores: Numbers, target: Numbers) -> float:
    _, places = np.unique(scores, return_inverse=True)
    positives, rows = np.bincount(places, target), np.bincount(places)
    negatives = rows - positives
    pairs = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else 0.5


def _counted(train: Statistics, other: Statistics) -> tuple[Numbers, Numbers]:
    """Counts of two splits in the bins or the most frequent categories of the first; missing values are one more."""
    if isinstance(train, NumberStatistics):
        assert isinstance(other, NumberStatistics)
        edges = edges_of(train)
        one, two = (
            np.append(counts_between(edges, found), np.isnan(found.sample).sum()).astype(np.float64) for found in (train, other)
        )
        return one, two
    assert isinstance(other, StringStatistics)
    top = [text for text, _ in train.ranked()[:TOP]]

    def counts(found: StringStatistics) -> Numbers:
        listed = [found.counts.get(text, 0) for text in top]
        return np.array([*listed, found.count - found.missing - sum(listed), found.missing], np.float64)

    return counts(train), counts(other)


def _of_target(task: Task, table: pa.Table) -> Statistics:
    values = table[task.target]
    if task.classes is not None:
        return StringStatistics.of(texts(values))
    found = numbers(pc.cast(values, pa.float64(), safe=False))
    return NumberStatistics(sample=found)
