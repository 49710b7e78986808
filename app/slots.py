"""Which CPU slots of the Ray are free, and who holds the others?"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Final

from pipelines.errors import ClusterError

TASKS: Final = "running tasks"
SETTLE_S: Final = 10.0
"""How long to wait for tasks that may have ended already."""


@dataclass(frozen=True)
class Slots:
    """The CPU slots of all nodes at one moment."""

    total: float
    free: float
    holders: dict[str, float]
    """Who holds how many of the others, e.g. {"serve app 'flights'": 1.0}; the most first."""

    def for_workers(self) -> int:
        """Answer how many workers `workers: auto` means: the free slots less one, which Ray Data needs; at least one.

        With a single free slot the one worker must take a fraction of it, or Ray Data waits for ever.
        """
        if self.free < 1:
            raise ClusterError(
                f"no CPU slot is free: {self.total:g} in all, held by {self.described()}; "
                "stop one of these (a served model: heliostat serve --stop NAME), or use a larger Ray"
            )
        return max(1, int(self.free) - 1)

    def described(self) -> str:
        """Say who holds slots, in one line."""
        return ", ".join(f"{name} ({number:g})" for name, number in self.holders.items()) or "nobody that Ray knows"


def free_slots() -> Slots:
    """Ask the Ray that this process is connected to; needs no dashboard.

    Nodes report what their tasks have given back up to a second late, and later when they are busy: slots that only tasks seem to
    hold are looked at again for `SETTLE_S`.
    """
    deadline = time.monotonic() + SETTLE_S
    while TASKS in (found := _look()).holders and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _look() -> Slots:
    import ray

    total = float(ray.cluster_resources().get("CPU", 0.0))
    free = float(ray.available_resources().get("CPU", 0.0))
    holders = _actors() | _placement_groups()
    known = sum(holders.values())
    # Tasks come and go, and Ray keeps no table of them outside the dashboard: they are what remains.
    if (rest := round(total - free - known, 3)) > 0:
        holders[TASKS] = rest
    return Slots(total, min(free, total - known), dict(sorted(holders.items(), key=lambda held: -held[1])))


def _actors() -> dict[str, float]:
    """CPU slots by living actors, except those inside a placement group, which the group already counts."""
    # `ray.util.state.list_actors` asks the dashboard; this is the table in the GCS from which that answer is made.
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData

    counted: dict[str, float] = defaultdict(float)
    for row in state._connect_and_get_accessor().get_actor_table(None, "ALIVE"):
        actor = ActorTableData.FromString(row)
        slots = actor.required_resources.get("CPU", 0.0)
        if slots > 0 and not actor.placement_group_id.strip(b"\xff"):
            counted[_name(actor)] += slots
    return counted


def _name(actor: Any) -> str:
    kind, _, rest = str(actor.class_name).partition(":")
    if kind == "ServeReplica":
        return f"serve app '{rest.split(':')[0]}'"
    return f"actor {actor.class_name} of job {actor.job_id.hex()}"


def _placement_groups() -> dict[str, float]:
    """CPU slots reserved by placement groups, such as the worker groups of Ray Train."""
    from ray.util import placement_group_table

    counted: dict[str, float] = defaultdict(float)
    for group in placement_group_table().values():
        slots = sum(bundle.get("CPU", 0.0) for bundle in group["bundles"].values())
        if slots > 0 and group["state"] == "CREATED":
            counted[f"worker group {group['name'] or group['placement_group_id']}"] += slots
    return counted
