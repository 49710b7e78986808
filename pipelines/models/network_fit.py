"""How a network is trained on any number of workers: one loop for all families.

Each rank streams its rows (`network_feed.py`). A step's gradient is the sum over the rows of all ranks, each weighted, divided by
the sum of all weights, so that N ranks take the steps of one, up to rounding and dropout. With the strategy ddp every rank has
the whole network, and the gradients of all parameters, which lie in one block of memory, are summed by one message a step. With
fsdp (`fully_shard`) each rank keeps its share of every parameter, of its gradient and of AdamW's state.

A fit that goes on from a checkpoint takes the steps that an undisturbed one takes, on CPUs with the same bits: the order of the
rows and the learning rate are functions of the step, dropout is seeded by (seed, step, rank), and the rest is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor, nn

from pipelines.metrics import Metrics
from pipelines.models.model import Matrix
from pipelines.models.network import FittedNetwork, on_scale, rows_at_once, to_float32
from pipelines.models.network_export import exported
from pipelines.models.network_feed import Feed, Rows
from pipelines.models.network_layout import Layout
from pipelines.models.network_modules import build, load_weights
from pipelines.models.network_params import LinearParams, NetworkParams
from pipelines.tasks import Task

if TYPE_CHECKING:
    from pipelines.training.worker import Worker

RECENT: Final = 20
"""Steps over which the loss is averaged before it is called diverged."""
DIVERGED: Final = 100.0
"""So many times the loss of a constant answer."""
EXTREME: Final = 50.0
"""A value this many standard deviations away is named where a loss goes wrong."""


class Training:
    """One fit on one rank, from the start, from a checkpoint or from another run's network."""

    def __init__(self, family: type[FittedNetwork], params: NetworkParams, task: Task, worker: Worker) -> None:
        self._family, self._params, self._task, self._worker = family, params, task, worker
        self._metric = params.metric or task.loss_metric
        start = worker.start
        self._state: dict[str, Any] = dict(start.state) if start else {}
        self._step = start.step if start else 0
        self._busy_s, self._rows = 0.0, 0
        """How long the steps took, without evaluations and checkpoints, and how many rows of all ranks they had."""
        self._device = device_of(worker)
        self._distributed = worker.size > 1
        torch.set_num_threads(worker.threads)
        torch.manual_seed(params.seed)

        sample = worker.shards.sample_batch()
        self._columns = [feature.name for feature in worker.columns]
        self._spread = _spread(sample.matrix)
        if start is None:
            self._layout = Layout.of(params, task, worker.columns, sample.matrix, sample.target)
        else:
            assert isinstance(start.model, FittedNetwork)
            self._layout = start.model.layout
            if "dropout" in type(params).model_fields:  # the one of its numbers that shapes no weight
                self._layout = self._layout.model_copy(update={"dropout": getattr(params, "dropout")})  # noqa: B009
        self._network = build(self._layout).to(self._device)
        self._kept = read_tensors(start.model.training) if start and start.model.training else {}  # type: ignore[attr-defined]
        if start is not None:
            load_weights(self._network, read_tensors(start.model.weights))  # type: ignore[attr-defined]
        self._shard()
        self._named = dict(self._network.named_parameters())
        self._flat = None if self._sharded else self._flattened()
        self._optimizer = self._made_optimizer()
        self._best: dict[str, Tensor] = {}
        self._restore()
        self._forward: Any = torch.compile(self._network) if worker.compile else self._network
        self._feed = Feed(
            worker,
            seed=params.seed,
            steps=params.steps(worker.total_rows("train")),
            center=self._layout.center,
            scale=self._layout.scale,
        )

    @property
    def _sharded(self) -> bool:
        return self._worker.strategy == "fsdp" and self._distributed

    def run(self) -> None:
        """Fit, and report the network."""
        worker = self._worker
        if "final" in self._state:  # lost behind the last report
            assert worker.start is not None
            worker.report(worker.start.step, worker.start.model if worker.rank == 0 else None, worker.start.state)
            return
        if self.learn():
            self._end()

    def learn(self) -> bool:
        """Take all steps; return whether they went well."""
        worker, steps = self._worker, self._feed.steps
        last = self._params.epochs * steps
        stop = self._stopped()
        with self._feed.batches(self._step, last) as batches:
            while self._step < last and not stop:
                started = time.monotonic()
                self._learn(next(batches), last)
                self._busy_s += time.monotonic() - started
                self._rows += self._feed.rows_of_step(self._step)
                self._step += 1
                if wrong := self._wrong():
                    worker.refuse(wrong)
                    return False
                if self._step % steps == 0:
                    self._evaluate(last)
                    stop = self._stopped()
                if self._step % worker.checkpoint_every == 0 and self._step < last and not stop:
                    worker.report(self._step, self.going_on(), self._state, aside=True)
        return True

    def _learn(self, rows: Rows, last: int) -> None:
        """Take one step."""
        params, step = self._params, self._step
        torch.manual_seed(_mixed(params.seed, step, self._worker.rank))
        rate = params.learning_rate_at(step, last)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        matrix, target = self._there(rows.matrix), self._there(rows.target)
        weight = None if rows.weight is None else self._there(rows.weight)
        total = self._total(weight, step)
        self._network.train()
        if self._flat is not None:
            self._flat.zero_()
        else:
            self._optimizer.zero_grad(set_to_none=False)
        with self._precision():
            outputs = self._forward(matrix).float()
        each = self._network.losses(outputs, target)
        loss = (each if weight is None else each * weight).sum() / total
        # fully_shard takes the mean over the ranks, and this is a sum.
        (loss * self._worker.size if self._sharded else loss).backward()  # type: ignore[no-untyped-call]
        self._state["rate"] = rate
        self._note(self._reduced(loss.detach()), self._clipped())
        self._optimizer.step()
        self._shrink(rate)

    def _total(self, weight: Tensor | None, step: int) -> Tensor | float:
        """The sum of the weights of a step's rows on all ranks."""
        if weight is None:
            return float(self._feed.rows_of_step(step))
        total = weight.sum()
        if self._distributed:
            torch.distributed.all_reduce(total)
        return total.clamp_min(1e-12)

    def _reduced(self, loss: Tensor) -> float:
        """Sum gradients and loss over the ranks; return the loss."""
        if self._flat is not None:
            self._flat[-1] = loss
            if self._distributed:
                torch.distributed.all_reduce(self._flat)
            loss = self._flat[-1]
        elif self._distributed:
            loss = loss.clone()
            torch.distributed.all_reduce(loss)
        if isinstance(self._params, LinearParams) and self._params.l2:
            for name, value in self._named.items():
                if name != "bias":
                    assert value.grad is not None
                    value.grad.add_(value.detach(), alpha=self._params.l2)
        return float(loss)

    def _clipped(self) -> float:
        """Shorten the gradient where it is too long; return how long it was."""
        limit = self._params.gradient_clip
        if self._flat is None:
            found: Any = nn.utils.clip_grad_norm_(self._named.values(), limit if limit is not None else math.inf)
            return float(found.full_tensor() if hasattr(found, "full_tensor") else found)
        gradient = self._flat[:-1]
        norm = float(torch.linalg.vector_norm(gradient))
        if limit is not None and norm > limit:
            gradient.mul_(limit / norm)
        return norm

    def _shrink(self, rate: float) -> None:
        """The proximal step of l1: weights go towards 0, as far as the optimizer would take the same gradient, and stay there."""
        if not isinstance(self._params, LinearParams) or not self._params.l1:
            return
        with torch.no_grad():
            for name, value in self._named.items():
                if name != "bias":
                    less: Any = rate * self._params.l1
                    state = self._optimizer.state[value]
                    if "exp_avg_sq" in state:
                        less = less / ((state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8)
                    value.copy_(value.sign() * (value.abs() - less).clamp(min=0))

    def _note(self, loss: float, norm: float) -> None:
        """Keep what tells how it goes; equal on every rank."""
        state = self._state
        state["norm"] = norm
        state["sum"], state["steps"] = state.get("sum", 0.0) + loss, state.get("steps", 0) + 1
        state["recent"] = [*state.get("recent", []), loss][-RECENT:]

    def _wrong(self) -> str | None:
        """What went wrong in the step behind us, if something did."""
        recent = self._state["recent"]
        loss, norm = recent[-1], self._state["norm"]
        constant = math.log(max(2, self._layout.outputs)) if self._layout.task != "regression" else 1.0
        if math.isfinite(loss) and math.isfinite(norm):
            mean = math.fsum(recent) / len(recent)
            if len(recent) < RECENT or mean < DIVERGED * constant:
                return None
            what = f"the loss has grown to {mean:.3g}, that of a constant answer is {constant:.2g},"
        else:
            what = f"the {'loss' if not math.isfinite(loss) else 'gradient'} is {loss if not math.isfinite(loss) else norm}"
        epoch = (self._step - 1) // self._feed.steps + 1
        columns = [f"{name} ({value:.3g})" for name, value in self._extremes()]
        seen = f"; columns with extreme values: {', '.join(columns)}" if columns else ""
        remedy = "clip or scale them under features.columns, or lower" if columns else "lower"
        return (
            f"train: {what} in step {self._step} (epoch {epoch}), with a learning rate of {self._state['rate']:.3g}{seen}; "
            f"{remedy} model.params.learning_rate"
        )

    def _extremes(self) -> list[tuple[str, float]]:
        """The columns of the row sample whose largest value is far off, as the network gets it; five at most."""
        found = [(self._columns[i], self._spread[i]) for i in self._layout.numbers if abs(self._spread[i]) > EXTREME]
        return sorted(found, key=lambda each: -abs(each[1]))[:5]

    def _evaluate(self, last: int) -> None:
        """Measure the network on the valid rows of all ranks, and keep the best weights."""
        worker, state = self._worker, self._state
        train = {"loss": state["sum"] / state["steps"]}
        state["sum"], state["steps"] = 0.0, 0
        if not worker.total_rows("valid"):
            worker.log(self._step, {"train": train}, total=last)
            return
        metrics = Metrics(self._task)
        for answers in self._answers("valid"):
            metrics.add(*answers)
        result = Metrics.merge(self._task, worker.gather(f"valid-{self._step}", metrics.state())).result()
        worker.log(self._step, {"valid": result, "train": train}, total=last)
        value, best = result[self._metric], state.get("best")
        if value is not None and (best is None or self._better(value, best)):
            state["best"], state["best_step"] = value, self._step
            if self._params.early_stopping is not None:
                self._best = {name: _local(parameter).detach().clone() for name, parameter in self._named.items()}

    def _answers(self, split: str) -> Iterator[tuple[Matrix, Matrix, Matrix | None]]:
        """Targets, raw scores and weights (those of metrics: without the classes') of this rank's rows."""
        self._network.eval()
        most = rows_at_once(self._layout)
        shards = self._worker.shards
        batches = (batch for found in self._worker.ranges(split) for batch in shards.read(found))
        left = self._rounds(split, most) if self._sharded else None
        with torch.no_grad(), self._precision():
            for batch in batches:
                for at in range(0, len(batch.target), most):
                    matrix = self._there(to_float32(batch.matrix[at : at + most]))
                    raw = self._network.scores(self._network(matrix).float()).double().cpu().numpy()
                    left = None if left is None else left - 1
                    weight = None if batch.weight is None else batch.weight[at : at + most]
                    yield batch.target[at : at + most], on_scale(self._layout, raw), weight
            for _ in range(left or 0):  # each call gathers shards from all ranks, so all have to call equally often
                self._network(torch.zeros(1, self._layout.features, device=self._device))

    def _rounds(self, split: str, most: int) -> int:
        """How many calls the rank that has the most of them needs."""
        pieces = [piece for found in self._worker.ranges(split) for piece in self._worker.shards.pieces(found)]
        own = sum(-(-(piece.stop - piece.start) // most) for piece in pieces)
        return int(max(self._worker.gather(f"rounds-{split}-{self._step}", own)))

    def _better(self, value: float, than: float) -> bool:
        return value > than if self._task.higher_is_better(self._metric) else value < than

    def _stopped(self) -> bool:
        patience, best = self._params.early_stopping, self._state.get("best_step")
        return patience is not None and best is not None and self._step - best >= patience * self._feed.steps

    def measured(self) -> Metrics:
        """The metrics of the network as it is on this rank's train rows."""
        metrics = Metrics(self._task)
        for answers in self._answers("train"):
            metrics.add(*answers)
        return metrics

    def going_on(self) -> FittedNetwork | None:
        """The network as it is with all that is needed to go on, on rank 0; every rank calls it."""
        weights = self._weights()
        training = {f"best/{name}": self._whole(name, value) for name, value in self._best.items()}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state[parameter].items():
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                training[f"optimizer/{key}/{name}"] = whole.detach().cpu().contiguous()
        if self._worker.rank > 0:
            return None
        return self._family(self._layout, write_tensors(weights), training=write_tensors(training))

    def _end(self) -> None:
        kept = {name: self._whole(name, value) for name, value in self._best.items()} or self._weights()
        best = self._state["best_step"] if self._best else self._step
        model = None
        if self._worker.rank == 0:
            network = build(self._layout)
            load_weights(network, kept)
            sample = self._worker.shards.sample()
            model = self._family(self._layout, write_tensors(kept), program=exported(network.eval(), sample))
        speed = {"rows_per_s": self._rows / self._busy_s, "waited": self._feed.waited_s / self._busy_s} if self._rows else None
        self._worker.report(self._step, model, {**self._state, "final": best, "speed": speed})

    def _weights(self) -> dict[str, Tensor]:
        return {name: self._whole(name, _local(value).detach()) for name, value in self._named.items()}

    def _whole(self, name: str, local: Tensor) -> Tensor:
        """A tensor like a parameter, of which this rank has its part, put together on the CPU."""
        parameter: Any = self._named[name]
        if not self._sharded:
            return local.cpu().clone()
        from torch.distributed.tensor import DTensor

        spread = DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
        return spread.full_tensor().cpu().contiguous()

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor like a parameter."""
        whole = whole.to(self._device)
        if not self._sharded or whole.ndim == 0:
            return whole
        from torch.distributed.tensor import distribute_tensor

        parameter: Any = self._named[name]
        # Every rank has the whole: nothing is sent, and safetensors hands its tensors out in another order on each rank.
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)

    def _shard(self) -> None:
        if not self._sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device.type, (self._worker.size,))
        for block in getattr(self._network, "blocks", []):
            fully_shard(block, mesh=mesh)
        fully_shard(self._network, mesh=mesh)

    def _flattened(self) -> Tensor:
        """One block of memory that all gradients lie in, and behind them the loss: what the ranks sum in one message."""
        sizes = [value.numel() for value in self._named.values()]
        flat = torch.zeros(sum(sizes) + 1, device=self._device)
        for value, part in zip(self._named.values(), torch.split(flat[:-1], sizes), strict=True):
            value.grad = part.view(value.shape)
        return flat

    def _made_optimizer(self) -> torch.optim.Optimizer:
        params = self._params
        undecayed = self._network.undecayed()
        groups = [
            {
                "params": [value for name, value in self._named.items() if name not in undecayed],
                "weight_decay": params.weight_decay,
            },
            {"params": [value for name, value in self._named.items() if name in undecayed], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if isinstance(params, LinearParams) and params.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=params.learning_rate)
        return torch.optim.AdamW(groups, lr=params.learning_rate, fused=not self._sharded or self._device.type == "cuda")

    def _restore(self) -> None:
        for key, whole in self._kept.items():
            kind, _, rest = key.partition("/")
            if kind == "best":
                self._best[rest] = _local(self._part(rest, whole))
            else:
                entry, _, name = rest.partition("/")
                self._optimizer.state[self._named[name]][entry] = self._part(name, whole) if whole.ndim else whole
        self._kept = {}

    def _there(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """bfloat16 for what a GPU that has it multiplies; sums, losses and weights stay float32."""
        if self._device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()


def device_of(worker: Worker) -> torch.device:
    """The GPU that Ray gave to this process, else the CPU."""
    if torch.cuda.is_available() and worker.gpu:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _local(value: Any) -> Tensor:
    """What this rank holds of a parameter."""
    found: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return found


def _mixed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _spread(matrix: Matrix) -> list[float]:
    """The value of each column that is farthest from 0; 0 of a column without any."""
    found = []
    for column in matrix.T:
        known = column[~np.isnan(column)]
        found.append(float(known[np.argmax(np.abs(known))]) if len(known) else 0.0)
    return found
