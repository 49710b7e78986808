"""Do rows start from the raw scores of their own as in LightGBM, in every fit, in every answer, and is a wrong one refused?"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import lightgbm as lgb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, mean_poisson_deviance

from pipelines.artifact import Artifact
from pipelines.data.beside import check_numeric, init_scores_of
from pipelines.data.prepared import GROUP, INIT_SCORE, Shard, Shards, to_table
from pipelines.data.read import Counts, Each, Reader
from pipelines.data.source import Source, Unit
from pipelines.errors import DataError, InputError, SpecError
from pipelines.evaluate import evaluate
from pipelines.explain import checked
from pipelines.features.transform import Feature
from pipelines.metrics import Metrics, sizes_of
from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_params import LightGBMParams as Params
from pipelines.plan import plan
from pipelines.predict import predict
from pipelines.prepare import prepare
from pipelines.registry import MODELS, load
from pipelines.runs import Run
from pipelines.schema import Column
from pipelines.spec import PipelineSpec, TaskSpec
from pipelines.storage import Folder
from pipelines.tasks import Task, sigmoid
from pipelines.train import run
from pipelines.training.shared import Shared
from pipelines.training.trainer import Fit
from pipelines.training.worker import Start, parent_of
from serve.routes import build_app
from tests.unit.test_boosting import Recording, saved
from tests.unit.test_plan import cluster

Array = np.ndarray[Any, np.dtype[Any]]

BINARY = Task(type="binary", target="y", target_type="int64", classes=[0, 1], init_score="o")
VALUE = Task(type="regression", target="y", target_type="float64", init_score="o")
RANKING = Task(type="ranking", target="y", target_type="int64", group="q", init_score="o")
SAMPLING = {"bagging_fraction": 0.5, "bagging_freq": 1, "feature_fraction": 0.6}
PLAIN = {
    "num_leaves": 15, "learning_rate": 0.1, "min_sum_hessian_in_leaf": 1.0, "lambda_l2": 1.0, "seed": 7, "verbosity": -1,
    "deterministic": True, "force_row_wise": True, "num_threads": 1, "feature_pre_filter": False,
}  # fmt: skip


def table(task: Task, rows: int, seed: int) -> tuple[Array, Array, Array]:
    """Rows, their targets, and the scores that they start from, which say much of the target."""
    rng = np.random.default_rng(seed)
    matrix, start = rng.normal(size=(rows, 3)), rng.normal(size=rows)
    raw = start + matrix[:, 0] + (matrix[:, 1] > 0) - 1
    y = {
        "binary": (raw + rng.logistic(size=rows) > 0).astype(float),
        "regression": rng.poisson(np.exp(0.5 * raw)).astype(float),
        "ranking": np.clip(np.round(raw + 1), 0, 4),
    }[task.type]
    return matrix, y, start if task.type != "regression" else 0.5 * start


def queries(rows: int) -> Array:
    return np.arange(rows, dtype=np.uint64) // 20


def worker(folder: Path, task: Task, start: Start | None = None) -> Recording:
    splits: dict[str, list[Shard]] = {"test": []}
    for seed, (split, rows) in enumerate({"train": 3000, "valid": 1000}.items()):
        matrix, y, own = table(task, rows, seed)
        (folder / split).mkdir(parents=True, exist_ok=True)
        beside = ({INIT_SCORE: own} if task.init_score else {}) | ({GROUP: queries(rows)} if task.group else {})
        pq.write_table(to_table([*matrix.T, y], beside), folder / split / "a.parquet", row_group_size=700)
        splits[split] = [Shard(f"{split}/a.parquet", rows)]
        if split == "train":
            pq.write_table(to_table([*matrix.T, y], beside), folder / "sample.parquet")
    features = [Feature(name=name, kind="numeric") for name in "abc"]
    shards = Shards(Folder.at(str(folder)), features, splits, grouped=task.group is not None)
    return Recording(rank=0, size=1, threads=1, checkpoint_every=10, shards=shards, start=start, rendezvous=None, attempt="a")


def fitted(folder: Path, task: Task, start: Start | None = None, **given: Any) -> tuple[Recording, Task]:
    params = Params.model_validate({"rounds": 30, "early_stopping": None, "num_leaves": 15, **given})
    made = worker(folder, task, start)
    task = LightGBM.check(params, task, made.shards, 1)
    LightGBM.fit(params, task, made)
    return made, task


LINKS = {"poisson": np.exp, "tweedie": np.exp, "sqrt": lambda raw: np.sign(raw) * raw * raw}
FITS: list[tuple[Task, dict[str, Any], dict[str, Any], str]] = [
    (BINARY, {}, {"objective": "binary"}, ""),
    (BINARY, {"boosting": "dart"}, {"objective": "binary", "boosting": "dart"}, ""),
    (VALUE, {}, {"objective": "regression"}, ""),
    (VALUE, {"reg_sqrt": True}, {"objective": "regression", "reg_sqrt": True}, "sqrt"),
    (VALUE, {"objective": "l1"}, {"objective": "regression_l1"}, ""),
    (VALUE, {"objective": "quantile", "alpha": 0.8}, {"objective": "quantile", "alpha": 0.8}, ""),
    (VALUE, {"objective": "poisson"}, {"objective": "poisson"}, "poisson"),
    (VALUE, {"objective": "tweedie"}, {"objective": "tweedie"}, "tweedie"),
    (RANKING, {}, {"objective": "lambdarank"}, ""),
]


@pytest.mark.parametrize(("task", "given", "wanted", "link"), FITS, ids=[str([*f[1].values(), f[0].type]) for f in FITS])
def test_a_fit_is_that_of_plain_lightgbm_and_its_metrics_are_those_of_the_answers(
    tmp_path: Path, task: Task, given: dict[str, Any], wanted: dict[str, Any], link: str
) -> None:
    made, task = fitted(tmp_path, task, **given)

    matrix, y, start = table(task, 3000, 0)
    group = sizes_of(queries(3000)) if task.group else None
    plain = lgb.train({**PLAIN, **wanted}, lgb.Dataset(matrix, y, init_score=start, group=group), 30)
    model = made.kept[-1][1]
    raw = plain.predict(matrix, raw_score=True)
    assert np.array_equal(model.raw(matrix), raw)
    other = lgb.train({**PLAIN, **wanted}, lgb.Dataset(matrix, y, group=group), 30)
    assert not np.allclose(raw, other.predict(matrix, raw_score=True), atol=0.05), "the scores change what is learned"

    found = model.predict_from(matrix, start)
    assert found == pytest.approx(LINKS[link](raw + start) if link else raw + start, rel=1e-12)
    valid, valid_y, valid_start = table(task, 1000, 1)
    metrics = Metrics(task)
    metrics.add(valid_y, model.predict_from(valid, valid_start), None, sizes_of(queries(1000)) if task.group else None)
    assert made.logged[-1][1]["valid"] == pytest.approx(metrics.result(), rel=1e-9)


@pytest.mark.parametrize(
    ("task", "given"),
    [
        (BINARY, SAMPLING),
        (BINARY, {"segment": 5, "eval_every": 4, "early_stopping": 16, "learning_rate": 0.2}),
        (VALUE, {"objective": "poisson", **SAMPLING}),
        (VALUE, {"objective": "l1"}),
        (RANKING, {}),
    ],
    ids=["sampling", "early stopping", "poisson", "l1", "ranking"],
)
def test_a_fit_that_goes_on_from_any_checkpoint_ends_with_the_bits_of_one_never_killed(
    tmp_path: Path, task: Task, given: dict[str, Any]
) -> None:
    whole, _ = fitted(tmp_path, task, **{"rounds": 45, **given})
    assert [step for step, _, _ in whole.kept[:2]] == [10, 20] and "final" in whole.kept[-1][2]
    final = saved(tmp_path / "whole", whole.kept[-1][1])

    for step, model, state in whole.kept:
        saved(tmp_path / str(step), model)
        start = Start(LightGBM.load(tmp_path / str(step)), step, state)
        resumed, _ = fitted(tmp_path, task, start, **{"rounds": 45, **given})
        assert saved(tmp_path / f"{step}-resumed", resumed.kept[-1][1]) == final
        assert resumed.kept[-1][2] == whole.kept[-1][2]
        assert resumed.logged == [entry for entry in whole.logged if entry[0] > step]


def test_the_scores_of_a_checkpoint_are_added_in_the_order_of_the_fit(tmp_path: Path) -> None:
    """Bits of leaves mostly survive another order; those of the scores do not, and it is they that a fit must start from."""
    made, _ = fitted(tmp_path, BINARY, rounds=193)  # one more than six times what is looked up at a time
    matrix, _, start = table(BINARY, 3000, 0)
    model = made.kept[-1][1]

    expected = start.copy()
    for tree in range(193):
        expected = expected + model.booster.predict(matrix, raw_score=True, start_iteration=tree, num_iteration=1)

    assert np.array_equal(model.raw_from(matrix, start), expected)
    assert not np.array_equal(model.raw(matrix) + start, expected)


def test_an_earlier_model_is_continued_and_its_continuation_can_be_resumed(tmp_path: Path) -> None:
    first = fitted(tmp_path, BINARY, rounds=5)[0].kept[-1][1]

    whole, _ = fitted(tmp_path, BINARY, Start(first, 0, {}), rounds=20, **SAMPLING)

    valid, y, start = table(BINARY, 1000, 1)
    model = whole.kept[-1][1]
    before, loss = (log_loss(y, sigmoid(each.predict_from(valid, start))) for each in (first, model))
    assert model.rounds == 25 and loss < before - 0.01
    assert whole.logged[-1][1]["valid"]["logloss"] == pytest.approx(loss, rel=1e-9)
    step, model, state = whole.kept[0]
    resumed, _ = fitted(tmp_path, BINARY, Start(model, step, state), rounds=20, **SAMPLING)
    assert saved(tmp_path / "resumed", resumed.kept[-1][1]) == saved(tmp_path / "whole", whole.kept[-1][1])


@pytest.mark.parametrize("task", [BINARY, VALUE], ids=["binary", "regression"])
def test_leaves_are_fitted_as_by_lightgbms_own_refit(tmp_path: Path, task: Task) -> None:
    first = fitted(tmp_path / "first", task)[0].kept[-1][1]
    matrix, y, start = table(task, 3000, 0)
    plain = lgb.Booster(model_str=first.booster.model_to_string())
    objective = "binary" if task.type == "binary" else "regression"
    plain.params |= {"objective": objective, "verbosity": -1, "num_threads": 1, "lambda_l2": 1.0}
    shifted = start + 0.3

    def refitted(own: Array) -> Array:
        return np.asarray(plain.refit(matrix, y, decay_rate=0.5, init_score=own).predict(matrix, raw_score=True))

    folder = tmp_path / "again"
    made = worker(folder, task, Start(first, 0, {}))
    pq.write_table(to_table([*matrix.T, y], {INIT_SCORE: shifted}), folder / "train/a.parquet", row_group_size=700)
    LightGBM.fit(Params(refit=True, refit_decay_rate=0.5), task, made)

    model = made.kept[-1][1]
    assert np.allclose(model.raw(matrix), refitted(shifted), rtol=0, atol=1e-5)  # LightGBM's gradients are float32
    assert not np.allclose(model.raw(matrix), refitted(start), rtol=0, atol=1e-3)
    valid, valid_y, valid_start = table(task, 1000, 1)
    metrics = Metrics(task)
    metrics.add(valid_y, model.predict_from(valid, valid_start))
    assert made.logged[-1][1]["valid"] == pytest.approx(metrics.result(), rel=1e-9)


def test_fits_on_shared_bins_start_from_their_own_scores(tmp_path: Path) -> None:
    bare = VALUE.model_copy(update={"init_score": None})
    alone = [fitted(tmp_path / "alone", task)[0].kept[-1][1] for task in (VALUE, bare, VALUE)]

    shared, found = Shared(tmp_path / "shared"), []
    for task in (VALUE, bare, VALUE):
        made = worker(tmp_path / "one", VALUE)
        made.shared = shared
        LightGBM.fit(Params(rounds=30, early_stopping=None, num_leaves=15), task, made)
        found.append(made.kept[-1][1])

    texts = [model.booster.model_to_string() for model in found]
    assert shared.made == 1 and texts == [model.booster.model_to_string() for model in alone]
    assert texts[0] == texts[2] != texts[1]


class Here:
    class file:  # noqa: N801
        path = "data/a.parquet"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0, None, 2.0, None], "'o' is missing in 2 of 4 rows of data/a.parquet, expected the raw score that each row starts"),
        ([1.0, float("nan"), 2.0, 0.0], "'o' is missing in 1 of 4 rows"),
        ([1.0, float("-inf"), 2.0, 0.0], "'o' is infinite in 1 of 4 rows"),
    ],
)
def test_a_wrong_score_is_refused_with_what_to_do(values: list[float | None], sentence: str) -> None:
    with pytest.raises(DataError) as refused:
        init_scores_of(pa.table({"o": pa.array(values, pa.float64())}), "o", Here)  # type: ignore[arg-type]

    assert sentence in str(refused.value) and "data.where" in str(refused.value) and "\n" not in str(refused.value)


def test_what_has_no_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task.init_score: 'o' is a column of type string, expected numbers"):
        check_numeric("init_score", Column(name="o", type="string", kind="categorical"))
    for other, name in (("target", "o"), ("weight", "o"), ("group", "o")):
        task = {"target": "y", "init_score": "o", **({"type": "ranking"} if other == "group" else {}), other: name}
        with pytest.raises(SpecError, match=f"init_score: 'o' is the {other}; name another column"):
            checked(TaskSpec, task)
    letters = Column(name="y", type="string", kind="categorical")
    with pytest.raises(SpecError, match="task.init_score: 'o' is one score for each row, but this is a multiclass task"):
        Task.fit(TaskSpec(target="y", init_score="o"), letters, {"a": 5, "b": 5, "c": 5}, 15)
    assert Task.fit(TaskSpec(target="y", init_score="o"), letters, {"a": 5, "b": 5}, 10).init_score == "o"
    forest = {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5}
    with pytest.raises(SpecError, match="model.params.boosting: the trees of a random forest start from no scores; choose gbdt"):
        fitted(tmp_path, BINARY, **forest)


RATES = "rates"
LOGGED: dict[str, dict[str, float]] = {}
"""The last metrics that a fit has told, by the path of its run."""


def claims(rows: int = 2000, seed: int = 0) -> pl.DataFrame:
    """How often something happens in a time that is known beforehand."""
    rng = np.random.default_rng(seed)
    a, kind, years = rng.normal(size=rows), rng.choice(["x", "y"], rows), rng.uniform(0.1, 5.0, rows)
    number = rng.poisson(years * np.exp(0.5 * a + 0.4 * (kind == "x")))
    return pl.DataFrame({"a": a, "kind": kind, "years": years, "base": np.log(years), "number": number.astype(float)})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claims")
    for i, part in enumerate(claims().iter_slices(700)):
        part.write_parquet(folder / f"{i}.parquet")
    return folder


def spec_of(data: Path, store: Path, *, derived: bool = True, model: dict[str, Any] | None = None, **task: Any) -> PipelineSpec:
    params = {"objective": "poisson", "rounds": 30, "num_leaves": 7, "early_stopping": None}
    start = "log_years" if derived else "base"
    chosen: dict[str, Any] = {"target": "number", "type": "regression", "init_score": start, **task}
    content: dict[str, Any] = {
        "name": RATES,
        "data": {"source": str(data), "derive": {"log_years": "ln(years)"} if derived else {}},
        "task": chosen,
        "features": {"drop": sorted({"years", "base", *(["log_years"] if derived else [])} - {chosen["init_score"]})},
        "model": model or {"params": params},
        "train": {"workers": 1},
        "store": str(store),
    }
    return checked(PipelineSpec, content)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cluster does, in this process: each unit is read, and one rank trains."""

    def stream(source: Source, reader: Reader, each: Each) -> Iterator[tuple[Unit, Any, Counts]]:
        for unit in source.units:
            counts = Counts()
            yield unit, each(unit, reader.blocks(unit, counts)), counts

    def fit(
        model: Any, train: Any, team: Any, task: Task, shards: Shards, *, folder: Folder, metrics: Folder, **more: Any
    ) -> Fit:
        family = load(MODELS, model.type, "model.type")
        own: dict[str, Any] = {"shards": shards, "start": parent_of(family, more["parent"]), "rendezvous": None, "attempt": "a"}
        made = Recording(rank=0, size=1, threads=1, checkpoint_every=10, **own)
        family.fit(family.Params.model_validate(model.params), task, made)
        (folder / "final").create()
        made.kept[-1][1].save(Path((folder / "final").path))
        LOGGED[metrics.path] = made.logged[-1][1]["valid"]
        return Fit(folder / "final", {"final": made.kept[-1][0]})

    for module in ("prepare", "data.summary", "evaluate", "predict"):
        monkeypatch.setattr(f"pipelines.{module}.stream", stream)
    monkeypatch.setattr("pipelines.prepare.warm_up", lambda: None)
    monkeypatch.setattr("pipelines.train.fit", fit)


