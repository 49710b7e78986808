"""Which files a source consists of, and the read units they are cut into.

A read unit is (file relative to the source's root, first row, rows): whole row groups of a Parquet file, or one text file. Units
are planned from footers alone, in source order: sorted by name within each root. Everything that must not depend on the
cluster (split, statistics, order of the prepared rows) hangs on them.
"""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow.fs

from pipelines.data.formats import Format, Piece
from pipelines.errors import DataError, SpecError
from pipelines.registry import FORMATS, load
from pipelines.spec import DataSpec
from pipelines.storage import one_line, open_location

GLOB = frozenset("*?[")


@dataclass(frozen=True)
class File:
    """One file; `name` is its path relative to the root of the source it was found in."""

    filesystem: pyarrow.fs.FileSystem
    path: str
    name: str
    size: int
    mtime_ns: int
    split: str | None
    """The split that `data.source` gives to all its rows, if it does."""

    @cached_property
    def name_hash(self) -> int:
        """64 bits of the relative name, by BLAKE2b."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "little")


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

    @classmethod
    def open(cls, spec: DataSpec) -> Source:
        """List the files and read their footers. Raises `DataError` for what is missing, empty or unreadable."""
        files = [file for split, location in _locations(spec.source) for file in _find(location, split)]
        name = spec.format or _format_of(files)
        form: Format = load(FORMATS, name, "data.format")(spec.options)
        units: list[Unit] = []
        for file in files:
            with explained(file):
                units += [
                    Unit(len(units) + i, file, piece)
                    for i, piece in enumerate(form.pieces(file.filesystem, file.path, file.size))
                ]
        return cls(form, name, files, units)

    @property
    def rows(self) -> int:
        """Rows before any filter: exact from footers, estimated for text."""
        return sum(unit.piece.rows if unit.piece.rows is not None else unit.piece.estimated_rows for unit in self.units)

    @property
    def splits(self) -> set[str]:
        """The splits that have files of their own."""
        return {file.split for file in self.files if file.split is not None}

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether the files are the ones that were read before: name, size and time of change of each."""
        return {
            f"{file.split}: {file.path}" if file.split else file.path: [file.name, file.size, file.mtime_ns]
            for file in self.files
        }


class explained:  # noqa: N801  # used as a verb: with explained(file)
    """Turn an error of reading one file into a sentence that names the file."""

    def __init__(self, file: File) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # ArrowInvalid is a ValueError; OSError covers a missing, cut off or unreachable file.
        if isinstance(error, (ValueError, OSError)) and not isinstance(error, DataError):
            raise DataError(
                f"{self._file.path}: cannot be read: {one_line(error)}; replace the file or take it out of data.source"
            ) from error


def _locations(source: Any) -> list[tuple[str | None, str]]:
    by_split = source if isinstance(source, dict) else {None: source}
    return [(split, one) for split, many in by_split.items() for one in ([many] if isinstance(many, str) else many)]


def locations_of(spec: DataSpec) -> list[str]:
    """The files, folders, globs and URIs of `data.source`."""
    return [location for _, location in _locations(spec.source)]


def root_of(path: str) -> str:
    """The folder above the first wildcard; the path itself where there is none."""
    while GLOB & set(path):
        path = path.rpartition("/")[0]
    return path


def _find(location: str, split: str | None) -> list[File]:
    filesystem, path = open_location(location)
    root = root_of(path)
    try:
        entry = filesystem.get_file_info(root)
        if entry.type == pyarrow.fs.FileType.NotFound:
            raise DataError(
                f"data.source: '{location}' does not exist; check the path (relative paths start at the current folder)"
            )
        if entry.type == pyarrow.fs.FileType.File:
            return [_file(filesystem, entry, root.rpartition("/")[0], split)]
        entries = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    except OSError as error:
        raise DataError(f"data.source: '{location}' cannot be listed: {one_line(error)}") from error
    files = [
        _file(filesystem, entry, root, split)
        for entry in sorted(entries, key=lambda entry: entry.path)
        if entry.type == pyarrow.fs.FileType.File and entry.size > 0 and _counts(entry.path[len(root) + 1 :])
    ]
    if root != path:
        files = [file for file in files if _matches(file.path, path)]
    if not files:
        what = "matches no file" if root != path else "has no files in it"
        raise DataError(f"data.source: '{location}' {what}; expected files such as {root}/part-0.parquet or {root}/part-0.csv")
    return files


def _file(filesystem: pyarrow.fs.FileSystem, entry: pyarrow.fs.FileInfo, root: str, split: str | None) -> File:
    return File(filesystem, entry.path, entry.path[len(root) + 1 :], entry.size or 0, entry.mtime_ns or 0, split)


def _counts(name: str) -> bool:
    """Leave out what writers put beside their data: _SUCCESS, _metadata, .crc, hidden folders."""
    return not any(part.startswith(("_", ".")) for part in name.split("/"))


def _matches(path: str, pattern: str) -> bool:
    """Match part by part, so that * stays within a folder; ** spans any number of them."""
    return _match_parts(path.split("/"), pattern.split("/"))


def _match_parts(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_match_parts(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _match_parts(parts[1:], patterns[1:])


def _format_of(files: list[File]) -> str:
    found: dict[str, File] = {}
    for file in files:
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
