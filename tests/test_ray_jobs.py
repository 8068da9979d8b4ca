"""Stages as jobs of a real Ray cluster: run store, reports and errors as in local runs."""

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
def environment(coverage_environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of `hm` for a cluster of two nodes, whose PATH contains `hm`."""
    old_path, folder = os.environ["PATH"], Path(sys.executable).parent
    os.environ["PATH"] = f"{folder}:{old_path}"
    node = {"num_cpus": 1, "memory": 20 * 2**30, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": True})
    cluster.add_node(**node)
    ray_settings = {
        "HM_RAY_ADDRESS": cluster.address,
        "HM_RAY_DASHBOARD": f"http://{cluster.webui_url}",
    }
    yield os.environ | ray_settings | coverage_environment
    cluster.shutdown()
    os.environ["PATH"] = old_path


def run_hm(environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HM, *args], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_ray_jobs_run_stages_and_are_recorded(environment, lake):
    args = ("run", "ingestion", "processing", "--backend", "ray", "--lake", lake.root, "-v")
    result = run_hm(environment, *args, "-p", "customers=300", "-p", "processing.shards=2")
    assert result.returncode == 0, result.stdout + result.stderr
    stage_runs = read_runs(lake)
    assert [(e.stage, e.state) for e in stage_runs] == [
        ("ingestion", "succeeded"),
        ("processing", "succeeded"),
    ]
    assert len({e.run_id for e in stage_runs}) == 1 and stage_runs[1].parameters["shards"] == 2
    page = lake.path("reports", stage_runs[0].run_id, "index.html").read_text()
    for stage_run in stage_runs:
        assert (
            stage_run.job_url.startswith(environment["HM_RAY_DASHBOARD"])
            and stage_run.job_url in page
        )
        assert lake.path(stage_run.report).is_file() and lake.path(stage_run.notebook).is_file()
    assert "processing | " in result.stdout  # what the job printed
    assert "Ray: " in run_hm(environment, "runs", "--lake", lake.root).stdout
    rerun = run_hm(environment, *args, "-p", "customers=300", "-p", "processing.shards=2")
    assert rerun.returncode == 0 and "cached" in rerun.stdout, rerun.stdout


def test_ray_job_failure_is_reported_by_hm(environment, lake):
    result = run_hm(environment, "run", "processing", "--backend", "ray", "--lake", lake.root)
    assert result.returncode == 1
    assert "stage 'processing' failed" in result.stderr and "raw/" in result.stderr, result.stderr


def test_ray_job_waiting_for_resources_is_reported(environment, lake, tmp_path):
    from runner.backends.ray_jobs import Resources, get_job_client, run_job

    messages: list[str] = []
    job = run_job(
        get_job_client(environment["HM_RAY_DASHBOARD"]),
        "large",
        ["true"],
        Resources(cpus=64),
        messages.append,
        lambda: not messages,  # stop as soon as a message arrives
    )
    assert job[0] == "STOPPED" and "resources" in "".join(messages)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"HM_RAY_ADDRESS": ""}, "HM_RAY_ADDRESS is empty"),
        ({"HM_RAY_DASHBOARD": "http://127.0.0.1:9"}, "no Ray dashboard at http://127.0.0.1:9"),
    ],
)
def test_ray_jobs_without_cluster_name_the_setting(environment, tmp_path, extra, message):
    lake = open_lake(str(tmp_path))
    result = run_hm(
        environment | extra, "run", "ingestion", "--backend", "ray", "--lake", lake.root
    )
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    unknown_backend = run_hm(environment, "run", "--backend", "spark", "--lake", lake.root)
    assert (
        unknown_backend.returncode == 1
        and "--backend spark: expected local or ray" in unknown_backend.stderr
    )
