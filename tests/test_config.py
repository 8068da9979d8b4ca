"""Sources of settings, errors for invalid ones, and no secret in any output."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import httpx
import jsonschema
import polars as pl
import pytest
from typer.testing import CliRunner

from hm_reco.lake.settings import (
    Settings,
    build_aws_schema,
    explain_settings,
    find_setting_source,
    render_settings_page,
)
from hm_reco.lake.storage import open_lake, resolve_file, write_file
from hm_reco.lake.tables import list_table_names, write
from runner.cli import app
from tests.conftest import BUCKET, find_free_port, wait_for_url

ROOT = Path(__file__).parents[1]
INI = "[DEFAULT]\nlake = from-ini\nport = 8081\n[dev]\n[prod]\nport = 8082\n"


@pytest.fixture
def project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a settings.ini."""
    (tmp_path / "settings.ini").write_text(INI)
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_settings_layer_overrides_lower_layers(project_folder, monkeypatch):
    assert (Settings().port, find_setting_source("port")) == (8081, "settings.ini [dev]")
    monkeypatch.setenv("HM_ENV", "prod")
    assert (Settings().port, find_setting_source("port")) == (8082, "settings.ini [prod]")
    monkeypatch.setenv("HM_PORT", "8083")
    assert (Settings().port, find_setting_source("port")) == (8083, "environment HM_PORT")
    (project_folder / "secrets").mkdir()
    (project_folder / "secrets" / "hm_port").write_text("8084")
    monkeypatch.setenv("HM_SECRETS_DIR", str(project_folder / "secrets"))
    assert (Settings().port, find_setting_source("port")) == (8084, "secret hm_port")
    assert find_setting_source("max_queue") == "default"


def test_settings_bucket_defines_lake_by_layer(project_folder, monkeypatch):
    (project_folder / "config/aws.json").write_text('{"s3_data_lake_bucket": "shop"}')
    assert (Settings().lake, find_setting_source("lake")) == ("s3://shop", "config/aws.json")
    monkeypatch.setenv("S3_DATA_LAKE_BUCKET", "other")
    monkeypatch.setenv("S3_DATA_LAKE_PREFIX", "/reco/")
    assert Settings().lake == "s3://other/reco"
    assert find_setting_source("lake") == "environment S3_DATA_LAKE_BUCKET"
    monkeypatch.setenv("HM_LAKE", "here")
    assert (Settings().lake, find_setting_source("lake")) == ("here", "environment HM_LAKE")


def test_settings_empty_bucket_is_ignored(project_folder, monkeypatch):
    monkeypatch.setenv("S3_DATA_LAKE_BUCKET", "")
    assert (Settings().lake, find_setting_source("lake")) == ("from-ini", "settings.ini [dev]")


