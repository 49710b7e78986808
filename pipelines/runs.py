"""Run: a folder in the store and its record.

STORE/NAME/ID/
    spec.yaml        the resolved Spec
    run.json         status, versions, timings, metrics; written last: its presence means complete
    metrics.jsonl    one line per report: step, split, metric, value
    artifact/        see artifact.py
    begun.json       until the run is complete: what it needs to go on, see `Begun`
    checkpoints/     until the run is complete
    search.json      of a search, until it is complete: see tune/search.py, which has more files besides
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.attribution import IMPORTANCE
from pipelines.errors import ArtifactError, did_you_mean
from pipelines.storage import Folder
from pipelines.tasks import SCORES

RECORD = "run.json"
BEGUN = "begun.json"
SEARCH = "search.json"
PACKAGES = ("heliostat", "ray", "lightgbm", "torch", "polars", "pyarrow", "numpy", "pandas")


@dataclass(frozen=True)
class Run:
    """One execution of a Spec."""

    folder: Folder
    record: dict[str, Any]
    """Empty until the run is complete."""

    @classmethod
    def create(cls, store: str, name: str) -> Run:
        """Make the folder of a new run; its id starts with the time in UTC."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        folder = Folder.at(store) / name / f"{stamp}-{secrets.token_hex(2)}"
        return cls(folder.create(), {})

    @classmethod
    def open(cls, folder: Folder) -> Run:
        """Read a complete run; raises `ArtifactError` for what is none."""
        if not folder.exists(RECORD):
            there = "is not complete: it has no run.json; run its Spec again" if folder.names() else "does not exist"
            raise ArtifactError(f"the run {folder} {there}")
        return cls(folder, folder.read_json(RECORD))

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        return (self.folder.path.rsplit("/", 2))[-2]

    @property
    def path(self) -> str:
        return str(self.folder)

    @property
    def artifact(self) -> Folder:
        return self.folder / "artifact"

    @property
    def importance(self) -> dict[str, Any] | None:
        """What is in the artifact about the columns' part in the model; None where it does not say."""
        found: dict[str, Any] | None = self.artifact.read_json(IMPORTANCE) if self.artifact.exists(IMPORTANCE) else None
        return found

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        """By split, then by name."""
        found: dict[str, dict[str, float | None]] = self.record.get("metrics", {})
        return found

    def complete(self, **facts: Any) -> Run:
        """Write the record, which makes the run complete, and return it with it; what it needed to go on is deleted."""
        record = {"run": self.id, "name": self.name, "status": "complete", "versions": versions(), **facts}
        self.folder.write_json(RECORD, record)
        (self.folder / "checkpoints").delete()
        if self.folder.exists(BEGUN):
            self.folder.remove(BEGUN)
        return Run(self.folder, record)

    def begin(self, begun: Begun) -> None:
        """Write down what the run needs to go on, should this process end before it does."""
        self.folder.write_json(BEGUN, {**asdict(begun), "driver": driver()})

    def begun(self) -> Begun:
        """What the run needs to go on; raises `ArtifactError` where somebody trains it right now."""
        found = self.folder.read_json(BEGUN)
        self.check_idle(found.pop("driver"))
        return Begun(**found)

    def check_idle(self, driver: dict[str, Any]) -> None:
        """Raise `ArtifactError` where the process that last worked on the run still does."""
        if driver["host"] == platform.node() and driver["started"] == _started(driver["pid"]) is not None:
            raise ArtifactError(f"the run {self.folder} is not interrupted: process {driver['pid']} works on it; end that first")


@dataclass(frozen=True)
class Begun:
    """What a run that is not complete needs to go on, besides its Spec and its checkpoints."""

    prepared: str
    """The folder of the prepared data."""
    prepare: dict[str, Any]
    """What the record says of it: seconds, reused."""
    team: dict[str, Any]
    """Workers, slots and threads; with another team the bits would differ."""
    versions: dict[str, str]
    resumed: list[int]
    """The step of the checkpoint that it went on from, each time."""
    follow: str | None = None
    """The folder whose files it learns from as they arrive."""


