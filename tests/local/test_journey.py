"""What a user does with their own table, each command a process with a private Ray of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipelines.artifact import Artifact
from tests.local.conftest import PATIENCE_S
from tests.local.test_pipeline import people

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-the-test"
SPEC = """
data: {source: data, key: [id], split: {test: 0.2, valid: 0.2}}
task: {target: bought}
model: {params: {rounds: 30, num_leaves: 15}}
train: {workers: 2}
serve: {cpus: 0.5}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user")
    (path / "data").mkdir()
    people().write_parquet(path / "data/people.parquet")
    people().drop("bought")[:50].write_csv(path / "new.csv")
    (path / "people.yaml").write_text(SPEC)
    return path


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HELIOSTAT_TOKEN": TOKEN}


def heliostat(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-m", "app", *words], environment() | variables
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=PATIENCE_S, check=False)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "app", *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(),
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Any]:
    """The result of `heliostat run people.yaml --json`."""
    ended = heliostat(folder, "run", "people.yaml", "--json")
    assert ended.returncode == 0, ended.stderr[-3000:]
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def test_run_prints_the_result_and_only_it_as_json(done: dict[str, Any], folder: Path) -> None:
    assert {"run", "path", "task", "metrics", "rows", "seconds"} <= set(done)
    assert set(done["metrics"]["test"]) == {"auc", "logloss", "accuracy", "average_precision", "brier"}
    assert sum(done["rows"].values()) == 6000
    assert done["metrics"]["test"]["auc"] > 0.8
    assert Path(done["path"]).is_relative_to(folder)


def test_the_resolved_spec_is_a_spec_that_gives_the_same_model(done: dict[str, Any], folder: Path) -> None:
    ended = heliostat(folder, "train", f"{done['path']}/spec.yaml", "--json")
    assert ended.returncode == 0, ended.stderr[-3000:]
    paths = [Path(found["path"]) for found in (done, json.loads(ended.stdout))]
    one, two = (json.loads((path / "artifact/manifest.json").read_text())["files"] for path in paths)
    assert one["model/model.txt"] == two["model/model.txt"]
    assert one["preprocessor.json"] == two["preprocessor.json"]


def test_predict_and_runs(done: dict[str, Any], folder: Path) -> None:
    ended = heliostat(folder, "predict", "people@latest", "new.csv", "--out", "answers", "--keep", "id", "--json")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert pl.read_parquet(folder / "answers/*.parquet")["id"].to_list() == list(range(50))
    again = heliostat(folder, "predict", "people@latest", "new.csv", "--out", "answers")
    assert again.returncode == 2
    assert "has predictions already" in again.stderr
    assert "Traceback" not in again.stderr
    assert done["run"] in heliostat(folder, "runs").stdout
    assert "auc" in heliostat(folder, "runs", "show", done["run"]).stdout


def test_serve_answers_what_batch_answers_and_ends_on_ctrl_c(done: dict[str, Any], folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start(folder, "serve", done["run"], "--port", str(port), "--json")
    try:
        ready = json.loads(line_of(process))
        url = ready["models"][0]["url"]
        assert url == f"http://127.0.0.1:{port}/v2/models/people/predict"
        rows = [{**row, "seen": row["seen"].isoformat()} for row in people()[:20].drop("bought").to_dicts()]
        answers = ask(url, {"rows": rows})
        assert answers["predictions"] == Artifact.load(done["path"]).predict(rows)
        assert answers["version"] == done["run"]
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, {"rows": rows}, token="another")
        assert refused.value.code == 401
        swap_from_a_second_terminal(folder, done["run"], url, ready["address"], rows)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, err[-2000:]
    finally:
        process.kill()
        process.wait()
    assert processes_of(process.pid) == []


def swap_from_a_second_terminal(folder: Path, run: str, url: str, address: str, rows: list[Any]) -> None:
    """The same run with a lower limit takes over, and goes again; then other clients may ask."""
    swapped = heliostat(folder, "serve", run, "--set", "serve.limits.rows=5", "--address", address, "--json")
    assert swapped.returncode == 0, swapped.stderr[-3000:]
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(url, {"rows": rows})
    assert refused.value.code == 413
    back = heliostat(folder, "serve", "--rollback", "people", "--address", address, "--json")
    assert json.loads(back.stdout) == {"model": "people", "version": run, "was": run}
    assert len(ask(url, {"rows": rows})["predictions"]) == len(rows)
    rotated = heliostat(folder, "serve", "--tokens", "--address", address, HELIOSTAT_TOKEN="the-token-after-it")
    assert rotated.returncode == 0, rotated.stderr[-3000:]
    assert ask(url, {"rows": rows[:1]}, token="the-token-after-it")["version"] == run
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(url, {"rows": rows})
    assert refused.value.code == 401


def test_ctrl_c_in_the_middle_of_training_leaves_no_process_and_no_run(folder: Path) -> None:
    runs = folder / "runs/people"
    before = set(runs.iterdir()) if runs.exists() else set()
    endless = ("--set", "model.params.rounds=100000", "--set", "model.params.early_stopping=null")
    process = start(folder, "run", "people.yaml", *endless)
    new: set[Path] = set()
    try:
        deadline = time.monotonic() + 180
        while not any((run / "metrics.jsonl").exists() for run in new):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline, "training did not begin"
            time.sleep(0.2)
            new = set(runs.iterdir()) - before if runs.exists() else set()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err[-3000:]
    assert "interrupted:" in err
    assert "Traceback" not in err
    assert not any((run / "run.json").exists() for run in new)
    assert processes_of(process.pid) == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "peple.yaml"], 2, "peple.yaml: there is no such file; did you mean 'people.yaml'?"),
        (["run", "people.yaml", "--set", "model.typ=lightgbm"], 2, "--set: model.typ is unknown; did you mean 'type'?"),
        (["run", "people.yaml", "--set", "model.params.num_leafs=3"], 2, "num_leafs is unknown; did you mean 'num_leaves'?"),
        (["run", "people.yaml", "--set", "data.source=nowhere"], 2, "data.source: 'nowhere' does not exist"),
        (["evaluate", "people@latets"], 2, "'people@latets' is no run"),
        (["evaluate", "persons@latest"], 2, "there is no complete run of 'persons'"),
        (["tune", "people.yaml"], 2, "tune: the Spec says nothing of a search; add tune.space"),
        (["run", "people.yaml", "--set", "evaluate.require={auc: 0.9999}"], 3, "evaluate.require wants at least 0.9999"),
    ],
)
def test_wrong_input_is_one_line_and_an_exit_code(
    done: dict[str, Any], folder: Path, words: list[str], code: int, message: str
) -> None:
    ended = heliostat(folder, *words)
    assert ended.returncode == code, ended.stderr[-2000:]
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def line_of(process: subprocess.Popen[str]) -> str:
    """The first line on stdout: that is all there is until the command ends."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1][-3000:]
    return line


def ask(url: str, body: dict[str, Any], token: str = TOKEN) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def processes_of(session: int) -> list[str]:
    """What still runs in the process session of a command, or was started below it, after a moment."""
    deadline = time.monotonic() + 20
    while True:
        left = list(_in_session(session))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def _in_session(session: int) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                yield (path.parent / "cmdline").read_text().replace("\0", " ")[:120]
        except (OSError, IndexError):
            continue
