"""follow: a network learns from files as they arrive, each once, until it is told to end; then it is a complete Run.

One process, without a cluster: what arrives is small beside what a fit reads. A file is evaluated first and learned from then, in
one pass with a constant learning rate; AdamW's state goes from file to file. Behind each file stands a checkpoint that has the
weights and the names of all files so far in one: what is killed goes on with the file that it was at, and no file counts twice.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifact import Artifact, keep_answers, write_manifest
from pipelines.contract import Contract
from pipelines.data.files import File, find
from pipelines.data.prepared import Shard, Shards, to_table
from pipelines.data.read import Counts
from pipelines.data.source import Source
from pipelines.data.writing import beside_of
from pipelines.errors import DataError, SpecError
from pipelines.explain import checked
from pipelines.notation import to_yaml
from pipelines.parent import Parent
from pipelines.prepare import PARTS
from pipelines.progress import SILENT, Progress
from pipelines.registry import MODELS, load
from pipelines.runs import Begun, Run, versions
from pipelines.scoring import reader_for
from pipelines.spec import PipelineSpec, SplitSpec
from pipelines.storage import Folder, to_json
from pipelines.training.worker import STATE, Start, Worker, cores, last_checkpoint

LOOK_S: Final = 1.0
"""Between two looks at the folder; a file that has not changed between them is complete."""
ONLINE: Final = {"epochs": 1, "schedule": "constant", "warmup": 0.0, "early_stopping": None}
KEPT: Final = 2
"""Checkpoints."""

S = TypeVar("S", bound=PipelineSpec)


def follow(spec: S, source: str, *, resume: Run | None = None, once: bool = False, progress: Progress = SILENT) -> Run:
    """Learn from the files of `source` and return the complete Run once Ctrl-C comes, or (`once`) no file is left.

    The Spec names the run to go on from (`model.from`), whose features and task hold. `resume` is an interrupted run of this
    kind, of which `spec` is the resolved Spec. Raises `SpecError`, `DataError` or `ArtifactError` for what the user can mend;
    the run then goes on with `resume`.
    """
    parent = Parent.of(spec)
    if parent is None:
        raise SpecError("train --follow goes on from a run that has learned the features; set model.from to one")
    spec = parent.inherit(spec)
    family = load(MODELS, spec.model.type, "model.type")
    if family.trainer != "torch":
        raise SpecError(f"train --follow: '{spec.model.type}' cannot take further steps; start from a run of type linear")
    checked(family.Params, spec.model.params, ("model", "params"))
    made = resume or Run.create(spec.store, spec.name)
    if resume is None:
        made.folder.write_bytes("spec.yaml", to_yaml(spec, {}).encode())
    before = made.begun().resumed if resume is not None else []
    learner = Learner.of(made, spec, family, parent)
    resumed = [*before, learner.step] if resume is not None else []
    made.begin(Begun(prepared="", prepare={}, team={}, versions=versions(), resumed=resumed, follow=source))
    started = time.monotonic()
    progress.note(f"following {source}; Ctrl-C ends it and keeps the run")
    try:
        with progress.stage("follow", unit="files") as stage:
            for file in _arriving(source, learner, once, progress):
                found = learner.learn(file, _location(source, file))
                stage.advance(1, rows=learner.rows, **dict(list(found.items())[:2]))
    except KeyboardInterrupt:
        progress.note("ending: what was learned from whole files is kept")
        learner = Learner.of(made, spec, family, parent)
    except BaseException as error:
        error.add_note(f"what was learned from whole files is kept; to go on: heliostat train --resume {made.path}")
        raise
    return learner.complete(time.monotonic() - started, resumed)


@dataclass
class Online(Worker):
    """The only rank, which tells nobody."""

    def log(self, step: int, metrics: dict[str, dict[str, float | None]], *, total: int) -> None:
        """What is worth telling is measured before a file is learned from."""


@dataclass
class Learner:
    """The network so far and the files that it has seen."""

    run: Run
    spec: PipelineSpec
    family: Any
    parent: Parent
    model: Any
    """With the optimizer's state."""
    step: int = 0
    """Steps of this run."""
    files: dict[str, list[int]] = field(default_factory=dict)
    """Size and time of change of each file that was learned from, in that order."""
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, spec: PipelineSpec, family: Any, parent: Parent) -> Learner:
        """From the run's last checkpoint, else from the parent's model."""
        checkpoints = run.folder / "checkpoints"
        name = last_checkpoint(checkpoints)
        with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
            (checkpoints / name if name else parent.model).fetch(Path(path))
            model = family.load(Path(path))
            state = json.loads((Path(path) / STATE).read_text()) if name else {}
        return cls(
            run,
            spec,
            family,
            parent,
            model,
            state.get("steps", 0),
            state.get("followed", {}),
            state.get("rows", 0),
            state.get("dropped", {}),
        )

    @property
    def artifact(self) -> Artifact:
        return self.parent.artifact

    def learn(self, file: File, location: str) -> dict[str, float | None]:
        """Learn from one file, leave a checkpoint, and return the metrics of what was there before on its rows."""
        from pipelines.models.network_fit import Training

        with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
            shards = self._prepared(Path(path), location)
            found: dict[str, float | None] = {}
            if shards.rows["train"]:
                params = self.family.Params.model_validate({**self.spec.model.params, **ONLINE})
                params = params.model_copy(update={"seed": (params.seed + len(self.files)) % (1 << 31)})
                training = Training(self.family, params, self.artifact.task, self._worker(shards))
                found = training.measured().result()
                training.learn()
                self.model = training.going_on()
                self.step += params.steps(shards.rows["train"])
            self.rows += shards.rows["train"]
        self.files[file.name] = [file.size, file.mtime_ns]
        self._keep()
        lines = [{"step": self.step, "split": "arrived", "metric": name, "value": value} for name, value in found.items()]
        self.run.folder.append_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return found

    def complete(self, seconds: float, resumed: list[int]) -> Run:
        """Make the Artifact and the record."""
        from safetensors.torch import load as read_tensors

        from pipelines.models.network_export import exported
        from pipelines.models.network_modules import build, load_weights

        made, artifact = self.run, self.artifact
        for part in PARTS:
            made.artifact.write_bytes(part, self.parent.run.artifact.read_bytes(part))
        network = build(self.model.layout)
        load_weights(network, read_tensors(self.model.weights))
        examples = artifact.check_rows(artifact.examples)
        rows = artifact.matrix(Contract(artifact.schema).to_table(examples))
        with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
            self.family(self.model.layout, self.model.weights, program=exported(network.eval(), rows)).save(Path(path))
            for one in Path(path).iterdir():
                made.artifact.write_bytes(f"model/{one.name}", one.read_bytes())
        keep_answers(made.artifact, name=self.spec.name, run=made.id, model=self.spec.model.type)
        write_manifest(made.artifact, name=self.spec.name, run=made.id, model=self.spec.model.type)
        task = artifact.task
        facts: dict[str, Any] = {
            "task": {"type": task.type, "target": task.target, "metric": task.metric_names[0]},
            "rows": {"train": self.rows},
            "dropped": self.dropped,
            "seconds": {"train": seconds},
            "metrics": {},
            "require": {},
            "steps": self.step,
            "followed": self.files,
            "parent": self.parent.run.path,
        }
        return made.complete(**facts, **({"resumed": resumed} if resumed else {}))

    def _prepared(self, folder: Path, location: str) -> Shards:
        """Write the rows of a file as the features that the parent knows, a block at a time."""
        artifact = self.artifact
        task = artifact.task
        data = self.spec.data.model_copy(update={"source": location, "split": SplitSpec(test=0.0, valid=0.0), "key": []})
        source = Source.open(data)
        reader = reader_for(artifact, source, data, task=artifact.task)
        counts, rows = Counts(), 0
        (folder / "train").mkdir()
        writer: Any = None
        try:
            for unit in source.units:
                for block in reader.blocks(unit, counts):
                    matrix = artifact.matrix(block.table)
                    columns = [*matrix.T, task.encode(block.table[task.target])]
                    table: pa.Table = to_table(columns, beside_of(block.table, task, unit))
                    if writer is None:
                        writer = pq.ParquetWriter(folder / "train/0.parquet", table.schema)
                        pq.write_table(table, folder / "sample.parquet")
                    writer.write_table(table)
                    rows += table.num_rows
        finally:
            if writer is not None:
                writer.close()
        for reason, number in counts.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + number
        shards = [Shard("train/0.parquet", rows)] if rows else []
        return Shards(Folder.at(str(folder)), artifact.preprocessor.features, {"train": shards, "valid": [], "test": []})

    def _worker(self, shards: Shards) -> Online:
        start = Start(self.model, 0, {})
        return Online(
            rank=0,
            size=1,
            threads=cores(),
            checkpoint_every=1 << 60,
            shards=shards,
            start=start,
            rendezvous=None,
            attempt="",
            class_weights=self.artifact.task.class_weights,
        )

    def _keep(self) -> None:
        """Leave a checkpoint: the state is written last, and without it the others are none."""
        folder = self.run.folder / "checkpoints"
        own = folder / f"{len(self.files):09d}"
        with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
            self.model.save(Path(path))
            files = {one.name: one.stat().st_size for one in Path(path).iterdir()}
            for one in Path(path).iterdir():
                own.write_bytes(one.name, one.read_bytes())
        state = {"step": len(self.files), "files": files, "steps": self.step, "followed": self.files}
        own.write_bytes(STATE, to_json({**state, "rows": self.rows, "dropped": self.dropped}).encode())
        for name in sorted(folder.names())[:-KEPT]:
            (folder / name).delete()


def _arriving(source: str, learner: Learner, once: bool, progress: Progress) -> Iterator[File]:
    """Yield the files that are complete and were not learned from, in the order of their names, as they come."""
    seen: dict[str, list[int]] = {}
    told: set[str] = set()
    while True:
        files = {file.name: file for file in _listed(source)}
        now = {name: [file.size, file.mtime_ns] for name, file in files.items()}
        for name in sorted(now):
            if name in learner.files:
                if learner.files[name] != now[name] and name not in told:
                    told.add(name)
                    progress.note(f"{name} has changed since it was learned from; it counts once")
            elif seen.get(name) == now[name]:
                yield files[name]
        waiting = [name for name in now if name not in learner.files]
        if once and not waiting and seen == now:
            return
        seen = now
        time.sleep(LOOK_S)


def _listed(source: str) -> list[File]:
    """The files that are there now; a folder may still be empty."""
    try:
        return find(source, None)
    except DataError as error:
        if "has no files in it" in str(error) or "matches no file" in str(error):
            return []
        raise


def _location(source: str, file: File) -> str:
    """The path or URI of one file."""
    scheme, _, _ = source.partition("://") if "://" in source else ("", "", "")
    return f"{scheme}://{file.path}" if scheme else file.path
