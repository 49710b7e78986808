"""prepare: from a source to transformed shards, with everything learned about the data on the way."""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.cuts import time_cuts
from pipelines.data.infer import infer_schema, with_kinds
from pipelines.data.prepared import Shard, Shards, WriteShards, to_table
from pipelines.data.read import Counts, Reader, in_order, stream
from pipelines.data.source import Source
from pipelines.data.split import SPLITS
from pipelines.data.summary import Summary, gather, summarise
from pipelines.errors import DataError, SpecError
from pipelines.expressions import Derivation
from pipelines.features.passes import of_pass, passes
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.transform import Feature
from pipelines.profiles import profile_of
from pipelines.progress import SILENT, Progress
from pipelines.registry import MODELS, load
from pipelines.schema import Column, Schema
from pipelines.spec import Chain, GroupSpec, PipelineSpec
from pipelines.storage import Folder, to_json
from pipelines.tasks import Task

FORMAT: Final = 1
ORDINALS: Final = {2: "second", 3: "third"}
PARTS: Final = ("schema.json", "preprocessor.json", "task.json", "profile.json")


@dataclass(frozen=True)
class Prepared:
    """The prepared data of one Spec: shards, and the parts of an Artifact that come before the model."""

    folder: Folder
    shards: Shards
    preprocessor: Preprocessor
    task: Task
    schema: Schema
    """The raw columns that a prediction reads."""
    chains: dict[str, Chain]
    """The chain of transforms of each column."""
    cuts: list[str] | None
    """Where a time split was cut."""
    dropped: dict[str, int]
    read: dict[str, int]
    """Rows, bytes and column chunks that the statistics pass read."""
    reused: bool
    seconds: float

    @property
    def path(self) -> str:
        return str(self.folder)

    @property
    def rows(self) -> dict[str, int]:
        return self.shards.rows

    @classmethod
    def open(cls, folder: Folder, *, reused: bool, seconds: float) -> Prepared:
        """Read a complete prepared folder."""
        manifest = folder.read_json("manifest.json")
        preprocessor = Preprocessor.from_json(folder.read_json("preprocessor.json"))
        splits = {split: [Shard(*shard) for shard in shards] for split, shards in manifest["splits"].items()}
        shards = Shards(folder / manifest["shards"], preprocessor.features, splits)
        task = Task.model_validate(folder.read_json("task.json"))
        return cls(
            folder=folder,
            shards=shards,
            preprocessor=preprocessor,
            task=task,
            schema=Schema.model_validate(folder.read_json("schema.json")),
            chains=manifest["chains"],
            cuts=manifest["cuts"],
            dropped=manifest["dropped"],
            read=manifest["read"],
            reused=reused,
            seconds=seconds,
        )


def prepare(spec: PipelineSpec, *, progress: Progress = SILENT) -> Prepared:
    """Return the prepared data of a Spec; what an earlier run of the same data and settings left is used again.

    Reads the source twice: once for all statistics, once to transform; and once more where `passes` says so. Writes below
    STORE/cache. Raises `SpecError` and `DataError` before any long work where it can.
    """
    started = time.monotonic()
    source = Source.open(spec.data)
    raw = infer_schema(source, spec.data)
    schema = with_kinds(Derivation(expressions=spec.data.derive).extend(raw), spec.data)
    target = schema.require(spec.task.target, "task.target")
    columns, chains = feature_chains(spec, schema, progress)

    folder = Folder.at(spec.store) / "cache" / _key(spec, source, schema, chains)
    if folder.exists("manifest.json"):
        progress.note(f"prepared data of an earlier run is used again: {folder}")
        return Prepared.open(folder, reused=True, seconds=time.monotonic() - started)

    inputs = Derivation(expressions=spec.data.derive).needs({column.name for column in columns})
    seen = [column for column in schema.columns if column in columns or column.name in inputs]
    reader = Reader.of(source, raw, spec.data, {column.name for column in seen} | {target.name}, target.name)
    reader = _with_cuts(spec, source, reader, progress)
    summary, read = summarise(source, reader, seen, Preprocessor.unfitted(columns, chains, spec.features.groups), progress)
    _check_rows(spec, summary, read)
    task = Task.fit(spec.task, target, summary.targets, summary.rows["train"])
    preprocessor = _fit(spec, source, reader, columns, chains, summary, task, progress)
    contract = _inputs(schema, raw, preprocessor, summary)
    shards = _write(folder, source, reader, preprocessor, task, summary, progress)
    for name, content in zip(
        PARTS,
        (
            contract.model_dump(),
            preprocessor.to_json(),
            task.model_dump(),
            profile_of(contract, summary, task),
        ),
        strict=True,
    ):
        folder.write_json(name, content)
    folder.write_json(
        "manifest.json",
        {
            "format": FORMAT,
            "shards": shards.folder.name,
            "splits": {split: [list(shard) for shard in found] for split, found in shards.splits.items()},
            "dropped": read.dropped,
            "read": {"rows": read.rows, "bytes": read.bytes, "chunks": read.chunks},
            "chains": chains,
            "cuts": reader.data.split.cuts,
        },
    )
    del summary
    pa.default_memory_pool().release_unused()  # the sample is done with, and a fit follows that needs the memory
    return Prepared.open(folder, reused=False, seconds=time.monotonic() - started)


