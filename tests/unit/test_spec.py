"""The Spec: what files, overlays and --set become, and what each mistake is answered with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from app.spec import Spec, load_spec, parse_spec, read_spec
from pipelines.errors import SpecError
from pipelines.notation import split_path, to_yaml

BASE = "data: {source: rows.parquet}\ntask: {target: y}\n"


def one_file(text: str, sets: list[str] | None = None) -> Spec:
    return parse_spec([("flights.yaml", text)], sets or [])[0]


def refusal(*documents: str, sets: list[str] | None = None) -> str:
    names = ["flights.yaml", "cluster.yaml", "more.yaml"]
    with pytest.raises(SpecError) as caught:
        parse_spec(list(zip(names, documents, strict=False)), sets or [])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is read


def test_smallest_spec_is_named_after_its_file_and_has_every_default() -> None:
    spec = one_file(BASE)

    assert (spec.name, spec.store, spec.model.type, spec.tune) == ("flights", "runs", "lightgbm", None)
    assert (spec.data.split.test, spec.data.split.seed, spec.serve.replicas.max) == (0.1, 7, 4)


def test_the_spec_of_the_documentation_is_valid() -> None:
    spec = one_file("""
data:
  source: examples/flights/data
  format: parquet
  key: [id]
  kinds: {month: categorical}
  where: "arr_delay IS NOT NULL"
  derive: {late: "arr_delay > 15"}
  on_error: fail
  split: {test: 0.1, valid: 0.1, seed: 7}
task: {target: late}
features:
  drop: [arr_delay, dep_time, dep_delay, arr_time, air_time]
  numeric: [impute]
  categorical: [index]
  datetime: [parts]
  columns:
    tailnum: [{hash: {buckets: 1024}}]
model: {type: lightgbm, params: {num_leaves: 63, learning_rate: 0.05, rounds: 400, early_stopping: 30}}
train: {workers: auto, cpus_per_worker: auto, gpu: auto, checkpoint_every: 50, max_failures: 3}
evaluate: {require: {auc: 0.74}}
tune:
  metric: auc
  trials: 40
  searcher: bayesian
  scheduler: asha
  time_budget_s: 600
  space: {model.params.num_leaves: {int: [15, 255], log: true}, model.params.learning_rate: {float: [0.01, 0.3], log: true}}
serve:
  replicas: {min: 1, max: 4}
  cpus: 0.5
  batch: auto
  auth: token
  limits: {body_mb: 16, rows: 10000, in_flight: 64, timeout_s: 10}
