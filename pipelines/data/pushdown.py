"""What of `data.where` is decided without reading rows: by a folder's name, or by a row group's smallest and largest value.

Everything here errs on the side of reading: a part of the predicate that is not understood excludes nothing.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from polars.exceptions import PolarsError

from pipelines.expressions import Predicate

# Words that join or negate: a text with one of them outside brackets is no plain list of conditions.
UNSPLITTABLE: Final = re.compile(r"\b(or|not|xor|between|case)\b", re.IGNORECASE)
SIMPLE: Final = re.compile(
    r"""\s*(?:"(?P<quoted>[^"]+)"|(?P<plain>[A-Za-z_]\w*))\s*
    (?:(?P<op><=|>=|==|=|<|>)\s*(?:(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)|'(?P<text>[^'\\]*)')|(?P<valid>is\s+not\s+null))\s*$""",
    re.IGNORECASE | re.VERBOSE,
)


class Bounds(NamedTuple):
    """What is known of the values of a column in some rows."""

    low: Any
    """None where the smallest and largest value are not known."""
    high: Any
    all_null: bool


class Condition(NamedTuple):
    """`column op value`; the operator `valid` has no value: the column is not null."""

    column: str
    op: str
    value: int | float | str | None

    def excludes(self, bounds: Bounds) -> bool:
        """Whether no row with these bounds can satisfy it."""
        if bounds.all_null:
            return True
        if self.op == "valid" or bounds.low is None or bounds.high is None:
            return False
        low, high, value = bounds.low, bounds.high, self.value
        if isinstance(value, str) != isinstance(low, str) or isinstance(low, bool) or not isinstance(low, (int, float, str)):
            return False
        if isinstance(low, float) and self.op in (">", ">="):
            return False  # NaN, which no footer counts, is greater than any number
        if isinstance(value, float):  # the comparison will be made in float64
            low, high = float(low), float(high)
        elif isinstance(value, int) and isinstance(low, float):
            value = float(value)
        return bool(
            {
                "<": lambda: low >= value,
                "<=": lambda: low > value,
                ">": lambda: high <= value,
                ">=": lambda: high < value,
            }.get(self.op, lambda: low > value or high < value)()
        )


def conjuncts(sql: str) -> list[str]:
    """The parts of a predicate that all have to be true; the whole predicate where it cannot be told apart safely."""
    depth, start, quote, outside, parts = 0, 0, "", "", list[str]()
    position = 0
    while position < len(sql):
        character = sql[position]
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"`":
            quote = character
        elif character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif depth == 0:
            if re.match(r"and\b", sql[position:], re.IGNORECASE) and not re.match(r"\w", sql[position - 1 : position] or " "):
                parts.append(sql[start:position])
                start = position + 3
            outside += character
        if quote or depth:
            outside += " "
        position += 1
    parts.append(sql[start:])
    plain = not UNSPLITTABLE.search(re.sub(r"\bis\s+not\s+null\b", "", outside, flags=re.IGNORECASE))
    safe = plain and not quote and depth == 0 and "--" not in sql and "/*" not in sql
    return [part.strip() for part in parts] if safe else [sql]


def conditions(sql: str | None) -> list[Condition]:
    """The parts of the form `column op literal`."""
    matches = [SIMPLE.match(part) for part in conjuncts(sql)] if sql else []
    return [_condition(match) for match in matches if match is not None]


def _condition(match: re.Match[str]) -> Condition:
    column = match["quoted"] or match["plain"]
    if match["valid"]:
        return Condition(column, "valid", None)
    value: int | float | str
    if match["text"] is not None:
        value = match["text"]
    else:
        value = int(match["number"]) if re.fullmatch(r"-?\d+", match["number"]) else float(match["number"])
    return Condition(column, match["op"], value)


def decided_by(sql: str | None, columns: set[str]) -> list[Predicate]:
    """The parts that need no other columns than these."""
    parts = [Predicate(sql=part) for part in conjuncts(sql)] if sql else []
    try:
        return [part for part in parts if part.columns and part.columns <= columns]
    except PolarsError:
        return []  # no SQL: its check says so
