"""Can the clients of one Artifact be answered by another, with requests and answers as they are?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.contract import WORDS

if TYPE_CHECKING:
    from pipelines.artifact import Artifact
    from pipelines.schema import Column


def breaks(old: Artifact, new: Artifact) -> list[str]:
    """Return each way in which the new Artifact refuses what the old one takes, or answers in another form.

    A column that is no longer read breaks nothing: what clients send of it is ignored.
    """
    known = {column.name: column for column in old.inputs}
    found = [line for column in new.inputs for line in _column(known.get(column.name), column)]
    if old.task.type != new.task.type:
        found.append(f"the task is {new.task.type} and was {old.task.type}")
    elif set(old.task.classes or []) != set(new.task.classes or []):
        found.append(f"the classes are {_listed(new.task.classes)} and were {_listed(old.task.classes)}")
    return found


def _column(old: Column | None, new: Column) -> list[str]:
    found = []
    if not new.nullable and (old is None or old.nullable):
        was = "was not read" if old is None else "was optional"
        found.append(f"column '{new.name}' is required and {was}")
    if old is None:
        return found
    if new.type != old.type and (old.type, new.type) != ("int64", "float64"):
        found.append(f"column '{new.name}' is {WORDS[new.type]} and was {WORDS[old.type]}")
    elif old.text not in (None, new.text):
        form = f"in the form {new.text}" if new.text else "refused"
        found.append(f"column '{new.name}': texts in the form {old.text} were accepted, and are now {form}")
    return found


def _listed(classes: Sequence[object] | None) -> str:
    values = [str(value) for value in classes or []]
    return ", ".join(values[:10]) + (", ..." if len(values) > 10 else "")
