"""What is predicted: from the target's values to numbers a model can learn, and from raw scores to answers.

A model of any family sees a float64 target (the value, the index of the class, the relevance to a query) and gives raw scores:
logits of the positive class `(n,)`, logits of every class `(n, k)`, or values `(n,)`. What stands on either side of it is here.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DataError, SpecError, did_you_mean
from pipelines.schema import ARROW, Column, Type, cast, category_text
from pipelines.spec import Frozen, Scalar, TaskSpec

Array = np.ndarray[Any, np.dtype[Any]]
TaskType = Literal["binary", "multiclass", "regression", "ranking"]

METRICS: dict[TaskType, list[str]] = {
    "binary": ["auc", "logloss", "accuracy", "average_precision", "brier"],
    "multiclass": ["accuracy", "logloss", "macro_f1"],
    "regression": ["rmse", "mae", "r2"],
    "ranking": ["ndcg@10", "ndcg@5", "ndcg@3", "ndcg@1"],
}
SCORES = frozenset({"auc", "accuracy", "average_precision", "macro_f1", "r2", *METRICS["ranking"]})
"""Metrics of which more is better; the others are losses and errors."""

MAX_CLASSES = 1000
MAX_INTEGER_CLASSES = 20
"""An integer target with more distinct values than this is a quantity, unless the Spec says otherwise."""


class Loss(Frozen):
    """What a regression minimises where it is not the squared error; the mean over the rows is a metric of this name."""

    name: Literal["mae", "huber", "fair", "pinball", "mape", "poisson_deviance", "gamma_deviance", "tweedie_deviance"]
    parameter: float | None = None
    """huber: the error up to which it is square; fair: its scale; pinball: the quantile; tweedie_deviance: its variance power."""


class Task(Frozen):
    """A target, fitted: its type and its classes."""

    type: TaskType
    target: str
    target_type: Type
    """The type of the target's column."""
    classes: list[Scalar] | None = None
    """binary: the negative class, then the positive one; multiclass: sorted; regression and ranking: none."""
    threshold: float = 0.5
    """binary: the label is positive where the probability is at least this."""
    loss: Loss | None = None
    """regression: what the model minimises, which is then the main metric; None: the squared error. Set by the model's family."""
    weight: str | None = None
    """The column that says how much each row counts, in training and in the metrics."""
    group: str | None = None
    """ranking: the column that tells the query of each row."""
    init_score: str | None = None
    """The column with the raw score that each row starts from, in training and in every answer."""
    class_weights: list[float] | None = None
    """What the weight of a train row of each class is multiplied by, in training alone."""

    @classmethod
    def fit(cls, spec: TaskSpec, column: Column, counts: dict[Scalar, int] | None, rows: int) -> Task:
        """Infer what the Spec leaves open from the target's values in the train split.

        `counts` are the distinct values with their numbers of rows, None where there are more than 1000; `rows` is the
        number of train rows that have a target.
        """
        if counts is not None:  # NaN is a missing value, and not equal to itself
            counts = {value: count for value, count in counts.items() if value is not None and value == value}
        _check_target(column, counts, rows)
        kind = spec.type or _infer(column, counts)
        if spec.positive is not None and kind != "binary":
            raise SpecError(
                f"task.positive goes with a binary task, but this is a {kind}: target '{column.name}' {_found(counts)}; "
                "remove task.positive, or derive a boolean target under data.derive"
            )
        if kind == "regression" and column.type == "string":
            raise SpecError(
                f"task.type is regression, but target '{column.name}' is a string column, expected numbers; "
                "set task.type to multiclass, or derive a number under data.derive"
            )
        if kind == "ranking":
            _check_labels(column, counts)
        if kind == "multiclass" and spec.init_score is not None:
            raise SpecError(
                f"task.init_score: '{spec.init_score}' is one score for each row, but this is a multiclass task, which needs one "
                "for each class; take it out"
            )
        classes = None if kind in ("regression", "ranking") else _classes(kind, column, counts)
        if kind == "binary" and classes is not None:
            positive = _positive(spec.positive, column, classes)
            classes = [value for value in classes if value != positive] + [positive]
        return cls(
            type=kind,
            target=column.name,
            target_type=column.type,
            classes=classes,
            threshold=spec.threshold,
            weight=spec.weight,
            group=spec.group,
            init_score=spec.init_score,
        )

    def counts_of(self, counts: dict[Scalar, int] | None) -> list[int] | None:
        """The rows of each class, whatever they weigh, of the rows of each value; None: there are no classes."""
        return None if self.classes is None else [(counts or {}).get(value, 0) for value in self.classes]

    def weighing(self, spec: TaskSpec, counts: list[int] | None) -> Task:
        """The same task with the class weights of a Spec; `counts` are the train rows of each class.

        Raises `SpecError` where they do not go with the classes.
        """
        wanted = spec.class_weight
        if wanted is None:
            return self.model_copy(update={"class_weights": None})
        if self.classes is None or counts is None:
            raise SpecError(f"task.class_weight goes with classes, but this is a {self.type}; use task.weight, or take it out")
        if wanted == "balanced":
            weights = [sum(counts) / (len(self.classes) * max(1, count)) for count in counts]
            return self.model_copy(update={"class_weights": weights})
        weights = [1.0] * len(self.classes)
        for value, weight in wanted.items():
            weights[self.classes.index(_class_meant(value, self.target, self.classes, "task.class_weight"))] = float(weight)
        return self.model_copy(update={"class_weights": weights})

    @property
    def beside(self) -> list[str]:
        """The columns that training and evaluating need besides the features and the target; no prediction does."""
        return [name for name in (self.weight, self.group) if name is not None]

    @property
    def outputs(self) -> int:
        """The number of raw scores per row."""
        return len(self.classes) if self.classes and self.type == "multiclass" else 1

    @property
    def metric_names(self) -> list[str]:
        """The metrics of this task, the main one first."""
        names = METRICS[self.type]
        return [self.loss.name, *(name for name in names if name != self.loss.name)] if self.loss else list(names)

    @property
    def loss_metric(self) -> str:
        """The metric that training minimises, and early stopping looks at."""
        return "logloss" if self.classes is not None else self.metric_names[0]

    def higher_is_better(self, metric: str) -> bool:
        """Whether more of the metric is better; `SpecError` for a metric that this task does not have."""
        if metric not in self.metric_names:
            raise SpecError(f"metric '{metric}' is unknown for a {self.type} task{did_you_mean(metric, self.metric_names)}")
        return metric in SCORES

    def encode(self, values: pa.Array | pa.ChunkedArray) -> Array:
        """Return the target as float64, NaN where it is missing: the index of the class, or the value."""
        values = self._of_target_type(values)
        if self.classes is None:
            numbers: Array = values.cast(pa.float64(), safe=False).to_numpy()
            if self.type == "ranking" and ((numbers < 0) | (numbers != np.floor(numbers))).any():
                wrong = numbers[(numbers < 0) | (numbers != np.floor(numbers))][0]
                raise DataError(_no_label(self.target, wrong))
            if np.isinf(numbers).any():
                raise DataError(
                    f"task.target: '{self.target}' is infinite in {np.isinf(numbers).sum()} rows, expected finite numbers; "
                    "drop these rows with data.where"
                )
            return numbers
        if pa.types.is_floating(values.type):
            # NaN is a missing value here, and the hash of -0.0 is not that of 0.0.
            values = pc.add(pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values), 0.0)
        codes = pc.index_in(values, value_set=self._class_values)
        if codes.null_count > values.null_count:
            unknown = values.filter(pc.and_(pc.is_null(codes), pc.is_valid(values)))
            raise DataError(
                f"task.target: '{self.target}' is {unknown[0].as_py()!r}, expected one of the {len(self.classes)} classes of the "
                f"train split ({_listed(self.classes)}); drop such rows ({len(unknown)} here) with data.where, or train with them"
            )
        encoded: Array = codes.cast(pa.float64()).to_numpy()
        return encoded

    def probabilities(self, raw: Array) -> Array:
        """Turn logits into probabilities: of the positive class `(n,)`, or of every class `(n, k)`."""
        raw = np.ascontiguousarray(raw, dtype=np.float64)
        if self.type == "binary":
            return sigmoid(raw)
        assert self.type == "multiclass", "a regression has no probabilities"
        probabilities: Array = np.exp(log_softmax(raw))
        return probabilities

    def codes(self, raw: Array) -> Array:
        """The index of the class that each row's label names."""
        codes: Array = self.probabilities(raw) >= self.threshold if self.type == "binary" else np.argmax(raw, axis=1)
        return codes.astype(np.int64)

    def decode(self, raw: Array) -> pa.Table:
        """The answers as columns: label, probability; label, probabilities (a struct); value."""
        if self.classes is None:
            return pa.table({"value": np.ascontiguousarray(raw, dtype=np.float64)})
        labels = self._class_values.take(pa.array(self.codes(raw)))
        probabilities = self.probabilities(raw)
        if self.type == "binary":
            return pa.table({"label": labels, "probability": probabilities})
        struct = pa.StructArray.from_arrays([pa.array(column) for column in probabilities.T], names=self._class_texts)
        return pa.table({"label": labels, "probabilities": struct})

    def answers(self, raw: Array) -> list[dict[str, Any]]:
        """The answers as rows: the same bits as `decode`, in plain Python."""
        if self.classes is None:
            return [{"value": value} for value in np.asarray(raw, dtype=np.float64).tolist()]
        probabilities = self.probabilities(raw).tolist()
        if self.type == "binary":
            negative, positive = self.classes
            return [{"label": positive if p >= self.threshold else negative, "probability": p} for p in probabilities]
        labels = [self.classes[code] for code in self.codes(raw)]
        structs = [dict(zip(self._class_texts, row, strict=True)) for row in probabilities]
        return [{"label": label, "probabilities": struct} for label, struct in zip(labels, structs, strict=True)]

    @cached_property
    def _class_values(self) -> pa.Array:
        return pa.array(self.classes, ARROW[self.target_type])

    @cached_property
    def _class_texts(self) -> list[str]:
        return [category_text(value) for value in self.classes or []]

    def _of_target_type(self, values: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
        chunked = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])
        try:
            return cast(chunked, self.target_type)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"task.target: '{self.target}' is {values.type}, expected {self.target_type} as in the train split; "
                "convert the column, or train again with this data"
            ) from error


