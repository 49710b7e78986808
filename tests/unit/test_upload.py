"""Which files travel with a Ray job."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import upload as module
from app.upload import upload
from pipelines.errors import ClusterError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project; a megabyte stands for sixteen, and three for a hundred."""
    monkeypatch.setattr(module, "FILE_LIMIT", 1 << 20)
    monkeypatch.setattr(module, "UPLOAD_LIMIT", 3 << 20)
    for name, size in {
        "flights.yaml": 100,
        "app/__main__.py": 100,
        "app/__pycache__/x.pyc": 100,
        ".git/pack": 9 << 20,
        ".venv/torch.so": 9 << 20,
        "runs/flights/model.txt": 9 << 20,
        "heliostat.egg-info/PKG-INFO": 9 << 20,
        ".mypy_cache/x": 9 << 20,
        "data/small.parquet": 1000,
        "data/large [1].parquet": 2 << 20,
        "secret/notes": 9 << 20,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("secret/\n")
    return tmp_path


def test_history_environments_runs_and_caches_stay_behind(folder: Path) -> None:
    sent = set(module._sizes(folder))

    assert sent == {".gitignore", "flights.yaml", "app/__main__.py", "data/small.parquet", "data/large [1].parquet"}


def test_a_large_file_stays_behind_and_is_named(folder: Path) -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    chosen = upload(folder)

    assert chosen.note.startswith(
        "not sent, over 1 MB each: data/large [1].parquet (2 MB); a job reads such data from a path or URI"
    )
    excluded = _get_excludes(folder, chosen.excludes)
    assert excluded(folder / "data" / "large [1].parquet")
    assert not excluded(folder / "data" / "small.parquet")


def test_too_much_in_all_is_a_sentence_that_names_the_largest(folder: Path) -> None:
    for number in range(4):
        (folder / "data" / f"{number}.csv").write_bytes(b"x" * (1 << 20))

    with pytest.raises(
        ClusterError, match=r"holds 4 MB to send with the job, and Ray takes 3 MB; the largest: data \(4 MB\).*\.rayignore"
    ):
        upload(folder)


def test_no_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="is not a folder"):
        upload(tmp_path / "nowhere")
