"""How do LightGBM's ranks find each other? Over ports that are chosen at the last moment and connections that notice a cut."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pipelines.training.worker import Worker

TIME_OUT_MINUTES: Final = 30
"""How long LightGBM waits for the next byte of a peer that lives; the peer may be storing a checkpoint."""
CONNECTS_S: Final = 180.0
"""How long LightGBM tries to connect: 20 times, with longer and longer pauses."""


def _options() -> list[tuple[int, int, int]]:
    """Probe after 5 s of silence, every 5 s, three times; give up what is sent but not confirmed for 20 s."""
    named = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}  # some are Linux's alone
    ours = [(socket.IPPROTO_TCP, int(getattr(socket, name)), value) for name, value in named.items() if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *ours]


OPTIONS: Final = _options()


def lightgbm_network(worker: Worker) -> dict[str, Any]:
    """Agree on a port for each rank and return LightGBM's parameters of the network.

    Every rank holds its port until all have told theirs, so no two ranks of a machine get the same. LightGBM cannot take over a
    socket that is bound, so between here and its own bind, some milliseconds, another process may take the port; LightGBM then
    says `Binding port N failed`, and the group starts again with other ports.
    """
    from ray.util import get_node_ip_address

    with socket.socket() as held:
        held.bind(("", 0))
        own = held.getsockname()[1]
        places = worker.gather(f"network-{worker.networks}", (get_node_ip_address(), own))
    threading.Thread(
        target=notice_cuts, args=({port for _, port in places}, worker.size - 1), name="heliostat-network", daemon=True
    ).start()
    return {
        "machines": ",".join(f"{ip}:{port}" for ip, port in places),
        "num_machines": worker.size,
        "local_listen_port": own,
        "time_out": TIME_OUT_MINUTES,
    }


def notice_cuts(ports: set[int], peers: int, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Let the kernel probe LightGBM's connections, as soon as they are there: a cut one then fails after 20 s.

    LightGBM sets no such option, so that a rank whose peer is cut off waits for its `time_out`. The kernel answers probes for a
    process that is busy or stopped.
    """
    deadline = time.monotonic() + CONNECTS_S
    while time.monotonic() < deadline and _probe(ports) < peers:
        sleep(0.2)


def _probe(ports: set[int]) -> int:
    """Set the options on every connection of this process from or to one of these ports; return how many there are."""
    found = 0
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError):  # no socket, not connected, or closed by now
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family != socket.AF_INET or connection.type != socket.SOCK_STREAM:
                    continue
                if {connection.getsockname()[1], connection.getpeername()[1]} & ports:
                    for level, option, value in OPTIONS:
                        connection.setsockopt(level, option, value)
                    found += 1
    return found
