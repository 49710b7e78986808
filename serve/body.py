"""How the body of a request is read: all of it, or as much as it takes to refuse it."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.types import Receive, Scope

from serve.errors import RequestError

# How much of a refused body is taken in, and for how long, so that its sender gets to read why.
_DROPPED_BYTES = 64 * 1024 * 1024
_DROPPED_S = 2.0


class Headers:
    """The few headers that count here."""

    __slots__ = ("authorization", "content_type", "encoded", "expects", "length", "request_id")

    def __init__(self, scope: Scope) -> None:
        self.authorization: bytes | None = None
        self.content_type = b""
        self.request_id: bytes | None = None
        self.length = 0
        self.encoded = self.expects = False
        for key, value in scope["headers"]:
            if key == b"content-length":
                self.length = int(value) if value.isdigit() else 0
            elif key == b"authorization":
                self.authorization = value
            elif key == b"content-type":
                self.content_type = value
            elif key == b"x-request-id":
                self.request_id = value
            elif key == b"content-encoding":
                self.encoded = value.lower() != b"identity"
            elif key == b"expect":
                self.expects = True  # the client waits for a word before it sends its body


class Arriving:
    """How many bytes of unanswered bodies a replica holds, and at most may."""

    __slots__ = ("held", "most")

    def __init__(self, most: int) -> None:
        self.held, self.most = 0, most


class Body:
    """The body of a request, of which not all may have arrived."""

    __slots__ = ("_arriving", "_headers", "_held", "_receive", "_unread")

    def __init__(self, receive: Receive, headers: Headers, arriving: Arriving) -> None:
        self._receive, self._headers, self._arriving = receive, headers, arriving
        self._held, self._unread = 0, True

    async def read(self, most: int) -> bytes:
        """Return all of it, as long as it has at most so many bytes, said or unsaid."""
        if self._headers.length > most:
            raise _too_large(self._headers.length, most)
        body = self._hold(await self._next())
        if self._unread:
            chunks = [body]
            while self._unread and self._held <= most:
                chunks.append(self._hold(await self._next()))
            body = b"".join(chunks)
        if len(body) > most:
            raise _too_large(len(body), most)
        return body

    def close(self) -> None:
        """Make room for others."""
        self._arriving.held -= self._held
        self._held = 0

    def _hold(self, chunk: bytes) -> bytes:
        self._held += len(chunk)
        self._arriving.held += len(chunk)
        if self._arriving.held > self._arriving.most:
            raise RequestError(429, "too many large bodies are on their way here; try again", headers={"retry-after": "1"})
        return chunk

    async def drop(self) -> None:
        """Take in what is left before an early answer: closed with bytes unread, a connection is reset and the answer lost."""
        if self._headers.expects or self._headers.length > _DROPPED_BYTES:
            return
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DROPPED_S):
                while self._unread and size <= _DROPPED_BYTES:
                    size += len(await self._next())

    async def _next(self) -> bytes:
        message = await self._receive()
        self._unread = message.get("more_body", False)
        body: bytes = message.get("body", b"")
        return body


def _too_large(found: int, most: int) -> RequestError:
    return RequestError(413, "the body is too large", found=found, expected=f"at most {most} bytes")
