"""Where settings come from, what is said of wrong ones, and that no secret is ever told."""

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
from tests.conftest import BUCKET, free_port, wait_for

ROOT = Path(__file__).parents[1]
INI = "[DEFAULT]\nlake = from-ini\nport = 8081\n[dev]\n[prod]\nport = 8082\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with settings.ini, in which we work."""
    (tmp_path / "settings.ini").write_text(INI)
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_layer_is_stronger_than_the_one_below(home, monkeypatch):
    assert (Settings().port, find_setting_source("port")) == (8081, "settings.ini [dev]")
    monkeypatch.setenv("HM_ENV", "prod")
    assert (Settings().port, find_setting_source("port")) == (8082, "settings.ini [prod]")
    monkeypatch.setenv("HM_PORT", "8083")
    assert (Settings().port, find_setting_source("port")) == (8083, "environment HM_PORT")
    (home / "secrets").mkdir()
    (home / "secrets" / "hm_port").write_text("8084")
    monkeypatch.setenv("HM_SECRETS_DIR", str(home / "secrets"))
    assert (Settings().port, find_setting_source("port")) == (8084, "secret hm_port")
    assert find_setting_source("max_queue") == "default"


def test_a_bucket_names_the_lake_by_its_layer(home, monkeypatch):
    (home / "config/aws.json").write_text('{"s3_data_lake_bucket": "shop"}')
    assert (Settings().lake, find_setting_source("lake")) == ("s3://shop", "config/aws.json")
    monkeypatch.setenv("S3_DATA_LAKE_BUCKET", "other")
    monkeypatch.setenv("S3_DATA_LAKE_PREFIX", "/reco/")
    assert Settings().lake == "s3://other/reco"
    assert find_setting_source("lake") == "environment S3_DATA_LAKE_BUCKET"
    monkeypatch.setenv("HM_LAKE", "here")
    assert (Settings().lake, find_setting_source("lake")) == ("here", "environment HM_LAKE")


def test_an_empty_bucket_names_no_lake(home, monkeypatch):
    monkeypatch.setenv("S3_DATA_LAKE_BUCKET", "")
    assert (Settings().lake, find_setting_source("lake")) == ("from-ini", "settings.ini [dev]")


