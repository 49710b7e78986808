"""How good are raw scores? The metrics of a task, from small states that can be merged.

Every worker and every read unit adds its rows to a `Metrics` of its own; only states travel, and merging them in source
order gives the same bits on any cluster. logloss, brier, accuracy, macro_f1, rmse, mae, r2 and the mean of a regression's own
loss are exact, and so is ndcg where no query is divided. auc and average_precision come from a `ScoreHistogram`: exact for few
distinct scores or few positives, else auc is within 1e-4.

Rows may have weights, with the meaning that `sample_weight` has in scikit-learn: a row of weight 2 counts as two rows, one of
weight 0 not at all.

A metric that the rows do not define (auc where a class is missing, r2 of a constant, anything of no rows or of NaN scores)
is None, which JSON can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from pipelines.tasks import Array, Loss, Task, TaskType, log_softmax

State = dict[str, Array]

BINS: Final = 20_480
"""About how many bins a histogram travels with at most, in 10 to 16 bytes each; 2 / BINS bounds the error of auc."""
TOP: Final = 1024
"""So many of the highest scores always have a bin each: few rows decide average_precision there."""
PENDING_BYTES: Final = 2**24
PENDING_PARTS: Final = 64
"""What is collected before it is put together: grouping seldom is fast and keeps the error small."""
COUNTS: Final = ("negatives", "positives")
LEAST: Final = float(np.finfo(np.float64).eps)
"""A probability below this counts as this in logloss, as in scikit-learn, so that one sure mistake is not infinite."""


def sizes_of(groups: Array) -> Array:
    """How many rows of each query stand together."""
    return np.diff(starts_of(groups), append=len(groups))


def starts_of(groups: Array) -> Array:
    """The rows whose query is another than that of the row before them."""
    new = np.ones(len(groups), np.bool_)
    new[1:] = groups[1:] != groups[:-1]
    return np.flatnonzero(new)


class Metrics:
    """The metrics of the rows added so far."""

    def __init__(self, task: Task) -> None:
        self._task = task
        empty = np.empty((0, task.outputs) if task.type == "multiclass" else 0)
        self._parts = [NO_QUERY if task.type == "ranking" else SUMS[task.type](task, np.empty(0), empty, None)]
        self._bytes = 0

    def add(self, target: Array, raw: Array, weight: Array | None = None, sizes: Array | None = None) -> None:
        """Add rows: the encoded target, without missing values, the model's raw scores, and what each row weighs (default 1).

        Rows to rank are whole queries, one after the other, of as many rows as `sizes` says.
        """
        target, raw = np.asarray(target, np.float64), np.asarray(raw, np.float64)
        if sizes is not None:
            self._append(_ranking(target, raw, weight, sizes))
            return
        if weight is not None:
            weight = np.asarray(weight, np.float64)
            if not weight.all():
                counts = weight > 0
                target, raw, weight = target[counts], raw[counts], weight[counts]
        if len(target):
            self._append(SUMS[self._task.type](self._task, target, raw, weight))

    def state(self) -> State:
        """What travels: at most about 300 KB, with weights 500 KB, less for fewer rows. `merge` puts states together."""
        self._put_together()
        return self._parts[0]

    @classmethod
    def merge(cls, task: Task, states: Iterable[State]) -> Metrics:
        """Return the metrics of all rows together; floats are added up in the order given."""
        metrics = cls(task)
        for state in states:
            metrics._append(state)
        return metrics

    def result(self) -> dict[str, float | None]:
        """Return each metric of the task, the main one first; None where the rows do not define it."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = RESULTS[self._task.type](self._task, _merge(self._parts))
        return {name: float(found[name]) if np.isfinite(found[name]) else None for name in self._task.metric_names}

    def _append(self, state: State) -> None:
        self._parts.append(state)
        self._bytes += sum(array.nbytes for array in state.values())
        if self._bytes > PENDING_BYTES or len(self._parts) > PENDING_PARTS:
            self._put_together()

    def _put_together(self) -> None:
        state = _merge(self._parts)
        if "scores" in state:
            state |= ScoreHistogram.from_state(state).grouped().to_state()
        self._parts, self._bytes = [state], 0


def _merge(states: list[State]) -> State:
    merged: State = {name: np.sum([state[name] for state in states], axis=0) for name in ("sums", "classes") if name in states[0]}
    if "moments" in states[0]:
        merged["moments"] = _merge_moments([state["moments"] for state in states])
    if "scores" in states[0]:
        merged |= ScoreHistogram.merge(states).to_state()
    return merged


def _total(values: Array, weight: Array | None) -> Any:
    """Their sum, each as often as it counts."""
    return values.sum() if weight is None else (values * weight).sum()


