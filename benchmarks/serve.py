"""One raw row a request, over HTTP: heliostat beside the same model in a hand-written FastAPI server, and in stock Ray Serve.

    python -m benchmarks.serve --run RUN [--seconds 5] [--repeat 1]

RUN is the folder of a finished run, of flights for the README's numbers. Each side serves its Artifact on 127.0.0.1 with one
replica and is asked by wrk over 1, 8 and 32 connections, and over 8 with 1,000 rows a request; any answer but 200 ends the
benchmark. The hand-written server calls the same `Artifact.predict_rows`, without checks of limits, tokens or health: it is the
limit. Stock Ray Serve runs that very application as Serve's own documentation has it, without HAProxy and throughput mode.
Prints one table and writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, alternate, median, save

SIDES = ("hand-written", "heliostat", "ray-serve")
CONNECTIONS = (1, 8, 32)
MANY = 1000
TOKEN = "the-token-of-the-benchmark"
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3}


def main() -> None:
    """Measure the sides in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the folder of a finished run")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        json.dump(side(options.side, str(options.run), options.seconds), sys.stdout)
        return
    if shutil.which("wrk") is None:
        sys.exit("this benchmark needs wrk (Debian's package of that name)")
    report(alternate("benchmarks.serve", options.sides, options.repeat, run=options.run, seconds=options.seconds))


def side(name: str, run: str, seconds: float) -> dict[str, Any]:
    """Serve in one of the ways and ask it; requests per second and milliseconds, by number of connections."""
    from pipelines.artifact import Artifact

    artifact = Artifact.load(run, model=False)
    ways = {"hand-written": hand_written, "heliostat": heliostat, "ray-serve": ray_serve}
    started = time.monotonic()
    with ways[name](run, artifact.name) as url:
        ready = time.monotonic() - started
        one, many = ({"rows": artifact.examples[:1] * number} for number in (1, MANY))
        asked = {str(connections): wrk(url, one, connections, seconds) for connections in CONNECTIONS}
        return {"ready_s": ready, "one": asked, "many": wrk(url, many, 8, seconds)}


def wrk(url: str, body: dict[str, Any], connections: int, seconds: float) -> dict[str, float]:
    """Ask over so many connections that are kept open, after a warm-up of a fifth of the time."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            f"wrk.method = 'POST'\nwrk.body = [==[{json.dumps(body)}]==]\n"
            f"wrk.headers['Authorization'] = 'Bearer {TOKEN}'\nwrk.headers['Content-Type'] = 'application/json'\n"
        )
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", "--latency", "--timeout", "10s", "-s", script.name]
        subprocess.run([*command, f"-d{max(1, round(seconds / 5))}s", url], capture_output=True, check=True)
        out = subprocess.run([*command, f"-d{round(seconds)}s", url], capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        raise RuntimeError(f"not every request of {url} was answered with 200:\n{out}")
    latency = {share: _ms(out, share) for share in ("50%", "99%")}
    rate = re.search(r"Requests/sec:\s+([0-9.]+)", out)
    assert rate is not None, out
    return {"rps": float(rate[1]), "p50_ms": latency["50%"], "p99_ms": latency["99%"]}


def _ms(out: str, share: str) -> float:
    found = re.search(rf"^\s+{share}\s+([0-9.]+)(us|ms|s|m)\s*$", out, re.MULTILINE)
    assert found is not None, out
    return float(found[1]) * UNITS[found[2]]


@contextlib.contextmanager
def hand_written(run: str, name: str) -> Iterator[str]:
    port = free_port()
    code = f"import uvicorn; from benchmarks.serve import application; uvicorn.run(application({run!r}), port={port}"
    # One thread for LightGBM, as Ray gives a replica of half a slot; more of them wait for each other on a busy machine.
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}, log_level='warning', access_log=False)"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        _until_ready(f"http://127.0.0.1:{port}/ready")
        yield f"http://127.0.0.1:{port}/predict"
    finally:
        process.terminate()
        process.wait()


def application(run: str) -> Any:
    """The hand-written server: what one would write who needs nothing but the answer."""
    import orjson
    from fastapi import FastAPI, Request, Response

    from pipelines.artifact import Artifact

    artifact, app = Artifact.load(run), FastAPI()

    async def predict(request: Request) -> Response:
        rows = orjson.loads(await request.body())["rows"]
        return Response(orjson.dumps({"predictions": artifact.predict_rows(rows)}), media_type="application/json")

    async def ready() -> bool:
        return True

    predict.__annotations__ = {"request": Request, "return": Response}  # of this function's imports, where FastAPI cannot look
    app.add_api_route("/predict", predict, methods=["POST"])
    app.add_api_route("/ready", ready)
    return app


@contextlib.contextmanager
def heliostat(run: str, name: str) -> Iterator[str]:
    from app.session import open_session

    port = free_port()
    with open_session("local", slots=2, serve_port=port):
        from serve.deploy import serve_runs
        from serve.spec import ServeSpec

        spec = ServeSpec.model_validate({"replicas": {"min": 1, "max": 1}})
        server = serve_runs([(name, run, spec)], port=port, tokens={"bench": TOKEN})
        yield f"{server.url}/v2/models/{name}/predict"


@contextlib.contextmanager
def ray_serve(run: str, name: str) -> Iterator[str]:
    os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
    from app.session import open_session

    port = free_port()
    with open_session("local", slots=2, serve_port=port):
        import ray.serve
        from ray.serve.config import HTTPOptions

        ray.serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        ray.serve.run(stock(run), name="stock", route_prefix="/")
        yield f"http://127.0.0.1:{port}/predict"


def stock(run: str) -> Any:
    import ray.serve

    @ray.serve.deployment(ray_actor_options={"num_cpus": 0.5})
    @ray.serve.ingress(lambda: application(run))
    class Stock:
        pass

    return Stock.bind()


def report(found: dict[str, list[Measured]]) -> None:
    """Print requests per second with their p50 and p99, and keep all numbers."""
    table = Table(title="one raw row a request", title_justify="left")
    table.add_column("connections")
    for name in found:
        table.add_column(name, justify="right")
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for name, runs in found.items():
        asked = [{**one.result["one"], f"8, {MANY} rows": one.result["many"]} for one in runs]
        medians[name] = {key: {fact: median([one[key][fact] for one in asked]) for fact in asked[0][key]} for key in asked[0]}
    for key in next(iter(medians.values())):
        cells = [medians[name][key] for name in found]
        table.add_row(key, *(f"{one['rps']:,.0f}/s  p50 {one['p50_ms']:.2f}  p99 {one['p99_ms']:.1f} ms" for one in cells))
    table.add_row("ready, s", *(f"{median([one.result['ready_s'] for one in runs]):.1f}" for runs in found.values()))
    table.add_row("peak memory (PSS), MB", *(f"{median([one.peak_mb for one in runs]):,.0f}" for runs in found.values()))
    Console(width=140).print(table)
    save("serve", {"sides": medians, "peak_mb": {name: median([one.peak_mb for one in runs]) for name, runs in found.items()}})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    main()
