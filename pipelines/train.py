"""train: from prepared shards to an Artifact in a complete Run; `run` evaluates it besides."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from pipelines.artifact import keep_answers, write_manifest
from pipelines.attribution import IMPORTANCE, Attribution
from pipelines.cache import MANIFEST, Address
from pipelines.data.source import Source
from pipelines.errors import ArtifactError, ClusterError, DataError, SpecError
from pipelines.evaluate import Evaluation, check_requirements, evaluate, require
from pipelines.explain import checked
from pipelines.models.model import Explaining
from pipelines.notation import to_yaml
from pipelines.parent import Parent
from pipelines.prepare import PARTS, Prepared, prepare
from pipelines.progress import SILENT, Progress
from pipelines.registry import MODELS, load
from pipelines.runs import Begun, Run, versions
from pipelines.spec import PipelineSpec
from pipelines.storage import Folder, to_json
from pipelines.tasks import Task
from pipelines.training.trainer import Fit, Team, checkpoint_every, fit
from pipelines.training.worker import STATE, last_checkpoint

S = TypeVar("S", bound=PipelineSpec)


def train(spec: PipelineSpec, *, resume: Run | None = None, progress: Progress = SILENT, free_slots: Callable[[], float]) -> Run:
    """Prepare, train on the cluster and return the complete Run, without test metrics.

    `free_slots` tells how many CPU slots the workers may take; it is asked once, when they are about to start. `resume` is an
    interrupted run, of which `spec` is the resolved Spec: it goes on from its last checkpoint. Raises `SpecError`, `DataError`,
    `ArtifactError` or `ClusterError` for what the user can mend; a run that fails leaves its folder without a record.
    """
    made, _, facts, _ = _train(spec, resume, "train", progress, free_slots)
    return made.complete(**facts)


def run(
    spec: PipelineSpec,
    *,
    resume: Run | None = None,
    into: Run | None = None,
    command: str = "run",
    more: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
    free_slots: Callable[[], float],
) -> Run:
    """Prepare, train and evaluate. Raises `RequirementError` after the Run is complete when a required metric was missed.

    A search trains its winner with it: `into` its own Run, by its own `command`, with `more` facts for the record. Metrics of a
    split without rows, here, stay those that `more` has.
    """
    made, spec, facts, task = _train(spec, resume, command, progress, free_slots, into)
    with _resumable(made, command):
        found = evaluate(made, spec, progress=progress)
    facts = _with_evaluation(facts, found)
    more = dict(more or {})
    both = {name: {**more.get(name, {}), **facts[name]} for name in ("metrics", "seconds")}
    done = made.complete(**{**facts, **more, **both})
    require(spec, task, found.metrics)
    return done


def _train(
    spec: S,
    resume: Run | None,
    command: str,
    progress: Progress,
    free_slots: Callable[[], float],
    into: Run | None = None,
) -> tuple[Run, S, dict[str, Any], Task]:
    made, spec, prepared, begun = (
        _begin(spec, progress, free_slots, into) if resume is None else _go_on(resume, spec, progress, free_slots)
    )
    started, parent = time.monotonic(), Parent.of(spec)
    with _resumable(made, command):
        left = fit(
            spec.model,
            spec.train,
            Team(**begun.team),
            prepared.task,
            prepared.shards,
            folder=made.folder / "checkpoints",
            metrics=made.folder,
            progress=progress,
            parent=parent.model if parent else None,
        )
        _write_artifact(made, spec, prepared, left)
    facts = _facts(spec, prepared, left, {"prepare": prepared.seconds, "train": time.monotonic() - started})
    facts |= {"resumed": begun.resumed} if begun.resumed else {}
    facts |= {"parent": parent.run.path} if parent else {}
    return made, spec, facts, prepared.task


def _begin(spec: S, progress: Progress, free_slots: Callable[[], float], into: Run | None) -> tuple[Run, S, Prepared, Begun]:
    """Prepare, resolve the Spec and create the run, unless it is there."""
    parent = Parent.of(spec)
    spec = parent.inherit(spec) if parent else spec
    family, params, gpus = family_of(spec)
    prepared = prepare(spec, progress=progress)
    team = Team.plan(spec.train, free_slots(), gpus, prepared.rows["train"])
    prepared = replace(prepared, task=_checked_task(family, params, prepared, team))
    check_requirements(spec, prepared.task)
    spec, reasons = resolve(spec, prepared, params.model_dump(), team)
    made = into or Run.create(spec.store, spec.name)
    made.folder.write_bytes("spec.yaml", to_yaml(spec, reasons).encode())
    begun = Begun(
        prepared=prepared.path,
        prepare={"reused": prepared.reused, "seconds": prepared.seconds},
        team=asdict(team),
        versions=versions(),
        resumed=[],
    )
    made.begin(begun)
    return made, spec, prepared, begun


def parameters(spec: PipelineSpec) -> tuple[Any, Any]:
    """The family and its parameters, resolved; raises `SpecError` where they are wrong."""
    family = load(MODELS, spec.model.type, "model.type")
    params = checked(family.Params, spec.model.params, ("model", "params"))
    if resolved := getattr(params, "resolved", None):
        params = resolved(checkpoint_every(spec.train, family))
    if family.trainer != "torch" and (spec.train.strategy != "ddp" or spec.train.compile):
        raise SpecError(f"train.strategy and train.compile are for networks, and '{spec.model.type}' is none; take them out")
    return family, params


def family_of(spec: PipelineSpec) -> tuple[Any, Any, float]:
    """The family, its parameters and the GPUs that it could use; `ClusterError` where the cluster cannot train with them."""
    import ray

    family, params = parameters(spec)
    if not family.uses_gpu(params):
        if spec.train.gpu is True:
            raise SpecError(f"train.gpu: '{spec.model.type}' trains on CPUs with these parameters; set it to auto or false")
        return family, params, 0
    gpus = ray.cluster_resources().get("GPU", 0)
    ask = ray.remote(num_cpus=0, num_gpus=1 if gpus else 0)(_unavailable)
    if problem := ray.get(ask.remote(family, params)):
        raise ClusterError(problem)
    return family, params, gpus


def _go_on(made: Run, spec: S, progress: Progress, free_slots: Callable[[], float]) -> tuple[Run, S, Prepared, Begun]:
    """Check that an interrupted run finds what it had: the same rows, prepared data and slots."""
    begun = made.begun()
    folder = Folder.at(begun.prepared)
    if not folder.exists(MANIFEST):
        raise ArtifactError(f"the run {made.path} cannot go on: its prepared data is gone from {folder}; start it by its Spec")
    before = folder.read_json(MANIFEST)["address"]["source"]
    now = json.loads(to_json(Source.open(spec.data).fingerprint()))
    if changed := Address({"source": now, "code": None}).differences({"source": before}):
        raise DataError(f"data.source: {changed[0]} since the run {made.id} began, so it cannot go on; start it by its Spec")
    family, params, _ = family_of(spec)
    team, free = Team(**begun.team), free_slots()
    least, _ = team.sizes
    if least * team.cpus > free:
        raise ClusterError(
            f"the run {made.id} goes on with {least} workers of {team.cpus:g} slots each, and {free:g} slots are free; "
            "wait, or join a Ray that has them with --address"
        )
    for name, version in versions().items():
        if (old := begun.versions.get(name)) not in (version, None):
            progress.note(f"the run began with {name} {old}, this is {version}: its bits may be others than without a break")
    checkpoint = last_checkpoint(made.folder / "checkpoints")
    step = (made.folder / "checkpoints" / checkpoint).read_json(STATE)["step"] if checkpoint else 0
    progress.note(f"run {made.id} goes on from step {step}")
    begun = replace(begun, resumed=[*begun.resumed, step])
    made.begin(begun)
    prepared = Prepared.open(folder, spec.task, **begun.prepare)
    return made, spec, replace(prepared, task=_checked_task(family, params, prepared, team)), begun


def _checked_task(family: Any, params: Any, prepared: Prepared, team: Team) -> Task:
    """The task with the family's loss, which prepared data has not; for every number of workers that there may be."""
    task: Task
    for size in sorted(set(team.sizes)):
        task = family.check(params, prepared.task, prepared.shards, size)
    return task


