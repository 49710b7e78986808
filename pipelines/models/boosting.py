"""Gradient-boosted trees by LightGBM, data-parallel over any number of workers, larger than memory.

Every worker streams its row range into LightGBM's binned form, about one byte a value; no worker holds its raw rows. What each
rank keeps is rows x (columns (x 2 over 256 bins) + 12 + 20 x outputs) bytes, the reference sample and one row group.

Bins are made on every rank from the same row sample before the network exists. Both obvious ways are silently wrong: a Dataset
constructed before the Booster is binned from the rank's own rows, so the ranks grow different trees; one constructed by the
Booster bins each feature from a single rank's rows.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self

import lightgbm as lgb
import numpy as np
from pydantic import Field

from pipelines.metrics import Metrics
from pipelines.models.model import Matrix
from pipelines.spec import Chain, Frozen, Kind
from pipelines.tasks import Task

if TYPE_CHECKING:
    from pipelines.training.worker import Worker

OBJECTIVES: Final = {"binary": "binary", "multiclass": "multiclass", "regression": "regression"}
LOSSES: Final = {"binary": "logloss", "multiclass": "logloss", "regression": "rmse"}


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


OURS: Final = {"rounds", "early_stopping", "metric", "eval_every", "max_category"}


class LightGBM:
    """A fitted ensemble of trees."""

    Params: ClassVar[type[Frozen]] = LightGBMParams
    chains: ClassVar[dict[Kind, Chain]] = {
        "numeric": [],  # LightGBM sends missing values to the better side
        "boolean": [],
        "categorical": ["index"],  # type: ignore[dict-item]  # mypy does not try the union's members on a literal
        "datetime": [["parts"], ["elapsed"]],  # type: ignore[dict-item]
    }
    trainer: ClassVar[str] = "lightgbm"

    def __init__(self, booster: lgb.Booster) -> None:
        self._booster = booster

    @classmethod
    def fit(cls, params: LightGBMParams, task: Task, worker: Worker) -> None:
        Boosting(params, task, worker).run()

    @property
    def rounds(self) -> int:
        return int(self._booster.current_iteration())

    def predict(self, matrix: Matrix) -> Matrix:
        threads: dict[str, Any] = {"num_threads": 1} if len(matrix) < 64 else {}  # waking threads costs more than a few rows
        return np.asarray(self._booster.predict(matrix, raw_score=True, **threads))

    def save(self, folder: Path) -> None:
        (folder / "model.txt").write_text(self._booster.model_to_string(num_iteration=-1))

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.of_text((folder / "model.txt").read_text())

    @classmethod
    def of_text(cls, text: str) -> Self:
        """From LightGBM's text format, without its settings of the network: equal trees have equal bytes."""
        text = re.sub(
            r"^\[(machines|local_listen_port|num_machines|machine_list_filename|time_out): .*\]\n", "", text, flags=re.M
        )
        return cls(lgb.Booster(model_str=text))


