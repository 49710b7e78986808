"""What a served model answers to every kind of request, right or wrong, without Ray and without a trained model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.artifact import Artifact
from pipelines.contract import Contract
from pipelines.errors import ArtifactError
from pipelines.schema import Column, Schema
from pipelines.tasks import Task
from serve import auth
from serve.overview import Standing, build_root
from serve.routes import ModelApp, build_app
from serve.spec import LimitsSpec

TOKEN = "a-token-of-enough-length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
MODEL = "/v2/models/houses"
ROW: dict[str, Any] = {"rooms": 4, "age": 31.5, "garden": True, "city": "Ulm", "sold": "2024-02-29T12:00:00"}
COLUMNS = [
    Column(name="rooms", type="int64", kind="numeric", nullable=False),
    Column(name="age", type="float64", kind="numeric"),
    Column(name="garden", type="bool", kind="boolean"),
    Column(name="city", type="string", kind="categorical", nullable=False),
    Column(name="sold", type="timestamp", kind="datetime"),
]
PROFILE = {
    "columns": {
        "rooms": {"min": 1.0, "max": 9.0},
        "age": {"min": -0.5, "max": 120.25},
        "garden": {"min": 0.0, "max": 1.0},
        "city": {"distinct": 3, "top": [["Ulm", 7], ["Bern", 2]]},
        "sold": {"min": 0.0, "max": 86_400_000_000.0},
    }
}
BINARY = Task(type="binary", target="y", target_type="bool", classes=[False, True])


class FakeArtifact:
    """An Artifact's interface over the real contract of columns; the model is the number of rooms."""

    def __init__(self, task: Task = BINARY) -> None:
        self.version = "20260101-000000-abcd"
        self.task = task
        self.inputs = COLUMNS
        self.examples = [ROW]
        self.profile = PROFILE
        self.contract = Contract(Schema(columns=COLUMNS))
        self.during: Callable[[], object] = lambda: None

    def check(self) -> None:
        self.predict_rows(self.examples)

    def ignored(self, rows: list[Any]) -> int:
        return self.contract.ignored(rows)

    def predict_rows(self, rows: list[Any]) -> list[dict[str, Any]]:
        checked = self.contract.check_rows(rows)
        self.during()
        return [self._answer(row["rooms"] / 10) for row in checked]

    def _answer(self, score: float) -> dict[str, Any]:
        if self.task.type == "regression":
            return {"value": score}
        if self.task.type == "multiclass":
            return {"label": "b", "probabilities": {"a": 0.25, "b": 0.75}}
        return {"label": score >= 0.5, "probability": score}


def app_of(artifact: FakeArtifact | None = None, *, limits: LimitsSpec | None = None, token: bool = True) -> ModelApp:
    tokens = auth.digests({"one": TOKEN}) if token else {}
    return build_app(cast(Artifact, artifact or FakeArtifact()), "houses", limits=limits, tokens=tokens)


def ask(app: Any, method: str, path: str, *, headers: dict[str, str] | None = None, **kwargs: Any) -> httpx.Response:
    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://heliostat") as client:
            return await client.request(method, path, headers=BEARER if headers is None else headers, **kwargs)

    return asyncio.run(request())


def predict(body: Any, app: ModelApp | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(app or app_of(), "POST", f"{MODEL}/predict", content=content)


def infer(body: Any, app: ModelApp | None = None) -> httpx.Response:
    return ask(app or app_of(), "POST", f"{MODEL}/infer", json=body)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) <= {"message", "row", "column", "found", "expected"}
    error: dict[str, Any] = body["error"]
    return error


def test_rows_are_answered_in_order() -> None:
    response = predict({"rows": [ROW, {**ROW, "rooms": 9}, {**ROW, "rooms": 1}]})

    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "model": "houses",
        "version": "20260101-000000-abcd",
        "predictions": [
            {"label": False, "probability": 0.4},
            {"label": True, "probability": 0.9},
            {"label": False, "probability": 0.1},
        ],
    }


