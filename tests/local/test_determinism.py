"""The same Spec in two processes, on Rays of different sizes, leaves the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.local.conftest import PATIENCE_S
from tests.local.test_pipeline import people

SCRIPT = """
import json, sys
from app.session import open_session
from app.spec import load_spec
from pipelines.train import train
spec = load_spec([sys.argv[1]], [f"store={sys.argv[3]}"])
with open_session(slots=int(sys.argv[2]), object_store_mb=100):
    print(train(spec, free_slots=lambda: 2.0).path)
"""


def test_slots_do_not_change_the_artifact(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    table = people()
    for i in range(12):
        table[500 * i : 500 * (i + 1)].write_parquet(data / f"{i:02d}.parquet")
    spec = tmp_path / "people.yaml"
    spec.write_text(
        json.dumps(
            {
                "data": {"source": str(data)},
                "task": {"target": "bought"},
                "features": {
                    "numeric": ["impute", "scale"],
                    "drop": ["id"],
                    "columns": {"city": ["target_mean"]},
                    "groups": {
                        "body": {"columns": ["age", "visits"], "steps": ["impute", "scale", {"pca": {"components": 2}}]},
                        "who": {"columns": ["city", "member"], "steps": ["cross", "target_mean"]},
                    },
                },
                "model": {"params": {"rounds": 20, "num_leaves": 15, "early_stopping": None}},
                "train": {"workers": 2, "cpus_per_worker": 1.0},
            }
        )
    )
    found = []
    for slots in (2, 4):
        store = tmp_path / f"store-{slots}"
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(spec), str(slots), str(store)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        path = Path(done.stdout.strip().splitlines()[-1])
        found.append(json.loads((path / "artifact/manifest.json").read_text())["files"])
    assert found[0] == found[1] and "preprocessor.json" in found[0] and "model/model.txt" in found[0]
