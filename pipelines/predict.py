"""predict: answers for every row of a source, as Parquet files in source order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifact import Artifact
from pipelines.attribution import ANSWERS
from pipelines.data.beside import init_scores_of
from pipelines.data.files import is_database
from pipelines.data.read import Block, in_order, stream
from pipelines.data.source import Source, Unit
from pipelines.errors import DataError
from pipelines.progress import SILENT, Progress
from pipelines.schema import decoded
from pipelines.scoring import loaded, reader_for
from pipelines.spec import DataSpec, SplitSpec
from pipelines.storage import Folder

MANIFEST: Final = "_manifest.json"


@dataclass(frozen=True)
class Predictions:
    """What was written: the folder, its rows, and the files in source order."""

    path: str
    rows: int
    seconds: float


def predict(
    artifact: str,
    source: str | list[str],
    out: str,
    *,
    keep: list[str] | None = None,
    explain: bool = False,
    data: DataSpec | None = None,
    progress: Progress = SILENT,
) -> Predictions:
    """Answer every row of a source and write the answers to a folder, `keep` columns first; with `explain` also their reasons.

    Rows keep the order of the source and none is left out. The folder is complete when it has `_manifest.json`, which names the
    files in order; a folder that is already complete is refused, what an interrupted run left is written anew. `data` says how
    to read the source (format, options, derive); its `where` does not act here.
    """
    started = time.monotonic()
    described = Artifact.load(artifact, model=explain)
    if explain:
        _check_explained(described, keep or [])
    reading = (
        DataSpec(source=source)
        if data is None
        else data.model_copy(update={"source": source, "split": SplitSpec(), "where": None})
    )
    # Answers are in source order, which a database has by its key alone.
    key = reading.key if any(map(is_database, [source] if isinstance(source, str) else source)) else []
    reading = reading.model_copy(update={"derive": described.schema.derive, "kinds": {}, "key": key})
    files = Source.open(reading)
    reader = reader_for(described, files, reading, keep=keep or [])
    folder = _fresh(Folder.at(out))
    each = Answer(artifact, described.version, tuple(keep or []), explain, folder)
    if explain:
        progress.note(_cost(described.explaining.explain_s(), files.rows))
    with progress.stage("predict", total=files.rows) as stage:
        parts = [part for part in in_order(stream(files, reader, each), stage) if part[1]]
    rows = sum(count for _, count in parts)
    folder.write_json(
        MANIFEST,
        {
            "model": described.name,
            "version": described.version,
            "rows": rows,
            "files": [{"file": file, "rows": count} for file, count in parts],
        },
    )
    return Predictions(str(folder), rows, time.monotonic() - started)


def _check_explained(artifact: Artifact, keep: list[str]) -> None:
    """Raise the error of a family that has no contributions before anything is read."""
    assert artifact.explaining
    taken = [name for name in keep if name in ANSWERS]
    if taken:
        raise DataError(f"--keep: '{taken[0]}' is also what --explain calls one of its columns; leave one of the two out")


def _cost(seconds: float, rows: int) -> str:
    """What contributions take, for they can be a hundred times the work of the answers; `rows` may be an estimate."""
    return f"contributions: about {1000 * seconds:.2g} ms of a core for a row, {rows * seconds / 60:,.1f} min for {rows:,} rows"


def _fresh(folder: Folder) -> Folder:
    names = folder.names()
    if MANIFEST in names:
        raise DataError(f"--out: {folder} has predictions already; name another folder, or delete this one")
    foreign = [name for name in names if not name.startswith("part-")]
    if foreign:
        raise DataError(f"--out: {folder} has other files in it ({foreign[0]}); name a new or empty folder")
    for name in names:  # of a run that was interrupted
        folder.filesystem.delete_file(f"{folder.path}/{name}")
    return folder.create()


@dataclass(frozen=True)
class Answer:
    """Write the answers of one unit as one file."""

    artifact: str
    version: str
    keep: tuple[str, ...]
    explain: bool
    folder: Folder

    def __call__(self, unit: Unit, blocks: Iterator[Block]) -> tuple[str, int]:
        artifact = loaded(self.artifact, self.version)
        name, rows = f"part-{unit.index:05d}.parquet", 0
        writer: Any = None
        try:
            for table in self._answered(artifact, unit, blocks):
                if writer is None:
                    writer = pq.ParquetWriter(f"{self.folder.path}/{name}", table.schema, filesystem=self.folder.filesystem)
                writer.write_table(table)
                rows += table.num_rows
        finally:
            if writer is not None:
                writer.close()
        return name, rows

    def _answered(self, artifact: Artifact, unit: Unit, blocks: Iterator[Block]) -> Iterator[pa.Table]:
        for block in blocks:
            if artifact.task.init_score is not None:
                init_scores_of(block.table, artifact.task.init_score, unit)  # a wrong one is told with its file
            kept, start = decoded(block.table.select(self.keep)), 0
            for answers in artifact.explained(block.table) if self.explain else [artifact.predict_table(block.table)]:
                beside = kept.slice(start, answers.num_rows)
                yield pa.table({column: found[column] for found in (beside, answers) for column in found.column_names})
                start += answers.num_rows
