"""Text as features: counts equal scikit-learn's and plain Python's, whatever script the text is in."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from pipelines.features import text
from pipelines.features.stats import StringStatistics
from pipelines.features.text import Length, Ngrams

SAMPLE = ["The cat sat on the mat.", "the CAT", "", "a dog's day: the dog ran", "mat mat mat", "x"]
TEXTS = st.lists(
    st.none() | st.sampled_from(["", "a b", "日本 語", "İSS ß", "e\u0301 é", "🛫🛬 go"]) | st.text(max_size=30), max_size=8
)
MASK = 2**64 - 1


def length(*which: str) -> Length:
    return Length.fit(Length.Params.model_validate({"which": list(which)} if which else {}), StringStatistics())


def ngrams(**params: Any) -> Ngrams:
    return Ngrams.fit(Ngrams.Params.model_validate(params), StringStatistics())


def array(values: list[str | None]) -> pa.Array:
    return pa.array(values, pa.large_string())


def bucket(units: list[int], base: int, kind: int, buckets: int) -> int:
    """The hash of one n-gram, written out."""
    found = (sum(unit * pow(base, i, 2**64) for i, unit in enumerate(units, 1)) + (kind << 32 | len(units))) & MASK
    found = ((found ^ (found >> 30)) * int(text.MIX[0])) & MASK
    found = ((found ^ (found >> 27)) * int(text.MIX[1])) & MASK
    return (found >> 32) * buckets >> 32


def plain(value: str, words: list[int] | None, characters: list[int] | None, buckets: int) -> list[float]:
    """Counts of one text by loops."""
    value = "".join(c.lower() if len(c.lower()) == 1 else c for c in value)
    apart = "".join(c if not any(first <= ord(c) <= last for first, last in text.NO_WORD) else " " for c in value)
    hashes = [sum(ord(c) * pow(int(text.CHARACTER), i, 2**64) for i, c in enumerate(w, 1)) & MASK for w in apart.split(" ") if w]
    found: Counter[int] = Counter()
    for sizes, units, base, kind in ((words, hashes, text.WORD, 1), (characters, [ord(c) for c in value], text.CHARACTER, 2)):
        for size in range(sizes[0], sizes[1] + 1) if sizes else ():
            runs = [units[i : i + size] for i in range(len(units) - size + 1)]
            found.update(bucket(run, int(base), kind, buckets) for run in runs)
    return [float(found[i]) for i in range(buckets)]


@settings(max_examples=80, deadline=None)
@given(
    TEXTS,
    st.sampled_from([None, [1, 1], [1, 2], [2, 4]]),
    st.sampled_from([None, [1, 1], [3, 5], [9, 10]]),
    st.sampled_from([2, 7, 64]),
)
def test_counts_equal_a_loop_over_each_text(
    values: list[str | None], words: list[int] | None, characters: list[int] | None, buckets: int
) -> None:
    transform = ngrams(words=words, characters=characters, buckets=buckets, weight="count")

    found = np.array(transform.block(array(values))).T

    if words is None and characters is None:
        words = [1, 2]
    assert found.tolist() == [plain(value or "", words, characters, buckets) for value in values]


@pytest.mark.parametrize(
    ("params", "reference"),
    [
        ({"words": [1, 2]}, CountVectorizer(token_pattern=r"\w+", ngram_range=(1, 2))),
        ({"words": [1, 1], "lowercase": False}, CountVectorizer(token_pattern=r"\w+", lowercase=False)),
        ({"characters": [3, 3]}, CountVectorizer(analyzer="char", ngram_range=(3, 3))),
        ({"words": [2, 2], "weight": "binary"}, CountVectorizer(token_pattern=r"\w+", ngram_range=(2, 2), binary=True)),
    ],
)
def test_counts_equal_scikit_learn_where_no_bucket_is_shared(params: dict[str, Any], reference: CountVectorizer) -> None:
    found = np.array(ngrams(**{"weight": "count", "buckets": 4096} | params).block(array([*SAMPLE])))

    expected = reference.fit_transform(SAMPLE).toarray().T
    assert sorted(map(tuple, found[found.any(axis=1)])) == sorted(map(tuple, expected.astype(np.float64)))


def test_the_logarithm_of_a_count_is_the_default() -> None:
    values = array(["a a a b", "b"])

    counted, found = (np.array(ngrams(buckets=64, **more).block(values)) for more in ({"weight": "count"}, {}))

    assert found.tolist() == np.log1p(counted).tolist()


def test_buckets_are_pinned() -> None:
    found = ngrams(words=[1, 1], characters=[2, 2], buckets=1024, weight="count").row("Ab 日本")

    assert {bucket: count for bucket, count in enumerate(found) if count} == dict.fromkeys((295, 423, 434, 835, 876, 987), 1.0)


def test_what_is_hashed_is_spread_evenly() -> None:
    found = ngrams(words=[1, 1], buckets=64, weight="count").row(" ".join(map(str, range(64_000))))

    assert 800 < min(found) <= max(found) < 1200  # 1000 expected, standard deviation 32


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.integers(1, 12), st.integers(1, 4))
def test_where_stripes_are_cut_plays_no_part(values: list[str | None], stripe: int, cells: int) -> None:
    expected = [ngrams(buckets=3).block(array(values)), length().block(array(values))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "STRIPE", stripe)
        patch.setattr(text, "CELLS", cells)
        found = [ngrams(buckets=3).block(array(values)), length().block(array(values))]

    for one, two in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, two)


def test_lengths_are_code_points_and_words() -> None:
    values = array(["", None, "one two", "  don't—stop  ", "日本 語", "e\u0301te\u0301", "🛫", "...", "snake_case 1.5"])

    characters, words = length().block(values)

    np.testing.assert_array_equal(characters, [0, np.nan, 7, 14, 4, 5, 1, 3, 14])
    np.testing.assert_array_equal(words, [0, np.nan, 2, 3, 2, 1, 1, 0, 3])
    assert length("words").row("one two") == [2.0]


def test_a_missing_text_has_no_ngrams() -> None:
    assert ngrams(buckets=3).row(None) == [0.0] * 3
    assert np.array(ngrams(buckets=3).block(array([None]))).tolist() == [[0.0]] * 3


def test_a_sliced_block_is_the_same() -> None:
    values = array([*SAMPLE, None])

    found = ngrams(buckets=8).block(values.slice(2, 3))

    assert np.array(found).tolist() == np.array(ngrams(buckets=8).block(values))[:, 2:5].tolist()


@pytest.mark.parametrize(
    "params", [{"words": [2, 1]}, {"words": [0, 1]}, {"characters": [3]}, {"buckets": 1}, {"weight": "tfidf"}]
)
def test_wrong_parameters_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"1 validation error"):
        ngrams(**params)


def test_a_text_of_100_characters_takes_at_most_a_fifth_of_a_millisecond() -> None:
    transform = ngrams(words=[1, 2], characters=[3, 5], buckets=256)
    value = "the quick brown fox jumps over the lazy dog " * 2
    transform.row(value)

    seconds = []
    for _ in range(30):
        start = time.process_time()  # of this process alone: the machine may be busy
        for _ in range(20):
            transform.row(value)
        seconds.append((time.process_time() - start) / 20)

    assert min(seconds) <= 200e-6
