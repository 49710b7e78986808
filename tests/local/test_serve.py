"""Models served by Ray Serve: what they answer over HTTP, who may ask, how replicas follow the load, how one is exchanged."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import lightgbm as lgb
import numpy as np
import pyarrow as pa
import pytest

from pipelines.artifact import ANSWERS_FILE, Artifact, keep_answers, write_manifest
from pipelines.errors import ArtifactError, ClusterError, SpecError
from pipelines.features.preprocessor import Preprocessor
from pipelines.features.stats import NumberStatistics, StringStatistics
from pipelines.models.boosting import LightGBM
from pipelines.schema import Column, Schema, numbers
from pipelines.spec import FeaturesSpec
from pipelines.storage import Folder
from pipelines.tasks import Task
from serve.arrow import MEDIA
from serve.spec import ServeSpec
from tests.local.conftest import wait_for

pytestmark = pytest.mark.usefixtures("session")

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-enough-length"
TOKENS = {"one": TOKEN}
BEARER = {"Authorization": f"Bearer {TOKEN}"}
ROW: dict[str, Any] = {"rooms": 4, "age": 31.5, "city": "Ulm"}
COLUMNS = [
    Column(name="rooms", type="int64", kind="numeric", nullable=False),
    Column(name="age", type="float64", kind="numeric"),
    Column(name="city", type="string", kind="categorical", nullable=False),
]
HOUSES = ServeSpec.model_validate(
    {  # in seconds, for a short test; what settles in seconds settles in minutes too
        "replicas": {"min": 1, "max": 2, "look_back_s": 2, "up_after_s": 2, "down_after_s": 12},
        "limits": {"body_mb": 8},
    }
)
OPEN = ServeSpec.model_validate({"replicas": {"min": 1, "max": 1}, "auth": "none"})


def make_artifact(path: Path, name: str, run: str, seed: int = 0) -> Path:
    """A small trained model, without the cluster."""
    rng = np.random.default_rng(seed)
    table = pa.table(
        {
            "rooms": rng.integers(1, 9, 500),
            "age": rng.normal(30, 9, 500),
            "city": pa.array(rng.choice(["Ulm", "Bern", "Graz"], 500).tolist(), pa.large_string()),
        }
    )
    statistics: Any = {name: NumberStatistics.of(numbers(table[name])) for name in ("rooms", "age")}
    statistics["city"] = StringStatistics.of(table["city"].combine_chunks())
    chains = Preprocessor.plan(COLUMNS, FeaturesSpec.model_validate({"categorical": ["index"]}), {"numeric": []}, set())
    preprocessor = Preprocessor.fit(COLUMNS, chains, statistics)
    target = (table["rooms"].to_numpy() * 5 + rng.normal(0, 5, 500) > 25).astype(float)
    settings = {"objective": "binary", "verbosity": -1, "num_threads": 1}
    booster = lgb.train(settings, lgb.Dataset(preprocessor.matrix(table), target), 20)
    folder = Folder.at(str(path))
    folder.write_json("schema.json", Schema(columns=COLUMNS).model_dump())
    folder.write_json("preprocessor.json", preprocessor.to_json())
    folder.write_json("task.json", Task(type="binary", target="y", target_type="bool", classes=[False, True]).model_dump())
    columns = {name: statistics[name].profile() for name in statistics}
    folder.write_json("profile.json", {"rows": {}, "columns": columns, "target": {}, "examples": [ROW]})
    (path / "model").mkdir()
    LightGBM(booster).save(path / "model")
    keep_answers(folder, name=name, run=run, model="lightgbm")
    write_manifest(folder, name=name, run=run, model="lightgbm")
    return path


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("artifacts")
    return {
        run: make_artifact(base / run, run.partition("-")[0], run, seed)
        for seed, run in enumerate(["houses-1", "houses-2", "flats-1"])
    }


@pytest.fixture(scope="module")
def server(session: Any, artifacts: dict[str, Path]) -> Iterator[Any]:
    """Two models at once on one server."""
    from serve import deploy

    models = [("houses", str(artifacts["houses-1"]), HOUSES), ("flats", str(artifacts["flats-1"]), OPEN)]
    yield deploy.serve_runs(models, port=free_port(), tokens=TOKENS)
    deploy.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def predict(server: Any, body: Any, *, model: str = "houses", headers: dict[str, str] | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = BEARER if headers is None else headers
    return httpx.post(f"{server.url}/v2/models/{model}/predict", headers=headers, content=content, timeout=30)


def get(server: Any, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.get(server.url + path, headers=BEARER if headers is None else headers, timeout=30)


def test_two_models_answer_what_their_artifacts_answer(server: Any, artifacts: dict[str, Path]) -> None:
    rows = [{**ROW, "rooms": rooms, "age": age} for rooms in range(1, 9) for age in (None, 20.25, 40)]

    for model, run, headers in [("houses", "houses-1", BEARER), ("flats", "flats-1", {})]:
        for asked in (rows[:1], rows * 20):
            response = predict(server, {"rows": asked}, model=model, headers=headers)
            assert response.status_code == 200
            predictions = Artifact.load(str(artifacts[run])).predict_rows(asked)
            assert response.json() == {"model": model, "version": run, "predictions": predictions}


def test_it_says_through_what_it_answers_and_where(server: Any) -> None:
    from serve.deploy import status

    assert server.url.startswith("http://127.0.0.1:")
    assert server.haproxy is (os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1")
    found = status()
    assert found.server == server
    assert [(model.name, model.version, model.ready) for model in found.models] == [
        ("flats", "flats-1", True),
        ("houses", "houses-1", True),
    ]


def test_the_protocols_paths_answer(server: Any) -> None:
    assert get(server, "/v2/health/live", {}).json() == {"live": True}
    assert get(server, "/v2/health/ready", {}).json() == {"ready": True}
    assert {model["name"] for model in get(server, "/v2/models").json()["models"]} == {"houses", "flats"}
    assert get(server, "/v2/models/houses").json()["versions"] == ["houses-1"]
    assert get(server, "/v2/models/houses/ready").json() == {"name": "houses", "ready": True}
    assert "swagger" in get(server, "/docs").text
    assert "houses.Row" in get(server, "/openapi.json").json()["components"]["schemas"]
    inputs = [
        {"name": "rooms", "datatype": "INT64", "shape": [1], "data": [4]},
        {"name": "city", "datatype": "BYTES", "shape": [1], "data": ["Ulm"]},
    ]
    response = httpx.post(f"{server.url}/v2/models/houses/infer", headers=BEARER, json={"inputs": inputs})
    expected = predict(server, {"rows": [{"rooms": 4, "city": "Ulm"}]}).json()["predictions"][0]
    assert [output["data"] for output in response.json()["outputs"]] == [[expected["label"]], [expected["probability"]]]


def test_only_the_token_opens_what_asks_for_one(server: Any) -> None:
    body = {"rows": [ROW]}

    for headers in ({}, {"Authorization": "Bearer wrong"}):
        response = predict(server, body, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["message"]
        assert get(server, "/v2/models/houses", headers).status_code == 401
        assert [model["name"] for model in get(server, "/v2/models", headers).json()["models"]] == ["flats"]
    assert predict(server, body, headers=BEARER).status_code == 200
    assert predict(server, body, model="flats", headers={}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "facts"),
    [
        ({"rows": [ROW, {"rooms": 4}]}, 422, {"row": 1, "column": "city", "expected": "string"}),
        ({"rows": [{**ROW, "rooms": "4"}]}, 422, {"row": 0, "column": "rooms", "found": "4", "expected": "integer"}),
        ({"rows": [{"rooms": 4, "city": "Ulm"}] * 100_000}, 413, {"found": 100_000, "expected": "at most 10000 rows"}),
        (b"no json", 422, {"expected": "a JSON object"}),
        (b" " * 50_000_000, 413, {"found": 50_000_000, "expected": "at most 8388608 bytes"}),
    ],
    ids=["a missing column", "a wrong type", "100,000 rows", "no JSON", "a body of 50 MB"],
)
def test_wrong_input_is_the_clients_fault(server: Any, body: Any, status: int, facts: dict[str, Any]) -> None:
    response = predict(server, body)

    assert response.status_code == status
    error = response.json()["error"]
    assert error.pop("message")
    assert error == facts


def test_a_large_body_of_unknown_size_is_refused(server: Any) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v2/models/houses/predict", (b" " * 1_000_000 for _ in range(12)), BEARER, encode_chunked=True)

    response = connection.getresponse()

    assert response.status == 413
    connection.close()


def test_what_cannot_be_served_is_said_and_leaves_the_rest_alone(server: Any, artifacts: dict[str, Path], tmp_path: Path) -> None:
    from serve.deploy import serve_runs, status, stop

    path = str(artifacts["houses-1"])
    greedy = ServeSpec.model_validate({"cpus": 64})
    with pytest.raises(ClusterError, match=r"'greedy' did not get ready.*needs 64 CPU slots.*serve\.cpus"):
        serve_runs([("greedy", path, greedy)], tokens=TOKENS, wait_s=2)
    with pytest.raises(ArtifactError, match="does not exist"):
        serve_runs([("missing", str(tmp_path / "nothing"), HOUSES)], tokens=TOKENS)
    with pytest.raises(SpecError, match="there is no token"):
        serve_runs([("cottages", path, HOUSES)])  # what runs keeps its tokens
    with pytest.raises(ClusterError, match="did you mean 'houses'"):
        stop("house")

    wait_for(lambda: [model.name for model in status().models] == ["flats", "houses"], "the refused model to go")
    assert predict(server, {"rows": [ROW]}).status_code == 200


def test_a_new_version_takes_over_without_a_lost_request(server: Any, artifacts: dict[str, Path]) -> None:
    from serve.deploy import serve_runs

    ready: list[int] = []

    def swap() -> None:
        time.sleep(0.5)
        with ThreadPoolExecutor(1) as pool:
            swapping = pool.submit(serve_runs, [("houses", str(artifacts["houses-2"]), HOUSES)], tokens=TOKENS)
            while not swapping.done():
                ready.append(answering_replicas())
            swapping.result()
        time.sleep(0.5)

    answers = drive(server, connections=4, during=swap)

    assert set(answers) == {(200, "houses-1"), (200, "houses-2")}
    assert min(ready) >= 1
    assert predict(server, {"rows": [ROW]}).json()["version"] == "houses-2"


def test_an_artifact_that_fails_its_check_never_takes_traffic(server: Any, artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Neither where the command sees it, nor where only a replica does; new replicas start with what runs."""
    from serve.deploy import _tell, serve_runs
    from serve.directory import configs

    broken = tmp_path / "houses-3"
    shutil.copytree(artifacts["houses-1"], broken)
    Folder.at(str(broken)).write_json(ANSWERS_FILE, [{"label": True, "probability": 0.123}])
    write_manifest(Folder.at(str(broken)), name="houses", run="houses-3", model="lightgbm")
    before = configs()["houses"]

    def swap() -> None:
        with pytest.raises(ArtifactError, match="answers its own example row 0 with"):
            serve_runs([("houses", str(broken), HOUSES)])
        assert configs()["houses"] == before
        told = {"houses": before.followed_by(str(broken), HOUSES, before.tokens)}
        with pytest.raises(ClusterError, match="'houses' goes on with houses-2: .* answers its own example row 0 with"):
            _tell(told, configs(), deadline=time.monotonic() + 60)

    assert set(drive(server, connections=2, during=swap)) == {(200, "houses-2")}
    wait_for(lambda: configs()["houses"] == before, "what ran to be put back")


