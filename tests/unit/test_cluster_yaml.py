"""cluster.yaml: Ray takes it, offline, and its nodes get what a private session gets."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from app.environment import node_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """The configuration as `ray up` sees it after filling in its defaults."""
    prepared: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    return prepared


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_cpu_and_gpu_workers_grow_from_none_and_cpu_workers_are_spot(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]

    assert set(types) == {"head", "cpu", "gpu"} and cluster["head_node_type"] == "head"
    assert types["cpu"]["min_workers"] == types["gpu"]["min_workers"] == 0
    assert types["cpu"]["max_workers"] >= 1 and types["gpu"]["max_workers"] >= 1
    assert types["cpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["gpu"]["node_config"]["InstanceType"].startswith("g")


def test_the_environment_is_that_of_a_session_and_is_read_before_ray_starts(cluster: dict[str, Any]) -> None:
    [written] = [command for command in cluster["setup_commands"] if "cat > ~/heliostat.env" in command]
    exports = dict(shlex.split(line)[1].split("=", 1) for line in written.splitlines() if line.startswith("export "))
    exports.pop("PATH")

    assert exports == node_environment() | {"RAY_AUTH_MODE": "token"}
    for kind in ("head", "worker"):
        assert all(command.startswith(". ~/heliostat.env; ") for command in cluster[f"{kind}_start_ray_commands"])


def test_the_shell_reads_the_environment_as_it_is_meant(cluster: dict[str, Any], tmp_path: Path) -> None:
    [written] = [command for command in cluster["setup_commands"] if "cat > ~/heliostat.env" in command]

    for command in (written, '. ~/heliostat.env; echo "$RAY_SERVE_HAPROXY_RETRY_ON"; echo "$PATH"'):
        shell = subprocess.run(
            ["bash", "-c", command], env={"HOME": str(tmp_path), "PATH": "/bin:/usr/bin"}, capture_output=True, text=True
        )

    retry_on, path = shell.stdout.splitlines()
    assert retry_on == node_environment()["RAY_SERVE_HAPROXY_RETRY_ON"]
    assert path == f"{tmp_path}/heliostat-venv/bin:/bin:/usr/bin"


def test_the_token_reaches_every_node(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]


def test_nodes_install_this_code_with_the_tested_set(cluster: dict[str, Any]) -> None:
    mounted = {local for remote, local in cluster["file_mounts"].items() if remote.startswith("~/heliostat-source/")}
    [install] = [command for command in cluster["setup_commands"] if "pip install" in command]
    everything = [command for kind in ("", "head_", "worker_") for command in cluster[f"{kind}setup_commands"]]

    assert all((ROOT / name).exists() for name in mounted)
    assert mounted >= {"app", "pipelines", "serve", "tune", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    assert install.endswith(" -c ~/heliostat-source/constraints.txt ~/heliostat-source")
    assert all("uv pip install --python ~/heliostat-venv/bin/python" in command for command in everything if "pip" in command)


def test_the_header_names_the_three_places_to_edit() -> None:
    text = (ROOT / "cluster.yaml").read_text()

    assert re.findall(r"# EDIT (\d), (\w+):", text) == [("1", "provider"), ("2", "sizes"), ("3", "storage")]
