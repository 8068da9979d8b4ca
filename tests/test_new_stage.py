"""A stage is begun in a copy of the project, and goes the whole way there."""

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
PARTS = (
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
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, root / name)
    for path in (*ROOT.glob("*.md"), ROOT / "LICENSE"):
        shutil.copy(path, root / path.name)
    return root


def call(root: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Call an installed command with the copy's code."""
    return subprocess.run(
        [str(BIN / name), *words],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        text=True,
        capture_output=True,
        check=False,
    )


def test_a_new_stage_runs_and_keeps_the_rules(clone: Path):
    begun = call(clone, "hm", "new-stage", "price_watch")
    assert begun.returncode == 0, begun.stderr
    assert (clone / "nbs/stages/60_price_watch.ipynb").is_file()
    assert "price_watch:" in (clone / "runner/pipeline.yaml").read_text()
    assert (clone / "hm_reco/stages/price_watch.py").is_file()
    tested = call(clone, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_price_watch.py")
    assert tested.returncode == 0, tested.stdout
    rules = call(clone, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layout.py")
    assert rules.returncode == 0, rules.stdout
    for check in (["check"], ["format", "--check"]):
        assert call(clone, "ruff", *check, "nbs", "tests").returncode == 0
    planned = call(clone, "hm", "plan", "price_watch")
    assert "it never ran here" in planned.stdout


def test_a_new_component_goes_the_whole_way(clone: Path):
    """After the test above: detection, image, registry, workflow of Argo, overlays."""
    notebook = "nbs/stages/60_price_watch.ipynb"
    assert list_components(clone)["price_watch"] == clone / notebook
    assert find_affected([notebook], clone) == ["price_watch"]
    assert find_affected(["nbs/lake/01_storage.ipynb"], clone)[-1] == "price_watch"
    assert find_affected(["nbs/ranking/03_ranker.ipynb"], clone) == ["training", "inference"]

    subprocess.run(["git", "init", "--quiet", str(clone)], check=True)
    me = ("-c", "user.name=me", "-c", "user.email=me@here", "commit", "--quiet", "--allow-empty")
    subprocess.run(["git", "-C", str(clone), *me, "--message=first"], check=True)
    making = ["make", "-n", "build-component", "COMPONENT=price_watch", f"PYTHON={sys.executable}"]
    built = subprocess.run(making, cwd=clone, check=True, capture_output=True, text=True).stdout
    assert "--target stage" in built
    assert re.search(r"--tag ml-fashion-recommender/price_watch:\w+-[0-9a-f]{40} ", built)
    listed = call(clone, "python", "-m", "deploy.changed_components", "--base", "")
    assert json.loads(listed.stdout)[-1] == "price_watch"  # as deploy/aws makes repositories

    manifest = (clone / "deploy/pipeline/base/workflow.yaml").read_text()
    assert call(clone, "hm", "manifests", "argo").stdout == manifest
    templates = next(yaml.safe_load_all(manifest))["spec"]["templates"]
    template = next(one for one in templates if one["name"] == "price-watch")
    assert template["container"]["image"] == "ml-fashion-recommender/price_watch"
    assert "weeks={{workflow.parameters.price-watch-weeks}}" in template["container"]["args"]


@pytest.mark.skipif(not KUBECTL.exists(), reason="make check-delivery brings kubectl")
def test_an_overlay_without_the_new_image_is_a_fault(clone: Path):
    assert set(check_references(clone)) == {
        f"deploy/pipeline/overlays/{where}: image ml-fashion-recommender/price_watch has no "
        "digest; name it in the overlay's images"
        for where in ("production", "staging")
    }
    for where in ("production", "staging"):
        file = clone / "deploy/pipeline/overlays" / where / "kustomization.yaml"
        name = "ml-fashion-recommender/price_watch"
        set_image(file, name, f"registry.example.com/{name}", "sha256:" + "a" * 64)
    assert list(check_references(clone)) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("training", "it is taken"),
        ("Price-Watch", "expected small letters"),
        ("class", "expected small letters"),
        ("../x", "expected small letters"),
    ],
)
def test_a_name_that_cannot_be_a_stage_is_refused(clone: Path, name: str, message: str):
    before = (clone / "runner/pipeline.yaml").read_bytes()
    refused = call(clone, "hm", "new-stage", name)
    assert refused.returncode == 1 and message in " ".join(refused.stderr.split())
    assert (clone / "runner/pipeline.yaml").read_bytes() == before


def test_an_unknown_stage_before_it_is_refused(clone: Path):
    refused = call(clone, "hm", "new-stage", "late", "--after", "trainig")
    assert refused.returncode == 1 and "did you mean 'training'" in refused.stderr
    assert not list((clone / "nbs/stages").glob("*_late.ipynb"))
