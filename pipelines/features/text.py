"""Transforms of free text: how long it is, and its words and runs of characters, hashed into a fixed number of features.

Both paths give their texts to the same functions, a row as a list of one. These work on the code points of all texts in one
array, with no loop over texts or n-grams, in integers that are the same everywhere: nothing is learned and nothing depends on
a library's hash.

A word is a run of ASCII letters, digits and _, and of whatever is beyond ASCII but spaces and punctuation: letters of any script,
their accents, symbols. Scripts that put no spaces between words need `characters`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import AfterValidator, Field, field_validator

from pipelines.explain import shown
from pipelines.features.stats import Numbers, StringStatistics
from pipelines.features.transform import TEXT, Feature, Form, Transform, Values, once
from pipelines.spec import Frozen

Integers = npt.NDArray[Any]

CODE_POINTS: Final = 0x110000
NO_WORD: Final = [
    *[(0x00, 0x2F), (0x3A, 0x40), (0x5B, 0x5E), (0x60, 0x60), (0x7B, 0xA9), (0xAB, 0xB4), (0xB6, 0xB9), (0xBB, 0xBF)],
    *[(0xD7, 0xD7), (0xF7, 0xF7), (0x1680, 0x1680), (0x2000, 0x206F), (0x3000, 0x3003), (0x3008, 0x3020), (0x3030, 0x3030)],
    *[(0xFE30, 0xFE52), (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF3E), (0xFF40, 0xFF40), (0xFF5B, 0xFF65)],
]
"""Code points, first and last, that stand between words. A list of our own: Python's grows with each version of Unicode."""
STRIPE: Final = 16_384
"""Characters that are worked on at a time: their arrays stay in the processor's cache, which makes it four times as fast."""
CELLS: Final = 131_072
"""Counts that are made at a time: texts times buckets."""

# Stored Artifacts rely on these; a test pins the buckets that they give.
CHARACTER: Final = np.uint64(0x9E3779B97F4A7C15)
INVERSE: Final = np.uint64(pow(int(CHARACTER), -1, 2**64))
WORD: Final = np.uint64(0xC2B2AE3D27D4EB4F)
MIX: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class LengthParams(Frozen):
    """What is counted."""

    which: Annotated[list[Literal["characters", "words"]], Field(min_length=1), AfterValidator(once)] = ["characters", "words"]


@dataclass(frozen=True)
class Length(Transform):
    """Features NAME__characters (Unicode code points) and NAME__words; missing stays missing, the empty text has 0 of both."""

    Params: ClassVar[type[Frozen]] = LengthParams
    takes: ClassVar[frozenset[Form]] = TEXT

    which: list[str]

    @classmethod
    def gives(cls, params: LengthParams, form: Form) -> Form:
        return "numeric"

    @classmethod
    def fit(cls, params: LengthParams, statistics: StringStatistics) -> Length:
        return cls(list(params.which))

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=f"{feature.name}__{count}", kind="numeric") for count in self.which]

    def block(self, values: pa.Array) -> list[Values]:
        missing = values.is_null().to_numpy(zero_copy_only=False)
        counts = [self._counts(Characters.of(texts)) for texts in stripes(values, CELLS)]
        return [np.where(missing, math.nan, np.concatenate([c[i] for c in counts])) for i in range(len(self.which))]

    def row(self, value: str | None) -> list[float]:
        if value is None:
            return [math.nan] * len(self.which)
        return [float(count[0]) for count in self._counts(Characters.of([value]))]

    def _counts(self, characters: Characters) -> list[Integers]:
        return [
            characters.lengths if count == "characters" else np.bincount(characters.words[0], minlength=characters.num_texts)
            for count in self.which
        ]


class NgramsParams(Frozen):
    """Which n-grams are counted, and how."""

    words: list[int] | None = None
    """The fewest and the most words that follow each other; default: [1, 2] where there are no characters."""
    characters: list[int] | None = None
    """The fewest and the most characters that follow each other, those between words too; [3, 5] is usual."""
    buckets: Annotated[int, Field(ge=2, le=4096)] = 256
    """Features that the n-grams share; each is a column of 8 bytes a row while a block is transformed."""
    weight: Literal["log", "count", "binary"] = "log"
    """log: log(1 + count); binary: 1 where there is any."""
    lowercase: bool = True
    """Whether upper and lower case are the same; character by character, so ß stays ß."""

    @field_validator("words", "characters")
    @classmethod
    def _sizes(cls, sizes: list[int] | None) -> list[int] | None:
        if sizes is not None and (len(sizes) != 2 or not 1 <= sizes[0] <= sizes[1] <= 10):
            raise ValueError(f"found {shown(sizes)}, expected the smallest and the largest size, from 1 to 10, such as [1, 2]")
        return sizes


