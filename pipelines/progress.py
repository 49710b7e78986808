"""How does long work tell what it is doing?

The verbs call the two methods below and know nothing of terminals; `app/progress.py` shows them. The default is silence, as in
a notebook or a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol


class Stage(Protocol):
    """One piece of work that is under way."""

    def advance(self, n: int = 1, **shown: object) -> None:
        """Count `n` more units as done; `shown` are the latest facts to show beside the bar, such as `auc=0.81`."""

    def show(self, lines: Sequence[str]) -> None:
        """Put lines below the bar, instead of those that were there."""


class Progress(Protocol):
    """Whoever shows progress."""

    def stage(self, name: str, total: int | None = None, *, unit: str = "rows") -> AbstractContextManager[Stage]:
        """Begin a stage of `total` units (unknown if None); leaving the context ends it, done or failed."""

    def note(self, text: str) -> None:
        """Say something that a user should know and that is no error."""


class Silent:
    """Show nothing; both a Progress and its Stage."""

    def stage(self, name: str, total: int | None = None, *, unit: str = "rows") -> AbstractContextManager[Stage]:
        return nullcontext(self)

    def advance(self, n: int = 1, **shown: object) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def show(self, lines: Sequence[str]) -> None:
        pass


SILENT: Final = Silent()