def trained(spec: PipelineSpec) -> Run:
    return run(spec, free_slots=lambda: 2.0)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("derived", [True, False], ids=["derived", "as it is"])
def test_every_way_of_asking_gives_the_answers_that_evaluate_measures(data: Path, tmp_path: Path, derived: bool) -> None:
    spec = spec_of(data, tmp_path, derived=derived)
    made = trained(spec)

    artifact = Artifact.load(made.path)
    artifact.check()
    assert [feature.name for feature in artifact.preprocessor.features] == ["a", "kind"]
    needed = "years" if derived else "base"
    assert {column.name: column.nullable for column in artifact.inputs} == {"a": False, "kind": False, needed: False}
    assert needed in artifact.profile["columns"] and len(artifact.examples) == 5

    frame = claims()
    values = artifact.predict(frame)["value"].to_numpy()
    raw = artifact.model.raw(artifact.preprocessor.matrix(frame.select("a", pl.col("kind")).to_arrow()))
    assert values == pytest.approx(frame["years"].to_numpy() * np.exp(raw), rel=1e-12)
    rows = frame.drop("number").to_dicts()
    assert [answer["value"] for answer in artifact.predict_rows(rows)] == values.tolist()
    assert [artifact.predict_rows([row])[0]["value"] for row in rows[:40]] == values[:40].tolist()
    assert artifact.predict(frame.to_pandas())["value"].tolist() == values.tolist()
    predict(f"{made.path}/artifact", str(data), str(tmp_path / "out"))
    written = pl.concat([pl.read_parquet(file) for file in sorted((tmp_path / "out").glob("part-*.parquet"))])
    assert written["value"].to_list() == values.tolist()

    found = evaluate(made, spec, source=str(data)).metrics["data"]
    assert found["poisson_deviance"] == pytest.approx(mean_poisson_deviance(frame["number"], values), rel=1e-9)
    bare = mean_poisson_deviance(frame["number"], np.exp(raw))
    assert found["poisson_deviance"] < 0.9 * bare
    assert made.metrics["valid"] == pytest.approx(LOGGED[made.path], rel=1e-9)