@pytest.mark.parametrize(
    "row",
    [
        {"rooms": 4, "city": "Ulm"},
        {**ROW, "age": None, "garden": None, "sold": None},
        {**ROW, "more": [1, {"deep": None}]},
        {**ROW, "age": 31, "sold": "2024-02-29"},
        dict(reversed(ROW.items())),
    ],
    ids=["optional columns missing", "nulls", "another column", "whole number and date", "another order"],
)
def test_what_the_contract_allows_is_answered(row: dict[str, Any]) -> None:
    assert predict({"rows": [row]}).json()["predictions"] == [{"label": False, "probability": 0.4}]


class Explained(FakeArtifact):
    """It takes a second to say that all is due to the rooms."""

    @property
    def explaining(self) -> Any:
        return self

    def explain_s(self) -> float:
        return 1.0

    def predict_rows(self, rows: list[Any], *, explain: bool = False) -> list[dict[str, Any]]:
        more = {"base": 0.25, "contributions": {"rooms": 0.5}} if explain else {}
        return [answer | more for answer in super().predict_rows(rows)]


def explain(query: str, rows: int, artifact: FakeArtifact, **limits: Any) -> httpx.Response:
    return ask(app_of(artifact, limits=LimitsSpec(**limits)), "POST", f"{MODEL}/predict{query}", json={"rows": [ROW] * rows})


@pytest.mark.parametrize(
    ("query", "explained"),
    [("", False), ("?explain=false", False), ("?explain=true", True), ("?other=%FF&explain=true", True), ("?other=true", False)],
)
def test_contributions_are_answered_where_they_are_asked_for(query: str, explained: bool) -> None:
    [answer] = explain(query, 1, Explained()).json()["predictions"]

    assert ("contributions" in answer, "base" in answer) == (explained, explained)
    assert answer["probability"] == 0.4


def test_contributions_never_hold_up_the_event_loop() -> None:
    artifact, threads = Explained(), list[str]()
    artifact.during = lambda: threads.append(threading.current_thread().name)
    app = app_of(artifact)
    for query in ("", "?explain=true"):
        ask(app, "POST", f"{MODEL}/predict{query}", json={"rows": [ROW]})

    assert [name.startswith("predict") for name in threads[-2:]] == [False, True]


@pytest.mark.parametrize("query", ["?explain=yes", "?explain", "?explain=true&explain=false", "?explain=%FF%00"])
def test_another_way_to_ask_for_contributions_is_refused(query: str) -> None:
    response = explain(query, 1, Explained())

    assert response.status_code == 422
    assert error_of(response)["expected"] == "true or false"


def test_more_rows_than_there_is_time_to_explain_are_refused() -> None:
    assert explain("?explain=true", 3, Explained(), timeout_s=3.5).status_code == 200
    response = explain("?explain=true", 4, Explained(), timeout_s=3.5)

    assert response.status_code == 413
    assert error_of(response) == {
        "message": "there are too many rows to explain in one request", "found": 4, "expected": "at most 3 rows",
    }  # fmt: skip
    assert explain("", 4, Explained(), timeout_s=3.5).status_code == 200


def test_a_model_without_contributions_says_so() -> None:
    class Plain(FakeArtifact):
        @property
        def explaining(self) -> Any:
            raise ArtifactError("houses cannot be explained")

    response = explain("?explain=true", 1, Plain())

    assert (response.status_code, error_of(response)["message"]) == (422, "houses cannot be explained")


def test_no_rows_have_no_predictions() -> None:
    assert predict({"rows": []}).json()["predictions"] == []


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({**ROW, "city": 7}, {"column": "city", "found": 7, "expected": "string"}),
        ({**ROW, "rooms": "4"}, {"column": "rooms", "found": "4", "expected": "integer"}),
        ({**ROW, "rooms": 4.5}, {"column": "rooms", "found": 4.5, "expected": "integer"}),
        ({**ROW, "rooms": 10**30}, {"column": "rooms", "found": 1e30, "expected": "integer"}),
        ({**ROW, "rooms": True}, {"column": "rooms", "found": True, "expected": "integer"}),
        ({**ROW, "rooms": None}, {"column": "rooms", "expected": "integer"}),
        ({**ROW, "age": "old"}, {"column": "age", "found": "old", "expected": "number"}),
        ({**ROW, "garden": 1}, {"column": "garden", "found": 1, "expected": "boolean"}),
        ({key: value for key, value in ROW.items() if key != "city"}, {"column": "city", "expected": "string"}),
    ],
)
def test_a_wrong_value_is_named_by_row_and_column(row: dict[str, Any], facts: dict[str, Any]) -> None:
    response = predict({"rows": [ROW, row]})

    assert response.status_code == 422
    error = error_of(response)
    message = error.pop("message")
    assert error == {"row": 1, **facts}
    assert "row 1" in message


