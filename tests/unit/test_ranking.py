"""Ranking without Ray: NDCG is scikit-learn's and LightGBM's, and no query is divided, between ranks or anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from pipelines.data.prepared import GROUP, Shard, Shards, to_table
from pipelines.data.queries import by_query, sort_bucket, together
from pipelines.data.writing import Encodings, Placed, ShardWriter
from pipelines.errors import DataError, SpecError
from pipelines.explain import checked
from pipelines.features.transform import Feature
from pipelines.metrics import Metrics, sizes_of
from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_params import LightGBMParams as Params
from pipelines.schema import Column
from pipelines.spec import PipelineSpec, PrepareSpec, TaskSpec
from pipelines.storage import Folder
from pipelines.tasks import Task
from pipelines.training.worker import Start
from tests.unit.test_boosting import Recording, saved

Array = np.ndarray[Any, np.dtype[Any]]

RANKING = Task(type="ranking", target="y", target_type="int64", group="q")
TOPS = (10, 5, 3, 1)


def reference(target: Array, raw: Array, sizes: Array, weight: Array) -> dict[str, float]:
    ends = np.cumsum(sizes)
    found: dict[str, float] = {}
    for top in TOPS:
        each, of_query = [], []
        for start, end in zip(ends - sizes, ends, strict=True):
            gain = 2.0 ** target[start:end] - 1
            one = end - start == 1 or gain.max() == 0  # scikit-learn wants two rows, and one that is relevant
            each.append(1.0 if one else ndcg_score(gain[None], raw[None, start:end], k=top))
            of_query.append(weight[start:end].mean())
        found[f"ndcg@{top}"] = float(np.average(each, weights=of_query))
    return found


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 20), digits=st.sampled_from([0, 1, 12]), parts=st.integers(1, 3))
def test_ndcg_is_scikit_learns_however_queries_are_shared(seed: int, queries: int, digits: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 30, queries)
    rows = sizes.sum()
    target, raw = rng.integers(0, 5, rows).astype(float), np.round(rng.normal(size=rows), digits)
    target[: sizes[0]] = 0  # a query without a relevant row
    weight = rng.uniform(0.1, 3, rows)
    states = []
    for some in np.array_split(np.arange(queries), parts):
        part = slice(sizes[: some[0]].sum(), sizes[: some[-1] + 1].sum()) if len(some) else slice(0)
        metrics = Metrics(RANKING)
        metrics.add(target[part], raw[part], weight[part], sizes[some])
        states.append(metrics.state())

    found = Metrics.merge(RANKING, states).result()

    assert list(found) == RANKING.metric_names == ["ndcg@10", "ndcg@5", "ndcg@3", "ndcg@1"]
    assert found == pytest.approx(reference(target, raw, sizes, weight), rel=1e-9)


def test_no_query_and_no_number_are_none() -> None:
    empty = Metrics(RANKING)
    empty.add(np.empty(0), np.empty(0), None, np.empty(0, np.int64))
    wrong = Metrics(RANKING)
    wrong.add(np.array([1.0, 0.0]), np.array([np.nan, 1.0]), None, np.array([2]))

    for metrics in (empty, wrong, Metrics(RANKING)):
        assert metrics.result() == dict.fromkeys(RANKING.metric_names)


def table(queries: int, seed: int) -> tuple[Array, Array, Array]:
    """Rows, labels and the number of each row's query; what is relevant can be learned."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 40, queries)
    matrix = rng.normal(size=(sizes.sum(), 3))
    y = np.clip(np.round(matrix[:, 0] + 0.5 * rng.normal(size=len(matrix)) + 1), 0, 4)
    return matrix, y, np.repeat(rng.permutation(10**6)[:queries], sizes).astype(np.uint64)


def worker(folder: Path, queries: int = 200, cuts: tuple[int, ...] = ()) -> Recording:
    """One rank; `cuts` are rows at which another shard begins."""
    splits: dict[str, list[Shard]] = {"test": []}
    for seed, (split, number) in enumerate({"train": queries, "valid": 60}.items()):
        matrix, y, group = table(number, seed)
        (folder / split).mkdir(parents=True)
        splits[split] = []
        for i, rows in enumerate(np.split(np.arange(len(y)), cuts if split == "train" else [])):
            part = to_table([*matrix[rows].T, y[rows]], {GROUP: group[rows]})
            pq.write_table(part, folder / split / f"{i}.parquet", row_group_size=100)
            splits[split].append(Shard(f"{split}/{i}.parquet", len(rows)))
        if split == "train":
            pq.write_table(to_table([*matrix.T, y], {GROUP: group}), folder / "sample.parquet")
    shards = Shards(Folder.at(str(folder)), [Feature(name=name, kind="numeric") for name in "abc"], splits, grouped=True)
    return Recording(rank=0, size=1, threads=1, checkpoint_every=50, shards=shards, start=None, rendezvous=None, attempt="a")


