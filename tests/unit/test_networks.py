"""Networks on one rank, without Ray: they learn, go on with equal bits, and their ONNX program answers as the module does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from pipelines.data.prepared import Batch, Range, Shards
from pipelines.errors import SpecError
from pipelines.explain import checked
from pipelines.features.transform import Feature
from pipelines.models import network_fit
from pipelines.models.model import Matrix
from pipelines.models.network import MLP, FittedNetwork, Linear, TabM, to_float32
from pipelines.models.network_fit import Training
from pipelines.models.network_layout import Layout
from pipelines.models.network_modules import Answer, build
from pipelines.models.network_params import LinearParams, MLPParams, NetworkParams, TabMParams
from pipelines.tasks import Task
from pipelines.training.worker import Start
from tests.unit.test_boosting import BINARY, NUMBER, THREE, Recording, table, worker

SMALL: dict[type[FittedNetwork], dict[str, Any]] = {
    Linear: {"crosses": [["c", "d"]], "buckets": 64},
    MLP: {"d_block": 16, "n_blocks": 2, "d_embedding": 4, "n_bins": 8},
    TabM: {"d_block": 16, "k": 4, "d_embedding": 4, "n_bins": 8},
}
FEATURES = [
    Feature(name="x", kind="numeric"),
    Feature(name="c", kind="categorical", cardinality=5),
    Feature(name="d", kind="categorical", cardinality=100),
    Feature(name="z", kind="numeric"),
]


@dataclasses.dataclass
class Refusing(Recording):
    refused: str | None = None

    def refuse(self, why: str) -> None:
        self.refused = why

    def report(self, step: int, model: Any, state: dict[str, Any], *, aside: bool = False) -> None:
        super().report(step, model, {**state})


@pytest.fixture
def unexported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ONNX program, whose export takes seconds."""
    monkeypatch.setattr(network_fit, "exported", lambda network, sample: b"")


def run_of(folder: Path, task: Task = BINARY, start: Start | None = None, every: int = 10**6) -> Refusing:
    made = worker(folder, start, task=task)
    return Refusing(**{**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)}, "checkpoint_every": every})


def trained(family: type[FittedNetwork], run: Refusing, task: Task = BINARY, **params: Any) -> FittedNetwork | None:
    small = {name: value for name, value in SMALL[family].items() if name not in ("crosses", "buckets")}
    family.fit(checked(family.Params, {"batch_size": 256, **small, **params}, ("model", "params")), task, run)
    model: FittedNetwork | None = run.kept[-1][1] if run.kept else None
    return model


def scores(model: FittedNetwork, matrix: Matrix) -> Matrix:
    """By the module itself."""
    network = build(model.layout)
    network_fit.load_weights(network, network_fit.read_tensors(model.weights))
    with torch.no_grad():
        return Answer(network.eval())(torch.from_numpy(matrix.astype(np.float32))).double().numpy()


def matrix_of(rows: int = 1000, seed: int = 1) -> tuple[Matrix, Matrix]:
    columns, target = table(rows, seed)
    return np.column_stack(columns), target