def test_s3_prefix_settings_rename_lake_folders(s3, project_folder, monkeypatch):
    monkeypatch.setenv("S3_ARTIFACTS_PREFIX", "models")
    lake = open_lake(f"{s3}/renamed")
    write(lake, "artifacts/tried", pl.DataFrame({"n": [1]}))
    write_file(lake.path("artifacts", "models", "v1", "note.txt"), "here")
    keys = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="renamed/")["Contents"]
    top_folders = {item["Key"].split("/")[1] for item in keys}
    assert "models" in top_folders and "artifacts" not in top_folders
    assert list_table_names(lake) == ["artifacts/tried"]
    assert resolve_file(lake, "artifacts", "models", "v1", "note.txt").read_text() == "here"
    assert open_lake(project_folder / "lake").prefixes == {}  # no overrides on a local folder
    for name in ("raw", "reports"):
        monkeypatch.setenv("S3_ARTIFACTS_PREFIX", name)
        with pytest.raises(ValueError, match="each folder needs a unique name"):
            open_lake(f"{s3}/renamed")
    monkeypatch.setenv("S3_ARTIFACTS_PREFIX", "../up")
    with pytest.raises(ValueError, match="s3_artifacts_prefix"):
        Settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "invalid JSON, line 1"),
        ('{"aws_regoin": "eu-north-1"}', "aws_regoin: Extra inputs are not permitted"),
        ('{"aws_region": 7}', "aws_region: Input should be a valid string"),
        ("[]", "all: "),
    ],
)
def test_invalid_aws_file_is_reported_without_values(project_folder, content, message):
    (project_folder / "config/aws.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Settings()
    (project_folder / "config/aws.json").write_text('{"aws_secret_access_key": ["canary-1"]}')
    with pytest.raises(ValueError, match="aws_secret_access_key") as error:
        Settings()
    assert "canary-1" not in str(error.value)


def test_aws_schema_matches_settings_model():
    schema = json.loads(build_aws_schema())
    jsonschema.validate({"aws_region": "eu-north-1", "s3_data_lake_bucket": "shop"}, schema)
    for invalid in ({"aws_regoin": "x"}, {"aws_region": 7}, {"lake": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(invalid, schema)


def test_generated_settings_files_are_up_to_date():
    assert (ROOT / "config/aws.schema.json").read_text() == build_aws_schema(), "make format"
    assert (ROOT / "config/README.md").read_text() == render_settings_page(), "make format"


def test_config_command_shows_sources_and_masks_secrets(project_folder, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-2")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)  # of a bucket that other tests use
    monkeypatch.setenv("HM_API_KEYS", "ab" * 32)
    rows = {row["setting"]: row for row in explain_settings()}
    assert rows["aws_secret_access_key"]["value"] == rows["api_keys"]["value"] == "********"
    assert rows["aws_access_key_id"]["value"] == ""
    for options in ([], ["--json"]):
        result = CliRunner().invoke(app, ["config", *options])
        assert result.exit_code == 0 and "********" in result.output
        assert "canary-2" not in result.output and "abab" not in result.output


CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-env-5b1c",
    "AWS_SESSION_TOKEN": "canary-env-77d0",
    "GITOPS_REPO_TOKEN": "canary-env-e2a9",
    "CRM_PASSWORD": "canary-env-90ff",
}


def run_command(args: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output, also when it fails."""
    return subprocess.run(
        args, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def run_service(hm: str, root: str, environment: dict[str, str]) -> str:
    """Log and responses of a service with an API key, for valid and invalid requests."""
    key, port = "canary-key-0d4f", find_free_port()
    key_hash = hashlib.sha256(key.encode()).hexdigest()
    service_environment = {"HM_API_KEYS": key_hash, "HM_SECRETS_DIR": root, "HM_PORT": str(port)}
    process = subprocess.Popen(
        [hm, "serve", "--lake", root],
        env=environment | service_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_url(f"http://127.0.0.1:{port}/healthz")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            responses = [
                client.get(path).text for path in ("/readyz", "/metrics", "/model", "/none")
            ]
            for headers in ({"X-API-Key": key}, {"X-API-Key": "canary-wrong"}, {}):
                for body in (b'{"customer_ids": ["a"]}', b"{", b'{"customer_ids": 3}'):
                    response = client.post("/predict", content=body, headers=headers)
                    assert response.status_code >= 400  # no model, or no valid key
                    responses.append(response.text)
    finally:
        process.terminate()
        log = process.communicate(timeout=60)[0]
    assert len(log) > 100 and key_hash not in log
    return log + "".join(responses)


def test_run_outputs_contain_no_secret(s3, small_data, tmp_path):
    """Put canaries in the environment and mounted secrets; search all outputs of a run."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "hm_api_keys").write_text("canary-file-31aa")
    root = f"{s3}/canaries"
    environment = os.environ | CANARIES | {"HM_SECRETS_DIR": str(secrets), "HM_LOG_LEVEL": "DEBUG"}
    hm = str(Path(sys.executable).with_name("hm"))
    output = ""
    for args in (
        ["run", "ingestion", "--data", str(small_data), "-v"],
        ["run", "training"],  # fails
        ["runs", "--json"],
        ["config"],
        ["recommend", "unknown"],
    ):
        result = run_command(
            [hm, *args, "--lake", root] if args != ["config"] else [hm, *args], environment
        )
        output += result.stdout + result.stderr
    rejected_service = run_command([hm, "serve", "--lake", root], environment)
    assert (
        rejected_service.returncode and "api_keys" in rejected_service.stderr
    )  # the mounted value is not a hash
    output += rejected_service.stderr + run_service(hm, root, environment)
    lake = open_lake(root)
    files = [path for path in lake.path().rglob("*") if path.is_file()]
    assert len(files) > 20 and "the stage 'processing' writes it" in output
    leaking_files = [str(path) for path in files if b"canary-" in path.read_bytes()]
    assert not leaking_files and "canary-" not in output.replace(root, "")
