"""From Parquet to a saved LightGBM model: heliostat beside LightGBM in one process (the limit) and its peers, on the same rows.

    python -m benchmarks.train_lightgbm [--rows 1000000 4000000] [--repeat 3] [--peers ray dask spark xgboost]

The table of benchmarks.prepare, 100 rounds, 63 leaves, 255 bins. heliostat is timed on a Ray that runs already, on its first
piece of work. Every side imports its libraries before the clock starts, trains on all rows, and is scored on 250,000 others;
"with start" has the whole command. The peers are an optional extra: pip install -e '.[peers]' (Spark needs a Java besides).
Prints one table and writes benchmarks/results/train_lightgbm.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, alternate, median, save, wait_for_slots
from benchmarks.table import CARDINALITIES, NUMERIC, TARGET, TIMES, generate

CATEGORICAL = list(CARDINALITIES)
PARTS = {"year": "year", "month": "month", "day": "day", "weekday": "weekday", "dayofyear": "ordinal_day", "hour": "hour"}
ROUNDS = 100
PARAMS = {
    "num_leaves": 63, "max_bin": 255, "learning_rate": 0.1, "min_data_in_leaf": 20, "min_sum_hessian_in_leaf": 1.0,
    "lambda_l2": 1.0,
}  # fmt: skip
TEST_FILE = 1000
"""A file of the table that no side trains on."""


def main() -> None:
    """Measure all sides in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=[])
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        json.dump(SIDES[options.side](Path(options.folder)), sys.stdout)
        return
    found: dict[str, dict[str, list[Measured]]] = {}
    for rows in options.rows:
        with train_and_test(rows) as folder:
            sides = ("heliostat", "lightgbm", *options.peers)
            found[f"{rows:,}"] = alternate("benchmarks.train_lightgbm", sides, options.repeat, folder=folder)
    report(found)


@contextlib.contextmanager
def train_and_test(rows: int) -> Iterator[Path]:
    """A folder with the table that all sides train on, and 250,000 other rows."""
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder:
        generate(Path(folder) / "train", rows)
        generate(Path(folder) / "test", 250_000, TEST_FILE)
        yield Path(folder)


def heliostat(folder: Path, workers: int | str = "auto") -> dict[str, Any]:
    """`heliostat train` on a Ray that has just started; none of its workers has seen a line of heliostat."""
    from app.session import open_session
    from app.spec import Spec
    from pipelines.evaluate import evaluate
    from pipelines.explain import checked
    from pipelines.train import train

    with tempfile.TemporaryDirectory(dir=folder) as store, open_session() as session:
        wait_for_slots(session)
        spec = checked(
            Spec,
            {
                "name": "table",
                "data": {"source": {"train": str(folder / "train"), "test": str(folder / "test")}, "split": {"valid": 0.0}},
                "task": {"target": TARGET},
                "features": {"numeric": [], "categorical": ["index"], "datetime": ["parts"]},
                "model": {"type": "lightgbm", "params": {**PARAMS, "rounds": ROUNDS, "early_stopping": None}},
                "train": {"workers": workers},
                "store": store,
            },
        )
        started = time.monotonic()
        run = train(spec, free_slots=lambda: session.slots().free)
        seconds = time.monotonic() - started
        return {
            "seconds": seconds,
            "stages": run.record["seconds"],
            "auc": evaluate(run, spec).metrics["test"]["auc"],
            "rows": run.record["rows"]["train"],
        }


def lightgbm(folder: Path) -> dict[str, Any]:
    """The same by hand in one process with all cores: Polars, a matrix, LightGBM."""
    import lightgbm as lgb

    started = time.monotonic()
    frame = pl.read_parquet(folder / "train/*.parquet")
    codes = {name: codes_of(frame[name]) for name in CATEGORICAL}
    matrix, target = matrix_of(frame, codes), frame[TARGET].to_numpy().astype(float)
    del frame
    data = lgb.Dataset(matrix, target, categorical_feature=small(), params={"max_bin": PARAMS["max_bin"]})
    settings = {**PARAMS, "objective": "binary", "verbosity": -1}
    booster = lgb.train(settings, data, ROUNDS)
    booster.save_model(folder / "bare.txt")
    seconds = time.monotonic() - started
    rows = data.num_data()
    return {"seconds": seconds, "rows": rows, "auc": auc(folder, codes, booster.predict)}


