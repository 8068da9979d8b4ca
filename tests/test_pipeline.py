"""The complete pipeline with papermill, on a local lake and on S3: same recommendations."""

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
from hm_reco.data.ingestion import ingest
from hm_reco.data.processing import process
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
from runner.cli import app
from tests.conftest import wait_until

QUICK_PARAMETERS = ["evaluation_weeks=1", "training_weeks=4", "rounds=60", "as_of=2020-09-16"]
QUICK_PARAMETERS += ["tower_examples=2000"]
OPTIONS = [text for assignment in QUICK_PARAMETERS for text in ("-p", assignment)]
STAGES = ["ingestion", "processing", "eda", "training", "inference"]
cli_runner = CliRunner()


def run_hm(*args: str):
    return cli_runner.invoke(app, list(args), catch_exceptions=False)


@pytest.fixture(scope="module")
def folder_lake(synthetic_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    root = str(tmp_path_factory.mktemp("whole") / "lake")
    result = run_hm("run", "--data", str(synthetic_files), "--lake", root, *OPTIONS)
    assert result.exit_code == 0, result.output
    # the summary at the end: the metric table, three customers, reports, how to serve
    for text in ("MAP@12", "own history", "For a loyal", "For a lapsed", "For a new", "hm serve"):
        assert text in result.output
    return open_lake(root)


def test_run_leaves_stage_run_notebook_and_report(folder_lake):
    stage_runs = read_runs(folder_lake)
    assert {stage_run.stage for stage_run in stage_runs} == {*STAGES}
    for stage_run in stage_runs:
        assert stage_run.state == "succeeded"
        assert folder_lake.path(stage_run.notebook).is_file()
        assert folder_lake.path(stage_run.report).is_file()
    training = next(stage_run for stage_run in stage_runs if stage_run.stage == "training")
    assert training.parameters["as_of"] == "2020-09-16" and training.parameters["rounds"] == 60
    assert training.origins["rounds"] == "-p" and training.origins["seed"] == "notebook"
    plan = training.metrics["plan"]
    assert {name: plan[name] for name in plan if name in training.parameters} == {
        name: value for name, value in training.parameters.items() if name in plan
    } | {"tuning_weeks": 0}  # with `rounds` given, no week is needed for tuning


def test_reports_are_self_contained_and_hide_code(folder_lake):
    pages = list(folder_lake.path("reports").rglob("*.html"))
    assert len(pages) == 7
    for page in pages:
        text = page.read_text()
        assert not re.search(r"""(src|href)=["']?(https?:)?//|@import""", text), page
        assert "import polars" not in text and "<title>" in text


def test_processing_preserves_units(folder_lake):
    raw = scan(folder_lake, "raw/transactions").select(pl.len()).collect().item()
    units = scan(folder_lake, "processed/purchases").select(pl.col("units").sum()).collect().item()
    assert raw == units


def test_submission_has_every_customer_and_12_articles(folder_lake, tmp_path):
    out = tmp_path / "submission.csv"
    assert run_hm("submission", "--lake", folder_lake.root, "--out", str(out)).exit_code == 0
    rows = pl.read_csv(out, infer_schema=False)
    assert rows.columns == ["customer_id", "prediction"] and rows.height == 2_000
    lists = rows["prediction"].str.split(" ")
    assert (lists.list.len() == 12).all() and (lists.list.n_unique() == 12).all()
    assert lists.explode().str.contains(r"^\d{10}$").all()


def test_submission_ignores_target_week(folder_lake, synthetic_files, tmp_path):
    """The same run on files that end before the target week gives the same lists."""
    cut_source = tmp_path / "cut"
    cut_source.mkdir()
    for name in ("articles.csv", "customers.csv"):
        (cut_source / name).write_bytes((synthetic_files / name).read_bytes())
    rows = pl.read_csv(synthetic_files / "transactions_train.csv", infer_schema=False)
    rows.filter(pl.col("t_dat") < "2020-09-16").write_csv(cut_source / "transactions_train.csv")
    root = str(tmp_path / "lake")
    assert run_hm("run", "--data", str(cut_source), "--lake", root, *OPTIONS).exit_code == 0
    columns = ["customer_id", "rank"]
    cut_predictions, full_predictions = (
        scan(lake, "predictions/customers").sort(columns).collect()
        for lake in (open_lake(root), folder_lake)
    )
    assert cut_predictions.equals(full_predictions)


def test_run_on_s3_gives_same_recommendations(folder_lake, synthetic_files, s3):
    result = run_hm("run", "--data", str(synthetic_files), "--lake", f"{s3}/lake", *OPTIONS)
    assert result.exit_code == 0, result.output
    lake = open_lake(f"{s3}/lake")
    columns = ["customer_id", "rank"]
    s3_predictions, local_predictions = (
        scan(lake, "predictions/customers").sort(columns).collect() for lake in (lake, folder_lake)
    )
    assert s3_predictions.equals(local_predictions)
    pages = boto3.client("s3").list_objects_v2(
        Bucket=s3.removeprefix("s3://"), Prefix="lake/reports/"
    )
    html = [o["Key"] for o in pages["Contents"] if o["Key"].endswith(".html")]
    head = boto3.client("s3").head_object(Bucket=s3.removeprefix("s3://"), Key=html[0])
    assert len(html) == 7 and head["ContentType"] == "text/html"
    for stage_run in read_runs(lake):
        assert "testing-secret" not in json.dumps(vars(stage_run), default=str)


def test_service_serves_snapshot_of_inference(folder_lake):
    loaded = load_model(folder_lake, find_target(folder_lake))
    assert loaded.key[1].startswith("2020-09-16-") and loaded.recommender.precomputed is not None
    table = scan(folder_lake, "predictions/customers").sort("customer_id", "rank").collect()
    ids = table["customer_id"].unique().sort().to_list()[::40]
    recommendations = to_recommendation_table(recommend(loaded.recommender, ids)).sort(
        "customer_id", "rank"
    )
    assert recommendations.equals(
        table.filter(pl.col("customer_id").is_in(ids)).select(recommendations.columns)
    )


def test_service_follows_promotion_rollback_and_stock(folder_lake, synthetic_files, tmp_path):
    """On a copy of the lake, while a service runs."""
    shutil.copytree(folder_lake.root, tmp_path / "lake")
    lake_option, lake = ["--lake", str(tmp_path / "lake")], open_lake(str(tmp_path / "lake"))
    champion = get_champion(lake)
    save_bundle(lake, replace(load_bundle(lake, champion), version="twin"))
    save_scores(lake, "twin", load_scores(lake, champion))
    champion_model = next(model for model in read_models(lake) if model.version == champion)
    with publish_immediately(lake):
        changes = {"version": "twin", "event": "candidate", "created": datetime.now(UTC)}
        register_model(lake, replace(champion_model, **changes))
    with TestClient(
        create_app(open_lake(lake.root), ServiceSettings(registry_poll_seconds=0.1))
    ) as client:
        get_version = lambda: client.get("/healthz").json()["model_version"]  # noqa: E731
        assert get_version() == champion
        assert run_hm("promote", "twin", "--force", *lake_option).exit_code == 0
        wait_until(lambda: get_version() == "twin")
        assert run_hm("rollback", *lake_option).exit_code == 0
        wait_until(lambda: get_version() == champion)
        body = {"customer_ids": ["unknown-customer"], "k": 3}
        first_article = client.post("/predict", json=body).json()["recommendations"][0]["articles"][
            0
        ]
        sold_out = pl.DataFrame({"article_id": [first_article["article_id"]], "units": [0]})
        write(lake, "stock/units", sold_out)
        wait_until(
            lambda: first_article["article_id"] not in client.post("/predict", json=body).text
        )
        write(lake, "stock/units", sold_out.with_columns(units=5))
        wait_until(lambda: first_article["article_id"] in client.post("/predict", json=body).text)
    args = ["--data", str(synthetic_files), *lake_option, *OPTIONS]
    plan = json.loads(run_hm("plan", *args, "--json").output)
    assert {row["stage"]: row["action"] for row in plan}["training"] == "cached", plan


def test_recommend_command_for_known_and_unknown_customers(folder_lake):
    customer = scan(folder_lake, "raw/customers").head(1).collect()["customer_id"].item()
    result = run_hm("recommend", customer, "--lake", folder_lake.root, "--json")
    rows = json.loads(result.output)
    assert [row["rank"] for row in rows] == list(range(1, 13)) and rows[0]["article"]
    unknown_result = run_hm("recommend", "nobody", "--lake", folder_lake.root)
    assert "an unknown customer" in unknown_result.output


def test_runs_command_lists_runs(folder_lake, tmp_path):
    table = run_hm("runs", "--lake", folder_lake.root)
    assert table.output.count("succeeded") >= 5
    rows = json.loads(run_hm("runs", "--lake", folder_lake.root, "--json").output)
    assert rows[0]["stage"] == "ingestion" and rows[0]["seconds"] > 0
    assert "No runs yet" in run_hm("runs", "--lake", str(tmp_path / "empty")).output


def test_report_command_prints_path_and_opens_browser(folder_lake, tmp_path, monkeypatch):
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\necho $1 > {opened}\n")
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    command = [Path(sys.executable).with_name("hm"), "report", "--lake", folder_lake.root]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    index = folder_lake.path("reports", "index.html")
    assert result.stdout.strip() == str(index)
    assert opened.read_text().strip() == index.as_uri()
    assert '<td class="champion">' in index.read_text()  # the model of this run


def test_run_one_stage_prints_json(folder_lake):
    result = run_hm("run", "eda", "--lake", folder_lake.root, "--json", "--force")
    [stage_run] = json.loads(result.output)
    assert stage_run["stage"] == "eda" and stage_run["state"] == "succeeded"


def test_run_without_changes_is_cached(folder_lake, synthetic_files):
    args = ["--data", str(synthetic_files), "--lake", folder_lake.root, *OPTIONS]
    rows = json.loads(run_hm("plan", *args, "--json").output)
    assert [row["action"] for row in rows] == ["cached"] * 5
    before = len(read_runs(folder_lake))
    assert "nothing to do" in run_hm("run", *args).output
    assert len(read_runs(folder_lake)) == before
    more_rounds = [arg.replace("rounds=60", "rounds=61") for arg in args]
    rows = json.loads(run_hm("plan", *more_rounds, "--json").output)
    assert {row["stage"]: row["reason"] for row in rows if row["action"] == "run"} == {
        "training": "rounds: 60 → 61",
        "inference": "after training",
    }


def test_reproduce_gives_same_metrics_from_recorded_tables(folder_lake, synthetic_files):
    run_id = read_runs(folder_lake)[0].run_id
    result = run_hm("reproduce", run_id, "--lake", folder_lake.root, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    reproduced = [row["stage"] for row in rows if row["agree"]]
    assert sorted(reproduced) == sorted(STAGES)  # two of them run in parallel
    missing_run = run_hm("reproduce", "20200101-000000-0000", "--lake", folder_lake.root)
    assert missing_run.exit_code == 1 and "no such run" in missing_run.output
    args = ["--lake", folder_lake.root, "--into", folder_lake.root]
    occupied_target = run_hm("reproduce", run_id, *args)
    assert occupied_target.exit_code == 1 and "expected an empty folder" in " ".join(
        occupied_target.output.split()
    )
    assert not folder_lake.path("runs", "branch.json").exists()


def test_sweep_compares_trials_and_keeps_champion(folder_lake):
    registry = get_table_version(folder_lake, "artifacts/registry")
    grid = ["-p", "rounds=[5,10]", "-p", "learning_rate=[0.05]"]
    args = ["training", *grid, *OPTIONS[:4], "-p", "as_of=2020-09-16", "--lake", folder_lake.root]
    rows = json.loads(run_hm("sweep", *args, "--json").output)
    assert [(row["rounds"], row["state"]) for row in rows] == [(5, "succeeded"), (10, "succeeded")]
    assert rows[0]["ranker"] != rows[1]["ranker"]
    assert get_table_version(open_lake(folder_lake.root), "artifacts/registry") == registry
    trials = [e for e in read_runs(folder_lake) if e.run_id.endswith(("-t1", "-t2"))]
    assert [stage_run.parameters["rounds"] for stage_run in trials] == [5, 10]
    sweep = trials[0].run_id.removesuffix("-t1")
    page = folder_lake.path("reports", sweep, "index.html").read_text()
    assert all(f"{row['ranker']:.4f}" in page for row in rows)
    assert f"{sweep}/index.html" in folder_lake.path("reports", "index.html").read_text()
    states = [row["state"] for row in json.loads(run_hm("sweep", *args, "--json").output)]
    assert states == ["cached", "cached"]
    without_list = run_hm("sweep", "training", "-p", "rounds=5", "--lake", folder_lake.root)
    assert without_list.exit_code == 1 and "a sweep needs a list" in without_list.output


def test_vacuum_keeps_versions_of_models_and_pinned_runs(folder_lake, synthetic_files):
    args = ["processing", "--lake", folder_lake.root, "-p", "full_refresh=true", "--force"]
    name = "processed/purchases"
    versions = [get_table_version(open_lake(folder_lake.root), name)]
    for _ in range(2):
        assert run_hm("run", *args).exit_code == 0
        versions.append(get_table_version(open_lake(folder_lake.root), name))
    first_version, middle_version, last_version = versions
    rows = scan(folder_lake, name, first_version).collect().height
    planned = json.loads(
        run_hm(
            "lake", "vacuum", "--retention", "0d", "--dry-run", "--json", "--lake", folder_lake.root
        ).output
    )
    result = json.loads(
        run_hm("lake", "vacuum", "--retention", "0d", "--json", "--lake", folder_lake.root).output
    )
    assert planned == result and sum(row["files"] for row in result if row["table"] == name) > 0
    assert (
        scan(folder_lake, name, first_version).collect().height == rows
    )  # a model was trained on it
    assert scan(folder_lake, name, last_version).collect().height == rows
    with pytest.raises(Exception, match="No such file"):
        scan(folder_lake, name, middle_version).collect()
    tables = json.loads(run_hm("lake", "--json", "--lake", folder_lake.root).output)
    table_row = next(row for row in tables if row["table"] == name)
    assert (
        table_row["version"] == last_version
        and table_row["rows"] == rows
        and table_row["versions"] > last_version
    )
    invalid_result = run_hm("lake", "vacuum", "--retention", "soon", "--lake", folder_lake.root)
    assert invalid_result.exit_code == 1 and "expected a number of days" in invalid_result.output


def test_processed_tables_are_independent_of_shards(synthetic_files, tmp_path):
    lakes = {}
    for shards in (1, 3):
        lakes[shards] = open_lake(str(tmp_path / str(shards)))
        ingest(lakes[shards], str(synthetic_files))
        process(lakes[shards], shards)
    single_shard, three_shards = (
        scan(lake, "processed/purchases").drop("shard").collect() for lake in lakes.values()
    )
    columns = single_shard.columns
    assert single_shard.sort(columns).equals(three_shards.select(columns).sort(columns))
    assert set(scan(lakes[3], "processed/purchases").collect()["shard"]) == {0, 1, 2}


def test_predict_command_runs_inference(folder_lake):
    before = scan(folder_lake, "predictions/customers").collect()
    result = run_hm("predict", "--lake", folder_lake.root, "--shards", "3")
    assert result.exit_code == 0, result.output
    after = scan(folder_lake, "predictions/customers").collect()
    assert after.height == before.height and read_runs(folder_lake)[-1].parameters["shards"] == 3
    assert not list(folder_lake.path("predictions", "parts").rglob("*.parquet"))
