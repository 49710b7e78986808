"""What does a configuration of Ray Serve name, which `serve deploy` and KubeRay's RayService read? These two builders.

    applications:
      - {name: _root, route_prefix: /, import_path: "app.builders:root"}
      - name: flights
        route_prefix: /v2/models/flights
        import_path: app.builders:model
        args: {run: flights@latest, store: "s3://BUCKET/runs"}

They run on a node of the cluster, whenever such a file is applied or its `args` change.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.opening import open_run
from pipelines.errors import SpecError, UserError
from pipelines.explain import checked
from pipelines.spec import Frozen

if TYPE_CHECKING:
    from ray.serve import Application


class ServedRun(Frozen):
    """The `args` of a model's application."""

    run: str
    """An id, a path or URI, NAME@latest or NAME@best."""
    store: str | None = None
    """Path or URI of the run store, which every node has to reach; not needed where `run` is one."""
    name: str | None = None
    """What clients call the model; default: the run's name. The application has the same one, and the prefix /v2/models/NAME."""
    set: list[str] = []
    """Changes to the run's own `serve` section, as `--set` takes them: serve.replicas.max=8."""


def model(args: dict[str, Any]) -> Application:
    """Build the application of one finished run; its tokens are those that the environment of the nodes has."""
    from ray.serve.exceptions import RayServeException

    from pipelines.artifact import Artifact
    from serve.config import ReplicaConfig
    from serve.deployment import model_application

    try:
        wanted = checked(ServedRun, args)
        run, spec, _ = open_run(wanted.run, wanted.store, wanted.set)
        name = wanted.name or run.name
        Artifact.load(run.artifact).check()  # what fails here changes nothing that runs
        tokens = _digests(name) if spec.serve.auth == "token" else {}
    except UserError as error:
        raise RayServeException(str(error)) from error  # any other Serve tries three times, and shows its traceback
    return model_application(name, ReplicaConfig(artifact=str(run.artifact), spec=spec.serve, tokens=tokens))


def root(args: dict[str, Any]) -> Application:
    """Build the application at `/`: health, the overview and the documentation of all models; it takes no arguments."""
    from ray.serve.exceptions import RayServeException

    from serve.deployment import root_application

    if args:
        raise RayServeException(f"app.builders:root takes no args; found {', '.join(args)}")
    return root_application()


def _digests(name: str) -> dict[str, str]:
    from serve import auth

    # A file with a token, which `heliostat serve` writes where there is none, would be on this node and known to nobody.
    if auth.VARIABLE not in os.environ:
        raise SpecError(
            f"{name}: serve.auth is 'token', and {auth.VARIABLE} is not set here; set it on every node before Ray starts, "
            "in Kubernetes from a Secret, or serve.auth=none"
        )
    tokens, _ = auth.find_tokens(Path())
    return auth.digests(tokens)