def ray_example(folder: Path) -> dict[str, Any]:
    """Ray Train's documented example: the shard to pandas, LightGBM's network parameters; its own encoder before."""
    from app.session import open_session

    with open_session():
        import lightgbm as lgb
        import ray.data
        import ray.train
        from ray.data.preprocessors import OrdinalEncoder
        from ray.train.lightgbm import LightGBMTrainer, RayTrainReportCallback

        def parts(batch: Any) -> Any:
            for name in TIMES:
                for part in PARTS:
                    batch[f"{name}-{part}"] = getattr(batch[name].dt, part).astype(float)
            return batch.drop(columns=TIMES)

        def train_func() -> None:
            frame = ray.train.get_dataset_shard("train").materialize().to_pandas()
            data = lgb.Dataset(frame.drop(columns=TARGET).to_numpy(np.float64), frame[TARGET].to_numpy(np.float64))
            network = ray.train.lightgbm.get_network_params()
            settings = {**PARAMS, "objective": "binary", "verbosity": -1, "tree_learner": "data_parallel", "pre_partition": True}
            lgb.train(
                {**settings, **network, "num_threads": 1}, data, ROUNDS, callbacks=[RayTrainReportCallback(frequency=ROUNDS)]
            )

        started = time.monotonic()
        dataset = ray.data.read_parquet(str(folder / "train")).map_batches(parts, batch_format="pandas")
        encoder = OrdinalEncoder(CATEGORICAL)
        dataset = encoder.fit_transform(dataset)
        trainer = LightGBMTrainer(
            train_func,
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(storage_path=tempfile.mkdtemp(dir=folder)),
            datasets={"train": dataset},
        )
        trainer.fit()
        return {"seconds": time.monotonic() - started, "rows": dataset.count()}


def dask(folder: Path) -> dict[str, Any]:
    """LightGBM's own Dask estimator, two workers of one thread; categories by their counts."""
    import dask.dataframe as dd
    from dask.distributed import Client, LocalCluster
    from lightgbm import DaskLGBMClassifier

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        started = time.monotonic()
        frame = dd.read_parquet(f"{folder}/train/*.parquet")
        counts = dd.compute(*(frame[name].value_counts() for name in CATEGORICAL))
        for name, counted in zip(CATEGORICAL, counts, strict=True):
            codes = {text: float(code) for code, text in enumerate(counted.index)}
            frame[name] = frame[name].astype(object).map(codes, meta=(name, "float64")).astype("float64")
        for name in TIMES:
            for part in PARTS:
                frame[f"{name}-{part}"] = getattr(frame[name].dt, part).astype("float64")
        frame = frame.drop(columns=TIMES)
        names = {"n_estimators": ROUNDS, "min_child_samples": 20, "min_child_weight": 1.0, "reg_lambda": 1.0}
        model = DaskLGBMClassifier(client=client, num_leaves=63, max_bin=255, learning_rate=0.1, verbosity=-1, **names)
        model.fit(frame.drop(columns=TARGET), frame[TARGET].astype("float64"))
        model.booster_.save_model(folder / "dask.txt")
        return {"seconds": time.monotonic() - started, "rows": len(frame)}


def spark(folder: Path) -> dict[str, Any]:
    """Spark ML's GBTClassifier in local mode: depth 6 is its nearest to 63 leaves."""
    from pyspark.ml.classification import GBTClassifier

    return _on_spark(folder, lambda: GBTClassifier(maxIter=ROUNDS, maxDepth=6, maxBins=256, stepSize=0.1), missing=0.0)


def xgboost(folder: Path) -> dict[str, Any]:
    """XGBoost's own Spark estimator in local mode, two workers of one thread."""
    from xgboost.spark import SparkXGBClassifier

    settings = {"max_leaves": 63, "max_depth": 0, "grow_policy": "lossguide", "max_bin": 255, "learning_rate": 0.1}
    return _on_spark(
        folder,
        lambda: SparkXGBClassifier(
            n_estimators=ROUNDS, num_workers=2, tree_method="hist", min_child_weight=1.0, reg_lambda=1.0, **settings
        ),
        missing=None,
    )


