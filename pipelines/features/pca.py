"""Principal components of a group of numbers, from their exact covariance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final

import numpy as np
from pydantic import Field

from pipelines.errors import DataError, SpecError
from pipelines.features.comoments import CoMoments
from pipelines.features.stats import Numbers, Statistics
from pipelines.features.transform import Feature, Form, Gathered, Rows, State, Transform, Values
from pipelines.spec import Frozen

NOTHING: Final = 1e-12
"""A component with less than this share of the variance is rounding: whitening leaves it as it is."""

TIE: Final = 1e-9


class PCAParams(Frozen):
    """How many components become features."""

    components: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0.0, lt=1.0)]
    """Their number; or, below 1, as many as have this share of the variance together."""
    whiten: bool = False
    """Whether each component is divided by its standard deviation."""


@dataclass(frozen=True)
class PCA(Transform):
    """Features GROUP__0, GROUP__1 and so on, by descending variance; the largest loading of each is positive."""

    Params: ClassVar[type[Frozen]] = PCAParams
    takes: ClassVar[frozenset[Form]] = frozenset({"numeric", "boolean"})
    joins: ClassVar[bool] = True
    gathers: ClassVar[type[State] | None] = CoMoments

    centers: list[float]
    loadings: list[list[float]]
    """A list per component, with an entry per column."""
    scales: list[float]

    @classmethod
    def gives(cls, params: PCAParams, *forms: Form) -> Form:
        if params.components > len(forms):
            raise SpecError(f"makes at most as many components as there are columns, {len(forms)}, found {params.components}")
        return "numeric"

    @classmethod
    def gather(cls, params: PCAParams, *values: Numbers, rows: Rows) -> CoMoments:
        return CoMoments.of(values)

    @classmethod
    def fit(cls, params: PCAParams, *statistics: Statistics, gathered: Gathered) -> PCA:
        state: CoMoments = gathered.state
        for name, missing, infinite in zip(gathered.names, state.missing.tolist(), state.infinite.tolist(), strict=True):
            if missing:
                raise DataError(f"'{name}' has {missing} missing values in the train rows; put 'impute' before it")
            if infinite:
                raise DataError(
                    f"'{name}' has {infinite} infinite values in the train rows; drop such rows with data.where, "
                    "or take the column out of the group"
                )
        centers = np.diag(state.means)
        covariance = state.products / max(1, state.rows - 1)
        if not (np.isfinite(covariance).all() and np.isfinite(centers).all()):
            raise DataError("the values are too large to take their covariance; put 'scale' before it")
        variances, vectors = np.linalg.eigh(covariance)
        variances, vectors = np.maximum(variances[::-1], 0.0), vectors.T[::-1]
        # The first of the largest: of two scaled columns both loadings are as large, and which is larger would be rounding.
        sizes = np.abs(vectors)
        largest = (sizes >= sizes.max(axis=1, keepdims=True) * (1 - TIE)).argmax(axis=1)
        signs = np.sign(vectors[np.arange(len(vectors)), largest])
        kept = _number(params.components, variances)
        total = float(variances.sum())
        scales = [math.sqrt(v) if params.whiten and v > total * NOTHING else 1.0 for v in variances[:kept].tolist()]
        return cls(centers.tolist(), (vectors * signs[:, None])[:kept].tolist(), scales)

    def outputs(self, *features: Feature, group: str) -> list[Feature]:
        return [Feature(name=f"{group}__{number}", kind="numeric") for number in range(len(self.loadings))]

    def block(self, *values: Numbers) -> list[Values]:
        # Summed in the columns' order, as `row` does: a BLAS product of a matrix and of its rows differ in the last bit.
        centered = [column - center for column, center in zip(values, self.centers, strict=True)]
        made: list[Values] = []
        for loadings, scale in zip(self.loadings, self.scales, strict=True):
            total = centered[0] * loadings[0]
            for column, loading in zip(centered[1:], loadings[1:], strict=True):
                total = total + column * loading
            made.append(total / scale)
        return made

    def row(self, *values: float) -> list[float]:
        centered = [value - center for value, center in zip(values, self.centers, strict=True)]
        made = []
        for loadings, scale in zip(self.loadings, self.scales, strict=True):
            total = centered[0] * loadings[0]
            for value, loading in zip(centered[1:], loadings[1:], strict=True):
                total = total + value * loading
            made.append(total / scale)
        return made


def _number(components: float, variances: Numbers) -> int:
    if isinstance(components, int):
        return components
    total = float(variances.sum())
    if total == 0.0:
        return 1
    return min(len(variances), int(np.searchsorted(np.cumsum(variances) / total, components)) + 1)
