"""The REST service, by FastAPI's client and by a real process."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import boto3
import httpx
import polars as pl
import psutil
import pytest
from fastapi.testclient import TestClient

from hm_reco.api.app import create_app
from hm_reco.api.middleware import MAX_BODY_BYTES
from hm_reco.api.schemas import EXAMPLE, PredictResponse, SimilarResponse
from hm_reco.api.shadow import SHADOW, BoundedExecutor, find_challenger
from hm_reco.data.history import load_history
from hm_reco.data.ingestion import ingest
from hm_reco.data.sources import Source
from hm_reco.lake.settings import ServiceSettings
from hm_reco.lake.storage import Lake, open_lake, write_file
from hm_reco.lake.tables import scan
from hm_reco.registry.bundle import load_bundle, save_bundle
from hm_reco.registry.registry import (
    NoModelError,
    get_champion,
    load_scores,
    promote,
    read_models,
    register_model,
    rollback,
    save_scores,
)
from hm_reco.serving.batch import predict_all, to_external_ids, with_precomputed
from hm_reco.stages.demo import demo_lake
from hm_reco.stages.inference import select_example_customers
from tests.conftest import (
    BUCKET,
    build_s3_environment,
    find_free_port,
    run_moto_server,
    wait_for_url,
    wait_until,
)


@pytest.fixture(scope="module")
def client(trained_lake: Lake):
    with TestClient(create_app(trained_lake)) as client:
        yield client


@pytest.fixture(scope="module")
def loyal(trained_lake: Lake) -> str:
    return select_example_customers(load_history(trained_lake))["loyal"]


def test_health_reports_model_version(client, trained_lake):
    health = client.get("/healthz").json()
    assert health["status"] == "ok" and health["model_version"] == get_champion(trained_lake)
    assert health["as_of"] == "2020-09-23" and health["loaded_at"]


def test_predict_for_known_and_unknown_customers(client, loyal):
    response = client.post(
        "/predict", json={"customer_ids": [loyal, "unknown-customer"], "k": 5}
    ).json()
    known_result, unknown_result = response["recommendations"]
    assert (known_result["customer_id"], known_result["cold"]) == (loyal, False)
    assert (unknown_result["customer_id"], unknown_result["cold"]) == ("unknown-customer", True)
    for recommendation in (known_result, unknown_result):
        scores = [article["score"] for article in recommendation["articles"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        assert len({article["article_id"] for article in recommendation["articles"]}) == 5
        assert all(article["source"] for article in recommendation["articles"])
    assert response["model_version"]


def test_predict_default_and_max_k(client):
    for body, count in (({}, 12), ({"k": 100}, 100)):
        response = client.post("/predict", json={"customer_ids": ["x"]} | body).json()
        assert len(response["recommendations"][0]["articles"]) == count


def test_predict_with_recent_articles_is_not_cold(client, trained_lake):
    ids = scan(trained_lake, "raw/articles").head(3).collect()["article_id"].to_list()
    body = {"customer_ids": ["x"], "recent_articles": [*ids, "0000000000"]}
    session_result = client.post("/predict", json=body).json()["recommendations"][0]
    cold_result = client.post("/predict", json={"customer_ids": ["x"]}).json()["recommendations"][0]
    assert (
        not session_result["cold"]
        and cold_result["cold"]
        and session_result["articles"] != cold_result["articles"]
    )


@pytest.mark.parametrize(
    ("body", "field"),
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
def test_predict_malformed_request_returns_problem(client, body, field):
    response = client.post("/predict", json=body)
    assert response.status_code == 422
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["status"] == 422 and problem["request_id"] == response.headers["x-request-id"]
    assert any(error["field"].split(".")[0] == field for error in problem["errors"])


def test_predict_invalid_or_oversized_body_is_rejected(client):
    assert client.post("/predict", content=b"{not json").status_code == 422
    assert client.post("/predict", content=b"[" * (MAX_BODY_BYTES + 1)).status_code == 413


def test_predict_without_model_returns_503(lake):
    with TestClient(create_app(lake)) as client:
        assert client.get("/healthz").json()["status"] == "no model"
        response = client.post("/predict", json=EXAMPLE)
    assert response.status_code == 503 and "hm run" in response.json()["detail"]


def test_openapi_example_is_valid(client):
    schema = client.get("/openapi.json").json()["components"]["schemas"]["PredictRequest"]
    response = client.post("/predict", json=schema["examples"][0])
    assert (
        response.status_code == 200 and len(response.json()["recommendations"][0]["articles"]) == 3
    )


def test_serve_process_answers_and_shuts_down(trained_lake, loyal):
    command = [str(Path(sys.executable).with_name("hm")), "serve", "--lake", trained_lake.root]
    environment = os.environ | {"HM_PORT": str(find_free_port())}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{environment['HM_PORT']}"
            wait_for_url(f"{url}/healthz")
            response = httpx.post(f"{url}/predict", json={"customer_ids": [loyal]}, timeout=60)
            assert response.status_code == 200
            assert len(response.json()["recommendations"][0]["articles"]) == 12
            assert httpx.post(f"{url}/predict", json={"customer_ids": 7}).status_code == 422
        finally:
            process.terminate()
            _, log = process.communicate(timeout=60)
    assert re.search(r"Application shutdown complete", log)


def list_workers(process: psutil.Process) -> list[psutil.Process]:
    """The worker processes of `hm serve --workers`."""
    workers = []
    for child in process.children(recursive=True):
        with suppress(psutil.Error):  # the process has ended
            workers += [child] * ("spawn_main" in " ".join(child.cmdline()))
    return workers


def send_and_count(stop: threading.Event, url: str, counts: Counter[str]) -> None:
    """Send requests on a connection until `stop`; reconnect when it breaks."""
    while not stop.is_set():
        try:
            with httpx.Client(timeout=60) as client:
                while not stop.is_set():
                    response = client.post(f"{url}/predict", json=EXAMPLE)
                    counts[str(response.status_code)] += 1
        except httpx.TransportError:
            counts["lost"] += 1


def test_killed_worker_loses_in_flight_requests_only(trained_lake):
    port, n_clients = find_free_port(), 6
    command = [str(Path(sys.executable).with_name("hm")), "serve", "--lake", trained_lake.root]
    command += ["--port", str(port), "--workers", "2"]
    stop, counts = threading.Event(), Counter[str]()
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as process,
        ThreadPoolExecutor(n_clients) as pool,
    ):
        try:
            service, url = psutil.Process(process.pid), f"http://127.0.0.1:{port}"
            wait_for_url(f"{url}/readyz")
            for _ in range(n_clients):
                pool.submit(send_and_count, stop, url, counts)
            wait_until(lambda: counts["200"] > n_clients)
            workers = list_workers(service)
            assert len(workers) == 2
            workers[0].kill()
            n_before_kill = counts["200"]
            wait_until(lambda: len({*list_workers(service)} - {workers[0]}) == len(workers))
            wait_until(lambda: counts["200"] > n_before_kill + n_clients)
        finally:
            stop.set()
            process.terminate()
    assert counts["200"] > n_before_kill > 0
    assert 0 <= counts["lost"] <= n_clients and set(counts) <= {"200", "lost"}


READ_ONLY = """
mount --rbind / {root} && mount -o remount,bind,ro {root} && mount -t tmpfs tmpfs {root}/var/tmp &&
exec chroot {root} env -i PATH=/usr/bin:/bin HM_LAKE={lake} {hm} serve --port {port}
"""


def test_serve_on_read_only_root(trained_lake, tmp_path):
    mount_command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(mount_command, check=False).returncode:
        pytest.skip("needs the right to mount")
    hm, port = Path(sys.executable).with_name("hm"), find_free_port()
    script = READ_ONLY.format(root=tmp_path, lake=trained_lake.root, hm=hm, port=port)
    command = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_url(f"http://127.0.0.1:{port}/readyz", 300)
            response = httpx.post(f"http://127.0.0.1:{port}/predict", json=EXAMPLE, timeout=60)
            assert response.status_code == 200
        finally:
            process.terminate()
            _, log = process.communicate(timeout=60)
    assert "Application shutdown complete" in log


def test_predict_while_s3_is_unavailable(trained_lake, tmp_path):
    with run_moto_server() as (url, server), pytest.MonkeyPatch.context() as patch:
        for name, value in build_s3_environment(url).items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        lake = open_lake(f"s3://{BUCKET}/away")
        lake.path().upload_from(Path(trained_lake.root))
        settings = ServiceSettings(registry_poll_seconds=0.1, feedback_flush_seconds=60)
        with TestClient(create_app(lake, settings)) as client:
            body = EXAMPLE | {"k": 30}
            expected = client.post("/predict", json=body).json()["recommendations"]
            server.kill()
            server.wait()
            time.sleep(0.5)  # several polls of the registry
            for path in ("/healthz", "/readyz", "/model", "/metrics", "/"):
                assert client.get(path).status_code == 200, path
            assert client.post("/predict", json=body).json()["recommendations"] == expected


def test_predict_scores_are_json_floats(client):
    text = client.post("/predict", json={"customer_ids": ["x"], "k": 1}).text
    assert isinstance(json.loads(text)["recommendations"][0]["articles"][0]["score"], float)


def test_report_routes_serve_reports_only(tmp_path: Path):
    lake = open_lake(tmp_path)  # a lake of its own: other tests read the reports of the shared one
    write_file(lake.path("reports", "index.html"), "<p>all runs")
    write_file(lake.path("reports", "r1", "eda.html"), "<p>a report")
    write_file(lake.path("runs", "r1", "eda.ipynb"), "{}")
    write_file(lake.path("runs", "r1", "secret.txt"), "no")
    with TestClient(create_app(lake)) as client:
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


def test_predict_equals_batch_predictions(client, trained_lake):
    service = client.app.state.service
    current, history = service.model_manager.current, load_history(trained_lake)
    predictions = predict_all(current.recommender)
    batch = to_external_ids(history, predictions).collect()
    ids = history.customers["customer_id"].sort().to_list()[:1_000]
    precomputed = replace(current, recommender=with_precomputed(current.recommender, predictions))
    expected = batch.filter(pl.col("customer_id").is_in(ids)).sort("customer_id", "rank")
    try:
        for service.model_manager.current in (current, precomputed):
            rows = []
            for offset in range(0, len(ids), 100):
                body = {"customer_ids": ids[offset : offset + 100]}
                for recommendation in client.post("/predict", json=body).json()["recommendations"]:
                    rows += [
                        (recommendation["customer_id"], rank, *list(article.values())[:3])
                        for rank, article in enumerate(recommendation["articles"], 1)
                    ]
            online = pl.DataFrame(rows, batch.schema, orient="row").sort("customer_id", "rank")
            assert online.equals(expected)
    finally:
        service.model_manager.current = current


def test_predict_filters_apply_and_report_shortfall(client, loyal):
    body = {
        "customer_ids": [loyal, "unknown-customer"],
        "k": 100,
        "filters": {"colours": ["black"]},
    }
    response = client.post("/predict", json=body).json()
    catalogue = client.app.state.service.model_manager.current.catalogue.articles
    colours = dict(catalogue.select("article_id", "colour").rows())
    for recommendation in response["recommendations"]:
        assert {colours[article["article_id"]] for article in recommendation["articles"]} == {
            "Black"
        }
        assert len(recommendation["articles"]) + recommendation["shortfall"] == 100
    narrow_body = body | {"filters": {"colours": ["black"], "price": {"min": 1e6}}}
    empty_result = client.post("/predict", json=narrow_body).json()["recommendations"][0]
    assert empty_result["articles"] == [] and empty_result["shortfall"] == 100
    invalid = client.post("/predict", json=body | {"filters": {"colours": ["blakc"]}})
    assert invalid.status_code == 422 and invalid.json()["errors"][0]["field"] == "filters.colours"
    assert "black" in invalid.json()["detail"]


def test_predict_excludes_purchases_and_listed_articles(client, loyal, trained_lake):
    unfiltered = client.post("/predict", json={"customer_ids": [loyal], "k": 50}).json()
    first_article = unfiltered["recommendations"][0]["articles"][0]["article_id"]
    for filters in ({"exclude_articles": [first_article]}, {"exclude_bought": True}):
        body = {"customer_ids": [loyal], "k": 50, "filters": filters}
        articles = client.post("/predict", json=body).json()["recommendations"][0]["articles"]
        ids = {article["article_id"] for article in articles}
        assert len(ids) == 50
        if "exclude_bought" in filters:
            history = load_history(trained_lake)
            customer = history.customers.filter(customer_id=loyal)["customer"][0]
            purchases = history.purchases.filter(customer=customer).join(
                history.articles, on="article"
            )
            assert not ids & set(purchases["article_id"])
        else:
            assert first_article not in ids


def test_predict_omits_sold_out_articles(client, loyal):
    service = client.app.state.service
    current = service.model_manager.current
    body = {"customer_ids": [loyal, "unknown-customer"]}
    first_article = client.post("/predict", json=body).json()["recommendations"][0]["articles"][0]
    stock = current.catalogue.stock.copy()
    stock[current.catalogue.articles["article_id"].to_list().index(first_article["article_id"])] = 0
    try:
        service.model_manager.current = replace(
            current, catalogue=replace(current.catalogue, stock=stock)
        )
        text = client.post("/predict", json=body).text
        assert first_article["article_id"] not in text
    finally:
        service.model_manager.current = current


def test_predict_explanations_name_sources_and_evidence(client, loyal):
    body = {"customer_ids": [loyal, "unknown-customer"], "k": 5, "explain": True}
    response = client.post("/predict", json=body)
    PredictResponse.model_validate_json(response.text)
    known_result, unknown_result = response.json()["recommendations"]
    assert any(article["reasons"]["evidence"] for article in known_result["articles"])
    assert all(article["reasons"]["evidence"] is None for article in unknown_result["articles"])
    for article in known_result["articles"]:
        assert article["source"] in article["reasons"]["sources"]
    too_many = client.post(
        "/predict", json={"customer_ids": [f"{n}" for n in range(11)], "explain": True}
    )
    assert too_many.status_code == 422


def test_similar_returns_other_articles(client):
    article = client.post("/predict", json=EXAMPLE).json()["recommendations"][0]["articles"][0]
    response = client.post("/similar", json={"article_id": article["article_id"], "k": 5})
    similar = SimilarResponse.model_validate_json(response.text)
    ids = [item.article_id for item in similar.articles]
    assert len(set(ids)) == 5 and article["article_id"] not in ids
    assert client.post("/similar", json={"article_id": "0000000000"}).status_code == 404


def test_model_and_ready_routes_describe_model(client, trained_lake):
    card = client.get("/model").json()
    assert (
        card["model_version"] == get_champion(trained_lake) and card["scores"][card["method"]] > 0
    )
    ready = client.get("/readyz").json()
    assert ready["status"] == "ok" and ready["age_days"] > 1_000 and ready["load_error"] is None


def test_response_has_request_id_and_security_headers(client):
    response = client.post("/predict", json=EXAMPLE, headers={"X-Request-ID": "request-1"})
    assert response.json()["request_id"] == response.headers["x-request-id"] == "request-1"
    for path in ("/healthz", "/nothing-here", "/predict"):
        response = client.get(path, headers={"X-Request-ID": "<script>"})
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/predict").status_code == 405
    assert client.get("/nothing-here").json()["title"] == "Not found"


def test_metrics_count_requests_and_cold_customers(trained_lake):
    with TestClient(create_app(trained_lake)) as client:
        for _ in range(3):
            client.post("/predict", json=EXAMPLE)
        client.post("/predict", json={})
        text = client.get("/metrics").text
    for line in (
        'hm_requests_total{route="/predict",status="200"} 3.0',
        'hm_requests_total{route="/predict",status="422"} 1.0',
        'hm_customers_total{cold="yes"} 3.0',
        "hm_model_switches_total 1.0",
        "hm_model_load_failed 0.0",
    ):
        assert line in text
    assert 'hm_model_info{method="ranker",state="' in text or "hm_model_info{" in text


def test_api_keys_and_rate_limit(trained_lake):
    key_hash = hashlib.sha256(b"secret key").hexdigest()
    settings = ServiceSettings(
        api_keys=f"{key_hash},{hashlib.sha256(b'new').hexdigest()}", rate_limit=2
    )
    with TestClient(create_app(trained_lake, settings)) as client:
        assert client.get("/healthz").status_code == 200
        unauthorised = client.post("/predict", json=EXAMPLE)
        assert unauthorised.status_code == 401 and key_hash not in unauthorised.text
        for key in ("secret key", "new"):
            headers = {"X-API-Key": key}
            codes = [
                client.post("/predict", json=EXAMPLE, headers=headers).status_code for _ in range(4)
            ]
            assert codes[:2] == [200, 200] and codes[-1] == 429
        limited = client.post("/predict", json=EXAMPLE, headers=headers)
        assert int(limited.headers["retry-after"]) >= 1


def test_unknown_api_keys_share_rate_limit(trained_lake):
    with TestClient(create_app(trained_lake, ServiceSettings(rate_limit=1))) as client:
        keys = [{"X-API-Key": f"{n}"} for n in range(5)]
        codes = [client.post("/predict", json=EXAMPLE, headers=key).status_code for key in keys]
    assert codes[0] == 200 and 429 in codes


def test_deep_or_large_body_is_rejected_before_parsing(client):
    deep = client.post(
        "/predict", content=b'{"customer_ids": ' + b"[" * 1_000 + b"]" * 1_000 + b"}"
    )
    assert deep.status_code == 400 and "nested" in deep.json()["detail"]
    large = client.post("/predict", content=b" " * (MAX_BODY_BYTES + 1))
    assert large.status_code == 413 and large.json()["status"] == 413


def test_full_queue_and_timeout_return_503(trained_lake, monkeypatch):
    settings = ServiceSettings(max_queue=1, request_timeout=0.3)
    release = threading.Event()
    monkeypatch.setattr("hm_reco.api.app.respond", lambda *args: release.wait(20))
    body = EXAMPLE | {"k": 50}  # more than the precomputed lists have
    with TestClient(create_app(trained_lake, settings)) as client, ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: client.post("/predict", json=body), range(8)))
        release.set()
    assert {response.status_code for response in responses} == {503}
    details = {response.json()["detail"] for response in responses}
    assert details == {"1 requests are waiting", "no response within 0.3 s"}
    assert all(response.headers["retry-after"] for response in responses)


def test_internal_error_hides_traceback(trained_lake, monkeypatch):
    monkeypatch.setattr("hm_reco.api.app.respond", lambda *args: 1 / 0)
    client = TestClient(create_app(trained_lake), raise_server_exceptions=False)
    with client:
        response = client.post("/predict", json=EXAMPLE)
    assert response.status_code == 500 and "ZeroDivision" not in response.text
    assert response.json()["request_id"] == response.headers["x-request-id"]


@pytest.fixture
def two_models(trained_lake: Lake, tmp_path: Path) -> tuple[Lake, str, str]:
    """A lake with a champion and a candidate of another method."""
    shutil.copytree(trained_lake.root, tmp_path / "lake")
    lake = open_lake(str(tmp_path / "lake"))
    champion = get_champion(lake)
    bundle = load_bundle(lake, champion)
    challenger = replace(
        bundle, version="other", method="popular, 28 days", ranker=None, two_tower=None
    )
    save_bundle(lake, challenger)
    save_scores(lake, "other", load_scores(lake, champion))
    champion_model = next(model for model in read_models(lake) if model.version == champion)
    changes = {"event": "candidate", "method": challenger.method, "created": datetime.now(UTC)}
    register_model(lake, replace(champion_model, version="other", **changes))
    return lake, champion, "other"


def send_until_stopped(
    stop: threading.Event, client: TestClient, body: dict[str, object]
) -> list[httpx.Response]:
    """Send one request repeatedly until `stop`; returns the responses."""
    responses = []
    while not stop.is_set():
        responses.append(client.post("/predict", json=body))
    return responses


def test_model_switches_under_load_do_not_mix(two_models):
    """Switch by promotion and rollback; each response comes from a single model."""
    lake, champion, challenger = two_models
    ids = scan(lake, "processed/customers").head(20).collect()["customer_id"].to_list()
    body = {"customer_ids": ids, "k": 20}
    stop, lists = threading.Event(), {}
    with (
        TestClient(create_app(lake, ServiceSettings(registry_poll_seconds=0.05))) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        service = client.app.state.service
        tasks = [pool.submit(send_until_stopped, stop, client, body) for _ in range(3)]
        for i in range(10):
            promote(lake, challenger, force=True) if i % 2 == 0 else rollback(lake)
            target = (challenger, champion)[i % 2]
            wait_until(lambda name=target: service.model_manager.current.key[0] == name)
            time.sleep(0.1)
            single_response = client.post("/predict", json=body).json()
            assert single_response["model_version"] == target, f"switch {i}"
            lists[target] = single_response["recommendations"]
        stop.set()
        responses = [response for task in tasks for response in task.result()]
    assert {response.status_code for response in responses} == {200}
    for response in responses:
        content = response.json()
        assert content["recommendations"] == lists[content["model_version"]]
    assert {response.json()["model_version"] for response in responses} == {champion, challenger}
    assert lists[champion] != lists[challenger]


def test_shadow_compares_challenger_in_background(two_models, monkeypatch):
    lake, champion, challenger = two_models
    ids = scan(lake, "processed/customers").head(2).collect()["customer_id"].to_list()
    settings = ServiceSettings(shadow_share=1, registry_poll_seconds=60, feedback_flush_seconds=60)
    with TestClient(create_app(lake, settings)) as client:
        champion_response = client.post("/predict", json={"customer_ids": ids}).json()
        client.post("/predict", json={"customer_ids": ["unknown-customer"], "k": 3})
        client.app.state.service.shadow.executor.pool.submit(int).result()  # after both
        monkeypatch.setattr("hm_reco.api.shadow.respond", lambda *args: 1 / 0)
        assert client.post("/predict", json={"customer_ids": ids}).status_code == 200
        client.app.state.service.shadow.executor.pool.shutdown()
        text = client.get("/metrics").text
    assert champion_response["model_version"] == champion
    assert f'hm_shadow_info{{state="",version="{challenger}"}} 1.0' in text
    assert 'hm_shadow_requests_total{outcome="compared"} 2.0' in text
    assert 'hm_shadow_requests_total{outcome="failed"} 1.0' in text
    rows = scan(lake, SHADOW).collect()
    assert rows["challenger"].unique().to_list() == [challenger]
    assert [len(articles) for articles in rows["champion_articles"]] == [12, 12, 3]
    assert rows["champion_articles"][0].to_list() == [
        article["article_id"] for article in champion_response["recommendations"][0]["articles"]
    ]
    assert not any(id_ in str(rows.to_dicts()) for id_ in ids)
    page = lake.path("reports", "shadow.html").read_text()
    assert f"hm promote {challenger}" in page and "of unknown customers <b>33 %" in page


def test_shadow_with_backlog_drops_requests(two_models, monkeypatch):
    lake, *_ = two_models
    release = threading.Event()
    monkeypatch.setattr("hm_reco.api.shadow.MAX_PENDING", 2)
    monkeypatch.setattr("hm_reco.api.shadow.respond", lambda *args: release.wait(20))
    with TestClient(create_app(lake, ServiceSettings(shadow_share=1))) as client:
        codes = {client.post("/predict", json=EXAMPLE).status_code for _ in range(5)}
        text = client.get("/metrics").text
        release.set()
    assert codes == {200} and 'hm_shadow_requests_total{outcome="dropped"} 3.0' in text


def test_bounded_executor_frees_slot_after_failure():
    executor = BoundedExecutor(1)
    assert executor.submit(lambda: 1 / 0)
    wait_until(lambda: executor.submit(lambda: None))
    executor.pool.shutdown()


def test_find_challenger_selects_candidate(two_models):
    lake, champion, challenger = two_models
    assert find_challenger(lake) == (challenger, "")
    assert find_challenger(lake, champion)[0] == champion
    promote(lake, challenger, force=True)
    with pytest.raises(NoModelError, match="no candidate"):
        find_challenger(lake)


def build_event(kind: str, **fields: object) -> dict[str, object]:
    return {"kind": kind, "customer_id": "anna", "article_id": "0108775015"} | fields


def test_feedback_is_written_on_shutdown(lake):
    with TestClient(create_app(lake)) as client:
        body = {
            "events": [
                build_event("impression"),
                build_event("purchase", price=0.02, channel="store"),
            ]
        }
        assert client.post("/feedback", json=body).json()["accepted"] == 2
        for invalid_body, field in (
            ({"events": []}, "events"),
            ({"events": [build_event("purchase")]}, "events.0"),
            ({"events": [build_event("impression", at="2999-01-01T00:00:00Z")]}, "events.0"),
            ({"events": [build_event("stolen")]}, "events.0.kind"),
        ):
            response = client.post("/feedback", json=invalid_body)
            assert response.status_code == 422 and response.json()["errors"][0]["field"] == field
    assert scan(lake, "feedback/events").collect()["kind"].to_list() == ["impression", "purchase"]
    purchases = scan(lake, "feedback/purchases").collect()
    assert purchases.select("article_id", "price", "sales_channel_id").row(0) == (
        "0108775015",
        0.02,
        1,
    )


def test_feedback_purchases_are_ingested():
    lake = demo_lake("ingestion", 200)
    transactions_before = scan(lake, "raw/transactions").collect()
    source = Path(lake.root).with_name("source")
    customer, article = (
        transactions_before.row(0, named=True)["customer_id"],
        transactions_before.row(1, named=True)["article_id"],
    )
    with TestClient(create_app(lake)) as client:
        body = {
            "events": [
                build_event("purchase", price=0.02)
                | {"customer_id": customer, "article_id": article}
            ]
        }
        assert client.post("/feedback", json=body).status_code == 200
    feedback_source = Source(uri=f"{lake.root}/feedback/purchases", table="transactions")
    ingest(lake, [Source(uri=str(source)), feedback_source])
    transactions_after = scan(lake, "raw/transactions").collect()
    assert transactions_after.height == transactions_before.height + 1


def test_page_shows_history_recommendations_and_session(client, loyal):
    page = client.get("/", params={"q": loyal}).text
    assert page.count("<li><a") > 12 and "Bought" in page and "another variant of it" in page
    article_id = re.search(r"seen=(\d{10})", page).group(1)
    session = client.get("/", params={"q": loyal, "seen": [article_id, "0000000000", "<b>"]})
    assert "This session" in session.text and '<b>"' not in session.text
    assert "script" not in session.text and "'none'" in session.headers["content-security-policy"]
    for query in (
        "",
        "trousers",
        article_id,
        "unknown-customer",
        "<script>alert(1)</script>",
        "\x00",
    ):
        response = client.get("/", params={"q": query})
        assert response.status_code == 200 and "<script" not in response.text


def test_page_without_model_names_command(lake):
    with TestClient(create_app(lake)) as client:
        assert "hm run" in client.get("/").text


def test_service_runs_without_stage_dependencies(trained_lake):
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    stages = [re.split("[>=]", name)[0].replace("-", "_") for name in extras["stages"]]
    assert {"torch", "papermill", "pandas"} <= {*stages}
    code = f"""
import sys
sys.modules |= dict.fromkeys({stages})  # as if they were not installed
from fastapi.testclient import TestClient
from hm_reco.lake.storage import open_lake
from hm_reco.api.app import create_app
from runner.cli import app
with TestClient(create_app(open_lake({trained_lake.root!r}))) as client:
    body = {{"customer_ids": ["a"], "explain": True}}
    print(client.post("/predict", json=body).json()["recommendations"][0]["articles"][0])
    print(client.get("/?q=trousers").status_code, client.get("/reports/").status_code)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "'reasons'" in result.stdout and "200" in result.stdout