@dataclass(frozen=True)
class RunStore:
    """All runs under a path or URI."""

    folder: Folder

    @classmethod
    def at(cls, store: str) -> RunStore:
        return cls(Folder.at(store))

    def list(self, name: str | None = None) -> list[Run]:
        """The complete runs, oldest first, of one name or of all."""
        names = [name] if name is not None else [found for found in self.folder.names() if found != "cache"]
        folders = [self.folder / found / id for found in names for id in (self.folder / found).names()]
        runs = [Run.open(folder) for folder in folders if folder.exists(RECORD)]
        return sorted(runs, key=lambda run: run.id)

    def find(self, reference: str) -> Run:
        """Return the run that an id, a path or URI, `NAME@latest` or `NAME@best` stands for."""
        if "@" in reference and "://" not in reference:
            name, _, which = reference.rpartition("@")
            return self._named(name, which)
        folder = Folder.at(reference)
        if "/" in reference or folder.exists(RECORD):
            return Run.open(folder)
        runs = self.list()
        found = [run for run in runs if run.id == reference]
        if not found:
            hint = (
                did_you_mean(reference, [run.id for run in runs]) if runs else "; there is none yet: heliostat run SPEC makes one"
            )
            raise ArtifactError(f"there is no run '{reference}' in {self.folder}{hint}")
        return found[0]

    def interrupted(self, reference: str, mark: str = BEGUN) -> Run:
        """Return the run that is not complete and can go on; an id, a path or URI, or `NAME@latest` (of those that can).

        One that can has the file `mark`: `BEGUN` of one that trains, `SEARCH` of one that searches.
        """
        if "@" in reference and "://" not in reference:
            name, _, which = reference.rpartition("@")
            here = self.folder / name
            begun = [id for id in here.names() if (here / id).exists(mark) and not (here / id).exists(RECORD)]
            if which != "latest" or not begun:
                raise ArtifactError(f"no run of '{name}' in {self.folder} was interrupted; name one by its id or path")
            folder = self.folder / name / begun[-1]
        elif "/" in reference:
            folder = Folder.at(reference.rstrip("/"))
        else:
            places = {id: self.folder / name / id for name in self.folder.names() if name != "cache" for id in self._ids(name)}
            if reference not in places:
                raise ArtifactError(f"there is no run '{reference}' in {self.folder}{did_you_mean(reference, places)}")
            folder = places[reference]
        if folder.exists(RECORD):
            raise ArtifactError(f"the run {folder} is complete: there is nothing to go on with")
        if mark == BEGUN and folder.exists(SEARCH):
            raise ArtifactError(f"the run {folder} is a search; go on with: heliostat tune --resume {folder}")
        if not folder.exists(mark):
            there = "did not come to its training" if folder.names() else "does not exist"
            raise ArtifactError(f"the run {folder} {there}; start it by its Spec")
        return Run(folder, {})

    def _ids(self, name: str) -> Sequence[str]:
        return (self.folder / name).names()

    def _named(self, name: str, which: str) -> Run:
        if which not in ("latest", "best"):
            raise ArtifactError(f"'{name}@{which}' is no run; expected {name}@latest or {name}@best")
        runs = self.list(name)
        if not runs:
            names = [found for found in self.folder.names() if found != "cache"]
            raise ArtifactError(f"there is no complete run of '{name}' in {self.folder}{did_you_mean(name, names)}")
        return runs[-1] if which == "latest" else best(runs)


def best(runs: list[Run]) -> Run:
    """The run with the best valid value of the latest run's first required metric, else of its task's first metric."""
    latest = runs[-1].record
    metric = next(iter(latest.get("require") or []), None) or latest["task"]["metric"]
    sign = 1.0 if metric in SCORES else -1.0
    scored = [(run.metrics.get("valid", {}).get(metric), run) for run in runs]
    known = [(sign * value, run.id, run) for value, run in scored if value is not None]
    if not known:
        raise ArtifactError(
            f"no run of '{runs[-1].name}' has a valid '{metric}'; name one by its id, or take {runs[-1].name}@latest"
        )
    return max(known)[2]


def versions() -> dict[str, str]:
    """Of Python and of the packages that shape a result."""
    return dict(_versions())


def driver() -> dict[str, Any]:
    """This process, so that another can tell whether it still runs."""
    return {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None: there is none, or no /proc."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