def test_a_wrong_timestamp_is_named() -> None:
    error = error_of(predict({"rows": [{**ROW, "sold": "yesterday"}]}))

    assert (error["row"], error["column"], error["found"]) == (0, "sold", "yesterday")
    assert error["expected"].startswith("ISO 8601")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b'{"rows": [',
        b'{"rows": [{"rooms": NaN}]}',
        b'{"rows": [{"rooms": Infinity}]}',
        b'{"rows": [{"rooms": 1e999}]}',
        b'{"rows": "\xff"}',
        b"[" * 100_000,
        b'{"rows": ' + b"[" * 500 + b"]" * 500 + b"}",
        b"null",
        b"[]",
        b"{}",
        b'{"rows": null}',
        b'{"rows": {"rooms": 1}}',
        b'{"rows": ["rooms"]}',
        b'{"rows": [null]}',
        b'{"rows": [[1, 2]]}',
        b'{"rows": [{}]}',
        b'{"inputs": []}',
    ],
)
@pytest.mark.parametrize("operation", ["predict", "infer"])
def test_a_body_of_another_shape_is_the_clients_fault(body: bytes, operation: str) -> None:
    response = ask(app_of(), "POST", f"{MODEL}/{operation}", content=body)

    assert response.status_code == 422
    assert error_of(response)["message"]


def test_a_large_wrong_value_is_not_sent_back() -> None:
    response = predict({"rows": [{**ROW, "age": "x" * 1_000_000}]})

    assert response.status_code == 422
    assert len(response.content) < 1000


def test_too_many_rows_are_refused() -> None:
    app = app_of(limits=LimitsSpec(rows=3))

    assert predict({"rows": [ROW] * 3}, app).status_code == 200
    for response in [
        predict({"rows": [ROW] * 4}, app),
        infer({"inputs": [tensor("rooms", "INT64", [1, 2, 3, 4])]}, app),
    ]:
        assert response.status_code == 413
        assert error_of(response) == {
            "message": "there are too many rows in one request",
            "found": 4,
            "expected": "at most 3 rows",
        }


def test_a_large_body_is_refused_whether_it_says_its_size_or_not() -> None:
    app = app_of(limits=LimitsSpec(body_mb=0.01))

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 1000

    for content in (b" " * 20_000, chunks()):
        response = ask(app, "POST", f"{MODEL}/predict", content=content)
        assert response.status_code == 413
        assert error_of(response)["expected"] == "at most 10485 bytes"


def test_a_compressed_body_is_refused() -> None:
    response = ask(app_of(), "POST", f"{MODEL}/predict", headers={**BEARER, "Content-Encoding": "gzip"}, content=b"x")

    assert response.status_code == 415


