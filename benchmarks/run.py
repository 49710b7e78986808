"""From Parquet to an evaluated model: heliostat beside Polars and LightGBM in one process, on the same rows and the same work.

    python -m benchmarks.run [--rows 336776] [--repeat 3]

More rows than the flights example has are drawn from it with a seed. Both sides run at the same priority (Ray would lower its
workers'). Prints one table and writes benchmarks/results/run.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, measure, median, save

FLIGHTS = Path("examples/flights/data")
SPEC = Path("examples/flights/flights.yaml")
ROWS_PER_FILE = 250_000


def main() -> None:
    """Measure both sides in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=0, help="rows of the table; default: the flights as they are")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bare", metavar="SOURCE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        json.dump(bare(options.bare), sys.stdout)
        return
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder:
        source = generate(Path(folder) / "data", options.rows) if options.rows else FLIGHTS
        ours, limit = [], []
        for i in range(options.repeat):
            ours.append(heliostat(source, Path(folder) / f"store-{i}"))
            limit.append(measure([sys.executable, "-m", "benchmarks.run", "--bare", str(source)]))
    report(ours, limit)


def heliostat(source: Path, store: Path) -> Measured:
    """One `heliostat run` on an empty store."""
    command = [sys.executable, "-m", "app", "run", str(SPEC), "--store", str(store), "--json", "--set", f"data.source={source}"]
    return measure(command, env={"RAY_worker_niceness": "0"})


def bare(source: str) -> dict[str, Any]:
    """The same work by hand: the Spec's split, features, parameters and early stopping, all cores, no Ray."""
    import lightgbm as lgb
    from sklearn.metrics import roc_auc_score

    spec = yaml.safe_load(SPEC.read_text())
    started = time.monotonic()
    frame = pl.read_parquet(f"{source}/*.parquet").filter(pl.col("arr_delay").is_not_null())
    splits = split_of(frame.height)
    y = (frame["arr_delay"] > 15).to_numpy().astype(float)
    when = pl.col("time_hour")
    frame = frame.drop(spec["features"]["drop"]).with_columns(
        year=when.dt.year(), month=when.dt.month(), day=when.dt.day(), weekday=when.dt.weekday(), hour=when.dt.hour(),
        dayofyear=when.dt.ordinal_day(), since=when.cast(pl.Int64) / 3.6e9,
    ).drop("time_hour")  # fmt: skip
    texts = [name for name in frame.columns if frame[name].dtype == pl.String]
    for name in texts:  # codes by frequency in the train split, as `index` has them
        counts = frame.filter(splits == 0)[name].drop_nulls().value_counts(sort=True)
        codes = {text: code for code, text in enumerate(counts[name].to_list())}
        unknown = len(codes)
        frame = frame.with_columns(pl.col(name).replace_strict(codes, default=unknown, return_dtype=pl.Float64))
    matrix = frame.cast(pl.Float64).to_numpy()
    prepared = time.monotonic()
    params = dict(spec["model"]["params"])
    rounds, patience = params.pop("rounds"), params.pop("early_stopping")
    categorical = [frame.columns.index(name) for name in texts if frame[name].n_unique() <= 256]
    settings = {
        **params, "objective": "binary", "metric": "binary_logloss", "verbosity": -1,
        "min_sum_hessian_in_leaf": 1.0, "lambda_l2": 1.0,
    }  # fmt: skip
    train = lgb.Dataset(matrix[splits == 0], y[splits == 0], categorical_feature=categorical)
    valid = lgb.Dataset(matrix[splits == 1], y[splits == 1], reference=train)
    booster = lgb.train(settings, train, rounds, valid_sets=[valid], callbacks=[lgb.early_stopping(patience, verbose=False)])
    trained = time.monotonic()
    auc = roc_auc_score(y[splits == 2], booster.predict(matrix[splits == 2]))
    return {
        "metrics": {"test": {"auc": auc}},
        "seconds": {"prepare": prepared - started, "train": trained - prepared, "evaluate": time.monotonic() - trained},
        "rows": {"train": int((splits == 0).sum())},
        "steps": booster.best_iteration,
    }


def split_of(rows: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Train, valid and test in the Spec's proportions."""
    place = np.random.default_rng(7).random(rows)
    return np.where(place < 0.1, 2, np.where(place < 0.2, 1, 0)).astype(np.int8)


def generate(folder: Path, rows: int) -> Path:
    """Draw rows from the flights, a little noise on the weather so that they are not copies."""
    folder.mkdir(parents=True)
    flights = pl.read_parquet(FLIGHTS / "*.parquet")
    rng = np.random.default_rng(7)
    for i, first in enumerate(range(0, rows, ROWS_PER_FILE)):
        count = min(ROWS_PER_FILE, rows - first)
        part = flights[rng.integers(0, flights.height, count)]
        noise = [
            (pl.col(name) + pl.Series(rng.normal(0, 0.5, count))).alias(name) for name in ("temp", "dewp", "humid", "pressure")
        ]
        part.with_columns(noise).write_parquet(folder / f"{i:05d}.parquet")
    return folder


def report(ours: list[Measured], limit: list[Measured]) -> None:
    """Print the table of medians and save it."""
    table = Table("", "heliostat", "Polars + LightGBM, one process", title="From Parquet to an evaluated model (medians)")
    rows: dict[str, tuple[float, float]] = {}
    for stage in ("prepare", "train", "evaluate"):
        rows[f"{stage}, s"] = (
            median([one.result["seconds"][stage] for one in ours]), median([one.result["seconds"][stage] for one in limit])
        )  # fmt: skip
    inside = [(sum(one.result["seconds"].values()) for one in side) for side in (ours, limit)]
    outside = [
        median([one.seconds - within for one, within in zip(side, sums, strict=True)])
        for side, sums in zip((ours, limit), inside, strict=True)
    ]
    rows["start and end (Ray, imports), s"] = (outside[0], outside[1])
    rows["whole command, s"] = (median([one.seconds for one in ours]), median([one.seconds for one in limit]))
    rows["peak memory of the process tree (PSS), MB"] = (
        median([one.peak_mb for one in ours]),
        median([one.peak_mb for one in limit]),
    )
    rows["test AUC"] = (median([_auc(one) for one in ours]), median([_auc(one) for one in limit]))
    for name, (left, right) in rows.items():
        table.add_row(name, f"{left:.4g}", f"{right:.4g}")
    Console().print(table)
    path = save("run", {"repeat": len(ours), "rows": ours[0].result["rows"], "table": rows})
    Console().print(f"written to {path}")


def _auc(one: Measured) -> float:
    return float(one.result["metrics"]["test"]["auc"])


if __name__ == "__main__":
    main()
