"""A LightGBM that has an accident: what befalls workers, at a chosen moment and once, or each time.

Its `fit` is LightGBM's own; the accident is a real one (a signal, an abort in LightGBM's native code, a port that is taken).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any, ClassVar

import lightgbm as lgb
import pyarrow as pa

from pipelines.errors import DataError
from pipelines.models.boosting import LightGBM, LightGBMParams
from pipelines.spec import Frozen
from pipelines.tasks import Task
from pipelines.training.worker import Worker


class FaultyParams(LightGBMParams):
    accident: str
    """kill | stop | abort | port | leave | refuse | alone (no accident: it trains slowly while it is alone)"""
    at: int = 0
    """The step: at the first evaluation from there on, or before the first round."""
    rank: int = 1
    again: bool = False
    """Whether it happens at each start."""
    marker: str
    """A file that is there since it happened first."""


class Leaving(Exception):  # noqa: N818 - no error: the rank ends as if it had finished
    pass


class Faulty(LightGBM):
    Params: ClassVar[type[Frozen]] = FaultyParams

    @classmethod
    def fit(cls, params: LightGBMParams, task: Task, worker: Worker) -> None:
        assert isinstance(params, FaultyParams)
        own = LightGBMParams(**{name: getattr(params, name) for name in LightGBMParams.model_fields})
        if params.accident == "alone":
            worker.gather = _slow(worker.gather, params) if worker.size == 1 else worker.gather  # type: ignore[method-assign]
        elif worker.rank == params.rank and (params.again or not os.path.exists(params.marker)):
            if params.accident == "port":
                worker.connect = _taken(worker.connect, params)
            elif params.at == 0:
                _happen(params)
            else:
                worker.gather = _at(worker.gather, params)  # type: ignore[method-assign]
        with contextlib.suppress(Leaving):
            super().fit(own, task, worker)


def _at(gather: Any, params: FaultyParams) -> Any:
    def gathering(key: str, state: Any) -> list[Any]:
        if key.startswith("valid-") and int(key.partition("-")[2]) >= params.at:
            _happen(params)
        found: list[Any] = gather(key, state)
        return found

    return gathering


def _slow(gather: Any, params: FaultyParams) -> Any:
    def gathering(key: str, state: Any) -> list[Any]:
        Path(params.marker).touch()
        time.sleep(2)
        found: list[Any] = gather(key, state)
        return found

    return gathering


def _taken(connect: Any, params: FaultyParams) -> Any:
    """A network whose port another process takes just before LightGBM does."""

    def connecting(worker: Worker) -> dict[str, Any]:
        network: dict[str, Any] = connect(worker)
        Path(params.marker).touch()
        stranger = socket.socket()
        stranger.bind(("", network["local_listen_port"]))
        stranger.listen()
        worker.stranger = stranger  # type: ignore[attr-defined]  # as long as this process
        return network

    return connecting


def _happen(params: FaultyParams) -> None:
    Path(params.marker).touch()
    match params.accident:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "abort":
            lgb.Dataset(pa.table({"x": ["a", "b"]})).construct()  # LightGBM aborts the process on columns of text
        case "leave":
            raise Leaving
        case "refuse":
            raise DataError("this data cannot be learned from")
        case _:
            raise AssertionError(params.accident)
