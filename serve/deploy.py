"""Bring models up on the Ray that this process is connected to, take them down, and say how they stand."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
import ray.serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig, ServeInstanceDetails

from pipelines.artifact import Artifact
from pipelines.errors import ArtifactError, ClusterError, SpecError, did_you_mean
from serve import auth
from serve.compatible import breaks
from serve.config import ReplicaConfig
from serve.deployment import model_application, root_application
from serve.directory import ROOT, ask_card, configs, details, standings
from serve.overview import Standing
from serve.port import port_holder
from serve.spec import ServeSpec
from serve.waiting import last_line, wait_until_reached, wait_until_running, wait_until_settled


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
    tokens: Mapping[str, str] | None = None,
    force: bool = False,
    wait_s: float = 60.0,
) -> Server:
    """Deploy models, each given as (name, path or URI of its Artifact, Spec), and return once all of them answer over HTTP.

    Models that run already stay. One of the same name takes over its new Artifact without a restart, unless `cpus` changed, and
    keeps its tokens; `tokens`, by name, are for the others. Serve has one address for each Ray: where it runs already, that
    address stays. Raises `ArtifactError`, also for an Artifact that breaks what clients of the running one rely on unless
    `force`, before anything is touched, and `ClusterError` when a model does not get ready in time; what ran is then put back.
    """
    _quiet()
    running = configs()
    wanted = {}
    for name, artifact, spec in artifacts:
        location = artifact if "://" in artifact else os.path.abspath(artifact)
        new = Artifact.load(location)
        new.check()  # what fails here is refused at once, not after the third try of a replica
        before = running.get(name)
        if before is not None and not force and before.artifact != location:
            _refuse_breaks(name, before.artifact, new)
        accepted = _digests(name, spec, before, tokens)
        wanted[name] = (
            ReplicaConfig(artifact=location, spec=spec, tokens=accepted)
            if before is None
            else before.followed_by(location, spec, accepted)
        )
    server = _start(host, port)
    _tell(wanted, running, deadline=time.monotonic() + wait_s, url=server.local_url)
    return server


def roll_back(name: str, *, wait_s: float = 60.0) -> tuple[str, str]:
    """Put back what a model was served with before; return the ids of the run that answered and of the one that answers now."""
    _quiet()
    running = configs()
    if name not in running:
        raise ClusterError(f"no model '{name}' is served here{did_you_mean(name, running)}")
    now = running[name]
    if not now.history:
        raise ClusterError(f"'{name}' has no earlier version to go back to: {now.artifact} is the first that was served here")
    last = now.rolled_back()
    if last.spec.auth == "token" and not last.tokens:
        raise SpecError(f"{name}: {last.artifact} was served with tokens, and now there are none; serve it by its name instead")
    previous = Artifact.load(last.artifact)
    previous.check()
    card = ask_card(name)
    _tell({name: last}, running, deadline=time.monotonic() + wait_s)
    return card.version if card else now.artifact, previous.version


def change_tokens(tokens: Mapping[str, str], *, wait_s: float = 60.0) -> list[str]:
    """Let every running model that asks for tokens accept these, by name, and no others; return the names of the models."""
    _quiet()
    running = configs()
    asking = {name: config for name, config in running.items() if config.spec.auth == "token"}
    accepted = auth.digests(tokens)
    changed = {name: config.with_tokens(accepted) for name, config in asking.items() if config.tokens != accepted}
    _tell(changed, running, deadline=time.monotonic() + wait_s)
    return sorted(asking)


def _tell(
    wanted: Mapping[str, ReplicaConfig], running: Mapping[str, ReplicaConfig], *, deadline: float, url: str | None = None
) -> None:
    """Deploy, wait until all replicas of the wanted models have settled on it, and put back what ran where one does not."""
    before = set(ray.serve.status().applications)
    targets = [_target(name, config) for name, config in wanted.items()]
    if ROOT not in before:
        targets.append(ray.serve.RunTarget(root_application(), name=ROOT, route_prefix="/"))
    try:
        _run(targets)
        wait_until_running({ROOT: 0.0} | {name: config.spec.cpus for name, config in wanted.items()}, deadline=deadline)
        for name, config in wanted.items():
            wait_until_settled(name, config.digest, deadline=deadline)
        if url is not None and _on_head_node():  # where the address is
            for name in wanted:
                wait_until_reached(name, url, deadline=deadline)
    except BaseException:
        _delete([target.name for target in targets if target.name not in before], wait=False)
        _run([_target(name, running[name]) for name in wanted if name in running])
        raise


def _run(targets: Sequence[ray.serve.RunTarget]) -> None:
    if targets:
        ray.serve.run_many(list(targets), wait_for_applications_running=False, wait_for_ingress_deployment_creation=False)


def _target(name: str, config: ReplicaConfig) -> ray.serve.RunTarget:
    return ray.serve.RunTarget(model_application(name, config), name=name, route_prefix=f"/v2/models/{name}")


def _refuse_breaks(name: str, running: str, new: Artifact) -> None:
    """Raise `ArtifactError`, with a note for each difference, where clients of the running Artifact would be refused."""
    try:
        old = Artifact.load(running, model=False)
    except ArtifactError as error:
        raise ArtifactError(
            f"{name}: what runs cannot be compared with {new.version}: {error}; --force swaps all the same"
        ) from None
    if found := breaks(old, new):
        refusal = ArtifactError(
            f"{name}: {new.version} breaks what clients of {old.version} rely on; --force swaps all the same. The differences:"
        )
        for line in found:
            refusal.add_note(f"  {line}")
        raise refusal


def _digests(name: str, spec: ServeSpec, before: ReplicaConfig | None, tokens: Mapping[str, str] | None) -> dict[str, str]:
    if spec.auth == "none":
        return {}
    if before is not None and before.tokens:
        return before.tokens
    if not tokens:
        raise SpecError(f"{name}: serve.auth is 'token', but there is no token; set {auth.VARIABLE}, or serve.auth=none")
    return auth.digests(tokens)


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
    found = details()
    if found is None or ROOT not in found.applications:
        return Status(None, [])
    return Status(_server(found), standings())


def _quiet() -> None:
    """Keep Serve from telling each of its steps on the terminal, for which importing it has set this process up."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _start(host: str, port: int) -> Server:
    """Start Serve, unless it runs."""
    if fresh := details() is None:
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
    found = details()
    assert found is not None, "Serve has just been started"
    server = _server(found)
    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if server.haproxy and len(nodes) > 1 and _is_loopback(server.host):
        if fresh:
            ray.serve.shutdown()
        raise ClusterError(
            f"Serve listens on {server.host}, where HAProxy cannot reach replicas on the other nodes of this Ray; "
            "give --host 0.0.0.0, or the address of the head node"
        )
    return server


def _server(found: ServeInstanceDetails) -> Server:
    options = found.http_options
    assert options is not None, "Serve always runs with an HTTP address here"
    anywhere = options.host in ("0.0.0.0", "::")
    return Server(
        host=options.host,
        url=f"http://{_in_url(socket.gethostname() if anywhere else options.host)}:{options.port}",
        local_url=f"http://{_in_url('127.0.0.1' if anywhere else options.host)}:{options.port}",
        haproxy=any(_is_haproxy(proxy.actor_name) for proxy in found.proxies.values()),
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
