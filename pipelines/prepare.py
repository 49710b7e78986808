"""prepare: from a source to transformed shards, with everything learned about the data on the way."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cache import MANIFEST, STATISTICS, Address, cache_of, code_of, explain
from pipelines.data.cuts import time_cuts
from pipelines.data.kept import load as load_kept
from pipelines.data.kept import save as save_kept
from pipelines.data.prepared import GROUP, INIT_SCORE, WEIGHT, Shard, Shards, to_table
from pipelines.data.queries import by_query, remove, sorted_by_query, together
from pipelines.data.read import Counts, Reader, in_order, stream, warm_up
from pipelines.data.source import Source
from pipelines.data.split import SPLITS, identity_of_values
from pipelines.data.summary import Summary, gather, summarise, with_samples, without_samples
from pipelines.data.writing import Encodings, Placed, WriteShards
from pipelines.design import Design, check_chains, is_free
from pipelines.errors import DataError, SpecError
from pipelines.expressions import Derivation
from pipelines.features.passes import of_pass, passes
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.transform import Feature
from pipelines.profiles import profile_of
from pipelines.progress import SILENT, Progress
from pipelines.quality import quality_of
from pipelines.schema import Column, Schema, numbers
from pipelines.spec import Chain, GroupSpec, PipelineSpec, PrepareSpec, TaskSpec
from pipelines.storage import Folder
from pipelines.tasks import Task

ORDINALS: Final = {2: "second", 3: "third"}
PARTS: Final = ("schema.json", "preprocessor.json", "task.json", "profile.json", "quality.json")


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
    left_out: dict[str, str]
    """Columns that are no features though the Spec does not say so, and why."""
    reasons: dict[str, str]
    """Why other choices were made, by dotted path."""
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

    @property
    def findings(self) -> list[dict[str, Any]]:
        """What may be wrong with the data, worst first."""
        found: list[dict[str, Any]] = self.folder.read_json("quality.json")["findings"]
        return found

    @classmethod
    def open(cls, folder: Folder, wanted: TaskSpec, *, reused: bool, seconds: float) -> Prepared:
        """Read a complete prepared folder; `wanted` has the class weights, which are no part of it."""
        manifest = folder.read_json(MANIFEST)
        preprocessor = Preprocessor.from_json(folder.read_json("preprocessor.json"))
        splits = {split: [Shard(*shard) for shard in shards] for split, shards in manifest["splits"].items()}
        task = Task.model_validate(folder.read_json("task.json")).weighing(wanted, manifest["class_counts"])
        shards = Shards(folder / manifest["shards"], preprocessor.features, splits, grouped=task.group is not None)
        return cls(
            folder=folder,
            shards=shards,
            preprocessor=preprocessor,
            task=task,
            schema=Schema.model_validate(folder.read_json("schema.json")),
            chains=manifest["chains"],
            left_out=manifest["left_out"],
            reasons=manifest["reasons"],
            cuts=manifest["cuts"],
            dropped=manifest["dropped"],
            read=manifest["read"],
            reused=reused,
            seconds=seconds,
        )


def prepare(spec: PipelineSpec, *, progress: Progress = SILENT) -> Prepared:
    """Return the prepared data of a Spec; what an earlier run of the same data and settings left is used again.

    Reads the source twice: once for all statistics, once to transform; and once more where `passes` says so, and where the rows
    of a query lie apart. Writes below STORE/cache. Raises `SpecError` and `DataError` before any long work where it can.
    """
    started = time.monotonic()
    design = Design.of(spec, progress)
    place = design.address
    folder = cache_of(spec.store) / place.key
    progress.note(f"cache {explain(spec.store, place, spec.name)}")
    if folder.exists(MANIFEST):
        return Prepared.open(folder, spec.task, reused=True, seconds=time.monotonic() - started)
    warm_up()
    with ThreadPoolExecutor(1) as aside:  # what only describes the data is worked out while they are transformed
        _prepare(design, folder, aside, progress)
    pa.default_memory_pool().release_unused()  # the sample is done with, and a fit follows that needs the memory
    return Prepared.open(folder, spec.task, reused=False, seconds=time.monotonic() - started)


def _prepare(design: Design, folder: Folder, aside: Executor, progress: Progress) -> None:
    spec, columns = design.spec, design.columns
    reader, summary, read, keep = _look(design, progress)
    kept = aside.submit(keep)
    _check_rows(spec, summary, read)
    identifiers = {name: why for name, why in design.inferred.left_out.items() if is_free(name, spec)}
    constants = {} if design.parent else _constants(design.chains, spec, summary)
    left_out = identifiers | constants
    if left_out:
        noted = ", ".join(f"{name} ({why})" for name, why in left_out.items())
        progress.note(f"left out: {noted}; name one under data.kinds or features.columns to use it")
    chains = {name: chain for name, chain in design.chains.items() if name not in left_out}
    if design.parent:
        progress.note(f"features and task are those of {design.parent.run.id}: nothing is fitted to the new data")
        made = design.parent.artifact
        task = made.task.model_copy(update={"weight": spec.task.weight, "group": spec.task.group})
        preprocessor, contract = made.preprocessor, made.schema
    else:
        task = Task.fit(spec.task, design.target, summary.targets, summary.rows["train"])
        check_chains(spec, chains, left_out)
        preprocessor = _fit(spec, design.source, reader, columns, chains, summary, task, progress)
        contract = _inputs(design.schema, design.raw, preprocessor, summary, task)
    class_counts = task.counts_of(summary.targets)
    task.weighing(spec.task, class_counts)  # a mistake in it is told before the long work
    described = aside.submit(
        lambda: {
            "schema.json": contract.model_dump(),
            "preprocessor.json": preprocessor.to_json(),
            "task.json": task.model_dump(),
            "profile.json": profile_of(contract, summary, task),
            "quality.json": quality_of(
                preprocessor.inputs,
                summary,
                read,
                task=task,
                split=spec.data.split,
                identifiers=identifiers,
                constants=constants,
            ),
        }
    )
    shards = _write(design, folder, reader, preprocessor, task, summary, progress)
    kept.result()
    for name, content in described.result().items():
        folder.write_json(name, content)
    folder.write_json(
        MANIFEST,
        {
            "name": spec.name,
            "made": time.time(),
            "address": design.address.parts,
            "shards": shards.folder.name,
            "splits": {split: [list(shard) for shard in found] for split, found in shards.splits.items()},
            "dropped": read.dropped,
            "read": {"rows": read.rows, "bytes": read.bytes, "chunks": read.chunks},
            "chains": chains,
            "left_out": left_out,
            "reasons": design.reasons(chains),
            "cuts": reader.data.split.cuts,
            "class_counts": class_counts,
        },
    )


def _constants(chains: dict[str, Chain], spec: PipelineSpec, summary: Summary) -> dict[str, str]:
    """Columns that are the same in every train row, and why nothing can be learned from them."""
    rows, found = summary.rows["train"], {}
    for name in chains:
        statistics = summary.columns[name]
        if is_free(name, spec) and statistics.is_constant:
            found[name] = f"no value in {rows:,} rows" if statistics.missing == rows else f"one value in all {rows:,} rows"
    return found


def _look(design: Design, progress: Progress) -> tuple[Reader, Summary, Counts, Callable[[], None]]:
    """Return the reader with the cuts of a time split, the statistics of all columns, what was read, and what keeps all this.

    Kept statistics are used again. They depend on less than the prepared data: another chain of the same columns needs no second
    look.
    """
    spec, source, columns = design.spec, design.source, design.columns
    inputs = Derivation(expressions=spec.data.derive).needs(_read_by_predictions(columns, spec.task))
    seen = [column for column in design.schema.columns if column in columns or column.name in inputs]
    reader = design.reader(seen)
    taken = design.parent is not None  # then nothing is to be gathered
    unfitted = Preprocessor.unfitted(columns, {} if taken else design.chains, {} if taken else spec.features.groups)
    place = Address(
        {
            "statistics": True,
            "source": source.fingerprint(),
            "data": spec.data.model_dump(exclude={"source"}),
            "target": spec.task.target,
            "beside": spec.task.beside,
            "columns": [column.model_dump() for column in seen],
            "gathers": [
                [list(key), wanted.step.name, wanted.step.params.model_dump(), wanted.slots]
                for key, wanted in unfitted.wanted.items()
            ],
            "code": code_of([]),
        }
    )
    folder = cache_of(spec.store) / place.key
    if folder.exists(MANIFEST):
        progress.note("statistics of an earlier run are used again: the rows and columns are the same")
        cuts, summary, read = load_kept(folder)
        data = spec.data.model_copy(update={"split": spec.data.split.model_copy(update={"cuts": cuts})})
        return replace(reader, data=data), with_samples(summary), read, lambda: None
    reader = _with_cuts(spec, source, reader, progress)
    summary, read = summarise(source, reader, seen, unfitted, progress, spec.task)

    def keep() -> None:
        save_kept(folder, (reader.data.split.cuts, without_samples(summary), read))
        folder.write_json(MANIFEST, {"kind": STATISTICS, "name": spec.name, "made": time.time(), "address": place.parts})

    return reader, summary, read, keep


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


def _read_by_predictions(columns: list[Column], task: TaskSpec | Task) -> set[str]:
    """The names of the columns that features are made of, and of the one with the scores that rows start from."""
    return {column.name for column in columns} | ({task.init_score} if task.init_score is not None else set())


def _inputs(schema: Schema, raw: Schema, preprocessor: Preprocessor, summary: Summary, task: Task) -> Schema:
    """The raw columns that a prediction needs; a column without a missing value in the train split is required."""
    wanted = _read_by_predictions(preprocessor.inputs, task)
    derivation = Derivation(expressions=schema.derive).select(wanted)
    columns = [
        raw[name].model_copy(update={"kind": schema[name].kind, "nullable": summary.columns[name].missing > 0})
        for name in raw.names
        if name in derivation.needs(wanted)
    ]
    return Schema(columns=columns, derive=derivation.expressions)


def _write(
    design: Design,
    folder: Folder,
    reader: Reader,
    preprocessor: Preprocessor,
    task: Task,
    summary: Summary,
    progress: Progress,
) -> Shards:
    spec, source = design.spec, design.source
    shards_folder = folder / f"shards-{uuid.uuid4().hex[:8]}"
    for split in SPLITS:
        (shards_folder / split).create()
    reader = reader.only({*reader.columns, *spec.prepare.bucket_by})
    assert summary.sample is not None
    fitted = design.parent is None  # rows that nothing was fitted to are transformed as new ones are
    matrix = preprocessor.transform(summary.sample, summary.places if fitted else None)
    beside: dict[str, Any] = {WEIGHT: numbers(summary.sample[task.weight])} if task.weight else {}
    beside |= {GROUP: identity_of_values([summary.sample[task.group]])} if task.group else {}
    beside |= {INIT_SCORE: numbers(summary.sample[task.init_score])} if task.init_score else {}
    sample = to_table([*matrix, task.encode(summary.sample[task.target])], beside)
    encodings = Encodings.of(sample)
    with shards_folder.filesystem.open_output_stream(f"{shards_folder.path}/sample.parquet") as file:
        pq.write_table(sample, file, compression=encodings.compression, use_dictionary=encodings.dictionary)

    def written(layout: PrepareSpec) -> dict[str, list[Placed]]:
        each = WriteShards(shards_folder, preprocessor, task, layout, encodings, fitted)
        with progress.stage("transform", total=source.rows) as stage:
            found = list(in_order(stream(source, reader, each), stage))
        return {
            split: sorted((one for unit in found for one in unit.get(split, [])), key=lambda placed: placed.bucket)
            for split in SPLITS
        }

    layout = spec.prepare
    placed = written(layout)
    splits = {split: [shard for one in found for shard in one.shards] for split, found in placed.items()}
    if task.group is not None and not all(map(together, placed.values())):
        progress.note(f"the rows of some queries lie apart in the source: they are brought together by '{task.group}'")
        if not layout.bucket_by:
            for found in placed.values():
                remove(shards_folder, found)
            layout = by_query(layout, task.group, source.rows, sample.num_columns)
            placed = written(layout)
        splits = {split: sorted_by_query(shards_folder, split, found, layout, encodings) for split, found in placed.items()}
    features: list[Feature] = preprocessor.features
    return Shards(shards_folder, features, splits, grouped=task.group is not None)
