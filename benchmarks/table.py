"""The table that benchmarks share: 12 numeric columns with nulls, 6 categoricals of 4 to 50,000 values, 2 timestamps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

NUMERIC = [f"n{i}" for i in range(12)]
CARDINALITIES = {"c0": 4, "c1": 20, "c2": 100, "c3": 1_000, "c4": 10_000, "c5": 50_000}
TIMES = ["t0", "t1"]
TARGET = "y"
ROWS_PER_FILE = 250_000
NULLS = 0.05
DAY_US = 86_400_000_000


def generate(folder: Path, rows: int, first_file: int = 0) -> Path:
    """Write it as Parquet files of 250,000 rows; file i is the same whatever `rows` is."""
    folder.mkdir(parents=True)
    for i, first in enumerate(range(0, rows, ROWS_PER_FILE), first_file):
        _part(i).head(rows - first).write_parquet(folder / f"{i:05d}.parquet")
    return folder


def _part(i: int) -> pl.DataFrame:
    rng = np.random.default_rng((7, i))
    numbers = {name: rng.normal(j, 1 + j, ROWS_PER_FILE) for j, name in enumerate(NUMERIC)}
    codes = {name: (rng.beta(1, 3, ROWS_PER_FILE) * size).astype(np.int64) for name, size in CARDINALITIES.items()}
    first = rng.integers(0, 3 * 365, ROWS_PER_FILE) * DAY_US + rng.integers(0, DAY_US, ROWS_PER_FILE)
    times = {"t0": first, "t1": first + rng.integers(0, 30 * DAY_US, ROWS_PER_FILE)}
    score = (
        numbers["n0"] + 0.5 * (numbers["n1"] - 1) * numbers["n0"] + np.sin(numbers["n2"]) + (codes["c1"] % 5 - 2) * 0.5
        + (codes["c4"] % 7 - 3) * 0.2 + ((first // 3_600_000_000) % 24 > 17) + rng.normal(0, 1, ROWS_PER_FILE)
    )  # fmt: skip
    frame = pl.DataFrame(numbers).select(
        pl.when(pl.Series(rng.random(ROWS_PER_FILE) >= NULLS)).then(pl.col(name)).alias(name) for name in NUMERIC
    )
    texts = [pl.Series(name, values).cast(pl.String).str.zfill(5).str.replace("^", f"{name}-") for name, values in codes.items()]
    instants = [pl.Series(name, values + 1_600_000_000_000_000).cast(pl.Datetime("us")) for name, values in times.items()]
    return frame.with_columns(*texts, *instants, pl.Series(TARGET, score > 0.5))
