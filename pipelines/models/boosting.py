"""Gradient-boosted trees by LightGBM: a fitted ensemble, and what the family needs.

Its parameters stand in `boosting_params.py`, how it is trained in `boosting_fit.py`; a serving replica never imports the
latter. LightGBM itself is imported where a booster is made: the process that only checks a Spec does not wait for it.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np

from pipelines.models.boosting_params import LightGBMParams
from pipelines.models.model import Matrix
from pipelines.spec import Chain, Frozen, Kind
from pipelines.tasks import Task

if TYPE_CHECKING:
    import lightgbm as lgb

    from pipelines.data.prepared import Shards
    from pipelines.training.worker import Worker

SAMPLE_ROWS = 200_000
"""Rows of the sample that the bins come from, at most."""
LOGITS: Final = {"binary", "multiclass"}
"""Objectives whose raw scores a Task turns into answers; those of the others LightGBM does, which knows their link."""

LOG_LINK: Final = {"poisson", "gamma", "tweedie"}
TREES: Final = 32
"""Trees that rows are led through at a time where their leaves are asked for."""


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

    def __init__(self, booster: lgb.Booster) -> None:
        self.booster = booster
        head = booster.model_to_string(num_iteration=1)
        found = re.search(r"^objective=(\S+)(.*)", head, flags=re.M)
        self._logits = found is None or found[1] in LOGITS
        self._link = None if found is None else "log" if found[1] in LOG_LINK else "sqrt" if " sqrt" in found[2] else None
        self._averaged = re.search(r"^average_output$", head, flags=re.M) is not None

    @classmethod
    def fit(cls, params: LightGBMParams, task: Task, worker: Worker) -> None:
        from pipelines.models.boosting_fit import Boosting
        from pipelines.models.boosting_refit import refit

        if params.refit:
            refit(params, task, worker)
        else:
            Boosting(params, task, worker).run()

    @classmethod
    def check(cls, params: LightGBMParams, task: Task, shards: Shards, workers: int) -> Task:
        return params.check(task, shards, workers)

    @classmethod
    def uses_gpu(cls, params: LightGBMParams) -> bool:
        return params.device_type != "cpu"

    @classmethod
    def unavailable(cls, params: LightGBMParams) -> str | None:
        """Grow a stump to see: whether LightGBM was built for a device, and whether there is one, only shows then."""
        import lightgbm as lgb

        settings = {"device_type": params.device_type, "verbosity": -1, "min_data_in_leaf": 1}
        try:
            lgb.train(settings, lgb.Dataset(np.arange(100.0)[:, None], np.arange(100.0)), 1)
        except lgb.basic.LightGBMError as error:
            said = " ".join(str(error).split())
            return f"model.params.device_type: {params.device_type} cannot be used here, LightGBM says: {said}; set it to cpu"
        return None

    @classmethod
    def memory(cls, params: LightGBMParams, rows: int, features: int, outputs: int) -> int:
        """See `boosting_fit.py`: binned rows (by rows they are kept twice while small), scores and gradients, the row sample."""
        most = max([params.max_bin, *(params.max_bin_by_feature or {}).values()])
        binned = rows * features * (2 if most > 256 else 1)
        return binned + rows * (12 + 28 * outputs) + SAMPLE_ROWS * features * 8

    @property
    def rounds(self) -> int:
        return int(self.booster.current_iteration())

    def predict(self, matrix: Matrix) -> Matrix:
        """Logits, or values on the target's scale: what LightGBM's own `predict` says, which is not raw where there is a link."""
        return self.raw(matrix) if self._logits else self._predict(matrix)

    def predict_from(self, matrix: Matrix, init_score: Matrix) -> Matrix:
        """The same of rows that start from raw scores of their own, which LightGBM knows in training alone."""
        raw = self.raw(matrix) + init_score
        if self._link == "log":
            with np.errstate(over="ignore"):  # infinite, as LightGBM says
                return np.exp(raw)
        return np.sign(raw) * raw * raw if self._link == "sqrt" else raw

    def raw_from(self, matrix: Matrix, init_score: Matrix) -> Matrix:
        """The scores that a fit of these trees has come to: they are added to `init_score` one after the other, as it added them.

        It has the bits of the fit. Of models with one output; holds a few bytes for each row of the matrix and of `TREES` trees.
        """
        scores = init_score.copy()
        for first in range(0, self.rounds, TREES):
            trees = self._leaf_values[first : first + TREES]
            leaves = self.booster.predict(matrix, pred_leaf=True, start_iteration=first, num_iteration=TREES)
            leaves = np.asarray(leaves).reshape(len(matrix), len(trees))  # of a single tree LightGBM gives (rows,)
            for at, values in enumerate(trees):
                scores += values[leaves[:, at]]
        return scores

    @cached_property
    def _leaf_values(self) -> list[Matrix]:
        """What each leaf of each tree adds."""
        sizes = re.findall(r"^num_leaves=(.*)$", self.booster.model_to_string(num_iteration=-1), flags=re.M)
        return [
            np.array([self.booster.get_leaf_output(tree, leaf) for leaf in range(int(size))]) for tree, size in enumerate(sizes)
        ]

    def raw(self, matrix: Matrix) -> Matrix:
        """The sum of the trees, of a forest their mean: logits, values, or the logarithms of values (poisson, gamma, tweedie)."""
        scores = self._predict(matrix, raw_score=True)
        return scores / self.rounds if self._averaged else scores  # LightGBM averages answers, and leaves raw scores a sum

    def _predict(self, matrix: Matrix, **how: Any) -> Matrix:
        threads: dict[str, Any] = {"num_threads": 1} if len(matrix) < 64 else {}  # waking threads costs more than a few rows
        outputs = self.booster.num_model_per_iteration()
        shape = (len(matrix), outputs) if outputs > 1 else (len(matrix),)  # of no row too, of which LightGBM gives (0,)
        return np.asarray(self.booster.predict(matrix, **how, **threads)).reshape(shape)

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
        found = np.asarray(self.booster.predict(matrix, pred_contrib=True, **threads)).reshape(shape)
        return found / self.rounds if self._averaged else found
