"""Networks by Torch - linear, MLP, TabM: a fitted one, and what its family needs.

A fitted network answers by an ONNX program in ONNX Runtime: a serving replica imports no Torch. The parameters stand in
`network_params.py`, the modules in `network_modules.py`, how they are trained in `network_fit.py`.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np

from pipelines.models.model import Matrix
from pipelines.models.network_layout import Layout
from pipelines.models.network_params import DeepParams, LinearParams, MLPParams, NetworkParams, TabMParams
from pipelines.spec import Chain, Frozen, Kind, Step
from pipelines.tasks import Task

if TYPE_CHECKING:
    import onnxruntime

    from pipelines.data.prepared import Shards
    from pipelines.training.worker import Worker

CONFIG: Final = "config.json"
WEIGHTS: Final = "weights.safetensors"
TRAINING: Final = "training.safetensors"
PROGRAM: Final = "model.onnx"
INPUT: Final = "matrix"
TORCH: Final = 350 << 20
"""Bytes of Torch in a worker process."""
POOL_BYTES: Final = 128 << 20
"""A pool of shuffled rows holds no more than this, or a single row group; see `network_feed.py`."""
POOL_ROWS: Final = 1 << 18
ACTIVATIONS: Final = 1 << 22
"""Numbers of one layer that an evaluation or a prediction holds at once."""


class FittedNetwork:
    """A trained network: its layout, its weights and the program that computes it."""

    Params: ClassVar[type[Frozen]]
    chains: ClassVar[dict[Kind, Chain]]
    trainer: ClassVar[str] = "torch"
    checkpoint_every: ClassVar[int] = 1000

    def __init__(self, layout: Layout, weights: bytes, program: bytes | None = None, training: bytes | None = None) -> None:
        self.layout = layout
        self.weights = weights
        """safetensors."""
        self.program = program
        """ONNX; a checkpoint has none."""
        self.training = training
        """safetensors: what a checkpoint needs besides to go on."""

    @classmethod
    def fit(cls, params: NetworkParams, task: Task, worker: Worker) -> None:
        from pipelines.models.network_fit import Training

        Training(cls, params, task, worker).run()

    @classmethod
    def check(cls, params: NetworkParams, task: Task, shards: Shards, workers: int) -> Task:
        params.check(task, shards.features)
        return task

    @classmethod
    def uses_gpu(cls, params: NetworkParams) -> bool:
        return True

    @classmethod
    def unavailable(cls, params: NetworkParams) -> str | None:
        return None

    @classmethod
    def memory(cls, params: NetworkParams, rows: int, features: int, outputs: int) -> int:
        """Torch; three pools of rows; weights with their gradients, AdamW's two means, the best ones; a step's activations.

        How many codes the columns have is not known before they are read: their embeddings come on top.
        """
        pools = 3 * min(rows * (features + 1) * 4, POOL_BYTES + (features + 1) * 4 * 65_536)
        width, each, members = _widths(params, features)
        weights = each * width + (width * width * 2 * getattr(params, "n_blocks", 1) if width > 1 else 0)
        weights += outputs * width * members + getattr(params, "buckets", 0) * len(getattr(params, "crosses", [])) * outputs
        layers = 4 * (getattr(params, "n_blocks", 0) + 1)
        active = params.rows_of_batch(rows) * members * (each + layers * width)
        return TORCH + pools + 4 * (6 * weights + active)

    def predict(self, matrix: Matrix) -> Matrix:
        """Logits (rows,) or (rows, classes), or values (rows,): float32 arithmetic, on the target's scale in float64."""
        rows = to_float32(matrix)
        most = rows_at_once(self.layout)
        parts = [self._session.run(None, {INPUT: rows[at : at + most]})[0] for at in range(0, len(rows), most)]
        outputs = self.layout.outputs
        shape = (len(rows), outputs) if outputs > 1 else (len(rows),)
        raw = np.concatenate(parts).astype(np.float64) if parts else np.empty(shape)
        return on_scale(self.layout, raw.reshape(shape))

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        import onnxruntime

        assert self.program is not None, "a checkpoint answers no rows; only the end of a fit has a program"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a row takes less than it costs to wake threads; blocks are answered side by side
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(self.program, options, providers=["CPUExecutionProvider"])

    def save(self, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(self.layout.model_dump(), sort_keys=True))
        for name, content in ((WEIGHTS, self.weights), (PROGRAM, self.program), (TRAINING, self.training)):
            if content is not None:
                (folder / name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> Self:
        def read(name: str) -> bytes | None:
            return (folder / name).read_bytes() if (folder / name).exists() else None

        layout = Layout.model_validate_json((folder / CONFIG).read_text())
        return cls(layout, (folder / WEIGHTS).read_bytes(), read(PROGRAM), read(TRAINING))


def to_float32(matrix: Matrix) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The matrix as a network sees it; what is too large becomes infinite, and the module cuts that off."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(matrix, np.float32)


def on_scale(layout: Layout, raw: Matrix) -> Matrix:
    """A regression's values on the target's scale; logits as they are."""
    return raw * layout.scale + layout.center if layout.task == "regression" else raw


def rows_at_once(layout: Layout) -> int:
    """How many rows are computed in one go where no gradient is needed: few of a wide network."""
    widest = max(layout.d_block, len(layout.numbers) * max(1, layout.d_embedding), 64)
    return max(64, ACTIVATIONS // (widest * layout.k))


def _widths(params: NetworkParams, features: int) -> tuple[int, int, int]:
    """The width of a layer, the inputs of the first one, the members."""
    if not isinstance(params, DeepParams):
        return 1, features, 1
    each = features * (params.d_embedding if params.num_embeddings else 1)
    return params.d_block, each, getattr(params, "k", 1)


NORMAL: Final[list[Step]] = [{"quantile": {"output": "normal"}}]
"""The recipe of the papers: numbers are brought to a normal distribution by their quantiles."""


def _chains(number: list[Step], *dates: list[Step]) -> dict[Kind, Chain]:
    """What each kind becomes; all numbers on one scale. `dates` is more that a date becomes."""
    behind_date: list[Any] = [["parts", *number], ["since", *number], *dates]
    behind_text: list[Any] = [["length", *number], [{"ngrams": {"words": [1, 1], "buckets": 64}}, *number]]
    return {
        "numeric": list(number),
        "boolean": [],
        "categorical": ["index"],  # type: ignore[dict-item]  # mypy does not try the union's members on a literal
        "datetime": behind_date,
        "text": behind_text,
    }


class Linear(FittedNetwork):
    """Linear, logistic or softmax regression."""

    Params: ClassVar[type[Frozen]] = LinearParams
    chains: ClassVar[dict[Kind, Chain]] = _chains(["scale"], ["cyclic"])  # the hours' effect is no straight line


class MLP(FittedNetwork):
    """A residual network over embedded columns."""

    Params: ClassVar[type[Frozen]] = MLPParams
    chains: ClassVar[dict[Kind, Chain]] = _chains(NORMAL)


class TabM(FittedNetwork):
    """Many MLPs in one that share their weights (ICLR 2025)."""

    Params: ClassVar[type[Frozen]] = TabMParams
    chains: ClassVar[dict[Kind, Chain]] = _chains(NORMAL)