@pytest.mark.parametrize(
    ("family", "task"), [(Linear, THREE), (MLP, BINARY), (TabM, BINARY), (TabM, THREE), (TabM, NUMBER)], ids=str
)
def test_the_program_answers_as_the_module_whatever_the_values_and_the_rows_at_once(
    family: type[FittedNetwork], task: Task
) -> None:
    rng = np.random.default_rng(0)
    sample = np.column_stack(
        [rng.normal(size=400), rng.integers(0, 4, 400), rng.integers(0, 90, 400), rng.normal(5, 2, 400)]
    ).astype(np.float64)
    sample[::7, 0], sample[::5, 2] = np.nan, np.nan
    torch.manual_seed(0)
    layout = Layout.of(checked(family.Params, SMALL[family], ()), task, FEATURES, sample, rng.normal(3e6, 10, 400))
    network = build(layout).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)

    program = network_fit.exported(network, sample)
    answers = FittedNetwork(layout, b"", program)

    strange = np.array([[np.inf, 4, 99, -np.inf], [np.nan, np.nan, np.nan, np.nan], [1e300, 77, -3, 0], [0, 4, 98.0, 1]])
    rows = np.concatenate([sample, strange])
    found = answers.predict(rows)
    with torch.no_grad():
        wanted = Answer(network)(torch.from_numpy(to_float32(rows))).double().numpy()
    assert np.isfinite(found).all() and found.shape == ((404, 3) if task is THREE else (404,))
    tolerance = 1e-5 * np.abs(wanted).max()
    assert np.allclose(found, wanted * layout.scale + layout.center, rtol=1e-6, atol=tolerance)
    alone = np.concatenate([answers.predict(rows[i : i + 1]) for i in range(len(rows))])
    assert np.allclose(alone[:400], found[:400], rtol=1e-6, atol=1e-6)
    assert answers.predict(rows[:0]).shape == found[:0].shape


@pytest.mark.parametrize("family", [Linear, MLP, TabM])
def test_what_was_saved_answers_with_the_same_bits(family: type[FittedNetwork], tmp_path: Path) -> None:
    model = trained(family, run_of(tmp_path), epochs=1)
    assert model is not None
    folder = tmp_path / "model"
    folder.mkdir()
    model.save(folder)

    again = family.load(folder)

    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.onnx", "weights.safetensors"]
    matrix = matrix_of()[0]
    assert np.array_equal(again.predict(matrix), model.predict(matrix))
    assert np.allclose(again.predict(matrix), scores(model, matrix), atol=1e-5)


