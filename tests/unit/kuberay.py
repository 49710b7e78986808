"""What do KubeRay's schemas say of a manifest? They stand in tests/data/kuberay; `python -m tests.unit.kuberay CLONE [TAG]` renews them.

A Kubernetes API server drops a field that a schema does not know, without a word: a misspelled `authOptions` would be a cluster
without authentication. So the check here refuses unknown fields.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError, validators

FOLDER = Path(__file__).parents[1] / "data" / "kuberay"
KINDS = ("RayCluster", "RayJob", "RayService")
TAG = "v1.7.0"


def mistakes(manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with a resource of KubeRay, each as `path: what`."""
    errors = _Validator(_strict(schema_of(manifest["kind"]))).iter_errors(manifest)
    return sorted(f"{error.json_path}: {error.message}" for error in errors)


def schema_of(kind: str) -> dict[str, Any]:
    """Return the schema of version v1 as KubeRay publishes it."""
    schema: dict[str, Any] = json.loads(gzip.decompress((FOLDER / f"{kind.lower()}.json.gz").read_bytes()))
    return schema


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a whole resource in which every object has only the fields that it lists."""
    closed = _closed(schema)
    # That of a resource's own metadata is left to Kubernetes; a pod's has the fields that a user may set.
    pod = schema_of("RayCluster")["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    closed["properties"]["metadata"] = _closed({**pod["properties"]["metadata"], "required": ["name"]})
    closed["properties"]["apiVersion"] = {"const": "ray.io/v1"}
    closed["properties"].pop("status")  # the operator's
    return {**closed, "required": ["apiVersion", "kind", "metadata", "spec"]}


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _one_of_each(_: Any, keys: list[str], entries: Any, schema: Any) -> Iterator[ValidationError]:
    """Kubernetes' own keyword: two entries of a list may not agree in all of these fields."""
    seen = []
    for entry in entries:
        key = [entry.get(name, schema["items"]["properties"][name].get("default")) for name in keys]
        if key in seen:
            yield ValidationError(f"two entries have the same {', '.join(keys)}: {key}")
        seen.append(key)


_Validator = validators.extend(Draft202012Validator, {"x-kubernetes-list-map-keys": _one_of_each})


def renew(clone: str, tag: str = TAG) -> None:
    """Make the files from a clone of https://github.com/ray-project/kuberay."""
    for kind in KINDS:
        path = f"{tag}:ray-operator/config/crd/bases/ray.io_{kind.lower()}s.yaml"
        text = subprocess.run(["git", "-C", clone, "show", path], check=True, capture_output=True).stdout
        [version] = [version for version in yaml.safe_load(text)["spec"]["versions"] if version["name"] == "v1"]
        schema = json.dumps(_undescribed(version["schema"]["openAPIV3Schema"]), separators=(",", ":"), sort_keys=True)
        (FOLDER / f"{kind.lower()}.json.gz").write_bytes(gzip.compress(schema.encode(), compresslevel=9, mtime=0))


def _undescribed(schema: Any) -> Any:
    """The same without descriptions, most of its size; a property may have that name too, and is no text."""
    if isinstance(schema, list):
        return [_undescribed(item) for item in schema]
    if isinstance(schema, dict):
        return {key: _undescribed(value) for key, value in schema.items() if key != "description" or not isinstance(value, str)}
    return schema


if __name__ == "__main__":
    renew(*sys.argv[1:])
