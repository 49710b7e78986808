"""Peak memory of preparing and training on a table that is eight times as large as the object store.

    python -m benchmarks.memory [--rows 21000000] [--object-store-mb MB]

The table is generated: 30 random numbers and 20 texts of 30 characters a row, about a kilobyte in Arrow's memory. Prints the peak
of the whole process tree (PSS: shared pages counted once) beside the table's size and writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.measure import measure, save

ROWS_PER_FILE = 250_000
NUMBERS, TEXTS, WORDS = 30, 20, 200


def main() -> None:
    """Generate, train in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=21_000_000)
    parser.add_argument("--object-store-mb", type=int, default=default_store_mb(), help="default: as a session has it")
    parser.add_argument("--train", nargs=2, metavar=("SOURCE", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        json.dump(train(*options.train, options.object_store_mb), sys.stdout)
        return
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder:
        table_mb = generate(Path(folder) / "data", options.rows)
        command = [sys.executable, "-m", "benchmarks.memory", "--train", f"{folder}/data", f"{folder}/store"]
        found = measure([*command, "--object-store-mb", str(options.object_store_mb)])
    rows = {
        "rows": options.rows,
        "table in memory, MB": round(table_mb),
        "object store, MB": options.object_store_mb,
        "table / object store": round(table_mb / options.object_store_mb, 2),
        "peak memory of the process tree (PSS), MB": round(found.peak_mb),
        "peak / table": round(found.peak_mb / table_mb, 3),
        "prepare, s": round(found.result["seconds"]["prepare"], 1),
        "train, s": round(found.result["seconds"]["train"], 1),
    }
    table = Table("", "", title="Preparing and training beyond the object store", show_header=False)
    for name, value in rows.items():
        table.add_row(name, f"{value:,}")
    for name, mb in list(found.at_peak.items())[:8]:
        table.add_row(f"  {name}", f"{mb:,}")
    Console().print(table)
    Console().print(f"written to {save('memory', {**rows, 'at peak': found.at_peak})}")


def default_store_mb() -> int:
    """The cap of a private session's object store."""
    return max(1024, psutil.virtual_memory().total // 10 >> 20)


def train(source: str, store: str, object_store_mb: int) -> dict[str, Any]:
    """Prepare and train ten rounds on two workers."""
    from app.session import open_session
    from app.slots import free_slots
    from app.spec import Spec
    from pipelines.explain import checked
    from pipelines.train import train as train_spec

    spec = checked(
        Spec,
        {
            "name": "wide",
            "data": {"source": source, "split": {"test": 0.05, "valid": 0.05}},
            "task": {"target": "y"},
            "model": {"params": {"rounds": 10, "early_stopping": None}},
            "train": {"workers": 2},
            "store": store,
        },
    )
    with open_session(object_store_mb=object_store_mb):
        return train_spec(spec, free_slots=lambda: free_slots().free).record


def generate(folder: Path, rows: int) -> float:
    """Write the table and return its size in Arrow's memory, in MB."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    words = pl.Series(["".join(rng.choice(list("abcdefghij"), 30)) for _ in range(WORDS)])
    size = 0.0
    for i, first in enumerate(range(0, rows, ROWS_PER_FILE)):
        count = min(ROWS_PER_FILE, rows - first)
        numbers = {f"n{j}": rng.normal(size=count) for j in range(NUMBERS)}
        texts = {f"s{j}": words.gather(rng.integers(0, WORDS, count)) for j in range(TEXTS)}
        y = numbers["n0"] + 0.5 * numbers["n1"] + rng.normal(size=count) > 0
        part = pl.DataFrame({**numbers, **texts, "y": y})
        size += part.to_arrow().nbytes / 2**20
        part.write_parquet(folder / f"{i:05d}.parquet")
    return size


if __name__ == "__main__":
    main()
