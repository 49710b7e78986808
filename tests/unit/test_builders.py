"""What Ray Serve makes of a configuration file that names our builders: the deployment that `heliostat serve` makes of the same run."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from ray._common.utils import import_attr
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built_by_serve
from ray.serve._private.build_app import build_app
from ray.serve.exceptions import RayServeException

from pipelines.artifact import ANSWERS_FILE, write_manifest
from pipelines.runs import Run
from pipelines.storage import Folder
from serve.config import ReplicaConfig
from serve.deployment import model_application
from serve.directory import MODEL
from serve.spec import ServeSpec
from tests.unit.test_requests import trained

TOKEN = "a-token-of-enough-length"
ID = "20260101-000000-abcd"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one complete run of 'houses', which is served by two replicas at the most."""
    path = tmp_path_factory.mktemp("runs")
    run = Run(Folder.at(str(path / "houses" / ID)).create(), {})
    (path / "houses" / ID / "artifact").mkdir()
    trained(path / "houses" / ID / "artifact", derive=False)
    spec = "name: houses\ndata: {source: houses.parquet}\ntask: {target: y}\nserve: {replicas: {min: 1, max: 2}}\n"
    run.folder.write_bytes("spec.yaml", spec.encode())
    run.complete(metrics={})
    return path


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that has the token; without a Ray, which would be asked for the environment of the job."""
    monkeypatch.setenv("HELIOSTAT_TOKEN", TOKEN)
    monkeypatch.setattr("serve.deployment._runtime_env", dict)


def build(import_path: str, **args: Any) -> Application:
    return built_by_serve(import_attr(import_path), args)


def config_of(application: Application, name: str) -> dict[str, Any]:
    [deployment] = build_app(application, name=name, default_runtime_env={}).deployments
    assert deployment.name == MODEL and deployment.init_args == (name, 1)
    config: dict[str, Any] = deployment._deployment_config.model_dump()
    return config


def test_a_run_is_served_as_heliostat_serve_would(store: Path) -> None:
    tokens = {"token": hashlib.sha256(TOKEN.encode()).hexdigest()}
    spec = ServeSpec.model_validate({"replicas": {"min": 1, "max": 2}})
    same = ReplicaConfig(artifact=str(store / "houses" / ID / "artifact"), spec=spec, tokens=tokens)

    application = build("app.builders:model", run="houses@latest", store=str(store))

    assert config_of(application, "houses") == config_of(model_application("houses", same), "houses")
    assert TOKEN not in str(config_of(application, "houses"))


def test_name_and_serve_section_can_be_changed(store: Path) -> None:
    settings = ["serve.replicas.min=3", "serve.replicas.max=3", "serve.auth=none"]

    config = config_of(build("app.builders:model", run=str(store / "houses" / ID), name="canary", set=settings), "canary")

    assert config["num_replicas"] == 3 and config["autoscaling_config"] is None
    assert config["user_config"]["tokens"] == {}


def test_the_root_is_the_application_that_speaks_for_all() -> None:
    [deployment] = build_app(build("app.builders:root"), name="_root", default_runtime_env={}).deployments

    assert deployment.name == "root"
    with pytest.raises(RayServeException, match="app.builders:root takes no args; found run"):
        build("app.builders:root", run="houses@latest")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"run": "huoses@latest"}, r"no complete run of 'huoses'.*did you mean 'houses'"),
        ({"ran": "houses@latest"}, r"ran.*did you mean 'run'"),
        ({"run": "houses@latest", "set": ["serve.replica.max=3"]}, r"serve\.replica.*did you mean 'replicas'"),
    ],
)
def test_a_mistake_is_one_line_in_the_status_of_the_application(store: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(RayServeException, match=message) as caught:  # Serve shows the text of this one, and tries no second time
        build("app.builders:model", store=str(store), **args)
    assert "\n" not in str(caught.value)


def test_without_a_token_on_the_node_nothing_is_served_openly(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIOSTAT_TOKEN")

    with pytest.raises(RayServeException, match=r"houses: serve.auth is 'token', and HELIOSTAT_TOKEN is not set here"):
        build("app.builders:model", run="houses@latest", store=str(store))


def test_an_artifact_that_answers_otherwise_than_where_it_was_trained_is_refused(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store / "houses", tmp_path / "houses")
    artifact = Folder.at(str(tmp_path / "houses" / ID / "artifact"))
    artifact.write_json(ANSWERS_FILE, [{"label": False, "probability": 0.123}])
    write_manifest(artifact, name="houses", run=ID, model="lightgbm")

    with pytest.raises(RayServeException, match="answers its own example row 0 with"):
        build("app.builders:model", run="houses@latest", store=str(tmp_path))
