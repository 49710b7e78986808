"""What fits share is made once on a node, and a fit on shared bins has the bits of one that binned for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.models.boosting import LightGBM
from pipelines.models.boosting_params import LightGBMParams as Params
from pipelines.training.shared import Shared
from tests.unit.test_boosting import BINARY, Recording, worker

SETTINGS: list[dict[str, Any]] = [
    {"rounds": 30, "num_leaves": 7, "segment": 10},
    {"rounds": 30, "num_leaves": 15, "min_data_in_leaf": 3, "learning_rate": 0.3, "segment": 10, "seed": 3},
    {"rounds": 30, "lambda_l2": 9.0, "bagging_freq": 1, "bagging_fraction": 0.5, "scale_pos_weight": 2.0},
    {"rounds": 30, "max_bin": 15},
    {"rounds": 30, "max_category": 2},
    {"rounds": 30, "num_leaves": 7, "segment": 10},
]


def text_of(run: Recording) -> str:
    model = run.kept[-1][1]
    assert isinstance(model, LightGBM)
    return str(model.booster.model_to_string(num_iteration=-1))


def test_shared_bins_change_no_bit_and_each_binning_is_made_once(tmp_path: Path) -> None:
    alone = []
    for i, params in enumerate(SETTINGS):
        run = worker(tmp_path / str(i))
        LightGBM.fit(Params(**params), BINARY, run)
        alone.append(text_of(run))

    shared, found = Shared(tmp_path / "shared"), []
    for params in SETTINGS:
        run = worker(tmp_path / "data")
        run.shared = shared
        LightGBM.fit(Params(**params), BINARY, run)
        found.append(text_of(run))

    assert found == alone
    assert shared.made == 3  # of max_bin 255 and 15, and with the column as numbers


def test_another_process_finds_what_one_has_made(tmp_path: Path) -> None:
    first, second = Shared(tmp_path), Shared(tmp_path)

    def make(folder: Path) -> None:
        (folder / "x").write_text("made")

    def load(folder: Path) -> str:
        return (folder / "x").read_text()

    assert [first.get(["a"], make, load), second.get(["a"], make, load), second.get(["b"], make, load)] == ["made"] * 3
    assert (first.made, second.made) == (1, 1)


def test_what_could_not_be_made_is_made_again(tmp_path: Path) -> None:
    shared = Shared(tmp_path)

    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        shared.get(["a"], fails, lambda folder: None)

    assert shared.get(["a"], lambda folder: None, lambda folder: [file.name for file in folder.iterdir()]) == []
