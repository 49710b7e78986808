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
from serve.arrow import MEDIA, stream_of, table_of
from serve.body import Arriving, Body, Headers
from serve.errors import JSON, RequestError, one_shape, respond
from serve.meter import AccessLog, Asked, Meter
from serve.overview import Card
from serve.parsing import object_in, rows_in
from serve.spec import LimitsSpec

if TYPE_CHECKING:
    from pipelines.artifact import Artifact

# A child of Serve's logger, so that it writes into the log of the replica.
logger = logging.getLogger("ray.serve.heliostat")

Operation = Callable[[bytes, Asked], bytes]

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
        self.meter = Meter(name, artifact.version)
        self.log: AccessLog | None = None
        self._pool, self._inline_bytes = pool, inline
        self._in_flight = 0
        # Four bodies of the largest size, or any number of small ones, may be on their way here.
        self._arriving = Arriving(max(64 << 20, 4 * limits.body_bytes))
        self._version = {"x-model-version": artifact.version}
        base = f"/v2/models/{name}"
        self._operations: dict[str, Operation] = {f"{base}/predict": self._predict, f"{base}/infer": self._infer}
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
        asked, headers = Asked(), Headers(scope)
        body = Body(receive, headers, self._arriving)
        operation = self._operations.get(scope["path"])
        status, size = 200, 0
        try:
            asked.token = auth.require(headers.authorization, self.tokens)
            if operation is not None:
                operation = self._chosen(operation, scope, headers)
                answer = await self._answer(operation, asked, scope, headers, body)
        except RequestError as error:
            status = error.status
            if status != HTTPStatus.REQUEST_TIMEOUT:
                await body.drop()
            await respond(send, status, error.body, {**self._version, **error.headers})
        except Exception:  # a bug of ours must not show the client a traceback
            status = 500
            logger.exception("%s failed", scope["path"])
            await respond(send, status, RequestError.internal().body, self._version)
        else:
            if operation is None:
                # Serve puts the application's prefix into root_path; the routes here are whole paths.
                await self._rest({**scope, "root_path": ""}, receive, send)
                return
            size = len(answer)
            await respond(send, 200, answer, self._version, media=MEDIA if operation == self._arrow else JSON)
        finally:
            body.close()
        seconds = self.meter.count(operation.__name__.strip("_") if operation else "other", status, asked)
        if self.log is not None:
            self.log.write(
                id=headers.request_id and headers.request_id.decode("latin-1")[:128],
                model=self.name,
                version=self.artifact.version,
                method=scope["method"],
                path=scope["path"][:256],
                status=status,
                ms=round(seconds * 1000, 3),
                rows=asked.rows,
                bytes=size,
                token=asked.token,
            )

    def _chosen(self, operation: Operation, scope: Scope, headers: Headers) -> Operation:
        """The operation by what the request asks for and holds besides its path."""
        query = scope.get("query_string")
        explains = bool(query) and operation == self._predict and _explains(query or b"")
        if headers.content_type == MEDIA.encode() and operation == self._predict:
            if explains:
                raise RequestError(422, "an Arrow stream cannot be explained", found="explain=true", expected="JSON")
            return self._arrow
        return self._explain if explains else operation

    async def _answer(self, operation: Operation, asked: Asked, scope: Scope, headers: Headers, body: Body) -> bytes:
        """Answer within the limits on requests in flight, bytes and time. A request is in flight once its body is here."""
        if scope["method"] != "POST":
            raise RequestError(405, f"{scope['method']} is not for this path", expected="POST", headers={"allow": "POST"})
        if headers.encoded:
            raise RequestError(415, "the body is compressed", expected="JSON without a content-encoding")
        content: bytes | None = None
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                content = await body.read(self.limits.body_bytes)
                if self._in_flight >= self.limits.in_flight:
                    raise RequestError(429, f"{self._in_flight} requests are in flight; try again", headers={"retry-after": "1"})
                self._in_flight += 1
                try:
                    # Let the requests that arrived together with this one be counted before it is answered: as the answer does
                    # not wait for anything, there would otherwise never be two in flight, here and in what Serve scales by.
                    await asyncio.sleep(0)
                    if len(content) < self._inline_bytes and operation != self._explain:
                        return operation(content, asked)
                    return await asyncio.get_running_loop().run_in_executor(self._pool, operation, content, asked)
                finally:
                    self._in_flight -= 1
        except TimeoutError:
            limit = f"{self.limits.timeout_s:g} s"
            if content is None:
                raise RequestError(408, f"the body did not arrive within {limit}") from None
            raise RequestError(504, f"the answer took longer than {limit}") from None

    def _predict(self, body: bytes, asked: Asked) -> bytes:
        return self._predictions(self._answers(rows_in(body), asked))

    def _explain(self, body: bytes, asked: Asked) -> bytes:
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
        return self._predictions(self._answers(rows, asked, explain=True))

    def _predictions(self, answers: list[dict[str, Any]]) -> bytes:
        return orjson.dumps({"model": self.name, "version": self.artifact.version, "predictions": answers})

    def _infer(self, body: bytes, asked: Asked) -> bytes:
        request = object_in(body)
        rows = tensors.rows_of(request, self.artifact.inputs)
        return orjson.dumps(tensors.response(self.artifact, self.name, self._answers(rows, asked), request))

    def _arrow(self, body: bytes, asked: Asked) -> bytes:
        table = table_of(body, self.artifact, most_rows=self.limits.rows, most_bytes=self.limits.body_bytes)
        asked.rows = len(table)
        try:
            answers = self.artifact.predict(table)
        except InputError as error:
            raise RequestError.of_input(error) from None
        return stream_of(answers, model=self.name, version=self.artifact.version)

    def _answers(self, rows: list[Any], asked: Asked, **how: bool) -> list[dict[str, Any]]:
        most = self.limits.rows
        if len(rows) > most:
            raise RequestError(413, "there are too many rows in one request", found=len(rows), expected=f"at most {most} rows")
        asked.rows = len(rows)
        try:
            answers = self.artifact.predict_rows(rows, **how) if rows else []
        except InputError as error:
            raise RequestError.of_input(error) from None
        asked.ignored = self.artifact.ignored(rows)
        return answers


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
