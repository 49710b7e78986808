"""The verbs on small tables made here, on one shared Ray."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from pipelines.artifact import Artifact
from pipelines.data.prepared import Range
from pipelines.errors import ArtifactError, DataError, RequirementError, SpecError, UserError
from pipelines.evaluate import evaluate
from pipelines.explain import checked
from pipelines.predict import predict
from pipelines.prepare import prepare
from pipelines.progress import Silent
from pipelines.runs import RunStore
from pipelines.spec import PipelineSpec
from pipelines.train import run, train

pytestmark = pytest.mark.usefixtures("session")


def slots() -> float:
    return 4.0


def people(rows: int = 6000, seed: int = 0) -> pl.DataFrame:
    """A learnable table with every kind of column, missing values and a leak-free target."""
    rng = np.random.default_rng(seed)
    age = rng.normal(40, 12, rows)
    city = rng.choice(["Ulm", "Bern", "Graz", "Łódź", "São Paulo"], rows, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    member = rng.random(rows) < 0.3
    seen = np.datetime64("2024-01-01") + rng.integers(0, 500 * 86_400, rows).astype("timedelta64[s]")
    visits = rng.poisson(3, rows)
    score = 0.05 * (age - 40) + (city == "Bern") + 1.5 * member - 0.2 * visits + rng.normal(0, 0.7, rows)
    return pl.DataFrame(
        {
            "id": np.arange(rows),
            "age": [None if r < 0.08 else float(a) for a, r in zip(age, rng.random(rows), strict=True)],
            "city": [None if r < 0.05 else str(c) for c, r in zip(city, rng.random(rows), strict=True)],
            "member": member,
            "seen": seen.astype("datetime64[us]"),
            "visits": visits,
            "bought": score > 0.5,
        }
    )


def people_files(folder: Path) -> Path:
    """Write them as four files."""
    table = people()
    for i in range(4):
        table[1500 * i : 1500 * (i + 1)].write_parquet(folder / f"{i}.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people_files(tmp_path_factory.mktemp("people"))


def spec_of(data: Path, store: Path, /, **sections: Any) -> PipelineSpec:
    content: dict[str, Any] = {
        "name": "people",
        "data": {"source": str(data), "key": ["id"], "split": {"test": 0.2, "valid": 0.2}},
        "task": {"target": "bought"},
        "model": {"params": {"rounds": 40, "num_leaves": 15}},
        "train": {"workers": 2},
        "store": str(store),
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    return checked(PipelineSpec, content)


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory, session: Any) -> Any:
    store = tmp_path_factory.mktemp("store")
    spec = spec_of(data, store)
    return spec, run(spec, free_slots=slots)


def test_a_run_leaves_what_was_promised(made: Any) -> None:
    _, done = made
    folder = Path(done.path)
    assert sorted(entry.name for entry in folder.iterdir()) == ["artifact", "metrics.jsonl", "run.json", "spec.yaml"]
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "complete" and record["rows"]["train"] + record["rows"]["valid"] + record["rows"]["test"] == 6000
    assert record["metrics"]["test"]["auc"] > 0.8
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "split", "metric", "value"} == set(lines[0]) and lines[-1]["step"] == 40
    forbidden = [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".joblib", ".pt", ".bin")]
    assert forbidden == []


def test_two_processes_had_half_the_rows_each_and_every_row_was_used(made: Any) -> None:
    _, done = made
    workers = done.record["workers"]
    train_rows = done.record["rows"]["train"]
    assert len({worker["pid"] for worker in workers}) == 2 and sum(worker["rows"] for worker in workers) == train_rows
    assert max(worker["rows"] for worker in workers) - min(worker["rows"] for worker in workers) <= 1
    booster = lgb.Booster(model_file=str(Path(done.path) / "artifact/model/model.txt"))
    assert booster.dump_model()["tree_info"][0]["tree_structure"]["internal_count"] == train_rows


def test_metrics_are_scikit_learns(made: Any, data: Path) -> None:
    spec, done = made
    again = evaluate(done, spec)
    assert again.metrics == done.metrics
    frame = pl.read_parquet(data)
    answers = Artifact.load(done.path).predict(frame)
    whole = evaluate(done, spec, source=str(data))
    y, p = frame["bought"].to_numpy(), answers["probability"].to_numpy()
    assert whole.rows == {"data": 6000}
    found = whole.metrics["data"]
    assert found["auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-4)
    assert found["average_precision"] == pytest.approx(average_precision_score(y, p), abs=1e-3)
    assert found["logloss"] == pytest.approx(log_loss(y, p), abs=1e-9)
    assert found["accuracy"] == pytest.approx(((p >= 0.5) == y).mean(), abs=1e-12)


def test_statistics_of_the_pass_are_those_of_pandas(made: Any, data: Path) -> None:
    spec, done = made
    profile = Artifact.load(done.path).profile
    prepared = prepare(spec)
    assert prepared.reused and prepared.rows == done.record["rows"]
    from pipelines.data.split import assign, identity_of_values

    frame = pl.read_parquet(data)
    codes = assign(spec.data.split, identity_of_values([frame.to_arrow()["id"]]), None, frozenset(), None)
    train_frame: pd.DataFrame = frame.to_pandas()[codes == 0]
    age = profile["columns"]["age"]
    assert profile["rows"]["train"] == age["count"] == len(train_frame)
    assert age["missing"] == train_frame["age"].isna().sum()
    assert age["mean"] == pytest.approx(train_frame["age"].mean(), rel=1e-12)
    assert age["std"] == pytest.approx(train_frame["age"].std(ddof=0), rel=1e-9)
    assert age["quantiles"]["0.5"] == train_frame["age"].median()
    counts = train_frame["city"].value_counts()
    assert profile["columns"]["city"]["top"] == sorted(map(list, counts.items()), key=lambda pair: (-pair[1], pair[0]))


def test_each_needed_column_chunk_is_read_once_for_the_statistics(made: Any, data: Path) -> None:
    _, done = made
    columns = ("id", "age", "city", "member", "seen", "visits", "bought")
    chunks = [
        group.column(i)
        for path in sorted(data.glob("*.parquet"))
        for metadata in [pq.read_metadata(path)]
        for g in range(metadata.num_row_groups)
        for group in [metadata.row_group(g)]
        for i in range(metadata.num_columns)
        if group.column(i).path_in_schema in columns
    ]
    assert done.record["read"] == {"rows": 6000, "chunks": len(chunks), "bytes": sum(c.total_compressed_size for c in chunks)}


def test_frames_of_all_kinds_and_rows_get_equal_answers(made: Any, data: Path) -> None:
    artifact = Artifact.load(made[1].path)
    frame = pl.read_parquet(data)[:300]
    expected = artifact.predict(frame)["probability"].to_list()
    assert artifact.predict(frame.to_arrow())["probability"].to_pylist() == expected
    pandas = frame.to_pandas().set_index(np.arange(300) + 7)
    answered = artifact.predict(pandas)
    assert answered["probability"].tolist() == expected and answered.index.tolist() == pandas.index.tolist()
    rows = [{**row, "seen": row["seen"].isoformat()} for row in frame.to_dicts()]
    assert [answer["probability"] for answer in artifact.predict(rows)] == expected
    # Few rows take the row path, one by one.
    assert [artifact.predict([row])[0]["probability"] for row in rows[:50]] == expected[:50]
    assert artifact.predict_rows([]) == []


def test_predict_answers_every_row_in_order(made: Any, data: Path, tmp_path: Path) -> None:
    _, done = made
    result = predict(done.path, str(data), str(tmp_path / "out"), keep=["id", "bought", "city"])
    frame = pl.read_parquet(data)
    manifest = json.loads((tmp_path / "out/_manifest.json").read_text())
    answers = pl.concat([pl.read_parquet(tmp_path / "out" / entry["file"]) for entry in manifest["files"]])
    assert result.rows == manifest["rows"] == len(answers) == 6000
    assert answers.columns == ["id", "bought", "city", "label", "probability"]
    assert answers.select("id", "bought", "city").equals(frame.select("id", "bought", "city"))
    assert answers["probability"].equals(Artifact.load(done.path).predict(frame)["probability"])
    with pytest.raises(DataError, match="has predictions already"):
        predict(done.path, str(data), str(tmp_path / "out"))


def test_predict_explains_each_answer_by_the_columns(made: Any, data: Path, tmp_path: Path) -> None:
    _, done = made
    source = tmp_path / "some.parquet"
    frame = pl.read_parquet(data)[:700]
    frame.write_parquet(source, row_group_size=200)
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    result = predict(done.path, str(source), str(tmp_path / "out"), keep=["id"], explain=True, progress=Noting())

    manifest = json.loads((tmp_path / "out/_manifest.json").read_text())
    answers = pl.concat([pl.read_parquet(tmp_path / "out" / entry["file"]) for entry in manifest["files"]])
    assert result.rows == len(answers) == 700 and answers["id"].equals(frame["id"])
    assert answers.columns == ["id", "label", "probability", "base", "contributions"]
    assert notes[0].startswith("contributions: about 0.") and notes[0].endswith("for 700 rows")
    assert sorted(answers["contributions"].struct.fields) == ["age", "city", "member", "seen", "visits"]
    odds = answers["base"] + answers["contributions"].struct.unnest().sum_horizontal()
    np.testing.assert_allclose(1 / (1 + np.exp(-odds.to_numpy())), answers["probability"], rtol=1e-9)
    artifact = Artifact.load(done.path)
    assert answers.drop("id").equals(artifact.predict(frame, explain=True))
    plain = predict(done.path, str(source), str(tmp_path / "plain"))
    assert pl.read_parquet(f"{plain.path}/*.parquet").equals(answers.select("label", "probability"))
    with pytest.raises(DataError, match="--keep: 'base' is also what --explain calls one of its columns"):
        predict(done.path, str(source), str(tmp_path / "other"), keep=["base"], explain=True)


def test_a_run_knows_what_each_column_is_to_its_model(made: Any) -> None:
    _, done = made
    importance = json.loads((Path(done.path) / "artifact/importance.json").read_text())
    booster = lgb.Booster(model_file=str(Path(done.path) / "artifact/model/model.txt"))
    assert Artifact.load(done.path).importance == importance == done.importance
    assert {column["name"] for column in importance["columns"]} == {"age", "city", "member", "seen", "visits"}
    assert sum(column["split"] for column in importance["columns"]) == booster.feature_importance("split").sum()
    gain = sum(column["gain"] for column in importance["columns"])
    assert gain == pytest.approx(booster.feature_importance("gain").sum(), rel=1e-12)
    assert importance["rows"] == 1000 and importance["columns"][0]["contribution"] > 0


def test_predict_is_absent_when_it_fails_and_goes_on_afterwards(made: Any, data: Path, tmp_path: Path) -> None:
    _, done = made
    source = tmp_path / "source"
    source.mkdir()
    for path in data.glob("*.parquet"):
        (source / path.name).write_bytes(path.read_bytes())
    good = (source / "2.parquet").read_bytes()
    half = len(good) // 2
    (source / "2.parquet").write_bytes(good[:4] + b"\0" * (half - 4) + good[half:])
    with pytest.raises(UserError, match=r"2\.parquet: cannot be read"):
        predict(done.path, str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out/_manifest.json").exists()
    (source / "2.parquet").write_bytes(good)
    assert predict(done.path, str(source), str(tmp_path / "out")).rows == 6000


def test_one_and_two_workers_agree(made: Any, data: Path) -> None:
    spec, done = made
    alone = run(spec.model_copy(update={"train": spec.train.model_copy(update={"workers": 1})}), free_slots=slots)
    assert alone.record["prepared"]["reused"] and len(alone.record["workers"]) == 1
    assert alone.metrics["test"]["auc"] == pytest.approx(done.metrics["test"]["auc"], abs=0.02)


def test_the_same_spec_twice_gives_the_same_bits(made: Any, tmp_path: Path) -> None:
    spec, done = made
    again = train(spec.model_copy(update={"store": str(tmp_path)}), free_slots=slots)
    one, two = (json.loads((Path(r.path) / "artifact/manifest.json").read_text())["files"] for r in (done, again))
    assert one == two


@pytest.mark.parametrize(
    ("sections", "kind", "message"),
    [
        ({"task": {"target": "boght"}}, DataError, "task.target: there is no column 'boght'; did you mean 'bought'"),
        ({"task": {"target": "none"}, "data": {"derive": {"none": "CASE WHEN age < -1e9 THEN true END"}}}, DataError, "no row is left"),
        ({"task": {"target": "one"}, "data": {"derive": {"one": "id >= 0"}}}, DataError, "'one' .*"),
        ({"data": {"where": "age > 1000"}}, DataError, "no row is left of 6000"),
        ({"data": {"where": "aeg > 10"}}, SpecError, "data.where: .*'aeg', which does not exist; did you mean 'age'"),
        ({"features": {"drop": ["agee"]}}, SpecError, "features.drop: there is no column 'agee'; did you mean 'age'"),
        ({"features": {"columns": {"city": ["scale"]}}}, SpecError, "scale"),
        ({"features": {"numeric": ["impote"]}}, SpecError, "'impote' is unknown; did you mean 'impute'"),
        ({"model": {"type": "lightgmb"}}, SpecError, "model.type 'lightgmb' is unknown; did you mean 'lightgbm'"),
        ({"model": {"params": {"num_leafs": 3}}}, SpecError, "model.params.num_leafs is unknown; did you mean 'num_leaves'"),
        ({"model": {"params": {"num_leaves": 1}}}, SpecError, "model.params.num_leaves 1 is wrong: expected an integer >= 2"),
        ({"evaluate": {"require": {"auk": 0.5}}}, SpecError, "evaluate.require: 'auk' is no metric of a binary task; did you mean 'auc'"),
        ({"train": {"workers": 5000}}, DataError, "5000 workers cannot share"),
        ({"data": {"split": {"by": "time", "column": "age"}}}, SpecError, "data.split.column: 'age' is float64; a time split needs timestamps"),
    ],
)  # fmt: skip
def test_what_the_user_got_wrong_is_one_line_and_leaves_no_run(
    data: Path, tmp_path: Path, sections: dict[str, Any], kind: type[UserError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run(spec_of(data, tmp_path, **sections), free_slots=slots)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "people").exists()


def test_a_missed_requirement_is_told_after_the_run_is_complete(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match=r"test auc is 0\.\d+; evaluate.require wants at least 0.999"):
        run(spec_of(data, tmp_path, evaluate={"require": {"auc": 0.999}}, train={"workers": 1}), free_slots=slots)
    assert RunStore.at(str(tmp_path)).find("people@latest").record["status"] == "complete"


def test_runs_are_found_by_their_names(made: Any) -> None:
    spec, done = made
    store = RunStore.at(spec.store)
    assert store.find(done.id).path == store.find(done.path).path == done.path
    latest, best = store.find("people@latest"), store.find("people@best")
    assert latest.id == max(r.id for r in store.list()) and best.metrics["valid"]["auc"] == max(
        r.metrics["valid"]["auc"] for r in store.list()
    )
    with pytest.raises(ArtifactError, match="there is no complete run of 'peple'.*did you mean 'people'"):
        store.find("peple@best")
    with pytest.raises(ArtifactError, match="there is no run '20200101-000000-0000'"):
        store.find("20200101-000000-0000")


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
def test_other_tasks(data: Path, tmp_path: Path, kind: str) -> None:
    target = {"multiclass": "city", "regression": "worth"}[kind]
    derive = {"worth": "age * 2 + visits"} if kind == "regression" else {}
    done = run(
        spec_of(
            data,
            tmp_path,
            task={"target": target},
            data={"source": str(data), "key": ["id"], "derive": derive},
            train={"workers": 2},
        ),
        free_slots=slots,
    )
    assert done.record["task"]["type"] == kind
    answers = Artifact.load(done.path).predict(pl.read_parquet(data)[:5])
    if kind == "regression":
        assert done.metrics["test"]["r2"] > 0.9 and answers.columns == ["value"]
    else:
        assert answers.columns == ["label", "probabilities"]
        assert sum(answers["probabilities"][0].values()) == pytest.approx(1.0)


def test_a_time_split_tests_on_the_latest_rows(data: Path, tmp_path: Path) -> None:
    done = train(
        spec_of(data, tmp_path, data={"split": {"by": "time", "column": "seen", "test": 0.25, "valid": 0.25}}), free_slots=slots
    )
    seen = pl.read_parquet(data)["seen"].sort()
    rows = done.record["rows"]
    assert rows["test"] == pytest.approx(1500, abs=2) and rows["valid"] == pytest.approx(1500, abs=2)
    spec = (Path(done.path) / "spec.yaml").read_text()
    assert str(np.datetime64(seen[4500], "us")) in spec


def test_prepared_data_is_used_again_without_a_read_and_says_why(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    first = prepare(spec_of(data, tmp_path), progress=Noting())
    other = prepare(spec_of(data, tmp_path, data={"split": {"seed": 8}}), progress=Noting())
    monkeypatch.setattr("pipelines.prepare.stream", None)
    monkeypatch.setattr("pipelines.data.summary.stream", None)
    again = prepare(spec_of(data, tmp_path), progress=Noting())

    assert (first.reused, other.reused, again.reused) == (False, False, True) and again.path == first.path != other.path
    assert "nothing is prepared for 'people'" in notes[0]
    assert "data.split.seed was 7, is 8" in notes[1]
    assert notes[2].startswith("cache hit: prepared ")


def test_buckets_keep_equal_values_together_and_lose_no_row(data: Path, tmp_path: Path) -> None:
    plain = prepare(spec_of(data, tmp_path))
    layout = {"bucket_by": ["city"], "buckets": 3, "row_group_rows": 1024, "shard_rows": 1024}
    bucketed = prepare(spec_of(data, tmp_path, prepare=layout))

    def rows(prepared: Any, shards: Any) -> Any:
        parts = [
            np.column_stack([batch.matrix, batch.target])
            for s in shards
            for batch in prepared.shards.read(Range(s.file, 0, s.rows))
        ]
        return np.concatenate(parts)

    whole, bucket = (rows(one, one.shards.splits["train"]) for one in (plain, bucketed))
    assert bucketed.rows == plain.rows
    assert max(shard.rows for shard in bucketed.shards.splits["train"]) <= 1024
    assert sorted(map(bytes, whole)) == sorted(map(bytes, bucket))
    by_bucket: dict[str, set[float]] = {}
    city = [feature.name for feature in bucketed.shards.features].index("city")
    for shard in bucketed.shards.splits["train"]:
        name = shard.file.split("-b")[1][:4]
        by_bucket.setdefault(name, set()).update(rows(bucketed, [shard])[:, city].tolist())
    found = list(by_bucket.values())
    assert all(not (one & two) for i, one in enumerate(found) for two in found[i + 1 :])


def test_no_thread_is_left_of_a_preparation(data: Path, tmp_path: Path) -> None:
    prepare(spec_of(data, tmp_path / "first"))  # which may start some that all later ones use
    before = threading.enumerate()

    prepare(spec_of(data, tmp_path / "second"))

    assert [thread.name for thread in threading.enumerate() if thread not in before] == []


def test_other_features_of_the_same_rows_need_no_second_look(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spec(store: Path, numeric: list[Any]) -> PipelineSpec:
        groups = {"both": {"columns": ["age", "visits"], "steps": ["impute", {"pca": {"components": 2}}]}}
        columns = {"city": [["index"], ["target_mean"]]}
        split = {"by": "time", "column": "seen", "test": 0.2, "valid": 0.2}
        features = {"numeric": numeric, "groups": groups, "columns": columns}
        return spec_of(data, store, features=features, data={"split": split})

    prepare(spec(tmp_path / "used", []))
    fresh = prepare(spec(tmp_path / "fresh", ["impute", "quantile"]))
    monkeypatch.setattr("pipelines.prepare.summarise", None)
    monkeypatch.setattr("pipelines.prepare.time_cuts", None)
    again = prepare(spec(tmp_path / "used", ["impute", "quantile"]))

    for part in ("preprocessor.json", "profile.json", "quality.json", "schema.json", "task.json"):
        assert again.folder.read_bytes(part) == fresh.folder.read_bytes(part), part
    assert (again.cuts, again.read, again.dropped) == (fresh.cuts, fresh.read, fresh.dropped)
    for split, shards in fresh.shards.splits.items():
        for ours, theirs in zip(shards, again.shards.splits[split], strict=True):
            files = [Path(str(prepared.shards.folder)) / shard.file for prepared, shard in ((fresh, ours), (again, theirs))]
            assert files[0].read_bytes() == files[1].read_bytes()
