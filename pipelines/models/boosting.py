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

from pipelines.models.model import Matrix
from pipelines.spec import Chain, Frozen, Kind
from pipelines.tasks import Task

if TYPE_CHECKING:
    import lightgbm as lgb

    from pipelines.training.worker import Worker


SAMPLE_ROWS = 200_000
"""Rows of the sample that the bins come from, at most."""


class LightGBMParams(Frozen):
    """`model.params` of `type: lightgbm`; names as LightGBM spells them where it has them."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Trees at most (per class)."""
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
        return binned + rows * (12 + 20 * outputs) + SAMPLE_ROWS * features * 8

    @property
    def rounds(self) -> int:
        return int(self.booster.current_iteration())

    def predict(self, matrix: Matrix) -> Matrix:
        threads: dict[str, Any] = {"num_threads": 1} if len(matrix) < 64 else {}  # waking threads costs more than a few rows
        outputs = self.booster.num_model_per_iteration()
        shape = (len(matrix), outputs) if outputs > 1 else (len(matrix),)  # of no row too, of which LightGBM gives (0,)
        return np.asarray(self.booster.predict(matrix, raw_score=True, **threads)).reshape(shape)

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

    def explain_s(self) -> float:
        """TreeSHAP takes about 0.3 us for a row and a split (measured with 63 and 127 leaves)."""
        return 0.3e-6 * float(self.booster.feature_importance("split").sum())

    def importance(self) -> dict[str, Matrix]:
        """What splits on a feature took from the loss, and how many there are."""
        return {measure: np.asarray(self.booster.feature_importance(measure), np.float64) for measure in ("gain", "split")}

    def contributions(self, matrix: Matrix) -> Matrix:
        """TreeSHAP (Lundberg et al., 2020), given which share of the train rows went down each branch."""
        shape = (len(matrix), self.booster.num_model_per_iteration(), self.booster.num_feature() + 1)
        if not len(matrix):
            return np.empty(shape)  # LightGBM divides by the number of rows
        threads: dict[str, Any] = {"num_threads": 1} if len(matrix) < 8 else {}
        return np.asarray(self.booster.predict(matrix, pred_contrib=True, **threads)).reshape(shape)
