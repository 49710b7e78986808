"""Categories as the mean of the target where they stand, such that no train row sees its own target.

A train row gets the mean over the other folds, every other row that over all train rows. Means are drawn towards the mean of all
rows (the prior) as if `smoothing` more rows had that. A missing value is a category; an unknown one gets the prior.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipelines.errors import DataError
from pipelines.features.cross import distinct, text_of
from pipelines.features.stats import Numbers, Statistics
from pipelines.features.target_sums import FIRST_LABEL, LABELS, ROWS, SUM, TargetSums
from pipelines.features.transform import TEXT, Feature, Form, Gathered, Rows, State, Transform, Value, Values
from pipelines.schema import category_text
from pipelines.spec import Frozen
from pipelines.tasks import Task

Means = npt.NDArray[np.float64]


class TargetMeanParams(Frozen):
    """How much a rare category counts, and how train rows are kept apart from their own targets."""

    smoothing: Annotated[float, Field(ge=0.0)] = 20.0
    """A category in this many rows gets a mean halfway between its own and that of all rows."""
    folds: Annotated[int, Field(ge=2, le=20)] = 5
    """A train row sees the targets of the other folds."""


@dataclass(frozen=True)
class TargetMean(Transform):
    """Binary: the share of the positive class; regression: the mean; multiclass: a feature NAME__CLASS, its share, for each."""

    Params: ClassVar[type[Frozen]] = TargetMeanParams
    takes: ClassVar[frozenset[Form]] = frozenset({*TEXT, "code"})
    cross_fitted: ClassVar[bool] = True
    gathers: ClassVar[type[State] | None] = TargetSums

    texts: list[str | None]
    means: list[list[float]]
    """Of each text, one per output."""
    prior: list[float]
    classes: list[str]
    """Multiclass: an output each; else none."""
    out_of_fold: Means | None = field(default=None, repr=False, compare=False)
    """(texts, and the prior last; folds; outputs) without the rows of the fold. Only there until the train rows are written."""

    @classmethod
    def gives(cls, params: TargetMeanParams, form: Form) -> Form:
        return "numeric"

    @classmethod
    def gather(cls, params: TargetMeanParams, *values: Values, rows: Rows) -> TargetSums:
        return TargetSums.of(*distinct(values[0]), np.floor(rows.places * params.folds), params.folds, rows.target)

    @classmethod
    @np.errstate(over="ignore", invalid="ignore")
    def fit(cls, params: TargetMeanParams, *statistics: Statistics, gathered: Gathered) -> TargetMean:
        state: TargetSums = gathered.state
        task = gathered.task
        assert task is not None
        columns = [SUM] if task.classes is None else _columns(state, task)
        # The prior stands behind the categories as one more.
        cells = np.concatenate([state.cells, state.totals[None]])
        rows, sums = cells[:, :, [ROWS]], cells[:, :, columns]
        num_folds = rows.shape[1]
        # The other folds are added up, not taken from the whole: what a float has taken in cannot be taken out again.
        others = [[other for other in range(num_folds) if other != fold] for fold in range(num_folds)]
        out_of_fold = np.stack([_means(rows[:, o].sum(1), sums[:, o].sum(1), params.smoothing) for o in others], axis=1)
        means = _means(rows.sum(1), sums.sum(1), params.smoothing)
        if not (np.isfinite(means).all() and np.isfinite(out_of_fold).all()):
            raise DataError(f"the target '{task.target}' is too large to take its mean; scale it under data.derive")
        classes = [category_text(value) for value in task.classes or []] if task.type == "multiclass" else []
        return cls(state.texts.to_pylist(), means[:-1].tolist(), means[-1].tolist(), classes, out_of_fold)

    def outputs(self, feature: Feature) -> list[Feature]:
        names = [f"{feature.name}__{name}" for name in self.classes] or [feature.name]
        return [Feature(name=name, kind="numeric") for name in names]

    def block(self, values: Values, places: Numbers | None = None) -> list[Values]:
        texts, chosen = distinct(values)
        found = np.array([self._places.get(text, len(self.texts)) for text in texts], np.int64)[chosen]
        columns = list(self._table[found].T)
        if places is None:
            return list(columns)
        assert self.out_of_fold is not None, "a stored Preprocessor is for rows that were not trained on"
        in_train = ~np.isnan(places)
        folds = np.where(in_train, np.floor(places * self.out_of_fold.shape[1]), 0.0).astype(np.int64)
        return [np.where(in_train, own, column) for own, column in zip(self.out_of_fold[found, folds].T, columns, strict=True)]

    def row(self, value: Value) -> list[float]:
        place = self._places.get(text_of(value))
        return list(self.prior if place is None else self.means[place])

    def state(self) -> dict[str, Any]:
        return {"texts": self.texts, "means": self.means, "prior": self.prior, "classes": self.classes}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        return cls(**state)

    @cached_property
    def _places(self) -> dict[str | None, int]:
        return {text: place for place, text in enumerate(self.texts)}

    @cached_property
    def _table(self) -> Means:
        return np.array([*self.means, self.prior], np.float64)


def _columns(state: TargetSums, task: Task) -> list[int]:
    """Where the counts of the classes stand that become features."""
    if state.labels is None:
        raise DataError(
            f"it makes a feature for each class, and the target '{task.target}' has more than {LABELS}; use 'index' or 'hash'"
        )
    classes = task.classes or []
    return [FIRST_LABEL + state.labels.index(value) for value in (classes[1:] if task.type == "binary" else classes)]


def _means(rows: Means, sums: Means, smoothing: float) -> Means:
    """The smoothed means; the last entry is about all rows, and the prior of the others."""
    prior = _ratio(sums[-1], rows[-1])
    means = np.where(rows + smoothing > 0, _ratio(sums + smoothing * prior, rows + smoothing), prior)
    means[-1] = prior
    return np.asarray(means, np.float64)


def _ratio(above: Means, below: Means) -> Means:
    below = np.broadcast_to(below, above.shape)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
