"""What a worker goes on from after a kill."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.storage import Folder
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


def test_without_a_checkpoint_a_fit_starts_from_nothing(tmp_path: Path) -> None:
    assert last_checkpoint(Folder.at(str(tmp_path / "not there"))) is None