@pytest.mark.usefixtures("here")
def test_contributions_and_base_sum_to_the_raw_score(data: Path, tmp_path: Path) -> None:
    artifact = Artifact.load(trained(spec_of(data, tmp_path)).path)
    frame = claims(50, seed=1)

    found = artifact.predict(frame, explain=True)

    base, parts = found["base"].to_numpy(), found["contributions"].struct.unnest()
    assert parts.columns == ["kind", "a"] or parts.columns == ["a", "kind"]
    assert base + parts.sum_horizontal().to_numpy() == pytest.approx(np.log(found["value"].to_numpy()), rel=1e-9, abs=1e-9)
    assert base - np.log(frame["years"].to_numpy()) == pytest.approx(
        np.full(50, base[0] - math.log(frame["years"][0])), abs=1e-12
    )
    rows = artifact.predict_rows(frame.to_dicts(), explain=True)
    assert [row["base"] for row in rows] == base.tolist()


@pytest.mark.usefixtures("here")
def test_a_request_without_its_score_is_refused(data: Path, tmp_path: Path) -> None:
    own = Artifact.load(trained(spec_of(data, tmp_path, derived=False)).path)
    derived = Artifact.load(trained(spec_of(data, tmp_path)).path)
    row = {"a": 0.5, "kind": "x", "base": 0.1, "years": 2.0}

    for wrong, sentence in (
        ({"base": None}, "row 0: column 'base' is null; expected number"),
        ({"base": float("nan")}, "row 0: 'base' is missing; expected a finite number, the raw score that the row starts from"),
        ({"base": float("inf")}, "row 0: 'base' is infinite; expected a finite number"),
        ({"base": "0.1"}, "row 0: column 'base' is '0.1'; expected number"),
    ):
        with pytest.raises(InputError) as refused:
            own.predict_rows([{**row, **wrong}])
        assert sentence in str(refused.value) and refused.value.column == "base" and refused.value.row == 0
    with pytest.raises(InputError, match="row 0: column 'base' is missing"):
        own.predict_rows([{"a": 0.5, "kind": "x"}])
    with pytest.raises(InputError, match=r"row 1: 'log_years' \(ln\(years\)\) is infinite; expected a finite number"):
        derived.predict_rows([row, {**row, "years": 0.0}])
    with pytest.raises(InputError, match="row 2: 'base' is missing"):
        own.predict(pl.DataFrame([row, row, {**row, "base": None}]))
    with pytest.raises(InputError, match="column 'base' is missing; expected number"):
        own.predict(pl.DataFrame([row]).drop("base"))

    gone, none = tmp_path / "gone.parquet", tmp_path / "none.parquet"
    claims().drop("base").write_parquet(gone)
    claims().with_columns(base=pl.when(pl.col("a") > 1).then(None).otherwise(pl.col("base"))).write_parquet(none)
    location = str(tmp_path / RATES / own.version / "artifact")
    with pytest.raises(DataError, match="gone.parquet: the columns base are missing, which rates was trained on"):
        predict(location, str(gone), str(tmp_path / "out"))
    with pytest.raises(DataError, match="task.init_score: 'base' is missing in .* of 2000 rows of .*none.parquet"):
        predict(location, str(none), str(tmp_path / "out"))
    made = Run.open(Folder.at(str(tmp_path / RATES / own.version)))
    with pytest.raises(DataError, match="task.init_score: 'base' is missing in .* of 2000 rows of .*none.parquet"):
        evaluate(made, spec_of(data, tmp_path, derived=False), source=str(none))
    made = Run.open(Folder.at(str(tmp_path / RATES / derived.version)))
    with pytest.raises(DataError, match="task.init_score: .* has no column 'log_years', which rows of rates start from"):
        evaluate(made, spec_of(data, tmp_path, derived=False), source=str(data))


