"""Create a stage in a copy of the project, and test, build and deploy it there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.changed_components import find_affected, list_components
from deploy.gitops import set_image
from deploy.manifests import BIN_FOLDER as TOOLS
from deploy.manifests import check_references

ROOT = Path(__file__).parents[1]
COPIED_PATHS = (
    *("nbs", "hm_reco", "runner", "reports", "deploy", "config", "tests", "docs"),
    *("pyproject.toml", "settings.ini", "Makefile"),
)
BIN = Path(sys.executable).parent
KUBECTL = TOOLS / "kubectl"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project."""
    root = tmp_path_factory.mktemp("clone")
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in COPIED_PATHS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, root / name)
    for path in (*ROOT.glob("*.md"), ROOT / "LICENSE"):
        shutil.copy(path, root / path.name)
    return root


def run_installed(root: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Call an installed command with the copy's code."""
    return subprocess.run(
        [str(BIN / name), *args],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        text=True,
        capture_output=True,
        check=False,
    )


def test_new_stage_passes_its_tests_and_layout_rules(clone: Path):
    created = run_installed(clone, "hm", "new-stage", "price_watch")
    assert created.returncode == 0, created.stderr
    assert (clone / "nbs/stages/60_price_watch.ipynb").is_file()
    assert "price_watch:" in (clone / "runner/pipeline.yaml").read_text()
    assert (clone / "hm_reco/stages/price_watch.py").is_file()
    test_result = run_installed(
        clone, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_price_watch.py"
    )
    assert test_result.returncode == 0, test_result.stdout
    layout_result = run_installed(
        clone, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layout.py"
    )
    assert layout_result.returncode == 0, layout_result.stdout
    for ruff_args in (["check"], ["format", "--check"]):
        assert run_installed(clone, "ruff", *ruff_args, "nbs", "tests").returncode == 0
    plan_result = run_installed(clone, "hm", "plan", "price_watch")
    assert "it never ran here" in plan_result.stdout


def test_new_component_is_detected_built_and_deployed(clone: Path):
    """Needs the test above: detection, image, registry, Argo workflow, overlays."""
    notebook = "nbs/stages/60_price_watch.ipynb"
    assert list_components(clone)["price_watch"] == clone / notebook
    assert find_affected([notebook], clone) == ["price_watch"]
    assert find_affected(["nbs/lake/01_storage.ipynb"], clone)[-1] == "price_watch"
    assert find_affected(["nbs/ranking/08_ranker.ipynb"], clone) == ["training", "inference"]

    subprocess.run(["git", "init", "--quiet", str(clone)], check=True)
    commit_args = (
        "-c",
        "user.name=me",
        "-c",
        "user.email=me@here",
        "commit",
        "--quiet",
        "--allow-empty",
    )
    subprocess.run(["git", "-C", str(clone), *commit_args, "--message=first"], check=True)
    make_command = [
        "make",
        "-n",
        "build-component",
        "COMPONENT=price_watch",
        f"PYTHON={sys.executable}",
    ]
    make_output = subprocess.run(
        make_command, cwd=clone, check=True, capture_output=True, text=True
    ).stdout
    assert "--target stage" in make_output
    assert re.search(r"--tag ml-fashion-recommender/price_watch:\w+-[0-9a-f]{40} ", make_output)
    detection = run_installed(clone, "python", "-m", "deploy.changed_components", "--base", "")
    assert json.loads(detection.stdout)[-1] == "price_watch"  # as deploy/aws makes repositories

    manifest = (clone / "deploy/pipeline/base/workflow.yaml").read_text()
    assert run_installed(clone, "hm", "manifests", "argo").stdout == manifest
    templates = next(yaml.safe_load_all(manifest))["spec"]["templates"]
    template = next(item for item in templates if item["name"] == "price-watch")
    assert template["container"]["image"] == "ml-fashion-recommender/price_watch"
    assert "weeks={{workflow.parameters.price-watch-weeks}}" in template["container"]["args"]


@pytest.mark.skipif(not KUBECTL.exists(), reason="make check-delivery brings kubectl")
def test_overlay_without_new_image_is_reported(clone: Path):
    assert set(check_references(clone)) == {
        f"deploy/pipeline/overlays/{overlay}: image ml-fashion-recommender/price_watch has no "
        "digest; name it in the overlay's images"
        for overlay in ("production", "staging")
    }
    for overlay in ("production", "staging"):
        file = clone / "deploy/pipeline/overlays" / overlay / "kustomization.yaml"
        name = "ml-fashion-recommender/price_watch"
        set_image(file, name, f"registry.example.com/{name}", "sha256:" + "a" * 64)
    assert list(check_references(clone)) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("training", "it exists already"),
        ("Price-Watch", "expected lower-case letters"),
        ("class", "expected lower-case letters"),
        ("../x", "expected lower-case letters"),
    ],
)
def test_invalid_stage_name_is_rejected(clone: Path, name: str, message: str):
    before = (clone / "runner/pipeline.yaml").read_bytes()
    result = run_installed(clone, "hm", "new-stage", name)
    assert result.returncode == 1 and message in " ".join(result.stderr.split())
    assert (clone / "runner/pipeline.yaml").read_bytes() == before


def test_unknown_upstream_stage_is_rejected(clone: Path):
    result = run_installed(clone, "hm", "new-stage", "late", "--after", "trainig")
    assert result.returncode == 1 and "did you mean 'training'" in result.stderr
    assert not list((clone / "nbs/stages").glob("*_late.ipynb"))
