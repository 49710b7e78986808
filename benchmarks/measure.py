"""How long a command takes, and how much memory its whole process tree."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 0.2


@dataclass(frozen=True)
class Measured:
    """One finished command."""

    seconds: float
    peak_mb: float
    """Largest sum of proportional set sizes (PSS) over the process and all its descendants."""
    at_peak: dict[str, float]
    """MB of each process at that moment, by name, the largest first."""
    result: dict[str, Any]
    """The JSON object on its stdout."""


def measure(command: Sequence[str], env: dict[str, str] | None = None) -> Measured:
    """Run a command that prints one JSON object; raises `RuntimeError` with its stderr when it fails."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )
    peak = Peak(process.pid)
    with peak:
        out, err = process.communicate()
    seconds = time.monotonic() - started
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{err[-4000:]}")
    return Measured(seconds, peak.mb, peak.processes, json.loads(out))


def alternate(module: str, sides: Sequence[str], repeat: int, **places: Path | float) -> dict[str, list[Measured]]:
    """Run the sides of a benchmark in turn as `python -m MODULE --side SIDE`, at one priority: Ray lowers its workers'."""
    words = [word for name, place in places.items() for word in (f"--{name}", str(place))]
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, measured in found.items():
            command = [sys.executable, "-m", module, "--side", name, *words]
            measured.append(measure(command, env={"RAY_worker_niceness": "0"}))
    return found


def wait_for_slots(session: Any) -> None:
    """Return once a worker of each slot has answered."""
    import ray

    nothing = ray.remote(num_cpus=1)(lambda: time.sleep(0.1))
    ray.get([nothing.remote() for _ in range(int(session.slots().total))])


class Peak:
    """Watches a process tree from a thread. Descendants that leave the tree (daemons) are kept by their session."""

    def __init__(self, pid: int) -> None:
        self._pid, self._stop, self.mb = pid, threading.Event(), 0.0
        self.processes: dict[str, float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        known: set[int] = {self._pid}
        while not self._stop.wait(SAMPLE_S):
            try:
                known |= {child.pid for child in psutil.Process(self._pid).children(recursive=True)}
            except psutil.Error:
                continue
            found = {pid: _pss_mb(pid) for pid in known}
            if sum(found.values()) > self.mb:
                self.mb = sum(found.values())
                ordered = sorted(found.items(), key=lambda item: -item[1])
                self.processes = {f"{_name(pid)} ({pid})": round(mb) for pid, mb in ordered if mb > 1}


def _pss_mb(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def _name(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()[:3])[-60:].strip()
    except psutil.Error:
        return "gone"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> str:
    """What the numbers were measured on."""
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    )


def save(name: str, content: dict[str, Any]) -> Path:
    """Write the result under benchmarks/results."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "date": time.strftime("%Y-%m-%d"), **content}, indent=1) + "\n")
    return path
