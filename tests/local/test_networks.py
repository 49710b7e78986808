"""Networks on the cluster: any number of workers learns the same, what is killed goes on with equal bits, all ways answer alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipelines.artifact import Artifact
from pipelines.errors import DataError, SpecError
from pipelines.predict import predict
from pipelines.runs import Run
from pipelines.spec import PipelineSpec
from pipelines.train import run, train
from tests.local.test_pipeline import people, slots, spec_of
from tests.local.test_resume import kill, train_while

pytestmark = pytest.mark.usefixtures("session")

EPOCHS = 30
STEPS = 15
"""Of an epoch: some 3600 train rows in batches of 256."""
TABM = {"d_block": 32, "k": 8, "batch_size": 256, "epochs": EPOCHS, "early_stopping": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of unequal lengths, so that the shares of the ranks begin in the middle of a shard."""
    folder = tmp_path_factory.mktemp("people")
    table = people()
    for i, (first, last) in enumerate([(0, 700), (700, 3100), (3100, 3200), (3200, 6000)]):
        table[first:last].write_parquet(folder / f"{i}.parquet")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def spec_with(data: Path, store: Path, workers: int = 2, **model: Any) -> PipelineSpec:
    train = {"workers": workers, "cpus_per_worker": 1.0, "checkpoint_every": 20}
    spec = spec_of(data, store, train=train)
    return spec.model_copy(update={"model": type(spec.model).model_validate({"type": "tabm", "params": TABM, **model})})


@pytest.fixture(scope="module")
def made(data: Path, store: Path, session: Any) -> Run:
    return run(spec_with(data, store), free_slots=slots)


def curve(run: Run) -> list[Any]:
    lines = [json.loads(line) for line in run.folder.read_bytes("metrics.jsonl").splitlines()]
    return [[line["step"], line["split"], line["metric"], line["value"]] for line in lines]


def test_a_run_leaves_weights_a_program_and_nothing_pickled(made: Run) -> None:
    names = sorted(path.name for path in Path(made.path).joinpath("artifact/model").iterdir())
    assert names == ["config.json", "model.onnx", "weights.safetensors"]
    assert [path for path in Path(made.path).rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".pth")] == []
    assert sum(worker["rows"] for worker in made.record["workers"]) == made.record["rows"]["train"]
    assert made.metrics["test"]["auc"] is not None and made.metrics["test"]["auc"] > 0.8


def test_one_worker_learns_what_two_learn(data: Path, store: Path, session: Any) -> None:
    params = {"batch_size": 256, "epochs": 10, "early_stopping": None}
    two, one = (train(spec_with(data, store, workers, type="linear", params=params), free_slots=slots) for workers in (2, 1))

    assert [len(found.record["workers"]) for found in (two, one)] == [2, 1]
    aucs = [[value for _, split, metric, value in curve(found) if (split, metric) == ("valid", "auc")] for found in (two, one)]
    assert aucs[0][-1] > 0.8 and aucs[0][-1] == pytest.approx(aucs[1][-1], abs=0.003)
    assert len(aucs[0]) == len(aucs[1]) == 10  # equally many steps


def test_a_killed_worker_costs_no_bit_and_no_point_of_the_curve(made: Run, data: Path, store: Path) -> None:
    done = train_while(spec_with(data, store), lambda: [kill("RayTrainWorker"), None][1], 8 * STEPS)

    assert done.artifact.read_bytes("model/weights.safetensors") == made.artifact.read_bytes("model/weights.safetensors")
    assert done.artifact.read_bytes("model/config.json") == made.artifact.read_bytes("model/config.json")
    assert curve(done) == curve(made) and curve(made)[-1][0] == EPOCHS * STEPS
    [again_from] = {worker["from_step"] for worker in done.record["workers"][2:]}
    assert again_from % 20 == 0 and again_from > 0
    assert len(done.record["failures"]) == 1 and "was killed from outside" in done.record["failures"][0]


def test_batches_rows_and_files_get_the_same_answers(made: Run, data: Path, tmp_path: Path) -> None:
    artifact = Artifact.load(made.path)
    frame = pl.read_parquet(data)
    rows = [{**row, "seen": row["seen"].isoformat()} for row in frame[:300].to_dicts()]

    written = predict(str(made.artifact), str(data), str(tmp_path / "out"))
    batch = np.concatenate(
        [pl.read_parquet(path)["probability"].to_numpy() for path in sorted((tmp_path / "out").glob("*.parquet"))]
    )
    one_by_one = np.array([artifact.predict_rows([row])[0]["probability"] for row in rows])
    together = np.array([answer["probability"] for answer in artifact.predict_rows(rows)])

    assert written.rows == len(batch) == 6000
    assert np.abs(one_by_one - batch[:300]).max() < 1e-6 and np.abs(together - batch[:300]).max() < 1e-6
    assert np.abs(artifact.predict(frame)["probability"].to_numpy() - batch).max() < 1e-6


def test_new_data_continues_a_network_whose_shape_it_keeps(made: Run, data: Path, store: Path, tmp_path: Path) -> None:
    people(3000, seed=3).write_parquet(tmp_path / "0.parquet")
    steps = {"epochs": 2, "batch_size": 256, "learning_rate": 1e-4}

    again = train(spec_with(tmp_path, store, **{"from": made.id, "params": steps}), free_slots=slots)

    assert again.record["parent"] == made.path
    first = next(value for step, split, metric, value in curve(again) if split == "valid" and metric == "auc")
    assert first > 0.8  # after one epoch with a small learning rate: of the parent's weights
    config = json.loads(again.artifact.read_bytes("model/config.json"))
    assert (config["k"], config["d_block"]) == (8, 32)
    with pytest.raises(SpecError, match=r"model.params.k: '16' is not what .* has \('8'\)"):
        train(spec_with(tmp_path, store, **{"from": made.id, "params": {**steps, "k": 16}}), free_slots=slots)


def test_a_loss_that_goes_wrong_ends_the_run_at_once_and_keeps_the_last_checkpoint(data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    table = people().with_columns(pl.when(pl.col("id") == 5).then(1e30).otherwise(pl.col("visits")).alias("visits"))
    table.write_parquet(tmp_path / "data/0.parquet")
    wild = {"learning_rate": 1000.0, "optimizer": "sgd", "batch_size": 64, "gradient_clip": None, "warmup": 0.0}
    spec = spec_with(tmp_path / "data", tmp_path, type="linear", params=wild)
    raw = spec.model_copy(
        update={
            "features": type(spec.features).model_validate({"numeric": []}),
            "task": type(spec.task).model_validate({"target": "age"}),
            "data": spec.data.model_copy(update={"where": "age IS NOT NULL"}),
        }
    )

    with pytest.raises(DataError, match=r"train: the .* in step \d+ \(epoch 1\), with a learning rate of .*visits \(1e\+30\)"):
        train(raw, free_slots=slots)
