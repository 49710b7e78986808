"""Train on a cluster of three nodes on this machine and kill one of them; a process of its own, for it starts a Ray of its own.

`python -m tests.local.node_loss DATA STORE STEP` prints the record of the run as JSON. With `elastic` behind it there are two
nodes and one or two workers: the fit goes on with one after the loss, and with two again once a new node has come.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

import pipelines.training.trainer
from app.environment import node_environment, train_environment
from pipelines.spec import PipelineSpec


def main(data: str, store: str, step: int, elastic: bool) -> None:
    os.environ.update({**node_environment(), **train_environment(), "RAY_AUTH_MODE": "disabled"})
    import ray
    from ray.cluster_utils import Cluster

    from tests.local import test_resume
    from tests.local.conftest import wait_for

    # A worker takes two slots: one fits on the head, one on each of the others, and what is left is Ray Data's.
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False, "object_store_memory": 10**8}
    )
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=10**8) for _ in range(1 if elastic else 2)]
    ray.init(address=cluster.address, log_to_driver=False)
    pipelines.training.trainer.GROW_S = 2.0
    # Not by `add_node`, which needs the main thread.
    start = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--address",
        cluster.address,
        "--num-cpus",
        "2",
        "--object-store-memory",
        str(10**8),
        "--block",
    ]
    alone = Path(store) / "alone"
    late: list[subprocess.Popen[bytes]] = []
    try:
        spec = test_resume.spec_with(Path(data), Path(store), 2)
        changes: dict[str, Any] = {"train": {"cpus_per_worker": 2.0}}
        if elastic:
            changes["train"]["workers"] = {"min": 1, "max": 2}
            params = {**spec.model.params, "accident": "alone", "marker": str(alone)}
            changes["model"] = {"type": "tests.local.faulty:Faulty", "params": params}
        spec = changed(spec, changes)

        def lose_a_node() -> None:
            cluster.remove_node(next(node for node in nodes if trains(node)), allow_graceful=False)
            if elastic:
                wait_for(alone.exists, "the group of one")
                late.append(subprocess.Popen(start))

        done = test_resume.train_while(spec, lose_a_node, step)
        print(json.dumps({**done.record, "path": done.path}))
    finally:
        for process in late:
            process.terminate()
            process.wait()
        ray.shutdown()
        cluster.shutdown()


def changed(spec: PipelineSpec, changes: dict[str, Any]) -> PipelineSpec:
    values = spec.model_dump(by_alias=True)
    return PipelineSpec.model_validate({**values, **{section: {**values[section], **new} for section, new in changes.items()}})


def trains(node: Any) -> bool:
    """Whether a train worker runs on this node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("RayTrainWorker" in word for process in raylet.children(recursive=True) for word in process.cmdline())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:] == ["elastic"])
