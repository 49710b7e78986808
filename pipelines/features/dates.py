"""Transforms of instants: to the parts of their date and time, to places on a circle, to the time since a reference.

Instants are microseconds since 1970 as float64, UTC, exact to the microsecond until the year 2255. What a clock shows is that of
UTC, or of the `zone` of the step.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, field_validator

from pipelines.features.stats import Numbers, NumberStatistics, Statistics
from pipelines.features.transform import Feature, Form, Order, Transform, Values, once
from pipelines.features.zones import check_zone, offsets
from pipelines.spec import Frozen

SECOND: Final = 1_000_000
UNITS: Final = {"seconds": SECOND, "hours": 3600 * SECOND, "days": 86400 * SECOND}
DAY: Final = UNITS["days"]
CLOCK: Final = {"hour": 3600 * SECOND, "minute": 60 * SECOND, "second": SECOND}
"""The parts of the time of day, and how long one of each is."""
LAST: Final = 2.0**62
"""What lies beyond has no date (int64 ends there): all its parts are missing."""

Part = Literal["year", "quarter", "month", "day", "weekday", "dayofyear", "hour", "minute", "second"]
Circle = Literal["hour", "weekday", "month", "dayofyear"]
CIRCLES: Final[dict[Circle, tuple[int, float, int]]] = {
    "hour": (0, 24.0, 24),
    "weekday": (0, 7.0, 7),
    "month": (1, 12.0, 12),
    "dayofyear": (1, 365.25, 366),
}
"""The smallest value of a part, its period and how many values it has."""
Integers = Any  # an int, or an array of int64: the arithmetic below is the same


FEW: Final = Field(min_length=1), AfterValidator(once)
Zone = Annotated[str | None, AfterValidator(check_zone)]


@dataclass(frozen=True)
class Clock(Transform):
    """What reads date and time off a clock: some numbers for each part that is asked for."""

    takes: ClassVar[frozenset[Form]] = frozenset({"datetime"})

    changes: list[int]
    offsets: list[int]
    """Instants at which the clock's offset to UTC changes; the offsets before, between and behind them. In microseconds."""
    which: list[Any]

    @classmethod
    def gives(cls, params: Any, form: Form) -> Form:
        return "numeric"

    @classmethod
    def fit(cls, params: Any, statistics: NumberStatistics) -> Self:
        changes, found = offsets(params.zone)
        return cls(list(changes), list(found), list(params.which))

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """What the features are called behind the column's name."""

    @abstractmethod
    def numbers(self, part: Any, values: Integers) -> list[Any]:
        """Return the features of a part: new arrays for an array, floats for an int."""

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=f"{feature.name}__{name}", kind="numeric") for name in self.names]

    def block(self, values: Numbers) -> list[Values]:
        has_date = np.abs(values) < LAST
        all_dates = bool(has_date.all())
        micros = np.floor(values if all_dates else np.where(has_date, values, 0.0)).astype(np.int64)
        if self.changes:
            changes, offsets = self._table
            micros += offsets[np.searchsorted(changes, micros, side="right")]
        elif self.offsets[0]:
            micros += self.offsets[0]
        days = micros // DAY
        micros -= days * DAY
        first, last = (int(days.min()), int(days.max())) if len(days) else (0, 0)
        by_day = last - first < len(days)  # as a rule a day has many rows: work out each day once
        dates = calendar(np.arange(first, last + 1) if by_day else days)
        place = days - first
        columns: list[Any] = []
        for part in self.which:
            if part in CLOCK:
                columns += self.numbers(part, clock(micros, part))
            else:
                found = self.numbers(part, dates[part])
                columns += [numbers[place] for numbers in found] if by_day else found
        if not all_dates:
            for column in columns:
                column[~has_date] = math.nan
        return columns

    def row(self, value: float) -> list[float]:
        if not abs(value) < LAST:
            return [math.nan] * len(self.names)
        micros = math.floor(value)
        micros += self.offsets[bisect_right(self.changes, micros)]
        days = micros // DAY
        micros -= days * DAY
        dates = calendar(days)
        return [
            number for part in self.which for number in self.numbers(part, clock(micros, part) if part in CLOCK else dates[part])
        ]

    @cached_property
    def _table(self) -> tuple[Any, Any]:
        return np.array(self.changes, np.int64), np.array(self.offsets, np.int64)


class PartsParams(Frozen):
    """Which parts become features."""

    zone: Zone = None
    """A name of the IANA database, such as Europe/Berlin; default: UTC. Changes of its offset are followed from 1900 to 2100."""
    which: Annotated[list[Part], *FEW] = ["year", "month", "day", "weekday", "dayofyear", "hour"]
    """weekday: Monday is 0; all others as people write them."""


