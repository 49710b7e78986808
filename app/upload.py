"""What of a folder travels with a job, and is it small enough?"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import ClusterError

NEVER = ["/.git", "/.venv", "/venv", "/runs", "/build", "/dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", ".tox"]
"""In the notation of .gitignore; what .gitignore and .rayignore name stays behind as well."""
FILE_LIMIT = 16 << 20
UPLOAD_LIMIT = 100 << 20
"""Ray's own, for one request to the dashboard, which answers more with a bare 413."""


@dataclass(frozen=True)
class Upload:
    """The part of a folder that is sent."""

    folder: Path
    excludes: list[str]
    left_out: dict[str, int]
    """Files too large to travel, with their bytes."""

    @property
    def note(self) -> str:
        """Say what stays behind that a user may miss."""
        return (
            f"not sent, over {_mb(FILE_LIMIT)} each: {_listed(self.left_out)}; "
            "a job reads such data from a path or URI that every node of the cluster reaches"
        )


def upload(folder: Path) -> Upload:
    """Choose what of `folder` is sent with a job; ClusterError when that is more than Ray takes."""
    root = folder.resolve()
    if not root.is_dir():
        raise ClusterError(f"'{folder}' is not a folder; expected the one that holds the Spec")
    sizes = _sizes(root)
    large = {name: size for name, size in sizes.items() if size > FILE_LIMIT}
    total = sum(sizes.values()) - sum(large.values())
    if total > UPLOAD_LIMIT:
        by_folder: Counter[str] = Counter()
        for name, size in sizes.items():
            if name not in large:
                by_folder[name.rpartition("/")[0] or name] += size
        raise ClusterError(
            f"{root} holds {_mb(total)} to send with the job, and Ray takes {_mb(UPLOAD_LIMIT)}; the largest: "
            f"{_listed(dict(by_folder.most_common(3)))}; name in a file .rayignore what the job does not need"
        )
    return Upload(root, [*NEVER, *map(_pattern, large)], large)


def _sizes(root: Path) -> dict[str, int]:
    """Bytes of each file that Ray would send, by its path below the root; Ray's own walk decides."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.stat().st_size

    with_ignored = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") == "1"
    _dir_travel(root, [_get_excludes(root, NEVER)], take, include_gitignore=not with_ignored)
    return found


def _pattern(name: str) -> str:
    return "/" + re.sub(r"([*?!#\[\]\\ ])", r"\\\1", name)


def _listed(sizes: dict[str, int]) -> str:
    shown = [f"{name} ({_mb(size)})" for name, size in list(sizes.items())[:5]]
    return ", ".join(shown + ([f"and {len(sizes) - 5} more"] if len(sizes) > 5 else []))


def _mb(size: int) -> str:
    return f"{size / (1 << 20):.0f} MB"
