"""How do two runs differ? Spec, data and metrics side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from app.output import Output, number, table
from pipelines.explain import dotted
from pipelines.notation import read_yaml

if TYPE_CHECKING:
    from pipelines.runs import Run

ALWAYS = ("metrics",)
"""What is shown even where it is equal."""
FACTS = ("metrics", "rows", "dropped", "seconds", "versions")


def differences(first: Run, second: Run) -> dict[str, list[Any]]:
    """Return what differs, by dotted path: the values of both runs, None where one has none; metrics in any case."""
    left, right = _facts(first), _facts(second)
    paths = [*left, *(path for path in right if path not in left)]
    found = {path: [left.get(path), right.get(path)] for path in paths}
    return {path: pair for path, pair in found.items() if pair[0] != pair[1] or path.startswith(ALWAYS)}


def print_differences(first: Run, second: Run, out: Output) -> None:
    """Print the differences as a table; a metric's change stands behind it."""
    found = differences(first, second)
    rows = [[path, _text(left), _text(right), _change(left, right)] for path, (left, right) in found.items()]
    out.result({"runs": [first.id, second.id], "differences": found}, table(["", first.id, second.id, ""], rows))


def _facts(run: Run) -> dict[str, Any]:
    spec = read_yaml(run.folder.read_bytes("spec.yaml").decode(), f"{run.path}/spec.yaml")
    record = {name: run.record[name] for name in FACTS if name in run.record}
    return {dotted(path): value for path, value in [*_leaves(record), *_leaves({"spec": spec})]}


def _leaves(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _text(value: object) -> str:
    text = number(value) if value is None or isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else text[:45] + "..."


def _change(left: object, right: object) -> str:
    if isinstance(left, float) and isinstance(right, float) and left != right:
        return f"{right - left:+.4f}"
    return ""
