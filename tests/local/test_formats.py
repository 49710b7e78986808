"""One table through every format is one and the same prepared data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipelines.errors import DataError
from pipelines.prepare import Prepared, prepare
from tests.local.test_pipeline import people, spec_of
from tests.unit.test_formats import write

pytestmark = pytest.mark.usefixtures("session")


def test_every_format_gives_the_same_preprocessor_bits_and_shards(tmp_path: Path) -> None:
    def prepared(suffix: str) -> Prepared:
        folder = tmp_path / suffix / "data"
        folder.mkdir(parents=True)
        for i in range(2):
            write(people()[3000 * i : 3000 * (i + 1)], folder / f"part-{i}.{suffix}")
        return prepare(spec_of(folder, tmp_path / suffix / "store", data={"key": []}))

    def content(found: Prepared) -> dict[str, Any]:
        shards = {
            split: [pl.read_parquet(f"{found.shards.folder}/{shard[0]}") for shard in shards]
            for split, shards in found.shards.splits.items()
        }
        return {split: pl.concat(frames) for split, frames in shards.items()}

    expected = prepared("parquet")
    for suffix in ("csv.gz", "jsonl", "orc", "arrow"):
        found = prepared(suffix)
        assert found.schema == expected.schema and found.rows == expected.rows, suffix
        assert found.preprocessor.to_json() == expected.preprocessor.to_json(), suffix
        for split, rows in content(found).items():
            assert rows.equals(content(expected)[split]), (suffix, split)


def test_a_folder_of_partitions_is_pruned_and_a_late_change_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for city, part in people().partition_by("city", as_dict=True, include_key=False).items():
        folder = tmp_path / "data" / f"city={city[0] or '__HIVE_DEFAULT_PARTITION__'}"
        folder.mkdir(parents=True)
        write(part, folder / "part-0.parquet")
    pruned = prepare(spec_of(tmp_path / "data", tmp_path / "store", data={"where": "city = 'Bern'"}))
    assert sum(pruned.rows.values()) == people().filter(pl.col("city") == "Bern").height

    import pipelines.prepare

    def changing(*args: Any) -> Any:
        (tmp_path / "data" / "city=Ulm" / "part-0.parquet").touch()
        return write_shards(*args)

    write_shards = pipelines.prepare._write
    monkeypatch.setattr(pipelines.prepare, "_write", changing)
    with pytest.raises(DataError, match=r"city=Ulm/part-0\.parquet: changed while it was read: .* run again") as caught:
        prepare(spec_of(tmp_path / "data", tmp_path / "store"))
    assert "\n" not in str(caught.value)
