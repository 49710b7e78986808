"""Which models run, asked of Serve's controller and of the models themselves; for the root application and the command line."""

from __future__ import annotations

from collections.abc import Mapping

import ray.serve
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import RayServeException

from serve.overview import Card, Standing

MODEL = "model"  # the deployment in each model's application
ROOT = "_root"  # the application at /; a model's name cannot begin so
_CARD_TIMEOUT_S = 2.0


def standings(known: Mapping[str, Card] | None = None) -> list[Standing]:
    """Return how each model stands, in the order of their names; blocks on the controller and on one replica of each model.

    A model that does not answer in time shows the card that is `known` of it.
    """
    result = []
    for name, application in sorted(ray.serve.status().applications.items()):
        deployment = application.deployments.get(MODEL)
        if deployment is None:
            continue  # the root, or an application that is not ours
        replicas = deployment.replica_states.get(ReplicaState.RUNNING, 0)
        card = (ask_card(name) if replicas else None) or (known or {}).get(name)
        result.append(Standing(name=name, ready=replicas > 0, replicas=replicas, message=deployment.message, card=card))
    return result


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