@pytest.mark.parametrize(("family", "least"), [(Linear, 0.95), (MLP, 0.96), (TabM, 0.96)])
def test_each_family_learns(unexported: None, family: type[FittedNetwork], least: float, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    model = trained(family, run, epochs=8, learning_rate=0.05 if family is Linear else 0.005)
    assert model is not None
    matrix, target = matrix_of()
    auc = roc_auc_score(target, scores(model, matrix))
    assert auc > least
    best = max(metrics["valid"]["auc"] for _, metrics in run.logged)
    assert auc == pytest.approx(best, abs=5e-3)


def test_logistic_regression_is_that_of_scikit_learn(unexported: None, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    model = trained(Linear, run, epochs=60, learning_rate=0.1, early_stopping=None, l2=0.01)
    assert model is not None
    matrix, target = matrix_of(4000, 0)
    inputs = np.column_stack(
        [np.nan_to_num(matrix[:, 0]), np.isnan(matrix[:, 0]), matrix[:, 2], *(matrix[:, 1] == np.arange(5)[:, None])]
    )
    plain = LogisticRegression(C=1 / (4000 * 0.01), max_iter=1000).fit(inputs, target)
    assert np.allclose(scores(model, matrix), plain.decision_function(inputs), atol=0.02)


def test_a_regression_learns_on_the_targets_scale(unexported: None, tmp_path: Path) -> None:
    run = run_of(tmp_path, NUMBER)
    shards = run.shards
    assert isinstance(shards, Shards)

    class Far(Shards):
        def read(self, range: Range) -> Iterator[Batch]:
            return (batch._replace(target=batch.target * 1e4 + 1e7) for batch in super().read(range))

        def sample_batch(self) -> Batch:
            found = super().sample_batch()
            return found._replace(target=found.target * 1e4 + 1e7)

    run.shards = Far(shards.folder, shards.features, shards.splits)
    trained(MLP, run, NUMBER, epochs=8, learning_rate=0.005)
    assert run.logged[-1][1]["valid"]["r2"] > 0.6


@pytest.mark.parametrize(
    ("family", "params"), [(Linear, {"optimizer": "sgd"}), (Linear, {"l1": 1e-4}), (MLP, {}), (TabM, {"dropout": 0.5})]
)
def test_what_goes_on_from_a_checkpoint_ends_with_the_bits_of_what_was_never_disturbed(
    unexported: None, family: type[FittedNetwork], params: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"epochs": 4, "learning_rate": 0.01, **params}
    whole = run_of(tmp_path / "data", every=23)
    wanted = trained(family, whole, **settings)
    assert wanted is not None and [step for step, _, _ in whole.kept] == [23, 46, 64]

    for step, checkpoint, state in whole.kept[:-1]:
        (folder := tmp_path / str(step)).mkdir()
        checkpoint.save(folder)
        resumed = run_of(tmp_path / "data", start=Start(family.load(folder), step, state), every=23)
        found = trained(family, resumed, **settings)
        assert found is not None and found.weights == wanted.weights
        assert [entry for entry in whole.logged if entry[0] > step] == resumed.logged
    assert not list(tmp_path.rglob("*.pkl")) and not list(tmp_path.rglob("*.pt"))


def test_early_stopping_keeps_the_best_weights(unexported: None, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    model = trained(MLP, run, epochs=200, learning_rate=0.03, early_stopping=3, warmup=0.0)
    step, _, state = run.kept[-1]
    losses = {step: metrics["valid"]["logloss"] for step, metrics in run.logged}
    assert state["final"] == min(losses, key=lambda at: losses[at])
    assert step == state["final"] + 3 * 16 < 200 * 16
    assert model is not None
    matrix, target = matrix_of()
    p = 1 / (1 + np.exp(-scores(model, matrix)))
    assert -np.mean(np.log(np.where(target == 1, p, 1 - p))) == pytest.approx(losses[state["final"]], abs=1e-5)


def test_without_early_stopping_the_last_weights_are_kept(unexported: None, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    trained(Linear, run, epochs=3, early_stopping=None)
    assert run.kept[-1][0] == run.kept[-1][2]["final"] == 48


class Half(Shards):
    """Rows with a positive first number count; those of the others count nothing and have whatever target."""

    target = 0.0

    def read(self, range: Range) -> Iterator[Batch]:
        for batch in super().read(range):
            counts = np.nan_to_num(batch.matrix[:, 0]) > 0
            yield Batch(batch.matrix, np.where(counts, batch.target, self.target), np.where(counts, 2.0, 0.0))


def test_a_row_that_weighs_nothing_teaches_nothing(unexported: None, tmp_path: Path) -> None:
    found = []
    for target in (0.0, 1.0):
        run = run_of(tmp_path)
        kind = type("Told", (Half,), {"target": target})
        run.shards = kind(run.shards.folder, run.shards.features, run.shards.splits)
        model = trained(MLP, run, epochs=2, early_stopping=None)
        assert model is not None
        found.append(model.weights)
    assert found[0] == found[1]


def test_a_class_that_weighs_more_is_answered_more(unexported: None, tmp_path: Path) -> None:
    found = []
    for weights in (None, [1.0, 20.0]):
        run = run_of(tmp_path)
        run.class_weights = weights
        model = trained(MLP, run, epochs=2, early_stopping=None)
        assert model is not None
        found.append(scores(model, matrix_of()[0]).mean())
    assert found[1] > found[0] + 0.5


def test_a_run_that_continues_starts_from_the_weights(unexported: None, tmp_path: Path) -> None:
    first = run_of(tmp_path)
    parent = trained(MLP, first, epochs=8, learning_rate=0.01)
    assert parent is not None

    run = run_of(tmp_path, start=Start(parent, 0, {}))
    trained(MLP, run, epochs=1, learning_rate=1e-6)

    assert run.logged[0][1]["valid"]["auc"] == pytest.approx(first.logged[-1][1]["valid"]["auc"], abs=0.01)


def test_a_cross_learns_what_the_columns_alone_do_not_say(unexported: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (4000, 2)).astype(np.float64)
    target = (codes.sum(1) % 2 == 0).astype(np.float64)
    features = [Feature(name=name, kind="categorical", cardinality=4) for name in "ab"]

    class Parity(Shards):
        def read(self, range: Range) -> Iterator[Batch]:
            return iter([Batch(codes[range.start : range.stop], target[range.start : range.stop])])

        def sample_batch(self) -> Batch:
            return Batch(codes, target)

    run = run_of(tmp_path)
    splits = run.shards.splits
    run.shards = Parity(run.shards.folder, features, {**splits, "valid": splits["train"]})
    model = trained(Linear, run, epochs=10, learning_rate=0.1, crosses=[["a", "b"]], buckets=512)
    alone = trained(Linear, run, epochs=10, learning_rate=0.1)
    assert model is not None and alone is not None
    assert roc_auc_score(target, scores(model, codes)) > 0.999
    assert roc_auc_score(target, scores(alone, codes)) < 0.6


def test_l1_makes_weights_zero_and_l2_makes_them_small(unexported: None, tmp_path: Path) -> None:
    def weights(**params: Any) -> np.ndarray:
        model = trained(Linear, run_of(tmp_path), epochs=10, learning_rate=0.05, early_stopping=None, **params)
        assert model is not None
        found = network_fit.read_tensors(model.weights)
        return np.concatenate([found["numbers"].numpy().ravel(), found["table"].numpy().ravel()])

    plain, sparse, small = weights(), weights(l1=0.02), weights(l2=0.5)
    assert np.count_nonzero(sparse) < np.count_nonzero(plain) - 2 and np.count_nonzero(sparse) > 0
    assert 0 < np.linalg.norm(small) < 0.5 * np.linalg.norm(plain)


def test_a_loss_that_is_no_number_stops_with_what_was_seen(unexported: None, tmp_path: Path) -> None:
    run = run_of(tmp_path, every=5)

    class Poisoned(Shards):
        reads = 0

        def read(self, range: Range) -> Iterator[Batch]:
            for batch in super().read(range):
                yield batch._replace(target=batch.target * (np.nan if range.file.endswith("b.parquet") else 1.0))

        def sample_batch(self) -> Batch:
            found = super().sample_batch()
            found.matrix[5, 2] = 3e9
            return found

    run.shards = Poisoned(run.shards.folder, run.shards.features, run.shards.splits)
    trained(MLP, run, epochs=2, learning_rate=0.01)
    assert run.refused is not None
    assert "train: the loss is nan in step " in run.refused and "with a learning rate of 0.0" in run.refused
    assert "columns with extreme values: z (3e+09)" in run.refused and "lower model.params.learning_rate" in run.refused
    assert not any("final" in state for _, _, state in run.kept)


def test_a_loss_that_diverges_stops(unexported: None, tmp_path: Path) -> None:
    run = run_of(tmp_path, NUMBER)
    settings = {"learning_rate": 1.5, "optimizer": "sgd", "gradient_clip": None, "early_stopping": None, "warmup": 0.0}
    trained(Linear, run, NUMBER, epochs=60, **settings)
    assert run.refused is not None and "that of a constant answer is 1, in step " in run.refused


def test_a_category_that_training_has_not_seen_counts_as_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sample = np.column_stack([rng.normal(size=300), rng.integers(0, 4, 300), rng.integers(0, 90, 300), rng.normal(size=300)])
    layout = Layout.of(MLPParams(d_block=8), BINARY, FEATURES, sample.astype(np.float64), np.zeros(300))
    columns = build(layout).columns
    assert isinstance(columns, torch.nn.Module)

    def inputs(c: float, d: float) -> torch.Tensor:
        return columns(torch.zeros(1, 2), torch.zeros(1, 0), torch.tensor([[int(c), int(d)]]))[0]

    one_hot, embedded = slice(32, 38), slice(38, None)
    assert inputs(4, 99)[one_hot].abs().sum() == 0 and inputs(4, 99)[embedded].abs().sum() == 0
    assert inputs(2, 5)[one_hot].tolist() == [0, 0, 1, 0, 0, 0] and inputs(2, 5)[embedded].abs().sum() > 0


@pytest.mark.parametrize(
    ("family", "params", "message"),
    [
        (MLP, {"metric": "rmse"}, r"model.params.metric: 'rmse' is no metric of a binary task"),
        (Linear, {"crosses": [["c", "z"]]}, r"model.params.crosses: 'z' is no feature with codes.*step 'bin'"),
        (MLP, {"n_frequencies": 7}, r"n_frequencies goes with num_embeddings: periodic"),
        (TabM, {"dropout": 1.0}, r"dropout"),
        (TabM, {"learning_rate": 0.0}, r"learning_rate"),
        (Linear, {"d_block": 7}, r"d_block"),
    ],
)
def test_what_cannot_be_is_one_line(family: type[FittedNetwork], params: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message):
        family.check(checked(family.Params, params, ("model", "params")), BINARY, worker(tmp_path).shards, 1)


@pytest.mark.parametrize(
    ("rows", "batch", "linear"), [(10, 64, 64), (7_300, 64, 64), (26_000, 256, 256), (262_000, 1024, 2048), (10**9, 1024, 4096)]
)
def test_a_batch_grows_with_the_table_unless_it_is_named(rows: int, batch: int, linear: int) -> None:
    assert (MLPParams().rows_of_batch(rows), LinearParams().rows_of_batch(rows)) == (batch, linear)
    assert TabMParams(batch_size=300).rows_of_batch(rows) == 300
    assert MLPParams().steps(rows) == -(-rows // batch)


def test_the_learning_rate_rises_and_falls() -> None:
    params = NetworkParams(learning_rate=1.0, warmup=0.1)
    rates = [params.learning_rate_at(step, 100) for step in range(100)]
    assert np.argmax(rates) == 10 and rates[10] == 1.0 and 0 < rates[0] < 0.1
    assert all(one > other for one, other in itertools.pairwise(rates[10:])) and 0 < rates[-1] < 0.001


def test_a_replica_that_answers_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys; import pipelines.artifact; from pipelines.registry import MODELS, load; [load(MODELS, name, '') for name in MODELS]; import onnxruntime; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("params", [LinearParams(), MLPParams(), TabMParams(), TabMParams(d_block=1024)])
def test_memory_grows_with_what_a_network_is_made_of(params: NetworkParams) -> None:
    def memory(**changed: Any) -> int:
        return FittedNetwork.memory(type(params).model_validate({**params.model_dump(), **changed}), 10**6, 30, 1)

    assert 350 << 20 < memory() < 8 << 30
    assert memory(batch_size=2 * params.largest_batch) > memory()
    assert FittedNetwork.memory(params, 10**9, 30, 1) < memory() + (400 << 20)  # pools, not the split


def test_a_worker_without_a_gpu_computes_on_the_cpu_whatever_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    run = run_of(tmp_path)
    assert network_fit.device_of(run).type == "cpu"
    run.gpu = True
    assert network_fit.device_of(run).type == "cuda"


def test_a_gpu_computes_in_bfloat16_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(Linear, LinearParams(), BINARY, run_of(tmp_path))
    assert not isinstance(training._precision(), torch.autocast)
    monkeypatch.setattr(training, "_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype: (device, dtype))
    assert training._precision() == ("cuda", torch.bfloat16)


def test_a_compiled_network_takes_the_steps_of_one_that_is_not(
    unexported: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = torch.compile
    compiled: list[Any] = []

    def captured(network: Any) -> Any:
        compiled.append(network)
        return compile(network, backend="eager")  # what is captured, without a C++ compiler

    monkeypatch.setattr(torch, "compile", captured)
    found = []
    for wanted in (False, True):
        run = run_of(tmp_path)
        run.compile = wanted
        trained(TabM, run, epochs=1, dropout=0.0)
        found.append(run.logged[-1][1]["valid"]["logloss"])
    assert len(compiled) == 1 and found[0] == pytest.approx(found[1], abs=1e-5)
