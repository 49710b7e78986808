"""Fit, transform and write: heliostat beside Polars in one process (the limit) and its peers, on the same rows.

    python -m benchmarks.prepare [--rows 1000000 4000000] [--repeat 3] [--peers ray dask spark]

Impute and scale 12 numeric columns, index 6 categoricals, take the parts of 2 timestamps, all fitted on the train rows; write the
result as Parquet. heliostat is timed on a Ray that runs already, on its first piece of work. Every side imports its libraries
before the clock starts; "with start" has the whole command. The peers are an optional extra: pip install -e '.[peers]' (Spark
needs a Java besides). Prints one table and writes benchmarks/results/prepare.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, alternate, median, save, wait_for_slots
from benchmarks.table import CARDINALITIES, NUMERIC, TARGET, TIMES, generate

CATEGORICAL = list(CARDINALITIES)
SHARE = 0.8
"""Train rows; the others are transformed as well."""


def main() -> None:
    """Measure all sides in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=[])
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        json.dump(SIDES[options.side](options.source, f"{tempfile.mkdtemp(dir=options.out)}/out"), sys.stdout)
        return
    found: dict[str, dict[str, list[Measured]]] = {}
    for rows in options.rows:
        with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder:
            source = generate(Path(folder) / "data", rows)
            sides = ("heliostat", "polars", *options.peers)
            found[f"{rows:,}"] = alternate("benchmarks.prepare", sides, options.repeat, source=source, out=Path(folder))
    report(found)


def heliostat(source: str, out: str) -> dict[str, Any]:
    """`heliostat prepare` on a Ray that has just started; none of its workers has seen a line of heliostat."""
    from app.session import open_session
    from app.spec import Spec
    from pipelines.explain import checked
    from pipelines.prepare import prepare

    steps = {"numeric": [{"impute": {"strategy": "mean"}}, "scale"], "categorical": ["index"], "datetime": ["parts"]}
    spec = checked(
        Spec, {"name": "table", "data": {"source": source}, "task": {"target": TARGET}, "features": steps, "store": out}
    )
    with open_session() as session:
        wait_for_slots(session)
        started = time.monotonic()
        prepared = prepare(spec)
        seconds, started = time.monotonic() - started, time.monotonic()
        assert prepare(spec).reused
        return {"seconds": seconds, "again": time.monotonic() - started, "rows": sum(prepared.rows.values())}


def polars(source: str, out: str) -> dict[str, Any]:
    """The same by hand on Polars' streaming engine."""
    started = time.monotonic()
    place = pl.int_range(pl.len(), dtype=pl.UInt64).hash(7)
    rows = pl.scan_parquet(f"{source}/*.parquet").with_columns((place < int(SHARE * 2**64)).alias("train"))
    train = rows.filter(pl.col("train"))
    moments = train.select(
        *(pl.col(name).mean().alias(f"{name}-mean") for name in NUMERIC), *(pl.col(name).std(ddof=0) for name in NUMERIC)
    )
    counts = [train.select(name).group_by(name).len().sort(["len", name], descending=[True, False]) for name in CATEGORICAL]
    [found, *tables] = pl.collect_all([moments, *counts], engine="streaming")
    known = found.row(0, named=True)
    numbers = [
        ((pl.col(name).fill_null(known[f"{name}-mean"]) - known[f"{name}-mean"]) / known[name]).alias(name) for name in NUMERIC
    ]
    codes = [
        pl.col(name).replace_strict(table[name], pl.int_range(table.height, eager=True).cast(pl.Float64), default=table.height)
        for name, table in zip(CATEGORICAL, tables, strict=True)
    ]
    parts = [
        getattr(pl.col(name).dt, part)().cast(pl.Float64).alias(f"{name}-{part}")
        for name in TIMES
        for part in ("year", "month", "day", "weekday", "ordinal_day", "hour")
    ]
    answer = rows.select(*numbers, *codes, *parts, pl.col(TARGET).cast(pl.Float64), "train")
    Path(out).mkdir()
    answer.sink_parquet(f"{out}/0.parquet", compression="lz4", engine="streaming")
    seconds = time.monotonic() - started
    return {"seconds": seconds, "rows": pl.scan_parquet(f"{out}/0.parquet").select(pl.len()).collect().item()}


