"""serve: from the names of runs to models that answer over HTTP, until Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.endings import say
from app.opening import joins, open_ray, open_run
from app.output import Output, table
from pipelines.errors import ClusterError, UserError

if TYPE_CHECKING:
    from app.session import Session
    from pipelines.runs import Run
    from serve.deploy import Server
    from serve.spec import ServeSpec

TOKEN_FOLDER = "~/.heliostat"
LASTING = [
    "RAY_SERVE_ENABLE_HA_PROXY=1 ray start --head",
    "heliostat serve RUN --detach --address auto",
]


@dataclass(frozen=True)
class Where:
    """On which Ray, at which address, and whether to leave it running."""

    address: str | None
    host: str
    port: int
    detach: bool


def serve(references: Sequence[str], out: Output, where: Where, *, store: str | None, sets: Sequence[str]) -> None:
    """Serve runs and stay until Ctrl-C; detached, leave them running on the Ray that was joined."""
    if where.detach and not joins(where.address):
        raise lasting("serve --detach")
    from serve.auth import find_token

    found = _targets(references, store, sets)
    token, token_path = None, None
    if any(spec.auth == "token" for _, spec in found):
        token, token_path = find_token(Path(TOKEN_FOLDER).expanduser())
    with open_ray(where.address, serve_port=where.port, host=where.host) as session:
        from serve.deploy import serve_runs, stop  # reads its environment, which the session has set

        with out.progress.stage("deploy", total=len(found), unit="models") as stage:
            server = serve_runs(
                [(run.name, str(run.artifact), spec) for run, spec in found], host=where.host, port=where.port, token=token
            )
            stage.advance(len(found))
        out.result(*_ready(found, server, session, token_path, where.detach))
        if where.detach:
            return
        try:
            with contextlib.suppress(KeyboardInterrupt):
                while True:  # a wait without end would not see a signal that reaches another thread
                    time.sleep(0.5)
            say("stopping")
        finally:
            for name in [] if session.private else [run.name for run, _ in found]:  # a private Ray takes all with it
                stop(name)


def show_status(out: Output, *, address: str | None) -> None:
    """Show what is served on a Ray that outlives the command."""
    if not joins(address):
        raise lasting("serve --status")
    with open_ray(address):
        from serve.deploy import status

        found = status()
    models = [{"name": model.name, "ready": model.ready, "replicas": model.replicas} for model in found.models]
    url = found.server.url if found.server else None
    rows = [
        [model.name, "ready" if model.ready else "not ready", f"{model.replicas} replicas", model.message]
        for model in found.models
    ]
    out.result(
        {"url": url, "models": models}, [f"at {url}", *table(["model", "", "", ""], rows)] if url else ["nothing is served"]
    )


def stop_model(name: str, out: Output, *, address: str | None) -> None:
    """Take one model down."""
    if not joins(address):
        raise lasting("serve --stop")
    with open_ray(address):
        from serve.deploy import stop

        gone = stop(name)
    out.result({"stopped": gone}, [f"stopped: {', '.join(gone)}"])


def lasting(what: str) -> ClusterError:
    """The error of a command that makes no sense on a Ray of its own, with the lines that start another."""
    error = ClusterError(f"{what} needs a Ray that outlives the command, and no --address was given; start one with:")
    for line in LASTING:
        error.add_note(f"  {line}")
    return error


def _targets(references: Sequence[str], store: str | None, sets: Sequence[str]) -> list[tuple[Run, ServeSpec]]:
    found: list[tuple[Run, ServeSpec]] = []
    for reference in references:
        run, spec, _ = open_run(reference, store, sets)
        if run.name in [other.name for other, _ in found]:
            raise UserError(f"'{reference}' is a second run of '{run.name}'; one run of a name is served at a time")
        found.append((run, spec.serve))
    return found


def _ready(
    found: list[tuple[Run, ServeSpec]], server: Server, session: Session, token_path: Path | None, detach: bool
) -> tuple[dict[str, Any], list[str]]:
    models = [{"name": run.name, "version": run.id, "url": f"{server.url}/v2/models/{run.name}/predict"} for run, _ in found]
    content = {"url": server.url, "models": models, "token_path": token_path and str(token_path), "address": session.address}
    lines = [f"{model['name']} ({model['version']}) answers at {model['url']}" for model in models]
    lines += [f"docs      {server.url}/docs", f"Ray       {session.address} (--address of a second terminal)"]
    if token_path:
        lines.append(f"token     in {token_path}")
    if not server.haproxy:
        lines.append("this Ray was not started in HAProxy mode: requests go through Serve's own proxy, about ten times slower")
    lines += ["try", f"  {_curl(*found[0], server, token_path)}"]
    return content, [*lines, "it stays when this command ends: heliostat serve --stop NAME" if detach else "Ctrl-C ends it"]


def _curl(run: Run, spec: ServeSpec, server: Server, token_path: Path | None) -> str:
    examples = run.artifact.read_json("profile.json").get("examples") or [{}]
    token = f'"Authorization: Bearer $(cat {token_path})"' if token_path else '"Authorization: Bearer $HELIOSTAT_TOKEN"'
    header = f"-H {token} " if spec.auth == "token" else ""
    body = shlex.quote(json.dumps({"rows": examples[:1]}))
    return f"curl -s {header}-H 'Content-Type: application/json' -d {body} {server.url}/v2/models/{run.name}/predict"
