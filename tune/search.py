"""tune: many trials of one Spec, and the best of them trained and evaluated as a Run.

RUN/
    search.yaml      the Spec of the search
    search.json      until the run is complete: who searches, and what the search needs to go on besides the study
    study.journal    Optuna's study, see study.py
    trials/          a child Run each, see trials.py
    learned.json     history, importance of the parameters, and the axes of the space; see learned.py
    winner.yaml      the best trial's Spec
    spec.yaml run.json metrics.jsonl artifact/   of the winner, trained again
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from optuna.trial import FrozenTrial, TrialState

from pipelines.errors import ClusterError, DataError, SpecError, UserError
from pipelines.evaluate import check_requirements
from pipelines.explain import checked
from pipelines.notation import read_yaml, to_yaml
from pipelines.parent import Parent
from pipelines.prepare import Prepared, prepare
from pipelines.progress import SILENT, Progress
from pipelines.runs import BEGUN, RECORD, SEARCH, Run, RunStore, driver
from pipelines.storage import to_json
from pipelines.train import family_of, parameters, run
from pipelines.training.trainer import END_S, POLL_S, Team, in_background
from tune.layout import Layout, Room
from tune.learned import learned
from tune.objective import Objective
from tune.space import Point, count, grid
from tune.spec import SearchedSpec, axes
from tune.study import Journal, baseline, begin, open_study, own, point_of, read_study
from tune.trials import Going, Trials, clean

if TYPE_CHECKING:
    from tune.searcher import Asking
    from tune.trial import TrialJob

S = TypeVar("S", bound=SearchedSpec)

YAML: Final = "search.yaml"
WINNER: Final = "winner.yaml"
LEARNED: Final = "learned.json"
GRID: Final = 100_000
"""Points at most."""
ENVIRONMENT: Final = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the child Runs have it all
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # the study remembers
    "RAY_AIR_NEW_OUTPUT": "0",  # its own table would go to stdout
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "1000000",
}


@dataclass(frozen=True)
class Begun:
    """What a search was found to be when it began; one that goes on takes it as it is."""

    metrics: list[str]
    layout: dict[str, Any]
    seconds: float
    """Searched so far."""


def search(spec: S, *, resume: Run | None = None, progress: Progress = SILENT, free_slots: Callable[[], float]) -> Run:
    """Search, train the winner and return the complete Run. Raises as `run` does, and for a space that cannot be searched.

    `resume` is a search that was interrupted, of which `spec` is the Spec: trials that have ended count, and those under way
    go on from their checkpoints.
    """
    check(spec)
    made, work = _begin(spec, progress, free_slots) if resume is None else _go_on(resume, spec, progress, free_slots)
    fitting = made if made.folder.exists(BEGUN) else None  # the search was over, and its winner trained, when it was interrupted
    if fitting is None:
        with _resumable(made, work):
            work.run(progress, free_slots)
    winner, facts = work.won()
    progress.note(f"tune: trial {facts['tune']['winner']} wins ({facts['tune']['rule']}); it is trained and evaluated now")
    if fitting is not None:
        winner = checked(type(spec), read_yaml(made.folder.read_bytes("spec.yaml").decode(), "spec.yaml"))
    try:
        return run(winner, resume=fitting, into=made, command="tune", more=facts, progress=progress, free_slots=free_slots)
    finally:
        if made.folder.exists(RECORD):
            made.folder.remove(SEARCH)


@contextlib.contextmanager
def _resumable(made: Run, work: Search) -> Iterator[None]:
    """Say of whatever ends a search in the middle what is known so far, and how it goes on."""
    try:
        yield
    except BaseException as error:
        error.add_note("; ".join([*filter(None, [work.best()]), f"to go on: heliostat tune --resume {made.path}"]))
        raise


def check(spec: SearchedSpec) -> None:
    """Raise `SpecError` for a search that cannot work, before any data is read."""
    if spec.tune is None:
        raise SpecError(
            "tune: the Spec says nothing of a search; add tune.space, such as {model.params.num_leaves: {int: [15, 255]}}"
        )
    parameters(spec)
    if spec.tune.searcher == "grid" and (points := count(spec.tune.space)) > GRID:
        raise SpecError(
            f"tune.searcher: the grid has {points:,} points, more than {GRID:,}; lower steps, or take another searcher"
        )
    if spec.tune.folds and (spec.data.split.by == "time" or isinstance(spec.data.source, dict)):
        raise SpecError("tune.folds: rows are divided by chance, but the Spec divides them by time or by source; take folds out")
    for path, axis, opening in axes(spec.tune.space):
        problems: list[str] = []
        for value in axis.extremes:
            ends = [{other: each.extremes[at] for other, each in spec.tune.space.items()} for at in (0, -1)]
            tries = [{**opening, path: value}, *({**end, **opening, path: value} for end in ends)]
            wrong = []
            for point in tries:
                try:
                    parameters(spec.replace({**point, "tune": None}))
                    break
                except SpecError as error:
                    wrong.append(str(error))
            else:
                problems.append(wrong[0])
        if problems:
            raise SpecError(f"tune.space '{path}': a trial cannot have it: {problems[0]}")


def _begin(spec: SearchedSpec, progress: Progress, free_slots: Callable[[], float]) -> tuple[Run, Search]:
    """Prepare the first trial's data, plan, and create the run with its study."""
    tune = spec.tune
    assert tune is not None
    known = [trial for reference in tune.warm_start for trial in _known(spec.store, reference)]
    first = first_points(spec)
    shown = folded(spec.replace(_of_data(first[0]) if first else {}), tune.folds)[0]
    free = free_slots()  # before Ray Data takes some: Ray tells a moment late that they are free again
    prepared = prepare(shown, progress=progress)
    family, params, gpus = family_of(shown)
    task = family.check(params, prepared.task, prepared.shards, 1)
    objective = Objective.of(tune, task)
    check_requirements(spec, task)
    if not prepared.rows["valid"]:
        raise DataError("tune: trials are compared on the valid split, which has no rows; set data.split.valid above 0")
    if tune.refit == "all" and isinstance(spec.data.source, dict) and "valid" in spec.data.source:
        raise SpecError("tune.refit: all takes the valid rows for training, but data.source gives them apart; set refit: train")
    if tune.refit == "all" and rounds_of(family) is None:
        raise SpecError(
            f"tune.refit: all needs a number of rounds or epochs, which '{spec.model.type}' has not; set refit: train"
        )
    size = family.memory(params, prepared.rows["train"], len(prepared.shards.features), task.outputs)
    layout = Layout.plan(tune, spec.train, _rooms(), free=free, gpus=gpus, size=size)
    made = Run.create(spec.store, spec.name)
    begun = Begun(list(objective.metrics), asdict(layout), 0.0)
    work = Search(spec, made, objective, layout, begun, {settings_of(shown): prepared})
    begin(work.study, tune, first, known)
    made.folder.write_bytes(YAML, to_yaml(spec).encode())
    made.folder.write_bytes("spec.yaml", to_yaml(spec).encode())
    work.note()
    progress.note(f"trials: {layout.described}")
    return made, work


