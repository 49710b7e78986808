"""A configuration of Ray Serve that names runs, as KubeRay's RayService hands it over, answers as `heliostat serve` does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.artifact import Artifact
from pipelines.runs import Run
from pipelines.storage import Folder
from tests.local.conftest import wait_for
from tests.local.test_serve import BEARER, ROW, TOKEN, free_port, make_artifact

FIRST, SECOND = "20260101-000000-aaaa", "20260102-000000-bbbb"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    for seed, id in enumerate((FIRST, SECOND)):
        run = Run(Folder.at(str(path / "houses" / id)).create(), {})
        (path / "houses" / id / "artifact").mkdir()
        make_artifact(path / "houses" / id / "artifact", "houses", id, seed)
        run.folder.write_bytes(
            "spec.yaml", b"data: {source: x.parquet}\ntask: {target: y}\nserve: {replicas: {min: 1, max: 1}}\n"
        )
        run.complete(metrics={})
    return path


@pytest.fixture
def server(session: Any) -> Iterator[Any]:
    from serve import deploy

    yield deploy._start("127.0.0.1", free_port())
    import ray.serve

    ray.serve.shutdown()


def apply(store: Path, run: str) -> None:
    """What the dashboard does with PUT /api/serve/applications/."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    root = {"name": "_root", "route_prefix": "/", "import_path": "app.builders:root"}
    houses = {
        "name": "houses",
        "route_prefix": "/v2/models/houses",
        "import_path": "app.builders:model",
        "args": {"run": run, "store": str(store)},
        "runtime_env": {"env_vars": {"HELIOSTAT_TOKEN": TOKEN}},  # in Kubernetes the containers have it
    }
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [root, houses]}))


def ask(server: Any, headers: dict[str, str] = BEARER) -> httpx.Response:
    return httpx.post(f"{server.url}/v2/models/houses/predict", headers=headers, json={"rows": [ROW]}, timeout=30)


def answers_with(server: Any, run: str) -> bool:
    response = ask(server)
    return response.status_code == 200 and response.json()["version"] == run


def test_a_configuration_serves_a_run_changes_it_and_keeps_it_when_the_next_is_wrong(store: Path, server: Any) -> None:
    import ray.serve

    apply(store, FIRST)
    wait_for(lambda: answers_with(server, FIRST), "the first run", 300)
    expected = Artifact.load(str(store / "houses" / FIRST)).predict_rows([ROW])
    assert ask(server).json()["predictions"] == expected
    assert ask(server, {}).status_code == 401
    assert httpx.get(f"{server.url}/v2/health/ready").json() == {"ready": True}

    apply(store, "houses@latest")
    statuses: list[int] = []
    wait_for(lambda: statuses.append(ask(server).status_code) or answers_with(server, SECOND), "the second run", 300)
    assert set(statuses) == {200}

    apply(store, "20260103-000000-cccc")
    wait_for(lambda: ray.serve.status().applications["houses"].status == "DEPLOY_FAILED", "the refusal", 300)
    assert "there is no run '20260103-000000-cccc'" in ray.serve.status().applications["houses"].message
    assert answers_with(server, SECOND)
