"""The command line: what is wrong is said in one message, with a non-zero exit."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from hm_reco.data.ingest_log import read_loads
from hm_reco.lake.lease import hold_leases
from hm_reco.lake.storage import open_lake
from runner.cli import app

hm = CliRunner()
PARTS = [part.typer_instance for part in app.registered_groups if part.name is None]
COMMANDS = [command for part in PARTS for command in part.registered_commands]


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in COMMANDS])
def test_every_command_has_help(command):
    done = hm.invoke(app, [command, "--help"])
    assert done.exit_code == 0 and len(done.output) > 200


def test_sample_writes_three_files(tmp_path):
    done = hm.invoke(app, ["generate", "--out", str(tmp_path), "--customers", "50", "--json"])
    rows = {row["table"]: row["rows"] for row in json.loads(done.output)}
    for table, name in (("customers", "customers"), ("transactions", "transactions_train")):
        assert pl.read_csv(tmp_path / f"{name}.csv", infer_schema=False).height == rows[table]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "trainig"], "did you mean 'training'"),
        (["run", "training", "-p", "round=3"], "did you mean 'rounds'"),
        (["run", "training", "-p", "rounds=many"], "rounds (training)"),
        (["run", "-p", "rounds"], "expected name=value"),
        (["run", "eda", "--lake", "gs://x"], "expected a folder or s3://"),
        (["submission", "--out", "x.csv", "--lake", "{tmp}"], "the stage 'inference' writes it"),
        (["recommend", "x", "--lake", "{tmp}"], "the stage 'inference' writes it"),
        (["sweep", "training", "-p", "rounds=[1,"], "expected a list"),
        (["sweep", "training", "-p", "round=[1,2]"], "did you mean 'rounds'"),
        (["report", "--lake", "{tmp}"], "no report at"),
        (["runs", "--pin", "x", "--lake", "{tmp}"], "has no run 'x'"),
        (["run", "--params", "{tmp}/none.yaml"], "No such file"),
    ],
)
def test_errors_name_the_thing(words, message, tmp_path):
    done = hm.invoke(app, [word.replace("{tmp}", str(tmp_path)) for word in words])
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_bad_data_fails_the_first_stage_and_names_the_notebook(tmp_path):
    (tmp_path / "data").mkdir()
    lake = tmp_path / "lake"
    done = hm.invoke(app, ["run", "--data", str(tmp_path / "data"), "--lake", str(lake)])
    output = " ".join(done.output.split())
    assert done.exit_code == 1 and "stage 'ingestion' failed: ValueError" in output
    assert "expected files like articles.csv" in output and "ingestion.ipynb" in output


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("hm")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "submission" in done.stdout


def test_due_sources_are_read_and_others_are_not(sample, tmp_path):
    lake, file = str(tmp_path / "lake"), tmp_path / "sources.yaml"
    source = {"name": "shop", "uri": str(sample), "schedule": "* * * * *"}
    later = {"name": "yearly", "uri": str(tmp_path / "nowhere"), "schedule": "0 0 1 1 *"}
    words = ["ingest", "--due", "--lake", lake, "--params", str(file)]

    def ingest(*sources: dict) -> tuple[int, str]:
        file.write_text(json.dumps({"ingestion": {"sources": sources}}))
        done = hm.invoke(app, words)
        return done.exit_code, done.output

    assert ingest(source | {"schedule": ""}) == (0, "nothing is due of 1 sources\n")
    code, output = ingest(source)
    assert code == 0 and "ingestion   succeeded" in output
    states = [load.state for load in read_loads(open_lake(lake))]
    assert states == ["loaded"] * 3
    assert ingest(source | {"schedule": "0 0 1 1 *"})[1].startswith("nothing is due")
    with hold_leases(open_lake(lake), ["ingestion"]):  # somebody else is at work
        code, output = ingest(later)
    assert code == 0 and "will be read the next time" in output
    code, output = ingest(source | {"schedule": "0 0 1 1 *"}, later)  # never read before
    assert code == 1 and "nowhere: no such folder or file" in output
    code, output = ingest(source | {"schedule": "every day"})
    assert code == 1 and "source shop" in output


@pytest.mark.parametrize("words", [["run"], ["plan"], ["runs"], ["lake"], ["models"]])
def test_a_bucket_that_is_not_there_is_told(s3, words):
    done = hm.invoke(app, [*words, "--lake", "s3://nobodys-bucket/lake"])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert "error S3: " in done.output and "bucket does not exist; expected a bucket" in done.output


def test_a_password_in_a_parameter_is_neither_kept_nor_shown(tmp_path):
    place = "postgresql://me:hunter2@db/shop"  # pragma: allowlist secret
    for words in (["-p", f"data={place}"], ["-p", f'sources=[{{uri: "{place}"}}]']):
        done = hm.invoke(app, ["run", "ingestion", "--lake", str(tmp_path), *words])
        assert done.exit_code == 1 and "a password in a URL" in done.output
        assert "hunter2" not in done.output and not list(tmp_path.iterdir())


def test_a_module_edited_by_hand_is_told_with_the_way_back(monkeypatch):
    edited = {"hm_reco/core/lake.py": "nbs/lake/01_storage.ipynb"}
    for found, code in ((edited, 1), ({}, 0)):
        monkeypatch.setattr(
            "hm_reco.lake.fingerprint.find_unsynced_modules", lambda root, it=found: it
        )
        told = hm.invoke(app, ["check-export"])
        assert told.exit_code == code
        assert ("nbdev-update --fname hm_reco/core/lake.py" in told.output) == bool(found)
