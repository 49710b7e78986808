"""Which split a row belongs to, as a pure function of the row's identity and the seed.

A row's identity is a 64-bit hash: of the `data.key` columns, else of the file's name relative to the source's root and the
row's number in that file. Everything random about rows (split, sample, fold) is the identity mixed with a salt, so no number of
workers, blocks or reads changes it. The values are pinned in a test: they hold for any version.
"""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa

from pipelines.schema import texts
from pipelines.spec import SplitSpec

SPLITS: Final = ("train", "valid", "test")
SPLIT_SALT: Final = 0x5B117
SAMPLE_SALT: Final = 0x5A3B1E
FOLD_SALT: Final = 0xF01D5

Hashes = np.ndarray[tuple[int], np.dtype[np.uint64]]
Splits = np.ndarray[tuple[int], np.dtype[np.int8]]
"""A split's number for each row."""


def mix(values: Hashes) -> Hashes:
    """Scramble 64-bit integers, one to one (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def salted(identity: Hashes, salt: int) -> Hashes:
    """A hash of the identity that has nothing to do with the one of another salt."""
    constant = mix(np.array([salt & 0xFFFFFFFFFFFFFFFF], np.uint64))
    return mix(identity ^ constant)


def uniform(hashes: Hashes) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Numbers in [0, 1) from the 53 high bits."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def in_sample(identity: Hashes, share: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which rows are among a share of all rows, the same ones whatever is read."""
    return uniform(salted(identity, SAMPLE_SALT)) < share


def in_folds(identity: Hashes, groups: pa.ChunkedArray | None) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Where rows stand in [0, 1) for folds (`floor(place * folds)`); rows of a group, which is never split, stand together."""
    return uniform(salted(identity if groups is None else _of_groups(identity, groups), FOLD_SALT))


def identity_of_rows(name_hash: int, first_row: int, rows: int) -> Hashes:
    """Identities of consecutive rows of a file."""
    numbers = np.arange(first_row, first_row + rows, dtype=np.uint64)
    return mix(np.uint64(name_hash) ^ mix(numbers + np.uint64(0x9E3779B97F4A7C15)))


def identity_of_values(columns: list[pa.ChunkedArray]) -> Hashes:
    """Identities from values (`data.key`, groups); a null is a value like any other. Equal texts of values are equal."""
    total: Hashes | None = None
    for column in columns:
        # pandas hashes strings with SipHash and a fixed key: vectorised, the same on every platform.
        text = texts(column).to_numpy(zero_copy_only=False)
        hashes = mix(pd.util.hash_array(np.where(pd.isna(text), "\0null", text).astype(object), categorize=False))
        total = hashes if total is None else mix(total * np.uint64(0x9E3779B97F4A7C15) ^ hashes)
    assert total is not None
    return total


def assign(
    spec: SplitSpec, identity: Hashes, values: pa.ChunkedArray | None, own: frozenset[str], given: str | None
) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
    """Return each row's split as an index into SPLITS.

    `values` is the time or group column. `given` is the split that the source gives to these rows: then only train rows are
    divided further, and only among splits that have no source of their own (`own`).
    """
    rows = len(identity)
    if given is not None and given != "train":
        return np.full(rows, SPLITS.index(given), np.int8)
    test = 0.0 if "test" in own else spec.test
    valid = 0.0 if "valid" in own else spec.valid
    if spec.by == "time":
        assert values is not None and spec.cuts is not None
        return _by_time(values, spec.cuts, valid > 0, test > 0)
    if spec.by == "group":
        assert values is not None
        identity = _of_groups(identity, values)
    place = uniform(salted(identity, SPLIT_SALT + (spec.seed << 20)))
    if spec.fold is not None and "valid" not in own:
        part, parts = spec.fold
        each = (1 - test) / parts
        first, last = test + each * part, test + each * (part + 1) if part + 1 < parts else 1.0
        return np.where(place < test, 2, np.where((place >= first) & (place < last), 1, 0)).astype(np.int8)
    return np.where(place < test, 2, np.where(place < test + valid, 1, 0)).astype(np.int8)


def grouped(
    numbers: np.ndarray[tuple[int], np.dtype[Any]], size: int
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]] | slice, list[int]]:
    """Return the order that puts rows of the same number from 0 to `size` together, each in their order, and where each ends.

    Rows of number i are `order[ends[i]:ends[i + 1]]`. It is a slice where all rows have one number.
    """
    ends = [0, *np.cumsum(np.bincount(numbers, minlength=size)).tolist()]
    if any(first == 0 and last == len(numbers) for first, last in itertools.pairwise(ends)):
        return slice(None), ends
    return np.argsort(numbers, kind="stable"), ends  # a radix sort for small integers


def _of_groups(identity: Hashes, groups: pa.ChunkedArray) -> Hashes:
    """The identities of the rows' groups; a row without a group is a group of its own."""
    missing = groups.is_null().to_numpy(zero_copy_only=False)
    return np.where(missing, identity, identity_of_values([groups]))


def _by_time(values: pa.ChunkedArray, cuts: list[str], valid: bool, test: bool) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
    times = values.cast(pa.int64()).fill_null(np.iinfo(np.int64).min).to_numpy()  # a row without a time is a train row
    first, second = (np.datetime64(cut, "us").astype(np.int64) for cut in cuts)
    result = np.zeros(len(times), np.int8)
    if valid:
        result[times >= first] = 1
    if test:
        result[times >= second] = 2
    return result
