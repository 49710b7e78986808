"""What the networks compute, as Torch modules: linear, MLP and TabM, each made from a plain `Layout`.

All take the prepared matrix as float32, (rows, features): numbers, codes as numbers, NaN where missing. What is done with a
missing or infinite value is a part of the module, so training, prediction and the exported program share it.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Final

import numpy as np
import rtdl_num_embeddings as embeddings
import tabm
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.models.network_layout import Layout

LARGEST: Final = 1e6
"""Numbers are cut off here, infinities too: their squares stay far below the end of float32."""
MAX_ONE_HOT: Final = 16
"""Codes up to this many become 0/1 inputs, as in TabM's paper; beyond, embeddings, for an input costs k times d_block."""


def build(layout: Layout) -> Network:
    """The module of a layout with fresh weights, drawn from Torch's generator."""
    return MODULES[layout.family](layout)


def load_weights(network: Network, weights: dict[str, Tensor]) -> None:
    """Put weights by name into a module of the same layout; its buffers follow from the layout."""
    named = dict(network.named_parameters())
    assert named.keys() == weights.keys(), f"weights of another layout: {named.keys() ^ weights.keys()}"
    network.load_state_dict(weights, strict=False)


class Network(nn.Module):
    """The base: from the matrix to numbers, flags and codes; from outputs to losses and raw scores.

    `forward` gives the outputs of each member: (rows, members, outputs). Targets of a regression are standardised.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        index = {
            "number_at": layout.numbers,
            "flag_at": layout.missing,
            "code_at": layout.codes,
        }
        for name, places in index.items():
            self.register_buffer(name, torch.tensor(places, dtype=torch.int64), persistent=False)
        sizes = torch.tensor(layout.cardinalities, dtype=torch.float32)
        self.register_buffer("sizes", sizes, persistent=False)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return numbers (rows, numbers), flags of missing ones (rows, flags), codes (rows, codes) with missing as the last."""
        at = self._buffers
        numbers = torch.nan_to_num(matrix.index_select(1, _there(at["number_at"])), nan=0.0).clamp(-LARGEST, LARGEST)
        flags = torch.isnan(matrix.index_select(1, _there(at["flag_at"]))).to(torch.float32)
        raw = matrix.index_select(1, _there(at["code_at"]))
        sizes = _there(at["sizes"])
        known = torch.minimum(torch.nan_to_num(raw, nan=0.0).clamp(min=0.0), sizes - 1)
        codes = torch.where(torch.isnan(raw), sizes, known).to(torch.int64)
        return numbers, flags, codes

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The loss of each row, the mean over its members: (rows,)."""
        members = outputs.shape[1]
        if self.layout.task == "multiclass":
            flat = outputs.flatten(0, 1)
            found = functional.cross_entropy(flat, target.long().repeat_interleave(members), reduction="none")
            return found.view(-1, members).mean(1)
        wanted = target[:, None].expand(-1, members)
        if self.layout.task == "binary":
            return functional.binary_cross_entropy_with_logits(outputs[..., 0], wanted, reduction="none").mean(1)
        return functional.mse_loss(outputs[..., 0], wanted, reduction="none").mean(1)

    def scores(self, outputs: Tensor) -> Tensor:
        """Raw scores of the members together: logits of their mean probabilities, or the mean of their standardised values."""
        if self.layout.task == "regression":
            return outputs[..., 0].mean(1)
        if outputs.shape[1] == 1:
            return outputs[:, 0, 0] if self.layout.task == "binary" else outputs[:, 0]
        if self.layout.task == "binary":
            logits = outputs[..., 0]
            return _log_sum(_log_sigmoid(logits)) - _log_sum(_log_sigmoid(-logits))
        return _log_sum(outputs - _log_sum(outputs.transpose(1, 2))[..., None])

    def undecayed(self) -> set[str]:
        """Parameters without weight decay: those of embeddings and normalisations, and all biases."""
        inside = [name for name, module in self.named_modules() if isinstance(module, UNDECAYED)]
        return {
            name
            for name, value in self.named_parameters()
            if name.endswith("bias") or value.ndim < 2 or any(name.startswith(f"{owner}.") for owner in inside)
        }


class Columns(nn.Module):
    """Numbers embedded, flags as they are, few codes as 0/1 inputs, many embedded: one flat vector a row."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.numbers = _number_embeddings(layout)
        wide = [size + 1 > MAX_ONE_HOT for size in layout.cardinalities]  # and one for missing
        self.one_hot = [i for i, many in enumerate(wide) if not many]
        self.embedded = [i for i, many in enumerate(wide) if many]
        each = layout.d_embedding if self.numbers is not None else 1
        sizes = [layout.cardinalities[i] + 1 for i in self.one_hot]
        widths = [embedding_size(layout.cardinalities[i]) for i in self.embedded]
        self.widths = [each] * len(layout.numbers) + [1] * len(layout.missing) + sizes + widths
        """Inputs of each column."""
        present = [torch.zeros(size) for size in sizes]
        tables = [nn.Embedding(layout.cardinalities[i] + 1, width) for i, width in zip(self.embedded, widths, strict=True)]
        for seen, i in zip(present, self.one_hot, strict=True):
            seen[torch.tensor(layout.present[i], dtype=torch.int64)] = 1.0
        for table, i in zip(tables, self.embedded, strict=True):
            _silence_absent(table, layout.present[i])
        self.tables = nn.ModuleList(tables)
        for place, seen in enumerate(present):
            self.register_buffer(f"present_{place}", seen, persistent=False)

    def forward(self, numbers: Tensor, flags: Tensor, codes: Tensor) -> Tensor:
        parts = [numbers if self.numbers is None else self.numbers(numbers).flatten(1)] if numbers.shape[1] else []
        parts.append(flags)
        for place, i in enumerate(self.one_hot):
            seen = _there(self._buffers[f"present_{place}"])
            # A code that training has not seen is no input at all: its weights were never learned.
            parts.append((codes[:, i : i + 1] == torch.arange(len(seen), device=codes.device)).to(numbers.dtype) * seen)
        parts += [table(codes[:, i]) for table, i in zip(self.tables, self.embedded, strict=True)]
        return torch.cat(parts, 1)


