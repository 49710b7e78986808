"""What a run takes over from an earlier one, its parent: `model: {from: RUN}`.

All that tells how a row becomes features and an answer: Schema, Preprocessor, Task. Nothing of it is fitted again, so the
parent's trees mean on the new rows what they meant on the old ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, TypeVar

from pipelines.artifact import Artifact
from pipelines.errors import ArtifactError, SpecError
from pipelines.notation import read_yaml
from pipelines.registry import MODELS, load
from pipelines.runs import Run, RunStore
from pipelines.spec import PipelineSpec
from pipelines.storage import Folder

S = TypeVar("S", bound=PipelineSpec)
PARTS = ("schema.json", "preprocessor.json", "task.json")


@dataclass(frozen=True)
class Parent:
    """The run that a fit goes on from."""

    run: Run
    artifact: Artifact
    """Without its model: the workers load that."""
    spec: dict[str, Any]
    """Its resolved Spec, as it is written down."""

    @classmethod
    def of(cls, spec: PipelineSpec) -> Self | None:
        """Find it and check that it predicts the same; None where the Spec names none.

        Raises `ArtifactError` where it is missing or damaged, `SpecError` where it does not go with the Spec.
        """
        if spec.model.from_ is None:
            if spec.model.params.get("refit"):
                raise SpecError("model.params.refit: fits the leaves of another run's trees; name that run under model.from")
            return None
        try:
            run = RunStore.at(spec.store).find(spec.model.from_)
            artifact = Artifact.load(run.artifact, model=False)
        except ArtifactError as error:
            raise ArtifactError(f"model.from: {error}") from error
        text = run.folder.read_bytes("spec.yaml").decode()
        found = cls(run, artifact, read_yaml(text, f"{run.path}/spec.yaml"))
        params, task = found.spec["model"]["params"], artifact.task
        objective = {"regression": "l2", "ranking": "lambdarank"}.get(task.type, task.type)
        default = {"objective": objective, "reg_sqrt": False}
        for path, own, its in (
            ("model.type", spec.model.type, found.spec["model"]["type"]),
            ("task.target", spec.task.target, task.target),
            ("task.type", spec.task.type or task.type, task.type),
            ("task.init_score", spec.task.init_score or task.init_score, task.init_score),
            # Raw scores of the one are no raw scores of the other.
            *((f"model.params.{key}", spec.model.params.get(key) or it, params.get(key) or it) for key, it in default.items()),
            *((f"model.params.{key}", spec.model.params.get(key, it), it) for key, it in found.architecture.items()),
        ):
            if own != its:
                raise SpecError(f"{path}: '{own}' is not what {run.id} has ('{its}'), which model.from names; make them alike")
        if "rf" in (params.get("boosting"), spec.model.params.get("boosting")):
            raise SpecError("model.from: the trees of a random forest start from no scores, so it cannot be continued")
        return found

    @property
    def model(self) -> Folder:
        return self.run.artifact / "model"

    @property
    def architecture(self) -> dict[str, Any]:
        """The parameters that shape its weights, which cannot change."""
        names = getattr(load(MODELS, self.spec["model"]["type"], "model.from").Params, "architecture", ())
        return {name: self.spec["model"]["params"][name] for name in sorted(names)}

    @property
    def digests(self) -> dict[str, str]:
        """What tells one Schema, Preprocessor and Task from another."""
        files = self.run.artifact.read_json("manifest.json")["files"]
        return {part: files[part] for part in PARTS}

    def inherit(self, spec: S) -> S:
        """Return the Spec with the features, derived columns, task and architecture of the parent; all else stays."""
        raw = spec.model_dump()
        raw["features"] = self.spec["features"]
        raw["data"] |= {name: self.spec["data"][name] for name in ("kinds", "derive")}
        raw["task"] |= {name: self.spec["task"][name] for name in ("type", "positive")}
        raw["task"]["group"] = raw["task"]["group"] or self.spec["task"].get("group")
        raw["task"]["init_score"] = self.artifact.task.init_score
        raw["model"]["from_"] = self.run.path
        raw["model"]["params"] |= self.architecture
        return type(spec).model_validate(raw)
