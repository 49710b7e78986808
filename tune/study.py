"""What a search remembers: Optuna's study, kept as a journal in the run's folder, and the sampler that learns from it.

The journal has Optuna's own format, a line of JSON per event; `optuna-dashboard study.journal` opens it. It is all that a search
needs to go on: no state of a searcher is kept anywhere else.
"""

from __future__ import annotations

import contextlib
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from pipelines.errors import SpecError
from pipelines.storage import Folder
from tune.objective import Direction
from tune.space import Point, distributions, grid, params_of, within
from tune.spec import Space, TuneSpec

JOURNAL: Final = "study.journal"
FROM: Final = "from"
"""The attribute of a trial that another search has tried: which run."""


class Journal(BaseJournalBackend):
    """A journal in a folder of any file system, which this process alone writes.

    A local file has each line at once. An object store cannot append: there the whole file is written by `flush`.
    """

    def __init__(self, folder: Folder, name: str = JOURNAL) -> None:
        self._folder, self._name, self._flushed = folder, name, True
        text = folder.read_bytes(name).decode() if folder.exists(name) else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill left half a line
            folder.write_bytes(name, whole.encode())
        self._logs: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        self._logs += [json.loads(line) for line in lines]
        if self._folder.is_local:
            self._folder.append_text(self._name, "".join(f"{line}\n" for line in lines))
        else:
            self._flushed = False

    def flush(self) -> None:
        """Write what a store that cannot append has not yet."""
        if not self._flushed:
            text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in self._logs)
            self._folder.write_bytes(self._name, text.encode())
            self._flushed = True


def open_study(journal: Journal, name: str, tune: TuneSpec, directions: list[Direction]) -> optuna.Study:
    """Open the study of a run, or begin it."""
    with quiet():
        storage = JournalStorage(journal)
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        # A searcher that goes on must not begin with the same random numbers again.
        study.sampler = sampler_of(tune, tune.seed + len(study.get_trials(deepcopy=False)))
    return study


def sampler_of(tune: TuneSpec, seed: int) -> optuna.samplers.BaseSampler:
    """The searcher, in Optuna's words."""
    samplers = optuna.samplers
    with quiet():
        match tune.searcher:
            case "bayesian":
                return samplers.TPESampler(
                    seed=seed, multivariate=True, group=True, constant_liar=True, warn_independent_sampling=False
                )
            case "gp":
                return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
            case "cmaes":
                return samplers.CmaEsSampler(seed=seed, consider_pruned_trials=True, warn_independent_sampling=False)
            case "genetic":
                return samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, tune.trials // 4)))
            case "random" | "grid":  # the points of a grid wait in the study
                return samplers.RandomSampler(seed=seed)


def begin(study: optuna.Study, tune: TuneSpec, first: Sequence[Point], known: Iterable[tuple[str, FrozenTrial]]) -> None:
    """Put in a new study what is known before its first trial: the trials of others, and the points to try first.

    `known` are trials of earlier searches with the run that made them. A grid is tried in random order where there are fewer
    trials than points: its beginning is but a corner.
    """
    for run, trial in known:
        _check_same(run, trial, tune.space)
        trial.user_attrs[FROM] = run
        study.add_trial(trial)
    points = [*first, *tune.points]
    if tune.searcher == "grid":
        rest = grid(tune.space)
        if len(rest) > tune.trials:
            random.Random(tune.seed).shuffle(rest)
        points = [*tune.points, *rest]
    seen: list[dict[str, Any]] = []
    for point in points:
        params = params_of(tune.space, point)
        if params and params not in seen:
            seen.append(params)
            study.enqueue_trial(params)


def read_study(folder: Folder, run: str) -> list[tuple[str, FrozenTrial]]:
    """The ended trials of an earlier search, each with its run; raises `SpecError` where there are none."""
    if not folder.exists(JOURNAL):
        raise SpecError(f"tune.warm_start: the run {folder} is no search: it has no {JOURNAL}")
    with quiet():
        storage = JournalStorage(Journal(folder))
        studies = storage.get_all_studies()
        trials = [trial for one in studies for trial in storage.get_all_trials(one._study_id)]
    return [(run, trial) for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def own(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The trials of this search in these states; those of the searches that it learns from do not count."""
    return [trial for trial in study.get_trials(deepcopy=False, states=states or None) if FROM not in trial.user_attrs]


def point_of(trial: FrozenTrial) -> Point:
    """What was tried."""
    found: Point = json.loads(trial.user_attrs["point"])
    return found


def baseline(space: Space, values: dict[str, Any]) -> list[Point]:
    """The Spec's own settings as the first point, where they lie in the space."""
    return [values] if within(space, values) else []


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's news and warnings to itself: which of its parts are experimental is our business."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _check_same(run: str, trial: FrozenTrial, space: Space) -> None:
    """Raise `SpecError` where a trial of an earlier search is none of this space."""
    mine = distributions(space)
    for name, theirs in trial.distributions.items():
        if name not in mine:
            raise SpecError(
                f"tune.warm_start: the search {run} varied {name}, which tune.space does not; give both the same space"
            )
        if mine[name] != theirs:
            raise SpecError(
                f"tune.warm_start: the search {run} varied {name} otherwise than tune.space; give both the same space"
            )
    if missing := [name for name in space if name not in trial.distributions]:
        raise SpecError(f"tune.warm_start: the search {run} did not vary {missing[0]}; give both the same space")
