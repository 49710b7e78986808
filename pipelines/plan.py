"""plan: what a run would read, need and reuse, and what would go wrong, from footers and the first rows alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs

from pipelines.cache import explain
from pipelines.data.files import explained, is_database, root_of
from pipelines.data.read import BLOCK_BYTES
from pipelines.data.source import locations_of
from pipelines.data.summary import SAMPLE_ROWS, statistics_of
from pipelines.design import Design
from pipelines.errors import ClusterError, DataError
from pipelines.explain import checked
from pipelines.expressions import Derivation
from pipelines.features.passes import passes
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.stats import LIMIT
from pipelines.features.transform import TEXT
from pipelines.progress import SILENT, Progress
from pipelines.registry import MODELS, load
from pipelines.schema import ARROW, cast
from pipelines.spec import Chain, PipelineSpec
from pipelines.storage import Folder, one_line, open_location
from pipelines.training.trainer import Team

PROCESS: Final = 300 << 20
"""Bytes of a worker process of Ray with Arrow, Polars and numpy imported."""
BLOCKS: Final = 6
"""Copies of a block that a pass holds at once: read, canonical, derived, transformed, split, in the writer."""
TEXT_BYTES: Final = 150
"""Of one counted text: itself, its place in the dictionary, its count."""
WEIGHT_BYTES: Final = 20
"""Of a row's weight in a worker: as it was read, put together, and what the family keeps."""
INIT_SCORE_BYTES: Final = 8
"""Of the raw score that a row starts from, in a worker."""
HEAD_ROWS: Final = 1000
SMALLER: Final = {
    "lightgbm": " or fewer bins (model.params.max_bin)",
    "torch": " or smaller batches (model.params.batch_size)",
}
"""What else makes a fit need less, by trainer."""


@dataclass(frozen=True)
class Machine:
    """One node, as it is now."""

    name: str
    slots: float
    memory: int
    """Bytes that processes may still take."""
    unreachable: dict[str, str] = field(default_factory=dict)
    """Which of the asked-for locations it cannot reach, and why."""


