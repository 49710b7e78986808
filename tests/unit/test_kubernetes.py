"""deploy/kuberay: KubeRay takes the manifests, Ray and heliostat what is in them, and they say what cluster.yaml says."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._common.utils import import_attr
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from app.builders import ServedRun
from app.environment import node_environment
from app.spec import load_spec
from pipelines.explain import checked
from tests.unit.kuberay import KINDS, mistakes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
WITHIN = {"RayCluster": [], "RayJob": ["rayClusterSpec"], "RayService": ["rayClusterConfig"]}
"""Where a resource's spec has that of its cluster."""


def manifest(kind: str) -> dict[str, Any]:
    [resource] = yaml.safe_load_all((FOLDER / f"{kind.lower()}.yaml").read_text())
    assert resource["kind"] == kind
    return dict(resource)


def cluster_of(kind: str) -> dict[str, Any]:
    """The cluster that a resource asks for."""
    spec = manifest(kind)["spec"]
    for key in WITHIN[kind]:
        spec = spec[key]
    return dict(spec)


def common(kind: str) -> dict[str, Any]:
    [resource] = [found for found in yaml.safe_load_all((FOLDER / "common.yaml").read_text()) if found["kind"] == kind]
    return dict(resource)


def groups(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each group of pods with its name."""
    cluster = cluster_of(kind)
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def container(group: dict[str, Any]) -> dict[str, Any]:
    [found] = group["template"]["spec"]["containers"]
    return dict(found)


def ray_cluster_yaml() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_kuberay_knows_every_field_and_accepts_every_value(kind: str) -> None:
    assert mistakes(manifest(kind)) == []


def test_the_services_that_kuberay_makes_of_them_have_names_of_their_own() -> None:
    names = [manifest(kind)["metadata"]["name"] for kind in KINDS]  # each becomes NAME-head-svc

    assert len(set(names)) == len(names)
    for kind, name in zip(KINDS, names, strict=True):
        asked = re.findall(r"service/([\w-]+)-(?:head|serve)-svc", (FOLDER / f"{kind.lower()}.yaml").read_text())
        assert set(asked) <= {name}


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "$.spec: Additional properties are not allowed ('authOption' was unexpected)": lambda wrong: wrong["spec"].update(
        authOption=wrong["spec"].pop("authOptions")
    ),
    "$.spec.authOptions.mode: 'tokens' is not one of ['disabled', 'token']": lambda wrong: wrong["spec"]["authOptions"].update(
        mode="tokens"
    ),
    "$.spec.headGroupSpec.template.spec.containers[0]: Additional properties are not allowed ('imagePolicy' was unexpected)": (
        lambda wrong: wrong["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(imagePolicy="Always")
    ),
    "$.spec.headGroupSpec.template.spec.containers[0].ports: two entries have the same containerPort, protocol: [8265, 'TCP']": (
        lambda wrong: wrong["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"].append({"containerPort": 8265})
    ),
    "$.spec.headGroupSpec.rayStartParams['num-cpus']: 0 is not of type 'string'": lambda wrong: wrong["spec"]["headGroupSpec"][
        "rayStartParams"
    ].update({"num-cpus": 0}),
    "$.spec.workerGroupSpecs[0]: 'groupName' is a required property": lambda wrong: wrong["spec"]["workerGroupSpecs"][0].pop(
        "groupName"
    ),
    "$.spec.workerGroupSpecs[1].minReplicas: 'none' is not of type 'integer'": lambda wrong: wrong["spec"]["workerGroupSpecs"][
        1
    ].update(minReplicas="none"),
    "$.metadata: Additional properties are not allowed ('label' was unexpected)": lambda wrong: wrong["metadata"].update(
        label={}
    ),
    "$.apiVersion: 'ray.io/v1' was expected": lambda wrong: wrong.update(apiVersion="ray.io/v1alpha1"),
}


@pytest.mark.parametrize("expected", WRONG)
def test_a_wrong_manifest_is_refused(expected: str) -> None:
    wrong = copy.deepcopy(manifest("RayCluster"))

    WRONG[expected](wrong)

    assert mistakes(wrong) == [expected]


def test_the_check_of_quantities_is_that_of_kubernetes() -> None:
    wrong = copy.deepcopy(manifest("RayService"))
    wrong["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"] = {
        "cpu": "4 cores"
    }

    [mistake] = mistakes(wrong)

    assert "limits.cpu: '4 cores' does not match" in mistake


@pytest.mark.parametrize("kind", KINDS)
def test_ray_s_autoscaler_reads_the_groups(kind: str) -> None:
    resource = {"metadata": {"name": "heliostat", "namespace": "default"}, "spec": cluster_of(kind)}

    types = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]

    found = {name.removesuffix("group"): type_["resources"] for name, type_ in types.items()}
    sizes = {name: container(group)["resources"]["limits"] for name, group in groups(kind)}
    assert {name: resources["CPU"] for name, resources in found.items()} == {
        name: 0 if kind == "RayService" and name == "head" else size["cpu"] for name, size in sizes.items()
    }
    assert {name: resources["memory"] for name, resources in found.items()} == {
        name: int(size["memory"].removesuffix("Gi")) << 30 for name, size in sizes.items()
    }
    assert {name: resources.get("GPU", 0) for name, resources in found.items()} == {
        name: size.get("nvidia.com/gpu", 0) for name, size in sizes.items()
    }


def test_the_environment_is_that_of_a_session() -> None:
    assert common("ConfigMap")["data"] == node_environment() | {"RAY_AUTH_MODE": "token"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_has_the_environment_and_changes_nothing_of_it(kind: str) -> None:
    name = common("ConfigMap")["metadata"]["name"]
    containers = [container(group) for _, group in groups(kind)] + [cluster_of(kind)["autoscalerOptions"]]

    for found in containers:
        assert {"configMapRef": {"name": name}} in found["envFrom"]
        assert not {variable["name"] for variable in found.get("env", [])} & (node_environment().keys() | {"RAY_AUTH_MODE"})


@pytest.mark.parametrize("kind", KINDS)
def test_ray_asks_for_the_token_of_the_secret(kind: str) -> None:
    cluster = cluster_of(kind)

    assert cluster["authOptions"] == {"mode": "token", "secretName": "heliostat"}
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_clients_of_models_have_another_token_than_ray() -> None:
    created = re.findall(r"--from-literal=(\w+)=", (FOLDER / "common.yaml").read_text())
    asked = {
        tuple(variable["valueFrom"]["secretKeyRef"].values())
        for _, group in groups("RayService")
        for variable in container(group)["env"]
        if variable["name"] == "HELIOSTAT_TOKEN"
    }

    assert created == ["auth_token", "http_token"]
    assert asked == {("heliostat", "http_token")}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_reachable_from_outside_of_kubernetes(kind: str) -> None:
    cluster = cluster_of(kind)
    text = (FOLDER / f"{kind.lower()}.yaml").read_text()

    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for opening in ("enableIngress", "ingressOptions", "headService", "serveService", "hostNetwork", "hostPort", "NodePort"):
        assert opening not in text


def test_within_kubernetes_only_predictions_are_open_to_other_namespaces() -> None:
    policy = common("NetworkPolicy")["spec"]
    labels = [group["template"]["metadata"]["labels"] for kind in KINDS for _, group in groups(kind)]

    assert all(policy["podSelector"]["matchLabels"].items() <= own.items() for own in labels)
    assert policy["policyTypes"] == ["Ingress"]
    assert [rule["ports"] for rule in policy["ingress"] if "from" not in rule] == [[{"port": 8000}]]
    assert [rule["ports"] for rule in policy["ingress"] if "namespaceSelector" in str(rule)] == [[{"port": 8265}]]


@pytest.mark.parametrize("kind", KINDS)
def test_containers_are_without_privileges_and_have_the_resources_that_they_ask_for(kind: str) -> None:
    user = re.findall(r"^USER (\d+):\d+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for _, group in groups(kind):
        pod, found = group["template"]["spec"], container(group)
        assert pod["securityContext"]["runAsNonRoot"] and [str(pod["securityContext"]["runAsUser"])] == user
        assert found["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert found["resources"]["requests"] == found["resources"]["limits"]
        assert found["resources"]["limits"].keys() >= {"cpu", "memory", "ephemeral-storage"}
        mounted = {mount["name"] for mount in found.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_workers_grow_from_none_as_in_cluster_yaml(kind: str) -> None:
    other = ray_cluster_yaml()
    cluster = cluster_of(kind)
    workers = {name: group for name, group in groups(kind) if name != "head"}

    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * other["idle_timeout_minutes"]
    assert {name: (group["minReplicas"], group["maxReplicas"]) for name, group in workers.items()} == {
        name: (other["available_node_types"][name]["min_workers"], other["available_node_types"][name]["max_workers"])
        for name in ("cpu", "gpu")
    }


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_cpu_workers_may_be_on_spot_and_gpu_workers_have_a_gpu(kind: str) -> None:
    found = dict(groups(kind))
    tolerated = {
        name: {entry["key"] for entry in group["template"]["spec"].get("tolerations", [])} for name, group in found.items()
    }

    assert tolerated["cpu"] == {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
    assert tolerated["gpu"] == {"nvidia.com/gpu"} and container(found["gpu"])["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container(found["gpu"])["image"].endswith("-cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_what_must_stay_is_not_on_spot(kind: str) -> None:
    steady = [group for name, group in groups(kind) if name == "head" or kind == "RayService"]

    for group in steady:
        required = group["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        [term] = required["nodeSelectorTerms"]
        assert {entry["key"]: entry["operator"] for entry in term["matchExpressions"]} == {
            "eks.amazonaws.com/capacityType": "NotIn",
            "karpenter.sh/capacity-type": "NotIn",
            "cloud.google.com/gke-spot": "DoesNotExist",
        }
        assert "tolerations" not in group["template"]["spec"]


def test_images_are_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    texts = [(ROOT / "Dockerfile").read_text(), *(file.read_text() for file in FOLDER.glob("*.yaml"))]

    assert set(re.findall(r"heliostat:([\w.-]+)", "".join(texts))) == {f"{version}-cpu", f"{version}-cuda"}


def test_a_job_has_the_cluster_of_raycluster_yaml_and_the_spec() -> None:
    cluster = cluster_of("RayJob")
    pod = cluster["headGroupSpec"]["template"]["spec"]

    [volume], [mount] = pod.pop("volumes"), pod["containers"][0].pop("volumeMounts")

    assert cluster == cluster_of("RayCluster")
    assert (volume["configMap"]["name"], mount["mountPath"]) == ("heliostat-spec", "/etc/heliostat")


def test_a_job_runs_a_command_of_heliostat_on_the_spec_that_its_header_puts_there() -> None:
    [made] = re.findall(r"kubectl create configmap heliostat-spec --from-file=(\S+)", (FOLDER / "rayjob.yaml").read_text())
    words = shlex.split(manifest("RayJob")["spec"]["entrypoint"])

    spec = load_spec([str(ROOT / made)], [value for option, value in pairwise(words) if option == "--set"])

    assert words[:3] == ["heliostat", "run", f"/etc/heliostat/{Path(made).name}"]
    assert words[3:5] == ["--store", "s3://BUCKET/runs"] and set(words[5::2]) == {"--set"}
    assert spec.data.source == "s3://BUCKET/flights" and spec.train.workers == 16


def test_serve_accepts_the_configuration_and_its_applications_can_be_built() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest("RayService")["spec"]["serveConfigV2"]))

    root, *models = config.applications
    assert (root.name, root.route_prefix, root.args) == ("_root", "/", {})
    assert models
    for application in config.applications:
        assert callable(import_attr(application.import_path))
    for application in models:
        wanted = checked(ServedRun, application.args)
        assert application.import_path == "app.builders:model"
        assert application.name == wanted.name or wanted.run.startswith(f"{application.name}@")
        assert application.route_prefix == f"/v2/models/{application.name}"
    assert config.http_options.host == "0.0.0.0"
    assert config.logging_config and not config.logging_config.enable_access_log
    assert {
        port["containerPort"]
        for _, group in groups("RayService")
        for port in container(group)["ports"]
        if port["name"] == "serve"
    } == {config.http_options.port}


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_names_the_three_places_to_edit(kind: str) -> None:
    text = (FOLDER / f"{kind.lower()}.yaml").read_text()

    assert re.findall(r"# EDIT (\d), (\w+):", text) == [("1", "storage"), ("2", "image"), ("3", "sizes")]
    assert "marked EDIT: storage, image, sizes" in text
    assert f"deploy/kuberay/{kind.lower()}.yaml" in text and "deploy/kuberay/common.yaml" in text