@contextlib.contextmanager
def _resumable(made: Run, command: str) -> Iterator[None]:
    """Say of whatever ends the work in the middle how it goes on."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"what was trained up to the last checkpoint is kept; to go on: heliostat {command} --resume {made.path}")
        raise


def _unavailable(family: Any, params: Any) -> str | None:
    problem: str | None = family.unavailable(params)
    return problem


def resolve(spec: S, prepared: Prepared, params: dict[str, Any], team: Team) -> tuple[S, dict[str, str]]:
    """Return the Spec with everything that was inferred, and why, by dotted path."""
    task, reasons = prepared.task, dict(prepared.reasons)
    raw = spec.model_dump()
    dropped = [*spec.features.drop, *prepared.left_out]
    left_out = "; ".join(f"{name}: {why}" for name, why in prepared.left_out.items())
    kinds = {column.name: column.kind for column in prepared.preprocessor.inputs}
    for path, value, why in (
        ("data.kinds", kinds, "from the first rows of the first, middle and last file"),
        ("data.split.cuts", prepared.cuts, "the fractions as points in time"),
        ("task.type", task.type, "from the target's values"),
        (
            "task.positive",
            task.classes[1] if task.type == "binary" and task.classes else None,
            "the class that reads as yes, else the last",
        ),
        ("features.drop", dropped, left_out),
        ("features.columns", prepared.chains, "the chain of the column's kind"),
        ("model.params", params, "the family's defaults"),
        ("train.workers", None if team.least else team.workers, "free slots less one"),
        ("train.cpus_per_worker", team.cpus, "one slot, or a share where there are fewer"),
        ("train.gpu", team.gpu, "whether the cluster has them"),
    ):
        section, _, key = path.rpartition(".")
        place = raw
        for part in section.split("."):
            place = place[part]
        if value is not None and place[key] != value:
            place[key] = value
            reasons[path] = why
    return type(spec).model_validate(raw), reasons


def _write_artifact(made: Run, spec: PipelineSpec, prepared: Prepared, left: Fit) -> None:
    for part in PARTS:
        made.artifact.write_bytes(part, prepared.folder.read_bytes(part))
    made.artifact.write_json("task.json", prepared.task.model_dump())  # with the model's loss
    for name in left.model.files():
        if name != STATE and not name.startswith("."):
            made.artifact.write_bytes(f"model/{name}", left.model.read_bytes(name))
    _write_importance(made.artifact, spec.model.type, prepared)
    keep_answers(made.artifact, name=spec.name, run=made.id, model=spec.model.type)
    write_manifest(made.artifact, name=spec.name, run=made.id, model=spec.model.type)


def _write_importance(artifact: Folder, family: str, prepared: Prepared) -> None:
    """Keep what each column is to the model, where the family can tell."""
    found = load(MODELS, family, "model.type")
    if not issubclass(found, Explaining):
        return
    with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
        (artifact / "model").fetch(Path(path))
        model = found.load(Path(path))
    attribution = Attribution.of(prepared.preprocessor, prepared.task)
    artifact.write_json(IMPORTANCE, attribution.importance(model, prepared.shards.sample()))


def _facts(spec: PipelineSpec, prepared: Prepared, left: Fit, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "task": {"type": prepared.task.type, "target": prepared.task.target, "metric": prepared.task.metric_names[0]},
        "rows": prepared.rows,
        "dropped": prepared.dropped,
        "findings": prepared.findings,
        "read": prepared.read,
        "prepared": {"path": prepared.path, "reused": prepared.reused},
        "seconds": seconds,
        "metrics": {},
        "require": spec.evaluate.require,
        "steps": left.state["final"],
        "workers": left.workers,
        "failures": left.failures,
        **({"speed": left.state["speed"]} if left.state.get("speed") else {}),
    }


def _with_evaluation(facts: dict[str, Any], found: Evaluation) -> dict[str, Any]:
    return {**facts, "metrics": found.metrics, "seconds": {**facts["seconds"], "evaluate": found.seconds}}
