"""plan on a Ray that runs: each of its nodes is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from app.machines import machines
from app.session import Session
from tests.local.conftest import wait_for


def test_every_node_says_what_it_has_and_what_it_cannot_reach(session: Session, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    wait_for(
        lambda: ray.available_resources().get("CPU") == 4, "free slots"
    )  # what the test before had may still be on its way back
    with machines(session.address) as cluster:
        [found] = cluster.machines(str(tmp_path / "runs"), [str(tmp_path), gone])

    assert found.slots == 4 and found.memory > 100 << 20
    assert found.unreachable == {gone: "it does not exist there"}
    assert cluster.free == pytest.approx(4)
