"""The command line: what is wrong is said in one message, with a non-zero exit."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from runner.cli import app

hm = CliRunner()


@pytest.mark.parametrize(
    "command", [c.name or c.callback.__name__ for c in app.registered_commands]
)
def test_every_command_has_help(command):
    done = hm.invoke(app, [command, "--help"])
    assert done.exit_code == 0 and len(done.output) > 200


def test_sample_writes_three_files(tmp_path):
    done = hm.invoke(app, ["sample", "--out", str(tmp_path), "--customers", "50", "--json"])
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
        (["runs", "--keep", "x", "--lake", "{tmp}"], "has no run 'x'"),
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
    assert done.exit_code == 1 and "stage 'ingestion' failed: FileNotFoundError" in output
    assert "expected articles: articles.parquet" in output and "ingestion.ipynb" in output


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("hm")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "submission" in done.stdout
