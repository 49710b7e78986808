"""Why is a worker gone? One sentence, from what Ray says of its death and from what its process wrote last."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

TAIL_BYTES: Final = 16_384
GLOO: Final = r"gloo/transport/|NCCL error|ncclRemoteError"
"""What Torch says on a rank whose peer is gone."""
LESS_MEMORY: Final = "take fewer workers a node, or nodes with more memory"


@dataclass(frozen=True)
class Lost:
    """A worker that died, fell silent or failed."""

    who: str
    """`rank 1 (pid 4711 on worker-3)`"""
    how: str
    """died | silent | failed"""
    text: str
    """What Ray says of its death; for how many seconds it was silent; the exception."""
    pid: int | None = None
    node: str | None = None
    """Ray's id of the node."""


class Trace(NamedTuple):
    """What a dead process left on its node."""

    stderr: str
    """The end of what it wrote."""
    oom_kills: int
    """How often the node's kernel killed for lack of memory, since it started."""
    memory: int
    """Bytes of the node."""


def is_symptom(text: str) -> bool:
    """Whether the text tells of a connection that broke, which is what another rank's death looks like from a survivor."""
    return re.search(rf"Socket \w+ error|lost its connection to another rank|{GLOO}", text) is not None


def sentences(lost: list[Lost], trace: Callable[[Lost], Trace | None], oom_kills: int) -> list[str]:
    """Say why each worker is gone; survivors that only saw a connection break are left out where the cause is known.

    `trace` looks on the worker's node, `oom_kills` is what the kernel's count was when the workers started.
    """
    told = [(explain(one, trace(one) if one.pid is not None else None, oom_kills), one) for one in lost]
    causes = [sentence for sentence, one in told if not is_symptom(sentence)]
    return causes or [sentence for sentence, _ in told[:1]]


def explain(lost: Lost, trace: Trace | None, oom_kills: int = 0) -> str:
    """Put one loss into words.

    >>> explain(Lost("rank 1 (pid 7 on b)", "silent", "20"), None)
    'rank 1 (pid 7 on b) has not answered for 20 s: it is stopped, or its node cannot be reached; it was killed'
    """
    if lost.how == "silent":
        return f"{lost.who} has not answered for {lost.text} s: it is stopped, or its node cannot be reached; it was killed"
    if lost.how == "failed":
        return f"{lost.who} {_failure(lost.text)}"
    if found := re.search(r"Memory on the node .*? was (\S+) used / (\S+) limit", lost.text):
        own = re.search(rf"\bpid={lost.pid}, [^)]*?memory used=(\w[\w.]*)", lost.text)
        return (
            f"{lost.who} ran out of memory: Ray killed it when its node had {found[1]} of {found[2]} in use"
            f"{f', {own[1]} of that its own' if own else ''}; {LESS_MEMORY}"
        )
    if re.search(r"its node has died|node was terminated", lost.text):
        return f"{lost.who} is lost with its node, which died or cannot be reached"
    written = trace.stderr if trace else ""
    if signals := re.findall(r"\*\*\* (SIG\w+) received", written):
        fatal = re.findall(r"\[LightGBM\] \[Fatal\] (.*)", written)
        other = re.findall(r"what\(\): +(.*)", written)
        last = f"; LightGBM said: {fatal[-1].strip()}" if fatal else f"; it said: {other[-1].strip()}" if other else ""
        return f"{lost.who} was ended by its own native code ({signals[-1]}){last}"
    if trace and trace.oom_kills > oom_kills:
        return (
            f"{lost.who} ran out of memory: the kernel of its node, which has {trace.memory / 2**30:.1f} GiB, killed it; "
            f"{LESS_MEMORY}"
        )
    return f"{lost.who} was killed from outside (SIGKILL)"


def trace(pid: int, *, kill: bool = False) -> Trace:
    """Look at what a process left; to be called on its node. `kill`: end it first, if it is still there."""
    import psutil
    import ray._private.worker

    if kill:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if "ray::" in " ".join(process.cmdline()):  # else the pid is another process's by now
                process.send_signal(signal.SIGKILL)
    node: Any = ray._private.worker._global_node
    logs = Path(node.get_logs_dir_path()).glob(f"worker-*-{pid}.err")
    written = "".join(_tail(path) for path in logs)
    return Trace(written, kernel_oom_kills(), psutil.virtual_memory().total)


def kernel_oom_kills() -> int:
    """How often this machine's kernel has killed a process for lack of memory."""
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.M)
        return int(found[1]) if found else 0
    return 0


def _failure(text: str) -> str:
    if port := re.search(r"Binding port (\d+) failed", text):
        return f"could not listen for its peers on port {port[1]}, which another process took first; each start takes other ports"
    if broken := re.search(r"Socket \w+ error, (.*) \(code: \d+\)", text):
        return f"lost its connection to another rank: {broken[1]}"
    if re.search(GLOO, text):
        return "lost its connection to another rank"
    if "did not start" in text or text.startswith("waited"):
        return text.splitlines()[0]
    return f"failed: {text.splitlines()[0] if text else 'without a word'}"


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")
