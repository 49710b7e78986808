"""Which ports of this machine are free?"""

from __future__ import annotations

import random
import socket

from pipelines.errors import ClusterError

# Below what Linux (from 32768) and macOS (from 49152) give to outgoing connections, which would take one between choice and use.
FIRST, LAST = 20_000, 30_000


def free_ports(count: int) -> int:
    """Return the first of `count` free ports in a row."""
    for _ in range(100):
        first = random.SystemRandom().randrange(FIRST, LAST - count)
        if all(is_free("", port) for port in range(first, first + count)):
            return first
    raise ClusterError(f"no {count} free ports in a row between {FIRST} and {LAST}, which Ray Serve needs; end what holds them")


def is_free(host: str, port: int) -> bool:
    """Say whether a server could listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def refuse_taken(host: str, port: int) -> None:
    """Raise ClusterError when another program listens there."""
    if not is_free(host, port):
        raise ClusterError(f"port {port} of {host} is taken by another program; choose another with --port")
