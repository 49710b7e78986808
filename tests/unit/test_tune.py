"""A search without Ray: the space in Optuna's words, what the searcher is told and remembers, who is stopped, who wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import polars as pl
import pyarrow as pa
import pyarrow.fs
import pytest
from optuna.trial import FrozenTrial, TrialState

from app.spec import Spec, parse_spec
from pipelines.data.split import assign, identity_of_rows
from pipelines.errors import ClusterError, SpecError
from pipelines.plan import plan
from pipelines.runs import Run
from pipelines.spec import TrainSpec
from pipelines.storage import Folder
from pipelines.tasks import Task
from tests.unit.test_plan import cluster
from tune.layout import Layout, Room
from tune.learned import learned
from tune.objective import Objective
from tune.plan import plan_search
from tune.search import check, first_points, folded, settings_of
from tune.space import ask, distributions, grid, params_of, within
from tune.spec import Space, TuneSpec
from tune.stopping import Known, Rule
from tune.study import Journal, begin, open_study, own, point_of, quiet, read_study
from tune.trials import Trials

BASE = "data: {source: rows.parquet}\ntask: {target: y}\n"
TASK = Task(type="binary", target="y", target_type="bool", classes=[False, True])
GIB = 1 << 30
LEAVES = "model.params.num_leaves"
RATE = "model.params.learning_rate"
CONDITIONAL = """
  model.params.boosting:
    choice: [gbdt, dart]
    opens:
      dart: {model.params.drop_rate: {float: [0.05, 0.3]}}
      gbdt: {model.params.early_stopping: {choice: [null, 20]}}
  model.params.num_leaves: {int: [4, 64], log: true}
