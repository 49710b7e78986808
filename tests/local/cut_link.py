"""One of two ranks of a LightGBM that trains until its link is cut: `python -m tests.local.cut_link RANK`; prints what ended it."""

from __future__ import annotations

import sys
from typing import Any

import lightgbm as lgb
import numpy as np

from pipelines.training.network import lightgbm_network
from pipelines.training.worker import Worker

HOSTS = ("10.231.7.1", "10.231.7.2")
PORTS = (23471, 23472)


def main(rank: int) -> None:
    rng = np.random.default_rng(rank)
    matrix = rng.normal(size=(20_000, 5))
    data = lgb.Dataset(matrix, (matrix[:, 0] > 0).astype(float), params={"verbosity": -1, "num_threads": 1}).construct()
    worker: Any = Worker(rank, 2, 1, 1, None, None, None, "a", connect=None)  # type: ignore[arg-type]
    worker.gather = lambda key, state: list(zip(HOSTS, PORTS, strict=True))
    network = lightgbm_network(worker) | {"local_listen_port": PORTS[rank]}
    booster = lgb.Booster({"objective": "binary", "tree_learner": "data", "num_threads": 1, "verbosity": -1, **network}, data)
    print("connected", flush=True)
    try:
        while True:
            booster.update()
    except lgb.basic.LightGBMError as error:
        print(error, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
