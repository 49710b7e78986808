"""The sections of the Spec that say what a pipeline does: data, task, features, model, train, evaluate, store.

Each field carries its default, its bound and one line of documentation. `app/spec.py` adds the sections of `tune` and `serve`
and reads the files.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """An immutable, strictly typed section; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


Kind = Literal["numeric", "categorical", "boolean", "datetime", "text"]
Scalar = bool | int | float | str
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

# One step is a name (`impute`) or a name with its parameters (`{impute: {strategy: median}}`).
Step = str | dict[str, dict[str, Any] | None]
# A chain is a list of steps; a list of chains runs side by side on the same column.
Chain = list[Step] | list[list[Step]]


class SplitSpec(Frozen):
    """Which rows are train, valid and test."""

    by: Literal["random", "time", "group"] = "random"
    """random: by each row's identity; time: the latest rows are test, those before them valid; group: a group is never split."""
    column: str | None = None
    """The time or group column."""
    test: Fraction = 0.1
    """Fraction of the rows."""
    valid: Fraction = 0.1
    """Fraction of the rows."""
    seed: int = 7
    """Changes which rows fall where (random and group)."""
    cuts: list[str] | None = None
    """Time split, resolved: rows before the first cut are train, before the second valid, the rest test."""
    fold: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    """[i, k]: of the rows that are not test, those of the i-th of k equal parts are valid; `valid` is of no account."""

    @model_validator(mode="after")
    def _consistent(self) -> SplitSpec:
        if self.test + self.valid >= 1.0:
            raise ValueError(
                f"test + valid is {self.test + self.valid:g}, which leaves nothing to train on; make the sum less than 1"
            )
        if self.by != "random" and self.column is None:
            raise ValueError(f"by: {self.by} needs 'column'")
        if self.fold is not None and (self.by == "time" or not 0 <= self.fold[0] < self.fold[1]):
            raise ValueError(f"fold {self.fold} goes with by: random or group, and is [i, k] with i from 0 to k - 1")
        if self.by == "random" and self.column is not None:
            raise ValueError("'column' goes with by: time or by: group")
        return self


Source = str | list[str] | dict[Literal["train", "valid", "test"], str | list[str]]


class DataSpec(Frozen):
    """Where the rows are and which of them count."""

    source: Source
    """File, folder, glob or URI (of a database too), a list of them, or {train: ..., valid: ..., test: ...}."""
    format: Literal["parquet", "csv", "jsonl", "orc", "arrow", "sql"] | None = None
    """Inferred from the files' names."""
    options: dict[str, Any] = {}
    """For the format's reader, e.g. {delimiter: ";", nulls: ["NA"]} for csv, {query: "SELECT ..."} for sql."""
    key: list[str] = []
    """Columns that identify a row; default: (file relative to the source's root, row in the file)."""
    kinds: dict[str, Kind] = {}
    """Column kinds that win over inference."""
    where: str | None = None
    """SQL predicate: rows for which it is not true take no part in prepare, train and evaluate."""
    derive: dict[str, str] = {}
    """New columns as SQL expressions, computed by the same engine when training and when serving."""
    on_error: Literal["fail", "null"] = "fail"
    """What a later value that contradicts the Schema does: end the run, or count as missing."""
    split: SplitSpec = SplitSpec()


class TaskSpec(Frozen):
    """What to predict."""

    target: str
    """The column to predict; it may be a derived one."""
    type: Literal["binary", "multiclass", "regression", "ranking"] | None = None
    """Inferred from the target's values; ranking never is."""
    group: str | None = None
    """Ranking: the column that tells the query of each row. Rows of one query are ranked against each other and never split."""
    positive: Scalar | None = None
    """Binary: the class whose probability is answered; default true, 1 or "yes", else the last in sorted order."""
    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Binary: the label is positive where the probability is at least this."""
    weight: str | None = None
    """A column of numbers, 0 and above: how much each row counts in training and in the metrics. It is no feature."""
    class_weight: Literal["balanced"] | dict[Scalar, float] | None = None
    """Binary and multiclass, in training alone: a factor of the weight by class, 1 for those not named; balanced: train rows /
    (classes * train rows of the class)."""

    init_score: str | None = None
    """A column of numbers: the raw score that each row starts from, such as log-odds (binary), a value (regression) or its
    logarithm (objectives with a log link). Trees learn what is missing; each prediction needs it. It is no feature."""

    @model_validator(mode="after")
    def _beside(self) -> TaskSpec:
        of: dict[str, str] = {self.target: "target"}
        for name, column in self.beside.items():
            if column in of:
                raise ValueError(f"{name}: '{column}' is the {of[column]}; name another column")
            of[column] = name
        if self.type == "ranking" and self.group is None:
            raise ValueError("type: ranking needs 'group', the column that tells the query of each row")
        if self.group is not None and self.type != "ranking":
            raise ValueError("group goes with type: ranking; set it, or take the group out")
        if isinstance(self.class_weight, dict):
            wrong = [value for value in self.class_weight.values() if not (value > 0 and math.isfinite(value))]
            if wrong:
                raise ValueError(f"class_weight: {wrong[0]:g} is no weight of a class; expected numbers above 0")
        return self

    @property
    def beside(self) -> dict[str, str]:
        """The columns that say something of a row besides its target, by their field here."""
        return {name: column for name in ("group", "weight", "init_score") if (column := getattr(self, name)) is not None}


class GroupSpec(Frozen):
    """Features from several columns together."""

    columns: Annotated[list[str], Field(min_length=2)]
    """They keep their own features besides, unless they are in features.drop."""
    steps: list[Step]
    """One reads all columns (cross, difference, pca); those before it act on each column, those behind it on what it makes."""


class FeaturesSpec(Frozen):
    """How columns become features: a chain of transforms per kind, or per column, or for a group of columns."""

    drop: list[str] = []
    """Columns that are no features of their own; a group that names one still reads it."""
    numeric: Chain | None = None
    categorical: Chain | None = None
    boolean: Chain | None = None
    datetime: Chain | None = None
    text: Chain | None = None
    columns: dict[str, Chain] = {}
    """Chains of single columns; they win over the chain of the kind."""
    groups: dict[str, GroupSpec] = {}
    """By the name that the features get."""


class ModelSpec(Frozen):
    """Which family of models, with its parameters."""

    type: str = "lightgbm"
    """A registered family, or "package.module:Class"."""
    params: dict[str, Any] = {}
    """Checked against the family's own Params."""
    from_: str | None = Field(None, alias="from")
    """A complete run (an id, a path or URI, NAME@latest, NAME@best) whose model is continued on this data: its features and task
    are taken over as they are, and `params.rounds` more rounds are added."""


