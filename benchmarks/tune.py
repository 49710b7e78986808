"""heliostat tune beside a bare Optuna loop (the limit) and Ray's documented Tune + LightGBM example, on equal cores and budget.

    python -m benchmarks.tune [--data flights table] [--rows 200000] [--seconds 120] [--repeat 2]
    python -m benchmarks.tune --tiny          200 trials of next to no work: what a trial costs besides
    python -m benchmarks.tune --quality 600   a search of flights, its example Spec, and the defaults with five seeds, by test AUC

All sides draw from the same space with the same number of rounds and stop no trial early, so that trials are of one length. The
bare loop has a process per core, each with one thread and a Dataset that is binned once; they share a study by a journal. Ray's
example builds its Dataset in each trial, as documented. Trials per hour count from the first start to the last end; "busy" is the
CPU time of the trials' processes over that time and all cores.
Prints one table and writes benchmarks/results/tune.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, alternate, measure, median, save, wait_for_slots
from benchmarks.table import TARGET, generate

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0))
ROUNDS = 100
SPACE: dict[str, Any] = {
    "model.params.num_leaves": {"int": [15, 255], "log": True},
    "model.params.learning_rate": {"float": [0.02, 0.3], "log": True},
    "model.params.min_data_in_leaf": {"int": [5, 200], "log": True},
    "model.params.feature_fraction": {"float": [0.4, 1.0]},
    "model.params.lambda_l2": {"float": [0.01, 30.0], "log": True},
}
BROAD: dict[str, Any] = {
    **SPACE,
    "model.params.learning_rate": {"float": [0.02, 0.2], "log": True},
    "model.params.num_leaves": {"int": [31, 511], "log": True},
    "model.params.cat_smooth": {"float": [1.0, 100.0], "log": True},
    "model.params.max_cat_threshold": {"int": [16, 256], "log": True},
    "model.params.max_category": {"choice": [256, 8192]},
}
"""Of the quality side: also how categories are split."""


def main() -> None:
    """Measure all sides in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=["flights", "table"], default=["flights", "table"])
    parser.add_argument("--rows", type=int, default=200_000, help="of the generated table")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each search")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--quality", type=float, metavar="SECONDS")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        kept = os.dup(1)
        os.dup2(2, 1)  # what libraries print is no result
        found = SIDES[options.side](options.folder)
        with os.fdopen(kept, "w") as out:
            json.dump(found, out)
        return
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as place:
        folder = Path(place)
        if options.tiny or options.quality:
            side = "tiny" if options.tiny else "quality"
            _lay_out(folder, "flights", options.rows, options.quality or 0.0)
            result = measure([sys.executable, "-m", "benchmarks.tune", "--side", side, "--folder", str(folder)]).result
            Console().print_json(json.dumps(result))
            print(save(f"tune_{side}", result))
            return
        found = {}
        for name in options.data:
            (folder / name).mkdir()
            _lay_out(folder / name, name, options.rows, options.seconds)
            measure([sys.executable, "-m", "benchmarks.tune", "--side", "prepare", "--folder", str(folder / name)])
            found[name] = alternate("benchmarks.tune", ("bare", "heliostat", "ray"), options.repeat, folder=folder / name)
    report(found)


def _lay_out(folder: Path, data: str, rows: int, seconds: float) -> None:
    """Write what the sides read: the Spec's sections, and the budget."""
    if data == "table":
        generate(folder / "rows", rows)
        content: dict[str, Any] = {"data": {"source": str(folder / "rows")}, "task": {"target": TARGET}, "features": {}}
    else:
        import yaml

        content = yaml.safe_load((ROOT / "examples/flights/flights.yaml").read_text())
        content["data"]["source"] = str(ROOT / "examples/flights/data")
    settings = {
        "name": data,
        "data": content["data"],
        "task": content["task"],
        "features": content["features"],
        "seconds": seconds,
    }
    (folder / "settings.json").write_text(json.dumps(settings))


def spec_of(folder: Path, /, params: dict[str, Any], tune: dict[str, Any] | None = None, **sections: Any) -> Any:
    """A Spec on this side's data."""
    from app.spec import Spec
    from pipelines.explain import checked

    settings = json.loads((folder / "settings.json").read_text())
    content = {name: settings[name] for name in ("name", "data", "task", "features")}
    return checked(
        Spec,
        {**content, "model": {"params": params}, "store": str(folder / "runs"), **({"tune": tune} if tune else {}), **sections},
    )


def prepare(folder: Path) -> dict[str, Any]:
    """What all sides train on, as matrices for those that are not heliostat."""
    from app.session import open_session
    from pipelines.prepare import prepare

    with open_session(slots=CORES):
        prepared = prepare(spec_of(folder, {}))
    for split in ("train", "valid"):
        batches = [batch for found in prepared.shards.ranges(split, 0, 1) for batch in prepared.shards.read(found)]
        np.save(folder / f"{split}.npy", np.concatenate([batch.matrix for batch in batches]))
        np.save(folder / f"{split}_y.npy", np.concatenate([batch.target for batch in batches]))
    categorical = [
        i
        for i, feature in enumerate(prepared.shards.features)
        if feature.kind == "categorical" and (feature.cardinality or 0) <= 256
    ]
    (folder / "categorical.json").write_text(json.dumps(categorical))
    return {"rows": prepared.rows}


