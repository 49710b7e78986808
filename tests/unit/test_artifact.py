"""An Artifact made without Ray: saved equals loaded, rows equal blocks, and what is damaged is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.artifact import ANSWERS_FILE, Artifact, keep_answers, write_manifest
from pipelines.errors import ArtifactError, InputError
from pipelines.expressions import Derivation
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.stats import NumberStatistics, StringStatistics
from pipelines.models.boosting import LightGBM
from pipelines.schema import Column, Schema, cast, numbers, texts
from pipelines.spec import FeaturesSpec
from pipelines.storage import Folder
from pipelines.tasks import Task

COLUMNS = [
    Column(name="age", type="float64", kind="numeric", nullable=True),
    Column(name="rooms", type="int64", kind="numeric", nullable=False),
    Column(name="city", type="string", kind="categorical", nullable=True),
    Column(name="month", type="int64", kind="categorical", nullable=True),
    Column(name="garden", type="bool", kind="boolean", nullable=True),
    Column(name="sold", type="timestamp", kind="datetime", nullable=True),
]
CHAINS: Any = {
    "age": [{"impute": {"strategy": "median", "indicator": True}}, "scale"],
    "rooms": [],
    "city": ["index"],
    "month": ["onehot"],
    "garden": ["impute"],
    "sold": [["parts"], ["since"]],
}


def houses(rows: int = 500) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    return pl.DataFrame(
        {
            "age": [None if i % 9 == 0 else float(a) for i, a in enumerate(rng.normal(30, 9, rows))],
            "rooms": rng.integers(1, 9, rows),
            "city": [None if i % 11 == 0 else str(c) for i, c in enumerate(rng.choice(["Ulm", "Bern", "Łódź"], rows))],
            "month": rng.integers(1, 13, rows),
            "garden": [None if i % 13 == 0 else bool(g) for i, g in enumerate(rng.random(rows) < 0.5)],
            "sold": (np.datetime64("2020-02-28") + rng.integers(0, 10**8, rows).astype("timedelta64[s]")).astype(
                "datetime64[us]"
            ),
        }
    )


def statistics_of(column: Column, frame: pl.DataFrame) -> Any:
    values = cast(frame.to_arrow()[column.name], column.type)
    if column.kind in ("categorical", "text"):
        return StringStatistics.of(texts(values))
    return NumberStatistics.of(numbers(values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete artifact of a small model."""
    frame = houses()
    schema = Schema(columns=COLUMNS, derive={"per_room": "age / rooms"})
    derived = Derivation(expressions=schema.derive)
    columns = derived.extend(schema).columns
    table = derived.apply(frame.to_arrow().cast(_canonical(frame)))
    whole = pl.from_arrow(table)
    assert isinstance(whole, pl.DataFrame)
    chains = Preprocessor.plan(columns, FeaturesSpec(columns=CHAINS), {"numeric": []}, set())
    preprocessor = Preprocessor.fit(columns, chains, {column.name: statistics_of(column, whole) for column in columns})
    y = (np.nan_to_num(frame["age"].to_numpy()) + 3 * frame["rooms"].to_numpy() > 45).astype(float)
    booster = lgb.train(
        {"objective": "binary", "verbosity": -1, "num_threads": 1}, lgb.Dataset(preprocessor.matrix(table), y), 20
    )
    path = tmp_path_factory.mktemp("artifact")
    target = Folder.at(str(path))
    target.write_json("schema.json", schema.model_dump())
    target.write_json("preprocessor.json", preprocessor.to_json())
    target.write_json("task.json", Task(type="binary", target="y", target_type="bool", classes=[False, True]).model_dump())
    target.write_json("profile.json", {"rows": {}, "columns": {}, "target": {}, "examples": plain(frame[:3])})
    (path / "model").mkdir()
    LightGBM(booster).save(path / "model")
    keep_answers(target, name="houses", run="20260101-000000-abcd", model="lightgbm")
    write_manifest(target, name="houses", run="20260101-000000-abcd", model="lightgbm")
    return path


def _canonical(frame: pl.DataFrame) -> Any:
    import pyarrow as pa

    from pipelines.schema import ARROW

    return pa.schema([(column.name, ARROW[column.type]) for column in COLUMNS])


