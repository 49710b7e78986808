"""Where the ranks of one fit meet: each hands in a state and gets all of them, and what they report reaches the driver.

One actor without a slot, started by the driver. Ray Train's own collectives only broadcast from rank 0, and its `report` is a
barrier that costs up to seconds; a meeting here costs about two milliseconds and needs no port.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import ray


@dataclass
class Meeting:
    """What has been handed in under one key."""

    states: dict[int, Any] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    left: int = 0
    crossed: str | None = None
    """Why it will never be complete."""


@ray.remote(num_cpus=0, max_restarts=0)
class Rendezvous:
    """Asynchronous: a rank that waits for the others holds nothing up."""

    def __init__(self) -> None:
        self._meetings: dict[tuple[str, str], Meeting] = {}
        self._waiting: dict[str, dict[int, str]] = {}
        self._reports: list[dict[str, Any]] = []
        self._controller: Any = None
        self._stopping = False

    async def lead(self, controller: Any) -> None:
        """Say who leads the fit: Ray Train's controller, which only knows itself."""
        self._controller = controller
        if self._stopping:
            ray.kill(controller)

    async def stop(self) -> None:
        """End the fit as soon as its controller is known: the workers end with it, for it owns them."""
        self._stopping = True
        if self._controller is not None:
            ray.kill(self._controller)

    async def gather(self, attempt: str, key: str, rank: int, size: int, state: Any) -> list[Any]:
        """Return what every rank handed in under this key, in rank order, once all have.

        `attempt` tells one start of the worker group from the next, so that what a dead group left never counts. Raises
        `RuntimeError` on each rank when all of them wait, but not under one key: none would ever go on.
        """
        place = (attempt, key)
        meeting = self._meetings.setdefault(place, Meeting())
        meeting.states[rank] = state
        waiting = self._waiting.setdefault(attempt, {})
        waiting[rank] = key
        if len(meeting.states) == size:
            waiting.clear()
            meeting.complete.set()
        elif len(waiting) == size:
            self._cross(attempt, ", ".join(f"rank {r} under '{key}'" for r, key in sorted(waiting.items())))
        await meeting.complete.wait()
        if meeting.crossed is not None:
            raise RuntimeError(f"the ranks wait for one another for ever: {meeting.crossed}")
        meeting.left += 1
        if meeting.left == size:
            del self._meetings[place]
        return [meeting.states[r] for r in range(size)]

    def _cross(self, attempt: str, why: str) -> None:
        for (place, _), meeting in self._meetings.items():
            if place == attempt and not meeting.complete.is_set():
                meeting.crossed = why
                meeting.complete.set()

    async def report(self, entry: dict[str, Any]) -> None:
        """Leave a line for the driver."""
        self._reports.append(entry)

    async def drain(self) -> list[dict[str, Any]]:
        """Return what was reported since the last call, in order."""
        reports, self._reports = self._reports, []
        return reports
