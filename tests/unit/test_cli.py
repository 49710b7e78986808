"""The command line: help, exit codes, what goes to which stream; the verbs themselves are stand-ins here."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import app.progress
import pipelines.train
from app import cli, opening
from app.endings import cause, exits, interrupts_kept
from app.progress import Shown
from app.session import Session
from pipelines.errors import ArtifactError, DataError, RequirementError, SpecError
from pipelines.notation import to_yaml
from pipelines.runs import Run
from pipelines.spec import PipelineSpec

SPEC = "data: {source: rows.parquet}\ntask: {target: y}\n"


def heliostat(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "app", *words], capture_output=True, text=True, cwd=folder or root, env=environment
    )


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ended]:
    """Run a command in this process, in a folder with a Spec, with a session that is none."""

    @contextlib.contextmanager
    def no_session(*_: Any, **__: Any) -> Iterator[Session]:
        yield Session(address="127.0.0.1:1", private=True, log_dir="/tmp/ray/logs", haproxy=True)

    monkeypatch.setattr(opening, "open_session", no_session)
    monkeypatch.chdir(tmp_path)
    Path("flights.yaml").write_text(SPEC)

    def ended(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["heliostat", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return Ended(int(caught.value.code or 0), out, err)

    return ended


def complete_run(spec: PipelineSpec, **facts: Any) -> Run:
    run = Run.create(spec.store, spec.name)
    run.folder.write_bytes("spec.yaml", to_yaml(spec).encode())
    metrics = facts.pop("metrics", {"valid": {"auc": 0.75, "logloss": 0.5}, "test": {"auc": 0.8, "logloss": None}})
    task = {"type": "binary", "target": "y", "metric": "auc"}
    return run.complete(
        task=task, metrics=metrics, rows={"train": 1234}, seconds={"prepare": 1.0}, dropped={"null target": 2}, **facts
    )


# Help


def test_help_lists_the_commands() -> None:
    done = heliostat("--help")

    listed = [line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line.strip()]
    assert (done.returncode, done.stderr) == (0, "")
    assert set(listed) == {
        *["run", "prepare", "train", "plan", "evaluate", "predict", "serve", "runs", "cache", "submit", "demo", "tune"]
    }


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "prepare",
        "train",
        "tune",
        "plan",
        "evaluate",
        "predict",
        "serve",
        "runs",
        "cache list",
        "cache prune",
        "submit",
        "demo",
    ],
)
def test_every_command_has_the_common_options(command: str, call: Callable[..., Ended]) -> None:
    shown = call(*command.split(), "--help").out

    assert [option for option in ("--address", "--store", "--set", "--json") if option not in shown] == []


def test_help_imports_neither_ray_nor_torch_and_is_quick() -> None:
    code = "import sys; sys.argv = ['heliostat', '--help']; from app.cli import main\ntry: main()\nfinally: print(sorted({'ray', 'torch', 'lightgbm', 'polars', 'pyarrow', 'numpy', 'pydantic'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"

    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        heliostat("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    # The machine may be busy: the time of the processor, and one quick answer of several shows that it can be.
    assert any(cpu_seconds() < 0.3 for _ in range(10))


# Exit codes


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "churn.yaml").write_text(SPEC + "model: {tpye: lightgbm}\n")

    done = heliostat("run", "churn.yaml", folder=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "churn.yaml: model.tpye is unknown; did you mean 'type'? (known: from, params, type)\n"


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["run", "x.yaml", "--no-such"],
        ["nothing"],
        ["serve"],
        ["serve", "a", "--status"],
        ["runs", "--json", "show", "x"],
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], call: Callable[..., Ended]) -> None:
    ended = call(*words)

    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err


def test_tune_without_a_space_says_what_to_add(call: Callable[..., Ended]) -> None:
    ended = call("tune", "flights.yaml")

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(
        "flights.yaml: tune: the Spec says nothing of a search; add tune.space, such as {model.params.num_leaves:"
    )


@pytest.mark.parametrize(
    "words", [["serve", "--status"], ["serve", "--stop", "flights"], ["serve", "flights@latest", "--detach"]]
)
def test_what_needs_a_lasting_ray_says_how_to_start_one(
    words: list[str], call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    ended = call(*words)

    assert ended.code == 2
    first, *commands = ended.err.splitlines()
    assert first.startswith(
        f"serve {next(word for word in words if word.startswith('--'))} needs a Ray that outlives the command"
    )
    assert [line.split()[1:3] for line in commands] == [["ray", "start"], ["serve", "RUN"]]


def test_a_spec_error_from_a_verb_names_the_file(call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> Run:
        raise SpecError("task.target: 'y' is constant")

    monkeypatch.setattr(pipelines.train, "run", wrong)

    assert call("run", "flights.yaml", "--set", "task.target=y") == Ended(2, "", "--set: task.target: 'y' is constant\n")


def test_a_missed_metric_prints_the_run_and_is_exit_code_3(call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    def missed(spec: PipelineSpec, **_: Any) -> Run:
        complete_run(spec)
        raise RequirementError("test auc is 0.8; evaluate.require wants at least 0.9")

    monkeypatch.setattr(pipelines.train, "run", missed)

    ended = call("run", "flights.yaml", "--json")

    assert (ended.code, ended.err) == (3, "test auc is 0.8; evaluate.require wants at least 0.9\n")
    assert json.loads(ended.out)["metrics"]["test"] == {"auc": 0.8, "logloss": None}


def test_an_interrupt_says_what_is_kept_and_is_exit_code_130(call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Run:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.train, "train", interrupted)

    ended = call("train", "flights.yaml")

    assert (ended.code, ended.out) == (130, "")
    assert (
        ended.err
        == "interrupted: prepared data is kept in STORE/cache, and what is not complete is no run; the same command starts again\n"
    )


def test_a_fault_of_ours_is_a_traceback_with_the_path_of_the_logs(
    call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Run:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(pipelines.train, "run", broken)

    ended = call("run", "flights.yaml")

    assert ended.code == 1
    assert ended.err.startswith("Traceback")
    assert ended.err.endswith("ZeroDivisionError: by zero\nRay's logs: /tmp/ray/logs\n")


def test_a_users_error_is_found_in_what_ray_wraps_around_it() -> None:
    class RayTaskError(Exception):
        cause: BaseException

    class BothError(RayTaskError, DataError):
        def __str__(self) -> str:
            return "a traceback of a hundred lines"

    wrapped, failed, original = BothError(), RuntimeError("worker group failed"), DataError("a.csv, line 3: 4 fields")
    wrapped.cause = original
    failed.worker_failures = {1: wrapped}  # type: ignore[attr-defined]

    assert cause(wrapped) is original
    assert cause(failed) is original
    assert cause(RuntimeError("other")) is None
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as err, exits("run"):
        raise ValueError("outer") from wrapped
    assert (caught.value.code, err.getvalue()) == (2, "a.csv, line 3: 4 fields\n")


def test_a_users_error_survives_the_trip_between_processes() -> None:
    error = ArtifactError("the run x does not exist")

    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# Results


def test_json_is_the_only_thing_on_stdout(call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    def talkative(spec: PipelineSpec, *, progress: Any, **_: Any) -> Run:
        print("printed by a library")
        os.write(1, b"written by C\n")
        with progress.stage("prepare", total=10) as stage:
            stage.advance(10)
        return complete_run(spec)

    monkeypatch.setattr(pipelines.train, "run", talkative)

    ended = call("run", "flights.yaml", "--json", "--store", "elsewhere")

    result = json.loads(ended.out)
    assert ended.code == 0
    assert result["path"] == str(Path("elsewhere/flights").resolve() / result["run"])
    assert (result["task"]["type"], result["rows"], result["seconds"]) == ("binary", {"train": 1234}, {"prepare": 1.0})
    assert {"printed by a library", "written by C"} < set(ended.err.splitlines())
    assert "prepare: 10 rows in 0.0 s" in ended.err


def test_a_run_is_printed_for_people(call: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.train, "run", lambda spec, **_: complete_run(spec))

    lines = call("run", "flights.yaml").out.splitlines()

    assert lines[1] == "task      binary: y"
    assert lines[2] == "rows      train 1,234 (dropped: 2 null target)"
    assert [line.split() for line in lines if "auc" in line or "logloss" in line] == [
        ["auc", "0.7500", "0.8000"],
        ["logloss", "0.5000", "-"],
    ]


def test_runs_are_listed_shown_and_compared(call: Callable[..., Ended]) -> None:
    from app.spec import load_spec

    spec = load_spec(["flights.yaml"])
    first = complete_run(spec)
    second = complete_run(spec.replace({"model.params.num_leaves": 31}), metrics={"test": {"auc": 0.81}})

    listed, shown = call("runs"), call("runs", "show", f"{first.id}", "--json")
    compared = call("runs", "diff", first.id, second.id)

    assert [line.split()[1] for line in listed.out.splitlines()[1:]] == sorted([first.id, second.id])
    assert json.loads(shown.out)["run"] == first.id
    differences = {line.split()[0]: line.split()[1:] for line in compared.out.splitlines()[1:]}
    assert differences["metrics.test.auc"] == ["0.8000", "0.8100", "+0.0100"]
    assert differences["spec.model.params.num_leaves"] == ["-", "31"]
    assert "spec.task.target" not in differences
    assert call("runs", "list", "--json").out.startswith('{"runs": [')


def test_a_shown_run_tells_what_its_columns_are_to_the_model(call: Callable[..., Ended]) -> None:
    from app.spec import load_spec

    columns = [
        {"name": f"c{i}", "columns": [f"c{i}"], "gain": 96.0 if i == 0 else 0.25, "split": 4.0, "contribution": 0.5 / (i + 1)}
        for i in range(12)
    ]
    importance = {"rows": 200, "measures": ["gain", "split", "contribution"], "columns": columns}
    without, run = complete_run(load_spec(["flights.yaml"])), complete_run(load_spec(["flights.yaml"]))
    run.artifact.write_json("importance.json", importance)

    lines = call("runs", "show", run.id).out.splitlines()

    at = lines.index("COLUMN  GAIN   SPLIT  CONTRIBUTION")
    assert lines[at + 1].split() == ["c0", "97.2%", "8.3%", "0.5"]
    assert lines[at + 10].split() == ["c9", "0.3%", "8.3%", "0.05"]
    assert lines[at + 11] == "and 2 more in importance.json"
    assert json.loads(call("runs", "show", run.id, "--json").out)["importance"] == importance
    assert "COLUMN" not in call("runs", "show", without.id).out
    assert "importance" not in json.loads(call("runs", "show", without.id, "--json").out)


def test_the_cache_is_listed_and_pruned(call: Callable[..., Ended]) -> None:
    from tests.unit.test_cache import address, keep

    keep(Path("runs"), address(), name="flights", made=0)

    listed = call("cache", "list").out.splitlines()
    assert listed[1].split()[:4] == [address().key, "flights", "shards", "10"]
    assert json.loads(call("cache", "list", "--json").out)["entries"][0]["holds"] == "shards"
    assert call("cache", "prune").out == "nothing to delete\n"
    assert "prepared 1970-01-01" in call("cache", "prune", "--days", "30").out
    assert call("cache", "list").out == "the cache is empty\n"


def test_a_plan_is_printed_and_its_problems_are_wrong_input(call: Callable[..., Ended]) -> None:
    import polars as pl

    pl.DataFrame({"age": range(100), "city": ["Ulm", "Bern"] * 50, "y": [True, False] * 50}).write_parquet("rows.parquet")

    good, bad = call("plan", "flights.yaml"), call("plan", "flights.yaml", "--json", "--set", "train.workers=200")

    assert (good.code, good.err) == (0, "")
    assert good.out.splitlines()[0].startswith("rows      100 in 1 file,")
    assert "1. statistics of all columns" in good.out
    assert bad.code == 2
    assert json.loads(bad.out)["problems"] == ["train.workers: 200 workers cannot share 80 train rows; lower train.workers"]
    assert bad.err == json.loads(bad.out)["problems"][0] + "\n"


def test_an_unknown_run_is_wrong_input(call: Callable[..., Ended]) -> None:
    ended = call("runs", "show", "flights@latest")

    assert (ended.code, ended.out) == (2, "")
    assert "there is no complete run of 'flights'" in ended.err


# Progress


def test_progress_in_a_log_is_a_line_when_a_stage_ends() -> None:
    log = io.StringIO()
    shown = Shown(Console(file=log, width=40))

    with shown.stage("train", total=300, unit="rounds") as stage:
        stage.advance(100, auc=0.81234)
        stage.advance(200, auc=0.82)
    shown.note("left out, for text has no default transform: a, b, c, d, e, f")
    with contextlib.suppress(ValueError), shown.stage("predict", total=10) as stage:
        stage.advance(4)
        raise ValueError("boom")

    assert log.getvalue().splitlines() == [
        "train: 300 rounds (auc 0.82) in 0.0 s",
        "left out, for text has no default transform: a, b, c, d, e, f",
        "predict: stopped after 4 of 10 rows in 0.0 s",
    ]


def test_progress_in_a_log_also_speaks_up_during_long_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(app.progress, "LOG_EVERY_S", 0.0)

    with Shown(Console(file=log, width=40)).stage("read", total=100) as stage:
        stage.advance(25)
        stage.advance(25)

    assert log.getvalue().splitlines()[:2] == ["read: 25 of 100 rows, about 0 s left", "read: 50 of 100 rows, about 0 s left"]


def test_progress_on_a_terminal_is_a_bar_that_leaves_a_line() -> None:
    screen = io.StringIO()
    shown = Shown(Console(file=screen, width=100, force_terminal=True))

    with shown.stage("outer", total=2, unit="units") as outer, shown.stage("inner", total=5) as inner:
        inner.advance(5, loss=0.5)
        outer.advance()

    text = screen.getvalue()
    assert "━" in text
    assert "inner: 5 rows (loss 0.5) in 0.0 s" in text
    assert "outer: 1 of 2 units in 0.0 s" in text


def test_an_interrupt_that_python_drops_comes_again() -> None:
    class Unlucky:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def unlucky() -> None:
        Unlucky()
        time.sleep(10)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_kept():
            unlucky()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train"], "no Spec was given; name at least one YAML file, or an interrupted run with --resume RUN"),
        (["train", "flights.yaml", "--resume", "x"], "--resume goes on with the run's own Spec; leave out SPEC and --set"),
        (["run", "--resume", "x", "--set", "name=y"], "--resume goes on with the run's own Spec; leave out SPEC and --set"),
        (["run", "--resume", "gone/x"], "the run {folder}/gone/x does not exist; start it by its Spec"),
    ],
)
def test_resume_goes_on_with_a_run_and_nothing_else(call: Callable[..., Ended], words: list[str], line: str) -> None:
    ended = call(*words)

    assert ended.code == 2
    assert ended.err.strip() == line.format(folder=Path.cwd())


def test_a_stage_may_have_lines_below_its_bar_and_in_a_log_with_its_news(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, logged = io.StringIO(), io.StringIO()
    with Shown(Console(file=shown, force_terminal=True, width=100)).stage("tune", 10, unit="trials") as stage:
        stage.show(["TRIAL  auc", "0001   0.9"])
        stage.advance(1)
    monkeypatch.setattr(app.progress, "LOG_EVERY_S", -1.0)
    with Shown(Console(file=logged, width=100)).stage("tune", 10, unit="trials") as stage:
        stage.show(["TRIAL  auc", "0001   0.9"])
        stage.advance(1)

    assert "TRIAL  auc\n0001   0.9" in shown.getvalue() and shown.getvalue().endswith("s\n")
    assert "trials, about" in logged.getvalue() and "s left\n  TRIAL  auc\n  0001   0.9\n" in logged.getvalue()
