"""The section `serve` of a Spec, and the token that it asks for."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.errors import SpecError
from serve import auth
from serve.errors import RequestError
from serve.port import port_holder
from serve.spec import ServeSpec
from serve.waiting import last_line

TOKEN = "a-token-of-enough-length"


def test_defaults_are_those_of_the_documentation() -> None:
    spec = ServeSpec()

    assert spec.model_dump() == {
        "replicas": {"min": 1, "max": 4},
        "cpus": 0.5,
        "batch": "auto",
        "auth": "token",
        "limits": {"body_mb": 16, "rows": 10_000, "in_flight": 64, "timeout_s": 10},
    }
    assert spec.limits.body_bytes == 16 * 1024 * 1024


@pytest.mark.parametrize(
    "section",
    [
        {"replicas": {"min": 0}},
        {"replicas": {"min": 3, "max": 2}},
        {"cpus": 0},
        {"batch": "always"},
        {"auth": "basic"},
        {"limits": {"rows": 0}},
        {"limits": {"rows": "10"}},
        {"limits": {"in_flight": 0}},
        {"limits": {"timeout_s": 0}},
        {"limits": {"body_mb": -1}},
        {"limits": {"bodymb": 1}},
        {"replica": 1},
    ],
)
def test_what_cannot_be_served_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ServeSpec.model_validate(section)


def test_a_token_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(auth.VARIABLE, raising=False)

    token, path = auth.find_token(tmp_path / "new")
    again, _ = auth.find_token(tmp_path / "new")

    assert path is not None
    assert path.read_text() == token + "\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert again == token
    assert len(token) >= 32
    assert os.listdir(tmp_path / "new") == ["token"]


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auth.VARIABLE, TOKEN)

    assert auth.find_token(tmp_path) == (TOKEN, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", ["", "short", "with a space in it", "ümlaut-in-the-token", "line\nbreak-in-it"])
def test_a_token_no_header_can_carry_is_refused(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auth.VARIABLE, token)

    with pytest.raises(SpecError, match="HELIOSTAT_TOKEN.*expected at least 8 printable"):
        auth.find_token(tmp_path)


def test_a_token_others_can_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(auth.VARIABLE, raising=False)
    _, path = auth.find_token(tmp_path)
    assert path is not None
    path.chmod(0o644)

    with pytest.raises(SpecError, match="chmod 600"):
        auth.find_token(tmp_path)


@pytest.mark.parametrize(
    ("header", "passes"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer {TOKEN}", True),
        ("Basic " + base64.b64encode(f"anyone:{TOKEN}".encode()).decode(), True),
        (None, False),
        ("", False),
        (TOKEN, False),
        ("Bearer", False),
        ("Bearer ", False),
        (f"Bearer {TOKEN}x", False),
        ("Bearer \xff", False),
        ("Basic ###", False),
        ("Basic " + base64.b64encode(TOKEN.encode()).decode(), False),
    ],
)
def test_only_the_token_opens(header: str | None, passes: bool) -> None:
    accepted = auth.digests({"old": "another-token", "new": TOKEN})
    shown = None if header is None else header.encode("latin-1")

    assert auth.accepts(shown, accepted) is passes
    if not passes:
        with pytest.raises(RequestError) as refused:
            auth.require(shown, accepted)
        assert refused.value.status == 401
        assert TOKEN not in refused.value.body.decode()


def test_tokens_are_kept_as_digests_only() -> None:
    assert TOKEN not in str(auth.digests({"one": TOKEN}))


def test_the_holder_of_a_port_is_named() -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        named = port_holder("127.0.0.1", port)
    assert named is not None
    assert str(os.getpid()) in named or named == "another program"
    assert port_holder("127.0.0.1", port) is None


def test_an_error_of_a_replica_is_told_by_its_last_sentence() -> None:
    message = """The deployment failed to start 3 times in a row. Error:
\x1b[36mray::ServeReplica:x:model.initialize_and_get_metadata()\x1b[39m
  File "replica.py", line 1, in initialize
RuntimeError: Traceback (most recent call last):
  File "artifact.py", line 2, in load
pipelines.errors.ArtifactError: the artifact runs/x is damaged: model.txt is not what was written
"""
    assert last_line(message) == "the artifact runs/x is damaged: model.txt is not what was written"
    assert last_line("no error\n  in it") == "no error in it"
