"""Every finding: data that triggers it, and data that just does not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from app.output import finding_lines
from pipelines.data.infer import infer_schema
from pipelines.data.read import Counts, Reader
from pipelines.data.source import Source
from pipelines.data.split import SPLITS, mix
from pipelines.data.summary import Held, Summary, statistics_of
from pipelines.quality import DROPPED, LEAK_AUC, MIN_ROWS, NEAR_AUC, OUTLIER, RARE_CLASS, quality_of
from pipelines.schema import KIND_OF_TYPE, Column, canonical_type
from pipelines.spec import DataSpec, SplitSpec
from pipelines.tasks import Task

ROWS = 4000
BINARY = Task(type="binary", target="y", target_type="bool", classes=[False, True])
REGRESSION = Task(type="regression", target="y", target_type="float64")
THREE = Task(type="multiclass", target="y", target_type="string", classes=["a", "b", "c"])


def coins(rows: int = ROWS, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(rows) < 0.4


def noise(rows: int = ROWS, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=rows)


def report(
    train: dict[str, Any],
    task: Task = BINARY,
    *,
    read: Counts | None = None,
    split: SplitSpec | None = None,
    kinds: dict[str, Any] | None = None,
    **held: dict[str, Any],
) -> list[dict[str, Any]]:
    """The findings of a table whose rows are all in the sample."""
    tables = {name: pl.DataFrame(rows).to_arrow() for name, rows in {"train": train, **held}.items()}
    tables = {name: table.cast(pa.schema([(f.name, _canonical(f.type)) for f in table.schema])) for name, table in tables.items()}
    columns = []
    for field in tables["train"].schema:
        type = canonical_type(field.type)
        assert type is not None
        columns.append(Column(name=field.name, type=type, kind=(kinds or {}).get(field.name, KIND_OF_TYPE[type])))
    states = {name: {c.name: statistics_of(c, table[c.name]) for c in columns} for name, table in tables.items()}
    summary = Summary(
        states["train"],
        Counter(tables["train"]["y"].to_pylist()) if task.classes else None,
        {name: table.num_rows for name, table in tables.items()},
        tables["train"],
        mix(np.arange(tables["train"].num_rows, dtype=np.uint64)),
        {name: Held(states[name], [tables[name]]) for name in held},
    )
    content = quality_of(
        [c for c in columns if c.name != "y"],
        summary,
        read or Counts(),
        task=task,
        split=split or SplitSpec(),
        identifiers={},
        constants={},
    )
    json.dumps(content, allow_nan=False)
    found: list[dict[str, Any]] = content["findings"]
    return found


def _canonical(type: pa.DataType) -> pa.DataType:
    return pa.large_string() if pa.types.is_string_view(type) else type


def kinds_of(findings: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [(finding["kind"], finding["columns"]) for finding in findings]


def with_auc(auc: float) -> dict[str, Any]:
    """A column whose AUC for y is about this: two normal distributions that far apart."""
    from scipy.stats import norm

    y = coins(20_000)
    return {"y": y, "x": noise(20_000) + y * norm.ppf(auc) * 2**0.5, "n": noise(20_000, 2)}


@pytest.mark.parametrize(
    ("auc", "expected"),
    [
        (LEAK_AUC + 0.02, [("leak", ["x"])]),
        (LEAK_AUC - 0.02, [("strong column", ["x"])]),
        (NEAR_AUC - 0.02, []),
    ],
)
def test_a_column_that_alone_predicts_too_well_is_a_leak_suspect(auc: float, expected: list[Any]) -> None:
    found = report(with_auc(auc))
    assert kinds_of(found) == expected
    if found:
        assert found[0]["figures"]["auc"] == pytest.approx(auc, abs=0.015)
        assert found[0]["severity"] == ("high" if auc > LEAK_AUC else "low")


@pytest.mark.parametrize(
    ("leak", "task"),
    [
        (lambda y: y.astype(np.float64), BINARY),
        (lambda y: [None if v else 1.0 for v in y], BINARY),  # it is missing where y is true
        (lambda y: [f"{'late' if v else 'fine'} {i % 5}" for i, v in enumerate(y)], BINARY),
        (lambda y: np.where(y, np.datetime64("2020-01-01", "us"), np.datetime64("2021-01-01", "us")), BINARY),
    ],
)
def test_leaks_of_every_kind_are_found(leak: Any, task: Task) -> None:
    y = coins()
    found = report({"y": y, "x": leak(y), "n": noise()}, task)
    assert ("leak", ["x"]) in kinds_of(found) and ("leak", ["n"]) not in kinds_of(found)


def test_leaks_of_a_number_and_of_many_classes() -> None:
    value = noise()
    assert kinds_of(report({"y": value, "x": value + 0.3 * noise(seed=5)}, REGRESSION)) == [("leak", ["x"])]
    assert kinds_of(report({"y": value, "x": value + 0.9 * noise(seed=5)}, REGRESSION)) == []
    classes = np.random.default_rng(0).choice(["a", "b", "c"], ROWS)
    found = report({"y": classes, "x": [f"{c}!" for c in classes], "n": noise()}, THREE)
    assert kinds_of(found) == [("leak", ["x"])]


def test_the_length_of_a_sales_call_is_near_the_line() -> None:
    bank = pl.read_parquet(Path(__file__).parents[1] / "data/bank.parquet").to_dict(as_series=False)
    task = Task(type="binary", target="y", target_type="string", classes=["no", "yes"])
    [found] = [finding for finding in report(bank, task) if finding["kind"] in ("leak", "strong column")]
    assert (found["kind"], found["columns"], found["severity"]) == ("strong column", ["duration"], "low")
    assert NEAR_AUC < found["figures"]["auc"] < LEAK_AUC


def test_rare_categories_and_small_tables_are_no_leaks() -> None:
    many = [f"c{i}" for i in np.random.default_rng(2).integers(0, 3000, ROWS).tolist()]  # each has a row or two
    assert kinds_of(report({"y": coins(), "x": many, "n": noise()})) == []
    few = coins(MIN_ROWS - 1)
    assert ("leak", ["x"]) not in kinds_of(report({"y": few, "x": few.astype(float)}))
    rare = np.arange(ROWS) < 19  # too few to tell
    assert kinds_of(report({"y": rare, "x": rare.astype(float), "n": noise()})) == [("imbalance", ["y"])]


def test_equal_columns_are_named_once() -> None:
    x, c = noise(), [f"c{i % 7}" for i in range(ROWS)]
    found = report({"y": coins(), "x": x, "again": x, "c": c, "same": c, "other": np.where(np.arange(ROWS) == 9, 0.0, x)})
    assert kinds_of(found) == [("duplicate column", ["x", "again"]), ("duplicate column", ["c", "same"])]


def test_rows_that_stand_there_twice() -> None:
    x, y = noise(), coins()
    assert report({"y": y, "x": x}) == []
    low = report({"y": np.append(y, y[:39]), "x": np.append(x, x[:39])})
    assert kinds_of(low) == [("duplicate rows", [])] and low[0]["severity"] == "low" and low[0]["figures"]["rows"] == 39
    assert report({"y": np.append(y, y[:60]), "x": np.append(x, x[:60])})[0]["severity"] == "medium"
    other = report({"y": y, "x": x}, test={"y": y[:100], "x": np.append(x[:2], noise(98, 7))})
    assert other[0]["figures"] == {"split": "test", "rows": 2, "share": 0.02, "worth": 0.02}
    assert report({"y": y, "x": x}, test={"y": y[:1000], "x": np.append(x[:9], noise(991, 7))}) == []


def test_infinities_and_outliers() -> None:
    x = noise()
    infinite = report({"y": coins(), "x": np.append(x[1:], np.inf)})
    assert kinds_of(infinite) == [("infinities", ["x"])] and infinite[0]["figures"]["values"] == 1
    low, high = np.quantile(x, [0.01, 0.99])
    for factor, expected in ((1.01, [("outliers", ["x"])]), (0.98, [])):
        far = np.append(x, high + factor * OUTLIER * (high - low))
        assert kinds_of(report({"y": coins(ROWS + 1), "x": far})) == expected
    assert report({"y": coins(), "x": np.random.default_rng(0).exponential(size=ROWS)}) == []


def test_drift_between_the_splits() -> None:
    train = {"y": coins(), "x": noise(), "c": [f"c{i % 10}" for i in range(ROWS)]}

    def held(shift: float, rows: int = 1000, categories: int = 10) -> dict[str, Any]:
        return {"y": coins(rows, 3), "x": noise(rows, 4) + shift, "c": [f"c{i % categories}" for i in range(rows)]}

    assert report(train, test=held(0)) == []
    assert [f["severity"] for f in report(train, valid=held(0.4))] == ["low"]
    far = report(train, valid=held(0), test=held(1))
    assert kinds_of(far) == [("drift", ["x"])] and far[0]["severity"] == "medium" and set(far[0]["figures"]["psi"]) == {"test"}
    both = report(train, valid=held(1), test=held(2))
    assert kinds_of(both) == [("drift", ["x"])] and set(both[0]["figures"]["psi"]) == {"valid", "test"}
    assert kinds_of(report(train, test=held(0, categories=5))) == [("drift", ["c"])]
    assert report(train, test=held(0, rows=30)) == []  # chance
    target = report(train, test={**held(0), "y": coins(1000) & (noise(1000) > 0)})
    assert kinds_of(target) == [("drift", ["y"])]


def test_what_the_rows_were_split_by_differs_on_purpose() -> None:
    days = np.datetime64("2020-01-01", "us") + np.arange(ROWS).astype("timedelta64[h]")
    train, test = {"y": coins(), "t": days}, {"y": coins(), "t": days + np.timedelta64(365, "D")}
    assert kinds_of(report(train, test=test)) == [("drift", ["t"])]
    assert report(train, test=test, split=SplitSpec(by="time", column="t")) == []


def test_a_rare_class_and_rows_left_out() -> None:
    for rows, expected in ((int(ROWS * RARE_CLASS) - 1, [("imbalance", ["y"])]), (int(ROWS * RARE_CLASS), [])):
        assert kinds_of(report({"y": np.arange(ROWS) < rows, "x": noise()})) == expected
    read = Counts(rows=1000)
    read.drop("target is null", int(1000 * DROPPED) - 1)
    assert report({"y": coins(), "x": noise()}, read=read)[0]["severity"] == "low"
    read.drop("target is null", 1)
    read.drop("where", 500)
    found = report({"y": coins(), "x": noise()}, read=read)
    assert [(f["figures"]["reason"], f["severity"]) for f in found] == [("target is null", "medium"), ("where", "low")]


def test_types_that_differ_between_files_are_seen_in_the_pass(tmp_path: Path) -> None:
    def read(second: dict[str, Any], on_error: Any = "fail") -> list[dict[str, Any]]:
        pl.DataFrame({"x": [1.5, 2.5], "s": ["a", "b"], "y": [True, False]}).write_parquet(tmp_path / "a.parquet")
        pl.DataFrame({**second, "y": [True, False]}).write_parquet(tmp_path / "b.parquet")
        data = DataSpec(source=str(tmp_path), on_error=on_error)
        source = Source.open(data)
        schema = infer_schema(source, data)
        total = Counts()
        for unit in reversed(source.units):  # whatever arrives first
            counts = Counts()
            for _ in Reader.of(source, schema, data, {"x", "s", "y"}, "y").blocks(unit, counts):
                pass
            total.add(counts)
        return report({"y": coins(), "x": noise(), "s": ["a"] * ROWS}, read=total)

    assert read({"x": [1.5, None], "s": ["c", None]}) == []
    [whole] = read({"x": [1, 2], "s": ["c", "d"]})
    assert (whole["kind"], whole["columns"], whole["severity"]) == ("mixed types", ["x"], "low")
    assert whole["message"] == f"differs between files: float64 in {tmp_path}/a.parquet, int64 in {tmp_path}/b.parquet"
    mixed = read({"x": ["1", "many"], "s": ["c", "d"]}, on_error="null")
    assert [(f["kind"], f["columns"], f["severity"]) for f in mixed] == [
        ("contradicting values", ["x"], "medium"),
        ("mixed types", ["x"], "medium"),
    ]
    assert mixed[0]["figures"]["values"] == 1


def test_identifiers_and_constants_are_told_and_the_worst_comes_first() -> None:
    y = coins()
    table = pl.DataFrame({"y": y, "x": y.astype(float)}).to_arrow()
    column = Column(name="x", type="float64", kind="numeric")
    statistics = statistics_of(column, table["x"])
    summary = Summary({"x": statistics}, Counter(y.tolist()), {"train": ROWS}, table, mix(np.arange(ROWS, dtype=np.uint64)))
    content = quality_of(
        [column], summary, Counts(), task=BINARY, split=SplitSpec(), identifiers={"id": "unique"}, constants={"one": "alike"}
    )
    kinds = [finding["kind"] for finding in content["findings"]]
    assert kinds == ["leak", "duplicate rows", "identifier", "constant"]
    lines = finding_lines(content["findings"])
    assert lines[1].split() == ["FINDING", "KIND", "COLUMN"] and lines[2].startswith("high     leak            x       alone")
    assert finding_lines(content["findings"] * 4)[-1] == "and 6 more in quality.json"
    assert finding_lines([]) == []
    assert set(SPLITS) >= set(content["rows"])
