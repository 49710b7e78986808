"""Artifact: schema, preprocessor, task and model in one folder; loaded, it is the predictor.

    artifact/
        manifest.json    format version, run, sha256 of every file below; written last
        schema.json preprocessor.json task.json profile.json quality.json
        answers.json     to the example rows in profile.json, by which a new place of work is checked
        importance.json  of a family that can tell
        model/           the family's own files

The same code predicts over a Dataset, over HTTP and in a notebook; it needs no Ray.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.attribution import ANSWERS, IMPORTANCE, Attribution, Contributions
from pipelines.contract import Contract, table_to_frame
from pipelines.errors import ArtifactError, InputError
from pipelines.expressions import Derivation
from pipelines.features.preprocessor import Preprocessor
from pipelines.models.model import Explaining, Matrix
from pipelines.registry import MODELS, load
from pipelines.schema import Column, Schema, numbers
from pipelines.storage import Folder
from pipelines.tasks import Task

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
ANSWERS_FILE: Final = "answers.json"
ROW_PATH_ROWS: Final = 32  # up to here single rows are faster than building a block


class Rows(NamedTuple):
    """What a model sees of some rows."""

    matrix: Matrix
    """(rows, features)."""
    init_score: Matrix | None
    """(rows,): the raw scores that they start from, where the task has such."""

    def part(self, start: int, stop: int) -> Rows:
        return Rows(self.matrix[start:stop], None if self.init_score is None else self.init_score[start:stop])


@dataclass(frozen=True)
class Artifact:
    """A trained pipeline."""

    name: str
    version: str
    """The id of the run that made it."""
    schema: Schema
    """The columns that a prediction reads, and the expressions that it derives."""
    preprocessor: Preprocessor
    task: Task
    model: Any
    profile: dict[str, Any]
    importance: dict[str, Any] | None = None
    """Each column's part in the model (see `attribution.py`), the largest first; None where that is not known."""
    answers: list[dict[str, Any]] | None = None
    """What was answered to `examples` where the model was made; None: it comes from a version that did not keep them."""

    @classmethod
    def load(cls, location: str | Folder, *, model: bool = True) -> Artifact:
        """Load from a path or URI: an artifact folder, or the folder of a run.

        Without `model` it cannot predict, and the family's library is not imported. Raises `ArtifactError` when it is missing,
        incomplete, damaged or of a newer format. Nothing in it is executed.
        """
        folder = location if isinstance(location, Folder) else Folder.at(location)
        if not folder.exists(MANIFEST) and folder.exists(f"artifact/{MANIFEST}"):
            folder = folder / "artifact"
        with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
            local = Path(path)
            manifest = _fetch(folder, local)
            family = load(MODELS, manifest["model"], f"{folder}/{MANIFEST}: model")
            return cls._read(local, manifest["name"], manifest["run"], family if model else None)

    @classmethod
    def _read(cls, local: Path, name: str, version: str, family: Any) -> Artifact:
        parts = Folder.at(str(local))
        return cls(
            name=name,
            version=version,
            schema=Schema.model_validate(parts.read_json("schema.json")),
            preprocessor=Preprocessor.from_json(parts.read_json("preprocessor.json")),
            task=Task.model_validate(parts.read_json("task.json")),
            model=family.load(local / "model") if family else None,
            profile=parts.read_json("profile.json"),
            importance=parts.read_json(IMPORTANCE) if parts.exists(IMPORTANCE) else None,
            answers=parts.read_json(ANSWERS_FILE) if parts.exists(ANSWERS_FILE) else None,
        )

    @property
    def inputs(self) -> list[Column]:
        """The columns that a request may have."""
        return self.schema.columns

    @property
    def examples(self) -> list[dict[str, Any]]:
        """A few rows of the training data, as a request would send them."""
        rows: list[dict[str, Any]] = self.profile["examples"]
        return rows

    def check(self) -> None:
        """Predict the example rows and compare with what was answered where the model was made; raises `ArtifactError`.

        Numbers may differ by 1e-5 of their size: other processors have other last bits.
        """
        try:
            found = self.predict_rows(self.examples)
        except Exception as error:
            raise ArtifactError(
                f"{self.name} ({self.version}) cannot predict its own example rows here: {type(error).__name__}: {error}"
            ) from error
        for i, (answer, expected) in enumerate(zip(found, self.answers or [], strict=False)):
            if not _equal(_plain(answer), expected):
                raise ArtifactError(
                    f"{self.name} ({self.version}) answers its own example row {i} with {answer}, and where it was trained "
                    f"with {expected}; the libraries here may be others than those under 'versions' in its run.json"
                )

    @cached_property
    def _contract(self) -> Contract:
        return Contract(self.schema)

    @cached_property
    def _derivation(self) -> Derivation:
        return Derivation(expressions=self.schema.derive)

    def check_rows(self, rows: list[Any]) -> list[dict[str, Any]]:
        """Return the rows of a request in canonical values, or raise `InputError` that names row and column."""
        return self._contract.check_rows(rows)

    def ignored(self, rows: list[Any]) -> int:
        """How many values of a request's rows are of no column that a prediction reads."""
        return self._contract.ignored(rows)

    def predict_rows(self, rows: list[Any], *, explain: bool = False) -> list[dict[str, Any]]:
        """Answer JSON rows; a few go through the row path, many through the block path, with equal bits.

        With `explain` each answer has its `base` and `contributions` besides; see `explained`.
        """
        checked = self.check_rows(rows)
        if not checked:
            return []
        if len(checked) > ROW_PATH_ROWS or self.schema.derive:
            seen = self._rows(self._contract.to_table(checked))
        else:
            matrix = np.array([self.preprocessor.transform_row(row) for row in checked], np.float64)
            name = self.task.init_score
            seen = Rows(matrix, None if name is None else self._finite(np.array([row[name] for row in checked], np.float64)))
        answers = self.task.answers(self._raw(seen))
        if not explain:
            return answers
        reasons = [row for some in self._contributions(seen) for row in some.rows()]
        return [answer | reason for answer, reason in zip(answers, reasons, strict=True)]

    def predict(self, frame: Any, *, explain: bool = False) -> Any:
        """Answer a pandas, Polars or Arrow frame, or a list of dicts, in kind: columns `label`, `probability` and so on.

        With `explain` there are `base` and `contributions` besides; see `explained`. Raises `InputError` where a column is
        missing or has another type than it had in training.
        """
        if isinstance(frame, list | Mapping):
            return self.predict_rows(list(frame) if isinstance(frame, list) else [frame], explain=explain)
        table = self._contract.frame_to_table(frame)
        answers = pa.concat_tables(self.explained(table)) if explain else self.predict_table(table)
        return table_to_frame(answers, like=frame)

    def predict_table(self, table: pa.Table) -> pa.Table:
        """Answer canonical rows."""
        return self.task.decode(self.scores(table))

    def explained(self, table: pa.Table) -> Iterator[pa.Table]:
        """Answer canonical rows and say what each column contributes; yields so many consecutive rows at a time as memory allows.

        `base` and the `contributions`, a number per column or group, sum to the raw score: the log-odds of a binary task, of each
        class before the softmax, the value of a regression (its logarithm, where the objective has a log link). The score that a
        row starts from (`task.init_score`) is part of its `base`. Raises `ArtifactError` for a family that has no contributions.
        """
        rows = self._rows(table)
        start = 0
        for some in self._contributions(rows):
            answers = self.task.decode(self._raw(rows.part(start, start + len(some.base))))
            start += len(some.base)
            reasons = some.table()
            for name in ANSWERS:
                answers = answers.append_column(name, reasons[name])
            yield answers

    @property
    def explaining(self) -> Explaining:
        """The model, if it can say what its answers come from; else raises `ArtifactError`."""
        if isinstance(self.model, Explaining):
            return self.model
        family = type(self.model).__name__
        raise ArtifactError(
            f"{self.name} ({self.version}) cannot be explained: {family} models have no contributions; leave explain out"
        )

    @cached_property
    def attribution(self) -> Attribution:
        return Attribution.of(self.preprocessor, self.task)

    def scores(self, table: pa.Table) -> Matrix:
        """Raw scores of canonical rows."""
        return self._raw(self._rows(table))

    def matrix(self, table: pa.Table) -> Matrix:
        """The features of canonical rows: (rows, features)."""
        return self.preprocessor.matrix(self._derivation.apply(table))

    def _rows(self, table: pa.Table) -> Rows:
        """What the model sees of canonical rows."""
        table = self._derivation.apply(table)
        name = self.task.init_score
        return Rows(self.preprocessor.matrix(table), None if name is None else self._finite(numbers(table[name])))

    def _finite(self, init_score: Matrix) -> Matrix:
        """The scores that rows start from; raises `InputError` where one is missing or infinite."""
        wrong = ~np.isfinite(init_score)
        if not wrong.any():
            return init_score
        row, name = int(np.argmax(wrong)), str(self.task.init_score)
        found = "missing" if math.isnan(init_score[row]) else "infinite"
        made = f" ({self.schema.derive[name]})" if name in self.schema.derive else ""
        raise InputError.at(
            f"row {row}: '{name}'{made} is {found}; expected a finite number, the raw score that the row starts from",
            row=row,
            column=name,
            found=found,
            expected="number",
        )

    def _raw(self, rows: Rows) -> Matrix:
        """What the model says of rows, each from where it starts."""
        result: Matrix = (
            self.model.predict(rows.matrix) if rows.init_score is None else self.model.predict_from(rows.matrix, rows.init_score)
        )
        return result

    def _contributions(self, rows: Rows) -> Iterator[Contributions]:
        start = 0
        for some in self.attribution.contributions(self.explaining, rows.matrix):
            yield some if rows.init_score is None else some.from_scores(rows.init_score[start : start + len(some.base)])
            start += len(some.base)