@pytest.mark.usefixtures("here")
def test_a_run_goes_on_from_one_with_the_same_scores(data: Path, tmp_path: Path) -> None:
    first = trained(spec_of(data, tmp_path))
    more = {"from": first.path, "params": {"objective": "poisson", "rounds": 20, "num_leaves": 7, "early_stopping": None}}

    second = trained(spec_of(data, tmp_path, model=more, init_score=None))

    task = Artifact.load(second.path).task
    assert task.init_score == "log_years" and second.metrics["valid"] == pytest.approx(LOGGED[second.path], rel=1e-9)
    assert second.metrics["valid"] != pytest.approx(first.metrics["valid"], rel=1e-6)
    with pytest.raises(SpecError, match="task.init_score: 'base' is not what .* has .'log_years'., which model.from names"):
        trained(spec_of(data, tmp_path, model=more, init_score="base"))
    bare = trained(spec_of(data, tmp_path, init_score=None))
    with pytest.raises(SpecError, match="task.init_score: 'log_years' is not what .* has"):
        trained(spec_of(data, tmp_path, model={**more, "from": bare.path}))


@pytest.mark.usefixtures("here")
def test_shards_hold_the_scores_and_other_scores_are_other_prepared_data(data: Path, tmp_path: Path) -> None:
    prepared = prepare(spec_of(data, tmp_path))

    tables = [pq.read_table(f"{prepared.shards.folder.path}/{shard.file}") for shard in prepared.shards.splits["train"]]
    assert all(found.column_names == ["f0", "f1", INIT_SCORE, "__target__"] for found in tables)
    of_a = dict(claims().select("a", pl.col("years").log()).iter_rows())
    for found in tables:
        assert found[INIT_SCORE].to_pylist() == pytest.approx([of_a[a] for a in found["f0"].to_pylist()], rel=1e-12)
    assert prepare(spec_of(data, tmp_path)).reused
    keys = {prepare(spec_of(data, tmp_path, init_score=name)).path for name in ("log_years", "base", "years", None)}
    assert len(keys) == 4