def _go_on(made: Run, spec: SearchedSpec, progress: Progress, free_slots: Callable[[], float]) -> tuple[Run, Search]:
    """Check that an interrupted search finds the slots that it had, and open it."""
    found = made.folder.read_json(SEARCH)
    made.check_idle(found.pop("driver"))
    begun = Begun(**found)
    assert spec.tune is not None
    objective, layout, free = Objective(tuple(begun.metrics), spec.tune.tolerance), Layout(**begun.layout), free_slots()
    if layout.at_once * layout.workers * layout.cpus > free:
        raise ClusterError(
            f"the search {made.id} goes on with {layout.at_once} trials of {layout.workers * layout.cpus:g} slots each at once, "
            f"and {free:g} slots are free; wait, or join a Ray that has them with --address"
        )
    work = Search(spec, made, objective, layout, begun, {})
    ended, left = len(own(work.study)) - len(own(work.study, TrialState.RUNNING)), len(own(work.study, TrialState.RUNNING))
    progress.note(f"run {made.id} goes on: {ended} trials have ended or wait, {left} were under way")
    work.note()
    return made, work


class Search:
    """A search under way: its study, its trials and the data that they need."""

    def __init__(
        self,
        spec: SearchedSpec,
        made: Run,
        objective: Objective,
        layout: Layout,
        begun: Begun,
        prepared: dict[str, Prepared | UserError],
    ) -> None:
        assert spec.tune is not None
        self._spec, self._tune, self._made, self._objective, self._layout = spec, spec.tune, made, objective, layout
        self._begun, self._prepared = begun, prepared
        self._wanted: queue.SimpleQueue[tuple[str, SearchedSpec]] = queue.SimpleQueue()
        self._asked: set[str] = set(prepared)
        self._seconds = begun.seconds
        self._over = "the search has ended before"
        journal = Journal(made.folder)
        self.study = open_study(journal, f"{made.name}/{made.id}", self._tune, objective.directions)
        self._trials = Trials(spec, made, self.study, journal, objective)

    def note(self) -> None:
        """Write down what the search needs to go on."""
        self._made.folder.write_json(SEARCH, {**asdict(self._begun), "seconds": self._seconds, "driver": driver()})

    def run(self, progress: Progress, free_slots: Callable[[], float]) -> None:
        """Run trials until the budget is used up."""
        from tune.searcher import Asking, Budget
        from tune.stopping import Rule

        budget = Budget(self._tune, self._begun.seconds)
        if (why := budget.spent(self._trials)) is not None:
            self._over = why
            return
        free = free_slots()
        higher = self._objective.higher(self._objective.metrics[0])
        stopping = self._tune.stopping
        rule = None if stopping == "none" else Rule(stopping, higher=higher, grace=self._tune.grace)
        if rule is not None:
            self._remember(rule)
        try:
            with progress.stage("tune", self._tune.trials, unit="trials") as stage:
                stage.advance(sum(self._trials.counts().values()))

                def ended() -> None:
                    self._seconds = budget.seconds
                    self.note()

                asking = Asking(self._trials, budget, rule, self._layout.at_once, self._job, stage, ended)
                self._with_ray_tune(asking, progress)
            self._over = asking.over or self._over
        finally:
            self._seconds = budget.seconds
            self.note()
            self._tidy()
            clean(self._made.folder)
        _wait_for(free_slots, free)

    def won(self) -> tuple[SearchedSpec, dict[str, Any]]:
        """Write down what was learned; return the winner's Spec to train it by, and what the record says of the search."""
        complete = own(self.study, TrialState.COMPLETE)
        if not complete:
            whys = self._trials.errors or [t.user_attrs.get("error", "") for t in own(self.study, TrialState.FAIL)]
            raise DataError(f"tune: no trial came to its end; the last one: {whys[-1] if whys else 'was stopped early'}")
        best, rule = self._objective.winner(complete)
        child = Run.open(self._made.folder / "trials" / f"{best.number:04d}")
        winner = self._write_winner(best)
        self._made.folder.write_json(LEARNED, learned(self.study, self._objective, self._tune.space))
        values = dict(zip(self._objective.metrics, best.values, strict=True))
        front = [trial.number for trial in self._objective.front(complete)] if self._tune.several else [best.number]
        told = {
            "winner": best.number,
            "rule": rule,
            "values": values,
            "point": point_of(best),
            "front": front,
            "metric": list(self._objective.metrics),
            "trials": self._trials.counts(),
            "over": self._over,
            "seconds": self._seconds,
            "cpu_s": self._trials.cpu_s,
            "layout": self._begun.layout,
            "prepared": len(self._prepared),
            "binned": self._trials.made,
            "refit": self._tune.refit,
        }
        # Refitted on all rows it has no valid rows any more: those of the trial are what it competes with.
        metrics = {"valid": child.record["metrics"]["valid"]} if self._tune.refit == "all" else {}
        return self._refit(winner, best, child), {"tune": told, "metrics": metrics, "seconds": {"tune": self._seconds}}

    def best(self) -> str | None:
        """The best trial so far in one line, its Spec being written; None: there is none."""
        complete = own(self.study, TrialState.COMPLETE)
        if not complete:
            return None
        best, _ = self._objective.winner(complete)
        self._write_winner(best)
        values = ", ".join(f"{name} {v:.5g}" for name, v in zip(self._objective.metrics, best.values, strict=True))
        return f"the best of {len(complete)} trials has valid {values}; its Spec is {self._made.path}/{WINNER}"

    def _write_winner(self, best: FrozenTrial) -> SearchedSpec:
        winner = self._spec.replace({**point_of(best), "tune": None})
        self._made.folder.write_bytes(WINNER, to_yaml(winner).encode())
        return winner

    def _refit(self, winner: SearchedSpec, best: FrozenTrial, child: Run) -> SearchedSpec:
        if self._tune.refit == "train":
            return winner
        family, params = parameters(winner)
        name = rounds_of(family)
        assert name is not None
        changes: dict[str, Any] = {"data.split.valid": 0.0, f"model.params.{name}": child.record["step"]}
        if "early_stopping" in type(params).model_fields:
            changes["model.params.early_stopping"] = None
        prepared = self._prepared.get(settings_of(winner)) or prepare(winner) if winner.data.split.by == "time" else None
        if isinstance(prepared, Prepared) and prepared.cuts is not None:
            changes["data.split.cuts"] = prepared.cuts
        return winner.replace(changes)

    def _remember(self, rule: Any) -> None:
        """Let a scheduler know the trials that ended before this process began."""
        for trial in own(self.study, TrialState.COMPLETE, TrialState.PRUNED):
            points: list[tuple[int, float]] = []
            for step, value in sorted(trial.intermediate_values.items()):
                best = points[-1][1] if points and self._objective.better(points[-1][1], value) else value
                points.append((step, best))
            if points:
                rule.remember(trial.number, points, points[-1][0])

    def _job(self, going: Going) -> TrialJob | UserError | None:
        """What the process of a trial needs; None while its data is being prepared. Called by Ray Tune's thread."""
        from tune.trial import TrialJob

        specs = folded(going.spec, self._tune.folds)
        found = [self._prepared_for(spec) for spec in specs]
        if None in found:
            return None
        layout = self._layout
        try:
            parent = Parent.of(going.spec)
            spec = parent.inherit(going.spec) if parent else going.spec
            family, params = parameters(spec)
            parts = []
            for prepared in found:
                if isinstance(prepared, UserError):
                    return prepared
                assert prepared is not None
                parts.append((family.check(params, prepared.task, prepared.shards, layout.workers), prepared.shards))
        except UserError as error:
            return error
        return TrialJob(
            model=spec.model.model_copy(update={"params": params.model_dump()}),
            train=spec.train,
            parts=parts,
            folder=going.run.folder,
            team=Team(layout.workers, layout.cpus, layout.threads, layout.gpu),
            costs=self._objective.costs,
            shared=self._shared,
            parent=parent.model if parent else None,
        )

    def _prepared_for(self, spec: SearchedSpec) -> Prepared | UserError | None:
        """What was prepared for a Spec, or why it could not be; None: it is asked for."""
        key = settings_of(spec)
        if key not in self._prepared and key not in self._asked:
            self._asked.add(key)
            self._wanted.put((key, spec))
        return self._prepared.get(key)

    @property
    def _shared(self) -> str:
        return f"heliostat-{self._made.id}"

    def _with_ray_tune(self, asking: Asking, progress: Progress) -> None:
        """Let Ray Tune run trials, and prepare here what they ask for."""
        import ray.tune

        from tune.stopping import Deciding
        from tune.trial import Trainee

        stop = _Stop()
        with tempfile.TemporaryDirectory(prefix="heliostat-") as aside, _environment():
            tuner = ray.tune.Tuner(
                ray.tune.with_resources(Trainee, ray.tune.PlacementGroupFactory([self._resources()])),
                tune_config=ray.tune.TuneConfig(
                    search_alg=asking,
                    scheduler=Deciding(asking),
                    num_samples=-1,
                    reuse_actors=True,
                    max_concurrent_trials=self._layout.at_once,
                ),
                run_config=ray.tune.RunConfig(storage_path=aside, name="search", verbose=0, stop=stop.of(ray.tune.Stopper)),
            )
            done = in_background(tuner.fit)
            try:
                while not done.done():
                    self._prepare_next(progress)
            finally:
                stop.now.set()
                concurrent.futures.wait([done], timeout=END_S)
            done.result()

    def _prepare_next(self, progress: Progress) -> None:
        """Prepare what a trial waits for, if there is one."""
        try:
            key, spec = self._wanted.get(timeout=POLL_S)
        except queue.Empty:
            return
        try:
            self._prepared[key] = prepare(spec, progress=progress)
        except UserError as error:
            self._prepared[key] = error

    def _resources(self) -> dict[str, float]:
        """What Ray reserves for a trial. One that has workers of its own takes nothing but a place beside the driver."""
        layout = self._layout
        if layout.workers > 1 or layout.cpus == 0:
            import ray

            return {f"node:{ray.util.get_node_ip_address()}": 0.001}
        return {"CPU": layout.cpus, **({"GPU": 1.0} if layout.gpu else {})}

    def _tidy(self) -> None:
        """Delete on every node what the trials have shared."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from tune.trial import forget

        task = ray.remote(num_cpus=0, max_retries=0)(forget)
        places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
        asked = [task.options(scheduling_strategy=place).remote(self._shared) for place in places]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(asked, timeout=END_S)


class _Stop:
    """Ends all trials, from another thread."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def of(self, base: Any) -> Any:
        """As Ray Tune wants it."""
        from tune.stopping import Unkept

        now = self.now

        class Stopping(Unkept, base):  # type: ignore[misc]
            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return now.is_set()

        return Stopping()


