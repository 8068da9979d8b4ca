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
from hm_reco.serving.recommend import predict_all, to_external_ids, with_precomputed
from hm_reco.stages.demo import demo_lake
from hm_reco.stages.inference import select_example_customers
from hm_reco.stages.ingestion import ingest
from tests.conftest import BUCKET, free_port, moto_server, s3_settings, until, wait_for


@pytest.fixture(scope="module")
def client(trained_lake: Lake):
    with TestClient(create_app(trained_lake)) as client:
        yield client


@pytest.fixture(scope="module")
def loyal(trained_lake: Lake) -> str:
    return select_example_customers(load_history(trained_lake))["loyal"]


def test_health_tells_the_model(client, trained_lake):
    health = client.get("/healthz").json()
    assert health["status"] == "ok" and health["model_version"] == get_champion(trained_lake)
    assert health["as_of"] == "2020-09-23" and health["loaded_at"]


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
    assert client.post("/predict", content=b"[" * (MAX_BODY_BYTES + 1)).status_code == 413


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
            _, log = process.communicate(timeout=60)
    assert re.search(r"Application shutdown complete", log)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The processes that answer, below `hm serve --workers`."""
    found = []
    for one in process.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            found += [one] * ("spawn_main" in " ".join(one.cmdline()))
    return found


def ask_and_count(stop: threading.Event, url: str, counts: Counter[str]) -> None:
    """Ask on a connection; one that breaks is opened anew."""
    while not stop.is_set():
        try:
            with httpx.Client(timeout=60) as client:
                while not stop.is_set():
                    answer = client.post(f"{url}/predict", json=EXAMPLE)
                    counts[str(answer.status_code)] += 1
        except httpx.TransportError:
            counts["lost"] += 1


def test_a_killed_worker_loses_its_requests_in_flight_alone(trained_lake):
    port, asking = free_port(), 6
    command = [str(Path(sys.executable).with_name("hm")), "serve", "--lake", trained_lake.root]
    command += ["--port", str(port), "--workers", "2"]
    stop, counts = threading.Event(), Counter[str]()
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as process,
        ThreadPoolExecutor(asking) as pool,
    ):
        try:
            service, url = psutil.Process(process.pid), f"http://127.0.0.1:{port}"
            wait_for(f"{url}/readyz")
            for _ in range(asking):
                pool.submit(ask_and_count, stop, url, counts)
            until(lambda: counts["200"] > asking)
            before = workers_of(service)
            assert len(before) == 2
            before[0].kill()
            killed = counts["200"]
            until(lambda: len({*workers_of(service)} - {before[0]}) == len(before))
            until(lambda: counts["200"] > killed + asking)
        finally:
            stop.set()
            process.terminate()
    assert counts["200"] > killed > 0
    assert 0 <= counts["lost"] <= asking and set(counts) <= {"200", "lost"}


READ_ONLY = """
mount --rbind / {root} && mount -o remount,bind,ro {root} && mount -t tmpfs tmpfs {root}/var/tmp &&
exec chroot {root} env -i PATH=/usr/bin:/bin HM_LAKE={lake} {hm} serve --port {port}
"""


def test_a_read_only_root_and_some_room_for_temporary_files_are_enough(trained_lake, tmp_path):
    may = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(may, check=False).returncode:
        pytest.skip("needs the right to mount")
    hm, port = Path(sys.executable).with_name("hm"), free_port()
    script = READ_ONLY.format(root=tmp_path, lake=trained_lake.root, hm=hm, port=port)
    command = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/readyz", 300)
            answer = httpx.post(f"http://127.0.0.1:{port}/predict", json=EXAMPLE, timeout=60)
            assert answer.status_code == 200
        finally:
            process.terminate()
            _, log = process.communicate(timeout=60)
    assert "Application shutdown complete" in log


def test_answers_go_on_while_s3_is_away(trained_lake, tmp_path):
    with moto_server() as (url, server), pytest.MonkeyPatch.context() as patch:
        for name, value in s3_settings(url).items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        lake = open_lake(f"s3://{BUCKET}/away")
        lake.path().upload_from(Path(trained_lake.root))
        settings = ServiceSettings(registry_poll_seconds=0.1, feedback_flush_seconds=60)
        with TestClient(create_app(lake, settings)) as client:
            body = EXAMPLE | {"k": 30}
            before = client.post("/predict", json=body).json()["recommendations"]
            server.kill()
            server.wait()
            time.sleep(0.5)  # some looks at the registry
            for path in ("/healthz", "/readyz", "/model", "/metrics", "/"):
                assert client.get(path).status_code == 200, path
            assert client.post("/predict", json=body).json()["recommendations"] == before


def test_scores_are_json_numbers(client):
    text = client.post("/predict", json={"customer_ids": ["x"], "k": 1}).text
    assert isinstance(json.loads(text)["recommendations"][0]["articles"][0]["score"], float)


def test_reports_are_offered_and_nothing_else(tmp_path: Path):
    lake = open_lake(tmp_path)  # one of its own: other tests look at the reports of theirs
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


def test_a_thousand_customers_are_answered_as_in_the_batch(client, trained_lake):
    service = client.app.state.service
    now, history = service.model_manager.current, load_history(trained_lake)
    lists = predict_all(now.recommender)
    batch = to_external_ids(history, lists).collect()
    ids = history.customers["customer_id"].sort().to_list()[:1_000]
    ready = replace(now, recommender=with_precomputed(now.recommender, lists))
    wanted = batch.filter(pl.col("customer_id").is_in(ids)).sort("customer_id", "rank")
    try:
        for service.model_manager.current in (now, ready):
            rows = []
            for first in range(0, len(ids), 100):
                body = {"customer_ids": ids[first : first + 100]}
                for part in client.post("/predict", json=body).json()["recommendations"]:
                    rows += [
                        (part["customer_id"], rank, *list(article.values())[:3])
                        for rank, article in enumerate(part["articles"], 1)
                    ]
            online = pl.DataFrame(rows, batch.schema, orient="row").sort("customer_id", "rank")
            assert online.equals(wanted)
    finally:
        service.model_manager.current = now


def test_filters_hold_and_say_when_little_is_left(client, loyal):
    body = {"customer_ids": [loyal, "a-stranger"], "k": 100, "filters": {"colours": ["black"]}}
    answer = client.post("/predict", json=body).json()
    catalogue = client.app.state.service.model_manager.current.catalogue.articles
    colours = dict(catalogue.select("article_id", "colour").rows())
    for part in answer["recommendations"]:
        assert {colours[article["article_id"]] for article in part["articles"]} == {"Black"}
        assert len(part["articles"]) + part["shortfall"] == 100
    narrow = body | {"filters": {"colours": ["black"], "price": {"min": 1e6}}}
    nothing = client.post("/predict", json=narrow).json()["recommendations"][0]
    assert nothing["articles"] == [] and nothing["shortfall"] == 100
    wrong = client.post("/predict", json=body | {"filters": {"colours": ["blakc"]}})
    assert wrong.status_code == 422 and wrong.json()["errors"][0]["field"] == "filters.colours"
    assert "black" in wrong.json()["detail"]


def test_what_she_bought_and_what_is_excluded_stays_out(client, loyal, trained_lake):
    plain = client.post("/predict", json={"customer_ids": [loyal], "k": 50}).json()
    first = plain["recommendations"][0]["articles"][0]["article_id"]
    for filters in ({"exclude_articles": [first]}, {"exclude_bought": True}):
        body = {"customer_ids": [loyal], "k": 50, "filters": filters}
        articles = client.post("/predict", json=body).json()["recommendations"][0]["articles"]
        ids = {article["article_id"] for article in articles}
        assert len(ids) == 50
        if "exclude_bought" in filters:
            history = load_history(trained_lake)
            number = history.customers.filter(customer_id=loyal)["customer"][0]
            bought = history.purchases.filter(customer=number).join(history.articles, on="article")
            assert not ids & set(bought["article_id"])
        else:
            assert first not in ids


def test_what_is_sold_out_is_never_shown(client, loyal):
    service = client.app.state.service
    now = service.model_manager.current
    body = {"customer_ids": [loyal, "a-stranger"]}
    first = client.post("/predict", json=body).json()["recommendations"][0]["articles"][0]
    stock = now.catalogue.stock.copy()
    stock[now.catalogue.articles["article_id"].to_list().index(first["article_id"])] = 0
    try:
        service.model_manager.current = replace(now, catalogue=replace(now.catalogue, stock=stock))
        text = client.post("/predict", json=body).text
        assert first["article_id"] not in text
    finally:
        service.model_manager.current = now


def test_reasons_name_sources_features_and_a_purchase(client, loyal):
    body = {"customer_ids": [loyal, "a-stranger"], "k": 5, "explain": True}
    answer = client.post("/predict", json=body)
    PredictResponse.model_validate_json(answer.text)
    known, stranger = answer.json()["recommendations"]
    assert any(article["reasons"]["evidence"] for article in known["articles"])
    assert all(article["reasons"]["evidence"] is None for article in stranger["articles"])
    for article in known["articles"]:
        assert article["source"] in article["reasons"]["sources"]
    many = client.post(
        "/predict", json={"customer_ids": [f"{n}" for n in range(11)], "explain": True}
    )
    assert many.status_code == 422


def test_similar_articles(client):
    article = client.post("/predict", json=EXAMPLE).json()["recommendations"][0]["articles"][0]
    answer = client.post("/similar", json={"article_id": article["article_id"], "k": 5})
    given = SimilarResponse.model_validate_json(answer.text)
    ids = [found.article_id for found in given.articles]
    assert len(set(ids)) == 5 and article["article_id"] not in ids
    assert client.post("/similar", json={"article_id": "0000000000"}).status_code == 404


def test_the_model_tells_what_it_is(client, trained_lake):
    card = client.get("/model").json()
    assert card["model_version"] == get_champion(trained_lake) and card["map12"][card["method"]] > 0
    ready = client.get("/readyz").json()
    assert ready["status"] == "ok" and ready["age_days"] > 1_000 and ready["load_error"] is None


def test_every_answer_carries_the_request_id_and_security_headers(client):
    answer = client.post("/predict", json=EXAMPLE, headers={"X-Request-ID": "mine-1"})
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-1"
    for path in ("/healthz", "/nothing-here", "/predict"):
        answer = client.get(path, headers={"X-Request-ID": "<script>"})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/predict").status_code == 405
    assert client.get("/nothing-here").json()["title"] == "Not found"


def test_metrics_count_answers_sources_and_cold_customers(trained_lake):
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


def test_keys_and_rates(trained_lake):
    hashed = hashlib.sha256(b"secret key").hexdigest()
    settings = ServiceSettings(
        api_keys=f"{hashed},{hashlib.sha256(b'new').hexdigest()}", rate_limit=2
    )
    with TestClient(create_app(trained_lake, settings)) as client:
        assert client.get("/healthz").status_code == 200
        refused = client.post("/predict", json=EXAMPLE)
        assert refused.status_code == 401 and hashed not in refused.text
        for key in ("secret key", "new"):
            headers = {"X-API-Key": key}
            codes = [
                client.post("/predict", json=EXAMPLE, headers=headers).status_code for _ in range(4)
            ]
            assert codes[:2] == [200, 200] and codes[-1] == 429
        last = client.post("/predict", json=EXAMPLE, headers=headers)
        assert int(last.headers["retry-after"]) >= 1


def test_an_invented_key_gives_no_new_rate(trained_lake):
    with TestClient(create_app(trained_lake, ServiceSettings(rate_limit=1))) as client:
        keys = [{"X-API-Key": f"{n}"} for n in range(5)]
        codes = [client.post("/predict", json=EXAMPLE, headers=key).status_code for key in keys]
    assert codes[0] == 200 and 429 in codes


def test_deep_and_large_bodies_are_refused_before_they_are_parsed(client):
    deep = client.post(
        "/predict", content=b'{"customer_ids": ' + b"[" * 1_000 + b"]" * 1_000 + b"}"
    )
    assert deep.status_code == 400 and "nested" in deep.json()["detail"]
    large = client.post("/predict", content=b" " * (MAX_BODY_BYTES + 1))
    assert large.status_code == 413 and large.json()["status"] == 413


def test_a_full_queue_and_a_slow_answer_are_told(trained_lake, monkeypatch):
    settings = ServiceSettings(max_queue=1, request_timeout=0.3)
    free = threading.Event()
    monkeypatch.setattr("hm_reco.api.app.respond", lambda *asked: free.wait(20))
    body = EXAMPLE | {"k": 50}  # more than was computed before
    with TestClient(create_app(trained_lake, settings)) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/predict", json=body), range(8)))
        free.set()
    assert {answer.status_code for answer in answers} == {503}
    words = {answer.json()["detail"] for answer in answers}
    assert words == {"1 requests wait already", "not in 0.3 s"}
    assert all(answer.headers["retry-after"] for answer in answers)


def test_an_error_shows_no_trace(trained_lake, monkeypatch):
    monkeypatch.setattr("hm_reco.api.app.respond", lambda *asked: 1 / 0)
    client = TestClient(create_app(trained_lake), raise_server_exceptions=False)
    with client:
        answer = client.post("/predict", json=EXAMPLE)
    assert answer.status_code == 500 and "ZeroDivision" not in answer.text
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.fixture
def two_models(trained_lake: Lake, tmp_path: Path) -> tuple[Lake, str, str]:
    """A lake with a champion, and a candidate that a year's change of mind made."""
    shutil.copytree(trained_lake.root, tmp_path / "lake")
    lake = open_lake(str(tmp_path / "lake"))
    now = get_champion(lake)
    bundle = load_bundle(lake, now)
    other = replace(bundle, version="other", method="popular, 28 days", booster=None, tower=None)
    save_bundle(lake, other)
    save_scores(lake, "other", load_scores(lake, now))
    made = next(model for model in read_models(lake) if model.version == now)
    newer = {"event": "candidate", "method": other.method, "created": datetime.now(UTC)}
    register_model(lake, replace(made, version="other", **newer))
    return lake, now, "other"


