"""Searches on a small table made here, on one shared Ray: what they find, count, survive and leave."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightgbm as lgb
import optuna
import psutil
import pytest

from app.processes import ray_processes
from app.spec import Spec, parse_spec
from pipelines.artifact import Artifact
from pipelines.errors import DataError
from pipelines.explain import checked
from pipelines.runs import Run, RunStore
from pipelines.storage import Folder
from pipelines.train import train
from tests.local.conftest import PATIENCE_S, wait_for
from tests.local.test_commands import start
from tests.local.test_pipeline import people_files, slots
from tune.search import search

pytestmark = pytest.mark.timeout(600)  # several searches and fits each, on a machine that may be busy

LEAVES, RATE, BINS = "model.params.num_leaves", "model.params.learning_rate", "model.params.max_bin"
SPACE = {LEAVES: {"int": [4, 40], "log": True}, RATE: {"float": [0.03, 0.4], "log": True}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people_files(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def spec_of(data: Path, store: Path, /, tune: dict[str, Any], **sections: Any) -> Spec:
    content: dict[str, Any] = {
        "name": "people",
        "data": {"source": str(data), "key": ["id"], "split": {"test": 0.2, "valid": 0.2}},
        "task": {"target": "bought"},
        "model": {"params": {"rounds": 30, "num_leaves": 15}},
        "train": {"workers": 1},
        "tune": {"trials": 8, "space": SPACE, **tune},
        "store": str(store),
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    return checked(Spec, content)


def children(done: Run) -> list[dict[str, Any]]:
    folder = done.folder / "trials"
    return [Run.open(folder / name).record for name in folder.names()]


def study_of(done: Run) -> optuna.Study:
    """As Optuna's dashboard opens it."""
    backend = optuna.storages.journal.JournalFileBackend(f"{done.path}/study.journal")
    return optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))


@pytest.fixture(scope="module")
def done(data: Path, store: Path, session: Any) -> Run:
    return search(spec_of(data, store, {"scheduler": "none"}), free_slots=slots)


def test_a_search_leaves_what_was_promised(done: Run) -> None:
    names = sorted(entry.name for entry in Path(done.path).iterdir())
    assert names == [
        *["artifact", "learned.json", "metrics.jsonl", "run.json", "search.yaml", "spec.yaml", "study.journal", "trials"],
        "winner.yaml",
    ]
    found = children(done)
    assert [child["status"] for child in found] == ["complete"] * 8
    for folder in (Path(done.path) / "trials").iterdir():
        assert sorted(entry.name for entry in folder.iterdir()) == ["metrics.jsonl", "run.json", "spec.yaml"]
    tune = done.record["tune"]
    assert tune["trials"] == {"complete": 8, "stopped": 0, "failed": 0} and (tune["prepared"], tune["binned"]) == (1, 1)
    assert len({trial.params[RATE] for trial in study_of(done).trials}) == 8
    forbidden = [path for path in Path(done.path).rglob("*") if path.suffix in (".pkl", ".pickle", ".bin")]
    assert forbidden == []


def test_the_winner_is_the_best_trial_trained_again_and_evaluated_once(done: Run) -> None:
    aucs = [child["metrics"]["valid"]["auc"] for child in children(done)]
    tune = done.record["tune"]

    assert tune["values"]["auc"] == max(aucs) == aucs[tune["winner"]]
    assert done.metrics["valid"]["auc"] == pytest.approx(max(aucs), abs=1e-9) and done.metrics["test"]["auc"] > 0.85
    assert all("test" not in child["metrics"] for child in children(done))
    spec, _ = parse_spec([("winner.yaml", (Path(done.path) / "winner.yaml").read_text())])
    assert spec.tune is None and spec.model.params["num_leaves"] == tune["point"][LEAVES]
    assert Artifact.load(done.artifact).version == done.id


def test_the_first_trial_is_the_spec_itself_so_that_no_search_ends_worse(done: Run) -> None:
    assert children(done)[0]["point"] == {LEAVES: 15, RATE: 0.1}


