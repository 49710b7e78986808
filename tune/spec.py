"""The section of the Spec that says how hyperparameters are searched: what is varied, what is best, how long."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pipelines.errors import did_you_mean
from pipelines.explain import checked
from pipelines.notation import assign, split_path
from pipelines.spec import Frozen, PipelineSpec

RESULT_SECTIONS = ("data", "task", "features", "model")
"""What changes the result; what changes only the cost is nothing to search over."""
ROWS = ("data.source", "data.format", "data.options", "data.key", "data.where", "data.split")
"""What changes the rows: trials on different rows cannot be compared."""
TARGET = ("task.target", "task.type", "task.positive", "model.from")
"""What changes the question."""


class Axis(Frozen):
    """The values that one knob may take: a range of integers or numbers, or a choice."""

    # `int` and `float` are what a user writes; as attributes they would hide the types.
    model_config = ConfigDict(serialize_by_alias=True, populate_by_name=False)

    integers: Annotated[list[int] | None, Field(alias="int", min_length=2, max_length=2)] = None
    """[lowest, highest], both included."""
    numbers: Annotated[list[float] | None, Field(alias="float", min_length=2, max_length=2)] = None
    """[lowest, highest], both included."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """The values themselves, of any type."""
    log: bool = False
    """Search a range on a logarithmic scale."""
    steps: Annotated[int, Field(ge=2)] = 5
    """Values of a range in a grid."""
    opens: dict[str, dict[str, Axis]] = {}
    """By a value of the choice: what is searched besides where it is chosen, a space of its own."""

    @model_validator(mode="after")
    def _consistent(self) -> Axis:
        given = [
            name
            for name, value in (("int", self.integers), ("float", self.numbers), ("choice", self.choice))
            if value is not None
        ]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none'} of int, float and choice; give exactly one")
        bounds = self.integers or self.numbers
        if bounds is None:
            texts = [json.dumps(value, sort_keys=True, default=str) for value in self.choice or []]
            if self.log:
                raise ValueError("log goes with int or float; a choice has no scale")
            if len(set(texts)) < len(texts):
                raise ValueError("a value stands twice in choice; name each once")
        elif bounds[0] >= bounds[1]:
            raise ValueError(f"{given[0]} [{bounds[0]:g}, {bounds[1]:g}] is empty; give the lower end first")
        elif self.log and bounds[0] <= 0:
            raise ValueError(f"log needs a range above 0, found [{bounds[0]:g}, {bounds[1]:g}]")
        known = [name_of(value) for value in self.choice or []]
        for value in self.opens:
            if value not in known:
                raise ValueError(f"opens '{value}', which is no value of the choice{did_you_mean(value, known)}")
        return self

    @property
    def extremes(self) -> list[Any]:
        """The ends of the range, or every choice: if these are valid, so is all between."""
        return self.integers or self.numbers or self.choice or []

    def has(self, value: Any) -> bool:
        """Whether a knob with this value is within."""
        if self.choice is not None:
            return any(name_of(one) == name_of(value) for one in self.choice)
        if isinstance(value, bool) or not isinstance(value, int if self.integers else int | float):
            return False
        low, high = self.extremes
        return bool(low <= value <= high)

    def opened(self, value: Any) -> dict[str, Axis]:
        """What is searched besides where this value is chosen."""
        return self.opens.get(name_of(value), {})


Space = dict[str, Axis]


class TuneSpec(Frozen):
    """How a search for better hyperparameters goes."""

    metric: str | list[str] | None = None
    """What is best, on the valid split; several for a Pareto front: metrics, predict_ms (1000 rows) and model_bytes; default: the
    task's first metric."""
    trials: Annotated[int, Field(ge=1)] = 40
    """How many settings are tried at most."""
    time_budget_s: Annotated[float, Field(gt=0)] | None = None
    """No new trial is started after this; default: no limit."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """No new trial is started once so many ended without a better one; default: no limit."""
    searcher: Literal["bayesian", "gp", "cmaes", "genetic", "random", "grid"] = "bayesian"
    """bayesian is the tree-structured Parzen estimator (TPE)."""
    scheduler: Literal["asha", "median", "none"] | None = None
    """How trials that look bad are stopped early; default: asha, and none where there are several metrics or folds."""
    grace: Annotated[int, Field(ge=1)] | None = None
    """Rounds or epochs before a trial may be stopped; default: a ninth of all."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 7
    """Of the searcher; the trials' own seeds stay those of the Spec."""
    space: Annotated[Space, Field(min_length=1)]
    """Dotted path of a knob that changes the result, and its values."""
    points: list[dict[str, Any]] = []
    """Known settings, by dotted path, that are tried first."""
    warm_start: list[str] = []
    """Earlier searches of the same space to learn from: ids, paths or URIs, or NAME@latest."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that train one trial; auto: one, unless no machine has the memory for it."""
    folds: Annotated[int, Field(ge=2, le=20)] | None = None
    """Trials are compared by the mean of so many fits, each with another part of the rows that are not test as its valid split;
    default: one fit on the split as it is."""
    refit: Literal["train", "all"] = "train"
    """The winner's rows: train, or train and valid, with the rounds that were best."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Several metrics: the winner is the best by the second (then the third) of those that come this close to the best by the
    first, as a share of it."""

    @model_validator(mode="after")
    def _reaches_results(self) -> TuneSpec:
        if self.metric == []:
            raise ValueError("metric is an empty list; name one, or leave it out for the task's first metric")
        if isinstance(self.metric, list) and len(set(self.metric)) < len(self.metric):
            raise ValueError("metric names one twice; name each once")
        if self.several and self.scheduler not in (None, "none"):
            raise ValueError(f"scheduler: {self.scheduler} stops trials by one metric, and there are several; take it out")
        if self.folds and self.scheduler not in (None, "none"):
            raise ValueError(f"scheduler: {self.scheduler} stops single fits, and folds compares the mean of all; take one out")
        if self.several and self.searcher == "cmaes":
            raise ValueError("searcher: cmaes has one metric; choose bayesian, gp or genetic for several")
        for path, _, _ in axes(self.space):
            section, _, rest = path.partition(".")
            if section not in RESULT_SECTIONS:
                raise ValueError(
                    f"space '{path}' does not begin with a section of results{did_you_mean(section, RESULT_SECTIONS)}"
                )
            if not rest:
                raise ValueError(f"space '{path}' is a whole section; name a knob in it, such as {section}.x")
            for fixed in (*ROWS, *TARGET):
                if path == fixed or path.startswith(f"{fixed}."):
                    why = "changes the rows" if fixed in ROWS else "changes what is learned"
                    raise ValueError(f"space '{path}' {why}, and such trials cannot be compared; take it out")
        known = [path for path, _, _ in axes(self.space)]
        for point in self.points:
            for path in point:
                if path not in known:
                    raise ValueError(f"points name '{path}', which is not in the space{did_you_mean(path, known)}")
        return self

    @property
    def several(self) -> bool:
        """Whether there is more than one metric."""
        return isinstance(self.metric, list) and len(self.metric) > 1

    @property
    def stopping(self) -> Literal["asha", "median", "none"]:
        """The scheduler, worked out."""
        return self.scheduler or ("none" if self.several or self.folds else "asha")

    @property
    def reaches_data(self) -> bool:
        """Whether more than one setting of data and features is prepared."""
        return self.folds is not None or any(not path.startswith("model.params") for path, _, _ in axes(self.space))


class SearchedSpec(PipelineSpec):
    """A pipeline, and how it is tuned."""

    tune: TuneSpec | None = None
    """How a search for better hyperparameters goes."""

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with the values at these dotted paths changed, validated again."""
        values = self.model_dump(by_alias=True)
        for path, value in changes.items():
            assign(values, split_path(path), value)
        return checked(type(self), values)


def axes(space: Space, above: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Axis, dict[str, Any]]]:
    """Yield each axis of a space with its path and the choices, by path, that open it."""
    opening = dict(above or {})
    for path, axis in space.items():
        yield path, axis, opening
        for value in axis.choice or []:
            yield from axes(axis.opened(value), {**opening, path: value})


def name_of(value: Any) -> str:
    """A choice's value as text, as YAML has it for a key."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