def _on_spark(folder: Path, estimator: Callable[[], Any], missing: float | None) -> dict[str, Any]:
    """Spark's own indexers and assembler, then the estimator; `missing` is put where a number is null."""
    from pyspark.ml import Pipeline
    from pyspark.ml.feature import SQLTransformer, StringIndexer, VectorAssembler
    from pyspark.sql import SparkSession, functions

    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = SparkSession.builder.master("local[*]").config("spark.driver.memory", "12g").getOrCreate()
    started = time.monotonic()
    frame = session.read.parquet(str(folder / "train"))
    functions_of = {"year": "year", "month": "month", "day": "dayofmonth", "weekday": "dayofweek", "dayofyear": "dayofyear"}
    for name in TIMES:
        for part in PARTS:
            frame = frame.withColumn(f"{name}_{part}", getattr(functions, functions_of.get(part, part))(name).cast("double"))
    frame = frame.withColumn("label", functions.col(TARGET).cast("double"))
    inputs = [*NUMERIC, *(f"{name}_number" for name in CATEGORICAL), *(f"{name}_{part}" for name in TIMES for part in PARTS)]
    stages = [
        StringIndexer(inputCols=CATEGORICAL, outputCols=[f"{name}_code" for name in CATEGORICAL]),
        # As numbers: the trees would want a bin for each of 50,000 categories. The sum loses what the indexer notes on it.
        SQLTransformer(
            statement=f"SELECT *, {', '.join(f'{name}_code + 0.0 AS {name}_number' for name in CATEGORICAL)} FROM __THIS__"
        ),
        VectorAssembler(inputCols=inputs, outputCol="features", handleInvalid="keep"),
        estimator(),  # it needs the session
    ]
    model = Pipeline(stages=stages).fit(frame if missing is None else frame.fillna(missing, NUMERIC))
    model.write().overwrite().save(str(folder / "spark-model"))
    seconds = time.monotonic() - started
    rows = frame.count()
    session.stop()
    return {"seconds": seconds, "rows": rows}


PEERS: dict[str, Callable[[Path], dict[str, Any]]] = {"ray": ray_example, "dask": dask, "spark": spark, "xgboost": xgboost}
SIDES: dict[str, Callable[[Path], dict[str, Any]]] = {"heliostat": heliostat, "lightgbm": lightgbm, **PEERS}


def codes_of(texts: pl.Series) -> dict[str, float]:
    """Codes by frequency, as `index` has them."""
    counts = texts.drop_nulls().value_counts().sort(["count", texts.name], descending=[True, False])
    return {text: float(code) for code, text in enumerate(counts[texts.name].to_list())}


def matrix_of(frame: pl.DataFrame, codes: dict[str, dict[str, float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers, codes and parts of dates as (rows, features), C order."""
    columns = [
        *(pl.col(name) for name in NUMERIC),
        *(pl.col(name).replace_strict(codes[name], default=float(len(codes[name])), return_dtype=pl.Float64) for name in codes),
        *(getattr(pl.col(name).dt, part)().cast(pl.Float64).alias(f"{name}-{part}") for name in TIMES for part in PARTS.values()),
    ]
    return np.ascontiguousarray(frame.select(columns).to_numpy())


def small() -> list[int]:
    """Where the categories stand that are split as sets; those of many are split as numbers, as heliostat does."""
    return [len(NUMERIC) + i for i, size in enumerate(CARDINALITIES.values()) if size <= 256]


def auc(folder: Path, codes: dict[str, dict[str, float]], predict: Callable[[Any], Any]) -> float:
    """On the rows that no side trained on."""
    from sklearn.metrics import roc_auc_score

    frame = pl.read_parquet(folder / "test/*.parquet")
    return float(roc_auc_score(frame[TARGET].to_numpy(), predict(matrix_of(frame, codes))))


def report(found: dict[str, dict[str, list[Measured]]]) -> None:
    """Print the table of medians and save it."""
    table = Table("rows", "", "seconds", "with start, s", "peak PSS, MB", "test AUC", title="From Parquet to a model (medians)")
    content: dict[str, Any] = {}
    for rows, sides in found.items():
        for name, measured in sides.items():
            seconds = [median([one.result["seconds"] for one in measured]), median([one.seconds for one in measured])]
            peak = median([one.peak_mb for one in measured])
            scores = [one.result["auc"] for one in measured if "auc" in one.result]
            shown = f"{median(scores):.4f}" if scores else ""
            table.add_row(rows, name, f"{seconds[0]:.1f}", f"{seconds[1]:.1f}", f"{peak:,.0f}", shown)
            content.setdefault(rows, {})[name] = {
                "seconds": seconds[0], "with_start": seconds[1], "peak_mb": peak, "repeat": len(measured), "auc": scores,
                "stages": [one.result.get("stages") for one in measured], "at_peak": measured[-1].at_peak,
            }  # fmt: skip
    Console().print(table)
    Console().print(f"written to {save('train_lightgbm', {'table': content})}")


if __name__ == "__main__":
    main()