store: runs
""")

    assert spec.tune is not None
    assert spec.tune.space["model.params.num_leaves"].integers == [15, 255]
    assert spec.features.columns["tailnum"] == [{"hash": {"buckets": 1024}}]


def test_files_merge_from_left_to_right_and_set_wins() -> None:
    first = BASE + "model: {params: {num_leaves: 63, rounds: 400}}\nfeatures: {drop: [a, b]}\n"
    second = "model: {params: {num_leaves: 15}}\nfeatures: {drop: [c]}\nstore: /tmp/runs\n"

    spec, _ = parse_spec([("flights.yaml", first), ("cluster.yaml", second)], ["model.params.rounds=5", "store=s3://b/runs"])

    assert spec.name == "flights"
    assert spec.model.params == {"num_leaves": 15, "rounds": 5}
    assert spec.features.drop == ["c"]
    assert spec.store == "s3://b/runs"


def test_set_values_are_yaml_and_may_name_what_is_not_there_yet() -> None:
    sets = [
        "features.columns.tailnum=[{hash: {buckets: 8}}]",
        'tune.space."model.params.rounds"={int: [1, 9]}',
        "data.where=a = 1",
    ]

    spec = one_file(BASE, sets)

    assert spec.features.columns == {"tailnum": [{"hash": {"buckets": 8}}]}
    assert spec.tune is not None
    assert list(spec.tune.space) == ["model.params.rounds"]
    assert spec.data.where == "a = 1"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("-1.", -1.0), ("010", 10), ("0x1f", 31), ("0o17", 15), ("+3", 3),
        ("on", "on"), ("yes", "yes"), ("No", "No"), ("2013-10-01", "2013-10-01"), ("1:30", "1:30"), ("1_000", "1_000"),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("'1'", "1"),
    ],
)  # fmt: skip
def test_scalars_are_read_as_yaml_1_2_says(written: str, meant: object) -> None:
    found = one_file(f"{BASE}model: {{params: {{x: {written}}}}}\n").model.params["x"]

    assert (found, type(found)) == (meant, type(meant))


def test_column_names_that_look_like_something_else_stay_names() -> None:
    spec = one_file("data: {source: x, kinds: {on: text, 2013: numeric, true: boolean, null: text}}\ntask: {target: y}\n")

    assert list(spec.data.kinds) == ["on", "2013", "true", "null"]


def test_anchors_and_merge_keys_work() -> None:
    spec = one_file(
        BASE
        + "model: {params: &p {a: 1, b: 2}}\ntrain: {}\ndataless: null\nfeatures: {columns: {}}\n".replace("dataless: null\n", "")
    )
    assert spec.model.params == {"a": 1, "b": 2}

    spec = one_file(BASE + "model:\n  params:\n    one: &p {a: 1, b: 2}\n    two: {<<: *p, b: 3}\n    three: *p\n")
    assert spec.model.params == {"one": {"a": 1, "b": 2}, "two": {"a": 1, "b": 3}, "three": {"a": 1, "b": 2}}


def test_an_empty_section_says_nothing() -> None:
    spec, _ = parse_spec([("a.yaml", BASE + "train: {workers: 3}\nfeatures:\n"), ("b.yaml", "train:\nstore: x\n")])

    assert spec.train.workers == 3


# What is refused, and with which words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "modle is unknown; did you mean 'model'? (known: data, evaluate, features, model, name, prepare, serve, store, task, train, tune)"),
        ("model: {tpye: x}", "model.tpye is unknown; did you mean 'type'? (known: from, params, type)"),
        ("serve: {limits: {row: 1}}", "serve.limits.row is unknown; did you mean 'rows'? (known: body_mb, in_flight, rows, timeout_s)"),
        ("train: {workers: two}", "train.workers 'two' is wrong: expected an integer >= 1, a mapping with min, max or 'auto'"),
        ("train: {workers: {min: 2, max: 1}}", "train.workers: max is 1, which is less than min, 2; make max at least min"),
        ("train: {workers: {min: 0, max: 1}}", "train.workers.min 0 is wrong: expected an integer >= 1"),
        ("train: {workers: {maks: 1}}", "train.workers.maks is unknown (known: max, min)"),
        ("train: {workers: {max: 2}, cpus_per_worker: 0.5}", "train: cpus_per_worker is 0.5, and workers: {min, max} goes with whole slots; make it 1 or more"),
        ("train: {workers: 0}", "train.workers 0 is wrong: expected an integer >= 1, a mapping with min, max or 'auto'"),
        ("train: {max_failures: 1.5}", "train.max_failures 1.5 is wrong: expected an integer >= 0"),
        ("train: {max_failures: true}", "train.max_failures true is wrong: expected an integer >= 0"),
        ("train: 3", "train 3 is wrong: expected a mapping with workers, cpus_per_worker, gpu, checkpoint_every, max_failures, worker_timeout_s, strategy, compile"),
        ("serve: {auth: tokn}", "serve.auth 'tokn' is unknown; did you mean 'token'? (known: none, token)"),
        ("serve: {replicas: {min: 5}}", "serve.replicas: max is 4, which is less than min, 5; make max at least min"),
        ("evaluate: {require: {auc: good}}", "evaluate.require.auc 'good' is wrong: expected a number"),
        ("evaluate: {require: [auc]}", "evaluate.require [\"auc\"] is wrong: expected a mapping"),
        ("features: {drop: late}", "features.drop 'late' is wrong: expected a list, each item text"),
        ("features: {drop: [1]}", "features.drop.0 1 is wrong: expected text"),
        (
            "features: {numeric: impute}",
            "features.numeric 'impute' is wrong: expected a list of steps, each a name or {name: {parameter: value}}, or a list of such lists",
        ),
        ("name: a b", "name 'a b' is wrong: expected text that matches ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"),
        ("tune: {}", "tune.space is missing: expected a mapping with at least 1 entries"),
        ("tune: {space: {model.x: {int: [1, 2], float: [1, 2]}}}", "tune.space.\"model.x\": found int and float of int, float and choice; give exactly one"),
        ("tune: {space: {model.x: {float: [0, 2], log: true}}}", "tune.space.\"model.x\": log needs a range above 0, found [0, 2]"),
        ("tune: {space: {model.x: {int: [3, 1]}}}", "tune.space.\"model.x\": int [3, 1] is empty; give the lower end first"),
        ("tune: {space: {train.workers: {int: [1, 2]}}}", "tune: space 'train.workers' does not begin with a section of results (known: data, features, model, task)"),
        ("tune: {space: {model.parms.x: {int: [1, 2]}}}", "tune.space.\"model.parms.x\": a trial cannot have 1: model.parms is unknown; did you mean 'params'? (known: from, params, type)"),
        ("tune: {space: {task.threshold: {float: [0.5, 2]}}}", "tune.space.\"task.threshold\": a trial cannot have 2.0: task.threshold 2.0 is wrong: expected a number >= 0 and <= 1"),
        ("a: 1\na: 2", "line 4, column 1: the key 'a' stands twice, first in line 3; keep one"),
        ("model: {params: [1, 2}", "line 3, column 22: expected ',' or ']', but got '}'"),
        ("model:\n\tx: 1", "line 4, column 1: found character '\\t' that cannot start any token"),
        ("model: {params: {x: .nan}}", "line 3, column 21: .nan is not a finite number"),
        ("model: {params: {x: 1e999}}", "line 3, column 21: 1e999 is not a finite number"),
        ("model: {params: {x: *nowhere}}", "line 3, column 21: found undefined alias 'nowhere'"),
        ("model: {params: {x: !!python/name:os.system ''}}", "line 3, column 21: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'"),
    ],
)  # fmt: skip
def test_one_line_says_where_what_and_what_else(text: str, message: str) -> None:
    assert refusal(f"{BASE}{text}\n") == f"flights.yaml: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; a Spec has at least data.source and task.target"),
        ("# only a comment\n", "is empty; a Spec has at least data.source and task.target"),
        (
            "task: {target: y}\n",
            "data is missing: expected a mapping with source, format, options, key, kinds, where, derive, on_error, split",
        ),
        ("data: {sorce: x}\ntask: {target: y}\n", "data.sorce is unknown; did you mean 'source'?"),
        ("data: {source: x}\ntask: {}\n", "task.target is missing: expected text"),
        ("- data\n- task\n", 'found ["data", "task"]; expected a mapping of sections (known: data, evaluate,'),
        ("just text\n", "found 'just text'; expected a mapping of sections"),
    ],
)
def test_what_is_no_spec_is_refused(text: str, message: str) -> None:
    assert refusal(text).startswith(f"flights.yaml: {message}")


def test_the_file_named_is_the_one_that_set_the_value() -> None:
    assert refusal(BASE, "train: {workers: no}").startswith("cluster.yaml: train.workers 'no'")
    assert refusal(BASE + "train: {workers: no}", "train: {gpu: true}").startswith("flights.yaml: train.workers 'no'")
    assert refusal(BASE + "train: {workers: no}", "train: {workers: 2}", "trian: 1").startswith("more.yaml: trian is unknown")
    assert refusal(BASE, "train: {workers: 3}", sets=["train.workers=no"]).startswith("--set: train.workers 'no'")
    assert refusal(BASE, sets=["data.split.test=0.95"]).startswith("--set: data.split: test + valid")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.params.x", "--set 'model.params.x' is wrong: expected dotted.path=value, such as model.params.num_leaves=31"),
        ("=3", "--set '=3' is wrong: expected dotted.path=value, such as model.params.num_leaves=31"),
        ("model..x=3", "--set model..x=3: 'model..x' is not a dotted path such as model.params.num_leaves"),
        ("model.params.x=[1", "--set model.params.x=[1: value: line 1, column 3: expected ',' or ']', but got '<stream end>'"),
        ("model.type.x=3", "--set model.type.x=3: model.type is 'mlp', which has nothing inside; give the whole of it"),
        (
            "data.source.train=3",
            "--set data.source.train=3: data.source is 'rows.parquet', which has nothing inside; give the whole of it",
        ),
        ("modle.type=x", "--set: modle is unknown; did you mean 'model'?"),
    ],
)
def test_a_wrong_set_is_refused(setting: str, message: str) -> None:
    assert refusal(BASE + "model: {type: mlp}", sets=[setting]).startswith(message)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "flights.yaml").write_text(BASE)
    (tmp_path / "latin.yaml").write_bytes(b"data: \xff\n")
    near = tmp_path / "flihgts.yaml"

    for path, message in [
        (near, f"{near}: there is no such file; did you mean 'flights.yaml'? (known: flights.yaml, latin.yaml)"),
        (tmp_path, f"{tmp_path}: is a folder; name a YAML file"),
        (tmp_path / "latin.yaml", f"{tmp_path / 'latin.yaml'}: is not UTF-8 text (byte 6); name a YAML file"),
    ]:
        with pytest.raises(SpecError) as caught:
            load_spec([str(path)], [])
        assert str(caught.value) == message
    assert load_spec([str(tmp_path / "flights.yaml")]).name == "flights"


def test_errors_found_later_get_the_file_too(tmp_path: Path) -> None:
    file = tmp_path / "flights.yaml"
    file.write_text(BASE)

    _, origins = read_spec([str(file)], ["model.params.num_leavs=3"])

    assert str(origins.blame(SpecError("model.params.num_leavs is unknown"))) == "--set: model.params.num_leavs is unknown"
    assert str(origins.blame(SpecError("task.target: 'y' is constant"))) == f"{file}: task.target: 'y' is constant"
    assert str(origins.blame(SpecError("the moon is full"))) == "the moon is full"


# Changing and writing


def test_replace_gives_a_validated_copy() -> None:
    spec = one_file(BASE)

    changed = spec.replace({"model.params.num_leaves": 31, "tune.space": {"model.params.num_leaves": {"int": [2, 9]}}})

    assert (changed.model.params, spec.model.params) == ({"num_leaves": 31}, {})
    assert changed.tune is not None
    assert changed.replace({"task.threshold": 0.3}).tune == changed.tune
    with pytest.raises(SpecError, match=r"^task.threshold 3 is wrong: expected a number >= 0 and <= 1$"):
        spec.replace({"task.threshold": 3})
    with pytest.raises(SpecError, match=r"^modle is unknown; did you mean 'model'\?"):
        spec.replace({"modle.type": "x"})


def test_a_spec_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        one_file(BASE).name = "other"


def test_inferred_values_are_written_with_their_reasons() -> None:
    spec = one_file(BASE).replace({"task.type": "binary", "data.kinds": {"month": "categorical"}})

    text = to_yaml(
        spec, {"task.type": "two distinct\nvalues", "data.kinds": "from the columns' types", "data.kinds.month": "12 values"}
    )

    assert "  type: binary  # inferred: two distinct values\n" in text
    assert "  kinds:  # inferred: from the columns' types\n    month: categorical  # inferred: 12 values\n" in text
    assert one_file(text) == spec


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    [
        "on",
        "1e-3",
        "0o7",
        "null",
        "~",
        "<<",
        "=",
        "2013-10-01",
        "a.b",
        "- x",
        "a: b",
        "#",
        "'",
        '"',
        "\n",
        "\x85",
        "\u2028",
        "\ufeff",
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | names
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
params = st.dictionaries(names, values, max_size=3)
steps = names | st.dictionaries(names, st.none() | params, min_size=1, max_size=1)
chains = st.lists(steps, max_size=3) | st.lists(st.lists(steps, max_size=2), min_size=1, max_size=2)
groups = st.fixed_dictionaries({"columns": st.lists(names, min_size=2, max_size=3), "steps": st.lists(steps, max_size=3)})
sources = names | st.lists(names, max_size=2) | st.dictionaries(st.sampled_from(["train", "valid", "test"]), names, max_size=3)
axes = st.sampled_from([{"int": [1, 9], "log": True}, {"float": [0.1, 2.5]}, {"choice": [[1, None], "x", {"a": 1e-9}]}])


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    kind = st.sampled_from(["numeric", "categorical", "boolean", "datetime", "text"])
    content: dict[str, Any] = {
        "name": "a",
        "data": {
            "source": draw(sources),
            "options": draw(params),
            "kinds": draw(st.dictionaries(names, kind, max_size=3)),
            "where": draw(st.none() | names),
            "derive": draw(st.dictionaries(names, names, max_size=2)),
            "split": {"test": draw(st.floats(0, 0.4)), "seed": draw(st.integers())},
        },
        "task": {"target": draw(names), "positive": draw(scalars)},
        "features": {
            "numeric": draw(st.none() | chains),
            "columns": draw(st.dictionaries(names, chains, max_size=2)),
            "groups": draw(st.dictionaries(names, groups, max_size=2)),
        },
        "model": {"type": draw(names), "params": draw(params)},
        "tune": draw(st.none() | st.fixed_dictionaries({"space": st.dictionaries(st.just("model.params.x"), axes, min_size=1)})),
        "store": draw(names),
    }
    return Spec.model_validate(content)


@settings(max_examples=60, deadline=None)
@given(spec=specs(), reason=names)
def test_a_written_spec_is_read_back_equal(spec: Spec, reason: str) -> None:
    text = to_yaml(spec, {"task.positive": reason, "model.params": reason, "data.source": reason})

    assert one_file(text) == spec


@settings(max_examples=40, deadline=None)
@given(spec=specs())
def test_a_written_spec_is_plain_yaml_to_others(spec: Spec) -> None:
    assert yaml.safe_load(to_yaml(spec)) == spec.model_dump(by_alias=True)


def test_paths_are_split_at_dots_outside_quotes() -> None:
    assert split_path("model.params.num_leaves") == ("model", "params", "num_leaves")
    assert split_path('tune.space."model.params.x".int') == ("tune", "space", "model.params.x", "int")


def test_a_spec_is_read_without_ray_torch_and_the_like() -> None:
    heavy = "{'ray', 'torch', 'lightgbm', 'polars', 'pandas', 'pyarrow'}"

    done = subprocess.run(
        [sys.executable, "-c", f"import sys, app.spec; print({heavy} & set(sys.modules))"], capture_output=True, text=True
    )

    assert done.stdout.strip() == "set()", done.stderr
