"""How do texts become numbers, booleans and instants? Strictly, by one form a column, with one function for blocks and rows.

A column of texts is given its form once, from the fixed sample; from then on a text that is not written in that form is an error
or, with `data.on_error: null`, missing. What CSV reads as null is missing here too.
"""

from __future__ import annotations

from typing import Final, Literal

import pyarrow as pa
import pyarrow.compute as pc

TextForm = Literal["number", "boolean", "iso", "Y/M/D", "D.M.Y", "D/M/Y", "M/D/Y"]

NULLS: Final = ("", "NA", "NaN", "nan", "null", "NULL", "N/A", "#N/A")
BOOLEANS: Final = {"true": True, "false": False, "yes": True, "no": False, "y": True, "n": False, "t": True, "f": False}
NUMBER: Final = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
INTEGER: Final = r"^-?[0-9]{1,18}$"
ISO: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[-+][0-9]{2}:?[0-9]{2})?)?$"
ZONE: Final = r":.*(Z|[-+][0-9]{2}:?[0-9]{2})$"
TO_ISO: Final[dict[TextForm, tuple[str, str]]] = {
    "Y/M/D": (r"^([0-9]{4})/([0-9]{2})/([0-9]{2})", r"\1-\2-\3"),
    "D.M.Y": (r"^([0-9]{2})\.([0-9]{2})\.([0-9]{4})", r"\3-\2-\1"),
    "D/M/Y": (r"^([0-9]{2})/([0-9]{2})/([0-9]{4})", r"\3-\2-\1"),
    "M/D/Y": (r"^([0-9]{2})/([0-9]{2})/([0-9]{4})", r"\3-\1-\2"),
}
"""Dates with their parts in another order; a time of day may follow, as in ISO 8601."""


def parse(values: pa.ChunkedArray, form: TextForm, target: pa.DataType, *, lenient: bool = False) -> pa.ChunkedArray:
    """Return texts as int64, float64, bool or timestamp in UTC (microseconds).

    Raises `pyarrow.ArrowInvalid` for a text that is not written in the form; with `lenient` it becomes null.
    """
    texts = _said(values)
    if pa.types.is_boolean(target):
        return _checked(_booleans(texts), texts, form, lenient)
    if pa.types.is_timestamp(target):
        return _checked(_instants(texts, form), texts, form, lenient)
    well_formed = pc.match_substring_regex(texts, INTEGER if pa.types.is_integer(target) else NUMBER)
    return _checked(_only(texts, well_formed).cast(target), texts, form, lenient)


def is_blank(values: pa.Array) -> pa.Array:
    """Which texts say nothing."""
    return pc.is_null(_said(values))


def _said(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The texts without the space around them; null where there is nothing else, or a word for nothing."""
    texts = pc.utf8_trim_whitespace(values.cast(pa.large_string()))
    return _only(texts, pc.invert(pc.is_in(texts, value_set=pa.array(NULLS, pa.large_string()))))


def _booleans(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    places = pc.index_in(pc.utf8_lower(texts), value_set=pa.array(list(BOOLEANS), pa.large_string()))
    return pc.take(pa.array(list(BOOLEANS.values())), places)


def _instants(texts: pa.ChunkedArray, form: TextForm) -> pa.ChunkedArray:
    if form in TO_ISO:
        pattern, order = TO_ISO[form]
        padded = pc.replace_substring_regex(texts, r"\b([0-9])\b", r"0\1")  # 1/2/2013 9:05
        texts = pc.replace_substring_regex(_only(padded, pc.match_substring_regex(padded, pattern)), pattern, order)
    texts = _only(texts, _is_instant(texts))
    is_zoned = pc.match_substring_regex(texts, ZONE)
    zoned = _only(texts, is_zoned).cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us"))
    return pc.coalesce(zoned, _only(texts, pc.invert(is_zoned)).cast(pa.timestamp("us")))


def _is_instant(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether a text is ISO 8601 and its day and time exist; Arrow's cast would end the whole block for one 30 February."""
    well_formed = pc.match_substring_regex(texts, ISO)
    distinct = pc.unique(_only(pc.utf8_slice_codeunits(texts, 0, 10), well_formed)).drop_null()
    days = pa.array([day for day in distinct.to_pylist() if _exists(day)], pa.large_string())
    exists = pc.is_in(pc.utf8_slice_codeunits(texts, 0, 10), value_set=days)
    clock = pc.match_substring_regex(texts, r"^.{10}($|.([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]|$|[^:0-9]))")
    zone = pc.or_(
        pc.invert(pc.match_substring_regex(texts, r":.*[-+]")),
        pc.match_substring_regex(texts, r"[-+]([01][0-9]|2[0-3]):?[0-5][0-9]$"),
    )
    return pc.and_(pc.and_(well_formed, exists), pc.and_(clock, zone))


def _exists(day: str) -> bool:
    try:
        pa.scalar(day).cast(pa.timestamp("us"))
    except pa.ArrowInvalid:
        return False
    return True


def _only(texts: pa.ChunkedArray, where: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(where, texts, pa.scalar(None, pa.large_string()))


def _checked(parsed: pa.ChunkedArray, texts: pa.ChunkedArray, form: TextForm, lenient: bool) -> pa.ChunkedArray:
    if not lenient and parsed.null_count > texts.null_count:
        wrong = texts.filter(pc.and_(pc.is_null(parsed), pc.is_valid(texts)))[0].as_py()
        what = {"number": "number", "boolean": "yes or no"}.get(form, f"date ({form})")
        raise pa.ArrowInvalid(f"'{wrong[:40]}' is no {what}")
    return parsed
