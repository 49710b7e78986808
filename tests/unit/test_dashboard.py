"""The files in deploy/ speak of metrics that replicas have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from serve.meter import COUNTERS

DEPLOY = Path(__file__).parents[2] / "deploy"
SHOWN = {f"ray_{name}_total": set(labels) for name, (_, labels) in COUNTERS.items()} | {
    "ray_heliostat_version": {"model", "version"}
}


def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    asked = set()
    for expression in [target["expr"] for panel in panels for target in panel["targets"]]:
        [name] = re.findall(r"ray_\w+", expression)
        grouped = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")}
        assert grouped <= SHOWN[name]
        asked.add(name)

    assert asked >= SHOWN.keys() - {"ray_heliostat_latency_seconds_sum_total"}


def test_prometheus_finds_the_nodes_where_ray_lists_them() -> None:
    [job] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]

    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
