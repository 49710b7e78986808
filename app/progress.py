"""How is long work shown on a terminal, and how in a log?

On a terminal a bar per stage with what is done, the latest facts and the time left; elsewhere a line now and then. Either way a
finished stage leaves one line. All of it goes to stderr: stdout is for results.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

LOG_EVERY_S = 15.0


class Bars(Progress):
    """Bars, and the lines that a stage has below its own."""

    lines: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(line, no_wrap=True, overflow="ellipsis") for line in self.lines)


class Shown:
    """A `pipelines.progress.Progress` that people can see."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "rows") -> Iterator[Shown.Stage]:
        bar = self._bars.add_task(name, total=total, state="") if self._console.is_terminal else None
        if bar is not None:
            self._bars.start()
        stage = Shown.Stage(self, name, total, unit, bar)
        ended = "stopped"
        try:
            yield stage
            ended = "done"
        finally:
            if bar is not None:
                if stage.lines:
                    self._bars.lines = ()
                self._bars.remove_task(bar)
                if not self._bars.tasks:
                    self._bars.stop()
            self.note(f"{name}: {'' if ended == 'done' else 'stopped after '}{stage.state} in {stage.seconds:.1f} s")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @dataclass
    class Stage:
        """One stage under way; threads of one process may advance it."""

        shown: Shown
        name: str
        total: int | None
        unit: str
        bar: TaskID | None
        done: int = 0
        lines: Sequence[str] = ()
        facts: dict[str, object] = field(default_factory=dict)
        started: float = field(default_factory=time.monotonic)
        logged: float = field(default_factory=time.monotonic)

        def advance(self, n: int = 1, **shown: object) -> None:
            self.done += n
            self.facts.update(shown)
            if self.bar is not None:
                self.shown._bars.update(self.bar, completed=self.done, state=self.state)
            elif self.done != self.total and time.monotonic() - self.logged > LOG_EVERY_S:
                self.logged = time.monotonic()
                self.shown.note("\n  ".join([f"{self.name}: {self.state}, {self.left}", *self.lines]))

        def show(self, lines: Sequence[str]) -> None:
            self.lines = lines
            if self.bar is not None:
                self.shown._bars.lines = lines
                self.shown._bars.refresh()

        @property
        def seconds(self) -> float:
            return time.monotonic() - self.started

        @property
        def state(self) -> str:
            of = f" of {self.total:,}" if self.total is not None and self.done != self.total else ""
            facts = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.facts.items()
            )
            return f"{self.done:,}{of} {self.unit}" + (f" ({facts})" if facts else "")

        @property
        def left(self) -> str:
            if self.total is None or self.done == 0:
                return f"{self.seconds:.0f} s so far"
            return f"about {self.seconds * max(0, self.total - self.done) / self.done:.0f} s left"