def first_points(spec: SearchedSpec) -> list[Point]:
    """The Spec's own settings, if they lie in the space: no search ends worse than it began.

    Where they do not, and trials differ in their data, the first settings of the data. Of a grid, its first point.
    """
    tune = spec.tune
    assert tune is not None
    if tune.searcher == "grid":
        return grid(tune.space)[:1]
    _, params = parameters(spec)
    values = {**spec.model_dump(by_alias=True), "model": {**spec.model.model_dump(by_alias=True), "params": params.model_dump()}}
    own_values = {path: _at(values, path) for path, _, _ in axes(tune.space)}
    found = baseline(tune.space, own_values)
    if found or not tune.reaches_data:
        return found
    return [_of_data({path: axis.extremes[0] for path, axis in tune.space.items()})]


def folded(spec: S, folds: int | None) -> list[S]:
    """The Spec, or one for each fold."""
    return [spec] if folds is None else [spec.replace({"data.split.fold": [i, folds]}) for i in range(folds)]


def _of_data(point: Point) -> Point:
    """What of a point decides the prepared data."""
    return {path: value for path, value in point.items() if not path.startswith("model.params")}


def settings_of(spec: SearchedSpec) -> str:
    """All in a Spec that its prepared data depends on, as text."""
    model = {"type": spec.model.type, "from": spec.model.from_}
    sections = [section.model_dump() for section in (spec.data, spec.task, spec.features, spec.prepare)]
    return to_json([*sections, model])


def rounds_of(family: Any) -> str | None:
    """What the family calls the length of a fit."""
    return next((name for name in ("rounds", "epochs", "steps") if name in family.Params.model_fields), None)


def _at(values: Mapping[str, Any], path: str) -> Any:
    found: Any = values
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found


def _known(store: str, reference: str) -> list[tuple[str, FrozenTrial]]:
    found = RunStore.at(store).find(reference)
    return read_study(found.folder, found.id)


def _rooms() -> list[Room]:
    import ray

    found = [(node["Resources"].get("CPU", 0.0), node["Resources"].get("memory", 0.0)) for node in ray.nodes() if node["Alive"]]
    return [Room(slots, int(memory)) for slots, memory in found if slots >= 1]


def _wait_for(free_slots: Callable[[], float], wanted: float) -> None:
    """Wait until the trials' processes have given their slots back."""
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ClusterError):
            if free_slots() >= wanted:
                return
        time.sleep(0.1)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Ray Tune's settings, for as long as it works."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
