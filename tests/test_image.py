"""The images: what they hold, the stages in them as a cluster runs them, and their answers.

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
from tests.conftest import BUCKET, free_port, moto_server, s3_settings, wait_for

ROOT = Path(__file__).parents[1]
NAMED = {name: os.environ.get(f"IMAGE_{name.upper()}", "") for name in ("stage", "api")}


def answers(name: str) -> bool:
    """Whether a container engine is there, and not just its command."""
    if not shutil.which(name):
        return False
    return subprocess.run([name, "info"], check=False, capture_output=True).returncode == 0


ENGINE = next(filter(answers, ("docker", "podman")), "")
pytestmark = pytest.mark.skipif(
    ENGINE != "docker" and not (ENGINE and all(NAMED.values())),
    reason="no container engine; IMAGE_STAGE and IMAGE_API name images for podman",
)
# as in a cluster: nothing but /tmp can be written
BOUND = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--memory", "4g"]
BOUND += ["--security-opt", "no-new-privileges", "--network", "host"]
CANARY = "canary-image-6c1d"  # a secret that is nobody's business
SMALL = {
    "ingestion-customers": "800",
    "training-evaluation_weeks": "1",
    "training-training_weeks": "2",
    "training-tower_examples": "2000",
}


def engine(*words: str, check: bool = True) -> str:
    """What the engine says."""
    command = [ENGINE, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    """The image of each target."""
    found = {target: named or f"hm-reco-{target}:test" for target, named in NAMED.items()}
    for target in (name for name, named in NAMED.items() if not named):
        built = ["build", "--target", target, "--build-arg", "GIT_SHA=" + "1" * 40]
        engine(*built, "--tag", found[target], str(ROOT))
    return found


@pytest.fixture(scope="module")
def cloud() -> Iterator[dict[str, str]]:
    """The environment for an S3 of our own, in which there is a bucket."""
    with moto_server() as (url, _), pytest.MonkeyPatch.context() as patch:
        settings = s3_settings(url)
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield settings | {"HM_LAKE": f"s3://{BUCKET}/lake", "CRM_PASSWORD": CANARY}


@pytest.fixture(scope="module")
def lake(images, cloud):
    """What the stages left, each run in a container of its own with what Argo gives it."""
    spec = next(yaml.safe_load_all((ROOT / "deploy/pipeline/base/workflow.yaml").read_text()))[
        "spec"
    ]
    values = {one["name"]: one["value"] for one in spec["arguments"]["parameters"]} | SMALL
    assert SMALL.keys() <= {one["name"] for one in spec["arguments"]["parameters"]}
    known = {f"workflow.parameters.{name}": value for name, value in values.items()}
    known["workflow.name"] = "nightly-1"
    templates = {one["name"]: one for one in spec["templates"]}
    environment = [word for pair in cloud.items() for word in ("--env", "=".join(pair))]
    for name in load_pipeline():
        args = templates[name]["container"]["args"]
        words = [re.sub(r"\{\{(.*?)\}\}", lambda one: known[one[1]], word) for word in args]
        told = engine("run", "--rm", *BOUND, *environment, images["stage"], *words)
        assert name in told and CANARY not in told
    return open_lake(cloud["HM_LAKE"])


def test_the_images_are_small_and_hold_what_they_need(images, capsys):
    for target, image in images.items():
        about = json.loads(engine("image", "inspect", image))[0]
        labels = about["Config"]["Labels"]
        with capsys.disabled():
            print(f"\n{target}: {about['Size'] / 1e6:,.0f} MB unpacked")
        assert about["Config"]["User"] == "10001"
        assert re.fullmatch("[0-9a-f]{40}", labels["org.opencontainers.image.revision"])
        assert labels["org.opencontainers.image.version"]
        assert target == "stage" or about["Size"] < 900e6
        look = "import importlib.util as u; print(*[n for n in {} if u.find_spec(n)])"
        never = ["jupyterlab", "pip", "pytest", "nbdev", "moto"]
        only = ["torch", "papermill", "pandas"]
        run = ("run", "--rm", *BOUND, image, "python", "-c")
        assert engine(*run, look.format(never)) == ""
        assert engine(*run, look.format(only)) == ("" if target == "api" else " ".join(only))
        tools = "for t in gcc cc make git strip curl; do command -v $t; done; id -u; touch /app/x"
        assert engine("run", "--rm", *BOUND, image, "sh", "-c", tools, check=False) == "10001"


def test_the_stages_ran_as_one_run(lake):
    entries = {entry.stage: entry for entry in read_runs(lake)}
    assert [*entries] == [*load_pipeline()]
    assert {(entry.run_id, entry.state) for entry in entries.values()} == {
        ("nightly-1", "succeeded")
    }
    assert {model.run_id for model in read_models(lake)} == {"nightly-1"}
    page = lake.path("reports", "nightly-1", "index.html").read_text()
    assert all(f'/reports/nightly-1/{stage}.html"' in page for stage in entries)
    files = [path for path in lake.path("runs", "nightly-1").rglob("*") if path.is_file()]
    files += [path for path in lake.path("reports").rglob("*") if path.is_file()]
    assert len(files) > 15 and not any(CANARY.encode() in path.read_bytes() for path in files)


def ask(port: int, seconds: float = 120) -> dict:
    """A prediction, asked for when the service is ready. Raises `TimeoutError`."""
    wait_for(f"http://127.0.0.1:{port}/readyz", seconds)
    body = {"customer_ids": ["nobody"], "k": 12, "explain": True}
    answer = httpx.post(f"http://127.0.0.1:{port}/predict", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_service_answers_from_the_lake(images, lake, cloud):
    port, name = free_port(), "hm-reco-test-api"
    settings = cloud | {"HM_PORT": str(port), "HM_HOST": "127.0.0.1"}
    environment = [word for pair in settings.items() for word in ("--env", "=".join(pair))]
    engine("rm", "--force", name, check=False)
    engine("run", "--detach", "--name", name, *BOUND, *environment, images["api"])
    try:
        answer = ask(port)
        assert len(answer["recommendations"][0]["articles"]) == 12
        assert answer["model_version"] in {model.version for model in read_models(lake)}
        text = "hm", "--version"
        assert re.search(r"[0-9a-f]{40}", engine("exec", name, *text))
        check = engine("image", "inspect", images["api"])
        assert "Healthcheck" in check and "healthz" in check
        told = engine("exec", name, "sh", "-c", "hm run eda 2>&1", check=False)
        assert told.endswith("is not installed; stages need: pip install 'hm-reco[stages]'")
    finally:
        engine("stop", "--time", "20", name, check=False)
        told = engine("logs", name)
        state = json.loads(engine("inspect", name))[0]["State"]
        engine("rm", "--force", name)
    assert state["ExitCode"] == 0 and CANARY not in told


def played(images: dict[str, str], settings: dict[str, str]) -> str:
    """What ArgoCD would apply of the staging overlay, as podman can play it on this machine."""
    kubectl = shutil.which("kubectl") or str(ROOT / ".venv-delivery" / "bin" / "kubectl")
    if not Path(kubectl).exists():
        pytest.skip("no kubectl: make check-delivery brings it")
    overlay = ROOT / "deploy/api/overlays/staging"
    text = subprocess.run([kubectl, "kustomize", overlay], check=True, capture_output=True).stdout
    documents = {one["kind"]: one for one in yaml.safe_load_all(text)}
    kept = [documents["ConfigMap"], documents["Deployment"]]
    for document in kept:
        document["metadata"].pop("namespace")
    documents["ConfigMap"]["data"] |= settings
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    # this machine's network, so a port of its own; no secret, which podman 4 cannot mount when it
    # is optional; the rest is as a cluster gets it
    pod["hostNetwork"] = True
    del container["ports"]
    for mounts in (pod["volumes"], container["volumeMounts"]):
        mounts[:] = [one for one in mounts if one["name"] != "secrets"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        container[probe]["httpGet"]["port"] = int(settings["HM_PORT"])
    container |= {"image": images["api"], "imagePullPolicy": "Never"}
    return yaml.safe_dump_all(kept)


@pytest.mark.skipif(
    ENGINE != "docker" and not os.environ.get("IMAGE_LAB"), reason="IMAGE_LAB names no image"
)
def test_the_lab_opens_the_notebooks():
    image, port, name = os.environ.get("IMAGE_LAB", ""), free_port(), "hm-reco-test-lab"
    if not image:
        image = "hm-reco-lab:test"
        engine("build", "--target", "lab", "--tag", image, str(ROOT))
    words = [
        "jupyter",
        "lab",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--no-browser",
        "--notebook-dir=nbs",
    ]
    engine("rm", "--force", name, check=False)
    engine("run", "--detach", "--name", name, *BOUND, image, *words)
    try:
        wait_for(f"http://127.0.0.1:{port}/api", 60)
        log = engine("exec", name, "sh", "-c", "jupyter server list")
        token = re.search(r"token=(\w+)", log)
        assert token  # without it nobody gets in
        address = f"http://127.0.0.1:{port}/api/contents"
        assert httpx.get(address).status_code == 403
        listed = httpx.get(address, params={"token": token[1]}).json()["content"]
        assert {"00_start.ipynb", "stages"} <= {one["name"] for one in listed}
    finally:
        engine("rm", "--force", name)


@pytest.mark.skipif(ENGINE != "podman", reason="kube play is podman's")
@pytest.mark.parametrize("fault", ["", "mountPath: /tmp"])
def test_what_the_cluster_is_given_plays_and_answers(images, lake, cloud, tmp_path, fault):
    settings = cloud | {"HM_PORT": str(free_port()), "HM_HOST": "127.0.0.1"}
    text, file = played(images, settings), tmp_path / "play.yaml"
    assert fault in text
    # with the fault there is nothing that it can write to
    file.write_text(text.replace(fault, "mountPath: /elsewhere") if fault else text)
    podman = ["podman", "kube"]
    subprocess.run([*podman, "play", str(file)], check=True, capture_output=True, timeout=120)
    try:
        if fault:
            with pytest.raises(TimeoutError):
                ask(int(settings["HM_PORT"]), 15)
        else:
            assert len(ask(int(settings["HM_PORT"]))["recommendations"][0]["articles"]) == 12
    finally:
        subprocess.run([*podman, "down", str(file)], check=True, capture_output=True, timeout=120)


@pytest.mark.skipif(not os.environ.get("IMAGE_CLUSTER"), reason="IMAGE_CLUSTER names no image")
def test_stages_are_jobs_of_a_ray_cluster_in_its_image():
    head = "ray start --head --num-cpus 2 --memory 17179869184 --disable-usage-stats > /dev/null"
    run = "hm run ingestion processing --backend ray --lake /tmp/lake -p customers=300"
    script = f"{head} && {run} && hm runs --json --lake /tmp/lake && wget --version > /dev/null"
    image = os.environ["IMAGE_CLUSTER"]
    told = engine(
        "run", "--rm", *BOUND, "--env", "HM_RAY_ADDRESS=auto", image, "bash", "-c", script
    )
    entries = json.loads(told[told.rindex("\n[") :])
    assert [(e["stage"], e["state"]) for e in entries] == [
        ("ingestion", "succeeded"),
        ("processing", "succeeded"),
    ]
    assert all(e["job"].startswith("http://127.0.0.1:8265/#/jobs/") for e in entries)