def sigmoid(logits: Array) -> Array:
    """The logistic function, without overflow."""
    small = np.exp(-np.abs(logits))
    probabilities: Array = np.where(logits >= 0, 1.0, small) / (1.0 + small)
    return probabilities


def log_softmax(logits: Array) -> Array:
    """The logarithm of each row's softmax, without overflow."""
    finite = np.clip(logits, -1e300, 1e300)
    shifted = finite - finite.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _check_target(column: Column, counts: dict[Scalar, int] | None, rows: int) -> None:
    """Refuse a target that nothing can be learned from."""
    where = f"task.target: '{column.name}'"
    if column.type == "timestamp":
        raise DataError(f"{where} is a timestamp, expected a number, a boolean or a string; derive one under data.derive")
    if rows == 0 or counts == {}:
        raise DataError(f"{where} is null in every train row, expected at least two different values; choose another target")
    if counts is not None and len(counts) == 1:
        raise DataError(
            f"{where} is {next(iter(counts))!r} in all {rows} train rows, expected at least two different values; "
            "choose another target, or let more rows in by data.where"
        )
    infinite = [value for value in counts or {} if isinstance(value, float) and math.isinf(value)]
    if infinite:
        raise DataError(f"{where} is infinite in some train rows, expected finite numbers; drop these rows with data.where")