def heliostat(folder: Path) -> dict[str, Any]:
    """`heliostat tune` on a Ray that runs already."""
    from app.session import open_session
    from tune.search import search

    seconds = json.loads((folder / "settings.json").read_text())["seconds"]
    tune = {"trials": 100_000, "time_budget_s": seconds, "scheduler": "none", "space": SPACE}
    with open_session(slots=CORES) as session:
        wait_for_slots(session)
        spec = spec_of(folder, {"rounds": ROUNDS, "early_stopping": None, "eval_every": ROUNDS}, tune)
        run = search(spec, free_slots=lambda: session.slots().free)
        history = run.folder.read_json("learned.json")["history"]
        return _summary(
            [(entry["started"], entry["ended"]) for entry in history if entry["status"] == "complete"],
            run.record["tune"]["cpu_s"],
            run.record["tune"]["values"]["auc"],
        )


def bare(folder: Path) -> dict[str, Any]:
    """The limit: Optuna and LightGBM alone, a process per core."""
    journal = tempfile.mktemp(dir=folder)
    context = multiprocessing.get_context("spawn")
    with context.Pool(CORES) as pool:
        cpu = sum(pool.starmap(_bare, [(folder, journal, i) for i in range(CORES)]))
    study = _study(journal)
    done = [trial for trial in study.trials if trial.datetime_start and trial.datetime_complete]
    times = [
        (t.datetime_start.timestamp(), t.datetime_complete.timestamp()) for t in done if t.datetime_start and t.datetime_complete
    ]
    return _summary(times, cpu, study.best_value)


def _bare(folder: Path, journal: str, number: int) -> float:
    import lightgbm as lgb
    from sklearn.metrics import roc_auc_score

    train, target, valid, valid_target, categorical = _matrices(folder)
    data = lgb.Dataset(
        train, target, categorical_feature=categorical, params={"feature_pre_filter": False, "num_threads": 1}
    ).construct()
    del train
    study = _study(journal, seed=number)
    seconds = json.loads((folder / "settings.json").read_text())["seconds"]
    cpu, started = time.process_time(), time.monotonic()

    def objective(trial: Any) -> float:
        settings = {name.rpartition(".")[2]: _suggested(trial, name, axis) for name, axis in SPACE.items()}
        booster = lgb.train({**FIXED, **settings, "num_threads": 1}, data, ROUNDS, keep_training_booster=True)
        return float(roc_auc_score(valid_target, booster.predict(valid, num_threads=1)))

    while time.monotonic() - started < seconds:
        study.optimize(objective, n_trials=1)
    return time.process_time() - cpu


def ray(folder: Path) -> dict[str, Any]:
    """Ray's documented example: `tune.Tuner` on a function that builds its Dataset and trains with a callback."""
    from app.session import open_session

    with open_session(slots=CORES) as session:
        wait_for_slots(session)
        import ray.tune
        from ray.tune.search.optuna import OptunaSearch

        words = {
            name.rpartition(".")[2]: ray.tune.randint(*axis["int"]) if "int" in axis else ray.tune.loguniform(*axis["float"])
            for name, axis in SPACE.items()
        }
        seconds = json.loads((folder / "settings.json").read_text())["seconds"]
        with tempfile.TemporaryDirectory() as storage:
            tuner = ray.tune.Tuner(
                ray.tune.with_resources(_trainable, {"cpu": 1}),
                param_space={**words, "folder": str(folder)},
                tune_config=ray.tune.TuneConfig(
                    metric="valid_0-auc", mode="max", search_alg=OptunaSearch(), num_samples=-1, time_budget_s=seconds
                ),
                run_config=ray.tune.RunConfig(storage_path=storage, verbose=0),
            )
            results = [result.metrics for result in tuner.fit() if result.metrics and result.metrics.get("done")]
        ended = [(found["timestamp"] - found["time_total_s"], found["timestamp"]) for found in results]
        return _summary(ended, float("nan"), max(found["valid_0-auc"] for found in results))


def _trainable(config: dict[str, Any]) -> None:
    import lightgbm as lgb
    from ray.tune.integration.lightgbm import TuneReportCheckpointCallback

    train, target, valid, valid_target, categorical = _matrices(Path(config.pop("folder")))
    data = lgb.Dataset(train, target, categorical_feature=categorical)
    lgb.train(
        {**FIXED, **config, "num_threads": 1, "metric": "auc"},
        data,
        ROUNDS,
        valid_sets=[lgb.Dataset(valid, valid_target, reference=data)],
        callbacks=[TuneReportCheckpointCallback({"valid_0-auc": "valid_0-auc"}, frequency=ROUNDS)],
    )


