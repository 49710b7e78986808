"""From files to blocks: listing, units, types, identity, filters. No Ray: a Reader is a plain value."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import storage
from pipelines.data.formats.reading import Piece
from pipelines.data.infer import infer_schema, with_kinds
from pipelines.data.read import MIN_TASK_BYTES, TASK_BYTES, Block, Counts, Reader, group_units
from pipelines.data.source import Source, Unit
from pipelines.errors import DataError, SpecError, UserError
from pipelines.expressions import Derivation
from pipelines.spec import DataSpec


def frame(rows: int = 100, start: int = 0) -> pl.DataFrame:
    numbers = np.arange(start, start + rows)
    return pl.DataFrame(
        {
            "n": numbers,
            "x": [None if i % 7 == 0 else i / 4 for i in numbers.tolist()],
            "s": [None if i % 5 == 0 else f"c{i % 3}" for i in numbers.tolist()],
            "y": (numbers % 2 == 0),
        }
    )


def read(data: DataSpec, columns: set[str] | None = None, target: str | None = None) -> tuple[pa.Table, list[Block], Counts]:
    source = Source.open(data)
    raw = infer_schema(source, data)
    schema = with_kinds(Derivation(expressions=data.derive).extend(raw), data)
    reader = Reader.of(source, raw, data, columns or set(schema.names), target)
    counts = Counts()
    blocks = [block for unit in source.units for block in reader.blocks(unit, counts)]
    return pa.concat_tables([block.table for block in blocks]), blocks, counts


def write_all(folder: Path, suffix: str) -> None:
    folder.mkdir()
    for i in range(3):
        part = frame(100, 100 * i)
        if suffix == "parquet":
            part.write_parquet(folder / f"{i}.parquet", row_group_size=30)
        elif suffix == "csv":
            part.write_csv(folder / f"{i}.csv", null_value="NA")
        else:
            (folder / f"{i}.csv.gz").write_bytes(gzip.compress(part.write_csv(null_value="NA").encode()))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "csv.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    write_all(tmp_path / "data", suffix)
    table, _, counts = read(DataSpec(source=str(tmp_path / "data")))
    assert pl.from_arrow(table).equals(pl.concat([frame(100, 0), frame(100, 100), frame(100, 200)]))  # type: ignore[union-attr,arg-type]
    assert counts.rows == 300


def test_a_row_keeps_its_identity_whatever_is_read_or_dropped(tmp_path: Path) -> None:
    write_all(tmp_path / "data", "parquet")
    table, blocks, _ = read(DataSpec(source=str(tmp_path / "data")))
    by_number = dict(zip(table["n"].to_pylist(), np.concatenate([b.identity for b in blocks]).tolist(), strict=True))
    assert len(set(by_number.values())) == 300
    filtered, blocks, counts = read(DataSpec(source=str(tmp_path / "data"), where="n % 3 = 0"), {"n", "y"}, "y")
    found = dict(zip(filtered["n"].to_pylist(), np.concatenate([b.identity for b in blocks]).tolist(), strict=True))
    assert found == {n: by_number[n] for n in range(0, 300, 3)}
    assert counts.dropped == {"where": 200}


def test_moving_the_root_keeps_the_splits_and_key_columns_keep_them_across_files(tmp_path: Path) -> None:
    write_all(tmp_path / "one", "parquet")
    (tmp_path / "two").mkdir()
    write_all(tmp_path / "two" / "moved", "parquet")
    frame(300).write_parquet(tmp_path / "whole.parquet")

    def splits(source: Any, key: list[str]) -> list[int]:
        _, blocks, _ = read(DataSpec(source=source, key=key), {"n", "y"}, "y")
        return [code for block in blocks for code in block.split.tolist()]

    assert splits(str(tmp_path / "one"), []) == splits(str(tmp_path / "two" / "moved"), [])
    assert splits(str(tmp_path / "one"), ["n"]) == splits(str(tmp_path / "whole.parquet"), ["n"])


def test_rows_without_a_target_are_dropped_and_counted(tmp_path: Path) -> None:
    frame(100).write_parquet(tmp_path / "a.parquet")
    table, _, counts = read(DataSpec(source=str(tmp_path)), {"n", "x"}, "x")
    assert table.num_rows == 85 and counts.dropped == {"target is null": 15}


def test_only_needed_column_chunks_are_read_and_each_once(tmp_path: Path) -> None:
    frame(100).write_parquet(tmp_path / "a.parquet", row_group_size=25)
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    sizes = [metadata.row_group(g).column(0).total_compressed_size for g in range(metadata.num_row_groups)]
    _, _, counts = read(DataSpec(source=str(tmp_path)), {"n"})
    assert counts.bytes == sum(sizes) and counts.chunks == len(sizes)


def test_the_file_system_sees_no_more_bytes_than_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    pl.DataFrame({f"c{i}": rng.random(200_000) for i in range(8)}).write_parquet(tmp_path / "a.parquet")
    data = DataSpec(source=str(tmp_path))
    source = Source.open(data)
    reader = Reader.of(source, infer_schema(source, data), data, {"c1", "c5"}, None)
    counts = Counts()
    before = _read_by_this_process()
    for _ in reader.blocks(source.units[0], counts):
        pass
    touched = _read_by_this_process() - before
    assert counts.bytes <= touched < 1.2 * counts.bytes + 100_000


def _read_by_this_process() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_tiny_files_share_tasks_and_keep_their_order(tmp_path: Path) -> None:
    for i in range(50):
        frame(10, 10 * i).write_parquet(tmp_path / f"{i:03d}.parquet")
    units = Source.open(DataSpec(source=str(tmp_path))).units
    tasks = group_units(units, slots=2)
    assert len(tasks) == 1 and [unit.index for task in tasks for unit in task] == list(range(50))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 400 << 20), min_size=1, max_size=300), slots=st.integers(1, 64))
def test_tasks_keep_the_order_and_become_smaller(sizes: list[int], slots: int) -> None:
    units = [Unit(i, None, Piece(0, 1, 1, size)) for i, size in enumerate(sizes)]  # type: ignore[arg-type]

    tasks = group_units(units, slots)

    assert [unit for task in tasks for unit in task] == units
    left = sum(sizes)
    for task in tasks:
        # One unit may always be a task of its own; more of them are no more than a share of what is left.
        assert len(task) == 1 or sum(unit.bytes for unit in task) <= max(MIN_TASK_BYTES, min(TASK_BYTES, left // (2 * slots)))
        left -= sum(unit.bytes for unit in task)


def test_globs_lists_and_given_splits(tmp_path: Path) -> None:
    for name in ("a/1.parquet", "a/2.parquet", "b/1.parquet", "b/deep/3.parquet", "a/_SUCCESS", "a/.hidden.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        frame(10).write_parquet(tmp_path / name)
    names = lambda source: [file.path[len(str(tmp_path)) + 1 :] for file in Source.open(DataSpec(source=source)).files]  # noqa: E731
    assert names(f"{tmp_path}/*/1.parquet") == ["a/1.parquet", "b/1.parquet"]
    assert names(f"{tmp_path}/**/*.parquet") == ["a/1.parquet", "a/2.parquet", "b/1.parquet", "b/deep/3.parquet"]
    assert names([f"{tmp_path}/b/1.parquet", f"{tmp_path}/a"]) == ["b/1.parquet", "a/1.parquet", "a/2.parquet"]
    given = Source.open(DataSpec(source={"train": f"{tmp_path}/a", "test": f"{tmp_path}/b/1.parquet"}))
    assert [file.split for file in given.files] == ["train", "train", "test"] and given.splits == {"train", "test"}


def test_kinds_are_inferred_and_overruled(tmp_path: Path) -> None:
    pl.DataFrame(
        {
            "number": [1.5, 2.0],
            "code": ["a", "b"],
            "note": ["the plane was late because of rain", "nothing happened on this quiet day"],
            "flag": [True, False],
            "day": [pl.date(2013, 1, 1), pl.date(2013, 1, 2)],
            "month": [1, 2],
        }
    ).select(pl.all().exclude("day"), pl.Series("day", ["2013-01-01", "2013-01-02"]).str.to_date()).write_parquet(
        tmp_path / "a.parquet"
    )
    data = DataSpec(source=str(tmp_path), kinds={"month": "categorical"})
    schema = with_kinds(infer_schema(Source.open(data), data), data)
    assert {column.name: column.kind for column in schema.columns} == {
        "number": "numeric",
        "code": "categorical",
        "note": "text",
        "flag": "boolean",
        "month": "categorical",
        "day": "datetime",
    }


@pytest.mark.parametrize(
    ("make", "spec", "kind", "message"),
    [
        (lambda p: None, {"source": "{}/none.parquet"}, DataError, "'.*none.parquet' does not exist"),
        (lambda p: None, {"source": "{}"}, DataError, "has no files in it"),
        (lambda p: None, {"source": "{}/*.parquet"}, DataError, "matches no file"),
        (
            lambda p: (p / "a.parquet").write_bytes(b"PAR1 not at all PAR1"),
            {"source": "{}"},
            DataError,
            r"a\.parquet: cannot be read",
        ),
        (lambda p: (p / "a.data").write_text("x"), {"source": "{}"}, SpecError, "data.format: cannot be told from the file name"),
        (
            lambda p: frame().write_parquet(p / "a.parquet"),
            {"source": "{}", "options": {"x": 1}},
            SpecError,
            "parquet takes no options",
        ),
        (
            lambda p: frame().write_csv(p / "a.csv"),
            {"source": "{}", "options": {"delimeter": ";"}},
            SpecError,
            "did you mean 'delimiter'",
        ),
        (
            lambda p: (p / "a.csv").write_text("a,b\n1,2\n1,2,3\n"),
            {"source": "{}"},
            DataError,
            r"a\.csv: cannot be read: CSV parse error: Row #3: Expected 2 columns, got 3",
        ),
        (lambda p: (p / "a.csv").write_text(""), {"source": "{}"}, DataError, "has no files in it"),
        (
            lambda p: frame().write_parquet(p / "a.parquet"),
            {"source": "{}", "kinds": {"q": "text"}},
            SpecError,
            "data.kinds: there is no column 'q'",
        ),
        (
            lambda p: frame().write_parquet(p / "a.parquet"),
            {"source": "{}", "kinds": {"s": "numeric"}},
            SpecError,
            "numeric does not go with string",
        ),
        (
            lambda p: frame().write_parquet(p / "a.parquet"),
            {"source": "{}", "key": ["id"]},
            SpecError,
            "data.key: there is no column 'id'",
        ),
    ],
)
def test_wrong_sources_are_one_sentence(
    tmp_path: Path, make: Any, spec: dict[str, Any], kind: type[UserError], message: str
) -> None:
    make(tmp_path)
    spec["source"] = spec["source"].format(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        read(DataSpec(**spec))
    assert "\n" not in str(caught.value)


def test_a_column_that_differs_between_files_is_named(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1, 2], "y": [1, 0]}).write_parquet(tmp_path / "1.parquet")
    pl.DataFrame({"a": ["x", "y"], "y": [1, 0]}).write_parquet(tmp_path / "2.parquet")
    with pytest.raises(DataError, match=r"column 'a' differs between files: int64 in .*1\.parquet, string in .*2\.parquet"):
        read(DataSpec(source=str(tmp_path)))
    table, _, _ = read(DataSpec(source=str(tmp_path), on_error="null"))
    assert table["a"].to_pylist() == [1, 2, None, None]


def test_a_late_file_that_differs_is_named_with_its_first_row(tmp_path: Path) -> None:
    for i in range(5):  # only the first, middle and last file are probed
        pl.DataFrame({"a": ["x"] if i == 3 else [i]}).write_parquet(tmp_path / f"{i}.parquet")
    with pytest.raises(DataError, match=r"3\.parquet: column 'a' from row 0 on is .*string.*expected int64 as in .*0\.parquet"):
        read(DataSpec(source=str(tmp_path)))


def test_a_missing_column_is_named_or_null(tmp_path: Path) -> None:
    frame(10).write_csv(tmp_path / "1.csv")
    frame(10).drop("x").write_csv(tmp_path / "2.csv")
    with pytest.raises(DataError, match=r"2\.csv: column 'x' is missing"):
        read(DataSpec(source=str(tmp_path)), None, "y")
    table, _, _ = read(DataSpec(source=str(tmp_path), on_error="null"), None, "y")
    assert table["x"].null_count == 2 + 10


def test_text_that_is_no_number_ends_the_run_or_counts_as_missing(tmp_path: Path) -> None:
    rows = [str(i) for i in range(200_000)] + ["oops"]
    (tmp_path / "a.csv").write_text("a\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"a\.csv: cannot be read: .*oops"):
        read(DataSpec(source=str(tmp_path)))
    table, _, _ = read(DataSpec(source=str(tmp_path), on_error="null"))
    assert table["a"].null_count == 1 and table["a"][5].as_py() == 5


def test_a_bucket_that_cannot_be_reached_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "GS_RETRY_S", 1)
    source = "gs://anonymous@bucket/x?scheme=http&endpoint_override=127.0.0.1:1"  # nobody listens there

    with pytest.raises(DataError, match="cannot be listed: .*UNAVAILABLE.*; check the URI and the credentials") as error:
        Source.open(DataSpec(source=source))

    assert "error_info" not in str(error.value)
