"""Networks on two gloo processes, without Ray: ddp takes the steps of one process, fsdp those of ddp on disjoint shares."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

from pipelines.models import network_fit
from pipelines.models.network import MLP, FittedNetwork, Linear, TabM
from pipelines.models.network_fit import Training
from pipelines.training.worker import Start
from tests.unit.test_boosting import BINARY
from tests.unit.test_networks import Refusing, run_of

PARAMS: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 2, "learning_rate": 0.05, "l2": 0.001},
    "mlp": {"epochs": 2, "d_block": 32, "n_blocks": 2, "dropout": 0.0, "d_embedding": 4, "learning_rate": 0.01},
    "tabm": {"epochs": 2, "d_block": 32, "k": 4, "dropout": 0.0, "d_embedding": 4, "learning_rate": 0.01},
}
FAMILIES: dict[str, type[FittedNetwork]] = {"linear": Linear, "mlp": MLP, "tabm": TabM}
EVERY = 13
State = tuple[dict[str, Any], Path]


class Ranked(Refusing):
    """Gathers over Torch's own process group."""

    def gather(self, key: str, state: Any) -> list[Any]:
        if self.size == 1:
            return [state]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (key, state))
        assert {key for key, _ in found} == {key}
        return [state for _, state in found]


def fit(rank: int, size: int, port: int, folder: str, name: str, strategy: str, resume: int) -> None:
    """What each process runs; rank 0 leaves its checkpoints and the sizes of its parameters."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    if size > 1:
        dist.init_process_group("gloo")
    network_fit.exported = lambda network, sample: b""
    place = Path(folder) / f"{name}-{strategy}-{size}"
    start = None
    if resume:
        state = json.loads((place / f"{resume}.json").read_text())
        start = Start(FAMILIES[name].load(place / str(resume)), resume, state)
    plain = run_of(Path(folder) / f"data-{rank}", start=start, every=EVERY)
    run = Ranked(**{**vars(plain), "rank": rank, "size": size, "strategy": strategy})
    training = Training(FAMILIES[name], FAMILIES[name].Params(batch_size=256, **PARAMS[name]), BINARY, run)  # type: ignore[arg-type]
    own = {key: network_fit._local(value).numel() for key, value in training._named.items()}
    training.run()
    place = place / "resumed" if resume else place
    for step, model, state in run.kept:
        if model is not None:
            (place / str(step)).mkdir(parents=True)
            model.save(place / str(step))
            (place / f"{step}.json").write_text(json.dumps(state))
    (Path(folder) / f"{name}-{strategy}-{size}-{rank}.json").write_text(json.dumps({"own": own, "logged": run.logged}))
    if size > 1:
        dist.barrier()
        dist.destroy_process_group()


def started(folder: Path, name: str, strategy: str, size: int, resume: int = 0) -> tuple[dict[str, Any], Path]:
    with socket.socket() as held:
        held.bind(("", 0))
        port = held.getsockname()[1]
    args = (size, port, str(folder), name, strategy, resume)
    torch.multiprocessing.spawn(fit, args=args, nprocs=size)
    ranks = [json.loads((folder / f"{name}-{strategy}-{size}-{rank}.json").read_text()) for rank in range(size)]
    place = folder / f"{name}-{strategy}-{size}"
    return {
        "own": [rank["own"] for rank in ranks],
        "logged": [rank["logged"] for rank in ranks],
    }, place / "resumed" if resume else place


def weights(place: Path, step: int = 32) -> dict[str, np.ndarray]:
    return load_file(place / str(step) / "weights.safetensors")


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.max(np.abs(one[name] - other[name]), initial=0.0)) for name in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, State]:
    """By strategy."""
    return {strategy: started(folder, "tabm", strategy, 2) for strategy in ("ddp", "fsdp")}


def test_fsdp_holds_disjoint_shares_and_saves_the_weights_of_ddp(undisturbed: dict[str, State]) -> None:
    (ddp, by_ddp), (fsdp, by_fsdp) = undisturbed["ddp"], undisturbed["fsdp"]

    whole = {key: value.size for key, value in weights(by_ddp).items()}
    assert ddp["own"] == [whole, whole]
    assert {key: sum(own[key] for own in fsdp["own"]) for key in whole} == whole
    assert all(0 < sum(own.values()) < 0.75 * sum(whole.values()) for own in fsdp["own"])
    assert apart(weights(by_ddp), weights(by_fsdp)) < 1e-5
    for (step, one), (again, other) in zip(ddp["logged"][0], fsdp["logged"][0], strict=True):
        assert step == again and one["valid"]["auc"] == pytest.approx(other["valid"]["auc"], abs=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_that_go_on_end_with_the_bits_of_an_undisturbed_fit(
    strategy: str, folder: Path, undisturbed: dict[str, State]
) -> None:
    told, whole = undisturbed[strategy]

    again, resumed = started(folder, "tabm", strategy, 2, resume=EVERY)

    assert sorted(path.name for path in resumed.iterdir() if path.is_dir()) == ["26", "32"]
    assert (resumed / "32/weights.safetensors").read_bytes() == (whole / "32/weights.safetensors").read_bytes()
    assert again["logged"][0] == told["logged"][0]


def test_a_fit_goes_on_with_another_number_of_ranks_and_another_strategy(folder: Path, undisturbed: dict[str, State]) -> None:
    told, whole = undisturbed["fsdp"]
    shutil.copytree(whole, folder / "tabm-ddp-1", ignore=shutil.ignore_patterns("resumed"))

    again, resumed = started(folder, "tabm", "ddp", 1, resume=EVERY)

    assert sorted(path.name for path in resumed.iterdir() if path.is_dir()) == ["26", "32"]
    last = again["logged"][0][-1][1]["valid"]["auc"]
    assert last == pytest.approx(told["logged"][0][-1][1]["valid"]["auc"], abs=0.03)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_two_ranks_learn_what_one_learns(name: str, tmp_path: Path) -> None:
    aucs = [started(tmp_path, name, "ddp", size)[0]["logged"][0][-1][1]["valid"]["auc"] for size in (1, 2)]

    assert aucs[0] == pytest.approx(aucs[1], abs=0.003)
