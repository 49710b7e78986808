"""How far is the clock of a time zone from UTC at an instant? A table of the changes, made from the IANA database when fitting.

The table is fitted state: a prediction needs no database, and a later version of it with other rules changes no trained model.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from pipelines.errors import did_you_mean

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
FIRST: Final = datetime(1900, 1, 1, tzinfo=UTC)
LAST: Final = datetime(2100, 1, 1, tzinfo=UTC)
"""Between these the offset is right; before and after it is what it was there."""
STEP: Final = timedelta(days=1)
"""No zone of the database changes its offset twice within three days after 1900."""
MICROSECOND: Final = timedelta(microseconds=1)


def check_zone(zone: str | None) -> str | None:
    """Return the name of a zone, or raise `ValueError` when the IANA database has none of this name."""
    try:
        if zone is not None:
            ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # a folder of the database is an OSError
        raise ValueError(f"zone '{zone}' is unknown{did_you_mean(str(zone), available_timezones())}") from None
    return zone


@lru_cache(maxsize=64)
def offsets(zone: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the instants at which the offset to UTC changes, and the offsets before, between and behind them, in microseconds.

    None is UTC. Takes some 40 ms for a zone.
    """
    if zone is None:
        return (), (0,)
    clock, at = ZoneInfo(zone), FIRST
    changes, found = [], [_offset(clock, at)]
    while at < LAST:
        if _offset(clock, at + STEP) != found[-1]:
            changes.append(_change(clock, at, at + STEP))
            found.append(_offset(clock, at + STEP))
        at += STEP
    return tuple(changes), tuple(found)


def _change(clock: ZoneInfo, before: datetime, after: datetime) -> int:
    """The first second between two instants that has the second one's offset, in microseconds."""
    while after - before > timedelta(seconds=1):
        middle = before + timedelta(seconds=(after - before) // timedelta(seconds=2))
        before, after = (middle, after) if _offset(clock, middle) == _offset(clock, before) else (before, middle)
    return (after - EPOCH) // MICROSECOND


def _offset(clock: ZoneInfo, instant: datetime) -> int:
    offset = instant.astimezone(clock).utcoffset()
    assert offset is not None
    return offset // MICROSECOND
