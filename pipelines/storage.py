"""Where files are kept: a folder in any file system that `pyarrow.fs` opens, by path or URI."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs

from pipelines.errors import DataError, SpecError

RETRY_LIMIT: Final = "retry_limit_seconds"
GS_RETRY_S: Final = 30
SECRETS: Final = frozenset({"password", "sslpassword"})  # that the query of a URI may hold


def open_location(location: str) -> tuple[pa.fs.FileSystem, str]:
    """Return the file system and the path in it of a local path or a URI (s3:// gs:// abfs:// hdfs:// file://)."""
    if "://" not in location:
        return pa.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))
    check_no_secret(location)
    scheme, _, rest = location.partition("://")
    host, slash, path = rest.partition("/")
    # A glob's brackets are no characters of a URI; they come back in the path.
    encoded = f"{scheme}://{host}{slash}{path.replace('[', '%5B').replace(']', '%5D')}"
    if scheme in ("gs", "gcs") and RETRY_LIMIT not in location:  # else an unreachable bucket is tried for a quarter of an hour
        encoded += f"{'&' if '?' in encoded else '?'}{RETRY_LIMIT}={GS_RETRY_S}"
    try:
        filesystem, path = pa.fs.FileSystem.from_uri(encoded)
    except (pa.ArrowException, OSError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"'{location}' cannot be opened: {one_line(error)}; expected a path or a URI that pyarrow.fs knows"
        ) from error
    return filesystem, path.rstrip("/")


def check_no_secret(location: str, where: str = "") -> None:
    """Raise `SpecError` for a URI with a password in it, before it stands anywhere; `where` begins the sentence."""
    if "://" not in location:
        return
    try:
        address = urllib.parse.urlsplit(location)
    except ValueError as error:  # the text is not repeated: it may hold a password
        raise SpecError(
            f"{where}a {location.partition('://')[0]}:// URI is none: {error}; expected scheme://host/path"
        ) from error
    if address.password is not None or SECRETS & urllib.parse.parse_qs(address.query).keys():
        raise SpecError(
            f"{where}the {address.scheme}:// URI holds a password, which spec.yaml and messages would show; take it out and "
            "set it on every node as its client reads it (PGPASSWORD or ~/.pgpass; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )


def one_line(error: BaseException) -> str:
    """The error's message on one line, without the part that Arrow adds about its own source."""
    return " ".join(str(error).split(" Detail:")[0].split(" error_info=")[0].split()) or type(error).__name__


@dataclass(frozen=True)
class Folder:
    """One folder. Files appear whole or not at all: they are written aside and renamed, or are one object."""

    filesystem: pa.fs.FileSystem
    path: str
    query: str = ""
    """What stands behind the ? of its URI: how the file system is reached."""

    @classmethod
    def at(cls, location: str) -> Folder:
        """Open a path or URI; nothing is created."""
        return cls(*open_location(location), location.partition("?")[2] if "://" in location else "")

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}", self.query)

    def __str__(self) -> str:
        if self.is_local:
            return self.path
        return f"{self.filesystem.type_name}://{self.path}" + (f"?{self.query}" if self.query else "")

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pa.fs.LocalFileSystem)

    def exists(self, name: str) -> bool:
        try:
            return bool(self.filesystem.get_file_info(f"{self.path}/{name}").type != pa.fs.FileType.NotFound)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"'{self}' cannot be reached: {one_line(error)}; check the URI and the credentials") from error

    def names(self) -> list[str]:
        """Names of the files and folders in it, sorted; empty when it does not exist."""
        selector = pa.fs.FileSelector(self.path, allow_not_found=True)
        return sorted(entry.base_name for entry in self.filesystem.get_file_info(selector))

    def files(self) -> list[str]:
        """Paths of all files below it, relative to it, sorted."""
        return [name for name, _ in self.infos()]

    def infos(self) -> list[tuple[str, pa.fs.FileInfo]]:
        """All files below it by relative path, sorted, with size and time of change."""
        selector = pa.fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        entries = self.filesystem.get_file_info(selector)
        return sorted(((e.path[len(self.path) + 1 :], e) for e in entries if e.type == pa.fs.FileType.File), key=lambda e: e[0])

    def create(self) -> Folder:
        self.filesystem.create_dir(self.path, recursive=True)
        return self

    def delete(self) -> None:
        """Remove it with all that is in it; nothing happens when it does not exist."""
        if self.filesystem.get_file_info(self.path).type != pa.fs.FileType.NotFound:
            self.filesystem.delete_dir(self.path)

    def remove(self, name: str) -> None:
        """Delete one file."""
        self.filesystem.delete_file(f"{self.path}/{name}")

    def read_bytes(self, name: str) -> bytes:
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return bytes(file.read())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file, whole or not at all, and make the folders that it needs."""
        with self.writing(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a file to write it, and make the folders that it needs; a local one has its name only once it is whole."""
        target = f"{self.path}/{name}"
        self.filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
        aside = f"{target}.{uuid.uuid4().hex[:8]}.tmp" if self.is_local else target
        with self.filesystem.open_output_stream(aside) as file:
            yield file
        if aside != target:
            self.filesystem.move(aside, target)

    def append_text(self, name: str, text: str) -> None:
        """Add lines to a text file. Object stores cannot append, so there the file is written again."""
        if self.is_local:
            with open(f"{self.path}/{name}", "a") as file:
                file.write(text)
        else:
            before = self.read_bytes(name) if self.exists(name) else b""
            self.write_bytes(name, before + text.encode())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, content: Any) -> None:
        self.write_bytes(name, to_json(content).encode())

    def copy_to(self, other: Folder) -> None:
        """Copy all files below it into another folder, across file systems."""
        for name in self.files():
            other.write_bytes(name, self.read_bytes(name))

    def fetch(self, into: Path) -> None:
        """Copy all files below it into a local folder."""
        for name in self.files():
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)


def to_json(content: Any) -> str:
    """JSON with sorted keys and floats by `repr`: equal content has equal bytes. NaN and infinities are refused."""
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
