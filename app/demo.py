"""demo: the flights example end to end, from Parquet to predictions over HTTP beside what really happened."""

from __future__ import annotations

import json
import secrets
import socket
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.opening import free_slots, open_ray, open_spec
from app.output import Output, metric_lines, table
from app.spec import Spec
from pipelines.errors import UserError

ROOT = Path(__file__).parents[1]
SPEC = "examples/flights/flights.yaml"
DATA = "examples/flights/data"
FLIGHTS = 6


def demo(out: Output, *, address: str | None, store: str | None, sets: Sequence[str]) -> None:
    """Train on the flights, predict a month, serve the model, ask it about flights that it has not seen, and shut down."""
    started = time.monotonic()
    spec, december = _example(store, sets)
    from pipelines.predict import predict
    from pipelines.train import run

    say, token, port = out.progress.note, secrets.token_urlsafe(32), _free_port()
    with open_ray(address, serve_port=port) as session:
        from serve.deploy import serve_runs, stop  # reads its environment, which the session has set

        say(f"1. heliostat run {SPEC}")
        made = run(spec, progress=out.progress, free_slots=free_slots)
        for line in metric_lines(made.metrics, made.record["task"]["metric"]):
            say(f"   {line}")
        say("2. heliostat predict: the flights of December")
        answers = predict(
            str(made.artifact),
            december,
            str(made.folder / "predictions"),
            keep=["carrier", "flight"],
            data=spec.data,
            progress=out.progress,
        )
        say(f"   {answers.rows:,} answers in {answers.path}")
        say("3. heliostat serve: the same model over HTTP, asked about flights of December that it has not seen")
        server = serve_runs([(made.name, str(made.artifact), spec.serve)], port=port, tokens={"demo": token})
        url = f"{server.local_url}/v2/models/{made.name}/predict"
        flights = _unseen(spec, december)
        answer = _ask(url, token, [row for row, _ in flights])
        say(f"   POST {url}")
        if not session.private:  # a private Ray takes the model with it
            stop(made.name)
    seconds = time.monotonic() - started
    content = {
        "run": made.id,
        "path": made.path,
        "metrics": made.metrics,
        "predictions": answers.path,
        "served": answer,
        "seconds": seconds,
    }
    lines = _beside(flights, answer["predictions"])
    out.result(content, [*lines, "", f"From Parquet to predictions over HTTP in {seconds:.0f} s.", "", *_next(made.name)])


def _example(store: str | None, sets: Sequence[str]) -> tuple[Spec, str]:
    """The example's Spec, from any current folder, and the file of December."""
    path = ROOT / SPEC
    if not path.exists():
        raise UserError(f"{path} is not there: the demo comes with heliostat's repository; run it from a checkout (make demo)")
    spec, _ = open_spec([str(path)], store, [f"data.source={ROOT / DATA}", *sets])
    return spec, str(ROOT / DATA / "2013-12.parquet")


def _unseen(spec: Spec, path: str) -> list[tuple[dict[str, Any], float]]:
    """Some test rows of one file, as JSON has them, each with its real delay in minutes; evenly spread over the file."""
    import pyarrow.parquet as pq

    from pipelines.data.source import Source
    from pipelines.data.split import SPLITS, assign, identity_of_rows
    from pipelines.profiles import to_plain

    table = pq.read_table(path)
    file = next(file for file in Source.open(spec.data).files if file.path == path)
    split = assign(spec.data.split, identity_of_rows(file.name_hash, 0, len(table)), None, frozenset(), None)
    delays = table["arr_delay"].to_pylist()
    rows = [row for row, code in enumerate(split) if SPLITS[code] == "test" and delays[row] is not None]
    chosen = [rows[(2 * part + 1) * len(rows) // (2 * FLIGHTS)] for part in range(FLIGHTS)]
    known = [name for name in table.column_names if name not in spec.features.drop]
    found = table.select(known).take(chosen).to_pylist()
    return [({k: to_plain(v) for k, v in row.items()}, delays[number]) for row, number in zip(found, chosen, strict=True)]


def _ask(url: str, token: str, rows: list[dict[str, Any]]) -> Any:
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps({"rows": rows}).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def _beside(flights: list[tuple[dict[str, Any], float]], predictions: list[dict[str, Any]]) -> list[str]:
    lines = []
    for (row, delay), prediction in zip(flights, predictions, strict=True):
        happened = f"{delay:.0f} min late" if delay > 0 else f"{-delay:.0f} min early" if delay < 0 else "on time"
        late = "late" if prediction["label"] else "on time"
        flight = f"{row['carrier']} {row['flight']} {row['origin']} to {row['dest']}"
        lines.append([flight, row["time_hour"][:13] + "h", f"{prediction['probability']:.2f}", late, happened])
    return [
        "",
        "Late means more than 15 minutes:",
        *table(["FLIGHT", "LEAVES (UTC)", "P(LATE)", "PREDICTED", "WHAT HAPPENED"], lines),
    ]


def _next(name: str) -> list[str]:
    return [
        "What to try next:",
        f"  heliostat runs show {name}@latest",
        f"  heliostat serve {name}@latest      then open http://127.0.0.1:8000/docs",
        f"  heliostat run {SPEC} --set model.params.num_leaves=31",
        "  heliostat runs                     then: heliostat runs diff RUN RUN",
        "  your own data: copy the Spec, change data.source and task.target",
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
