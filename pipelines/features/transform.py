"""What one fitted step from a column's values to features is: the contract of every transform.

A transform is a frozen dataclass whose fields are its fitted state, in JSON's types. It sees a column in one of two ways, and
answers both with the same bits:

    block   numbers as float64 (NaN = missing; booleans 0 and 1, timestamps microseconds since 1970), texts as Arrow
            large_string, or as indices into a dictionary of them that may have more texts than the rows (`coded`); null = missing
    row     one float (NaN = missing), or one `str | None`

So the row path may use + - * / and comparisons of Python floats, exact integers and dictionaries; anything else has to call the
same numpy function as the block path on an array of length 1, because numpy and `math` differ in the last bit.

The methods take as many columns as the step reads, mostly one; a step that reads a group, or the row's fold besides, has more
parameters and nothing else changes:

    joins          its methods take all columns of a group, and `outputs` the group's name as `group`
    cross_fitted   `block` and `push` take `places` where the rows are train rows: what decides each row's fold
    gathers        `fit` takes what was `gathered`
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Literal, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.features.stats import Numbers, NumberStatistics, Statistics, StringStatistics
from pipelines.spec import Frozen, Kind
from pipelines.tasks import Task

Values: TypeAlias = Numbers | pa.Array
Value: TypeAlias = float | str | None
W = TypeVar("W", bound=str)

Order = Literal["rising", "constant"]
"""How an output goes along with its input: never falls while that rises, or only tells whether that is missing."""
Form = Literal["numeric", "boolean", "datetime", "categorical", "text", "code"]
TEXT: Final[frozenset[Form]] = frozenset({"categorical", "text"})
"""The forms that are texts; the others are numbers."""


class Feature(Frozen):
    """A column as it enters or leaves a transform, or reaches the model."""

    name: str
    kind: Kind
    """Of the model's features: numeric or categorical. Between steps also what else a column can be."""
    cardinality: int | None = None
    """Set for codes: integers as float64 from 0 to below it, NaN = missing; their kind is categorical."""
    columns: list[str] = []
    """Of the model's features: the columns that it is made of."""
    order: Order | None = None
    """Of the model's features: how it goes along with its column; None where that is not known, or there are several."""

    @property
    def form(self) -> Form:
        """What a step gets to see: the kind, or `code` once texts have become codes."""
        return self.kind if self.cardinality is None else "code"


class Rows(NamedTuple):
    """What else is known of the train rows of a block, an entry per row."""

    places: Numbers
    """From 0 to below 1 by the row's identity, or its group's: `floor(place * folds)` is its fold. NaN: no train row."""
    target: pa.ChunkedArray
    """The target's column, canonical and without nulls."""


class State(Protocol):
    """What a step gathers about its inputs in all train rows, exactly, a block at a time; it travels between processes."""

    def merge(self, other: Any) -> Any:
        """Append the state of the rows behind these."""


class Gathered(NamedTuple):
    """What a step that gathers is fitted to."""

    state: Any
    """The `State` of its inputs."""
    names: list[str]
    """Of its inputs."""
    task: Task | None


@dataclass(frozen=True)
class Transform(ABC):
    """One fitted, pure step."""

    Params: ClassVar[type[Frozen]]
    """The step's parameters in the Spec."""
    takes: ClassVar[frozenset[Form]]
    """What it can be applied to; other outputs of the step before it go past it unchanged."""
    joins: ClassVar[bool] = False
    """Whether it reads the columns of a group together."""
    cross_fitted: ClassVar[bool] = False
    """Whether it uses the target, so that what a train row becomes must not depend on that row."""
    gathers: ClassVar[type[State] | None] = None
    """What it has to know of its inputs beyond the statistics of each."""
    carries: ClassVar[frozenset[type[State]]] = frozenset()
    """The states that follow exactly behind it from those before it, so that no further pass has to gather them there."""

    orders: ClassVar[tuple[Order, ...]] = ()
    """How the first outputs go along with the one input; of the others, and of several inputs, nothing is known."""

    @classmethod
    @abstractmethod
    def gives(cls, params: Any, *forms: Any) -> Form:
        """Return the form of the main output for inputs that it takes; `SpecError` when `params` do not suit them."""

    @classmethod
    def gather(cls, params: Any, *values: Any, rows: Rows) -> State:
        """Return the state of a block of train rows, the inputs of the step."""
        raise NotImplementedError(f"{cls.__name__} gathers nothing")

    def carry(self, state: Any, at: int) -> State:
        """Return the state behind this step, which stands on the input `at` of those that `state` is about."""
        raise NotImplementedError(f"{type(self).__name__} carries nothing")

    @classmethod
    @abstractmethod
    def fit(cls, params: Any, *statistics: Any, **more: Any) -> Self:
        """Fit to the statistics of each column it reads; `DataError` when they do not allow it."""

    @abstractmethod
    def outputs(self, *features: Any, **more: Any) -> list[Feature]:
        """Name and describe the outputs, given the inputs."""

    @abstractmethod
    def block(self, *values: Any, **more: Any) -> list[Values]:
        """Apply to a block; the caller silences numpy's warnings of overflow."""

    @abstractmethod
    def row(self, *values: Any, **more: Any) -> list[Any]:
        """Apply to one row; a list of `Value`."""

    def push(self, *statistics: Any, **more: Any) -> list[Statistics]:
        """Return the outputs' statistics for the step behind it: those of the row sample, or better where they follow exactly."""
        with np.errstate(all="ignore"):
            return [described(values) for values in self.block(*map(sampled, statistics), **more)]

    def state(self) -> dict[str, Any]:
        """The fitted state as plain JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        return cls(**state)


def once(which: list[W]) -> list[W]:
    """Return the list, or raise `ValueError` when a word stands there twice."""
    twice = [word for word in dict.fromkeys(which) if which.count(word) > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)} stands there twice; take one out")
    return which


def coded(values: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int32]]:
    """Return the texts of a block, each once, and which of them each row has; their number where it is missing."""
    encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
    places = encoded.indices
    return encoded.dictionary, (places.fill_null(len(encoded.dictionary)) if places.null_count else places).to_numpy()


def sampled(statistics: Statistics) -> Values:
    """The row sample of a column, as a block."""
    return statistics.sample


def described(values: Values) -> Statistics:
    """The statistics of a block that is itself the row sample."""
    if isinstance(values, pa.Array):
        return replace(StringStatistics.of(values), sample=values)
    return replace(NumberStatistics.of(values), sample=values)
