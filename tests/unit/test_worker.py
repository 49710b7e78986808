"""What a worker goes on from after a kill."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from pipelines.progress import SILENT
from pipelines.storage import Folder
from pipelines.training.trainer import Hearing, steps_in
from pipelines.training.worker import last_checkpoint


def keep(folder: Path, name: str, step: int, *, size: int = 5, text: str | None = None) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "model.txt").write_text("trees")
    state = {"step": step, "files": {"model.txt": size}}
    (folder / name / "state.json").write_text(json.dumps(state) if text is None else text)


def test_the_last_checkpoint_is_the_complete_one_with_the_most_steps(tmp_path: Path) -> None:
    (tmp_path / ".validate_storage_marker").write_text("Ray's own")
    keep(tmp_path, "b", 25)
    keep(tmp_path, "a", 100)
    keep(tmp_path, "half-a-model", 125, size=9)
    keep(tmp_path, "half-a-state", 150, text='{"step": 150, "fi')
    (tmp_path / "no-state").mkdir()

    assert last_checkpoint(Folder.at(str(tmp_path))) == "a"


def test_the_end_of_a_fit_wins_over_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    keep(tmp_path, "b/z", 25)
    keep(tmp_path, "a/a", 25, text='{"step": 25, "final": 20, "files": {"model.txt": 5}}')

    assert last_checkpoint(Folder.at(str(tmp_path))) == "a/a"


def test_steps_that_a_restart_comes_by_again_are_written_once(tmp_path: Path) -> None:
    folder, lines = Folder.at(str(tmp_path)), tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "split": "valid", "metric": "auc", "value": 0.5}) for step in (5, 10)]
    lines.write_text("\n".join(whole) + '\n{"step": 15, "spl')  # what a kill leaves

    with contextlib.ExitStack() as stack:
        hear = Hearing(stack, SILENT, folder, 0, heard=steps_in(folder))
        for step in (5, 10, 15, 20, 15, 20, 30, 25):
            hear({"step": step, "total": 25, "metrics": {"valid": {"auc": 0.5}}})

    assert [json.loads(line)["step"] for line in lines.read_text().splitlines()] == [5, 10, 15, 20, 30, 25]


def test_without_a_checkpoint_a_fit_starts_from_nothing(tmp_path: Path) -> None:
    assert last_checkpoint(Folder.at(str(tmp_path / "not there"))) is None
