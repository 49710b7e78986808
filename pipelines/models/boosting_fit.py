"""How LightGBM is trained data-parallel over any number of workers, larger than memory.

Every worker streams its row range into LightGBM's binned form, about one byte a value; no worker holds its raw rows. What each
rank keeps is rows x (columns (x 2 over 256 bins) + 12 + 28 x outputs) bytes (8 more a row where rows start from scores of their
own), the reference sample and one row group.

Bins are made on every rank from the same row sample before the network exists. Both obvious ways are silently wrong: a Dataset
constructed before the Booster is binned from the rank's own rows, so the ranks grow different trees; one constructed by the
Booster bins each feature from a single rank's rows.

A fit is a chain of segments of `model.params.segment` rounds. Each is a Booster of its own on the same binned rows, seeded by
(seed, segment) and started from the raw scores so far. Nothing but trees and scores goes from one to the next, so a fit that goes
on from a checkpoint, which stands at the end of a segment, ends with the bits of one that was never disturbed, sampling or not.
Dart, random forests and goss are one segment and start anew: dart changes earlier trees later on, a forest's trees start from no
scores, and goss uses all rows in a segment's first rounds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import lightgbm as lgb
import numpy as np
import pyarrow as pa

from pipelines.metrics import Metrics, sizes_of
from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_params import LightGBMParams
from pipelines.models.model import Matrix
from pipelines.tasks import Task

if TYPE_CHECKING:
    from pipelines.training.worker import Worker

ROW_WISE_BYTES: Final = 128 << 20
BINNING: Final = (
    "max_bin",
    "max_bin_by_feature",
    "min_data_in_bin",
    "use_missing",
    "zero_as_missing",
    "device_type",
    "feature_pre_filter",
    "pre_partition",
)
"""What LightGBM is told that decides how rows are binned, besides the rows themselves and which columns are categorical."""

BESIDE: Final = ("weight", "sizes")


class Binned(NamedTuple):
    """A rank's rows in bins."""

    train: lgb.Dataset
    valid: lgb.Dataset | None
    weight: Matrix | None = None
    """Of the valid rows; with their queries for our metrics alone, LightGBM's are not asked for."""
    sizes: Any = None
    """Rows of each query of the valid rows."""


