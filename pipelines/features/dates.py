"""Transforms of instants: to the parts of their date and time, to the time elapsed since a reference.

Instants are microseconds since 1970 as float64, UTC, exact to the microsecond until the year 2255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import Field, field_validator

from pipelines.features.stats import Numbers, NumberStatistics, Statistics
from pipelines.features.transform import Feature, Form, Transform, Values
from pipelines.spec import Frozen

SECOND: Final = 1_000_000
UNITS: Final = {"seconds": SECOND, "hours": 3600 * SECOND, "days": 86400 * SECOND}
DAY: Final = UNITS["days"]
LAST: Final = 2.0**62
"""What lies beyond has no date (int64 ends there): all its parts are missing."""

Part = Literal["year", "quarter", "month", "day", "weekday", "dayofyear", "hour", "minute", "second"]
Integers = Any  # an int, or an array of int64: the arithmetic below is the same


class PartsParams(Frozen):
    """Which parts become features."""

    which: Annotated[list[Part], Field(min_length=1)] = ["year", "month", "day", "weekday", "dayofyear", "hour"]
    """weekday: Monday is 0; all others as people write them."""

    @field_validator("which")
    @classmethod
    def _once(cls, which: list[Part]) -> list[Part]:
        if len(set(which)) < len(which):
            raise ValueError(f"a part stands there twice: {', '.join(which)}")
        return which


@dataclass(frozen=True)
class Parts(Transform):
    """Features NAME__year, NAME__month and so on."""

    Params: ClassVar[type[Frozen]] = PartsParams
    takes: ClassVar[frozenset[Form]] = frozenset({"datetime"})

    which: list[Part]

    @classmethod
    def gives(cls, params: PartsParams, form: Form) -> Form:
        return "numeric"

    @classmethod
    def fit(cls, params: PartsParams, statistics: NumberStatistics) -> Parts:
        return cls(list(params.which))

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=f"{feature.name}__{part}", kind="numeric") for part in self.which]

    def block(self, values: Numbers) -> list[Values]:
        has_date = np.abs(values) < LAST
        micros = np.floor(np.where(has_date, values, 0.0)).astype(np.int64)
        days = micros // DAY
        parts: dict[str, Integers]
        first, last = (int(days.min()), int(days.max())) if len(days) else (0, 0)
        if last - first < len(days):  # as a rule a day has many rows: work out each day once
            by_day = calendar(np.arange(first, last + 1))
            parts = {part: by_day[part][days - first] for part in self.which if part in by_day}
        else:
            parts = calendar(days)
        parts |= clock(micros - days * DAY)
        return [np.where(has_date, parts[part].astype(np.float64), np.nan) for part in self.which]

    def row(self, value: float) -> list[float]:
        if not abs(value) < LAST:
            return [math.nan] * len(self.which)
        micros = math.floor(value)
        days = micros // DAY
        parts = calendar(days) | clock(micros - days * DAY)
        return [float(parts[part]) for part in self.which]


class ElapsedParams(Frozen):
    """Since when, and in what."""

    unit: Literal["seconds", "hours", "days"] = "hours"
    reference: str = "1970-01-01"
    """ISO 8601; UTC where it names no zone."""

    @field_validator("reference")
    @classmethod
    def _instant(cls, reference: str) -> str:
        try:
            datetime.fromisoformat(reference)
        except ValueError:
            raise ValueError(f"reference '{reference}' is no date; expected ISO 8601, such as 2013-01-31T15:00") from None
        return reference


@dataclass(frozen=True)
class Elapsed(Transform):
    """A feature NAME__elapsed: the time since a reference, as a number with fractions."""

    Params: ClassVar[type[Frozen]] = ElapsedParams
    takes: ClassVar[frozenset[Form]] = frozenset({"datetime"})

    reference: float
    unit: float
    """Both in microseconds."""

    @classmethod
    def gives(cls, params: ElapsedParams, form: Form) -> Form:
        return "numeric"

    @classmethod
    def fit(cls, params: ElapsedParams, statistics: NumberStatistics) -> Elapsed:
        instant = datetime.fromisoformat(params.reference)
        since = (instant if instant.tzinfo else instant.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
        micros = since.days * DAY + since.seconds * SECOND + since.microseconds
        return cls(float(micros), float(UNITS[params.unit]))

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=f"{feature.name}__elapsed", kind="numeric")]

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


def clock(micros: Integers) -> dict[str, Integers]:
    """Parts of the time of day."""
    seconds = micros // SECOND
    return {"hour": seconds // 3600, "minute": seconds // 60 % 60, "second": seconds % 60}
