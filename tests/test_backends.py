"""What runs stages elsewhere: resources of Ray jobs, manifests of Argo and KubeRay."""

import yaml

from hm_reco.lake.settings import Settings
from runner.backends.argo import build_workflows
from runner.backends.kuberay import build_ray_job, build_worker_resources
from runner.backends.kubernetes import PIPELINE_NAME, Step
from runner.backends.ray_jobs import Resources, get_dashboard_url

LOAD = Step("load", (), "load", {"rows": "100"})
LEARN = Step("learn", ("load",), "learn", {"rate": "0.1"}, memory="16Gi")


def test_dashboard_url_follows_ray_address():
    client = Settings(ray_address="ray://head:10001", ray_dashboard="")
    assert get_dashboard_url(client) == "http://head:8265"
    assert get_dashboard_url(Settings(ray_address="auto", ray_dashboard="")).endswith(":8265")


def test_resources_are_given_to_ray_in_bytes():
    assert Resources(2, "512Mi").to_options()["entrypoint_memory"] == 512 * 2**20


def test_argo_template_has_one_container_a_step():
    template, schedule = yaml.safe_load_all(build_workflows([LOAD, LEARN]))
    assert schedule["spec"]["workflowSpec"]["workflowTemplateRef"]["name"] == PIPELINE_NAME
    dag, load, learn = template["spec"]["templates"]
    assert dag["dag"]["tasks"][1] == {
        "name": "learn",
        "template": "learn",
        "dependencies": ["load"],
    }
    assert load["container"]["args"][:2] == ["run", "load"]
    assert learn["container"]["resources"]["limits"]["memory"] == "16Gi"


def test_kuberay_worker_has_room_for_the_largest_step():
    steps = [Step("a", (), "a", {}), Step("b", (), "b", {}, 2, "16Gi")]
    assert build_worker_resources(steps) == {
        "requests": {"cpu": "3", "memory": "24Gi"},
        "limits": {"memory": "24Gi"},
    }


def test_kuberay_job_runs_all_steps_on_its_workers():
    job = yaml.safe_load(build_ray_job([LEARN]))
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == 2
    assert job["spec"]["entrypoint"] == "hm run --backend ray"
