"""Reading a source: from units to blocks of canonical rows, each with its identity and split, streamed by Ray Data.

`Reader` is the whole way from a file to a block: read the needed columns, bring them to their canonical types, derive, filter,
split. It is a plain value, sent to wherever a unit is read. `stream` runs a function over all units as a Ray Dataset.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.files import explained
from pipelines.data.formats.reading import Format, Wanted
from pipelines.data.partitions import constant
from pipelines.data.pushdown import Condition, conditions
from pipelines.data.source import Source, Unit
from pipelines.data.split import Hashes, assign, identity_of_rows, identity_of_values, in_folds
from pipelines.errors import DataError, UserError
from pipelines.expressions import Derivation, Predicate
from pipelines.progress import Stage
from pipelines.schema import ARROW, ENCODED_TEXTS, Schema, canonical_type, cast
from pipelines.spec import DataSpec
from pipelines.storage import one_line

BLOCK_BYTES = 16 << 20
TASK_BYTES = 256 << 20  # Ray Data looks ten times a second for what has ended: each task costs its slot that long
MIN_TASK_BYTES = 4 << 20
MAX_TASKS = 2000
MAX_WARM = 64


@dataclass
class Counts:
    """What a read saw: rows and bytes of the files, and the rows that were left out, by reason."""

    rows: int = 0
    bytes: int = 0
    chunks: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    nulled: dict[str, int] = field(default_factory=dict)
    """Values that contradict the Schema and count as missing, by column (`data.on_error: null`)."""
    types: dict[str, dict[str, str]] = field(default_factory=dict)
    """The types that the files give a column, each with the first file that has it."""

    def drop(self, reason: str, rows: int) -> None:
        if rows:
            self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def touch(self, size: int, chunks: int) -> None:
        self.bytes += size
        self.chunks += chunks

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        self.bytes += other.bytes
        self.chunks += other.chunks
        for reason, rows in other.dropped.items():
            self.drop(reason, rows)
        for name, values in other.nulled.items():
            self.nulled[name] = self.nulled.get(name, 0) + values
        for name, types in other.types.items():
            for type, path in types.items():
                self.see(name, type, path)

    def see(self, name: str, type: str, path: str) -> None:
        """Note that a file has a column in a type; the first path by name is kept, whatever was read first."""
        known = self.types.setdefault(name, {})
        known[type] = min(path, known.get(type, path))


@dataclass(frozen=True)
class Block:
    """Rows of one unit. `identity` and `split` have one entry per row of `table`."""

    table: pa.Table
    identity: Hashes
    split: np.ndarray[tuple[int], np.dtype[np.int8]]
    groups: pa.ChunkedArray | None = None
    """The column whose groups are never split."""

    @property
    def places(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """What decides each train row's fold, from 0 to below 1; NaN for other rows."""
        return np.where(self.split == 0, in_folds(self.identity, self.groups), np.nan)

    def take(self, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Block:
        """The rows where the mask is true."""
        groups = None if self.groups is None else self.groups.filter(pa.array(mask))
        return Block(self.table.filter(pa.array(mask)), self.identity[mask], self.split[mask], groups)


class Rows(NamedTuple):
    """Consecutive rows of one unit, before anything is left out."""

    first_row: int
    table: pa.Table
    identity: Hashes


@dataclass(frozen=True)
class Reader:
    """How the units of one source become blocks with `columns`, in Schema order."""

    format: Format
    first_path: str
    """The file that the Schema's types come from, for messages."""
    own_splits: frozenset[str]
    """The splits that have files of their own."""
    raw: Schema
    """The columns as the files have them."""
    schema: Schema
    """The same with the derived ones."""
    data: DataSpec
    columns: tuple[str, ...]
    target: str | None
    """Rows where it is null are left out; None: every row is kept and `where` does not act."""

    @classmethod
    def of(cls, source: Source, raw: Schema, data: DataSpec, columns: set[str], target: str | None) -> Reader:
        schema = Derivation(expressions=data.derive).extend(raw)
        ordered = tuple(name for name in schema.names if name in columns)
        return cls(source.format, source.files[0].path, frozenset(source.splits), raw, schema, data, ordered, target)

    def only(self, columns: set[str]) -> Reader:
        """The same rows with other columns."""
        return replace(self, columns=tuple(name for name in self.schema.names if name in columns))

    @property
    def file_columns(self) -> list[str]:
        """The columns that are read from the files."""
        wanted = set(self.columns) | set(self.data.key)
        if self.target is not None:
            wanted |= {self.target} | (Predicate(sql=self.data.where).columns if self.data.where else set())
        if self.data.split.column is not None and self.target is not None:
            wanted.add(self.data.split.column)
        needed = self._derivation.needs(wanted)
        return [name for name in self.raw.names if name in needed]

    @cached_property
    def encoded(self) -> frozenset[str]:
        """The columns of texts that only transforms look at: a block may have each different text once (`schema.encoded`)."""
        if not self.format.encodes:
            return frozenset()
        names = set(self.columns) - self._filter_columns() - set(self.data.key) - set(self.data.derive)
        names -= self._derivation.needs(set(self.data.derive))
        return frozenset(name for name in self.raw.names if name in names and self.raw[name].kind == "categorical")

    @property
    def block_rows(self) -> int:
        """A function of the Schema alone: block borders must not depend on the machine."""
        return int(np.clip(BLOCK_BYTES // (12 * max(1, len(self.raw.columns))), 1024, 131072))

    @property
    def _derivation(self) -> Derivation:
        return Derivation(expressions=self.data.derive)

    def blocks(self, unit: Unit, counts: Counts) -> Iterator[Block]:
        """Yield the rows of a unit in file order; `counts` is added to as they come."""
        derivation = self._derivation.select(set(self.columns) | self._filter_columns())
        predicate = Predicate(sql=self.data.where) if self.data.where and self.target is not None else None
        with explained(unit.file):
            for table, identity in on_grid(self._rows(unit, counts), self.block_rows):
                table = derivation.apply(table)
                kept = self._filter(table, predicate, counts)
                if kept is not None:
                    table, identity = table.filter(kept), identity[kept.to_numpy(zero_copy_only=False)]
                groups = table[self.data.split.column] if self.data.split.by == "group" and self.target is not None else None
                yield Block(table.select(self.columns), identity, self._split(table, identity, unit), groups)
            unit.file.check_unchanged()

    def wanted(self, unit: Unit) -> Wanted:
        """What is asked of the format for a unit."""
        stored = [name for name in self.file_columns if name not in unit.file.partition]
        # Where the folders' names say all that is needed, some column tells how many rows there are.
        stored = stored or [name for name in self.raw.names if name not in unit.file.partition][:1]
        types = {name: ARROW["string" if self.raw[name].text else self.raw[name].type] for name in stored}
        return Wanted(types, self.block_rows, self.data.on_error == "null", self._conditions(stored), self.encoded)

    def _rows(self, unit: Unit, counts: Counts) -> Iterator[Rows]:
        """The rows of a unit as they come from the file, in canonical types."""
        wanted, lenient = self.wanted(unit), self.data.on_error == "null"
        row = unit.piece.first_row
        for table in self.format.read(unit.file, unit.piece, wanted, counts.touch):
            if isinstance(table, int):
                counts.rows += table
                counts.drop("where", table)
                row += table
                continue
            rows = table.num_rows
            counts.rows += rows
            table = self._canonical(table, unit, row, lenient, counts)
            yield Rows(row, table, self._identity(table, unit, row))
            row += rows

    def _conditions(self, stored: list[str]) -> list[Condition]:
        """The parts of `where` that a file's own statistics can answer: about its columns as they stand in it."""
        if self.target is None or self.data.on_error == "null":
            return []
        known = {name for name in stored if self.raw[name].text is None} - set(self.data.derive)
        return [condition for condition in conditions(self.data.where) if condition.column in known]

    def _filter_columns(self) -> set[str]:
        if self.target is None:
            return set()
        split = {self.data.split.column} if self.data.split.column is not None else set()
        return {self.target} | split | (Predicate(sql=self.data.where).columns if self.data.where else set())

    def _canonical(self, table: pa.Table, unit: Unit, row: int, lenient: bool, counts: Counts) -> pa.Table:
        columns, encoded = {}, self.encoded
        for name in self.file_columns:
            column = self.raw[name]
            if name in unit.file.partition:
                columns[name] = constant(unit.file, name, column.type, table.num_rows, lenient=lenient)
                continue
            if name not in table.column_names:
                if not lenient and not (self.target is None and column.nullable):
                    raise DataError(
                        f"{unit.file.path}: column '{name}' is missing, which {self.first_path} has; "
                        "add it, drop it under features.drop, or set data.on_error: null"
                    )
                columns[name] = pa.chunked_array([pa.nulls(table.num_rows, ARROW[column.type])])
                continue
            found = canonical_type(table[name].type)
            if found is not None and not pa.types.is_null(table[name].type):
                counts.see(name, found, unit.file.path)
            if name in encoded and table[name].type == ENCODED_TEXTS:
                columns[name] = table[name]
                continue
            try:
                columns[name] = cast(table[name], column.type, lenient=lenient, text=column.text)
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"{unit.file.path}: column '{name}' from row {row} on is {table[name].type} ({one_line(error)}); "
                    f"expected {column.type} as in {self.first_path}; write the files alike, or set data.on_error: null"
                    f"{f' (data.kinds.{name}: categorical keeps all texts)' if column.text else ''}"
                ) from error
            if lenient and (nulled := columns[name].null_count - table[name].null_count) > 0:
                counts.nulled[name] = counts.nulled.get(name, 0) + nulled
        return pa.table(columns) if columns else table.select([])

    def _identity(self, table: pa.Table, unit: Unit, row: int) -> Hashes:
        if self.data.key:
            return identity_of_values([table[name] for name in self.data.key])
        return identity_of_rows(unit.file.name_hash, row, table.num_rows)

    def _filter(self, table: pa.Table, predicate: Predicate | None, counts: Counts) -> pa.ChunkedArray | None:
        if self.target is None:
            return None
        kept = pc.is_valid(table[self.target])
        if pa.types.is_floating(table[self.target].type):
            kept = pc.and_(kept, pc.invert(pc.fill_null(pc.is_nan(table[self.target]), True)))
        if predicate is not None:
            where = predicate.mask(table)
            counts.drop("where", table.num_rows - (pc.sum(where).as_py() or 0))
            counts.drop("target is null", (pc.sum(where).as_py() or 0) - (pc.sum(pc.and_(where, kept)).as_py() or 0))
            kept = pc.and_(where, kept)
        else:
            counts.drop("target is null", table.num_rows - (pc.sum(kept).as_py() or 0))
        return None if pc.all(kept).as_py() else kept

    def _split(self, table: pa.Table, identity: Hashes, unit: Unit) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
        if self.target is None:
            return np.zeros(len(identity), np.int8)
        spec = self.data.split
        values = table[spec.column] if spec.column is not None else None
        return assign(spec, identity, values, self.own_splits, unit.file.split)


def on_grid(rows: Iterable[Rows], block_rows: int) -> Iterator[tuple[pa.Table, Hashes]]:
    """Put rows together so that block borders are at the multiples of `block_rows` in the file.

    Sums are rounded block by block: with these borders they have the same bits whatever the format, its row groups and the
    parts of a file that are passed over.
    """
    cell, parts = -1, list[Rows]()
    for some in rows:
        start = 0
        while start < len(some.identity):
            first = some.first_row + start
            if first // block_rows != cell and parts:
                yield pa.concat_tables([part.table for part in parts]), np.concatenate([part.identity for part in parts])
                parts = []
            cell = first // block_rows
            end = min(len(some.identity), start + (cell + 1) * block_rows - first)
            parts.append(Rows(first, some.table.slice(start, end - start), some.identity[start:end]))
            start = end
    if parts:
        yield pa.concat_tables([part.table for part in parts]), np.concatenate([part.identity for part in parts])


Each = Callable[[Unit, Iterator[Block]], Any]


def stream(source: Source, reader: Reader, each: Each) -> Iterator[tuple[Unit, Any, Counts]]:
    """Run `each(unit, blocks)` for every unit on the cluster; yield its results, with what was read, as they arrive, in no order.

    Each unit's result must be small; the rows themselves stay where they are read. Reading and `each` are one Ray Data operator.
    Raises the `UserError` that a task met.
    """
    import ray.data

    from pipelines.data.dataset import UnitDatasource, tuned

    tasks = group_units(source.units, _slots())
    # Once in the object store and not in every task: a Preprocessor with many categories is megabytes.
    shared = ray.put((reader, each))
    with tuned():
        dataset = ray.data.read_datasource(UnitDatasource(shared, tasks), override_num_blocks=max(1, len(tasks)))
        batches: Any = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        with contextlib.closing(batches):  # an error's traceback would hold the execution beyond the end of its Ray
            for batch in batches:
                for index, payload in zip(batch["unit"].to_pylist(), batch["result"].to_pylist(), strict=True):
                    result, counts = pickle.loads(payload)  # noqa: S301  # written a moment ago by our own task, never stored
                    if isinstance(result, UserError):
                        raise result
                    yield source.units[index], result, counts


def warm_up() -> None:
    """Let a worker for each slot import what reading needs, in a second or two, while this process does."""
    import ray

    for _ in range(min(MAX_WARM, _slots())):
        ray.remote(num_cpus=1, max_retries=0)(_import).remote()


def _import() -> None:
    import pipelines.data.dataset
    import pipelines.data.summary
    import pipelines.data.writing  # noqa: F401


def _slots() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def in_order(results: Iterable[tuple[Unit, Any, Counts]], stage: Stage, total: Counts | None = None) -> Iterator[Any]:
    """Yield the results in source order, each as soon as all before it are there; count what was read."""
    waiting: dict[int, Any] = {}
    following = 0
    for unit, result, counts in results:
        stage.advance(counts.rows)
        if total is not None:
            total.add(counts)
        waiting[unit.index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    assert not waiting, f"unit {following} was not read"


def group_units(units: list[Unit], slots: int) -> list[list[Unit]]:
    """Put neighbouring units into tasks: large ones first, for each task costs, and small ones last, so that slots end together.

    That is guided self-scheduling (Polychronopoulos and Kuck, 1987). A thousand tiny files are not a thousand tasks. Only the
    cost depends on the grouping: results are per unit.
    """
    left = sum(unit.bytes for unit in units)
    smallest = max(left // MAX_TASKS, MIN_TASK_BYTES)
    tasks: list[list[Unit]] = []
    room = 0
    for unit in units:
        if not tasks or room < unit.bytes:
            tasks.append([])
            room = max(smallest, min(TASK_BYTES, left // (2 * slots)))
        tasks[-1].append(unit)
        room -= unit.bytes
        left -= unit.bytes
    return tasks


def user_error_in(error: BaseException | None) -> UserError | None:
    """The user's error that a remote error was raised from, if there is one."""
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, UserError) and cause is None:
            return error
        error = cause
    return None