def test_a_body_in_pieces_is_put_together() -> None:
    body = json.dumps({"rows": [ROW]}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for position in range(0, len(body), 7):
            yield body[position : position + 7]

    assert ask(app_of(), "POST", f"{MODEL}/predict", content=pieces()).status_code == 200


def test_a_large_body_is_answered_in_a_thread() -> None:
    artifact, threads = FakeArtifact(), set()
    app = app_of(artifact)
    artifact.during = lambda: threads.add(threading.current_thread())

    assert predict({"rows": [ROW]}, app).status_code == 200
    assert threads == {threading.main_thread()}
    assert len(predict({"rows": [ROW] * 500}, app).json()["predictions"]) == 500
    assert len(threads) == 2


def test_beyond_the_limit_in_flight_a_request_is_told_to_come_again() -> None:
    artifact = FakeArtifact()
    app = app_of(artifact, limits=LimitsSpec(in_flight=1))
    entered, leave = threading.Event(), threading.Event()
    artifact.during = lambda: (entered.set(), leave.wait(5))
    large = json.dumps({"rows": [ROW] * 500}).encode()

    async def two() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://heliostat", headers=BEARER) as client:
            first = asyncio.create_task(client.post(f"{MODEL}/predict", content=large))
            await asyncio.to_thread(entered.wait, 5)
            second = await client.post(f"{MODEL}/predict", content=large)
            leave.set()
            return await first, second, await client.post(f"{MODEL}/predict", content=large)

    first, second, third = asyncio.run(two())
    assert (first.status_code, second.status_code, third.status_code) == (200, 429, 200)
    assert int(second.headers["retry-after"]) >= 1
    assert error_of(second)["message"]


def test_a_slow_answer_is_given_up() -> None:
    artifact, leave = FakeArtifact(), threading.Event()
    app = app_of(artifact, limits=LimitsSpec(timeout_s=0.05))
    artifact.during = lambda: leave.wait(5)

    response = predict({"rows": [ROW] * 500}, app)
    leave.set()
    assert response.status_code == 504
    assert error_of(response) == {"message": "the answer took longer than 0.05 s"}


def test_a_client_that_does_not_send_its_body_is_given_up() -> None:
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    app = app_of(limits=LimitsSpec(timeout_s=0.05), token=False)
    scope = {"type": "http", "method": "POST", "path": f"{MODEL}/predict", "headers": [(b"content-length", b"10")]}
    asyncio.run(app(scope, never, send))
    assert sent[0]["status"] == 408


def test_a_refused_body_is_taken_in_so_that_the_answer_is_not_lost() -> None:
    """A server that closes a connection with bytes unread resets it, and the client may never see why."""
    pieces = [{"type": "http.request", "body": b" " * 1000, "more_body": left > 0} for left in reversed(range(50))]
    sent: list[Any] = []

    async def receive() -> Any:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        assert not pieces
        sent.append(message)

    headers = [(b"content-length", b"50000")]
    asyncio.run(app_of()({"type": "http", "method": "POST", "path": f"{MODEL}/predict", "headers": headers}, receive, send))
    assert sent[0]["status"] == 401


def test_a_fault_of_ours_shows_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    artifact = FakeArtifact()
    app = app_of(artifact)

    def fail() -> None:
        raise RuntimeError("a secret of the server")

    artifact.during = fail
    response = predict({"rows": [ROW]}, app)
    assert response.status_code == 500
    assert error_of(response) == {"message": "internal error; the server's log has the details"}
    assert "a secret of the server" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"{MODEL}/predict", 405),
        ("PUT", f"{MODEL}/infer", 405),
        ("POST", MODEL, 405),
        ("GET", f"{MODEL}/nothing", 404),
        ("GET", "/v2/models/other", 404),
    ],
)
def test_other_paths_and_methods_are_refused_in_the_same_shape(method: str, path: str, status: int) -> None:
    response = ask(app_of(), method, path)

    assert response.status_code == status
    assert error_of(response)["message"]
    assert status != 405 or response.headers["allow"] in ("GET", "POST")