def feature_chains(spec: PipelineSpec, schema: Schema, progress: Progress = SILENT) -> tuple[list[Column], dict[str, Chain]]:
    """Return the columns that become features, each with its chain of transforms."""
    family = load(MODELS, spec.model.type, "model.type")
    grouped = {name for group in spec.features.groups.values() for name in group.columns}
    chains = Preprocessor.plan(schema.columns, spec.features, family.chains, {spec.task.target, *spec.data.key})
    left_out = [
        c.name for c in schema.columns if c.kind not in family.chains and c.name not in {*chains, *grouped, *spec.features.drop}
    ]
    left_out = [name for name in left_out if name != spec.task.target and name not in spec.data.key]
    if left_out:
        progress.note(
            f"left out, for text has no default transform: {', '.join(left_out)}; name one under features.columns to use them"
        )
    if not chains and not grouped:
        raise SpecError("features: no column is left to learn from; take some out of features.drop")
    return [column for column in schema.columns if column.name in chains or column.name in grouped], chains


def _key(spec: PipelineSpec, source: Source, schema: Schema, chains: dict[str, Chain]) -> str:
    """The address of the prepared data: whatever changes its content changes this."""
    content = {
        "format": FORMAT,
        "source": source.fingerprint(),
        "data": spec.data.model_dump(exclude={"source"}),
        "task": spec.task.model_dump(),
        "schema": schema.model_dump(),
        "chains": chains,
        "groups": {name: group.model_dump() for name, group in spec.features.groups.items()},
    }
    return hashlib.blake2b(to_json(content).encode(), digest_size=10).hexdigest()


def _with_cuts(spec: PipelineSpec, source: Source, reader: Reader, progress: Progress) -> Reader:
    split = spec.data.split
    if split.column is None:
        return reader
    column = reader.schema.require(split.column, "data.split.column")
    if split.by != "time" or split.cuts is not None:
        return reader
    if column.type != "timestamp":
        raise SpecError(f"data.split.column: '{column.name}' is {column.type}; a time split needs timestamps, or use by: group")
    progress.note(f"time split: one extra pass over '{column.name}' finds where to cut")
    # While the cuts are looked for, no row has a split yet.
    uncut = Reader.of(source, reader.raw, spec.data.model_copy(update={"split": type(split)()}), {column.name}, reader.target)
    cuts = time_cuts(source, uncut, split)
    data = spec.data.model_copy(update={"split": split.model_copy(update={"cuts": cuts})})
    return Reader.of(source, reader.raw, data, set(reader.columns), reader.target)


def _check_rows(spec: PipelineSpec, summary: Summary, read: Counts) -> None:
    left = sum(summary.rows.values())
    if left == 0:
        dropped = ", ".join(f"{rows} by {reason}" for reason, rows in read.dropped.items()) or "the files have none"
        raise DataError(f"data.source: no row is left of {read.rows} ({dropped}); loosen data.where or check task.target")
    if summary.rows["train"] == 0:
        raise DataError(f"data.split: none of the {left} rows is a train row; lower data.split.test and data.split.valid")


def _fit(
    spec: PipelineSpec,
    source: Source,
    reader: Reader,
    columns: list[Column],
    chains: dict[str, Chain],
    summary: Summary,
    task: Task,
    progress: Progress,
) -> Preprocessor:
    """Fit all steps, with as many further passes over the data as `passes` says."""
    groups = spec.features.groups

    def fitted(chains: dict[str, Chain], groups: dict[str, GroupSpec]) -> Preprocessor:
        return Preprocessor.fit(
            columns, chains, summary.columns, groups=groups, states=summary.states, task=task, places=summary.places
        )

    for number, reasons in enumerate(passes(chains, groups), 2):
        shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        progress.note(f"{ORDINALS.get(number, f'{number}th')} pass: {shown}")
        partly = fitted(*of_pass(number, chains, groups))
        needed = reader.only({task.target, *(column.name for column in partly.inputs)})
        summary.states |= gather(source, needed, partly, progress)
    return fitted(chains, groups)


def _inputs(schema: Schema, raw: Schema, preprocessor: Preprocessor, summary: Summary) -> Schema:
    """The raw columns that a prediction needs; a column without a missing value in the train split is required."""
    wanted = {column.name for column in preprocessor.inputs}
    derivation = Derivation(expressions=schema.derive).select(wanted)
    columns = [
        Column(name=name, type=raw[name].type, kind=schema[name].kind, nullable=summary.columns[name].missing > 0)
        for name in raw.names
        if name in derivation.needs(wanted)
    ]
    return Schema(columns=columns, derive=derivation.expressions)


def _write(
    folder: Folder, source: Source, reader: Reader, preprocessor: Preprocessor, task: Task, summary: Summary, progress: Progress
) -> Shards:
    shards_folder = folder / f"shards-{uuid.uuid4().hex[:8]}"
    for split in SPLITS:
        (shards_folder / split).create()
    with progress.stage("transform", total=source.rows) as stage:
        found = list(in_order(stream(source, reader, WriteShards(shards_folder, preprocessor, task)), stage))
    splits: dict[str, list[Shard]] = {split: [shards[split] for shards in found if split in shards] for split in SPLITS}
    assert summary.sample is not None
    matrix = preprocessor.transform(summary.sample, summary.places)
    with shards_folder.filesystem.open_output_stream(f"{shards_folder.path}/sample.parquet") as file:
        pq.write_table(to_table(matrix, task.encode(summary.sample[task.target])), file, compression="lz4")
    features: list[Feature] = preprocessor.features
    return Shards(shards_folder, features, splits)
