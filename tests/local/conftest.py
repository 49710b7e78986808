"""One Ray for all tests of this folder, started as a user's private one is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from app.session import Session, open_session


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as patch:
        # Workers have the environment of the time when Ray started: what the S3 server of test_s3.py takes.
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with open_session("local", slots=4, object_store_mb=200) as session:
            yield session
