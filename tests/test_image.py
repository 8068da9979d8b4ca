"""The images: their content, the stages as a cluster runs them, and the service.

IMAGE_STAGE, IMAGE_API, IMAGE_LAB and IMAGE_CLUSTER name images; Docker builds the first three.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
import pytest
import yaml

from hm_reco.lake.runs import read_runs
from hm_reco.lake.storage import open_lake
from hm_reco.registry.registry import read_models
from runner.graph import load_pipeline
from tests.conftest import (
    BUCKET,
    build_s3_environment,
    find_free_port,
    run_moto_server,
    wait_for_url,
)

ROOT = Path(__file__).parents[1]
IMAGE_NAMES = {name: os.environ.get(f"IMAGE_{name.upper()}", "") for name in ("stage", "api")}


def is_engine_running(name: str) -> bool:
    """Whether a container engine runs; its command alone is not enough."""
    if not shutil.which(name):
        return False
    return subprocess.run([name, "info"], check=False, capture_output=True).returncode == 0


ENGINE = next(filter(is_engine_running, ("docker", "podman")), "")
pytestmark = pytest.mark.skipif(
    ENGINE != "docker" and not (ENGINE and all(IMAGE_NAMES.values())),
    reason="no container engine; IMAGE_STAGE and IMAGE_API name images for podman",
)
# as in a cluster: only /tmp is writable
RUN_OPTIONS = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--memory", "4g"]
RUN_OPTIONS += ["--security-opt", "no-new-privileges", "--network", "host"]
CANARY = "canary-image-6c1d"  # a secret that no output may contain
SMALL_PARAMETERS = {
    "ingestion-customers": "800",
    "training-evaluation_weeks": "1",
    "training-training_weeks": "2",
    "training-tower_examples": "2000",
}


def run_engine(*args: str, check: bool = True) -> str:
    """Run the container engine; returns its output."""
    command = [ENGINE, *args]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert not check or result.returncode == 0, (
        f"{args}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
    )
    return result.stdout.strip()


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    """The image of each target."""
    names = {target: image or f"hm-reco-{target}:test" for target, image in IMAGE_NAMES.items()}
    for target in (name for name, image in IMAGE_NAMES.items() if not image):
        build_args = ["build", "--target", target, "--build-arg", "GIT_SHA=" + "1" * 40]
        run_engine(*build_args, "--tag", names[target], str(ROOT))
    return names


@pytest.fixture(scope="module")
def s3_environment() -> Iterator[dict[str, str]]:
    """The environment of a local S3 server with a bucket."""
    with run_moto_server() as (url, _), pytest.MonkeyPatch.context() as patch:
        settings = build_s3_environment(url)
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield settings | {"HM_LAKE": f"s3://{BUCKET}/lake", "CRM_PASSWORD": CANARY}


@pytest.fixture(scope="module")
def lake(images, s3_environment):
    """The lake after all stages, each run in a container with the arguments of Argo."""
    spec = next(yaml.safe_load_all((ROOT / "deploy/pipeline/base/workflow.yaml").read_text()))[
        "spec"
    ]
    values = {
        parameter["name"]: parameter["value"] for parameter in spec["arguments"]["parameters"]
    } | SMALL_PARAMETERS
    assert SMALL_PARAMETERS.keys() <= {
        parameter["name"] for parameter in spec["arguments"]["parameters"]
    }
    substitutions = {f"workflow.parameters.{name}": value for name, value in values.items()}
    substitutions["workflow.name"] = "nightly-1"
    templates = {template["name"]: template for template in spec["templates"]}
    environment = [arg for pair in s3_environment.items() for arg in ("--env", "=".join(pair))]
    for name in load_pipeline():
        args = templates[name]["container"]["args"]
        stage_args = [
            re.sub(r"\{\{(.*?)\}\}", lambda match: substitutions[match[1]], arg) for arg in args
        ]
        output = run_engine("run", "--rm", *RUN_OPTIONS, *environment, images["stage"], *stage_args)
        assert name in output and CANARY not in output
    return open_lake(s3_environment["HM_LAKE"])


def test_images_are_small_and_have_expected_modules(images, capsys):
    for target, image in images.items():
        image_info = json.loads(run_engine("image", "inspect", image))[0]
        labels = image_info["Config"]["Labels"]
        with capsys.disabled():
            print(f"\n{target}: {image_info['Size'] / 1e6:,.0f} MB unpacked")
        assert image_info["Config"]["User"] == "10001"
        assert re.fullmatch("[0-9a-f]{40}", labels["org.opencontainers.image.revision"])
        assert labels["org.opencontainers.image.version"]
        assert target == "stage" or image_info["Size"] < 900e6
        probe = "import importlib.util as u; print(*[n for n in {} if u.find_spec(n)])"
        forbidden_modules = ["jupyterlab", "pip", "pytest", "nbdev", "moto"]
        stage_modules = ["torch", "papermill", "pandas"]
        run_args = ("run", "--rm", *RUN_OPTIONS, image, "python", "-c")
        assert run_engine(*run_args, probe.format(forbidden_modules)) == ""
        assert run_engine(*run_args, probe.format(stage_modules)) == (
            "" if target == "api" else " ".join(stage_modules)
        )
        script = "for t in gcc cc make git strip curl; do command -v $t; done; id -u; touch /app/x"
        assert (
            run_engine("run", "--rm", *RUN_OPTIONS, image, "sh", "-c", script, check=False)
            == "10001"
        )


def test_stage_containers_share_one_run(lake):
    stage_runs = {stage_run.stage: stage_run for stage_run in read_runs(lake)}
    assert [*stage_runs] == [*load_pipeline()]
    assert {(stage_run.run_id, stage_run.state) for stage_run in stage_runs.values()} == {
        ("nightly-1", "succeeded")
    }
    assert {model.run_id for model in read_models(lake)} == {"nightly-1"}
    page = lake.path("reports", "nightly-1", "index.html").read_text()
    assert all(f'/reports/nightly-1/{stage}.html"' in page for stage in stage_runs)
    files = [path for path in lake.path("runs", "nightly-1").rglob("*") if path.is_file()]
    files += [path for path in lake.path("reports").rglob("*") if path.is_file()]
    assert len(files) > 15 and not any(CANARY.encode() in path.read_bytes() for path in files)


def request_prediction(port: int, seconds: float = 120) -> dict:
    """Request a prediction when the service is ready. Raises `TimeoutError`."""
    wait_for_url(f"http://127.0.0.1:{port}/readyz", seconds)
    body = {"customer_ids": ["unknown"], "k": 12, "explain": True}
    response = httpx.post(f"http://127.0.0.1:{port}/predict", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_api_image_serves_predictions(images, lake, s3_environment):
    port, name = find_free_port(), "hm-reco-test-api"
    settings = s3_environment | {"HM_PORT": str(port), "HM_HOST": "127.0.0.1"}
    environment = [arg for pair in settings.items() for arg in ("--env", "=".join(pair))]
    run_engine("rm", "--force", name, check=False)
    run_engine("run", "--detach", "--name", name, *RUN_OPTIONS, *environment, images["api"])
    try:
        response = request_prediction(port)
        assert len(response["recommendations"][0]["articles"]) == 12
        assert response["model_version"] in {model.version for model in read_models(lake)}
        version_command = "hm", "--version"
        assert re.search(r"[0-9a-f]{40}", run_engine("exec", name, *version_command))
        image_info = run_engine("image", "inspect", images["api"])
        assert "Healthcheck" in image_info and "healthz" in image_info
        output = run_engine("exec", name, "sh", "-c", "hm run eda 2>&1", check=False)
        assert output.endswith("is not installed; stages need: pip install 'hm-reco[stages]'")
    finally:
        run_engine("stop", "--time", "20", name, check=False)
        output = run_engine("logs", name)
        state = json.loads(run_engine("inspect", name))[0]["State"]
        run_engine("rm", "--force", name)
    assert state["ExitCode"] == 0 and CANARY not in output


def render_staging_overlay(images: dict[str, str], settings: dict[str, str]) -> str:
    """The staging overlay as ArgoCD applies it, adapted to `podman kube play`."""
    kubectl = shutil.which("kubectl") or str(ROOT / ".venv-delivery" / "bin" / "kubectl")
    if not Path(kubectl).exists():
        pytest.skip("no kubectl: make check-delivery brings it")
    overlay = ROOT / "deploy/api/overlays/staging"
    text = subprocess.run([kubectl, "kustomize", overlay], check=True, capture_output=True).stdout
    documents = {item["kind"]: item for item in yaml.safe_load_all(text)}
    resources = [documents["ConfigMap"], documents["Deployment"]]
    for document in resources:
        document["metadata"].pop("namespace")
    documents["ConfigMap"]["data"] |= settings
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    # host network, so a free port; no secret, because podman 4 cannot mount an optional one;
    # everything else as in a cluster
    pod["hostNetwork"] = True
    del container["ports"]
    for mounts in (pod["volumes"], container["volumeMounts"]):
        mounts[:] = [mount for mount in mounts if mount["name"] != "secrets"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        container[probe]["httpGet"]["port"] = int(settings["HM_PORT"])
    container |= {"image": images["api"], "imagePullPolicy": "Never"}
    return yaml.safe_dump_all(resources)


@pytest.mark.skipif(
    ENGINE != "docker" and not os.environ.get("IMAGE_LAB"), reason="IMAGE_LAB names no image"
)
def test_lab_image_serves_notebooks():
    image, port, name = os.environ.get("IMAGE_LAB", ""), find_free_port(), "hm-reco-test-lab"
    if not image:
        image = "hm-reco-lab:test"
        run_engine("build", "--target", "lab", "--tag", image, str(ROOT))
    args = [
        "jupyter",
        "lab",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--no-browser",
        "--notebook-dir=nbs",
    ]
    run_engine("rm", "--force", name, check=False)
    run_engine("run", "--detach", "--name", name, *RUN_OPTIONS, image, *args)
    try:
        wait_for_url(f"http://127.0.0.1:{port}/api", 60)
        servers = run_engine("exec", name, "sh", "-c", "jupyter server list")
        token = re.search(r"token=(\w+)", servers)
        assert token  # access needs the token
        address = f"http://127.0.0.1:{port}/api/contents"
        assert httpx.get(address).status_code == 403
        contents = httpx.get(address, params={"token": token[1]}).json()["content"]
        assert {"00_start.ipynb", "stages"} <= {item["name"] for item in contents}
    finally:
        run_engine("rm", "--force", name)


@pytest.mark.skipif(ENGINE != "podman", reason="kube play is podman's")
@pytest.mark.parametrize("fault", ["", "mountPath: /tmp"])
def test_staging_overlay_runs_and_serves_predictions(images, lake, s3_environment, tmp_path, fault):
    settings = s3_environment | {"HM_PORT": str(find_free_port()), "HM_HOST": "127.0.0.1"}
    text, file = render_staging_overlay(images, settings), tmp_path / "play.yaml"
    assert fault in text
    # with the fault no folder is writable
    file.write_text(text.replace(fault, "mountPath: /elsewhere") if fault else text)
    podman = ["podman", "kube"]
    subprocess.run([*podman, "play", str(file)], check=True, capture_output=True, timeout=120)
    try:
        if fault:
            with pytest.raises(TimeoutError):
                request_prediction(int(settings["HM_PORT"]), 15)
        else:
            assert (
                len(request_prediction(int(settings["HM_PORT"]))["recommendations"][0]["articles"])
                == 12
            )
    finally:
        subprocess.run([*podman, "down", str(file)], check=True, capture_output=True, timeout=120)


@pytest.mark.skipif(not os.environ.get("IMAGE_CLUSTER"), reason="IMAGE_CLUSTER names no image")
def test_cluster_image_runs_stages_as_ray_jobs():
    head = "ray start --head --num-cpus 2 --memory 17179869184 --disable-usage-stats > /dev/null"
    run = "hm run ingestion processing --backend ray --lake /tmp/lake -p customers=300"
    script = f"{head} && {run} && hm runs --json --lake /tmp/lake && wget --version > /dev/null"
    image = os.environ["IMAGE_CLUSTER"]
    output = run_engine(
        "run", "--rm", *RUN_OPTIONS, "--env", "HM_RAY_ADDRESS=auto", image, "bash", "-c", script
    )
    stage_runs = json.loads(output[output.rindex("\n[") :])
    assert [(e["stage"], e["state"]) for e in stage_runs] == [
        ("ingestion", "succeeded"),
        ("processing", "succeeded"),
    ]
    assert all(e["job"].startswith("http://127.0.0.1:8265/#/jobs/") for e in stage_runs)
