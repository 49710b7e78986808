"""How rows and answers look in the Open Inference Protocol, version 2: one tensor for each column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serve.errors import RequestError

if TYPE_CHECKING:
    from pipelines.artifact import Artifact
    from pipelines.schema import Column, Type
    from pipelines.tasks import Task

# A timestamp travels as text in ISO 8601, as it does in a row.
DATATYPES: dict[Type, str] = {"int64": "INT64", "float64": "FP64", "bool": "BOOL", "string": "BYTES", "timestamp": "BYTES"}

_WHOLE = frozenset(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
# Narrower numbers hold nothing that their column's type does not.
_ACCEPTED: dict[Type, frozenset[str]] = {
    "int64": _WHOLE,
    "float64": _WHOLE | {"FP16", "FP32", "FP64"},
    "bool": frozenset({"BOOL"}),
    "string": frozenset({"BYTES"}),
    "timestamp": frozenset({"BYTES"}),
}


def metadata(artifact: Artifact, name: str) -> dict[str, Any]:
    """The answer to GET /v2/models/NAME."""
    return {
        "name": name,
        "versions": [artifact.version],
        "platform": "heliostat",
        "inputs": [{"name": column.name, "datatype": DATATYPES[column.type], "shape": [-1]} for column in artifact.inputs],
        "outputs": [_described(output) for output in _outputs(artifact.task, [])],
    }


def rows_of(request: dict[str, Any], columns: Sequence[Column]) -> list[Any]:
    """Turn a request's tensors into rows; tensors that are no column are ignored, missing ones are left to the row's check."""
    if not isinstance(request.get("inputs"), list):
        expected = '{"inputs": [{"name": ..., "shape": ..., "datatype": ..., "data": ...}]}'
        raise RequestError(422, "the body has no list under 'inputs'", expected=expected)
    known = {column.name: column for column in columns}
    values: dict[str, list[Any]] = {}
    length: int | None = None
    for tensor in request["inputs"]:
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
            raise RequestError(
                422, "a tensor under 'inputs' has no name", expected="an object with name, shape, datatype and data"
            )
        name = tensor["name"]
        if name in values:
            raise RequestError(422, f"there are two tensors '{name}'", column=name)
        if name not in known:
            continue
        values[name] = _values(tensor, known[name])
        if length is None:
            length = len(values[name])
        if len(values[name]) != length:
            message = f"tensor '{name}' has another number of rows than the tensors before it"
            raise RequestError(422, message, column=name, found=len(values[name]), expected=str(length))
    if length is None:
        raise RequestError(422, "no tensor under 'inputs' is a column of the model", expected=", ".join(known))
    names = list(values)
    return [dict(zip(names, row, strict=True)) for row in zip(*values.values(), strict=True)]


def response(artifact: Artifact, name: str, answers: list[dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    """The answers as tensors, only the wanted ones where the request names some under 'outputs'."""
    outputs = _outputs(artifact.task, answers)
    if request.get("outputs"):
        outputs = _wanted(outputs, request["outputs"])
    body: dict[str, Any] = {"model_name": name, "model_version": artifact.version, "outputs": outputs}
    if isinstance(request.get("id"), str):
        body["id"] = request["id"]
    return body


def _wanted(outputs: list[dict[str, Any]], wanted: object) -> list[dict[str, Any]]:
    by_name = {output["name"]: output for output in outputs}
    names = [item.get("name") if isinstance(item, dict) else item for item in wanted] if isinstance(wanted, list) else [wanted]
    unknown = [name for name in names if not isinstance(name, str) or name not in by_name]
    if unknown:
        raise RequestError(422, f"there is no output '{str(unknown[0])[:100]}'", expected=", ".join(by_name))
    return [by_name[name] for name in names]


def _values(tensor: dict[str, Any], column: Column) -> list[Any]:
    """The tensor's values as a flat list, one for each row."""
    name, datatype, shape, data = column.name, tensor.get("datatype"), tensor.get("shape"), tensor.get("data")
    accepted = _ACCEPTED[column.type] | ({"BYTES"} if column.text else set())
    if not isinstance(datatype, str) or datatype not in accepted:
        expected = DATATYPES[column.type]
        raise RequestError(
            422, f"tensor '{name}' has another datatype", column=name, found=str(datatype)[:100], expected=expected
        )
    if not isinstance(data, list):
        raise RequestError(422, f"tensor '{name}' has no data", column=name, expected="a list of values")
    num = len(data)
    if shape not in ([num], [num, 1]):
        message = f"tensor '{name}' has {num} values, which is not its shape"
        raise RequestError(422, message, column=name, found=str(shape)[:100], expected=f"[{num}]")
    if shape == [num, 1] and num and isinstance(data[0], list):  # nested, which the protocol allows as well as flat
        if not all(isinstance(value, list) and len(value) == 1 for value in data):
            raise RequestError(422, f"tensor '{name}' has not one value in each row", column=name, expected=f"[{num}, 1]")
        return [value[0] for value in data]
    return data


def _outputs(task: Task, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tensors of the answers; those of no answers tell names, datatypes and shapes."""
    num = len(answers)
    if task.classes is None:
        return [_tensor("value", "FP64", [num], [answer["value"] for answer in answers])]
    classes = task.classes or []
    label = _tensor("label", _datatype_of(classes), [num], [answer["label"] for answer in answers])
    if task.type == "binary":
        return [label, _tensor("probability", "FP64", [num], [answer["probability"] for answer in answers])]
    flat = [probability for answer in answers for probability in answer["probabilities"].values()]
    return [label, {**_tensor("probabilities", "FP64", [num, len(classes)], flat), "parameters": {"classes": classes}}]


def _described(output: dict[str, Any]) -> dict[str, Any]:
    """An output without its data, for any number of rows."""
    return {key: value for key, value in output.items() if key != "data"} | {"shape": [-1, *output["shape"][1:]]}


def _tensor(name: str, datatype: str, shape: list[int], values: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": values}


def _datatype_of(classes: Sequence[object]) -> str:
    if all(isinstance(value, bool) for value in classes):
        return "BOOL"
    if all(isinstance(value, int) for value in classes):
        return "INT64"
    return "FP64" if all(isinstance(value, int | float) for value in classes) else "BYTES"
