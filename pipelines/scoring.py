"""How an Artifact meets a source: which columns are read in which types, and one loaded Artifact per process."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from pipelines.artifact import Artifact
from pipelines.data.beside import check_numeric
from pipelines.data.infer import infer_schema
from pipelines.data.read import Reader
from pipelines.data.source import Source
from pipelines.errors import DataError
from pipelines.expressions import Derivation
from pipelines.schema import Column, Schema
from pipelines.spec import DataSpec
from pipelines.tasks import Task


@functools.lru_cache(maxsize=4)
def loaded(location: str, version: str) -> Artifact:
    """The Artifact at a location, read once per process."""
    artifact = Artifact.load(location)
    assert artifact.version == version, f"{location} changed from {version} to {artifact.version} in the middle of the work"
    return artifact


def reader_for(
    artifact: Artifact, source: Source, data: DataSpec, *, task: Task | None = None, keep: Sequence[str] = ()
) -> Reader:
    """A Reader of the columns that the Artifact needs, in its types, besides the columns to keep and those of a task.

    With a task rows without a target are left out; without one all rows are there.
    """
    raw = schema_for(artifact, source, data)
    for name in keep:
        raw.require(name, "--keep")
    start = artifact.task.init_score  # besides the inputs where it is derived
    wanted = {column.name for column in artifact.inputs} | set(keep) | ({start} if start is not None else set())
    if task is None:
        return Reader.of(source, raw, data, wanted, None)
    known = Derivation(expressions=data.derive).extend(raw)
    if task.weight is not None:
        why = f"by which the metrics of {artifact.name} are weighted; add it, with 1 in rows that all count the same"
        check_numeric("weight", _needed(known, source, "task.weight", task.weight, why))
    if start is not None:
        check_numeric("init_score", _needed(known, source, "task.init_score", start, f"which rows of {artifact.name} start from"))
    if task.group is not None:
        _needed(known, source, "task.group", task.group, f"within which {artifact.name} ranks the rows; add it")
    return Reader.of(source, raw, data, wanted | {task.target} | set(task.beside), task.target)


def _needed(schema: Schema, source: Source, where: str, name: str, why: str) -> Column:
    if name not in schema:
        raise DataError(f"{where}: {source.files[0].path} has no column '{name}', {why}")
    return schema[name]


def schema_for(artifact: Artifact, source: Source, data: DataSpec) -> Schema:
    """The columns of a source, those that the Artifact needs in its types; raises `DataError` where one is missing."""
    found = infer_schema(source, data)
    known = {column.name: column for column in artifact.inputs}
    missing = [column.name for column in artifact.inputs if column.name not in found and not column.nullable]
    if missing:
        raise DataError(
            f"{source.files[0].path}: the columns {', '.join(missing)} are missing, which {artifact.name} was trained on; "
            f"expected {', '.join(known)}"
        )
    columns = [known.get(column.name, column) for column in found.columns]
    return Schema(columns=columns + [column for name, column in known.items() if name not in found])
