"""Commands as Ray jobs, on a head node as `ray start` makes it: own ports, own folder, token authentication."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from app.ports import free_ports
from serve.port import port_holder
from tests.local.conftest import PATIENCE_S

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4
ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys, time

print("words", sys.argv[1:], flush=True)
print("noise", file=sys.stderr, flush=True)
if sys.argv[1] == "sleep":
    time.sleep(60)
if sys.argv[1] == "session":
    from app.session import open_session, store_path

    with open_session() as session:
        print(session.private, session.haproxy, store_path("runs"))
print(json.dumps({"files": sorted(os.listdir("."))}))
sys.exit(3)
"""


@dataclass(frozen=True)
class Head:
    """A running head node."""

    dashboard: str
    address: str
    folder: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="hst-", dir="/tmp"))  # short: Ray puts unix sockets below it
    (folder / "token").write_text(TOKEN)
    first = free_ports(3)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HELIOSTAT_HOME": str(folder / "home"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_worker_niceness": "5",
    }
    command = [
        *[str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000"],
        *[f"--port={first}", f"--dashboard-port={first + 1}", f"--dashboard-agent-listen-port={first + 2}"],
        f"--temp-dir={folder}",
    ]
    with open(folder / "out", "w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_it_listens(first + 1, process)
        yield Head(f"http://127.0.0.1:{first + 1}", f"127.0.0.1:{first}", folder, environment)
    finally:
        end_tree(process.pid)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a program that `python -m app` runs, and with what must not travel."""
    for name in ("app", ".git", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "runs" / "model.txt").write_text("x")
    (tmp_path / "app" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'app')!r})")
    (tmp_path / "app" / "__main__.py").write_text(PROGRAM)
    return tmp_path


def test_the_commands_own_exit_code_comes_back_and_its_output_streams(head: Head, project: Path) -> None:
    done = submit(head, project, "session", "a b", "--json")

    assert done.returncode == 3
    assert done.stdout == '{"files": ["app"]}\n'
    assert "words ['session', 'a b', '--json']" in done.stderr and "noise" in done.stderr
    assert (
        f"False False {head.folder}/home/runs" in done.stderr
    )  # joins the head, which has no HAProxy; the store outlives the job
    assert "INFO" not in done.stderr.replace("INFO job_manager.py", "")  # that one line is the head's, in the job's own log


def test_the_address_of_the_ray_itself_will_do(head: Head, project: Path) -> None:
    done = submit(head, project, "x", ADDRESS=head.address)

    assert done.returncode == 3
    assert "words ['x']" in done.stdout
    assert f"at {head.dashboard}: python -m app x" in done.stderr


def test_ctrl_c_stops_the_job(head: Head, project: Path) -> None:
    process = start(head, project, "sleep")
    assert process.stdout is not None
    while "words" not in process.stdout.readline():
        assert process.poll() is None

    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 130
    assert "interrupted: job raysubmit_" in errors and "is stopped" in errors
    assert not [one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [])[1:] == ["-m", "app", "sleep"]]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"RAY_AUTH_TOKEN": "f" * 64}, "does not accept the token found here; put its own (ray get-auth-token"),
        ({"RAY_AUTH_TOKEN_PATH": None, "HOME": "/nowhere"}, "asks for a token and there is none here; put its own"),
        ({"ADDRESS": "http://127.0.0.1:1"}, "no dashboard of a Ray can be reached at http://127.0.0.1:1"),
        ({"ADDRESS": None}, "submit needs a Ray that is already there: --address http://HOST:8265"),
    ],
    ids=["wrong token", "no token", "nobody there", "no address"],
)
def test_what_a_job_cannot_be_sent_to_is_a_sentence(
    head: Head, project: Path, changed: dict[str, str | None], sentence: str
) -> None:
    done = submit(head, project, "x", **changed)

    assert done.returncode == 2
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_plain_ray_job_submit_runs_the_same_program(head: Head) -> None:
    command = [
        str(BIN / "ray"),
        "job",
        "submit",
        "--address",
        head.dashboard,
        "--working-dir",
        ".",
        "--",
        "python",
        "-m",
        "app",
        "--help",
    ]

    done = subprocess.run(command, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=PATIENCE_S)

    assert done.returncode == 0
    assert "submit" in done.stdout and "Run a command as a Ray job" in done.stdout


def submit(head: Head, project: Path, *words: str, **changed: str | None) -> subprocess.CompletedProcess[str]:
    process = start(head, project, *words, **changed)
    output, errors = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start(head: Head, project: Path, *words: str, **changed: str | None) -> subprocess.Popen[str]:
    """Run `heliostat submit` in the project's folder; `changed` is its environment, and ADDRESS its --address."""
    environment = head.environment | {"ADDRESS": head.dashboard} | changed
    address = environment.pop("ADDRESS")
    options = [*(["--address", address] if address else []), *(["--json"] if "--json" in words else [])]
    return subprocess.Popen(
        # -P: not the project's own `app`, which is for the job
        [
            sys.executable,
            "-P",
            "-c",
            "from app.cli import main; main()",
            "submit",
            *options,
            "--",
            *(word for word in words if word != "--json"),
        ],
        cwd=project,
        env={name: value for name, value in environment.items() if value is not None and name != "RAY_AUTH_MODE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_it_listens(port: int, process: subprocess.Popen[bytes]) -> None:
    while not port_holder("127.0.0.1", port):
        assert process.poll() is None, "ray start has ended"
        time.sleep(0.1)


def end_tree(pid: int) -> None:
    """End the head and all that it started; `ray stop` would end every Ray of this machine."""
    head = psutil.Process(pid)
    for process in [head, *head.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
