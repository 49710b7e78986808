"""The cache of prepared data: what has the same address, how a miss is explained, what goes when it is pruned."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.cache import Address, address_of, entries, explain, prune

SOURCE = {"/data/a.parquet": ["a.parquet", 100, 1], "/data/b.parquet": ["b.parquet", 200, 2]}


def address(source: dict[str, Any] | None = None, chains: Any = None, **settings: Any) -> Address:
    data = {"split": {"seed": 7}, **settings.pop("data", {})}
    return address_of(source or SOURCE, chains or {"age": ["impute"]}, {}, data=data, **settings)


def keep(store: Path, place: Address, *, name: str = "flights", made: float | None = None) -> Path:
    """A complete entry as `prepare` leaves it."""
    folder = store / "cache" / place.key
    (folder / "shards-1/train").mkdir(parents=True)
    (folder / "shards-1/train/00000.parquet").write_bytes(b"x" * 1000)
    manifest = {
        "name": name,
        "made": time.time() if made is None else made,
        "address": place.parts,
        "shards": "shards-1",
        "splits": {"train": [["train/00000.parquet", 10]]},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def age(folder: Path, hours: float) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (time.time() - hours * 3600,) * 2)


def test_the_same_files_and_settings_have_the_same_address() -> None:
    assert address().key == address(dict(reversed(SOURCE.items()))).key


@pytest.mark.parametrize(
    "other",
    [
        address({**SOURCE, "/data/a.parquet": ["a.parquet", 100, 9]}),
        address({**SOURCE, "/data/c.parquet": ["c.parquet", 1, 1]}),
        address(chains={"age": ["impute", "scale"]}),
        address(data={"where": "age > 3"}),
    ],
    ids=["changed file", "new file", "chain", "setting"],
)
def test_what_changes_the_content_changes_the_address(other: Address) -> None:
    assert other.key != address().key


def test_the_code_of_a_users_own_step_is_part_of_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_steps.py").write_text("class Own: ...\n")
    before = address(chains={"age": [{"own_steps:Own": {}}]})
    (tmp_path / "own_steps.py").write_text("class Own: ...  # better\n")

    assert address(chains={"age": [{"own_steps:Own": {}}]}).key != before.key


def test_a_hit_says_when_it_was_prepared(tmp_path: Path) -> None:
    keep(tmp_path, address(), made=0)

    assert explain(str(tmp_path), address(), "flights") == "hit: prepared 1970-01-01 00:00 UTC from the same files and settings"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (address({**SOURCE, "/data/b.parquet": ["b.parquet", 200, 3]}), "/data/b.parquet changed"),
        (
            address({"/data/a.parquet": ["a.parquet", 1, 1], "/data/b.parquet": ["b.parquet", 1, 1]}),
            "/data/a.parquet and 1 more changed",
        ),
        (address(data={"split": {"seed": 8}}), "data.split.seed was 7, is 8"),
        (address(chains={"age": ["scale"]}), 'features.age was ["impute"], is ["scale"]'),
    ],
)
def test_a_miss_says_what_changed(tmp_path: Path, now: Address, words: str) -> None:
    keep(tmp_path, address(), made=0)

    assert explain(str(tmp_path), now, "flights") == f"miss: since it was prepared 1970-01-01 00:00 UTC, {words}"


def test_a_miss_names_the_least_difference_to_any_entry_of_the_spec(tmp_path: Path) -> None:
    keep(tmp_path, address(chains={"other": ["scale"]}, data={"where": "x"}))
    keep(tmp_path, address(), made=0)
    keep(tmp_path, address(data={"split": {"seed": 9}}), name="another spec")

    assert "data.split.seed was 7, is 9" in explain(
        str(tmp_path), address(data={"split": {"seed": 9}, "on_error": "null"}), "flights"
    )


def test_another_version_of_the_code_is_named(tmp_path: Path) -> None:
    old = address()
    keep(tmp_path, Address({**old.parts, "code": {**old.parts["code"], "polars": "0.1"}}))

    assert explain(str(tmp_path), old, "flights").endswith("the code or a library became another version")


def test_nothing_prepared_yet(tmp_path: Path) -> None:
    assert explain(str(tmp_path), address(), "flights") == f"miss: nothing is prepared for 'flights' in {tmp_path}/cache"


def test_entries_are_complete_with_their_manifest_alone(tmp_path: Path) -> None:
    keep(tmp_path, address())
    (tmp_path / "cache/half/shards-2/train").mkdir(parents=True)

    found = {entry.key: entry for entry in entries(str(tmp_path))}
    assert found[address().key].rows == {"train": 10} and found[address().key].bytes > 1000
    assert found["half"].manifest is None


def test_prune_takes_what_killed_runs_left_and_nothing_else(tmp_path: Path) -> None:
    complete = keep(tmp_path, address())
    second = complete / "shards-2/train"
    second.mkdir(parents=True)
    (second / "00000.parquet").write_bytes(b"y")
    running, killed = tmp_path / "cache/running", tmp_path / "cache/killed"
    for folder in (running, killed):
        (folder / "shards-3").mkdir(parents=True)
        (folder / "shards-3/0.parquet").write_bytes(b"z" * 50)
    age(killed, 2)
    age(complete, 2)

    gone = prune(str(tmp_path))

    assert sorted((path, size) for path, _, size in gone) == sorted([(str(second.parent), 1), (str(killed), 50)])
    assert (complete / "manifest.json").exists() and running.exists() and not killed.exists() and not second.exists()


def test_prune_takes_old_or_all_entries_where_asked_for(tmp_path: Path) -> None:
    old = keep(tmp_path, address(), made=time.time() - 8 * 86400)
    new = keep(tmp_path, address(chains={"age": ["scale"]}))

    assert [path for path, _, _ in prune(str(tmp_path), days=7)] == [str(old)]
    assert not old.exists()
    assert [path for path, _, _ in prune(str(tmp_path), everything=True)] == [str(new)]
    assert list(entries(str(tmp_path))) == []
