"""The command line: an error is one message and a non-zero exit code."""

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

cli_runner = CliRunner()
COMMAND_GROUPS = [group.typer_instance for group in app.registered_groups if group.name is None]
COMMANDS = [command for group in COMMAND_GROUPS for command in group.registered_commands]


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in COMMANDS])
def test_every_command_has_help(command):
    result = cli_runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0 and len(result.output) > 200


def test_generate_writes_three_files(tmp_path):
    result = cli_runner.invoke(
        app, ["generate", "--out", str(tmp_path), "--customers", "50", "--json"]
    )
    rows = {row["table"]: row["rows"] for row in json.loads(result.output)}
    for table, name in (("customers", "customers"), ("transactions", "transactions_train")):
        assert pl.read_csv(tmp_path / f"{name}.csv", infer_schema=False).height == rows[table]


@pytest.mark.parametrize(
    ("args", "message"),
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
def test_invalid_argument_is_named_without_traceback(args, message, tmp_path):
    result = cli_runner.invoke(app, [arg.replace("{tmp}", str(tmp_path)) for arg in args])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_run_without_input_files_fails_ingestion_and_names_notebook(tmp_path):
    (tmp_path / "data").mkdir()
    lake = tmp_path / "lake"
    result = cli_runner.invoke(app, ["run", "--data", str(tmp_path / "data"), "--lake", str(lake)])
    output = " ".join(result.output.split())
    assert result.exit_code == 1 and "stage 'ingestion' failed: ValueError" in output
    assert "expected files like articles.csv" in output and "ingestion.ipynb" in output


def test_hm_command_is_installed():
    command = Path(sys.executable).with_name("hm")
    result = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "submission" in result.stdout


def test_ingest_due_reads_due_sources_only(synthetic_files, tmp_path):
    lake, parameter_file = str(tmp_path / "lake"), tmp_path / "sources.yaml"
    source = {"name": "shop", "uri": str(synthetic_files), "schedule": "* * * * *"}
    yearly_source = {"name": "yearly", "uri": str(tmp_path / "nowhere"), "schedule": "0 0 1 1 *"}
    args = ["ingest", "--due", "--lake", lake, "--params", str(parameter_file)]

    def ingest(*sources: dict) -> tuple[int, str]:
        parameter_file.write_text(json.dumps({"ingestion": {"sources": sources}}))
        result = cli_runner.invoke(app, args)
        return result.exit_code, result.output

    assert ingest(source | {"schedule": ""}) == (0, "none of 1 sources is due\n")
    code, output = ingest(source)
    assert code == 0 and "ingestion   succeeded" in output
    states = [load.state for load in read_loads(open_lake(lake))]
    assert states == ["loaded"] * 3
    assert ingest(source | {"schedule": "0 0 1 1 *"})[1].startswith("none of")
    with hold_leases(open_lake(lake), ["ingestion"]):  # another process holds the lease
        code, output = ingest(yearly_source)
    assert code == 0 and "the next call reads the due sources" in output
    code, output = ingest(source | {"schedule": "0 0 1 1 *"}, yearly_source)  # never read before
    assert code == 1 and "nowhere: no such folder or file" in output
    code, output = ingest(source | {"schedule": "every day"})
    assert code == 1 and "sources.0 'shop'" in output


@pytest.mark.parametrize("args", [["run"], ["plan"], ["runs"], ["lake"], ["models"]])
def test_missing_bucket_is_reported(s3, args):
    result = cli_runner.invoke(app, [*args, "--lake", "s3://missing-bucket/lake"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert (
        "error S3: " in result.output
        and "bucket does not exist; expected an existing bucket" in result.output
    )


def test_password_in_parameter_is_rejected_and_not_shown(tmp_path):
    uri = "postgresql://me:hunter2@db/shop"  # pragma: allowlist secret
    for args in (["-p", f"data={uri}"], ["-p", f'sources=[{{uri: "{uri}"}}]']):
        result = cli_runner.invoke(app, ["run", "ingestion", "--lake", str(tmp_path), *args])
        assert result.exit_code == 1 and "a password in a URL" in result.output
        assert "hunter2" not in result.output and not list(tmp_path.iterdir())


def test_check_export_with_unsynced_module_names_command(monkeypatch):
    edited = {"hm_reco/lake/storage.py": "nbs/lake/01_storage.ipynb"}
    for unsynced, code in ((edited, 1), ({}, 0)):
        monkeypatch.setattr(
            "hm_reco.lake.fingerprint.find_unsynced_modules", lambda root, modules=unsynced: modules
        )
        result = cli_runner.invoke(app, ["check-export"])
        assert result.exit_code == code
        assert ("nbdev-update --fname hm_reco/lake/storage.py" in result.output) == bool(unsynced)
