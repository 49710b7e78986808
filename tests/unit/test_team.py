"""How a fit is spread out: `auto` becomes numbers, once."""

from __future__ import annotations

import pytest

from pipelines.errors import DataError
from pipelines.spec import TrainSpec
from pipelines.training.trainer import Team


@pytest.mark.parametrize(
    ("spec", "free", "gpus", "team"),
    [
        ({}, 2, 0, Team(workers=1, cpus=1.0, threads=2, gpu=False)),  # one slot stays free, its thread is used
        ({}, 4, 0, Team(workers=3, cpus=1.0, threads=1, gpu=False)),
        ({}, 1, 0, Team(workers=1, cpus=1.0, threads=1, gpu=False)),
        ({"workers": 2}, 2, 0, Team(workers=2, cpus=1.0, threads=1, gpu=False)),
        ({"workers": 4}, 2, 0, Team(workers=4, cpus=0.5, threads=1, gpu=False)),
        ({"workers": 2, "cpus_per_worker": 4.0}, 16, 0, Team(workers=2, cpus=4.0, threads=4, gpu=False)),
        ({"workers": 2}, 8, 2, Team(workers=2, cpus=1.0, threads=4, gpu=True)),
        ({"workers": 2}, 8, 1, Team(workers=2, cpus=1.0, threads=4, gpu=False)),
        ({"workers": 2, "gpu": False}, 8, 2, Team(workers=2, cpus=1.0, threads=4, gpu=False)),
        ({"workers": {"max": 4}}, 2, 0, Team(workers=4, cpus=1.0, threads=1, gpu=False, least=1)),  # whole slots: it may wait
        ({"workers": {"min": 2, "max": 4}}, 8, 2, Team(workers=4, cpus=1.0, threads=2, gpu=True, least=2)),
    ],
)
def test_auto_becomes_numbers(spec: dict[str, object], free: float, gpus: float, team: Team) -> None:
    assert Team.plan(TrainSpec(**spec), free, gpus, rows=1000) == team


def test_more_workers_than_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"train\.workers: 5 workers cannot share 3 train rows"):
        Team.plan(TrainSpec(workers=5), 8, 0, rows=3)
    with pytest.raises(DataError, match=r"train\.workers: 5 workers cannot share 3 train rows"):
        Team.plan(TrainSpec(workers={"min": 5, "max": 6}), 8, 0, rows=3)
    assert Team.plan(TrainSpec(), 8, 0, rows=3).workers == 3
    assert Team.plan(TrainSpec(workers={"max": 5}), 8, 0, rows=3).sizes == [1, 3]
