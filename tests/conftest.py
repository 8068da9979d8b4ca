"""Fixtures: small lakes on a folder and on S3 (moto's server), and an environment of their own."""

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
from tests.faults import finish, start

# a developer's own settings must not reach the tests
for name in [name for name in os.environ if name.startswith(("HM_", "AWS_", "S3_"))]:
    del os.environ[name]
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "AWS_EC2_METADATA_DISABLED": "true"}

BUCKET = "hm-reco-test"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something to become true, at most so long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for(url: str, seconds: float = 120) -> None:
    """Return when `url` answers 200; raise `TimeoutError` when it does not in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(url)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the synthetic data set's three files, 2,000 customers."""
    folder = tmp_path_factory.mktemp("sample")
    write_synthetic(folder, 2_000)
    return folder


@contextmanager
def moto_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An S3 of our own: its address and its process."""
    # a process of its own: deltalake waits for S3 without letting go of Python's lock
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, "-p", str(port)], **quiet) as server:
        try:
            wait_for(f"{url}/moto-api/data.json")
            yield url, server
        finally:
            server.terminate()


def s3_settings(url: str) -> dict[str, str]:
    """The environment for a server of our own."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="session", autouse=True)
def watched() -> dict[str, str]:
    """What has coverage look into processes, taken out of the environment.

    Python is half as slow again with it. Tests give it to the processes that are worth a look.
    """
    name = "COVERAGE_PROCESS_CONFIG"
    return {name: os.environ.pop(name)} if name in os.environ else {}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The root of an empty S3 bucket on a server of our own, with the environment set for it."""
    with moto_server() as (url, _):
        settings = s3_settings(url)
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
    sales = folder / "transactions_train.csv"
    head, *rows = sales.read_text().splitlines(keepends=True)
    sales.write_text("".join([head, *(row for row in rows if row >= "2020-03-20")]))
    return folder


@pytest.fixture(scope="session")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake after a whole run that nothing disturbed."""
    lake = str(tmp_path_factory.mktemp("undisturbed") / "lake")
    finish(start(lake, small_data))
    return open_lake(lake)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MB; skips where none may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a real browser, in which nothing may go wrong."""
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


def faults(page: Page) -> list[str]:
    """What axe-core calls serious or critical for people who see, hear or move otherwise."""
    options = {"preload": False}  # else axe asks for stylesheets that a file may not ask for
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
