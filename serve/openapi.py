"""The OpenAPI document of served models, generated from their Schemas: each column, its type, its range, an example row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from serve.arrow import MEDIA
from serve.tensors import DATATYPES

if TYPE_CHECKING:
    from pipelines.artifact import Artifact
    from pipelines.schema import Column, Type
    from serve.spec import LimitsSpec

_CATEGORIES_LISTED = 20

_JSON_TYPES: dict[Type, dict[str, Any]] = {
    "int64": {"type": "integer", "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1},
    "float64": {"type": "number", "format": "double"},
    "bool": {"type": "boolean"},
    "string": {"type": "string"},
    "timestamp": {"type": "string", "format": "date-time"},
}

_REFUSALS = {
    401: "No token, or a wrong one.",
    408: "The body did not arrive in time.",
    413: "Too many rows or bytes.",
    415: "The body is compressed.",
    422: "The body breaks the contract; the error names the row and the column where it can.",
    429: "Too many requests in flight; Retry-After says when to come again.",
    504: "The answer took too long.",
}


def model_part(artifact: Artifact, name: str, limits: LimitsSpec) -> dict[str, Any]:
    """Return one model's share of a document: its paths and its component schemas."""
    schemas = {
        f"{name}.Row": _row(artifact),
        f"{name}.Rows": _rows(artifact, name, limits),
        f"{name}.Predictions": _predictions(artifact),
        f"{name}.InferRequest": _infer_request(artifact),
        f"{name}.InferResponse": _object(model_name=_STRING, model_version=_STRING, outputs=_TENSORS),
    }
    base = f"/v2/models/{name}"
    paths = {
        base: {"get": _get("Inputs and outputs with their types and shapes", name, _object(name=_STRING, versions=_STRINGS))},
        f"{base}/ready": {"get": _get("Whether the model answers", name, _object(name=_STRING, ready={"type": "boolean"}))},
        f"{base}/predict": {"post": _also_arrow(_post("Predict rows", name, "Rows", "Predictions")) | {"parameters": [_EXPLAIN]}},
        f"{base}/infer": {"post": _post("Predict tensors (Open Inference Protocol)", name, "InferRequest", "InferResponse")},
    }
    return {"paths": paths, "schemas": schemas}


