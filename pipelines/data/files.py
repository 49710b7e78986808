"""What one file is, and which files a location stands for."""

from __future__ import annotations

import datetime
import fnmatch
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs

from pipelines.errors import DataError
from pipelines.storage import check_no_secret, one_line, open_location

GLOB: Final = frozenset("*?[")
DATABASES: Final = ("postgresql", "postgres", "sqlite")
COMPRESSIONS: Final = (".gz", ".bz2", ".zst", ".lz4")


@dataclass(frozen=True)
class File:
    """One file as the listing saw it; `name` is its path relative to the root of the source it was found in."""

    filesystem: pa.fs.FileSystem | None
    """None: a database, whose URI is `path`."""
    path: str
    name: str
    size: int
    mtime_ns: int
    split: str | None
    """The split that `data.source` gives to all its rows, if it does."""
    suffixes: tuple[str, ...] = ()
    """The endings that say its format: they are no part of its rows' identity."""
    partition: dict[str, str | None] = field(default_factory=dict)
    """The values that its folders' names give to all its rows (`year=2013`)."""

    @cached_property
    def name_hash(self) -> int:
        """64 bits of the relative name without the format's ending, by BLAKE2b: equal for part-0.parquet and part-0.csv.gz."""
        return int.from_bytes(hashlib.blake2b(self.stem.encode(), digest_size=8).digest(), "little")

    @property
    def stem(self) -> str:
        """The relative name without the format's ending."""
        ending = max((s for s in self.suffixes if self.name.lower().endswith(s)), key=len, default="")
        return self.name[: len(self.name) - len(ending)]

    @property
    def is_database(self) -> bool:
        return self.filesystem is None

    def stream(self) -> Any:
        """Open it to be read from its start, decompressed as its name says."""
        assert self.filesystem is not None
        return self.filesystem.open_input_stream(self.path)

    def random(self) -> Any:
        """Open it to be read at any place."""
        assert self.filesystem is not None
        return self.filesystem.open_input_file(self.path)

    def check_unchanged(self) -> None:
        """Raise `DataError` unless it is the file that the listing saw, by size and time of change."""
        if self.filesystem is None:
            return
        now = self.filesystem.get_file_info(self.path)
        if now.type == pa.fs.FileType.NotFound:
            raise DataError(f"{self.path}: vanished while it was read; run again when its folder is at rest")
        # Object stores list milliseconds and answer about one object in whole seconds.
        unit = 1 if isinstance(self.filesystem, pa.fs.LocalFileSystem) else 10**9
        if (now.size or 0) != self.size or (now.mtime_ns or 0) // unit != self.mtime_ns // unit:
            raise DataError(
                f"{self.path}: changed while it was read: it had {self.size} bytes of {_time(self.mtime_ns)} and has "
                f"{now.size} of {_time(now.mtime_ns or 0)}; run again when nothing writes to it"
            )


class explained:  # noqa: N801  # used as a verb: with explained(file)
    """Turn an error of reading one file into a sentence that names the file."""

    def __init__(self, file: File) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # ArrowInvalid is a ValueError; OSError covers a missing, cut off or unreachable file.
        if not isinstance(error, (ValueError, OSError, pa.ArrowException, DataError)):
            return
        try:
            self._file.check_unchanged()  # a file that was replaced meanwhile fails in any way: say the cause
        except (OSError, pa.ArrowException):
            pass  # the store cannot be asked: what went wrong first is what is told
        except DataError as changed:
            raise changed from error
        if not isinstance(error, DataError):
            remedy = "replace the file or take it out of data.source"
            if isinstance(error, OSError) and not isinstance(self._file.filesystem, pa.fs.LocalFileSystem):
                remedy = "check the file and the connection, and run again"
            raise DataError(f"{self._file.path}: cannot be read: {one_line(error)}; {remedy}") from error


def find(location: str, split: str | None) -> list[File]:
    """List the files of a location, sorted by name; a database is one. Raises `DataError` where there are none."""
    check_no_secret(location, "data.source: ")
    if is_database(location):
        return [_database(location, split)]
    filesystem, path = open_location(location)
    root = root_of(path)
    try:
        entry = filesystem.get_file_info(root)
        if entry.type == pyarrow.fs.FileType.NotFound:
            hint = "bucket and path" if "://" in location else "path (relative paths start at the current folder)"
            raise DataError(f"data.source: '{location}' does not exist; check the {hint}")
        if entry.type == pyarrow.fs.FileType.File:
            return [_file(filesystem, entry, root.rpartition("/")[0], split)]
        entries = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"data.source: '{location}' cannot be listed: {one_line(error)}; check the URI and the credentials"
        ) from error
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


def root_of(path: str) -> str:
    """The folder above the first wildcard; the path itself where there is none."""
    while GLOB & set(path):
        path = path.rpartition("/")[0]
    return path


def is_database(location: str) -> bool:
    return location.partition("://")[0] in DATABASES


def _database(location: str, split: str | None) -> File:
    return File(None, location, "query", 0, 0, split)


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


def _time(mtime_ns: int) -> str:
    return datetime.datetime.fromtimestamp(mtime_ns / 1e9, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
