"""What is wrong with a section of the Spec, in one line?

`checked` validates any section or Params and turns pydantic's list of errors into one `FieldError` that names the dotted path,
what was found and what was expected. Whoever knows which file a path came from puts that in front.
"""

from __future__ import annotations

import functools
import json
import operator
import re
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipelines.errors import SpecError, did_you_mean
from pipelines.spec import Chain, Source, Step

M = TypeVar("M", bound=BaseModel)
Path = tuple[str | int, ...]

# Unions that read badly when spelled out.
SENTENCES: list[tuple[Any, str]] = [
    (Chain, "a list of steps, each a name or {name: {parameter: value}}, or a list of such lists"),
    (Step, "a name or {name: {parameter: value}}"),
    (Source, "a path, a list of paths, or {train: ..., valid: ..., test: ...}"),
]
BOUNDS = {
    "ge": ">= {:g}",
    "gt": "> {:g}",
    "le": "<= {:g}",
    "lt": "< {:g}",
    "pattern": "that matches {}",
    "min_length": "with at least {} entries",
    "max_length": "with at most {} entries",
}
NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    types.NoneType: "null",
}


class FieldError(SpecError):
    """A field of the Spec is wrong; `path` says which."""

    path: Path = ()

    @classmethod
    def at(cls, path: Path, problem: str) -> FieldError:
        """Build the error from the field's path and what is to be said of it."""
        error = cls(f"{dotted(path)}{problem}")
        error.path = path
        return error


def checked(model: type[M], value: object, path: Path = ()) -> M:
    """Return `value` as a `model`, or raise a `FieldError` about the first thing that is wrong; `path` is where it stands."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # A misspelled key is also a missing one: the misspelling is what helps. A mapping was not meant as a number.
        first = min(
            error.errors(include_url=False),
            key=lambda e: (e["type"] != "extra_forbidden", _meant_otherwise(model, value, e["loc"])),
        )
        raise _explained(model, value, first, path) from None


def dotted(path: Path) -> str:
    """Write a path as a user does: `model.params.num_leaves`, with quotes around a name that has dots or spaces itself."""
    return ".".join(str(part) if re.fullmatch(r"[^\s.\"'=]+", str(part)) else f'"{part}"' for part in path)


def shown(value: object) -> str:
    """A found value as it would stand in YAML, cut short where it is long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _explained(model: type[BaseModel], value: object, error: ErrorDetails, above: Path) -> FieldError:
    """One of pydantic's errors as ours."""
    path, annotation, bounds = _place(model, error["loc"])
    kind, at = error["type"], above + path
    if kind == "extra_forbidden":
        return FieldError.at(at, f" is unknown{did_you_mean(str(path[-1]), _keys(annotation))}")
    if kind == "missing":
        return FieldError.at(at, f" is missing: expected {_expected(annotation, bounds)}")
    if kind == "value_error":  # what one of our validators says is a sentence already
        return FieldError.at(at, f"{': ' if at else ''}{error['ctx']['error']}")
    found = _at(value, path)
    literal = _without_none(annotation)
    if get_origin(literal) is Literal and isinstance(found, str):
        return FieldError.at(at, f" {shown(found)} is unknown{did_you_mean(found, map(str, get_args(literal)))}")
    return FieldError.at(at, f" {shown(found)} is wrong: expected {_expected(annotation, bounds)}")


def _place(model: type[BaseModel], loc: Path) -> tuple[Path, Any, list[Any]]:
    """Follow pydantic's location; return the path that a user knows, what is declared there, and its bounds.

    Pydantic puts the tried members of a union into the location (`train.workers.literal['auto']`): the path ends before them, or
    goes on inside of a section (`train.workers.function-after[_ordered(), WorkersSpec].min`).
    """
    annotation: Any = model
    bounds: list[Any] = []
    path: Path = ()
    for part in loc:
        annotation = _without_none(annotation)
        origin = get_origin(annotation)
        if tried := next(
            (section for section in _sections(annotation) if re.search(rf"\b{section.__name__}\b", str(part))), None
        ):
            annotation = tried
            continue
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = next((f for name, f in annotation.model_fields.items() if part in (name, f.alias)), None)
            if field is None:
                return (*path, part), annotation, []  # of an unknown key: the section that does not know it
            annotation, bounds = field.annotation, field.metadata
        elif origin in (dict, list) and part != "[key]":
            annotation, bounds = get_args(annotation)[-1], []
        else:
            return path, annotation, bounds
        path = (*path, part)
    return path, annotation, bounds


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections among the members of a union."""
    union = get_origin(annotation) in (Union, types.UnionType)
    return [one for one in get_args(annotation) if isinstance(one, type) and issubclass(one, BaseModel)] if union else []


def _meant_otherwise(model: type[BaseModel], value: object, loc: Path) -> bool:
    """Whether the error is about a member of a union that a mapping was not meant for: one that is no section."""
    path, annotation, _ = _place(model, loc)
    return bool(_sections(_without_none(annotation))) and isinstance(_at(value, path), dict)


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not types.NoneType]
        return functools.reduce(operator.or_, members)
    return annotation


def _keys(section: Any) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _at(value: Any, path: Path) -> Any:
    for part in path:
        value = value[part]
    return value


def _expected(annotation: Any, bounds: list[Any]) -> str:
    """What is declared, in words."""
    annotation = _without_none(annotation)
    sentence = next((text for declared, text in SENTENCES if declared == annotation), None)
    if sentence:
        return sentence
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _expected(members[0], [bound for field in members[1:] for bound in getattr(field, "metadata", [field])])
    if origin is Literal:
        return _either([shown(member) for member in members])
    if origin in (Union, types.UnionType):
        return _either([_expected(member, []) for member in members])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with {', '.join(_keys(annotation))}"
    words = NAMES.get(origin or annotation, "another value")
    if origin is list:
        words += f", each item {_expected(members[0], [])}"
    return " ".join([words, " and ".join(filter(None, map(_bound, bounds)))]).strip()


def _bound(bound: Any) -> str:
    return next(
        (text.format(getattr(bound, name)) for name, text in BOUNDS.items() if getattr(bound, name, None) is not None), ""
    )


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