"""


def spec_of(space: str, rest: str = "") -> Spec:
    return parse_spec([("a.yaml", f"{BASE}tune:\n  trials: 8\n{rest}  space: {space}\n")])[0]


def tuned(space: str, rest: str = "") -> TuneSpec:
    found = spec_of(space, rest).tune
    assert found is not None
    return found


def indented(space: str) -> str:
    return space.replace("\n", "\n  ").rstrip()


@pytest.fixture
def conditional() -> Space:
    return tuned(indented(CONDITIONAL)).space


# The space


def test_an_axis_is_what_optuna_calls_a_distribution() -> None:
    space = tuned(
        f"{{{LEAVES}: {{int: [4, 64], log: true}}, {RATE}: {{float: [0.1, 0.3]}}, "
        "model.params.max_bin: {choice: [63, 255]}, features.numeric: {choice: [[impute], [impute, scale]]}}"
    ).space

    assert distributions(space) == {
        LEAVES: optuna.distributions.IntDistribution(4, 64, log=True),
        RATE: optuna.distributions.FloatDistribution(0.1, 0.3),
        "model.params.max_bin": optuna.distributions.CategoricalDistribution([63, 255]),
        "features.numeric": optuna.distributions.CategoricalDistribution(['["impute"]', '["impute", "scale"]']),
    }


def test_what_optuna_suggests_is_exactly_what_the_space_says(conditional: Space) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(30):
        trial = study.ask()
        point = ask(conditional, trial)

        assert trial.distributions == {name: distributions(conditional)[name] for name in trial.params}
        assert within(conditional, point) and params_of(conditional, point) == trial.params


def test_a_choice_opens_further_parameters_and_only_where_it_is_chosen(conditional: Space) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    points = [ask(conditional, study.ask()) for _ in range(40)]

    dart = [point for point in points if point["model.params.boosting"] == "dart"]
    gbdt = [point for point in points if point["model.params.boosting"] == "gbdt"]
    assert dart and gbdt
    assert all("model.params.drop_rate" in point and "model.params.early_stopping" not in point for point in dart)
    assert all("model.params.early_stopping" in point and "model.params.drop_rate" not in point for point in gbdt)
    assert {point["model.params.early_stopping"] for point in gbdt} == {None, 20}


def test_choices_keep_their_types() -> None:
    space = tuned("{model.params.x: {choice: [1, true, 1.5, null, a, [1, {b: 2}]]}}").space
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = [ask(space, study.ask())["model.params.x"] for _ in range(60)]

    found = {json.dumps(value): value for value in seen}
    assert sorted(found) == sorted(["1", "true", "1.5", "null", '"a"', '[1, {"b": 2}]'])
    assert found["true"] is True and type(found["1"]) is int


def test_a_grid_has_every_point_once_with_what_choices_open() -> None:
    space = tuned(
        "{model.params.a: {choice: [x, z], opens: {z: {model.params.b: {int: [1, 3]}}}}, model.params.c: {float: [0, 1], steps: 3}}"
    ).space

    found = [tuple(point.values()) for point in grid(space)]
    assert found == [("x", 0.0), ("x", 0.5), ("x", 1.0), *(("z", b, c) for b in (1, 2, 3) for c in (0.0, 0.5, 1.0))]


@pytest.mark.parametrize(
    ("space", "rest", "message"),
    [
        ("{model.params.a: {choice: [x], opens: {w: {model.params.b: {int: [1, 3]}}}}}", "", "opens 'w', which is no value of the choice"),
        ("{model.params.a: {choice: [x], opens: {x: {train.workers: {int: [1, 3]}}}}}", "", "space 'train.workers' does not begin with"),
        ("{data.split.seed: {int: [1, 3]}}", "", "space 'data.split.seed' changes the rows, and such trials cannot be compared"),
        ("{task.target: {choice: [a, b]}}", "", "space 'task.target' changes what is learned"),
        (f"{{{RATE}: {{float: [0.1, 0.3]}}}}", "  metric: [auc, model_bytes]\n  scheduler: asha\n", "scheduler: asha stops trials by one metric"),
        (f"{{{RATE}: {{float: [0.1, 0.3]}}}}", "  points: [{model.params.rate: 0.2}]\n", "points name 'model.params.rate', which is not in the space"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_searched_is_refused(space: str, rest: str, message: str) -> None:
    with pytest.raises(SpecError, match=r"^a.yaml: tune") as caught:
        spec_of(space, rest)

    assert message in str(caught.value)


def test_a_typing_mistake_in_a_parameter_is_found_before_any_trial() -> None:
    with pytest.raises(SpecError, match=r"num_leafs.* unknown.*did you mean 'num_leaves'"):
        check(spec_of("{model.params.num_leafs: {int: [4, 64]}}"))
    with pytest.raises(SpecError, match="drop_rate"):
        check(spec_of("{model.params.drop_rate: {float: [0.1, 0.2]}}"))
    check(spec_of(indented(CONDITIONAL)))


def test_knobs_that_need_each_other_may_be_searched_together() -> None:
    check(spec_of("{model.params.bagging_fraction: {float: [0.5, 1.0]}, model.params.bagging_freq: {int: [1, 5]}}"))


# The study


def test_the_spec_itself_is_the_first_point_where_it_lies_in_the_space() -> None:
    assert first_points(spec_of(f"{{{LEAVES}: {{int: [4, 64]}}}}")) == [{LEAVES: 63}]
    assert first_points(spec_of(f"{{{LEAVES}: {{int: [4, 20]}}}}")) == []


def test_known_points_are_tried_first(tmp_path: Path) -> None:
    tune = tuned(f"{{{LEAVES}: {{int: [4, 64]}}}}", f"  points: [{{{LEAVES}: 9}}, {{{LEAVES}: 63}}]\n")
    study = open_study(Journal(Folder.at(str(tmp_path))), "a", tune, ["maximize"])
    begin(study, tune, [{LEAVES: 63}], [])

    assert [ask(tune.space, study.ask())[LEAVES] for _ in range(2)] == [63, 9]


def test_a_grid_larger_than_the_budget_is_not_only_its_corner(tmp_path: Path) -> None:
    tune = tuned("{model.params.a: {int: [1, 30], steps: 30}}", "  searcher: grid\n")
    study = open_study(Journal(Folder.at(str(tmp_path))), "a", tune, ["maximize"])
    begin(study, tune, [], [])

    found = [ask(tune.space, study.ask())["model.params.a"] for _ in range(30)]
    assert sorted(found) == list(range(1, 31)) and max(found[:8]) > 15


@pytest.mark.parametrize("searcher", ["bayesian", "gp", "cmaes", "genetic", "random", "grid"])
def test_every_searcher_goes_on_from_the_journal_alone(searcher: str, tmp_path: Path) -> None:
    tune = tuned(f"{{{LEAVES}: {{int: [4, 64], log: true}}, {RATE}: {{float: [0.01, 0.3]}}}}", f"  searcher: {searcher}\n")
    folder, told = Folder.at(str(tmp_path)), []
    for session in range(2):
        study = open_study(Journal(folder), "a", tune, ["maximize"])
        if session == 0:
            begin(study, tune, [], [])
        for _ in range(12):
            with quiet():
                trial = study.ask()
                point = ask(tune.space, trial)
                study.tell(trial, point[RATE])
            told.append((point[LEAVES], point[RATE]))

    again = open_study(Journal(folder), "a", tune, ["maximize"])
    assert [(trial.params[LEAVES], trial.params[RATE]) for trial in again.trials[:24]] == told
    assert told[12:] != told[:12]  # as one would say that began anew


def test_a_torn_line_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    tune = tuned(f"{{{RATE}: {{float: [0.01, 0.3]}}}}")
    study = open_study(Journal(Folder.at(str(tmp_path))), "a", tune, ["maximize"])
    study.tell(study.ask(), 0.5)
    with open(tmp_path / "study.journal", "a") as file:
        file.write('{"op_code": 4, "wor')

    again = open_study(Journal(Folder.at(str(tmp_path))), "a", tune, ["maximize"])
    again.tell(again.ask(), 0.6)
    assert [trial.value for trial in open_study(Journal(Folder.at(str(tmp_path))), "a", tune, ["maximize"]).trials] == [0.5, 0.6]


def test_a_store_that_cannot_append_gets_the_journal_when_a_trial_has_ended(tmp_path: Path) -> None:
    tune = tuned(f"{{{RATE}: {{float: [0.01, 0.3]}}}}")
    away = Folder(pa.fs.SubTreeFileSystem(str(tmp_path), pa.fs.LocalFileSystem()), "run")
    journal = Journal(away)
    study = open_study(journal, "a", tune, ["maximize"])
    study.tell(study.ask(), 0.5)
    assert not away.exists("study.journal")
    journal.flush()

    assert [trial.value for trial in open_study(Journal(away), "a", tune, ["maximize"]).trials] == [0.5]


def test_optuna_itself_reads_the_journal(tmp_path: Path) -> None:
    tune = tuned(f"{{{RATE}: {{float: [0.01, 0.3]}}}}")
    study = open_study(Journal(Folder.at(str(tmp_path))), "a", tune, ["maximize"])
    study.tell(study.ask(), 0.5)

    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal"))
    found = optuna.load_study(study_name="a", storage=optuna.storages.JournalStorage(backend))
    assert found.best_value == 0.5


def searched(folder: Path, tune: TuneSpec, values: list[float]) -> None:
    study = open_study(Journal(Folder.at(str(folder))), folder.name, tune, ["maximize"])
    for value in values:
        trial = study.ask()
        ask(tune.space, trial)
        study.tell(trial, value)


def test_a_search_learns_from_an_earlier_one_without_counting_its_trials(tmp_path: Path) -> None:
    tune = tuned(f"{{{RATE}: {{float: [0.01, 0.3]}}}}")
    (tmp_path / "old").mkdir()
    searched(tmp_path / "old", tune, [0.5, 0.7])
    study = open_study(Journal(Folder.at(str(tmp_path))), "new", tune, ["maximize"])
    begin(study, tune, [], read_study(Folder.at(str(tmp_path / "old")), "old"))

    assert [trial.value for trial in study.trials] == [0.5, 0.7] and own(study) == []
    other = tuned(f"{{{RATE}: {{float: [0.01, 0.5]}}}}")
    with pytest.raises(SpecError, match=r"the search old varied model.params.learning_rate otherwise than tune.space"):
        begin(study, other, [], read_study(Folder.at(str(tmp_path / "old")), "old"))
    with pytest.raises(SpecError, match=r"is no search: it has no study.journal"):
        read_study(Folder.at(str(tmp_path / "else")), "else")


# The books


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    return books(tmp_path)


def books(folder: Path, rest: str = "") -> Trials:
    spec = spec_of(f"{{{LEAVES}: {{int: [4, 64]}}}}", rest)
    assert spec.tune is not None
    run = Run(Folder.at(str(folder)) / "people" / "run1", {})
    run.folder.create()
    objective = Objective.of(spec.tune, TASK)
    journal = Journal(run.folder)
    return Trials(spec, run, open_study(journal, "a", spec.tune, objective.directions), journal, objective)


def report(*values: float | None, first: int = 0, **more: Any) -> dict[str, Any]:
    curve = [{"step": 5 * (first + i + 1), "total": 40, "metrics": {"valid": {"auc": value}}} for i, value in enumerate(values)]
    return {"first": first, "curve": curve, "facts": {"seconds": 1.0, "cpu_s": 0.9, "made": 1}, **more}


def test_a_trial_that_was_stopped_is_told_as_stopped_with_its_curve(trials: Trials, tmp_path: Path) -> None:
    going = trials.next()
    assert going is not None
    trials.hear(going, report(0.6, 0.65))
    trials.hear(going, report(0.65, 0.64, first=1))  # Ray Tune may hand over the same again
    trials.stop(going)

    (found,) = trials.study.trials
    assert (found.state, found.intermediate_values) == (TrialState.PRUNED, {5: 0.6, 10: 0.65, 15: 0.64})
    folder = tmp_path / "people/run1/trials/0000"
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["step"], record["point"], record["name"]) == ("stopped", 15, going.point, "people")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15]
    assert parse_spec([("spec.yaml", (folder / "spec.yaml").read_text())])[0].model.params["num_leaves"] == going.point[LEAVES]


def test_a_complete_trial_has_the_value_of_the_model_that_it_left(trials: Trials) -> None:
    going = trials.next()
    assert going is not None
    trials.hear(going, report(0.6, 0.8, 0.7))
    trials.complete(going, {"step": 10, "costs": {}})

    assert (trials.study.trials[0].state, trials.study.best_value) == (TrialState.COMPLETE, 0.8)
    assert (trials.made, trials.cpu_s) == (1, 0.9)


def test_a_trial_without_a_finite_value_has_failed_and_the_search_knows_why(trials: Trials) -> None:
    going = trials.next()
    assert going is not None
    trials.hear(going, report(None))
    trials.complete(going, {"step": 5, "costs": {}})

    assert trials.study.trials[0].state == TrialState.FAIL
    assert trials.errors == ["the model has no finite auc on the valid split"]
    assert going.run.folder.read_json("run.json")["error"] == trials.errors[0]


def test_the_next_process_goes_on_with_the_trials_that_were_under_way(tmp_path: Path) -> None:
    before = books(tmp_path)
    first, second = before.next(), before.next()
    assert first is not None and second is not None
    before.hear(first, report(0.6))
    before.complete(first, {"step": 5, "costs": {}})
    before.hear(second, report(0.7))

    after = books(tmp_path)
    assert after.begun == 1
    again = after.next()
    assert again is not None and (again.number, again.point) == (second.number, second.point)
    assert after.begun == 2
    after.hear(again, report(0.7, 0.75))  # it tells again what it had told
    after.complete(again, {"step": 10, "costs": {}})
    assert [trial.value for trial in after.study.trials] == [0.6, 0.75]
    lines = again.run.folder.read_bytes("metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10]


def test_a_trial_whose_record_was_written_before_the_kill_is_not_tried_again(tmp_path: Path) -> None:
    before = books(tmp_path)
    going = before.next()
    assert going is not None
    before.hear(going, report(0.6))
    going.run.complete(status="complete", values={"auc": 0.6}, step=5, point=going.point)

    after = books(tmp_path)
    assert after.next() is None
    assert [(trial.state, trial.value) for trial in after.study.trials] == [(TrialState.COMPLETE, 0.6)]


def test_settings_that_were_tried_are_not_tried_again(tmp_path: Path) -> None:
    found = books(tmp_path, f"  points: [{{{LEAVES}: 9}}]\n")
    for leaves in (9, 20, 9, 20):
        found.study.enqueue_trial({LEAVES: leaves}, skip_if_exists=False)
    first, second = found.next(), found.next()
    assert first is not None and second is not None
    found.hear(first, report(0.6, 0.7))
    found.complete(first, {"step": 10, "costs": {}})
    found.hear(second, report(0.5, 0.4))
    found.stop(second)

    assert (found.next(), found.next()) == (None, None)
    trials = found.study.trials
    assert [(trial.state, trial.intermediate_values) for trial in trials[2:]] == [
        (trial.state, trial.intermediate_values) for trial in trials[:2]
    ]
    assert trials[2].value == 0.7
    record = json.loads((tmp_path / "people/run1/trials/0002/run.json").read_text())
    assert (record["same_as"], record["values"], record["status"]) == (0, {"auc": 0.7}, "complete")


def test_trials_without_gain_are_counted_from_the_best(trials: Trials) -> None:
    for value in (0.5, 0.9, 0.8, 0.7):
        going = trials.next()
        assert going is not None
        trials.hear(going, report(value))
        trials.complete(going, {"step": 5, "costs": {}})

    assert trials.without_gain() == 2


def test_what_was_learned_has_history_importance_and_axes(trials: Trials) -> None:
    for value in (0.5, 0.9, 0.8):
        going = trials.next()
        assert going is not None
        trials.hear(going, report(value))
        trials.complete(going, {"step": 5, "costs": {}})
    failed = trials.next()
    assert failed is not None
    trials.fail(failed, "out of memory")

    space = tuned(f"{{{LEAVES}: {{int: [4, 64]}}}}").space
    found = json.loads(json.dumps(learned(trials.study, Objective(("auc",), 0.01), space)))
    assert [entry["status"] for entry in found["history"]] == ["complete", "complete", "complete", "failed"]
    assert found["history"][1]["values"] == {"auc": 0.9} and found["history"][3]["error"] == "out of memory"
    assert list(found["importance"]["auc"]) == [LEAVES]
    assert found["axes"] == [{"path": LEAVES, "kind": "int", "values": [4, 64], "log": False, "opened_by": {}}]


# Stopping


def curve(final: float) -> list[tuple[int, float]]:
    return [(step, final * step / 90) for step in range(5, 95, 5)]


def stopped_at(rule: Rule, name: str, final: float) -> int | None:
    trial = Known(name)
    return next((step for step, value in curve(final) if rule.stops(trial, [(step, value)], 90)), None)


def test_asha_stops_the_worse_ones_at_a_rung_and_never_before_the_grace() -> None:
    rule = Rule("asha", higher=True, grace=None)
    found = [stopped_at(rule, str(i), final) for i, final in enumerate([0.5, 0.6, 0.7, 0.1, 0.55, 0.9])]

    assert found == [None, None, None, 10, 10, None]


def test_asha_counts_every_report_of_a_trial_that_is_heard_late() -> None:
    late, prompt = Rule("asha", higher=True, grace=None), Rule("asha", higher=True, grace=None)
    for i, final in enumerate([0.5, 0.6, 0.7, 0.1, 0.55, 0.9]):
        stops = late.stops(Known(str(i)), curve(final), 90)

        assert stops == (stopped_at(prompt, str(i), final) is not None)


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_rule_that_goes_on_knows_the_trials_before(name: Any) -> None:
    rule = Rule(name, higher=False, grace=10)
    for number, final in enumerate([-0.5, -0.6, -0.7, -0.8]):
        rule.remember(number, curve(final), 90)

    assert stopped_at(rule, "bad", -0.1) == 10
    assert stopped_at(rule, "good", -0.9) is None


# Who wins


def complete(number: int, *values: float) -> FrozenTrial:
    found = optuna.trial.create_trial(values=list(values), params={}, distributions={})
    found.number = number
    return found


def test_the_front_has_the_trials_that_none_beats_in_all() -> None:
    objective = Objective(("auc", "predict_ms"), 0.0)
    found = [complete(0, 0.8, 5.0), complete(1, 0.9, 9.0), complete(2, 0.7, 6.0), complete(3, 0.85, 5.0), complete(4, 0.9, 9.5)]

    assert [trial.number for trial in objective.front(found)] == [1, 3]
    assert objective.winner(found)[0].number == 1


def test_a_little_of_the_first_metric_is_given_for_much_of_the_second() -> None:
    found = [complete(0, 0.9, 9.0), complete(1, 0.895, 3.0), complete(2, 0.7, 1.0)]
    winner, rule = Objective(("auc", "model_bytes"), 0.01).winner(found)

    assert winner.number == 1
    assert rule == "the best model_bytes of the 2 of 3 on the front within 0.01 of the best auc"


@pytest.mark.parametrize(("metric", "number"), [("auc", 1), ("logloss", 0)])
def test_one_metric_has_one_best(metric: str, number: int) -> None:
    assert Objective((metric,), 0.01).winner([complete(0, 0.3), complete(1, 0.5)])[0].number == number


def test_a_metric_that_the_task_has_not_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^tune.metric: 'aux' is no metric of a binary task; did you mean 'auc'"):
        Objective.of(tuned(f"{{{RATE}: {{float: [0.1, 0.3]}}}}", "  metric: aux\n"), TASK)
    with pytest.raises(SpecError, match=r"^tune.metric: model_bytes alone would find the smallest model"):
        Objective.of(tuned(f"{{{RATE}: {{float: [0.1, 0.3]}}}}", "  metric: model_bytes\n"), TASK)


# How trials share the cluster


def planned(space: str, free: float, memory: int, size: int = GIB, rest: str = "", rooms: int = 1) -> Layout:
    room = [Room(free / rooms, memory // rooms)] * rooms
    return Layout.plan(tuned(space, rest), TrainSpec(), room, free=free, gpus=0, size=size)


MODEL = f"{{{LEAVES}: {{int: [4, 64]}}}}"
DATA = "{features.numeric: {choice: [[], [impute]]}}"


def test_each_slot_does_a_trial_while_memory_allows() -> None:
    found = planned(MODEL, 4, 100 * GIB)
    assert (found.at_once, found.workers, found.cpus, found.threads) == (4, 1, 1.0, 1)

    tight = planned(MODEL, 8, 5 * GIB)
    assert (tight.at_once, tight.threads, tight.cpus) == (3, 2, 2.0) and "memory allows 3" in tight.why

    few = planned(MODEL, 16, 100 * GIB)
    assert (few.at_once, few.threads) == (8, 2)  # no more than there are trials


def test_trials_leave_ray_data_a_slot_where_they_differ_in_their_data() -> None:
    for slots in (2, 4, 8):
        one = planned(DATA, slots, 100 * GIB)
        assert one.at_once * one.cpus <= slots - 1 and one.at_once == slots

    several = planned(DATA, 8, 100 * GIB, rooms=2)
    assert several.at_once * several.cpus <= 7 and several.cpus == 1.0


def test_a_trial_that_no_machine_has_the_memory_for_has_several_processes() -> None:
    found = planned(MODEL, 8, 8 * 2 * GIB, size=4 * GIB, rooms=8)
    assert (found.workers, found.at_once) == (4, 2) and "which no machine has" in found.why

    with pytest.raises(ClusterError, match=r"^tune: a trial needs 409,600 MiB, more than 8 machines with 16,384 MiB can share"):
        planned(MODEL, 8, 8 * 2 * GIB, size=400 * GIB, rooms=8)


def test_each_row_that_is_not_test_is_valid_in_one_fold() -> None:
    spec = parse_spec([("a.yaml", "data: {source: rows.parquet, split: {test: 0.2, valid: 0.1}}\ntask: {target: y}\n")])[0]
    rows = identity_of_rows(3, 0, 20_000)

    codes = np.array([assign(one.data.split, rows, None, frozenset(), None) for one in folded(spec, 4)])

    test = assign(spec.data.split, rows, None, frozenset(), None) == 2
    assert ((codes == 2) == test).all()
    assert ((codes == 1).sum(axis=0) == ~test).all()
    assert np.abs((codes == 1).mean(axis=1) - 0.2).max() < 0.01
    with pytest.raises(SpecError, match=r"fold \[4, 4\] goes with by: random or group, and is \[i, k\] with i from 0 to k - 1"):
        spec.replace({"data.split.fold": [4, 4]})


def test_trials_with_the_same_data_have_one_key_and_others_have_not() -> None:
    spec = spec_of(DATA)

    assert settings_of(spec.replace({LEAVES: 5})) == settings_of(spec)
    assert settings_of(spec.replace({"features.numeric": ["impute"]})) != settings_of(spec)
    assert point_of(optuna.trial.create_trial(value=1.0, user_attrs={"point": '{"a": [1]}'})) == {"a": [1]}


def test_a_plan_tells_how_trials_share_the_cluster_and_how_often_data_is_prepared(tmp_path: Path) -> None:
    pl.DataFrame({"x": [i * 7919 % 997 / 3 for i in range(1000)], "y": [i % 3 == 0 for i in range(1000)]}).write_parquet(
        tmp_path / "rows.parquet"
    )
    places = [f"data.source={tmp_path / 'rows.parquet'}", f"store={tmp_path}"]
    space = f"{{{LEAVES}: {{int: [4, 64]}}, features.numeric: {{choice: [[], [impute], [scale]]}}}}"
    spec, _ = parse_spec([("a.yaml", f"{BASE}tune: {{trials: 9, searcher: grid, space: {space}}}\n")], places)

    found = plan_search(spec, cluster(), plan(spec, cluster()))

    assert (found.trials, found.knobs, found.points, found.prepared) == (9, 2, 15, 3)
    assert found.layout is not None and (found.layout.at_once, found.layout.workers) == (4, 1)
    assert found.copies == 4 * found.layout.memory and found.problems == []
    small = cluster(memory=1 << 20)
    assert "a trial needs" in plan_search(spec, small, plan(spec, small)).problems[0]


def test_a_grid_that_nobody_could_try_is_refused_before_it_is_made() -> None:
    knobs = ", ".join(
        f"model.params.{name}: {{float: [0.1, 1.0], steps: 9}}" for name in ("lambda_l1", "lambda_l2", "path_smooth")
    )
    more = ", ".join(
        f"model.params.{name}: {{float: [0.1, 1.0], steps: 9}}" for name in ("cat_l2", "cat_smooth", "learning_rate")
    )
    with pytest.raises(SpecError, match=r"^tune.searcher: the grid has 531,441 points, more than 100,000; lower steps"):
        check(spec_of(f"{{{knobs}, {more}}}", "  searcher: grid\n"))
