"""The section of the Spec that says how hyperparameters are searched: what is varied, what is best, how long."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipelines.errors import did_you_mean
from pipelines.spec import Frozen

RESULT_SECTIONS = ("data", "task", "features", "model")
"""What changes the result; what changes only the cost is nothing to search over."""


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
        return self

    @property
    def extremes(self) -> list[Any]:
        """The ends of the range, or every choice: if these are valid, so is all between."""
        return self.integers or self.numbers or self.choice or []


class TuneSpec(Frozen):
    """How a search for better hyperparameters goes."""

    metric: str | list[str] | None = None
    """What is best, on the valid split; several for a Pareto front; default: the task's first metric."""
    trials: Annotated[int, Field(ge=1)] = 40
    """How many settings are tried."""
    searcher: Literal["bayesian", "gp", "cmaes", "genetic", "random", "grid"] = "bayesian"
    """bayesian is the tree-structured Parzen estimator (TPE)."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """How trials that look bad are stopped early."""
    time_budget_s: Annotated[float, Field(gt=0)] | None = None
    """No new trial is started after this; default: no limit."""
    space: Annotated[dict[str, Axis], Field(min_length=1)]
    """Dotted path of a knob that changes the result, and its values."""

    @model_validator(mode="after")
    def _reaches_results(self) -> TuneSpec:
        if self.metric == []:
            raise ValueError("metric is an empty list; name one, or leave it out for the task's first metric")
        for path in self.space:
            section, _, rest = path.partition(".")
            if section not in RESULT_SECTIONS:
                raise ValueError(
                    f"space '{path}' does not begin with a section of results{did_you_mean(section, RESULT_SECTIONS)}"
                )
            if not rest:
                raise ValueError(f"space '{path}' is a whole section; name a knob in it, such as {section}.x")
        return self
