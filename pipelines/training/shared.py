"""What fits that follow one another share: what is costly to make and the same for many of them.

It is made once on a node, as files, whoever needs it first; each process loads it once and keeps it until a fit needs another.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipelines.storage import to_json

T = TypeVar("T")


@dataclass
class Shared:
    """One process's view of what the fits of its node share."""

    folder: Path
    """On this node; whoever owns the fits deletes it."""
    made: int = 0
    """How often this process made something, rather than finding it."""
    _held: tuple[str, Any] | None = None

    def get(self, parts: Any, make: Callable[[Path], None], load: Callable[[Path], T]) -> T:
        """Return what `load` reads from the files that `make` writes into a folder; `parts`, of JSON, say what it depends on.

        Only the last thing is held in memory: it may be as large as the data.
        """
        key = hashlib.blake2b(to_json(parts).encode(), digest_size=10).hexdigest()
        if self._held is not None and self._held[0] == key:
            found: T = self._held[1]
            return found
        self._held = None
        place = self.folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{key}.lock"):
            if not place.exists():
                aside = self.folder / f"{key}.{os.getpid()}"
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                make(aside)
                aside.rename(place)
                self.made += 1
        loaded = load(place)
        self._held = (key, loaded)
        return loaded


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock of the node; the kernel frees it with the process."""
    with open(file, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