@pytest.mark.usefixtures("here")
def test_scores_that_look_like_categories_or_identifiers_stay_numbers(tmp_path: Path) -> None:
    for name, values in (("few", np.arange(2000) % 3), ("each its own", np.arange(2000))):
        file = tmp_path / f"{name}.parquet"
        claims().with_columns(base=pl.Series(values)).write_parquet(file)

        prepared = prepare(spec_of(file, tmp_path, derived=False))

        [column] = [column for column in prepared.schema.columns if column.name == "base"]
        assert (column.type, column.kind, column.nullable) == ("int64", "numeric", False)
        assert [feature.name for feature in prepared.shards.features] == ["a", "kind"] and not prepared.left_out


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("task", "model", "sentence"),
    [
        ({"init_score": "kind"}, None, "task.init_score: 'kind' is a column of type string, expected numbers"),
        ({"init_score": "bsae"}, None, "task.init_score: there is no column 'bsae'; did you mean 'base'"),
        (
            {},
            {"type": "linear"},
            "task.init_score: rows of a 'linear' model start from no scores of their own; set model.type to",
        ),
        ({}, {"type": "mlp"}, "task.init_score: rows of a 'mlp' model start from no scores"),
    ],
)
def test_what_is_no_score_is_one_line(
    data: Path, tmp_path: Path, task: dict[str, Any], model: dict[str, Any] | None, sentence: str
) -> None:
    for ask in (prepare, lambda spec: plan(spec, cluster())):
        with pytest.raises((DataError, SpecError)) as refused:
            ask(spec_of(data, tmp_path, model=model, **task))
        assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.usefixtures("here")
