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
    force: bool = False
    """Also swap to an Artifact that breaks what clients of the running one rely on."""


def serve(references: Sequence[str], out: Output, where: Where, *, store: str | None, sets: Sequence[str]) -> None:
    """Serve runs and stay until Ctrl-C; detached, leave them running on the Ray that was joined."""
    if where.detach and not joins(where.address):
        raise lasting("serve --detach")
    from serve.auth import find_tokens

    found = _targets(references, store, sets)
    tokens: dict[str, str] = {}
    token_path = None
    if any(spec.auth == "token" for _, spec in found):
        tokens, token_path = find_tokens(Path(TOKEN_FOLDER).expanduser())
    with open_ray(where.address, serve_port=where.port, host=where.host) as session:
        from serve.deploy import serve_runs, status, stop  # reads its environment, which the session has set

        served = {model.name for model in status().models}
        swapped = [run.name for run, _ in found if run.name in served]
        with out.progress.stage("deploy", total=len(found), unit="models") as stage:
            server = serve_runs(
                [(run.name, str(run.artifact), spec) for run, spec in found],
                host=where.host,
                port=where.port,
                tokens=tokens,
                force=where.force,
            )
            stage.advance(len(found))
        # Whoever started a model is there for its end: a swap leaves it running.
        stays = where.detach or len(swapped) == len(found)
        out.result(*_ready(found, server, session, token_path, stays))
        if stays:
            return
        try:
            with contextlib.suppress(KeyboardInterrupt):
                _stay(token_path)
            say("stopping")
        finally:
            own = [run.name for run, _ in found if run.name not in swapped]
            for name in [] if session.private else own:  # a private Ray takes all with it
                stop(name)


def _stay(token_path: Path | None) -> None:
    """Wait for Ctrl-C; tokens that change in their file meanwhile are accepted, or no longer, from then on."""
    from serve.auth import read_tokens
    from serve.deploy import change_tokens

    seen = token_path.stat().st_mtime_ns if token_path else 0
    while True:  # a wait without end would not see a signal that reaches another thread
        time.sleep(0.5)
        if token_path is None:
            continue
        try:
            changed = token_path.stat().st_mtime_ns
            if changed != seen:
                seen = changed
                tokens = read_tokens(token_path)
                say(f"{', '.join(change_tokens(tokens))} accept the tokens named {', '.join(tokens)}")
        except (OSError, UserError) as error:
            seen = 0
            say(f"the tokens stay as they were: {error}")
            time.sleep(5)


def roll_back(name: str, out: Output, *, address: str | None) -> None:
    """Put back the version that a model was served with before."""
    if not joins(address):
        raise lasting("serve --rollback")
    with open_ray(address):
        from serve.deploy import roll_back

        was, now = roll_back(name)
    out.result({"model": name, "version": now, "was": was}, [f"{name} answers with {now} again, not with {was}"])


def rotate_tokens(out: Output, *, address: str | None) -> None:
    """Let what is served accept the tokens that the environment or the file has now."""
    if not joins(address):
        raise lasting("serve --tokens")
    from serve.auth import find_tokens

    tokens, _ = find_tokens(Path(TOKEN_FOLDER).expanduser())
    with open_ray(address):
        from serve.deploy import change_tokens

        models = change_tokens(tokens)
    named = ", ".join(tokens)
    lines = [f"{', '.join(models)} accept the tokens named {named}" if models else "nothing that is served asks for a token"]
    out.result({"models": models, "tokens": sorted(tokens)}, lines)


def show_status(out: Output, *, address: str | None) -> None:
    """Show what is served on a Ray that outlives the command."""
    if not joins(address):
        raise lasting("serve --status")
    with open_ray(address):
        from serve.deploy import status

        found = status()
    models = [
        {"name": model.name, "version": model.version, "ready": model.ready, "replicas": model.replicas} for model in found.models
    ]
    url = found.server.url if found.server else None
    rows = [
        [model.name, model.version or "", "ready" if model.ready else "not ready", f"{model.replicas} replicas", model.message]
        for model in found.models
    ]
    out.result(
        {"url": url, "models": models}, [f"at {url}", *table(["model", "", "", "", ""], rows)] if url else ["nothing is served"]
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
    first = f"$(awk '!/^#/ {{print $NF; exit}}' {token_path})"  # a line is NAME TOKEN, or TOKEN
    token = f'"Authorization: Bearer {first}"' if token_path else '"Authorization: Bearer $HELIOSTAT_TOKEN"'
    header = f"-H {token} " if spec.auth == "token" else ""
    body = shlex.quote(json.dumps({"rows": examples[:1]}))
    return f"curl -s {header}-H 'Content-Type: application/json' -d {body} {server.url}/v2/models/{run.name}/predict"
