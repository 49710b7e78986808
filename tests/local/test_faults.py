"""No fit hangs: awkward data trains or is refused with the reason, and a worker that is lost is named, explained and replaced."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import polars as pl
import psutil
import pytest
import ray

from pipelines.errors import ClusterError, DataError
from pipelines.explain import checked
from pipelines.progress import Silent
from pipelines.runs import Run
from pipelines.spec import PipelineSpec
from pipelines.train import train
from pipelines.training import trainer, watch
from pipelines.training.rendezvous import Rendezvous
from tests.local.conftest import wait_for
from tests.local.cut_link import HOSTS

# Of the test's own work: the shared Ray starts before its clock.
pytestmark = [pytest.mark.usefixtures("session"), pytest.mark.timeout(60, func_only=True)]
# Workers take 3 s to start, and on a machine with other work half a minute: an accident's limit is counted from the accident.
slow_start = pytest.mark.timeout(180, func_only=True)

ROWS, LIMIT_S = 4000, 60


class Noting(Silent):
    """Keeps what the terminal would show."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.times: list[float] = []

    def note(self, text: str) -> None:
        if text.startswith("train: "):
            self.notes.append(text)
            self.times.append(time.time())


def table(rows: int = ROWS) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, rows))
    score = x - y + rng.normal(0, 0.5, rows)
    return pl.DataFrame({"id": np.arange(rows), "x": x, "y": y, "won": score > 0.4, "place": np.digitize(score, [-0.7, 0.7])})


def write(frame: pl.DataFrame, folder: Path, files: int = 4) -> Path:
    folder.mkdir()
    borders = np.linspace(0, len(frame), files + 1).astype(int)
    for i, (start, stop) in enumerate(itertools.pairwise(borders)):
        frame[int(start) : int(stop)].write_parquet(folder / f"{i:04}.parquet")
    return folder


def spec_of(source: Path, store: Path, /, **sections: Any) -> PipelineSpec:
    content: dict[str, Any] = {
        "name": "faults",
        "data": {"source": str(source), "key": ["id"], "split": {"test": 0.1, "valid": 0.2}},
        "task": {"target": "won"},
        "features": {"drop": ["place"]},
        "model": {"params": {"rounds": 20, "num_leaves": 7, "early_stopping": None, "eval_every": 1}},
        "train": {"workers": 2},
        "store": str(store),
    }
    for name, section in sections.items():
        content[name] = {**content[name], **section}
    return checked(PipelineSpec, content)


def trained(spec: PipelineSpec, noting: Noting | None = None) -> Run:
    return train(spec, progress=noting or Noting(), free_slots=lambda: 4.0)


def booster_of(done: Run) -> lgb.Booster:
    return lgb.Booster(model_file=str(Path(done.path) / "artifact/model/model.txt"))


def root_count(done: Run) -> int:
    """The rows that the first tree was grown from, over all ranks."""
    root = booster_of(done).dump_model()["tree_info"][0]["tree_structure"]
    return int(root.get("internal_count", root.get("leaf_count", 0)))