def plain(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return [{**row, "sold": row["sold"] and row["sold"].isoformat()} for row in frame.to_dicts()]


def test_every_way_of_asking_gives_the_same_bits(folder: Path) -> None:
    artifact = Artifact.load(str(folder))
    frame = houses()
    block = artifact.predict(frame)["probability"].to_list()
    assert [answer["probability"] for answer in artifact.predict_rows(plain(frame))] == block
    assert [artifact.predict_rows([row])[0]["probability"] for row in plain(frame[:40])] == block[:40]
    assert artifact.predict(frame.to_pandas())["probability"].tolist() == block


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "age": st.none() | st.floats(allow_nan=False),
                "rooms": st.integers(-(2**53), 2**53),
                "city": st.none() | st.text(max_size=5) | st.just("Bern"),
                "month": st.none() | st.integers(0, 14),
                "garden": st.none() | st.booleans(),
                "sold": st.none() | st.datetimes().map(lambda when: when.isoformat()),
            }
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_row_alone_is_answered_as_in_a_block(folder: Path, rows: list[dict[str, Any]]) -> None:
    artifact = Artifact.load(str(folder))
    without_derive = artifact.preprocessor
    contract = artifact._contract
    checked = contract.check_rows(rows)
    table = artifact._derivation.apply(contract.to_table(checked))
    block = without_derive.matrix(table)
    single = np.array(
        [
            without_derive.transform_row({**row, "per_room": d})
            for row, d in zip(checked, table["per_room"].to_pylist(), strict=True)
        ]
    )
    assert block.tobytes() == single.astype(np.float64).tobytes()


def test_a_wrong_row_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="row 1: column 'rooms' is 'two'; expected integer"):
        Artifact.load(str(folder)).predict_rows([{"rooms": 2}, {"rooms": "two"}])


def test_one_changed_byte_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("model/model.txt", "preprocessor.json", "schema.json"):
        copy = tmp_path / name.replace("/", "-")
        Folder.at(str(folder)).copy_to(Folder.at(str(copy)))
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(bytes(content))
        with pytest.raises(ArtifactError, match=rf"is damaged: {name} is not what was written"):
            Artifact.load(str(copy))


def test_incomplete_newer_and_absent_artifacts_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        Artifact.load(str(tmp_path / "none"))
    copy = Folder.at(str(tmp_path / "copy"))
    Folder.at(str(folder)).copy_to(copy)
    manifest = copy.read_json("manifest.json")
    copy.write_json("manifest.json", {**manifest, "format": 99})
    with pytest.raises(ArtifactError, match="has format 99; this heliostat reads up to 1"):
        Artifact.load(copy)
    copy.write_json("manifest.json", manifest)
    (tmp_path / "copy/task.json").unlink()
    with pytest.raises(ArtifactError, match="not complete: task.json is missing"):
        Artifact.load(copy)
    (tmp_path / "copy/manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="manifest.json cannot be read"):
        Artifact.load(copy)
    (tmp_path / "copy/manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"is not complete: it has no manifest.json"):
        Artifact.load(copy)


def test_the_manifest_names_every_file(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == files


def test_an_artifact_knows_what_it_answered_where_it_was_made(folder: Path, tmp_path: Path) -> None:
    kept = Folder.at(str(folder)).read_json(ANSWERS_FILE)
    artifact = Artifact.load(str(folder))
    artifact.check()
    assert kept == artifact.predict_rows(plain(houses()[:3]))

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    other = [*kept[:2], {**kept[2], "probability": kept[2]["probability"] * 1.001}]
    Folder.at(str(moved)).write_json(ANSWERS_FILE, other)
    with pytest.raises(ArtifactError, match=r"answers\.json is not what was written"):
        Artifact.load(str(moved))
    write_manifest(Folder.at(str(moved)), name="houses", run="20260101-000000-abcd", model="lightgbm")

    with pytest.raises(ArtifactError, match="answers its own example row 2 with"):
        Artifact.load(str(moved)).check()


def test_an_artifact_that_cannot_predict_its_examples_fails_its_check(folder: Path) -> None:
    artifact = Artifact.load(str(folder), model=False)

    with pytest.raises(ArtifactError, match="cannot predict its own example rows"):
        artifact.check()
