"""What columns mean: kinds from the fixed sample, with reasons; texts that are parsed when training and when serving."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contract import Contract
from pipelines.data.infer import with_kinds
from pipelines.data.kinds import Inference, infer_kinds
from pipelines.data.read import Counts, Reader
from pipelines.data.source import Source
from pipelines.errors import DataError, InputError, SpecError
from pipelines.parsing import TextForm, parse
from pipelines.schema import ARROW, Column, Schema, Type, cast
from pipelines.spec import DataSpec

ROWS = 300
CODES = ("1/2/2013", "007", "4929123412341234")


def inferred(folder: Path, values: dict[str, Any], /, suffix: str = "parquet", **data: Any) -> Inference:
    frame = pl.DataFrame({**values, "y": [i % 2 for i in range(len(next(iter(values.values()))))]})
    path = folder / f"a.{suffix}"
    frame.write_parquet(path) if suffix == "parquet" else frame.write_csv(path)
    spec = DataSpec(source=str(path), **data)
    return infer_kinds(Source.open(spec), spec, "y")


def column(found: Inference, name: str) -> tuple[Type, str, TextForm | None]:
    it = found.schema[name]
    return it.type, it.kind, it.text


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", "-20", None, ""], ("int64", "numeric", "number")),
        (["1", "2.5", "1e3", "NA"], ("float64", "numeric", "number")),
        (["0", "1", "1"], ("int64", "boolean", "number")),
        (["yes", "No", None], ("bool", "boolean", "boolean")),
        (["true", "FALSE"], ("bool", "boolean", "boolean")),
        (["2013-01-31", "2013-02-01"], ("timestamp", "datetime", "iso")),
        (["2013-01-31T15:00:00Z", "2013-02-01 10:00"], ("timestamp", "datetime", "iso")),
        (["31.1.2013", "1.2.2013 9:05"], ("timestamp", "datetime", "D.M.Y")),
        (["1/31/2013", "2/1/2013"], ("timestamp", "datetime", "M/D/Y")),
        (["31/1/2013", "1/2/2013"], ("timestamp", "datetime", "D/M/Y")),
        (["2013/1/31"], ("timestamp", "datetime", "Y/M/D")),
        (["1/2/2013", "3/4/2013"], ("string", "categorical", None)),  # which is the month?
        (["2013-02-30", "2013-02-01"], ("string", "categorical", None)),
        (["007", "012"], ("string", "categorical", None)),
        (["1", "2", "?"], ("string", "categorical", None)),
        (["1,5", "2"], ("string", "categorical", None)),
        (["4929123412341234", "4929123412341235"], ("string", "categorical", None)),
        (["", None], ("string", "categorical", None)),
        (["yes", "no", "unknown"], ("string", "categorical", None)),
    ],
)
def test_texts_that_are_something_else_are_parsed(tmp_path: Path, texts: list[Any], expected: tuple[str, str, str]) -> None:
    found = inferred(tmp_path, {"c": texts})
    assert column(found, "c") == expected
    assert (found.reasons["c"] != "a column of texts") == (expected[2] is not None or texts[0] in CODES)


def test_the_spec_wins(tmp_path: Path) -> None:
    texts = {"c": ["1", "2", "3"], "d": ["1/2/2013", "3/4/2013", None], "i": [0, 1, 0]}
    kept = inferred(tmp_path, texts, kinds={"c": "categorical", "i": "numeric"})
    assert column(kept, "c") == ("string", "categorical", None) and column(kept, "i")[1] == "numeric"
    dated = inferred(tmp_path, texts, kinds={"d": "datetime"})
    assert column(dated, "d") == ("timestamp", "datetime", "D/M/Y")
    wrong = DataSpec(source=str(tmp_path), kinds={"c": "datetime"})
    with pytest.raises(SpecError, match=r"data.kinds.c: datetime does not go with string"):
        with_kinds(infer_kinds(Source.open(wrong), wrong, "y").schema, wrong)


def test_texts_that_are_mostly_numbers_say_how_to_read_them(tmp_path: Path) -> None:
    texts = {"c": ["1.5"] * 19 + ["?"], "d": ["1.5"] * 17 + ["?"] * 3}
    found = inferred(tmp_path, texts)
    assert column(found, "c") == ("string", "categorical", None)
    assert found.reasons["c"].startswith("texts; 95% of them are numbers: data.kinds numeric with on_error: null")
    assert found.reasons["d"] == "a column of texts"
    for name in texts:
        read = inferred(tmp_path, texts, kinds={name: "numeric"}, on_error="null")
        assert column(read, name) == ("float64", "numeric", "number")
    strict = inferred(tmp_path, texts, kinds={"c": "numeric"})
    with pytest.raises(SpecError, match="data.kinds.c: numeric does not go with string"):
        with_kinds(strict.schema, DataSpec(source="x", kinds={"c": "numeric"}))


def test_identifiers_written_as_texts_are_identifiers(tmp_path: Path) -> None:
    values = [str(i) for i in range(ROWS)]
    assert set(inferred(tmp_path, {"row": values, "user_id": values[::-1]}).left_out) == {"row", "user_id"}


def test_the_resolved_kinds_give_the_same_schema_again(tmp_path: Path) -> None:
    values = {
        "a": ["0", "1", "1"],
        "b": ["yes", "no", "no"],
        "c": ["1.5", "2", None],
        "d": ["2013-01-31"] * 3,
        "e": ["x", "1", "2"],
    }
    found = inferred(tmp_path, values).schema
    spec = DataSpec(source=str(tmp_path), kinds={c.name: c.kind for c in found.columns if c.name != "y"})
    assert with_kinds(infer_kinds(Source.open(spec), spec, "y").schema, spec) == found


def test_the_target_keys_and_what_sql_names_stay_as_they_are(tmp_path: Path) -> None:
    values = {"k": ["1", "2"], "w": ["3", "4"], "d": ["yes", "no"], "f": ["5", "6"]}
    found = inferred(tmp_path, values, key=["k"], where="w = '3'", derive={"flag": "d = 'yes'"})
    assert [column(found, name)[0] for name in "kwdf"] == ["string", "string", "string", "int64"]
    assert infer_kinds(*_again(tmp_path), "f").schema["f"].type == "string"


def test_a_mistake_in_derive_is_one_line(tmp_path: Path) -> None:
    for sql, message in (("c +", "is not an SQL expression"), ("d + 1", "uses the column 'd'")):
        with pytest.raises(SpecError, match=f"data.derive.x: .*{message}"):
            inferred(tmp_path, {"c": [1, 2]}, derive={"x": sql})


def _again(folder: Path) -> tuple[Source, DataSpec]:
    spec = DataSpec(source=str(folder))
    return Source.open(spec), spec


def test_integers_that_are_flags_or_codes(tmp_path: Path) -> None:
    found = inferred(
        tmp_path,
        {
            "flag": [i % 2 for i in range(ROWS)],
            "count": [i % 3 for i in range(ROWS)],
            "store_id": [i % 50 for i in range(ROWS)],
            "zipCode": [10_000 + i % 70 for i in range(ROWS)],
            "one": [1] * ROWS,
            "identity": [i % 40 for i in range(ROWS)],
        },
    )
    kinds = {c.name: c.kind for c in found.schema.columns}
    assert kinds == {
        "flag": "boolean",
        "count": "numeric",
        "store_id": "categorical",
        "zipCode": "categorical",
        "one": "numeric",
        "identity": "numeric",
        "y": "numeric",
    }
    assert found.reasons == dict.fromkeys(("count", "one", "identity", "y"), "a column of integers") | {
        "flag": "only 0 and 1",
        "store_id": "integers that are codes by the name, 50 different",
        "zipCode": "integers that are codes by the name, 70 different",
    }


def test_identifiers_are_left_out(tmp_path: Path) -> None:
    shuffled = [(i * 7919) % 10_007 for i in range(ROWS)]
    found = inferred(
        tmp_path,
        {
            "customer_id": shuffled,
            "row": list(range(5, ROWS + 5)),
            "token": [f"t{i}" for i in shuffled],
            "amount": shuffled,  # all different, but neither named nor numbered
            "float_id": [float(i) for i in shuffled],
            "often": [f"t{i // 2}" for i in range(ROWS)],
            "day": [f"2013-01-{1 + i % 28:02}T00:{i // 28:02}" for i in range(ROWS)],
        },
    )
    assert found.left_out == {
        "customer_id": "an identifier by its name, different in each of 300 rows",
        "row": "counts the rows",
        "token": "300 different texts in 300 rows: an identifier",
    }
    small = inferred(tmp_path, {"id": list(range(99)), "t": [f"{i}x" for i in range(99)]})
    assert small.left_out == {}
    assert inferred(tmp_path, {"id": list(range(ROWS))}, kinds={"id": "numeric"}).left_out == {}


def test_many_categories_are_told(tmp_path: Path) -> None:
    found = inferred(tmp_path, {"few": [f"c{i % 256}" for i in range(1000)], "many": [f"c{i % 257}" for i in range(1000)]})
    assert found.many == {"many": "257 categories in 1,000 rows"}


@pytest.mark.parametrize(("form", "type", "texts"), [("number", "float64", ["1.5", ""]), ("boolean", "bool", ["yes", "no"])])
def test_a_later_text_that_contradicts_is_an_error_or_missing(tmp_path: Path, form: str, type: Type, texts: list[str]) -> None:
    pl.DataFrame({"c": texts * 2048}).write_parquet(tmp_path / "0.parquet")
    pl.DataFrame({"c": [*texts * 3000, "perhaps"]}).write_parquet(tmp_path / "1.parquet")

    def read(on_error: Any) -> tuple[pa.Table, Counts]:
        spec = DataSpec(source=str(tmp_path), on_error=on_error)
        source = Source.open(spec)
        raw = infer_kinds(source, spec, "y").schema
        assert raw["c"].text == form
        counts = Counts()
        reader = Reader.of(source, raw, spec, {"c"}, None)
        return pa.concat_tables([b.table for unit in source.units for b in reader.blocks(unit, counts)]), counts

    with pytest.raises(DataError, match=r"1\.parquet: column 'c' .*'perhaps' is no .*data.kinds.c: categorical keeps all texts"):
        read("fail")
    table, _ = read("null")
    assert table["c"].type == ARROW[type] and table["c"][-1].as_py() is None and table.num_rows == 4096 + 6001


def test_the_kinds_are_those_of_the_same_table_in_another_format(tmp_path: Path) -> None:
    values = {
        "number": ["1", "20"] * 200,
        "share": ["1.5", "2"] * 200,
        "day": ["2013-01-31", "2013-02-01"] * 200,
        "german": ["31.1.2013", "1.2.2013"] * 200,
        "flag": [0, 1] * 200,
        "city": ["Ulm", "Bern"] * 200,
        "id": list(range(400)),
    }
    parquet, csv = (inferred(tmp_path, values, suffix) for suffix in ("parquet", "csv"))
    assert [(c.name, c.type, c.kind) for c in parquet.schema.columns] == [(c.name, c.type, c.kind) for c in csv.schema.columns]
    assert parquet.left_out == csv.left_out and set(parquet.left_out) == {"id"}


@given(
    st.sampled_from(
        [("number", "int64"), ("number", "float64"), ("boolean", "bool"), ("iso", "timestamp"), ("M/D/Y", "timestamp")]
    ),
    st.lists(
        st.none()
        | st.text(max_size=12)
        | st.sampled_from(["12", "-3.5", "yes", "F", "2013-01-31T10:00+02:00", "1/31/2013", "12/1/2013 1:02", "NA", " 7 "]),
        max_size=8,
    ),
)
def test_a_row_and_a_block_read_a_text_alike(how: tuple[TextForm, Type], texts: list[str | None]) -> None:
    form, type = how
    block = parse(pa.chunked_array([pa.array(texts, pa.large_string())]), form, ARROW[type], lenient=True)
    block = block.cast(pa.int64()) if type == "timestamp" else block
    contract = Contract(Schema(columns=[Column(name="c", type=type, kind="numeric", text=form)]))
    for text, parsed in zip(texts, block.to_pylist(), strict=True):
        try:
            assert contract.check_rows([{"c": text}]) == [{"c": parsed}]
        except InputError:
            assert parsed is None
        except AssertionError:  # beside its own form a row may always have an instant in ISO 8601
            assert type == "timestamp" and parsed is None and text is not None and datetime.datetime.fromisoformat(text)


def test_rows_and_frames_may_have_the_texts_or_the_values() -> None:
    contract = Contract(
        Schema(
            columns=[
                Column(name="n", type="int64", kind="numeric", text="number"),
                Column(name="b", type="bool", kind="boolean", text="boolean"),
                Column(name="t", type="timestamp", kind="datetime", text="D.M.Y"),
            ]
        )
    )
    expected = [{"n": 3, "b": True, "t": 1359590400_000_000}]
    assert contract.check_rows([{"n": "3", "b": "Yes", "t": "31.1.2013"}]) == expected
    assert contract.check_rows([{"n": 3, "b": True, "t": "2013-01-31"}]) == expected
    assert contract.check_rows([{"n": "NA", "b": "", "t": None}]) == [{"n": None, "b": None, "t": None}]
    with pytest.raises(InputError, match="row 0: column 'n' is 'three'; expected integer"):
        contract.check_rows([{"n": "three"}])
    as_texts = contract.frame_to_table(pl.DataFrame({"n": ["3"], "b": ["no"], "t": ["31.1.2013"]}))
    as_values = contract.frame_to_table(pl.DataFrame({"n": [3], "b": [False], "t": [datetime.datetime(2013, 1, 31)]}))
    assert as_texts.equals(as_values)
    with pytest.raises(InputError, match="column 'n' is large_string .*'x' is no number"):
        contract.frame_to_table(pl.DataFrame({"n": ["x"], "b": [True], "t": [None]}))


def test_without_a_form_texts_are_not_guessed_into_numbers() -> None:
    with pytest.raises(pa.ArrowInvalid):
        cast(pa.chunked_array([["1"]]), "int64")
