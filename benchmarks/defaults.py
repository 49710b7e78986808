"""Do the defaults of `type: lightgbm` hold on any table? Each setting beside them, on real and on generated tables.

    python -m benchmarks.defaults [--tables flights bank ...] [--settings ...]

A Spec names data, target and what must be dropped; all else is the default but for the one setting. Prints the loss on the test
split that training minimises (logloss or rmse), for the defaults as it is and for each setting as the change in percent (below 0
is better), and writes benchmarks/results/defaults.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.measure import save
from benchmarks.table import generate

DATA = Path("tests/data")
SEEDS = (7, 8, 9)
"""Of the split: a difference is the median over three."""


class Data(NamedTuple):
    """One table: where it is, and what its Spec has to say."""

    source: Callable[[Path], Path]
    """Where it is; one that is generated is written into the folder."""
    spec: dict[str, Any]
    seeds: tuple[int, ...] = SEEDS


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "LightGBM's own": {"num_leaves": 31, "min_sum_hessian_in_leaf": 1e-3, "lambda_l2": 0.0},
    "no regularisation": {"min_sum_hessian_in_leaf": 1e-3, "lambda_l2": 0.0},
    "31 leaves": {"num_leaves": 31},
    "127 leaves": {"num_leaves": 127},
    "learning rate 0.05": {"learning_rate": 0.05, "rounds": 2000, "early_stopping": 100},
    "features 0.8": {"feature_fraction": 0.8},
    "categories as sets": {"max_category": 1_000_000},
    "categories as numbers": {"max_category": 0},
}


def flights(_: Path) -> Path:
    return Path("examples/flights/data")


def tiny_hessians(folder: Path) -> Path:
    """Seven classes that are nearly separable: second derivatives close to 0."""
    rng = np.random.default_rng(7)
    centres = rng.normal(0, 3, (7, 8))
    y = rng.integers(0, 7, 20_000)
    x = centres[y] + rng.normal(0, 1, (20_000, 8))
    return _written(
        folder, {f"x{i}": x[:, i] for i in range(8)}, np.where(rng.random(len(y)) < 0.02, rng.integers(0, 7, len(y)), y)
    )


def many_categories(folder: Path) -> Path:
    """A category of 5,000 values, of which most are seen a few times, tells less than it seems to."""
    rng = np.random.default_rng(7)
    x, code = rng.normal(0, 1, (30_000, 4)), (5_000 * rng.beta(1, 4, 30_000)).astype(int)
    effect = rng.normal(0, 0.5, 5_000)
    score = x[:, 0] + x[:, 1] * x[:, 2] + effect[code]
    columns = {**{f"x{i}": x[:, i] for i in range(4)}, "code": np.char.add("v", code.astype(str))}
    return _written(folder, columns, rng.random(len(x)) < 1 / (1 + np.exp(-score)))


def heavy_tail(folder: Path) -> Path:
    """A target with outliers of a thousand times its middle."""
    rng = np.random.default_rng(7)
    x = rng.normal(0, 1, (20_000, 6))
    return _written(
        folder, {f"x{i}": x[:, i] for i in range(6)}, np.exp(x[:, 0] + 0.5 * x[:, 1] * x[:, 2] + rng.normal(0, 1, 20_000))
    )


def few_rows(folder: Path) -> Path:
    """Three hundred rows, of 20 columns two tell something."""
    rng = np.random.default_rng(7)
    x = rng.normal(0, 1, (300, 20))
    return _written(folder, {f"x{i}": x[:, i] for i in range(20)}, x[:, 0] + x[:, 1] + rng.normal(0, 1, 300) > 0)


def _written(folder: Path, columns: dict[str, Any], y: np.ndarray[Any, Any]) -> Path:
    pl.DataFrame({**columns, "y": y}).write_parquet(folder / "table.parquet")
    return folder / "table.parquet"


LATE = {"late": "arr_delay > 15"}
LEAKS = ["arr_delay", "dep_time", "dep_delay", "arr_time", "air_time"]
TABLES = {
    "flights": Data(flights, {"data": {"derive": LATE}, "task": {"target": "late"}, "features": {"drop": LEAKS}}, seeds=(7,)),
    "bank": Data(lambda _: DATA / "bank.parquet", {"task": {"target": "y"}, "features": {"drop": ["duration"]}}),
    "bike": Data(
        lambda _: DATA / "bike.parquet", {"task": {"target": "cnt"}, "features": {"drop": ["casual", "registered", "instant"]}}
    ),
    "lightgbm binary": Data(lambda _: DATA / "lightgbm/binary_train.parquet", {"task": {"target": "label"}}),
    "lightgbm multiclass": Data(lambda _: DATA / "lightgbm/multiclass_train.parquet", {"task": {"target": "label"}}),
    "generated, mixed": Data(lambda folder: generate(folder / "table", 100_000), {"task": {"target": "y"}}, seeds=(7,)),
    "tiny hessians": Data(tiny_hessians, {"task": {"target": "y", "type": "multiclass"}}),
    "many categories": Data(many_categories, {"task": {"target": "y"}}),
    "heavy tail": Data(heavy_tail, {"task": {"target": "y", "type": "regression"}}),
    "few rows": Data(few_rows, {"task": {"target": "y"}}),
}


def main() -> None:
    """Train every setting on every table and print the changes."""
    from app.session import open_session

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args()
    settings = ["defaults", *(name for name in options.settings if name != "defaults")]
    content: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder, open_session() as session:
        for i, name in enumerate(options.tables):
            data, place = TABLES[name], Path(folder) / str(i)
            place.mkdir()
            source = data.source(place)
            content[name] = {
                setting: [
                    trained(data.spec, source, place / "store", seed, SETTINGS[setting], lambda: session.slots().free)
                    for seed in data.seeds
                ]
                for setting in settings
            }
    report(content, settings)


def trained(
    spec: dict[str, Any], source: Path, store: Path, seed: int, params: dict[str, Any], slots: Callable[[], float]
) -> dict[str, Any]:
    """The test metrics and the rounds of one run."""
    from app.spec import Spec
    from pipelines.explain import checked
    from pipelines.train import run

    data = {**spec.get("data", {}), "source": str(source), "split": {"seed": seed, "test": 0.2, "valid": 0.1}}
    values = {"name": "table", **spec, "data": data, "model": {"params": params}, "store": str(store)}
    done = run(checked(Spec, values), free_slots=slots)
    return {**done.metrics["test"], "rounds": done.record["steps"]}


def report(content: dict[str, Any], settings: list[str]) -> None:
    """Print the table and save it."""
    table = Table("", "loss", *settings, title="Test loss: of the defaults, and the change by each setting in percent")
    for name, found in content.items():
        loss = "rmse" if "rmse" in found["defaults"][0] else "logloss"
        base = [one[loss] for one in found["defaults"]]
        changes = [
            100 * float(np.median([one[loss] / value - 1 for one, value in zip(found[setting], base, strict=True)]))
            for setting in settings[1:]
        ]
        table.add_row(name, loss, f"{np.median(base):.4g}", *(f"{change:+.1f}" for change in changes))
    Console(width=160).print(table)
    Console().print(f"written to {save('defaults', {'table': content})}")


if __name__ == "__main__":
    main()
