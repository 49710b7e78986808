"""`model.params` of `type: lightgbm`: names, bounds, what goes with what, and what LightGBM is told.

Names are LightGBM's own where it has them. Its aliases, and what heliostat sets itself, are answered in one line each
(`boosting_names.py`), and so is every combination that LightGBM would abort on or silently ignore. LightGBM itself is not
imported here: a Spec is checked without it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pipelines.errors import DataError, SpecError, did_you_mean
from pipelines.features.transform import Feature
from pipelines.models.boosting_columns import BY_COLUMN, by_feature
from pipelines.models.boosting_names import ANSWERS, CALLED, OBJECTIVE_CALLED
from pipelines.spec import Frozen
from pipelines.tasks import Loss, Task, TaskType

if TYPE_CHECKING:
    from pipelines.data.prepared import Shards

Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]

Objective = Literal["l2", "l1", "huber", "fair", "poisson", "quantile", "mape", "gamma", "tweedie", "binary", "multiclass",
    "lambdarank", "rank_xendcg"]  # fmt: skip


class LightGBMParams(Frozen):
    """The parameters of LightGBM. Where a default is null, LightGBM's own holds.

    - **Objectives** of a regression. `poisson`, `gamma` and `tweedie` learn the logarithm; answers are on the target's scale all
      the same. On several workers LightGBM sets the leaves of `l1`, `quantile` and `mape` to the mean of what each worker's rows
      alone would give: exact on one worker, close on workers with like rows. Rows sorted by the target are refused.
    - **Ranking** on several workers: LightGBM estimates the rows of a leaf from its hessians, which differ greatly there, so that
      `min_data_in_leaf` acts somewhat differently than on one worker; without it the trees are the same.
    - **dart** rescales earlier trees in later rounds. The best of its rounds cannot be cut out afterwards, so there is no early
      stopping, and a fit is one segment: what is killed starts anew.
    - **rf** averages its trees, all grown from the same start: `learning_rate` is of no account, early stopping keeps the average
      of the best number of trees, and a fit is one segment: what is killed starts anew.
    - **goss** uses all rows in the first 1 / learning_rate rounds of each segment, so by default a fit is one segment too.
    - **By column**: `monotone_constraints`, `interaction_constraints`, `feature_contri` and `max_bin_by_feature` name columns of
      the data (or derived ones), not features.
    - **Constraints**: on several workers and with `feature_fraction_bynode` LightGBM falls back from `intermediate` and
      `advanced` to `basic`; what is constrained holds either way. It crashes with `interaction_constraints` on several workers.
    """

    objective: Objective | None = None
    """Of a regression, default l2, or a ranking, default lambdarank. Other tasks have one each."""
    boosting: Literal["gbdt", "dart", "rf"] = "gbdt"
    data_sample_strategy: Literal["bagging", "goss"] = "bagging"
    """goss: the rows with large gradients, and some of the others."""
    device_type: Literal["cpu", "gpu", "cuda"] = "cpu"
    """What grows the trees: gpu by OpenCL, cuda where LightGBM was built with it. Only cpu gives the same bits each time."""

    rounds: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Trees at most (per class)."""
    segment: Annotated[int, Field(ge=1)] | None = None
    """A fit is a chain of Boosters of so many rounds, each seeded anew and started from the scores so far; checkpoints stand at
    their ends. null: 50, or train.checkpoint_every where that is less; with dart, rf and goss all rounds."""
    early_stopping: Annotated[int, Field(ge=1)] | None = 50
    """Stop after this many rounds without a better `metric` on the valid split; null: never, as always with dart."""
    metric: str | None = None
    """What early stopping looks at; default: logloss, or the loss that a regression minimises (rmse for l2)."""
    eval_every: Annotated[int, Field(ge=1)] = 5
    """Rounds between looks at the valid split."""
    seed: Seed = 7
    learning_rate: Share = 0.1

    num_leaves: Annotated[int, Field(ge=2, le=131_072)] = 63
    max_depth: Annotated[int, Field(ge=-1)] = -1
    """-1: no limit."""
    min_data_in_leaf: Annotated[int, Field(ge=0)] = 20
    min_sum_hessian_in_leaf: Amount = 1.0
    """LightGBM's own 0.001 lets tables with tiny hessians diverge."""
    min_gain_to_split: Amount = 0.0
    lambda_l1: Amount = 0.0
    lambda_l2: Amount = 1.0
    max_delta_step: Amount = 0.0
    """Limit of a leaf's output before `learning_rate`; 0: none."""
    path_smooth: Amount = 0.0
    extra_trees: bool = False
    extra_seed: Seed | None = None
    boost_from_average: bool = True
    """Start from the mean target; of no account with `task.init_score`, which says where each row starts."""

    feature_fraction: Share = 1.0
    feature_fraction_bynode: Share = 1.0
    feature_fraction_seed: Seed | None = None
    bagging_fraction: Share = 1.0
    bagging_freq: Annotated[int, Field(ge=0)] = 0
    """Rounds between new samples of rows; 0: all rows."""
    pos_bagging_fraction: Share | None = None
    neg_bagging_fraction: Share | None = None
    """Binary: shares of the positive and of the negative rows, instead of bagging_fraction."""
    bagging_seed: Seed | None = None
    top_rate: Share | None = None
    other_rate: Share | None = None
    """goss: shares of all rows, 0.2 and 0.1."""

    drop_rate: Part | None = None
    max_drop: int | None = None
    """dart: trees dropped in a round at most, 50; 0 and below: no limit."""
    skip_drop: Part | None = None
    uniform_drop: bool | None = None
    xgboost_dart_mode: bool | None = None
    drop_seed: Seed | None = None

    max_bin: Annotated[int, Field(ge=2, le=65_535)] = 255
    max_bin_by_feature: dict[str, Annotated[int, Field(ge=2, le=65_535)]] | None = None
    """By column, for those that need other than max_bin."""
    min_data_in_bin: Annotated[int, Field(ge=1)] = 3
    use_missing: bool = True
    zero_as_missing: bool = False

    max_category: Annotated[int, Field(ge=0)] = 256
    """A categorical column with more values than this is split as numbers (its codes are ordered by frequency), not as sets."""
    cat_smooth: Amount = 10.0
    cat_l2: Amount = 10.0
    max_cat_threshold: Annotated[int, Field(ge=1)] = 32
    max_cat_to_onehot: Annotated[int, Field(ge=1)] = 4
    min_data_per_group: Annotated[int, Field(ge=1)] = 100

    monotone_constraints: dict[str, Literal[-1, 0, 1]] | None = None
    """By column: 1, the prediction never falls while the value rises and all else is the same; -1, it never rises."""
    monotone_constraints_method: Literal["basic", "intermediate", "advanced"] | None = None
    monotone_penalty: Amount | None = None
    interaction_constraints: list[Annotated[list[str], Field(min_length=1)]] | None = None
    """Groups of columns: only those of one group meet on the way to a leaf. Columns named nowhere are one more group."""
    feature_contri: dict[str, Amount] | None = None
    """By column: factors of the gain of its splits; 0 leaves it out."""

    alpha: Positive | None = None
    """quantile: which one; huber: the error from where on it counts linearly. Default 0.9."""
    fair_c: Positive | None = None
    tweedie_variance_power: Annotated[float, Field(ge=1, lt=2)] | None = None
    """1: Poisson, towards 2: gamma. Default 1.5."""
    poisson_max_delta_step: Positive | None = None
    reg_sqrt: bool | None = None
    """l2: learn the square root of the target; answers are squared again."""
    scale_pos_weight: Positive = 1.0
    is_unbalance: bool = False
    """Binary: weight both classes as if they were equally frequent."""

    lambdarank_truncation_level: Annotated[int, Field(ge=1)] | None = None
    """lambdarank: how many of the first rows of a query count in training, 30; a little more than the k of the wanted ndcg@k."""
    lambdarank_norm: bool | None = None
    """lambdarank: whether queries with many rows and large differences are toned down; true."""

    refit: bool = False
    """With model.from: keep that run's splits and fit their leaves to this data, instead of adding rounds."""
    refit_decay_rate: Part | None = None
    """How much of a leaf's old value stays; default 0.9."""

    use_quantized_grad: bool = False
    num_grad_quant_bins: Annotated[int, Field(ge=2, le=64)] | None = None
    quant_train_renew_leaf: bool | None = None
    stochastic_rounding: bool | None = None
    gpu_use_dp: bool | None = None
    """gpu: sums in double precision."""

    @model_validator(mode="before")
    @classmethod
    def _in_our_words(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name in values:
            if name in CALLED:
                raise ValueError(f"{name} is called {CALLED[name]} here; write {CALLED[name]}: {_shown(values[name])}")
            if name in ANSWERS:
                raise ValueError(f"{name} {ANSWERS[name]}; take it out")
        objective = values.get("objective")
        if isinstance(objective, str) and objective in OBJECTIVE_CALLED:
            raise ValueError(f"objective {objective} is called {OBJECTIVE_CALLED[objective]} here")
        if values.get("boosting") == "dart":  # so that the resolved Spec says what happens
            values = {"early_stopping": None, **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> LightGBMParams:
        for wrong, sentence in self._conflicts():
            if wrong:
                raise ValueError(sentence)
        for name, (owner, wanted) in BELONGS.items():
            found = DEFAULTS.get(owner) if getattr(self, owner) is None else getattr(self, owner)
            if getattr(self, name) is not None and found not in wanted:
                listed = " or ".join(_shown(value) for value in wanted)
                raise ValueError(
                    f"{name} goes with {owner}: {listed}, but {owner} is {_shown(found)}; set {owner}: {_shown(wanted[0])}, "
                    f"or take {name} out"
                )
        return self

    def _conflicts(self) -> list[tuple[bool, str]]:
        by_class = self.pos_bagging_fraction is not None or self.neg_bagging_fraction is not None
        sampled = self.bagging_freq > 0 and self.bagging_fraction < 1
        goss = self.data_sample_strategy == "goss"
        rates = (0.2 if self.top_rate is None else self.top_rate) + (0.1 if self.other_rate is None else self.other_rate)
        objective = self.objective or "l2"
        return [
            (
                goss and (self.bagging_freq > 0 or self.bagging_fraction < 1 or by_class),
                "data_sample_strategy: goss chooses the rows itself and excludes bagging; "
                "take bagging_freq, bagging_fraction, pos_bagging_fraction and neg_bagging_fraction out",
            ),
            (
                goss and rates > 1,
                f"top_rate + other_rate is {rates:g}, which is more than all rows; make the sum at most 1",
            ),
            (
                (self.bagging_fraction < 1 or by_class) and self.bagging_freq == 0,
                "bagging_fraction has no effect while bagging_freq is 0; set bagging_freq: 1 for a new sample in each round",
            ),
            (
                self.boosting == "rf" and not goss and not sampled and self.feature_fraction == 1,
                "boosting: rf would grow the same tree again and again, for each sees all rows and columns; "
                "set bagging_freq: 1 and bagging_fraction: 0.632, or feature_fraction below 1",
            ),
            (
                self.boosting == "dart" and self.early_stopping is not None,
                "boosting: dart cannot stop early, for later rounds rescale earlier trees, so that the best of its rounds cannot "
                "be cut out; set early_stopping: null, and rounds to what is wanted",
            ),
            (
                objective == "quantile" and self.alpha is not None and self.alpha >= 1,
                f"alpha is {self.alpha}, expected a quantile between 0 and 1",
            ),
            (
                self.is_unbalance and self.scale_pos_weight != 1,
                "is_unbalance and scale_pos_weight exclude each other; take one of them out",
            ),
            (
                bool(self.monotone_constraints) and objective in RENEWED,
                f"monotone_constraints cannot hold with objective: {objective}, whose leaves are set after the tree is grown; "
                "choose huber or l2, or take the constraints out",
            ),
            (
                self.refit and objective not in REFITTED,
                f"refit goes with the objectives {', '.join(REFITTED)}, but objective is {objective}; take refit out",
            ),
            (
                self.refit and self.is_unbalance,
                "refit does not know is_unbalance; write task.class_weight: balanced",
            ),
            (
                self.refit and self.path_smooth > 0,
                "refit fits each leaf by itself, without path_smooth; take one of them out",
            ),
            (
                self.device_type == "gpu" and max([self.max_bin, *(self.max_bin_by_feature or {}).values()]) > 255,
                "device_type: gpu has at most 255 bins; lower max_bin",
            ),
        ]

    def check(self, task: Task, shards: Shards, workers: int) -> Task:
        """Return the task with the loss that is minimised; raise `SpecError` or `DataError` where the data does not allow it."""
        where = "model.params"
        wanted = TASKS.get(self.objective, "regression") if self.objective else task.type
        if wanted != task.type:
            raise SpecError(
                f"{where}.objective: '{self.objective}' goes with a {wanted} task, but this is a {task.type}: target "
                f"'{task.target}'; set task.type: {wanted}, or take the objective out"
            )
        for kind, names in ONLY.items():
            for name in names if task.type != kind else ():
                if getattr(self, name) != _default(name):
                    raise SpecError(f"{where}.{name} goes with a {kind} task, but this is a {task.type}; take it out")
        if task.type == "ranking":
            _check_ranking(task, shards, workers)
        if task.weight is not None:
            _check_weights(task, shards, workers)
        if task.init_score is not None and self.boosting == "rf":
            raise SpecError(
                f"{where}.boosting: the trees of a random forest start from no scores; choose gbdt or dart, or take "
                "task.init_score out"
            )
        own = next((name for name in ("is_unbalance", "scale_pos_weight") if getattr(self, name) != _default(name)), None)
        if own and task.class_weights is not None:
            raise SpecError(f"{where}.{own} and task.class_weight both weight the classes; take one of them out")
        if self.objective in LOWEST:
            (lowest, allowed), (low, _) = LOWEST[self.objective], shards.target_range()
            if low < 0 or (low == 0 and not allowed):
                raise DataError(
                    f"{where}.objective: '{self.objective}' needs targets {lowest}, but '{task.target}' goes down to {low:g}; "
                    "choose another objective, or drop such rows with data.where"
                )
        by_feature(self, shards.features)
        if self.refit and task.type == "ranking":
            raise SpecError(f"{where}.refit: the trees of a ranking are not fitted anew; take it out to add rounds")
        if self.interaction_constraints and workers > 1:
            raise SpecError(
                f"{where}.interaction_constraints: LightGBM 4.7 crashes with them on several workers, and there are {workers}; "
                "set train.workers: 1, or take them out"
            )
        if self.objective in RENEWED and workers > 1:
            _check_alike(
                f"{where}.objective: '{self.objective}'", [shards.target_sample("train", i, workers) for i in range(workers)]
            )
        task = task.model_copy(update={"loss": self._loss()})
        if self.metric is not None and self.metric not in task.metric_names:
            known = task.metric_names
            raise SpecError(
                f"{where}.metric: '{self.metric}' is no metric of a {task.type} task{did_you_mean(self.metric, known)}"
            )
        return task

    def resolved(self, checkpoint_every: int) -> Self:
        """With the length of its segments as a number; raises `SpecError` where checkpoints could not come as asked."""
        if self.segment is not None and self.segment > checkpoint_every:
            raise SpecError(
                f"model.params.segment: {self.segment} rounds are more than train.checkpoint_every ({checkpoint_every}), and "
                "checkpoints stand at the ends of segments; lower the one or raise the other"
            )
        if self.segment is not None or self._whole:
            return self
        return type(self).model_validate({**self.model_dump(), "segment": self.rounds_of_segment(checkpoint_every)})

    def rounds_of_segment(self, checkpoint_every: int) -> int:
        """Rounds of each segment but the last."""
        return self.segment or (self.rounds if self._whole else min(SEGMENT, checkpoint_every))

    @property
    def _whole(self) -> bool:
        """Whether a fit is one segment, for its rounds depend on more than the scores so far."""
        return self.boosting != "gbdt" or self.data_sample_strategy == "goss"

    def settings(self, task: Task, features: Sequence[Feature], segment: int = 0) -> dict[str, Any]:
        """What LightGBM is told of the model, in its own words; each segment has seeds of its own."""
        own = self.model_dump(exclude={*OURS, *BY_COLUMN}, exclude_none=True) | by_feature(self, features)
        if task.type != "binary":
            del own["scale_pos_weight"], own["is_unbalance"]
        if task.type == "multiclass":
            own["num_class"] = task.outputs
        own |= {name: segment_seed(own[name], segment) for name in SEEDS if name in own}
        objective = self.objective or {"regression": "l2", "ranking": "lambdarank"}.get(task.type, task.type)
        return own | {"objective": {"l2": "regression", "l1": "regression_l1"}.get(objective, objective)}

    def _loss(self) -> Loss | None:
        """What is minimised, with LightGBM's defaults, where it is not the squared error."""
        alpha = 0.9 if self.alpha is None else self.alpha
        losses = {
            "l1": Loss(name="mae"),
            "huber": Loss(name="huber", parameter=alpha),
            "fair": Loss(name="fair", parameter=1.0 if self.fair_c is None else self.fair_c),
            "quantile": Loss(name="pinball", parameter=alpha),
            "mape": Loss(name="mape"),
            "poisson": Loss(name="poisson_deviance"),
            "gamma": Loss(name="gamma_deviance"),
            "tweedie": Loss(
                name="tweedie_deviance", parameter=1.5 if self.tweedie_variance_power is None else self.tweedie_variance_power
            ),
        }
        return losses.get(self.objective or "l2")


def _check_ranking(task: Task, shards: Shards, workers: int) -> None:
    highest = shards.target_range()[1]
    if highest > MAX_LABEL:
        raise DataError(
            f"task.target: '{task.target}' goes up to {highest:g}, but LightGBM has gains for labels from 0 to {MAX_LABEL}; "
            "derive a column with fewer levels under data.derive"
        )
    if (largest := shards.largest_query("train")) > MAX_QUERY_ROWS:
        raise DataError(
            f"task.group: a query of '{task.group}' has {largest:,} rows, and LightGBM ranks at most {MAX_QUERY_ROWS:,}; drop "
            "some with data.where, or name another column"
        )
    if not all(shards.ranges("train", rank, workers) for rank in range(workers)):
        raise DataError(
            f"train.workers: a query is never split, and the train rows have too few for {workers}; lower train.workers"
        )


def _check_weights(task: Task, shards: Shards, workers: int) -> None:
    """Raise `DataError` where a worker's rows weigh nothing: LightGBM would divide by the sum of their weights."""
    idle = [rank for rank in range(workers) if not shards.weighs("train", rank, workers)]
    if idle:
        whose = "all train rows" if len(idle) == workers else f"all rows of worker {idle[0]}"
        raise DataError(
            f"task.weight: '{task.weight}' is 0 in {whose}; drop rows that weigh nothing with data.where, or lower train.workers"
        )


def _default(name: str) -> Any:
    return LightGBMParams.model_fields[name].default


def _check_alike(what: str, samples: list[np.ndarray[Any, np.dtype[np.float64]]]) -> None:
    """Raise `DataError` where the workers' targets are spread out so differently that the mean of their leaves is wrong.

    Measured on rows sorted by the target, two workers: of a model of the 0.9 quantile, only 0.72 of the rows stay below.
    """
    points = np.unique(np.concatenate([sample[np.linspace(0, len(sample) - 1, 33).astype(int)] for sample in samples]))
    shares = [np.searchsorted(sample, points, side="right") / len(sample) for sample in samples]
    apart = max(float(np.abs(one - other).max()) for one, other in itertools.combinations(shares, 2))
    if apart > APART + 3 / math.sqrt(min(map(len, samples))):
        raise DataError(
            f"{what} needs workers with like rows, but the rows are sorted so that their targets differ (by {apart:.0%} of the "
            "rows); set prepare.bucket_by: [a column that has many values], which mixes them, or train.workers: 1"
        )


def segment_seed(seed: int, segment: int) -> int:
    """The seed of a segment: the first has the fit's own, so a fit of one segment is that of plain LightGBM."""
    if segment == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{segment}".encode(), digest_size=4).digest(), "big") >> 1


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


SEGMENT: Final = 50
MAX_LABEL: Final = 30
MAX_QUERY_ROWS: Final = 10_000
OURS: Final = {"refit", "refit_decay_rate", "rounds", "segment", "early_stopping", "metric", "eval_every", "max_category"}
"""Parameters that are not LightGBM's."""
ONLY: Final = {
    "binary": ("pos_bagging_fraction", "neg_bagging_fraction", "is_unbalance", "scale_pos_weight"),
    "ranking": ("lambdarank_truncation_level", "lambdarank_norm"),
}
"""Parameters that a single type of task has."""
SEEDS: Final = ("seed", "bagging_seed", "feature_fraction_seed", "extra_seed")
TASKS: Final[dict[str, TaskType]] = {
    "binary": "binary", "multiclass": "multiclass", "lambdarank": "ranking", "rank_xendcg": "ranking",
}  # fmt: skip
"""Objectives of other tasks than regression."""
RENEWED: Final = ("l1", "quantile", "mape")
"""Objectives whose leaves are set once the tree is grown: by each worker from its own rows, and of these the mean is taken."""
APART: Final = 0.2
"""By what share of their rows the targets of two workers may differ (Kolmogorov and Smirnov's distance), besides chance."""
REFITTED: Final = ("l2", "binary", "multiclass")
LOWEST: Final = {"poisson": ("of 0 and above", True), "tweedie": ("of 0 and above", True), "gamma": ("above 0", False)}
"""Which targets an objective can learn, and whether 0 is one."""
DEFAULTS: Final = {"objective": "l2"}
BELONGS: Final[dict[str, tuple[str, tuple[Any, ...]]]] = {
    "alpha": ("objective", ("quantile", "huber")),
    "fair_c": ("objective", ("fair",)),
    "tweedie_variance_power": ("objective", ("tweedie",)),
    "poisson_max_delta_step": ("objective", ("poisson",)),
    "reg_sqrt": ("objective", ("l2",)),
    "segment": ("boosting", ("gbdt",)),
    "refit_decay_rate": ("refit", (True,)),
    "drop_rate": ("boosting", ("dart",)),
    "max_drop": ("boosting", ("dart",)),
    "skip_drop": ("boosting", ("dart",)),
    "uniform_drop": ("boosting", ("dart",)),
    "xgboost_dart_mode": ("boosting", ("dart",)),
    "drop_seed": ("boosting", ("dart",)),
    "top_rate": ("data_sample_strategy", ("goss",)),
    "other_rate": ("data_sample_strategy", ("goss",)),
    "extra_seed": ("extra_trees", (True,)),
    "num_grad_quant_bins": ("use_quantized_grad", (True,)),
    "quant_train_renew_leaf": ("use_quantized_grad", (True,)),
    "stochastic_rounding": ("use_quantized_grad", (True,)),
    "gpu_use_dp": ("device_type", ("gpu",)),
}
"""Parameters that have a meaning with certain values of another one only."""
