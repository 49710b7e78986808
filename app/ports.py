"""Which ports of this machine are free?"""

from __future__ import annotations

import random

from pipelines.errors import ClusterError
from serve.port import port_holder

# Below what Linux (from 32768) and macOS (from 49152) give to outgoing connections, which would take one between choice and use.
FIRST, LAST = 20_000, 30_000


def free_ports(count: int) -> int:
    """Return the first of `count` free ports in a row."""
    for _ in range(100):
        first = random.SystemRandom().randrange(FIRST, LAST - count)
        if not any(port_holder("", port) for port in range(first, first + count)):
            return first
    raise ClusterError(f"no {count} free ports in a row between {FIRST} and {LAST}, which Ray Serve needs; end what holds them")


def refuse_taken(host: str, port: int) -> None:
    """Raise ClusterError when another program listens there."""
    if holder := port_holder(host, port):
        raise ClusterError(f"port {port} of {host} is taken by {holder}; choose another with --port")
