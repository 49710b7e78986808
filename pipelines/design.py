"""What a Spec makes of its source before any row is read: the columns with their kinds, and the chain of each feature."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from pipelines.cache import Address, address_of
from pipelines.data.beside import check_numeric
from pipelines.data.infer import with_kinds
from pipelines.data.kinds import Inference, infer_kinds
from pipelines.data.read import Reader
from pipelines.data.source import Source
from pipelines.errors import SpecError
from pipelines.explain import dotted
from pipelines.expressions import Derivation
from pipelines.features.preprocessor import Preprocessor
from pipelines.models.model import Starting
from pipelines.parent import Parent
from pipelines.progress import SILENT, Progress
from pipelines.registry import MODELS, load
from pipelines.schema import Column, Schema
from pipelines.scoring import schema_for
from pipelines.spec import Chain, PipelineSpec

RARE: Final = 5
"""Train rows that a category needs for a code of its own where there are many: what fewer say of it is mostly chance.

On the flights' 4,043 aircraft 5 changes no digit of the AUC (0.8049), 10 costs 0.0007."""
POOLED: Final = {"index": {"min_count": RARE}}


@dataclass(frozen=True)
class Design:
    """The features of one Spec on one source, as they were chosen by the Spec or inferred from the first rows."""

    spec: PipelineSpec
    source: Source
    inferred: Inference
    schema: Schema
    """All columns, the derived ones too."""
    target: Column
    columns: list[Column]
    """Those that features are made of."""
    chains: dict[str, Chain]
    """The chain of transforms of each."""
    parent: Parent | None = None
    """The run whose Schema, Preprocessor and Task are taken over."""

    @classmethod
    def of(cls, spec: PipelineSpec, progress: Progress = SILENT) -> Design:
        """Read footers and first rows. Raises `SpecError` and `DataError` for what does not fit the source."""
        parent = Parent.of(spec)
        spec = parent.inherit(spec) if parent else spec
        source = Source.open(spec.data)
        if source.num_pruned:
            progress.note(f"data.where leaves out {source.num_pruned} files by their folders' names: they are not opened")
        if parent:
            return cls._taken_over(spec, source, parent)
        inferred = infer_kinds(source, spec.data, spec.task.target, list(spec.task.beside.values()))
        schema = with_kinds(Derivation(expressions=spec.data.derive).extend(inferred.schema), spec.data)
        target = schema.require(spec.task.target, "task.target")
        _check_beside(spec, schema)
        columns, chains = _chains(spec, schema, inferred, progress)
        for name in spec.prepare.bucket_by:
            schema.require(name, "prepare.bucket_by")
        return cls(spec, source, inferred, schema, target, columns, chains)

    @classmethod
    def _taken_over(cls, spec: PipelineSpec, source: Source, parent: Parent) -> Design:
        raw = schema_for(parent.artifact, source, spec.data)
        schema = with_kinds(Derivation(expressions=spec.data.derive).extend(raw), spec.data)
        target = schema.require(spec.task.target, "task.target")
        _check_beside(spec, schema)
        columns = [schema.require(column.name, "model.from") for column in parent.artifact.preprocessor.inputs]
        return cls(spec, source, Inference(raw), schema, target, columns, spec.features.columns, parent)

    @property
    def raw(self) -> Schema:
        """The columns as the files have them."""
        return self.inferred.schema

    @cached_property
    def address(self) -> Address:
        """Where the prepared data is kept: whatever changes its content changes this."""
        spec = self.spec
        return address_of(
            self.source.fingerprint(),
            self.chains,
            spec.features.groups,
            data=spec.data.model_dump(exclude={"source"}),
            task=spec.task.model_dump(exclude={"class_weight"}),  # which acts when a model is fitted
            prepare=spec.prepare.model_dump(),
            named=sorted(spec.features.columns),  # these stay features, whatever they turn out to be
            schema={column.name: column.model_dump(exclude={"name"}) for column in self.schema.columns},
            **({"from": self.parent.digests} if self.parent else {}),
        )

    def reader(self, columns: list[Column]) -> Reader:
        """A Reader of these columns, the target and what stands beside it."""
        names = {column.name for column in columns} | {self.target.name, *self.spec.task.beside.values()}
        return Reader.of(self.source, self.raw, self.spec.data, names, self.target.name)

    def reasons(self, chains: dict[str, Chain]) -> dict[str, str]:
        """Why what was inferred is so, by dotted path, for what became of the chains; a choice of the Spec needs no reason."""
        spec, inferred = self.spec, self.inferred
        kinds = {name: inferred.reasons.get(name, "the type of its expression") for name in chains if name not in spec.data.kinds}
        pooled = [name for name in inferred.many if name not in spec.features.columns and POOLED in chains.get(name, [])]
        return {dotted(("data", "kinds", name)): why for name, why in kinds.items()} | {
            dotted(("features", "columns", name)): f"{inferred.many[name]}: those in fewer than {RARE} rows share one code"
            for name in pooled
        }


def _check_beside(spec: PipelineSpec, schema: Schema) -> None:
    """Raise `DataError` for a column of the task that is not there, or cannot say what it should.

    `SpecError` where the family makes nothing of it.
    """
    for field, name in spec.task.beside.items():
        column = schema.require(name, f"task.{field}")
        if field != "group":
            check_numeric(field, column)
    if spec.task.init_score is not None and not issubclass(load(MODELS, spec.model.type, "model.type"), Starting):
        raise SpecError(
            f"task.init_score: rows of a '{spec.model.type}' model start from no scores of their own; set model.type to "
            "lightgbm, or take it out"
        )


def is_free(name: str, spec: PipelineSpec) -> bool:
    """Whether the Spec says nothing of the column, so that what was inferred holds."""
    features = spec.features
    named = {*features.columns, *features.drop, *(column for group in features.groups.values() for column in group.columns)}
    return name not in {spec.task.target, *spec.task.beside.values(), *spec.data.key, *spec.data.kinds, *named}


def check_chains(spec: PipelineSpec, chains: dict[str, Chain], left_out: dict[str, str]) -> None:
    """Raise `SpecError` when nothing is left to learn from."""
    if not chains and not spec.features.groups:
        why = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        raise SpecError(f"features: no column is left to learn from; take some out of features.drop, or name their kinds{why}")


def _chains(spec: PipelineSpec, schema: Schema, inferred: Inference, progress: Progress) -> tuple[list[Column], dict[str, Chain]]:
    """Return the columns that become features, each with its chain of transforms."""
    family = load(MODELS, spec.model.type, "model.type")
    grouped = {name for group in spec.features.groups.values() for name in group.columns}
    identifiers = {name for name in inferred.left_out if is_free(name, spec)}
    exclude = {spec.task.target, *spec.task.beside.values(), *spec.data.key}
    chains = Preprocessor.plan(schema.columns, spec.features, family.chains, exclude | identifiers)
    seen = {*chains, *grouped, *spec.features.drop, *exclude, *identifiers}
    left_out = [c.name for c in schema.columns if c.kind not in family.chains and c.name not in seen]
    if left_out:
        progress.note(
            f"left out, for text has no default transform: {', '.join(left_out)}; name one under features.columns to use them"
        )
    if spec.features.categorical is None:  # the chains are the family's
        chains |= {name: _pooled(chains[name]) for name in inferred.many if name in chains and name not in spec.features.columns}
    check_chains(spec, chains, inferred.left_out)
    return [column for column in schema.columns if column.name in chains or column.name in grouped], chains


def _pooled(chain: Chain) -> Chain:
    """The chain with one code for all rare categories."""
    return [POOLED if step == "index" else step for step in chain]  # type: ignore[return-value]
