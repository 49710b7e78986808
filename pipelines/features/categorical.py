"""Transforms of categories: to codes by frequency, to codes by hash, to their share of the rows, to one 0/1 feature each.

The block path finds each text among the known ones by Arrow's hash table, or looks at each distinct text of a block once; the row
path by a dictionary.

What is counted is exact while a column has at most `stats.LIMIT` different texts. Beyond, only that many of the most frequent are
known and the others are as unseen: what does not repeat often says nothing that can be learned per category; use `hash`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Annotated, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipelines.features.stats import Numbers, NumberStatistics, Statistics, StringStatistics
from pipelines.features.transform import TEXT, Feature, Form, Transform, Values, coded
from pipelines.spec import Frozen


@dataclass(frozen=True)
class Lookup(Transform):
    """From a text to one number; missing stays missing."""

    takes: ClassVar[frozenset[Form]] = TEXT

    @abstractmethod
    def code(self, text: str) -> float:
        """The number of a text."""

    def block(self, values: pa.Array) -> list[Values]:
        return [codes_of(values, self.code)]

    def row(self, value: str | None) -> list[float]:
        return [math.nan if value is None else self.code(value)]

    def push(self, statistics: StringStatistics) -> list[Statistics]:
        if statistics.dropped_max:
            return super().push(statistics)
        [codes], [sample] = self.block(statistics.texts), self.block(statistics.sample)
        times = np.append(statistics.times.to_numpy(), statistics.missing)
        return [replace(NumberStatistics.of(np.append(codes, math.nan), times), sample=sample)]


@dataclass(frozen=True)
class Coding(Lookup):
    """From a text to one integer below `cardinality`."""

    @property
    @abstractmethod
    def cardinality(self) -> int:
        """How many codes there are."""

    @classmethod
    def gives(cls, params: Frozen, form: Form) -> Form:
        return "code"

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=feature.name, kind="categorical", cardinality=self.cardinality)]


class IndexParams(Frozen):
    """Which categories have a code of their own; the rest is "other"."""

    min_count: Annotated[int, Field(ge=1)] = 1
    """Categories in fewer train rows than this are other."""
    max_categories: Annotated[int, Field(ge=1)] | None = None
    """The most frequent ones, ties by text; null: all that were counted."""


@dataclass(frozen=True)
class Index(Coding):
    """Codes by descending frequency, ties by text.

    The last code stands for "other": categories that got no code of their own, and any text that training has not seen. Missing
    is not other but stays missing.
    """

    Params: ClassVar[type[Frozen]] = IndexParams

    categories: list[str]

    @classmethod
    def fit(cls, params: IndexParams, statistics: StringStatistics) -> Index:
        frequent = [text for text, times in statistics.ranked() if times >= params.min_count]
        return cls(frequent[: params.max_categories])

    @property
    def cardinality(self) -> int:
        return len(self.categories) + 1

    def code(self, text: str) -> float:
        return self._codes.get(text, self._other)

    def block(self, values: pa.Array) -> list[Values]:
        return [found_in(self._texts, np.arange(self.cardinality, dtype=np.float64), values)]

    @cached_property
    def _codes(self) -> dict[str, float]:
        return {text: float(i) for i, text in enumerate(self.categories)}

    @cached_property
    def _texts(self) -> pa.Array:
        return pa.array(self.categories, pa.large_string())

    @cached_property
    def _other(self) -> float:
        return float(len(self.categories))


class HashParams(Frozen):
    """How many codes there are."""

    buckets: Annotated[int, Field(ge=2, le=100_000)] = 1024
    """Texts share codes; about buckets / 2 categories keep most of them apart."""


@dataclass(frozen=True)
class Hash(Coding):
    """A code from the text alone: nothing is learned, so any number of categories is possible."""

    Params: ClassVar[type[Frozen]] = HashParams

    buckets: int

    @classmethod
    def fit(cls, params: HashParams, statistics: StringStatistics) -> Hash:
        return cls(params.buckets)

    @property
    def cardinality(self) -> int:
        return self.buckets

    def code(self, text: str) -> float:
        """Stored Artifacts rely on these values; a test pins them."""
        return float(
            int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") % self.buckets
        )


class FrequencyParams(Frozen):
    """Nothing to choose."""


@dataclass(frozen=True)
class Frequency(Lookup):
    """The share of the train rows that have the category, 0 for one that training has not seen; missing rows count as rows."""

    Params: ClassVar[type[Frozen]] = FrequencyParams

    shares: dict[str, float]

    @classmethod
    def gives(cls, params: FrequencyParams, form: Form) -> Form:
        return "numeric"

    @classmethod
    def fit(cls, params: FrequencyParams, statistics: StringStatistics) -> Frequency:
        return cls({text: times / statistics.count for text, times in statistics.ranked()})

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=feature.name, kind="numeric")]

    def code(self, text: str) -> float:
        return self.shares.get(text, 0.0)

    def block(self, values: pa.Array) -> list[Values]:
        return [found_in(*self._table, values)]

    @cached_property
    def _table(self) -> tuple[pa.Array, Numbers]:
        return pa.array(list(self.shares), pa.large_string()), np.array([*self.shares.values(), 0.0])


class OneHotParams(Frozen):
    """Which categories become features."""

    max_categories: Annotated[int, Field(ge=1, le=10_000)] = 100
    """The most frequent ones, ties by text."""


@dataclass(frozen=True)
class OneHot(Transform):
    """A feature NAME__CATEGORY, 0 or 1, for each category; an unknown or missing text is 0 in all of them."""

    Params: ClassVar[type[Frozen]] = OneHotParams
    takes: ClassVar[frozenset[Form]] = TEXT

    categories: list[str]

    @classmethod
    def gives(cls, params: OneHotParams, form: Form) -> Form:
        return "boolean"

    @classmethod
    def fit(cls, params: OneHotParams, statistics: StringStatistics) -> OneHot:
        return cls([text for text, _ in statistics.ranked()[: params.max_categories]])

    def outputs(self, feature: Feature) -> list[Feature]:
        return [Feature(name=f"{feature.name}__{text}", kind="boolean") for text in self.categories]

    def block(self, values: pa.Array) -> list[Values]:
        places = found_in(
            pa.array(self.categories, pa.large_string()), np.append(np.arange(len(self.categories)), math.nan), values
        )
        return [(places == place).astype(np.float64) for place in range(len(self.categories))]

    def row(self, value: str | None) -> list[float]:
        answer = [0.0] * len(self.categories)
        if value in self._places:
            answer[self._places[value]] = 1.0
        return answer

    @cached_property
    def _places(self) -> dict[str | None, int]:
        return {text: place for place, text in enumerate(self.categories)}


def found_in(texts: pa.Array, numbers: Numbers, values: pa.Array) -> Numbers:
    """Return for each value the number at its place among the texts, the last number where it is none of them; missing is NaN."""
    distinct, chosen = coded(values)
    places = pc.index_in(distinct.cast(pa.large_string()), value_set=texts).fill_null(len(texts)).to_numpy()
    found: Numbers = np.append(numbers[places], math.nan)[chosen]
    return found


def codes_of(values: pa.Array, code: Callable[[str], float]) -> Numbers:
    """Apply a function of one text to a block, once per distinct text; missing is NaN."""
    distinct, chosen = coded(values)
    codes: Numbers = np.array([*map(code, distinct.to_pylist()), math.nan])[chosen]
    return codes
