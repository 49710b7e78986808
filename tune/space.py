"""Where does a search look? Points of a space, asked of Optuna, listed as a grid, or known before.

A point is the value of each knob by its dotted path; knobs that no choice has opened are not in it. Optuna knows a knob by its
path, and one that a choice opens by the choice besides: another value of it may open the same knob with another range.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from tune.spec import Axis, Space, name_of

if TYPE_CHECKING:
    import optuna

Point = dict[str, Any]


def ask(space: Space, trial: optuna.Trial) -> Point:
    """Return the point that Optuna wants tried."""
    point: Point = {}
    for name, path, axis in _walk(space, point):
        if axis.integers is not None:
            low, high = axis.integers
            point[path] = trial.suggest_int(name, low, high, log=axis.log)
        elif axis.numbers is not None:
            point[path] = trial.suggest_float(name, *axis.numbers, log=axis.log)
        else:
            assert axis.choice is not None
            chosen = trial.suggest_categorical(name, [_told(axis, value) for value in axis.choice])
            point[path] = next(value for value in axis.choice if _told(axis, value) == chosen)
    return point


def params_of(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Optuna calls these values; those that the point lacks, or has outside of the space, are left out."""
    known = dict(point)
    found = {}
    for name, path, axis in _walk(space, known):
        if path in known and axis.has(known[path]):
            found[name] = _told(axis, known[path])
    return found


def within(space: Space, point: Mapping[str, Any]) -> bool:
    """Whether every knob that the point opens has a value in its range."""
    return all(path in point and axis.has(point[path]) for _, path, axis in _walk(space, dict(point)))


def distributions(space: Space, above: str = "") -> dict[str, BaseDistribution]:
    """What Optuna is told of each knob, opened or not."""
    found: dict[str, BaseDistribution] = {}
    for path, axis in space.items():
        if axis.integers is not None:
            found[path + above] = IntDistribution(axis.integers[0], axis.integers[1], log=axis.log)
        elif axis.numbers is not None:
            found[path + above] = FloatDistribution(axis.numbers[0], axis.numbers[1], log=axis.log)
        else:
            found[path + above] = CategoricalDistribution([_told(axis, value) for value in axis.choice or []])
        for value in axis.choice or []:
            found |= distributions(axis.opened(value), _opened(path, value, above))
    return found


def grid(space: Space) -> list[Point]:
    """Every point of the grid, in the order of the space."""
    points: list[Point] = [{}]
    for path, axis in space.items():
        points = [
            {**point, path: value, **below}
            for point, value in itertools.product(points, values_of(axis))
            for below in (grid(axis.opened(value)) if axis.opened(value) else [{}])
        ]
    return points


def count(space: Space) -> int:
    """How many points the grid has."""
    return math.prod(sum(count(axis.opened(value)) for value in values_of(axis)) for axis in space.values())


def values_of(axis: Axis) -> list[Any]:
    """The values of an axis in a grid: every choice, or evenly spread ones of a range."""
    if axis.choice is not None:
        return axis.choice
    low, high = axis.extremes
    spread = np.geomspace(low, high, axis.steps) if axis.log else np.linspace(low, high, axis.steps)
    if axis.integers is not None:
        return sorted({int(value) for value in np.round(spread)})
    return [low, *(float(value) for value in spread[1:-1]), high]


def _walk(space: Space, point: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str, Axis]]:
    """Yield name, path and axis of each knob that is open; who listens sets its value in `point` before the next one comes."""
    for path, axis in space.items():
        yield path + above, path, axis
        if axis.opens and path in point:
            yield from _walk(axis.opened(point[path]), point, _opened(path, point[path], above))


def _opened(path: str, value: Any, above: str) -> str:
    return f" ({path}={name_of(value)}{above})"


def _told(axis: Axis, value: Any) -> Any:
    """A choice as Optuna can keep it: a plain value, or its text where there are mappings, or equal ones such as 1 and true."""
    values = axis.choice
    if values is None:
        return value
    plain = all(one is None or isinstance(one, bool | int | float | str) for one in values)
    if plain and len(set(values)) == len(values):
        return next(one for one in values if name_of(one) == name_of(value))
    return name_of(value)
