"""A process that reads is lost in the middle of each pass over the data, and nothing changes by it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.data import read
from pipelines.predict import predict
from pipelines.prepare import Prepared, prepare
from pipelines.progress import Silent
from pipelines.train import train
from tests.local.test_pipeline import people, slots, spec_of

pytestmark = pytest.mark.usefixtures("session", "many_tasks")


@pytest.fixture
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tables in so many tasks that some are left when the first has ended."""
    monkeypatch.setattr(read, "MIN_TASK_BYTES", 1)


class Killing(Silent):
    """Kills one process that reads in each stage, once the stage has a result."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.killed: list[str] = []

    def stage(self, name: str, total: int | None = None, *, unit: str = "rows") -> Any:
        self.stages.append(f"{name} {self.stages.count(name) + 1 if name in self.stages else ''}".strip())
        return super().stage(name, total, unit=unit)

    def advance(self, n: int = 1, **shown: object) -> None:
        if self.stages[-1] not in self.killed and (pid := _reader()):
            os.kill(pid, signal.SIGKILL)
            self.killed.append(self.stages[-1])


def _reader() -> int | None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ReadUnits" in path.read_bytes():
                return int(path.parent.name)
        except OSError:  # it ended while we looked
            continue
    return None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    table = people(400_000)
    for i in range(40):
        table[10_000 * i : 10_000 * (i + 1)].write_parquet(folder / f"{i:02d}.parquet")
    return folder


def prepared(data: Path, store: Path, progress: Silent) -> Prepared:
    features = {
        "drop": ["id"],
        "columns": {"city": ["target_mean"]},
        "groups": {
            "body": {"columns": ["age", "visits"], "steps": ["impute", {"log1p": {"signed": True}}, {"pca": {"components": 2}}]}
        },
    }
    spec = spec_of(data, store, data={"source": str(data), "split": {"test": 0.2, "valid": 0.2}}, features=features)
    return prepare(spec, progress=progress)


def bits(found: Prepared) -> dict[str, Any]:
    parts = {name: found.folder.read_bytes(name) for name in ("preprocessor.json", "task.json", "profile.json", "quality.json")}
    shards = {
        (split, i): pq.read_table(f"{found.shards.folder.path}/{shard.file}")
        for split, shards in found.shards.splits.items()
        for i, shard in enumerate(shards)
    }
    return parts | {str(key): [column.to_numpy().tobytes() for column in table.columns] for key, table in shards.items()}


def test_a_reader_lost_in_each_pass_changes_no_bit(data: Path, tmp_path: Path) -> None:
    killing = Killing()

    disturbed = prepared(data, tmp_path / "disturbed", killing)

    assert killing.killed == killing.stages == ["statistics", "statistics 2", "transform"]
    assert bits(disturbed) == bits(prepared(data, tmp_path / "quiet", Silent()))


def test_a_reader_lost_while_rows_are_answered_changes_no_answer(data: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    people(2000).write_parquet(small / "0.parquet")
    run = train(spec_of(small, tmp_path / "store", model={"params": {"rounds": 5}}), free_slots=slots)
    killing = Killing()

    disturbed = predict(str(run.artifact), str(data), str(tmp_path / "disturbed"), progress=killing)
    quiet = predict(str(run.artifact), str(data), str(tmp_path / "quiet"))

    assert killing.killed == killing.stages == ["predict"]
    assert disturbed.rows == quiet.rows == 400_000
    assert pq.read_table(disturbed.path).equals(pq.read_table(quiet.path))
