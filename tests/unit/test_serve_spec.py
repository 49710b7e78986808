"""The section `serve` of a Spec, and the token that it asks for."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.errors import SpecError
from pipelines.schema import Column
from pipelines.tasks import Task
from serve import auth
from serve.compatible import breaks
from serve.config import KEPT, ReplicaConfig
from serve.errors import RequestError
from serve.port import port_holder
from serve.spec import ServeSpec
from serve.waiting import last_line

TOKEN = "a-token-of-enough-length"
TASK = Task(type="binary", target="y", target_type="bool", classes=[False, True])


def test_defaults_are_those_of_the_documentation() -> None:
    spec = ServeSpec()

    assert spec.model_dump() == {
        "replicas": {"min": 1, "max": 4, "look_back_s": 12, "up_after_s": 12, "down_after_s": 72},
        "cpus": 0.5,
        "batch": "auto",
        "auth": "token",
        "access_log": True,
        "limits": {"body_mb": 16, "rows": 10_000, "in_flight": 64, "timeout_s": 10},
    }
    assert spec.limits.body_bytes == 16 * 1024 * 1024


@pytest.mark.parametrize(
    "section",
    [
        {"replicas": {"min": 0}},
        {"replicas": {"min": 3, "max": 2}},
        {"replicas": {"up_after_s": 5}},
        {"replicas": {"down_after_s": 11}},
        {"replicas": {"look_back_s": 20}},
        {"replicas": {"look_back_s": 0.5}},
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

    tokens, path = auth.find_tokens(tmp_path / "new")
    again, _ = auth.find_tokens(tmp_path / "new")

    assert path is not None
    [token] = tokens.values()
    assert path.read_text() == token + "\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert again == tokens
    assert len(token) >= 32
    assert os.listdir(tmp_path / "new") == ["token"]


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auth.VARIABLE, TOKEN)

    assert auth.find_tokens(tmp_path) == ({"token": TOKEN}, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("token", ["", "short", "with a space in it", "ümlaut-in-the-token", "line\nbreak-in-it"])
def test_a_token_no_header_can_carry_is_refused(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auth.VARIABLE, token)

    with pytest.raises(SpecError, match="HELIOSTAT_TOKEN.*expected at least 8 printable"):
        auth.find_tokens(tmp_path)


def test_a_token_others_can_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(auth.VARIABLE, raising=False)
    _, path = auth.find_tokens(tmp_path)
    assert path is not None
    path.chmod(0o644)

    with pytest.raises(SpecError, match="chmod 600"):
        auth.find_tokens(tmp_path)


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


def test_a_file_may_name_several_tokens(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"# who may ask\n{TOKEN}\n\nshop  the-token-of-the-shop\n")
    path.chmod(0o600)

    assert auth.read_tokens(path) == {"token": TOKEN, "shop": "the-token-of-the-shop"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no token in it"),
        ("# nothing\n", "there is no token in it"),
        ("shop short", "line 1: the token is too short"),
        (f"shop {TOKEN}\nshop {TOKEN}2", "line 2: there are two tokens named 'shop'"),
        (f"the shop {TOKEN}", "line 1: there are 3 words; expected NAME TOKEN"),
    ],
)
def test_a_file_of_another_form_is_refused_by_its_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(0o600)

    with pytest.raises(SpecError, match=message) as refused:
        auth.read_tokens(path)
    assert TOKEN not in str(refused.value)


def test_the_token_that_is_shown_has_a_name() -> None:
    accepted = auth.digests({"shop": TOKEN, "desk": "another-token"})

    assert auth.require(f"Bearer {TOKEN}".encode(), accepted) == "shop"
    assert auth.require(b"Bearer another-token", accepted) == "desk"
    with pytest.raises(RequestError):
        auth.require(b"Bearer a-third-token", accepted)


# What was served before


def config(artifact: str, *, tokens: dict[str, str] | None = None, **spec: Any) -> ReplicaConfig:
    return ReplicaConfig(artifact=artifact, spec=ServeSpec.model_validate(spec), tokens=tokens or {"one": "digest"})


def test_what_is_rolled_back_is_what_was_served_before_with_the_tokens_of_today() -> None:
    second = config("a", limits={"rows": 5}).followed_by("b", ServeSpec(), {"two": "digest"})
    third = second.followed_by("c", ServeSpec(), second.tokens)

    assert third.rolled_back() == second
    first = third.rolled_back().rolled_back()
    assert (first.artifact, first.spec.limits.rows, first.tokens, first.history) == ("a", 5, {"two": "digest"}, [])


def test_the_history_is_bounded_and_other_tokens_are_no_version() -> None:
    now = config("0")
    for number in range(1, 100):
        now = now.followed_by(str(number), now.spec, now.tokens).with_tokens({"new": str(number)})

    assert [past.artifact for past in now.history] == [str(number) for number in range(99 - KEPT, 99)]


def test_no_token_opens_what_was_served_to_all_and_none_is_kept_for_it() -> None:
    was_open = config("a", auth="none", tokens={})
    assert was_open.followed_by("b", ServeSpec(), {"one": "digest"}).rolled_back().tokens == {}


# Which Artifacts can follow each other


def artifact_of(columns: list[Column], task: Task = TASK) -> Any:
    return SimpleNamespace(inputs=columns, task=task)


def column(name: str, type: Any = "int64", *, nullable: bool = True, text: Any = None) -> Column:
    return Column(name=name, type=type, kind="numeric", nullable=nullable, text=text)


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ([column("a")], [column("a")], None),
        ([column("a"), column("b")], [column("a")], None),
        ([column("a")], [column("a"), column("b")], None),
        ([column("a", nullable=False)], [column("a")], None),
        ([column("a", "int64")], [column("a", "float64")], None),
        ([column("a", "float64")], [column("a", "float64", text="number")], None),
        ([column("a")], [column("a"), column("b", nullable=False)], "column 'b' is required and was not read"),
        ([column("a")], [column("a", nullable=False)], "column 'a' is required and was optional"),
        ([column("a", "float64")], [column("a", "int64")], "column 'a' is integer and was number"),
        ([column("a", "string")], [column("a", "int64")], "column 'a' is integer and was string"),
        (
            [column("a", "float64", text="number")],
            [column("a", "float64")],
            "texts in the form number were accepted, and are now refused",
        ),
        ([column("a", "timestamp", text="D/M/Y")], [column("a", "timestamp", text="M/D/Y")], "and are now in the form M/D/Y"),
    ],
)
def test_what_clients_rely_on(old: list[Column], new: list[Column], difference: str | None) -> None:
    found = breaks(artifact_of(old), artifact_of(new))

    assert [difference in line for line in found] == [True] if difference else found == []


def test_another_task_or_other_classes_break_clients() -> None:
    value = Task(type="regression", target="y", target_type="float64")
    other = Task(type="binary", target="y", target_type="string", classes=["no", "yes"])

    assert breaks(artifact_of([]), artifact_of([], value)) == ["the task is regression and was binary"]
    assert breaks(artifact_of([]), artifact_of([], other)) == ["the classes are no, yes and were False, True"]