def _rows(target: Array, weight: Array | None) -> Any:
    """How many rows these count for."""
    return len(target) if weight is None else weight.sum()


def _binary(task: Task, target: Array, raw: Array, weight: Array | None) -> State:
    probability = task.probabilities(raw)
    positive = target == 1
    # 1 - p of a sure mistake would have lost its digits.
    truth = task.probabilities(np.where(positive, raw, -raw))
    loss = _total(-np.log(np.maximum(truth, LEAST)), weight)
    correct = _total((probability >= task.threshold) == positive, weight)
    sums = np.array([_rows(target, weight), loss, correct, _total(np.square(probability - target), weight)])
    rows = slice(0 if np.isnan(loss) else None)  # NaN has no place in an order
    histogram = ScoreHistogram.of(positive[rows], raw[rows], None if weight is None else weight[rows])
    return {"sums": sums} | histogram.to_state()


def _binary_result(_: Task, state: State) -> dict[str, float]:
    rows, loss, correct, squares = state["sums"]
    known = loss * 0 + 1  # NaN if any score was
    histogram = ScoreHistogram.from_state(state)
    return {
        "auc": histogram.auc * known,
        "logloss": loss / rows,
        "accuracy": correct / rows * known,
        "average_precision": histogram.average_precision * known,
        "brier": squares / rows,
    }


def _multiclass(task: Task, target: Array, raw: Array, weight: Array | None) -> State:
    codes, classes = task.codes(raw), target.astype(np.int64)
    truth = log_softmax(raw)[np.arange(len(classes)), classes]
    loss = _total(-np.maximum(truth, np.log(LEAST)), weight)
    counts = [
        np.bincount(classes, weight, task.outputs),
        np.bincount(codes, weight, task.outputs),
        np.bincount(classes[codes == classes], None if weight is None else weight[codes == classes], task.outputs),
    ]
    return {"sums": np.array([_rows(target, weight), loss]), "classes": np.array(counts)}


def _multiclass_result(_: Task, state: State) -> dict[str, float]:
    rows, loss = state["sums"]
    there, named, hits = state["classes"]
    known = loss * 0 + 1  # NaN if any score was
    seen = there + named > 0  # a class neither in these rows nor in the answers says nothing about them
    f1 = 2 * hits[seen] / (there + named)[seen]
    return {
        "accuracy": hits.sum() / rows * known,
        "logloss": loss / rows,
        "macro_f1": f1.sum() / np.float64(len(f1)) * known,
    }


def _regression(task: Task, target: Array, raw: Array, weight: Array | None) -> State:
    error = raw - target
    moments = np.zeros(4)
    if len(target):
        origin = target[0]  # the mean is kept as the distance from here: its digits count where it is large beside the spread
        rows = _rows(target, weight)
        mean = (target - origin).mean() if weight is None else _total(target - origin, weight) / rows
        moments = np.array([rows, origin, mean, _total(np.square(target - origin - mean), weight)])
    loss = _total(loss_of(task.loss, target, raw), weight) if task.loss else 0.0
    return {"sums": np.array([_total(np.abs(error), weight), _total(np.square(error), weight), loss]), "moments": moments}


def loss_of(loss: Loss, target: Array, value: Array) -> Array:
    """The loss of each row, as LightGBM's metrics have it; deviances as scikit-learn (twice the log-likelihood ratio).

    Not finite where a deviance is not defined: for negative targets, and for values of 0 and below.
    """
    with np.errstate(all="ignore"):
        return np.asarray(LOSSES[loss.name](target, value, loss.parameter))


def _huber(target: Array, value: Array, delta: Any) -> Array:
    error = np.abs(value - target)
    result: Array = np.where(error <= delta, error * error / 2, delta * (error - delta / 2))
    return result


def _fair(target: Array, value: Array, scale: Any) -> Array:
    error = np.abs(value - target)
    result: Array = scale * error - scale * scale * np.log1p(error / scale)
    return result


def _poisson(target: Array, value: Array, _: Any = None) -> Array:
    known = np.where(target == 0, 0.0, target * np.log(target / value))  # the limit at 0
    result: Array = 2 * (known - target + value)
    return result


def _tweedie(target: Array, value: Array, power: Any) -> Array:
    if power == 1:
        return _poisson(target, value)
    a, b = 1 - power, 2 - power
    result: Array = 2 * (target**b / (a * b) - target * value**a / a + value**b / b)
    return result


