"""Each delivery check passes on the repository and fails on a planted fault."""

import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.check import BIN_FOLDER, CHECKS, ROOT, main, run_check

pytestmark = pytest.mark.skipif(
    not BIN_FOLDER.is_dir(), reason="make check-delivery installs the tools"
)
TOKEN = "AKIA" + "QYLPMN5HHHFPZAM2"  # invented; split to hide it from the secrets check

# check: file, text to replace (empty: append), replacement, word in the finding
FAULTS = {
    "schema": (".github/workflows/ci.yml", "timeout-minutes: 5", "timeout-minuts: 5", "minuts"),
    "actionlint": (
        ".github/workflows/ci.yml",
        "needs.changed.outputs.components != '[]'",
        "needs.changd.outputs.components != '[]'",
        "changd",
    ),
    "zizmor": (
        ".github/workflows/ci.yml",
        "actions/setup-python@a26af69be951a213d495a4c3e4e4022e16d87065",
        "actions/setup-python@v5",
        "unpinned-uses",
    ),
    "hadolint": ("Dockerfile", "WORKDIR /app", "WORKDIR app", "DL3000"),
    "bandit": (
        "deploy/champion_summary.py",
        "",
        "\nexec(input())\nimport pickle\npickle.loads(b'')\n",
        "B301",
    ),
    "kubernetes": (
        "deploy/api/base/deployment.yaml",
        "terminationGracePeriodSeconds",
        "terminationGraceSeconds",
        "terminationGraceSeconds",
    ),
    "argo": (
        "deploy/pipeline/base/workflow.yaml",
        "retryPolicy: Always",
        "retryPolice: Always",
        "retryPolice",
    ),
    "ray": (
        "deploy/ray/base/rayjob.yaml",
        "shutdownAfterJobFinishes",
        "shutdownAfterJobFinish",
        "spec.shutdownAfterJobFinish is not known",
    ),
    "references": (
        "deploy/pipeline/base/workflow.yaml",
        "{{workflow.parameters.training-seed}}",
        "{{workflow.parameters.training-sead}}",
        "'workflow.parameters.training-sead' is not defined",
    ),
    "checkov": (
        "deploy/api/base/deployment.yaml",
        "readOnlyRootFilesystem: true",
        "readOnlyRootFilesystem: false",
        "CKV_K8S_22",
    ),
    "act": (
        ".github/workflows/ci.yml",
        'test "$DETECTION" = success',
        "true",
        "the gate passed after a failed detection",
    ),
    "secrets": ("deploy/champion_summary.py", "", f'\nKEY = "{TOKEN}"\n', "AWS Access Key"),
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with every file that is checked."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    file_names = subprocess.run(
        [*command, "--exclude-standard"], check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in (name for name in file_names if (ROOT / name).is_file()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    return tmp_path


def test_each_check_has_fault_case():
    assert FAULTS.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_check_with_planted_fault_fails(checkout: Path, name: str, capsys):
    clean_result = run_check(name, checkout)
    assert clean_result.returncode == 0, clean_result.stdout + clean_result.stderr
    file, old, new, expected = FAULTS[name]
    text = (checkout / file).read_text()
    assert old in text
    (checkout / file).write_text(text.replace(old, new, 1) if old else text + new)
    assert main([name, "--root", str(checkout)]) == 1
    output = capsys.readouterr().out
    assert "FAILED" in output and expected in output
