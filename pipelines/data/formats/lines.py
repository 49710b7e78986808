"""JSON Lines: one object a line, read in blocks of whole lines."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.json

from pipelines.data.files import COMPRESSIONS, File
from pipelines.data.formats.reading import TEXT_BLOCK_BYTES, Format, Piece, Touched, Wanted, no_options, sliced, text_piece
from pipelines.errors import DataError
from pipelines.spec import DataSpec

HEAD_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


class JSONLines(Format):
    """JSON Lines, compressed or not; one piece a file, streamed in blocks of 8 MiB.

    A key that a line lacks is null. Every line is parsed whole, so leaving columns out saves memory but reads no fewer bytes.
    """

    suffixes = tuple(base + end for base in (".jsonl", ".ndjson") for end in ("", *COMPRESSIONS))

    def __init__(self, data: DataSpec) -> None:
        no_options("jsonl", data)

    def pieces(self, file: File) -> list[Piece]:
        return [text_piece(file)]

    def head(self, file: File, rows: int) -> pa.Table:
        for _, block in _blocks(file, HEAD_BYTES):
            lines = b"\n".join(block.splitlines()[:rows])
            try:
                table = _parsed(lines)
            except (pa.ArrowInvalid, UnicodeDecodeError) as error:
                _refuse(file, 1, lines, None)
                raise DataError(f"{file.path}: the first lines are not alike: {' '.join(str(error).split())}") from error
            return pa.table([_times(column) for column in table.columns], table.column_names)
        return pa.table({})

    def read(self, file: File, piece: Piece, wanted: Wanted, touched: Touched) -> Iterator[pa.Table]:
        touched(file.size, len(wanted.types))
        schema = pa.schema(list(wanted.types.items()))
        parse = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        for line, block in _blocks(file, TEXT_BLOCK_BYTES):
            try:
                table = _parsed(block, parse)
            except (pa.ArrowInvalid, UnicodeDecodeError):
                if not wanted.lenient:
                    _refuse(file, line, block, wanted.types)
                table = _leniently(file, line, block, wanted.types)
            yield from sliced(table.select(list(wanted.types)), wanted.block_rows)


def _blocks(file: File, size: int) -> Iterator[tuple[int, bytes]]:
    """The text in blocks of whole lines of about `size` bytes, each with the number of its first line; none is blank."""
    line, block, rest = 1, b"", b""
    with file.stream() as stream:
        rest = stream.read(size).removeprefix(BOM)
        while chunk := stream.read(size):
            if block.strip():
                yield line, block
            line += block.count(b"\n")
            whole, newline, after = rest.rpartition(b"\n")
            block, rest = whole + newline, after + chunk
    block += rest
    if block.strip():
        yield line, block


def _parsed(block: bytes, options: pyarrow.json.ParseOptions | None = None) -> pa.Table:
    if not block.isascii():
        block.decode()  # Arrow takes bytes that are no UTF-8 as they are
    # One block: Arrow would infer each block's types from itself, and cut an object that is longer than a block.
    reading = pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    return pyarrow.json.read_json(pa.BufferReader(block), reading, options)


def _times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text that is an ISO time throughout as timestamps; Arrow itself sees only those of whole seconds."""
    if not pa.types.is_string(column.type) or column.null_count == len(column):
        return column
    for type in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return column.cast(type)
        except pa.ArrowInvalid:
            continue
    return column


def _objects(file: File, line: int, block: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(block.split(b"\n"), line):
        if not text.strip():
            continue
        try:
            found = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{file.path}: line {number} is not JSON: {error}; expected one object a line, whole") from error
        if not isinstance(found, dict):
            raise DataError(f"{file.path}: line {number} is {_shown(found)}; expected one JSON object a line")
        yield number, found


def _refuse(file: File, line: int, block: bytes, types: dict[str, pa.DataType] | None) -> None:
    """Raise the `DataError` that names the first line, and column, that cannot be read."""
    for number, found in _objects(file, line, block):
        for name, type in (types or {}).items():
            value = found.get(name)
            if value is not None and _fitting(value, type) is None:
                raise DataError(
                    f"{file.path}: column '{name}' in line {number} is {_shown(value)}; expected {type}; "
                    "mend the line, or set data.on_error: null"
                )


def _leniently(file: File, line: int, block: bytes, types: dict[str, pa.DataType]) -> pa.Table:
    """The block with null for what does not fit; times stay text, which the reader brings into their type."""
    rows = [found for _, found in _objects(file, line, block)]
    held = {name: pa.large_string() if pa.types.is_timestamp(type) else type for name, type in types.items()}
    return pa.table({name: pa.array([_fitting(row.get(name), type) for row in rows], type) for name, type in held.items()})


def _fitting(value: Any, type: pa.DataType) -> Any:
    """The value if it is one of the type, else None; the same values that Arrow's own reader takes."""
    if pa.types.is_large_string(type):
        return value if isinstance(value, str) else None
    if pa.types.is_boolean(type):
        return value if isinstance(value, bool) else None
    if pa.types.is_timestamp(type):
        return value if isinstance(value, str) and _is_time(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if pa.types.is_integer(type):
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    return float(value)


def _is_time(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
