"""How rows and answers travel as an Arrow IPC stream: the same contract and limits without the cost of text."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contract import WORDS
from serve.errors import RequestError

if TYPE_CHECKING:
    from pipelines.artifact import Artifact

MEDIA: Final = "application/vnd.apache.arrow.stream"
_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2  # of Arrow's union MessageHeader


def table_of(body: bytes, artifact: Artifact, *, most_rows: int, most_bytes: int) -> pa.Table:
    """Return the model's columns of a stream; raises `RequestError`, for a stream may claim more than it holds.

    Compression is refused, as it is around JSON, and texts that unfold to more than `most_bytes` are too.
    """
    try:
        _refuse_compressed(body)
        batches, rows = [], 0
        with pa.ipc.open_stream(body) as reader:
            for batch in reader:
                rows += batch.num_rows
                if rows > most_rows:
                    expected = f"at most {most_rows} rows"
                    raise RequestError(413, "there are too many rows in one request", found=rows, expected=expected)
                batch.validate(full=True)
                batches.append(batch)
            table = pa.Table.from_batches(batches, reader.schema)
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        struct.error,
        OverflowError,
        IndexError,
    ) as error:  # as pyarrow happens to say it
        message = " ".join(str(error).split())[:200]
        raise RequestError(422, f"the body is no Arrow IPC stream: {message}", expected=MEDIA) from None
    return _columns(table, artifact, most_bytes)


def stream_of(answers: pa.Table, **facts: str) -> bytes:
    """The answers as a stream; the facts are the metadata of its schema."""
    sink = pa.BufferOutputStream()
    answers = answers.replace_schema_metadata(facts)
    with pa.ipc.new_stream(sink, answers.schema) as writer:
        writer.write_table(answers)
    return bytes(sink.getvalue())


def _columns(table: pa.Table, artifact: Artifact, most_bytes: int) -> pa.Table:
    arrays: dict[str, Any] = {}
    for column in artifact.inputs:
        places = table.schema.get_all_field_indices(column.name)
        if len(places) > 1:
            raise RequestError(422, f"there are two columns '{column.name}'", column=column.name)
        if not places:
            continue
        values = table.column(places[0])
        if column.nullable is False and values.null_count:
            row = pc.index(values.is_null(), True).as_py()
            message = f"row {row}: column '{column.name}' is null; it was never missing in the training data"
            raise RequestError(422, message, row=row, column=column.name, expected=WORDS[column.type])
        arrays[column.name] = _unfolded(values, column.name, most_bytes)
    return pa.table(arrays) if arrays else table.select([])


def _unfolded(values: pa.ChunkedArray, name: str, most_bytes: int) -> pa.ChunkedArray:
    """The values without a dictionary; its few texts may stand for many."""
    found, is_dictionary = values.type, pa.types.is_dictionary(values.type)
    plain = found.value_type if is_dictionary else found
    texts = pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)
    if not texts and (
        is_dictionary or not (pa.types.is_primitive(plain) or pa.types.is_decimal(plain) or pa.types.is_null(plain))
    ):
        raise RequestError(422, f"column '{name}' has a type that no model reads", column=name, found=str(found)[:100])
    if not texts:
        return values
    if sum(_bytes(chunk, is_dictionary) for chunk in values.chunks) > most_bytes:
        raise RequestError(413, f"the texts of column '{name}' are too large", expected=f"at most {most_bytes} bytes")
    return values.cast(plain) if is_dictionary else values


def _bytes(chunk: pa.Array, is_dictionary: bool) -> int:
    lengths = pc.binary_length((chunk.dictionary if is_dictionary else chunk).cast(pa.large_string()))
    return pc.sum(lengths.take(chunk.indices) if is_dictionary else lengths).as_py() or 0


def _refuse_compressed(body: bytes) -> None:
    """Refuse a stream with compressed buffers, from which a few bytes would become any number; pyarrow does not tell."""
    reader = pa.ipc.MessageReader.open_stream(body)
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        if _is_compressed(message.metadata.to_pybytes()):
            raise RequestError(415, "the stream is compressed", expected="Arrow IPC without compression")


def _is_compressed(metadata: bytes) -> bool:
    """Whether a Message, a flatbuffer, holds a batch with the field `compression` (Arrow's Message.fbs)."""
    root = struct.unpack_from("<I", metadata, 0)[0]
    kind = _field(metadata, root, 1)
    header = _field(metadata, root, 2)
    if not kind or not header or metadata[kind] not in (_RECORD_BATCH, _DICTIONARY_BATCH):
        return False
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    if metadata[kind] == _DICTIONARY_BATCH:
        data = _field(metadata, batch, 1)
        if not data:
            return False
        batch = data + struct.unpack_from("<I", metadata, data)[0]
    return _field(metadata, batch, 3) != 0


def _field(buffer: bytes, table: int, slot: int) -> int:
    """Where a table's field stands; 0: it has none."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    size = struct.unpack_from("<H", buffer, vtable)[0]
    entry = 4 + 2 * slot
    offset = struct.unpack_from("<H", buffer, vtable + entry)[0] if entry < size else 0
    return table + offset if offset else 0