@pytest.mark.parametrize("path", ["", "/ready", "/predict", "/infer", "/nothing", "/openapi.json"])
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong-token"}])
def test_nothing_is_answered_without_the_token(path: str, headers: dict[str, str]) -> None:
    for method in ("GET", "POST"):
        response = ask(app_of(), method, MODEL + path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert error_of(response)["message"]


def test_without_tokens_it_is_open() -> None:
    response = ask(app_of(token=False), "POST", f"{MODEL}/predict", headers={}, json={"rows": [ROW]})

    assert response.status_code == 200


def test_an_artifact_that_cannot_predict_its_examples_is_not_served() -> None:
    artifact = FakeArtifact()
    artifact.examples = [{**ROW, "city": 7}]

    with pytest.raises(Exception, match="city"):
        app_of(artifact)


# The Open Inference Protocol


def tensor(name: str, datatype: str, data: list[Any], shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": data}


INPUTS = [
    tensor("rooms", "INT64", [4, 9]),
    tensor("age", "FP64", [31.5, None]),
    tensor("garden", "BOOL", [True, None]),
    tensor("city", "BYTES", ["Ulm", "new"]),
    tensor("sold", "BYTES", ["2024-02-29T12:00:00", None]),
]


def test_metadata_names_inputs_and_outputs() -> None:
    assert ask(app_of(), "GET", MODEL).json() == {
        "name": "houses",
        "versions": ["20260101-000000-abcd"],
        "platform": "heliostat",
        "inputs": [
            {"name": "rooms", "datatype": "INT64", "shape": [-1]},
            {"name": "age", "datatype": "FP64", "shape": [-1]},
            {"name": "garden", "datatype": "BOOL", "shape": [-1]},
            {"name": "city", "datatype": "BYTES", "shape": [-1]},
            {"name": "sold", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "label", "datatype": "BOOL", "shape": [-1]},
            {"name": "probability", "datatype": "FP64", "shape": [-1]},
        ],
    }
    assert ask(app_of(), "GET", f"{MODEL}/ready").json() == {"name": "houses", "ready": True}


def test_tensors_are_answered_as_rows_are() -> None:
    response = infer({"id": "42", "inputs": INPUTS})

    assert response.status_code == 200
    assert response.json() == {
        "id": "42",
        "model_name": "houses",
        "model_version": "20260101-000000-abcd",
        "outputs": [tensor("label", "BOOL", [False, True]), tensor("probability", "FP64", [0.4, 0.9])],
    }


@pytest.mark.parametrize(
    "inputs",
    [
        [tensor("rooms", "INT64", [4]), tensor("city", "BYTES", ["Ulm"])],
        [tensor("rooms", "INT32", [4], [1, 1]), tensor("city", "BYTES", [["Ulm"]], [1, 1])],
        [tensor("city", "BYTES", ["Ulm"]), tensor("more", "FP16", [1, 2, 3]), tensor("rooms", "UINT8", [4])],
        [tensor("city", "BYTES", ["Ulm"]), tensor("rooms", "INT64", [4]), tensor("age", "FP32", [1.5])],
    ],
    ids=["optional columns missing", "a matrix of one column", "a tensor that is no column", "narrower numbers"],
)
def test_other_ways_to_send_tensors(inputs: list[dict[str, Any]]) -> None:
    assert infer({"inputs": inputs}).json()["outputs"][1]["data"] == [0.4]


def test_only_the_outputs_asked_for_are_answered() -> None:
    body = infer({"inputs": INPUTS, "outputs": [{"name": "probability"}]}).json()

    assert [output["name"] for output in body["outputs"]] == ["probability"]
    assert infer({"inputs": INPUTS, "outputs": [{"name": "nothing"}]}).status_code == 422
    assert infer({"inputs": INPUTS, "outputs": 7}).status_code == 422


@pytest.mark.parametrize(
    ("changed", "column"),
    [
        (tensor("rooms", "FP64", [4, 9]), "rooms"),
        (tensor("rooms", "INT64", [4, 9], [1]), "rooms"),
        (tensor("rooms", "INT64", [4, 9], [2, 2]), "rooms"),
        (tensor("rooms", "INT64", [4]), "age"),
        (tensor("rooms", "INT64", [[4], [9, 9]], [2, 1]), "rooms"),
        (tensor("rooms", "INT64", [4, "9"]), "rooms"),
        (tensor("rooms", "INT64", [4, None]), "rooms"),
        ({"name": "rooms", "datatype": "INT64", "shape": [2]}, "rooms"),
        ({"name": "rooms", "datatype": ["INT64"], "shape": [2], "data": [1, 2]}, "rooms"),
        (tensor("city", "BYTES", ["Ulm", "Bern"]), "city"),
    ],
)
def test_a_wrong_tensor_is_named(changed: dict[str, Any], column: str) -> None:
    response = infer({"inputs": [changed, *INPUTS[1:]]})

    assert response.status_code == 422
    assert error_of(response)["column"] == column


@pytest.mark.parametrize("inputs", [None, {}, [7], [{"datatype": "BOOL"}], [tensor("more", "FP64", [1])]])
def test_tensors_of_another_shape_are_the_clients_fault(inputs: Any) -> None:
    assert infer({"inputs": inputs}).status_code == 422


def test_other_tasks_have_other_outputs() -> None:
    several = Task(type="multiclass", target="y", target_type="string", classes=["a", "b"])
    value = Task(type="regression", target="y", target_type="float64")
    inputs = {"inputs": INPUTS}

    assert infer(inputs, app_of(FakeArtifact(several))).json()["outputs"] == [
        tensor("label", "BYTES", ["b", "b"]),
        {**tensor("probabilities", "FP64", [0.25, 0.75, 0.25, 0.75], [2, 2]), "parameters": {"classes": ["a", "b"]}},
    ]
    assert infer(inputs, app_of(FakeArtifact(value))).json()["outputs"] == [tensor("value", "FP64", [0.4, 0.9])]
    assert predict({"rows": [ROW]}, app_of(FakeArtifact(value))).json()["predictions"] == [{"value": 0.4}]


# Nothing a client sends is a fault of the server

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rows", "inputs", *ROW]), inner, max_size=3),
    max_leaves=8,
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from([*ROW, "more"]) | JSON,
        "datatype": st.sampled_from(["BOOL", "INT64", "FP64", "BYTES"]) | JSON,
        "shape": st.sampled_from([[1], [2], [1, 1]]) | JSON,
        "data": st.lists(JSON, max_size=2) | JSON,
    },
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.fixed_dictionaries({"rows": st.lists(st.dictionaries(st.sampled_from([*ROW]), JSON) | JSON, max_size=3) | JSON}),
    tensors=st.fixed_dictionaries({"inputs": st.lists(TENSOR, max_size=3), "outputs": JSON}),
    other=JSON,
)
def test_no_json_makes_the_server_fail(rows: Any, tensors: Any, other: Any) -> None:
    app = app_of()
    for body in (rows, tensors, other):
        text = json.dumps(body).encode("utf-8", "surrogatepass")  # NaN and lone surrogates too
        for operation in ("predict", "infer"):
            assert ask(app, "POST", f"{MODEL}/{operation}", content=text).status_code in (200, 422)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=50))