def tiny(folder: Path) -> dict[str, Any]:
    """200 trials of five rounds on 2,000 rows: what Ray Tune, Optuna and the records cost."""
    from app.session import open_session
    from tune.search import search

    generate(folder / "small", 2000)
    sections = {"data": {"source": str(folder / "small")}, "task": {"target": TARGET}, "features": {}}
    tune = {"trials": 200, "scheduler": "none", "space": SPACE}
    with open_session(slots=CORES) as session:
        wait_for_slots(session)
        spec = spec_of(folder, {"rounds": 5, "early_stopping": None}, tune, **sections)
        run = search(spec, free_slots=lambda: session.slots().free)
        history = run.folder.read_json("learned.json")["history"]
    span = max(entry["ended"] for entry in history) - min(entry["started"] for entry in history)
    own = sum(entry["seconds"] for entry in history)
    at_once = run.record["tune"]["layout"]["at_once"]
    return {
        "trials": len(history),
        "at_once": at_once,
        "span_s": span,
        "own_s": own,
        "beyond_s": (span - own / at_once) / len(history),
    }


def quality(folder: Path) -> dict[str, Any]:
    """Test AUC: of the winner of a search, of the example Spec, and of the defaults with five seeds."""
    import yaml

    from app.session import open_session
    from pipelines.train import run
    from tune.search import search

    seconds = json.loads((folder / "settings.json").read_text())["seconds"]
    example = yaml.safe_load((ROOT / "examples/flights/flights.yaml").read_text())["model"]["params"]
    tune = {"trials": 100_000, "time_budget_s": seconds, "space": BROAD}
    with open_session(slots=CORES) as session:

        def free() -> float:
            return session.slots().free

        found = search(spec_of(folder, {"rounds": 600, "early_stopping": 40, "metric": "auc"}, tune), free_slots=free)
        aucs = {"example": run(spec_of(folder, example), free_slots=free).metrics["test"]["auc"]}
        defaults = [run(spec_of(folder, {"seed": seed}), free_slots=free).metrics["test"]["auc"] for seed in range(5)]
    auc = found.metrics["test"]["auc"]
    assert auc is not None and aucs["example"] is not None
    known = [value for value in defaults if value is not None]
    return {
        "tuned": auc,
        **aucs,
        "defaults": known,
        "spread": max(known) - min(known),
        "beats example by": auc - aucs["example"],
        "beats the mean default by": auc - statistics.fmean(known),
        "trials": found.record["tune"]["trials"],
        "point": found.record["tune"]["point"],
        "busy": found.record["tune"]["cpu_s"] / (found.record["tune"]["seconds"] * CORES),
    }


SIDES = {
    "prepare": prepare, "heliostat": heliostat, "bare": bare, "ray": ray, "tiny": tiny, "quality": quality,
}  # fmt: skip
FIXED = {"objective": "binary", "verbosity": -1, "min_sum_hessian_in_leaf": 1.0, "deterministic": True, "force_row_wise": True}


def _matrices(folder: Path) -> tuple[Any, Any, Any, Any, list[int]]:
    names = ("train", "train_y", "valid", "valid_y")
    train, target, valid, valid_target = (np.load(folder / f"{name}.npy") for name in names)
    return train, target, valid, valid_target, json.loads((folder / "categorical.json").read_text())


def _study(journal: str, seed: int = 0) -> Any:
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.create_study(
            study_name="bare",
            storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal)),
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
            load_if_exists=True,
        )


def _suggested(trial: Any, name: str, axis: dict[str, Any]) -> Any:
    if "int" in axis:
        return trial.suggest_int(name, *axis["int"], log=axis.get("log", False))
    return trial.suggest_float(name, *axis["float"], log=axis.get("log", False))


def _summary(times: list[tuple[float, float]], cpu_s: float, best: float) -> dict[str, Any]:
    span = max(end for _, end in times) - min(start for start, _ in times)
    return {"trials": len(times), "per_hour": 3600 * len(times) / span, "busy": cpu_s / (span * CORES), "best": best}


def report(found: dict[str, dict[str, list[Measured]]]) -> None:
    """Print the medians, and each side's trials per hour beside the bare loop's."""
    table = Table("data", "side", "trials/h", "of bare", "busy", "best valid auc", "peak MB")
    results: dict[str, Any] = {}
    for data, sides in found.items():
        limit = median([one.result["per_hour"] for one in sides["bare"]])
        for side, runs in sides.items():
            rate = median([one.result["per_hour"] for one in runs])
            busy, best = (median([one.result[name] for one in runs]) for name in ("busy", "best"))
            peak = median([one.peak_mb for one in runs])
            table.add_row(data, side, f"{rate:.0f}", f"{rate / limit:.2f}", f"{busy:.0%}", f"{best:.4f}", f"{peak:.0f}")
            results.setdefault(data, {})[side] = [{**one.result, "seconds": one.seconds, "peak_mb": one.peak_mb} for one in runs]
    Console().print(table)
    with contextlib.suppress(OSError):
        print(save("tune", {"results": results}))


if __name__ == "__main__":
    main()
