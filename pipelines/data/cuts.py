"""Where a time split cuts: the extra pass over one column that turns fractions into points in time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipelines.data.read import Block, Reader, stream
from pipelines.data.source import Source, Unit
from pipelines.data.split import in_sample
from pipelines.errors import DataError
from pipelines.features.stats import Numbers
from pipelines.schema import numbers
from pipelines.spec import SplitSpec

SAMPLE_ROWS = 1_000_000


def time_cuts(source: Source, reader: Reader, spec: SplitSpec) -> list[str]:
    """Return the two cut points as ISO 8601 text: valid starts at the first, test at the second.

    Exact up to a million rows; beyond, quantiles of the million rows with the smallest identity hash (error below 0.1 % of the
    rows). A cut is a value of the column, so rows of one instant stay together.
    """
    assert spec.column is not None
    share = min(1.0, 1.1 * SAMPLE_ROWS / max(1, source.rows))
    each = Sampled(spec.column, share)
    times = [found for _, found, _ in stream(source, reader.only({spec.column}), each)]
    values = np.sort(np.concatenate(times)) if times else np.array([])
    if not len(values):
        raise DataError(f"data.split.column: '{spec.column}' has no value in any row; expected timestamps")
    quantiles = np.quantile(values, [1 - spec.test - spec.valid, 1 - spec.test], method="higher")
    return [str(np.datetime64(int(quantile), "us")) for quantile in quantiles]


class Sampled:
    """The times of the rows whose hash is below a share of all hashes."""

    def __init__(self, column: str, share: float) -> None:
        self.column, self.share = column, share

    def __call__(self, unit: Unit, blocks: Iterator[Block]) -> Numbers:
        found = [numbers(block.table[self.column])[in_sample(block.identity, self.share)] for block in blocks]
        values = np.concatenate(found) if found else np.array([])
        return np.asarray(values[~np.isnan(values)])
