"""train: from prepared shards to an Artifact in a complete Run; `run` evaluates it besides."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pipelines.artifact import write_manifest
from pipelines.attribution import IMPORTANCE, Attribution
from pipelines.errors import ClusterError, SpecError
from pipelines.evaluate import Evaluation, check_requirements, evaluate, require
from pipelines.explain import checked
from pipelines.models.model import Explaining
from pipelines.notation import to_yaml
from pipelines.prepare import PARTS, Prepared, prepare
from pipelines.progress import SILENT, Progress
from pipelines.registry import MODELS, load
from pipelines.runs import Run
from pipelines.spec import PipelineSpec
from pipelines.storage import Folder
from pipelines.tasks import Task
from pipelines.training.trainer import Fit, Team, fit
from pipelines.training.worker import STATE

S = TypeVar("S", bound=PipelineSpec)


def train(spec: PipelineSpec, *, progress: Progress = SILENT, free_slots: Callable[[], float]) -> Run:
    """Prepare, train on the cluster and return the complete Run, without test metrics.

    `free_slots` tells how many CPU slots the workers may take; it is asked once, when they are about to start. Raises
    `SpecError`, `DataError` or `ClusterError` for what the user can mend; a run that fails leaves its folder without a record.
    """
    made, _, facts, _ = _train(spec, progress, free_slots)
    return made.complete(**facts)


def run(spec: PipelineSpec, *, progress: Progress = SILENT, free_slots: Callable[[], float]) -> Run:
    """Prepare, train and evaluate. Raises `RequirementError` after the Run is complete when a required metric was missed."""
    made, spec, facts, task = _train(spec, progress, free_slots)
    found = evaluate(made, spec, progress=progress)
    done = made.complete(**_with_evaluation(facts, found))
    require(spec, task, found.metrics)
    return done


def _train(spec: S, progress: Progress, free_slots: Callable[[], float]) -> tuple[Run, S, dict[str, Any], Task]:
    import ray

    family = load(MODELS, spec.model.type, "model.type")
    params = checked(family.Params, spec.model.params, ("model", "params"))
    uses_gpu = family.uses_gpu(params)
    if spec.train.gpu is True and not uses_gpu:
        raise SpecError(f"train.gpu: '{spec.model.type}' trains on CPUs with these parameters; set it to auto or false")
    gpus = ray.cluster_resources().get("GPU", 0) if uses_gpu else 0
    if uses_gpu:
        ask = ray.remote(num_cpus=0, num_gpus=1 if gpus else 0)(_unavailable)
        if problem := ray.get(ask.remote(family, params)):
            raise ClusterError(problem)
    prepared = prepare(spec, progress=progress)
    team = Team.plan(spec.train, free_slots(), gpus, prepared.rows["train"])
    prepared = replace(prepared, task=family.check(params, prepared.task, prepared.shards, team.workers))
    check_requirements(spec, prepared.task)
    spec, reasons = resolve(spec, prepared, params.model_dump(), team)
    started = time.monotonic()
    made = Run.create(spec.store, spec.name)
    made.folder.write_bytes("spec.yaml", to_yaml(spec, reasons).encode())
    checkpoints = made.folder / "checkpoints"
    left = fit(
        spec.model, spec.train, team, prepared.task, prepared.shards, folder=checkpoints, metrics=made.folder, progress=progress
    )
    _write_artifact(made, spec, prepared, left)
    checkpoints.delete()  # they are only there to go on from
    seconds = {"prepare": prepared.seconds, "train": time.monotonic() - started}
    return made, spec, _facts(spec, prepared, left, seconds), prepared.task


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
        ("train.workers", team.workers, "free slots less one"),
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
    }


def _with_evaluation(facts: dict[str, Any], found: Evaluation) -> dict[str, Any]:
    return {**facts, "metrics": found.metrics, "seconds": {**facts["seconds"], "evaluate": found.seconds}}
