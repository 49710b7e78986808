"""Train on a cluster of three nodes on this machine and kill one of them; a process of its own, for it starts a Ray of its own.

`python -m tests.local.node_loss DATA STORE STEP` prints the record of the run as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil

from app.environment import node_environment, train_environment


def main(data: str, store: str, step: int) -> None:
    os.environ.update({**node_environment(), **train_environment(), "RAY_AUTH_MODE": "disabled"})
    import ray
    from ray.cluster_utils import Cluster

    from tests.local import test_resume

    # A worker takes two slots: one fits on the head, one on each of the others, and what is left is Ray Data's.
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False, "object_store_memory": 10**8}
    )
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=10**8) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        spec = test_resume.spec_with(Path(data), Path(store), 2)
        spec = spec.model_copy(update={"train": spec.train.model_copy(update={"cpus_per_worker": 2.0})})

        def lose_a_node() -> None:
            cluster.remove_node(next(node for node in nodes if trains(node)), allow_graceful=False)

        done = test_resume.train_while(spec, lose_a_node, step)
        print(json.dumps({**done.record, "path": done.path}))
    finally:
        ray.shutdown()
        cluster.shutdown()


def trains(node: Any) -> bool:
    """Whether a train worker runs on this node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return any("RayTrainWorker" in word for process in raylet.children(recursive=True) for word in process.cmdline())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