class Linear(Network):
    """A weight for each number, flag, code and hashed cross: a row of one table each, and their sum."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.numbers = nn.Parameter(torch.zeros(len(layout.numbers) + len(layout.missing), layout.outputs))
        sizes = [size + 1 for size in layout.cardinalities]
        total = sum(sizes) + layout.buckets * len(layout.crosses)
        self.table = nn.Parameter(torch.zeros(total, layout.outputs))
        self.bias = nn.Parameter(torch.zeros(layout.outputs))
        offsets = np.cumsum([0, *sizes])
        self.register_buffer("offsets", torch.tensor(offsets[:-1], dtype=torch.int64), persistent=False)
        self._crosses_at = int(offsets[-1])

    def forward(self, matrix: Tensor) -> Tensor:
        numbers, flags, codes = self.split(matrix)
        found = torch.cat([numbers, flags], 1) @ self.numbers + self.bias
        if codes.shape[1]:
            places = [codes + _there(self._buffers["offsets"])]
            places += [self._hashed(codes, i, cross) for i, cross in enumerate(self.layout.crosses)]
            # Not one row after the other: an embedding bag adds each row's weights up at once.
            found = found + functional.embedding(torch.cat(places, 1), self.table).sum(1)
        return found[:, None, :]

    def _hashed(self, codes: Tensor, at: int, cross: list[int]) -> Tensor:
        """The place of each row's combination; integers below 2**62 all along, the same in every runtime."""
        key = torch.full_like(codes[:, 0], at + 1)
        for i in cross:
            key = ((key * 31_337 + codes[:, i] + 1) * 1_000_003) % 2_147_483_647
        return (self._crosses_at + at * self.layout.buckets + key % self.layout.buckets)[:, None]


