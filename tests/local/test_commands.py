"""The command line as a user runs it, each command a process with a Ray of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from tests.local.conftest import PATIENCE_S

ROOT = Path(__file__).parents[2]


def start(*words: str, folder: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "app", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment)


def ray_processes_of(pid: int) -> list[str]:
    """What is left of the Ray of a process that has ended: Ray's sessions carry the pid in their names."""
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if f"_{pid}/" in line]


def test_the_demo_answers_over_http_and_leaves_nothing_running(tmp_path: Path) -> None:
    process = start("demo", "--json", "--set", "model.params.rounds=20", "--set", "evaluate.require={}", folder=tmp_path)
    out, err = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["metrics"]["test"]["auc"] > 0.7
    assert {"label", "probability"} == set(result["served"]["predictions"][0])
    assert result["served"]["version"] == result["run"]
    assert len(list(Path(result["predictions"]).glob("part-*.parquet"))) >= 1
    assert Path(result["path"]).is_relative_to(tmp_path / "runs" / "flights")
    assert ray_processes_of(process.pid) == []


def test_an_interrupted_run_says_so_and_leaves_nothing_running(tmp_path: Path) -> None:
    data = f"data.source={ROOT / 'examples/flights/data'}"
    process = start("run", str(ROOT / "examples/flights/flights.yaml"), "--set", data, folder=tmp_path)

    assert process.stderr is not None
    for line in process.stderr:  # until a stage has ended, so that workers are up
        if line.startswith("statistics: 336,776 rows"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)

    assert (process.returncode, out) == (130, ""), err
    assert "interrupted: prepared data is kept" in err
    assert "Traceback" not in err
    assert ray_processes_of(process.pid) == []
    assert list((tmp_path / "runs").glob("flights/*/run.json")) == []


def test_a_prepare_that_was_killed_is_not_taken_for_complete(tmp_path: Path) -> None:
    words = [str(ROOT / "examples/flights/flights.yaml"), "--set", f"data.source={ROOT / 'examples/flights/data'}"]
    process = start("prepare", *words, folder=tmp_path)
    while not list((tmp_path / "runs/cache").glob("*/shards-*/train/*.parquet")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=PATIENCE_S)

    listed = start("cache", "list", "--json", folder=tmp_path).communicate(timeout=PATIENCE_S)[0]
    assert sorted(entry["holds"] for entry in json.loads(listed)["entries"]) == ["not complete", "statistics"]
    again = start("prepare", "--json", *words, folder=tmp_path)
    out, err = again.communicate(timeout=PATIENCE_S)

    assert again.returncode == 0, err
    assert json.loads(out)["reused"] is False and sum(json.loads(out)["rows"].values()) == 327_346
    assert "cache miss: nothing is prepared for 'flights'" in err


def test_two_runs_at_once_prepare_the_same_data_without_harm(tmp_path: Path) -> None:
    words = [str(ROOT / "examples/flights/flights.yaml"), "--json", "--set", f"data.source={ROOT / 'examples/flights/data'}"]
    both = [start("prepare", *words, folder=tmp_path) for _ in range(2)]
    ended = [(process, *process.communicate(timeout=PATIENCE_S)) for process in both]

    assert [process.returncode for process, _, _ in ended] == [0, 0], ended
    results = [json.loads(out) for _, out, _ in ended]
    assert results[0]["path"] == results[1]["path"] and results[0]["rows"] == results[1]["rows"]
    folder = Path(results[0]["path"])
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, shards in manifest["splits"].items():
        rows = [pq.ParquetFile(folder / manifest["shards"] / file).metadata.num_rows for file, _ in shards]
        assert rows == [rows for _, rows in shards] and sum(rows) == results[0]["rows"][split]
