"""Bring models up on the Ray that this process is connected to, take them down, and say how they stand."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ray
import ray.serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, LoggingConfig, ServeInstanceDetails

from pipelines.errors import ClusterError, SpecError, did_you_mean
from serve import auth
from serve.deployment import ReplicaConfig, model_application, root_application
from serve.directory import ROOT, standings
from serve.overview import Standing
from serve.spec import ServeSpec

_POLL_S: Final = 0.1


@dataclass(frozen=True)
class Server:
    """Where the models answer."""

    url: str
    local_url: str
    """The same, as this machine reaches it."""
    haproxy: bool
    """Through HAProxy; else through Serve's own proxy, which takes about ten times as long for a small request."""


@dataclass(frozen=True)
class Status:
    """What runs on a Ray."""

    server: Server | None
    """None: Serve does not run there."""
    models: list[Standing]


def serve_runs(
    artifacts: Sequence[tuple[str, str, ServeSpec]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    wait_s: float = 60.0,
) -> Server:
    """Deploy models, each given as (name, path or URI of its Artifact, Spec), and return once all of them answer over HTTP.

    Models that run already stay; one of the same name takes over its new Artifact without a restart. Serve has one address for
    each Ray: where it runs already, that address stays. Raises `ClusterError` when a model does not get ready in time, and takes
    down again what was not there before.
    """
    specs = {name: spec for name, _, spec in artifacts}
    server = _start(host, port)
    before = set(ray.serve.status().applications)
    targets = [_target(name, artifact, spec, token) for name, artifact, spec in artifacts]
    if ROOT not in before:
        targets.append(ray.serve.RunTarget(root_application(), name=ROOT, route_prefix="/"))
    ray.serve.run_many(targets, wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)
    try:
        deadline = time.monotonic() + wait_s
        _wait_until_running([target.name for target in targets], specs, deadline)
        _wait_until_reached(server, list(specs), deadline)
    except BaseException:
        _delete([target.name for target in targets if target.name not in before])
        raise
    return server


def stop(name: str | None = None) -> list[str]:
    """Take one model down, or all of them and Serve with them; return the names of those that are gone.

    Requests in flight are answered first, so it takes as long as the slowest of them and Serve's draining period.
    """
    running = [standing.name for standing in standings()]
    if name is None or running == [name]:
        ray.serve.shutdown()
        return running
    if name not in running:
        raise ClusterError(f"no model '{name}' is served here{did_you_mean(name, running)}")
    _delete([name], wait=True)
    return [name]


def status() -> Status:
    """Say what is served on this Ray, and where."""
    details = _details()
    return Status(None, []) if details is None else Status(_server(details), standings())


def _start(host: str, port: int) -> Server:
    """Start Serve, unless it runs."""
    if _details() is None:
        if _on_head_node() and (holder := port_holder(host, port)):
            raise ClusterError(f"port {port} of {host} is taken by {holder}; choose another one with --port, or end that program")
        alone = host in ("127.0.0.1", "::1", "localhost")  # then an entry on another node could be reached by nobody
        try:
            ray.serve.start(
                http_options=HTTPOptions(host=host, port=port),
                proxy_location=ProxyLocation.HeadOnly if alone else ProxyLocation.EveryNode,
                logging_config=LoggingConfig(enable_access_log=False),
            )
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise ClusterError(f"Serve cannot answer at {host}:{port}: {_last_line(str(error))}") from error
    details = _details()
    assert details is not None, "Serve has just been started"
    return _server(details)


def _details() -> ServeInstanceDetails | None:
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else ServeInstanceDetails.model_validate(client.get_serve_details())


def _server(details: ServeInstanceDetails) -> Server:
    options = details.http_options
    assert options is not None, "Serve always runs with an HTTP address here"
    anywhere = options.host in ("0.0.0.0", "::")
    # Both kinds of entry have actors of one name; only the class tells them apart.
    entries = [ray.get_actor(proxy.actor_name, namespace="serve") for proxy in details.proxies.values() if proxy.actor_name]
    return Server(
        url=f"http://{_in_url(socket.gethostname() if anywhere else options.host)}:{options.port}",
        local_url=f"http://{_in_url('127.0.0.1' if anywhere else options.host)}:{options.port}",
        haproxy=any("HAProxy" in repr(entry) for entry in entries),
    )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _target(name: str, artifact: str, spec: ServeSpec, token: str | None) -> ray.serve.RunTarget:
    if spec.auth == "token" and token is None:
        raise SpecError(f"{name}: serve.auth is 'token', but there is no token; set {auth.VARIABLE}, or serve.auth=none")
    tokens = auth.digests({"token": token}) if spec.auth == "token" and token is not None else {}
    where = artifact if "://" in artifact else os.path.abspath(artifact)
    config = ReplicaConfig(artifact=where, limits=spec.limits, tokens=tokens)
    return ray.serve.RunTarget(model_application(name, spec, config), name=name, route_prefix=f"/v2/models/{name}")


def _wait_until_running(names: Sequence[str], specs: Mapping[str, ServeSpec], deadline: float) -> None:
    while True:
        applications = ray.serve.status().applications
        for name in names:
            application = applications.get(name)
            if application is not None and application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
                raise ClusterError(f"'{name}' cannot be served: {_last_line(max(messages, key=len))}")
        waiting = [name for name in names if name not in applications or applications[name].status != ApplicationStatus.RUNNING]
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise ClusterError(f"'{waiting[0]}' did not get ready in time: {_what_it_waits_for(waiting[0], specs)}")
        time.sleep(_POLL_S)


def _what_it_waits_for(name: str, specs: Mapping[str, ServeSpec]) -> str:
    free = {node: resources.get("CPU", 0.0) for node, resources in ray._private.state.available_resources_per_node().items()}
    need = specs[name].cpus if name in specs else 0.0
    if max(free.values(), default=0.0) < need:
        total = ray.cluster_resources().get("CPU", 0.0)
        return (
            f"a replica needs {need:g} CPU slots, and {sum(free.values()):g} of {total:g} are free; "
            "lower serve.cpus or serve.replicas.min, or end what holds the slots"
        )
    deployments = ray.serve.status().applications[name].deployments.values()
    return _last_line(" ".join(deployment.message for deployment in deployments)) or "its replicas are still starting"


def _wait_until_reached(server: Server, names: Sequence[str], deadline: float) -> None:
    """Wait until the way from the address to the replicas is open, which is a moment after they run."""
    if not _on_head_node():
        return
    for name in names:
        while not _answers(f"{server.local_url}/v2/models/{name}/ready"):
            if time.monotonic() > deadline:
                raise ClusterError(f"'{name}' runs, but {server.url} does not lead to it; see the logs of Ray Serve")
            time.sleep(_POLL_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 401  # said by a replica, and only by one
    except OSError:
        return False


def _last_line(message: str) -> str:
    """The sentence at the end of a traceback of tracebacks, without the names of exceptions; else the message on one line."""
    lines = [line.strip() for line in message.replace("\\n", "\n").splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := re.match(r"[\w.]*(?:Error|Exception): (.+)", line))]
    return errors[-1] if errors else " ".join(lines)


def _delete(names: Sequence[str], *, wait: bool = False) -> None:
    for name in names:
        ray.serve.delete(name, _blocking=wait)


def _on_head_node() -> bool:
    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and "node:__internal_head__" in node["Resources"] for node in ray.nodes())


def port_holder(host: str, port: int) -> str | None:
    """Return who listens at a port of this machine, or None when it is free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            return "the system, which keeps it for administrators"
        except OSError:
            return _process_at(port) or "another program"
        return None


def _process_at(port: int) -> str | None:
    """The name and id of the process that listens at a port, as far as Linux shows it to this user."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            sockets |= {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(descriptor) in sockets for descriptor in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return None
