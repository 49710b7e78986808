"""How one model answers over HTTP, from the bytes of a request to the bytes of its answer; no Ray in it.

POST requests do not pass FastAPI: its routing and middleware would take a quarter of a one-row request's time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import orjson
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from pipelines.errors import ArtifactError, InputError
from serve import auth, openapi, tensors
from serve.body import Body, Headers
from serve.errors import RequestError, one_shape, respond
from serve.overview import Card
from serve.parsing import object_in, rows_in
from serve.spec import LimitsSpec

if TYPE_CHECKING:
    from pipelines.artifact import Artifact

# A child of Serve's logger, so that it writes into the log of the replica.
logger = logging.getLogger("ray.serve.heliostat")

# A body is answered on the event loop up to this size and this time; the way to a thread and back takes longer than a few rows.
_INLINE_BYTES = 16 * 1024
_INLINE_S = 0.002


def build_app(
    artifact: Artifact, name: str, *, limits: LimitsSpec | None = None, tokens: Mapping[str, str] | None = None, threads: int = 1
) -> ModelApp:
    """Return the ASGI application of one model; `tokens` are digests by name (`serve.auth.digests`), none: open to all.

    Raises `ArtifactError` when the Artifact does not answer its example rows as it did where it was made: it takes no request.
    """
    artifact.check()
    pool = ThreadPoolExecutor(threads, "predict")
    return ModelApp(artifact, name, limits or LimitsSpec(), tokens or {}, pool, _inline_bytes(artifact))


def _inline_bytes(artifact: Artifact) -> int:
    """The size of a body that the event loop can answer itself, by the time that one row takes once everything is warm."""
    if not artifact.examples:
        return _INLINE_BYTES
    times = []
    for _ in range(3):
        start = time.perf_counter()
        artifact.predict_rows(artifact.examples[:1])
        times.append(time.perf_counter() - start)
    rows = _INLINE_S / max(min(times), 1e-6)
    return min(_INLINE_BYTES, int(rows * len(orjson.dumps({"rows": artifact.examples[:1]}))))


class ModelApp:
    """The ASGI application of one model: its version, its limits, and how many requests it works on."""

    def __init__(
        self, artifact: Artifact, name: str, limits: LimitsSpec, tokens: Mapping[str, str], pool: ThreadPoolExecutor, inline: int
    ) -> None:
        self.artifact, self.name, self.limits, self.tokens = artifact, name, limits, tokens
        self._pool, self._inline_bytes = pool, inline
        self._in_flight = 0
        self._version = {"x-model-version": artifact.version}
        base = f"/v2/models/{name}"
        self._operations = {f"{base}/predict": self._predict, f"{base}/infer": self._infer}
        self._part = openapi.model_part(artifact, name, limits)
        self._rest = _described(self, self._part)

    def card(self) -> Card:
        """What the root application tells about this model."""
        metadata = tensors.metadata(self.artifact, self.name)
        tokens = dict(self.tokens)
        return Card(name=self.name, version=self.artifact.version, metadata=metadata, openapi=self._part, tokens=tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
            return
        headers = Headers(scope)
        body = Body(receive, headers)
        operation = self._operations.get(scope["path"])
        try:
            auth.require(headers.authorization, self.tokens)
            query = scope.get("query_string")
            if query and operation == self._predict and _explains(query):
                operation = self._explain
            if operation is not None:
                answer = await self._answer(operation, scope, headers, body)
        except RequestError as error:
            if error.status != HTTPStatus.REQUEST_TIMEOUT:
                await body.drop()
            await respond(send, error.status, error.body, {**self._version, **error.headers})
        except Exception:  # a bug of ours must not show the client a traceback
            logger.exception("%s failed", scope["path"])
            await respond(send, 500, RequestError.internal().body, self._version)
        else:
            if operation is not None:
                await respond(send, 200, answer, self._version)
            else:
                # Serve puts the application's prefix into root_path; the routes here are whole paths.
                await self._rest({**scope, "root_path": ""}, receive, send)

    async def _answer(self, operation: Callable[[bytes], bytes], scope: Scope, headers: Headers, body: Body) -> bytes:
        """Answer within the limits on requests in flight, bytes and time."""
        if scope["method"] != "POST":
            raise RequestError(405, f"{scope['method']} is not for this path", expected="POST", headers={"allow": "POST"})
        if self._in_flight >= self.limits.in_flight:
            raise RequestError(429, f"{self._in_flight} requests are in flight; try again", headers={"retry-after": "1"})
        if headers.encoded:
            raise RequestError(415, "the body is compressed", expected="JSON without a content-encoding")
        self._in_flight += 1
        content: bytes | None = None
        try:
            # Let the requests that arrived together with this one be counted before it is answered: as the answer does not
            # wait for anything, there would otherwise never be two in flight, here and in what Serve scales by.
            await asyncio.sleep(0)
            async with asyncio.timeout(self.limits.timeout_s):
                content = await body.read(self.limits.body_bytes)
                if len(content) < self._inline_bytes and operation != self._explain:
                    return operation(content)
                return await asyncio.get_running_loop().run_in_executor(self._pool, operation, content)
        except TimeoutError:
            limit = f"{self.limits.timeout_s:g} s"
            if content is None:
                raise RequestError(408, f"the body did not arrive within {limit}") from None
            raise RequestError(504, f"the answer took longer than {limit}") from None
        finally:
            self._in_flight -= 1

    def _predict(self, body: bytes) -> bytes:
        return self._predictions(self._answers(rows_in(body)))

    def _explain(self, body: bytes) -> bytes:
        """`_predict` with what each column contributes, of as many rows as there is time for: what is begun is not broken off."""
        try:
            seconds = self.artifact.explaining.explain_s()
        except ArtifactError as error:
            raise RequestError(422, str(error), found="explain=true") from None
        rows = rows_in(body)
        most = max(1, int(self.limits.timeout_s / max(seconds, 1e-9)))
        if len(rows) > most:
            expected = f"at most {most} rows"
            raise RequestError(413, "there are too many rows to explain in one request", found=len(rows), expected=expected)
        return self._predictions(self._answers(rows, explain=True))

    def _predictions(self, answers: list[dict[str, Any]]) -> bytes:
        return orjson.dumps({"model": self.name, "version": self.artifact.version, "predictions": answers})

    def _infer(self, body: bytes) -> bytes:
        request = object_in(body)
        rows = tensors.rows_of(request, self.artifact.inputs)
        return orjson.dumps(tensors.response(self.artifact, self.name, self._answers(rows), request))

    def _answers(self, rows: list[Any], **how: bool) -> list[dict[str, Any]]:
        most = self.limits.rows
        if len(rows) > most:
            raise RequestError(413, "there are too many rows in one request", found=len(rows), expected=f"at most {most} rows")
        try:
            return self.artifact.predict_rows(rows, **how) if rows else []
        except InputError as error:
            raise RequestError.of_input(error) from None


def _explains(query: bytes) -> bool:
    """Whether the query asks for contributions; other parameters are ignored, as other columns are."""
    wanted = parse_qs(query.decode("latin-1"), keep_blank_values=True).get("explain", ["false"])
    if wanted not in (["true"], ["false"]):
        raise RequestError(422, "the query parameter 'explain' is wrong", found=", ".join(wanted)[:80], expected="true or false")
    return wanted == ["true"]


def _described(model: ModelApp, part: dict[str, Any]) -> FastAPI:
    """The part of the application that is asked rarely: what the model takes and answers, and whether it is there."""
    base, metadata = f"/v2/models/{model.name}", tensors.metadata(model.artifact, model.name)
    document = openapi.document(model.name, model.artifact.version, [part], secured=bool(model.tokens))
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    one_shape(app)

    @app.get(base)
    async def describe() -> dict[str, Any]:
        return metadata

    @app.get(f"{base}/ready")
    async def ready() -> dict[str, Any]:
        return {"name": model.name, "ready": True}

    @app.get(f"{base}/openapi.json")
    async def describe_openapi() -> dict[str, Any]:
        return document

    return app