def ray_preprocessors(source: str, out: str) -> dict[str, Any]:
    """Ray Data's own preprocessors, as its guide chains them; dates by a function, which they lack."""
    from app.session import open_session

    with open_session():
        import ray.data
        from ray.data.preprocessors import Chain, OrdinalEncoder, SimpleImputer, StandardScaler

        def parts(batch: Any) -> Any:
            for name in TIMES:
                for part in ("year", "month", "day", "weekday", "dayofyear", "hour"):
                    batch[f"{name}-{part}"] = getattr(batch[name].dt, part).astype(float)
            return batch.drop(columns=TIMES)

        started = time.monotonic()
        dataset = ray.data.read_parquet(source)
        chain = Chain(SimpleImputer(NUMERIC, "mean"), StandardScaler(NUMERIC), OrdinalEncoder(CATEGORICAL))
        chain.fit_transform(dataset).map_batches(parts, batch_format="pandas").write_parquet(out)
        return {"seconds": time.monotonic() - started, "rows": dataset.count()}


def dask(source: str, out: str) -> dict[str, Any]:
    """The same by hand on Dask's data frames."""
    import dask
    import dask.dataframe as dd

    started = time.monotonic()
    frame = dd.read_parquet(f"{source}/*.parquet")
    means, stds, *counts = dask.compute(
        frame[NUMERIC].mean(), frame[NUMERIC].std(ddof=0), *(frame[name].value_counts() for name in CATEGORICAL)
    )
    tables = {
        name: {text: float(code) for code, text in enumerate(found.index)}
        for name, found in zip(CATEGORICAL, counts, strict=True)
    }

    def transform(part: Any) -> Any:
        part[NUMERIC] = (part[NUMERIC].fillna(means) - means) / stds
        for name in CATEGORICAL:
            part[name] = part[name].astype(object).map(tables[name])
        for name in TIMES:
            for what in ("year", "month", "day", "weekday", "dayofyear", "hour"):
                part[f"{name}-{what}"] = getattr(part[name].dt, what).astype(float)
        return part.drop(columns=TIMES)

    frame.map_partitions(transform).to_parquet(out)
    return {"seconds": time.monotonic() - started, "rows": len(dd.read_parquet(out))}


def spark(source: str, out: str) -> dict[str, Any]:
    """Spark ML's pipeline in local mode."""
    from pyspark.ml import Pipeline
    from pyspark.ml.feature import Imputer, StandardScaler, StringIndexer, VectorAssembler
    from pyspark.sql import SparkSession, functions

    session = SparkSession.builder.master("local[*]").config("spark.driver.memory", "8g").getOrCreate()
    started = time.monotonic()
    frame = session.read.parquet(source)
    for name in TIMES:
        for part, function in (
            ("year", functions.year),
            ("month", functions.month),
            ("day", functions.dayofmonth),
            ("weekday", functions.dayofweek),
            ("dayofyear", functions.dayofyear),
            ("hour", functions.hour),
        ):
            frame = frame.withColumn(f"{name}_{part}", function(name).cast("double"))
    stages = [
        Imputer(inputCols=NUMERIC, outputCols=[f"{name}_filled" for name in NUMERIC]),
        VectorAssembler(inputCols=[f"{name}_filled" for name in NUMERIC], outputCol="numbers"),
        StandardScaler(inputCol="numbers", outputCol="scaled", withMean=True),
        StringIndexer(inputCols=CATEGORICAL, outputCols=[f"{name}_code" for name in CATEGORICAL]),
    ]
    answer = Pipeline(stages=stages).fit(frame).transform(frame).drop(*NUMERIC, *CATEGORICAL, *TIMES, "numbers")
    answer.write.parquet(out)
    seconds = time.monotonic() - started
    rows = session.read.parquet(out).count()
    session.stop()
    return {"seconds": seconds, "rows": rows}


PEERS: dict[str, Callable[[str, str], dict[str, Any]]] = {"ray": ray_preprocessors, "dask": dask, "spark": spark}
SIDES: dict[str, Callable[[str, str], dict[str, Any]]] = {"heliostat": heliostat, "polars": polars, **PEERS}


def report(found: dict[str, dict[str, list[Measured]]]) -> None:
    """Print the table of medians and save it."""
    table = Table("rows", "", "seconds", "again, s", "with start, s", "peak PSS, MB", title="Fit, transform and write (medians)")
    content: dict[str, Any] = {}
    for rows, sides in found.items():
        for name, measured in sides.items():
            seconds = [median([one.result["seconds"] for one in measured]), median([one.seconds for one in measured])]
            peak = median([one.peak_mb for one in measured])
            again = [one.result["again"] for one in measured if "again" in one.result]
            shown = f"{median(again):.2f}" if again else ""
            table.add_row(rows, name, f"{seconds[0]:.1f}", shown, f"{seconds[1]:.1f}", f"{peak:,.0f}")
            content.setdefault(rows, {})[name] = {
                "seconds": seconds[0], "with_start": seconds[1], "peak_mb": peak, "repeat": len(measured), "again": again,
                "at_peak": measured[-1].at_peak,
            }  # fmt: skip
    Console().print(table)
    Console().print(f"written to {save('prepare', {'table': content})}")


if __name__ == "__main__":
    main()
