"""The one pass: everything that has to be known about the train rows before they can be transformed.

Each read unit yields one `Summary`; they are folded in source order, never in order of arrival, so the result has the same bits
on any cluster. The row sample is the rows with the smallest identity hash: at most `SAMPLE_ROWS` of them, all while there are
fewer. What steps gather about transformed values takes a further pass (`gather`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.beside import check_beside
from pipelines.data.described import Described
from pipelines.data.read import Block, Counts, Reader, in_order, stream
from pipelines.data.source import Source, Unit
from pipelines.data.split import SAMPLE_SALT, SPLITS, Hashes, in_sample, salted
from pipelines.features.passes import Key
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.stats import Numbers, NumberStatistics, Statistics
from pipelines.features.transform import TEXT, Rows, State, described
from pipelines.progress import Progress
from pipelines.schema import Column, decoded, numbers, texts
from pipelines.spec import TaskSpec

SAMPLE_ROWS = 200_000
MAX_CLASSES = 1000


@dataclass
class Summary:
    """Of some rows of the train split: a state per column, the distinct targets, the row sample; and the rows of each split."""

    columns: dict[str, Statistics]
    targets: Counter[Any] | None
    """Distinct target values with their counts; None when there are more than MAX_CLASSES."""
    rows: dict[str, int]
    sample: pa.Table | None = None
    hashes: Hashes = field(default_factory=lambda: np.array([], np.uint64))
    held: dict[str, Held] = field(default_factory=dict)
    """The valid and the test rows, as far as there are some."""
    places: Numbers = field(default_factory=lambda: np.array([], np.float64))
    """What decides the fold of each row of the sample."""
    states: dict[Key, State] = field(default_factory=dict)
    """What steps gathered."""

    def merge(self, other: Summary) -> None:
        """Append the summary of the rows that come after this one's."""
        for name, statistics in other.columns.items():
            self.columns[name] = self.columns[name].merge(statistics) if name in self.columns else statistics  # type: ignore[arg-type]
        self.targets = None if self.targets is None or other.targets is None else _bounded(self.targets + other.targets)
        for split, rows in other.rows.items():
            self.rows[split] = self.rows.get(split, 0) + rows
        _append(self.states, other.states)
        for split, held in other.held.items():
            self.held[split] = self.held[split].merge(held) if split in self.held else held


@dataclass(frozen=True)
class Held:
    """Rows of a split that nothing is fitted to: a state per column, and the rows whose hash is below the share of the sample."""

    columns: dict[str, Statistics]
    sample: list[pa.Table]

    def merge(self, other: Held) -> Held:
        merged: dict[str, Statistics] = {
            name: statistics.merge(other.columns[name])  # type: ignore[arg-type]
            for name, statistics in self.columns.items()
        }
        return Held(merged, self.sample + other.sample)


@dataclass(frozen=True)
class Summarise:
    """Summarise the train rows of a unit."""

    columns: tuple[Column, ...]
    target: str
    share: float
    """Rows whose hash is below this share of all hashes are in the sample."""
    preprocessor: Preprocessor
    """Not fitted yet: it gathers."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Columns of the task (see `TaskSpec.beside`); they are looked at here, before the long work."""

    def __call__(self, unit: Unit, blocks: Iterator[Block]) -> Summary:
        summary = Summary({}, Counter(), {})
        columns = Described(self.columns, len(SPLITS))
        samples: list[list[pa.Table]] = [[] for _ in SPLITS]
        hashes, places = [], []
        for block in blocks:
            check_beside(block.table, self.beside, unit)
            columns.add(block.table, block.split)
            is_train = block.split == 0
            summary.merge(
                Summary(
                    {},
                    _distinct(block.table[self.target].filter(pa.array(is_train))),
                    dict(zip(SPLITS, np.bincount(block.split, minlength=len(SPLITS)).tolist(), strict=True)),
                    states=_gathered(self.preprocessor, block, self.target),
                )
            )
            chosen = block.take(in_sample(block.identity, self.share))
            table = decoded(chosen.table)
            for split, kept in enumerate(samples):
                kept.append(table.filter(pa.array(chosen.split == split)))
            chosen = chosen.take(chosen.split == 0)
            hashes.append(salted(chosen.identity, SAMPLE_SALT))
            places.append(chosen.places)
        if hashes:
            summary.sample, summary.hashes = pa.concat_tables(samples[0]), np.concatenate(hashes)
            summary.places = np.concatenate(places)
            summary.columns, *held = columns.statistics()
            parts = zip(SPLITS[1:], held, samples[1:], strict=True)
            summary.held = {split: Held(states, sample) for split, states, sample in parts if summary.rows[split]}
        return summary


@dataclass(frozen=True)
class Gather:
    """Gather from the train rows of a unit what a Preprocessor wants."""

    preprocessor: Preprocessor
    target: str

    def __call__(self, unit: Unit, blocks: Iterator[Block]) -> dict[Key, State]:
        states: dict[Key, State] = {}
        for block in blocks:
            _append(states, _gathered(self.preprocessor, block, self.target))
        return states