class Boosting:
    """One fit on one rank, from the start or from a checkpoint."""

    def __init__(self, params: LightGBMParams, task: Task, worker: Worker) -> None:
        self._params, self._task, self._worker = params, task, worker
        self._start = worker.start
        self._rounds = params.rounds_of_segment(worker.checkpoint_every)
        self._checkpoint = max(1, worker.checkpoint_every // self._rounds) * self._rounds
        self._metric = params.metric or task.loss_metric
        self._best_step: int | None = worker.start.state.get("best_step") if worker.start else None
        self._best: float | None = worker.start.state.get("best") if worker.start else None

        self._text: str | None = None
        """Of all trees so far, on rank 0."""
        self._before = 0
        """Rounds of an earlier run that this fit goes on from."""
        if worker.start is not None:
            assert isinstance(worker.start.model, LightGBM)
            self._before = worker.start.state.get("before", worker.start.model.rounds)
            self._text = worker.start.model.booster.model_to_string(num_iteration=-1) if worker.rank == 0 else None

    def run(self) -> None:
        worker, params = self._worker, self._params
        if worker.start is not None and "final" in worker.start.state:  # lost behind the last report
            worker.report(worker.start.step, worker.start.model if worker.rank == 0 else None, worker.start.state)
            return
        train, valid, self._weight, self._sizes = self._datasets()
        self._set_scores(train, "train")
        if valid is not None:
            self._set_scores(valid, "valid")
        step = worker.start.step if worker.start else 0
        stop = self._stopped(step)
        booster: lgb.Booster | None = None
        with connected(worker.network, self._settings(), train) as network:
            while step < params.rounds and not stop:
                booster = booster or self._segment(step, network, train, valid)
                stop = booster.update()  # true when no leaf can be split any more; the same on every rank
                step += 1
                if step % params.eval_every == 0 or step == params.rounds or stop:
                    self._evaluate(booster, step, valid)
                    stop = stop or self._stopped(step)
                if step % self._rounds == 0 and step < params.rounds and not stop:
                    self._text, scores = self._joined(booster), self._scores(booster, train, valid)  # which ends its objective
                    booster = None  # before the scores go into the Datasets: one copy less at the peak
                    while scores:
                        dataset, raw = scores.pop()
                        dataset.set_field("init_score", raw)
                    if step % self._checkpoint == 0:
                        worker.report(step, self._model(None) if worker.rank == 0 else None, self._state())
            if booster is not None:
                self._text = self._joined(booster)
            best = self._best_step if self._best_step is not None and params.early_stopping else step
            worker.report(step, self._model(best) if worker.rank == 0 else None, {**self._state(), "final": best})

    def _segment(self, step: int, network: dict[str, Any], train: lgb.Dataset, valid: lgb.Dataset | None) -> lgb.Booster:
        """The Booster of the segment that begins behind round `step`; the Datasets have the scores that it starts from."""
        settings = {**self._settings(step // self._rounds), **network}
        if step > 0 or self._start is not None:
            settings["boost_from_average"] = False  # the start value is in the first tree of all, the same on every rank
        booster = lgb.Booster(settings, train)
        if valid is not None:
            booster.add_valid(valid, "valid")
        return booster

    def _scores(self, booster: lgb.Booster, train: lgb.Dataset, valid: lgb.Dataset | None) -> list[tuple[lgb.Dataset, Matrix]]:
        """The raw scores so far of each Dataset, for the next segment to start from; this one's Booster is then done with.

        LightGBM adds tree after tree to them in float64, and `Booster.predict` of the whole model adds the same leaf values in
        the same order: a resume that predicts has the same bits. Where rows start from scores of their own, it is `raw_from`
        that does.
        """
        found: list[tuple[lgb.Dataset, Matrix]] = []

        def keep(scores: Matrix, dataset: lgb.Dataset) -> list[tuple[str, float, bool]]:
            found.append((dataset, scores.ravel(order="F")))
            return []

        train.set_field("init_score", None)
        booster.reset_parameter({"objective": "none"})  # scores are now handed out raw
        booster.eval_train(feval=keep)
        if valid is not None:
            valid.set_field("init_score", None)
            booster._Booster__is_predicted_cur_iter[1] = False  # type: ignore[attr-defined]  # else those of the last look
            booster.eval_valid(feval=keep)
        return found

    @property
    def _bins(self) -> int:
        """Bytes of a rank's binned rows."""
        return self._worker.total_rows("train") // self._worker.size * len(self._worker.columns)

    def _settings(self, segment: int = 0) -> dict[str, Any]:
        settings = self._params.settings(self._task, self._worker.columns, segment)
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

    @property
    def _categorical(self) -> list[int]:
        return [
            i
            for i, column in enumerate(self._worker.columns)
            if column.kind == "categorical" and (column.cardinality or 0) <= self._params.max_category
        ]

    def _datasets(self) -> Binned:
        """This rank's train and valid rows in bins; those of an earlier fit with the same bins, where fits share them."""
        shared = self._worker.shared
        if shared is None or self._worker.size > 1:
            return self._bin()
        settings = self._settings()
        binning = {name: settings[name] for name in BINNING if name in settings}
        parts = [str(self._worker.shards.folder), self._categorical, binning, self._worker.class_weights]
        return shared.get(parts, self._save, self._open)

    def _bin(self) -> Binned:
        rows = Rows(self._worker, "train")
        train = self._dataset(rows, self._reference())
        if rows.weights:
            train.set_weight(np.concatenate(rows.weights))
        if self._task.group is not None:
            train.set_group(sizes_of(np.concatenate(rows.groups)))
        if not self._worker.rows("valid"):
            return Binned(train, None)  # LightGBM refuses one without rows
        rows = Rows(self._worker, "valid")
        valid = self._dataset(rows, train)
        weight = np.concatenate(rows.weights) if rows.weights else None
        return Binned(train, valid, weight, sizes_of(np.concatenate(rows.groups)) if rows.groups else None)

    def _save(self, folder: Path) -> None:
        """Bin the rows and write them in LightGBM's binary format."""
        binned = self._bin()
        (folder / "params.json").write_text(json.dumps(binned.train.get_params()))  # LightGBM opens the files with no others
        binned.train.save_binary(folder / "train.bin")
        if binned.valid is not None:
            binned.valid.save_binary(folder / "valid.bin")
        for name in BESIDE:
            if getattr(binned, name) is not None:
                np.save(folder / f"{name}.npy", getattr(binned, name), allow_pickle=False)

    def _open(self, folder: Path) -> Binned:
        params = json.loads((folder / "params.json").read_text())
        train = lgb.Dataset(folder / "train.bin", params=params).construct()
        file = folder / "valid.bin"
        valid = lgb.Dataset(file, reference=train, params=params).construct() if file.exists() else None
        beside = {name: np.load(folder / f"{name}.npy") for name in BESIDE if (folder / f"{name}.npy").exists()}
        return Binned(train, valid, **beside)

    def _reference(self) -> lgb.Dataset:
        """The bins, from the row sample that every rank reads."""
        sample = self._worker.shards.sample()
        settings = {**self._settings(), "tree_learner": "serial", "bin_construct_sample_cnt": max(1, len(sample))}
        reference = lgb.Dataset(sample, params=settings, categorical_feature=self._categorical).construct()
        pa.default_memory_pool().release_unused()
        return reference

    def _dataset(self, rows: Rows, reference: lgb.Dataset) -> lgb.Dataset:
        dataset = lgb.Dataset(rows, reference=reference, params=reference.get_params())
        dataset.construct()
        dataset.set_label(np.concatenate(rows.targets) if rows.targets else np.array([]))
        return dataset

    def _set_scores(self, dataset: lgb.Dataset, split: str) -> None:
        """Let the rows have the raw scores that the fit starts from, whatever an earlier fit left: their own, if they have some,
        and its start's."""
        dataset.set_field("init_score", None)
        scores = list(self._first_scores(split))
        if scores:
            dataset.set_field("init_score", np.concatenate(scores).ravel(order="F"))

    def _first_scores(self, split: str) -> Iterator[Matrix]:
        """Yield them a row group at a time; nothing where all rows start from 0."""
        if self._start is None:
            if self._task.init_score is not None:
                yield from self._worker.init_scores(split)
        elif self._params.boosting != "rf":  # whose trees do not stand on one another
            assert isinstance(self._start.model, LightGBM)
            model = self._start.model
            for batch in self._worker.batches(split):
                yield model.raw(batch.matrix) if batch.init_score is None else model.raw_from(batch.matrix, batch.init_score)

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
        raw = probabilities
        if self._task.classes is not None:
            with np.errstate(divide="ignore"):
                log = np.log(probabilities)
                raw = log if self._task.type == "multiclass" else log - np.log1p(-probabilities)
        metrics.add(np.asarray(data.get_label()), raw, self._weight, self._sizes)
        return []

    def _stopped(self, step: int) -> bool:
        patience = self._params.early_stopping
        return patience is not None and self._best_step is not None and step - self._best_step >= patience

    def _state(self) -> dict[str, Any]:
        return {"best": self._best, "best_step": self._best_step, "before": self._before}

    def _joined(self, booster: lgb.Booster) -> str | None:
        """The text of all trees so far, on rank 0: what was there before, then this segment's."""
        if self._worker.rank > 0:
            return None
        text = booster.model_to_string(num_iteration=-1)
        return text if self._text is None else join(self._text, text)

    def _model(self, rounds: int | None) -> LightGBM:
        """The trees so far, on rank 0; cut after `rounds` rounds of this fit."""
        assert self._text is not None
        model = LightGBM.of_text(self._text)
        if rounds is None or self._before + rounds >= model.rounds:
            return model
        return LightGBM.of_text(model.booster.model_to_string(num_iteration=self._before + rounds))


@contextlib.contextmanager
def connected(network: dict[str, Any], settings: dict[str, Any], reference: lgb.Dataset) -> Iterator[dict[str, Any]]:
    """Connect the ranks for the whole fit and yield what a Booster must be told of it.

    A Booster that connects them itself would also part them when it is freed, and every segment has its own.
    """
    if not network:
        yield {}
        return
    least = {"objective": "none", "boosting": "gbdt", "tree_learner": "serial", "device_type": "cpu", "num_leaves": 2}
    holder = lgb.Booster({**settings, **least}, reference)
    holder.set_network(
        machines=network["machines"],
        local_listen_port=network["local_listen_port"],
        listen_time_out=network.get("time_out", 120),
        num_machines=network["num_machines"],
    )
    try:
        yield {"num_machines": network["num_machines"]}
    finally:
        holder.free_network()


class Rows(lgb.Sequence):
    """The rows of a rank as LightGBM asks for them, front to back; keeps their targets, weights and queries."""

    batch_size = 65_536

    def __init__(self, worker: Worker, split: str) -> None:
        self._batches = worker.batches(split)
        self._rows = worker.rows(split)
        self._waiting: list[Matrix] = []
        self._position = 0
        self.targets: list[Matrix] = []
        self.weights: list[Matrix] = []
        """None where all rows weigh the same."""
        self.groups: list[Any] = []

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: Any) -> Matrix:
        assert isinstance(index, slice) and index.start == self._position, "rows are streamed, so only the next ones can be had"
        wanted = index.stop - index.start
        while sum(len(matrix) for matrix in self._waiting) < wanted:
            batch = next(self._batches)
            self._waiting.append(batch.matrix)
            self.targets.append(batch.target)
            if batch.weight is not None:
                self.weights.append(batch.weight)
            if batch.group is not None:
                self.groups.append(batch.group)
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
