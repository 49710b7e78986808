"""Bring models up on the Ray that this process is connected to, take them down, and say how they stand."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import ray.serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig, ServeInstanceDetails

from pipelines.artifact import Artifact
from pipelines.errors import ClusterError, SpecError, did_you_mean
from serve import auth
from serve.deployment import ReplicaConfig, model_application, root_application
from serve.directory import ROOT, standings
from serve.overview import Standing
from serve.port import port_holder
from serve.spec import ServeSpec
from serve.waiting import last_line, wait_until_reached, wait_until_running


@dataclass(frozen=True)
class Server:
    """Where the models answer."""

    host: str
    """The address that it listens on."""
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

    Models that run already stay; one of the same name takes over its new Artifact without a restart, unless `cpus` changed.
    Serve has one address for each Ray: where it runs already, that address stays. Raises `ArtifactError` before anything is
    touched, and `ClusterError` when a model does not get ready in time; what was not there before is then taken down again.
    """
    _quiet()
    targets = [_target(name, artifact, spec, token) for name, artifact, spec in artifacts]
    server = _start(host, port)
    before = set(ray.serve.status().applications)
    if ROOT not in before:
        targets.append(ray.serve.RunTarget(root_application(), name=ROOT, route_prefix="/"))
    deadline = time.monotonic() + wait_s
    try:
        ray.serve.run_many(targets, wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)
        wait_until_running({ROOT: 0.0} | {name: spec.cpus for name, _, spec in artifacts}, deadline=deadline)
        if _on_head_node():  # where the address is
            for name, _, _ in artifacts:
                wait_until_reached(name, server.local_url, deadline=deadline)
    except BaseException:
        _delete([target.name for target in targets if target.name not in before], wait=False)
        raise
    return server


def stop(name: str | None = None) -> list[str]:
    """Take one model down, or all of them and Serve with them; return the names of those that are gone.

    Requests in flight are answered first, so it takes as long as the slowest of them and Serve's draining period.
    """
    _quiet()
    running = [standing.name for standing in standings()]
    if name is not None and name not in running:
        raise ClusterError(f"no model '{name}' is served here{did_you_mean(name, running)}")
    if name is not None and running != [name]:
        _delete([name], wait=True)
        return [name]
    if set(ray.serve.status().applications) <= {ROOT, *running}:
        ray.serve.shutdown()
    else:  # applications of others run here too
        _delete([*running, ROOT], wait=True)
    return running


def status() -> Status:
    """Say what is served on this Ray, and where."""
    _quiet()
    details = _details()
    if details is None or ROOT not in details.applications:
        return Status(None, [])
    return Status(_server(details), standings())


def _quiet() -> None:
    """Keep Serve from telling each of its steps on the terminal, for which importing it has set this process up."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _target(name: str, artifact: str, spec: ServeSpec, token: str | None) -> ray.serve.RunTarget:
    if spec.auth == "token" and token is None:
        raise SpecError(f"{name}: serve.auth is 'token', but there is no token; set {auth.VARIABLE}, or serve.auth=none")
    tokens = auth.digests({"token": token}) if spec.auth == "token" and token is not None else {}
    location = artifact if "://" in artifact else os.path.abspath(artifact)
    Artifact.load(location)  # what cannot be loaded here is refused at once, not after the third try of a replica
    config = ReplicaConfig(artifact=location, limits=spec.limits, tokens=tokens)
    return ray.serve.RunTarget(model_application(name, spec, config), name=name, route_prefix=f"/v2/models/{name}")


def _start(host: str, port: int) -> Server:
    """Start Serve, unless it runs."""
    if fresh := _details() is None:
        if _on_head_node() and (holder := port_holder(host, port)):
            raise ClusterError(f"port {port} of {host} is taken by {holder}; choose another one with --port, or end that program")
        try:
            ray.serve.start(
                http_options=HTTPOptions(host=host, port=port),
                # An entry on another node could be reached by nobody if it listens on that node alone.
                proxy_location=ProxyLocation.HeadOnly if _is_loopback(host) else ProxyLocation.EveryNode,
                logging_config=LoggingConfig(enable_access_log=False),
            )
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise ClusterError(f"Serve cannot answer at {host}:{port}: {last_line(str(error))}") from error
    details = _details()
    assert details is not None, "Serve has just been started"
    server = _server(details)
    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if server.haproxy and len(nodes) > 1 and _is_loopback(server.host):
        if fresh:
            ray.serve.shutdown()
        raise ClusterError(
            f"Serve listens on {server.host}, where HAProxy cannot reach replicas on the other nodes of this Ray; "
            "give --host 0.0.0.0, or the address of the head node"
        )
    return server


def _details() -> ServeInstanceDetails | None:
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else ServeInstanceDetails.model_validate(client.get_serve_details())


def _server(details: ServeInstanceDetails) -> Server:
    options = details.http_options
    assert options is not None, "Serve always runs with an HTTP address here"
    anywhere = options.host in ("0.0.0.0", "::")
    return Server(
        host=options.host,
        url=f"http://{_in_url(socket.gethostname() if anywhere else options.host)}:{options.port}",
        local_url=f"http://{_in_url('127.0.0.1' if anywhere else options.host)}:{options.port}",
        haproxy=any(_is_haproxy(proxy.actor_name) for proxy in details.proxies.values()),
    )


def _is_haproxy(entry: str | None) -> bool:
    """Both kinds of entry have actors of one name; only the class tells them apart."""
    with contextlib.suppress(ValueError):  # it has just ended
        return entry is not None and "HAProxy" in repr(ray.get_actor(entry, namespace="serve"))
    return False


def _is_loopback(host: str) -> bool:
    return host in ("127.0.0.1", "::1", "localhost")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _delete(names: Sequence[str], *, wait: bool) -> None:
    for name in names:
        ray.serve.delete(name, _blocking=wait)


def _on_head_node() -> bool:
    here = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == here and "node:__internal_head__" in node["Resources"] for node in ray.nodes())
