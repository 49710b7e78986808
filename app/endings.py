"""How does a command end? Exit codes, and what is said on stderr.

0 done; 2 the user's input is wrong: one line, and its notes such as commands to copy; 3 a required metric was missed: one line;
130 interrupted: what is kept and how to go on; 1 anything else: a traceback, for that is our fault.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

import typer

from pipelines.errors import RequirementError, UserError

WRONG_INPUT, MISSED, INTERRUPTED, FAULT = 2, 3, 130, 1

AGAIN = "the same command starts again"
HALF_RUN = f"prepared data is kept in STORE/cache, and what is not complete is no run; {AGAIN}"
KEPT = {
    "run": HALF_RUN,
    "train": HALF_RUN,
    "tune": HALF_RUN,
    "prepare": f"what was complete in STORE/cache is kept; {AGAIN}",
    "predict": f"the output has no _manifest.json and is not complete; {AGAIN}",
}


@contextlib.contextmanager
def exits(command: str) -> Iterator[None]:
    """Turn whatever ends a command early into its exit code, and say on stderr what a user can do."""
    try:
        with interrupts_kept():
            yield
    except KeyboardInterrupt as interrupt:
        kept = getattr(interrupt, "__notes__", None) or [KEPT.get(command, f"nothing was changed; {AGAIN}")]
        say(f"interrupted: {' '.join(kept)}")
        sys.exit(INTERRUPTED)
    except (typer.BadParameter, typer.Exit):
        raise  # typer's own endings
    except Exception as error:  # noqa: BLE001 - the one place where a command ends
        told = cause(error)
        if told is None:
            traceback.print_exc()
            sys.exit(FAULT)
        say(" ".join(str(told).split()))
        for line in getattr(told, "__notes__", []):
            say(line)
        sys.exit(MISSED if isinstance(told, RequirementError) else WRONG_INPUT)


@contextlib.contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise Ctrl-C once more where Python dropped it, as it drops whatever is raised inside a destructor or a weakref's callback.

    Measured: one of fifteen runs went on to its end. From a thread, a moment later: what the hook raises is dropped as well.
    """
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def cause(error: BaseException) -> UserError | RequirementError | None:
    """Return the user's error that an exception is or was caused by, however Ray has wrapped it on its way here.

    Ray raises a subclass of both its own error and the user's, with a whole traceback as its text; `cause` holds the original.
    """
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        found = waiting.pop(0)
        if not isinstance(found, BaseException) or any(found is other for other in seen):
            continue
        seen.append(found)
        original = getattr(found, "cause", None)
        if isinstance(found, (UserError, RequirementError)) and not isinstance(original, BaseException):
            return found
        waiting += [original, found.__cause__]
        failures = getattr(found, "worker_failures", None)  # of Ray Train, by rank
        waiting += list(failures.values()) if isinstance(failures, dict) else []
    return None


def say(text: str) -> None:
    """Write one line for people."""
    print(text, file=sys.stderr, flush=True)
