"""Which models run, asked of Serve's controller and of the models themselves; for the root application and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray.serve
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaState
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeInstanceDetails

from serve.config import ReplicaConfig
from serve.overview import Card, Standing

MODEL = "model"  # the deployment in each model's application
ROOT = "_root"  # the application at /; a model's name cannot begin so
_CARD_TIMEOUT_S = 2.0
_ANSWERING = (ReplicaState.RUNNING, ReplicaState.UPDATING)


def standings(known: Mapping[str, Card] | None = None) -> list[Standing]:
    """Return how each model stands, in the order of their names; blocks on the controller and on one replica of each model.

    A model that does not answer in time shows the card that is `known` of it.
    """
    result = []
    for name, application in sorted(ray.serve.status().applications.items()):
        deployment = application.deployments.get(MODEL)
        if deployment is None:
            continue  # the root, or an application that is not ours
        # A replica that is told something new is UPDATING for a moment, in which it answers as before.
        replicas = sum(deployment.replica_states.get(state, 0) for state in _ANSWERING)
        card = (ask_card(name) if replicas else None) or (known or {}).get(name)
        result.append(Standing(name=name, ready=replicas > 0, replicas=replicas, message=deployment.message, card=card))
    return result


def details() -> ServeInstanceDetails | None:
    """Return all that Serve's controller knows; None where Serve does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else ServeInstanceDetails.model_validate(client.get_serve_details())


def configs() -> dict[str, ReplicaConfig]:
    """Return what each model's replicas were last told."""
    told = {name: model["deployment_config"].get("user_config") for name, model in _models().items()}
    return {name: ReplicaConfig.model_validate(config) for name, config in told.items() if config}


def answering(name: str) -> set[str]:
    """Return the ids of the replicas that answer for a model."""
    model = _models().get(name, {"replicas": []})
    return {replica["replica_id"] for replica in model["replicas"] if replica["state"] in _ANSWERING}


def _models() -> dict[str, dict[str, Any]]:
    """What the controller knows of each model; as it says it, for Serve's own classes cannot be made in two threads at once."""
    client = _get_global_client(raise_if_no_controller_running=False)
    applications = client.get_serve_details()["applications"] if client else {}
    found = {name: (application.get("deployments") or {}).get(MODEL) for name, application in applications.items()}
    return {name: model for name, model in found.items() if model}


def ask_card(name: str) -> Card | None:
    """Ask one replica of a model for its card; None when it does not answer in time."""
    try:
        handle = ray.serve.get_app_handle(name)
        if not handle.is_initialized:
            # The default follows how Ray was started, and in throughput mode works on an event loop only.
            handle._init(_run_router_in_separate_loop=True)
        return Card.model_validate(handle.card.remote().result(timeout_s=_CARD_TIMEOUT_S))
    except (TimeoutError, RayError, RayServeException):
        return None
