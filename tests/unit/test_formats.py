"""Every format gives the same table the same way: types, rows, block borders, identities; and its own wrong files."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.orc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.infer import infer_schema
from pipelines.data.read import Block, Counts, Reader, Rows, on_grid
from pipelines.data.source import Source
from pipelines.errors import DataError, SpecError
from pipelines.schema import decoded
from pipelines.spec import DataSpec

FORMATS = ("parquet", "csv", "csv.gz", "jsonl", "jsonl.gz", "ndjson.zst", "orc", "arrow", "feather")


def frame(rows: int, start: int = 0) -> pl.DataFrame:
    numbers = np.arange(start, start + rows)
    return pl.DataFrame(
        {
            "n": numbers,
            "x": [None if i % 7 == 0 else i / 4 for i in numbers.tolist()],
            "s": [None if i % 5 == 0 else f'ü "{i % 3}", \\n' for i in numbers.tolist()],
            "y": (numbers % 2 == 0),
            "t": (np.datetime64("2024-01-01T00:00:00.25") + numbers.astype("timedelta64[m]")).astype("datetime64[us]"),
            "d": (np.datetime64("2024-01-01") + numbers % 40).astype("datetime64[D]"),
        }
    )


def write(frame: pl.DataFrame, path: Path) -> None:
    """In the format that the name says, in parts that differ from one format to the next."""
    name = path.name
    if name.endswith(".parquet"):
        frame.write_parquet(path, row_group_size=70)
    elif ".csv" in name:
        content = frame.write_csv(null_value="NA").encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    elif "json" in name:
        with (
            pa.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[path.suffix[1:]])
            if path.suffix
            in (
                ".gz",
                ".zst",
            )
            else pa.OSFile(str(path), "wb") as file
        ):
            file.write(frame.write_ndjson().encode())
    elif name.endswith(".orc"):
        table = frame.to_arrow()  # ORC's writer knows no string views
        table = table.cast(pa.schema([(f.name, pa.string() if f.type == pa.string_view() else f.type) for f in table.schema]))
        pyarrow.orc.write_table(table, str(path), stripe_size=4096, compression="zstd")
    else:
        compression = "lz4" if name.endswith(".arrow") else "zstd"
        table = frame.to_arrow()
        with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
            file.write_table(table, max_chunksize=90)


def blocks_of(data: DataSpec, columns: set[str] | None = None, target: str | None = "y") -> tuple[list[Block], Counts, Reader]:
    source = Source.open(data)
    raw = infer_schema(source, data)
    reader = Reader.of(source, raw, data, columns or set(raw.names), target)
    counts = Counts()
    return [block for unit in source.units for block in reader.blocks(unit, counts)], counts, reader


def folder_of(tmp_path: Path, suffix: str) -> Path:
    folder = tmp_path / suffix
    folder.mkdir()
    for i in range(3):
        write(frame(400, 400 * i), folder / f"part-{i}.{suffix}")
    return folder


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_schema_rows_identities_and_split(tmp_path: Path, suffix: str) -> None:
    expected, _, parquet = blocks_of(DataSpec(source=str(folder_of(tmp_path, "parquet"))))
    if suffix == "parquet":
        assert pl.from_arrow(pa.concat_tables([b.table for b in expected])).drop("d").equals(frame(1200).drop("d"))  # type: ignore[union-attr,arg-type]
        return

    found, counts, reader = blocks_of(DataSpec(source=str(folder_of(tmp_path, suffix))))

    assert reader.raw == parquet.raw and counts.rows == 1200
    assert len(found) == len(expected)
    for block, wanted in zip(found, expected, strict=True):
        assert block.table.equals(decoded(wanted.table))
        assert np.array_equal(block.identity, wanted.identity) and np.array_equal(block.split, wanted.split)


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 1000), max_size=12), block_rows=st.integers(1, 300), first=st.integers(0, 500))
def test_blocks_have_the_same_borders_however_the_rows_arrive(cuts: list[int], block_rows: int, first: int) -> None:
    borders = sorted({0, 1000, *cuts})
    table = pa.table({"a": np.arange(1000) + first})
    identity = np.arange(1000, dtype=np.uint64)
    parts = [Rows(first + a, table.slice(a, b - a), identity[a:b]) for a, b in itertools.pairwise(borders)]

    found = list(on_grid(parts, block_rows))

    assert pa.concat_tables([block for block, _ in found]).equals(table)
    assert np.array_equal(np.concatenate([hashes for _, hashes in found]), identity)
    starts = [block["a"][0].as_py() for block, _ in found]
    assert starts == [first, *range((first // block_rows + 1) * block_rows, first + 1000, block_rows)]


def test_two_files_that_differ_in_their_ending_alone_stay_two(tmp_path: Path) -> None:
    write(frame(50), tmp_path / "a.csv")
    write(frame(50, 50), tmp_path / "a.csv.gz")
    blocks, _, _ = blocks_of(DataSpec(source=str(tmp_path)))
    assert len(set(np.concatenate([block.identity for block in blocks]).tolist())) == 100


@pytest.mark.parametrize("suffix", ["parquet", "orc", "arrow"])
def test_columns_that_are_not_needed_are_not_read(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    table = pa.table({f"c{i}": rng.random(50_000) for i in range(8)})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pl.DataFrame(table).write_parquet(path)
    elif suffix == "orc":
        pyarrow.orc.write_table(table, str(path))
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    _, one, _ = blocks_of(DataSpec(source=str(path)), {"c1"}, None)
    _, everything, _ = blocks_of(DataSpec(source=str(path)), None, None)
    assert one.bytes < 0.2 * everything.bytes and one.rows == everything.rows == 50_000
    assert 400_000 * 8 * 0.9 < everything.bytes < 1.1 * path.stat().st_size


def test_json_values_that_no_column_can_hold_are_unseen_and_keys_may_lack(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"a": 1, "list": [1], "object": {"b": 2}}\n\n   \n{"object": null, "b": "x"}\n{"a": 2.5, "new": 1}'
    )
    blocks, _, reader = blocks_of(DataSpec(source=str(tmp_path)), None, None)
    assert reader.raw.names == ["a", "b", "new"]
    assert blocks[0].table.to_pylist() == [
        {"a": 1.0, "b": None, "new": None},
        {"a": None, "b": "x", "new": None},
        {"a": 2.5, "b": None, "new": 1},
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"oops"', "column 'a' in line 100001 is 'oops'; expected int64; mend the line, or set data.on_error: null"),
        ("1.5", "column 'a' in line 100001 is 1.5; expected int64"),
        ("[1]", "column 'a' in line 100001 is \\[1\\]; expected int64"),
        ("true", "column 'a' in line 100001 is True; expected int64"),
        ("99999999999999999999", "column 'a' in line 100001 is .*; expected int64"),
    ],
)
def test_a_later_json_value_of_another_type_is_named_or_null(tmp_path: Path, value: str, message: str) -> None:
    lines = [json.dumps({"a": i, "b": "x" * 20, "t": "2024-01-01T00:00:00"}) for i in range(100_000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, f'{{"a": {value}, "b": "last", "t": "no time"}}']) + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl: {message}") as caught:
        blocks_of(DataSpec(source=str(tmp_path)), None, None)
    assert "\n" not in str(caught.value)

    blocks, _, _ = blocks_of(DataSpec(source=str(tmp_path), on_error="null"), None, None)

    table = pa.concat_tables([block.table for block in blocks])
    assert table["a"].null_count == 1 and table["a"][99_999].as_py() == 99_999
    assert table["b"][100_000].as_py() == "last" and table["t"].null_count == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ', r"a\.jsonl: line 2 is not JSON: .*; expected one object a line, whole"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl: line 1 is \[1, 2\]; expected one JSON object a line"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl: line 1 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x"}\n', r"a\.jsonl: the first lines are not alike: .*a.* changed from number to string"),
        ("a.arrow", b"ARROW1 not at all", r"a\.arrow: cannot be read"),
        ("a.orc", b"ORC not at all", r"a\.orc: cannot be read"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        blocks_of(DataSpec(source=str(tmp_path)), None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_half_written_file_is_one_sentence(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write(
        frame(3000).with_columns(r=pl.Series(np.random.default_rng(0).random(3000))).drop("r")
        if suffix == "orc"
        else frame(3000),
        path,
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=rf"a\.{suffix}: ") as caught:
        blocks_of(DataSpec(source=str(tmp_path)), None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "orc", "arrow"])
def test_formats_without_options_say_so(tmp_path: Path, suffix: str) -> None:
    write(frame(5), tmp_path / f"a.{suffix}")
    with pytest.raises(SpecError, match="takes no options, found delimiter"):
        Source.open(DataSpec(source=str(tmp_path), options={"delimiter": ";"}))


def test_a_file_that_changes_between_two_passes_is_named(tmp_path: Path) -> None:
    for change in ("longer", "same size", "vanished"):
        path = tmp_path / "a.csv"
        write(frame(50), path)
        data = DataSpec(source=str(path))
        source = Source.open(data)
        reader = Reader.of(source, infer_schema(source, data), data, {"n"}, None)
        assert sum(block.table.num_rows for block in reader.blocks(source.units[0], Counts())) == 50

        content: Any = path.read_bytes()
        if change == "longer":
            path.write_bytes(content + b"51,1,x,true,2024-01-01,2024-01-01\n")
        elif change == "same size":
            path.write_bytes(content[:-2] + b"9\n")
        else:
            path.unlink()

        with pytest.raises(
            DataError, match=r"a\.csv: vanished" if change == "vanished" else r"a\.csv: changed while it was read"
        ):
            list(reader.blocks(source.units[0], Counts()))