def ask_till(
    stop: threading.Event, client: TestClient, body: dict[str, object]
) -> list[httpx.Response]:
    """Answers to one request again and again."""
    answers = []
    while not stop.is_set():
        answers.append(client.post("/predict", json=body))
    return answers


def test_ten_switches_under_load_lose_and_mix_nothing(two_models):
    """By promotion and rollback; answers of one request all come from one model."""
    lake, one, other = two_models
    ids = scan(lake, "processed/customers").head(20).collect()["customer_id"].to_list()
    body = {"customer_ids": ids, "k": 20}
    stop, lists = threading.Event(), {}
    with (
        TestClient(create_app(lake, ServiceSettings(registry_poll_seconds=0.05))) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        service = client.app.state.service
        asking = [pool.submit(ask_till, stop, client, body) for _ in range(3)]
        for turn in range(10):
            promote(lake, other, force=True) if turn % 2 == 0 else rollback(lake)
            wanted = (other, one)[turn % 2]
            until(lambda name=wanted: service.model_manager.current.key[0] == name)
            time.sleep(0.1)
            alone = client.post("/predict", json=body).json()
            assert alone["model_version"] == wanted, f"switch {turn}"
            lists[wanted] = alone["recommendations"]
        stop.set()
        answers = [answer for task in asking for answer in task.result()]
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        given = answer.json()
        assert given["recommendations"] == lists[given["model_version"]]
    assert {answer.json()["model_version"] for answer in answers} == {one, other}
    assert lists[one] != lists[other]


def test_a_challenger_answers_aside(two_models, monkeypatch):
    lake, one, other = two_models
    ids = scan(lake, "processed/customers").head(2).collect()["customer_id"].to_list()
    settings = ServiceSettings(shadow_share=1, registry_poll_seconds=60, feedback_flush_seconds=60)
    with TestClient(create_app(lake, settings)) as client:
        given = client.post("/predict", json={"customer_ids": ids}).json()
        client.post("/predict", json={"customer_ids": ["a-stranger"], "k": 3})
        client.app.state.service.shadow.executor.pool.submit(int).result()  # after the two
        monkeypatch.setattr("hm_reco.api.shadow.respond", lambda *asked: 1 / 0)
        assert client.post("/predict", json={"customer_ids": ids}).status_code == 200
        client.app.state.service.shadow.executor.pool.shutdown()
        text = client.get("/metrics").text
    assert given["model_version"] == one
    assert f'hm_shadow_info{{state="",version="{other}"}} 1.0' in text
    assert 'hm_shadow_requests_total{outcome="compared"} 2.0' in text
    assert 'hm_shadow_requests_total{outcome="failed"} 1.0' in text
    rows = scan(lake, SHADOW).collect()
    assert rows["challenger"].unique().to_list() == [other]
    assert [len(shown) for shown in rows["champion_articles"]] == [12, 12, 3]
    assert rows["champion_articles"][0].to_list() == [
        article["article_id"] for article in given["recommendations"][0]["articles"]
    ]
    assert not any(id_ in str(rows.to_dicts()) for id_ in ids)
    page = lake.path("reports", "shadow.html").read_text()
    assert f"hm promote {other}" in page and "of strangers <b>33 %" in page


def test_a_challenger_that_is_behind_is_passed_over(two_models, monkeypatch):
    lake, *_ = two_models
    free = threading.Event()
    monkeypatch.setattr("hm_reco.api.shadow.MAX_PENDING", 2)
    monkeypatch.setattr("hm_reco.api.shadow.respond", lambda *asked: free.wait(20))
    with TestClient(create_app(lake, ServiceSettings(shadow_share=1))) as client:
        codes = {client.post("/predict", json=EXAMPLE).status_code for _ in range(5)}
        text = client.get("/metrics").text
        free.set()
    assert codes == {200} and 'hm_shadow_requests_total{outcome="dropped"} 3.0' in text


def test_a_comparison_that_fails_makes_room():
    aside = BoundedExecutor(1)
    assert aside.submit(lambda: 1 / 0)
    until(lambda: aside.submit(lambda: None))
    aside.pool.shutdown()


def test_who_may_be_the_challenger(two_models):
    lake, one, other = two_models
    assert find_challenger(lake) == (other, "")
    assert find_challenger(lake, one)[0] == one
    promote(lake, other, force=True)
    with pytest.raises(NoModelError, match="no candidate"):
        find_challenger(lake)


def event(kind: str, **more: object) -> dict[str, object]:
    return {"kind": kind, "customer_id": "anna", "article_id": "0108775015"} | more


def test_feedback_is_in_the_lake_after_a_clean_stop(lake):
    with TestClient(create_app(lake)) as client:
        body = {"events": [event("impression"), event("purchase", price=0.02, channel="store")]}
        assert client.post("/feedback", json=body).json()["accepted"] == 2
        for wrong, where in (
            ({"events": []}, "events"),
            ({"events": [event("purchase")]}, "events.0"),
            ({"events": [event("impression", at="2999-01-01T00:00:00Z")]}, "events.0"),
            ({"events": [event("stolen")]}, "events.0.kind"),
        ):
            answer = client.post("/feedback", json=wrong)
            assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == where
    assert scan(lake, "feedback/events").collect()["kind"].to_list() == ["impression", "purchase"]
    bought = scan(lake, "feedback/purchases").collect()
    assert bought.select("article_id", "price", "sales_channel_id").row(0) == (
        "0108775015",
        0.02,
        1,
    )


def test_what_was_bought_is_a_source_of_the_next_ingestion():
    lake = demo_lake("ingestion", 200)
    before = scan(lake, "raw/transactions").collect()
    source = Path(lake.root).with_name("source")
    customer, article = (
        before.row(0, named=True)["customer_id"],
        before.row(1, named=True)["article_id"],
    )
    with TestClient(create_app(lake)) as client:
        body = {
            "events": [
                event("purchase", price=0.02) | {"customer_id": customer, "article_id": article}
            ]
        }
        assert client.post("/feedback", json=body).status_code == 200
    told = Source(uri=f"{lake.root}/feedback/purchases", table="transactions")
    ingest(lake, [Source(uri=str(source)), told])
    after = scan(lake, "raw/transactions").collect()
    assert after.height == before.height + 1


def test_the_page_shows_history_recommendations_and_a_session(client, loyal):
    page = client.get("/", params={"q": loyal}).text
    assert page.count("<li><a") > 12 and "Bought" in page and "another variant of it" in page
    seen = re.search(r"seen=(\d{10})", page).group(1)
    session = client.get("/", params={"q": loyal, "seen": [seen, "0000000000", "<b>"]})
    assert "This session" in session.text and '<b>"' not in session.text
    assert "script" not in session.text and "'none'" in session.headers["content-security-policy"]
    for query in ("", "trousers", seen, "a-stranger", "<script>alert(1)</script>", "\x00"):
        answer = client.get("/", params={"q": query})
        assert answer.status_code == 200 and "<script" not in answer.text


def test_the_page_without_a_model(lake):
    with TestClient(create_app(lake)) as client:
        assert "hm run" in client.get("/").text


def test_answering_needs_nothing_that_only_stages_need(trained_lake):
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
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "'reasons'" in done.stdout and "200" in done.stdout
