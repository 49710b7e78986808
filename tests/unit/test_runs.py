"""Runs are found by id, path, NAME@latest and NAME@best, and only when they are complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import ArtifactError
from pipelines.runs import Begun, Run, RunStore
from pipelines.storage import Folder


def made(store: Path, id: str, *, name: str = "flights", valid: dict[str, float], require: dict[str, float] | None = None) -> Run:
    folder = Folder.at(str(store)) / name / id
    task = {"type": "binary", "target": "late", "metric": "auc"}
    facts: dict[str, Any] = {"metrics": {"valid": valid}, "task": task, "require": require or {}}
    return Run(folder.create(), {}).complete(**facts)


def test_latest_best_id_and_path(tmp_path: Path) -> None:
    made(tmp_path, "20260101-000000-aaaa", valid={"auc": 0.8, "logloss": 0.5})
    best = made(tmp_path, "20260102-000000-aaaa", valid={"auc": 0.9, "logloss": 0.6})
    latest = made(tmp_path, "20260103-000000-aaaa", valid={"auc": 0.7, "logloss": 0.4})
    store = RunStore.at(str(tmp_path))
    assert [run.id for run in store.list()] == ["20260101-000000-aaaa", best.id, latest.id]
    assert store.find("flights@latest").id == latest.id
    assert store.find("flights@best").id == best.id
    assert store.find(best.id).path == store.find(best.path).path == best.path


def test_best_goes_by_the_required_metric_and_its_direction(tmp_path: Path) -> None:
    made(tmp_path, "20260101-000000-aaaa", valid={"auc": 0.9, "logloss": 0.6})
    better = made(tmp_path, "20260102-000000-aaaa", valid={"auc": 0.8, "logloss": 0.4}, require={"logloss": 0.5})
    assert RunStore.at(str(tmp_path)).find("flights@best").id == better.id


def test_what_is_not_complete_is_no_run(tmp_path: Path) -> None:
    half = Run.create(str(tmp_path), "flights")
    half.folder.write_bytes("spec.yaml", b"name: flights\n")
    store = RunStore.at(str(tmp_path))
    assert store.list() == []
    with pytest.raises(ArtifactError, match="is not complete: it has no run"):
        store.find(half.path)
    with pytest.raises(ArtifactError, match="there is no complete run of 'flights'"):
        store.find("flights@latest")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("fligths@best", r"no complete run of 'fligths'.*did you mean 'flights'"),
        ("flights@newest", "expected flights@latest or flights@best"),
        ("20260101-000000-aaab", r"there is no run '20260101-000000-aaab'.*did you mean '20260101-000000-aaaa'"),
        ("nowhere/at/all", "the run .*nowhere/at/all does not exist"),
    ],
)
def test_a_reference_that_leads_nowhere_is_one_sentence(tmp_path: Path, reference: str, message: str) -> None:
    made(tmp_path, "20260101-000000-aaaa", valid={"auc": 0.8})
    with pytest.raises(ArtifactError, match=message):
        RunStore.at(str(tmp_path)).find(reference)


def begun(store: Path, id: str, **driver: Any) -> Path:
    run = Run(Folder.at(str(store / "flights" / id)), {})
    run.begin(Begun(prepared="somewhere", prepare={}, team={}, versions={}, resumed=[]))
    if driver:
        found = run.folder.read_json("begun.json")
        run.folder.write_json("begun.json", {**found, "driver": {**found["driver"], **driver}})
    return store / "flights" / id


def test_an_interrupted_run_is_found_by_id_path_and_name(tmp_path: Path) -> None:
    first, last = (begun(tmp_path, id, pid=0) for id in ("20260101-000000-aaaa", "20260102-000000-bbbb"))
    store = RunStore.at(str(tmp_path))

    assert store.interrupted(first.name).path == store.interrupted(str(first)).path == str(first)
    assert store.interrupted("flights@latest").path == str(last)
    assert store.interrupted(first.name).begun().prepared == "somewhere"


def test_what_cannot_go_on_is_told_why(tmp_path: Path) -> None:
    place = begun(tmp_path, "20260101-000000-aaaa")
    (tmp_path / "flights/20260102-000000-bbbb").mkdir()
    (tmp_path / "flights/20260102-000000-bbbb/spec.yaml").write_text("")
    store = RunStore.at(str(tmp_path))

    with pytest.raises(ArtifactError, match=f"is not interrupted: process {os.getpid()} works on it"):
        store.interrupted(place.name).begun()
    with pytest.raises(ArtifactError, match="did not come to its training; start it by its Spec"):
        store.interrupted("20260102-000000-bbbb")
    with pytest.raises(ArtifactError, match="there is no run '20260101-000000-aaab' in .*; did you mean '20260101-000000-aaaa'"):
        store.interrupted("20260101-000000-aaab")
    with pytest.raises(ArtifactError, match="does not exist"):
        store.interrupted(str(tmp_path / "flights/nothing"))
    with pytest.raises(ArtifactError, match="no run of 'fligths' .* was interrupted"):
        store.interrupted("fligths@latest")
    store.interrupted(place.name).complete()
    with pytest.raises(ArtifactError, match="is complete: there is nothing to go on with"):
        store.interrupted(place.name)
    assert sorted(file.name for file in place.iterdir()) == ["run.json"]
