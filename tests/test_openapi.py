"""Whatever a request looks like, the service does not fail: the OpenAPI document, tried out."""

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hm_reco.api.app import create_app

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


def test_no_request_makes_the_service_fail(trained_lake):
    app = create_app(trained_lake)
    tried = set()
    with TestClient(app):  # loads the model
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        for found in schema.get_all_operations():
            operation = found.ok()

            @given(case=operation.as_strategy())
            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
            def attempt(case):
                answer = case.call_and_validate(checks=CHECKS)
                tried.add((case.path, answer.status_code))

            attempt()
    paths = {path for path, _ in tried}
    assert paths == {
        "/predict",
        "/similar",
        "/feedback",
        "/healthz",
        "/readyz",
        "/model",
        "/metrics",
    }
    assert {code for path, code in tried if path == "/predict"} >= {200}
