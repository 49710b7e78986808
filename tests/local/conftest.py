"""One Ray for all tests of this folder, started as a user's private one is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.session import Session, open_session

PATIENCE_S = 500
"""How long a command of some seconds is waited for: a machine with other work is no failure."""

FIRST = ("test_session.py", "test_plan.py")
"""They look at the shared Ray itself; what the others did to it may take a while to go."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=lambda item: (item.path.is_relative_to(here), item.path.name not in FIRST))


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        # Workers have the environment of the time when Ray started: what the S3 server of test_s3.py takes.
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with open_session("local", slots=4, object_store_mb=200) as session:
            yield session


@pytest.fixture(autouse=True)
def no_command_outlives_its_test() -> Iterator[None]:
    """A command that a failed test leaves would take the processors from the tests after it."""
    yield
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if child.cmdline()[1:3] == ["-m", "app"]:
                child.kill()


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)