def document(title: str, version: str, parts: Iterable[dict[str, Any]], *, secured: bool) -> dict[str, Any]:
    """Join the parts of any number of models into one document."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {"Error": _ERROR, "Tensor": _TENSOR}
    for part in parts:
        paths |= part["paths"]
        schemas |= part["schemas"]
    components: dict[str, Any] = {"schemas": schemas}
    info = {"title": title, "version": version}
    whole: dict[str, Any] = {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}
    if secured:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        whole["security"] = [{"token": []}]
    return whole


def _row(artifact: Artifact) -> dict[str, Any]:
    """A row: the columns that were never null in training are required; more columns than these are ignored."""
    columns = artifact.profile.get("columns", {})
    row: dict[str, Any] = {
        "type": "object",
        "properties": {column.name: _property(column, columns.get(column.name, {})) for column in artifact.inputs},
        "required": [column.name for column in artifact.inputs if not column.nullable],
        "additionalProperties": True,
    }
    return row | {"examples": artifact.examples[:1]} if artifact.examples else row


def _property(column: Column, profile: dict[str, Any]) -> dict[str, Any]:
    """One column. What training saw is told, not demanded: a value outside the range or a new category is answered too."""
    described = dict(_JSON_TYPES[column.type])
    if column.text:
        described.pop("format", None)  # a text need not be written as JSON Schema's formats are
    types = [described["type"], *(["string"] if column.text else []), *(["null"] if column.nullable else [])]
    types = list(dict.fromkeys(types))
    described["type"] = types if len(types) > 1 else types[0]
    words: list[str] = [column.kind, *([f"may be text as in the training data ({column.text})"] if column.text else [])]
    if (seen := _range(column, profile)) is not None:
        described["x-range"] = seen
        words.append(f"in the training data from {seen[0]} to {seen[1]}")
    categories = [value for value, _ in profile.get("top") or []]
    if column.kind == "categorical" and categories:
        described["x-categories"] = categories[:_CATEGORIES_LISTED]
        more = ", ..." if len(categories) > _CATEGORIES_LISTED or (profile.get("distinct") or 0) > len(categories) else ""
        words.append("known: " + ", ".join(map(str, categories[:_CATEGORIES_LISTED])) + more)
    words.append("may be null or missing" if column.nullable else "required")
    return described | {"description": "; ".join(words)}


def _range(column: Column, profile: dict[str, Any]) -> list[Any] | None:
    """The least and the greatest value of the training data, as a row would have them; statistics know only floats."""
    low, high = profile.get("min"), profile.get("max")
    if low is None or high is None or column.type in ("bool", "string"):
        return None
    if column.type == "timestamp":
        with contextlib.suppress(ValueError, OverflowError):  # beyond the year 9999, which ISO 8601 cannot say either
            return [datetime.fromtimestamp(end / 1e6, UTC).replace(tzinfo=None).isoformat() for end in (low, high)]
        return None
    return [int(low), int(high)] if column.type == "int64" else [low, high]


def _rows(artifact: Artifact, name: str, limits: LimitsSpec) -> dict[str, Any]:
    rows = _object(rows={"type": "array", "maxItems": limits.rows, "items": _ref(f"{name}.Row")})
    return rows | {"examples": [{"rows": artifact.examples[:1]}]} if artifact.examples else rows


def _predictions(artifact: Artifact) -> dict[str, Any]:
    task = artifact.task
    number, label = {"type": "number"}, {"enum": task.classes}
    probability = number | {"minimum": 0, "maximum": 1}
    if task.classes is None:
        answer = _object(value=number)
    elif task.type == "binary":
        answer = _object(label=label, probability=probability)
    else:
        answer = _object(label=label, probabilities={"type": "object", "additionalProperties": probability})
    # Only where the request asks for them, so not required.
    base, contributions = (
        number,
        _numbers("What each column, or group of columns, adds to the raw score; it is `base` and these."),
    )
    if task.type == "multiclass":
        base, contributions = _numbers("By class"), {"type": "object", "additionalProperties": contributions}
    answer["properties"] |= {"base": base, "contributions": contributions}
    return _object(model=_STRING, version=_STRING, predictions={"type": "array", "items": answer})


def _infer_request(artifact: Artifact) -> dict[str, Any]:
    outputs = {"type": "array", "items": _object(name=_STRING)}
    request = _object(inputs=_TENSORS) | {"properties": {"id": _STRING, "inputs": _TENSORS, "outputs": outputs}}
    if not artifact.examples:
        return request
    example = artifact.examples[0]
    inputs = [
        {"name": column.name, "datatype": DATATYPES[column.type], "shape": [1], "data": [example.get(column.name)]}
        for column in artifact.inputs
    ]
    return request | {"examples": [{"inputs": inputs}]}


def _get(summary: str, name: str, answer: dict[str, Any]) -> dict[str, Any]:
    responses = {"200": _content("OK", answer), "401": _content(_REFUSALS[401], _ref("Error"))}
    return {"summary": summary, "tags": [name], "responses": responses}


def _post(summary: str, name: str, request: str, answer: str) -> dict[str, Any]:
    refusals = {str(status): _content(meaning, _ref("Error")) for status, meaning in _REFUSALS.items()}
    return {
        "summary": summary,
        "tags": [name],
        "requestBody": _content("", _ref(f"{name}.{request}")) | {"required": True},
        "responses": {"200": _content("OK", _ref(f"{name}.{answer}")), **refusals},
    }


def _also_arrow(post: dict[str, Any]) -> dict[str, Any]:
    """An operation that also takes an Arrow IPC stream, and answers with one."""
    for place in (post["requestBody"], post["responses"]["200"]):
        place["content"] |= {MEDIA: {"schema": {"type": "string", "format": "binary"}}}
    return post


def _content(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _numbers(description: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": {"type": "number"}, "description": description}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_STRING = {"type": "string"}
_EXPLAIN = {
    "name": "explain",
    "in": "query",
    "schema": {"type": "boolean", "default": False},
    "description": "Also answer what each column contributes to the raw score; fewer rows are taken, for this takes time.",
}
_STRINGS = {"type": "array", "items": _STRING}
_TENSOR = {
    "type": "object",
    "properties": {
        "name": _STRING,
        "datatype": {"enum": ["BOOL", "INT64", "FP64", "BYTES"]},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "data": {"type": "array"},
    },
    "required": ["name", "datatype", "shape", "data"],
}
_TENSORS = {"type": "array", "items": _ref("Tensor")}
_FACTS = {"row": {"type": "integer"}, "column": _STRING, "found": {}, "expected": _STRING}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "object", "properties": {"message": _STRING, **_FACTS}, "required": ["message"]}},
    "required": ["error"],
}
