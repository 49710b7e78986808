"""Dockerfile and .dockerignore, read without Docker: what they copy is there, nobody is root, versions are those of everything else."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from serve.overview import build_root

ROOT = Path(__file__).parents[2]
FORMS = {"FROM", "ARG", "ENV", "COPY", "RUN", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


@dataclass(frozen=True)
class Instruction:
    name: str
    words: list[str]
    """Its words, without its own `--options`."""
    options: dict[str, str]
    text: str


def instructions() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.strip() and not line.startswith("#")]
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, text = line.split(maxsplit=1)
        words = text.split()
        options = [word for word in words if word.startswith("--")]
        leading = options[: next((i for i, word in enumerate(words) if not word.startswith("--")), len(words))]
        parsed = {key: value for key, _, value in (option.removeprefix("--").partition("=") for option in leading)}
        found.append(Instruction(name, words[len(leading) :], parsed, text))
    return found


def stages() -> list[list[Instruction]]:
    """Each stage's instructions, its FROM first."""
    found: list[list[Instruction]] = []
    for instruction in instructions():
        if instruction.name == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def every(name: str, stage: list[Instruction] | None = None) -> list[Instruction]:
    return [instruction for instruction in stage or instructions() if instruction.name == name]


def only(name: str) -> Instruction:
    [found] = every(name, stages()[-1])
    return found


def arguments() -> dict[str, str]:
    return dict(instruction.text.split("=", 1) for instruction in every("ARG"))


def copied() -> list[str]:
    """What is copied out of the repository."""
    return [source for instruction in every("COPY") if "from" not in instruction.options for source in instruction.words[:-1]]


def cluster_yaml() -> dict[str, object]:
    loaded: dict[str, object] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def test_every_line_is_an_instruction_of_docker() -> None:
    assert {instruction.name for instruction in instructions()} <= FORMS
    assert instructions()[0].name == "ARG"


def test_every_source_of_a_copy_is_there() -> None:
    assert copied()
    assert [source for source in copied() if not (ROOT / source).exists()] == []


def test_copies_between_stages_name_a_stage_before() -> None:
    known: list[str] = []
    for stage in stages():
        for instruction in every("COPY", stage):
            assert instruction.options.get("from", "") in ("", *known)
        known.append(stage[0].words[-1])
    assert known[:2] == ["uv", "build"]


def test_docker_is_sent_what_is_copied_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == set(copied())
    assert rules[-1] == "**/__pycache__" and sum(not rule.startswith("!") for rule in rules) == 2


def test_the_image_installs_what_nodes_of_cluster_yaml_install() -> None:
    mounts = cluster_yaml()["file_mounts"]
    assert isinstance(mounts, dict)

    assert set(copied()) == {local for remote, local in mounts.items() if remote.startswith("~/heliostat-source/")}


def test_python_and_uv_are_those_of_cluster_yaml() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]

    assert [arguments()["PYTHON"]] == re.findall(r"uv venv --python (\S+)", text)
    assert [arguments()["UV"]] == re.findall(r"astral\.sh/uv/([\d.]+)/install\.sh", text)
    assert arguments()["PYTHON"] in SpecifierSet(requires)
    pythons = {stage[0].words[0] for stage in stages() if stage[0].words[0].startswith("python:")}
    assert pythons == {"python:${PYTHON}-slim-bookworm"}  # a virtual environment lives with the Python that made it


def test_the_tested_set_is_installed_and_torch_is_the_cpu_s_unless_asked() -> None:
    dependencies, project = (instruction.text for instruction in every("RUN") if "uv pip install" in instruction.text)

    assert "-c constraints.txt -r pyproject.toml" in dependencies and "--torch-backend ${TORCH}" in dependencies
    assert project.endswith("--no-deps .")
    assert arguments()["TORCH"] == "cpu"
    [build] = [stage for stage in stages() if stage[0].words[-1] == "build"]
    assert "TORCH=cpu" in [instruction.text for instruction in every("ARG", build)]  # else it would be empty there


def test_nothing_runs_as_root() -> None:
    last = stages()[-1]

    user, group = only("USER").words[0].split(":")

    assert int(user) > 0 and int(group) > 0
    assert f"useradd --uid {user} " in " ".join(instruction.text for instruction in every("RUN", last))
    before = last[: last.index(only("USER"))]
    assert {"RUN", "COPY"} <= {instruction.name for instruction in before}
    assert not {"RUN", "COPY"} & {instruction.name for instruction in last[len(before) :]}


def test_the_image_has_what_it_is_asked_with() -> None:
    [run] = every("RUN", stages()[-1])
    installed = shlex.split(run.text.split("--no-install-recommends", 1)[1].split("&&", 1)[0])

    assert {"wget", "tini", "libgomp1"} <= set(installed)
    assert "rm -rf /var/lib/apt/lists/*" in run.text


def test_the_container_is_the_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    assert json.loads(only("ENTRYPOINT").text) == ["tini", "--", *scripts]
    assert json.loads(only("CMD").text) == ["--help"]


@pytest.mark.parametrize(
    ("command", "answers", "healthy"),
    [
        ("tini -- heliostat serve flights@best --host 0.0.0.0", True, True),
        ("tini -- heliostat serve flights@best --host 0.0.0.0", False, False),
        ("tini -- heliostat run serve.yaml", False, True),
        ("/bin/bash -c -- ulimit -n 65536; ray start --head", False, True),
    ],
)
def test_only_a_server_that_does_not_answer_is_ill(tmp_path: Path, command: str, answers: bool, healthy: bool) -> None:
    check = only("HEALTHCHECK").text.split("CMD ", 1)[1]
    (tmp_path / "cmdline").write_text("\0".join(shlex.split(command)) + "\0")
    (tmp_path / "wget").write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\nexit {0 if answers else 8}\n")
    (tmp_path / "wget").chmod(0o755)

    shell = check.replace("/proc/1/cmdline", f"{tmp_path}/cmdline")
    done = subprocess.run(["/bin/sh", "-c", shell], env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, check=False)

    assert (done.returncode == 0) is healthy
    assert (tmp_path / "asked").exists() is ("serve" in shlex.split(command))


def test_the_health_check_asks_a_path_and_a_port_that_are_there() -> None:
    async def standings() -> list[object]:
        return []

    [port, path] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\S+)", only("HEALTHCHECK").text)[0]

    assert path in {getattr(route, "path", None) for route in build_root(standings).routes}  # type: ignore[arg-type]
    assert only("EXPOSE").words == [port]