LOSSES: Final[dict[str, Callable[[Array, Array, Any], Array]]] = {
    "mae": lambda target, value, _: np.abs(value - target),
    "huber": _huber,
    "fair": _fair,
    "pinball": lambda target, value, quantile: np.maximum(quantile * (target - value), (quantile - 1) * (target - value)),
    "mape": lambda target, value, _: np.abs(value - target) / np.maximum(1.0, np.abs(target)),
    "poisson_deviance": _poisson,
    "gamma_deviance": lambda target, value, _: 2 * (np.log(value / target) + target / value - 1),
    "tweedie_deviance": _tweedie,
}


def _merge_moments(parts: list[Array]) -> Array:
    """Rows, origin, mean beside it and squared deviations of all parts together (Chan, Golub and LeVeque)."""
    rows, origin, mean, squares = 0.0, 0.0, 0.0, 0.0
    for more, other_origin, other_mean, other_squares in parts:
        if rows == 0:
            rows, origin, mean, squares = more, other_origin, other_mean, other_squares
        elif more:
            apart = (other_origin - origin) + (other_mean - mean)
            squares += other_squares + apart * apart * rows * more / (rows + more)
            mean += apart * more / (rows + more)
            rows += more
    return np.array([rows, origin, mean, squares])


def _regression_result(task: Task, state: State) -> dict[str, float]:
    absolutes, squares, loss = state["sums"]
    rows, _, _, spread = state["moments"]
    own = {task.loss.name: loss / rows} if task.loss else {}
    return own | {"rmse": np.sqrt(squares / rows), "mae": absolutes / rows, "r2": 1 - squares / spread if spread else np.nan}


def _ranking(target: Array, raw: Array, weight: Array | None, sizes: Array) -> State:
    """The sums over queries of what they weigh, and of that times their NDCG at each of `TOPS`.

    NDCG (Järvelin and Kekäläinen, 2002) with the gain 2**label - 1 and the discount log2(place + 1), as in LightGBM; as there a
    query without a relevant row counts as 1, and a query weighs the mean of its rows. Rows with equal scores have the mean gain
    of their places, as in scikit-learn: in which order they stood says nothing of the model.
    """
    if not len(sizes):
        return NO_QUERY
    queries = np.arange(len(sizes))
    query, start = np.repeat(queries, sizes), np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.arange(len(query)) - start
    weights = np.ones(len(sizes)) if weight is None else np.bincount(query, weight) / sizes
    gain = np.exp2(target) - 1
    best, found = gain[np.lexsort((-target, query))], np.lexsort((-raw, query))
    score = raw[found]
    tie = np.flatnonzero(np.append(True, (score[1:] != score[:-1]) | (place[1:] == 0)))
    mean_gain = np.add.reduceat(gain[found], tie) / np.diff(tie, append=len(score))
    sums = [weights.sum()]
    for top in TOPS:
        discount = np.where(place < top, 1 / np.log2(place + 2), 0.0)
        ideal = np.bincount(query, best * discount)
        reached = np.bincount(query[tie], mean_gain * np.add.reduceat(discount, tie))
        ndcg = np.divide(reached, ideal, out=np.ones(len(sizes)), where=ideal > 0)
        sums.append((weights * ndcg).sum())
    found_sums = np.array(sums)
    if np.isnan(raw).any():
        found_sums[1:] = np.nan
    return {"sums": found_sums}


def _ranking_result(_: Task, state: State) -> dict[str, float]:
    return {f"ndcg@{top}": total / state["sums"][0] for top, total in zip(TOPS, state["sums"][1:], strict=True)}