@pytest.mark.parametrize("objective", ["lambdarank", "rank_xendcg"])
def test_a_ranking_fit_is_that_of_plain_lightgbm(tmp_path: Path, objective: str) -> None:
    run = worker(tmp_path)
    chosen = {"objective": objective} if objective != "lambdarank" else {}  # the default
    LightGBM.fit(Params.model_validate({"rounds": 20, "early_stopping": None, "num_leaves": 15, **chosen}), RANKING, run)

    matrix, y, group = table(200, 0)
    settings_ = {
        "objective": objective, "num_leaves": 15, "learning_rate": 0.1, "min_sum_hessian_in_leaf": 1.0, "lambda_l2": 1.0, "seed": 7,
        "verbosity": -1, "deterministic": True, "force_row_wise": True, "num_threads": 1, "feature_pre_filter": False,
    }  # fmt: skip
    plain = lgb.train(settings_, lgb.Dataset(matrix, y, group=sizes_of(group)), 20)
    model = run.kept[-1][1]
    assert np.array_equal(model.predict(matrix), plain.predict(matrix))

    valid, valid_y, valid_group = table(60, 1)
    expected = reference(valid_y, plain.predict(valid), sizes_of(valid_group), np.ones(len(valid_y)))
    assert run.logged[-1][1]["valid"] == pytest.approx(expected, rel=1e-9)
    assert expected["ndcg@10"] > 0.8
    # LightGBM's own figure takes rows of equal scores as they stand.
    own = lgb.train(
        {**settings_, "metric": "ndcg", "eval_at": [1, 3, 5, 10], "boost_from_average": False}, lgb.Dataset(matrix, y, group=sizes_of(group)), 20,
        valid_sets=[lgb.Dataset(valid, valid_y, group=sizes_of(valid_group))], valid_names=["v"],
    )  # fmt: skip
    assert {name: own.best_score["v"][name] for name in expected} == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("objective", ["lambdarank", "rank_xendcg"])
def test_a_ranking_that_goes_on_from_a_checkpoint_ends_with_the_bits_of_one_never_killed(tmp_path: Path, objective: str) -> None:
    params = Params.model_validate(
        {
            "objective": objective, "rounds": 15, "early_stopping": None, "segment": 5, "bagging_fraction": 0.7, "bagging_freq": 1,
        }
    )  # fmt: skip
    whole = worker(tmp_path / "data")
    whole.checkpoint_every = 5
    LightGBM.fit(params, RANKING, whole)
    text = whole.kept[-1][1].booster.model_to_string()

    for step, model, state in whole.kept[:-1]:
        saved(tmp_path / str(step), model)
        again = Recording(
            **{**vars(whole), "kept": [], "logged": [], "start": Start(LightGBM.load(tmp_path / str(step)), step, state)}
        )
        LightGBM.fit(params, RANKING, again)
        assert again.kept[-1][1].booster.model_to_string() == text
    assert [step for step, _, _ in whole.kept] == [5, 10, 15]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("cuts", [(), (501, 502, 1500, 1503)])
def test_ranks_have_every_row_once_and_whole_queries(tmp_path: Path, size: int, cuts: tuple[int, ...]) -> None:
    shards = worker(tmp_path, cuts=cuts).shards
    _, _, group = table(200, 0)

    parts = [
        np.concatenate([batch.group for found in shards.ranges("train", rank, size) for batch in shards.read(found)])
        for rank in range(size)
    ]

    assert np.array_equal(np.concatenate(parts), group)
    assert sum(len(np.unique(part)) for part in parts) == 200, "a query is in one rank alone"
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * 40


def test_a_rank_may_have_no_query_and_then_training_is_refused(tmp_path: Path) -> None:
    shards = worker(tmp_path, queries=3).shards

    assert [bool(shards.ranges("train", rank, 8)) for rank in range(8)].count(True) == 3
    with pytest.raises(DataError, match="train.workers: a query is never split, and the train rows have too few for 8; lower"):
        Params().check(RANKING, shards, 8)


def test_a_query_that_is_too_large_for_lightgbm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.models.boosting_params.MAX_QUERY_ROWS", 30)
    shards = worker(tmp_path, cuts=(501, 502, 1500)).shards
    assert shards.largest_query("train") == np.unique(table(200, 0)[2], return_counts=True)[1].max() == 39
    with pytest.raises(DataError, match="task.group: a query of 'q' has 39 rows, and LightGBM ranks at most 30; drop some with"):
        Params().check(RANKING, shards, 1)


