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
_UNNAMED = "token"


def find_tokens(folder: Path) -> tuple[dict[str, str], Path | None]:
    """Return the tokens to serve with, by name, and the file that holds them when they were not given by the environment.

    The file is `FOLDER/token`, readable by its owner alone; it is written with one token on first use and read from then on. Each
    line of it is `NAME TOKEN`, or a token alone, whose name is "token"; lines that begin with # are skipped.
    """
    given = os.environ.get(VARIABLE)
    if given is not None:
        return {_UNNAMED: _checked(given, f"the environment variable {VARIABLE}")}, None
    path = folder / "token"
    if not path.exists():
        _generate(path)
    return read_tokens(path), path


def read_tokens(path: Path) -> dict[str, str]:
    """Return the tokens of a file by name; raises `SpecError`."""
    if path.stat().st_mode & 0o077:
        raise SpecError(f"{path}: other users can read the token; run `chmod 600 {path}`, or delete the file to get a new token")
    tokens: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{path}, line {number}"
        if len(words) > 2:
            raise SpecError(f"{where}: there are {len(words)} words; expected NAME TOKEN, or a token alone")
        name = words[0] if len(words) == 2 else _UNNAMED
        if name in tokens:
            raise SpecError(f"{where}: there are two tokens named '{name}'; give each a name of its own")
        tokens[name] = _checked(words[-1], where)
    if not tokens:
        raise SpecError(f"{path}: there is no token in it; delete the file to get a new one")
    return tokens


def digests(tokens: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of each named token, the only form in which replicas learn of them."""
    return {name: _digest(token.encode()) for name, token in tokens.items()}


def require(authorization: bytes | None, accepted: Mapping[str, str]) -> str | None:
    """Refuse a request whose header `Authorization` shows none of the accepted tokens; return the name of the one it shows."""
    if not accepted:
        return None
    name = shown(authorization, accepted)
    return refuse(authorization) if name is None else name


def accepts(authorization: bytes | None, accepted: Mapping[str, str]) -> bool:
    """Whether one of the accepted tokens is shown; where there are none, all requests pass."""
    return not accepted or shown(authorization, accepted) is not None


def shown(authorization: bytes | None, accepted: Mapping[str, str]) -> str | None:
    """The name of the accepted token that is shown, if one is."""
    digest = _digest(_token_of(authorization))
    matches = [(hmac.compare_digest(digest, own), name) for name, own in accepted.items()]  # each in constant time, and all
    return next((name for matching, name in matches if matching), None)


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