@dataclass(frozen=True)
class Ngrams(Transform):
    """Features NAME__0, NAME__1 and so on: how many n-grams of the text fall into each bucket; 0 in all where it is missing."""

    Params: ClassVar[type[Frozen]] = NgramsParams
    takes: ClassVar[frozenset[Form]] = TEXT

    words: list[int] | None
    characters: list[int] | None
    buckets: int
    weight: str
    lowercase: bool

    @classmethod
    def gives(cls, params: NgramsParams, form: Form) -> Form:
        return "numeric"

    @classmethod
    def fit(cls, params: NgramsParams, statistics: StringStatistics) -> Ngrams:
        words = [1, 2] if params.words is None and params.characters is None else params.words
        return cls(words, params.characters, params.buckets, params.weight, params.lowercase)

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=f"{feature.name}__{bucket}", kind="numeric") for bucket in range(self.buckets)]

    def block(self, values: pa.Array) -> list[Values]:
        found = np.empty((self.buckets, len(values)), np.float64)
        start = 0
        for texts in stripes(values, max(1, CELLS // self.buckets)):
            found[:, start : start + len(texts)] = self._weighted(texts).T
            start += len(texts)
        return list(found)

    def row(self, value: str | None) -> list[float]:
        if not value:
            return [0.0] * self.buckets
        weighted: list[float] = self._weighted([value])[0].tolist()
        return weighted

    def _weighted(self, texts: list[str]) -> Numbers:
        counts = self._counts(Characters.of(texts, lowercase=self.lowercase))
        if self.weight == "binary":
            return (counts > 0).astype(np.float64)
        if self.weight == "count":
            return counts.astype(np.float64)
        logarithms: Numbers = np.log1p(np.arange(counts.max(initial=0) + 1.0))  # there are few different counts
        return logarithms[counts]

    def _counts(self, characters: Characters) -> Integers:
        """Return how many n-grams of each text fall into each bucket, as (texts, buckets)."""
        texts, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        for kind, sizes in ((1, self.words), (2, self.characters)):
            if sizes is None:
                continue
            of, units = characters.words if kind == 1 else (characters.texts, characters.points)
            for size, runs in enumerate(_runs(units, sizes[1], WORD if kind == 1 else CHARACTER), 1):
                if size >= sizes[0]:
                    of_first, of_last = of[: len(runs)], of[size - 1 :]
                    # A run that goes on into the next text is counted behind the last text, and left out.
                    texts.append(np.where(of_first == of_last, of_first, characters.num_texts))
                    hashes.append(runs + np.uint64(kind << 32 | size))
        places = np.concatenate(texts) * self.buckets + _buckets(np.concatenate(hashes), self.buckets)
        shape = characters.num_texts + 1, self.buckets
        return np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape)[:-1]


@dataclass(frozen=True)
class Characters:
    """The code points of some texts, behind each other."""

    points: Integers
    lengths: Integers
    """Of each text."""

    @classmethod
    def of(cls, texts: list[str], *, lowercase: bool = False) -> Characters:
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        return cls(_lower()[points] if lowercase else points, np.fromiter(map(len, texts), np.int64, len(texts)))

    @property
    def num_texts(self) -> int:
        return len(self.lengths)

    @cached_property
    def texts(self) -> Integers:
        """Which text each code point belongs to."""
        return np.repeat(np.arange(self.num_texts), self.lengths)

    @cached_property
    def words(self) -> tuple[Integers, Integers]:
        """Which text each word belongs to, and a hash of it."""
        in_word = _in_word()[self.points]
        goes_on = np.zeros(len(in_word), np.bool_)
        goes_on[1:] = in_word[1:] & in_word[:-1] & (self.texts[1:] == self.texts[:-1])
        starts = np.flatnonzero(in_word & ~goes_on)
        if not len(starts):
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        # A word's hash is the sum of its code points, each times a power of CHARACTER by its place in the word. By powers of the
        # place in the stripe it is a difference of running sums, which the inverse power then moves to the word's start.
        ends = np.flatnonzero(in_word & ~np.append(goes_on[1:], False)) + 1
        powers, inverses = _powers(CHARACTER, len(in_word) + 1), _powers(INVERSE, len(in_word) + 1)
        sums = np.zeros(len(in_word) + 1, np.uint64)
        np.cumsum(self.points * powers[1:], out=sums[1:])
        return self.texts[starts], (sums[ends] - sums[starts]) * inverses[starts]


def stripes(values: pa.Array, most: int) -> Iterator[list[str]]:
    """Cut a block into one or more lists of at most `most` texts and about STRIPE characters; null is the empty text."""
    texts = [text or "" for text in values.to_pylist()]
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    start = 0
    while start < len(texts) or start == 0:
        stop = int(np.searchsorted(ends, STRIPE + (ends[start - 1] if start else 0), side="right"))
        stop = min(max(start + 1, stop), start + most)
        yield texts[start:stop]
        start = stop


def _runs(units: Integers, most: int, base: np.uint64) -> Iterator[Integers]:
    """Yield a hash of every 1, 2 ... `most` units that follow each other."""
    powers = _powers(base, most + 1)
    runs = units * powers[1]
    yield runs
    for size in range(1, most):
        runs = runs[:-1] + units[size:] * powers[size + 1]
        yield runs


@lru_cache(maxsize=4)
def _table(base: np.uint64, bits: int) -> Integers:
    powers = np.full(1 << bits, base)
    powers[0] = 1
    return np.cumprod(powers)


def _powers(base: np.uint64, number: int) -> Integers:
    """1, base, base ** 2 and so on, modulo 2 ** 64."""
    return _table(base, number.bit_length())[:number]


def _buckets(hashes: Integers, buckets: int) -> Integers:
    """Mix the bits (the end of splitmix64), so that each bucket is equally likely, and take the bucket from the upper half."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * MIX[0]
    hashes = (hashes ^ (hashes >> np.uint64(27))) * MIX[1]
    return (((hashes >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


@lru_cache(maxsize=1)
def _lower() -> Integers:
    """The lower case of each code point, itself where that would be several. Python's: a later Unicode only adds to it."""
    table = np.arange(CODE_POINTS, dtype=np.uint32)
    for point in range(0x1F000):  # beyond are no letters with case
        lower = chr(point).lower()
        if len(lower) == 1:
            table[point] = ord(lower)
    return table


@lru_cache(maxsize=1)
def _in_word() -> npt.NDArray[np.bool_]:
    """Whether each code point is part of a word."""
    table = np.ones(CODE_POINTS, np.bool_)
    for first, last in NO_WORD:
        table[first : last + 1] = False
    return table