@given(seed=st.integers(0, 2**32 - 1))
def test_rows_that_lie_apart_come_together_in_their_order(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("apart")
    (path / "train").mkdir()
    folder, rng = Folder.at(str(path)), np.random.default_rng(seed)
    group = rng.integers(0, 20, 300).astype(np.uint64)
    rows = to_table([np.arange(300.0), np.zeros(300)], {GROUP: group})
    placed = []
    for i, part in enumerate((rows[:200], rows[200:])):
        writer = ShardWriter(folder, f"train/{i}", rows.schema, PrepareSpec(), Encodings([], {}))
        writer.add(part)
        writer.close()
        placed.append(Placed(0, writer.shards, part[GROUP].to_numpy()))
    assert not together(placed)

    found = sort_bucket(
        folder, "train/q", [shard.file for each in placed for shard in each.shards], PrepareSpec(), Encodings([], {})
    )

    [table_] = [pq.read_table(path / shard.file) for shard in found]
    groups = table_[GROUP].to_numpy()
    assert together([Placed(0, found, groups)])
    for query in np.unique(group):
        assert table_["f0"].to_numpy()[groups == query].tolist() == np.flatnonzero(group == query).tolist()


def test_a_query_may_go_on_in_the_next_shard() -> None:
    runs = [np.array(queries, np.uint64) for queries in ([1, 2], [2, 3], [4, 3])]

    assert together([Placed(0, [], run) for run in runs[:2]])
    assert not together([Placed(0, [], run) for run in runs])
    assert by_query(PrepareSpec(), "q", 10**9, 20).buckets == 1024 and by_query(PrepareSpec(), "q", 1000, 20).bucket_by == ["q"]


def spec(**sections: Any) -> PipelineSpec:
    content = {"name": "r", "data": {"source": "x"}, "task": {"type": "ranking", "target": "y", "group": "q"}, **sections}
    return checked(PipelineSpec, content)


def test_a_ranking_is_split_by_its_queries() -> None:
    split = spec(data={"source": "x", "split": {"test": 0.3, "seed": 3}}).data.split

    assert (split.by, split.column, split.test, split.seed) == ("group", "q", 0.3, 3)
    assert spec().data.split.column == "q"
    assert checked(PipelineSpec, spec().model_dump()) == spec()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"data": {"source": "x", "split": {"by": "time", "column": "t"}}},
            r"data.split.by: time \(t\) may split a query; take by",
        ),
        ({"data": {"source": "x", "split": {"by": "group", "column": "u"}}}, r"data.split.by: group \(u\) may split a query"),
        ({"prepare": {"bucket_by": ["u"]}}, r"prepare.bucket_by: \['u'\] may split a query; expected \[q\]"),
        ({"task": {"type": "ranking", "target": "y"}}, "task: type: ranking needs 'group'"),
        ({"task": {"target": "y", "group": "q"}}, "task: group goes with type: ranking"),
        ({"task": {"type": "ranking", "target": "y", "group": "y"}}, "task: group: 'y' is the target; name another column"),
    ],
)
def test_what_would_split_a_query_is_one_line(sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence) as refused:
        spec(**sections)
    assert "\n" not in str(refused.value)


def fit(values: list[Any], type_: Any = "int64") -> Task:
    wanted = TaskSpec(target="y", type="ranking", group="q")
    return Task.fit(wanted, Column(name="y", type=type_, kind="numeric"), dict.fromkeys(values, 5), 100)


def test_labels_are_integers_of_0_and_above() -> None:
    task = fit([0, 2, 4])

    assert (task.type, task.group, task.classes) == ("ranking", "q", None)
    assert task.answers(np.array([0.5])) == [{"value": 0.5}]
    for values, type_, found in (([0, -1], "int64", "-1"), ([0.0, 1.5], "float64", "1.5"), (["a", "b"], "string", "string")):
        with pytest.raises(DataError, match=f"task.target: 'y' is {found}, but a ranking learns from labels that are integers"):
            fit(values, type_)
    with pytest.raises(DataError, match="task.target: 'y' is -3.0, but a ranking"):
        task.encode(to_table([np.array([1.0, -3.0])])["__target__"].cast("int64"))


def test_params_of_a_ranking_are_checked(tmp_path: Path) -> None:
    shards = worker(tmp_path).shards
    binary = Task(type="binary", target="y", target_type="bool", classes=[False, True])

    assert Params(objective="rank_xendcg", lambdarank_truncation_level=13).check(RANKING, shards, 2) == RANKING
    with pytest.raises(SpecError, match="model.params.objective: 'l2' goes with a regression task, but this is a ranking"):
        Params(objective="l2").check(RANKING, shards, 1)
    with pytest.raises(
        SpecError, match="lambdarank_truncation_level goes with a ranking task, but this is a binary; take it out"
    ):
        Params(lambdarank_truncation_level=13).check(binary, shards, 1)
    (tmp_path / "high").mkdir()
    pq.write_table(
        to_table([np.arange(4.0), np.array([0.0, 31, 1, 2])], {GROUP: np.zeros(4, np.uint64)}), tmp_path / "high/a.parquet"
    )
    high = Shards(Folder.at(str(tmp_path)), [], {"train": [Shard("high/a.parquet", 4)]}, grouped=True)
    with pytest.raises(DataError, match="task.target: 'y' goes up to 31, but LightGBM has gains for labels from 0 to 30"):
        Params().check(RANKING, high, 1)
