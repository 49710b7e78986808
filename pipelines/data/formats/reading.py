"""What a format has to know: how its files are cut into pieces and read as Arrow tables of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import pyarrow as pa

from pipelines.data.files import COMPRESSIONS, File
from pipelines.data.pushdown import Condition
from pipelines.errors import SpecError
from pipelines.spec import DataSpec

TEXT_BLOCK_BYTES = 8 << 20
TEXT_RATIO = 4  # a compressed file is three to five times smaller than its text; this only balances work and sample


class Piece(NamedTuple):
    """A part of one file that is read in one go."""

    first_row: int
    rows: int | None
    """None where only reading tells."""
    estimated_rows: int
    bytes: int
    """Uncompressed bytes in the file, for balancing the work."""
    groups: tuple[int, ...] = ()
    """Parquet: its row groups."""
    where: str = ""
    """A database: which rows of the query."""
    seen: str = ""
    """A database: what tells whether the query's rows are those that were read before."""


Touched = Callable[[int, int], None]  # is told the bytes of the file that are read, and the column chunks


class Wanted(NamedTuple):
    """What a read is to yield."""

    types: dict[str, pa.DataType]
    """The columns with their canonical types; a column that the file lacks is left out."""
    block_rows: int
    """Rows of a table, at most."""
    lenient: bool
    """Values that do not fit their type are handed on in a type that can hold them, or as null; else they are an error."""
    conditions: list[Condition] = []  # a NamedTuple's default is never changed
    """Rows that do not satisfy all of them are not asked for."""
    encoded: frozenset[str] = frozenset()
    """Columns of texts that may come as dictionaries (`schema.ENCODED_TEXTS`)."""


class Format(Protocol):
    """A file format, set by `data.options`."""

    suffixes: ClassVar[tuple[str, ...]]
    encodes: ClassVar[bool] = False
    """Whether it can yield texts as dictionaries."""

    def __init__(self, data: DataSpec) -> None: ...

    def pieces(self, file: File) -> list[Piece]:
        """Cut a file, in row order, reading no more than its footer or its first block."""

    def head(self, file: File, rows: int) -> pa.Table:
        """The first rows with the types that the file itself says or suggests; at least the column names."""

    def size(self, file: File, piece: Piece, wanted: Wanted) -> int:
        """Bytes of the file that `read` will read, as far as its footer tells; else all of it."""
        return file.size

    def read(self, file: File, piece: Piece, wanted: Wanted, touched: Touched) -> Iterator[pa.Table | int]:
        """Yield the piece's rows in order; a number stands for that many rows that the conditions rule out unread."""


def no_options(name: str, data: DataSpec) -> None:
    """Raise `SpecError` where a format that has no options is given some."""
    if data.options:
        raise SpecError(f"data.options: {name} takes no options, found {', '.join(data.options)}; take them out")


def text_piece(file: File) -> Piece:
    """A text file as one piece: where a row starts is known only after all before it are read."""
    with file.stream() as stream:
        start = stream.read(1 << 16)
    lines = max(1, start.count(b"\n"))
    text = file.size * (TEXT_RATIO if file.path.lower().endswith(COMPRESSIONS) else 1)
    return Piece(0, None, max(1, int(text * lines / max(1, len(start)))), text)


def sliced(batch: pa.RecordBatch | pa.Table, rows: int) -> Iterator[pa.Table]:
    """The rows of a batch as tables of at most `rows` rows."""
    table = batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


class CountedFile:
    """An open file that tells how many bytes are read from it, for formats that say nothing of it themselves."""

    def __init__(self, file: Any, touched: Touched) -> None:
        self._file, self._touched = file, touched

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def read(self, size: int | None = None) -> bytes:
        content: bytes = self._file.read(size)
        self._touched(len(content), 0)
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()
