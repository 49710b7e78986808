"""How much of a model, and of each of its answers, is due to which column of the data?

A model knows features; a column of the data becomes several of them, and what is told here is their sum. A feature made of
several columns together counts for its group. Contributions are additive (SHAP values): with the base, which is the same for all
rows that start from the same score, they sum to the raw score, and a column that the model never looks at contributes 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipelines.features.preprocessor import Preprocessor, Root
from pipelines.models.model import Explaining, Matrix
from pipelines.schema import category_text
from pipelines.tasks import Task

IMPORTANCE: Final = "importance.json"
ANSWERS: Final = ("base", "contributions")
"""What an explained answer has besides."""

BYTES: Final = 32 << 20
"""Of contributions by feature that are held at a time."""
SAMPLED_ROWS: Final = 1000
LEAST_ROWS: Final = 16
SAMPLED_S: Final = 0.6
"""Of a core, for the mean contributions: training waits for them."""


@dataclass(frozen=True)
class Contributions:
    """Of some rows."""

    names: list[str]
    """The columns and groups."""
    classes: list[str] | None
    """Of a multiclass task."""
    base: Matrix
    """(rows, outputs): what the contributions are added to, the model's mean raw score; of a row that starts from a score of its
    own the sum of both."""
    values: Matrix
    """(rows, outputs, names)"""

    def from_scores(self, init_score: Matrix) -> Contributions:
        """The same to rows that start from these raw scores (rows,), of which the model knows nothing."""
        return replace(self, base=self.base + init_score[:, None])

    def table(self) -> pa.Table:
        """`base`, a number, and `contributions`, a struct with a number per name; in multiclass a struct of these by class."""
        bases = [pa.array(np.ascontiguousarray(base)) for base in self.base.T]
        structs = [
            pa.StructArray.from_arrays([pa.array(np.ascontiguousarray(column)) for column in output.T], names=self.names)
            for output in np.moveaxis(self.values, 1, 0)
        ]
        if self.classes is None:
            return pa.table({"base": bases[0], "contributions": structs[0]})
        return pa.table(
            {
                "base": pa.StructArray.from_arrays(bases, names=self.classes),
                "contributions": pa.StructArray.from_arrays(structs, names=self.classes),
            }
        )

    def rows(self) -> list[dict[str, Any]]:
        """The same as rows, in plain Python."""
        bases, values = self.base.tolist(), self.values.tolist()
        if self.classes is None:
            return [
                {"base": base, "contributions": dict(zip(self.names, found, strict=True))}
                for [base], [found] in zip(bases, values, strict=True)
            ]
        return [
            {
                "base": dict(zip(self.classes, base, strict=True)),
                "contributions": {
                    name: dict(zip(self.names, output, strict=True)) for name, output in zip(self.classes, found, strict=True)
                },
            }
            for base, found in zip(bases, values, strict=True)
        ]


@dataclass(frozen=True)
class Attribution:
    """From features to the columns and groups that they come from."""

    roots: list[Root]
    """In the order of their first features; no two have the same name."""
    of_feature: list[int]
    """The place in `roots` of each feature."""
    outputs: int
    classes: list[str] | None

    @classmethod
    def of(cls, preprocessor: Preprocessor, task: Task) -> Attribution:
        distinct = list(dict.fromkeys(preprocessor.roots))
        same = Counter(root.name for root in distinct)
        named = [  # a group may be called like a column
            root if same[root.name] == 1 else Root(f"{root.name} ({', '.join(root.columns)})", root.columns) for root in distinct
        ]
        classes = [category_text(value) for value in task.classes or []] if task.type == "multiclass" else None
        return cls(named, [distinct.index(root) for root in preprocessor.roots], task.outputs, classes)

    def contributions(self, model: Explaining, matrix: Matrix) -> Iterator[Contributions]:
        """Yield those of a few rows of the matrix after the others', so many that 32 MiB hold them feature by feature."""
        names = [root.name for root in self.roots]
        rows = max(1, BYTES // (8 * self.outputs * (matrix.shape[1] + 1)))
        for start in range(0, max(1, len(matrix)), rows):  # of no row once
            found = model.contributions(matrix[start : start + rows])
            yield Contributions(names, self.classes, found[..., -1], self._sums(found[..., :-1]))

    def importance(self, model: Explaining, sample: Matrix) -> dict[str, Any]:
        """Return what stands in importance.json: each column's part in the model, the largest first.

        Beside the model's own measures that is `contribution`: the mean of the absolute contributions, added up over the outputs,
        to `rows` rows of the sample. These are at most 1000, fewer for a large model, none where too few to say something.
        """
        measures = {name: self._sums(found) for name, found in model.importance().items()}
        rows = min(len(sample), SAMPLED_ROWS, int(SAMPLED_S / max(model.explain_s(), 1e-9)))
        if rows < min(len(sample), LEAST_ROWS):
            rows = 0
        if rows:
            chosen = np.arange(rows) * len(sample) // rows
            total = sum(np.abs(found.values).sum(axis=(0, 1)) for found in self.contributions(model, sample[chosen]))
            measures["contribution"] = np.asarray(total) / rows
        order = sorted(range(len(self.roots)), key=lambda i: [-values[i] for values in measures.values()])
        return {
            "rows": rows,
            "measures": list(measures),
            "columns": [
                {"name": self.roots[i].name, "columns": list(self.roots[i].columns)}
                | {measure: float(values[i]) for measure, values in measures.items()}
                for i in order
            ],
        }

    def _sums(self, by_feature: Matrix) -> Matrix:
        """Add up the last axis; one addition after the other, so that a row has the same bits alone and among others."""
        total = np.zeros((*by_feature.shape[:-1], len(self.roots)))
        for feature, root in enumerate(self.of_feature):
            total[..., root] += by_feature[..., feature]
        return total
