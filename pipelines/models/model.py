"""What a family of models is: the contract that trainers, artifacts and the Spec rely on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from pipelines.spec import Chain, Frozen, Kind
from pipelines.tasks import Task

if TYPE_CHECKING:  # a serving replica has no training code
    from pipelines.data.prepared import Shards
    from pipelines.training.worker import Worker

Matrix = np.ndarray[Any, np.dtype[np.float64]]


class Model(Protocol):
    """One family. A new one is one file with this class and one line in the registry."""

    Params: ClassVar[type[Frozen]]
    """The section `model.params` of the Spec: names, bounds, defaults."""
    chains: ClassVar[dict[Kind, Chain]]
    """The transforms of each kind where the Spec names none; a kind that is absent is left out of the features."""
    trainer: ClassVar[str]
    """Which trainer of Ray Train starts its workers: a key of `training.trainer.TRAINERS`."""

    @classmethod
    def check(cls, params: Any, task: Task, shards: Shards, workers: int) -> Task:
        """Raise `SpecError` or `DataError` where the prepared data does not allow these parameters; before any worker starts.

        Returns the task, of a regression with the loss that the model minimises.
        """

    @classmethod
    def uses_gpu(cls, params: Any) -> bool:
        """Whether a GPU makes it faster."""

    @classmethod
    def unavailable(cls, params: Any) -> str | None:
        """Why this machine cannot train with these parameters, in one line; asked on one of the cluster if `uses_gpu`."""

    @classmethod
    def fit(cls, params: Any, task: Task, worker: Worker) -> None:
        """Train; runs on every worker. The result is what rank 0 reports last with `worker.report(..., model=...)`."""

    @classmethod
    def memory(cls, params: Any, rows: int, features: int, outputs: int) -> int:
        """Bytes that a worker with this many train rows needs at its peak, besides the process itself."""

    def predict(self, matrix: Matrix) -> Matrix:
        """Logits (rows,) for binary and (rows, classes) for multiclass, values on the target's scale (rows,) for regression."""

    def save(self, folder: Path) -> None:
        """Write it as text, JSON, safetensors or ONNX; never a pickle."""

    @classmethod
    def load(cls, folder: Path) -> Self: ...


@runtime_checkable
class Starting(Protocol):
    """What a family may have besides: rows may start from raw scores of their own (`task.init_score`, `Batch.init_score`)."""

    def predict_from(self, matrix: Matrix, init_score: Matrix) -> Matrix:
        """What `predict` says, of rows that start from these raw scores (rows,); a row has the same bits alone and among others.

        They are added before the link where there is one.
        """


@runtime_checkable
class Explaining(Protocol):
    """What a family may have besides, all of it or nothing: what the model and its answers rest on, by feature."""

    def explain_s(self) -> float:
        """Seconds that a core takes for the contributions to one row, about; derived from the model, not measured."""

    def importance(self) -> dict[str, Matrix]:
        """Measures of what the model makes of each feature, (features,) each, the main one first."""

    def contributions(self, matrix: Matrix) -> Matrix:
        """What each feature adds to each raw score, and what they are added to: (rows, outputs, features + 1).

        The last entry is the same in all rows. Along the last axis they sum to the raw score: what `predict` says, before the
        link where it is behind one. A row has the same bits alone and among others; there may be no row.
        """