@dataclass(frozen=True)
class Cluster:
    """What a run would find."""

    free: float
    """CPU slots."""
    gpus: float
    machines: Callable[[str, list[str]], list[Machine]]
    """Ask every node what it has, and whether it can open a store and sources."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str
    reads: int
    """Bytes of the files, or of the prepared shards."""
    slots: str
    memory: int
    """Bytes at the peak of one process that works for it; the processes of a machine add up."""
    driver: int = 0
    """Bytes that it adds to the process that the command runs in."""


@dataclass(frozen=True)
class Plan:
    """What `heliostat plan` tells."""

    rows: int
    exact: bool
    """Rows are known from footers; else estimated."""
    files: int
    bytes: int
    columns: dict[str, dict[str, Any]]
    """Type, kind and chain of each column that is read."""
    passes: list[str]
    """Each read of the source, with its reason."""
    cache: str
    features: int
    outputs: int
    """Raw scores of a row: the classes that the first rows have, or one."""
    stages: list[Stage]
    team: Team | None
    machines: list[Machine]
    disk: int
    """Bytes of the prepared shards at most, before compression."""
    problems: list[str]
    """Why it cannot work, and what to change; none: it can."""

    def refuse(self) -> None:
        """Raise `ClusterError` with the first problem, if there is one."""
        if self.problems:
            error = ClusterError(self.problems[0])
            for problem in self.problems[1:]:
                error.add_note(problem)
            raise error


def plan(spec: PipelineSpec, cluster: Cluster, *, progress: Progress = SILENT) -> Plan:
    """Plan a run. Reads footers and first rows, writes nothing; raises `SpecError` and `DataError` as the run would."""
    family = load(MODELS, spec.model.type, "model.type")
    params = checked(family.Params, spec.model.params, ("model", "params"))
    design = Design.of(spec, progress)
    source, columns, chains = design.source, design.columns, design.chains
    reader = design.reader(columns)
    reads = sum(source.format.size(unit.file, unit.piece, reader.wanted(unit)) for unit in source.units)
    features, classes = _first_rows(design)
    train_rows = int(source.rows * (1 - spec.data.split.test - spec.data.split.valid))
    machines = cluster.machines(spec.store, locations_of(spec.data))
    problems = _unreachable(machines)
    try:
        team = Team.plan(spec.train, cluster.free, cluster.gpus if family.uses_gpu(params) else 0, train_rows)
    except DataError as error:
        team = None
        problems.append(str(error))
    block = BLOCKS * BLOCK_BYTES + max((unit.piece.bytes for unit in source.units), default=0) // 4
    counted = sum(column.kind in TEXT for column in columns) * LIMIT * TEXT_BYTES
    sample = min(SAMPLE_ROWS, source.rows) * len(reader.columns) * 16
    beside = len(spec.task.beside)
    shards = source.rows * (features + 1 + beside) * 8
    stages = [
        Stage("statistics", reads, "all that are free", PROCESS + block + counted, sample + counted),
        Stage("transform", reads, "all that are free", PROCESS + block),
    ]
    if team is not None:
        rows = -(-train_rows // team.sizes[0])  # of the fewest workers, which have most each
        weighted = WEIGHT_BYTES * (spec.task.weight is not None or spec.task.class_weight is not None)
        started = INIT_SCORE_BYTES * (spec.task.init_score is not None)
        size = PROCESS + family.memory(params, rows, features, classes) + rows * (weighted + started)
        several = " to ".join(map(str, dict.fromkeys(team.sizes)))
        stages.append(Stage("train", shards, f"{several} workers with {team.cpus:g} each", size))
        problems += _too_large(team, size, machines, SMALLER.get(family.trainer, ""))
    problems += _disk(spec, shards)
    return Plan(
        rows=source.rows,
        exact=all(unit.piece.rows is not None for unit in source.units),
        files=len(source.files),
        bytes=sum(file.size for file in source.files),
        columns={
            column.name: {"type": column.type, "kind": column.kind, "chain": chains.get(column.name)}
            for column in design.schema.columns
            if column.name in reader.columns
        },
        passes=_passes(spec, chains),
        cache=explain(spec.store, design.address, spec.name),
        features=features,
        outputs=classes,
        stages=stages,
        team=team,
        machines=machines,
        disk=shards,
        problems=problems,
    )


def reach(store: str, sources: list[str]) -> dict[str, str]:
    """Return which of these locations this machine cannot open, and why. A store need not exist yet."""
    wrong = {}
    for location in [store, *sources]:
        try:
            if is_database(location):
                continue  # its server was asked when the source was opened
            filesystem, path = open_location(location)
            found = filesystem.get_file_info(root_of(path)).type
            if found == pa.fs.FileType.NotFound and location != store:
                wrong[location] = "it does not exist there"
        except (DataError, OSError) as error:
            wrong[location] = one_line(error)
    return wrong


def _passes(spec: PipelineSpec, chains: dict[str, Chain]) -> list[str]:
    split = spec.data.split
    cuts = [f"'{split.column}' alone, to find where to cut the time split"] if split.by == "time" and split.cuts is None else []
    further = [f"statistics again: {'; '.join(reasons)}" for reasons in passes(chains, spec.features.groups)]
    return [*cuts, "statistics of all columns", *further, "transform and write"]


def _first_rows(design: Design) -> tuple[int, int]:
    """How many features and classes the first rows give; more rows may have more categories for onehot."""
    spec, columns, target = design.spec, design.columns, design.target
    file = design.source.files[0]
    with explained(file):
        head = design.source.format.head(file, HEAD_ROWS)
    known = {column.name: column.type for column in design.raw.columns}
    table = pa.table(
        {
            name: cast(head[name], type, lenient=True) if name in head.column_names else pa.nulls(head.num_rows, ARROW[type])
            for name, type in known.items()
        }
    )
    table = Derivation(expressions=spec.data.derive).apply(table)
    statistics = {column.name: statistics_of(column, table[column.name]) for column in columns}
    try:
        fitted = Preprocessor.fit(columns, design.chains, statistics, groups=spec.features.groups)
        features = len(fitted.features) + len(fitted.wanted)  # steps that need a pass of their own make one at least
    except DataError:  # the first rows alone do not allow it
        features = len(columns)
    return features, max(1, len(table[target.name].drop_null().unique())) if spec.task.type == "multiclass" else 1


def _unreachable(machines: list[Machine]) -> list[str]:
    return [
        f"{location}: {machine.name} cannot reach it ({why}); use a shared mount or a URI (s3://...) that every node can open"
        for machine in machines
        for location, why in machine.unreachable.items()
    ]


def _too_large(team: Team, size: int, machines: list[Machine], smaller: str) -> list[str]:
    slots = sum(machine.slots for machine in machines)
    least, _ = team.sizes
    if least * team.cpus > slots:
        return [
            f"train.workers: {least} workers with {team.cpus:g} slots each are more than the {slots:g} slots there are; "
            f"set train.workers to at most {int(slots / team.cpus)}"
        ]
    room = sum(int(machine.memory // size) for machine in machines)
    if room >= least:
        return []
    free = sum(machine.memory for machine in machines)
    return [
        f"train: {least} workers need about {size >> 20:,} MiB each, and {free >> 20:,} MiB are free on {len(machines)} "
        f"machine{'s' if len(machines) > 1 else ''}; train on fewer rows (data.where), fewer features{smaller}, "
        "or on more machines"
    ]


def _disk(spec: PipelineSpec, shards: int) -> list[str]:
    folder = Folder.at(spec.store)
    if not folder.is_local:
        return []
    path = folder.path
    while not os.path.exists(path):
        path = os.path.dirname(path)
    free = shutil.disk_usage(path).free
    if shards // 4 <= free:  # compressed, a quarter is rarely reached
        return []
    return [
        f"store: the prepared shards take up to {shards >> 20:,} MiB, and {free >> 20:,} MiB are free at {path}; "
        "name another store, or heliostat cache prune --all"
    ]