TOPS: Final = (10, 5, 3, 1)
NO_QUERY: Final = {"sums": np.zeros(1 + len(TOPS))}
SUMS: Final[dict[TaskType, Callable[[Task, Array, Array, Array | None], State]]] = {
    "binary": _binary,
    "multiclass": _multiclass,
    "regression": _regression,
}
RESULTS: Final[dict[TaskType, Callable[[Task, State], dict[str, float]]]] = {
    "binary": _binary_result,
    "multiclass": _multiclass_result,
    "regression": _regression_result,
    "ranking": _ranking_result,
}


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """How many negatives and positives have which raw score; of rows with weights, what they weigh.

    Each distinct score has a bin of its own until there are more than `BINS`; then neighbours are grouped. A group is cut
    where the rows before it reach the next multiple of 4 / BINS, in shares of all negatives plus shares of all positives, and
    before any bin that has such a share itself. The shares add up to 2, so either rule cuts at most BINS / 2 times. Besides, the
    `TOP` highest scores stay apart.

    **The error of auc** of grouped scores is below 2 / BINS < 1e-4, whatever their distribution. auc is the share of the pairs
    (positive, negative) in the right order, a tie being half a pair. Grouping makes ties of the pairs within a group and changes
    no other, so each of them is wrong by half at most. With a and b the shares of all positives and of all negatives in a group
    of several bins, the error is at most the sum over groups of a * b / 2 <= (a + b)**2 / 8. By the first rule the bins of a
    group begin within 4 / BINS of each other, by the second the last one is narrower than that, so a + b < 8 / BINS; as all
    a + b add up to 2, the sum is below (8 / BINS) * 2 / 8. Where a class has fewer than BINS / 4 rows, each score of its rows
    has a bin by the second rule, and auc and average_precision are exact.

    A group stands at its middle score among the bins of other states, so putting grouped states together can turn pairs around
    whose groups overlap: a share of 16 / BINS of all pairs at most. The error found is far smaller in every case, seldom above
    1e-5, for the order within so narrow a group is close to chance, and the halves cancel.
    """

    scores: Array
    """Ascending."""
    negatives: Array
    positives: Array

    @classmethod
    def of(cls, positive: Array, scores: Array, weight: Array | None = None) -> ScoreHistogram:
        """Count the rows; `positive` says which. Weights are above 0."""
        if weight is not None:
            order = np.argsort(scores, kind="stable")
            weight, positive = weight[order], positive[order]
            return cls(scores[order], np.where(positive, 0.0, weight), np.where(positive, weight, 0.0))._distinct()
        # Polars sorts a million floats in a third of numpy's time.
        runs = [pl.Series(scores[rows]).sort().to_numpy() for rows in (~positive, positive)]
        counts = np.repeat(np.array([0, 1]), [len(run) for run in runs])
        return cls(np.concatenate(runs), 1 - counts, counts)._distinct()

    @classmethod
    def merge(cls, states: list[State]) -> ScoreHistogram:
        """Return the histogram of all rows together, not grouped."""
        parts = [cls.from_state(state) for state in states]
        if len(parts) == 1:
            return parts[0]
        scores, negatives, positives = zip(*((part.scores, part.negatives, part.positives) for part in parts), strict=True)
        return cls(np.concatenate(scores), np.concatenate(negatives), np.concatenate(positives))._distinct()

    @classmethod
    def from_state(cls, state: State) -> ScoreHistogram:
        counts = [state[name] for name in COUNTS]
        return cls(state["scores"], *(each if each.dtype == np.float64 else each.astype(np.int64) for each in counts))

    def to_state(self) -> State:
        """The arrays, counts in the narrowest type that holds them."""
        counted = {name: getattr(self, name) for name in COUNTS}
        narrow = {
            name: counts if counts.dtype == np.float64 else counts.astype(np.min_scalar_type(counts.max(initial=0)))
            for name, counts in counted.items()
        }
        return {"scores": self.scores} | narrow

    @property
    def auc(self) -> float:
        """The area under the ROC curve; NaN where a class is missing."""
        below = np.cumsum(self.negatives) - self.negatives
        pairs = np.float64(self.positives.sum()) * np.float64(self.negatives.sum())
        return float((self.positives * (below + self.negatives / 2)).sum() / pairs)

    @property
    def average_precision(self) -> float:
        """The mean over the positives of the precision at their score; NaN where there is none."""
        hits, named = np.cumsum(self.positives[::-1]), np.cumsum((self.positives + self.negatives)[::-1])
        return float((self.positives[::-1] * (hits / named)).sum() / np.float64(self.positives.sum()))

    def grouped(self) -> ScoreHistogram:
        """Put neighbours together until at most `BINS` are left."""
        if len(self.scores) <= BINS:
            return self
        share = sum((counts / (counts.sum() or 1) for counts in (self.negatives, self.positives)), start=np.zeros(1))
        step = np.floor((np.cumsum(share) - share) * (BINS / 4))
        cut = np.append(True, (step[1:] != step[:-1]) | (share[1:] >= 4 / BINS))
        cut[-TOP:] = True
        first = np.flatnonzero(cut)
        middle = (first + np.append(first[1:], len(share)) - 1) // 2
        return self._reduced(first, self.scores[middle])

    def _distinct(self) -> ScoreHistogram:
        """Put the scores in order and equal ones together."""
        order = np.argsort(self.scores, kind="stable")  # fast on the ascending runs that it is given
        ordered = ScoreHistogram(self.scores[order], self.negatives[order], self.positives[order])
        new = np.append(True, ordered.scores[1:] != ordered.scores[:-1])[: len(order)]
        if new.all():
            return ordered
        first = np.flatnonzero(new)
        return ordered._reduced(first, ordered.scores[first])

    def _reduced(self, first: Array, scores: Array) -> ScoreHistogram:
        return ScoreHistogram(scores, np.add.reduceat(self.negatives, first), np.add.reduceat(self.positives, first))
