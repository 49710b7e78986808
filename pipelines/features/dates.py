"""Transforms of instants: to the parts of their date and time, to places on a circle, to the time since a reference.

Instants are microseconds since 1970 as float64, UTC, exact to the microsecond until the year 2255. What a clock shows is that of
UTC, or of the `zone` of the step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import numpy as np
from pydantic import Field, field_validator

from pipelines.features.stats import Numbers, NumberStatistics, Statistics
from pipelines.features.transform import Feature, Form, Transform, Values
from pipelines.features.zones import check_zone, offsets
from pipelines.spec import Frozen

SECOND: Final = 1_000_000
UNITS: Final = {"seconds": SECOND, "hours": 3600 * SECOND, "days": 86400 * SECOND}
DAY: Final = UNITS["days"]
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
W = TypeVar("W", bound=str)
Integers = Any  # an int, or an array of int64: the arithmetic below is the same


class ClockParams(Frozen):
    """Whose clock is read."""

    zone: str | None = None
    """A name of the IANA database, such as Europe/Berlin; default: UTC. Changes of its offset are followed from 1900 to 2100."""

    @field_validator("zone")
    @classmethod
    def _known(cls, zone: str | None) -> str | None:
        return check_zone(zone)


@dataclass(frozen=True)
class Clock(Transform):
    """What reads date and time off a clock."""

    takes: ClassVar[frozenset[Form]] = frozenset({"datetime"})

    changes: list[int]
    offsets: list[int]
    """Instants at which the clock's offset to UTC changes; the offsets before, between and behind them. In microseconds."""

    @classmethod
    def gives(cls, params: Any, form: Form) -> Form:
        return "numeric"

    def parts_of_block(self, values: Numbers, which: Collection[str]) -> tuple[dict[str, Integers], Any]:
        """Return the named parts of each instant, and where there is one; elsewhere the parts mean nothing."""
        has_date = np.abs(values) < LAST
        micros = np.floor(np.where(has_date, values, 0.0)).astype(np.int64)
        if self.changes:
            changes, offsets = self._table
            micros += offsets[np.searchsorted(changes, micros, side="right")]
        else:
            micros += self.offsets[0]
        days = micros // DAY
        parts: dict[str, Integers]
        first, last = (int(days.min()), int(days.max())) if len(days) else (0, 0)
        if last - first < len(days):  # as a rule a day has many rows: work out each day once
            by_day = calendar(np.arange(first, last + 1))
            parts = {part: by_day[part][days - first] for part in which if part in by_day}
        else:
            parts = calendar(days)
        return parts | clock(micros - days * DAY), has_date

    def parts_of_row(self, value: float) -> dict[str, Integers] | None:
        """Return all parts of one instant; None where there is none."""
        if not abs(value) < LAST:
            return None
        micros = math.floor(value)
        micros += self.offsets[bisect_right(self.changes, micros)]
        days = micros // DAY
        return calendar(days) | clock(micros - days * DAY)

    @cached_property
    def _table(self) -> tuple[Any, Any]:
        return np.array(self.changes, np.int64), np.array(self.offsets, np.int64)


class PartsParams(ClockParams):
    """Which parts become features."""

    which: Annotated[list[Part], Field(min_length=1)] = ["year", "month", "day", "weekday", "dayofyear", "hour"]
    """weekday: Monday is 0; all others as people write them."""

    @field_validator("which")
    @classmethod
    def _once(cls, which: list[Part]) -> list[Part]:
        return once(which)


@dataclass(frozen=True)
class Parts(Clock):
    """Features NAME__year, NAME__month and so on."""

    Params: ClassVar[type[Frozen]] = PartsParams

    which: list[Part]

    @classmethod
    def fit(cls, params: PartsParams, statistics: NumberStatistics) -> Parts:
        changes, found = offsets(params.zone)
        return cls(list(changes), list(found), list(params.which))

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=f"{feature.name}__{part}", kind="numeric") for part in self.which]

    def block(self, values: Numbers) -> list[Values]:
        parts, has_date = self.parts_of_block(values, self.which)
        return [np.where(has_date, parts[part].astype(np.float64), np.nan) for part in self.which]

    def row(self, value: float) -> list[float]:
        parts = self.parts_of_row(value)
        return [math.nan] * len(self.which) if parts is None else [float(parts[part]) for part in self.which]


class CyclicParams(ClockParams):
    """Which parts are laid on a circle."""

    which: Annotated[list[Circle], Field(min_length=1)] = ["hour", "weekday", "month", "dayofyear"]

    @field_validator("which")
    @classmethod
    def _once(cls, which: list[Circle]) -> list[Circle]:
        return once(which)


@dataclass(frozen=True)
class Cyclic(Clock):
    """Features NAME__hour_sin, NAME__hour_cos and so on: the last hour of a day lies beside the first of the next."""

    Params: ClassVar[type[Frozen]] = CyclicParams

    which: list[Circle]

    @classmethod
    def fit(cls, params: CyclicParams, statistics: NumberStatistics) -> Cyclic:
        changes, found = offsets(params.zone)
        return cls(list(changes), list(found), list(params.which))

    def outputs(self, feature: Feature) -> list[Feature]:
        names = [f"{feature.name}__{part}_{wave}" for part in self.which for wave in ("sin", "cos")]
        return [Feature(name=name, kind="numeric") for name in names]

    def block(self, values: Numbers) -> list[Values]:
        parts, has_date = self.parts_of_block(values, self.which)
        return [
            np.where(has_date, wave[parts[part] - CIRCLES[part][0]], np.nan) for part in self.which for wave in self._waves[part]
        ]

    def row(self, value: float) -> list[float]:
        parts = self.parts_of_row(value)
        if parts is None:
            return [math.nan] * (2 * len(self.which))
        return [float(wave[parts[part] - CIRCLES[part][0]]) for part in self.which for wave in self._waves[part]]

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


def once(which: list[W]) -> list[W]:
    """Return a list of parts, or raise `ValueError` when one stands there twice."""
    if len(set(which)) < len(which):
        raise ValueError(f"a part stands there twice: {', '.join(which)}")
    return which


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


def clock(micros: Integers) -> dict[str, Integers]:
    """Parts of the time of day."""
    seconds = micros // SECOND
    return {"hour": seconds // 3600, "minute": seconds // 60 % 60, "second": seconds % 60}
