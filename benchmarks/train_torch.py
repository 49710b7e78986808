"""Networks: heliostat's workers beside a plain Torch loop (the limit) and Ray's example; `linear` beside scikit-learn.

    python -m benchmarks.train_torch [--rows 1000000] [--repeat 3] [--sides heliostat plain ray linear sgd]

The table of benchmarks.prepare, prepared once by heliostat: every side learns from the same features. `plain` is one process with
all cores and the features in memory, the same module, optimizer, batch size and schedule. `ray` is Ray Train's documented loop
(iter_torch_batches, prepare_model) on 2 workers. `sgd` is scikit-learn's SGDClassifier on one-hot features that it has in memory.
rows/s are those of the steps, without start, evaluation and export. Writes benchmarks/results/train_torch.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, alternate, median, save
from benchmarks.table import TARGET, generate

MLP = {"batch_size": 4096, "epochs": 2, "early_stopping": None}
LINEAR = {"batch_size": 4096, "epochs": 3, "early_stopping": None}
EPOCHS = MLP["epochs"]


def main() -> None:
    """Prepare once, measure all sides in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sides", nargs="*", choices=sorted(SIDES), default=sorted(SIDES))
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        json.dump(SIDES[options.side](Path(options.folder)), sys.stdout)
        return
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as path:
        folder = Path(path)
        generate(folder / "train", options.rows)
        prepared(folder, options.sides)
        report(alternate("benchmarks.train_torch", options.sides, options.repeat, folder=folder))


def prepared(folder: Path, sides: list[str]) -> None:
    """Let heliostat prepare the features that all sides take."""
    from app.session import open_session
    from pipelines.prepare import prepare

    with open_session():
        for family in ("mlp", "linear"):
            if {"mlp": {"heliostat", "plain", "ray"}, "linear": {"linear", "sgd"}}[family] & set(sides):
                made = prepare(spec_of(folder, family))
                (folder / f"{family}.txt").write_text(made.path)


def spec_of(folder: Path, family: str) -> Any:
    """The Spec of one family: no valid rows, so that steps are all there is; a tenth is test."""
    from app.spec import Spec
    from pipelines.explain import checked

    return checked(
        Spec,
        {
            "name": "table",
            "data": {"source": str(folder / "train"), "split": {"valid": 0.0, "test": 0.1}},
            "task": {"target": TARGET},
            "model": {"type": family, "params": MLP if family == "mlp" else LINEAR},
            "train": {"workers": 2, "cpus_per_worker": 0.5},
            "store": str(folder / "store"),
        },
    )


def heliostat(folder: Path, family: str = "mlp") -> dict[str, Any]:
    """`heliostat train` with two workers of one thread."""
    from app.session import open_session
    from pipelines.evaluate import evaluate
    from pipelines.train import train

    with open_session() as session:
        spec = spec_of(folder, family)
        run = train(spec, free_slots=lambda: session.slots().free)
        rows = run.record["rows"]["train"] * spec.model.params["epochs"]
        speed = run.record["speed"]
        auc = evaluate(run, spec).metrics["test"]["auc"]
        return {**speed, "auc": auc, "seconds": rows / speed["rows_per_s"], "whole_s": run.record["seconds"]["train"]}


def plain(folder: Path) -> dict[str, Any]:
    """One process, all threads, everything in memory."""
    import torch

    from pipelines.models.network_layout import Layout
    from pipelines.models.network_modules import build
    from pipelines.models.network_params import MLPParams

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(7)
    shards, task = features_of(folder, "mlp")
    sample = shards.sample_batch()
    params = MLPParams(**MLP)  # type: ignore[arg-type]
    network = build(Layout.of(params, task, shards.features, sample.matrix, sample.target)).train()
    matrix, target = (torch.from_numpy(part.astype(np.float32)) for part in in_memory(shards))
    optimizer = torch.optim.AdamW(network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True)
    steps = params.steps(len(target))
    started = time.monotonic()
    for step in range(EPOCHS * steps):
        if step % steps == 0:
            order = torch.randperm(len(target))
        rows = order[step % steps * params.batch_size :][: params.batch_size]
        optimizer.param_groups[0]["lr"] = params.learning_rate_at(step, EPOCHS * steps)
        optimizer.zero_grad()
        network.losses(network(matrix[rows]), target[rows]).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    seconds = time.monotonic() - started
    return {"rows_per_s": EPOCHS * len(target) / seconds, "seconds": seconds}