class Boosting:
    """One fit on one rank, from the start or from a checkpoint."""

    def __init__(self, params: LightGBMParams, task: Task, worker: Worker) -> None:
        self._params, self._task, self._worker = params, task, worker
        self._start = worker.start
        self._metric = params.metric or LOSSES[task.type]
        self._best_step: int | None = worker.start.state.get("best_step") if worker.start else None
        self._best: float | None = worker.start.state.get("best") if worker.start else None

    def run(self) -> None:
        worker, params = self._worker, self._params
        train = self._dataset("train", self._reference())
        valid = self._dataset("valid", train) if worker.total_rows("valid") else None
        booster = lgb.Booster({**self._settings(), **worker.network}, train)
        if valid is not None:
            booster.add_valid(valid, "valid")
        step = worker.start.step if worker.start else 0
        stop = self._stopped(step)
        while step < params.rounds and not stop:
            stop = booster.update()  # true when no leaf can be split any more; the same on every rank
            step += 1
            if step % params.eval_every == 0 or step == params.rounds or stop:
                self._evaluate(booster, step, valid)
                stop = stop or self._stopped(step)
            if step % worker.checkpoint_every == 0 and step < params.rounds and not stop:
                worker.report(step, self._model(booster, None) if worker.rank == 0 else None, self._state())
        best = self._best_step if self._best_step is not None and params.early_stopping else step
        worker.report(step, self._model(booster, best) if worker.rank == 0 else None, {**self._state(), "final": best})
        booster.free_network()

    def _settings(self) -> dict[str, Any]:
        settings = {name: value for name, value in self._params.model_dump().items() if name not in OURS}
        if self._task.type == "multiclass":
            settings["num_class"] = self._task.outputs
        if self._task.type != "binary":
            del settings["scale_pos_weight"]
        return settings | {
            "objective": OBJECTIVES[self._task.type],
            "metric": "none",
            "tree_learner": "data" if self._worker.size > 1 else "serial",
            "pre_partition": True,
            "num_threads": self._worker.threads,
            "verbosity": -1,
            # Bits: the layout of histograms is otherwise chosen by timing.
            "deterministic": True,
            "force_row_wise": True,
            # A pre-filter looks at local rows only and would differ between ranks.
            "feature_pre_filter": False,
        }

    def _reference(self) -> lgb.Dataset:
        """The bins, from the row sample that every rank reads."""
        categorical = [
            i
            for i, column in enumerate(self._worker.columns)
            if column.kind == "categorical" and (column.cardinality or 0) <= self._params.max_category
        ]
        sample = self._worker.shards.sample()
        settings = {**self._settings(), "tree_learner": "serial", "bin_construct_sample_cnt": max(1, len(sample))}
        return lgb.Dataset(sample, params=settings, categorical_feature=categorical).construct()

    def _dataset(self, split: str, reference: lgb.Dataset) -> lgb.Dataset:
        rows = Rows(self._worker, split)
        dataset = lgb.Dataset(rows, reference=reference, params=reference.get_params())
        dataset.construct()
        dataset.set_label(np.concatenate(rows.targets) if rows.targets else np.array([]))
        if self._start is not None:
            scores = [self._start.model.predict(matrix) for matrix, _ in self._worker.batches(split)]
            if scores:
                dataset.set_init_score(np.concatenate(scores).ravel(order="F"))
        return dataset

    def _evaluate(self, booster: lgb.Booster, step: int, valid: lgb.Dataset | None) -> None:
        if valid is None:
            self._worker.log(step, {}, total=self._params.rounds)
            return
        metrics = Metrics(self._task)
        booster.eval_valid(feval=lambda scores, data: self._add(metrics, scores, data))
        result = Metrics.merge(self._task, self._worker.gather(f"valid-{step}", metrics.state())).result()
        self._worker.log(step, {"valid": result}, total=self._params.rounds)
        value = result[self._metric]
        if value is not None and (self._best is None or self._better(value, self._best)):
            self._best, self._best_step = value, step

    def _better(self, value: float, than: float) -> bool:
        return value > than if self._task.higher_is_better(self._metric) else value < than

    def _add(self, metrics: Metrics, probabilities: Matrix, data: lgb.Dataset) -> list[tuple[str, float, bool]]:
        """LightGBM hands over answers, not raw scores; the logarithm brings them back."""
        if self._task.type == "regression":
            metrics.add(np.asarray(data.get_label()), probabilities)
        else:
            with np.errstate(divide="ignore"):
                log = np.log(probabilities)
                metrics.add(
                    np.asarray(data.get_label()), log if self._task.type == "multiclass" else log - np.log1p(-probabilities)
                )
        return []

    def _stopped(self, step: int) -> bool:
        patience = self._params.early_stopping
        return patience is not None and self._best_step is not None and step - self._best_step >= patience

    def _state(self) -> dict[str, Any]:
        return {"best": self._best, "best_step": self._best_step}

    def _model(self, booster: lgb.Booster, rounds: int | None) -> LightGBM:
        """The trees so far, those of the model that was started from first; cut after `rounds` rounds."""
        text = booster.model_to_string(num_iteration=-1)
        if self._start is not None:
            assert isinstance(self._start.model, LightGBM)
            text = join(self._start.model._booster.model_to_string(num_iteration=-1), text)
        model = LightGBM.of_text(text)
        return model if rounds is None else LightGBM.of_text(model._booster.model_to_string(num_iteration=rounds))


class Rows(lgb.Sequence):
    """The rows of a rank as LightGBM asks for them, front to back; keeps their targets."""

    batch_size = 65_536

    def __init__(self, worker: Worker, split: str) -> None:
        self._batches = worker.batches(split)
        self._rows = worker.rows(split)
        self._waiting: list[Matrix] = []
        self._position = 0
        self.targets: list[Matrix] = []

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: Any) -> Matrix:
        assert isinstance(index, slice) and index.start == self._position, "rows are streamed, so only the next ones can be had"
        wanted = index.stop - index.start
        while sum(len(matrix) for matrix in self._waiting) < wanted:
            matrix, target = next(self._batches)
            self._waiting.append(matrix)
            self.targets.append(target)
        found = np.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting = [found[wanted:]] if len(found) > wanted else []
        self._position = index.stop
        return found[:wanted]


def join(first: str, second: str) -> str:
    """Put the trees of one model text behind those of another; the second was boosted from the first one's scores."""
    head, trees = _split(first)
    more = _split(second)[1]
    numbered = [re.sub(r"^Tree=\d+", f"Tree={i}", tree) for i, tree in enumerate(trees + more)]
    head = re.sub(r"^tree_sizes=.*$", "tree_sizes=" + " ".join(str(len(tree.encode())) for tree in numbered), head, flags=re.M)
    return head + "".join(numbered) + first[first.index("end of trees") :]


def _split(text: str) -> tuple[str, list[str]]:
    body = text[: text.index("end of trees")]
    starts = [match.start() for match in re.finditer(r"^Tree=\d+", body, flags=re.M)]
    borders = [*starts, len(body)]
    return body[: borders[0]], [body[a:b] for a, b in itertools.pairwise(borders)]
