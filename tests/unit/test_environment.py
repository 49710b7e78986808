"""What stands around a Ray: its variables, ports, folders, the token, and what is left when a process is killed."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from app.environment import has_token, make_token, node_environment, private_environment
from app.ports import free_ports, refuse_taken
from app.processes import OWNER, RAY_FOLDER, owned, sweep
from app.session import store_path
from pipelines.errors import ClusterError
from serve.port import port_holder


def test_two_private_rays_share_no_port_and_no_path() -> None:
    first, second = private_environment("/tmp/a"), private_environment("/tmp/b")

    shared = {name for name, value in first.items() if second[name] == value}

    assert not {name for name in shared if "PORT" in name or "_SOCKET" in name or "_LOC" in name or "_STATE" in name}
    assert shared >= node_environment().keys()


def test_what_the_user_has_set_wins_but_not_over_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_RETRIES", "7")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "8404")

    environment = private_environment("/tmp/a")

    assert environment["RAY_SERVE_HAPROXY_RETRIES"] == "7"
    assert environment["RAY_SERVE_HAPROXY_STATS_PORT"] != "8404"


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        with pytest.raises(
            ClusterError, match=f"port {port} of 127.0.0.1 is taken by .*process [0-9]+.; choose another with --port"
        ):
            refuse_taken("127.0.0.1", port)

    refuse_taken("127.0.0.1", port)


def test_free_ports_are_free_and_outside_what_the_system_gives_away() -> None:
    first = free_ports(5)

    assert first >= 20_000 and first + 5 <= 30_000
    assert not any(port_holder("", port) for port in range(first, first + 5))


@pytest.mark.parametrize(
    ("store", "in_job", "expected"),
    [
        ("runs", False, "{cwd}/runs"),
        ("runs", True, "{home}/runs"),
        ("/data/runs", True, "/data/runs"),
        ("s3://bucket/runs", True, "s3://bucket/runs"),
        ("~/runs", False, os.path.expanduser("~/runs")),
    ],
)
def test_inside_a_job_a_relative_store_is_under_heliostat_home(
    store: str, in_job: bool, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path / "home"))
    if in_job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")

    assert store_path(store) == expected.format(cwd=tmp_path, home=tmp_path / "home")


def test_the_token_is_readable_for_its_owner_alone_and_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert not has_token()

    make_token()
    written = (tmp_path / ".ray" / "auth_token").read_text()
    make_token()

    assert has_token() and len(written) == 64
    assert (tmp_path / ".ray" / "auth_token").read_text() == written
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / ".ray").iterdir()] == ["auth_token"]


def test_what_a_killed_session_left_is_swept_and_a_living_one_is_not(tmp_path: Path) -> None:
    dead, living, spilled = tmp_path / "hs-dead", tmp_path / "hs-living", tmp_path / "ray" / "ray_spilled_objects_1"
    for folder in (dead, living, spilled):
        folder.mkdir(parents=True)
    (dead / OWNER).touch()
    (dead / RAY_FOLDER).write_text(str(spilled.parent))
    tail = shutil.which("tail")
    assert tail is not None
    shutil.copy(tail, tmp_path / "haproxy")
    left = subprocess.Popen([tmp_path / "haproxy", "-f", str(dead / OWNER)], stdout=subprocess.DEVNULL)
    wait_for_name(left.pid, "haproxy")

    try:
        with owned(living):
            sweep(tmp_path)

        assert not psutil.pid_exists(left.pid)
        assert not dead.exists() and living.exists()
        assert spilled.parent.exists() and not spilled.exists()
    finally:
        left.kill()


def wait_for_name(pid: int, name: str) -> None:
    while psutil.Process(pid).name() != name:
        time.sleep(0.01)
