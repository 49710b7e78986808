"""Who may ask: the token that a client shows, where it comes from, and how it is compared.

Replicas and the root application know tokens only by their SHA-256, so no token stands in Serve's state or in a log.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from pipelines.errors import SpecError
from serve.errors import RequestError

VARIABLE = "HELIOSTAT_TOKEN"
_SHORTEST = 8


def find_token(folder: Path) -> tuple[str, Path | None]:
    """Return the token to serve with, and the file that holds it when it was not given by the environment.

    The file is `FOLDER/token`, readable by its owner alone; it is written on first use and read from then on.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return _checked(given, f"the environment variable {VARIABLE}"), None
    path = folder / "token"
    if not path.exists():
        _generate(path)
    if path.stat().st_mode & 0o077:
        raise SpecError(f"{path}: other users can read the token; run `chmod 600 {path}`, or delete the file to get a new token")
    return _checked(path.read_text().strip(), str(path)), path


def digests(tokens: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of each named token, the only form in which replicas learn of them."""
    return {name: _digest(token.encode()) for name, token in tokens.items()}


def require(authorization: bytes | None, accepted: Mapping[str, str]) -> None:
    """Refuse a request whose header `Authorization` shows none of the accepted tokens."""
    if not accepts(authorization, accepted):
        refuse(authorization)


def accepts(authorization: bytes | None, accepted: Mapping[str, str]) -> bool:
    """Whether one of the accepted tokens is shown; where there are none, all requests pass."""
    if not accepted:
        return True
    shown = _digest(_token_of(authorization))
    matches = [hmac.compare_digest(shown, digest) for digest in accepted.values()]  # each in constant time, and all of them
    return any(matches)


def refuse(authorization: bytes | None) -> NoReturn:
    """Answer 401; a browser then asks for a password, which is the token."""
    what = "the token is wrong" if authorization else "there is no token"
    challenge = {"www-authenticate": 'Bearer realm="heliostat", Basic realm="heliostat"'}
    raise RequestError(401, f"{what}; send the header 'Authorization: Bearer TOKEN'", headers=challenge)


def _token_of(authorization: bytes | None) -> bytes:
    """The token of `Bearer TOKEN`, or the password of `Basic`, which is how a browser can open /docs."""
    scheme, _, value = (authorization or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def _digest(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


def _checked(token: str, where: str) -> str:
    if len(token) < _SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        expected = f"at least {_SHORTEST} printable ASCII characters without spaces"
        raise SpecError(f"{where}: the token is too short or has other characters; expected {expected}")
    return token


def _generate(path: Path) -> None:
    """Write a new token, whole and readable by the owner alone from the first moment; a file that is there already stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=".token")  # with mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    with contextlib.suppress(FileExistsError):
        os.link(aside, path)
    os.unlink(aside)
