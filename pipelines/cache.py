"""The cache of prepared data: under which address something is kept, why it is not there, and what may go.

STORE/cache/KEY/ is what `prepare` writes (see data/prepared.py). KEY is the hash of an `Address`: all that the content depends
on, part by part, so that a difference to what is there can be named.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import importlib.metadata
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from pipelines.explain import shown
from pipelines.registry import TRANSFORMS
from pipelines.spec import Chain, GroupSpec
from pipelines.storage import Folder, to_json

MANIFEST: Final = "manifest.json"
CODE: Final = [
    "data",
    "features",
    "design",
    "errors",
    "expressions",
    "parent",
    "parsing",
    "prepare",
    "profiles",
    "quality",
    "schema",
    "scoring",
    "tasks",
]
"""The modules of `pipelines` that decide what prepared data looks like; any change of them is a new version."""
LIBRARIES: Final = ("numpy", "pandas", "polars", "pyarrow")
STATISTICS: Final = "statistics"
KILLED: Final = "left by a run that was killed"
LEFT_AFTER_S: Final = 3600
"""What is incomplete and has not been written to for this long belongs to nobody who still runs."""


@dataclass(frozen=True)
class Address:
    """All that prepared data depends on, by part: data, task, schema, features, source, code."""

    parts: dict[str, Any]

    @property
    def key(self) -> str:
        return hashlib.blake2b(to_json(self.parts).encode(), digest_size=10).hexdigest()

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What changed since the address with these parts, in a few words each."""
        words = []
        files = _changed(other.get("source", {}), self.parts["source"])
        if files:
            words.append(f"{files[0]} {f'and {len(files) - 1} more ' if len(files) > 1 else ''}changed")
        for part in sorted(self.parts.keys() - {"source", "code"}):
            before, now = dict(_leaves(other.get(part), part)), dict(_leaves(self.parts[part], part))
            words += [f"{path} was {shown(before.get(path))}, is {shown(now.get(path))}" for path in _changed(before, now)]
        if other.get("code") != self.parts["code"]:
            words.append("the code or a library became another version")
        return words


@dataclass(frozen=True)
class Entry:
    """One folder of the cache."""

    folder: Folder
    manifest: dict[str, Any] | None
    """None: not complete, either written right now or left by a run that was killed."""
    bytes: int
    changed: float
    """When a file in it was written last, in seconds since 1970."""
    leftovers: list[str]
    """Folders in a complete entry that its manifest does not name: of another run, at the same time or killed."""

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def holds(self) -> str:
        """shards, statistics, or what is not complete."""
        return "not complete" if self.manifest is None else str(self.manifest.get("kind", "shards"))

    @property
    def rows(self) -> dict[str, int]:
        splits = self.manifest.get("splits", {}) if self.manifest else {}
        return {split: sum(rows for _, rows in shards) for split, shards in splits.items()}

    @classmethod
    def of(cls, folder: Folder) -> Entry:
        manifest = folder.read_json(MANIFEST) if folder.exists(MANIFEST) else None
        infos = folder.infos()
        folders = {name.split("/")[0] for name, _ in infos if "/" in name}
        return cls(
            folder,
            manifest,
            sum(info.size or 0 for _, info in infos),
            max((info.mtime_ns or 0 for _, info in infos), default=0) / 1e9,
            sorted(folders - {manifest.get("shards")}) if manifest else [],
        )


def address_of(
    fingerprint: Mapping[str, Any], chains: Mapping[str, Chain], groups: Mapping[str, GroupSpec], **settings: Any
) -> Address:
    """Return the address of what is made from a source (see `Source.fingerprint`) with these chains, settings and this code."""
    features = {**chains, **({"groups": {name: group.model_dump() for name, group in groups.items()}} if groups else {})}
    code = code_of([*chains.values(), *(group.steps for group in groups.values())])
    return Address({"source": dict(fingerprint), "features": features, **settings, "code": code})


def code_of(chains: Sequence[Chain]) -> dict[str, str]:
    """The versions of the code that makes prepared data, and of a user's own steps in these chains."""
    return {**_code(), **_named_code(chains)}


def cache_of(store: str) -> Folder:
    """Return the folder of a store's cache."""
    return Folder.at(store) / "cache"


def entries(store: str) -> Iterator[Entry]:
    """Yield what is in a store's cache, complete or not."""
    folder = cache_of(store)
    for name in folder.names():
        yield Entry.of(folder / name)


def explain(store: str, address: Address, name: str) -> str:
    """Say in one line whether data of this address is there, and if not, what differs from the most alike entry of the Spec."""
    folder = cache_of(store) / address.key
    if folder.exists(MANIFEST):
        return f"hit: prepared {_made(folder.read_json(MANIFEST))} from the same files and settings"
    others = [
        entry.manifest
        for entry in entries(store)
        if entry.manifest and entry.holds == "shards" and entry.manifest["name"] == name
    ]
    if not others:
        return f"miss: nothing is prepared for '{name}' in {cache_of(store)}"
    words, nearest = min(
        ((address.differences(other["address"]), other) for other in others), key=lambda pair: (len(pair[0]), -pair[1]["made"])
    )
    more = f" and {len(words) - 2} more" if len(words) > 2 else ""
    return f"miss: since it was prepared {_made(nearest)}, {'; '.join(words[:2])}{more}"


def prune(store: str, *, days: float | None = None, everything: bool = False) -> list[tuple[str, str, int]]:
    """Delete what nobody needs; return path, reason and bytes of each folder that went.

    What killed runs left, and, where asked for, complete entries: all, or those that were made more than `days` ago. A Run does
    not need them, it has its own Artifact; one that trains from an entry right now does.
    """
    found: list[tuple[Folder, str, int]] = []
    now = time.time()
    for entry in entries(store):
        if entry.manifest is None:
            if now - entry.changed > LEFT_AFTER_S:
                found.append((entry.folder, KILLED, entry.bytes))
        elif everything or (days is not None and now - entry.manifest["made"] > days * 86400):
            entry.folder.remove(MANIFEST)  # first: what is half deleted is not complete
            found.append((entry.folder, f"prepared {_made(entry.manifest)}", entry.bytes))
        else:
            left = [Entry.of(entry.folder / name) for name in entry.leftovers]
            found += [(one.folder, KILLED, one.bytes) for one in left if now - one.changed > LEFT_AFTER_S]
    for folder, _, _ in found:
        folder.delete()
    return [(str(folder), reason, size) for folder, reason, size in found]


def _made(manifest: Mapping[str, Any]) -> str:
    return datetime.datetime.fromtimestamp(manifest["made"], datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}")
    else:
        yield path, value


@cache
def _code() -> dict[str, str]:
    hashed = hashlib.blake2b(digest_size=10)
    base = Path(__file__).parent
    for name in CODE:
        for file in sorted(base.glob(f"{name}/**/*.py")) or [base / f"{name}.py"]:
            hashed.update(file.read_bytes())
    return {"heliostat": hashed.hexdigest(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}


def _named_code(chains: Sequence[Chain]) -> dict[str, str]:
    """The files of a user's own steps, those named as package.module:Class."""
    found = {}
    for name in {name for chain in chains for name in _step_names(chain)} - TRANSFORMS.keys():
        file = importlib.import_module(name.partition(":")[0]).__file__
        found[name] = hashlib.blake2b(Path(file).read_bytes(), digest_size=10).hexdigest() if file else ""
    return found


def _step_names(chain: Any) -> Iterator[str]:
    for step in chain:
        if isinstance(step, list):
            yield from _step_names(step)
        else:
            yield from [step] if isinstance(step, str) else step
