"""What a server says about all its models: health, the overview, and one OpenAPI document with its page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pipelines.errors import did_you_mean
from pipelines.spec import Frozen
from serve import auth, openapi
from serve.errors import RequestError, one_shape, response


class Card(Frozen):
    """What a running model says of itself."""

    name: str
    version: str
    metadata: dict[str, Any]
    openapi: dict[str, Any]
    tokens: dict[str, str]
    """Digests of the tokens it accepts; none: it is open."""
    problem: str | None = None
    """Why the replica did not take over what it was last told to."""
    replica: str = ""
    """The id of the replica that says this."""
    settled: str = ""
    """The digest of the last `ReplicaConfig` that it took over, or refused with `problem`."""


class Standing(Frozen):
    """One model of the server: its card, once it has shown one, and how it stands."""

    name: str
    ready: bool
    replicas: int
    message: str = ""
    card: Card | None = None

    @property
    def version(self) -> str | None:
        """The run that answers."""
        return self.card.version if self.card else None


def build_root(standings: Callable[[], Awaitable[list[Standing]]]) -> FastAPI:
    """Return the application at `/`; `standings` is asked at each request, so that what it says is never stale."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    one_shape(app)

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        is_ready = all(standing.ready for standing in await standings())
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/v2/models")
    async def overview(request: Request) -> dict[str, Any]:
        return {"models": [_line(standing) for standing in _permitted(request, await standings())]}

    @app.get("/openapi.json")
    async def describe(request: Request) -> dict[str, Any]:
        return _document(_permitted(request, await standings()))

    @app.get("/docs")
    async def docs(request: Request) -> HTMLResponse:
        _permitted(request, await standings())
        return get_swagger_ui_html(openapi_url="/openapi.json", title="heliostat")

    @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    async def unknown(request: Request, path: str) -> Response:
        names = [standing.name for standing in _permitted(request, await standings())]
        if f"/{path}" in paths:
            return response(RequestError(405, f"{request.method} is not for this path", expected="GET", headers={"allow": "GET"}))
        parts = path.split("/")
        if parts[:2] == ["v2", "models"] and len(parts) > 2 and parts[2] not in names:
            return response(RequestError(404, f"there is no model '{parts[2]}'{did_you_mean(parts[2], names)}"))
        return response(RequestError(404, f"there is nothing at /{path}; GET /docs shows what there is"))

    paths = {route.path for route in app.routes if isinstance(route, Route)}
    return app


def _permitted(request: Request, standings: list[Standing]) -> list[Standing]:
    """Return what the client's token lets it see: the models that accept it; 401 where that is none of several."""
    authorization = request.headers.get("authorization", "").encode() or None
    open_to_it = [standing for standing in standings if _opens(standing, authorization)]
    if standings and not open_to_it:
        auth.refuse(authorization)
    return open_to_it


def _opens(standing: Standing, authorization: bytes | None) -> bool:
    """A model whose replicas have not said yet which tokens they accept is shown to no one."""
    return standing.card is not None and auth.accepts(authorization, standing.card.tokens)


def _line(standing: Standing) -> dict[str, Any]:
    return {
        "name": standing.name,
        "version": standing.version,
        "ready": standing.ready,
        "replicas": standing.replicas,
        "url": f"/v2/models/{standing.name}",
    }


def _document(standings: list[Standing]) -> dict[str, Any]:
    cards = [standing.card for standing in standings if standing.card]
    secured = any(card.tokens for card in cards)
    return openapi.document("heliostat", "2", [card.openapi for card in cards], secured=secured)
