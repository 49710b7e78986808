"""Why a worker is gone, in one line: from texts in the form in which Ray 2.60, LightGBM and the system leave them."""

from __future__ import annotations

import socket
import sys

import pytest

from pipelines.training.lost import Lost, Trace, explain, sentences
from pipelines.training.network import notice_cuts

WHO = "rank 1 (pid 32609 on b)"
EOF = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tactor_id: 4e5b\n\tpid: 32609\n\tip: 10.0.0.2\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits "
    "with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high "
    "memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."
)
MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: 7a6b) was 3.97GB used / 23.54GB "
    "limit (0.168752)\nOOM kill reason: Memory usage 4207509504B exceeded threshold of 4195899136B (16.6% of 25276502016B limit)\n"
    "Selected to kill: (Actor(bf50): job ID=01000000, lease ID=0000, task name=RayTrainWorker.__init__, required resources={}, pid=32608, "
    "actual memory used=0.10GB, worker ID=f69e), (Actor(bf51): job ID=01000000, lease ID=0000, task name=RayTrainWorker.__init__, "
    "required resources={}, pid=32609, actual memory used=0.98GB, worker ID=f69f)\n"
)
NODE = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tpid: 32609\n\tip: 10.0.0.2\n"
    "The actor died because its node has died. Node Id: 5ca1\n\tthe actor's node was terminated unexpectedly: health check failed due to "
    "missing too many heartbeats"
)
ABORT = (
    "[LightGBM] [Fatal] Unsupported Arrow type: string\nterminate called after throwing an instance of 'std::runtime_error'\n"
    "  what():  Unsupported Arrow type: string\n*** SIGABRT received at time=1795289562 on cpu 1 ***\nPC: @     0x7f2a  (unknown)  pthread_kill\n"
)
SEGFAULT = "*** SIGSEGV received at time=1795289562 on cpu 1 ***\nPC: @     0x7f2a  (unknown)  memcpy\n"


@pytest.mark.parametrize(
    ("how", "text", "trace", "sentence"),
    [
        (
            "died",
            MEMORY,
            None,
            "ran out of memory: Ray killed it when its node had 3.97GB of 23.54GB in use, 0.98GB of that its own; take fewer workers a "
            "node, or nodes with more memory",
        ),
        (
            "died",
            EOF,
            Trace("", 4, 24 << 30),
            "ran out of memory: the kernel of its node, which has 24.0 GiB, killed it; take fewer workers a node, or nodes with more memory",
        ),
        ("died", EOF, Trace("", 3, 24 << 30), "was killed from outside (SIGKILL)"),
        ("died", EOF, None, "was killed from outside (SIGKILL)"),
        ("died", NODE, None, "is lost with its node, which died or cannot be reached"),
        (
            "died",
            EOF,
            Trace(ABORT, 3, 24 << 30),
            "was ended by its own native code (SIGABRT); LightGBM said: Unsupported Arrow type: string",
        ),
        ("died", EOF, Trace(SEGFAULT, 3, 24 << 30), "was ended by its own native code (SIGSEGV)"),
        ("silent", "20", None, "has not answered for 20 s: it is stopped, or its node cannot be reached; it was killed"),
        (
            "failed",
            "LightGBMError: Binding port 36729 failed",
            Trace("", 3, 1),
            "could not listen for its peers on port 36729, which another process took first; each start takes other ports",
        ),
        ("failed", "OSError: shard gone\nand more", None, "failed: OSError: shard gone"),
    ],
)
def test_each_way_to_be_lost_is_one_line(how: str, text: str, trace: Trace | None, sentence: str) -> None:
    assert explain(Lost(WHO, how, text, pid=32609, node="n"), trace, oom_kills=3) == f"{WHO} {sentence}"


def test_a_survivor_whose_connection_broke_is_no_cause() -> None:
    survivor = Lost(
        "rank 0 (pid 1 on a)", "failed", "LightGBMError: Socket recv error, Connection reset by peer (code: 104)", pid=1
    )
    dead = Lost(WHO, "died", EOF, pid=32609)

    assert sentences([survivor, dead], lambda lost: None, 0) == [f"{WHO} was killed from outside (SIGKILL)"]
    assert sentences([survivor], lambda lost: None, 0) == [
        "rank 0 (pid 1 on a) lost its connection to another rank: Connection reset by peer"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for sockets in /proc")
def test_the_kernel_probes_the_connections_between_ranks_and_no_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        ends = [socket.create_connection(server.getsockname()) for server in (listener, other)]
        accepted = [listener.accept()[0], other.accept()[0]]

        notice_cuts({listener.getsockname()[1]}, 2)

        assert [end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for end in [*ends, *accepted]] == [1, 0, 1, 0]
        for end in [*ends, *accepted]:
            end.close()
