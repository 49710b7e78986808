"""Gradient-boosted trees by LightGBM: the family's parameters, and a fitted ensemble.

How it is trained, on any number of workers, stands in `boosting_fit.py`; a serving replica never imports that. LightGBM itself is
imported where a booster is made: the process that only checks a Spec does not wait for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from pipelines.errors import SpecError
from pipelines.models.model import Matrix
from pipelines.spec import Chain, Frozen, Kind
from pipelines.tasks import Task

if TYPE_CHECKING:
    import lightgbm as lgb

    from pipelines.training.worker import Worker


SAMPLE_ROWS = 200_000
"""Rows of the sample that the bins come from, at most."""
SEGMENT = 50
ONE_SEGMENT = ("dart", "rf")
"""Where trees depend on more than the scores of those before them: see `boosting_fit.py`."""


class LightGBMParams(Frozen):
    """`model.params` of `type: lightgbm`; names as LightGBM spells them where it has them."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Trees at most (per class)."""
    segment: Annotated[int, Field(ge=1)] | None = None
    """A fit is a chain of Boosters of so many rounds, each seeded anew and started from the scores so far; checkpoints stand at
    their ends. null: 50, or train.checkpoint_every where that is less."""
    early_stopping: Annotated[int, Field(ge=1)] | None = 50
    """Stop after this many rounds without a better `metric` on the valid split; null: never."""
    metric: str | None = None
    """What early stopping looks at; default: logloss, or rmse for regression."""
    eval_every: Annotated[int, Field(ge=1)] = 5
    """Rounds between looks at the valid split."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    num_leaves: Annotated[int, Field(ge=2, le=131_072)] = 63
    max_depth: int = -1
    min_data_in_leaf: Annotated[int, Field(ge=0)] = 20
    min_sum_hessian_in_leaf: Annotated[float, Field(ge=0)] = 1.0
    """LightGBM's own 0.001 lets tables with tiny hessians diverge."""
    min_gain_to_split: Annotated[float, Field(ge=0)] = 0.0
    lambda_l1: Annotated[float, Field(ge=0)] = 0.0
    lambda_l2: Annotated[float, Field(ge=0)] = 1.0
    feature_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    feature_fraction_bynode: Annotated[float, Field(gt=0, le=1)] = 1.0
    bagging_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    bagging_freq: Annotated[int, Field(ge=0)] = 0
    max_bin: Annotated[int, Field(ge=2, le=65_535)] = 255
    min_data_in_bin: Annotated[int, Field(ge=1)] = 3
    extra_trees: bool = False
    path_smooth: Annotated[float, Field(ge=0)] = 0.0
    scale_pos_weight: Annotated[float, Field(gt=0)] = 1.0
    max_category: Annotated[int, Field(ge=0)] = 256
    """A categorical column with more values than this is split as numbers (its codes are ordered by frequency), not as sets."""
    cat_smooth: Annotated[float, Field(ge=0)] = 10.0
    cat_l2: Annotated[float, Field(ge=0)] = 10.0
    max_cat_threshold: Annotated[int, Field(ge=1)] = 32
    max_cat_to_onehot: Annotated[int, Field(ge=1)] = 4
    seed: int = 7

    def resolved(self, checkpoint_every: int) -> Self:
        """With the length of its segments as a number; raises `SpecError` where checkpoints could not come as asked."""
        if self.segment is not None and self.segment > checkpoint_every:
            raise SpecError(
                f"model.params.segment: {self.segment} rounds are more than train.checkpoint_every ({checkpoint_every}), and "
                "checkpoints stand at the ends of segments; lower the one or raise the other"
            )
        if self.segment is not None or getattr(self, "boosting", None) in ONE_SEGMENT:
            return self
        return type(self).model_validate({**self.model_dump(), "segment": self.rounds_of_segment(checkpoint_every)})

    def rounds_of_segment(self, checkpoint_every: int) -> int:
        """Rounds of each segment but the last."""
        if getattr(self, "boosting", None) in ONE_SEGMENT:
            return self.rounds
        return self.segment or min(SEGMENT, checkpoint_every)


class LightGBM:
    """A fitted ensemble of trees."""

    Params: ClassVar[type[Frozen]] = LightGBMParams
    chains: ClassVar[dict[Kind, Chain]] = {
        "numeric": [],  # LightGBM sends missing values to the better side
        "boolean": [],
        "categorical": ["index"],  # type: ignore[dict-item]  # mypy does not try the union's members on a literal
        "datetime": [["parts"], ["since"]],  # type: ignore[dict-item]
        # Few buckets: each is a column of the shards, and trees look at all of them.
        "text": [["length"], [{"ngrams": {"words": [1, 1], "buckets": 64}}]],  # type: ignore[dict-item]
    }
    trainer: ClassVar[str] = "lightgbm"
    uses_gpu: ClassVar[bool] = False

    def __init__(self, booster: lgb.Booster) -> None:
        self.booster = booster

    @classmethod
    def fit(cls, params: LightGBMParams, task: Task, worker: Worker) -> None:
        from pipelines.models.boosting_fit import Boosting

        Boosting(params, task, worker).run()

    @classmethod
    def memory(cls, params: LightGBMParams, rows: int, features: int, outputs: int) -> int:
        """See `boosting_fit.py`: binned rows (by rows they are kept twice while small), scores and gradients, the row sample."""
        binned = rows * features * (2 if params.max_bin > 256 else 1)
        return binned + rows * (12 + 28 * outputs) + SAMPLE_ROWS * features * 8

    @property
    def rounds(self) -> int:
        return int(self.booster.current_iteration())

    def predict(self, matrix: Matrix) -> Matrix:
        threads: dict[str, Any] = {"num_threads": 1} if len(matrix) < 64 else {}  # waking threads costs more than a few rows
        return np.asarray(self.booster.predict(matrix, raw_score=True, **threads))

    def save(self, folder: Path) -> None:
        (folder / "model.txt").write_text(self.booster.model_to_string(num_iteration=-1))

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.of_text((folder / "model.txt").read_text())

    @classmethod
    def of_text(cls, text: str) -> Self:
        """From LightGBM's text format, without its settings of the network: equal trees have equal bytes."""
        text = re.sub(
            r"^\[(machines|local_listen_port|num_machines|machine_list_filename|time_out): .*\]\n", "", text, flags=re.M
        )
        import lightgbm as lgb

        return cls(lgb.Booster(model_str=text))
