"""Which processes belong to a private Ray, and are they gone with it?"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

TIMEOUT_S = 5
OWNER = "heliostat-owner"
RAY_FOLDER = "ray-folder"
"""Names, in a session's folder, the one of its Ray: what Ray spilled there would stay after a kill."""


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Finish what takes a second or two even when the user presses Ctrl-C once more."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: somebody's C code
                signal.signal(number, handler)


def exit_when_terminated() -> None:
    """Let SIGTERM end the session in order. Ray's own handler writes a trace of its C++ to stderr first."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def end_threads(kept: list[threading.Thread]) -> None:
    """End the threads that still use Ray, all but `kept`: a call after Ray's shutdown ends the process on the spot, with 1.

    gRPC leaves one behind that polls, and Ray Data, where others than we use it, a parked `Prefetcher`; neither calls Ray.
    Forgotten executions go first: collected later, they call a Ray that is gone, and Ray starts a new one for them.
    """
    gc.collect()
    executor = getattr(sys.modules.get("ray.data._internal.execution.streaming_executor"), "StreamingExecutor", ())
    ours = [thread for thread in threading.enumerate() if thread not in (*kept, threading.current_thread())]
    ours = [thread for thread in ours if not any(name in thread.name for name in ("Prefetcher", "_poll_wrapper"))]
    for thread in ours:
        if isinstance(thread, executor):
            thread.shutdown(force=True)
    _end_routers()
    deadline = time.monotonic() + TIMEOUT_S
    for thread in ours:
        thread.join(max(0.0, deadline - time.monotonic()))


def _end_routers() -> None:
    """End the loop of Ray Serve's handles: every ten seconds it tells Serve of their load, and so would start a new Ray."""
    router: Any = getattr(sys.modules.get("ray.serve._private.router"), "SingletonThreadRouter", None)
    loop = getattr(router, "_asyncio_loop", None)
    if loop is not None:
        router._asyncio_loop = None  # a later session makes its own
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # until the session is over: that the loop is gone is no error
        loop.call_soon_threadsafe(loop.stop)


def ray_processes() -> list[psutil.Process]:
    """List the processes of this process's Ray, known by the name of its session, also of one that only half started."""
    session = re.compile(rf"/session_[\d_-]+_{os.getpid()}\b")
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if session.search(" ".join(child.cmdline())):
                found += [child, *child.children(recursive=True)]
    return found


def end(processes: list[psutil.Process], folder: Path, *, wait_s: float = TIMEOUT_S) -> None:
    """Wait until they are gone, and end what stays; then HAProxy, which outlives the actor that starts it, again and again."""
    others = [process for process in processes if not _is_haproxy_of(folder, process)]
    _, alive = psutil.wait_procs(others, timeout=wait_s)
    _kill(alive)
    _kill([process for process in psutil.process_iter() if _is_haproxy_of(folder, process)])


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a lock in a session's folder: the system takes it away with the process, however that ends."""
    with open(folder / "new", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "new").rename(folder / OWNER)  # never seen without its lock
        yield


def sweep(parent: Path) -> None:
    """End what is left of this user's sessions that were killed: HAProxy, which still holds its port, and files."""
    for marker in parent.glob(f"*/{OWNER}"):
        with contextlib.suppress(OSError), open(marker) as file:  # OSError: locked, or removed right now
            if os.fstat(file.fileno()).st_uid != os.getuid():
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end([], marker.parent)
            if (noted := marker.parent / RAY_FOLDER).exists():
                for spilled in Path(noted.read_text()).glob("ray_spilled_objects*"):
                    shutil.rmtree(spilled, ignore_errors=True)
            shutil.rmtree(marker.parent, ignore_errors=True)


def _is_haproxy_of(folder: Path, process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "haproxy" in process.name() and any(str(folder) in word for word in process.cmdline())
    return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=TIMEOUT_S)
