"""Run: a folder in the store and its record.

STORE/NAME/ID/
    spec.yaml        the resolved Spec
    run.json         status, versions, timings, metrics; written last: its presence means complete
    metrics.jsonl    one line per report: step, split, metric, value
    artifact/        see artifact.py
    checkpoints/
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import secrets
from dataclasses import dataclass
from typing import Any

from pipelines.attribution import IMPORTANCE
from pipelines.errors import ArtifactError, did_you_mean
from pipelines.storage import Folder
from pipelines.tasks import SCORES

RECORD = "run.json"
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
        """Write the record, which makes the run complete, and return it with it."""
        record = {"run": self.id, "name": self.name, "status": "complete", "versions": versions(), **facts}
        self.folder.write_json(RECORD, record)
        return Run(self.folder, record)


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
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
