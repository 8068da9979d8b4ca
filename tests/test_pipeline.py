"""The whole way by papermill, to a folder and to S3: both recommend the same."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import boto3
import polars as pl
import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from hm_reco.api.app import create_app
from hm_reco.api.model_manager import find_target, load_model
from hm_reco.lake.runs import read_runs
from hm_reco.lake.settings import ServiceSettings
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.lake.tables import get_table_version, scan, write
from hm_reco.registry.bundle import load_bundle, save_bundle
from hm_reco.registry.registry import (
    get_champion,
    load_scores,
    publish_immediately,
    read_models,
    register_model,
    save_scores,
)
from hm_reco.serving.recommend import recommend, to_recommendation_table
from hm_reco.stages.ingestion import ingest
from hm_reco.stages.processing import process
from runner.cli import app
from tests.conftest import until

QUICK = ["evaluation_weeks=1", "training_weeks=4", "rounds=60", "as_of=2020-09-16"]
QUICK += ["tower_examples=2000"]
OPTIONS = [text for assignment in QUICK for text in ("-p", assignment)]
STAGES = ["ingestion", "processing", "eda", "training", "inference"]
hm = CliRunner()


def run(*words: str):
    return hm.invoke(app, list(words), catch_exceptions=False)


@pytest.fixture(scope="module")
def folder_lake(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    root = str(tmp_path_factory.mktemp("whole") / "lake")
    done = run("run", "--data", str(sample), "--lake", root, *OPTIONS)
    assert done.exit_code == 0, done.output
    # what a person sees at the end: the metric table, three customers, reports, how to serve
    for text in ("MAP@12", "own history", "For a loyal", "For a lapsed", "For a new", "hm serve"):
        assert text in done.output
    return open_lake(root)


def test_each_stage_left_its_row_notebook_and_report(folder_lake):
    entries = read_runs(folder_lake)
    assert {entry.stage for entry in entries} == {*STAGES}
    for entry in entries:
        assert entry.state == "succeeded"
        assert folder_lake.path(entry.notebook).is_file()
        assert folder_lake.path(entry.report).is_file()
    training = next(entry for entry in entries if entry.stage == "training")
    assert training.parameters["as_of"] == "2020-09-16" and training.parameters["rounds"] == 60
    assert training.origins["rounds"] == "-p" and training.origins["seed"] == "notebook"
    used = training.metrics["plan"]
    assert {name: used[name] for name in used if name in training.parameters} == {
        name: value for name, value in training.parameters.items() if name in used
    } | {"tuning_weeks": 0}  # nothing is left to choose when `rounds` is given


def test_reports_are_self_contained_and_hide_code(folder_lake):
    pages = list(folder_lake.path("reports").rglob("*.html"))
    assert len(pages) == 7
    for page in pages:
        text = page.read_text()
        assert not re.search(r"""(src|href)=["']?(https?:)?//|@import""", text), page
        assert "import polars" not in text and "<title>" in text


def test_units_survive_processing(folder_lake):
    raw = scan(folder_lake, "raw/transactions").select(pl.len()).collect().item()
    units = scan(folder_lake, "processed/purchases").select(pl.col("units").sum()).collect().item()
    weekly = scan(folder_lake, "processed/weekly_articles").select(pl.col("units").sum())
    assert raw == units == weekly.collect().item()


def test_a_submission_has_every_customer_and_12_articles(folder_lake, tmp_path):
    out = tmp_path / "submission.csv"
    assert run("submission", "--lake", folder_lake.root, "--out", str(out)).exit_code == 0
    rows = pl.read_csv(out, infer_schema=False)
    assert rows.columns == ["customer_id", "prediction"] and rows.height == 2_000
    lists = rows["prediction"].str.split(" ")
    assert (lists.list.len() == 12).all() and (lists.list.n_unique() == 12).all()
    assert lists.explode().str.contains(r"^\d{10}$").all()