def test_a_missing_score_ends_prepare_with_the_file(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.parquet"
    claims().with_columns(years=pl.when(pl.col("a") > 2).then(0.0).otherwise(pl.col("years"))).write_parquet(file)

    with pytest.raises(DataError, match=r"task.init_score: 'log_years' is infinite in \d+ of 2000 rows of .*some.parquet"):
        prepare(spec_of(file, tmp_path))


def test_a_plan_counts_the_scores(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.source.Source.rows", property(lambda self: 10_000_000))

    def planned(name: str | None) -> Any:
        return plan(spec_of(data, tmp_path, init_score=name), cluster())

    own, none = planned("log_years"), planned(None)
    assert own.stages[-1].memory - none.stages[-1].memory == 8 * 8_000_000 // own.team.workers
    assert own.disk - none.disk == 8 * 10_000_000


@pytest.mark.usefixtures("here")
def test_a_served_model_asks_for_the_score_and_answers_as_a_frame_does(data: Path, tmp_path: Path) -> None:
    artifact = Artifact.load(trained(spec_of(data, tmp_path, derived=False)).path)
    app = build_app(artifact, RATES, tokens={})
    rows = claims(5, seed=2).drop("number", "years").to_dicts()

    def ask(rows: list[dict[str, Any]]) -> httpx.Response:
        async def request() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://heliostat") as client:
                return await client.post(f"/v2/models/{RATES}/predict", json={"rows": rows})

        return asyncio.run(request())

    answered, refused = ask(rows), ask([rows[0], {"a": 0.5, "kind": "x"}])

    assert [answer["value"] for answer in answered.json()["predictions"]] == artifact.predict(pl.DataFrame(rows))[
        "value"
    ].to_list()
    assert refused.status_code == 422
    assert refused.json()["error"] == {
        "message": "row 1: column 'base' is missing; expected number, for it was never missing in the training data",
        "row": 1,
        "column": "base",
        "expected": "number",
    }
