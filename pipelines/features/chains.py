"""Which steps does each column go through, and can they be applied to it? Answered before any data is read.

A chain is a list of steps, or a list of such lists that run side by side on the same column. A step is applied to each output of
the step before it that it takes; the others (an indicator of missing values, say) go past it unchanged.

The steps of a group are one chain, in which one step joins the columns: those before it are applied to each column by itself, it
reads what they made of each (their main output, the first), and those behind it are applied to what it makes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import SpecError, did_you_mean
from pipelines.explain import FieldError, Path, checked, dotted, shown
from pipelines.features.transform import TEXT, Feature, Form, Transform
from pipelines.registry import TRANSFORMS, load
from pipelines.schema import Column
from pipelines.spec import Chain, FeaturesSpec, Frozen, GroupSpec, Kind, Step


@dataclass(frozen=True)
class PlannedStep:
    """A step of a chain, its name looked up and its parameters checked."""

    name: str
    transform: type[Transform]
    params: Frozen


@dataclass(frozen=True)
class PlannedGroup:
    """The steps of a group: before its columns are joined, the one that joins them, and those behind."""

    before: list[PlannedStep]
    join: PlannedStep
    behind: list[PlannedStep]


def plan(
    columns: Sequence[Column], features: FeaturesSpec, defaults: Mapping[Kind, Chain], exclude: Collection[str]
) -> dict[str, Chain]:
    """Return the chain of each column that becomes features, in the columns' order.

    A column's own chain wins over its kind's, and the Spec over `defaults` (those of the model family). A column of a kind that
    neither names is left out. Groups are checked with them. Raises `SpecError` for a column or step that does not exist, for
    wrong parameters, and for a step that cannot take what it would be given.
    """
    _check_names(columns, features, exclude)
    chains: dict[str, Chain] = {}
    for column in columns:
        if column.name in exclude or column.name in features.drop:
            continue
        own, of_kind = features.columns.get(column.name), getattr(features, column.kind)
        path: Path = ("features", column.kind) if own is None else ("features", "columns", column.name)
        chain = next((chain for chain in (own, of_kind, defaults.get(column.kind)) if chain is not None), None)
        if chain is not None:
            for branch in parsed(chain, path):
                _check(branch, column, path)
            chains[column.name] = chain
    for name, group in features.groups.items():
        _check_group(name, group, {column.name: column for column in columns})
    return chains


def parsed(chain: Chain, path: Path) -> list[list[PlannedStep]]:
    """Return the chain as branches of looked-up steps; a plain list is one branch."""
    branches: list[list[Step]] = chain if chain and isinstance(chain[0], list) else [chain]  # type: ignore[list-item]
    return [[_parsed_step(step, path) for step in branch] for branch in branches]


def parsed_group(name: str, group: GroupSpec) -> PlannedGroup:
    """Return the steps of a group, looked up; `SpecError` unless exactly one of them joins the columns."""
    path: Path = ("features", "groups", name)
    steps = [_parsed_step(step, (*path, "steps")) for step in group.steps]
    joins = [place for place, step in enumerate(steps) if step.transform.joins]
    if len(joins) == 1:
        return PlannedGroup(steps[: joins[0]], steps[joins[0]], steps[joins[0] + 1 :])
    if joins:
        found = " and ".join(f"'{steps[place].name}'" for place in joins)
        raise FieldError.at(path, f": {found} each read all columns of the group, expected one such step; make more groups")
    raise FieldError.at(
        path, ": none of its steps reads all columns of the group; add one, such as 'cross', 'difference' or 'pca'"
    )


def transform_class(name: str, where: str) -> type[Transform]:
    """Return the registered or named class."""
    found: Any = load(TRANSFORMS, name, where)
    if not (isinstance(found, type) and issubclass(found, Transform)):
        raise SpecError(f"{where} '{name}' is no subclass of pipelines.features.transform:Transform")
    return found


def _check_names(columns: Sequence[Column], features: FeaturesSpec, exclude: Collection[str]) -> None:
    names = [column.name for column in columns]
    of_groups: list[tuple[Path, list[str]]] = [
        (("features", "groups", name, "columns"), group.columns) for name, group in features.groups.items()
    ]
    for path, given in ((("features", "drop"), features.drop), (("features", "columns"), features.columns), *of_groups):
        for name in given:
            if name not in names:
                raise FieldError.at(path, f": there is no column '{name}'{did_you_mean(name, names)}")
    for path, given in of_groups:
        for name in given:
            if name in exclude:
                raise FieldError.at(path, f": column '{name}' is the target or a key and no feature; take it out")
            if given.count(name) > 1:
                raise FieldError.at(path, f": column '{name}' stands there twice; take it out once")
    for name in features.columns:
        path = ("features", "columns", name)
        if name in features.drop:
            raise FieldError.at(path, f": column '{name}' is also in features.drop; take it out of one of them")
        if name in exclude:
            raise FieldError.at(path, f": column '{name}' is the target or a key and no feature; take its chain out")


def _parsed_step(step: Step, path: Path) -> PlannedStep:
    if isinstance(step, str):
        name, params = step, None
    elif len(step) == 1:
        [(name, params)] = step.items()
    else:
        raise FieldError.at(path, f": found {shown(step)}, expected one step: a name or {{name: {{parameter: value}}}}")
    transform = transform_class(name, f"{dotted(path)}: step")
    return PlannedStep(name, transform, checked(transform.Params, params or {}, (*path, name)))


def _check(branch: list[PlannedStep], column: Column, path: Path) -> None:
    """Follow the form of the main output through the chain of a column."""
    joining = next((step for step in branch if step.transform.joins), None)
    if joining is not None:
        raise FieldError.at(
            path,
            f": step '{joining.name}' reads several columns, but this is the chain of one; "
            "put it under features.groups: {NAME: {columns: [...], steps: [...]}}",
        )
    form, _ = _followed(branch, _form(column), column, path)
    if form in TEXT:
        raise FieldError.at(path, f": the chain of column '{column.name}' ends with text; add 'index', 'hash' or 'onehot'")


def _check_group(name: str, group: GroupSpec, columns: Mapping[str, Column]) -> None:
    path: Path = ("features", "groups", name)
    steps, forms = parsed_group(name, group), []
    for column in map(columns.__getitem__, group.columns):
        form, before = _followed(steps.before, _form(column), column, path)
        if form not in steps.join.transform.takes:
            raise FieldError.at(path, f": {_refusal(steps.join, form, before, column)}")
        forms.append(form)
    try:
        form = steps.join.transform.gives(steps.join.params, *forms)
    except SpecError as error:
        raise FieldError.at(path, f": step '{steps.join.name}' {error}") from None
    form, _ = _followed(steps.behind, form, None, path, steps.join.name)
    if form in TEXT:
        raise FieldError.at(path, ": its steps end with text; add 'index', 'hash' or 'onehot'")


def _form(column: Column) -> Form:
    return Feature(name=column.name, kind=column.kind).form


def _followed(
    steps: list[PlannedStep], form: Form, column: Column | None, path: Path, before: str | None = None
) -> tuple[Form, str | None]:
    """Return the form of the main output behind the steps, and the name of the last of them; no column: behind a join."""
    for step in steps:
        if form not in step.transform.takes:
            raise FieldError.at(path, f": {_refusal(step, form, before, column)}")
        try:
            form = step.transform.gives(step.params, form)
        except SpecError as error:
            on = f" on column '{column.name}' ({column.kind})" if column else ""
            raise FieldError.at(path, f": step '{step.name}'{on} {error}") from None
        before = step.name
    return form, before


def _refusal(step: PlannedStep, form: Form, before: str | None, column: Column | None) -> str:
    takes = step.transform.takes
    wanted = " or ".join(word for word, forms in WORDS.items() if takes & forms)
    raw = column if before is None else None
    found = f"column '{raw.name}' is {raw.kind}" if raw else f"'{before}' before it gives {_word(form)}"
    out = f"take '{step.name}' out"
    if form in TEXT and "code" in takes:
        remedy = f"put 'index' before it or {out}"
    elif form in TEXT and "numeric" in takes:
        remedy = f"put {'frequency' if form == 'categorical' else 'length'!r} before it or {out}"
    elif form == "datetime" and "numeric" in takes:
        remedy = f"put 'since' or 'parts' before it or {out}"
    elif raw and form == "boolean" and "numeric" in takes:
        remedy = f"set data.kinds.{raw.name}: numeric or {out}"
    elif raw and "categorical" in takes:
        remedy = f"set data.kinds.{raw.name}: categorical or {out}"
    else:
        remedy = out
    return f"step '{step.name}' takes {wanted}, but {found}; {remedy}"


WORDS: dict[str, frozenset[Form]] = {
    "numbers": frozenset({"numeric", "boolean", "code"}),
    "dates": frozenset({"datetime"}),
    "text": TEXT,
}


def _word(form: Form) -> str:
    return "codes" if form == "code" else next(word for word, forms in WORDS.items() if form in forms)
