"""How LightGBM is trained data-parallel over any number of workers, larger than memory.

Every worker streams its row range into LightGBM's binned form, about one byte a value; no worker holds its raw rows. What each
rank keeps is rows x (columns (x 2 over 256 bins) + 12 + 20 x outputs) bytes, the reference sample and one row group.

Bins are made on every rank from the same row sample before the network exists. Both obvious ways are silently wrong: a Dataset
constructed before the Booster is binned from the rank's own rows, so the ranks grow different trees; one constructed by the
Booster bins each feature from a single rank's rows.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any, Final

import lightgbm as lgb
import numpy as np
import pyarrow as pa

from pipelines.metrics import Metrics
from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_params import LightGBMParams
from pipelines.models.model import Matrix
from pipelines.tasks import Task

if TYPE_CHECKING:
    from pipelines.training.worker import Worker

ROW_WISE_BYTES: Final = 128 << 20


class Boosting:
    """One fit on one rank, from the start or from a checkpoint."""

    def __init__(self, params: LightGBMParams, task: Task, worker: Worker) -> None:
        self._params, self._task, self._worker = params, task, worker
        self._start = worker.start
        self._metric = params.metric or task.loss_metric
        self._best_step: int | None = worker.start.state.get("best_step") if worker.start else None
        self._best: float | None = worker.start.state.get("best") if worker.start else None

    def run(self) -> None:
        worker, params = self._worker, self._params
        train = self._dataset("train", self._reference())
        valid = self._dataset("valid", train) if worker.rows("valid") else None  # LightGBM refuses a Dataset without rows
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

    @property
    def _bins(self) -> int:
        """Bytes of a rank's binned rows."""
        return self._worker.total_rows("train") // self._worker.size * len(self._worker.columns)

    def _settings(self) -> dict[str, Any]:
        settings = self._params.settings(self._task, self._worker.columns, self._start.step if self._start else 0)
        return settings | {
            "metric": "none",
            "tree_learner": "data" if self._worker.size > 1 else "serial",
            "pre_partition": True,
            "num_threads": self._worker.threads,
            "verbosity": -1,
            # Bits: how histograms are built is otherwise chosen by timing. By rows is faster and keeps a second copy of the bins.
            "deterministic": True,
            "force_row_wise": self._bins <= ROW_WISE_BYTES,
            "force_col_wise": self._bins > ROW_WISE_BYTES,
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
        reference = lgb.Dataset(sample, params=settings, categorical_feature=categorical).construct()
        pa.default_memory_pool().release_unused()
        return reference

    def _dataset(self, split: str, reference: lgb.Dataset) -> lgb.Dataset:
        rows = Rows(self._worker, split)
        dataset = lgb.Dataset(rows, reference=reference, params=reference.get_params())
        dataset.construct()
        dataset.set_label(np.concatenate(rows.targets) if rows.targets else np.array([]))
        if self._start is not None and self._params.boosting != "rf":  # whose trees do not stand on one another
            assert isinstance(self._start.model, LightGBM)
            scores = [self._start.model.raw(matrix) for matrix, _ in self._worker.batches(split)]
            if scores:
                dataset.set_init_score(np.concatenate(scores).ravel(order="F"))
        return dataset

    def _evaluate(self, booster: lgb.Booster, step: int, valid: lgb.Dataset | None) -> None:
        if not self._worker.total_rows("valid"):
            self._worker.log(step, {}, total=self._params.rounds)
            return
        metrics = Metrics(self._task)  # of a rank without a valid row: nothing, and the others wait for it
        if valid is not None:
            booster.eval_valid(feval=lambda scores, data: self._add(metrics, scores, data))
        result = Metrics.merge(self._task, self._worker.gather(f"valid-{step}", metrics.state())).result()
        self._worker.log(step, {"valid": result}, total=self._params.rounds)
        value = result[self._metric]
        if value is not None and (self._best is None or self._better(value, self._best)):
            self._best, self._best_step = value, step

    def _better(self, value: float, than: float) -> bool:
        return value > than if self._task.higher_is_better(self._metric) else value < than

    def _add(self, metrics: Metrics, probabilities: Matrix, data: lgb.Dataset) -> list[tuple[str, float, bool]]:
        """LightGBM hands over answers, not raw scores; the logarithm brings logits back."""
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
            text = join(self._start.model.booster.model_to_string(num_iteration=-1), text)
        model = LightGBM.of_text(text)
        return model if rounds is None else LightGBM.of_text(model.booster.model_to_string(num_iteration=rounds))


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
