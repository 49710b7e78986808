"""Fitting the steps of chains and groups one after the other, each to what is known of its inputs.

What is known of an input are its statistics, pushed through the steps before it, and for a step that gathers the state that a
pass over the data yielded for it, carried through the steps between. A state that is not there yet is asked for: `wanted`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipelines.errors import DataError
from pipelines.features.chains import PlannedStep, parsed, parsed_group
from pipelines.features.passes import Key
from pipelines.features.stats import Numbers, Statistics
from pipelines.features.transform import Feature, Gathered, Order, State, Transform
from pipelines.spec import Chain, GroupSpec
from pipelines.tasks import Task

End = tuple[int, str]
"""A slot, and the name of the step that made it."""


@dataclass(frozen=True)
class FittedStep:
    """One step of the program."""

    name: str
    """As in the Spec."""
    reads: list[int]
    transform: Transform
    group: str | None = None
    """Of which it reads the columns; None for a step on one column."""


@dataclass(frozen=True)
class Wanted:
    """A state that a step needs."""

    step: PlannedStep
    slots: list[int]
    """What it is about."""


class Origin(NamedTuple):
    """What a slot is made of: see `Feature`."""

    columns: tuple[str, ...]
    order: Order | None


@dataclass
class Fitting:
    """The program while it is fitted: what is known of each slot so far, and the steps."""

    slots: list[tuple[Feature, Statistics | None]]
    """At first the raw columns. The statistics are left out where no step follows."""
    states: Mapping[Key, State]
    task: Task | None
    places: Numbers | None
    """Of the rows of the sample."""
    steps: list[FittedStep] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    """Of each slot."""
    makers: dict[int, FittedStep] = field(default_factory=dict)
    """The step that made a slot as its main output."""
    wanted: dict[Key, Wanted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.origins = [Origin((feature.name,), "rising") for feature, _ in self.slots]

    def column(self, slot: int, name: str, chain: Chain) -> Iterable[End]:
        """Fit the chain of a column; return where it ends."""
        for number, branch in enumerate(parsed(chain, ("features", "columns", name))):
            yield from self._run(branch, [(slot, "raw")], ("columns", name, number), f"on column '{name}'")

    def group(self, slots: Mapping[str, int], name: str, group: GroupSpec) -> list[End]:
        """Fit the steps of a group; return where they end."""
        steps, known = parsed_group(name, group), len(self.wanted)
        ends: list[End] = []
        read: list[int] = []
        for column in group.columns:
            where = f"on column '{column}' of group '{name}'"
            live = self._run(steps.before, [(slots[column], "raw")], ("groups", name, column), where, ends=False)
            if len(self.wanted) > known:
                return []
            if not live:
                raise DataError(f"features: step '{steps.before[-1].name}' {where}: makes nothing, for the column has no value")
            read.append(live[0][0])
            ends += live[1:]
        where = f"of group '{name}'"
        joined = self._apply(steps.join, read, ("groups", name, 0, 0), where, is_last=not steps.behind, group=name)
        behind = self._run(steps.behind, [(slot, steps.join.name) for slot in joined], ("groups", name), where, first=1)
        return [*behind, *ends]

    def _run(
        self, steps: Sequence[PlannedStep], live: list[End], key: Key, where: str, *, first: int = 0, ends: bool = True
    ) -> list[End]:
        """Apply each step to those outputs of the one before it that it takes; return the slots of the last outputs.

        `first` is the number of the first step in its chain, and `ends` says that nothing else follows behind the last one.
        """
        for index, planned in enumerate(steps, first):
            is_last = ends and planned is steps[-1]
            following: list[End] = []
            for nth, (at, maker) in enumerate(live):
                if self.slots[at][0].form in planned.transform.takes:
                    made = self._apply(planned, [at], (*key, index, nth), where, is_last=is_last)
                    following += [(slot, planned.name) for slot in made]
                else:
                    following.append((at, maker))
            live = following
        return live

    def _apply(self, planned: PlannedStep, reads: list[int], key: Key, where: str, *, is_last: bool, **named: str) -> range:
        """Fit a step and return the slots of its outputs; none when it needs a state that is not there yet."""
        more: dict[str, Any] = {}
        if planned.transform.gathers is not None:
            if key not in self.states:
                self.wanted[key] = Wanted(planned, [self._source(slot, planned.transform.gathers) for slot in reads])
                return range(0)
            state = self._carried(self.states[key], reads, planned.transform.gathers)
            more = {"gathered": Gathered(state, [self.slots[slot][0].name for slot in reads], self.task)}
        statistics = [self.slots[slot][1] for slot in reads]
        try:
            transform = planned.transform.fit(planned.params, *statistics, **more)
        except DataError as error:
            raise DataError(f"features: step '{planned.name}' {where}: {error}") from None
        step, first = FittedStep(planned.name, reads, transform, **named), len(self.slots)
        self.steps.append(step)
        outputs = transform.outputs(*[self.slots[slot][0] for slot in reads], **named)
        places = {"places": self.places} if transform.cross_fitted else {}
        self.slots += zip(outputs, [None] * len(outputs) if is_last else transform.push(*statistics, **places), strict=True)
        self.origins += [self._origin(step, output) for output in range(len(outputs))]
        self.makers[first] = step
        return range(first, len(self.slots))

    def _origin(self, step: FittedStep, output: int) -> Origin:
        """A step behind another keeps the order if both do."""
        read = [self.origins[slot] for slot in step.reads]
        columns = tuple(dict.fromkeys(name for origin in read for name in origin.columns))
        if len(read) > 1 or read[0].order != "rising":
            return Origin(columns, "constant" if all(origin.order == "constant" for origin in read) else None)
        return Origin(columns, dict(enumerate(step.transform.orders)).get(output))

    def _carriers(self, slot: int, state: type[State]) -> Iterable[FittedStep]:
        """The steps before a slot that carry the state, the last one first."""
        while (step := self.makers.get(slot)) is not None and state in step.transform.carries:
            yield step
            [slot] = step.reads

    def _source(self, slot: int, state: type[State]) -> int:
        """The slot that the state has to be gathered from."""
        return next((step.reads[0] for step in reversed([*self._carriers(slot, state)])), slot)

    def _carried(self, state: State, reads: list[int], kind: type[State]) -> State:
        for at, slot in enumerate(reads):
            for step in reversed([*self._carriers(slot, kind)]):
                state = step.transform.carry(state, at)
        return state
