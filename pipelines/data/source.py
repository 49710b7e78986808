"""Which files a source consists of, and the read units they are cut into.

A read unit is (file relative to the source's root, first row, rows): whole row groups of a Parquet file, or one text file. Units
are planned from footers alone, in source order: sorted by name within each root. Everything that must not depend on the
cluster (split, statistics, order of the prepared rows) hangs on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipelines.data.files import File, explained, find
from pipelines.data.formats.reading import Format, Piece
from pipelines.data.partitions import partition_types, prune, with_partition
from pipelines.errors import SpecError
from pipelines.registry import FORMATS, load
from pipelines.schema import Type
from pipelines.spec import DataSpec


@dataclass(frozen=True)
class Unit:
    """What one read yields in one go. `rows` is None where only reading tells (text)."""

    index: int
    file: File
    piece: Piece

    @property
    def bytes(self) -> int:
        return self.piece.bytes


@dataclass(frozen=True)
class Source:
    """All files of `data.source`, their format and their units."""

    format: Format
    format_name: str
    files: list[File]
    units: list[Unit]
    partitions: dict[str, Type]
    """The columns that the folders' names give."""
    num_pruned: int
    """Files that `data.where` leaves out by their folders; they are in no other number here."""

    @classmethod
    def open(cls, spec: DataSpec) -> Source:
        """List the files and read their footers. Raises `DataError` for what is missing, empty or unreadable."""
        files = [file for split, location in _locations(spec.source) for file in find(location, split)]
        name = spec.format or _format_of(files)
        if len({file.is_database for file in files} | {name == "sql"}) > 1:
            raise SpecError(f"data.format: sql goes with postgresql:// and sqlite:// alone, found {name} with {files[0].path}")
        form: Format = load(FORMATS, name, "data.format")(spec)
        files = _with_stems(files, tuple(form.suffixes))
        listed = [with_partition(file) for file in files]
        partitions = partition_types(listed)
        files = prune(listed, partitions, spec)
        units: list[Unit] = []
        for file in files:
            with explained(file):
                units += [Unit(len(units) + i, file, piece) for i, piece in enumerate(form.pieces(file))]
        return cls(form, name, files, units, partitions, len(listed) - len(files))

    @property
    def rows(self) -> int:
        """Rows before any filter: exact from footers, estimated for text."""
        return sum(unit.piece.rows if unit.piece.rows is not None else unit.piece.estimated_rows for unit in self.units)

    @property
    def splits(self) -> set[str]:
        """The splits that have files of their own."""
        return {file.split for file in self.files if file.split is not None}

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether the rows are the ones that were read before: name, size and time of change of each file.

        Of a database: the number of rows and the extremes of the column that its ranges are cut by. The query is in the Spec.
        """
        files: dict[str, Any] = {
            f"{file.split}: {file.path}" if file.split else file.path: [file.name, file.size, file.mtime_ns]
            for file in self.files
        }
        return files | {f"{unit.file.path} range {unit.index}": unit.piece.seen for unit in self.units if unit.piece.seen}


def _locations(source: Any) -> list[tuple[str | None, str]]:
    by_split = source if isinstance(source, dict) else {None: source}
    return [(split, one) for split, many in by_split.items() for one in ([many] if isinstance(many, str) else many)]


def locations_of(spec: DataSpec) -> list[str]:
    """The files, folders, globs and URIs of `data.source`."""
    return [location for _, location in _locations(spec.source)]


def _with_stems(files: list[File], suffixes: tuple[str, ...]) -> list[File]:
    """The files with the endings that are no part of their identity, unless two would then be one: a.csv and a.csv.gz."""
    stems = [replace(file, suffixes=suffixes) for file in files]
    return stems if len({file.stem for file in stems}) == len({file.name for file in files}) else files


def _format_of(files: list[File]) -> str:
    found: dict[str, File] = {}
    for file in files:
        if file.is_database:
            found.setdefault("sql", file)
            continue
        for name in FORMATS:
            if file.name.lower().endswith(tuple(load(FORMATS, name, "data.format").suffixes)):
                found.setdefault(name, file)
                break
        else:
            raise SpecError(
                f"data.format: cannot be told from the file name {file.path}; set data.format to one of {', '.join(FORMATS)}, "
                "or name the data files alone with a glob such as folder/*.parquet"
            )
    if len(found) > 1:
        listed = ", ".join(f"{file.path} ({name})" for name, file in found.items())
        raise SpecError(f"data.source: files of more than one format: {listed}; name those of one format with a glob")
    return next(iter(found))
