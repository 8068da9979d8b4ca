"""The REST service, by FastAPI's client and by a real process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from hm_reco.core.lake import Lake, put_file, scan
from hm_reco.core.registry import champion
from hm_reco.model.history import load_history
from hm_reco.service.app import create_app
from hm_reco.service.contract import EXAMPLE
from hm_reco.service.guard import MAX_BODY
from hm_reco.stages.inference import portraits
from tests.conftest import free_port, wait_for


@pytest.fixture(scope="module")
def client(trained_lake: Lake):
    with TestClient(create_app(trained_lake)) as client:
        yield client


@pytest.fixture(scope="module")
def loyal(trained_lake: Lake) -> str:
    return portraits(load_history(trained_lake))["loyal"]


def test_health_tells_the_model(client, trained_lake):
    health = client.get("/healthz").json()
    assert health["status"] == "ok" and health["model_version"] == champion(trained_lake)
    assert health["as_of"] == "2020-09-23" and health["loaded_since"]


def test_known_and_unknown_customers_are_answered(client, loyal):
    answer = client.post("/predict", json={"customer_ids": [loyal, "a-stranger"], "k": 5}).json()
    known, stranger = answer["recommendations"]
    assert (known["customer_id"], known["cold"]) == (loyal, False)
    assert (stranger["customer_id"], stranger["cold"]) == ("a-stranger", True)
    for part in (known, stranger):
        scores = [article["score"] for article in part["articles"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        assert len({article["article_id"] for article in part["articles"]}) == 5
        assert all(article["source"] for article in part["articles"])
    assert answer["model_version"]


def test_twelve_is_the_default_and_a_hundred_the_most(client):
    for body, count in (({}, 12), ({"k": 100}, 100)):
        answer = client.post("/predict", json={"customer_ids": ["x"]} | body).json()
        assert len(answer["recommendations"][0]["articles"]) == count


def test_recent_articles_warm_a_stranger(client, trained_lake):
    ids = scan(trained_lake, "raw/articles").head(3).collect()["article_id"].to_list()
    body = {"customer_ids": ["x"], "recent_articles": [*ids, "0000000000"]}
    warm = client.post("/predict", json=body).json()["recommendations"][0]
    cold = client.post("/predict", json={"customer_ids": ["x"]}).json()["recommendations"][0]
    assert not warm["cold"] and cold["cold"] and warm["articles"] != cold["articles"]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"customer_ids": 7}, "customer_ids"),
        ({"customer_ids": []}, "customer_ids"),
        ({"customer_ids": ["x"] * 101}, "customer_ids"),
        ({"customer_ids": ["x" * 65]}, "customer_ids"),
        ({"customer_ids": ["x"], "k": 0}, "k"),
        ({"customer_ids": ["x"], "k": 101}, "k"),
        ({"customer_ids": ["x"], "recent_articles": ["12"]}, "recent_articles"),
        ({"customer_ids": ["x"], "recent_articles": ["0108775015"] * 51}, "recent_articles"),
        ({"customer_ids": ["x"], "kk": 3}, "kk"),
        ({}, "customer_ids"),
    ],
)
def test_a_malformed_request_is_told_what_is_wrong(client, body, where):
    answer = client.post("/predict", json=body)
    assert answer.status_code == 422
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["status"] == 422 and problem["request_id"] == answer.headers["x-request-id"]
    assert any(error["field"].split(".")[0] == where for error in problem["errors"])


def test_no_json_and_too_much_of_it(client):
    assert client.post("/predict", content=b"{not json").status_code == 422
    assert client.post("/predict", content=b"[" * (MAX_BODY + 1)).status_code == 413


def test_without_a_model_the_service_says_so(lake):
    with TestClient(create_app(lake)) as client:
        assert client.get("/healthz").json()["status"] == "no model"
        answer = client.post("/predict", json=EXAMPLE)
    assert answer.status_code == 503 and "hm run" in answer.json()["detail"]


def test_the_openapi_example_runs(client):
    schema = client.get("/openapi.json").json()["components"]["schemas"]["PredictRequest"]
    answer = client.post("/predict", json=schema["examples"][0])
    assert answer.status_code == 200 and len(answer.json()["recommendations"][0]["articles"]) == 3


def test_a_real_process_serves(trained_lake, loyal):
    command = [str(Path(sys.executable).with_name("hm")), "serve", "--lake", trained_lake.root]
    environment = os.environ | {"HM_PORT": str(free_port())}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{environment['HM_PORT']}"
            wait_for(f"{url}/healthz")
            answer = httpx.post(f"{url}/predict", json={"customer_ids": [loyal]}, timeout=60)
            assert answer.status_code == 200
            assert len(answer.json()["recommendations"][0]["articles"]) == 12
            assert httpx.post(f"{url}/predict", json={"customer_ids": 7}).status_code == 422
        finally:
            process.terminate()
            _, log = process.communicate(timeout=30)
    assert re.search(r"Application shutdown complete", log)


def test_scores_are_json_numbers(client):
    text = client.post("/predict", json={"customer_ids": ["x"], "k": 1}).text
    assert isinstance(json.loads(text)["recommendations"][0]["articles"][0]["score"], float)


def test_reports_are_offered_and_nothing_else(trained_lake: Lake):
    put_file(trained_lake.path("reports", "index.html"), "<p>all runs")
    put_file(trained_lake.path("reports", "r1", "eda.html"), "<p>a report")
    put_file(trained_lake.path("runs", "r1", "eda.ipynb"), "{}")
    put_file(trained_lake.path("runs", "r1", "secret.txt"), "no")
    with TestClient(create_app(trained_lake)) as client:
        for path in ("/reports/", "/reports", "/reports/index.html"):
            assert client.get(path).text == "<p>all runs"
        page = client.get("/reports/r1/eda.html")
        assert page.text == "<p>a report" and page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert client.get("/runs/r1/eda.ipynb").status_code == 200
        for path in (
            "/runs/r1/secret.txt",
            "/reports/none.html",
            "/reports/r1",
            "/reports/%2e%2e/raw/articles/_delta_log/00000000000000000000.json",
            "/reports/..%2fraw%2farticles%2f_delta_log%2f00000000000000000000.json",
            "/reports//etc/passwd.html",
        ):
            assert client.get(path).status_code == 404, path
