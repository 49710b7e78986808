"""One Ray for all tests of this folder, started as a user's private one is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from app.session import Session, open_session


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    with open_session("local", slots=4, object_store_mb=200) as session:
        yield session
