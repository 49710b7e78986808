"""What does the text of a body say, and if it is no JSON, where does that show?"""

from __future__ import annotations

import json
from typing import Any

import orjson

from serve.errors import RequestError


def rows_in(body: bytes) -> list[Any]:
    """The rows of a body; of a key that stands in a row twice the last value counts."""
    rows = object_in(body).get("rows")
    if not isinstance(rows, list):
        raise RequestError(422, "the body has no list under 'rows'", expected='{"rows": [{"column": value, ...}, ...]}')
    return rows


def object_in(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is; raises `RequestError` that says where it is none."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _no_number(body) or _no_json(error) from None
    if not isinstance(request, dict):
        raise RequestError(422, "the body is JSON, but no object", expected="a JSON object")
    return request


def _no_json(error: orjson.JSONDecodeError) -> RequestError:
    where = f"line {error.lineno}, column {error.colno}"
    return RequestError(422, f"the body is not JSON: {error.msg} ({where})", expected="a JSON object")


class _NoNumber:
    """NaN or an infinity, which JSON has not, but many programs write."""

    def __init__(self, text: str) -> None:
        self.text = text


def _no_number(body: bytes) -> RequestError | None:
    """Where the body would be JSON but for a NaN or an infinity: the row and the column of the first; else None."""
    try:
        request = json.loads(body, parse_constant=_NoNumber, parse_float=_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict):
        return None
    for row, column, value in _values(request):
        if isinstance(value, _NoNumber):
            message = f"row {row}: column '{column}' is {value.text[:40]}, which JSON has not"
            facts = {"row": row, "column": column, "found": value.text[:40]}
            return RequestError(422, message, **facts, expected="a finite number, or null where it is missing")
    return None


def _number(text: str) -> float | _NoNumber:
    value = float(text)
    return _NoNumber(text) if value in (float("inf"), float("-inf")) else value


def _values(request: dict[str, Any]) -> Any:
    """Each value of the rows, or of the tensors, with its row and column."""
    rows, tensors = request.get("rows"), request.get("inputs")
    for i, row in enumerate(rows if isinstance(rows, list) else []):
        yield from ((i, column, value) for column, value in (row.items() if isinstance(row, dict) else ()))
    for tensor in tensors if isinstance(tensors, list) else []:
        data = tensor.get("data") if isinstance(tensor, dict) else None
        for i, value in enumerate(data if isinstance(data, list) else []):
            yield i, str(tensor.get("name")), value[0] if isinstance(value, list) and value else value