class PrepareSpec(Frozen):
    """How the prepared data is laid out. It costs or saves time and memory; the rows of a split stay the same."""

    row_group_rows: Annotated[int, Field(ge=1024, le=1_048_576)] = 65_536
    """Rows of a Parquet row group: what a trainer reads in one go."""
    shard_rows: Annotated[int, Field(ge=1024)] | None = None
    """Rows of a shard at most; null: one shard per read unit and split."""
    bucket_by: list[str] = []
    """Columns whose equal values come to lie in the same shards; the rows of a split are then in the order of the buckets."""
    buckets: Annotated[int, Field(ge=1, le=1024)] = 16
    """How many buckets, where there is a bucket_by."""


class WorkersSpec(Frozen):
    """How many workers train; between the two as many as there are slots for."""

    min: Annotated[int, Field(ge=1)] = 1
    """With fewer the fit waits for slots."""
    max: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _ordered(self) -> WorkersSpec:
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, which is less than min, {self.min}; make max at least min")
        return self


class TrainSpec(Frozen):
    """How much of the cluster a fit may use."""

    workers: Annotated[int, Field(ge=1)] | WorkersSpec | Literal["auto"] = "auto"
    """Processes that train; auto: the free slots less one, which Ray Data needs; {min: 1, max: 4}: as many as there are slots
    for, fewer after a loss and more when slots come, each time from the last checkpoint on."""
    cpus_per_worker: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Slots each worker reserves; auto: 1, or a fraction where there are fewer slots than workers."""
    gpu: bool | Literal["auto"] = "auto"
    """auto: a GPU per worker where the family uses one and the cluster has them."""
    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Rounds or steps between checkpoints; null: 50 rounds of LightGBM, 1000 steps of a network."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often lost workers are replaced before the run ends."""
    worker_timeout_s: Annotated[float, Field(ge=1)] = 20.0
    """Seconds without a sign of life after which a worker counts as lost. One that is busy gives signs of life."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Of networks: every worker has the whole one, or (fsdp) a part of each parameter."""
    compile: bool = False
    """Of networks: let torch.compile generate code for it; it takes a minute and a C++ compiler."""

    @model_validator(mode="after")
    def _whole(self) -> TrainSpec:
        if isinstance(self.workers, WorkersSpec) and self.cpus_per_worker != "auto" and self.cpus_per_worker % 1:
            raise ValueError(
                f"cpus_per_worker is {self.cpus_per_worker:g}, and workers: {{min, max}} goes with whole slots; make it 1 or more"
            )
        return self


class EvaluateSpec(Frozen):
    """What the result must reach."""

    require: dict[str, float] = {}
    """Metric on the test split: at least, for scores; at most, for losses and errors; else exit code 3."""


class PipelineSpec(Frozen):
    """What one pipeline does; `app.spec.Spec` adds how it is tuned and served."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Names the runs and the served model; default: the first file's name."""
    data: DataSpec
    task: TaskSpec
    features: FeaturesSpec = FeaturesSpec()
    model: ModelSpec = ModelSpec()
    prepare: PrepareSpec = PrepareSpec()
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    store: str = "runs"
    """Path or URI of the run store; the prepared cache is STORE/cache."""

    @model_validator(mode="before")
    @classmethod
    def _split_by_query(cls, values: Any) -> Any:
        """A ranking is split by its groups where the Spec names no other way."""
        match values:
            case {"task": {"type": "ranking", "group": str(group)}, "data": {**data}}:
                split = data.get("split") or {}
                if isinstance(split, dict) and split.get("by", "random") == "random" and split.get("column") is None:
                    return {**values, "data": {**data, "split": {**split, "by": "group", "column": group}}}
        return values

    @model_validator(mode="after")
    def _whole_queries(self) -> PipelineSpec:
        if self.task.type != "ranking":
            return self
        split, group = self.data.split, self.task.group
        if (split.by, split.column) != ("group", group):
            raise ValueError(
                f"data.split.by: {split.by}{f' ({split.column})' if split.column else ''} may split a query; take by and "
                f"column out, for a ranking is split by task.group ({group})"
            )
        if self.prepare.bucket_by not in ([], [group]):
            raise ValueError(
                f"prepare.bucket_by: {self.prepare.bucket_by} may split a query; expected [{group}], or leave it out"
            )
        return self