def test_no_bytes_make_the_server_fail(body: bytes) -> None:
    assert predict(body).status_code == 422


# What the root says about all models


def root_of(*models: Standing) -> Any:
    async def standings() -> list[Standing]:
        return list(models)

    return build_root(standings)


def standing(name: str, *, token: str | None = TOKEN, replicas: int = 1) -> Standing:
    tokens = auth.digests({"one": token}) if token else {}
    card = build_app(cast(Artifact, FakeArtifact()), name, tokens=tokens).card()
    return Standing(name=name, ready=replicas > 0, replicas=replicas, card=card)


def test_health_needs_no_token() -> None:
    root = root_of(standing("houses"), standing("flights", replicas=0))

    assert ask(root, "GET", "/v2/health/live", headers={}).json() == {"live": True}
    response = ask(root, "GET", "/v2/health/ready", headers={})
    assert (response.status_code, response.json()) == (503, {"ready": False})
    assert ask(root_of(standing("houses")), "GET", "/v2/health/ready", headers={}).status_code == 200


def test_the_overview_lists_what_the_token_opens() -> None:
    root = root_of(standing("flights", token="a-token-of-someone-else"), standing("houses", replicas=2))
    houses = {"name": "houses", "version": "20260101-000000-abcd", "ready": True, "replicas": 2, "url": "/v2/models/houses"}

    assert ask(root, "GET", "/v2/models").json() == {"models": [houses]}
    assert ask(root, "GET", "/v2/models", headers={}).status_code == 401
    assert ask(root_of(), "GET", "/v2/models", headers={}).json() == {"models": []}


@pytest.mark.parametrize("path", ["/v2/models", "/docs", "/openapi.json", "/nothing", "/v2/models/houses/predict"])
def test_the_root_asks_for_the_token(path: str) -> None:
    response = ask(root_of(standing("houses")), "GET", path, headers={})

    assert response.status_code == 401
    assert error_of(response)["message"]


