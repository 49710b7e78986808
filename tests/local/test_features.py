"""Every transform of one column through the verbs, on one shared Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipelines.artifact import Artifact
from pipelines.explain import checked
from pipelines.prepare import prepare
from pipelines.spec import PipelineSpec
from pipelines.train import run

pytestmark = pytest.mark.usefixtures("session")

CHAINS: dict[str, Any] = {
    "income": [
        ["impute", {"scale": {"method": "robust"}}],
        [{"impute": {"strategy": "most_frequent", "indicator": True}}, {"clip": {"quantiles": [0.05, None]}}, "log1p"],
        [{"quantile": {"output": "normal"}}, {"scale": {"method": "maxabs"}}],
        [{"bin": {"bins": 5}}],
    ],
    "city": [[{"index": {"max_categories": 2}}], ["frequency", "scale"], ["onehot"], [{"hash": {"buckets": 8}}]],
    "seen": [[{"cyclic": {"zone": "Europe/Berlin"}}], [{"parts": {"zone": "Asia/Tokyo"}}], [{"since": {"reference": "first"}}]],
    "note": [["length"], [{"ngrams": {"characters": [3, 4], "buckets": 32}}]],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table whose target hangs on the words of a text."""
    folder = tmp_path_factory.mktemp("notes")
    rng = np.random.default_rng(4)
    words = np.array(["fine", "great", "slow", "broken", *(f"w{i}" for i in range(40))])
    notes = [" ".join(words[rng.integers(0, len(words), 12)]) for _ in range(4000)]
    score = [sum(note.count(good) for good in ("fine", "great")) - note.count("slow") - note.count("broken") for note in notes]
    table = pl.DataFrame(
        {
            "income": [None if rng.random() < 0.1 else float(x) for x in rng.lognormal(3, 1, 4000).round(1)],
            "city": [None if rng.random() < 0.1 else str(x) for x in rng.choice(["Ulm", "Bern", "Graz", "Łódź"], 4000)],
            "seen": np.datetime64("2024-01-01", "us")
            + rng.integers(0, 400 * 86_400, 4000).astype("timedelta64[s]").astype("timedelta64[us]"),
            "note": [None if rng.random() < 0.02 else note for note in notes],
            "liked": np.array(score) + rng.normal(0, 0.3, 4000) > 0,
        }
    )
    for i in range(2):
        table[2000 * i : 2000 * (i + 1)].write_parquet(folder / f"{i}.parquet")
    return folder


def spec_of(data: Path, store: Path, columns: dict[str, Any]) -> PipelineSpec:
    content: dict[str, Any] = {
        "name": "notes",
        "data": {"source": str(data), "kinds": {"note": "text"}, "split": {"test": 0.2, "valid": 0.2}},
        "task": {"target": "liked"},
        "features": {"columns": columns},
        "model": {"params": {"rounds": 60, "num_leaves": 7}},
        "train": {"workers": 1},
        "store": str(store),
    }
    return checked(PipelineSpec, content)


def test_text_is_learned_from_without_a_word_in_the_spec(data: Path, tmp_path: Path) -> None:
    done = run(spec_of(data, tmp_path, {}), free_slots=lambda: 4.0)

    assert done.metrics["test"]["auc"] > 0.9
    frame = pl.read_parquet(data)[:50]
    artifact = Artifact.load(done.path)
    rows = artifact.predict(frame.to_dicts())
    assert [row["probability"] for row in rows] == artifact.predict(frame)["probability"].to_list()


def test_shards_hold_the_bits_of_each_row(data: Path, tmp_path: Path) -> None:
    prepared = prepare(spec_of(data, tmp_path, CHAINS))

    shards, found = prepared.shards, []
    for split in shards.rows:
        found += [batch.matrix for part in shards.ranges(split, 0, 1) for batch in shards.read(part)]
    frame = pl.read_parquet(data).with_columns(pl.col("seen").cast(pl.Datetime("us")).cast(pl.Int64))
    expected = np.array([prepared.preprocessor.transform_row(row) for row in frame.to_dicts()])
    # Splits stand one behind the other in the shards: compare as sets of rows, by their bits.
    assert sorted(map(bytes, np.nan_to_num(np.concatenate(found), nan=-7.0))) == sorted(
        map(bytes, np.nan_to_num(expected, nan=-7.0))
    )