@dataclass(frozen=True)
class Parts(Clock):
    """Features NAME__year, NAME__month and so on."""

    Params: ClassVar[type[Frozen]] = PartsParams

    @property
    def names(self) -> list[str]:
        return self.which

    def numbers(self, part: Part, values: Integers) -> list[Any]:
        return [values.astype(np.float64) if isinstance(values, np.ndarray) else float(values)]


class CyclicParams(Frozen):
    """Which parts are laid on a circle."""

    zone: Zone = None
    """As for `parts`."""
    which: Annotated[list[Circle], *FEW] = ["hour", "weekday", "month", "dayofyear"]


@dataclass(frozen=True)
class Cyclic(Clock):
    """Features NAME__hour_sin, NAME__hour_cos and so on: the last hour of a day lies beside the first of the next."""

    Params: ClassVar[type[Frozen]] = CyclicParams

    @property
    def names(self) -> list[str]:
        return [f"{part}_{wave}" for part in self.which for wave in ("sin", "cos")]

    def numbers(self, part: Circle, values: Integers) -> list[Any]:
        found = [wave[values - CIRCLES[part][0]] for wave in self._waves[part]]
        return found if isinstance(values, np.ndarray) else [float(number) for number in found]

    @cached_property
    def _waves(self) -> dict[Circle, tuple[Numbers, Numbers]]:
        """Sine and cosine of every value that a part can have: both paths look them up."""
        angles = {part: 2.0 * np.pi * np.arange(size) / period for part, (_, period, size) in CIRCLES.items()}
        return {part: (np.sin(angle), np.cos(angle)) for part, angle in angles.items()}


class SinceParams(Frozen):
    """Since when, and in what."""

    unit: Literal["seconds", "hours", "days"] = "hours"
    reference: str = "1970-01-01"
    """ISO 8601, UTC where it names no zone; or first or last: the earliest or latest instant of the train split."""

    @field_validator("reference")
    @classmethod
    def _instant(cls, reference: str) -> str:
        try:
            if reference not in ("first", "last"):
                datetime.fromisoformat(reference)
        except ValueError:
            raise ValueError(
                f"reference '{reference}' is no date; expected ISO 8601, such as 2013-01-31T15:00, or first or last"
            ) from None
        return reference


@dataclass(frozen=True)
class Since(Transform):
    """A feature NAME__since: the time since a reference, as a number with fractions, negative before it."""

    Params: ClassVar[type[Frozen]] = SinceParams
    takes: ClassVar[frozenset[Form]] = frozenset({"datetime"})
    orders: ClassVar[tuple[Order, ...]] = ("rising",)

    reference: float
    unit: float
    """Both in microseconds."""

    @classmethod
    def gives(cls, params: SinceParams, form: Form) -> Form:
        return "numeric"

    @classmethod
    def fit(cls, params: SinceParams, statistics: NumberStatistics) -> Since:
        if params.reference in ("first", "last"):
            end = statistics.minimum if params.reference == "first" else statistics.maximum
            return cls(end if statistics.finite else 0.0, float(UNITS[params.unit]))
        instant = datetime.fromisoformat(params.reference)
        since = (instant if instant.tzinfo else instant.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
        micros = since.days * DAY + since.seconds * SECOND + since.microseconds
        return cls(float(micros), float(UNITS[params.unit]))

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=f"{feature.name}__since", kind="numeric")]

    def block(self, values: Numbers) -> list[Values]:
        return [(values - self.reference) / self.unit]

    def row(self, value: float) -> list[float]:
        return [(value - self.reference) / self.unit]

    def push(self, statistics: NumberStatistics) -> list[Statistics]:
        return [statistics.scaled(self.reference, self.unit)]


def calendar(days: Integers) -> dict[str, Integers]:
    """Parts of the date of days since 1970, proleptic Gregorian (Howard Hinnant, "chrono-compatible low-level date algorithms").

    Years begin in March inside, so that the leap day is a year's last; eras are 400 years.
    """
    era = (days + 719_468) // 146_097
    day_of_era = days + 719_468 - era * 146_097
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    months_since_march = (5 * day_of_year + 2) // 153
    month = (months_since_march + 2) % 12 + 1
    year = year_of_era + era * 400 + (month <= 2)
    before = year - 1
    return {
        "year": year,
        "quarter": (month + 2) // 3,
        "month": month,
        "day": day_of_year - (153 * months_since_march + 2) // 5 + 1,
        "weekday": (days + 3) % 7,
        "dayofyear": days - (365 * before + before // 4 - before // 100 + before // 400 - 719_162) + 1,
    }


def clock(micros: Integers, part: str) -> Integers:
    """A part of the time of day, which is microseconds since midnight."""
    found = micros // CLOCK[part]
    return found if part == "hour" else found % 60
