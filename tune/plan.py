"""What would a search do? How many trials of what, how they share the cluster, and how often data is prepared for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.errors import ClusterError
from pipelines.plan import Cluster, Plan
from pipelines.train import parameters
from tune.layout import Layout, Room
from tune.space import count
from tune.spec import SearchedSpec, Space, axes


@dataclass(frozen=True)
class SearchPlan:
    """What `heliostat plan` tells of a search."""

    trials: int
    searcher: str
    scheduler: str
    knobs: int
    points: int | None
    """Of the grid; None for other searchers."""
    prepared: int | None
    """How often data is prepared at most; None: as often as there are trials."""
    layout: Layout | None
    """None: it cannot work."""
    copies: int
    """Bytes of all processes of trials that run at once, each with its own copy of the binned rows."""
    problems: list[str]


def plan_search(spec: SearchedSpec, cluster: Cluster, found: Plan) -> SearchPlan:
    """Plan the search of a Spec whose run was planned; reads nothing more."""
    tune = spec.tune
    assert tune is not None
    family, params = parameters(spec)
    rows = int(found.rows * (1 - spec.data.split.test - spec.data.split.valid))
    size = family.memory(params, rows, found.features, found.outputs)
    rooms = [Room(machine.slots, machine.memory) for machine in found.machines]
    gpus = cluster.gpus if family.uses_gpu(params) else 0
    layout, problems = None, []
    try:
        layout = Layout.plan(tune, spec.train, rooms, free=cluster.free, gpus=gpus, size=size)
    except ClusterError as error:
        problems.append(str(error))
    return SearchPlan(
        trials=tune.trials,
        searcher=tune.searcher,
        scheduler=tune.stopping,
        knobs=len({path for path, _, _ in axes(tune.space)}),
        points=count(tune.space) if tune.searcher == "grid" else None,
        prepared=_settings(tune.space),
        layout=layout,
        copies=layout.at_once * layout.workers * layout.memory if layout else 0,
        problems=problems,
    )


def _settings(space: Space) -> int | None:
    """How many settings of data and features a space has; None where a range among them makes that unknown."""
    data = [axis for path, axis, _ in axes(space) if not path.startswith("model.params")]
    if any(axis.choice is None for axis in data):
        return None
    return math.prod(len(axis.choice or []) for axis in data)