def _check_labels(column: Column, counts: dict[Scalar, int] | None) -> None:
    """Refuse a target that does not say how relevant rows are."""
    if column.type not in ("int64", "float64"):
        raise DataError(_no_label(column.name, column.type))
    wrong = [value for value in counts or {} if not isinstance(value, str) and (value < 0 or value != math.floor(value))]
    if counts is None or wrong:
        raise DataError(_no_label(column.name, min(wrong) if wrong else f"of more than {MAX_CLASSES} different values"))


def _no_label(target: str, found: object) -> str:
    return (
        f"task.target: '{target}' is {found}, but a ranking learns from labels that are integers of 0 and above, 0 being "
        "irrelevant; derive such a column under data.derive"
    )


def _infer(column: Column, counts: dict[Scalar, int] | None) -> TaskType:
    """The type of a task that names none."""
    named = column.type in ("bool", "string") or column.kind in ("boolean", "categorical", "text")
    if counts is None:
        return "multiclass" if named else "regression"
    if column.type == "float64" and not named:
        return "binary" if set(counts) == {0.0, 1.0} else "regression"
    if named or len(counts) <= MAX_INTEGER_CLASSES:
        return "binary" if len(counts) == 2 else "multiclass"
    return "regression"


def _classes(kind: TaskType, column: Column, counts: dict[Scalar, int] | None) -> list[Scalar]:
    """The distinct values, sorted."""
    if kind == "binary" and (counts is None or len(counts) != 2):
        raise SpecError(
            f"task.type is binary, but target '{column.name}' {_found(counts)}, expected two; "
            "set task.type to multiclass, or derive a boolean target under data.derive"
        )
    if counts is None or len(counts) > MAX_CLASSES:
        remedy = "group its values under data.derive" if column.type == "string" else "set task.type: regression"
        raise DataError(
            f"task.target: '{column.name}' {_found(counts)}, expected at most {MAX_CLASSES} classes; "
            f"choose another target, or {remedy}"
        )
    return sorted(value + 0.0 if isinstance(value, float) else value for value in counts)  # no -0.0