def _fetch(folder: Folder, local: Path) -> dict[str, Any]:
    """Copy the files to a local folder and compare them with the manifest."""
    if not folder.exists(MANIFEST):
        there = "is not complete: it has no manifest.json" if folder.names() else "does not exist"
        raise ArtifactError(f"the artifact {folder} {there}; expected the folder of a finished run, such as runs/NAME/ID")
    try:
        manifest: dict[str, Any] = folder.read_json(MANIFEST)
        version, files = manifest["format"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the artifact {folder} is damaged: manifest.json cannot be read; make it again with heliostat run"
        ) from error
    if version > FORMAT:
        raise ArtifactError(
            f"the artifact {folder} has format {version}; this heliostat reads up to {FORMAT}; install a newer one"
        )
    for name, digest in files.items():
        if not folder.exists(name):
            raise ArtifactError(f"the artifact {folder} is not complete: {name} is missing; make it again with heliostat run")
        content = folder.read_bytes(name)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ArtifactError(
                f"the artifact {folder} is damaged: {name} is not what was written; make it again with heliostat run"
            )
        target = local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return manifest


def keep_answers(folder: Folder, *, name: str, run: str, model: str) -> None:
    """Predict the example rows by the parts in a folder and keep the answers there, for `Artifact.check`."""
    with tempfile.TemporaryDirectory(prefix="heliostat-") as path:
        folder.fetch(Path(path))
        made = Artifact._read(Path(path), name, run, load(MODELS, model, "model.type"))
    folder.write_json(ANSWERS_FILE, [_plain(answer) for answer in made.predict_rows(made.examples)])


def write_manifest(folder: Folder, *, name: str, run: str, model: str) -> None:
    """Make a folder with all parts an Artifact: list every file with its sha256, last of all."""
    files = {file: hashlib.sha256(folder.read_bytes(file)).hexdigest() for file in folder.files() if file != MANIFEST}
    folder.write_json(MANIFEST, {"format": FORMAT, "name": name, "run": run, "model": model, "files": files})


def _plain(value: Any) -> Any:
    """An answer as JSON has it: null for what is no finite number, texts as keys."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(_equal(found[key], expected[key]) for key in found)
    if isinstance(found, float) or isinstance(expected, float):
        numbers = isinstance(found, float | int) and isinstance(expected, float | int)
        return numbers and math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-8)
    return type(found) is type(expected) and bool(found == expected)