def test_the_submission_knows_nothing_of_the_week(folder_lake, sample, tmp_path):
    """The same run on files that end before the week gives the same lists."""
    cut = tmp_path / "cut"
    cut.mkdir()
    for name in ("articles.csv", "customers.csv"):
        (cut / name).write_bytes((sample / name).read_bytes())
    rows = pl.read_csv(sample / "transactions_train.csv", infer_schema=False)
    rows.filter(pl.col("t_dat") < "2020-09-16").write_csv(cut / "transactions_train.csv")
    root = str(tmp_path / "lake")
    assert run("run", "--data", str(cut), "--lake", root, *OPTIONS).exit_code == 0
    columns = ["customer_id", "rank"]
    short, whole = (
        scan(lake, "predictions/customers").sort(columns).collect()
        for lake in (open_lake(root), folder_lake)
    )
    assert short.equals(whole)


def test_s3_gives_the_same_recommendations(folder_lake, sample, s3):
    done = run("run", "--data", str(sample), "--lake", f"{s3}/lake", *OPTIONS)
    assert done.exit_code == 0, done.output
    lake = open_lake(f"{s3}/lake")
    columns = ["customer_id", "rank"]
    there, here = (
        scan(lake, "predictions/customers").sort(columns).collect() for lake in (lake, folder_lake)
    )
    assert there.equals(here)
    pages = boto3.client("s3").list_objects_v2(
        Bucket=s3.removeprefix("s3://"), Prefix="lake/reports/"
    )
    html = [o["Key"] for o in pages["Contents"] if o["Key"].endswith(".html")]
    head = boto3.client("s3").head_object(Bucket=s3.removeprefix("s3://"), Key=html[0])
    assert len(html) == 7 and head["ContentType"] == "text/html"
    for entry in read_runs(lake):
        assert "testing-secret" not in json.dumps(vars(entry), default=str)


def test_the_service_answers_from_the_state_that_inference_left(folder_lake):
    served = load_model(folder_lake, find_target(folder_lake))
    assert served.key[1].startswith("2020-09-16-") and served.recommender.precomputed is not None
    table = scan(folder_lake, "predictions/customers").sort("customer_id", "rank").collect()
    ids = table["customer_id"].unique().sort().to_list()[::40]
    given = to_recommendation_table(recommend(served.recommender, ids)).sort("customer_id", "rank")
    assert given.equals(table.filter(pl.col("customer_id").is_in(ids)).select(given.columns))


def test_the_service_follows_commands_and_stock(folder_lake, sample, tmp_path):
    """On a lake of whole runs, beside a service that is up."""
    shutil.copytree(folder_lake.root, tmp_path / "lake")
    place, lake = ["--lake", str(tmp_path / "lake")], open_lake(str(tmp_path / "lake"))
    now = get_champion(lake)
    save_bundle(lake, replace(load_bundle(lake, now), version="twin"))
    save_scores(lake, "twin", load_scores(lake, now))
    made = next(model for model in read_models(lake) if model.version == now)
    with publish_immediately(lake):
        twin = {"version": "twin", "event": "candidate", "created": datetime.now(UTC)}
        register_model(lake, replace(made, **twin))
    with TestClient(
        create_app(open_lake(lake.root), ServiceSettings(registry_poll_seconds=0.1))
    ) as client:
        health = lambda: client.get("/healthz").json()["model_version"]  # noqa: E731
        assert health() == now
        assert run("promote", "twin", "--force", *place).exit_code == 0
        until(lambda: health() == "twin")
        assert run("rollback", *place).exit_code == 0
        until(lambda: health() == now)
        body = {"customer_ids": ["a-stranger"], "k": 3}
        first = client.post("/predict", json=body).json()["recommendations"][0]["articles"][0]
        gone = pl.DataFrame({"article_id": [first["article_id"]], "units": [0]})
        write(lake, "stock/units", gone)
        until(lambda: first["article_id"] not in client.post("/predict", json=body).text)
        write(lake, "stock/units", gone.with_columns(units=5))
        until(lambda: first["article_id"] in client.post("/predict", json=body).text)
    words = ["--data", str(sample), *place, *OPTIONS]
    plan = json.loads(run("plan", *words, "--json").output)
    assert {row["stage"]: row["action"] for row in plan}["training"] == "cached", plan


