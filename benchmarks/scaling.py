"""How seconds and bytes grow with the rows, and what more workers do: from Parquet to a saved LightGBM model, as a plot.

    python -m benchmarks.scaling [--rows 1000000 4000000 16000000] [--workers 1 2 4] [--repeat 1]

The table and settings of benchmarks.train_lightgbm. With more workers than cores they share cores, as on a busy machine: what
is shown is what more processes cost. Prints one table, writes benchmarks/results/scaling.json and scaling.svg beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, alternate, median, save
from benchmarks.train_lightgbm import heliostat, train_and_test


def main() -> None:
    """Measure every number of rows with every number of workers and plot the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 4_000_000, 16_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        json.dump(heliostat(Path(options.folder), int(options.side)), sys.stdout)
        return
    found: dict[int, dict[str, list[Measured]]] = {}
    for rows in options.rows:
        with train_and_test(rows) as folder:
            sides = [str(workers) for workers in options.workers]
            found[rows] = alternate("benchmarks.scaling", sides, options.repeat, folder=folder)
    report(found)


def report(found: dict[int, dict[str, list[Measured]]]) -> None:
    """Print the table of medians, save and plot it."""
    table = Table(
        "rows", "workers", "prepare, s", "train, s", "s per million rows", "peak PSS, MB", "MB per million rows", "test AUC"
    )
    content: dict[str, dict[str, Any]] = {}
    for rows, sides in found.items():
        for workers, measured in sides.items():
            one = {
                "prepare": median([each.result["stages"]["prepare"] for each in measured]),
                "train": median([each.result["stages"]["train"] for each in measured]),
                "seconds": median([each.result["seconds"] for each in measured]),
                "peak_mb": median([each.peak_mb for each in measured]),
                "auc": [each.result["auc"] for each in measured],
            }
            millions = rows / 1e6
            table.add_row(
                f"{rows:,}", workers, f"{one['prepare']:.1f}", f"{one['train']:.1f}", f"{one['seconds'] / millions:.2f}",
                f"{one['peak_mb']:,.0f}", f"{one['peak_mb'] / millions:,.0f}", f"{median(one['auc']):.4f}",
            )  # fmt: skip
            content.setdefault(str(rows), {})[workers] = one
    Console().print(table)
    path = save("scaling", {"table": content})
    plot(content, path.with_suffix(".svg"))
    Console().print(f"written to {path} and {path.with_suffix('.svg')}")


def plot(content: dict[str, dict[str, Any]], path: Path) -> None:
    """Seconds and MB over rows, a line for each number of workers."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, name in (
        (axes[0], "seconds", "seconds, Parquet to model"),
        (axes[1], "peak_mb", "peak memory of all processes, MB"),
    ):
        for workers in next(iter(content.values())):
            rows = [int(rows) for rows in content]
            axis.plot(
                rows, [content[str(n)][workers][key] for n in rows], marker="o", label=f"{workers} worker{'s' * (workers != '1')}"
            )
        axis.set(xscale="log", xlabel="rows", ylabel=name, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