def test_an_unknown_model_is_404_with_the_nearest_name() -> None:
    response = ask(root_of(standing("houses")), "POST", "/v2/models/house/predict")

    assert response.status_code == 404
    assert "did you mean 'houses'" in error_of(response)["message"]
    assert ask(root_of(), "GET", "/nothing").status_code == 404
    assert ask(root_of(), "POST", "/v2/models").status_code == 405


def test_one_document_describes_all_models() -> None:
    document = ask(root_of(standing("houses"), standing("flights")), "GET", "/openapi.json").json()

    assert document["openapi"] == "3.1.0"
    assert {"/v2/models/houses/predict", "/v2/models/flights/infer"} <= set(document["paths"])
    assert document["security"] == [{"token": []}]
    assert _dangling(document) == set()
    assert "/openapi.json" in ask(root_of(), "GET", "/docs").text


def test_the_document_comes_from_the_schema() -> None:
    document = ask(app_of(), "GET", f"{MODEL}/openapi.json").json()
    row = document["components"]["schemas"]["houses.Row"]
    columns = row["properties"]

    assert row["required"] == ["rooms", "city"]
    assert row["examples"] == [ROW]
    assert columns["rooms"]["type"] == "integer"
    assert columns["rooms"]["x-range"] == [1, 9]
    assert columns["age"]["type"] == ["number", "null"]
    assert columns["age"]["x-range"] == [-0.5, 120.25]
    assert columns["garden"]["type"] == ["boolean", "null"]
    assert columns["city"]["x-categories"] == ["Ulm", "Bern"]
    assert "known: Ulm, Bern, ...; required" in columns["city"]["description"]
    assert columns["sold"]["format"] == "date-time"
    assert columns["sold"]["x-range"] == ["1970-01-01T00:00:00", "1970-01-02T00:00:00"]
    assert document["components"]["schemas"]["houses.Rows"]["properties"]["rows"]["maxItems"] == 10_000
    assert _dangling(document) == set()


def test_a_column_that_was_parsed_from_texts_takes_texts_and_values() -> None:
    artifact = FakeArtifact()
    artifact.inputs = [COLUMNS[0].model_copy(update={"text": "number"}), *COLUMNS[1:4]]
    artifact.inputs.append(COLUMNS[4].model_copy(update={"text": "D.M.Y"}))
    artifact.contract = Contract(Schema(columns=artifact.inputs))
    app = app_of(artifact)
    row = ask(app, "GET", f"{MODEL}/openapi.json").json()["components"]["schemas"]["houses.Row"]["properties"]

    assert row["rooms"]["type"] == ["integer", "string"]
    assert row["sold"]["type"] == ["string", "null"] and "format" not in row["sold"] and "(D.M.Y)" in row["sold"]["description"]
    rows = [{**ROW, "rooms": "4", "sold": "29.2.2024"}, {**ROW, "rooms": 4}]
    assert [p["probability"] for p in predict({"rows": rows}, app).json()["predictions"]] == [0.4, 0.4]
    assert predict({"rows": [{**ROW, "rooms": "four"}]}, app).json()["error"]["found"] == "four"
    tensors = {name: ("BYTES", [value]) for name, value in (("rooms", "4"), ("city", "Ulm"))}
    inputs = [{"name": name, "datatype": kind, "shape": [1], "data": data} for name, (kind, data) in tensors.items()]
    assert infer({"inputs": inputs}, app).status_code == 200


def test_the_example_of_the_document_is_answered() -> None:
    schemas = ask(app_of(), "GET", f"{MODEL}/openapi.json").json()["components"]["schemas"]

    assert predict(schemas["houses.Rows"]["examples"][0]).status_code == 200
    assert infer(schemas["houses.InferRequest"]["examples"][0]).status_code == 200


def _dangling(document: dict[str, Any]) -> set[str]:
    """References to components that are not there."""
    text = json.dumps(document)
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    return {part.split('"')[0] for part in text.split('"$ref": "')[1:]} - known