def test_recommend_knows_customers_and_strangers(folder_lake):
    customer = scan(folder_lake, "raw/customers").head(1).collect()["customer_id"].item()
    done = run("recommend", customer, "--lake", folder_lake.root, "--json")
    rows = json.loads(done.output)
    assert [row["rank"] for row in rows] == list(range(1, 13)) and rows[0]["article"]
    stranger = run("recommend", "nobody", "--lake", folder_lake.root)
    assert "a customer nobody knows" in stranger.output


def test_runs_are_listed(folder_lake, tmp_path):
    table = run("runs", "--lake", folder_lake.root)
    assert table.output.count("succeeded") >= 5
    rows = json.loads(run("runs", "--lake", folder_lake.root, "--json").output)
    assert rows[0]["stage"] == "ingestion" and rows[0]["seconds"] > 0
    assert "No runs yet" in run("runs", "--lake", str(tmp_path / "empty")).output


def test_report_says_where_it_is_and_opens_it(folder_lake, tmp_path, monkeypatch):
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\necho $1 > {opened}\n")
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    command = [Path(sys.executable).with_name("hm"), "report", "--lake", folder_lake.root]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    index = folder_lake.path("reports", "index.html")
    assert done.stdout.strip() == str(index)
    assert opened.read_text().strip() == index.as_uri()
    assert '<td class="champion">' in index.read_text()  # the model that the run made


def test_one_stage_as_json(folder_lake):
    done = run("run", "eda", "--lake", folder_lake.root, "--json", "--force")
    [entry] = json.loads(done.output)
    assert entry["stage"] == "eda" and entry["state"] == "succeeded"


def test_a_run_that_changes_nothing_runs_nothing(folder_lake, sample):
    words = ["--data", str(sample), "--lake", folder_lake.root, *OPTIONS]
    rows = json.loads(run("plan", *words, "--json").output)
    assert [row["action"] for row in rows] == ["cached"] * 5
    before = len(read_runs(folder_lake))
    assert "nothing to do" in run("run", *words).output
    assert len(read_runs(folder_lake)) == before
    rows = json.loads(run("plan", *words, "-p", "rounds=61", "--json").output)
    assert {row["stage"]: row["reason"] for row in rows if row["action"] == "run"} == {
        "training": "rounds: 60 → 61",
        "inference": "after training",
    }


def test_a_run_repeats_exactly_from_the_tables_it_saw(folder_lake, sample):
    run_id = read_runs(folder_lake)[0].run_id
    done = run("reproduce", run_id, "--lake", folder_lake.root, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output)
    agreed = [row["stage"] for row in rows if row["agree"]]
    assert sorted(agreed) == sorted(STAGES)  # two of them run side by side
    lost = run("reproduce", "20200101-000000-0000", "--lake", folder_lake.root)
    assert lost.exit_code == 1 and "no such run" in lost.output
    words = ["--lake", folder_lake.root, "--into", folder_lake.root]
    onto = run("reproduce", run_id, *words)
    assert onto.exit_code == 1 and "expected nothing there" in " ".join(onto.output.split())
    assert not folder_lake.path("runs", "branch.json").exists()