def last_valid(done: Run, metric: str) -> float:
    lines = [json.loads(line) for line in (Path(done.path) / "metrics.jsonl").read_text().splitlines()]
    return float([line["value"] for line in lines if line["metric"] == metric and line["split"] == "valid"][-1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(table(), tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def plain(data: Path, store: Path, session: Any) -> Run:
    """Nothing goes wrong; leaves prepared data, so that an accident's clock runs for the training alone."""
    return trained(spec_of(data, store))


def test_data_sorted_by_its_label_gives_the_trees_of_shuffled_data(plain: Run, tmp_path: Path) -> None:
    """The first of two ranks has no row of the second class, and the other way round."""
    source = write(table().sort("won"), tmp_path / "sorted")

    done = trained(spec_of(source, tmp_path / "store"))

    assert root_count(done) == done.record["rows"]["train"] == plain.record["rows"]["train"]
    assert last_valid(done, "auc") == pytest.approx(last_valid(plain, "auc"), abs=1e-6)


def test_ranks_that_lack_classes_train_all_of_them(tmp_path: Path) -> None:
    """Three classes in order: neither of two ranks has rows of all."""
    kinds = {"place": "categorical"}
    sections = {"task": {"target": "place"}, "features": {"drop": ["won"]}, "data": {"kinds": kinds}}

    done = trained(spec_of(write(table().sort("place"), tmp_path / "sorted"), tmp_path / "store", **sections))

    assert done.record["task"]["type"] == "multiclass" and root_count(done) == done.record["rows"]["train"]
    assert last_valid(done, "accuracy") > 0.7


def test_a_rank_without_a_valid_row_trains(tmp_path: Path) -> None:
    days = pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2025, 12, 31), "1d", eager=True)
    split = {"by": "time", "column": "at", "test": 0.01, "valid": 0.0025}

    done = trained(
        spec_of(write(table(400).with_columns(at=days[:400]), tmp_path / "data"), tmp_path / "store", data={"split": split})
    )

    assert done.record["rows"]["valid"] == 1 and root_count(done) == done.record["rows"]["train"]


@pytest.mark.parametrize("files", [1, 1000])
def test_one_file_and_a_thousand_tiny_files_train(tmp_path: Path, files: int) -> None:
    done = trained(spec_of(write(table(), tmp_path / "data", files), tmp_path / "store"))

    assert root_count(done) == done.record["rows"]["train"] and sum(done.record["rows"].values()) == ROWS


def test_as_many_workers_as_rows_train_and_more_are_refused(tmp_path: Path) -> None:
    source = write(table(2).with_columns(won=pl.Series([True, False])), tmp_path / "data", 1)
    split = {"test": 0.0, "valid": 0.0}

    with pytest.raises(DataError, match=r"^train\.workers: 3 workers cannot share 2 train rows; lower train\.workers$"):
        trained(spec_of(source, tmp_path / "store", data={"split": split}, train={"workers": 3}))
    done = trained(spec_of(source, tmp_path / "store", data={"split": split}))

    assert [worker["rows"] for worker in done.record["workers"]] == [1, 1]


def accident(
    data: Path, store: Path, what: str, marker: Path, /, at: int = 0, again: bool = False, **settings: Any
) -> PipelineSpec:
    """The Spec of `plain` on a LightGBM whose rank 1 has an accident, before the first round or at round `at`."""
    params = {"rounds": 20, "num_leaves": 7, "early_stopping": None, "eval_every": 1}
    faults = {"accident": what, "at": at, "marker": str(marker), "again": again}
    return spec_of(
        data,
        store,
        model={"type": "tests.local.faulty:Faulty", "params": params | faults},
        train={"workers": 2, "checkpoint_every": 5, **settings},
    )


WHO = r"train: rank 1 \(pid (\d+) on \S+\) "


@slow_start
@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("kill", r"was killed from outside \(SIGKILL\)"),
        ("stop", r"has not answered for 20 s: it is stopped, or its node cannot be reached; it was killed"),
        ("abort", r"was ended by its own native code \(SIGABRT\); LightGBM said: Unsupported Arrow type: string"),
        ("port", r"could not listen for its peers on port \d+, which another process took first; each start takes other ports"),
    ],
)
def test_a_lost_worker_ends_the_run_with_one_line_that_names_it(
    plain: Run, data: Path, store: Path, tmp_path: Path, what: str, sentence: str
) -> None:
    """With the default of how long a worker may be silent."""
    noting = Noting()

    with pytest.raises(ClusterError) as caught:
        trained(accident(data, store, what, tmp_path / "happened", max_failures=0), noting)
    ended = time.time()

    found = re.fullmatch(WHO + sentence + r"; the workers were lost, and train\.max_failures is 0", str(caught.value))
    assert found, caught.value
    assert noting.notes == [str(caught.value).split("; the workers were")[0]]
    assert ended - (tmp_path / "happened").stat().st_mtime < LIMIT_S
    wait_for(lambda: not alive(int(found[1])), "the lost worker's end", 20)
    wait_for(lambda: not train_workers(), "the survivor's end", 20)


@slow_start
@pytest.mark.parametrize(
    ("what", "at", "from_step", "sentence"),
    [
        ("kill", 12, 10, "was killed from outside"),
        ("stop", 12, 10, "has not answered for 5 s"),
        ("port", 0, 0, "could not listen for its peers on port"),
    ],
)
def test_the_workers_start_again_and_end_with_the_whole_model(
    plain: Run, data: Path, store: Path, tmp_path: Path, what: str, at: int, from_step: int, sentence: str
) -> None:
    noting = Noting()

    done = trained(accident(data, store, what, tmp_path / "happened", at=at, worker_timeout_s=5), noting)

    [failure] = done.record["failures"]
    first, second = done.record["workers"][:2], done.record["workers"][2:]
    [lost] = [worker for worker in first if worker["rank"] == 1]
    assert failure.startswith(f"rank 1 (pid {lost['pid']} on {lost['host']}) {sentence}")
    again = "; the workers start again from the last checkpoint (failure 1 of at most 3)"
    assert noting.notes == [f"train: {failure}{again}"]
    assert noting.times[0] - (tmp_path / "happened").stat().st_mtime < LIMIT_S
    assert [worker["from_step"] for worker in second] == [from_step] * 2
    assert booster_of(done).current_iteration() == 20 and root_count(done) == done.record["rows"]["train"]


