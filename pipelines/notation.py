"""How is a Spec written down? YAML in and out, and dotted paths.

Reading follows YAML 1.2's core schema where PyYAML follows 1.1: `on`, `yes` and `2013-10-01` are text, `1e-3` is a number, and
a mapping's keys are always text, for all keys of a Spec are names.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

from pipelines.errors import SpecError
from pipelines.explain import Path, dotted, shown
from pipelines.spec import PipelineSpec

# Tag, its spelling in YAML 1.2's core schema, and the characters that it can begin with.
CORE_SCHEMA: Final = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
]
NAME: Final = r'(?:"[^"]+"|[^".]+)'


def read_yaml(text: str, name: str) -> Any:
    """Return what `text` says; `name` stands in front of an error's line and column."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SpecError(f"{name}: {where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{name}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SpecError(f"{name}: is nested too deeply, or an alias stands inside its own anchor") from None


def to_yaml(spec: PipelineSpec, reasons: Mapping[str, str] | None = None) -> str:
    """Write every value of a Spec; `reasons` say, by dotted path, why an inferred value is what it is."""
    comments = {path: f"inferred: {_plain(reason)}" for path, reason in (reasons or {}).items()}
    return _blocks(spec.model_dump(by_alias=True), comments)


def split_path(text: str) -> tuple[str, ...]:
    """Split `model.params.num_leaves`; a name that has dots itself stands in quotes: `tune.space."model.params.rounds"`."""
    if not re.fullmatch(rf"{NAME}(\.{NAME})*", text):
        raise SpecError(f"'{text}' is not a dotted path such as model.params.num_leaves")
    return tuple(name.strip('"') for name in re.findall(NAME, text))


def assign(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set the value at a path; what is not there on the way becomes a mapping."""
    for depth, name in enumerate(path[:-1], start=1):
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            raise SpecError(f"{dotted(path[:depth])} is {shown(values)}, which has nothing inside; give the whole of it")
    values[path[-1]] = copy.deepcopy(value)


class Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, without duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in lines:
                problem = f"the key '{key.value}' stands twice, first in line {lines[key.value]}; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_number(self, node: Any) -> int | float:
        text = self.construct_scalar(node)
        try:
            if node.tag.endswith(":int"):
                return int(text, 0 if text[:2] in ("0o", "0x") else 10)
            number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise yaml.constructor.ConstructorError(None, None, f"{text[:60]} is not a finite number", node.start_mark)
        return number


class Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read as text, and keeps every scalar on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, value: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


def _blocks(values: Mapping[str, Any], comments: Mapping[str, str], above: Path = ()) -> str:
    """Write mappings as blocks and everything else on one line; `comments` by dotted path stand behind their values."""
    lines = []
    for key, value in values.items():
        path = (*above, key)
        comment = comments.get(dotted(path))
        block = isinstance(value, Mapping) and bool(value)
        start = f"{'  ' * len(above)}{_flow(key)}:{'' if block else ' ' + _flow(value)}"
        lines.append(f"{start}  # {comment}\n" if comment else f"{start}\n")
        if block:
            lines.append(_blocks(value, comments, path))
    return "".join(lines)


def _plain(text: str) -> str:
    """Text that may stand in a comment: on one line, without what YAML does not allow there."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _flow(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return _scalar(repr(value), value)
    return _dumped(value)


@functools.lru_cache(maxsize=4096)
def _scalar(text: str, value: Any) -> str:
    """The same few values stand in Spec after Spec of a search, and PyYAML takes 0.1 ms for each; `text` tells 1 from true."""
    return _dumped(value)


def _dumped(value: Any) -> str:
    # As the one item of a list: a scalar of its own would be followed by an end-of-document mark.
    return str(
        yaml.dump([value], Dumper=Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    )[1:-2]


for _tag, _pattern, _first in CORE_SCHEMA:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
for _tag in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", Loader.construct_number)
Dumper.add_representer(str, Dumper.text)
