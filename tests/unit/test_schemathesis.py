"""What the OpenAPI document says is what the application does, by the requests that schemathesis makes from it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from serve.routes import build_app
from tests.unit.test_requests import trained

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    app = build_app(trained(tmp_path_factory.mktemp("houses"), derive=False), "houses")
    return schemathesis.openapi.from_asgi("/v2/models/houses/openapi.json", app)


@pytest.mark.parametrize(
    ("path", "method"),
    [("", "GET"), ("/ready", "GET"), ("/predict", "POST"), ("/infer", "POST")],
    ids=lambda word: word or "model",
)
def test_the_document_is_kept(document: Any, path: str, method: str) -> None:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as known

    checks = [not_a_server_error, known.status_code_conformance, known.content_type_conformance]
    checks.append(known.response_schema_conformance)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=document[f"/v2/models/houses{path}"][method].as_strategy())
    def keep(case: Any) -> None:
        case.call_and_validate(checks=checks)

    keep()