def test_folders_of_a_lake_on_s3_can_have_other_names(s3, home, monkeypatch):
    monkeypatch.setenv("S3_ARTIFACTS_PREFIX", "models")
    lake = open_lake(f"{s3}/renamed")
    write(lake, "artifacts/tried", pl.DataFrame({"n": [1]}))
    write_file(lake.path("artifacts", "models", "v1", "note.txt"), "here")
    keys = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="renamed/")["Contents"]
    tops = {one["Key"].split("/")[1] for one in keys}
    assert "models" in tops and "artifacts" not in tops
    assert list_table_names(lake) == ["artifacts/tried"]
    assert resolve_file(lake, "artifacts", "models", "v1", "note.txt").read_text() == "here"
    assert open_lake(home / "lake").prefixes == {}  # a folder is as it is
    for name in ("raw", "reports"):
        monkeypatch.setenv("S3_ARTIFACTS_PREFIX", name)
        with pytest.raises(ValueError, match="each folder needs a name of its own"):
            open_lake(f"{s3}/renamed")
    monkeypatch.setenv("S3_ARTIFACTS_PREFIX", "../up")
    with pytest.raises(ValueError, match="s3_artifacts_prefix"):
        Settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON, line 1"),
        ('{"aws_regoin": "eu-north-1"}', "aws_regoin: Extra inputs are not permitted"),
        ('{"aws_region": 7}', "aws_region: Input should be a valid string"),
        ("[]", "all: "),
    ],
)
def test_a_wrong_aws_file_is_named_without_its_values(home, content, message):
    (home / "config/aws.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Settings()
    (home / "config/aws.json").write_text('{"aws_secret_access_key": ["canary-1"]}')
    with pytest.raises(ValueError, match="aws_secret_access_key") as caught:
        Settings()
    assert "canary-1" not in str(caught.value)


def test_the_schema_holds_what_the_model_holds():
    schema = json.loads(build_aws_schema())
    jsonschema.validate({"aws_region": "eu-north-1", "s3_data_lake_bucket": "shop"}, schema)
    for wrong in ({"aws_regoin": "x"}, {"aws_region": 7}, {"lake": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_the_files_made_from_the_settings_are_up_to_date():
    assert (ROOT / "config/aws.schema.json").read_text() == build_aws_schema(), "make format"
    assert (ROOT / "config/README.md").read_text() == render_settings_page(), "make format"


def test_hm_config_shows_origins_and_masks_secrets(home, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-2")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)  # of a bucket that other tests use
    monkeypatch.setenv("HM_API_KEYS", "ab" * 32)
    rows = {row["setting"]: row for row in explain_settings()}
    assert rows["aws_secret_access_key"]["value"] == rows["api_keys"]["value"] == "********"
    assert rows["aws_access_key_id"]["value"] == ""
    for more in ([], ["--json"]):
        done = CliRunner().invoke(app, ["config", *more])
        assert done.exit_code == 0 and "********" in done.output
        assert "canary-2" not in done.output and "abab" not in done.output


CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-env-5b1c",
    "AWS_SESSION_TOKEN": "canary-env-77d0",
    "GITOPS_REPO_TOKEN": "canary-env-e2a9",
    "CRM_PASSWORD": "canary-env-90ff",
}


def said(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a command says, well or not."""
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def _service(hm: str, root: str, environment: dict[str, str]) -> str:
    """All that a service says that has a key, when it is asked well and badly."""
    key, port = "canary-key-0d4f", free_port()
    hashed = hashlib.sha256(key.encode()).hexdigest()
    own = {"HM_API_KEYS": hashed, "HM_SECRETS_DIR": root, "HM_PORT": str(port)}
    process = subprocess.Popen(
        [hm, "serve", "--lake", root],
        env=environment | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/healthz")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            answers = [client.get(path).text for path in ("/readyz", "/metrics", "/model", "/none")]
            for headers in ({"X-API-Key": key}, {"X-API-Key": "canary-wrong"}, {}):
                for body in (b'{"customer_ids": ["a"]}', b"{", b'{"customer_ids": 3}'):
                    answer = client.post("/predict", content=body, headers=headers)
                    assert answer.status_code >= 400  # there is no model, or no key
                    answers.append(answer.text)
    finally:
        process.terminate()
        log = process.communicate(timeout=60)[0]
    assert len(log) > 100 and hashed not in log
    return log + "".join(answers)


def test_no_secret_is_told_by_a_run(s3, small_data, tmp_path):
    """Canaries in the environment and in mounted secrets; all outputs of a run are searched."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "hm_api_keys").write_text("canary-file-31aa")
    root = f"{s3}/canaries"
    environment = os.environ | CANARIES | {"HM_SECRETS_DIR": str(secrets), "HM_LOG_LEVEL": "DEBUG"}
    hm = str(Path(sys.executable).with_name("hm"))
    told = ""
    for words in (
        ["run", "ingestion", "--data", str(small_data), "-v"],
        ["run", "training"],  # which fails
        ["runs", "--json"],
        ["config"],
        ["recommend", "nobody"],
    ):
        done = said(
            [hm, *words, "--lake", root] if words != ["config"] else [hm, *words], environment
        )
        told += done.stdout + done.stderr
    refused = said([hm, "serve", "--lake", root], environment)
    assert refused.returncode and "api_keys" in refused.stderr  # the one mounted is no hash
    told += refused.stderr + _service(hm, root, environment)
    lake = open_lake(root)
    files = [path for path in lake.path().rglob("*") if path.is_file()]
    assert len(files) > 20 and "the stage 'processing' writes it" in told
    found = [str(path) for path in files if b"canary-" in path.read_bytes()]
    assert not found and "canary-" not in told.replace(root, "")
