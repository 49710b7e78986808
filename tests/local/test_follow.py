"""train --follow: files are learned from as they arrive, each exactly once, and what is left is a complete run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import follow as module
from pipelines.artifact import Artifact
from pipelines.errors import DataError, SpecError
from pipelines.follow import Learner, follow
from pipelines.runs import Run, RunStore
from pipelines.spec import PipelineSpec
from pipelines.train import train
from tests.local.conftest import PATIENCE_S
from tests.local.test_journey import environment
from tests.local.test_pipeline import people, slots, spec_of

pytestmark = pytest.mark.usefixtures("session")

LINEAR = {"type": "linear", "params": {"epochs": 2}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def parent(store: Path, tmp_path_factory: pytest.TempPathFactory, session: Any) -> Run:
    data = tmp_path_factory.mktemp("first")
    people(1500).write_parquet(data / "0.parquet")
    return train(spec_of(data, store, model=LINEAR, train={"workers": 1}), free_slots=slots)


@pytest.fixture
def arriving(tmp_path: Path) -> Path:
    folder = tmp_path / "arriving"
    folder.mkdir()
    table = people(6000, seed=1)
    for i in range(3):
        table[2000 * i : 2000 * (i + 1)].write_parquet(folder / f"{i}.parquet")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.05)


def spec_from(parent: Run, store: Path) -> PipelineSpec:
    model = {"type": "linear", "from": parent.id, "params": {"batch_size": 256, "learning_rate": 0.05}}
    spec = spec_of(Path("unused"), store)
    return spec.model_copy(update={"model": type(spec.model).model_validate(model)})


def weights(run: Run) -> bytes:
    return run.artifact.read_bytes("model/weights.safetensors")


def arrived(run: Run) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in run.folder.read_bytes("metrics.jsonl").splitlines()]
    return [(line["step"], line["value"]) for line in lines if line["metric"] == "auc"]


def test_files_are_learned_from_once_each_and_leave_a_complete_run(parent: Run, store: Path, arriving: Path) -> None:
    made = follow(spec_from(parent, store), str(arriving), once=True)

    assert list(made.record["followed"]) == ["0.parquet", "1.parquet", "2.parquet"]
    assert made.record["rows"] == {"train": 6000} and made.record["steps"] == 3 * 8
    assert made.record["parent"] == parent.path
    assert weights(made) != weights(parent) and not made.folder.exists("checkpoints")
    assert [step for step, _ in arrived(made)] == [8, 16, 24]
    assert arrived(made)[-1][1] > arrived(made)[0][1] - 0.01
    new = people(500, seed=9)
    answers = Artifact.load(made.path).predict(new)
    assert answers.height == 500 and 0.3 < answers["probability"].mean() < 0.7
    assert RunStore.at(str(store)).find("people@latest").id == made.id


def test_what_is_killed_goes_on_with_the_file_it_was_at_and_ends_with_equal_bits(
    parent: Run, store: Path, arriving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = follow(spec_from(parent, store), str(arriving), once=True)
    keep = Learner._keep

    def lost(self: Learner) -> None:
        if len(self.files) == 2:
            raise RuntimeError("the power is gone")
        keep(self)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_keep", lost)
        with pytest.raises(RuntimeError, match="the power is gone") as caught:
            follow(spec_from(parent, store), str(arriving), once=True)
    [note] = caught.value.__notes__
    [path] = [word for word in note.split() if str(store) in word]
    half = RunStore.at(str(store)).folder / "people" / Path(path).name
    begun = half.read_json("begun.json")
    half.write_json("begun.json", {**begun, "driver": {"host": "gone", "pid": 1, "started": None}})

    interrupted = RunStore.at(str(store)).interrupted(path)
    assert interrupted.begun().follow == str(arriving)
    made = follow(spec_from(parent, store), str(arriving), resume=interrupted, once=True)

    assert weights(made) == weights(whole) and made.record["followed"] == whole.record["followed"]
    assert made.record["rows"] == {"train": 6000} and made.record["resumed"] == [8]
    assert arrived(made)[-1] == arrived(whole)[-1]


def test_ctrl_c_leaves_a_complete_run_of_whole_files(
    parent: Run, store: Path, arriving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Learner, path: Path, location: str) -> Any:
        if location.endswith("1.parquet"):
            raise KeyboardInterrupt
        return prepared(self, path, location)

    prepared = Learner._prepared
    monkeypatch.setattr(Learner, "_prepared", interrupt)

    made = follow(spec_from(parent, store), str(arriving))

    assert list(made.record["followed"]) == ["0.parquet"] and made.record["rows"] == {"train": 2000}
    assert Artifact.load(made.path).predict(people(5, seed=9)).height == 5


def test_a_file_that_changes_counts_once_and_one_that_grows_is_waited_for(
    parent: Run, store: Path, arriving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def look(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:  # between two looks 2.parquet grows: at the second it is not yet complete
            people(100, seed=5).write_parquet(arriving / "2.parquet")
        if looks == 3:  # all are learned from
            people(50, seed=6).write_parquet(arriving / "0.parquet")

    monkeypatch.setattr(module.time, "sleep", look)

    made = follow(spec_from(parent, store), str(arriving), once=True)

    assert made.record["rows"] == {"train": 2000 + 2000 + 100}


def test_what_cannot_be_followed_is_one_line(parent: Run, store: Path, tmp_path: Path) -> None:
    spec = spec_from(parent, store)
    plain = spec.model_copy(update={"model": type(spec.model).model_validate({"type": "linear"})})
    with pytest.raises(SpecError, match=r"train --follow goes on from a run .* set model.from"):
        follow(plain, str(tmp_path), once=True)
    with pytest.raises(DataError, match=r"does not exist"):
        follow(spec, str(tmp_path / "nowhere"), once=True)


def test_the_command_follows_until_no_file_is_left(parent: Run, store: Path, arriving: Path, tmp_path: Path) -> None:
    (tmp_path / "people.yaml").write_text(
        f"data: {{source: unused}}\ntask: {{target: bought}}\nmodel: {{type: linear, from: {parent.path}}}\nstore: {store}\n"
    )
    words = [sys.executable, "-m", "app", "train", "people.yaml", "--follow", str(arriving), "--once", "--json"]
    ended = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=PATIENCE_S, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert len(json.loads(ended.stdout)["followed"]) == 3
