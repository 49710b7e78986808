"""Delimited text with a header line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.csv

from pipelines.data.files import COMPRESSIONS, File
from pipelines.data.formats.reading import TEXT_BLOCK_BYTES, Format, Piece, Touched, Wanted, sliced, text_piece
from pipelines.errors import SpecError, did_you_mean
from pipelines.spec import DataSpec


class CSV(Format):
    """Delimited text with a header line, compressed or not; streamed in blocks of 8 MiB.

    One piece a file: whether a newline ends a row or stands inside quotes is known only from the text before it.
    """

    suffixes = tuple(base + end for base in (".csv", ".tsv", ".txt") for end in ("", *COMPRESSIONS))

    def __init__(self, data: DataSpec) -> None:
        options = data.options
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

    def pieces(self, file: File) -> list[Piece]:
        return [text_piece(file)]

    def head(self, file: File, rows: int) -> pa.Table:
        with file.stream() as stream:
            reader = pa.csv.open_csv(stream, self._read_options(1 << 20), self._parse_options(file), self._convert_options(None))
            try:
                return pa.Table.from_batches([reader.read_next_batch().slice(0, rows)])
            except StopIteration:
                return reader.schema.empty_table()

    def read(self, file: File, piece: Piece, wanted: Wanted, touched: Touched) -> Iterator[pa.Table]:
        touched(file.size, len(wanted.types))
        there = set(self.head(file, 1).column_names)
        types = {n: pa.large_string() if wanted.lenient else type for n, type in wanted.types.items() if n in there}
        with file.stream() as stream:
            options = (self._read_options(TEXT_BLOCK_BYTES), self._parse_options(file), self._convert_options(types))
            for batch in pa.csv.open_csv(stream, *options):
                yield from sliced(batch, wanted.block_rows)

    def _read_options(self, block_bytes: int) -> pa.csv.ReadOptions:
        return pa.csv.ReadOptions(block_size=block_bytes, encoding=self._encoding, column_names=self._columns, use_threads=False)

    def _parse_options(self, file: File) -> pa.csv.ParseOptions:
        delimiter = self._delimiter or ("\t" if ".tsv" in file.path.rsplit("/", 1)[-1].lower() else ",")
        return pa.csv.ParseOptions(delimiter=delimiter, quote_char=self._quote, newlines_in_values=True)

    def _convert_options(self, types: dict[str, pa.DataType] | None) -> pa.csv.ConvertOptions:
        return pa.csv.ConvertOptions(
            null_values=self._nulls,
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            column_types=types,
            include_columns=None if types is None else list(types),
        )