def test_a_worker_that_refuses_the_data_ends_the_fit_at_once(data: Path, store: Path, tmp_path: Path) -> None:
    noting = Noting()

    with pytest.raises(DataError, match=r"^this data cannot be learned from"):
        trained(accident(data, store, "refuse", tmp_path / "happened", again=True, max_failures=3), noting)

    assert noting.notes == []  # nobody was lost, and nobody was started again
    wait_for(lambda: not train_workers(), "the other worker's end", 20)


def test_ranks_that_wait_for_one_another_are_told_so() -> None:
    rendezvous = Rendezvous.remote()  # type: ignore[attr-defined]
    assert ray.get([rendezvous.gather.remote("a", "first", rank, 2, rank) for rank in (0, 1)]) == [[0, 1], [0, 1]]

    for waiting in [rendezvous.gather.remote("a", key, rank, 2, None) for rank, key in enumerate(("valid-5", "network-2"))]:
        with pytest.raises(RuntimeError, match="wait for one another for ever: rank 0 under 'valid-5', rank 1 under 'network-2'"):
            ray.get(waiting)

    ray.kill(rendezvous)


@slow_start
def test_a_rank_that_waits_for_one_that_has_ended_is_killed(
    plain: Run, data: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LightGBM spins for ever on a connection that its peer has closed."""
    monkeypatch.setattr(watch, "LEFT_S", 3.0)

    with pytest.raises(
        ClusterError, match=r"rank 0 \(pid \d+ on \S+\) waited 3 s for rank 1, which has ended; the workers were lost"
    ):
        trained(accident(data, store, "leave", tmp_path / "happened", at=12, max_failures=0))


@slow_start
@pytest.mark.parametrize(
    ("process", "sentence"),
    [
        ("LeanController", "Ray Train's controller has not answered for 5 s"),
        ("Rendezvous", "the process in which the workers meet has not answered for 5 s"),
    ],
)
def test_whoever_watches_is_watched(
    plain: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: str, sentence: str
) -> None:
    for name, seconds in (("CONTROLLER_S", 5.0), ("MEET_S", 5.0), ("END_S", 3.0)):
        monkeypatch.setattr(trainer, name, seconds)
    stopped: list[psutil.Process] = []

    class Stopping(Noting):
        def stage(self, name: str, total: int | None = None, *, unit: str = "rows") -> Any:
            if name == "train":  # the first rounds are reported
                stopped.extend(processes(process))
                for one in stopped:
                    one.suspend()
            return super().stage(name, total, unit=unit)

    try:
        with pytest.raises(ClusterError) as caught:
            trained(
                spec_of(data, tmp_path, model={"params": {"rounds": 100_000, "early_stopping": None, "eval_every": 1}}),
                Stopping(),
            )
    finally:
        for one in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()

    assert str(caught.value) == f"train: {sentence}; run the command again" and len(stopped) == 1
    wait_for(lambda: not train_workers(), "the workers' end", 60)


@slow_start
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="only root can make networks and cut them")
def test_a_cut_link_between_ranks_ends_both_and_not_after_an_hour(tmp_path: Path) -> None:
    """Two machines, made of network namespaces: each rank notices by itself, for no packet tells it."""
    with two_machines() as (names, cut), contextlib.ExitStack() as files:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "tests.local.cut_link", str(rank)],
                stdout=files.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for rank, (name, log) in enumerate(zip(names, logs, strict=True))
        ]
        try:
            wait_for(lambda: all("connected" in log.read_text() for log in logs), "both ranks to train", 90)
            time.sleep(1)  # into the rounds
            cut()
            assert [rank.wait(LIMIT_S) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        for log in logs:
            assert re.search(
                r"^Socket \w+ error, (Network is unreachable|No route to host|Connection timed out)", log.read_text(), re.M
            )


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[list[str], Callable[[], None]]]:
    """Two network namespaces with a cable between them, and what cuts it."""
    names = [f"hs-{os.getpid()}-{end}" for end in ("a", "b")]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, host in zip(names, HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{host}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names, lambda: ip("-n", names[0], "link", "set", "cable", "down")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def train_workers() -> list[int]:
    return [process.pid for process in processes("RayTrainWorker")]


def processes(name: str) -> list[psutil.Process]:
    """Those of this test process's Ray that run such an actor."""
    ours = psutil.Process().children(recursive=True)
    return [process for process in ours if alive(process.pid) and f"ray::{name}" in " ".join(process.cmdline())]


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