def _positive(wanted: Scalar | None, column: Column, classes: list[Scalar]) -> Scalar:
    """The class whose probability is answered; what YAML made of a value is forgiven where only one class can be meant."""
    if wanted is None:
        return next((value for value in classes if value in (1, "yes")), classes[-1])  # true equals 1
    return _class_meant(wanted, column.name, classes, "task.positive")


def _class_meant(wanted: Scalar, target: str, classes: list[Scalar], where: str) -> Scalar:
    """The class that a value in the Spec names."""
    exact = [value for value in classes if type(value) is type(wanted) and value == wanted]
    meant = exact or [value for value in classes if _means(wanted, value, classes)]
    if len(meant) == 1:
        return meant[0]
    found = f"may mean {'either class' if len(classes) == 2 else 'several classes'}" if meant else "is no class"
    known = did_you_mean(str(wanted), map(category_text, classes))
    raise SpecError(f"{where}: {wanted!r} {found} of target '{target}'{known}")


def _means(wanted: Scalar, value: Scalar, classes: list[Scalar]) -> bool:
    if isinstance(wanted, bool) and isinstance(value, str):
        return value.casefold() in (("true", "yes", "on") if wanted else ("false", "no", "off"))  # as YAML reads them
    if wanted == value:  # 1 and 1.0; true and 1 only where the classes are 0 and 1
        return not isinstance(wanted, bool) or set(classes) == {0, 1}
    return category_text(wanted).casefold() == category_text(value).casefold()


def _found(counts: dict[Scalar, int] | None) -> str:
    if counts is None:
        return f"has more than {MAX_CLASSES} distinct values"
    return f"has {len(counts)} distinct values ({_listed(sorted(counts))})"


def _listed(values: list[Scalar]) -> str:
    return ", ".join(map(repr, values[:10])) + (", ..." if len(values) > 10 else "")
