"""What is killed in the middle goes on from the last checkpoint and ends with the bits of what was never disturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm as lgb
import polars as pl
import psutil
import pytest

from app.processes import ray_processes
from pipelines.errors import ArtifactError, UserError
from pipelines.runs import Run, RunStore
from pipelines.spec import PipelineSpec
from pipelines.storage import Folder
from pipelines.train import run, train
from tests.local.conftest import PATIENCE_S, wait_for
from tests.local.test_journey import environment
from tests.local.test_pipeline import people, people_files, slots, spec_of

EVERY = 20
ROUNDS = 300
SAMPLING = {
    "bagging_fraction": 0.5,
    "bagging_freq": 1,
    "feature_fraction": 0.6,
    "rounds": ROUNDS,
    "num_leaves": 15,
    "early_stopping": None,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people_files(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def spec_with(data: Path, store: Path, workers: int) -> PipelineSpec:
    train = {"workers": workers, "cpus_per_worker": 1.0, "checkpoint_every": EVERY}
    return spec_of(data, store, model={"params": SAMPLING}, train=train)


@pytest.fixture(scope="module")
def undisturbed(data: Path, store: Path, session: Any) -> dict[int, Run]:
    """By number of workers."""
    return {workers: train(spec_with(data, store, workers), free_slots=slots) for workers in (1, 2)}


def model_of(run: Run) -> bytes:
    return run.artifact.read_bytes("model/model.txt")


def train_while(spec: PipelineSpec, happens: Callable[[], None], step: int) -> Run:
    """Train, and let something happen once a run that is not complete has come to this step."""
    store = Path(spec.store) / spec.name
    before = set(store.iterdir()) if store.exists() else set()

    def reached() -> bool:
        new = [path / "metrics.jsonl" for path in set(store.iterdir()) - before] if store.exists() else []
        return any(step_of(file) >= step for file in new)

    errors: list[BaseException] = []

    def wait() -> None:
        try:
            wait_for(reached, f"step {step}", 240)
            happens()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    done = train(spec, free_slots=slots)
    thread.join()
    assert not errors, errors
    return done


def step_of(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def kill(title: str) -> int:
    found = [process for process in ray_processes() if any(title in word for word in process.cmdline())]
    assert found, f"no process is called {title}"
    found[0].kill()
    return found[0].pid


def steps_in(run: Run) -> list[int]:
    lines = [json.loads(line) for line in run.folder.read_bytes("metrics.jsonl").splitlines()]
    return sorted(line["step"] for line in lines if line["metric"] == "auc")


@pytest.mark.parametrize(("workers", "step"), [(1, 35), (2, 60), (2, 145)])
def test_a_killed_worker_costs_the_rounds_since_the_last_checkpoint_and_no_bit(
    data: Path, store: Path, undisturbed: dict[int, Run], workers: int, step: int
) -> None:
    killed: list[int] = []

    done = train_while(spec_with(data, store, workers), lambda: killed.append(kill("RayTrainWorker")), step)

    assert model_of(done) == model_of(undisturbed[workers])
    started = done.record["workers"]
    assert len(started) == 2 * workers and killed[0] in {worker["pid"] for worker in started[:workers]}
    [again_from] = {worker["from_step"] for worker in started[workers:]}
    assert again_from % EVERY == 0 and again_from >= step - EVERY
    assert steps_in(done) == steps_in(undisturbed[workers]) == list(range(5, ROUNDS + 1, 5))


def test_a_killed_train_controller_is_replaced(data: Path, store: Path, undisturbed: dict[int, Run]) -> None:
    done = train_while(spec_with(data, store, 2), lambda: [kill("LeanController"), None][1], 100)

    assert model_of(done) == model_of(undisturbed[2])
    [again_from] = {worker["from_step"] for worker in done.record["workers"][2:]}
    assert again_from % EVERY == 0 and again_from >= 100 - EVERY
    assert not done.folder.exists("checkpoints") and not done.folder.exists("begun.json")


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "app", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment())


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


SPEC = f"""
data: {{source: data, key: [id], split: {{test: 0.2, valid: 0.2}}}}
task: {{target: bought}}
model: {{params: {json.dumps(SAMPLING)}}}
train: {{workers: 2, cpus_per_worker: 1.0, checkpoint_every: {EVERY}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    people_files(tmp_path / "data")
    (tmp_path / "people.yaml").write_text(SPEC)
    return tmp_path


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has ended, if nobody may have waited for it yet


def interrupted(folder: Path, number: int, at: int = 60) -> Path:
    """Start a command, send it a signal once it has trained, and return the folder of its run."""
    process = start(folder, "train", "people.yaml")
    children = psutil.Process(process.pid)
    wait_for(lambda: any(step_of(file) >= at for file in folder.glob("runs/people/*/metrics.jsonl")), f"step {at}", 300)
    # The node's two agents do nothing, and notice a minute later that it is gone.
    below = [one for one in children.children(recursive=True) if "Agent" not in title_of(one)]
    process.send_signal(number)
    code, _, err = ended(process)
    [run] = (folder / "runs/people").iterdir()
    if number == signal.SIGINT:
        assert code == 130 and f"to go on: heliostat train --resume {run}" in err
    wait_for(lambda: not any(title_of(one) for one in below), "Ray's end")
    return run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_was_killed_or_interrupted_goes_on(folder: Path, undisturbed: dict[int, Run], number: int) -> None:
    run = interrupted(folder, number)
    assert not (run / "run.json").exists() and (run / "checkpoints").exists()

    code, out, err = ended(start(folder, "train", "--resume", run.name, "--json"))

    assert code == 0, err
    done = RunStore.at(str(folder / "runs")).find(run.name)
    assert model_of(done) == model_of(undisturbed[2])
    [from_step] = json.loads(out)["resumed"]
    assert from_step % EVERY == 0 and from_step >= 60 - EVERY
    assert {worker["from_step"] for worker in done.record["workers"]} == {from_step}
    assert steps_in(done) == list(range(5, ROUNDS + 1, 5))
    assert sorted(path.name for path in run.iterdir()) == ["artifact", "metrics.jsonl", "run.json", "spec.yaml"]

    code, _, err = ended(start(folder, "train", "--resume", run.name))
    assert code == 2 and err.splitlines()[-1] == f"the run {run} is complete: there is nothing to go on with"


def test_a_run_whose_source_has_changed_does_not_go_on(folder: Path) -> None:
    run = interrupted(folder, signal.SIGKILL)
    people(seed=5)[:1500].write_parquet(folder / "data/2.parquet")

    code, _, err = ended(start(folder, "train", "--resume", str(run)))

    assert code == 2
    line = err.strip().splitlines()[-1]
    assert "data.source: " in line and f"2.parquet changed since the run {run.name} began, so it cannot go on" in line


def test_a_run_that_is_trained_right_now_is_not_taken_over(data: Path, store: Path, undisturbed: dict[int, Run]) -> None:
    refused: list[str] = []

    def take_over() -> None:
        runs = RunStore.at(str(store))
        with pytest.raises(ArtifactError) as caught:
            runs.interrupted("people@latest").begun()
        refused.append(str(caught.value))

    train_while(spec_with(data, store, 1), take_over, 20)

    assert f"is not interrupted: process {os.getpid()} works on it" in refused[0]


def test_new_data_continues_a_run_with_its_features_and_trees(
    data: Path, store: Path, undisturbed: dict[int, Run], tmp_path: Path
) -> None:
    parent = undisturbed[2]
    new = tmp_path / "new"
    new.mkdir()
    people(3000, seed=3).with_columns(pl.lit("Oslo").alias("city"), pl.lit(1.5).alias("extra")).write_parquet(new / "0.parquet")
    spec = spec_of(
        new, store, model={"from": parent.id, "params": {**SAMPLING, "rounds": 45}}, train={"workers": 2, "checkpoint_every": 20}
    )

    made = train_while(spec, lambda: [kill("RayTrainWorker"), None][1], 25)
    again = train(spec, free_slots=slots)

    assert made.record["parent"] == parent.path and made.record["rows"]["train"] < 3000
    for part in ("schema.json", "preprocessor.json", "task.json"):
        assert made.artifact.read_bytes(part) == parent.artifact.read_bytes(part)
    assert not made.record["prepared"]["reused"] and again.record["prepared"]["reused"]
    before, after = (trees_of(run) for run in (parent, made))
    assert len(before) == ROUNDS and len(after) == ROUNDS + 45 and after[:ROUNDS] == before
    assert model_of(again) == model_of(made)
    first_new = lgb.Booster(model_str=model_of(made).decode()).dump_model()["tree_info"][ROUNDS]["tree_structure"]
    assert 0 < first_new["internal_count"] <= made.record["rows"]["train"]


def test_the_leaves_of_a_run_are_fitted_to_new_data(undisturbed: dict[int, Run], data: Path, store: Path, tmp_path: Path) -> None:
    parent = undisturbed[2]
    people(3000, seed=3).with_columns(pl.col("bought").not_()).write_parquet(tmp_path / "new.parquet")
    params = {"refit": True, "refit_decay_rate": 0.0}

    made = {
        workers: run(
            spec_of(tmp_path / "new.parquet", store, model={"from": parent.id, "params": params}, train={"workers": workers}),
            free_slots=slots,
        )
        for workers in (1, 2)
    }

    splits = [re.findall(r"^threshold=.*$", model_of(each).decode(), flags=re.M) for each in (parent, made[1], made[2])]
    assert splits[0] == splits[1] == splits[2] and len(splits[0]) == ROUNDS
    assert made[1].metrics["test"]["auc"] > 0.7  # the answers have turned round with the rows
    assert made[1].metrics["test"] == pytest.approx(made[2].metrics["test"], abs=1e-9)
    assert made[1].record["parent"] == parent.path


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"params": {"refit": True}}}, "model.params.refit: fits the leaves of another run's trees; name that run"),
        ({"model": {"from": "people@lates"}}, "model.from: 'people@lates' is no run; expected people@latest or people@best"),
        ({"model": {"from": "nothing"}}, "model.from: there is no run 'nothing'"),
        (
            {"model": {"from": "people@latest", "params": {"objective": "poisson"}}},
            r"model\.params\.objective: 'poisson' is not what .* has \('binary'\)",
        ),
        (
            {"model": {"from": "people@latest"}, "task": {"target": "member"}},
            "task.target: 'member' is not what .* has \\('bought'\\)",
        ),
    ],
)
def test_a_run_that_cannot_be_continued_is_refused(
    data: Path, store: Path, undisturbed: dict[int, Run], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(spec_of(data, store, **sections), free_slots=slots)


def trees_of(run: Run) -> list[str]:
    return [
        tree.split("\n\n")[0].partition("\n")[2] for tree in model_of(run).decode().split("end of trees")[0].split("Tree=")[1:]
    ]


def test_a_lost_node_costs_the_rounds_since_the_last_checkpoint_and_no_bit(
    data: Path, store: Path, undisturbed: dict[int, Run], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.local.node_loss", str(data), str(tmp_path), "60"]

    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=PATIENCE_S, check=False
    )

    assert ended.returncode == 0, ended.stderr[-3000:]
    record = json.loads(ended.stdout.splitlines()[-1])
    assert model_of(Run.open(Folder.at(record["path"]))) == model_of(undisturbed[2])
    lost, again = record["workers"][:2], record["workers"][2:]
    assert {worker["from_step"] for worker in lost} == {0} and len(again) == 2
    [again_from] = {worker["from_step"] for worker in again}
    assert again_from % EVERY == 0 and again_from >= 60 - EVERY


def test_an_elastic_fit_goes_on_with_fewer_workers_and_grows_again(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.local.node_loss", str(data), str(tmp_path), "60", "elastic"]

    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=PATIENCE_S, check=False
    )

    assert ended.returncode == 0, ended.stderr[-3000:]
    record = json.loads(ended.stdout.splitlines()[-1])
    workers = record["workers"]
    assert [worker["size"] for worker in workers] == [2, 2, 1, 2, 2]
    rows = sum(worker["rows"] for worker in workers[:2])
    assert [workers[2]["rows"], sum(worker["rows"] for worker in workers[3:])] == [rows, rows]  # whoever trains, has every row
    model = lgb.Booster(model_str=model_of(Run.open(Folder.at(record["path"]))).decode())
    assert model.current_iteration() == ROUNDS