def ray_example(folder: Path) -> dict[str, Any]:
    """Ray Train's documented loop: Ray Data into iter_torch_batches, DistributedDataParallel by prepare_model."""
    from app.session import open_session

    with open_session():
        import ray.data
        import ray.train
        import ray.train.torch

        shards, task = features_of(folder, "mlp")
        sample = shards.sample_batch()
        names = [f"f{i}" for i in range(len(shards.features))]

        def train_func() -> None:
            import torch

            from pipelines.models.network_layout import Layout
            from pipelines.models.network_modules import build
            from pipelines.models.network_params import MLPParams

            torch.set_num_threads(1)
            params = MLPParams(**MLP)  # type: ignore[arg-type]
            network = build(Layout.of(params, task, shards.features, sample.matrix, sample.target))
            parallel = ray.train.torch.prepare_model(network)
            optimizer = torch.optim.AdamW(parallel.parameters(), lr=params.learning_rate, fused=True)
            rows, started = 0, time.monotonic()
            for _ in range(EPOCHS):
                data = ray.train.get_dataset_shard("train")
                for batch in data.iter_torch_batches(batch_size=params.batch_size // 2, dtypes=torch.float32):
                    matrix = torch.stack([batch[name] for name in names], 1)
                    optimizer.zero_grad()
                    network.losses(parallel(matrix), batch["__target__"]).mean().backward()
                    optimizer.step()
                    rows += len(matrix)
            ray.train.report({"rows": rows, "seconds": time.monotonic() - started})

        files = [f"{shards.folder.path}/{shard.file}" for shard in shards.splits["train"]]
        trainer = ray.train.torch.TorchTrainer(
            train_func,
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(storage_path=tempfile.mkdtemp(dir=folder)),
            datasets={"train": ray.data.read_parquet(files)},
        )
        found = trainer.fit().metrics
        return {"rows_per_s": 2 * found["rows"] / found["seconds"], "seconds": found["seconds"]}


def sgd(folder: Path) -> dict[str, Any]:
    """scikit-learn's SGDClassifier on the same features, codes one-hot; only its fit is timed."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import SGDClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import OneHotEncoder

    shards, _ = features_of(folder, "linear")
    coded = [i for i, feature in enumerate(shards.features) if feature.cardinality is not None]
    numbers = [i for i in range(len(shards.features)) if i not in coded]
    matrix, target = in_memory(shards)
    encoder = OneHotEncoder(handle_unknown="ignore").fit(np.nan_to_num(matrix[:, coded], nan=-1))

    def sparse(rows: Any) -> Any:
        dense = csr_matrix(np.hstack([np.nan_to_num(rows[:, numbers]), np.isnan(rows[:, numbers])]))
        return hstack([dense, encoder.transform(np.nan_to_num(rows[:, coded], nan=-1))], format="csr")

    inputs = sparse(matrix)
    started = time.monotonic()
    model = SGDClassifier(loss="log_loss", max_iter=LINEAR["epochs"], tol=None, random_state=7).fit(inputs, target)
    seconds = time.monotonic() - started
    test, wanted = in_memory(shards, "test")
    auc = float(roc_auc_score(wanted, model.decision_function(sparse(test))))
    return {"rows_per_s": LINEAR["epochs"] * len(target) / seconds, "seconds": seconds, "auc": auc}


def linear(folder: Path) -> dict[str, Any]:
    """`heliostat train` of type linear."""
    return heliostat(folder, "linear")


SIDES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "heliostat": heliostat,
    "plain": plain,
    "ray": ray_example,
    "linear": linear,
    "sgd": sgd,
}


def features_of(folder: Path, family: str) -> tuple[Any, Any]:
    """The prepared shards and their task."""
    from pipelines.prepare import Prepared
    from pipelines.storage import Folder

    made = Prepared.open(Folder.at((folder / f"{family}.txt").read_text()), reused=True, seconds=0.0)
    return made.shards, made.task


def in_memory(shards: Any, split: str = "train") -> tuple[Any, Any]:
    """All rows of a split."""
    batches = [batch for found in shards.ranges(split, 0, 1) for batch in shards.read(found)]
    return np.concatenate([batch.matrix for batch in batches]), np.concatenate([batch.target for batch in batches])


def report(found: dict[str, list[Measured]]) -> None:
    """Print the table of medians and save it."""
    table = Table("", "rows/s", "steps, s", "waiting for data", "whole command, s", "peak PSS, MB", "test AUC")
    content: dict[str, Any] = {}
    for name, measured in found.items():

        def middle(key: str, of: list[Measured] = measured) -> float | None:
            values = [one.result[key] for one in of if one.result.get(key) is not None]
            return median(values) if values else None

        row = {key: middle(key) for key in ("rows_per_s", "seconds", "waited", "auc")}
        row |= {"with_start": median([one.seconds for one in measured]), "peak_mb": median([one.peak_mb for one in measured])}
        content[name] = {**row, "repeat": len(measured)}
        table.add_row(
            name,
            f"{row['rows_per_s']:,.0f}",
            f"{row['seconds']:.1f}",
            f"{row['waited']:.1%}" if row["waited"] is not None else "",
            f"{row['with_start']:.1f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['auc']:.4f}" if row["auc"] is not None else "",
        )
    Console().print(table)
    Console().print(f"written to {save('train_torch', content)}")


if __name__ == "__main__":
    main()
