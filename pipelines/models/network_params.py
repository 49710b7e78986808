"""The parameters of the Torch families: what the published recipes choose, under their names, with their defaults.

Sources: the README and the paper of TabM (Gorishniy et al., ICLR 2025), "On Embeddings for Numerical Features in Tabular Deep
Learning" (NeurIPS 2022) and "Revisiting Deep Learning Models for Tabular Data" (NeurIPS 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, model_validator

from pipelines.errors import SpecError, did_you_mean
from pipelines.features.transform import Feature
from pipelines.spec import Frozen
from pipelines.tasks import Task

WHERE: Final = "model.params"
MAX_CODE: Final = 1 << 24
"""Codes reach the network as float32, which has every integer up to here."""
SMALLEST_BATCH: Final = 64
MOST_CHANGE: Final = 1e3
"""The largest learning rate that is let in: beyond, every loss diverges."""


class NetworkParams(Frozen):
    """How any of the networks is trained."""

    architecture: ClassVar[frozenset[str]] = frozenset()
    """Parameters that shape the network: a run that continues another has that one's."""
    largest_batch: ClassVar[int] = 1024
    """Where the Spec names none."""

    learning_rate: Annotated[float, Field(gt=0, le=MOST_CHANGE)] = 1e-3
    """Of AdamW, after the warm-up; from there it falls to 0 along a cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 3e-4
    """Of AdamW, on weights of layers; biases, normalisations and embeddings have none."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Rows of a step on all workers together: more workers follow the same recipe. null: a hundredth of the train rows, rounded
    down to a power of two, as in TabM's experiments; from 64 to 1024 (`linear`: 4096)."""
    epochs: Annotated[int, Field(ge=1)] = 20
    """How often the train rows are gone through at most."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on behind the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of the steps in which the learning rate rises from 0."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The largest norm of a step's gradient; null: it is taken as it is."""
    early_stopping: Annotated[int, Field(ge=1)] | None = 5
    """Epochs without a better valid metric after which a fit ends with the best weights; null: all epochs, the last weights."""
    metric: str | None = None
    """What early stopping looks at; default: the task's loss."""
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 7
    """Of the first weights, the order of the rows and dropout."""

    def check(self, task: Task, features: Sequence[Feature]) -> None:
        """Raise `SpecError` where the data does not allow these parameters."""
        if task.type == "ranking":
            raise SpecError("model.type: networks do not rank; use lightgbm, or a task of type regression")
        if self.metric is not None and self.metric not in task.metric_names:
            known = did_you_mean(self.metric, task.metric_names)
            raise SpecError(f"{WHERE}.metric: '{self.metric}' is no metric of a {task.type} task{known}")
        for feature in features:
            if (feature.cardinality or 0) >= MAX_CODE:
                raise SpecError(
                    f"features: '{feature.name}' has {feature.cardinality:,} codes, and a network takes fewer than {MAX_CODE:,}; "
                    "write {index: {max_categories: ...}} or {hash: {buckets: ...}} for its column"
                )

    def rows_of_batch(self, rows: int) -> int:
        """Rows of a step where there are so many train rows."""
        return self.batch_size or min(max(SMALLEST_BATCH, 1 << max(0, (rows // 100).bit_length() - 1)), self.largest_batch)

    def steps(self, rows: int) -> int:
        """Steps of an epoch."""
        return max(1, math.ceil(rows / self.rows_of_batch(rows)))

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step (from 0), of so many."""
        first = round(self.warmup * steps)
        if step < first:
            return self.learning_rate * (step + 1) / (first + 1)
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


class LinearParams(NetworkParams):
    """Linear, logistic and softmax regression: a weight for each number and for each category."""

    architecture: ClassVar[frozenset[str]] = frozenset({"crosses", "buckets"})
    largest_batch: ClassVar[int] = 4096

    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0, le=MOST_CHANGE)] = 0.02
    """After the warm-up; from there it falls to 0 along a cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled from the gradient (AdamW); `l2` is a part of the loss."""
    epochs: Annotated[int, Field(ge=1)] = 5
    early_stopping: Annotated[int, Field(ge=1)] | None = 2
    l1: Annotated[float, Field(ge=0)] = 0.0
    """Times the sum of the weights' magnitudes is added to the mean loss; weights become exactly 0."""
    l2: Annotated[float, Field(ge=0)] = 0.0
    """Half of it times the sum of the weights' squares is added to the mean loss."""
    crosses: list[Annotated[list[str], Field(min_length=2)]] = []
    """Features with codes whose combinations get weights of their own, e.g. [[carrier, dest]]; hashed."""
    buckets: Annotated[int, Field(ge=2, le=1 << 26)] = 1 << 18
    """How many weights each cross has: combinations share them."""

    def check(self, task: Task, features: Sequence[Feature]) -> None:
        super().check(task, features)
        coded = [feature.name for feature in features if feature.cardinality is not None]
        for cross in self.crosses:
            for name in cross:
                if name not in coded:
                    raise SpecError(
                        f"{WHERE}.crosses: '{name}' is no feature with codes{did_you_mean(name, coded)}; numbers become codes "
                        "with the step 'bin' under features.columns"
                    )


class DeepParams(NetworkParams):
    """How the columns enter a deep network, and how wide and deep it is."""

    architecture: ClassVar[frozenset[str]] = frozenset(
        {"d_block", "n_blocks", "num_embeddings", "d_embedding", "n_bins", "n_frequencies", "frequency_init_scale"}
    )

    n_blocks: Annotated[int, Field(ge=1, le=64)] = 3
    """Layers one after the other."""
    d_block: Annotated[int, Field(ge=1, le=16_384)] = 256
    """The width of each."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    num_embeddings: Literal["piecewise", "periodic"] | None = "piecewise"
    """How numbers enter: by the quantile bins of the train rows, by learned waves, or (null) as they are."""
    d_embedding: Annotated[int, Field(ge=1, le=1024)] = 16
    """Outputs per number."""
    n_bins: Annotated[int, Field(ge=2, le=1024)] = 48
    """piecewise: bins per number, at most."""
    n_frequencies: Annotated[int, Field(ge=1, le=1024)] = 48
    """periodic: waves per number."""
    frequency_init_scale: Annotated[float, Field(gt=0)] = 0.01
    """periodic: the standard deviation of the first frequencies."""

    @model_validator(mode="after")
    def _belongs(self) -> DeepParams:
        for name, owner in (("n_bins", "piecewise"), ("n_frequencies", "periodic"), ("frequency_init_scale", "periodic")):
            if self.num_embeddings != owner and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} goes with num_embeddings: {owner}, but num_embeddings is {self.num_embeddings or 'null'}; "
                    f"set num_embeddings: {owner}, or take {name} out"
                )
        return self


class MLPParams(DeepParams):
    """A residual network over embedded columns."""


class TabMParams(DeepParams):
    """k networks in one that share their weights but for small adapters; the answer is the mean of theirs."""

    architecture: ClassVar[frozenset[str]] = DeepParams.architecture | {"k", "arch_type"}

    learning_rate: Annotated[float, Field(gt=0, le=MOST_CHANGE)] = 2e-3
    """Of AdamW, after the warm-up; from there it falls to 0 along a cosine."""
    n_blocks: Annotated[int, Field(ge=1, le=64)] = 2
    d_block: Annotated[int, Field(ge=1, le=16_384)] = 512
    k: Annotated[int, Field(ge=1, le=1024)] = 32
    """How many networks."""
    arch_type: Literal["tabm", "tabm-mini"] = "tabm"
    """tabm: adapters in every layer; tabm-mini: before the first one only."""
