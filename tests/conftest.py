"""Fixtures: small lakes on a folder and on S3 (moto's server), and a clean environment."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

from hm_reco.data.synthetic import write_synthetic
from hm_reco.lake.storage import Lake, open_lake
from hm_reco.stages.demo import demo_lake
from tests.fault_injection import finish_run, start_run

# a developer's own settings must not reach the tests
for name in [name for name in os.environ if name.startswith(("HM_", "AWS_", "S3_"))]:
    del os.environ[name]
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "AWS_EC2_METADATA_DISABLED": "true"}

BUCKET = "hm-reco-test"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def find_free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 60) -> None:
    """Wait until `condition` returns true; fail after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_url(url: str, timeout_seconds: float = 120) -> None:
    """Return when `url` answers 200; raise `TimeoutError` when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(url)


@pytest.fixture(scope="session")
def synthetic_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the synthetic data set's three files, 2,000 customers."""
    folder = tmp_path_factory.mktemp("sample")
    write_synthetic(folder, 2_000)
    return folder


@contextmanager
def run_moto_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a local S3 server; yields its URL and its process."""
    # in another process: deltalake holds the interpreter's lock while it waits for S3
    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, "-p", str(port)], **quiet) as server:
        try:
            wait_for_url(f"{url}/moto-api/data.json")
            yield url, server
        finally:
            server.terminate()


def build_s3_environment(url: str) -> dict[str, str]:
    """Environment variables for the local S3 server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="session", autouse=True)
def coverage_environment() -> dict[str, str]:
    """The variable that measures coverage in subprocesses, removed from the environment.

    With it Python is 50 % slower. Tests pass it only to the processes that they measure.
    """
    name = "COVERAGE_PROCESS_CONFIG"
    return {name: os.environ.pop(name)} if name in os.environ else {}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The root of an empty S3 bucket on a local server; sets the environment variables for it."""
    with run_moto_server() as (url, _):
        settings = build_s3_environment(url)
        os.environ |= settings
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
        for name in settings:
            del os.environ[name]


@pytest.fixture(scope="session")
def trained_lake() -> Lake:
    """A lake with a champion; tests only read it."""
    return demo_lake("training", 1_500)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """An empty lake."""
    return open_lake(str(tmp_path / "lake"))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic data set's three files, 500 customers; of the purchases the last half year."""
    folder = tmp_path_factory.mktemp("small")
    write_synthetic(folder, 500)
    transactions_file = folder / "transactions_train.csv"
    header, *rows = transactions_file.read_text().splitlines(keepends=True)
    transactions_file.write_text("".join([header, *(row for row in rows if row >= "2020-03-20")]))
    return folder


@pytest.fixture(scope="session")
def reference_lake(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake after a complete run without faults."""
    lake = str(tmp_path_factory.mktemp("undisturbed") / "lake")
    finish_run(start_run(lake, small_data))
    return open_lake(lake)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MB; skips if mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a real browser; fails on errors and console messages."""
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        yield page
        assert problems == []
        browser.close()


def find_accessibility_violations(page: Page) -> list[str]:
    """Serious and critical accessibility violations that axe-core finds."""
    options = {"preload": False}  # otherwise axe loads stylesheets, which a file:// page may not
    violations = Axe().run(page, options=options).response["violations"]
    return [
        f"{violation['id']}: {violation['nodes'][0]['html'][:200]}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
    ]