def gather(source: Source, reader: Reader, preprocessor: Preprocessor, progress: Progress) -> dict[Key, State]:
    """Read all rows once more and return what a partly fitted Preprocessor wants of the train split."""
    assert reader.target is not None
    states: dict[Key, State] = {}
    with progress.stage("statistics", total=source.rows) as stage:
        for found in in_order(stream(source, reader, Gather(preprocessor, reader.target)), stage):
            _append(states, found)
    return states


def summarise(
    source: Source, reader: Reader, columns: list[Column], preprocessor: Preprocessor, progress: Progress, task: TaskSpec
) -> tuple[Summary, Counts]:
    """Read the needed columns of all rows once and return the summary of the train split, with what was read.

    `preprocessor` is the unfitted one, which gathers what its steps want of raw columns.
    Its memory on the driver is the states and the sample; the statistics of each column carry the column's values in the sample.
    """
    assert reader.target is not None
    share = min(1.0, 1.05 * SAMPLE_ROWS / max(1, source.rows))
    total, counts = Summary({}, Counter(), dict.fromkeys(SPLITS, 0)), Counts()
    samples: list[Summary] = []
    each = Summarise(tuple(columns), reader.target, share, preprocessor, task.beside)
    with progress.stage("statistics", total=source.rows) as stage:
        for summary in in_order(stream(source, reader, each), stage, counts):
            total.merge(summary)
            samples.append(replace(summary, columns={}, states={}, held={}))
    return _with_sample(total, samples), counts


def _with_sample(total: Summary, parts: list[Summary]) -> Summary:
    tables = [part.sample for part in parts if part.sample is not None]
    if not tables:
        return total
    sample, hashes = pa.concat_tables(tables), np.concatenate([part.hashes for part in parts])
    total.places = np.concatenate([part.places for part in parts])
    if len(hashes) > SAMPLE_ROWS:
        kept = np.sort(np.argsort(hashes, kind="stable")[:SAMPLE_ROWS])  # in source order
        sample, hashes, total.places = sample.take(pa.array(kept)), hashes[kept], total.places[kept]
    total.sample, total.hashes = sample.combine_chunks(), hashes
    for split, held in total.held.items():
        total.held[split] = replace(held, sample=[pa.concat_tables(held.sample).combine_chunks()])
    return with_samples(total)


def with_samples(summary: Summary) -> Summary:
    """Give the statistics of each column its values in the row sample."""

    def filled(columns: dict[str, Statistics], sample: pa.Table) -> dict[str, Statistics]:
        return {name: with_sample(statistics, sample[name]) for name, statistics in columns.items()}

    if summary.sample is None:
        return summary
    held = {split: Held(filled(found.columns, found.sample[0]), found.sample) for split, found in summary.held.items()}
    return replace(summary, columns=filled(summary.columns, summary.sample), held=held)


def without_samples(summary: Summary) -> Summary:
    """The same before `with_samples`: each value of the sample is there once."""

    def bare(columns: dict[str, Statistics]) -> dict[str, Statistics]:
        return {name: replace(statistics, sample=type(statistics)().sample) for name, statistics in columns.items()}

    held = {split: Held(bare(found.columns), found.sample) for split, found in summary.held.items()}
    return replace(summary, columns=bare(summary.columns), held=held)


def _gathered(preprocessor: Preprocessor, block: Block, target: str) -> dict[Key, State]:
    """What a Preprocessor wants of the train rows of a block."""
    if not preprocessor.wanted:
        return {}
    train = block.take(block.split == 0)
    return preprocessor.gather(train.table, Rows(train.places, train.table[target]))


def _append(states: dict[Key, State], following: dict[Key, State]) -> None:
    for key, state in following.items():
        states[key] = states[key].merge(state) if key in states else state


def statistics_of(column: Column, sample: pa.ChunkedArray) -> Statistics:
    """Describe canonical values of a column that are themselves the row sample."""
    return described(texts(sample) if column.kind in TEXT else numbers(sample))


def with_sample(statistics: Statistics, values: pa.ChunkedArray) -> Statistics:
    """Put in the column's values in the row sample."""
    if isinstance(statistics, NumberStatistics):
        return replace(statistics, sample=numbers(values))
    return replace(statistics, sample=texts(values))


def _distinct(values: pa.ChunkedArray) -> Counter[Any] | None:
    if pa.types.is_timestamp(values.type):
        return None
    counted = pc.value_counts(values)
    if len(counted) > MAX_CLASSES:
        return None
    return Counter({entry["values"]: entry["counts"] for entry in counted.to_pylist()})


def _bounded(counts: Counter[Any]) -> Counter[Any] | None:
    return None if len(counts) > MAX_CLASSES else counts
