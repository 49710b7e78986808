"""What a replica counts, and the line that each request leaves."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serve.meter import COUNTERS, AccessLog
from serve.routes import ModelApp
from serve.spec import LimitsSpec
from tests.unit.test_routes import BEARER, MODEL, ROW, TOKEN, app_of, ask


def counted(app: ModelApp) -> dict[tuple[str, ...], float]:
    found = list(app.meter.drain())
    for one in found:
        assert set(one.labels) == set(COUNTERS[one.name][1])
        assert one.value > 0
    return {
        (one.name, *(value for key, value in one.labels.items() if key not in ("model", "version"))): one.value for one in found
    }


def test_requests_rows_errors_and_ignored_values_are_counted_once() -> None:
    app = app_of()
    for body in ({"rows": [ROW]}, {"rows": [{**ROW, "more": 1, "and": 2}] * 7}, {"rows": [{}]}, {"rows": []}):
        ask(app, "POST", f"{MODEL}/predict", json=body)
    ask(app, "POST", f"{MODEL}/infer", headers={})

    found = counted(app)

    assert found["heliostat_requests", "predict", "200"] == 3
    assert found["heliostat_requests", "predict", "422"] == 1
    assert found["heliostat_requests", "infer", "401"] == 1
    assert (found["heliostat_errors", "input"], found["heliostat_errors", "token"]) == (1, 1)
    assert (found["heliostat_rows",], found["heliostat_ignored_values",]) == (8, 14)
    assert [found.get(("heliostat_batch_rows_bucket", edge)) for edge in ("1.0", "5.0", "10.0", "+Inf")] == [1, 1, 2, 2]
    assert found["heliostat_latency_seconds_bucket", "+Inf"] == 5
    assert counted(app) == {}


def test_latencies_fall_into_buckets_that_add_up() -> None:
    app = app_of()
    for _ in range(20):
        ask(app, "POST", f"{MODEL}/predict", json={"rows": [ROW]})

    found = counted(app)
    buckets = [value for (name, *_), value in found.items() if name == "heliostat_latency_seconds_bucket"]

    assert buckets == sorted(buckets)
    assert buckets[-1] == 20
    assert 0 < found["heliostat_latency_seconds_sum",] < 20 * 10


def test_each_request_leaves_a_line_without_its_token(tmp_path: Path) -> None:
    app = app_of()
    app.log = AccessLog(tmp_path / "access.jsonl")
    ask(app, "POST", f"{MODEL}/predict", json={"rows": [ROW] * 2}, headers={**BEARER, "x-request-id": "abc\tdef"})
    ask(app, "POST", f"{MODEL}/predict", json={"rows": 1}, headers=BEARER)
    ask(app, "POST", f"{MODEL}/predict", json={"rows": 1}, headers={"Authorization": "Bearer another-secret"})
    app.log.flush()

    text = (tmp_path / "access.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]

    assert [(line["status"], line["rows"], line["token"]) for line in lines] == [
        (200, 2, "one"),
        (422, None, "one"),
        (401, None, None),
    ]
    assert lines[0].items() >= {"id": "abc\tdef", "model": "houses", "method": "POST", "path": f"{MODEL}/predict"}.items()
    assert lines[0]["version"] == "20260101-000000-abcd" and lines[0]["ms"] > 0 and lines[0]["time"] > 0
    assert TOKEN not in text and "another-secret" not in text


def test_a_full_log_starts_anew_and_keeps_some_of_the_old(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.jsonl", most_bytes=100, kept=2)
    for number in range(5):
        for _ in range(3):
            log.write(number=number, filler="x" * 50)
        log.flush()

    found = {path.name: json.loads(path.read_text().splitlines()[0])["number"] for path in tmp_path.iterdir()}

    assert found == {"access.jsonl": 4, "access.jsonl.1": 3, "access.jsonl.2": 2}


# Bodies that take their time


async def slowly(app: ModelApp, chunks: int, go_on: asyncio.Event, size: int = 10) -> int:
    """Send a body of which a part comes only later; return the status."""
    sent: list[dict[str, Any]] = []
    body = b'{"rows": []}' + b" " * (size * chunks)
    pieces = iter([body[: size * (chunks - 1)], body[size * (chunks - 1) :]])

    async def receive() -> dict[str, Any]:
        piece = next(pieces)
        if piece.endswith(body[-1:]) and len(sent) == 0 and piece != body[: size * (chunks - 1)]:
            await go_on.wait()
            return {"type": "http.request", "body": piece, "more_body": False}
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {TOKEN}".encode())]
    scope = {"type": "http", "method": "POST", "path": f"{MODEL}/predict", "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    status: int = sent[0]["status"]
    return status


def test_clients_that_send_slowly_are_not_in_flight() -> None:
    app = app_of(limits=LimitsSpec(in_flight=1))

    async def all_at_once() -> tuple[list[int], int]:
        go_on, ready = asyncio.Event(), asyncio.Event()
        ready.set()
        slow = [asyncio.create_task(slowly(app, 5, go_on)) for _ in range(50)]
        await asyncio.sleep(0.05)
        quick = await slowly(app, 5, ready)
        go_on.set()
        return await asyncio.gather(*slow), quick

    slow, quick = asyncio.run(all_at_once())

    assert quick == 200
    assert set(slow) <= {200, 429} and 200 in slow


def test_bodies_on_their_way_are_bounded_together() -> None:
    app = app_of(limits=LimitsSpec(body_mb=32))  # room for 128 MiB

    async def all_at_once() -> list[int]:
        go_on = asyncio.Event()
        slow = [asyncio.create_task(slowly(app, 2, go_on, size=20 << 20)) for _ in range(8)]
        await asyncio.sleep(0.2)
        go_on.set()
        return await asyncio.gather(*slow)

    statuses = asyncio.run(all_at_once())

    assert set(statuses) >= {429}
    assert ask(app, "POST", f"{MODEL}/predict", json={"rows": [ROW]}).status_code == 200


@pytest.mark.parametrize("status", [401, 404, 405, 408, 413, 415, 422, 429, 500, 504])
def test_each_error_has_a_kind(status: int) -> None:
    from serve.meter import KINDS

    assert KINDS[status]