def test_a_winner_competes_for_best_as_any_run_does(done: Run, store: Path) -> None:
    assert RunStore.at(str(store)).find("people@best").id == done.id
    assert [run.id for run in RunStore.at(str(store)).list()] == [done.id]  # the trials are its own


def test_a_trial_is_the_fit_that_a_run_of_its_spec_would_be(done: Run, session: Any) -> None:
    """Same rows, same seeds: what a trial reports is what its Spec gives by itself."""
    spec, _ = parse_spec([("spec.yaml", (Path(done.path) / "trials/0003/spec.yaml").read_text())])
    alone = train(spec.replace({"name": "alone"}), free_slots=lambda: 2.0)

    def lines(folder: Folder) -> list[str]:
        return sorted(folder.read_bytes("metrics.jsonl").decode().splitlines())

    assert lines(done.folder / "trials/0003") == lines(alone.folder)


def test_stopped_trials_are_told_as_stopped_and_data_is_read_and_binned_once_per_setting(
    data: Path, store: Path, session: Any
) -> None:
    space = {**SPACE, BINS: {"choice": [15, 63]}, "features.numeric": {"choice": [[], ["impute"]]}}
    spec = spec_of(data, store / "settings", {"trials": 20, "space": space, "grace": 5, "searcher": "random"})

    found = search(spec, free_slots=slots)

    trials = study_of(found).trials
    pruned = [trial for trial in trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert pruned and all(trial.intermediate_values for trial in pruned)
    assert sum(child["status"] == "stopped" for child in children(found)) == len(pruned)
    points = [child["point"] for child in children(found)]
    features = {json.dumps(point["features.numeric"]) for point in points}
    binnings = {(json.dumps(point["features.numeric"]), point[BINS]) for point in points}
    assert (found.record["tune"]["prepared"], found.record["tune"]["binned"]) == (len(features), len(binnings)) == (2, 4)
    entries = [json.loads(file.read_text()) for file in (store / "settings/cache").glob("*/manifest.json")]
    assert sum("splits" in entry for entry in entries) == 2


def test_more_trials_than_slots_on_other_data_each_come_to_an_end(data: Path, store: Path, session: Any) -> None:
    steps = [[], ["impute"], ["scale"], ["impute", "scale"], [{"clip": {}}], ["log1p"]]
    spec = spec_of(data, store / "many", {"trials": 6, "searcher": "grid", "space": {"features.numeric": {"choice": steps}}})

    started = time.monotonic()
    found = search(spec, free_slots=slots)

    assert sum(found.record["tune"]["trials"].values()) == 6 and found.record["tune"]["prepared"] == 6
    assert time.monotonic() - started < 240


def test_a_failing_trial_is_a_line_and_the_search_goes_on(data: Path, store: Path, session: Any) -> None:
    """Half of the space is refused by the family, and one of the transforms by the data."""
    space = {
        LEAVES: {"int": [4, 40]},
        "model.params.bagging_freq": {"choice": [0, 1]},
        "model.params.bagging_fraction": {"choice": [0.5, 1.0]},
        "features.columns.city": {"choice": [["index"], ["no_such_step"]]},
    }
    points = [{"model.params.bagging_freq": 0, "model.params.bagging_fraction": 0.5, "features.columns.city": ["index"]}]
    points += [{"features.columns.city": ["no_such_step"]}]
    spec = spec_of(data, store / "failing", {"trials": 10, "space": space, "points": points, "searcher": "random"})

    found = search(spec, free_slots=slots)

    failed = [child for child in children(found) if child["status"] == "failed"]
    errors = {child["error"] for child in failed}
    assert any("bagging_fraction has no effect while bagging_freq is 0" in error for error in errors)
    assert any("no_such_step' is unknown" in error for error in errors)
    assert all("\n" not in error for error in errors)
    assert len(failed) == found.record["tune"]["trials"]["failed"] and found.record["tune"]["trials"]["complete"] > 0
    states = [trial.state for trial in study_of(found).trials]
    assert states.count(optuna.trial.TrialState.FAIL) == len(failed)


def test_a_search_of_failing_trials_alone_ends_with_the_reason(data: Path, store: Path, session: Any) -> None:
    space = {"features.columns.city": {"choice": [["nope"], ["neither"], ["nor"], ["none"], ["never"], ["not"]]}}
    with pytest.raises(Exception, match="nope' is unknown"):
        search(spec_of(data, store / "hopeless", {"space": space, "searcher": "grid", "trials": 6}), free_slots=slots)
    with pytest.raises(DataError, match=r"^tune: trials are compared on the valid split, which has no rows"):
        search(spec_of(data, store / "hopeless", {}, data={"split": {"valid": 0.0}}), free_slots=slots)


def test_several_metrics_give_a_front(data: Path, store: Path, session: Any) -> None:
    spec = spec_of(data, store / "front", {"metric": ["auc", "model_bytes", "predict_ms"], "tolerance": 0.05, "trials": 10})

    found = search(spec, free_slots=slots)

    tune = found.record["tune"]
    assert tune["metric"] == ["auc", "model_bytes", "predict_ms"] and tune["winner"] in tune["front"]
    bytes_of = {child["trial"]: child["values"]["model_bytes"] for child in children(found)}
    aucs = {child["trial"]: child["values"]["auc"] for child in children(found)}
    near = [number for number in tune["front"] if aucs[number] >= max(aucs.values()) * 0.95]
    assert bytes_of[tune["winner"]] == min(bytes_of[number] for number in near)
    assert tune["values"]["model_bytes"] == pytest.approx(
        (found.folder.path and os.path.getsize(f"{found.path}/artifact/model/model.txt")), rel=0.01
    )
    assert all(child["values"]["predict_ms"] > 0 for child in children(found))


def test_a_winner_refitted_on_all_rows_has_the_best_rounds_and_competes_with_the_trials_metrics(
    data: Path, store: Path, session: Any
) -> None:
    spec = spec_of(
        data,
        store / "refit",
        {"refit": "all", "trials": 4, "scheduler": "none"},
        model={"params": {"rounds": 200, "early_stopping": 10}},
    )

    found = search(spec, free_slots=slots)

    child = children(found)[found.record["tune"]["winner"]]
    assert found.record["rows"]["valid"] == 0 and found.record["rows"]["train"] > 4700
    assert lgb.Booster(model_file=f"{found.path}/artifact/model/model.txt").num_trees() == child["step"] < 200
    assert found.metrics["valid"] == child["metrics"]["valid"] and found.metrics["test"]["auc"] > 0.85


def test_with_folds_a_trial_is_the_mean_of_fits_on_other_valid_rows(data: Path, store: Path, session: Any) -> None:
    points = [{LEAVES: 7, RATE: 0.1}]
    found = search(spec_of(data, store / "folds", {"folds": 2, "trials": 2, "points": points}), free_slots=slots)

    assert (found.record["tune"]["prepared"], found.record["tune"]["trials"]["complete"]) == (2, 2)
    (child,) = [child for child in children(found) if child["point"] == points[0]]
    singles = []
    for fold in range(2):
        changes = {"data.split.fold": [fold, 2], "name": f"fold{fold}", "tune": None, "model.params.num_leaves": 7}
        one = train(spec_of(data, store / "folds", {}).replace(changes), free_slots=lambda: 2.0)
        lines = [json.loads(line) for line in one.folder.read_bytes("metrics.jsonl").decode().splitlines()]
        singles.append(next(line["value"] for line in lines if line["metric"] == "auc" and line["step"] == one.record["steps"]))
    assert child["metrics"]["valid"]["auc"] == pytest.approx(sum(singles) / 2, abs=1e-12)


def test_a_search_learns_from_an_earlier_one(done: Run, data: Path, store: Path, session: Any) -> None:
    found = search(spec_of(data, store, {"trials": 3, "warm_start": [done.id]}), free_slots=slots)

    assert len(study_of(found).trials) == 8 + 3 and len(children(found)) == 3


def test_a_trial_may_have_several_workers(data: Path, store: Path, session: Any) -> None:
    spec = spec_of(data, store / "workers", {"workers": 2, "trials": 2, "scheduler": "none"})

    found = search(spec, free_slots=slots)

    assert found.record["tune"]["layout"]["workers"] == 2 and found.record["tune"]["trials"]["complete"] == 2
    assert all(child["metrics"]["valid"]["auc"] > 0.8 for child in children(found))


def test_a_trial_whose_process_dies_has_failed_and_the_search_goes_on(data: Path, store: Path, session: Any) -> None:
    spec = spec_of(
        data,
        store / "killed",
        {"trials": 5, "scheduler": "none"},
        model={"params": {"rounds": 1000, "early_stopping": None, "num_leaves": 15}},
    )
    killed: list[int] = []

    def kill() -> None:
        def trainees() -> list[psutil.Process]:
            return [process for process in ray_processes() if any("Trainee" in word for word in process.cmdline())]

        wait_for(lambda: len(list((store / "killed").glob("people/*/trials/*/metrics.jsonl"))) >= 2, "two trials under way")
        process = trainees()[0]
        process.kill()
        killed.append(process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    found = search(spec, free_slots=slots)
    thread.join()

    assert killed
    assert found.record["tune"]["trials"] == {"complete": 4, "stopped": 0, "failed": 1}
    (failed,) = [child for child in children(found) if child["status"] == "failed"]
    assert failed["error"] == f"the process of the trial (pid {killed[0]}) was killed from outside (SIGKILL)"


LONG = {"rounds": 1000, "early_stopping": None, "num_leaves": 15}


def words(data: Path, folder: Path, *more: str) -> list[str]:
    content = spec_of(data, folder / "runs", {"trials": 4, "scheduler": "none"}, model={"params": LONG})
    (folder / "people.yaml").write_text(json.dumps(content.model_dump(by_alias=True)))
    return ["tune", "people.yaml", *more]


def under_way(folder: Path) -> bool:
    trials = list(folder.glob("runs/people/*/trials/*"))
    ended = [trial for trial in trials if (trial / "run.json").exists()]
    kept = [trial for trial in trials if list(trial.glob("checkpoints/*/state.json")) and trial not in ended]
    return len(ended) >= 1 and len(kept) >= 1


def test_a_search_that_was_killed_goes_on_with_its_trials_and_what_it_learned(data: Path, tmp_path: Path) -> None:
    process = start(*words(data, tmp_path), folder=tmp_path)
    wait_for(lambda: under_way(tmp_path) or process.poll() is not None, "a trial that has ended and one with a checkpoint", 180)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    (run,) = (tmp_path / "runs/people").iterdir()
    before = {file.parent.name: file.read_text() for file in run.glob("trials/*/run.json")}
    left = {folder.name for folder in run.glob("trials/*") if folder.name not in before}

    refused = start("train", "--resume", str(run), folder=tmp_path).communicate(timeout=PATIENCE_S)[1]
    assert f"is a search; go on with: heliostat tune --resume {run}" in refused
    again = start("tune", "--resume", str(run), "--json", folder=tmp_path)
    out, err = again.communicate(timeout=PATIENCE_S)

    assert again.returncode == 0, err
    record = json.loads(out)
    assert record["tune"]["trials"] == {"complete": 4, "stopped": 0, "failed": 0} and record["path"] == str(run)
    after = {file.parent.name: file.read_text() for file in run.glob("trials/*/run.json")}
    assert {name: after[name] for name in before} == before  # not tried again
    for name in left:  # every report once, and not one missing
        steps = [json.loads(line)["step"] for line in (run / "trials" / name / "metrics.jsonl").read_text().splitlines()]
        assert sorted(set(steps)) == list(range(5, 1001, 5)) and len(steps) == 5 * 200
    assert not (run / "search.json").exists()


def test_an_interrupted_search_keeps_the_best_so_far(data: Path, tmp_path: Path) -> None:
    process = start(*words(data, tmp_path), folder=tmp_path)
    wait_for(lambda: under_way(tmp_path) or process.poll() is not None, "a trial that has ended", 180)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)

    (run,) = (tmp_path / "runs/people").iterdir()
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    assert f"its Spec is {run}/winner.yaml; to go on: heliostat tune --resume {run}" in err
    assert parse_spec([("winner.yaml", (run / "winner.yaml").read_text())])[0].tune is None
    assert not (run / "run.json").exists()
