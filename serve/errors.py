"""What a client hears whose request is not answered: one shape for every 4xx and 5xx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from pipelines.errors import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Send

JSON = "application/json"
_SHOWN = 100  # characters of a found value that go back to the client


class RequestError(Exception):
    """A request that gets an error for an answer: its status, its headers and what was wrong where."""

    def __init__(self, status: int, message: str, *, headers: Mapping[str, str] | None = None, **facts: object) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.facts: dict[str, object] = {key: value for key, value in facts.items() if value is not None}

    @classmethod
    def of_input(cls, error: InputError) -> RequestError:
        """The answer to a request whose rows break the contract."""
        return cls(422, str(error), row=error.row, column=error.column, found=_shown(error.found), expected=error.expected)

    @classmethod
    def internal(cls) -> RequestError:
        """The answer to a request that met a bug; what it was stands in the log alone."""
        return cls(500, "internal error; the server's log has the details")

    @property
    def body(self) -> bytes:
        return orjson.dumps({"error": {"message": str(self), **self.facts}}, default=str)


def one_shape(app: FastAPI) -> None:
    """Let an application answer its own errors, such as 404 and 405, in the one shape too."""

    @app.exception_handler(HTTPException)
    async def _refuse(_: Request, error: HTTPException) -> Response:
        return response(RequestError(error.status_code, error.detail, headers=error.headers))

    @app.exception_handler(RequestError)
    async def _answer(_: Request, error: RequestError) -> Response:
        return response(error)

    @app.exception_handler(Exception)
    async def _apologise(_: Request, error: Exception) -> Response:
        return response(RequestError.internal())


def response(error: RequestError) -> Response:
    """The refusal as a Starlette response."""
    return Response(error.body, error.status, error.headers, media_type="application/json")


async def respond(send: Send, status: int, body: bytes, headers: Mapping[str, str] | None = None, *, media: str = JSON) -> None:
    """Send an answer with the two messages of ASGI, without an object in between."""
    head = [(b"content-type", media.encode()), (b"content-length", b"%d" % len(body))]
    head += [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def _shown(found: object) -> object:
    """The found value, if it is short; else its beginning, so that a wrong body of megabytes is not sent back."""
    if found is None or isinstance(found, bool | float):
        return found
    if isinstance(found, int):
        return found if -(2**63) <= found < 2**64 else str(found)[:_SHOWN]
    if isinstance(found, list | dict):
        return "array" if isinstance(found, list) else "object"
    text = str(found)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
