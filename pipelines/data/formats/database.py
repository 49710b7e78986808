"""SQL databases: the rows of one query, over ADBC, which hands them out as Arrow batches."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from pipelines.data.files import File
from pipelines.data.formats.reading import Format, Piece, Touched, Wanted, sliced
from pipelines.errors import DataError, SpecError, did_you_mean
from pipelines.spec import DataSpec

PARTITION_ROWS: Final = 250_000
MAX_PARTITIONS: Final = 1000
# A server that is gone is told within these bounds instead of never.
LIMITS: Final = {"connect_timeout": "10", "tcp_user_timeout": "60000"}


class SQL(Format):
    """PostgreSQL and SQLite by URI and query, in ranges of an integer column, each ordered by `data.key`.

    The ranges follow from the rows and the extremes of the column alone; a range is read in one query of its own, so rows that
    change during a run may be seen by one query and not by another.
    """

    suffixes = ()

    def __init__(self, data: DataSpec) -> None:
        known = {"query": str, "partition": str, "partition_rows": int}
        for name, value in data.options.items():
            if name not in known:
                raise SpecError(f"data.options: '{name}' is no option of sql{did_you_mean(name, known)}")
            if not isinstance(value, known[name]) or isinstance(value, bool) or not value:
                raise SpecError(f"data.options.{name}: found {value!r}; expected a {known[name].__name__}, not empty")
        if "query" not in data.options:
            raise SpecError('data.options.query: is missing; a database needs one, such as "SELECT * FROM flights"')
        if not data.key:
            raise SpecError("data.key: is missing; rows of a database have no number, so name the columns that identify a row")
        self._query = data.options["query"].strip().rstrip(";")
        self._key = data.key
        self._partition: str = data.options.get("partition", data.key[0])
        self._asked = "partition" in data.options
        self._partition_rows = max(1, data.options.get("partition_rows", PARTITION_ROWS))

    def pieces(self, file: File) -> list[Piece]:
        names = Batches(file, f"SELECT * {self._rows} LIMIT 0").schema.names
        for where, column in [*(("data.key", name) for name in self._key), ("data.options.partition", self._partition)]:
            if column not in names:
                raise SpecError(f"{where}: the query gives no column '{column}'{did_you_mean(column, names)}")
        by = _quoted(self._partition)
        extremes = Batches(file, f"SELECT COUNT(*) AS n, MIN({by}) AS low, MAX({by}) AS high {self._rows}").read_all()
        count, low, high = (extremes[name][0].as_py() for name in ("n", "low", "high"))
        if not count:
            raise DataError(f"data.options.query: gives no row at {file.path}; expected at least one")
        whole = isinstance(low, int) and isinstance(high, int)
        if self._asked and not whole:
            raise SpecError(f"data.options.partition: '{self._partition}' is no integer column; leave it out, or name one")
        parts = min(MAX_PARTITIONS, math.ceil(count / self._partition_rows), high - low + 1) if whole else 1
        borders = [low + (high - low + 1) * i // parts for i in range(1, parts)]
        seen = f"{count} rows, {self._partition} from {low} to {high}"
        shares = [count * (i + 1) // parts - count * i // parts for i in range(parts)]
        ranges = _ranges(by, borders)
        return [
            Piece(0, None, max(1, rows), 100 * rows, where=where, seen=seen) for rows, where in zip(shares, ranges, strict=True)
        ]

    def head(self, file: File, rows: int) -> pa.Table:
        return _plain(Batches(file, f"SELECT * {self._rows} {self._order} LIMIT {rows}").read_all())

    def read(self, file: File, piece: Piece, wanted: Wanted, touched: Touched) -> Iterator[pa.Table | int]:
        columns = ", ".join(map(_quoted, wanted.types))
        touched(0, len(wanted.types))
        for batch in Batches(file, f"SELECT {columns} {self._rows} {piece.where} {self._order}"):
            touched(batch.nbytes, 0)
            yield from sliced(_plain(pa.Table.from_batches([batch])), wanted.block_rows)

    @property
    def _rows(self) -> str:
        return f"FROM (\n{self._query}\n) AS q"  # on lines of its own: the query may end in a comment

    @property
    def _order(self) -> str:
        return f"ORDER BY {', '.join(map(_quoted, self._key))}"


class Batches:
    """The Arrow batches of one query on a connection of its own, which ends with them."""

    def __init__(self, file: File, sql: str) -> None:
        self._file, self._sql = file, sql

    @property
    def schema(self) -> pa.Schema:
        with self._reader() as reader:
            return reader.schema

    def read_all(self) -> pa.Table:
        with self._reader() as reader:
            return reader.read_all()

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        with self._reader() as reader:
            yield from reader

    @contextlib.contextmanager
    def _reader(self) -> Iterator[pa.RecordBatchReader]:
        connect, address = _driver(self._file)
        import adbc_driver_manager

        try:
            with connect(address, autocommit=True) as connection, connection.cursor() as cursor:
                try:
                    cursor.execute(self._sql)
                except adbc_driver_manager.ProgrammingError as error:
                    raise SpecError(
                        f"data.options.query: {self._file.path} refuses it: {_message(error)}; expected a SELECT it can run"
                    ) from error
                yield cursor.fetch_record_batch()
        except (adbc_driver_manager.Error, OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{self._file.path}: cannot be read: {_message(error)}; check the URI, that the server runs, and the password "
                "(PGPASSWORD or ~/.pgpass, on every node)"
            ) from error


def _driver(file: File) -> tuple[Any, str]:
    scheme, _, rest = file.path.partition("://")
    kind = "sqlite" if scheme == "sqlite" else "postgresql"
    try:
        driver = importlib.import_module(f"adbc_driver_{kind}.dbapi")
    except ImportError as error:
        raise SpecError(f"data.source: {kind} needs a driver that is not installed: pip install 'heliostat[sql]'") from error
    if kind == "sqlite":
        path = Path(rest).expanduser().absolute()
        if not path.is_file():
            raise DataError(f"{file.path}: the file {path} does not exist; expected sqlite:///absolute/path or sqlite://path")
        return driver.connect, f"file:{urllib.parse.quote(str(path))}?mode=ro"
    address = urllib.parse.urlsplit(file.path)
    given = dict(urllib.parse.parse_qsl(address.query))
    return driver.connect, address._replace(query=urllib.parse.urlencode({**LIMITS, **given})).geturl()


def _ranges(by: str, borders: list[int]) -> list[str]:
    """Conditions that part all rows; open at both ends, for rows may come meanwhile, and null goes to the first."""
    if not borders:
        return [""]
    inner = [f"WHERE {by} >= {low} AND {by} < {high}" for low, high in itertools.pairwise(borders)]
    return [f"WHERE {by} < {borders[0]} OR {by} IS NULL", *inner, f"WHERE {by} >= {borders[-1]}"]


def _plain(table: pa.Table) -> pa.Table:
    """PostgreSQL's numeric, which ADBC hands out as text, as float64; other types of the server's own as what carries them."""
    for i, field in enumerate(table.schema):
        values = table.column(i)
        if isinstance(field.type, pa.BaseExtensionType):
            values = pa.chunked_array([chunk.storage for chunk in values.chunks], field.type.storage_type)
        if (field.metadata or {}).get(b"ADBC:postgresql:typname") == b"numeric":
            values = values.cast(pa.float64())
        table = table.set_column(i, field.name, values)
    return table


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _message(error: BaseException) -> str:
    """The server's own words, without the driver's about itself and without the query again."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^[A-Z_]+: (\[\w+\] )?", "", first)
