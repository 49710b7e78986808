"""Crosses: one categorical feature from what several columns hold together.

A value counts as its category's text, a number too, and a missing one as a value of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipelines.features.stats import Statistics
from pipelines.features.transform import TEXT, Feature, Form, Transform, Value, Values, coded
from pipelines.schema import category_text
from pipelines.spec import Frozen


class CrossParams(Frozen):
    """How many codes there are."""

    buckets: Annotated[int, Field(ge=2, le=100_000)] = 1024
    """Combinations share codes; about buckets / 2 of them keep most apart."""


@dataclass(frozen=True)
class Cross(Transform):
    """A code from the combination of the values alone: nothing is learned. Never missing."""

    Params: ClassVar[type[Frozen]] = CrossParams
    takes: ClassVar[frozenset[Form]] = frozenset({*TEXT, "code", "boolean", "numeric"})
    joins: ClassVar[bool] = True

    buckets: int

    @classmethod
    def gives(cls, params: CrossParams, *forms: Form) -> Form:
        return "code"

    @classmethod
    def fit(cls, params: CrossParams, *statistics: Statistics) -> Cross:
        return cls(params.buckets)

    def outputs(self, *features: Feature, group: str) -> list[Feature]:
        return [Feature(name=group, kind="categorical", cardinality=self.buckets)]

    def block(self, *values: Values) -> list[Values]:
        """Each combination that is there is hashed once."""
        found = [distinct(column) for column in values]
        (texts, _), chosen = found[0], found[0][1]
        combined = [(text,) for text in texts]
        for texts, places in found[1:]:
            pairs, chosen = np.unique(chosen * max(1, len(texts)) + places, return_inverse=True)
            combined = [(*combined[pair // len(texts)], texts[pair % len(texts)]) for pair in pairs.tolist()]
        return [np.array([self.code(*each) for each in combined], np.float64)[chosen]]

    def row(self, *values: Value) -> list[float]:
        return [self.code(*map(text_of, values))]

    def code(self, *texts: str | None) -> float:
        """Stored Artifacts rely on these values; a test pins them."""
        digest = blake2b(digest_size=8)
        for text in texts:  # with its length, so that no two combinations are the same bytes
            content = b"" if text is None else text.encode("utf-8", "surrogatepass")
            digest.update((0 if text is None else len(content) + 1).to_bytes(8, "little") + content)
        return float(int.from_bytes(digest.digest(), "little") % self.buckets)


def text_of(value: Value) -> str | None:
    """The category of a value; None is missing."""
    if value is None or value != value:
        return None
    return value if isinstance(value, str) else category_text(value)


def distinct(values: Values) -> tuple[list[str | None], npt.NDArray[np.int64]]:
    """Return the categories of a block, each once and none that no row has, and which of them every row has."""
    if isinstance(values, np.ndarray):
        found, places = np.unique(values, return_inverse=True)
        return [text_of(value) for value in found.tolist()], places.astype(np.int64)
    texts, chosen = coded(values)
    present, first, places = np.unique(chosen, return_index=True, return_inverse=True)
    order = np.argsort(first)  # as they come in the rows, whatever the order of the dictionary
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    known = [*texts.to_pylist(), None]
    return [known[place] for place in present[order].tolist()], ranks[places]
