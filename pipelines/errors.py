"""What can go wrong by the user's hand, each as one sentence.

An error of the user is one line that says where it is, what was found, what was expected and what to do; the command line
prints it and exits with 2. Everything else is our fault and stays a traceback. Every class here takes one string, so that it
survives the trip between Ray processes; facts that a caller needs besides the sentence are attributes set afterwards.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong; the message is one line and says what to do."""


class SpecError(UserError):
    """The Spec is wrong."""


class DataError(UserError):
    """The data is not what the Spec or the Schema says."""


class ArtifactError(UserError):
    """An Artifact or a Run is missing, incomplete, damaged or of another version."""


class ClusterError(UserError):
    """Ray, or what the command needs of it, is not there."""


class InputError(UserError):
    """One row of a request is wrong. `row`, `column`, `found` and `expected` are set where they apply."""

    row: int | None = None
    column: str | None = None
    found: object = None
    expected: str | None = None

    @classmethod
    def at(
        cls, message: str, *, row: int | None = None, column: str | None = None, found: object = None, expected: str | None = None
    ) -> InputError:
        """Build the error with the facts that the HTTP answer shows."""
        error = cls(message)
        error.row, error.column, error.found, error.expected = row, column, found, expected
        return error


class RequirementError(Exception):
    """A metric under `evaluate.require` was missed (exit code 3)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'? (known: ...)`, to be put behind a sentence about an unknown name."""
    names = sorted(str(n) for n in known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    listed = ", ".join(names) if len(names) <= 30 else ", ".join(names[:30]) + ", ..."
    return (f"; did you mean '{near[0]}'?" if near else "") + f" (known: {listed})"
