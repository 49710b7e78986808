"""Profiles by column and split: equal to pandas, whatever the blocks, and plain JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data import summary as summaries
from pipelines.data.infer import infer_schema
from pipelines.data.read import Counts, Reader
from pipelines.data.source import Source
from pipelines.data.split import SPLITS
from pipelines.data.summary import Summarise, Summary, _with_sample
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.stats import NumberStatistics, StringStatistics
from pipelines.profiles import BINS, counts_between, distinct_of, edges_of, profile_column, profile_of
from pipelines.schema import Schema, decoded
from pipelines.spec import DataSpec
from pipelines.tasks import Task

ROWS = 4000


def table(rows: int = ROWS) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    return pl.DataFrame(
        {
            "x": [None if i % 11 == 0 else v for i, v in enumerate(rng.lognormal(size=rows).tolist())],
            "n": rng.integers(0, 5, rows),
            "c": [None if v == 9 else f"c{v}" for v in rng.integers(0, 10, rows).tolist()],
            "t": np.datetime64("2020-01-01", "us") + rng.integers(0, 10**13, rows).astype("timedelta64[us]"),
            "y": rng.random(rows) < 0.3,
        }
    )


def summarised(folder: Path, share: float = 1.0, reverse: bool = False) -> tuple[Summary, pd.DataFrame]:
    """The summary of the folder as `summarise` makes it, without Ray; and the same rows with their split in pandas."""
    data = DataSpec(source=str(folder))
    source = Source.open(data)
    schema = infer_schema(source, data)
    reader = Reader.of(source, schema, data, set(schema.names), "y")
    columns = [column for column in schema.columns if column.name != "y"]
    each = Summarise(tuple(columns), "y", share, Preprocessor.unfitted(columns, {}, {}))
    units = [(unit, each(unit, reader.blocks(unit, Counts()))) for unit in (source.units[::-1] if reverse else source.units)]
    parts = [part for _, part in sorted(units, key=lambda pair: pair[0].index)]
    total = Summary({}, parts[0].targets, dict.fromkeys(SPLITS, 0))
    for part in parts:
        total.merge(part)
    frames = [
        decoded(block.table).to_pandas().assign(split=block.split)
        for unit in source.units
        for block in reader.blocks(unit, Counts())
    ]
    return _with_sample(total, [replace(part, columns={}, held={}) for part in parts]), pd.concat(frames)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        table()[1000 * i : 1000 * (i + 1)].write_parquet(tmp_path / f"{i}.parquet")
    return tmp_path


def test_every_split_is_described_as_pandas_does(folder: Path) -> None:
    summary, frame = summarised(folder)
    task = Task(type="binary", target="y", target_type="bool", classes=[False, True])
    profile = profile_of(Schema(columns=[]), summary, task)
    json.dumps(profile, allow_nan=False)
    for code, split in enumerate(SPLITS):
        rows = frame[frame["split"] == code]
        assert profile["rows"][split] == len(rows) > 100
        x, n, c = (_of(profile, name, split) for name in "xnc")
        assert (x["count"], x["missing"], x["distinct"]) == (len(rows), rows["x"].isna().sum(), rows["x"].nunique())
        assert x["mean"] == pytest.approx(rows["x"].mean(), rel=1e-12) and x["std"] == pytest.approx(
            rows["x"].std(ddof=0), rel=1e-9
        )
        assert (x["min"], x["max"]) == (rows["x"].min(), rows["x"].max())
        assert x["quantiles"]["0.95"] == pytest.approx(rows["x"].quantile(0.95), rel=1e-12)
        assert n["distinct"] == 5 and n["distinct_factor"] == 1
        assert profile["columns"]["n"]["histogram"]["counts"][split] == rows["n"].value_counts().sort_index().tolist()
        assert dict(map(tuple, c["top"])) == rows["c"].value_counts().to_dict() and c["distinct"] == rows["c"].nunique()
        counts = profile["columns"]["x"]["histogram"]["counts"][split]
        assert len(counts) == BINS and sum(counts) == rows["x"].notna().sum()


def _of(profile: dict[str, Any], name: str, split: str) -> dict[str, Any]:
    found: dict[str, Any] = profile["columns"][name]
    return found if split == "train" else found["splits"][split]


def test_the_order_in_which_units_are_read_changes_no_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summaries, "SAMPLE_ROWS", 500)
    task = Task(type="binary", target="y", target_type="bool", classes=[False, True])
    one, two = (summarised(folder, 0.2, reverse) for reverse in (False, True))
    schema = Schema(columns=[])
    assert json.dumps(profile_of(schema, one[0], task)) == json.dumps(profile_of(schema, two[0], task))
    assert one[0].sample is not None and one[0].sample.num_rows == 500


@given(st.lists(st.sampled_from([None, "a", "b", "c", "d"]), max_size=40), st.lists(st.integers(0, 40), max_size=5))
def test_counts_are_the_same_for_any_grouping_of_blocks(values: list[str | None], cuts: list[int]) -> None:
    whole = StringStatistics.of(pa.array(values, pa.large_string()))
    borders = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    merged = StringStatistics()
    for start, stop in pairwise(borders):
        merged = merged.merge(StringStatistics.of(pa.array(values[start:stop], pa.large_string())))
    assert profile_column(merged, {}) == profile_column(whole, {})


def test_distinct_values_beyond_the_sample_are_estimated_within_the_stated_factor() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 1000, 100_000), rng.integers(0, 10**9, 100_000), rng.zipf(1.5, 100_000)):
        numbers = values.astype(np.float64)
        sampled = replace(NumberStatistics.of(numbers), sample=numbers[:10_000])
        distinct, factor = distinct_of(sampled)
        true = len(np.unique(numbers))
        assert factor == pytest.approx(10**0.5) and true / factor <= distinct <= true * factor


def of(values: Any) -> NumberStatistics:
    numbers = np.asarray(values, np.float64)
    return replace(NumberStatistics.of(numbers), sample=numbers)


def test_bins_tell_few_values_apart_and_many_are_equally_full() -> None:
    flags = of([0.0, 0, 0, 1, np.nan, np.inf])
    assert counts_between(edges_of(flags), flags).tolist() == [3, 1]
    values = of(np.random.default_rng(1).normal(size=10_000))
    counts = counts_between(edges_of(values), values)
    assert len(counts) == BINS and abs(counts - 500).max() <= 1
    assert counts_between(edges_of(of([np.nan])), of([1.0, np.nan])).tolist() == [1]
    skewed = of(np.r_[np.zeros(9000), np.arange(1.0, 1001)])
    assert counts_between(edges_of(skewed), skewed)[0] == 9000