class MLP(Network):
    """Embedded columns through residual blocks: normalise, widen, ReLU, dropout, back, added to what came in."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.columns = Columns(layout)
        self.first = nn.Linear(sum(self.columns.widths), layout.d_block)
        self.blocks = nn.ModuleList(Residual(layout.d_block, layout.dropout) for _ in range(layout.n_blocks))
        self.norm = nn.LayerNorm(layout.d_block)  # of a batch would differ with the number of workers
        self.output = nn.Linear(layout.d_block, layout.outputs)

    def forward(self, matrix: Tensor) -> Tensor:
        x = self.first(self.columns(*self.split(matrix)))
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.output(functional.relu(self.norm(x)))
        return output[:, None, :]


class Residual(nn.Module):
    """One block of the MLP."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, width)
        self.back = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.back(self.dropout(functional.relu(self.wide(self.norm(x)))))
        return x + change


class TabM(Network):
    """The published TabM: its ensemble of k MLPs over embedded columns."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.columns = Columns(layout)
        self.view = tabm.EnsembleView(k=layout.k)
        self.backbone = tabm.make_tabm_backbone(
            d_in=sum(self.columns.widths),
            n_blocks=layout.n_blocks,
            d_block=layout.d_block,
            dropout=layout.dropout,
            activation="ReLU",
            k=layout.k,
            arch_type=layout.arch_type,
            start_scaling_init="random-signs" if self.columns.numbers is None else "normal",
            start_scaling_init_chunks=self.columns.widths,
        )
        self.output = tabm.LinearEnsemble(layout.d_block, layout.outputs, k=layout.k)

    def forward(self, matrix: Tensor) -> Tensor:
        x: Tensor = self.output(self.backbone(self.view(self.columns(*self.split(matrix)))))
        return x


class Answer(nn.Module):
    """What is exported: from the matrix to raw scores."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, matrix: Tensor) -> Tensor:
        return self.network.scores(self.network(matrix))


def embedding_size(cardinality: int) -> int:
    """How many numbers stand for a category: fastai's rule of thumb, at most 32."""
    return min(32, int(1.6 * math.pow(cardinality + 1, 0.56) + 0.5))


def _log_sigmoid(logits: Tensor) -> Tensor:
    """Without overflow in ONNX Runtime too, whose softplus has it."""
    return logits.clamp(max=0.0) - torch.log1p(torch.exp(-logits.abs()))


def _log_sum(values: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials along dimension 1, shifted by the largest one."""
    largest = values.amax(1, keepdim=True)
    return (values - largest).exp().sum(1).log() + largest.squeeze(1)


def _number_embeddings(layout: Layout) -> Any:
    if not layout.numbers or layout.num_embeddings is None:
        return None
    if layout.num_embeddings == "periodic":
        return embeddings.PeriodicEmbeddings(
            len(layout.numbers),
            layout.d_embedding,
            n_frequencies=layout.n_frequencies,
            frequency_init_scale=layout.frequency_init_scale,
            lite=False,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*just two bin edges")  # a column of 0 and 1 has one bin, which is right
        bins = [torch.tensor(edges, dtype=torch.float32) for edges in layout.bins]
        return embeddings.PiecewiseLinearEmbeddings(bins, layout.d_embedding, activation=False, version="B")


@torch.no_grad()
def _silence_absent(table: nn.Embedding, present: list[int]) -> None:
    """Start codes that the sample has not at 0: one that never comes would else answer by chance."""
    kept = torch.zeros(table.num_embeddings, 1)
    kept[torch.tensor(present, dtype=torch.int64)] = 1.0
    table.weight.mul_(kept)


def _there(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer


UNDECAYED: Final = (
    nn.LayerNorm,
    nn.Embedding,
    embeddings.PiecewiseLinearEmbeddings,
    embeddings.PeriodicEmbeddings,
)
MODULES: Final[dict[str, type[Network]]] = {"linear": Linear, "mlp": MLP, "tabm": TabM}
