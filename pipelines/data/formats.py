"""How the files of each format are cut into pieces and read as Arrow tables of bounded size."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq

from pipelines.errors import SpecError, did_you_mean

PIECE_BYTES = 128 << 20  # row groups are put together up to this many uncompressed bytes
CSV_BLOCK_BYTES = 8 << 20
COMPRESSIONS = (".gz", ".bz2", ".zst", ".lz4")


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


class Format(Protocol):
    """A file format. `options` is `data.options` of the Spec."""

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, options: dict[str, Any]) -> None: ...

    def pieces(self, filesystem: pa.fs.FileSystem, path: str, size: int) -> list[Piece]:
        """Cut a file, in row order, reading no more than its footer or its first block."""

    def head(self, filesystem: pa.fs.FileSystem, path: str, rows: int) -> pa.Table:
        """The first rows with the types that the file itself says or suggests; at least the column names."""

    def read(
        self, filesystem: pa.fs.FileSystem, path: str, piece: Piece, types: dict[str, pa.DataType], block_rows: int, lenient: bool
    ) -> Iterator[pa.Table]:
        """Yield the piece's rows in order, in blocks whose borders depend on the file and `block_rows` alone.

        Only the columns in `types` are read; one that the file lacks is left out. Text is converted to these types, or left
        text with `lenient`.
        """

    def chunk_bytes(self, filesystem: pa.fs.FileSystem, path: str, piece: Piece, columns: list[str]) -> int:
        """Bytes of the file that reading these columns of the piece touches."""


class Parquet:
    """Parquet, by row groups; only the needed column chunks are read, each once."""

    suffixes = (".parquet", ".pq", ".parq")

    def __init__(self, options: dict[str, Any]) -> None:
        if options:
            raise SpecError(f"data.options: parquet takes no options, found {', '.join(options)}; take them out")

    def pieces(self, filesystem: pa.fs.FileSystem, path: str, size: int) -> list[Piece]:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            metadata = file.metadata
        pieces: list[Piece] = []
        groups: list[int] = []
        first, rows, size = 0, 0, 0
        for group in range(metadata.num_row_groups):
            group_size = metadata.row_group(group).total_byte_size
            if groups and size + group_size > PIECE_BYTES:
                pieces.append(Piece(first, rows, rows, size, tuple(groups)))
                first, rows, size, groups = first + rows, 0, 0, []
            rows, size = rows + metadata.row_group(group).num_rows, size + group_size
            groups.append(group)
        return [*pieces, Piece(first, rows, rows, size, tuple(groups))] if rows else pieces

    def head(self, filesystem: pa.fs.FileSystem, path: str, rows: int) -> pa.Table:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            for batch in file.iter_batches(batch_size=rows):
                return pa.Table.from_batches([batch])
            return file.schema_arrow.empty_table()

    def read(
        self, filesystem: pa.fs.FileSystem, path: str, piece: Piece, types: dict[str, pa.DataType], block_rows: int, lenient: bool
    ) -> Iterator[pa.Table]:
        with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as file:
            names = file.schema_arrow.names
            columns = [name for name in types if name in names]
            for batch in file.iter_batches(batch_size=block_rows, row_groups=list(piece.groups), columns=columns):
                yield pa.Table.from_batches([batch])

    def chunk_bytes(self, filesystem: pa.fs.FileSystem, path: str, piece: Piece, columns: list[str]) -> int:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            metadata = file.metadata
        wanted = set(columns)
        return sum(
            metadata.row_group(group).column(i).total_compressed_size
            for group in piece.groups
            for i in range(metadata.num_columns)
            if metadata.row_group(group).column(i).path_in_schema in wanted
        )


class CSV:
    """Delimited text with a header line, compressed or not; one piece a file, streamed in blocks of 8 MiB."""

    suffixes = tuple(base + end for base in (".csv", ".tsv", ".txt") for end in ("", *COMPRESSIONS))

    def __init__(self, options: dict[str, Any]) -> None:
        known: dict[str, type] = {"delimiter": str, "quote": str, "nulls": list, "encoding": str, "columns": list}
        for name, value in options.items():
            if name not in known:
                raise SpecError(f"data.options: '{name}' is no option of csv{did_you_mean(name, known)}")
            if not isinstance(value, known[name]):
                raise SpecError(f"data.options.{name}: found {value!r}; expected a {known[name].__name__}")
        self._delimiter: str | None = options.get("delimiter")
        for name in ("delimiter", "quote"):
            if name in options and len(options[name]) != 1:
                raise SpecError(f"data.options.{name}: found {options[name]!r}; expected one character")
        self._quote: str = options.get("quote", '"')
        self._nulls = ["", *(str(null) for null in options.get("nulls", ["NA", "NaN", "nan", "null", "NULL", "N/A", "#N/A"]))]
        self._encoding: str = options.get("encoding", "utf8")
        self._columns: list[str] | None = options.get("columns")
        try:
            codecs.lookup(self._encoding)
        except LookupError as error:
            raise SpecError(
                f"data.options.encoding: '{self._encoding}' is unknown; expected a name such as utf8 or latin-1"
            ) from error

    def pieces(self, filesystem: pa.fs.FileSystem, path: str, size: int) -> list[Piece]:
        with filesystem.open_input_stream(path) as file:
            start = file.read(1 << 16)
        lines = max(1, start.count(b"\n"))
        # A compressed file is three to five times smaller than its text; the estimate only balances work and sample.
        text = size * (4 if path.endswith(COMPRESSIONS) else 1)
        return [Piece(0, None, max(1, int(text * lines / max(1, len(start)))), text)]

    def head(self, filesystem: pa.fs.FileSystem, path: str, rows: int) -> pa.Table:
        with filesystem.open_input_stream(path) as file:
            reader = pa.csv.open_csv(file, self._read_options(1 << 20), self._parse_options(path), self._convert_options(None))
            try:
                return pa.Table.from_batches([reader.read_next_batch().slice(0, rows)])
            except StopIteration:
                return reader.schema.empty_table()

    def read(
        self, filesystem: pa.fs.FileSystem, path: str, piece: Piece, types: dict[str, pa.DataType], block_rows: int, lenient: bool
    ) -> Iterator[pa.Table]:
        there = set(self.head(filesystem, path, 1).column_names)
        types = {name: pa.large_string() if lenient else type for name, type in types.items() if name in there}
        with filesystem.open_input_stream(path) as file:
            reader = pa.csv.open_csv(
                file, self._read_options(CSV_BLOCK_BYTES), self._parse_options(path), self._convert_options(types)
            )
            for batch in reader:
                for start in range(0, batch.num_rows, block_rows):
                    yield pa.Table.from_batches([batch.slice(start, block_rows)])

    def chunk_bytes(self, filesystem: pa.fs.FileSystem, path: str, piece: Piece, columns: list[str]) -> int:
        return int(filesystem.get_file_info(path).size)

    def _read_options(self, block_bytes: int) -> pa.csv.ReadOptions:
        return pa.csv.ReadOptions(block_size=block_bytes, encoding=self._encoding, column_names=self._columns, use_threads=False)

    def _parse_options(self, path: str) -> pa.csv.ParseOptions:
        delimiter = self._delimiter or ("\t" if ".tsv" in path.rsplit("/", 1)[-1].lower() else ",")
        return pa.csv.ParseOptions(delimiter=delimiter, quote_char=self._quote, newlines_in_values=True)

    def _convert_options(self, types: dict[str, pa.DataType] | None) -> pa.csv.ConvertOptions:
        return pa.csv.ConvertOptions(
            null_values=self._nulls,
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            column_types=types,
            include_columns=None if types is None else list(types),
        )
