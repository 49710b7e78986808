"""Formats that keep their columns apart: only the needed ones are read. Parquet, ORC, and the Arrow IPC file (Feather 2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq

from pipelines.data.files import File
from pipelines.data.formats.reading import CountedFile, Format, Piece, Touched, Wanted, no_options, sliced
from pipelines.data.pushdown import Bounds, Condition
from pipelines.schema import canonical_type
from pipelines.spec import DataSpec

PIECE_BYTES = 128 << 20  # row groups are put together up to this many uncompressed bytes


class Parquet(Format):
    """Parquet, by row groups; only the needed column chunks are read, each once."""

    suffixes = (".parquet", ".pq", ".parq")
    encodes = True

    def __init__(self, data: DataSpec) -> None:
        no_options("parquet", data)

    def pieces(self, file: File) -> list[Piece]:
        with pq.ParquetFile(file.path, filesystem=file.filesystem) as parquet:
            metadata = parquet.metadata
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

    def head(self, file: File, rows: int) -> pa.Table:
        with pq.ParquetFile(file.path, filesystem=file.filesystem) as parquet:
            for batch in parquet.iter_batches(batch_size=rows):
                return pa.Table.from_batches([batch])
            return parquet.schema_arrow.empty_table()

    def size(self, file: File, piece: Piece, wanted: Wanted) -> int:
        with pq.ParquetFile(file.path, filesystem=file.filesystem) as parquet:
            groups = [parquet.metadata.row_group(group) for group in piece.groups]
        return sum(_chunk_bytes(group, set(wanted.types)) for group in groups if _may_match(group, wanted.conditions))

    def read(self, file: File, piece: Piece, wanted: Wanted, touched: Touched) -> Iterator[pa.Table]:
        with file.random() as opened, _opened(opened, wanted.encoded) as parquet:
            names = parquet.schema_arrow.names
            columns = [name for name in wanted.types if name in names]
            runs = itertools.groupby(piece.groups, lambda group: _may_match(parquet.metadata.row_group(group), wanted.conditions))
            for needed, groups in [(needed, list(run)) for needed, run in runs]:
                if not needed:
                    yield sum(parquet.metadata.row_group(group).num_rows for group in groups)
                    continue
                for group in groups:
                    touched(_chunk_bytes(parquet.metadata.row_group(group), set(columns)), len(columns))
                for batch in parquet.iter_batches(batch_size=wanted.block_rows, row_groups=groups, columns=columns):
                    yield pa.Table.from_batches([batch])


def _opened(file: pa.NativeFile, encoded: frozenset[str]) -> pq.ParquetFile:
    """Open a file; those of the columns that it has as texts come as it keeps them, which takes half the time to read."""
    parquet = pq.ParquetFile(file, pre_buffer=True)
    found = [field.name for field in parquet.schema_arrow if field.name in encoded and canonical_type(field.type) == "string"]
    return pq.ParquetFile(file, pre_buffer=True, metadata=parquet.metadata, read_dictionary=found) if found else parquet


def _chunk_bytes(group: pq.RowGroupMetaData, columns: set[str]) -> int:
    chunks = [group.column(i) for i in range(group.num_columns)]
    return sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in columns)


def _may_match(group: pq.RowGroupMetaData, conditions: list[Condition]) -> bool:
    """Whether the footer leaves it open that some row of the group satisfies all conditions."""
    if not conditions:
        return True
    chunks = {(chunk := group.column(i)).path_in_schema: chunk for i in range(group.num_columns)}
    found = [(condition, chunks[condition.column].statistics) for condition in conditions if condition.column in chunks]
    return not any(
        condition.excludes(
            Bounds(
                statistics.min if statistics.has_min_max else None,
                statistics.max if statistics.has_min_max else None,
                statistics.has_null_count and statistics.null_count == group.num_rows,
            )
        )
        for condition, statistics in found
        if statistics is not None
    )


class ORC(Format):
    """ORC, a stripe at a time; one piece a file: pyarrow tells the rows of a file but not of a stripe."""

    suffixes = (".orc",)

    def __init__(self, data: DataSpec) -> None:
        no_options("orc", data)

    def pieces(self, file: File) -> list[Piece]:
        with file.random() as opened:
            rows = pyarrow.orc.ORCFile(opened).nrows
        return [Piece(0, rows, rows, file.size)] if rows else []

    def head(self, file: File, rows: int) -> pa.Table:
        with file.random() as opened:
            orc = pyarrow.orc.ORCFile(opened)
            if orc.nstripes == 0:
                return orc.schema.empty_table()
            return pa.Table.from_batches([orc.read_stripe(0).slice(0, rows)])

    def read(self, file: File, piece: Piece, wanted: Wanted, touched: Touched) -> Iterator[pa.Table]:
        with file.random() as opened:
            orc = pyarrow.orc.ORCFile(pa.PythonFile(CountedFile(opened, touched), mode="r"))
            columns = [name for name in wanted.types if name in orc.schema.names]
            touched(0, len(columns))
            for stripe in range(orc.nstripes):
                yield from sliced(orc.read_stripe(stripe, columns=columns), wanted.block_rows)


class Arrow(Format):
    """The Arrow IPC file, which Feather 2 is, a record batch at a time, compressed inside or not; one piece a file."""

    suffixes = (".arrow", ".feather", ".ipc")

    def __init__(self, data: DataSpec) -> None:
        no_options("arrow", data)

    def pieces(self, file: File) -> list[Piece]:
        with file.random() as opened:
            rows = pa.ipc.open_file(opened).count_rows()
        return [Piece(0, rows, rows, file.size)] if rows else []

    def head(self, file: File, rows: int) -> pa.Table:
        with file.random() as opened:
            ipc = pa.ipc.open_file(opened)
            if ipc.num_record_batches == 0:
                return ipc.schema.empty_table()
            return pa.Table.from_batches([ipc.get_batch(0).slice(0, rows)])

    def read(self, file: File, piece: Piece, wanted: Wanted, touched: Touched) -> Iterator[pa.Table]:
        with file.random() as opened:
            names = pa.ipc.open_file(opened).schema.names
            # No included field would mean all of them: then the first column is read for the number of rows.
            included = [i for i, name in enumerate(names) if name in wanted.types] or [0]
            counted = pa.PythonFile(CountedFile(opened, touched), mode="r")
            ipc = pa.ipc.open_file(counted, options=pa.ipc.IpcReadOptions(included_fields=included))
            columns = [name for name in wanted.types if name in names]
            touched(0, len(columns))
            for index in range(ipc.num_record_batches):
                yield from sliced(ipc.get_batch(index).select(columns), wanted.block_rows)
