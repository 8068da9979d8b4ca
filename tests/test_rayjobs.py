"""Stages as jobs of a real Ray cluster with its dashboard: ledger, reports and errors as always."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")
from ray.cluster_utils import Cluster

from hm_reco.lake.runs import read_runs
from hm_reco.lake.storage import open_lake

HM = str(Path(sys.executable).with_name("hm"))


@pytest.fixture(scope="module")
def settings(watched: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment in which `hm` finds a cluster of two nodes, and they find `hm`."""
    before, folder = os.environ["PATH"], Path(sys.executable).parent
    os.environ["PATH"] = f"{folder}:{before}"
    node = {"num_cpus": 1, "memory": 20 * 2**30, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": True})
    cluster.add_node(**node)
    where = {"HM_RAY_ADDRESS": cluster.address, "HM_RAY_DASHBOARD": f"http://{cluster.webui_url}"}
    yield os.environ | where | watched
    cluster.shutdown()
    os.environ["PATH"] = before


def hm(settings: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HM, *words], env=settings, capture_output=True, text=True, timeout=300, check=False
    )


def test_stages_run_as_jobs_and_are_recorded_as_always(settings, lake):
    words = ("run", "ingestion", "processing", "--backend", "ray", "--lake", lake.root, "-v")
    done = hm(settings, *words, "-p", "customers=300", "-p", "processing.shards=2")
    assert done.returncode == 0, done.stdout + done.stderr
    entries = read_runs(lake)
    assert [(e.stage, e.state) for e in entries] == [
        ("ingestion", "succeeded"),
        ("processing", "succeeded"),
    ]
    assert len({e.run_id for e in entries}) == 1 and entries[1].parameters["shards"] == 2
    page = lake.path("reports", entries[0].run_id, "index.html").read_text()
    for entry in entries:
        assert entry.job_url.startswith(settings["HM_RAY_DASHBOARD"]) and entry.job_url in page
        assert lake.path(entry.report).is_file() and lake.path(entry.notebook).is_file()
    assert "processing | " in done.stdout  # what the job printed
    assert "Ray: " in hm(settings, "runs", "--lake", lake.root).stdout
    again = hm(settings, *words, "-p", "customers=300", "-p", "processing.shards=2")
    assert again.returncode == 0 and "cached" in again.stdout, again.stdout


def test_a_stage_that_fails_there_is_told_here(settings, lake):
    done = hm(settings, "run", "processing", "--backend", "ray", "--lake", lake.root)
    assert done.returncode == 1
    assert "stage 'processing' failed" in done.stderr and "raw/" in done.stderr, done.stderr


def test_what_no_machine_has_is_told_while_it_waits(settings, lake, tmp_path):
    from runner.backends.ray_jobs import Resources, get_job_client, run_job

    heard: list[str] = []
    asked = run_job(
        get_job_client(settings["HM_RAY_DASHBOARD"]),
        "large",
        ["true"],
        Resources(cpus=64),
        heard.append,
        lambda: not heard,  # waits no longer than until it is told
    )
    assert asked[0] == "STOPPED" and "resources" in "".join(heard)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"HM_RAY_ADDRESS": ""}, "HM_RAY_ADDRESS is empty"),
        ({"HM_RAY_DASHBOARD": "http://127.0.0.1:9"}, "no Ray dashboard at http://127.0.0.1:9"),
    ],
)
def test_a_cluster_that_is_not_there_is_named(settings, tmp_path, extra, says):
    lake = open_lake(str(tmp_path))
    done = hm(settings | extra, "run", "ingestion", "--backend", "ray", "--lake", lake.root)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    wrong = hm(settings, "run", "--backend", "spark", "--lake", lake.root)
    assert wrong.returncode == 1 and "--backend spark: expected ray" in wrong.stderr
