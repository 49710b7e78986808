"""Which Ray does a command run on? The only place that starts, joins and leaves Ray and sets up its logging."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.address import check_reachable, locate, one_line
from app.environment import (
    has_token,
    make_token,
    node_environment,
    private_environment,
    set_environment,
    surroundings_kept,
    train_environment,
    unless_set,
)
from app.ports import refuse_taken
from app.processes import RAY_FOLDER, TIMEOUT_S, end, end_threads, exit_when_terminated, owned, ray_processes, signals_held, sweep
from app.slots import Slots, free_slots
from pipelines.errors import ClusterError

__all__ = ["Session", "node_environment", "open_session", "store_path"]

FOLDERS = Path("/tmp")
DATA_LOGGING = "ray-data-logging.yaml"
_DATA_LOGGING = {  # Ray Data's own configuration without its handler for the terminal
    "version": 1,
    "formatters": {"ray": {"format": "%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s -- %(message)s"}},
    "handlers": {
        "file": {"class": "ray.data._internal.logging.SessionFileHandler", "formatter": "ray", "filename": "ray-data.log"}
    },
    "loggers": {"ray.data": {"level": "DEBUG", "handlers": ["file"], "propagate": False}},
}


@dataclass(frozen=True)
class Session:
    """The Ray that this process is connected to."""

    address: str
    """HOST:PORT by which another process on the same machine can join it."""
    private: bool
    """It was started by this process and ends with it."""
    log_dir: str
    """Where Ray writes its logs on this machine; they stay when the session ends."""
    haproxy: bool
    """Whether Ray Serve answers through HAProxy, which is fixed when a Ray starts; else through its own, slower proxy."""

    def slots(self) -> Slots:
        """Ask which CPU slots are free now, and who holds the others."""
        return free_slots()


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
    Import `ray.serve` inside the session: it reads its environment when it is imported.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(surroundings_kept())
        import ray

        if ray.is_initialized():
            yield _describe(private=False)
            return
        wanted = address or os.environ.get("RAY_ADDRESS") or "local"
        sweep(FOLDERS)
        if wanted == "local" and serve_port is not None:
            refuse_taken(host, serve_port)
        folder = stack.enter_context(_own_folder())
        session = stack.enter_context(_private(folder, slots, object_store_mb) if wanted == "local" else _joined(folder, wanted))
        exit_when_terminated()
        yield session


def private_slots() -> int:
    """How many slots a private Ray has here, where nothing else is said: one per core that this process may use, at least two."""
    from ray._private.utils import get_num_cpus

    return max(2, int(get_num_cpus()))


def store_path(store: str) -> str:
    """Return where a run store is: inside a Ray job a relative path is taken under HELIOSTAT_HOME (default ~/heliostat).

    A job runs in a copy of the folder that it was submitted from, and Ray deletes the copy with the job.
    """
    if "://" in store:
        return store
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set by Ray for the command of a job, and for nothing else
    base = os.environ.get("HELIOSTAT_HOME", "~/heliostat") if in_job else "."
    return os.path.abspath(os.path.join(os.path.expanduser(base), os.path.expanduser(store)))


@contextlib.contextmanager
def _private(folder: Path, slots: int | None, object_store_mb: int | None) -> Iterator[Session]:
    """Start a Ray on 127.0.0.1 alone, and end it.

    With Ray 2.60 on 2 cores `ray.init` took 2.6 to 3.5 s and `ray.shutdown` 1.1 to 1.3 s; without the three processes that
    `_lean_start` leaves out 1.6 s and 0.1 to 0.3 s. What remains is 1.0 s for the node's two agents and 0.5 s for connecting. A
    worker takes 0.45 s of CPU to start (`import ray`), 0.5 s more for its first task of Ray Data; one a slot is started ahead.
    """
    import ray
    from ray._common.utils import get_system_memory

    set_environment(private_environment(str(folder)) | _quiet_environment(folder), loopback=True)
    if os.environ["RAY_AUTH_MODE"] == "token" and not has_token():
        make_token()
    before = threading.enumerate()
    try:
        with _lean_start():
            ray.init(
                address="local",
                num_cpus=slots or private_slots(),
                object_store_memory=(object_store_mb or max(1024, get_system_memory() // 10 >> 20)) << 20,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        before = threading.enumerate()  # with Ray's own threads
        session = _describe(private=True)
        (folder / RAY_FOLDER).write_text(str(Path(session.log_dir).parent))
        yield session
    finally:
        with signals_held():
            end_threads(before)
            processes = ray_processes()
            wait_s = TIMEOUT_S if ray.is_initialized() else 0.0  # Ray ends nothing that it has not finished starting
            ray.shutdown()
            end(processes, folder, wait_s=wait_s)


@contextlib.contextmanager
def _lean_start() -> Iterator[None]:
    """Keep `ray.init` from starting three processes that a private Ray has no work for and cannot be told to leave out.

    The API server (there is no dashboard), the autoscaler's monitor (one node) and the log monitor (`log_to_driver` is off). A
    later Ray that calls these methods otherwise starts all three: two seconds more, 280 MB, and nothing breaks. On the way the
    agent gets a port of its own: Ray gives all agents of a machine the same, and all but the first try for it for 4 s, in vain.
    """
    from ray._private.node import Node

    def no_api_server(self: Any, **_: Any) -> None:
        self._webui_url = ""
        self._ray_params.dashboard_agent_listen_port = 0

    replaced = {"start_api_server": no_api_server, "start_monitor": lambda self: None, "start_log_monitor": lambda self: None}
    originals = {name: getattr(Node, name) for name in replaced if hasattr(Node, name)}
    for name in originals:
        setattr(Node, name, replaced[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(Node, name, original)


@contextlib.contextmanager
def _joined(folder: Path, address: str) -> Iterator[Session]:
    import ray

    location = locate(address)
    mode = {"RAY_AUTH_MODE": "token"} if has_token() else {}
    environment = unless_set(train_environment() | mode) | _quiet_environment(folder)
    set_environment(environment, loopback=location.startswith(("127.", "localhost:", "[::1]:")))
    check_reachable(location)
    before = threading.enumerate()
    try:
        try:
            ray.init(address=location, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterError(f"the Ray at {location} cannot be joined: {one_line(error)}") from error
        before = threading.enumerate()  # with Ray's own threads
        _take_node_environment()
        yield _describe(private=False)
    finally:
        with signals_held():
            end_threads(before)
            ray.shutdown()


def _take_node_environment() -> None:
    """Let this process see Ray Serve as the head node does: it is the head's environment that decides."""
    import ray

    def look() -> dict[str, str]:  # defined here, so that it travels whole: the node may not have this package
        import os

        return {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}

    on_head = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(look)
    for name in [name for name in os.environ if name.startswith("RAY_SERVE_")]:
        del os.environ[name]
    on_the_head: dict[str, str] = ray.get(on_head.remote())
    os.environ.update(on_the_head)


def _describe(*, private: bool) -> Session:
    import ray
    from ray._private.worker import global_worker

    node = global_worker.node
    assert node is not None, "this process is connected to a Ray"
    return Session(
        address=ray.get_runtime_context().gcs_address,
        private=private,
        log_dir=str(node.get_logs_dir_path()),
        haproxy=os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1",
    )


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """Make the session's own folder.

    A short path: below it Ray puts unix sockets behind 56 characters of a node's id, and the system allows 107 in all.
    Only its owner may enter: HAProxy's admin socket lies in it, open to whoever reaches it.
    """
    folder = Path(tempfile.mkdtemp(prefix="hs-", dir=FOLDERS))
    try:
        (folder / DATA_LOGGING).write_text(json.dumps(_DATA_LOGGING))  # JSON is YAML
        with owned(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _quiet_environment(folder: Path) -> dict[str, str]:
    return {"RAY_DATA_LOGGING_CONFIG": str(folder / DATA_LOGGING), "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
