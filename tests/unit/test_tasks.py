"""Does a Task infer, encode and answer as spec.md says, and refuse what cannot be learned with a sentence?"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit, softmax

from pipelines.errors import DataError, SpecError, UserError
from pipelines.schema import ARROW, KIND_OF_TYPE, Column, Type
from pipelines.spec import Kind, Scalar, TaskSpec
from pipelines.tasks import METRICS, SCORES, Task


def fit(type_: Type, values: list[Any] | None, *, kind: Kind | None = None, rows: int = 100, **spec: Any) -> Task:
    column = Column(name="y", type=type_, kind=kind or KIND_OF_TYPE[type_])
    return Task.fit(TaskSpec(target="y", **spec), column, None if values is None else dict.fromkeys(values, 10), rows)


BINARY = Task(type="binary", target="y", target_type="bool", classes=[False, True])
THREE = Task(type="multiclass", target="y", target_type="string", classes=["a", "b", "c"])
VALUE = Task(type="regression", target="y", target_type="float64")
TASKS = [BINARY, THREE, VALUE]


@pytest.mark.parametrize(
    ("type_", "values", "expected"),
    [
        ("bool", [True, False], "binary"),
        ("string", ["b", "a"], "binary"),
        ("string", ["b", "a", "c"], "multiclass"),
        ("int64", [7, 3], "binary"),
        ("int64", [3, 1, 2], "multiclass"),
        ("int64", list(range(20)), "multiclass"),
        ("int64", list(range(21)), "regression"),
        ("int64", None, "regression"),
        ("float64", [0.0, 1.0], "binary"),
        ("float64", [0.0, 2.0], "regression"),
        ("float64", [0.0, 1.0, math.nan], "binary"),
        ("float64", [0.0, 1.0, 2.0], "regression"),
        ("float64", None, "regression"),
    ],
)
def test_type_is_inferred_from_the_values(type_: Type, values: list[Any] | None, expected: str) -> None:
    assert fit(type_, values).type == expected


def test_a_number_declared_categorical_is_a_class() -> None:
    assert fit("int64", list(range(50)), kind="categorical").type == "multiclass"
    assert fit("float64", [2.5, 2.0], kind="categorical").classes == [2.0, 2.5]


def test_the_type_in_the_spec_wins() -> None:
    assert fit("int64", [0, 1, 2], type="regression").type == "regression"
    assert fit("float64", [0.0, 1.0, 2.0], type="multiclass").classes == [0.0, 1.0, 2.0]
    assert fit("string", ["b", "a"], type="multiclass").outputs == 2


@pytest.mark.parametrize(
    ("type_", "values", "positive", "classes"),
    [
        ("bool", [True, False], None, [False, True]),
        ("int64", [2, 1], None, [2, 1]),  # 1 is positive by default
        ("int64", [-1, 0], None, [-1, 0]),
        ("string", ["yes", "zero"], None, ["zero", "yes"]),
        ("string", ["good", "bad"], None, ["bad", "good"]),
        ("float64", [0.0, 1.0], None, [0.0, 1.0]),
        ("bool", [True, False], False, [True, False]),
        ("bool", [True, False], 1, [False, True]),
        ("bool", [True, False], "True", [False, True]),
        ("int64", [0, 1], True, [0, 1]),
        ("int64", [0, 1], "0", [1, 0]),
        ("int64", [1, 2], 2.0, [1, 2]),
        ("float64", [0.0, 1.0], 0, [1.0, 0.0]),
        ("string", ["0", "1"], 0, ["1", "0"]),
        ("string", ["No", "Yes"], False, ["Yes", "No"]),  # YAML reads a bare No as false
        ("string", ["Bad", "Good"], "bad", ["Good", "Bad"]),
        ("string", ["YES", "yes"], "YES", ["yes", "YES"]),
    ],
)
def test_positive_class_is_the_last(type_: Type, values: list[Any], positive: Scalar | None, classes: list[Any]) -> None:
    task = fit(type_, values, type="binary", positive=positive)

    assert task.classes == classes
    assert [type(value) for value in task.classes] == [type(values[0])] * 2


@pytest.mark.parametrize(
    ("error", "words", "case"),
    [
        (DataError, "null in every train row", {"type_": "string", "values": []}),
        (DataError, "null in every train row", {"type_": "float64", "values": [math.nan]}),
        (DataError, "null in every train row", {"type_": "int64", "values": None, "rows": 0}),
        (DataError, "is 7 in all 100 train rows", {"type_": "int64", "values": [7]}),
        (DataError, "is 'a' in all 100 train rows", {"type_": "string", "values": ["a"], "type": "binary"}),
        (DataError, "is 0.5 in all 100 train rows", {"type_": "float64", "values": [0.5], "type": "regression"}),
        (DataError, "infinite", {"type_": "float64", "values": [1.0, math.inf, 2.0]}),
        (DataError, "timestamp", {"type_": "timestamp", "values": None}),
        (DataError, "more than 1000 distinct values", {"type_": "string", "values": None}),
        (DataError, "set task.type: regression", {"type_": "float64", "values": None, "type": "multiclass"}),
        (DataError, "1001 distinct values", {"type_": "string", "values": [str(i) for i in range(1001)]}),
        (SpecError, r"has 3 distinct values \('a', 'b', 'c'\)", {"type_": "string", "values": ["c", "a", "b"], "type": "binary"}),
        (SpecError, "more than 1000 distinct values", {"type_": "float64", "values": None, "type": "binary"}),
        (SpecError, "string column, expected numbers", {"type_": "string", "values": ["a", "b"], "type": "regression"}),
        (SpecError, "did you mean 'yes'", {"type_": "string", "values": ["no", "yes"], "positive": "yess"}),
        (SpecError, "known: 1, 2", {"type_": "int64", "values": [1, 2], "positive": 3}),
        (SpecError, "True is no class", {"type_": "int64", "values": [1, 2], "positive": True}),
        (SpecError, "may mean either class", {"type_": "string", "values": ["YES", "yes"], "positive": "Yes"}),
        (SpecError, "may mean either class", {"type_": "string", "values": ["on", "yes"], "positive": True}),
        (SpecError, "this is a multiclass", {"type_": "string", "values": ["a", "b", "c"], "positive": "a"}),
        (SpecError, "this is a regression", {"type_": "float64", "values": None, "positive": 1}),
    ],
)
def test_unlearnable_target_is_one_sentence(error: type[UserError], words: str, case: dict[str, Any]) -> None:
    with pytest.raises(error, match=words) as caught:
        fit(**case)

    assert "\n" not in str(caught.value)
    assert "'y'" in str(caught.value)


@pytest.mark.parametrize(
    ("task", "values", "expected"),
    [
        (BINARY, [True, None, False], [1, math.nan, 0]),
        (BINARY, [], []),
        (THREE, ["c", "a", None, "b"], [2, 0, math.nan, 1]),
        (fit("int64", [0, 1], positive=0), [0, 1, 1], [1, 0, 0]),
        (fit("float64", [0.0, 1.0]), [-0.0, 1.0, math.nan, None], [0, 1, math.nan, math.nan]),
        (fit("float64", [-0.0, 1.0]), [-0.0, 1.0, 0.0], [0, 1, 0]),
        (VALUE, [1.5, None, math.nan, -2.0], [1.5, math.nan, math.nan, -2.0]),
        (fit("int64", None), [2**60 + 1, None], [2.0**60, math.nan]),
        (fit("bool", [True, False], type="regression"), [True, None, False], [1, math.nan, 0]),
    ],
)
def test_encode_gives_class_indices_or_values(task: Task, values: list[Any], expected: list[float]) -> None:
    array = pa.array(values, ARROW[task.target_type])

    for given_values in (array, pa.chunked_array([array, array.slice(0, 0), array])):
        encoded = task.encode(given_values)

        assert encoded.dtype == np.float64
        np.testing.assert_array_equal(encoded, expected if given_values is array else expected * 2)


def test_encode_takes_types_that_widen() -> None:
    task = fit("int64", [0, 1])

    np.testing.assert_array_equal(task.encode(pa.array([1, 0], pa.int8())), [1, 0])
    np.testing.assert_array_equal(THREE.encode(pa.array(["b", "b"]).dictionary_encode()), [1, 1])


def test_encode_refuses_what_training_did_not_see() -> None:
    with pytest.raises(DataError, match=r"is 'x', expected one of the 3 classes .*'a', 'b', 'c'.*\(2 here\)"):
        THREE.encode(pa.array(["a", "x", None, "z"], pa.large_string()))
    with pytest.raises(DataError, match=r"is 0.5, expected one of the 2 classes"):
        fit("float64", [0.0, 1.0]).encode(pa.array([0.5, math.nan, 1.0]))
    with pytest.raises(DataError, match="infinite in 1 rows"):
        VALUE.encode(pa.array([1.0, math.inf]))
    with pytest.raises(DataError, match="is string, expected bool"):
        BINARY.encode(pa.array(["true"]))


FLOATS = st.floats(allow_nan=False, width=64)


@given(raw=hnp.arrays(np.float64, st.integers(0, 20), elements=FLOATS))
def test_binary_probabilities_are_the_logistic_function(raw: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(BINARY.probabilities(raw), expit(raw), rtol=1e-12, atol=5e-324)


@given(raw=hnp.arrays(np.float64, st.tuples(st.integers(0, 20), st.just(3)), elements=st.floats(-1e3, 1e3)))
def test_multiclass_probabilities_are_the_softmax(raw: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(THREE.probabilities(raw), softmax(raw, axis=1), rtol=1e-9, atol=1e-300)


def test_infinite_logits_give_probabilities() -> None:
    raw = np.array([[math.inf, 0, 0], [-math.inf, 0, 0], [-math.inf, -math.inf, 1]])

    np.testing.assert_allclose(THREE.probabilities(raw), [[1, 0, 0], [0, 0.5, 0.5], [0, 0, 1]])


@settings(deadline=None)
@given(task=st.sampled_from(TASKS), rows=st.integers(0, 40), seed=st.integers(0, 2**32 - 1), columns=st.sampled_from("CF"))
def test_decode_and_answers_agree_for_blocks_and_rows(task: Task, rows: int, seed: int, columns: Any) -> None:
    shape = (rows, 3) if task is THREE else rows
    raw = np.asarray(np.random.default_rng(seed).normal(size=shape) * 10, order=columns)

    answers = task.decode(raw).to_pylist()

    assert task.answers(raw) == answers  # floats are compared by their bits, NaN does not occur
    assert [answer for row in range(rows) for answer in task.answers(raw[row : row + 1])] == answers
    assert json.loads(json.dumps(answers)) == answers


def test_softmax_of_a_row_has_the_bits_of_a_block() -> None:
    task = Task(type="multiclass", target="y", target_type="int64", classes=list(range(37)))
    raw = np.random.default_rng(0).normal(size=(500, 37)) * 8

    block = task.probabilities(raw)

    assert all(np.array_equal(task.probabilities(raw[i : i + 1])[0], block[i]) for i in range(500))


def test_answers_of_each_type() -> None:
    numbers = fit("float64", [0.0, 1.0, 2.0], type="multiclass")

    assert BINARY.answers(np.array([0.0, -50.0])) == [
        {"label": True, "probability": 0.5},
        {"label": False, "probability": pytest.approx(1.9e-22, rel=0.1)},
    ]
    assert numbers.answers(np.array([[0.0, 0.0, 0.0]])) == [
        {"label": 0.0, "probabilities": {"0": pytest.approx(1 / 3), "1": pytest.approx(1 / 3), "2": pytest.approx(1 / 3)}}
    ]
    assert VALUE.answers(np.array([1.5])) == [{"value": 1.5}]


def test_answers_have_the_types_of_the_target() -> None:
    assert BINARY.decode(np.array([1.0])).schema.types == [pa.bool_(), pa.float64()]
    assert fit("int64", [3, 4]).decode(np.array([1.0])).schema.types == [pa.int64(), pa.float64()]
    assert THREE.decode(np.zeros((0, 3))).schema.types[0] == pa.large_string()
    assert VALUE.decode(np.zeros(1, np.float32)).schema.types == [pa.float64()]


def test_label_is_positive_from_the_threshold_on() -> None:
    strict = fit("string", ["no", "yes"], threshold=0.75)
    raw = np.log([3.0, 2.9, 3.1])  # probabilities 0.75, 0.744, 0.756

    assert strict.codes(np.array([0.0])).tolist() == [0]
    assert [answer["label"] for answer in strict.answers(raw)][1:] == ["no", "yes"]
    assert strict.decode(raw)["label"].to_pylist() == [answer["label"] for answer in strict.answers(raw)]


@pytest.mark.parametrize("task", [*TASKS, fit("int64", [1, 2]), fit("float64", [0.0, 1.0], positive=0)])
def test_task_survives_json(task: Task) -> None:
    again = Task.model_validate(json.loads(json.dumps(task.model_dump())))

    assert again == task
    assert [type(value) for value in again.classes or []] == [type(value) for value in task.classes or []]
    assert Task.model_validate_json(task.model_dump_json()) == task


def test_every_metric_has_a_direction() -> None:
    assert {name for names in METRICS.values() for name in names if name in SCORES} == SCORES
    assert BINARY.metric_names[0] == "auc"
    assert BINARY.higher_is_better("auc")
    assert not BINARY.higher_is_better("logloss")
    with pytest.raises(SpecError, match="did you mean 'accuracy'"):
        THREE.higher_is_better("acuracy")
