"""How often do the data have to be read before everything is fitted, and why? Answered from the chains alone.

The statistics of single columns, the row sample, and what steps gather about raw columns all come from the first pass. A step
that gathers something about what another step makes needs a further pass with that step fitted, unless the steps between carry
its state: imputing and scaling follow by algebra, a logarithm does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.features.chains import PlannedStep, parsed, parsed_group
from pipelines.features.transform import State
from pipelines.spec import Chain, GroupSpec

Key = tuple[str | int, ...]
"""Where a step stands in the Spec, and which of the outputs before it it is applied to."""


@dataclass(frozen=True)
class Need:
    """A step that gathers something."""

    key: Key
    step: PlannedStep
    columns: list[str]
    """The raw columns behind it."""
    number: int
    """Of the pass that can gather it, from 1."""
    reason: str
    """Why that is not the first one."""


@dataclass(frozen=True)
class _Done:
    """A step that stands before another, and the pass after which it is fitted."""

    step: PlannedStep
    fitted: int


def needs(chains: Mapping[str, Chain], groups: Mapping[str, GroupSpec]) -> list[Need]:
    """Return the steps that gather something, in the order in which they are fitted."""
    found: list[Need] = []
    for column, chain in chains.items():
        for number, branch in enumerate(parsed(chain, ("features", "columns", column))):
            _follow(branch, [], ("columns", column, number), [column], f"column '{column}'", found)
    for name, group in groups.items():
        steps, where = parsed_group(name, group), f"group '{name}'"
        for column in group.columns:
            done = _follow(steps.before, [], ("groups", name, column), [column], where, found)
        _follow([steps.join, *steps.behind], done, ("groups", name), group.columns, where, found)
    return found


def passes(chains: Mapping[str, Chain], groups: Mapping[str, GroupSpec]) -> list[list[str]]:
    """Return why there is a second pass over the data, why a third and so on; empty where one is enough."""
    found = needs(chains, groups)
    numbers = range(2, max([need.number for need in found], default=1) + 1)
    return [list(dict.fromkeys(need.reason for need in found if need.number == number)) for number in numbers]


def of_pass(
    number: int, chains: Mapping[str, Chain], groups: Mapping[str, GroupSpec]
) -> tuple[dict[str, Chain], dict[str, GroupSpec]]:
    """Return the chains and the groups that gather something in a pass: what has to be read and fitted for it."""
    where = {need.key[:2] for need in needs(chains, groups) if need.number == number}
    return (
        {name: chain for name, chain in chains.items() if ("columns", name) in where},
        {name: group for name, group in groups.items() if ("groups", name) in where},
    )


def _follow(
    steps: list[PlannedStep], done: list[_Done], key: Key, columns: list[str], where: str, found: list[Need]
) -> list[_Done]:
    """Add what the steps behind those that are done gather; return all of them as done."""
    done = list(done)
    for index, step in enumerate(steps):
        fitted = done[-1].fitted if done else 1
        if step.transform.gathers is not None:
            before = _source(done, step.transform.gathers)
            fitted = 1 if before is None else before.fitted + 1
            reason = (
                "" if before is None else f"step '{step.name}' of {where} needs statistics of what '{before.step.name}' makes"
            )
            found.append(Need((*key, index, 0), step, columns, fitted, reason))
        done.append(_Done(step, fitted))
    return done


def _source(done: list[_Done], state: type[State]) -> _Done | None:
    """The last step that does not carry the state; None where it can be gathered from the raw columns."""
    return next((before for before in reversed(done) if state not in before.step.transform.carries), None)