def test_the_version_before_is_put_back_without_a_lost_request(server: Any) -> None:
    from serve.deploy import roll_back

    def back() -> None:
        assert roll_back("houses") == ("houses-2", "houses-1")
        time.sleep(0.5)

    assert set(drive(server, connections=4, during=back)) == {(200, "houses-2"), (200, "houses-1")}
    assert predict(server, {"rows": [ROW]}).headers["x-model-version"] == "houses-1"
    with pytest.raises(ClusterError, match="'houses' has no earlier version to go back to"):
        roll_back("houses")
    with pytest.raises(ClusterError, match="did you mean 'houses'"):
        roll_back("house")


def test_an_artifact_that_breaks_its_clients_is_refused_unless_forced(
    server: Any, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    from serve.deploy import roll_back, serve_runs

    strict = tmp_path / "houses-4"
    shutil.copytree(artifacts["houses-1"], strict)
    folder = Folder.at(str(strict))
    columns = [column.model_copy(update={"nullable": False}) for column in COLUMNS]
    folder.write_json("schema.json", Schema(columns=columns).model_dump())
    write_manifest(folder, name="houses", run="houses-4", model="lightgbm")

    with pytest.raises(ArtifactError, match="houses-4 breaks what clients of houses-1 rely on; --force") as refused:
        serve_runs([("houses", str(strict), HOUSES)])
    assert refused.value.__notes__ == ["  column 'age' is required and was optional"]
    assert predict(server, {"rows": [ROW]}).json()["version"] == "houses-1"

    serve_runs([("houses", str(strict), HOUSES)], force=True)
    assert predict(server, {"rows": [ROW]}).json()["version"] == "houses-4"
    roll_back("houses")


def test_tokens_change_without_a_restart(server: Any) -> None:
    from serve.deploy import change_tokens

    before = replica_pids()
    assert change_tokens({"desk": "the-token-of-the-desk", "shop": "the-token-of-the-shop"}) == ["houses"]

    for token, status in [("the-token-of-the-desk", 200), ("the-token-of-the-shop", 200), (TOKEN, 401)]:
        assert predict(server, {"rows": [ROW]}, headers={"Authorization": f"Bearer {token}"}).status_code == status
    change_tokens(TOKENS)
    assert predict(server, {"rows": [ROW]}).status_code == 200
    assert replica_pids() == before


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no Prometheus here (Debian's package)")
def test_a_prometheus_sees_what_replicas_count(server: Any, tmp_path: Path) -> None:
    """Its answers to what the dashboard asks for, from the port that Ray's agent opens on each node."""
    import ray

    targets = [f"127.0.0.1:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
    scrape = {"scrape_interval": "1s", "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": targets}]}]}
    config = {"global": {"scrape_interval": scrape.pop("scrape_interval")}, **scrape}
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    url = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    process = subprocess.Popen([*command, f"--web.listen-address={url}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:

        def value(query: str) -> float | None:
            with contextlib.suppress(httpx.HTTPError):
                found = httpx.get(f"http://{url}/api/v1/query", params={"query": query}).json()["data"]["result"]
                return float(found[0]["value"][1]) if found else None
            return None

        def asked() -> float | None:
            predict(server, {"rows": [ROW, {**ROW, "more": 1}]})
            predict(server, {"rows": [{}]})
            return value('ray_heliostat_requests_total{model="houses", status="422"}')

        wait_for(asked, "the first counts")
        panels = json.loads((ROOT / "deploy/grafana.json").read_text())["panels"]
        for query in [target["expr"] for panel in panels for target in panel["targets"]]:
            plain = query.replace("$model", "houses").replace("$__rate_interval", "1m")
            wait_for(lambda plain=plain: asked() and value(plain) is not None, plain)
        assert value('ray_heliostat_version{model="houses", version="houses-1"}') == 1
    finally:
        process.terminate()
        process.wait()


def test_each_request_has_an_id_that_stands_in_the_log(server: Any, session: Any) -> None:
    response = predict(server, {"rows": [ROW] * 3}, headers={**BEARER, "x-request-id": "of-this-test"})
    assert response.headers["x-request-id"] == "of-this-test"

    def logged() -> dict[str, Any] | None:
        lines = [
            line for path in Path(session.log_dir).glob("serve/access_houses_*.jsonl") for line in path.read_text().splitlines()
        ]
        assert not any(TOKEN in line for line in lines)
        return next((json.loads(line) for line in lines if '"of-this-test"' in line), None)

    wait_for(logged, "its line")
    found = logged()
    assert found is not None
    assert (found["status"], found["rows"], found["token"], found["version"]) == (200, 3, "one", "houses-1")


def test_an_arrow_stream_is_answered_as_rows_are(server: Any) -> None:
    rows = [{**ROW, "rooms": 1 + i % 8} for i in range(5000)]
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)

    response = predict(server, sink.getvalue().to_pybytes(), headers={**BEARER, "Content-Type": MEDIA})

    assert response.status_code == 200
    assert pa.ipc.open_stream(response.content).read_all().to_pylist() == predict(server, {"rows": rows}).json()["predictions"]


def test_replicas_follow_the_load(server: Any) -> None:
    """32 connections need a second replica, which answers too; when they are gone, one is enough."""
    replicas: list[int] = []
    worked: list[float] = []

    def second_works() -> None:
        def two_run() -> bool:
            replicas.append(running(server))
            return replicas[-1] == 2

        wait_for(two_run, "a second replica")
        before = cpu_seconds()
        wait_for(lambda: all(now - then > 0.3 for now, then in zip(cpu_seconds(), before, strict=True)), "it to answer")
        worked.extend(cpu_seconds())

    answers = drive(server, connections=32, during=second_works, rows=500)  # more work for a replica than for this client

    assert {status for status, _ in answers} <= {200, 429}
    assert set(replicas) == {1, 2}
    assert len(worked) == 2
    wait_for(lambda: running(server) == 1, "only one replica")
    assert predict(server, {"rows": [ROW]}).status_code == 200


def drive(server: Any, *, connections: int, during: Callable[[], None], rows: int = 1) -> Counter[tuple[int, str]]:
    """Send requests over so many connections while something is done; count statuses and versions."""
    answers: Counter[tuple[int, str]] = Counter()
    body = json.dumps({"rows": [ROW] * rows}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v2/models/houses/predict HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
    done = threading.Event()

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while not done.is_set():
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.split(b"content-length:")[1].split(b"\r\n")[0])
            version = re.search(rb'"version":"([^"]*)"', await reader.readexactly(length))
            answers[int(answer.split()[1]), version[1].decode() if version else ""] += 1
            if b"connection: close" in answer:
                writer.close()
                reader, writer = await asyncio.open_connection(host, int(port))
        writer.close()

    async def all_connections() -> None:
        await asyncio.gather(*(connection() for _ in range(connections)))

    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(asyncio.run, all_connections())
        try:
            during()
        finally:
            done.set()
        load.result(timeout=60)
    return answers


def running(server: Any) -> int:
    models = {model["name"]: model for model in get(server, "/v2/models").json()["models"]}
    replicas: int = models["houses"]["replicas"]
    return replicas


def answering_replicas() -> int:
    from serve.directory import answering

    return len(answering("houses"))


def replica_pids() -> list[int]:
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    replicas = client.get_serve_details()["applications"]["houses"]["deployments"]["model"]["replicas"]
    return sorted(replica["pid"] for replica in replicas)


def cpu_seconds() -> list[float]:
    """The processor time of each replica of houses so far."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in replica_pids()]
    return [(int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK") for stat in stats]
