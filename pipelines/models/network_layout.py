"""How is a network laid out? Plain numbers from parameters, columns and the row sample: the config.json beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np

from pipelines.features.transform import Feature
from pipelines.models.model import Matrix
from pipelines.models.network_params import DeepParams, LinearParams, NetworkParams, TabMParams
from pipelines.spec import Frozen
from pipelines.tasks import Task, TaskType

Family = Literal["linear", "mlp", "tabm"]


class Layout(Frozen):
    """All that a module is built from; equal on every rank, for all see the same row sample."""

    family: Family
    task: TaskType
    outputs: int
    features: int
    """Columns of the matrix."""
    numbers: list[int]
    """Which of them are numbers."""
    missing: list[int]
    """Numbers that may be missing: each has a 0/1 input that says so."""
    codes: list[int]
    """Which are codes."""
    cardinalities: list[int]
    """How many codes each has; the code behind the last stands for missing."""
    present: list[list[int]] = []
    """mlp, tabm: the codes that the row sample has."""
    center: float = 0.0
    """regression: the mean of the targets, and"""
    scale: float = 1.0
    """their standard deviation; the network learns (target - center) / scale."""

    crosses: list[list[int]] = []
    """linear: places in `codes`."""
    buckets: int = 0
    n_blocks: int = 0
    d_block: int = 0
    dropout: float = 0.0
    num_embeddings: Literal["piecewise", "periodic"] | None = None
    d_embedding: int = 0
    bins: list[list[float]] = []
    """piecewise: the edges of each number's bins, float32."""
    n_frequencies: int = 0
    frequency_init_scale: float = 0.0
    k: int = 1
    arch_type: Literal["tabm", "tabm-mini"] = "tabm"

    @classmethod
    def of(cls, params: NetworkParams, task: Task, features: Sequence[Feature], sample: Matrix, target: Matrix) -> Self:
        """Lay a network out for these columns. `sample` and `target` are train rows, prepared."""
        numbers = [i for i, feature in enumerate(features) if feature.cardinality is None]
        codes = [i for i, feature in enumerate(features) if feature.cardinality is not None]
        regression = task.type == "regression" and len(target) > 0
        layout: dict[str, Any] = {
            "task": task.type,
            "outputs": task.outputs,
            "features": len(features),
            "numbers": numbers,
            "missing": [i for i in numbers if np.isnan(sample[:, i]).any()],
            "codes": codes,
            "cardinalities": [features[i].cardinality for i in codes],
            "center": float(target.mean()) if regression else 0.0,
            "scale": (float(target.std()) or 1.0) if regression else 1.0,
        }
        if isinstance(params, LinearParams):
            names = [features[i].name for i in codes]
            crosses = [[names.index(name) for name in cross] for cross in params.crosses]
            return cls.model_validate({**layout, "family": "linear", "crosses": crosses, "buckets": params.buckets})
        assert isinstance(params, DeepParams)
        chosen = DeepParams.architecture - {"n_bins"} | {"dropout"}
        layout |= {name: getattr(params, name) for name in chosen}
        layout["present"] = [present(sample[:, i], features[i].cardinality or 0) for i in codes]
        if params.num_embeddings == "piecewise":
            layout["bins"] = [edges(sample[:, i], params.n_bins) for i in numbers]
        if isinstance(params, TabMParams):
            return cls.model_validate({**layout, "family": "tabm", "k": params.k, "arch_type": params.arch_type})
        return cls.model_validate({**layout, "family": "mlp"})


def edges(values: Matrix, bins: int) -> list[float]:
    """The quantiles that part a column into so many bins, each once; two at least.

    As `rtdl_num_embeddings.compute_bins`, which takes neither missing values nor constant columns.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return [0.0, 1.0]
    found = np.unique(np.quantile(finite, np.linspace(0.0, 1.0, bins + 1)).clip(-1e6, 1e6).astype(np.float32))
    return [float(edge) for edge in found] if len(found) > 1 else [float(found[0]), float(found[0]) + 1.0]


def present(codes: Matrix, cardinality: int) -> list[int]:
    """The codes that a column has, `cardinality` where it is missing."""
    return [int(code) for code in np.unique(np.where(np.isnan(codes), cardinality, codes))]
