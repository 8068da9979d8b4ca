"""Requests generated from the OpenAPI document never cause a server error."""

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


def test_generated_requests_never_cause_server_errors(trained_lake):
    app = create_app(trained_lake)
    observed = set()
    with TestClient(app):  # loads the model
        schema = schemathesis.openapi.from_asgi("/openapi.json", app)
        for result in schema.get_all_operations():
            operation = result.ok()

            @given(case=operation.as_strategy())
            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
            def check_operation(case):
                response = case.call_and_validate(checks=CHECKS)
                observed.add((case.path, response.status_code))

            check_operation()
    paths = {path for path, _ in observed}
    assert paths == {
        "/predict",
        "/similar",
        "/feedback",
        "/healthz",
        "/readyz",
        "/model",
        "/metrics",
    }
    assert {code for path, code in observed if path == "/predict"} >= {200}
