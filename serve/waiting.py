"""When is a deployed model ready, and if it does not get there, why not?"""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Final

import ray
import ray.serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from pipelines.errors import ClusterError
from serve.directory import answering, ask_card

_POLL_S: Final = 0.1
_FAILED: Final = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


def wait_until_running(cpus: Mapping[str, float], *, deadline: float) -> None:
    """Wait until each of these applications runs with what it was last told; `cpus` is what a replica of it needs.

    Raises `ClusterError`: a replica's own error, or what is missing when the time is up.
    """
    for name, need in cpus.items():
        while (application := ray.serve.status().applications.get(name)) is None or not _runs(name, application):
            if time.monotonic() > deadline:
                raise ClusterError(f"'{name}' did not get ready in time: {_what_it_waits_for(need, application)}")
            time.sleep(_POLL_S)


def wait_until_settled(name: str, digest: str, *, deadline: float) -> None:
    """Wait until each replica has taken over the `ReplicaConfig` of this digest; raises `ClusterError` when one refuses.

    A handle cannot name the replica that it asks, so it is asked until each has said its word.
    """
    settled: set[str] = set()
    while not (replicas := answering(name)) or replicas - settled:
        card = ask_card(name)
        if card is not None and card.settled == digest:
            if card.problem is not None:
                raise ClusterError(f"'{name}' goes on with {card.version}: {card.problem}")
            if card.replica not in settled:
                settled.add(card.replica)
                continue
        if time.monotonic() > deadline:
            raise ClusterError(f"'{name}': {len(replicas - settled)} of {len(replicas)} replicas did not take over in time")
        time.sleep(_POLL_S)


def wait_until_reached(name: str, url: str, *, deadline: float) -> None:
    """Wait until the way from the server's address to the replicas is open, which is a moment after they run."""
    while not _answers(f"{url}/v2/models/{name}/ready"):
        if time.monotonic() > deadline:
            raise ClusterError(f"'{name}' runs, but {url} does not lead to it; the logs of Ray Serve may say why")
        time.sleep(_POLL_S)


def last_line(message: str) -> str:
    """Return the sentence at the end of a traceback of tracebacks, without the exception's name; else all on one line."""
    lines = [line.strip() for line in message.replace("\\n", "\n").splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := re.match(r"[\w.]*(?:Error|Exception): (.+)", line))]
    return errors[-1] if errors else " ".join(lines)


def _runs(name: str, application: ApplicationStatusOverview) -> bool:
    if application.status in _FAILED:
        messages = [application.message, *(deployment.message for deployment in application.deployments.values())]
        raise ClusterError(f"'{name}' cannot be served: {last_line(max(messages, key=len))}")
    return application.status == ApplicationStatus.RUNNING


def _what_it_waits_for(need: float, application: ApplicationStatusOverview | None) -> str:
    free = [resources.get("CPU", 0.0) for resources in ray._private.state.available_resources_per_node().values()]
    if max(free, default=0.0) < need:
        return (
            f"a replica needs {need:g} CPU slots, and {sum(free):g} of {ray.cluster_resources().get('CPU', 0.0):g} are free; "
            "lower serve.cpus or serve.replicas.min, or end what holds the slots"
        )
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    return last_line(" ".join(messages)) or "its replicas are still starting"


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 401  # said by a replica, which asks for a token
    except OSError:
        return False