def test_a_sweep_compares_and_changes_no_champion(folder_lake):
    registry = get_table_version(folder_lake, "artifacts/registry")
    grid = ["-p", "rounds=[5,10]", "-p", "learning_rate=[0.05]"]
    words = ["training", *grid, *OPTIONS[:4], "-p", "as_of=2020-09-16", "--lake", folder_lake.root]
    rows = json.loads(run("sweep", *words, "--json").output)
    assert [(row["rounds"], row["state"]) for row in rows] == [(5, "succeeded"), (10, "succeeded")]
    assert rows[0]["MAP@12"] != rows[1]["MAP@12"]
    assert get_table_version(open_lake(folder_lake.root), "artifacts/registry") == registry
    trials = [e for e in read_runs(folder_lake) if e.run_id.endswith(("-t1", "-t2"))]
    assert [entry.parameters["rounds"] for entry in trials] == [5, 10]
    sweep = trials[0].run_id.removesuffix("-t1")
    page = folder_lake.path("reports", sweep, "index.html").read_text()
    assert all(f"{row['MAP@12']:.4f}" in page for row in rows)
    assert f"{sweep}/index.html" in folder_lake.path("reports", "index.html").read_text()
    states = [row["state"] for row in json.loads(run("sweep", *words, "--json").output)]
    assert states == ["cached", "cached"]
    none = run("sweep", "training", "-p", "rounds=5", "--lake", folder_lake.root)
    assert none.exit_code == 1 and "a sweep needs a list" in none.output


def test_vacuum_keeps_what_models_and_kept_runs_refer_to(folder_lake, sample):
    words = ["processing", "--lake", folder_lake.root, "-p", "full_refresh=true", "--force"]
    name = "processed/purchases"
    versions = [get_table_version(open_lake(folder_lake.root), name)]
    for _ in range(2):
        assert run("run", *words).exit_code == 0
        versions.append(get_table_version(open_lake(folder_lake.root), name))
    first, middle, last = versions
    rows = scan(folder_lake, name, first).collect().height
    dry = json.loads(
        run(
            "lake", "vacuum", "--retention", "0d", "--dry-run", "--json", "--lake", folder_lake.root
        ).output
    )
    done = json.loads(
        run("lake", "vacuum", "--retention", "0d", "--json", "--lake", folder_lake.root).output
    )
    assert dry == done and sum(row["files"] for row in done if row["table"] == name) > 0
    assert scan(folder_lake, name, first).collect().height == rows  # a model was trained on it
    assert scan(folder_lake, name, last).collect().height == rows
    with pytest.raises(Exception, match="No such file"):
        scan(folder_lake, name, middle).collect()
    tables = json.loads(run("lake", "--json", "--lake", folder_lake.root).output)
    shown = next(row for row in tables if row["table"] == name)
    assert shown["version"] == last and shown["rows"] == rows and shown["versions"] > last
    bad = run("lake", "vacuum", "--retention", "soon", "--lake", folder_lake.root)
    assert bad.exit_code == 1 and "expected a number of days" in bad.output


def test_processed_tables_do_not_depend_on_the_number_of_shards(sample, tmp_path):
    lakes = {}
    for shards in (1, 3):
        lakes[shards] = open_lake(str(tmp_path / str(shards)))
        ingest(lakes[shards], str(sample))
        process(lakes[shards], shards)
    for name in ("purchases", "weekly_articles", "weekly_customers", "customer_features"):
        one, three = (scan(lake, f"processed/{name}").collect() for lake in lakes.values())
        columns = [column for column in one.columns if column != "shard"]
        assert one.select(columns).sort(columns).equals(three.select(columns).sort(columns)), name
    assert set(scan(lakes[3], "processed/purchases").collect()["shard"]) == {0, 1, 2}


def test_predict_all_is_the_stage_inference(folder_lake):
    before = scan(folder_lake, "predictions/customers").collect()
    done = run("predict", "--lake", folder_lake.root, "--shards", "3")
    assert done.exit_code == 0, done.output
    after = scan(folder_lake, "predictions/customers").collect()
    assert after.height == before.height and read_runs(folder_lake)[-1].parameters["shards"] == 3
    assert not list(folder_lake.path("predictions", "parts").rglob("*.parquet"))
