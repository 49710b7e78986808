"""plan on a Ray that runs: each of its nodes is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.machines import machines
from app.session import Session


def test_every_node_says_what_it_has_and_what_it_cannot_reach(session: Session, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    with machines(session.address) as cluster:
        [found] = cluster.machines(str(tmp_path / "runs"), [str(tmp_path), gone])

    assert found.slots == 4 and found.memory > 100 << 20
    assert found.unreachable == {gone: "it does not exist there"}
    assert cluster.free == pytest.approx(4)
