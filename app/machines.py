"""Which machines would a command run on? Those of the Ray that it joins, or this one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from app.opening import joins, open_ray
from app.session import private_slots

if TYPE_CHECKING:
    from pipelines.plan import Cluster, Machine


@contextlib.contextmanager
def machines(address: str | None) -> Iterator[Cluster]:
    """Look at the Ray at `address`; without one at this machine, where nothing is started."""
    from pipelines.plan import Cluster

    if joins(address):
        with open_ray(address):
            import ray

            from app.slots import free_slots

            yield Cluster(free_slots().free, ray.cluster_resources().get("GPU", 0.0), _of_ray)
    else:
        slots = float(private_slots())
        yield Cluster(slots, 0.0, lambda store, sources: [_here(slots, store, sources)])


def _here(slots: float, store: str, sources: list[str]) -> Machine:
    import socket

    import psutil

    from pipelines.plan import Machine, reach

    return Machine(socket.gethostname(), slots, psutil.virtual_memory().available, reach(store, sources))


def _of_ray(store: str, sources: list[str]) -> list[Machine]:
    """Ask every node, each in a task of its own."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0)(_here)
    asked: list[Any] = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            node["Resources"].get("CPU", 0.0), store, sources
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    found: list[Machine] = ray.get(asked, timeout=60)
    return found
